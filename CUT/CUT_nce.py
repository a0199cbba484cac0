"""The contrast of CUT (Park et al. 2020, https://arxiv.org/abs/2007.15651): patches of the output's
features against patches of the input's. InfoNCE is the paper's loss; --nce, --query and --src-ratio
select later variants.

    python CUT/train.py --nce hdce --NCE-ratio 0.1 --NCE-ratio-id 0.1 --src-ratio 0.05
    python -m pytest tests/test_nce.py                    # compares all of them with numpy
"""

import math

import torch
from torch import nn
from torch.nn.functional import cross_entropy, normalize


def patch_nce(H, queries, keys, args):
    """Eq. 3 as means over taps and patches: each patch of the output against all of the input.

    queries, keys: lists over taps of features (N, C, h, w). Returns two scalars: the NCE, and the
    semantic relation loss (0.0 without --src-ratio).
    """
    contrast = {"infonce": infonce, "ence": ence, "hdce": hdce}[args.nce]
    nce, relations = [], []
    for tap, (query, key) in enumerate(zip(queries, keys, strict=True)):
        # QS-Attn: attention selects patches at the last two taps; at the others they are random.
        attends = args.query == "attention" and tap >= len(keys) - 2
        choose = attention_patches if attends else random_patches
        places = choose(key.detach(), args.num_patches)  # the same in query and key
        q, k = H(tap, take_patches(query, places)), H(tap, take_patches(key, places))
        k = k.detach() if args.detach else k
        nce.append(contrast(q, k, args.tau).mean())
        if args.src_ratio > 0:
            relations.append(semantic_relation(q, k.detach()).mean())
    # Paper: sums over layers and patches. Authors' code: means. Here: means, because published
    # results come from that code.
    return sum(nce) / len(nce), sum(relations) / len(keys)


class ProjectionHeads(nn.Module):
    """H: a small network for each tap, from the features at one position to a unit vector."""

    def __init__(self, channels, width=256):
        super().__init__()
        self.heads = nn.ModuleList(
            nn.Sequential(nn.Linear(c, width), nn.ReLU(), nn.Linear(width, width)) for c in channels
        )

    def forward(self, tap, patches):
        """tap: its index; patches: (N, S, C). Returns unit vectors, (N, S, width)."""
        # Authors' code: divides by |z| + 1e-7. Here: by max(|z|, 1e-12), torch's normalize; at the
        # small initial weights of H this changes the NCE of the first step by 0.2 %.
        return normalize(self.heads[tap](patches).float(), dim=2)


def random_patches(feature, num_patches):
    """Random positions (S,), S = min(num_patches, H * W), all different. feature: (N, C, H, W)."""
    return torch.randperm(feature[0, 0].numel(), device=feature.device)[:num_patches]


def attention_patches(feature, num_patches):
    """The rows of feature's self-attention with the lowest entropy: (N, S, H * W), sums of 1.

    QS-Attn (Hu et al. 2022, https://arxiv.org/abs/2203.08483): positions that attend to few others
    say most about the image. feature: (N, C, H, W) of the input, detached.
    """
    vectors = feature.float().flatten(2).transpose(1, 2)  # (N, H * W, C)
    log_attention = (vectors @ vectors.transpose(1, 2)).log_softmax(2)  # (N, H * W, H * W)
    attention = log_attention.exp()
    entropy = -(attention * log_attention).sum(2)  # (N, H * W)
    rows = entropy.topk(min(num_patches, entropy.shape[1]), largest=False).indices  # (N, S)
    return attention.gather(1, rows[:, :, None].expand(-1, -1, attention.shape[2]))


def take_patches(feature, where):
    """Patches (N, S, C) of feature (N, C, H, W).

    where: positions (S,), or weights of all positions for each patch, (N, S, H * W).
    """
    # Not feature.permute(0, 2, 3, 1) or where @ vectors.transpose(1, 2): their gradients have
    # channels-last strides, for which torch's instance norm is wrong on CPUs when N = 1.
    vectors = feature.flatten(2)  # (N, C, H * W)
    if where.dim() == 1:
        return vectors.index_select(2, where).transpose(1, 2)
    return (vectors @ where.to(vectors.dtype).transpose(1, 2)).transpose(1, 2)


def infonce(q, k, tau):
    """PatchNCE, Eq. 2: which key belongs to query i, among the S of the same image?

    l_i = -log( exp(q_i k_i / tau) / sum_j exp(q_i k_j / tau) ). q, k: (N, S, C), unit vectors.
    Returns (N, S).
    """
    logits = q @ k.transpose(1, 2) / tau  # (N, S, S): query i against key j
    target = torch.arange(q.shape[1], device=q.device).expand(q.shape[:2])  # (N, S): key i for i
    return cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").view_as(target)


def ence(q, k, tau):
    """The exponential NCE of Liu et al. 2021, https://arxiv.org/abs/2110.11271, for patches.

    With s_ij = q_i k_j / tau, A = mean_i exp(-s_ii / 2) and B = mean_{i != j} exp(s_ij / 2), the
    loss is (log A + log B) / 2: the minimum over c of log((A e^{c/2} + B e^{-c/2}) / 2), where c is
    a free normalizing constant. The paper is about binary NCE of densities, where this loss keeps
    its slope when the noise is far from the data. Its use for patches is this repository's.
    q, k: (N, S, C), unit vectors, S > 1. Returns (N,).
    """
    s = q @ k.transpose(1, 2) / tau  # (N, S, S)
    positives = s.diagonal(dim1=1, dim2=2)  # (N, S)
    others = s.masked_fill(torch.eye(s.shape[1], dtype=torch.bool, device=s.device), -math.inf)
    log_A = (-positives / 2).logsumexp(1) - math.log(positives.shape[1])
    log_B = (others / 2).logsumexp((1, 2)) - math.log(s.shape[1] * (s.shape[1] - 1))
    return (log_A + log_B) / 2


def hdce(q, k, tau, gamma=1.0):
    """The decoupled NCE with hard negatives of Jung et al. 2022, https://arxiv.org/abs/2203.01532.

    l_i = log sum_{j != i} exp((w_ij q_i k_j - q_i k_i) / tau), where w_ij, at most 1, grows with
    exp(k_i k_j / gamma): negatives similar to i weigh more. q, k: (N, S, C), unit vectors, S > 1.
    Returns (N, S).
    """
    # Authors' code: gamma is 1, or falls from 50 to 10 in an optional curriculum. Here: 1, because
    # with unit vectors and gamma = 10 all w are between 0.8 and 1.
    itself = torch.eye(q.shape[1], dtype=torch.bool, device=q.device)
    relation = (k @ k.transpose(1, 2) / gamma).masked_fill(itself, -math.inf).softmax(2)
    w = (relation / relation.amax(2, keepdim=True)).detach()  # (N, S, S)
    s = w * (q @ k.transpose(1, 2)) - (q * k).sum(2, keepdim=True)  # (N, S, S)
    return (s / tau).masked_fill(itself, -math.inf).logsumexp(2)


def semantic_relation(q, k):
    """Semantic relation consistency (Jung et al. 2022): equal relations of patches in both images.

    The Jensen-Shannon divergence of softmax_j(q_i q_j) and softmax_j(k_i k_j), summed over i.
    q, k: (N, S, C), unit vectors. Returns (N,).
    """
    log_p, log_r = ((z @ z.transpose(1, 2)).log_softmax(2) for z in (q, k))  # (N, S, S)
    p, r = log_p.exp(), log_r.exp()
    log_m = ((p + r) / 2).log()
    return ((p * (log_p - log_m) + r * (log_r - log_m)) / 2).sum((1, 2))

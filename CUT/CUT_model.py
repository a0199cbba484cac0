"""The networks of CUT (Park et al. 2020, https://arxiv.org/abs/2007.15651), its contrastive loss
and the variants that --nce, --query and --src-ratio choose.

    python CUT/train.py --data-folder facades_unpaired      # trains them
    python -m pytest tests/test_CUT_model.py                # against numpy and the authors' numbers
"""

import math

import torch
from torch import nn
from torch.nn.functional import conv2d, conv_transpose2d, cross_entropy, normalize, pad


class BlurPool(nn.Module):
    """Halves H and W after a blur of [1, 2, 1] / 4 each way, against aliasing (Zhang 2019,
    https://arxiv.org/abs/1904.11486). (N, C, H, W) -> (N, C, ceil(H / 2), ceil(W / 2)).

    The blurs compute in fp32 under bf16 autocast too: exact, and 2 to 3 times faster on CPUs.
    """

    def __init__(self):
        super().__init__()
        filter = torch.tensor([1.0, 2.0, 1.0]) / 4
        self.register_buffer("filter", torch.outer(filter, filter)[None, None], persistent=False)

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            filter = self.filter.expand(x.shape[1], 1, 3, 3)
            padded = pad(x, (1, 1, 1, 1), mode="reflect").to(filter.dtype)
            return conv2d(padded, filter, stride=2, groups=x.shape[1]).to(x.dtype)


class BlurUpsample(nn.Module):
    """Doubles H and W: zeros in between, then a blur of [1, 3, 3, 1] / 4 each way (Zhang 2019).
    (N, C, H, W) -> (N, C, 2 H, 2 W)."""

    def __init__(self):
        super().__init__()
        filter = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 4
        self.register_buffer("filter", torch.outer(filter, filter)[None, None], persistent=False)

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            filter = self.filter.expand(x.shape[1], 1, 4, 4)
            padded = pad(x, (1, 1, 1, 1), mode="replicate").to(filter.dtype)
            doubled = conv_transpose2d(padded, filter, stride=2, padding=3, groups=x.shape[1])
            return doubled.to(x.dtype)


class ReflectionPad(nn.ReflectionPad2d):
    """Pads by mirroring, in the dtype at hand: autocast on CPUs would have it in fp32, and keep
    that copy for the backward pass."""

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x)


def norm_relu(channels):
    """Instance norm, without scale and shift, and ReLU. It makes a bias before it pointless."""
    return [nn.InstanceNorm2d(channels), nn.ReLU()]


class ResnetBlock(nn.Module):
    """R256: x plus two 3x3 convolutions of it."""

    def __init__(self, channels):
        super().__init__()
        self.layers = nn.Sequential(
            *[ReflectionPad(1), nn.Conv2d(channels, channels, 3, bias=False)],
            *norm_relu(channels),
            *[ReflectionPad(1), nn.Conv2d(channels, channels, 3, bias=False)],
            nn.InstanceNorm2d(channels),
        )

    def forward(self, x):
        return x + self.layers(x)  # (N, channels, H, W)


def down(channels, antialias):
    """d: a 3x3 convolution from channels to twice as many, at half the size."""
    if antialias:
        layers = [nn.Conv2d(channels, 2 * channels, 3, 1, 1, bias=False)]
        return nn.Sequential(*layers, *norm_relu(2 * channels), BlurPool())
    return nn.Sequential(
        nn.Conv2d(channels, 2 * channels, 3, 2, 1, bias=False), *norm_relu(2 * channels)
    )


def up(channels, antialias):
    """u: a 3x3 convolution from channels to half as many, at twice the size."""
    half = channels // 2
    if antialias:
        layers = [BlurUpsample(), nn.Conv2d(channels, half, 3, 1, 1, bias=False)]
    else:
        layers = [nn.ConvTranspose2d(channels, half, 3, 2, 1, output_padding=1, bias=False)]
    return nn.Sequential(*layers, *norm_relu(half))


# Differs from cycleGAN/cycleGAN_model.py: it can also give the features of its layers
class ResnetGenerator(nn.Module):
    """G: X -> Y: c7s1-64, d128, d256, n_layers times R256, u128, u64, c7s1-3.

    The layers keep the paper's names, which give the widths at ngf = 64, at any ngf.
    """

    def __init__(self, n_layers=9, ngf=64, antialias=False):
        super().__init__()
        first = [ReflectionPad(3), nn.Conv2d(3, ngf, 7, bias=False), *norm_relu(ngf)]
        layers = {"c7s1_64": nn.Sequential(*first)}
        layers["d128"] = down(ngf, antialias)
        layers["d256"] = down(2 * ngf, antialias)
        for k in range(1, n_layers + 1):
            layers[f"R256_{k}"] = ResnetBlock(4 * ngf)
        layers["u128"] = up(4 * ngf, antialias)
        layers["u64"] = up(2 * ngf, antialias)
        layers["c7s1_3"] = nn.Sequential(ReflectionPad(3), nn.Conv2d(ngf, 3, 7))
        self.layers = nn.ModuleDict(layers)

    def forward(self, x, taps=(), encode_only=False):
        """x: (N, 3, H, W) in [-1, 1], H and W multiples of 4. Returns the same: the picture.

        With taps, names of layers ("pix": x itself), it returns the picture and the list of their
        outputs, each (N, C, h, w); with encode_only that list alone, stopping after the last tap.
        """
        # Authors' code: taps are numbers of modules, which mean other layers without anti-aliasing,
        # mostly convolutions before their norm. Here: the outputs of the layers that have the name.
        features = {"pix": x}
        for name, layer in self.layers.items():
            if encode_only and all(tap in features for tap in taps):
                break
            x = layer(x)
            if name in taps:  # keeping the others would cost memory
                features[name] = x
        features = [features[tap] for tap in taps]
        if encode_only:
            return features
        image = torch.tanh(x.float())  # (N, 3, H, W)
        return (image, features) if taps else image


def tap_channels(taps, n_layers=9, ngf=64):
    """The number of channels at each tap of a ResnetGenerator. KeyError where there is no such."""
    channels = {"pix": 3, "c7s1_64": ngf, "d128": 2 * ngf, "d256": 4 * ngf}
    channels.update({f"R256_{k}": 4 * ngf for k in range(1, n_layers + 1)})
    return [channels[tap] for tap in taps]


# Differs from pix2pix/pix2pix_model.py: it sees one picture, not a pair; instance norm; antialias
class PatchDiscriminator(nn.Module):
    """D: X -> a number for each 70x70 patch, 1 for real. C64-C128-C256-C512, then 1 channel."""

    def __init__(self, ndf=64, antialias=False):
        super().__init__()
        stride, blur = (1, [BlurPool()]) if antialias else (2, [])
        layers = [nn.Conv2d(3, ndf, 4, stride, 1), nn.LeakyReLU(0.2), *blur]
        for width in (ndf, 2 * ndf):
            layers += [nn.Conv2d(width, 2 * width, 4, stride, 1, bias=False)]
            layers += [nn.InstanceNorm2d(2 * width), nn.LeakyReLU(0.2), *blur]
        layers += [nn.Conv2d(4 * ndf, 8 * ndf, 4, 1, 1, bias=False)]
        layers += [nn.InstanceNorm2d(8 * ndf), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(8 * ndf, 1, 4, 1, 1))

    def forward(self, x):
        """x: (N, 3, H, W) in [-1, 1]. Returns (N, 1, H / 8 - 2, W / 8 - 2)."""
        return self.layers(x).float()


class ImageBuffer:
    """The last `size` generated pictures, for D to learn from (section 4; Shrivastava et al. 2017).

    buffer(images): for each picture, with probability 1/2, one from the buffer, whose place it
    takes; otherwise the picture itself. (N, 3, H, W) -> (N, 3, H, W). Until it is full it takes in
    every picture and gives it back; of size 0 it gives back all.
    """

    def __init__(self, size):
        self.size, self.images = size, []

    def __call__(self, images):
        given = []
        for image in images.detach():
            if len(self.images) < self.size:
                self.images.append(image.clone())
            elif self.size and torch.rand(()) < 0.5:
                place = int(torch.randint(self.size, ()))
                image, self.images[place] = self.images[place].to(image), image.clone()
            given.append(image)
        return torch.stack(given)

    def state_dict(self):
        return {"images": [image.clone() for image in self.images]}

    def load_state_dict(self, state):
        self.images = list(state["images"])


# ------------------------------------------------------------------------ the contrastive part


class ProjectionHeads(nn.Module):
    """H: one small network for each tap, from features at single positions to unit vectors."""

    def __init__(self, channels, width=256):
        super().__init__()
        self.heads = nn.ModuleList(
            nn.Sequential(nn.Linear(c, width), nn.ReLU(), nn.Linear(width, width)) for c in channels
        )

    def forward(self, tap, patches):
        """tap: its number; patches: (N, S, C). Returns (N, S, width), each vector of length 1."""
        return normalize(self.heads[tap](patches).float(), dim=2)


def random_patches(feature, num_patches):
    """Positions to compare, at random: (S,), S = min(num_patches, H * W). feature: (N, C, H, W)."""
    return torch.randperm(feature[0, 0].numel(), device=feature.device)[:num_patches]


def attention_patches(feature, num_patches):
    """The rows of feature's self-attention with the lowest entropy: (N, S, H * W), sums of 1.

    QS-Attn (Hu et al. 2022, https://arxiv.org/abs/2203.08483): positions that attend to few others
    say the most about the picture. feature: (N, C, H, W), of the source picture; it is detached.
    """
    vectors = feature.float().flatten(2).transpose(1, 2)  # (N, H * W, C)
    log_attention = (vectors @ vectors.transpose(1, 2)).log_softmax(2)  # (N, H * W, H * W)
    attention = log_attention.exp()
    entropy = -(attention * log_attention).sum(2)  # (N, H * W)
    rows = entropy.topk(min(num_patches, entropy.shape[1]), largest=False).indices  # (N, S)
    return attention.gather(1, rows[:, :, None].expand(-1, -1, attention.shape[2]))


def take_patches(feature, where):
    """(N, S, C) from feature (N, C, H, W): at positions (S,), or mixed by rows (N, S, H * W)."""
    vectors = feature.flatten(2)  # (N, C, H * W)
    if where.dim() == 1:
        return vectors[:, :, where].transpose(1, 2)
    return where.to(vectors.dtype) @ vectors.transpose(1, 2)


def infonce(q, k, tau):
    """PatchNCE, Eq. 2: which key belongs to query i, among the S of the same picture?

    l_i = -log( exp(q_i k_i / tau) / sum_j exp(q_i k_j / tau) ). q, k: (N, S, C), unit vectors.
    Returns (N, S).
    """
    logits = q @ k.transpose(1, 2) / tau  # (N, S, S): query i against key j
    right = torch.arange(q.shape[1], device=q.device).expand(q.shape[:2])  # (N, S): i's is key i
    return cross_entropy(logits.flatten(0, 1), right.flatten(), reduction="none").view_as(right)


def ence(q, k, tau):
    """The exponential NCE of Liu et al. 2021, https://arxiv.org/abs/2110.11271, carried to patches.

    With s_ij = q_i k_j / tau: A = mean_i exp(-s_ii / 2), B = mean_{i != j} exp(s_ij / 2), and the
    loss is (log A + log B) / 2, the least over c of log((A e^{c/2} + B e^{-c/2}) / 2) with a free
    normalising constant c. The paper is about binary NCE of densities: it shows that there the
    exponential loss keeps its slope where the noise is far from the data, with normalised gradient
    descent. It does not speak of patches or pictures. q, k: (N, S, C), S > 1. Returns (N,).
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
    exp(k_i k_j / gamma): negatives that mean the same as i weigh more. q, k: (N, S, C), S > 1.
    Returns (N, S).
    """
    # Authors' code: gamma is 1 unless a curriculum, 50 down to 10, is asked for. Here: 1, because
    # with unit vectors 10 leaves w between 0.8 and 1.
    itself = torch.eye(q.shape[1], dtype=torch.bool, device=q.device)
    relation = (k @ k.transpose(1, 2) / gamma).masked_fill(itself, -math.inf).softmax(2)
    w = (relation / relation.amax(2, keepdim=True)).detach()  # (N, S, S)
    s = w * (q @ k.transpose(1, 2)) - (q * k).sum(2, keepdim=True)  # (N, S, S)
    return (s / tau).masked_fill(itself, -math.inf).logsumexp(2)


def semantic_relation(q, k):
    """Semantic relation consistency (Jung et al. 2022): patches relate alike in both pictures.

    The Jensen-Shannon divergence of softmax_j(q_i q_j) and softmax_j(k_i k_j), summed over i.
    q, k: (N, S, C), unit vectors. Returns (N,).
    """
    log_p, log_r = ((z @ z.transpose(1, 2)).log_softmax(2) for z in (q, k))  # (N, S, S)
    p, r = log_p.exp(), log_r.exp()
    log_m = ((p + r) / 2).log()
    return ((p * (log_p - log_m) + r * (log_r - log_m)) / 2).sum((1, 2))


# Differs from pix2pix/pix2pix_model.py: Xavier's width, linear layers, no batch norm
# Differs from cycleGAN/cycleGAN_model.py: Xavier's width, linear layers, no batch norm
def initialize_weights(net):
    """Returns net with Xavier-normal weights of gain 0.02, as the authors have it, biases 0."""
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            nn.init.xavier_normal_(layer.weight, gain=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return net

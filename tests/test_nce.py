"""CUT's contrast: patches, heads and every loss, with its gradient, against numpy loops."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import normalize

from conftest import METHODS, ROOT, noise, parse, small_nets, spy

if "CUT" not in METHODS:
    pytest.skip("there is no CUT folder", allow_module_level=True)

import CUT_nce
from CUT_nce import ProjectionHeads, infonce, patch_nce, semantic_relation

TAPS = ["pix", "d128", "d256", "R256_1", "R256_2"]
FEW = ["CUT", "--num-patches", "16"]


def unit_vectors(seed, *shape):
    """(..., C) in float64, each vector of length 1."""
    return normalize(torch.from_numpy(np.random.RandomState(seed).randn(*shape)), dim=-1)


def slopes(function, array, step=1e-6):
    """The gradient of a function of a float64 array by central differences."""
    gradient = np.zeros_like(array)
    for index in np.ndindex(array.shape):
        moved = [array.copy(), array.copy()]
        moved[0][index] += step
        moved[1][index] -= step
        gradient[index] = (function(moved[0]) - function(moved[1])) / (2 * step)
    return gradient


def test_heads_return_unit_vectors_and_each_tap_has_its_own():
    torch.manual_seed(0)
    H = ProjectionHeads([3, 8, 8], width=16).double()
    patches = {3: torch.randn(2, 5, 3), 8: torch.randn(2, 5, 8)}
    outputs = [H(tap, patches[c].double()) for tap, c in enumerate((3, 8, 8))]
    assert not torch.allclose(outputs[1], outputs[2])
    first, _, second = H.heads[1]
    weights = [p.detach().numpy() for p in (first.weight, first.bias, second.weight, second.bias)]
    hidden = np.maximum(patches[8].double().numpy() @ weights[0].T + weights[1], 0)
    expected = hidden @ weights[2].T + weights[3]
    expected /= np.linalg.norm(expected, axis=2, keepdims=True)
    np.testing.assert_allclose(outputs[1].detach().numpy(), expected, rtol=1e-5, atol=1e-6)
    assert outputs[0].shape == (2, 5, 16) and outputs[0].dtype == torch.float32
    assert ProjectionHeads([3])(0, patches[3]).shape[2] == 256
    # Two linear layers, with biases, for each of the default taps.
    H = ProjectionHeads([3, 128, 256, 256, 256])
    assert sum(p.numel() for p in H.parameters()) == 560_384


def test_random_patches_are_distinct_uniform_and_at_most_all():
    torch.manual_seed(0)
    feature, counts = torch.zeros(2, 3, 4, 6), torch.zeros(24)
    for _ in range(400):
        where = CUT_nce.random_patches(feature, 5)
        assert where.shape == (5,) and len(set(where.tolist())) == 5
        counts[where] += 1
    mean = 400 * 5 / 24
    assert (abs(counts - mean) < 5 * mean**0.5).all()
    assert sorted(CUT_nce.random_patches(feature, 100).tolist()) == list(range(24))


@pytest.mark.parametrize("num_patches, rows", [(4, 4), (100, 12)])
def test_attention_patches_are_the_rows_of_lowest_entropy(num_patches, rows):
    feature = noise(2, 5, 3, 4) * 1.5
    found = CUT_nce.attention_patches(feature, num_patches)
    assert found.shape == (2, rows, 12)
    for n in range(2):
        vectors = feature[n].flatten(1).T.numpy()  # (12, 5)
        attention = np.exp(vectors @ vectors.T)
        attention /= attention.sum(1, keepdims=True)
        entropy = -(attention * np.log(attention)).sum(1)
        expected = attention[np.argsort(entropy)[:rows]]
        np.testing.assert_allclose(found[n].numpy(), expected, rtol=1e-4, atol=1e-6)


def test_attention_does_not_overflow():
    found = CUT_nce.attention_patches(torch.randn(1, 8, 4, 4) * 100, 3)
    torch.testing.assert_close(found.sum(2), torch.ones(1, 3))


def test_take_patches():
    feature, where = noise(2, 5, 3, 4), torch.tensor([11, 0, 6])
    found = CUT_nce.take_patches(feature, where)
    assert found.shape == (2, 3, 5)
    for n in range(2):
        for s, position in enumerate(where.tolist()):
            assert torch.equal(found[n, s], feature[n, :, position // 4, position % 4])
    rows = torch.rand(2, 3, 12, dtype=torch.float64)
    expected = np.einsum("nsp,ncp->nsc", rows.numpy(), feature.flatten(2).numpy())
    np.testing.assert_allclose(CUT_nce.take_patches(feature, rows).numpy(), expected, rtol=1e-12)


def numpy_infonce(q, k, tau):
    """(S,) for one image, exactly as in the paper."""
    logits = np.exp(q @ k.T / tau)
    return np.array([-np.log(logits[i, i] / logits[i].sum()) for i in range(len(q))])


def numpy_ence(q, k, tau):
    S = len(q)
    A = np.mean([np.exp(-q[i] @ k[i] / tau / 2) for i in range(S)])
    B = np.mean([np.exp(q[i] @ k[j] / tau / 2) for i in range(S) for j in range(S) if i != j])
    return (np.log(A) + np.log(B)) / 2


def numpy_hdce(q, k, tau, weigh=None):
    """weigh: the keys that the weights w are computed from, which are constants: k."""
    loss, weigh = np.zeros(len(q)), k if weigh is None else weigh
    for i in range(len(q)):
        others = [j for j in range(len(q)) if j != i]
        relation = {j: np.exp(weigh[i] @ weigh[j]) for j in others}
        w = {j: relation[j] / max(relation.values()) for j in others}
        loss[i] = np.log(sum(np.exp((w[j] * (q[i] @ k[j]) - q[i] @ k[i]) / tau) for j in others))
    return loss


def numpy_semantic_relation(q, k, _tau):
    def softmax(values):
        return np.exp(values) / np.exp(values).sum()

    loss = 0.0
    for i in range(len(q)):
        p, r = softmax(q @ q[i]), softmax(k @ k[i])
        m = (p + r) / 2
        loss += ((p * np.log(p / m)).sum() + (r * np.log(r / m)).sum()) / 2
    return loss


CONTRASTS = {
    "infonce": (infonce, numpy_infonce),
    "ence": (CUT_nce.ence, numpy_ence),
    "hdce": (CUT_nce.hdce, numpy_hdce),
    "semantic_relation": (lambda q, k, _: semantic_relation(q, k), numpy_semantic_relation),
}


@pytest.mark.parametrize("tau", [0.07, 0.5])
@pytest.mark.parametrize("name", CONTRASTS)
def test_a_contrast_equals_numpy_at_any_batch_size(name, tau):
    function, plain = CONTRASTS[name]
    q = unit_vectors(0, 3, 10, 8)
    k = normalize(q + unit_vectors(1, 3, 10, 8), dim=2)
    expected = np.stack([plain(q[n].numpy(), k[n].numpy(), tau) for n in range(3)])
    assert expected.std() > 1e-3
    found = function(q, k, tau)
    assert found.dtype == torch.float64 and found.shape == expected.shape
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-10, atol=1e-12)
    for n in range(3):
        alone = function(q[n : n + 1], k[n : n + 1], tau)
        np.testing.assert_allclose(alone.numpy(), expected[n : n + 1], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("side", ["queries", "keys"])
@pytest.mark.parametrize("name", CONTRASTS)
def test_the_gradient_of_a_contrast_equals_finite_differences(name, side):
    function, plain = CONTRASTS[name]
    q = unit_vectors(0, 1, 5, 3)
    k = normalize(q + unit_vectors(1, 1, 5, 3), dim=2)
    moved = (q if side == "queries" else k).requires_grad_()
    function(q, k, 0.2).sum().backward()
    q, k = q.detach()[0].numpy(), k.detach()[0].numpy()
    constant = {"weigh": k} if name == "hdce" else {}  # no gradient through its weights

    def loss(array):
        return plain(*((array, k) if side == "queries" else (q, array)), 0.2, **constant).sum()

    expected = slopes(loss, q if side == "queries" else k)
    np.testing.assert_allclose(moved.grad[0].numpy(), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", CONTRASTS)
def test_a_contrast_is_finite_in_float32(name):
    q = unit_vectors(0, 2, 6, 4).float().requires_grad_()
    loss = CONTRASTS[name][0](q, unit_vectors(1, 2, 6, 4).float(), 0.001).mean()  # logits of 1000
    loss.backward()
    assert loss.isfinite() and q.grad.isfinite().all() and q.grad.abs().max() > 0


@pytest.mark.parametrize("images, suffix", [(2, ""), (1, "_batch1")])
def test_infonce_equals_the_authors(images, suffix):
    r = np.random.RandomState(2000)
    q = r.randn(512, 256)
    k = r.randn(512, 256) * 0.5 + q * 0.5
    q, k = (normalize(torch.from_numpy(v), dim=1).view(images, -1, 256) for v in (q, k))
    saved = np.load(ROOT / "tests" / "parity" / "reference_outputs.npz")
    expected = saved[f"patchnce_loss_per_query{suffix}"]
    np.testing.assert_allclose(infonce(q, k, 0.07).flatten().numpy(), expected, rtol=1e-12)


def toy_H(_tap, patches):
    """No head at all: unit vectors of the features themselves. (N, S, C)."""
    return normalize(patches, dim=2)


def features(seed=0, sizes=((3, 8), (6, 4), (5, 4))):
    """A list over taps of features, (2, C, size, size), float64."""
    r = np.random.RandomState(seed)
    return [torch.from_numpy(r.randn(2, c, size, size)) for c, size in sizes]


@pytest.mark.parametrize("tau", ["0.07", "0.3"])
def test_patch_nce_is_the_mean_over_taps_images_and_patches(monkeypatch, tau):
    where = [torch.tensor([5, 63, 0, 17]), torch.tensor([1, 15, 7]), torch.tensor([2, 3])]
    chosen = iter(where)
    monkeypatch.setattr(CUT_nce, "random_patches", lambda _feature, _number: next(chosen))
    queries, keys = features(0), features(1)
    nce, relation = patch_nce(toy_H, queries, keys, parse(*FEW, "--tau", tau))
    means_of_taps = []
    for query, key, positions in zip(queries, keys, where, strict=True):
        pairs = [[f[n].flatten(1).T[positions].numpy() for f in (query, key)] for n in range(2)]
        units = [[v / np.linalg.norm(v, axis=1, keepdims=True) for v in pair] for pair in pairs]
        means_of_taps.append(np.mean([numpy_infonce(*pair, float(tau)) for pair in units]))
    assert nce.item() == pytest.approx(np.mean(means_of_taps), rel=1e-10)
    assert relation == 0


@pytest.mark.parametrize("nce", ["infonce", "ence", "hdce"])
def test_the_selected_contrast_and_relation_are_used(monkeypatch, nce):
    used = {name: spy(monkeypatch, CUT_nce, name) for name in CONTRASTS}
    args = parse(*FEW, "--nce", nce, "--tau", "0.2", "--src-ratio", "0.5")
    found = patch_nce(toy_H, features(0), features(1), args)
    names = (nce, "semantic_relation")
    assert {n: len(calls) for n, calls in used.items()} == {n: 3 * (n in names) for n in used}
    assert all(arguments[2] == 0.2 for arguments, _ in used[nce])
    for loss, name in zip(found, names, strict=True):
        assert loss.item() == pytest.approx(np.mean([out.mean().item() for _, out in used[name]]))
    for one, other in zip(*(used[name] for name in names), strict=True):  # of the same patches
        assert torch.equal(one[0][0], other[0][0]) and torch.equal(one[0][1], other[0][1])


@pytest.mark.parametrize("query", ["random", "attention"])
def test_query_and_key_come_from_the_same_positions(monkeypatch, query):
    """If both have the same features, q and k are equal."""
    same, calls = features(0), spy(monkeypatch, CUT_nce, "infonce")
    patch_nce(toy_H, same, same, parse(*FEW, "--query", query))
    assert len(calls) == 3 and all(torch.equal(q, k) for (q, k, _), _ in calls)


def test_attention_of_the_keys_selects_at_the_last_two_taps(monkeypatch):
    random = spy(monkeypatch, CUT_nce, "random_patches")
    attended = spy(monkeypatch, CUT_nce, "attention_patches")
    keys = [key.requires_grad_() for key in features(1)]
    args = parse(*FEW, "--query", "attention", "--num-patches", "7", "--no-detach")
    patch_nce(toy_H, features(0), keys, args)
    assert [arguments[0].shape[1] for arguments, _ in random] == [3]
    for (arguments, _), key in zip(attended, keys[1:], strict=True):
        assert torch.equal(arguments[0], key)
    assert all(not rows.requires_grad and rows.shape == (2, 7, 16) for _, rows in attended)


@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("query", ["random", "attention"])
@pytest.mark.parametrize("nce", ["infonce", "ence", "hdce"])
def test_keys_are_detached_unless_no_detach(monkeypatch, nce, query, detach):
    """From the encoder and from the heads; those of the semantic relation always."""
    calls = spy(monkeypatch, CUT_nce, nce)
    relations = spy(monkeypatch, CUT_nce, "semantic_relation")
    switch = "--detach" if detach else "--no-detach"
    nets, args = small_nets(*FEW, switch, "--nce", nce, "--query", query, "--src-ratio", "1")
    features = [nets["G"](noise(1, 3, 32, 32, seed=s), TAPS)[1] for s in (0, 1)]
    queries, keys = ([f.detach().requires_grad_() for f in side] for side in features)
    loss, relation = patch_nce(nets["H"], queries, keys, args)
    (loss + relation).backward()
    assert all(f.grad.abs().max() > 0 for f in queries)
    assert all((f.grad is None) == detach for f in keys)
    assert all(q.requires_grad and k.requires_grad != detach for (q, k, _), _ in calls)
    assert all(q.requires_grad and not k.requires_grad for (q, k), _ in relations)
    assert all(p.grad.abs().max() > 0 for head in nets["H"].heads for p in head[2:].parameters())


def elementary_norm(layer, x):
    """Instance norm in elementary operations, whose gradient is right for any strides."""
    centered = x - x.mean((2, 3), keepdim=True)
    return centered / (centered.pow(2).mean((2, 3), keepdim=True) + layer.eps).sqrt()


@pytest.mark.parametrize("query", ["random", "attention"])
@pytest.mark.parametrize("detach", ["--detach", "--no-detach"])
def test_the_gradient_of_G_for_one_image_is_right(monkeypatch, float64_outputs, detach, query):
    """On CPUs torch's instance norm returns a wrong gradient for one image if the gradient that it
    receives has channels-last strides, as from feature.permute(0, 2, 3, 1).
    """
    nets, args = small_nets(*FEW, detach, "--query", query)
    G, gradients = nets["G"], []
    for norm in (nn.InstanceNorm2d.forward, elementary_norm):
        monkeypatch.setattr(nn.InstanceNorm2d, "forward", norm)
        torch.manual_seed(0)
        image, keys = G(noise(1, 3, 32, 32), TAPS)
        loss, _ = patch_nce(nets["H"], G(image, TAPS, encode_only=True), keys, args)
        gradients.append(torch.autograd.grad(loss, [*G.parameters()]))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-7, atol=1e-9)
    assert max(gradient.abs().max() for gradient in gradients[0]) > 1e-3

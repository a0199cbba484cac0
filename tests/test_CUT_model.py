"""CUT's networks and PatchNCE against the authors' numbers; every contrast against numpy loops."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from conftest import ROOT
from CUT_model import (
    PatchDiscriminator,
    ProjectionHeads,
    ResnetGenerator,
    attention_patches,
    ence,
    hdce,
    infonce,
    initialize_weights,
    random_patches,
    semantic_relation,
    take_patches,
    tap_channels,
)

PARITY = ROOT / "tests" / "parity"
NETWORKS = {
    "resnet9_instancenorm": lambda: ResnetGenerator(9, 64),
    "resnet6_instancenorm": lambda: ResnetGenerator(6, 64),
    "resnet9_instancenorm_antialias": lambda: ResnetGenerator(9, 64, antialias=True),
    "patchgan70_instancenorm_3ch": lambda: PatchDiscriminator(64),
    "patchgan70_instancenorm_3ch_antialias": lambda: PatchDiscriminator(64, antialias=True),
}
TAPS = ["pix", "c7s1_64", "d128", "d256", "R256_1", "R256_2", "R256_3"]


def convolutions(net):
    return [m for m in net.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)]


def noise(*shape, seed=0):
    """Float64 in [-1, 1]."""
    return torch.from_numpy(np.tanh(np.random.RandomState(seed).randn(*shape)))


def reference_network(net):
    """net in float64 with the weights that the reference outputs belong to."""
    for k, layer in enumerate(convolutions(net)):
        shape = tuple(layer.weight.shape)
        weight = np.random.RandomState(k).randn(*shape) * (1 / np.prod(shape[1:])) ** 0.5
        layer.weight.data = torch.from_numpy(weight)
        if layer.bias is not None:
            layer.bias.data.zero_()
    return net.double()


def unit_vectors(seed, *shape):
    """(..., C) in float64, each vector of length 1."""
    vectors = np.random.RandomState(seed).randn(*shape)
    return torch.from_numpy(vectors / np.linalg.norm(vectors, axis=-1, keepdims=True))


# --------------------------------------------------------------------------------------- networks


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "resnet6_instancenorm"])
def test_outputs_equal_the_authors(name):
    """In float32, where the generator takes a second; the layers are those of cycleGAN."""
    net = reference_network(NETWORKS[name]()).to(torch.float32)
    out = net(noise(1, 3, 256, 256, seed=1000).to(torch.float32))
    reference = np.load(PARITY / "reference_outputs.npz")
    every = max(1, out.shape[-1] // 16)
    tight = {"rtol": 1e-4, "atol": 1e-5}
    np.testing.assert_allclose(out[:, :, ::every, ::every].numpy(), reference[name], **tight)
    mean_std = [out.double().mean(), out.double().std(correction=0)]
    np.testing.assert_allclose(mean_std, reference[f"{name}_mean_std"], **tight)


@pytest.mark.parametrize("name", NETWORKS)
def test_layers_equal_the_authors(name):
    layers = json.loads((PARITY / "reference_layers.json").read_text())
    found = [[type(m).__name__, list(m.weight.shape)] for m in convolutions(NETWORKS[name]())]
    assert found == layers[name]["layers"]


def count(net):
    return sum(p.numel() for p in net.parameters())


def test_parameter_counts():
    assert count(ResnetGenerator(9, 64)) == 11_372_931  # as cycleGAN's, where they are explained
    assert count(PatchDiscriminator(64)) == 2_763_841
    # Two linear layers, with biases, for each of pix, d128, d256, R256_1 and R256_5.
    channels = [3, 128, 256, 256, 256]
    heads = sum(channels) * 256 + 5 * 256 + 5 * (256 * 256 + 256)
    assert count(ProjectionHeads(channels)) == heads == 560_384


def test_initial_weights():
    torch.manual_seed(0)
    for net in (ResnetGenerator(2, 16), PatchDiscriminator(16), ProjectionHeads([3, 64])):
        for p in net.parameters():  # so that nothing passes by chance
            nn.init.constant_(p, 7)
        assert initialize_weights(net) is net
        layers = [m for m in net.modules() if isinstance(m, nn.Linear) or m in convolutions(net)]
        assert sum(1 + (m.bias is not None) for m in layers) == len(list(net.parameters()))
        scaled = []
        for layer in layers:
            assert layer.bias is None or (layer.bias == 0).all()
            weight = layer.weight.detach()
            fans = (weight.shape[0] + weight.shape[1]) * weight[0, 0].numel()
            scaled.append(weight.flatten() / (0.02 * (2 / fans) ** 0.5))  # Xavier, gain 0.02
            assert 0.7 < scaled[-1].std() < 1.3
        values = torch.cat(scaled)
        assert abs(values.mean()) < 5 / len(values) ** 0.5
        assert abs(values.std() - 1) < 5 / len(values) ** 0.5


def without_norms(G):
    """G whose output at a place depends on the input near it alone."""
    for layer in G.layers.values():
        sequence = getattr(layer, "layers", layer)
        for k, part in enumerate(sequence):
            if isinstance(part, nn.InstanceNorm2d):
                sequence[k] = nn.Identity()
    return G


def alike(ngf, seed):
    """A plain and an antialiased generator with the same weights."""
    plain, antialiased = ResnetGenerator(1, ngf), ResnetGenerator(1, ngf, antialias=True)
    torch.manual_seed(seed)
    for one, other in zip(convolutions(plain), convolutions(antialiased), strict=True):
        nn.init.normal_(one.weight, 0.0, one.weight[0].numel() ** -0.5)
        weight = one.weight.data
        transposed = isinstance(one, nn.ConvTranspose2d)
        other.weight.data = (weight.transpose(0, 1) if transposed else weight).clone()
    return plain, antialiased


@torch.no_grad()
def shift_error(G, x, shift, margin):
    """How far, inside, G(moved x) is from moved G(x), in standard deviations of G(x)."""
    size = x.shape[3] - 4
    still, moved = G(x[:, :, :size, :size]), G(x[:, :, :size, shift : shift + size])
    inside = slice(margin, size - margin)
    still_there = still[:, :, inside, margin + shift : size - margin + shift]
    return ((still_there - moved[:, :, inside, inside]).abs().mean() / still.std()).item()


def test_antialias_lets_the_output_move_with_the_input():
    """With instance norm, averaged over random weights and pictures; and for each of them."""
    errors = []
    for seed in range(4):
        x = noise(1, 3, 68, 68, seed=seed).float()
        errors.append([shift_error(G, x, 1, margin=24) for G in alike(8, seed)])
    plain, antialiased = np.mean(errors, axis=0)
    assert antialiased < 0.6 * plain
    assert all(one > other for one, other in errors)


def test_a_shift_by_the_stride_is_exact_and_any_other_only_nearly():
    """Without norms, whose statistics see the borders come and go. The stride is 4 in all."""
    x = noise(1, 3, 100, 100)
    plain, antialiased = (without_norms(G).double() for G in alike(4, 0))
    for G in (plain, antialiased):
        assert shift_error(G, x, 4, margin=40) < 1e-6
    for shift in (1, 2, 3):
        assert shift_error(plain, x, shift, margin=40) > 0.3
        assert shift_error(antialiased, x, shift, margin=40) < 0.2


# ------------------------------------------------------------------------------------------- taps


def small_G(antialias=False):
    return reference_network(ResnetGenerator(3, 4, antialias))


@pytest.mark.parametrize("antialias", [False, True])
def test_taps_are_the_outputs_of_the_layers_of_that_name(antialias):
    G, x, outputs = small_G(antialias), noise(2, 3, 32, 32), {}
    for name, layer in G.layers.items():
        layer.register_forward_hook(lambda _l, _i, out, name=name: outputs.update({name: out}))
    image, features = G(x, TAPS)
    assert torch.equal(image, G(x))
    assert torch.equal(features[0], x)
    for name, feature in zip(TAPS[1:], features[1:], strict=True):
        assert torch.equal(feature, outputs[name])
    sizes = {"pix": 32, "c7s1_64": 32, "d128": 16}
    for name, feature, channels in zip(TAPS, features, tap_channels(TAPS, 3, 4), strict=True):
        size = sizes.get(name, 8)
        assert feature.shape == (2, channels, size, size), name


def test_tap_channels():
    assert tap_channels(["pix", "d128", "d256", "R256_1", "R256_5"]) == [3, 128, 256, 256, 256]
    assert tap_channels(["R256_9", "c7s1_64"]) == [256, 64]
    for taps, n_layers in ((["R256_10"], 9), (["R256_4"], 3), (["u128"], 9), (["R256_0"], 9)):
        with pytest.raises(KeyError):
            tap_channels(taps, n_layers)


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("last", range(len(TAPS)))
def test_encoding_stops_after_the_last_tap_and_gives_the_same(antialias, last):
    G, x = small_G(antialias), noise(2, 3, 32, 32)
    wanted = dict(zip(TAPS, G(x, TAPS)[1], strict=True))
    names, called = ["pix", *G.layers], []
    for name, layer in G.layers.items():
        layer.register_forward_hook(lambda *_, name=name: called.append(name))
    for taps in ([TAPS[last]], [TAPS[last], "pix"], TAPS[: last + 1]):
        called.clear()
        features = G(x, taps, encode_only=True)
        assert called == names[1 : last + 1]
        assert len(features) == len(taps)
        for tap, feature in zip(taps, features, strict=True):
            assert torch.equal(feature, wanted[tap]), tap


@pytest.mark.parametrize("antialias", [False, True])
def test_nothing_after_a_layer_changes_its_output(antialias):
    G, x, outputs = small_G(antialias), noise(1, 3, 32, 32), []
    before = x.clone()
    for layer in G.layers.values():
        layer.register_forward_hook(lambda _l, _i, out: outputs.append((out, out.clone())))
    G(x)
    assert torch.equal(x, before) and len(outputs) == 9
    assert all(torch.equal(out, copy) for out, copy in outputs)


# ------------------------------------------------------------------------------- heads and patches


def test_heads_give_unit_vectors_each_tap_by_its_own():
    torch.manual_seed(0)
    H = ProjectionHeads([3, 8, 8], width=16).double()
    patches = {3: torch.randn(2, 5, 3), 8: torch.randn(2, 5, 8)}
    outputs = [H(tap, patches[c].double()) for tap, c in enumerate((3, 8, 8))]
    for out in outputs:
        assert out.shape == (2, 5, 16)
        torch.testing.assert_close(out.norm(dim=2), torch.ones(2, 5))
    assert not torch.allclose(outputs[1], outputs[2])
    first, _, second = H.heads[1]
    weights = [p.detach().numpy() for p in (first.weight, first.bias, second.weight, second.bias)]
    hidden = np.maximum(patches[8].double().numpy() @ weights[0].T + weights[1], 0)
    wanted = hidden @ weights[2].T + weights[3]
    wanted /= np.linalg.norm(wanted, axis=2, keepdims=True)
    np.testing.assert_allclose(outputs[1].detach().numpy(), wanted, rtol=1e-5, atol=1e-6)
    assert [head[0].in_features for head in ProjectionHeads([3, 128]).heads] == [3, 128]
    assert H.heads[0][2].out_features == 16 and ProjectionHeads([3])(0, patches[3]).shape[2] == 256


def test_random_patches_are_distinct_and_no_more_than_there_are():
    torch.manual_seed(0)
    feature, counts = torch.zeros(2, 3, 4, 6), torch.zeros(24)
    for _ in range(400):
        where = random_patches(feature, 5)
        assert where.shape == (5,) and len(set(where.tolist())) == 5
        counts[where] += 1
    mean = 400 * 5 / 24
    assert (abs(counts - mean) < 5 * mean**0.5).all()  # every position as often as another
    assert sorted(random_patches(feature, 100).tolist()) == list(range(24))
    assert random_patches(torch.zeros(1, 3, 4, 4, device="meta"), 5).device.type == "meta"


def test_attention_patches_are_the_rows_of_lowest_entropy():
    feature = noise(2, 5, 3, 4) * 1.5
    for num_patches, rows in ((4, 4), (100, 12)):
        found = attention_patches(feature, num_patches)
        assert found.shape == (2, rows, 12)
        torch.testing.assert_close(found.sum(2), torch.ones(2, rows), atol=1e-5, rtol=0)
        for n in range(2):
            vectors = feature[n].flatten(1).T.numpy()  # (12, 5)
            attention = np.exp(vectors @ vectors.T)
            attention /= attention.sum(1, keepdims=True)
            entropy = -(attention * np.log(attention)).sum(1)
            wanted = attention[np.argsort(entropy)[:rows]]
            np.testing.assert_allclose(found[n].numpy(), wanted, rtol=1e-4, atol=1e-6)


def test_attention_does_not_overflow():
    found = attention_patches(torch.randn(1, 8, 4, 4) * 100, 3)
    torch.testing.assert_close(found.sum(2), torch.ones(1, 3))


def test_take_patches():
    feature = noise(2, 5, 3, 4)
    where = torch.tensor([11, 0, 6])
    found = take_patches(feature, where)
    assert found.shape == (2, 3, 5)
    for n in range(2):
        for s, position in enumerate(where.tolist()):
            assert torch.equal(found[n, s], feature[n, :, position // 4, position % 4])
    rows = torch.rand(2, 3, 12, dtype=torch.float64)
    wanted = np.einsum("nsp,ncp->nsc", rows.numpy(), feature.flatten(2).numpy())
    np.testing.assert_allclose(take_patches(feature, rows).numpy(), wanted, rtol=1e-12)
    chosen = torch.eye(12, dtype=torch.float64)[where].expand(2, 3, 12)
    torch.testing.assert_close(take_patches(feature, chosen), found)


# --------------------------------------------------------------------------------------- contrasts


def numpy_infonce(q, k, tau):
    """(S,) for one picture, by the letter of the paper."""
    loss = np.zeros(len(q))
    for i in range(len(q)):
        all_keys = sum(np.exp(q[i] @ k[j] / tau) for j in range(len(k)))
        loss[i] = -np.log(np.exp(q[i] @ k[i] / tau) / all_keys)
    return loss


def means(q, k, tau):
    """A and B of ence."""
    S = len(q)
    A = np.mean([np.exp(-q[i] @ k[i] / tau / 2) for i in range(S)])
    B = np.mean([np.exp(q[i] @ k[j] / tau / 2) for i in range(S) for j in range(S) if i != j])
    return A, B


def numpy_ence(q, k, tau):
    A, B = means(q, k, tau)
    return (np.log(A) + np.log(B)) / 2


def numpy_hdce(q, k, tau, gamma=1.0):
    loss = np.zeros(len(q))
    for i in range(len(q)):
        others = [j for j in range(len(q)) if j != i]
        relation = {j: np.exp(k[i] @ k[j] / gamma) for j in others}
        w = {j: relation[j] / max(relation.values()) for j in others}
        terms = [np.exp((w[j] * (q[i] @ k[j]) - q[i] @ k[i]) / tau) for j in others]
        loss[i] = np.log(sum(terms))
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
    "ence": (ence, numpy_ence),
    "hdce": (hdce, numpy_hdce),
    "semantic_relation": (lambda q, k, _tau: semantic_relation(q, k), numpy_semantic_relation),
}


@pytest.mark.parametrize("tau", [0.07, 0.5])
@pytest.mark.parametrize("name", CONTRASTS)
def test_contrasts_equal_numpy_at_any_batch_size(name, tau):
    function, plain = CONTRASTS[name]
    q, noise_k = unit_vectors(0, 3, 10, 8), unit_vectors(1, 3, 10, 8)
    k = nn.functional.normalize(q + noise_k, dim=2)
    wanted = np.stack([plain(q[n].numpy(), k[n].numpy(), tau) for n in range(3)])
    assert wanted.std() > 1e-3
    found = function(q, k, tau)
    assert found.dtype == torch.float64 and found.shape == wanted.shape
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-10, atol=1e-12)
    for n in range(3):  # a short last batch
        alone = function(q[n : n + 1], k[n : n + 1], tau)
        np.testing.assert_allclose(alone.numpy(), wanted[n : n + 1], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", CONTRASTS)
def test_contrasts_are_finite_in_float32_and_send_gradients_to_queries(name):
    function, _ = CONTRASTS[name]
    q = unit_vectors(0, 2, 6, 4).float().requires_grad_()
    k = unit_vectors(1, 2, 6, 4).float()
    loss = function(q, k, 0.001).mean()  # logits of a thousand
    loss.backward()
    assert loss.isfinite() and q.grad.isfinite().all() and q.grad.abs().max() > 0


@pytest.mark.parametrize("name", ["infonce", "ence", "hdce"])
def test_contrasts_prefer_the_right_key(name):
    q = unit_vectors(0, 1, 8, 16)
    function = CONTRASTS[name][0]
    right, wrong = function(q, q, 0.07).mean(), function(q, q.roll(1, 1), 0.07).mean()
    assert right < wrong - 1


def test_semantic_relation_of_equal_relations_is_0():
    q = unit_vectors(0, 2, 8, 16)
    turned = torch.linalg.qr(torch.from_numpy(np.random.RandomState(0).randn(16, 16)))[0]
    assert semantic_relation(q, q @ turned).abs().max() < 1e-12  # other vectors, same relations
    assert semantic_relation(q, unit_vectors(1, 2, 8, 16)).min() > 1e-3
    k = unit_vectors(1, 2, 8, 16)
    torch.testing.assert_close(semantic_relation(q, k), semantic_relation(k, q))


@pytest.mark.parametrize("closeness", [0.0, 1.0, 5.0])
def test_ence_is_the_least_over_the_normalising_constant(closeness):
    q = unit_vectors(0, 1, 10, 8)
    k = nn.functional.normalize(closeness * q + unit_vectors(1, 1, 10, 8), dim=2)
    A, B = means(q[0].numpy(), k[0].numpy(), 0.07)
    c = np.linspace(-60, 60, 240_001)
    scanned = np.log((A * np.exp(c / 2) + B * np.exp(-c / 2)) / 2)
    assert 0 < scanned.argmin() < len(c) - 1
    assert ence(q, k, 0.07).item() == pytest.approx(scanned.min(), abs=1e-6)


def test_hdce_weighs_negatives_and_sends_no_gradient_through_the_weights():
    q, k = unit_vectors(0, 1, 6, 4), unit_vectors(1, 1, 6, 4)
    weak, strong = hdce(q, k, 0.07, gamma=1e9), hdce(q, k, 0.07, gamma=0.1)
    s = (q @ k.transpose(1, 2) / 0.07)[0].numpy()  # without weights: the plain decoupled NCE
    off = ~np.eye(6, dtype=bool)
    plain = [np.log(np.exp(s[i][off[i]] - s[i, i]).sum()) for i in range(6)]
    np.testing.assert_allclose(weak[0].numpy(), plain, rtol=1e-6)
    assert (strong - weak).abs().max() > 0.1
    moved = k.clone().requires_grad_()
    hdce(q, moved, 0.07, gamma=1.0).sum().backward()
    # By hand: dl_i/dk_j of sum_j exp((w_ij q_i k_j - q_i k_i) / tau) where w is a constant.
    relation = np.exp((k @ k.transpose(1, 2))[0].numpy() / 1.0) * off
    w = relation / relation.max(1, keepdims=True)
    qk = (q @ k.transpose(1, 2))[0].numpy()
    share = np.exp((w * qk - np.diag(qk)[:, None]) / 0.07) * off
    share /= share.sum(1, keepdims=True)
    wanted = ((share * w - np.eye(6)).T @ q[0].numpy()) / 0.07
    np.testing.assert_allclose(moved.grad[0].numpy(), wanted, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    "images, entry", [(2, "patchnce_loss_per_query"), (1, "patchnce_loss_per_query_batch1")]
)
def test_patch_nce_equals_the_authors(images, entry):
    r = np.random.RandomState(2000)
    q = r.randn(512, 256)
    k = r.randn(512, 256) * 0.5 + q * 0.5
    q, k = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (q, k))
    q, k = (torch.from_numpy(v).view(images, 512 // images, 256) for v in (q, k))
    wanted = np.load(PARITY / "reference_outputs.npz")[entry]
    found = infonce(q, k, 0.07).flatten().numpy()
    np.testing.assert_allclose(found, wanted, rtol=1e-12, atol=1e-12)

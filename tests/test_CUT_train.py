"""CUT's equations, its step, its variants, and what it alone writes; the rest is in
test_every_method.py.
"""

import csv
import types

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn.functional import normalize

from conftest import draw_no_curves, load_script, run_module, write_unpaired

SMALL = ["--image-size", "32", "--load-size", "36", "--ngf", "4", "--ndf", "4", "--n-layers", "2"]
SMALL += ["--device", "cpu", "--num-workers", "0", "--num-patches", "16", "--precision", "fp32"]
TAPS = ["pix", "d128", "d256", "R256_1", "R256_2"]
SMALL += ["--feat-str", ", ".join(TAPS)]


@pytest.fixture(autouse=True)
def one_thread():
    """Two threads slow networks this small down, more so on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def train(script, tmp_path, monkeypatch):
    """CUT/train.py, which writes its runs below tmp_path and draws no curves."""
    (tmp_path / "CUT").mkdir()
    module = script("CUT")
    draw_no_curves(monkeypatch, "CUT")
    return module


@pytest.fixture
def float64_outputs(monkeypatch):
    """Networks in float64 return float64 too, not float32."""
    monkeypatch.setattr(torch.Tensor, "float", lambda self: self)


def small_nets(train, *flags):
    """(nets, args) at 32 px."""
    args = train.parse_args([*SMALL, *flags])
    torch.manual_seed(0)
    return train.build(args, torch.device("cpu")), args


def lively_nets(train, *flags):
    """(nets, args) in float64, with weights so large that no output is near 0."""
    nets, args = small_nets(train, *flags)
    for name in "GDH":
        for p in nets[name].double().parameters():
            nn.init.normal_(p, 0.0, 0.3)
    return nets, args


def batch(size=2, dtype=torch.float32, seed=1):
    """A batch x, y of noise, (size, 3, 32, 32) in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(2, size, 3, 32, 32, generator=generator, dtype=dtype) * 2 - 1


def coin(monkeypatch, heads):
    """Has --flip-equivariance mirror each time, or never."""
    rand = torch.rand

    def tossed(*size, **rest):
        return torch.tensor(0.0 if heads else 0.9) if size == ((),) else rand(*size, **rest)

    monkeypatch.setattr(torch, "rand", tossed)


def spy(monkeypatch, module, name):
    """The list of (arguments, result) of each call of module.name from now on."""
    function, calls = getattr(module, name), []

    def watched(*args, **rest):
        calls.append((args, function(*args, **rest)))
        return calls[-1][1]

    monkeypatch.setattr(module, name, watched)
    return calls


def assert_close(found, wanted):
    """Two lists of float64 features are equal but for rounding."""
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-9)


def weights(net):
    return [p.detach().clone() for p in net.parameters()]


def changed(net, before):
    return not all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))


# ------------------------------------------------------------------------------------ mathematics


def numpy_gan_loss(prediction, real):
    D = prediction.detach().numpy()
    return ((D - 1) ** 2 if real else D**2).mean()


@pytest.mark.parametrize("real", [True, False])
def test_gan_loss(real):
    gan_loss = load_script("CUT").gan_loss
    prediction = torch.randn(2, 1, 5, 7, dtype=torch.float64)
    assert gan_loss(prediction, real).item() == pytest.approx(numpy_gan_loss(prediction, real))


def test_losses_of_D_equal_those_of_separate_calls(train, float64_outputs):
    nets, _ = lively_nets(train)
    (real, fake), D = batch(3, torch.float64), nets["D"]
    real = real[:2]
    on_real, on_fake = D(real), D(fake)
    wanted = {"D_real": numpy_gan_loss(on_real, True), "D_fake": numpy_gan_loss(on_fake, False)}
    wanted["D_total"] = (wanted["D_real"] + wanted["D_fake"]) / 2
    losses = train.losses_D(D, real, fake, "D")
    assert set(losses) == set(wanted)
    for name, value in wanted.items():
        assert losses[name].item() == pytest.approx(value, rel=1e-10), name
    plain = (((on_real - 1) ** 2).mean() + (on_fake**2).mean()) / 2
    parameters = list(D.parameters())
    gradients = torch.autograd.grad(losses["D_total"], parameters)
    wanted = torch.autograd.grad(plain, parameters)
    torch.testing.assert_close(gradients, wanted, rtol=1e-7, atol=1e-9)


def toy_H(_tap, patches):
    """No head at all: unit vectors of the features themselves. (N, S, C)."""
    return normalize(patches, dim=2)


def features(seed=0, sizes=((3, 8), (6, 4), (5, 4))):
    """A list over taps of features, (2, C, size, size), float64."""
    r = np.random.RandomState(seed)
    return [torch.from_numpy(r.randn(2, c, size, size)) for c, size in sizes]


def numpy_nce(query, key, positions, tau):
    """Mean PatchNCE at one tap."""
    losses = []
    for n in range(len(query)):
        q, k = (f[n].flatten(1).T[positions].numpy() for f in (query, key))
        q, k = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (q, k))
        for i in range(len(q)):
            logits = np.exp(k @ q[i] / tau)
            losses.append(-np.log(logits[i] / logits.sum()))
    return np.mean(losses)


@pytest.mark.parametrize("tau", [0.07, 0.3])
def test_patch_nce_is_the_mean_over_taps(train, monkeypatch, tau):
    where = iter([torch.tensor([5, 63, 0, 17]), torch.tensor([1, 15, 7]), torch.tensor([2, 3])])
    chosen = []

    def choose(_feature, num_patches):
        assert num_patches == 16
        chosen.append(next(where))
        return chosen[-1]

    monkeypatch.setattr(train, "random_patches", choose)
    queries, keys = features(0), features(1)
    args = train.parse_args([*SMALL, "--tau", str(tau)])
    nce, relation = train.patch_nce(toy_H, queries, keys, args)
    pairs = zip(queries, keys, chosen, strict=True)
    wanted = np.mean([numpy_nce(q, k, positions, tau) for q, k, positions in pairs])
    assert nce.item() == pytest.approx(wanted, rel=1e-10)
    assert relation == 0


@pytest.mark.parametrize("nce", ["infonce", "ence", "hdce"])
@pytest.mark.parametrize("ratio", ["0", "0.5"])
def test_the_chosen_contrast_and_relation_are_used(train, monkeypatch, nce, ratio):
    used = {name: spy(monkeypatch, train, name) for name in ("infonce", "ence", "hdce")}
    relations = spy(monkeypatch, train, "semantic_relation")
    args = train.parse_args([*SMALL, "--nce", nce, "--tau", "0.2", "--src-ratio", ratio])
    queries, keys = features(0), features(1)
    loss, relation = train.patch_nce(toy_H, queries, keys, args)
    assert {name: len(calls) for name, calls in used.items()} == {
        name: 3 * (name == nce) for name in used
    }
    assert all(call[0][2] == 0.2 for call in used[nce])
    assert loss.item() == pytest.approx(np.mean([out.mean().item() for _, out in used[nce]]))
    assert len(relations) == (0 if ratio == "0" else 3)
    if ratio != "0":
        wanted = np.mean([out.mean().item() for _, out in relations])
        assert relation.item() == pytest.approx(wanted) and wanted > 0
        for one, other in zip(used[nce], relations, strict=True):  # of the same patches
            assert all(torch.equal(one[0][part], other[0][part]) for part in (0, 1))


@pytest.mark.parametrize("num_patches", [2, 7, 16, 40, 500])
def test_num_patches_is_the_number_of_rows_in_the_contrast(train, monkeypatch, num_patches):
    calls = spy(monkeypatch, train, "infonce")
    args = train.parse_args([*SMALL, "--num-patches", str(num_patches)])
    train.patch_nce(toy_H, features(0), features(1), args)
    shapes = [(q.shape, k.shape, out.shape) for (q, k, _), out in calls]
    rows = [min(num_patches, n) for n in (64, 16, 16)]  # as many as there are positions
    wanted = [((2, s, c), (2, s, c), (2, s)) for s, c in zip(rows, (3, 6, 5), strict=True)]
    assert shapes == wanted


def test_query_and_key_come_from_the_same_positions(train, monkeypatch):
    """Of a feature and itself, q and k are equal; random or attended, and for each tap anew."""
    same = features(0, ((3, 8), (6, 8), (5, 8)))
    calls = spy(monkeypatch, train, "infonce")
    for flags in ([], ["--query", "attention"]):
        train.patch_nce(toy_H, same, same, train.parse_args([*SMALL, *flags]))
    assert len(calls) == 6 and all(torch.equal(q, k) for (q, k, _), _ in calls)
    chosen = spy(monkeypatch, train, "random_patches")
    for _ in range(2):
        train.patch_nce(toy_H, same, same, train.parse_args(SMALL))
    assert len({tuple(where.tolist()) for _, where in chosen}) == 6


def test_attention_chooses_at_the_two_deepest_taps(train, monkeypatch):
    by_chance = spy(monkeypatch, train, "random_patches")
    attended = spy(monkeypatch, train, "attention_patches")
    queries, keys = features(0), features(1)
    flags = ["--query", "attention", "--num-patches", "7", "--no-detach"]
    keys = [key.requires_grad_() for key in keys]
    train.patch_nce(toy_H, queries, keys, train.parse_args([*SMALL, *flags]))
    assert [call[0][0].shape[1] for call in by_chance] == [3]
    assert [call[0][0].shape[1] for call in attended] == [6, 5]
    assert all(torch.equal(call[0][0], key) for call, key in zip(attended, keys[1:], strict=True))
    assert all(not rows.requires_grad and rows.shape == (2, 7, 16) for _, rows in attended)
    train.patch_nce(toy_H, queries, keys, train.parse_args(SMALL))
    assert len(attended) == 2 and len(by_chance) == 4


# --------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("nce", ["infonce", "ence", "hdce"])
@pytest.mark.parametrize("query", ["random", "attention"])
@pytest.mark.parametrize("detach", [True, False])
def test_detach_keeps_the_gradient_of_the_keys_from_the_encoder(train, nce, query, detach):
    flags = ["--nce", nce, "--query", query, "--src-ratio", "1"]
    nets, args = small_nets(train, "--detach" if detach else "--no-detach", *flags)
    x, y = batch()
    with torch.no_grad():
        queries = nets["G"](y, TAPS, encode_only=True)  # constants: only the keys lead to G
    keys = nets["G"](x, TAPS, encode_only=True)
    loss, relation = train.patch_nce(nets["H"], queries, keys, args)
    (loss + relation).backward()
    tapped = [name for name, _ in nets["G"].named_parameters() if name.split(".")[1] in TAPS]
    assert len(tapped) == 6
    gradients = {name: p.grad for name, p in nets["G"].named_parameters()}
    if detach:
        assert all(grad is None for grad in gradients.values())
    else:
        assert all(gradients[name].abs().max() > 0 for name in tapped)
    assert all(p.grad.abs().max() > 0 for head in nets["H"].heads for p in head[2:].parameters())


@pytest.mark.parametrize("detach", [True, False])
def test_detach_keeps_the_gradient_of_the_keys_from_the_heads(train, monkeypatch, detach):
    calls = spy(monkeypatch, train, "infonce")
    nets, args = small_nets(train, "--detach" if detach else "--no-detach")
    x, y = batch()
    with torch.no_grad():
        queries, keys = (nets["G"](image, TAPS, encode_only=True) for image in (y, x))
    train.patch_nce(nets["H"], queries, keys, args)
    assert [k.requires_grad for (_, k, _), _ in calls] == [not detach] * 5
    assert all(q.requires_grad for (q, _, _), _ in calls)


def test_queries_send_their_gradient_through_the_picture_into_all_of_G(train):
    nets, args = small_nets(train)
    x, _ = batch()
    with torch.no_grad():
        keys = nets["G"](x, TAPS, encode_only=True)
    queries = nets["G"](nets["G"](x), TAPS, encode_only=True)
    train.patch_nce(nets["H"], queries, keys, args)[0].backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in nets["G"].parameters())


def test_each_step_reaches_its_own_networks_alone(train, monkeypatch):
    nets, args = small_nets(train)
    order, descend = [], train.descend

    def watched(loss, *optimizers):
        for_D = optimizers == (nets["optimizer_D"],)
        assert for_D or optimizers == (nets["optimizer_G"], nets["optimizer_H"])
        own = "D" if for_D else "GH"
        for name in "GDH":
            for p in nets[name].parameters():
                p.grad = None
        before = {name: weights(nets[name]) for name in "GDH"}
        descend(loss, *optimizers)
        for name in "GDH":
            has_gradient = {p.grad is not None for p in nets[name].parameters()}
            assert has_gradient == {name in own}, name
            assert changed(nets[name], before[name]) == (name in own), name
        order.append(own)

    monkeypatch.setattr(train, "descend", watched)
    train.training_step(nets, *batch(), args)
    assert order == ["D", "GH"]


def test_G_meets_the_D_that_has_just_learned_and_D_a_detached_picture(train, monkeypatch):
    nets, args = small_nets(train)
    x, y = batch()
    with torch.no_grad():
        made = nets["G"](x)
    before, seen, losses_D, losses_G = weights(nets["D"]), [], train.losses_D, train.losses_G

    def watched_D(D, real, fake, name):
        assert not changed(D, before) and torch.equal(real, y) and not fake.requires_grad
        torch.testing.assert_close(fake, made)
        seen.append(name)
        return losses_D(D, real, fake, name)

    def watched_G(G, D, H, fake_y, *rest):
        assert changed(D, before) and fake_y.requires_grad
        torch.testing.assert_close(fake_y, made)
        seen.append("G")
        return losses_G(G, D, H, fake_y, *rest)

    monkeypatch.setattr(train, "losses_D", watched_D)
    monkeypatch.setattr(train, "losses_G", watched_G)
    losses = train.training_step(nets, x, y, args)
    assert seen == ["D", "G"]
    assert list(losses) == ["G_total", "G_gan", "NCE", "NCE_id", "D_total", "D_real", "D_fake"]


def test_pictures_reach_D_through_the_buffer(train, monkeypatch):
    nets, args = small_nets(train)
    given, calls = [], spy(monkeypatch, train, "losses_D")

    def buffer(images):
        given.append((images, torch.full_like(images, 0.5)))
        return given[-1][1]

    x, y = batch()
    made = nets["G"](x)
    nets["buffer_y"] = buffer
    train.training_step(nets, x, y, args)
    ((_, _, fake, name), _), ((images, old),) = calls[0], given
    assert fake is old and name == "D" and len(calls) == 1
    torch.testing.assert_close(images, made)


# ----------------------------------------------------------------------------- the step, the total


def watch_G(nets):
    """The number of pictures in each call of G, from now on."""
    sizes = []
    nets["G"].register_forward_pre_hook(lambda _net, inputs: sizes.append(len(inputs[0])))
    return sizes


@pytest.mark.parametrize(
    "flags, mirrored, wanted",
    [
        ([], False, [6, 6]),
        (["--NCE-ratio-id", "0"], False, [3, 3]),
        (["--NCE-ratio-id", "0", "--flip-equivariance"], True, [3, 3, 3]),
        (["--flip-equivariance"], True, [6, 6, 6]),
        (["--flip-equivariance"], False, [6, 6]),
    ],
    ids=str,
)
def test_G_is_called_for_what_is_needed(train, monkeypatch, flags, mirrored, wanted):
    coin(monkeypatch, mirrored)
    nets, args = small_nets(train, *flags)
    sizes = watch_G(nets)
    losses = train.training_step(nets, *batch(3), args)
    assert sizes == wanted
    assert ("NCE_id" in losses) == ("--NCE-ratio-id" not in flags)


@pytest.mark.parametrize(
    "flags, weigh",
    [
        ([], lambda t: (t["NCE"] + t["NCE_id"]) / 2),
        (
            ["--NCE-ratio", "3", "--NCE-ratio-id", "5"],
            lambda t: (3 * t["NCE"] + 5 * t["NCE_id"]) / 2,
        ),
        (["--NCE-ratio", "0"], lambda t: t["NCE_id"] / 2),
        (["--NCE-ratio-id", "0"], lambda t: t["NCE"]),  # not halved
        (["--NCE-ratio-id", "0", "--NCE-ratio", "10"], lambda t: 10 * t["NCE"]),
        (["--fast"], lambda t: 10 * t["NCE"]),
        (["--src-ratio", "50"], lambda t: (t["NCE"] + t["NCE_id"]) / 2 + 50 * t["SRC"]),
        (["--src-ratio", "50", "--NCE-ratio-id", "0"], lambda t: t["NCE"] + 50 * t["SRC"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_the_total_weighs_as_the_authors_do(train, monkeypatch, float64_outputs, flags, weigh):
    calls = spy(monkeypatch, train, "patch_nce")
    nets, args = lively_nets(train, *flags)
    losses = train.training_step(nets, *batch(dtype=torch.float64), args)
    total = losses["G_gan"] + weigh(losses)
    torch.testing.assert_close(losses["G_total"], total, rtol=1e-12, atol=0)
    terms = [losses[name] for name in ("NCE", "NCE_id") if name in losses]
    assert len(calls) == len(terms)
    assert all(torch.equal(call[1][0], term) for call, term in zip(calls, terms, strict=True))
    relations = [call[1][1] for call in calls]
    if "SRC" in losses:  # of x and G(x) alone, as the authors have it
        torch.testing.assert_close(losses["SRC"], relations[0])
        assert losses["SRC"] > 0


@pytest.mark.parametrize("flags", [[], ["--NCE-ratio-id", "0"], ["--NCE-ratio", "0"]], ids=" ".join)
def test_losses_of_G_equal_those_of_separate_calls(train, float64_outputs, flags):
    """Values and gradients. Contrasting all positions, so that chance has no say."""
    nets, args = lively_nets(train, "--num-patches", "1024", *flags)
    G, D, H = (nets[name] for name in "GDH")
    x, y = batch(dtype=torch.float64)
    identity = args.NCE_ratio_id > 0

    def encode(image):
        return G(image, TAPS, encode_only=True)

    with torch.no_grad():
        keys_x, keys_y = encode(x), encode(y)
    fake_y = G(x)
    G_gan = ((D(fake_y) - 1) ** 2).mean()
    nce = args.NCE_ratio * train.patch_nce(H, encode(fake_y), keys_x, args)[0]
    if identity:
        nce_id = train.patch_nce(H, encode(G(y)), keys_y, args)[0]
        nce = (nce + args.NCE_ratio_id * nce_id) / 2
    weights = [*G.parameters(), *H.parameters()]
    wanted = torch.autograd.grad(G_gan + nce, weights)

    image = G(torch.cat([x, y]))
    fake_y, same_y = image[:2], image[2:] if identity else None
    losses = train.losses_G(G, D, H, fake_y, same_y, keys_x, keys_y, False, args)
    assert losses["G_gan"].item() == pytest.approx(numpy_gan_loss(D(G(x)), True), rel=1e-10)
    torch.testing.assert_close(losses["G_total"], G_gan + nce, rtol=1e-10, atol=0)
    gradients = torch.autograd.grad(losses["G_total"], weights)
    torch.testing.assert_close(gradients, wanted, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("identity", [True, False])
@pytest.mark.parametrize("n", [1, 2])
def test_queries_are_of_the_translation_and_keys_of_its_input(
    train, monkeypatch, float64_outputs, identity, n
):
    calls = spy(monkeypatch, train, "patch_nce")
    nets, args = lively_nets(train, *([] if identity else ["--NCE-ratio-id", "0"]))
    x, y = batch(n, torch.float64)
    G = nets["G"]
    with torch.no_grad():
        wanted = [(G(G(i), TAPS, encode_only=True), G(i, TAPS, encode_only=True)) for i in (x, y)]
    train.training_step(nets, x, y, args)
    assert len(calls) == 1 + identity
    for ((H, *found, _), _), right in zip(calls, wanted[: len(calls)], strict=True):
        assert H is nets["H"]
        for queries_or_keys in (0, 1):
            assert_close(found[queries_or_keys], right[queries_or_keys])


# ------------------------------------------------------------------------------ flip equivariance


class PointwiseG(nn.Module):
    """A generator that works on each pixel alone, so that it mirrors what its input mirrors."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Conv2d(3, 3, 1).double()

    def forward(self, x, taps=(), encode_only=False):
        features = [x, torch.tanh(self.layer(x))]
        features = [features[k % 2] for k, _ in enumerate(taps)]
        image = torch.tanh(2 * self.layer(x))
        return features if encode_only else (image, features) if taps else image


def toy_step(train, monkeypatch, mirrored):
    """One step with PointwiseG and all positions: losses, calls of patch_nce, of losses_G."""
    coin(monkeypatch, mirrored)
    flags = ["--flip-equivariance", "--feat-str", "pix, d128", "--num-patches", "1024"]
    nets, args = small_nets(train, *flags)
    nets["G"], nets["D"] = PointwiseG(), nets["D"].double()
    nets["H"] = train.ProjectionHeads([3, 3]).double()
    torch.manual_seed(1)
    for p in nets["H"].parameters():
        nn.init.normal_(p)
    for name in "GDH":
        nets[f"optimizer_{name}"] = run_module("CUT").adam(args, nets[name])
    terms, totals = (spy(monkeypatch, train, name) for name in ("patch_nce", "losses_G"))
    return train.training_step(nets, *batch(1, torch.float64), args), terms, totals


def test_features_correspond_after_the_flip(train, monkeypatch, float64_outputs):
    """With a G that mirrors with its input, NCE is the same as without a flip."""
    found = {}
    for mirrored in (False, True):
        with monkeypatch.context() as patch:
            losses, terms, totals = toy_step(train, patch, mirrored)
        found[mirrored] = losses, terms, totals[0][0][3]
    (straight, terms, fake), (flipped, flipped_terms, flipped_fake) = found[False], found[True]
    torch.testing.assert_close(flipped_fake, fake.flip(3))  # G has indeed seen the mirrored x
    assert not torch.allclose(flipped_fake, fake)
    for name in ("NCE", "NCE_id"):
        torch.testing.assert_close(flipped[name], straight[name], rtol=1e-9, atol=0)
    for call, flipped_call in zip(terms, flipped_terms, strict=True):
        for part in (1, 2):  # queries and keys
            pairs = zip(call[0][part], flipped_call[0][part], strict=True)
            assert all(torch.allclose(a, b) for a, b in pairs)


def test_keys_are_those_of_x_as_it_is(train, monkeypatch, float64_outputs):
    coin(monkeypatch, True)
    calls = spy(monkeypatch, train, "patch_nce")
    nets, args = lively_nets(train, "--flip-equivariance")
    x, y = batch(dtype=torch.float64)
    G = nets["G"]
    with torch.no_grad():
        keys = [G(image, TAPS, encode_only=True) for image in (x, y)]
        queries = [f.flip(3) for f in G(G(x.flip(3)), TAPS, encode_only=True)]
        queries_id = [f.flip(3) for f in G(G(y.flip(3)), TAPS, encode_only=True)]
    train.training_step(nets, x, y, args)
    assert len(calls) == 2
    for call, its_queries, its_keys in zip(calls, (queries, queries_id), keys, strict=True):
        assert_close(call[0][1], its_queries)
        assert_close(call[0][2], its_keys)


def test_half_of_the_steps_are_mirrored_and_none_by_default(train, monkeypatch):
    for flags, low, high in ((["--flip-equivariance"], 5, 19), ([], 0, 0)):
        nets, args = small_nets(train, *flags)
        with monkeypatch.context() as patch:
            calls = spy(patch, train, "losses_G")
            for _ in range(24):
                train.training_step(nets, *batch(1), args)
        mirrored = [bool(arguments[7]) for arguments, _ in calls]
        assert low <= sum(mirrored) <= high and len(mirrored) == 24


# ------------------------------------------------------------------------------------------ flags


def refused(train, capsys, *flags):
    """The one error line that these flags end with."""
    with pytest.raises(SystemExit) as ended:
        train.parse_args(list(flags))
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("train.py: error: ")
    return line


def test_defaults_are_the_authors(train):
    args = train.parse_args([])
    assert (args.n_layers, args.buffer_size, args.num_patches, args.tau) == (9, 0, 256, 0.07)
    assert (args.NCE_ratio, args.NCE_ratio_id, args.epochs) == (1, 1, 400)
    assert args.feat_str == "pix, d128, d256, R256_1, R256_5"
    assert (args.detach, args.flip_equivariance, args.antialias, args.fast) == (True, *[False] * 3)
    assert (args.nce, args.query, args.src_ratio) == ("infonce", "random", 0)


def test_fast_is_a_preset_that_typed_flags_override(train):
    def preset(*flags):
        args = train.parse_args(["--fast", *flags])
        return args.epochs, args.NCE_ratio, args.NCE_ratio_id, args.flip_equivariance

    assert preset() == (200, 10, 0, True)
    assert preset("--epochs", "7") == (7, 10, 0, True)
    assert preset("--NCE-ratio", "1") == (200, 1, 0, True)  # the default, but typed
    assert preset("--NCE-ratio-id", "1") == (200, 10, 1, True)
    assert preset("--no-flip-equivariance") == (200, 10, 0, False)
    args = train.parse_args([])
    default = (args.epochs, args.NCE_ratio, args.NCE_ratio_id, args.flip_equivariance)
    assert default == (400, 1, 1, False)


@pytest.mark.parametrize("flags, epochs, falling", [([], 400, 200), (["--fast"], 200, 50)])
def test_learning_rate_is_constant_and_then_falls(train, flags, epochs, falling):
    args = train.parse_args(flags)
    assert args.epochs == epochs and train.decay_epochs(args) == falling
    found = [train.lr_factor(e, epochs, train.decay_epochs(args)) for e in range(1, epochs + 1)]
    wanted = [1 - k / (falling + 1) for k in range(1, falling + 1)]
    assert found == pytest.approx([1.0] * (epochs - falling) + wanted)


def test_short_schedules(train):
    for fast, epochs, falling in ((False, 5, 2), (False, 1, 0), (True, 8, 2), (True, 3, 0)):
        args = types.SimpleNamespace(fast=fast, epochs=epochs)
        assert train.decay_epochs(args) == falling


@pytest.mark.parametrize("feat_str", ["R256_10", "pix, d64", "u128", "", "pix,,d128", "R256_0"])
def test_layers_that_are_not_there_are_refused(train, capsys, feat_str):
    line = refused(train, capsys, "--feat-str", feat_str)
    assert "--feat-str" in line and "c7s1_64" in line and "R256_9" in line


def test_layers_are_those_of_n_layers(train, capsys):
    line = refused(train, capsys, "--n-layers", "4")  # the default asks for R256_5
    assert "R256_5" in line and line.endswith("R256_4")
    args = train.parse_args(["--n-layers", "4", "--feat-str", "R256_4,pix ,  c7s1_64"])
    assert args.feat_str == "R256_4, pix, c7s1_64"
    assert train.parse_args(["--n-layers", "12", "--feat-str", "R256_12"]).feat_str == "R256_12"


@pytest.mark.parametrize("feat_str", ["pix", "R256_1, pix", "d128, d256", "d256, c7s1_64"])
def test_attention_between_all_positions_of_a_large_layer_is_refused(train, capsys, feat_str):
    """At 256 px that would be a matrix of 65536 squared."""
    line = refused(train, capsys, "--query", "attention", "--feat-str", feat_str)
    assert "--query attention" in line and "--feat-str" in line
    for deep in ("d256", "pix, R256_1, d256", "R256_9"):
        train.parse_args(["--query", "attention", "--feat-str", deep])


@pytest.mark.parametrize(
    "flags",
    [
        ["--nce", "nce"],
        ["--query", "all"],
        ["--num-patches", "1"],
        ["--tau", "0"],
        ["--NCE-ratio", "-1"],
        ["--src-ratio", "nan"],
        ["--image-size", "30"],
    ],
    ids=" ".join,
)
def test_values_that_mean_nothing_are_refused(train, capsys, flags):
    assert flags[0] in refused(train, capsys, *flags)


def test_flags_reach_the_networks_and_the_buffer(train):
    def blurs(net):
        return any(type(m).__name__ in ("BlurPool", "BlurUpsample") for m in net.modules())

    flags = ["--n-layers", "3", "--feat-str", "R256_3, pix, c7s1_64", "--buffer-size", "7"]
    nets, _ = small_nets(train, *flags, "--antialias")
    assert sum(key.startswith("R256_") for key in nets["G"].layers) == 3
    assert [head[0].in_features for head in nets["H"].heads] == [16, 3, 4]
    assert nets["buffer_y"].size == 7 and blurs(nets["G"]) and blurs(nets["D"])
    nets, _ = small_nets(train)
    assert not blurs(nets["G"]) and not blurs(nets["D"]) and nets["buffer_y"].size == 0
    for name in "GDH":  # initialized as the authors do: Xavier, gain 0.02
        for p in nets[name].parameters():
            if p.dim() > 1:
                fans = (p.shape[0] + p.shape[1]) * p[0, 0].numel()
                assert p.std().item() == pytest.approx(0.02 * (2 / fans) ** 0.5, rel=0.5)


def test_each_network_has_its_own_adam_as_published(train):
    nets, _ = small_nets(train)
    for name in "GDH":
        (group,) = nets[f"optimizer_{name}"].param_groups
        assert isinstance(nets[f"optimizer_{name}"], torch.optim.Adam)
        assert (group["lr"], group["betas"], group["weight_decay"]) == (2e-4, (0.5, 0.999), 0)
        assert [id(p) for p in group["params"]] == [id(p) for p in nets[name].parameters()]


# -------------------------------------------------------------------------------------- measuring


def test_inversion_is_told_once_a_run(train, capsys):
    progress = {}
    train.warn_of_inversion({"luminance": -0.1, "change": 0.5, "l1": -3.0}, progress)
    assert capsys.readouterr().out == "" and not progress
    train.warn_of_inversion({"luminance": -0.4}, progress)
    (line,) = capsys.readouterr().out.splitlines()
    assert "light and dark change places" in line and "--NCE-ratio" in line
    for _ in range(2):
        train.warn_of_inversion({"luminance": -0.9}, progress)
    assert capsys.readouterr().out == ""


def sample(train, root, G, epoch=1):
    """What train.sample measures with this generator on root/unpaired, and the grids by name."""
    argv = ["--data-root", str(root), "--data-folder", "unpaired", *SMALL]
    test_set = train.build_data(train.parse_args(argv))[1]
    progress = {"epoch": epoch}
    measured = train.sample({"G": G}, test_set, root, progress, torch.device("cpu"))
    return measured, {f.name: np.asarray(Image.open(f)) for f in root.glob("*.png")}, progress


def tiles(grid):
    """The pictures of a grid, each (32, 32, 3) of 0 to 255."""
    assert grid.shape[0] == 36
    return [grid[2:34, left : left + 32] for left in range(2, grid.shape[1] - 2, 34)]


def test_sample_shows_eight_and_measures_all(train, tmp_path, capsys):
    write_unpaired(tmp_path, train=(2, 2), test=10)
    measured, grids, progress = sample(train, tmp_path, lambda x: -0.5 * x, epoch=7)
    assert set(grids) == {"x7.png", "y_G7.png"}
    folder = tmp_path / "unpaired" / "test"
    pixels = {s: np.stack([Image.open(f) for f in sorted((folder / s).iterdir())]) for s in "xy"}
    assert (np.stack(tiles(grids["x7.png"])) == pixels["x"][:8]).all()
    halved = 127.5 - (pixels["x"][:8] / 127.5 - 1) * 63.75
    np.testing.assert_allclose(tiles(grids["y_G7.png"]), halved, atol=1)
    x, y = (pixels[side] / 127.5 - 1 for side in "xy")
    assert list(measured) == ["change", "luminance", "l1"]
    assert measured["change"] == pytest.approx(np.abs(-0.5 * x - x).mean(), rel=1e-4)
    assert measured["luminance"] == pytest.approx(-1, abs=1e-4)
    assert measured["l1"] == pytest.approx(np.abs(-0.5 * x - y).mean(), rel=1e-4)
    assert progress["warned"] and "change places" in capsys.readouterr().out


def test_no_l1_where_names_do_not_match(train, tmp_path):
    write_unpaired(tmp_path, train=(2, 2), test=3)
    (tmp_path / "unpaired" / "test" / "y" / "000.png").unlink()
    measured, grids, _ = sample(train, tmp_path, lambda x: x)
    assert list(measured) == ["change", "luminance"] and measured["change"] == 0
    assert len(tiles(grids["x1.png"])) == len(tiles(grids["y_G1.png"])) == 3


# ------------------------------------------------------------------------------------- whole runs


def run(train, root, *flags):
    data = ["--data-root", str(root), "--data-folder", "unpaired", "--run-name", "run"]
    return train.main([*data, *SMALL, *flags])


def rows(root, name="run"):
    with open(root / "visualize" / "CUT" / name / "losses.csv", newline="") as file:
        return list(csv.DictReader(file))


def checkpoint(root, name="run"):
    return torch.load(root / "CUT" / "model" / name / "checkpoint.pt", weights_only=True)


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


TWO_STEPS = ["--max-steps", "2", "--save-model"]


@pytest.fixture
def default_run(train, tmp_path):
    """The checkpoint of two steps with default flags."""
    write_unpaired(tmp_path)
    assert run(train, tmp_path, *TWO_STEPS, "--run-name", "default") == 0
    assert run(train, tmp_path, *TWO_STEPS, "--run-name", "again") == 0
    state = checkpoint(tmp_path, "default")
    assert same(state["G"], checkpoint(tmp_path, "again")["G"])  # else nothing below says anything
    return state


@pytest.mark.parametrize(
    "flags",
    [
        ["--nce", "ence"],
        ["--nce", "hdce"],
        ["--query", "attention"],
        ["--src-ratio", "10"],
        ["--flip-equivariance"],
        ["--fast"],
        ["--no-detach"],
        ["--num-patches", "8"],
        ["--tau", "0.2"],
        ["--NCE-ratio", "3"],
        ["--NCE-ratio-id", "0"],
        ["--swap-xy"],
    ],
    ids=" ".join,
)
def test_a_flag_changes_what_is_learned(train, tmp_path, default_run, flags):
    assert run(train, tmp_path, *flags, *TWO_STEPS) == 0
    found = checkpoint(tmp_path)
    assert not same(found["G"], default_run["G"]) and not same(found["H"], default_run["H"])
    terms = {"G_total", "G_gan", "NCE", "NCE_id", "SRC", "D_total", "D_real", "D_fake"}
    absent = {"--src-ratio": {}, "--fast": {"NCE_id", "SRC"}, "--NCE-ratio-id": {"NCE_id", "SRC"}}
    wanted = terms - set(absent.get(flags[0], {"SRC"}))
    assert {name for name in rows(tmp_path)[0] if name in terms} == wanted
    assert found["progress"]["step"] == 2


def test_feat_str_trains_other_heads(train, tmp_path, default_run):
    assert run(train, tmp_path, "--feat-str", "d256, R256_2", *TWO_STEPS) == 0
    state = checkpoint(tmp_path)
    assert {key.split(".")[1] for key in state["H"]} == {"0", "1"}
    assert {key.split(".")[1] for key in default_run["H"]} == set("01234")
    assert not same(state["G"], default_run["G"])


def test_antialias_trains(train, tmp_path, default_run):
    assert run(train, tmp_path, "--antialias", *TWO_STEPS) == 0
    one, other = (
        s["G"]["layers.R256_1.layers.1.weight"] for s in (checkpoint(tmp_path), default_run)
    )
    assert one.shape == other.shape and not torch.equal(one, other)
    assert rows(tmp_path)[0]["NCE"] != rows(tmp_path, "default")[0]["NCE"]


def test_buffer_keeps_pictures_and_changes_what_D_learns(train, tmp_path, default_run):
    assert run(train, tmp_path, "--buffer-size", "50", *TWO_STEPS) == 0
    state = checkpoint(tmp_path)
    assert [image.shape for image in state["buffer_y"]["images"]] == [(3, 32, 32)] * 2
    assert default_run["buffer_y"]["images"] == []
    assert same(state["D"], default_run["D"])  # not full yet: D has seen the same
    for size in ("0", "1"):
        flags = ["--buffer-size", size, "--run-name", f"run{size}", "--max-steps", "6"]
        assert run(train, tmp_path, *flags, "--save-model") == 0
    assert not same(checkpoint(tmp_path, "run0")["D"], checkpoint(tmp_path, "run1")["D"])


def test_buffer_and_heads_go_on_after_resuming(train, tmp_path):
    write_unpaired(tmp_path, train=(5, 3))
    flags = ["--epochs", "2", "--save-model", "--buffer-size", "2", "--flip-equivariance"]
    assert run(train, tmp_path, *flags, "--run-name", "straight") == 0
    assert run(train, tmp_path, *flags, "--max-steps", "3") == 0
    assert len(checkpoint(tmp_path)["buffer_y"]["images"]) == 2
    assert train.main(["--run-name", "run", "--resume"]) == 0
    straight, resumed = checkpoint(tmp_path, "straight"), checkpoint(tmp_path)
    images = [state["buffer_y"]["images"] for state in (straight, resumed)]
    assert all(torch.equal(a, b) for a, b in zip(*images, strict=True))
    assert all(same(straight[name], resumed[name]) for name in "GDH")
    moments = [state["optimizer_H"]["state"] for state in (straight, resumed)]
    assert len(moments[0]) == 5 * 4  # five heads of two layers, each with a weight and a bias
    assert all(same(moments[0][k], moments[1][k]) for k in moments[0])


@pytest.mark.parametrize("flags", [[], ["--fast"], ["--query", "attention", "--src-ratio", "1"]])
def test_a_short_last_batch(train, tmp_path, flags):
    write_unpaired(tmp_path, train=(5, 4))
    flags = ["--epochs", "1", "--batch-size", "2", "--num-patches", "300", *flags]
    assert run(train, tmp_path, *flags, "--save-model") == 0
    assert checkpoint(tmp_path)["progress"]["step"] == 3  # 2, 2 and 1 pictures


def test_columns_totals_and_schedule(train, tmp_path):
    write_unpaired(tmp_path, train=(3, 4))
    flags = ["--epochs", "3", "--sample-every", "2", "--batch-size", "2", "--src-ratio", "2"]
    assert run(train, tmp_path, *flags, "--save-model") == 0
    terms = ["G_total", "G_gan", "NCE", "NCE_id", "SRC", "D_total", "D_real", "D_fake"]
    first = ["epoch", "seconds", "images_per_second", "learning_rate"]
    assert list(rows(tmp_path)[0]) == [*first, *terms, "change", "luminance", "l1"]
    assert [bool(row["change"]) for row in rows(tmp_path)] == [True, False, True]
    for row in rows(tmp_path):
        values = {name: float(row[name]) for name in terms}
        nce = (values["NCE"] + values["NCE_id"]) / 2 + 2 * values["SRC"]
        assert values["G_total"] == pytest.approx(values["G_gan"] + nce, rel=1e-5)
        total = (values["D_real"] + values["D_fake"]) / 2
        assert values["D_total"] == pytest.approx(total, rel=1e-5)
    assert [float(row["learning_rate"]) for row in rows(tmp_path)] == [2e-4, 2e-4, 1e-4]
    state = checkpoint(tmp_path)
    for name in "GDH":  # the heads' learning rate falls too
        assert state[f"optimizer_{name}"]["param_groups"][0]["lr"] == 1e-4
    folder = tmp_path / "visualize" / "CUT" / "run" / "val"
    names = {f"{kind}{epoch}.png" for kind in ("x", "y_G") for epoch in (1, 3)}
    assert {f.name for f in folder.iterdir()} == names


def test_swap_xy_translates_the_other_side(train, tmp_path):
    write_unpaired(tmp_path)
    for name, flag in (("one", []), ("other", ["--swap-xy"])):
        assert run(train, tmp_path, "--max-steps", "1", "--run-name", name, *flag) == 0
    for name, side in (("one", "x"), ("other", "y")):
        grid = Image.open(tmp_path / "visualize" / "CUT" / name / "val" / "x1.png")
        files = sorted((tmp_path / "unpaired" / "test" / side).iterdir())
        assert (np.stack(tiles(np.asarray(grid))) == np.stack([Image.open(f) for f in files])).all()

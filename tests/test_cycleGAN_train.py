"""cycleGAN's equations, its step, and what it alone writes; the rest is in test_every_method.py."""

import csv
import types

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from conftest import draw_no_curves, load_script, write_unpaired

SMALL = ["--image-size", "32", "--load-size", "36", "--ngf", "4", "--ndf", "4", "--n-layers", "1"]
SMALL += ["--device", "cpu", "--num-workers", "0", "--precision", "fp32"]
NETS = ("G", "F", "D_X", "D_Y")


@pytest.fixture(autouse=True)
def one_thread():
    """Two threads slow networks this small down, more so on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def train(script, tmp_path, monkeypatch):
    """cycleGAN/train.py, which writes its runs below tmp_path and draws no curves."""
    (tmp_path / "cycleGAN").mkdir()
    module = script("cycleGAN")
    draw_no_curves(monkeypatch, "cycleGAN")
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
    for name in NETS:
        for p in nets[name].double().parameters():
            nn.init.normal_(p, 0.0, 0.3)
    return nets, args


def batch(size=2, dtype=torch.float32, seed=1):
    """A batch x, y of noise, (size, 3, 32, 32) in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(2, size, 3, 32, 32, generator=generator, dtype=dtype) * 2 - 1


# ------------------------------------------------------------------------------------ mathematics


def numpy_l1(a, b):
    return np.abs(a.detach().numpy() - b.detach().numpy()).mean()


def numpy_gan_loss(prediction, real):
    D = prediction.detach().numpy()
    return ((D - 1) ** 2 if real else D**2).mean()


@pytest.mark.parametrize("real", [True, False])
def test_gan_loss(real):
    gan_loss = load_script("cycleGAN").gan_loss
    prediction = torch.randn(2, 1, 5, 7, dtype=torch.float64)
    assert gan_loss(prediction, real).item() == pytest.approx(numpy_gan_loss(prediction, real))
    assert gan_loss(torch.full((1, 1, 2, 2), float(real)), real) == 0


def plain_losses_G(G, F, D_X, D_Y, x, y, args):
    """Each term by its own calls of the networks. The values are tensors."""
    fake_y, fake_x = G(x), F(y)
    terms = {
        "G_gan": ((D_Y(fake_y) - 1) ** 2).mean(),
        "F_gan": ((D_X(fake_x) - 1) ** 2).mean(),
        "cycle": (F(fake_y) - x).abs().mean() + (G(fake_x) - y).abs().mean(),
    }
    total = terms["G_gan"] + terms["F_gan"] + args.cycle_ratio * terms["cycle"]
    if args.identity_ratio:
        terms["identity"] = (G(y) - y).abs().mean() + (F(x) - x).abs().mean()
        total = total + args.identity_ratio * terms["identity"]
    if args.pix_loss:
        look = load_script("cycleGAN").DownSampler(args.pix_blur, args.pix_pool)  # tested by itself
        near_x, near_y = look(fake_y) - look(x), look(fake_x) - look(y)
        terms["pix"] = near_x.abs().mean() + near_y.abs().mean()
        total = total + args.pix_ratio * terms["pix"]
    return {"G_total": total, **terms}


VARIANTS = [
    [],
    ["--cycle-ratio", "3.5"],
    ["--cycle-ratio", "0"],
    ["--identity-ratio", "5"],
    ["--pix-loss"],
    ["--pix-loss", "--pix-ratio", "10", "--pix-blur", "--pix-pool", "4"],
    ["--pix-loss", "--identity-ratio", "0.5", "--cycle-ratio", "2"],
]


@pytest.mark.parametrize("flags", VARIANTS, ids=" ".join)
def test_losses_of_G_equal_those_of_separate_calls(train, flags, float64_outputs):
    nets, args = lively_nets(train, *flags)
    x, y = batch(dtype=torch.float64)
    four = [nets[name] for name in NETS]
    weights = [p for net in four[:2] for p in net.parameters()]
    wanted = plain_losses_G(*four, x, y, args)
    wanted_gradients = torch.autograd.grad(wanted["G_total"], weights)
    losses, fake_x, fake_y = train.losses_G(*four, x, y, args)
    assert list(losses) == list(wanted)
    for name, value in wanted.items():
        torch.testing.assert_close(losses[name], value, rtol=1e-10, atol=0, msg=name)
    gradients = torch.autograd.grad(losses["G_total"], weights)
    torch.testing.assert_close(gradients, wanted_gradients, rtol=1e-7, atol=1e-9)
    assert all(gradient.abs().max() > 1e-3 for gradient in gradients)
    torch.testing.assert_close(fake_x, nets["F"](y), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(fake_y, nets["G"](x), rtol=1e-10, atol=1e-10)


def test_losses_of_G_equal_numpy():
    """With toy networks, so that every direction is told from the other."""
    train = load_script("cycleGAN")
    x, y = batch(dtype=torch.float64)

    def G(image):
        return 0.5 * image + 0.1

    def F(image):
        return 0.9 * image - 0.3

    def D_X(image):
        return image.mean(1, keepdim=True) + 0.2

    def D_Y(image):
        return image.prod(1, keepdim=True) - 0.4

    flags = ["--identity-ratio", "4", "--pix-loss", "--pix-ratio", "6", "--pix-pool", "2"]
    args = train.parse_args([*SMALL, *flags, "--cycle-ratio", "7"])
    losses, fake_x, fake_y = train.losses_G(G, F, D_X, D_Y, x, y, args)

    def pooled(image):
        return image.unflatten(3, (16, 2)).unflatten(2, (16, 2)).mean((3, 5))

    wanted = {"G_gan": numpy_gan_loss(D_Y(G(x)), True), "F_gan": numpy_gan_loss(D_X(F(y)), True)}
    wanted["cycle"] = numpy_l1(F(G(x)), x) + numpy_l1(G(F(y)), y)
    wanted["identity"] = numpy_l1(G(y), y) + numpy_l1(F(x), x)
    wanted["pix"] = numpy_l1(pooled(G(x)), pooled(x)) + numpy_l1(pooled(F(y)), pooled(y))
    weights = {"G_gan": 1, "F_gan": 1, "cycle": 7, "identity": 4, "pix": 6}
    wanted["G_total"] = sum(weights[name] * value for name, value in wanted.items())
    assert set(losses) == set(wanted)
    for name, value in wanted.items():
        assert losses[name].item() == pytest.approx(value, rel=1e-12), name
    assert torch.equal(fake_x, F(y)) and torch.equal(fake_y, G(x))


def test_losses_of_D_equal_those_of_separate_calls(train, float64_outputs):
    nets, _ = lively_nets(train)
    (real, fake), D = batch(3, torch.float64), nets["D_X"]
    real = real[:2]  # as many of one as of the other are not needed
    on_real, on_fake = D(real), D(fake)
    wanted = {"D_X_real": numpy_gan_loss(on_real, True), "D_X_fake": numpy_gan_loss(on_fake, False)}
    wanted["D_X_total"] = (wanted["D_X_real"] + wanted["D_X_fake"]) / 2
    losses = train.losses_D(D, real, fake, "D_X")
    assert set(losses) == set(wanted)
    for name, value in wanted.items():
        assert losses[name].item() == pytest.approx(value, rel=1e-10), name
    plain = (((on_real - 1) ** 2).mean() + (on_fake**2).mean()) / 2
    weights = list(D.parameters())
    wanted = torch.autograd.grad(plain, weights)
    gradients = torch.autograd.grad(losses["D_X_total"], weights)
    torch.testing.assert_close(gradients, wanted, rtol=1e-7, atol=1e-9)


def test_one_call_serves_translation_and_identity(train):
    nets, args = small_nets(train, "--identity-ratio", "5")
    x, y = batch()
    calls = []
    for name in NETS:
        nets[name].register_forward_pre_hook(
            lambda _net, inputs, name=name: calls.append((name, len(inputs[0])))
        )
    train.training_step(nets, x, y, args)
    G_step = [("G", 4), ("F", 6), ("G", 2), ("D_Y", 2), ("D_X", 2)]
    assert calls == [*G_step, ("D_X", 4), ("D_Y", 4)]


# ------------------------------------------------------------------------------------- discipline


def weights(net):
    return [p.detach().clone() for p in net.parameters()]


def changed(net, before):
    return not all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))


def test_each_step_reaches_its_own_networks_alone(train, monkeypatch):
    nets, args = small_nets(train, "--identity-ratio", "1", "--pix-loss")
    order, descend = [], train.descend

    def watched(loss, *optimizers):
        (optimizer,) = optimizers
        own = ("G", "F") if optimizer is nets["optimizer_G"] else ("D_X", "D_Y")
        for name in NETS:
            for p in nets[name].parameters():
                p.grad = None
        before = {name: weights(nets[name]) for name in NETS}
        descend(loss, *optimizers)
        for name in NETS:
            has_gradient = {p.grad is not None for p in nets[name].parameters()}
            assert has_gradient == {name in own}, name
            assert changed(nets[name], before[name]) == (name in own), name
        order.append(own)

    monkeypatch.setattr(train, "descend", watched)
    train.training_step(nets, *batch(), args)
    assert order == [("G", "F"), ("D_X", "D_Y")]


def test_each_D_sees_its_own_side_and_what_was_made_before_G_moved(train, monkeypatch):
    nets, args = small_nets(train, "--buffer-size", "0")
    x, y = batch()
    with torch.no_grad():
        made = {"D_X": nets["F"](y), "D_Y": nets["G"](x)}
    seen, losses_D, before = {}, train.losses_D, weights(nets["G"])

    def watched(D, real, fake, name):
        assert D is nets[name] and not fake.requires_grad
        assert changed(nets["G"], before)  # G has had its step
        seen[name] = (real, fake)
        return losses_D(D, real, fake, name)

    monkeypatch.setattr(train, "losses_D", watched)
    losses = train.training_step(nets, x, y, args)
    assert list(seen) == ["D_X", "D_Y"]
    assert torch.equal(seen["D_X"][0], x) and torch.equal(seen["D_Y"][0], y)
    for name in seen:
        torch.testing.assert_close(seen[name][1], made[name])
    terms = [f"D_{side}_{term}" for side in "XY" for term in ("total", "real", "fake")]
    assert list(losses) == ["G_total", "G_gan", "F_gan", "cycle", *terms]


def test_pictures_reach_D_through_the_buffers(train, monkeypatch):
    nets, args = small_nets(train)
    given, seen, losses_D = {}, {}, train.losses_D
    for side, net in (("x", "F"), ("y", "G")):

        def buffer(images, side=side, net=net):
            given[side] = (images, torch.full_like(images, 0.5))
            return given[side][1]

        nets[f"buffer_{side}"] = buffer

    def watched(D, real, fake, name):
        seen[name] = fake
        return losses_D(D, real, fake, name)

    monkeypatch.setattr(train, "losses_D", watched)
    x, y = batch()
    made_y, made_x = nets["G"](x), nets["F"](y)
    train.training_step(nets, x, y, args)
    assert seen["D_X"] is given["x"][1] and seen["D_Y"] is given["y"][1]
    torch.testing.assert_close(given["x"][0], made_x)
    torch.testing.assert_close(given["y"][0], made_y)


def test_the_gradient_of_each_D_is_that_of_its_own_loss(train):
    nets, args = small_nets(train, "--buffer-size", "0")
    x, y = batch()
    wanted = {}
    for name, real, fake in (("D_X", x, nets["F"](y)), ("D_Y", y, nets["G"](x))):
        loss = train.losses_D(nets[name], real, fake.detach(), name)[f"{name}_total"]
        wanted[name] = torch.autograd.grad(loss, list(nets[name].parameters()))
    train.training_step(nets, x, y, args)
    for name, gradients in wanted.items():
        found = [p.grad for p in nets[name].parameters()]
        torch.testing.assert_close(found, list(gradients))


def test_one_adam_for_both_generators_and_one_for_both_discriminators(train):
    nets, _ = small_nets(train)
    for name, pair in (("optimizer_G", ("G", "F")), ("optimizer_D", ("D_X", "D_Y"))):
        (group,) = nets[name].param_groups
        assert isinstance(nets[name], torch.optim.Adam)
        assert (group["lr"], group["betas"], group["weight_decay"]) == (2e-4, (0.5, 0.999), 0)
        both = [id(p) for part in pair for p in nets[part].parameters()]
        assert [id(p) for p in group["params"]] == both
    assert not {id(p) for p in nets["G"].parameters()} & {id(p) for p in nets["F"].parameters()}


@pytest.mark.parametrize("epochs", [1, 2, 3, 5, 8, 200])
def test_learning_rate_is_constant_for_half_of_the_epochs_then_falls(train, epochs):
    args = types.SimpleNamespace(epochs=epochs)
    falling = epochs // 2
    steady = epochs - falling
    found = [train.lr_factor(e, epochs, train.decay_epochs(args)) for e in range(1, epochs + 1)]
    wanted = [1.0] * steady + [1 - k / (falling + 1) for k in range(1, falling + 1)]
    assert found == pytest.approx(wanted)
    assert train.lr_factor(epochs + 1, epochs, falling) == pytest.approx(0)


# ------------------------------------------------------------------------------------------ flags


def refused(train, capsys, *flags):
    """The one error line that these flags end with."""
    with pytest.raises(SystemExit) as ended:
        train.parse_args(list(flags))
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("train.py: error: ")
    return line


@pytest.mark.parametrize("flags", [["--pix-ratio", "5"], ["--pix-blur"], ["--pix-pool", "2"]])
def test_pix_flags_without_pix_loss_are_refused(train, capsys, flags):
    line = refused(train, capsys, *flags)
    assert flags[0] in line and "without --pix-loss" in line
    assert train.parse_args(["--pix-loss", *flags]).pix_loss


def test_a_pool_that_does_not_divide_the_picture_is_refused(train, capsys):
    line = refused(train, capsys, "--pix-loss", "--pix-pool", "5")
    assert "--pix-pool 5" in line and "256" in line
    train.parse_args(["--pix-loss", "--pix-pool", "5", "--image-size", "40"])


@pytest.mark.parametrize("size", ["30", "33", "28", "0"])
def test_sizes_that_the_generator_cannot_halve_twice_are_refused(train, capsys, size):
    assert size in refused(train, capsys, "--image-size", size)


def test_defaults_are_the_papers(train):
    args = train.parse_args([])
    assert (args.n_layers, args.buffer_size, args.cycle_ratio, args.epochs) == (9, 50, 10, 200)
    assert (args.identity_ratio, args.pix_loss, args.antialias) == (0, False, False)
    assert (args.pix_ratio, args.pix_blur, args.pix_pool) == (5, False, 1)


def test_flags_reach_the_networks_and_buffers(train):
    def blurs(net):
        return any(type(m).__name__ in ("BlurPool", "BlurUpsample") for m in net.modules())

    nets, _ = small_nets(train, "--n-layers", "2", "--buffer-size", "7", "--antialias")
    for name in "GF":
        assert sum(key.startswith("R256_") for key in nets[name].layers) == 2
        assert nets[name].layers["c7s1_64"][1].out_channels == 4
    assert [blurs(nets[name]) for name in NETS] == [True] * 4
    assert nets["buffer_x"].size == nets["buffer_y"].size == 7
    assert nets["buffer_x"] is not nets["buffer_y"]
    nets, _ = small_nets(train)
    assert [blurs(nets[name]) for name in NETS] == [False] * 4
    first = torch.cat([p.flatten() for p in nets["G"].parameters()]).std()
    assert first.item() == pytest.approx(0.02, rel=0.05)  # initialized as the paper says


# -------------------------------------------------------------------------------------- measuring


def test_luminance_correlation(train):
    a, b = (image[None] for image in batch(1)[:, 0])
    correlation = train.luminance_correlation
    assert correlation(a, a) == pytest.approx(1, abs=1e-5)
    assert correlation(a, -a) == pytest.approx(-1, abs=1e-5)
    weights = np.array([0.299, 0.587, 0.114])
    lumas = [np.tensordot(weights, image[0].double().numpy(), 1).ravel() for image in (a, b)]
    assert correlation(a, b) == pytest.approx(np.corrcoef(*lumas)[0, 1], abs=1e-5)
    assert correlation(a, 0.2 * b + 0.5) == pytest.approx(correlation(a, b), abs=1e-5)


def test_a_constant_picture_correlates_with_nothing(train):
    """Nor do two of them, whose differences from their mean are nothing but rounding."""
    zeros = torch.zeros(1, 3, 32, 32)
    assert train.luminance_correlation(zeros, zeros) == 0
    noise = batch(1)[0]
    for size, values in ((256, torch.linspace(-1, 1, 40)), (512, torch.linspace(-0.9, 0.9, 7))):
        pictures = [torch.full((1, 3, size, size), value) for value in values.tolist()]
        for one, other in zip(pictures, pictures[::-1], strict=True):
            assert abs(train.luminance_correlation(one, other)) < 0.05
    assert abs(train.luminance_correlation(torch.full_like(noise, 0.3), noise)) < 0.05


def test_inversion_is_told_once_a_run(train, capsys):
    progress = {}
    train.warn_of_inversion({"luminance_xy": 0.5, "luminance_yx": -0.1, "l1_xy": -3.0}, progress)
    assert capsys.readouterr().out == "" and not progress
    train.warn_of_inversion({"luminance_xy": 0.5, "luminance_yx": -0.4}, progress)
    (line,) = capsys.readouterr().out.splitlines()
    assert "luminance_yx" in line and "--pix-loss" in line
    for _ in range(2):
        train.warn_of_inversion({"luminance_xy": -0.9, "luminance_yx": -0.9}, progress)
    assert capsys.readouterr().out == ""
    train.warn_of_inversion({"luminance_xy": -0.9, "luminance_yx": 0.4}, {})  # another run
    assert "luminance_xy" in capsys.readouterr().out


def sample(train, root, G, F, epoch=1):
    """What train.sample measures with these generators on root/unpaired, and the grids by name."""
    argv = ["--data-root", str(root), "--data-folder", "unpaired", *SMALL]
    test_set = train.build_data(train.parse_args(argv))[1]
    nets, progress = {"G": G, "F": F}, {"epoch": epoch}
    measured = train.sample(nets, test_set, root, progress, torch.device("cpu"))
    grids = {f.name: np.asarray(Image.open(f)) for f in root.glob("*.png")}
    return measured, grids, progress


def tiles(grid):
    """The pictures of a grid, each (32, 32, 3) of 0 to 255."""
    assert grid.shape[0] == 36
    return [grid[2:34, left : left + 32] for left in range(2, grid.shape[1] - 2, 34)]


def test_sample_shows_eight_and_measures_all(train, tmp_path, capsys):
    write_unpaired(tmp_path, train=(2, 2), test=10)
    measured, grids, progress = sample(train, tmp_path, lambda x: -x, lambda y: 0.5 * y, epoch=7)
    assert set(grids) == {"x7.png", "y7.png", "x_G7.png", "y_G7.png"}
    files = {side: sorted((tmp_path / "unpaired" / "test" / side).iterdir()) for side in "xy"}
    pixels = {side: np.stack([Image.open(f) for f in files[side]]) for side in "xy"}
    for side in "xy":
        assert (np.stack(tiles(grids[f"{side}7.png"])) == pixels[side][:8]).all()
    np.testing.assert_allclose(tiles(grids["y_G7.png"]), 255.0 - pixels["x"][:8], atol=1)
    halved = (pixels["y"][:8] / 127.5 - 1) * 63.75 + 127.5
    np.testing.assert_allclose(tiles(grids["x_G7.png"]), halved, atol=1)
    # The set's y is the negative of its x: G is right, F is far off.
    assert list(measured) == ["luminance_xy", "l1_xy", "luminance_yx", "l1_yx"]
    assert measured["luminance_xy"] == pytest.approx(-1, abs=1e-4)
    assert measured["luminance_yx"] == pytest.approx(1, abs=1e-4)
    assert measured["l1_xy"] == pytest.approx(0, abs=1e-5)
    x, y = (pixels[side] / 127.5 - 1 for side in "xy")
    assert measured["l1_yx"] == pytest.approx(np.abs(0.5 * y - x).mean(), rel=1e-4)
    assert progress["warned"] and "luminance_xy" in capsys.readouterr().out


def test_no_l1_where_names_do_not_match(train, tmp_path):
    write_unpaired(tmp_path, train=(2, 2), test=3)
    (tmp_path / "unpaired" / "test" / "y" / "000.png").unlink()
    measured, grids, _ = sample(train, tmp_path, lambda x: x, lambda y: y)
    assert list(measured) == ["luminance_xy", "luminance_yx"]
    assert (len(tiles(grids["x1.png"])), len(tiles(grids["y1.png"]))) == (3, 2)


# ------------------------------------------------------------------------------------- whole runs


def run(train, root, *flags):
    data = ["--data-root", str(root), "--data-folder", "unpaired", "--run-name", "run"]
    return train.main([*data, *SMALL, *flags])


def rows(root, name="run"):
    with open(root / "visualize" / "cycleGAN" / name / "losses.csv", newline="") as file:
        return list(csv.DictReader(file))


def checkpoint(root, name="run"):
    file = root / "cycleGAN" / "model" / name / "checkpoint.pt"
    return torch.load(file, weights_only=True)


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.fixture
def default_run(train, tmp_path):
    """The checkpoint of two steps with default flags."""
    write_unpaired(tmp_path)
    flags = ["--max-steps", "2", "--save-model"]
    assert run(train, tmp_path, *flags, "--run-name", "default") == 0
    assert run(train, tmp_path, *flags, "--run-name", "again") == 0
    state = checkpoint(tmp_path, "default")
    assert same(state["G"], checkpoint(tmp_path, "again")["G"])  # else nothing below says anything
    return state


@pytest.mark.parametrize(
    "flags, term",
    [
        (["--cycle-ratio", "1"], None),
        (["--identity-ratio", "5"], "identity"),
        (["--pix-loss"], "pix"),
        (["--swap-xy"], None),
        (["--lr", "1e-3"], None),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_flag_changes_what_is_learned(train, tmp_path, default_run, flags, term):
    assert run(train, tmp_path, *flags, "--max-steps", "2", "--save-model") == 0
    found = checkpoint(tmp_path)
    assert not same(found["G"], default_run["G"]) and not same(found["F"], default_run["F"])
    added = {"G_total", "G_gan", "F_gan", "cycle", *([term] if term else [])}
    terms = {name for name in rows(tmp_path)[0] if name in {"identity", "pix"} | added}
    assert terms == added


@pytest.mark.parametrize("flag", [["--pix-ratio", "50"], ["--pix-blur"], ["--pix-pool", "4"]])
def test_pix_flags_change_what_is_learned(train, tmp_path, flag):
    write_unpaired(tmp_path)
    common = ["--pix-loss", "--max-steps", "2", "--save-model"]
    assert run(train, tmp_path, *common, "--run-name", "plain") == 0
    assert run(train, tmp_path, *common, *flag) == 0
    assert not same(checkpoint(tmp_path)["G"], checkpoint(tmp_path, "plain")["G"])


def test_antialias_trains(train, tmp_path, default_run):
    flags = ["--antialias", "--max-steps", "2", "--save-model"]
    assert run(train, tmp_path, *flags) == 0
    state = checkpoint(tmp_path)
    one, other = (s["F"]["layers.R256_1.layers.1.weight"] for s in (state, default_run))
    assert one.shape == other.shape and not torch.equal(one, other)


def test_buffers_are_in_the_checkpoint_and_in_use_after_resuming(train, tmp_path):
    write_unpaired(tmp_path, train=(5, 3))  # five steps an epoch; the buffers are full after two
    flags = ["--epochs", "2", "--save-model", "--buffer-size", "2"]
    assert run(train, tmp_path, *flags, "--run-name", "straight") == 0
    assert run(train, tmp_path, *flags, "--max-steps", "3") == 0
    halfway = checkpoint(tmp_path)
    assert train.main(["--run-name", "run", "--resume"]) == 0
    straight, resumed = checkpoint(tmp_path, "straight"), checkpoint(tmp_path)
    for name in ("buffer_x", "buffer_y"):
        images = [state[name]["images"] for state in (halfway, resumed, straight)]
        assert [len(kept) for kept in images] == [2, 2, 2]
        assert all(torch.equal(a, b) for a, b in zip(*images[1:], strict=True))
        assert all(image.shape == (3, 32, 32) for image in images[0])
    assert not torch.equal(straight["buffer_x"]["images"][0], straight["buffer_y"]["images"][0])
    assert same(straight["D_X"], resumed["D_X"]) and same(straight["D_Y"], resumed["D_Y"])


def test_buffer_size_changes_what_D_learns(train, tmp_path):
    write_unpaired(tmp_path)
    for size in ("0", "1"):
        flags = ["--buffer-size", size, "--run-name", f"run{size}"]
        assert run(train, tmp_path, *flags, "--max-steps", "6", "--save-model") == 0
    one, other = (checkpoint(tmp_path, f"run{size}") for size in "01")
    assert (len(one["buffer_x"]["images"]), len(other["buffer_x"]["images"])) == (0, 1)
    assert not same(one["D_Y"], other["D_Y"])


def test_columns_and_totals(train, tmp_path):
    write_unpaired(tmp_path, train=(3, 5))
    flags = ["--epochs", "3", "--sample-every", "2", "--batch-size", "2", "--pix-loss"]
    assert run(train, tmp_path, *flags, "--identity-ratio", "5", "--save-model") == 0
    terms = ["G_total", "G_gan", "F_gan", "cycle", "identity", "pix"]
    terms += [f"D_{side}_{term}" for side in "XY" for term in ("total", "real", "fake")]
    measured = ["luminance_xy", "l1_xy", "luminance_yx", "l1_yx"]
    first = ["epoch", "seconds", "images_per_second", "learning_rate"]
    assert list(rows(tmp_path)[0]) == [*first, *terms, *measured]
    assert [bool(row["l1_yx"]) for row in rows(tmp_path)] == [True, False, True]
    for row in rows(tmp_path):
        values = {name: float(row[name]) for name in terms}
        weighted = 10 * values["cycle"] + 5 * values["identity"] + 5 * values["pix"]
        total = values["G_gan"] + values["F_gan"] + weighted
        assert values["G_total"] == pytest.approx(total, rel=1e-5)
        for side in "XY":
            total = (values[f"D_{side}_real"] + values[f"D_{side}_fake"]) / 2
            assert values[f"D_{side}_total"] == pytest.approx(total, rel=1e-5)
    assert [float(row["learning_rate"]) for row in rows(tmp_path)] == [2e-4, 2e-4, 1e-4]
    state = checkpoint(tmp_path)
    for name in ("optimizer_G", "optimizer_D"):
        assert state[name]["param_groups"][0]["lr"] == 1e-4
    assert state["progress"]["step"] == 9  # 2, 2 and 1 pictures
    folder = tmp_path / "visualize" / "cycleGAN" / "run" / "val"
    names = {f"{kind}{epoch}.png" for kind in ("x", "y", "x_G", "y_G") for epoch in (1, 3)}
    assert {f.name for f in folder.iterdir()} == names


def test_swap_xy_trains_the_other_direction(train, tmp_path):
    write_unpaired(tmp_path)
    for name, flag in (("one", []), ("other", ["--swap-xy"])):
        assert run(train, tmp_path, "--max-steps", "1", "--run-name", name, *flag) == 0
    one, other = (tmp_path / "visualize" / "cycleGAN" / n / "val" for n in ("one", "other"))
    assert (one / "x1.png").read_bytes() == (other / "y1.png").read_bytes()
    assert (one / "y1.png").read_bytes() == (other / "x1.png").read_bytes()

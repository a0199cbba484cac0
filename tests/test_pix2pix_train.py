"""pix2pix's equations, its step, and what it alone writes; the rest is in test_every_method.py."""

import csv
import types

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from conftest import draw_no_curves, load_script, write_pairs

SMALL = ["--image-size", "32", "--load-size", "36", "--ngf", "4", "--ndf", "4", "--device", "cpu"]
SMALL += ["--num-workers", "0", "--precision", "fp32"]


@pytest.fixture(autouse=True)
def one_thread():
    """Two threads slow networks this small down, more so on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def train(script, tmp_path, monkeypatch):
    """pix2pix/train.py, which writes its runs below tmp_path and draws no curves."""
    (tmp_path / "pix2pix").mkdir()
    module = script("pix2pix")
    draw_no_curves(monkeypatch, "pix2pix")
    return module


def small_nets(train, *flags):
    """(nets, args) at 32 px."""
    args = train.parse_args([*SMALL, *flags])
    torch.manual_seed(0)
    return train.build(args, torch.device("cpu")), args


def batch(size=2):
    """A batch x, y of noise, (size, 3, 32, 32) in [-1, 1]."""
    return torch.rand(2, size, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1


# ------------------------------------------------------------------------------------ mathematics


def numpy_gan_loss(logits, real):
    D = 1 / (1 + np.exp(-logits.double().numpy()))
    return -np.log(D if real else 1 - D).mean()


def toy_D(x, y):
    """A discriminator without weights: (N, 3, H, W) twice -> logits (N, 1, H, W)."""
    return (x * y).sum(1, keepdim=True) - 0.3


@pytest.mark.parametrize("real", [True, False])
def test_gan_loss(real):
    gan_loss = load_script("pix2pix").gan_loss
    logits = torch.randn(2, 1, 5, 7)
    torch.testing.assert_close(gan_loss(logits, real).item(), numpy_gan_loss(logits, real))
    sure = torch.full((1, 1, 2, 2), 500.0 if real else -500.0)
    assert gan_loss(sure, real) == 0
    assert gan_loss(-sure, real) == 500  # where the formula itself overflows


def test_losses_of_D():
    (x, y), fake_y = batch(), batch()[1].flip(0)
    losses = load_script("pix2pix").losses_D(toy_D, x, y, fake_y)
    real, fake = numpy_gan_loss(toy_D(x, y), True), numpy_gan_loss(toy_D(x, fake_y), False)
    wanted = {"D_total": (real + fake) / 2, "D_real": real, "D_fake": fake}
    assert list(losses) == list(wanted)
    for name, value in wanted.items():
        assert losses[name].item() == pytest.approx(value, rel=1e-5), name


@pytest.mark.parametrize("l1_ratio", [100.0, 3.5, 0.0])
def test_losses_of_G(l1_ratio):
    (x, y), fake_y = batch(), batch()[1].flip(0)
    losses = load_script("pix2pix").losses_G(toy_D, x, y, fake_y, l1_ratio)
    gan = numpy_gan_loss(toy_D(x, fake_y), True)
    l1 = np.abs(fake_y.numpy() - y.numpy()).mean()
    wanted = {"G_total": gan + l1_ratio * l1, "G_gan": gan, "G_l1": l1}
    assert list(losses) == list(wanted)
    for name, value in wanted.items():
        assert losses[name].item() == pytest.approx(value, rel=1e-5), name


def test_l1_ratio_reaches_the_step(train):
    x, y = batch()
    for ratio in (100.0, 7.0):
        nets, args = small_nets(train, *([] if ratio == 100 else ["--l1-ratio", "7"]))
        losses = train.training_step(nets, x, y, args)
        wanted = losses["G_gan"] + ratio * losses["G_l1"]
        torch.testing.assert_close(losses["G_total"], wanted)


@pytest.mark.parametrize("epochs", [1, 2, 3, 5, 8, 200])
def test_learning_rate_is_constant_for_half_of_the_epochs_then_falls(train, epochs):
    args = types.SimpleNamespace(epochs=epochs)
    falling = epochs // 2
    steady = epochs - falling
    found = [train.lr_factor(e, epochs, train.decay_epochs(args)) for e in range(1, epochs + 1)]
    wanted = [1.0] * steady + [1 - k / (falling + 1) for k in range(1, falling + 1)]
    assert found == pytest.approx(wanted)
    assert found[-1] > 0
    assert train.lr_factor(epochs + 1, epochs, falling) == pytest.approx(0)


# ------------------------------------------------------------------------------------- discipline


def weights(net):
    return [p.detach().clone() for p in net.parameters()]


def changed(net, before):
    return not all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))


def test_each_step_reaches_its_own_network_alone(train, monkeypatch):
    nets, args = small_nets(train)
    order, descend = [], train.descend

    def watched(loss, optimizer):
        own, other = ("G", "D") if optimizer is nets["optimizer_G"] else ("D", "G")
        for name in "GD":
            for p in nets[name].parameters():
                p.grad = None
        before = weights(nets[own]), weights(nets[other])
        descend(loss, optimizer)
        assert all(p.grad is not None for p in nets[own].parameters())
        assert all(p.grad is None for p in nets[other].parameters())
        assert changed(nets[own], before[0])
        assert not changed(nets[other], before[1])
        order.append(own)

    monkeypatch.setattr(train, "descend", watched)
    train.training_step(nets, *batch(), args)
    assert order == ["D", "G"]


def test_gradients_of_one_step_do_not_add_to_those_of_the_next(train):
    nets, args = small_nets(train)
    train.training_step(nets, *batch(), args)
    p = nets["optimizer_D"].param_groups[0]["params"][0]
    loss = (p**2).sum()
    wanted = 2 * p.detach().clone()
    nets["optimizer_D"].param_groups[0]["params"] = [p]
    train.descend(loss, nets["optimizer_D"])
    torch.testing.assert_close(p.grad, wanted)


def test_D_sees_a_detached_picture_and_G_the_updated_D(train, monkeypatch):
    nets, args = small_nets(train)
    x, y = batch()
    seen, losses_D, losses_G = [], train.losses_D, train.losses_G

    def watched_D(D, x, y, fake_y):
        seen.append(("D", fake_y, weights(D)))
        return losses_D(D, x, y, fake_y)

    def watched_G(D, x, y, fake_y, l1_ratio):
        seen.append(("G", fake_y, weights(D)))
        return losses_G(D, x, y, fake_y, l1_ratio)

    monkeypatch.setattr(train, "losses_D", watched_D)
    monkeypatch.setattr(train, "losses_G", watched_G)
    losses = train.training_step(nets, x, y, args)
    (first, for_D, _), (second, for_G, D_weights) = seen
    assert (first, second) == ("D", "G")
    assert not for_D.requires_grad and for_G.requires_grad
    assert torch.equal(for_D, for_G)  # the very same picture
    assert not changed(nets["D"], D_weights)  # so D had been updated before
    assert set(losses) == {"G_total", "G_gan", "G_l1", "D_total", "D_real", "D_fake"}


def test_adam_is_set_as_published(train):
    nets, _ = small_nets(train)
    for name in "GD":
        (group,) = nets[f"optimizer_{name}"].param_groups
        assert (group["lr"], group["betas"], group["weight_decay"]) == (2e-4, (0.5, 0.999), 0)
        assert [id(p) for p in group["params"]] == [id(p) for p in nets[name].parameters()]


# -------------------------------------------------------------------------------------- sampling


def test_a_translation_depends_on_its_picture_alone(train):
    nets, _ = small_nets(train)
    (one, other), _ = batch()
    alone = train.translate(nets["G"], one[None])
    train.translate(nets["G"], other[None])
    torch.manual_seed(123)
    torch.rand(7)
    assert torch.equal(train.translate(nets["G"], one[None]), alone)
    assert not alone.requires_grad


def test_a_translation_leaves_the_random_state_as_it_was(train):
    nets, _ = small_nets(train)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    train.translate(nets["G"], batch()[0][:1])
    assert torch.equal(torch.get_rng_state(), before)


def test_a_translation_uses_dropout(train):
    nets, _ = small_nets(train)
    x = batch()[0][:1]
    with_dropout = train.translate(nets["G"], x)
    for layer in nets["G"].modules():
        if isinstance(layer, nn.Dropout):
            layer.eval()
    assert not torch.allclose(train.translate(nets["G"], x), with_dropout)


# ------------------------------------------------------------------------------------- whole runs


def run(train, root, *flags):
    return train.main(
        ["--data-root", str(root), "--data-folder", "pairs", *SMALL, "--num-workers", "0", *flags]
    )


def rows(root, name="pairs"):
    with open(root / "visualize" / "pix2pix" / name / "losses.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_a_short_run_learns(train, tmp_path):
    """y is the negative of x: an untrained G, a gray picture and x itself are all far from it."""
    write_pairs(tmp_path, train=12)
    flags = ["--epochs", "20", "--lr", "2e-3", "--ngf", "8", "--batch-size", "2"]
    args = train.parse_args(["--data-root", str(tmp_path), "--data-folder", "pairs", *SMALL])
    pairs = [train.build_data(args)[1][0, i] for i in range(3)]
    nets, _ = small_nets(train, *flags)
    errors = [(train.translate(nets["G"], x[None])[0] - y).abs().mean() for x, y in pairs]
    untrained = float(np.mean(errors))
    identity = float(np.mean([(x - y).abs().mean() for x, y in pairs]))
    assert run(train, tmp_path, *flags) == 0
    learned = [float(row["test_l1"]) for row in rows(tmp_path) if row["test_l1"]]
    assert learned[-1] < 0.4 * min(untrained, identity)
    assert learned[-1] < learned[0]


def test_columns_grids_and_measured_error(train, tmp_path):
    write_pairs(tmp_path, train=2, test=10)
    flags = ["--epochs", "3", "--sample-every", "2", "--save-model"]
    assert run(train, tmp_path, *flags) == 0
    terms = ["G_total", "G_gan", "G_l1", "D_total", "D_real", "D_fake"]
    columns = ["epoch", "seconds", "images_per_second", "learning_rate", *terms, "test_l1"]
    assert list(rows(tmp_path)[0]) == columns
    assert [bool(row["test_l1"]) for row in rows(tmp_path)] == [True, False, True]
    for row in rows(tmp_path):
        total = float(row["G_gan"]) + 100 * float(row["G_l1"])
        assert float(row["G_total"]) == pytest.approx(total, rel=1e-5)

    folder = tmp_path / "visualize" / "pix2pix" / "pairs" / "val"
    names = {f"{kind}{epoch}.png" for kind in ("x", "y", "y_G") for epoch in (1, 3)}
    assert {f.name for f in folder.iterdir()} == names
    files = sorted((tmp_path / "pairs" / "test").iterdir())
    for index, file in enumerate(files[:8]):  # y is the left half, shown pixel for pixel
        tile = (slice(2, 34), slice(2 + 34 * index, 34 + 34 * index))
        left = np.asarray(Image.open(file))[:, :32]
        assert (np.asarray(Image.open(folder / "y1.png"))[tile] == left).all()

    # test_l1 is the mean over all ten, each translated alone; the grid shows those translations.
    args = train.parse_args(["--data-root", str(tmp_path), "--data-folder", "pairs", *SMALL])
    nets, _ = small_nets(train)
    checkpoint = tmp_path / "pix2pix" / "model" / "pairs" / "checkpoint.pt"
    nets["G"].load_state_dict(torch.load(checkpoint, weights_only=True)["G"])
    pairs = [train.build_data(args)[1][0, index] for index in range(10)]
    fakes = [train.translate(nets["G"], x[None])[0] for x, _ in pairs]
    error = np.mean([(f - y).abs().mean() for f, (_, y) in zip(fakes, pairs, strict=True)])
    assert float(rows(tmp_path)[-1]["test_l1"]) == pytest.approx(error, rel=1e-5)
    grid = np.asarray(Image.open(folder / "y_G3.png"))
    assert grid.shape == (36, 2 + 8 * 34, 3)
    for index in range(8):
        shown = grid[2:34, 2 + 34 * index : 34 + 34 * index].transpose(2, 0, 1)
        np.testing.assert_allclose(shown, (fakes[index].numpy() + 1) * 127.5, atol=0.51)


def test_swap_xy_trains_the_other_direction(train, tmp_path):
    write_pairs(tmp_path, train=2)
    assert run(train, tmp_path, "--epochs", "1") == 0
    assert run(train, tmp_path, "--epochs", "1", "--swap-xy", "--run-name", "swapped") == 0
    one, other = (tmp_path / "visualize" / "pix2pix" / n / "val" for n in ("pairs", "swapped"))
    assert (one / "x1.png").read_bytes() == (other / "y1.png").read_bytes()
    assert (one / "y1.png").read_bytes() == (other / "x1.png").read_bytes()


def test_an_odd_width_ends_the_run(train, tmp_path, capsys):
    write_pairs(tmp_path, train=2)
    Image.new("RGB", (65, 32)).save(tmp_path / "pairs" / "train" / "odd.png")
    assert run(train, tmp_path, "--epochs", "1") == 2
    last = capsys.readouterr().err.rstrip("\n").rpartition("\n")[2]
    assert last.startswith("train.py: error: ") and "odd.png is 65 pixels wide" in last


def test_a_term_that_is_not_finite_is_named(train, tmp_path, monkeypatch, capsys):
    """G_total is not finite either; what helps is the name of the term that began it."""
    losses_G = train.losses_G

    def broken(*args):
        losses = losses_G(*args)
        G_l1 = losses["G_l1"] * torch.nan
        return {**losses, "G_total": losses["G_gan"] + G_l1, "G_l1": G_l1}

    write_pairs(tmp_path)
    monkeypatch.setattr(train, "losses_G", broken)
    assert run(train, tmp_path, "--epochs", "1") == 2
    error = capsys.readouterr().err.rpartition("train.py: error: ")[2]
    assert "G_l1" in error and "nan" in error and "step 1" in error


@pytest.mark.parametrize("size", ["100", "16", "0", "33", "1"])
def test_sizes_that_the_U_Net_cannot_halve_are_refused(train, capsys, size):
    with pytest.raises(SystemExit) as ended:
        train.parse_args(["--image-size", size, "--load-size", "300"])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("train.py: error: ") and size in line

"""What a sampling epoch shows and measures, against numpy, with generators of known output."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from conftest import METHODS, UNPAIRED, load_script, write_pairs, write_unpaired

LUMINANCE = np.array([0.299, 0.587, 0.114])
CPU = torch.device("cpu")


def sample(method, root, nets):
    """What train.sample measures on root/data, and the grids by name, as (images, 32, 32, 3)."""
    train = load_script(method)
    data = ["--data-root", str(root), "--data-folder", "data", "--image-size", "32"]
    test_set = train.build_data(train.parse_args(data))[1]
    measured = train.sample(nets, test_set, root, 7, CPU)
    grids = {file.stem: np.asarray(Image.open(file)) for file in root.glob("*.png")}
    assert all(grid.shape[0] == 36 for grid in grids.values())  # one row, 2 pixels between images
    for name, grid in grids.items():
        columns = range(2, grid.shape[1] - 2, 34)
        grids[name] = np.stack([grid[2:34, left : left + 32] for left in columns])
    return measured, grids


def real_images(method, root):
    """x and y of the test set: (10, 32, 32, 3), 0 to 255."""
    if method == "pix2pix":
        pairs = np.stack([Image.open(f) for f in sorted((root / "data" / "test").iterdir())])
        return pairs[:, :, 32:], pairs[:, :, :32]
    folders = (root / "data" / "test" / side for side in "xy")
    return [np.stack([Image.open(f) for f in sorted(folder.iterdir())]) for folder in folders]


@pytest.mark.parametrize("ema", [False, True])
def test_grids_show_eight_images_and_the_means_are_over_all(method, ema, tmp_path):
    """And --ema samples from the averages."""
    (write_pairs if method == "pix2pix" else write_unpaired)(tmp_path, "data", test=10)
    nets, unused = {"G": lambda x: -0.5 * x, "F": lambda y: 0.25 * y}, lambda image: 0 * image
    if ema:
        nets = {"G": unused, "F": unused, "G_ema": nets["G"], "F_ema": nets["F"]}
    measured, grids = sample(method, tmp_path, nets)
    pixels = real_images(method, tmp_path)
    x, y = (side / 127.5 - 1 for side in pixels)
    shown = {"x7": x, "y_G7": -0.5 * x}
    if method != "CUT":
        shown["y7"] = y
    if method == "cycleGAN":
        shown["x_G7"] = 0.25 * y
    assert set(grids) == set(shown)
    for name, images in shown.items():
        np.testing.assert_allclose(grids[name], (images[:8] + 1) * 127.5, atol=0.51)
    to_y = np.abs(-0.5 * x - y).mean()
    expected = {
        "pix2pix": {"test_l1": to_y},
        "cycleGAN": {"luminance_xy": -1, "l1_xy": to_y, "luminance_yx": 1}
        | {"l1_yx": np.abs(0.25 * y - x).mean()},
        "CUT": {"change": np.abs(-1.5 * x).mean(), "luminance": -1, "l1": to_y},
    }[method]
    assert list(measured) == list(expected)
    assert measured == pytest.approx(expected, rel=5e-7)
    for file in tmp_path.rglob("*/009.png"):
        file.write_bytes(file.read_bytes()[:60])  # the grids do not need it
    (tmp_path / "y_G7.png").unlink()
    with pytest.raises(Exception, match="cannot read "):
        sample(method, tmp_path, nets)
    assert (tmp_path / "y_G7.png").exists()


@pytest.mark.parametrize("method", UNPAIRED)
def test_no_error_is_measured_if_the_test_images_are_not_pairs(method, tmp_path):
    write_unpaired(tmp_path, "data")
    (tmp_path / "data" / "test" / "y" / "000.png").unlink()
    measured, _ = sample(method, tmp_path, {"G": lambda x: x, "F": lambda y: y})
    assert not any(name.startswith("l1") for name in measured) and "luminance" in str(measured)


@pytest.mark.parametrize("method", UNPAIRED)
def test_luminance_correlation(method):
    correlation = load_script(method).luminance_correlation
    a, b = torch.rand(2, 1, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    lumas = [np.tensordot(LUMINANCE, image[0].double().numpy(), 1).ravel() for image in (a, b)]
    assert correlation(a, b) == pytest.approx(np.corrcoef(*lumas)[0, 1], abs=1e-6)
    for value in (0.0, 0.3, -0.9):  # constant images correlate with nothing, not even by rounding
        assert abs(correlation(torch.full_like(a, value), b)) < 0.05
        assert abs(correlation(torch.full_like(a, value), torch.full_like(a, 0.1))) < 0.05


@pytest.mark.skipif("pix2pix" not in METHODS, reason="only pix2pix samples with dropout")
def test_pix2pix_translates_with_the_same_dropout_and_leaves_the_random_state():
    train = load_script("pix2pix")
    args = train.parse_args(["--image-size", "32", "--ngf", "4", "--ndf", "4", "--device", "cpu"])
    G = train.build(args, CPU)["G"]
    one, other = torch.rand(2, 1, 3, 32, 32) * 2 - 1
    found = train.translate(G, one)
    train.translate(G, other)
    torch.rand(7)
    before = torch.get_rng_state()
    assert torch.equal(train.translate(G, one), found) and not found.requires_grad
    assert torch.equal(torch.get_rng_state(), before)
    for layer in G.modules():
        if isinstance(layer, nn.Dropout):
            layer.eval()
    assert not torch.allclose(train.translate(G, one), found)

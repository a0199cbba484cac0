"""evaluate.py: each number against a few lines of numpy, what it says, and what it refuses."""

import json
import math
import re
import shutil
import struct
import subprocess
import sys
import types
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch
from PIL import Image

import images
from conftest import ROOT, status_of


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    """No weights, no network, no packages that need them; no notes from the test before."""

    def refuse(*_, **__):
        raise OSError("no network in this test")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    monkeypatch.setattr(evaluate, "find_spec", lambda name: None)
    monkeypatch.setattr(images, "NOTED", set())


def write(folder, images, names=None):
    """Images, each (H, W, 3) in [0, 255], as PNG; by default 000.png, 001.png, ... The folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, image in zip(names or [f"{k:03}" for k in range(len(images))], images, strict=True):
        pixels = np.asarray(image).round().clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.png")
    return folder


def blobs(count, width=64, height=64, seed=0, noise=8):
    """Smooth random images with some noise: (H, W, 3) in [0, 255], integers."""
    rng, images = np.random.default_rng(seed), []
    for _ in range(count):
        small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        smooth = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC)) * 0.6 + 50
        images.append((smooth + rng.normal(0, noise, smooth.shape)).round().clip(0, 255))
    return images


def run(tmp_path, *argv):
    """The report of a run that must succeed."""
    file = tmp_path / "report.json"
    assert evaluate.main([*map(str, argv), "--json", str(file)]) == 0
    return json.loads(file.read_text())


def refused(capsys, *argv):
    """The one line on stderr of a run that must end with status 2."""
    assert status_of(evaluate.main, *argv) == 2
    line = re.split(r"[\r\n]", capsys.readouterr().err.strip())[-1]  # behind a progress bar
    assert line.startswith("evaluate.py: error: ")
    return line


# Pairs


def test_l1_and_psnr_by_hand(tmp_path):
    flat = [np.full((32, 32, 3), level) for level in (100, 200, 50)]
    other = [np.full((32, 32, 3), level) for level in (110, 180, 50)]
    a, b = write(tmp_path / "a", flat), write(tmp_path / "b", other)
    found = run(tmp_path, a, b, "--paired")["paired"]
    assert found["l1"] == pytest.approx((10 + 20 + 0) / 3 / 127.5)
    expected = [20 * math.log10(255 / 10), 20 * math.log10(255 / 20)]
    assert found["psnr"] == pytest.approx(np.mean(expected))  # the third pair is equal


def test_ssim_against_plain_numpy():
    """Wang et al. 2004, pixel by pixel."""
    a, b = blobs(2, 24, 20, noise=20)
    y, x = np.mgrid[-5:6, -5:6]
    window = np.exp(-(x**2 + y**2) / (2 * 1.5**2))[..., None]
    window /= window.sum()
    values = []
    for i in range(a.shape[0] - 10):
        for j in range(a.shape[1] - 10):
            p, q = a[i : i + 11, j : j + 11], b[i : i + 11, j : j + 11]
            m, n = (window * p).sum((0, 1)), (window * q).sum((0, 1))
            v, w = (window * (p - m) ** 2).sum((0, 1)), (window * (q - n) ** 2).sum((0, 1))
            c = (window * (p - m) * (q - n)).sum((0, 1))
            top = (2 * m * n + 2.55**2) * (2 * c + 7.65**2)
            values.append(top / ((m * m + n * n + 2.55**2) * (v + w + 7.65**2)))
    assert evaluate.ssim(a, b) == pytest.approx(np.mean(values), abs=1e-10)
    assert evaluate.ssim(a, a) == pytest.approx(1, abs=1e-12)


def test_pairs_are_of_one_stem_whatever_the_suffix(tmp_path):
    a = write(tmp_path / "a", blobs(3), ["x.1", "x", "y"])
    (tmp_path / "b").mkdir()
    for name, suffix in (("x.1", ".png"), ("x", ".BMP"), ("y", ".tif")):
        Image.open(a / f"{name}.png").save(tmp_path / "b" / f"{name}{suffix}")
    assert run(tmp_path, a, tmp_path / "b", "--paired")["paired"]["l1"] == 0


@pytest.mark.parametrize("index", [0, 7, 19])
def test_every_image_counts(tmp_path, index):
    images = blobs(20, 32, 32)
    a, b = write(tmp_path / "a", images), write(tmp_path / "b", images)
    before = run(tmp_path, a, b, "--paired", "--input", b)
    images[index][:, ::2] = (images[index][:, ::2] + 40).clip(0, 255)
    after = run(tmp_path, write(a, images), b, "--paired", "--input", b)
    keys = {"paired": ["l1", "ssim"], "unpaired": ["swd_32", "swd_16"]}
    keys |= {"stripes": ["vertical_2"], "change": ["l1"]}
    for group in keys:
        assert all(after[group][key] != before[group][key] for key in keys[group]), group


# FID, KID, LPIPS


class Features(torch.nn.Module):
    """In place of Inception: (N, 3, 299, 299) bytes -> ((N, 6),)."""

    def __init__(self, name, features_list):
        super().__init__()
        self.Conv2d_1a_3x3 = torch.nn.Identity()

    def forward(self, images):
        assert images.dtype == torch.uint8 and images.shape[1:] == (3, 299, 299)
        images = self.Conv2d_1a_3x3((images.float() - 128) / 128).double()
        return (torch.cat([images.mean((2, 3)), images[:, :, ::7, 100].std(2)], 1),)


def plain_features(folder):
    """What Features makes of PIL's bicubic resizing without rounding: (N, 6)."""
    rows = []
    for file in sorted(folder.iterdir()):
        bands = [band.convert("F").resize((299, 299), 3) for band in Image.open(file).split()]
        x = (np.stack(bands).clip(0, 255).astype(float) - 128) / 128
        rows.append([*x.mean((1, 2)), *x[:, ::7, 100].std(1, ddof=1)])
    return np.array(rows)


@pytest.fixture
def inception(monkeypatch):
    pytest.importorskip("torchmetrics")
    module = types.SimpleNamespace(FeatureExtractorInceptionV3=Features)
    monkeypatch.setitem(sys.modules, "torch_fidelity", module)
    monkeypatch.setattr(evaluate, "find_spec", lambda name: True)


def test_fid_and_kid_against_plain_numpy(tmp_path, inception):
    a = write(tmp_path / "a", blobs(12, seed=1))
    b = write(tmp_path / "b", blobs(12, seed=2, noise=25))
    found = run(tmp_path, a, b)["unpaired"]
    p, q = sides = [plain_features(folder) for folder in (a, b)]
    means, covs = [s.mean(0) for s in sides], [np.cov(s.T) for s in sides]
    cross = np.sqrt(np.linalg.eigvals(covs[0] @ covs[1]).real.clip(0)).sum()
    fid = np.sum((means[0] - means[1]) ** 2) + np.trace(covs[0]) + np.trace(covs[1]) - 2 * cross
    assert found["fid"] == pytest.approx(fid, rel=1e-4)
    # With equal numbers each subset is the whole set, so that KID has one value.
    pp, qq, pq = ((u @ v.T / 6 + 1) ** 3 for u, v in ((p, p), (q, q), (p, q)))
    inner = sum(k.sum() - np.trace(k) for k in (pp, qq)) / (12 * 11)
    assert found["kid"] == pytest.approx(inner - 2 * pq.mean(), rel=1e-4)
    assert found["kid_std"] == pytest.approx(0, abs=1e-9)
    (b / "000.png").unlink()
    first, second = (run(tmp_path, a, b)["unpaired"] for _ in range(2))
    assert first == second and first["kid_std"] > 0  # the same random subsets each time


def test_without_packages_the_table_says_so_and_torch_is_not_needed(tmp_path):
    a, b = write(tmp_path / "a", blobs(3)), write(tmp_path / "b", blobs(3, seed=1))
    for name in ("torch", "torchvision"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('torch was imported')")
    code = "import sys, evaluate; evaluate.find_spec = lambda name: None; sys.exit(evaluate.main())"
    env = {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    command = [sys.executable, "-c", code, a, b, "--paired", "--input", b]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for key in ("lpips", "fid", "kid"):
        assert re.search(rf"^  {key} .*needs pip install torchmetrics torch-fid", done.stdout, re.M)
    assert re.search(r"^  swd +\d+\.\d{4}$", done.stdout, re.M)


@pytest.mark.parametrize("damaged", [False, True])
def test_without_weights_the_table_says_where_they_belong(tmp_path, monkeypatch, damaged):
    pytest.importorskip("torchmetrics")
    pytest.importorskip("torch_fidelity")
    monkeypatch.setattr(evaluate, "find_spec", lambda name: True)
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    for url in (evaluate.ALEXNET, evaluate.INCEPTION) * damaged:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / url.split("/")[-1]).write_bytes(b"<html>not found</html>")
    a, b = write(tmp_path / "a", blobs(3)), write(tmp_path / "b", blobs(3, seed=1))
    report = run(tmp_path, a, b, "--paired")
    for key, url in (("lpips", evaluate.ALEXNET), ("fid", evaluate.INCEPTION)):
        (line,) = [line for line in report["table"] if line.startswith(f"  {key} ")]
        assert f"{url} in {folder}" in line and "\n" not in line
        assert ("no network in this test" in line) != damaged
    assert report["unpaired"]["kid"] is report["paired"]["lpips"] is None
    assert report["paired"]["ssim"] < 1 and report["unpaired"]["swd"] > 0


def test_lpips_is_the_mean_over_pairs_in_unit_range(tmp_path, monkeypatch):
    class Network(torch.nn.Module):
        def __init__(self, net_type):
            super().__init__()
            assert net_type == "alex"

        def forward(self, a, b):
            assert a.shape == b.shape == (1, 3, 40, 32) and a.dtype == torch.float32
            return (2 * a - 3 * b).mean()

    module = types.SimpleNamespace(LearnedPerceptualImagePatchSimilarity=Network)
    monkeypatch.setitem(sys.modules, "torchmetrics.image.lpip", module)
    monkeypatch.setattr(evaluate, "find_spec", lambda name: True)
    images = [np.full((40, 32, 3), level) for level in (0, 255)]
    a, b = write(tmp_path / "a", images), write(tmp_path / "b", images[:1] * 2)
    found = run(tmp_path, a, b, "--paired")["paired"]
    assert found["lpips"] == pytest.approx(((-2 + 3) + (2 + 3)) / 2)


# Sliced Wasserstein distance


@pytest.mark.parametrize("size", [(64, 64), (67, 41)])
def test_the_levels_of_the_pyramid_add_up_to_the_image(size):
    image = blobs(1, *size)[0]
    levels = evaluate.laplacian_pyramid(image)
    sides = [level.shape[:2] for level in levels]
    assert sides == [tuple(-(-side // 2**k) for side in size[::-1]) for k in range(len(levels))]
    assert min(sides[-1]) in range(16, 32)
    total = levels[-1]
    for level in levels[-2::-1]:
        spread = np.zeros_like(level)
        spread[::2, ::2] = total
        padded, total = np.pad(spread, ((2, 2), (2, 2), (0, 0)), "reflect"), level
        for i, j in np.ndindex(5, 5):
            tap = [1, 4, 6, 4, 1][i] * [1, 4, 6, 4, 1][j] / 64
            total = total + tap * padded[i:, j:][: level.shape[0], : level.shape[1]]
    assert np.allclose(total, image)
    flat = evaluate.laplacian_pyramid(np.full_like(image, 77.0))
    assert all(np.allclose(level, 0) for level in flat[:-1]) and np.allclose(flat[-1], 77)


def plain_swd(a, b):
    """Sorted projections of two equally large sets of patches, (N, count, 3, 7, 7)."""
    a, b = (x.reshape(-1, 3, 49) for x in (a, b))
    a, b = ((x - x.mean((0, 2), keepdims=True)) / x.std((0, 2), keepdims=True) for x in (a, b))
    rng, distances = np.random.default_rng(5), []
    for _ in range(512):
        line = rng.standard_normal(147)
        line /= np.linalg.norm(line)
        p, q = (np.sort(x.reshape(-1, 147) @ line) for x in (a, b))
        distances.append(np.abs(p - q).mean())
    return np.mean(distances)


def test_swd_against_plain_numpy():
    rng = np.random.default_rng(0)
    a = rng.normal(3, 2, (10, 64, 3, 7, 7)).astype("f")
    b = (rng.gamma(0.3, 1, (10, 64, 1, 1, 1)) * rng.normal(0, 1, (10, 64, 3, 7, 7))).astype("f")
    swd = evaluate.sliced_wasserstein
    assert swd(a, b) == pytest.approx(plain_swd(a, b), rel=0.03)  # in other directions
    assert swd(a, a) == 0
    assert swd(a, np.repeat(a, 2, 0)) == pytest.approx(0, abs=1e-6)  # the same distribution
    assert swd(np.repeat(a, 3, 0), b) == pytest.approx(swd(a, b), rel=1e-3)


def test_swd_tells_on_which_level_sets_differ(tmp_path):
    """Single-pixel spots differ from noise on the finest level only."""
    rng = np.random.default_rng(9)
    b = write(tmp_path / "b", blobs(24, noise=20))
    alike = run(tmp_path, write(tmp_path / "c", blobs(24, noise=20, seed=1)), b)["unpaired"]
    smooth = blobs(24, noise=0, seed=1)
    spots = [image + 90 * (rng.random((64, 64, 1)) < 0.05) for image in smooth]
    fine = run(tmp_path, write(tmp_path / "d", spots), b)["unpaired"]
    assert fine["swd_64"] > 2 * alike["swd_64"] and fine["swd_16"] < 1.5 * alike["swd_16"]
    assert fine["swd"] == pytest.approx(np.mean([fine[f"swd_{k}"] for k in (64, 32, 16)]))


def test_names_and_order_do_not_matter(tmp_path):
    images, b = blobs(6), write(tmp_path / "b", blobs(7, seed=1, noise=12))
    first = run(tmp_path, write(tmp_path / "a", images), b)
    second = run(tmp_path, write(tmp_path / "c", images, "qzam19"), b)
    for key in ("swd_64", "swd_32", "swd_16"):
        assert second["unpaired"][key] == pytest.approx(first["unpaired"][key], rel=1e-5)


# Stripes

PLANTED = {
    "vertical_2": lambda y, x: (-1.0) ** x,
    "vertical_4": lambda y, x: np.sqrt(2) * np.cos(np.pi * x / 2 + np.pi / 4),
    "horizontal_2": lambda y, x: (-1.0) ** y,
    "horizontal_4": lambda y, x: np.sqrt(2) * np.cos(np.pi * y / 2 + np.pi / 4),
}


@pytest.mark.parametrize("size", [(64, 64), (99, 70)])
@pytest.mark.parametrize("planted", PLANTED)
def test_a_planted_stripe_raises_its_number_alone(planted, size, tmp_path):
    images = blobs(6, *size)
    y, x = np.mgrid[: size[1], : size[0]]
    stripe = 6 * PLANTED[planted](y, x)[..., None]
    a, b = write(tmp_path / "a", [i + stripe for i in images]), write(tmp_path / "b", images)
    found = run(tmp_path, a, b)["stripes"]
    assert found.pop(planted) > 6
    assert all(found[key] == pytest.approx(0, abs=1) for key in PLANTED if key != planted), found


def test_peaks_by_hand():
    """A cosine of period 4, amplitude A, in white noise of power s2: A^2 / 4 times the square of
    the window's sum over the sum of its squares, over s2 + 1/12."""
    rng = np.random.default_rng(0)
    lines = rng.normal(0, 2, (4000, 64)) + 5 * np.cos(np.pi * np.arange(64) / 2)
    half, quarter = evaluate.peaks(lines)
    noise = 4 + 1 / 12
    assert quarter == pytest.approx(10 * np.log10((25 / 4 * 32**2 / 24 + noise) / noise), abs=0.15)
    assert half == pytest.approx(0, abs=0.15)


@pytest.mark.parametrize("kernel", [[0, 1, 0], [0.1, 0.8, 0.1]])
def test_contrast_and_a_mild_blur_are_no_stripes(tmp_path, kernel):
    padded = [np.pad(x, ((1, 1), (1, 1), (0, 0)), "reflect") for x in blobs(6)]
    altered = [0.7 * evaluate.filtered(x, kernel) + 20 for x in padded]
    a, b = write(tmp_path / "a", altered), write(tmp_path / "b", blobs(6))
    found = run(tmp_path, a, b)["stripes"]
    assert all(abs(found[key]) < 0.8 for key in PLANTED), found


def test_a_stripe_is_looked_for_at_the_generated_size(tmp_path):
    """A generated image of an odd size is not resized, which would move the stripe."""
    images = blobs(4)
    images[3] = blobs(1, 80, 72)[0] + 8 * (-1.0) ** np.arange(80)[None, :, None]
    b = write(tmp_path / "b", blobs(4, 96, 96, seed=1))
    report = run(tmp_path, write(tmp_path / "a", images), b)
    assert report["stripes"]["vertical_2"] > 3
    text = "\n".join(report["table"])
    assert "4 generated, 3 of them 64x64" in text and "4 reference, 4 of them 96x96" in text
    assert "sets to 64x64" in text


# Change and shift-PSNR


def test_change_by_hand(tmp_path):
    x = blobs(3, noise=0)
    a = write(tmp_path / "a", [255 - image for image in x])
    found = run(tmp_path, a, a, "--input", write(tmp_path / "b", x))["change"]
    assert found["luminance"] == pytest.approx(-1)
    expected = np.mean([np.abs(255 - 2 * image).mean() / 127.5 for image in x])
    assert found["l1"] == pytest.approx(expected)


def test_correlation_is_of_rec_601_luminance():
    a, b = blobs(2)
    light = [x[..., 0] * 0.299 + x[..., 1] * 0.587 + x[..., 2] * 0.114 for x in (a, b)]
    expected = np.corrcoef(light[0].ravel(), light[1].ravel())[0, 1]
    assert evaluate.correlation(a, b) == pytest.approx(expected, abs=1e-12)
    assert evaluate.correlation(a, 0 * b) == 0


def stand_in(monkeypatch, G, status=0, stderr=""):
    """Replaces translate.py by G, a function of an image. Its calls: [(command, images), ...]."""
    calls = []

    def run(command, **_):
        given = dict(zip(command[2::2], command[3::2], strict=True))
        given["--output"].mkdir()
        for file in given["--input"].iterdir():
            image = G(np.array(Image.open(file), dtype=int)).astype(np.uint8)
            Image.fromarray(image).save(given["--output"] / file.name)
        calls.append((command, len([*given["--output"].iterdir()])))
        return subprocess.CompletedProcess(command, status, stderr=stderr)

    monkeypatch.setattr(evaluate.subprocess, "run", run)
    return calls


def test_shift_psnr_by_hand(monkeypatch, tmp_path):
    """G darkens every other column: shifted by an odd number to the right it is off by 20."""
    stand_in(monkeypatch, lambda image: image - 20 * (np.arange(64) % 2 == 0)[:, None])
    a, x = write(tmp_path / "a", blobs(5)), write(tmp_path / "x", blobs(5, 96, 96))
    report = run(tmp_path, a, a, "--input", x, "--checkpoint", "CUT/model/first/checkpoint.pt")
    found = report["stripes"]
    for key in ("shift_psnr", "shift_psnr_1", "shift_psnr_3"):
        assert found[key] == pytest.approx(20 * math.log10(255 / 20))
    assert found["shift_psnr_2"] is None  # JSON has no infinity
    assert "  shift_psnr_2       infinite: all are equal" in report["table"]


@pytest.mark.parametrize("place", ["cycleGAN/model/first", "visualize/cycleGAN/first", "other.pt"])
def test_shift_psnr_finds_the_method_and_the_run(monkeypatch, tmp_path, capsys, place):
    calls, a = stand_in(monkeypatch, lambda image: image), write(tmp_path / "a", blobs(9))
    argv = [a, a, "--input", a, "--checkpoint", tmp_path / place, "--direction", "y2x"]
    if place == "other.pt":
        assert "--method" in refused(capsys, *argv)
        argv += ["--method", "cycleGAN"]
    run(tmp_path, *argv)
    [((_, script, _, checkpoint, *_, flag, direction), images)] = calls
    assert (
        images == 8 * 7
    )  # eight of the nine, still and shifted by 1 to 3 pixels in two directions
    assert (script, checkpoint) == (ROOT / "cycleGAN" / "translate.py", tmp_path / place)
    assert (flag, direction) == ("--direction", "y2x")


def test_shift_psnr_says_why_translate_failed(monkeypatch, tmp_path, capsys):
    stand_in(monkeypatch, lambda image: image, 2, "note\ntranslate.py: error: it is damaged\n")
    a = write(tmp_path / "a", blobs(2))
    error = refused(capsys, a, a, "--input", a, "--checkpoint", "CUT/model/first")
    assert error.endswith("CUT/translate.py failed: translate.py: error: it is damaged")


# The command


def test_a_folder_of_flat_images_against_itself(tmp_path):
    a = write(tmp_path / "a", [np.full((32, 32, 3), level) for level in (0, 90, 255)])
    report = run(tmp_path, a, a, "--paired", "--input", a)
    found = {**report["paired"], **report["unpaired"], **report["stripes"], **report["change"]}
    assert found.pop("ssim") == pytest.approx(1)
    assert {value for value in found.values() if value is not None} == {0}  # correlation, too


def test_json_equals_the_table(tmp_path, capsys):
    a, b = write(tmp_path / "a", blobs(4)), write(tmp_path / "b", blobs(4, 70, 50, seed=1))
    report = run(tmp_path, a, b, "--paired", "--input", b)
    text = capsys.readouterr().out
    assert text == "\n".join(report["table"]) + "\n"
    shown = [float(n) for n in re.findall(r"^  \S+ +(-?\d+\.\d{4})$", text, re.M)]
    groups = [report[name] for name in ("paired", "unpaired", "stripes", "change")]
    numbers = [value for group in groups for value in group.values() if value is not None]
    assert shown == pytest.approx(numbers, abs=6e-5) and len(shown) == 13
    assert report["arguments"]["paired"] is True and report["arguments"]["generated"] == str(a)


def test_an_unwritable_json_does_not_cost_the_numbers(tmp_path, capsys):
    a = str(write(tmp_path / "a", blobs(2)))
    assert evaluate.main([a, a, "--json", a]) == 2
    assert "  swd " in capsys.readouterr().out


def test_skipped_files_are_counted_and_metadata_is_no_obstacle(tmp_path, capsys):
    a, b = write(tmp_path / "a", blobs(3)), write(tmp_path / "b", blobs(3))
    (b / "note.txt").touch()
    image = Image.open(b / "001.png").transpose(Image.Transpose.ROTATE_180)
    entries = struct.pack(">HHHI4sHHIH2x", 2, 0x011A, 2, 3, b"72", 0x0112, 3, 1, 3)
    image.save(b / "001.png", exif=b"MM\0*\0\0\0\x08" + entries + bytes(4))  # resolution as text
    assert run(tmp_path, a, b, "--paired")["paired"]["l1"] == 0
    assert f"note: skipped in {b}: 1, such as note.txt" in capsys.readouterr().err


def test_refusals(tmp_path, capsys):
    a, one = write(tmp_path / "a", blobs(3)), write(tmp_path / "one", blobs(1))
    small, damaged = write(tmp_path / "s", blobs(3, 40, 31)), write(tmp_path / "d", blobs(3))
    (damaged / "001.png").write_bytes((a / "001.png").read_bytes()[:200])
    for argv, message in (
        ([a, tmp_path / "nowhere"], "nowhere: 0 images found"),
        ([one, a], f"{one}: 1 images found, two or more expected"),
        ([a, a, "--input", one], "1 images found"),
        ([small, a], "32 pixels"),
        ([write(tmp_path / "wide", blobs(3, 128)), a, "--paired"], "--side-by-side"),
        ([tmp_path / "wide", a, "--input", a], "000.png is 128x64"),
        ([a, damaged], f"cannot read {damaged / '001.png'}"),
        ([a, a, "--pair"], "unrecognized arguments: --pair"),
        ([a, a, "--checkpoint", "c.pt"], "--checkpoint needs --input"),
    ):
        assert message in refused(capsys, *argv)
    assert evaluate.main([str(a), str(tmp_path / "wide"), "--paired"]) == 0  # 2:1, but no pairs?
    assert "REFERENCE is twice as wide" in capsys.readouterr().out


@pytest.mark.parametrize("names", ["12", "124", "1123"])
@pytest.mark.parametrize("flag", ["--paired", "--input"])
def test_stems_that_do_not_match_are_named(tmp_path, capsys, flag, names):
    a = write(tmp_path / "a", blobs(3), "123")
    b = write(tmp_path / "b", blobs(4)[: len(names)], names)
    if names == "1123":
        shutil.copy(b / "1.png", b / "1.bmp")
    error = refused(capsys, *([a, b, flag] if flag == "--paired" else [a, a, flag, b]))
    assert f"{flag}: each image needs a partner of the same stem" in error
    assert "needs a partner" in refused(capsys, b, a, "--paired")
    assert str({"12": a / "3.png", "124": a / "3.png", "1123": b / "1.bmp"}[names]) in error


def test_as_a_command(tmp_path):
    write(tmp_path / "a", blobs(3))
    command = [sys.executable, ROOT / "evaluate.py", "a", "a"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "  swd_64 " in done.stdout

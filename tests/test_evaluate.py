"""evaluate.py: each number against a few lines of numpy, what it says, and what it refuses."""

import ast
import json
import math
import re
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import ROOT, picture

sys.path.insert(0, str(ROOT))
import evaluate

SCRIPT = ROOT / "evaluate.py"


def write(folder, images, names=None):
    """Pictures, each (H, W, 3) in [0, 255], as PNG; by default called 000, 001, ... The folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, image in enumerate(images):
        name = names[index] if names else f"{index:03}"
        Image.fromarray(np.asarray(image).round().clip(0, 255).astype(np.uint8)).save(
            folder / f"{name}.png"
        )
    return folder


def blobs(count, width=64, height=64, seed=0, noise=8):
    """Smooth random pictures with some noise: (H, W, 3) in [0, 255], integers."""
    rng = np.random.default_rng(seed)
    images = [np.asarray(picture(rng, width, height)).astype(float) for _ in range(count)]
    return [
        (image * 0.6 + 50 + rng.normal(0, noise, image.shape)).round().clip(0, 255)
        for image in images
    ]


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path_factory):
    """No weights, no network."""

    def refuse(*_, **__):
        raise OSError("no network in this test")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path_factory.mktemp("hub")))


def run(tmp_path, *argv):
    """The report of a run that must succeed."""
    file = tmp_path / "report.json"
    assert evaluate.main([*map(str, argv), "--json", str(file)]) == 0
    return json.loads(file.read_text())


def table(text):
    """{label: value} of a printed table; None where left out."""
    rows = re.findall(r"^  (\S.*?) +(-|inf|-?\d+\.\d{4})  \S", text, re.M)
    return {label: None if value == "-" else float(value) for label, value in rows}


def refused(capsys, *argv):
    """The one line on stderr of a run that must end with status 2."""
    try:
        status = evaluate.main([*map(str, argv)])
    except SystemExit as ended:
        status = ended.code
    error = capsys.readouterr().err
    line = re.split(r"[\r\n]", error.strip())[-1]  # before it may come a progress bar
    assert status == 2 and "evaluate.py: error: " in line and "Traceback" not in error
    return line.split("evaluate.py: error: ")[1]


# --------------------------------------------------------------------------------------- paired


def test_l1_and_psnr_by_hand(tmp_path):
    flat = [np.full((16, 16, 3), level) for level in (100, 200, 50)]
    other = [np.full((16, 16, 3), level) for level in (110, 180, 50)]
    report = run(tmp_path, write(tmp_path / "a", flat), write(tmp_path / "b", other), "--paired")
    found = report["paired"]
    assert found["l1"] == pytest.approx((10 + 20 + 0) / 3 / 127.5)
    expected = [20 * math.log10(255 / 10), 20 * math.log10(255 / 20)]
    assert found["psnr"] == pytest.approx(np.mean(expected))  # the third pair is equal
    assert "without 1 of 3 that are equal" in report["notes"]["paired.psnr"]


def slow_ssim(a, b):
    """Wang et al. 2004, pixel by pixel."""
    y, x = np.mgrid[-5:6, -5:6]
    window = np.exp(-(x**2 + y**2) / (2 * 1.5**2))
    window /= window.sum()
    values = []
    for channel in range(3):
        for i in range(5, a.shape[0] - 5):
            for j in range(5, a.shape[1] - 5):
                p = a[i - 5 : i + 6, j - 5 : j + 6, channel]
                q = b[i - 5 : i + 6, j - 5 : j + 6, channel]
                m, n = (window * p).sum(), (window * q).sum()
                v, w = (window * (p - m) ** 2).sum(), (window * (q - n) ** 2).sum()
                c = (window * (p - m) * (q - n)).sum()
                top = (2 * m * n + 2.55**2) * (2 * c + 7.65**2)
                values.append(top / ((m * m + n * n + 2.55**2) * (v + w + 7.65**2)))
    return np.mean(values)


def test_ssim_against_plain_numpy():
    a, b = blobs(2, 24, 20, noise=20)
    assert evaluate.ssim(a, b) == pytest.approx(slow_ssim(a, b), abs=1e-10)
    assert evaluate.ssim(a, a) == pytest.approx(1, abs=1e-12)


def test_ssim_against_scikit_image():
    metrics = pytest.importorskip("skimage.metrics")
    a, b = blobs(2, 50, 40, noise=20)
    likewise = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    theirs = metrics.structural_similarity(a, b, channel_axis=2, data_range=255, **likewise)
    assert evaluate.ssim(a, b) == pytest.approx(theirs, abs=1e-6)


def test_ssim_against_torchmetrics():
    image = pytest.importorskip("torchmetrics.functional.image")
    a, b = blobs(2, 50, 40, noise=20)
    both = [torch.from_numpy(x).permute(2, 0, 1)[None] for x in (a, b)]
    _, map_ = image.structural_similarity_index_measure(
        *both, data_range=255.0, return_full_image=True
    )
    inside = map_[..., 5:-5, 5:-5].mean()  # its mean counts a mirrored border too
    assert evaluate.ssim(a, b) == pytest.approx(inside.item(), abs=1e-6)


def test_pairs_are_matched_by_stem_not_by_order(tmp_path):
    images = blobs(4)
    a = write(tmp_path / "a", images, ["d", "c", "b", "a"])
    b = tmp_path / "b"
    b.mkdir()
    for image, name in zip(images, ("d.bmp", "c.PNG", "b.tif", "a.png"), strict=True):
        Image.fromarray(image.astype(np.uint8)).save(b / name)
    assert run(tmp_path, a, b, "--paired")["paired"]["l1"] == 0


def test_every_pair_counts(tmp_path):
    """Each of 20 pictures, altered alone, changes every number: none is passed over."""
    images = blobs(20, 32, 32)
    a, b = write(tmp_path / "a", images), write(tmp_path / "b", images)
    still = run(tmp_path, a, b, "--paired", "--input", b)
    for index in (0, 7, 19):
        altered = [image.copy() for image in images]
        altered[index][:, ::2] += 40
        a = write(tmp_path / f"a{index}", altered)
        moved = run(tmp_path, a, b, "--paired", "--input", b)
        for group, key in (
            ("paired", "l1"),
            ("paired", "ssim"),
            ("unpaired", "swd_32"),
            ("unpaired", "swd_16"),
            ("stripes", "vertical_2"),
            ("change", "l1"),
            ("change", "luminance"),
        ):
            assert moved[group][key] != still[group][key], (index, key)
        expected = np.mean(
            [np.abs(p.clip(0, 255) - q).mean() for p, q in zip(altered, images, strict=True)]
        )
        assert moved["paired"]["l1"] == pytest.approx(expected / 127.5)


def test_too_small_for_a_metric_says_so_and_goes_on(tmp_path, capsys):
    images = blobs(3, 10, 10)
    a, b = write(tmp_path / "a", images), write(tmp_path / "b", images)
    report = run(tmp_path, a, b, "--paired")
    assert report["paired"]["l1"] == 0
    for group, key in (("paired", "ssim"), ("unpaired", "swd"), ("stripes", "excess")):
        assert report[group][key] is None
        assert re.search("left out: .* 10 px", report["notes"][f"{group}.{key}"])


# ------------------------------------------------------------------------------------- unpaired


def features(images):
    """Stands for Inception: six numbers a picture."""
    assert images.shape[1:] == (3, 299, 299) and images.dtype == torch.float32
    images = images.double()
    return torch.cat([images.mean((2, 3)), images[:, :, ::7, 100].std(2)], 1)


def test_fid_and_kid_against_plain_numpy(tmp_path, monkeypatch, capsys):
    pytest.importorskip("torchmetrics")
    monkeypatch.setattr(evaluate, "inception", lambda: features)
    a = write(tmp_path / "a", blobs(12, seed=1))
    b = write(tmp_path / "b", blobs(9, seed=2, noise=25))
    report = run(tmp_path, a, b)
    sides = []
    for folder in (a, b):
        images = torch.cat([evaluate.clean_299(file) for file in sorted(folder.iterdir())])
        sides.append(features(images).numpy())
    means, covs = [s.mean(0) for s in sides], [np.cov(s.T) for s in sides]
    values, vectors = np.linalg.eigh(covs[0])
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ covs[1] @ root).clip(0)).sum()
    fid = np.sum((means[0] - means[1]) ** 2) + np.trace(covs[0]) + np.trace(covs[1]) - 2 * cross
    assert report["unpaired"]["fid"] == pytest.approx(fid, rel=1e-6)
    assert "9 pictures (below 2048): read KID" in report["notes"]["unpaired.fid"]
    assert "100 subsets of 9," in report["notes"]["unpaired.kid"]

    # With equal numbers each subset is the whole set: KID has one value.
    c = write(tmp_path / "c", blobs(12, seed=2, noise=25))
    kid = run(tmp_path, a, c)["unpaired"]
    p, q = (
        sides[0],
        features(torch.cat([evaluate.clean_299(file) for file in sorted(c.iterdir())])).numpy(),
    )
    pp, qq, pq = ((u @ v.T / 6 + 1) ** 3 for u, v in ((p, p), (q, q), (p, q)))
    inner = sum(k.sum() - np.trace(k) for k in (pp, qq)) / (12 * 11)
    assert kid["kid"] == pytest.approx(inner - 2 * pq.mean(), rel=1e-6)
    assert kid["kid_std"] == pytest.approx(0, abs=1e-6 * abs(kid["kid"]))
    assert report == run(tmp_path, a, b)  # the subsets are drawn alike each time


def test_fid_rows_without_the_package(tmp_path, monkeypatch):
    """What is printed of FID and KID, whoever computes them."""
    seen = []

    def fake(generated, reference):
        seen.extend((len(generated), len(reference)))
        return 12.5, 0.25, 0.125, 4

    monkeypatch.setattr(evaluate, "fid_and_kid", fake)
    a, b = write(tmp_path / "a", blobs(5)), write(tmp_path / "b", blobs(4))
    report = run(tmp_path, a, b)
    assert seen == [5, 4]
    assert [report["unpaired"][key] for key in ("fid", "kid", "kid_std")] == [12.5, 0.25, 0.125]
    assert "299x299" in report["notes"]["unpaired.fid"]


def test_inception_is_given_floats_not_bytes(tmp_path, monkeypatch):
    """The hook hands the first layer what the network itself would hand it, but not rounded."""
    fidelity = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    torch.manual_seed(0)
    names = [name for name in dir(fidelity) if name.startswith("URL")]
    assert evaluate.INCEPTION in [getattr(fidelity, name) for name in names]
    monkeypatch.setattr(fidelity.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
    weights = tmp_path / "weights.pth"
    torch.save({}, weights)
    monkeypatch.setattr(evaluate, "fetch", lambda url: weights)
    network = evaluate.inception()
    bytes_ = torch.randint(0, 256, (1, 3, 299, 299), dtype=torch.uint8)
    whole = network(bytes_.float())
    assert whole.shape == (1, 2048)
    plain = network.__closure__[0].cell_contents
    assert torch.equal(plain(bytes_)[0], whole)
    assert not torch.equal(network(bytes_ + 0.4), whole)


def test_clean_299_is_pillows_bicubic_without_rounding(tmp_path):
    image = blobs(1, 300, 450)[0]
    found = evaluate.clean_299(write(tmp_path, [image]) / "000.png")
    assert found.shape == (1, 3, 299, 299) and found.min() >= 0 and found.max() <= 255
    assert found.frac().abs().max() > 0.01
    rounded = Image.fromarray(image.astype(np.uint8)).resize((299, 299), Image.Resampling.BICUBIC)
    assert np.abs(found[0].permute(1, 2, 0).numpy() - np.asarray(rounded)).max() < 1.5  # twice


@pytest.mark.parametrize("package", [True, False])
def test_without_weights_the_rest_is_printed(package, tmp_path, monkeypatch, capsys):
    if package:
        pytest.importorskip("torchmetrics")
        pytest.importorskip("torch_fidelity")
    else:
        monkeypatch.setitem(sys.modules, "torchmetrics.image.fid", None)
        monkeypatch.setitem(sys.modules, "torchmetrics.image.lpip", None)
    a, b = write(tmp_path / "a", blobs(4)), write(tmp_path / "b", blobs(4, seed=1))
    started = time.monotonic()
    report = run(tmp_path, a, b, "--paired")
    assert time.monotonic() - started < 30
    for group, key, weights in (
        ("paired", "lpips", "alexnet-owt-7be5be79.pth"),
        ("unpaired", "fid", "weights-inception-2015-12-05-6726825d.pth"),
    ):
        assert report[group][key] is None
        note = report["notes"][f"{group}.{key}"]
        assert note.startswith("left out: ") and "\n" not in note
        assert ("no network in this test" in note) == package
        assert "pip install torchmetrics torch-fidelity" in note
        assert weights in note and torch.hub.get_dir() in note
    assert report["unpaired"]["kid"] is None
    assert report["paired"]["ssim"] < 1 and report["unpaired"]["swd"] > 0
    assert table(capsys.readouterr().out)["FID"] is None


def test_a_broken_weights_file_is_named(tmp_path):
    pytest.importorskip("torchmetrics")
    pytest.importorskip("torch_fidelity")
    for url in (evaluate.ALEXNET, evaluate.INCEPTION):
        path = evaluate.Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"<html>not found</html>")
    report = run(tmp_path, *[write(tmp_path / n, blobs(3)) for n in "ab"], "--paired")
    assert report["paired"]["lpips"] is None and report["unpaired"]["fid"] is None
    assert "weights-inception" in report["notes"]["unpaired.fid"]


def test_lpips_is_called_on_each_pair(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "lpips_network", lambda small: lambda a, b: float(np.mean(a - b)))
    images = [np.full((16, 16, 3), level) for level in (10, 20, 60)]
    a, b = write(tmp_path / "a", images), write(tmp_path / "b", [0 * image for image in images])
    assert run(tmp_path, a, b, "--paired")["paired"]["lpips"] == pytest.approx(30)


# --------------------------------------------------------------------- sliced Wasserstein distance


@pytest.mark.parametrize("size", [(64, 64), (67, 41)])
def test_pyramid_adds_up_again(size):
    """The levels, each enlarged and added to the next, are the picture; flat has no detail."""
    image = blobs(1, *size)[0]
    levels = evaluate.laplacian_pyramid(image)
    assert min(levels[-1].shape[:2]) in range(16, 32)
    sides = [level.shape[:2] for level in levels]
    assert sides == [tuple(-(-side // 2**k) for side in size[::-1]) for k in range(len(levels))]
    whole = levels[-1]
    for level in levels[-2::-1]:
        spread = np.zeros_like(level)
        spread[::2, ::2] = whole
        padded = np.pad(spread, ((2, 2), (2, 2), (0, 0)), "reflect")
        kernel = np.outer([1, 4, 6, 4, 1], [1, 4, 6, 4, 1]) / 64
        height, width = level.shape[:2]
        enlarged = sum(
            kernel[i, j] * padded[i : i + height, j : j + width] for i in range(5) for j in range(5)
        )
        whole = level + enlarged
    assert np.allclose(whole, image)
    flat = evaluate.laplacian_pyramid(np.full_like(image, 77.0))
    assert all(np.allclose(level, 0) for level in flat[:-1]) and np.allclose(flat[-1], 77)


def plain_swd(a, b):
    """Sorted projections of two equally large sets of patches, (n, 3, 49)."""
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
    a = rng.normal(3, 2, (10, 64, 3, 7, 7)).astype(np.float32)
    b = (rng.gamma(0.3, 1, (10, 64, 1, 1, 1)) * rng.normal(0, 1, (10, 64, 3, 7, 7))).astype("f")
    expected = plain_swd(a.reshape(-1, 3, 49), b.reshape(-1, 3, 49))  # other lines: within 3 %
    assert evaluate.sliced_wasserstein(a, b) == pytest.approx(expected, rel=0.03)
    assert evaluate.sliced_wasserstein(a, a) == 0
    # Each picture twice is the same distribution, of another number.
    assert evaluate.sliced_wasserstein(a, np.repeat(a, 2, 0)) == pytest.approx(0, abs=1e-6)
    assert evaluate.sliced_wasserstein(np.repeat(a, 3, 0), b) == pytest.approx(
        evaluate.sliced_wasserstein(a, b), rel=1e-3
    )


def test_swd_tells_on_which_level_sets_differ(tmp_path):
    """Noise of another kind, on one pixel or on 4x4, against other pictures of the same kind."""
    rng = np.random.default_rng(9)
    b = write(tmp_path / "b", blobs(24, noise=20))
    alike = run(tmp_path, write(tmp_path / "c", blobs(24, noise=20, seed=1)), b)["unpaired"]
    smooth = blobs(24, noise=0, seed=1)
    spots = [image + 90 * (rng.random((64, 64, 1)) < 0.05) for image in smooth]
    fine = run(tmp_path, write(tmp_path / "d", spots), b)["unpaired"]
    assert fine["swd_64"] > 2 * alike["swd_64"] and fine["swd_16"] < 1.5 * alike["swd_16"]
    assert all(alike[f"swd_{side}"] < 2 * alike[f"swd_{side}_halves"] for side in (64, 32, 16))
    levels = [fine[f"swd_{side}"] for side in (64, 32, 16)]
    assert fine["swd"] == pytest.approx(np.mean(levels))


# --------------------------------------------------------------------------------------- stripes

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
    """Of a unit cosine of period 4 with white noise of power s2: A^2/4 times the sum of the window
    squared over that of its squares, over s2 + 1/12."""
    rng = np.random.default_rng(0)
    lines = rng.normal(0, 2, (4000, 64)) + 5 * np.cos(np.pi * np.arange(64) / 2)
    half, quarter = evaluate.peaks(lines)
    noise = 4 + 1 / 12
    assert quarter == pytest.approx(10 * np.log10((25 / 4 * 32**2 / 24 + noise) / noise), abs=0.15)
    assert half == pytest.approx(0, abs=0.15)


def test_brightness_contrast_and_a_mild_blur_are_no_stripes(tmp_path):
    images = blobs(6)
    b = write(tmp_path / "b", images)
    dull = [image * 0.7 + 20 for image in images]
    soft = [
        evaluate.filtered(np.pad(x, ((1, 1), (1, 1), (0, 0)), "reflect"), [0.1, 0.8, 0.1])
        for x in images
    ]
    for name, altered in (("dull", dull), ("soft", soft)):
        found = run(tmp_path, write(tmp_path / name, altered), b)["stripes"]
        assert all(abs(found[key]) < 0.7 for key in PLANTED), (name, found)


def test_error_is_the_standard_error(tmp_path):
    """Over a hundred draws of one kind of picture, the excess scatters as the error says."""
    levels = [
        np.array([evaluate.peaks(x.mean(2)) for x in blobs(8, 32, 32, seed)])[:, 1]
        for seed in range(100)
    ]
    scatter = np.std([a.mean() - b.mean() for a, b in zip(levels[::2], levels[1::2], strict=True)])
    a, b = (write(tmp_path / str(seed), blobs(8, 32, 32, seed)) for seed in (0, 1))
    assert run(tmp_path, a, b)["stripes"]["vertical_4_error"] == pytest.approx(scatter, rel=0.6)


def test_flat_pictures_have_no_stripes(tmp_path):
    flat = write(tmp_path / "a", [np.full((32, 32, 3), level) for level in (0, 90, 255)])
    found = run(tmp_path, flat, flat)
    assert all(found["stripes"][key] == 0 for key in PLANTED) and found["unpaired"]["swd"] == 0


def test_a_stripe_is_looked_for_at_the_generated_size(tmp_path):
    """A generated picture of an odd size is not resized, which would move the stripe."""
    images = blobs(4)
    x = np.arange(64)[None, :, None]
    striped = [image + 8 * (-1.0) ** x for image in images]
    striped[3] = striped[3][:40, :48]
    b = write(tmp_path / "b", blobs(4, 96, 96, seed=1))
    report = run(tmp_path, write(tmp_path / "a", striped), b)
    assert report["stripes"]["vertical_2"] > 6
    lines = report["pictures"]
    assert lines[0].startswith("4 generated 64x64 (3), 48x40 (1), 4 reference 96x96")
    assert "for SWD: 1 of 4 generated resized from 48x40 to 64x64" in lines[1]
    assert "for SWD and stripes: 4 of 4 references resized from 96x96 to 64x64" in lines[2]
    assert "nothing resized" not in "".join(lines)


# ---------------------------------------------------------------------------- change, shift-PSNR


def test_change_by_hand(tmp_path):
    x = blobs(3, noise=0)
    a = write(tmp_path / "a", [255 - image for image in x])
    found = run(tmp_path, a, write(tmp_path / "b", x), "--input", tmp_path / "b")["change"]
    assert found["luminance"] == pytest.approx(-1)
    expected = np.mean([np.abs(255 - 2 * image).mean() / 127.5 for image in x])
    assert found["l1"] == pytest.approx(expected)


def test_luminance_correlation_is_that_of_train():
    if not (ROOT / "cycleGAN" / "train.py").exists():
        pytest.skip("no cycleGAN folder")
    from conftest import load_script

    a, b = blobs(2)
    as_there = [torch.from_numpy(i / 127.5 - 1).permute(2, 0, 1)[None] for i in (a, b)]
    theirs = load_script("cycleGAN").luminance_correlation(*as_there)
    assert evaluate.correlation(a, b) == pytest.approx(theirs, abs=1e-6)
    assert evaluate.correlation(a, 0 * b) == 0


TRANSLATE = """
import argparse, json, sys
from pathlib import Path
import numpy as np
from PIL import Image
parser = argparse.ArgumentParser(allow_abbrev=False)
for name in ("checkpoint", "input", "output", "direction"):
    parser.add_argument("--" + name)
args = parser.parse_args()
Path("{log}").write_text(json.dumps([__file__, vars(args), len(list(Path(args.input).iterdir()))]))
Path(args.output).mkdir()
for file in Path(args.input).iterdir():
    image = np.asarray(Image.open(file)).astype(int)
    {body}
    Image.fromarray(image.astype(np.uint8)).save(Path(args.output) / file.name)
"""


@pytest.fixture
def translator(tmp_path, monkeypatch):
    """translator(body) stands for CUT/translate.py; it returns the file that logs its call."""
    monkeypatch.setattr(evaluate, "ROOT", tmp_path)
    for method in ("CUT", "cycleGAN"):
        (tmp_path / method).mkdir()
    torch.save({"method": "CUT"}, tmp_path / "checkpoint.pt")
    torch.save({"weight": torch.zeros(1)}, tmp_path / "net_G.pth")

    def make(body):
        log = tmp_path / "log.json"
        for method in ("CUT", "cycleGAN"):
            text = TRANSLATE.replace("{log}", str(log)).replace("{body}", body)
            (tmp_path / method / "translate.py").write_text(text)
        return log

    return make


def test_shift_psnr_of_a_generator_that_shifts_along(translator, tmp_path, capsys):
    log = translator("image = 255 - image")
    a = write(tmp_path / "a", blobs(3))
    flags = ["--input", a, "--checkpoint", tmp_path / "checkpoint.pt"]
    report = run(tmp_path, a, a, *flags)
    assert report["stripes"]["shift_psnr"] is None  # JSON has no infinity
    assert "18 of 18 that are equal (infinite); 3 of 3" in report["notes"]["stripes.shift_psnr"]
    assert table(capsys.readouterr().out)["shift-PSNR, 1 px"] == math.inf
    script, given, pictures = json.loads(log.read_text())
    assert script == str(tmp_path / "CUT" / "translate.py") and pictures == 3 * 7
    assert given["checkpoint"] == str(tmp_path / "checkpoint.pt") and given["direction"] is None


def test_shift_psnr_by_hand(translator, tmp_path):
    """G darkens every other column: shifted by an odd number to the right it is off by 20."""
    translator("image = image.copy(); image[:, ::2] -= 20")
    a = write(tmp_path / "a", blobs(5))
    flags = ["--input", a, "--checkpoint", tmp_path / "checkpoint.pt", "--shift-images", "2"]
    report = run(tmp_path, a, a, *flags)
    found = report["stripes"]
    assert found["shift_psnr_1"] == pytest.approx(20 * math.log10(255 / 20))
    assert found["shift_psnr_3"] == found["shift_psnr"] == found["shift_psnr_1"]
    assert found["shift_psnr_2"] is None
    assert "2 of 5 inputs, the first by name" in report["notes"]["stripes.shift_psnr"]


def test_shift_psnr_at_the_generated_size_and_direction(translator, tmp_path):
    log = translator("assert image.shape == (64, 64, 3)")
    a = write(tmp_path / "a", blobs(2))
    flags = ["--input", write(tmp_path / "x", blobs(2, 128, 128))]
    flags += ["--checkpoint", tmp_path / "net_G.pth", "--method", "cycleGAN", "--direction", "y2x"]
    lines = run(tmp_path, a, a, *flags)["pictures"]
    assert "for the change: 2 of 2 inputs resized from 128x128 to 64x64 (PIL's bicubic)" in lines
    script, given, _ = json.loads(log.read_text())
    assert "cycleGAN" in script and given["direction"] == "y2x"
    flags = ["--input", a, "--checkpoint", tmp_path / "net_G.pth", "--method", "cycleGAN"]
    notes = [
        run(tmp_path, a, a, *flags, *more)["notes"]["stripes.shift_psnr"]
        for more in ([], ["--direction", "y2x"])
    ]
    assert notes[0].endswith("; x2y") and notes[1].endswith("; y2x")


def test_shift_psnr_refuses(translator, tmp_path, capsys):
    translator("sys.exit('translate.py: error: the weights are of another network')")
    a = write(tmp_path / "a", blobs(2))
    given = [a, a, "--input", a, "--checkpoint"]
    assert "another network" in refused(capsys, *given, tmp_path / "checkpoint.pt")
    early = [tmp_path / "no folder", a, "--input", a, "--checkpoint", tmp_path / "checkpoint.pt"]
    assert "is of CUT" in refused(capsys, *early, "--direction", "x2y")  # before all else
    assert "pix2pix/translate.py to run" in refused(capsys, *early, "--method", "pix2pix")
    assert "--method" in refused(capsys, *given, tmp_path / "net_G.pth")
    assert "no file" in refused(capsys, *given, tmp_path / "nothing.pt")
    (tmp_path / "text.pt").write_text("nothing")
    assert "no checkpoint" in refused(capsys, *given, tmp_path / "text.pt")
    assert "--input" in refused(capsys, a, a, "--checkpoint", tmp_path / "checkpoint.pt")
    assert "without --checkpoint" in refused(capsys, a, a, "--direction", "x2y")
    assert "without --checkpoint" in refused(capsys, a, a, "--shift-images", "3")
    assert "from 1 on" in refused(capsys, *given, "c.pt", "--shift-images", "0")


# ------------------------------------------------------------------------------------- the whole


def test_a_folder_against_itself(tmp_path, capsys):
    a, b = (write(tmp_path / name, blobs(5)) for name in "ab")
    report = run(tmp_path, a, b, "--paired", "--input", b)
    assert report["paired"]["l1"] == 0 and report["paired"]["psnr"] is None
    assert report["paired"]["ssim"] == pytest.approx(1) == report["change"]["luminance"]
    assert [report["unpaired"][key] for key in ("swd_64", "swd_32", "swd_16", "swd")] == [0] * 4
    assert all(report["stripes"][key] == 0 for key in PLANTED)
    assert "5 generated 64x64, 5 reference 64x64, 5 input 64x64; nothing resized" in (
        capsys.readouterr().out
    )


def test_json_equals_the_table(tmp_path, capsys):
    a, b = write(tmp_path / "a", blobs(4)), write(tmp_path / "b", blobs(5, 70, 50, seed=1))
    shutil.copy(b / "000.png", b / "note.txt")
    (b / "004.png").unlink()
    report = run(tmp_path, a, b, "--paired", "--input", b)
    text = capsys.readouterr().out
    printed = table(text)
    groups = [report[name] for name in ("paired", "unpaired", "stripes", "change")]
    values = [
        v for g in groups for key, v in g.items() if key.split("_")[-1] not in ("halves", "error")
    ]
    assert len(values) == len(printed) and len(values) > 12
    for value, shown in zip(values, printed.values(), strict=True):
        assert (value is None and shown is None) or value == pytest.approx(shown, abs=6e-5)
    for line in [*report["pictures"], *report["notes"].values()]:
        assert line in text
    assert "likewise" in text and "likewise" not in report["notes"].values()
    assert report["counts"] == {"generated": 4, "reference": 4, "input": 4}
    assert report["arguments"]["paired"] is True and report["arguments"]["generated"] == str(a)
    assert f"in {b} not read: 1 (note.txt)" in report["pictures"]
    assert "for pairs: 4 of 4 references resized from 70x50 to 64x64 (PIL's bicubic)" in text


def test_names_and_order_do_not_matter(tmp_path):
    images, truths = blobs(6), blobs(7, seed=1, noise=12)
    names = ["q", "z", "a", "m", "10", "9", "b"]
    first = run(tmp_path, write(tmp_path / "a", images), write(tmp_path / "b", truths))
    second = run(
        tmp_path, write(tmp_path / "c", images, names), write(tmp_path / "d", truths, names)
    )
    for group in ("unpaired", "stripes"):
        for key, value in first[group].items():
            assert second[group][key] == (
                value if value is None else pytest.approx(value, rel=1e-5)
            )


def test_refusals(tmp_path, capsys):
    a, one = write(tmp_path / "a", blobs(3)), write(tmp_path / "one", blobs(1))
    (tmp_path / "empty").mkdir()
    assert "is no folder" in refused(capsys, a, tmp_path / "nowhere")
    assert "holds no picture" in refused(capsys, tmp_path / "empty", a)
    assert "holds 1 picture; wanted are two" in refused(capsys, one, a)
    assert "holds 1 picture; wanted are two" in refused(capsys, one, one, "--paired")
    assert "holds 1 picture; wanted are two" in refused(capsys, a, a, "--input", one)
    assert "--json" in refused(capsys, a, a, "--json", tmp_path / "no" / "file.json")
    assert "--json" in refused(capsys, a, a, "--json", tmp_path)
    assert "unrecognized arguments: --pair" in refused(capsys, a, a, "--pair")
    assert "required" in refused(capsys, a)


def test_stems_that_do_not_match_are_named(tmp_path, capsys):
    a = write(tmp_path / "a", blobs(6), ["1", "2", "3", "4", "5", "6"])
    b = write(tmp_path / "b", blobs(3), ["1", "2", "7"])
    for flags in (["--paired"], ["--input", b]):
        error = refused(capsys, a, b, *flags)
        assert flags[0] in error
        assert f"{b} lacks 4 (3, 4, 5, ...)" in error and f"{a} lacks 1 (7)" in error
    shutil.copy(b / "1.png", b / "1.bmp")
    assert "1.png have the same stem" in refused(capsys, a, b, "--paired")


def test_an_unreadable_picture_is_named(tmp_path, capsys):
    a, b = write(tmp_path / "a", blobs(3)), write(tmp_path / "b", blobs(3))
    whole = (b / "001.png").read_bytes()
    (b / "001.png").write_bytes(whole[: len(whole) // 2])
    assert f"cannot read the image {b / '001.png'}" in refused(capsys, a, b)


def test_as_a_command(tmp_path):
    a, b = write(tmp_path / "a", blobs(3)), write(tmp_path / "b", blobs(3, seed=1))
    whole = subprocess.run(
        [sys.executable, SCRIPT, "a", "b"], cwd=tmp_path, capture_output=True, text=True
    )
    assert whole.returncode == 0 and table(whole.stdout)["SWD, 64 px"] > 0
    broken = subprocess.run(
        [sys.executable, SCRIPT, a, tmp_path / "no"], capture_output=True, text=True
    )
    assert broken.returncode == 2 and broken.stdout == ""
    assert broken.stderr.strip().endswith("two or more (jpg, jpeg, png, webp, bmp, tif, tiff)")
    assert "Traceback" not in broken.stderr and b.exists()


def test_help_needs_no_torch(tmp_path):
    """A torch that cannot be imported lies in the way."""
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    env = {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, SCRIPT, "--help"], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for flag in ("--paired", "--input", "--json", "--checkpoint", "--shift-images", "--method"):
        assert flag in done.stdout


def test_pictures_are_read_as_the_data_sets_are():
    """Copies of the functions of cycleGAN_dataset.py, kept equal."""
    original = ROOT / "cycleGAN" / "cycleGAN_dataset.py"
    if not original.exists():
        pytest.skip("no cycleGAN folder")
    found = []
    for path in (SCRIPT, original):
        nodes = ast.parse(path.read_text()).body
        named = {
            n.name: ast.dump(n) for n in nodes if isinstance(n, ast.FunctionDef | ast.ClassDef)
        }
        found.append([named[name] for name in ("RunError", "list_images", "load_rgb")])
    assert found[0] == found[1]


def test_it_imports_no_method_folder():
    names = [
        alias.name if isinstance(node, ast.Import) else node.module
        for node in ast.walk(ast.parse(SCRIPT.read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    ]
    known = sys.stdlib_module_names | {"numpy", "PIL", "torch", "tqdm"}
    known |= {"torchmetrics", "torch_fidelity"}
    assert {name.split(".")[0] for name in names} <= known

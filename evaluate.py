"""Compares two folders of pictures in numbers: what a generator made, and what it should look like.

    python evaluate.py results/facades datasets/facades_unpaired/test/y --paired
    python evaluate.py results/monet datasets/monet2photo/testA \\
        --input datasets/monet2photo/testB --checkpoint CUT/model/monet2photo/checkpoint.pt

With --paired a picture and its reference have one stem. --input, matched by stem too, is what the
generator was given. LPIPS, FID and KID need `pip install torchmetrics torch-fidelity` and weights;
where these cannot be had, the table says so and the other numbers are still there.
"""

import argparse
import contextlib
import json
import math
import os
import socket
import subprocess
import sys
import tempfile
import warnings
import zlib
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image, ImageOps
from tqdm import tqdm

# torch is imported where it is used: in what needs a network. The rest starts without it.

ROOT = Path(__file__).resolve().parent
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
PACKAGES = "pip install torchmetrics torch-fidelity"
ALEXNET = "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth"
INCEPTION = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
    "weights-inception-2015-12-05-6726825d.pth"
)


class RunError(Exception):
    """Ends a run. The message is one line: what was found, what was wanted, what to do."""


class LeftOutError(Exception):
    """A number that cannot be had. The message says why and, where it can be mended, how."""


class Row(NamedTuple):
    """One line of the table. value: None where it is left out, and then `note` says why.

    beside: a number to judge it by, as ("error", 0.1), or none.
    """

    group: str
    key: str
    label: str
    value: float | None
    note: str
    beside: tuple = ()


# ---------------------------------------------------------------------------------------- flags


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def parse_args(argv=None):
    style = argparse.RawDescriptionHelpFormatter
    parser = Parser("evaluate.py", description=__doc__, formatter_class=style, allow_abbrev=False)
    flag = parser.add_argument
    flag("generated", metavar="GENERATED", type=Path, help="folder of generated pictures")
    flag("reference", metavar="REFERENCE", type=Path, help="folder of true pictures of that kind")
    flag("--paired", action="store_true", help="same stems are pairs: L1, PSNR, SSIM, LPIPS [off]")
    flag("--input", type=Path, help="folder of what G was given: how much G changes it [off]")
    flag("--json", type=Path, metavar="FILE", help="also write the numbers there [off]")

    shift = parser.add_argument_group("shift-PSNR").add_argument
    shift("--checkpoint", type=Path, metavar="FILE", help="the generator; needs --input [off]")
    methods = ["pix2pix", "cycleGAN", "CUT"]
    shift("--method", choices=methods, help="whose translate.py runs it [what FILE says]")
    shift("--direction", choices=["x2y", "y2x"], help="for cycleGAN [translate.py's default]")
    shift("--shift-images", type=int, metavar="N", help="use the first N inputs by name [8]")
    args = parser.parse_args(argv)
    for name in ("method", "direction", "shift_images"):
        if getattr(args, name) is not None and not args.checkpoint:
            parser.error(f"--{name.replace('_', '-')} does nothing without --checkpoint")
    if args.checkpoint and not args.input:
        parser.error("--checkpoint needs --input, the folder of pictures to shift and translate")
    if args.shift_images is None:
        args.shift_images = 8
    if args.shift_images < 1:
        parser.error(f"--shift-images {args.shift_images}: wanted is a number from 1 on")
    if args.json and (args.json.is_dir() or not args.json.absolute().parent.is_dir()):
        parser.error(f"--json {args.json}: wanted is a file in a folder that exists")
    return args


# ------------------------------------------------------------------------------------- pictures


def list_images(folder):
    """The pictures directly inside `folder` (a Path), sorted by name; [] without folder."""
    if not folder.is_dir():
        return []
    files = (f for f in folder.iterdir() if f.suffix.lower() in SUFFIXES and f.name[0] != ".")
    return sorted(f for f in files if f.is_file())


def load_rgb(path):
    """Any picture as 8-bit RGB (PIL): 16 bits are scaled to 8, transparency is put on white.

    Raises RunError, naming the file, where it cannot be read.
    """
    try:
        with Image.open(path) as opened:
            image = ImageOps.exif_transpose(opened)  # reads all: finds a cut-off file
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise RunError(f"cannot read the image {path}: {error}; replace or remove it") from None
    if image.mode == "F":
        raise RunError(f"{path} has floating-point pixels; save it with 8 or 16 bits a channel")
    if image.mode.startswith("I"):  # 16-bit gray: 65535 is white
        levels = np.asarray(image).astype(np.int64).clip(0, 65535)
        return Image.fromarray(((levels + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def pixels(path, size=None):
    """A picture as (H, W, 3) floats in [0, 255]; bicubically resized to size, (W, H), if given."""
    image = load_rgb(path)
    if size and image.size != size:
        image = image.resize(size, Image.Resampling.BICUBIC)
    return np.asarray(image).astype(np.float64)


def luminance(image):
    """Rec. 601: (H, W, 3) -> (H, W)."""
    return image @ np.array([0.299, 0.587, 0.114])


def bar(items, title):
    """`items`, with a progress bar on stderr while they pass."""
    return tqdm(items, desc=title, unit="img", leave=False)


def scan(folder):
    """Reads a folder: {path: (W, H)} of its pictures, by name. RunError below two of them."""
    files = list_images(folder)
    if len(files) < 2:
        found = f"holds {len(files) or 'no'} picture" if folder.is_dir() else "is no folder"
        kinds = ", ".join(suffix[1:] for suffix in SUFFIXES)
        raise RunError(f"{folder} {found}; wanted are two or more ({kinds})")
    return {file: load_rgb(file).size for file in bar(files, f"reading {folder.name}")}


def say_others(folder):
    """[a line] on what list_images passes over, [] where there is nothing but pictures."""
    read = {file.name for file in list_images(folder)}
    others = sorted(file.name for file in folder.iterdir() if file.name[0] != ".")
    others = [name for name in others if name not in read]
    return [f"in {folder} not read: {name_some(others)}"] if others else []


def name_some(names):
    """As in "2 (a, b)" or "7 (a, b, c, ...)"."""
    return f"{len(names)} ({', '.join(names[:3])}{', ...' * (len(names) > 3)})"


def match(generated, others, flag):
    """Pairs (generated, other) of equal stems. RunError where a picture has no or two partners."""
    by_stem = []
    for pictures in (generated, others):
        stems = {}
        for file in pictures:
            if file.stem in stems:
                raise RunError(f"{flag}: {stems[file.stem]} and {file.name} have the same stem")
            stems[file.stem] = file
        by_stem.append(stems)
    lone = []
    for mine, theirs in (by_stem, by_stem[::-1]):
        missing = sorted(mine.keys() - theirs.keys())
        if missing:
            lone.append(f"{next(iter(theirs.values())).parent} lacks {name_some(missing)}")
    if lone:
        raise RunError(f"{flag} wants the same stems in both folders: {'; '.join(lone)}")
    return [(by_stem[0][stem], by_stem[1][stem]) for stem in sorted(by_stem[0])]


def name_sizes(sizes):
    """As in "64x64", or the three most frequent of several: "64x64 (7), 80x64 (2)"."""
    counts = sorted(Counter(sizes).items(), key=lambda item: (-item[1], item[0]))
    if len(counts) == 1:
        return "{}x{}".format(*counts[0][0])
    names = ", ".join(f"{w}x{h} ({count})" for (w, h), count in counts[:3])
    return names + (f" and {len(counts) - 3} more sizes" if len(counts) > 3 else "")


def say_resized(purpose, what, pictures, wanted):
    """[a line] on what is resized, [] where nothing is. pictures, wanted: {path: (W, H)}."""
    changed = [file for file in wanted if wanted[file] != pictures[file]]
    if not changed:
        return []
    old, new = (name_sizes(sizes[file] for file in changed) for sizes in (pictures, wanted))
    count = f"{len(changed)} of {len(wanted)} {what}"
    return [f"for {purpose}: {count} resized from {old} to {new} (PIL's bicubic)"]


# --------------------------------------------------------------------------------------- paired


def filtered(image, kernel):
    """(H, W, C) filtered along both sides by k symmetric taps: (H - k + 1, W - k + 1, C)."""
    for _ in range(2):
        length = len(image) - len(kernel) + 1
        taps = enumerate(kernel)
        image = sum(tap * image[i : i + length] for i, tap in taps).swapaxes(0, 1)
    return image


def psnr(a, b):
    """Peak signal-to-noise ratio in dB, the peak being 255; inf where a equals b."""
    error = np.mean((a - b) ** 2)
    return 10 * math.log10(255**2 / error) if error else math.inf


def ssim(a, b):
    """Structural similarity (Wang et al. 2004) of two pictures, each (H, W, 3) in [0, 255].

    Gaussian window of 11x11, sigma 1.5, where it lies inside the picture; the mean of R, G and B.
    """
    window = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    window /= window.sum()
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    mean_a, mean_b = filtered(a, window), filtered(b, window)
    var_a = filtered(a * a, window) - mean_a**2
    var_b = filtered(b * b, window) - mean_b**2
    covariance = filtered(a * b, window) - mean_a * mean_b
    likeness = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)  # Eq. 13
    return np.mean(likeness * (2 * covariance + c2) / (var_a + var_b + c2))


def mean_psnr(values):
    """The mean in dB, and a note. Equal pictures, whose PSNR is infinite, are counted apart."""
    finite = [value for value in values if math.isfinite(value)]
    equal = len(values) - len(finite)
    without = f"; without {equal} of {len(values)} that are equal (infinite)" if equal else ""
    return (np.mean(finite) if finite else math.inf), f"dB, peak 255, higher is better{without}"


def paired_rows(pairs, generated):
    """L1, PSNR, SSIM and LPIPS of the pairs, the reference at its generated picture's size."""
    small = min(min(generated[file]) for file, _ in pairs)
    lpips, why_lpips = attempt(lpips_network, small)
    found = {"l1": [], "psnr": [], "ssim": [], "lpips": []}
    for file, truth in bar(pairs, "paired"):
        a, b = pixels(file), pixels(truth, generated[file])
        found["l1"].append(np.mean(np.abs(a - b)) / 127.5)
        found["psnr"].append(psnr(a, b))
        if small >= 11:
            found["ssim"].append(ssim(a, b))
        if lpips:
            found["lpips"].append(lpips(a, b))
    level, psnr_note = mean_psnr(found["psnr"])
    ssim_note = "higher is better, 1 is equal"
    if not found["ssim"]:
        ssim_note = f"left out: its window is 11 px, the smallest side {small} px"
    mean = {name: np.mean(values) if values else None for name, values in found.items()}
    return [
        Row("paired", "l1", "L1", mean["l1"], "mean |a - b| in [-1, 1], lower is better"),
        Row("paired", "psnr", "PSNR", level, psnr_note),
        Row("paired", "ssim", "SSIM", mean["ssim"], ssim_note),
        Row("paired", "lpips", "LPIPS", mean["lpips"], why_lpips or "AlexNet, lower is better"),
    ]


# ------------------------------------------------------- LPIPS, FID, KID: networks made elsewhere


def attempt(function, *arguments):
    """(its result, ""), or (None, why it is left out)."""
    try:
        return function(*arguments), ""
    except LeftOutError as error:
        return None, f"left out: {error}"


@contextlib.contextmanager
def needing(url):
    """Turns whatever packages and weights raise into a LeftOutError that says what is needed."""
    try:
        yield
    except Exception as error:  # a missing package, no network, a damaged file, an odd version
        import torch

        folder = Path(torch.hub.get_dir()) / "checkpoints"
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise LeftOutError(f"{reason}; needed: {PACKAGES}, and {url} in {folder}") from None


def fetch(url):
    """The path of weights in torch's cache. Downloads them if need be, and gives up soon."""
    import torch

    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        patience = socket.getdefaulttimeout()
        socket.setdefaulttimeout(5)  # seconds without an answer
        try:  # the hash of a good file is part of its name
            torch.hub.download_url_to_file(url, path, path.stem.rsplit("-", 1)[1])
        finally:
            socket.setdefaulttimeout(patience)
    return path


def lpips_network(small):
    """LPIPS (Zhang et al. 2018) as a function of two pictures. small: the smallest side, pixels."""
    if small < 32:
        raise LeftOutError(f"its network needs 32 px, the smallest side is {small} px")
    with needing(ALEXNET):
        import torch
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        fetch(ALEXNET)  # where torchvision will look for it
        network = LearnedPerceptualImagePatchSimilarity(net_type="alex")

    def distance(a, b):
        a, b = (torch.from_numpy(x / 127.5 - 1).float().permute(2, 0, 1)[None] for x in (a, b))
        with torch.no_grad():
            return network(a, b).item()

    return distance


def inception():
    """The Inception network of FID: (N, 3, 299, 299) floats in [0, 255] -> (N, 2048)."""
    import torch
    from torch_fidelity import FeatureExtractorInceptionV3 as Inception

    path = str(fetch(INCEPTION))
    network = Inception("inception-v3-compat", ["2048"], feature_extractor_weights_path=path)

    # This network takes bytes; clean-fid does not round after resizing. So its first layer is
    # handed the exact floats, scaled as the network scales bytes.
    def features(images):
        exact = ((images - 128) / 128,)
        hook = network.Conv2d_1a_3x3.register_forward_pre_hook(lambda layer, given: exact)
        with hook, torch.no_grad():
            return network(images.byte())[0]

    return features


def clean_299(path):
    """A picture for Inception, as clean-fid's mode "clean": (1, 3, 299, 299) in [0, 255].

    Each channel resized by PIL's bicubic, which blurs before it shrinks, and not rounded.
    Parmar et al. 2022, https://arxiv.org/abs/2104.11222.
    """
    import torch

    channels = [channel.convert("F") for channel in load_rgb(path).split()]
    channels = [channel.resize((299, 299), Image.Resampling.BICUBIC) for channel in channels]
    return torch.from_numpy(np.stack(channels).clip(0, 255))[None]


def fid_and_kid(generated, reference):
    """FID (Heusel et al. 2017), KID's mean and deviation (Binkowski et al. 2018), KID's subset.

    torchmetrics with torch-fidelity, not clean-fid: they take features that are at hand, so that
    FID and KID share one pass, and they need neither scipy nor requests; LPIPS comes with them. The
    weights are those of the original FID either way, and clean_299 is clean-fid's resizing.
    """
    with needing(INCEPTION):
        import torch
        from torchmetrics.image.fid import FrechetInceptionDistance
        from torchmetrics.image.kid import KernelInceptionDistance

        network = inception()
    sides = []
    for files, side in ((generated, "GENERATED"), (reference, "REFERENCE")):
        passing = bar(files, f"Inception {side}")
        sides.append(torch.cat([network(clean_299(file)) for file in passing]))
    same = torch.nn.Identity()  # the features are computed once, for both
    same.num_features = sides[0].shape[1]
    subset = min(1000, *map(len, sides))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that KID keeps the features
        fid = FrechetInceptionDistance(feature=same)
        kid = KernelInceptionDistance(feature=same, subsets=100, subset_size=subset)
    for features, real in zip(sides, (False, True), strict=True):
        fid.update(features.double(), real=real)
        kid.update(features.double(), real=real)
    torch.manual_seed(0)  # KID draws its subsets
    return fid.compute().item(), *(value.item() for value in kid.compute()), subset


def inception_rows(generated, reference):
    """FID and KID."""
    found, why = attempt(fid_and_kid, generated, reference)
    fid, kid, deviation, subset = found or (None, None, None, None)
    few = min(len(generated), len(reference))
    resized = "all resized to 299x299 (PIL's bicubic)"
    biased = f"; biased, being of {few} pictures (below 2048): read KID" if few < 2048 else ""
    drawn = f"mean of 100 subsets of {subset}, lower is better; {resized}"
    spread = "of these subsets; 0 where each is the whole set"
    return [
        Row("unpaired", "fid", "FID", fid, why or f"lower is better; {resized}{biased}"),
        Row("unpaired", "kid", "KID", kid, "left out: as FID" if why else drawn),
        Row("unpaired", "kid_std", "KID, deviation", deviation, spread),
    ][: 2 if why else 3]


# --------------------------------------------------------------------- sliced Wasserstein distance


def laplacian_pyramid(image):
    """[(h, w, 3), ...], largest first, down to the last whose sides are both 16 or more.

    Burt and Adelson 1983: each level is what the next, half as large, has lost of it; the last is
    the blurred picture itself. Any height and width.
    """
    kernel = np.array([1, 4, 6, 4, 1]) / 16
    around = ((2, 2), (2, 2), (0, 0))
    levels = []
    while min(image.shape[:2]) >= 32:
        half = filtered(np.pad(image, around, "reflect"), kernel)[::2, ::2]
        spread = np.zeros_like(image)
        spread[::2, ::2] = 4 * half  # three of four pixels are 0
        levels.append(image - filtered(np.pad(spread, around, "reflect"), kernel))
        image = half
    return [*levels, image]


def draw_patches(image, count):
    """`count` patches of 7x7 of each pyramid level of (H, W, 3): a list of (count, 3, 7, 7).

    Where they lie is drawn by a hash of the pixels, so that neither the name of a picture nor its
    place in the folder counts.
    """
    rng = np.random.default_rng(zlib.crc32(image.tobytes()))
    patches = []
    for level in laplacian_pyramid(image):
        windows = sliding_window_view(level, (7, 7), axis=(0, 1))  # (h - 6, w - 6, 3, 7, 7)
        top, left = (rng.integers(0, side, count) for side in windows.shape[:2])
        patches.append(windows[top, left].astype(np.float32))
    return patches


def describe(files, size, count, title):
    """Patches of all pictures, each resized to size (W, H), by level: (N, count, 3, 7, 7)."""
    images = (pixels(file, size) for file in bar(files, title))
    # Sorted by content, for two halves of a set that no name decides on.
    drawn = sorted((draw_patches(image, count) for image in images), key=lambda p: p[0].tobytes())
    return [np.stack(level) for level in zip(*drawn, strict=True)]


def sliced_wasserstein(a, b):
    """Mean Wasserstein distance of two sets of patches over 512 random lines through the origin.

    a, b: (N, count, 3, 7, 7); N may differ. Each set's channels are first brought to mean 0 and
    deviation 1, as in the paper, so a cast or a contrast that all pictures share does not show. On
    a line the distance is the mean difference of the quantile functions, taken at as many places
    as the larger set has patches.
    """
    sides = [standardized(patches) for patches in (a, b)]
    size = max(side.shape[1] for side in sides)
    places = [(2 * np.arange(size) + 1) * side.shape[1] // (2 * size) for side in sides]
    rng, distances = np.random.default_rng(0), []
    for _ in range(16):  # 32 lines at a time, for the memory's sake
        lines = rng.standard_normal((32, 147)).astype(np.float32)
        lines /= np.linalg.norm(lines, axis=1, keepdims=True)
        first, second = (np.sort(lines @ s)[:, at] for s, at in zip(sides, places, strict=True))
        distances.append(np.mean(np.abs(first - second), dtype=np.float64))
    return np.mean(distances)


def standardized(patches):
    """(N, count, 3, 7, 7) -> (147, N * count), each channel with mean 0 and deviation 1."""
    patches = patches.reshape(-1, 3, 49)
    patches = patches - patches.mean((0, 2), keepdims=True, dtype=np.float64).astype(np.float32)
    power = np.mean(patches**2, axis=(0, 2), keepdims=True, dtype=np.float64)
    return (patches / np.sqrt(power).clip(1e-6).astype(np.float32)).reshape(-1, 147).T


def wasserstein_rows(generated, reference, size):
    """The sliced Wasserstein distance of each pyramid level of the pictures at `size`, (W, H).

    Karras et al. 2018, section 5, https://arxiv.org/abs/1710.10196; in thousandths, as there.
    """
    side = min(size)
    if side < 16:
        why = f"left out: it needs 16 px, the smaller side is {side} px"
        return [Row("unpaired", "swd", "SWD", None, why)]
    # The paper's 128 patches a picture; above 1024 pictures fewer, to bound the memory.
    count = max(1, min(128, 2**17 // max(len(generated), len(reference))))
    made = describe(generated, size, count, "SWD GENERATED")
    true = describe(reference, size, count, "SWD REFERENCE")
    halves = "halves: the same of two halves of REFERENCE, higher as they are smaller"
    note = f"x 1000, lower is better; {count} patches of each picture; {halves}"
    rows, yardsticks = [], []
    for a, b in zip(made, true, strict=True):
        if len(b) >= 4:
            yardsticks.append(1000 * sliced_wasserstein(b[::2], b[1::2]))
        value, beside = 1000 * sliced_wasserstein(a, b), [("halves", x) for x in yardsticks[-1:]]
        rows.append(Row("unpaired", f"swd_{side}", f"SWD, {side} px", value, note, *beside))
        side, note = -(-side // 2), "likewise"
    value = np.mean([row.value for row in rows])
    beside = [("halves", np.mean(yardsticks))] if yardsticks else []
    return [*rows, Row("unpaired", "swd", "SWD, mean", value, "of these levels", *beside)]


# --------------------------------------------------------------------------------------- stripes


def peaks(lines):
    """How far the power of lines, (n, length), stands out at 1/2 and 1/4 cycle a pixel, in dB.

    P(k) is the mean over the lines of |FFT|^2, the mean of a line taken off, with a Hann window, in
    squared gray levels a pixel. With K = length / 2 or length / 4 the result is

        10 log10(P(K) + 1/12) - mean over k near K of 10 log10(P(k) + 1/12),

    so that contrast and sharpness, which scale P(K) and its neighbours alike, do not count. Near
    are bins 3 to length / 16 away (at least 3 and 4), beyond what the window smears; 1/12 is the
    power of rounding to 8 bits, without which flat pictures have no logarithm.
    """
    length = lines.shape[1] // 4 * 4  # then both frequencies fall on a bin
    lines = lines[:, :length] - lines[:, :length].mean(1, keepdims=True)
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(length) / length)
    power = np.mean(np.abs(np.fft.rfft(lines * window)) ** 2, axis=0) / np.sum(window**2)
    level = 10 * np.log10(power + 1 / 12)
    away = np.arange(3, max(4, length // 16) + 1)
    near_2, near_4 = length // 2 - away, length // 4 + np.concatenate([-away, away])
    return level[length // 2] - level[near_2].mean(), level[length // 4] - level[near_4].mean()


def stripe_levels(files, size, title):
    """`peaks` along the rows and along the columns of each picture's luminance: (N, 2, 2)."""
    found = []
    for file in bar(files, title):
        gray = luminance(pixels(file, size))
        found.append([peaks(gray), peaks(gray.T)])
    return np.array(found)


def stripe_rows(generated, reference, size):
    """How much more GENERATED stands out at 1/2 and 1/4 of the sampling frequency than REFERENCE.

    A generated picture keeps its own size, as resizing would move a stripe to another frequency.
    """
    small = min(min(sides) for sides in [size, *generated.values()])
    if small < 32:
        why = f"left out: it needs 32 px, the smallest side is {small} px"
        return [Row("stripes", "excess", "excess energy", None, why)]
    made = stripe_levels(generated, None, "stripes GENERATED")
    true = stripe_levels(reference, size, "stripes REFERENCE")
    excess = made.mean(0) - true.mean(0)
    error = np.sqrt(sum(levels.var(0, ddof=1) / len(levels) for levels in (made, true)))
    note, rows = "dB more than REFERENCE, a stripe is above 0; error: its standard error", []
    for at in np.ndindex(2, 2):
        direction, period = ("vertical", "horizontal")[at[0]], (2, 4)[at[1]]
        label = f"{direction}, period {period} px"
        beside = ("error", error[at])
        rows.append(Row("stripes", f"{direction}_{period}", label, excess[at], note, beside))
        note = "likewise"
    return rows


# ---------------------------------------------------------------------------- change, shift-PSNR


def correlation(a, b):
    """Pearson's correlation of two pictures' luminance, each (H, W, 3); 0 where one is flat."""
    a, b = (luminance(image).ravel() for image in (a, b))
    a, b = a - a.mean(), b - b.mean()
    return a @ b / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-8)


def change_rows(pairs, generated):
    """How far G(x) is from x, each x at the size of G(x)."""
    changes, correlations = [], []
    for file, source in bar(pairs, "change"):
        fake, x = pixels(file), pixels(source, generated[file])
        changes.append(np.mean(np.abs(fake - x)) / 127.5)
        correlations.append(correlation(fake, x))
    light, note = np.mean(correlations), "Rec. 601, 1 is equal up to contrast, below 0 inverted"
    return [
        Row("change", "l1", "L1 to the input", np.mean(changes), "mean |G(x) - x| in [-1, 1]"),
        Row("change", "luminance", "luminance correlation", light, note),
    ]


def read_method(checkpoint):
    """The method that a checkpoint of train.py names."""
    import torch

    if not checkpoint.is_file():
        raise RunError(f"there is no file {checkpoint}; train.py --save-model writes one")
    try:
        method = torch.load(checkpoint, map_location="cpu", weights_only=True).get("method")
    except Exception as error:  # a damaged file may raise nearly anything
        raise RunError(f"{checkpoint} is no checkpoint ({type(error).__name__})") from None
    if method not in ("pix2pix", "cycleGAN", "CUT"):
        raise RunError(f"{checkpoint} does not say whose it is; --method does")
    return method


def check_translator(args):
    """Settles --method and --direction before anything is measured. RunError where they are odd."""
    args.method = args.method or read_method(args.checkpoint)
    if not (ROOT / args.method / "translate.py").is_file():
        raise RunError(f"there is no {ROOT / args.method / 'translate.py'} to run the checkpoint")
    if args.direction and args.method != "cycleGAN":
        raise RunError(f"--direction is for cycleGAN, {args.checkpoint} is of {args.method}")


def translate(args, source, target):
    """Runs the method's translate.py on the folder `source`, into the folder `target`."""
    script = ROOT / args.method / "translate.py"
    command = [sys.executable, script, "--checkpoint", args.checkpoint]
    command += ["--input", source, "--output", target]
    command += ["--direction", args.direction] if args.direction else []
    done = subprocess.run(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise RunError(f"{script} failed: {reason}")


def shift_rows(args, pairs, generated):
    """shift-PSNR (Zhang 2019, https://arxiv.org/abs/1904.11486): G(shifted x) to shifted G(x).

    Circular shifts of 1, 2 and 3 pixels, each to the right (axis 1) and down (axis 0).
    """
    chosen = sorted(pairs, key=lambda pair: pair[1].name)[: args.shift_images]
    shifts = [(pixel, axis) for pixel in (1, 2, 3) for axis in (1, 0)]
    found = {pixel: [] for pixel, _ in shifts}
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "x", Path(folder) / "G_x"
        source.mkdir()
        for index, (file, x) in enumerate(chosen):
            x = pixels(x, generated[file]).astype(np.uint8)
            for pixel, axis in [(0, 0), *shifts]:
                shifted = Image.fromarray(np.roll(x, pixel, axis))
                shifted.save(source / f"{index}_{pixel}_{axis}.png", compress_level=1)
        print(f"translating {len(chosen)} pictures, each shifted in 6 ways", file=sys.stderr)
        translate(args, source, target)
        for index in range(len(chosen)):
            still = pixels(target / f"{index}_0_0.png")
            for pixel, axis in shifts:
                moved = pixels(target / f"{index}_{pixel}_{axis}.png")
                found[pixel].append(psnr(moved, np.roll(still, pixel, axis)))
    rows = []
    for key, name, values in (
        ("shift_psnr", "mean", [value for pixel in found for value in found[pixel]]),
        *((f"shift_psnr_{pixel}", f"{pixel} px", values) for pixel, values in found.items()),
    ):
        value, note = mean_psnr(values)
        if not rows:
            note += f"; {len(chosen)} of {len(pairs)} inputs, the first by name"
            note += f"; {args.direction or 'x2y'}" * (args.method == "cycleGAN")
        rows.append(Row("stripes", key, f"shift-PSNR, {name}", value, note))
    return rows


# ------------------------------------------------------------------------------------- the table


def evaluate(args):
    """Everything that is asked for: what the pictures are, a dict, and the rows of the table."""
    folders = {"generated": args.generated, "reference": args.reference, "input": args.input}
    if args.checkpoint:
        check_translator(args)
    sets = {name: scan(folder) for name, folder in folders.items() if folder}
    generated, reference = sets["generated"], sets["reference"]
    pairs = match(generated, reference, "--paired") if args.paired else []
    inputs = match(generated, sets["input"], "--input") if args.input else []
    size = Counter(sorted(generated.values())).most_common(1)[0][0]

    whole = {name: f"{len(set_)} {name} {name_sizes(set_.values())}" for name, set_ in sets.items()}
    said = say_resized("pairs", "references", reference, {y: generated[file] for file, y in pairs})
    if args.input:
        wanted = {x: generated[file] for file, x in inputs}
        said += say_resized("the change", "inputs", sets["input"], wanted)
    said += say_resized("SWD", "generated", generated, dict.fromkeys(generated, size))
    said += say_resized("SWD and stripes", "references", reference, dict.fromkeys(reference, size))
    others = [line for folder in folders.values() if folder for line in say_others(folder)]
    lines = [", ".join(whole.values()) + ("" if said else "; nothing resized"), *said, *others]
    facts = {
        "counts": {name: len(set_) for name, set_ in sets.items()},
        "sizes": {name: name_sizes(set_.values()) for name, set_ in sets.items()},
        "pictures": lines,
    }

    rows = paired_rows(pairs, generated) if args.paired else []
    rows += inception_rows(generated, reference)
    rows += wasserstein_rows(generated, reference, size)
    rows += stripe_rows(generated, reference, size)
    rows += shift_rows(args, inputs, generated) if args.checkpoint else []
    rows += change_rows(inputs, generated) if args.input else []
    return facts, rows


def show(lines, rows):
    """Prints the table."""
    print(*lines, sep="\n")
    group, width = None, max(len(row.label) for row in rows)
    for row in rows:
        if row.group != group:
            print(f"\n{row.group}")
        group = row.group
        value = "-" if row.value is None else four(row.value)
        beside = f"({row.beside[0]} {four(row.beside[1])}) " if row.beside else ""
        print(f"  {row.label:{width}} {value:>10}  {beside}{row.note}")


def four(value):
    """A number with four decimals; no "-0.0000"."""
    return f"{round(float(value), 4) + 0.0:.4f}"


def write_json(path, args, facts, rows):
    """Writes the numbers, groups of {key: value}, with what they were made from."""
    given = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    report, notes, note = {"arguments": given, **facts}, {}, ""
    for row in rows:
        values = report.setdefault(row.group, {})
        finite = row.value is not None and math.isfinite(row.value)
        values[row.key] = float(row.value) if finite else None
        if row.beside:
            values[f"{row.key}_{row.beside[0]}"] = float(row.beside[1])
        note = notes[f"{row.group}.{row.key}"] = note if row.note == "likewise" else row.note
    report["notes"] = notes
    aside = path.with_name(f".{path.name}.tmp")
    try:
        aside.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n")
        os.replace(aside, path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise RunError(f"cannot write {path}: {error}") from None


def main(argv=None):
    """Runs the command line. Returns the exit status."""
    args = parse_args(argv)
    try:
        facts, rows = evaluate(args)
        show(facts["pictures"], rows)
        if args.json:
            write_json(args.json, args, facts, rows)
    except (RunError, OSError) as error:
        print(f"evaluate.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())

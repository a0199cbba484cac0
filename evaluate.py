"""Measure generated images against real ones: L1, PSNR, SSIM, LPIPS, FID, KID, SWD, stripes.

    python evaluate.py results/facades datasets/facades_unpaired/test/y --paired
    python evaluate.py results/monet datasets/monet2photo/testA \\
        --input datasets/monet2photo/testB --checkpoint visualize/CUT/monet2photo

--paired and --input match images by stem. LPIPS, FID and KID need `pip install torchmetrics
torch-fidelity` and weights, which these packages download once. All other numbers work without.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
import zlib
from collections import Counter
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "datasets"))
from images import UserError, list_images, load_rgb  # noqa: E402

METHODS = ("pix2pix", "cycleGAN", "CUT")
ALEXNET = "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth"
INCEPTION = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
INCEPTION += "weights-inception-2015-12-05-6726825d.pth"
LUMA = np.array([0.299, 0.587, 0.114])  # Rec. 601
NOTES = {
    "paired": "L1 in [-1, 1], LPIPS: lower is better; PSNR in dB, SSIM: higher is better",
    "unpaired": "lower is better; FID is biased below 2048 images; SWD times 1000",
    "stripes": "dB more than REFERENCE at periods of 2 and 4 px; shift-PSNR: higher is better",
    "change": "L1 of G(x) - x in [-1, 1]; correlation of luminance, below 0 where inverted",
}


def parse_args(argv=None):
    style = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = argparse.ArgumentParser("evaluate.py", description=__doc__, **style)
    parser.error = lambda message: parser.exit(2, f"evaluate.py: error: {message}\n")
    flag = parser.add_argument
    flag("generated", metavar="GENERATED", type=Path, help="folder of generated images")
    flag("reference", metavar="REFERENCE", type=Path, help="folder of real images of that kind")
    flag("--paired", action="store_true", help="equal stems are pairs: L1, PSNR, SSIM, LPIPS [off]")
    flag("--input", metavar="DIR", type=Path, help="inputs of G: how much it changes them [off]")
    flag("--json", metavar="FILE", type=Path, help="also write the numbers to FILE [off]")
    flag = parser.add_argument_group("shift-PSNR, with --input").add_argument
    flag("--checkpoint", metavar="FILE", type=Path, help="the generator, or its run's folder [off]")
    flag("--method", choices=METHODS, help="method of the checkpoint [named in its path]")
    flag("--direction", choices=["x2y", "y2x"], help="for cycleGAN [translate.py's default]")
    args = parser.parse_args(argv)
    if args.checkpoint and not args.input:
        parser.error("--checkpoint needs --input, the folder of images to shift and translate")
    return args


def pixels(path, size=None):
    """An image as (H, W, 3) floats in [0, 255], resized to size, (W, H), if given."""
    image = load_rgb(path)
    if size and image.size != size:
        image = image.resize(size, Image.Resampling.BICUBIC)
    return np.asarray(image).astype(np.float64)


def match(generated, others, flag):
    """[(generated, other), ...] of equal stems. UserError where an image has no or two partners."""
    left, right = ({file.stem: file for file in files} for files in (generated, others))
    odd = [file for file in generated if left[file.stem] != file or file.stem not in right]
    odd += [file for file in others if right[file.stem] != file or file.stem not in left]
    if odd:
        found = f"{len(odd)} images have none, or more than one, such as {odd[0]}"
        raise UserError(f"{flag}: each image needs a partner of the same stem; {found}")
    return [(left[stem], right[stem]) for stem in sorted(left)]


def means(pairs, sizes, **functions):
    """{key: the mean of function(a, b) over the pairs, (H, W, 3)}; b is resized to sizes[a]."""
    values = {key: [] for key in functions}
    for file, other in tqdm(pairs, ", ".join(functions), leave=False):
        a, b = pixels(file), pixels(other, sizes[file])
        for key, function in functions.items():
            values[key].append(function(a, b))
    return {key: mean_finite(numbers) for key, numbers in values.items()}


def mean_finite(values):
    """The mean without the PSNR of equal images, which is infinite."""
    finite = [value for value in values if value < math.inf]
    return np.mean(finite) if finite else "infinite: all are equal"


def filtered(image, kernel):
    """(H, W, C) filtered along both sides by k symmetric taps: (H - k + 1, W - k + 1, C)."""
    for _ in range(2):
        length = len(image) - len(kernel) + 1
        image = sum(tap * image[i : i + length] for i, tap in enumerate(kernel)).swapaxes(0, 1)
    return image


def l1(a, b):
    return np.mean(np.abs(a - b)) / 127.5


def psnr(a, b):
    """Peak signal-to-noise ratio in dB; inf where a equals b."""
    error = np.mean((a - b) ** 2)
    return 10 * math.log10(255**2 / error) if error else math.inf


def ssim(a, b):
    """Structural similarity (Wang et al. 2004), the mean of R, G and B where the window fits."""
    window = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))  # 11x11 pixels, sigma 1.5
    window /= window.sum()
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    mean_a, mean_b, aa, bb, ab = (filtered(x, window) for x in (a, b, a * a, b * b, a * b))
    var_a, var_b, covariance = aa - mean_a**2, bb - mean_b**2, ab - mean_a * mean_b
    similarity = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)  # Eq. 13
    return np.mean(similarity * (2 * covariance + c2) / (var_a + var_b + c2))


def with_network(keys, weights, function, *arguments):
    """{key: number} of function(device, *arguments), or what it needs. weights: their URL."""
    missing = "pip install torchmetrics torch-fidelity"
    if find_spec("torchmetrics") and find_spec("torch_fidelity"):
        import torch  # takes seconds

        device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
        torch.backends.cudnn.allow_tf32 = False
        try:
            return function(device, *arguments)
        except Exception as error:  # no network, a damaged file, a full accelerator
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            missing = f"{weights} in {torch.hub.get_dir()}/checkpoints ({reason})"
    return dict.fromkeys(keys, f"left out, needs {missing}")


def lpips(device, pairs, sizes):
    """LPIPS (Zhang et al. 2018) with AlexNet, the mean over the pairs."""
    import torch
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    network = LearnedPerceptualImagePatchSimilarity("alex").to(device)

    def distance(*pair):
        pair = (torch.from_numpy(x / 127.5 - 1).float().permute(2, 0, 1)[None] for x in pair)
        return network(*(x.to(device) for x in pair)).item()

    return means(pairs, sizes, lpips=distance)


def fid_and_kid(device, generated, reference):
    """FID (Heusel et al. 2017), and KID's mean and deviation (Binkowski et al. 2018).

    Resized to 299x299 as by clean-fid (Parmar et al. 2022): PIL's bicubic without rounding.
    """
    import torch
    from torch_fidelity import FeatureExtractorInceptionV3 as Inception
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    network, sides = Inception("inception-v3-compat", ["2048"]).to(device), ([], [])
    for features, files in zip(sides, (generated, reference), strict=True):
        for file in tqdm(files, "Inception", leave=False):
            bands = [band.convert("F").resize((299, 299), 3) for band in load_rgb(file).split()]
            image = torch.from_numpy(np.stack(bands).clip(0, 255))[None].to(device)
            hook = partial(lambda exact, *_: exact, (image - 128) / 128)  # instead of scaled bytes
            with torch.no_grad(), network.Conv2d_1a_3x3.register_forward_pre_hook(hook):
                features.append(network(image.byte())[0].cpu().double())
    given = torch.nn.Identity()
    given.num_features = sides[0][0].shape[1]
    fid = FrechetInceptionDistance(given)
    kid = KernelInceptionDistance(given, subset_size=min(1000, len(generated), len(reference)))
    for metric in (fid, kid):
        metric.update(torch.cat(sides[0]), real=False)
        metric.update(torch.cat(sides[1]), real=True)
    torch.manual_seed(0)  # KID samples its 100 subsets
    mean, deviation = (value.item() for value in kid.compute())
    return {"fid": fid.compute().item(), "kid": mean, "kid_std": deviation}


def sample_patches(image, count):
    """`count` 7x7 patches of each level of a pyramid of (H, W, 3): [(count, 3, 7, 7), ...]."""
    # Seeded by the pixels, so that names and order of the files do not matter.
    rng, patches = np.random.default_rng(zlib.crc32(image.tobytes())), []
    for level in laplacian_pyramid(image):
        windows = sliding_window_view(level, (7, 7), axis=(0, 1))  # (h - 6, w - 6, 3, 7, 7)
        top, left = (rng.integers(0, side, count) for side in windows.shape[:2])
        patches.append(windows[top, left].astype(np.float32))
    return patches


def laplacian_pyramid(image):
    """Burt and Adelson 1983: [(h, w, 3), ...], largest first, down to sides of 16 to 31 pixels."""
    kernel, around, levels = np.array([1, 4, 6, 4, 1]) / 16, ((2, 2), (2, 2), (0, 0)), []
    while min(image.shape[:2]) >= 32:
        half = filtered(np.pad(image, around, "reflect"), kernel)[::2, ::2]
        spread = np.zeros_like(image)
        spread[::2, ::2] = 4 * half  # three of four pixels are 0
        levels.append(image - filtered(np.pad(spread, around, "reflect"), kernel))
        image = half
    return [*levels, image]


def sliced_wasserstein(a, b):
    """Mean Wasserstein distance of two sets of patches over 512 random directions.

    a, b: (N, count, 3, 7, 7); N may differ. Each set is first standardized, channel by channel.
    """
    sides = []
    for patches in (a.reshape(-1, 3, 49), b.reshape(-1, 3, 49)):
        of_channel = {"axis": (0, 2), "keepdims": True, "dtype": np.float64}
        mean, deviation = patches.mean(**of_channel), patches.std(**of_channel).clip(1e-6)
        sides.append(((patches - mean) / deviation).astype(np.float32).reshape(-1, 147).T)
    size = max(side.shape[1] for side in sides)  # as many quantiles as the larger set has
    places = [(2 * np.arange(size) + 1) * side.shape[1] // (2 * size) for side in sides]
    rng, distances = np.random.default_rng(0), []
    for _ in range(16):  # 32 directions at a time, to save memory
        lines = rng.standard_normal((32, 147)).astype(np.float32)
        lines /= np.linalg.norm(lines, axis=1, keepdims=True)
        first, second = (np.sort(lines @ s)[:, at] for s, at in zip(sides, places, strict=True))
        distances.append(np.mean(np.abs(first - second), dtype=np.float64))
    return np.mean(distances)


def wasserstein_metrics(generated, reference, size):
    """SWD x 1000 (Karras et al. 2018, section 5, https://arxiv.org/abs/1710.10196) at (W, H)."""
    # The paper's 128 patches per image; above 1024 images fewer, to bound the memory.
    count = max(1, min(128, 2**17 // max(len(generated), len(reference))))
    sides, found, side = [], {}, min(size)
    for files in (generated, reference):
        files = tqdm(files, "SWD", leave=False)
        patches = [sample_patches(pixels(file, size), count) for file in files]
        sides.append([np.stack(level) for level in zip(*patches, strict=True)])
    for a, b in zip(*sides, strict=True):
        found[f"swd_{side}"] = 1000 * sliced_wasserstein(a, b)
        side = -(-side // 2)
    return {"swd": np.mean(list(found.values())), **found}


def peaks(lines):
    """How far the power of lines, (n, length), stands out at 1/2 and 1/4 cycle per pixel, in dB.

    It is compared with the bins nearby, so that contrast and sharpness do not count.
    """
    length = lines.shape[1] // 4 * 4  # then both frequencies fall on a bin
    lines = lines[:, :length] - lines[:, :length].mean(1, keepdims=True)
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(length) / length)  # Hann
    power = np.mean(np.abs(np.fft.rfft(lines * window)) ** 2, axis=0) / np.sum(window**2)
    level = 10 * np.log10(power + 1 / 12)  # 1/12: the power of rounding to 8 bits
    away = np.arange(3, max(4, length // 16) + 1)  # beyond what the window smears
    near_2, near_4 = length // 2 - away, length // 4 + np.concatenate([-away, away])
    return level[length // 2] - level[near_2].mean(), level[length // 4] - level[near_4].mean()


def stripe_metrics(generated, reference, size):
    """How much more GENERATED stands out at periods of 2 and 4 pixels than REFERENCE at `size`."""
    # Generated images keep their own size: resizing would move a stripe to another frequency.
    keys, sides = ("vertical_2", "vertical_4", "horizontal_2", "horizontal_4"), []
    for files, resized in ((generated, None), (reference, size)):
        grays = (pixels(file, resized) @ LUMA for file in tqdm(files, "stripes", leave=False))
        sides.append(np.array([[*peaks(gray), *peaks(gray.T)] for gray in grays]))  # (N, 4)
    return dict(zip(keys, sides[0].mean(0) - sides[1].mean(0), strict=True))


def correlation(a, b):
    """Pearson's correlation of two images' luminance, each (H, W, 3); 0 where one is flat."""
    a, b = ((image @ LUMA).ravel() for image in (a, b))
    a, b = a - a.mean(), b - b.mean()
    return a @ b / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-8)


def translate(args, source, target):
    """Runs translate.py of the checkpoint's method on the folder `source`."""
    path = args.checkpoint.resolve()
    method = args.method or next((part for part in path.parts[::-1] if part in METHODS), None)
    if not method:
        raise UserError(f"{path} is in no folder of a method; give --method")
    command = [sys.executable, ROOT / method / "translate.py", "--checkpoint", path]
    command += ["--input", source, "--output", target]
    command += ["--direction", args.direction] if args.direction else []
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        reason = next((line for line in lines if line.startswith("translate.py: ")), lines[-1])
        raise UserError(f"{method}/translate.py failed: {reason}")


def shift_metrics(args, pairs, generated):
    """PSNR of G(shifted x) to shifted G(x): Zhang 2019, https://arxiv.org/abs/1904.11486."""
    chosen = sorted(pairs, key=lambda pair: pair[1].name)[:8]
    shifts = [(pixel, axis) for pixel in (1, 2, 3) for axis in (1, 0)]  # to the right, down
    found = {pixel: [] for pixel, _ in shifts}
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "x"), Path(folder, "G_x")
        source.mkdir()
        for index, (file, x) in enumerate(chosen):
            x = pixels(x, generated[file]).astype(np.uint8)
            for pixel, axis in [(0, 0), *shifts]:
                shifted = Image.fromarray(np.roll(x, pixel, axis))
                shifted.save(source / f"{index}_{pixel}_{axis}.png", compress_level=1)
        translate(args, source, target)
        for index in range(len(chosen)):
            still = pixels(target / f"{index}_0_0.png")
            for pixel, axis in shifts:
                moved = pixels(target / f"{index}_{pixel}_{axis}.png")
                found[pixel].append(psnr(moved, np.roll(still, pixel, axis)))
    every = [value for values in found.values() for value in values]
    found = {"shift_psnr": every} | {f"shift_psnr_{pixel}": found[pixel] for pixel in found}
    return {key: mean_finite(values) for key, values in found.items()}


def evaluate(args):
    """What was compared, as lines, and {group: {key: number, or why it is left out}}."""
    sizes = {}
    for name in ("generated", "reference", "input"):
        if folder := getattr(args, name):
            sizes[name] = {file: load_rgb(file).size for file in list_images(folder)}
            if len(sizes[name]) < 2:
                raise UserError(f"{folder}: {len(sizes[name])} images found, two or more expected")
    generated, reference = sizes["generated"], sizes["reference"]
    if min(map(min, generated.values())) < 32:
        raise UserError(f"{args.generated}: every side must have 32 pixels or more")
    [(size, _)] = Counter(sorted(generated.values())).most_common(1)
    lines = [
        f"{len(files)} {name}, {count} of them {width}x{height}"
        for name, files in sizes.items()
        for (width, height), count in Counter(sorted(files.values())).most_common(1)
    ]
    lines.append("resized: pairs to the generated image, sets to {}x{}".format(*size))
    [((w, h), _)] = Counter(sorted(reference.values())).most_common(1)
    if 1.9 < w * size[1] / (h * size[0]) < 2.1:
        lines.append("REFERENCE is twice as wide as GENERATED; if it holds pairs: prepare.py split")
    pairs = match(generated, reference, "--paired") if args.paired else []
    inputs = match(generated, sizes["input"], "--input") if args.input else []
    for one, other in pairs + inputs:
        (width, height), (w, h) = generated[one], (reference | sizes.get("input", {}))[other]
        if 1.9 < width * h / (height * w) < 2.1:
            shapes = f"{one} is {width}x{height}, {other} is {w}x{h}"
            raise UserError(f"{shapes}: translate without --side-by-side to measure the results")
    shift = shift_metrics(args, inputs, generated) if args.checkpoint else {}
    found = {}
    if args.paired:
        found["paired"] = means(pairs, generated, l1=l1, psnr=psnr, ssim=ssim)
        found["paired"] |= with_network(["lpips"], ALEXNET, lpips, pairs, generated)
    found["unpaired"] = with_network(["fid", "kid"], INCEPTION, fid_and_kid, generated, reference)
    found["unpaired"] |= wasserstein_metrics(generated, reference, size)
    found["stripes"] = stripe_metrics(generated, reference, size) | shift
    if args.input:
        found["change"] = means(inputs, generated, l1=l1, luminance=correlation)
    return lines, found


def report(args, lines, found):
    """Prints the numbers, after writing them to --json; null is what the table's text explains."""
    for group, values in found.items():
        lines += ["", f"{group}: {NOTES[group]}"]
        for key, value in values.items():
            shown = value if isinstance(value, str) else f"{round(value, 4) + 0.0:12.4f}"
            lines.append(f"  {key:18} {shown}")
            values[key] = None if isinstance(value, str) else value
    try:
        if args.json:
            content = {"arguments": vars(args), "table": lines, **found}
            args.json.write_text(json.dumps(content, indent=2, default=str) + "\n")
    finally:
        print(*lines, sep="\n")


def main(argv=None):
    """Runs the command line. Returns the exit status."""
    args = parse_args(argv)
    try:
        report(args, *evaluate(args))
    except (UserError, OSError) as error:
        print(f"evaluate.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Apply a trained pix2pix generator (Isola et al. 2017, https://arxiv.org/abs/1611.07004) to images
of any size. Each becomes a PNG of its own name and size.

    python pix2pix/translate.py --checkpoint visualize/pix2pix/facades --input DIR --output results
"""

import sys
from pathlib import Path

from pix2pix_flags import SWITCH, Parser


def parse_args(argv=None):
    parser = Parser("translate.py", description=__doc__.split("\n\n")[0], allow_abbrev=False)
    flag = parser.add_argument
    flag("--checkpoint", type=Path, required=True, help="checkpoint.pt, or a folder of its run")
    flag("--input", type=Path, nargs="+", required=True, help="images, or folders of images")
    flag("--output", type=Path, required=True, help="a folder; for one image also an image file")
    flag("--size", type=int, default=0, help="pixels to resize the short side to first [0: off]")
    flag("--restore-size", action="store_true", help="resize results back to the input's size")
    flag("--side-by-side", action="store_true", help="write input and result into one image")
    flag("--skip-existing", action="store_true", help="keep results that exist [overwrite them]")
    flag("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps [auto]")
    flag("--precision", choices=["fp32", "tf32", "bf16"], default="fp32", help="on GPUs [fp32]")
    flag("--dropout", action=SWITCH, default=True, help="at test time too, as in the paper [on]")
    parser.set_defaults(compile=False)
    args = parser.parse_args(argv)
    return args if args.size >= 0 else parser.error(f"--size {args.size}: expected 0 or more")


if __name__ == "__main__":
    parse_args()  # --help and flag errors exit here, before the slow import of torch

import signal
from functools import partial

import numpy as np
import torch
from PIL import Image
from torch import nn
from tqdm import tqdm

import pix2pix_system as system
from pix2pix_dataset import SUFFIXES, UserError, list_images, load_rgb, note, to_unit
from pix2pix_model import UNetGenerator
from train import prepare, translate


def load_generator(args, device):
    """(x -> G(x), what H and W must be multiples of, the image size in training)."""
    path = system.find_checkpoint(args.checkpoint)
    state = system.read_checkpoint(path)
    size, weights = state["args"]["image_size"], state.get("G_ema", state.get("G"))
    G = UNetGenerator(size, state["args"]["ngf"], state.get("dropout", (1, 2, 3)))
    for name, layer in G.named_modules():  # convert.py: biases of U-Nets with instance norm
        if isinstance(weights, dict) and f"{name}.bias" in weights and layer.bias is None:
            layer.bias = nn.Parameter(torch.zeros(layer.out_channels))
    system.load_part(G, weights, path)
    G = prepare(G, args, device).train(args.dropout)  # batch norm is the same in both modes
    return partial(translate, G), 2 ** len(G.down), size


def plan(args):
    """{image: result}, paths. UserError if a result would replace an input or another result."""
    files, output, results = [], args.output, {}
    for path in args.input:
        found = list_images(path) if path.is_dir() else [path] if path.exists() else []
        if not found:
            inside = {str(f.parent) for f in path.rglob("*") if f.suffix.lower() in SUFFIXES}
            hint = " or ".join(sorted(inside)[:4]) or f"a file {' '.join(SUFFIXES)}"
            raise UserError(f"no {'images in' if path.is_dir() else 'file'} {path}; try {hint}")
        files += found
    taken = {str(p.resolve()).lower(): "where inputs are" for f in files for p in (f, f.parent)}
    named = output.suffix.lower() in SUFFIXES and not output.is_dir()
    for file in dict.fromkeys(files):
        result = results[file] = output if named else output / f"{file.stem}.png"
        places = [str(p.resolve()).lower() for p in (output, result)]  # disks may ignore case
        if other := taken.get(places[0]) or taken.get(places[1]):
            raise UserError(f"{file} cannot become {result}, {other}: rename it or change --output")
        taken[places[1]] = f"the result of {file}"
    return results


@torch.no_grad()
def translate_file(file, G, multiple, trained, args, device):
    """The result for a file of any size, which is padded by reflection: an image (PIL)."""
    original = load_rgb(file)
    factor = args.size / min(original.size) if args.size else 1
    width, height = size = [round(side * factor) for side in original.size]
    if width * height > Image.MAX_IMAGE_PIXELS:
        raise UserError(f"{width}x{height} pixels are too many")
    if min(size) > 1.5 * trained:
        with tqdm.external_write_mode(sys.stderr):
            note("size", f"{width}x{height} is far larger than in training: try --size {trained}")
    image = original.resize(size, Image.Resampling.BICUBIC)
    missing = [max(-side % multiple, 32 - side) for side in (height, width)]
    (top, bottom), (left, right) = ((n // 2, n - n // 2) for n in missing)
    x = np.pad(image, [(top, bottom), (left, right), (0, 0)], mode="reflect")
    x = to_unit(torch.from_numpy(x).to(device).permute(2, 0, 1)[None].contiguous())
    y = G(x)[0, :, top : top + height, left : left + width].permute(1, 2, 0)
    result = Image.fromarray(((y + 1) * 127.5).round().clamp(0, 255).byte().cpu().numpy())
    if args.restore_size:
        image, result = original, result.resize(original.size, Image.Resampling.BICUBIC)
    return Image.fromarray(np.hstack([image, result])) if args.side_by_side else result


def main(argv=None):
    """Runs the command line. Returns the exit status: 1 if an image failed, 2 after an error."""
    sys.stdout, sys.stderr = system.Quiet(sys.stdout), system.Quiet(sys.stderr)
    args, failed = parse_args(argv), 0
    for number in system.SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup sets SIGHUP
            signal.signal(number, lambda number, _frame: sys.exit(128 + number))
    try:
        results, device = plan(args), system.pick_device(args)
        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True
        generator = load_generator(args, device)
        todo = [(f, r) for f, r in results.items() if not (args.skip_existing and r.exists())]
        for file, path in (bar := tqdm(todo, unit="img")):
            try:
                image = translate_file(file, *generator, args, device)
            except (UserError, RuntimeError, MemoryError) as error:  # the latter: out of memory
                reason = (str(error) or "out of memory").splitlines()[0]
                hint = "" if isinstance(error, UserError) else f"; try --size {generator[2]}"
                bar.write(f"translate.py: failed: {file}: {reason}{hint}", sys.stderr)
                failed += 1
                continue
            with system.replacing(path) as png:
                image.save(png, Image.registered_extensions()[path.suffix.lower()], quality=95)
    except Exception as error:
        if (message := system.explain(error)) is None:
            raise
        print(f"translate.py: error: {message}", file=sys.stderr)
        return 2
    print(f"{len(todo) - failed} translated, {len(results) - len(todo)} skipped, {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())

"""Applies a trained CUT generator (Park et al. 2020, https://arxiv.org/abs/2007.15651) to pictures
of any size. Each becomes a PNG of its own name and size.

    python CUT/translate.py --checkpoint CUT/model/facades_unpaired/checkpoint.pt \\
        --input datasets/facades_unpaired/test/x --output results/facades
    python CUT/translate.py --checkpoint latest_net_G.pth --input a.png --output results

--checkpoint takes what train.py --save-model wrote, and the *_net_G.pth of a ResNet that the
authors' PyTorch code wrote.

What is in --output already is kept, so that the same command goes on where it stopped. The exit
status is 1 if a picture could not be read, 2 after any other error.
"""

import argparse
import hashlib
import sys
from importlib.util import find_spec
from pathlib import Path

# Differs from pix2pix/translate.py: its own name
# Differs from cycleGAN/translate.py: its own name
METHOD = "CUT"


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def add_common_flags(parser):
    """The flags that pix2pix, cycleGAN and CUT share."""
    flag = parser.add_argument
    flag("--checkpoint", type=Path, required=True, help="checkpoint.pt, or the authors' net_G.pth")
    flag("--input", type=Path, help="a picture, or a folder of pictures")
    flag("--output", type=Path, help="the folder that the PNG files go to")
    flag("--size", type=int, help="pixels to resize the short side to first [the picture's own]")
    flag("--keep-gray", action="store_true", help="gray pictures give gray results [off: RGB]")
    flag("--overwrite", action="store_true", help="make results anew that are there already [off]")
    onnx = "also write the generator as an ONNX model of free height and width [off]"
    flag("--onnx", type=Path, metavar="FILE", help=onnx)
    flag("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps [auto]")
    kinds = ["fp32", "tf32", "bf16"]
    flag("--precision", choices=kinds, default="fp32", help="of the network's arithmetic [fp32]")
    parser.set_defaults(compile=False, resume=False)


def check_common_flags(parser, args):
    """Cross-checks."""
    if args.size is not None and args.size < 1:
        parser.error(f"--size {args.size}: wanted is a number of pixels from 1 on")
    if bool(args.input) != bool(args.output):
        parser.error("--input and --output belong together: give both")
    if not (args.input or args.onnx):
        parser.error("nothing to do: give --input and --output, or --onnx, or all three")
    if args.onnx and args.onnx.is_dir():
        parser.error(f"--onnx {args.onnx} is a folder: wanted is a file")


# Differs from pix2pix/translate.py: no flag of its own
# Differs from cycleGAN/translate.py: no flag of its own
def parse_args(argv=None):
    """The flags of CUT."""
    style = argparse.RawDescriptionHelpFormatter
    parser = Parser("translate.py", description=__doc__, formatter_class=style, allow_abbrev=False)
    add_common_flags(parser)
    args = parser.parse_args(argv)
    check_common_flags(parser, args)
    return args


if __name__ == "__main__":
    parse_args()  # --help and mistyped flags answer here, before torch takes its seconds to load

import numpy as np
import torch
from PIL import Image, PngImagePlugin
from torch import nn
from tqdm import tqdm

from CUT_dataset import SUFFIXES, RunError, list_images, load_rgb, to_tensor
from CUT_model import ResnetGenerator, down
from CUT_run import StopSignal, pick_device, prepare, replacing

# ----------------------------------------------------------------------------------- the generator


# Differs from pix2pix/translate.py: another network
# Differs from cycleGAN/translate.py: one direction
def read_generator(args):
    """The generator of --checkpoint, and the number that height and width must be multiples of."""
    state = read_state(args.checkpoint)
    if "method" not in state:
        return authors_generator(state, args.checkpoint)
    flags = state["args"]
    G = ResnetGenerator(flags["n_layers"], flags["ngf"], flags.get("antialias", False))
    return load(G, state["G"], args.checkpoint), 4


# Differs from pix2pix/translate.py: a ResNet
def authors_generator(state, path):
    """A ResNet with the weights of the authors' CycleGAN or CUT code, and the 4 that it needs.

    Blocks, width and anti-aliasing are read off the shapes. As in that code's tests, instance norm
    takes the picture's statistics; those that old files hold are left out. Nothing is dropped out.
    """
    convolutions, norms = authors_layers(state)
    first = convolutions[0]["weight"].shape if convolutions else ()
    n_layers = (len(convolutions) - 6) // 2  # two convolutions each
    normed = not norms and all("bias" in layer for layer in convolutions)  # by instance norm
    blurs = {tuple(tensor.shape[2:]) for key, tensor in state.items() if key.endswith(".filt")}
    if n_layers < 1 or first[1:] != (3, 7, 7) or not normed or blurs - {(3, 3), (4, 4)}:
        raise unfit(path, "a ResNet with instance norm for RGB pictures", state)
    # The authors' code has one switch for the way down (3x3 blurs) and one for up (4x4).
    G = ResnetGenerator(n_layers, first[0], antialias=(4, 4) in blurs)
    G.layers["d128"], G.layers["d256"] = (down(k * first[0], (3, 3) in blurs) for k in (1, 2))
    fill([m for m in G.modules() if isinstance(m, CONVOLUTIONS)], convolutions, state, path)
    return G, 4


# Differs from pix2pix/translate.py: no dropout
def apply(G, x):
    """G(x). x: (1, 3, H, W) in [-1, 1]."""
    return G(x)


# ------------------------------------------------- from here on the same in pix2pix, cycleGAN, CUT

CONVOLUTIONS = nn.Conv2d | nn.ConvTranspose2d
SMALLEST = 32  # pixels a side, as in training: convolutions and norms need some room


def read_state(path):
    """The dict in a file: a checkpoint of train.py, or the authors' weights of one network."""
    if not path.is_file():
        where = f"{METHOD}/model/<run-name>/checkpoint.pt"
        raise RunError(f"no file {path}; train.py --save-model writes {where}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        method = state.get("method")
        tensors = [state[part] for part in ("args", "G")][-1] if method == METHOD else state
        if not (method or all(isinstance(tensor, torch.Tensor) for tensor in tensors.values())):
            raise TypeError("no state dict")
    except Exception as error:  # a damaged file may raise nearly anything
        kind = type(error).__name__
        raise RunError(f"{path} is damaged, or holds no weights of a network ({kind})") from None
    if method not in (None, METHOD):
        raise RunError(f"{path} is a checkpoint of {method}: python {method}/translate.py reads it")
    return state


def load(net, weights, path):
    """net with these weights. RunError where they do not fit."""
    try:
        net.load_state_dict(weights)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise RunError(f"{path} does not fit the flags that it holds: {reason}") from None
    return net


def authors_layers(state):
    """The convolutions, and the norms that have weights, of a state dict, in the data's order.

    A key, as module.model.10.conv_block.5.weight or model.model.1.model.3.bias, numbers the place
    in nested Sequentials. A layer is a dict of tensors. Running statistics come with their norm.
    """
    layers = {}
    for key, tensor in state.items():
        *path, kind = key.split(".")
        place = tuple(int(part) for part in path if part.isdecimal())
        layers.setdefault(place, {})[kind] = tensor
    layers = [layers[place] for place in sorted(layers) if "weight" in layers[place]]
    return ([layer for layer in layers if layer["weight"].dim() == dim] for dim in (4, 1))


def fill(modules, layers, state, path):
    """Puts the tensors of layers into modules. RunError where they do not fit.

    A bias that its module lacks is dropped: the norm that follows would take it away again.
    """
    try:
        for module, layer in zip(modules, layers, strict=True):
            module.load_state_dict({name: layer[name] for name in module.state_dict()})
    except (KeyError, RuntimeError, ValueError):
        shape = tuple(module.weight.shape)
        raise unfit(path, f"{len(modules)} such layers, one of shape {shape}", state) from None


def unfit(path, wanted, state):
    """The RunError for weights of another network."""
    convolutions, norms = authors_layers(state)
    first = tuple(convolutions[0]["weight"].shape) if convolutions else "none"
    found = f"{len(convolutions)} convolutions (first: {first}), {len(norms)} norms with weights"
    others = "pix2pix/translate.py reads U-Nets, those of cycleGAN and CUT read ResNets"
    return RunError(f"{path} fits no generator here: wanted {wanted}; found {found}; {others}")


def plan(args):
    """The pairs (picture, PNG to make). RunError where a PNG would take another picture's place."""
    if not args.input.exists():
        raise RunError(f"no file or folder {args.input}: wanted is a picture, or a folder of them")
    files = list_images(args.input) if args.input.is_dir() else [args.input]
    if not files:
        raise RunError(f"{args.input} holds no pictures; wanted are files *{', *'.join(SUFFIXES)}")
    if args.output.exists() and not args.output.is_dir():
        raise RunError(f"--output {args.output} is a file; wanted is a folder")
    if args.output.resolve() == args.input.resolve():
        raise RunError(f"--output is --input, {args.input}: results need a folder of their own")
    jobs, taken = [], {file.resolve(): "one of --input" for file in files}
    for file in files:
        target = args.output / f"{file.stem}.png"
        other = taken.get(target.resolve())
        if other:
            raise RunError(f"{file} would become {target}, which is {other}: rename or move one")
        taken[target.resolve()] = f"what {file} becomes"
        jobs.append((file, target))
    return jobs


def reflection(side, multiple):
    """Pads a side to a multiple: (the pixel that each is a reflection of, the place of pixel 0)."""
    missing = max(-(-side // multiple) * multiple, SMALLEST) - side
    before = missing // 2
    return np.pad(np.arange(side), (before, missing - before), mode="reflect"), before


@torch.no_grad()
def translate_picture(G, image, multiple, device):
    """The picture that G makes of an RGB picture (PIL), of the same size."""
    width, height = image.size
    (rows, top), (columns, left) = reflection(height, multiple), reflection(width, multiple)
    x = to_tensor(image)[:, rows][:, :, columns]
    y = apply(G, x[None].to(device))[0, :, top : top + height, left : left + width]
    levels = ((y + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).cpu().numpy())


def resize_short_side(image, size):
    """A picture (PIL) whose short side is `size` pixels. RunError where it would be huge."""
    sides = [round(side * size / min(image.size)) for side in image.size]
    if sides[0] * sides[1] > Image.MAX_IMAGE_PIXELS:
        raise RunError(f"--size {size} makes pictures of {sides[0]}x{sides[1]}: give a smaller one")
    return image.resize(sides, Image.Resampling.BICUBIC)


def is_gray(image):
    """Whether red, green and blue of an RGB picture (PIL) are equal everywhere."""
    levels = np.asarray(image)
    return bool((levels == levels[:, :, :1]).all())


def recipe(args):
    """What a result depends on beside its picture, as a short text that each PNG carries."""
    flags = [args.size, args.keep_gray, args.precision, getattr(args, "dropout", None)]
    flags.append(getattr(args, "direction", None) or "x2y")
    return hashlib.sha256(args.checkpoint.read_bytes() + repr(flags).encode()).hexdigest()[:16]


def recipe_of(path):
    """The recipe that a PNG carries; None where it has none."""
    try:
        with Image.open(path) as image:
            return image.info.get("recipe")
    except (OSError, SyntaxError, ValueError):
        return None


def translate_all(G, multiple, jobs, args, device):
    """Makes the PNG files. Returns the exit status."""
    args.output.mkdir(parents=True, exist_ok=True)
    made_by, this = PngImagePlugin.PngInfo(), recipe(args)
    made_by.add_text("recipe", this)
    there = [] if args.overwrite else [target for _, target in jobs if target.exists()]
    others = [target for target in there if recipe_of(target) != this]
    if others:
        which = f"{len(others)} PNG files of another checkpoint or other flags, as {others[0]}"
        print(f"warning: {which}, are kept; --overwrite makes them anew", file=sys.stderr)
    todo = [job for job in jobs if args.overwrite or not job[1].exists()]
    made, unreadable = 0, 0
    with StopSignal() as stop, tqdm(todo, desc="translate", unit="img") as bar:
        for file, target in bar:
            try:
                image = load_rgb(file)
            except RunError as error:
                bar.write(f"translate.py: skipped: {error}", file=sys.stderr)
                unreadable += 1
                continue
            if args.size:
                image = resize_short_side(image, args.size)
            try:
                result = translate_picture(G, image, multiple, device)
            except RuntimeError as error:  # mostly: out of memory
                reason = str(error).splitlines()[0]
                raise RunError(f"{file}, {image.size}: {reason}; try --size") from None
            if args.keep_gray and is_gray(image):
                result = result.convert("L")
            with replacing(target, "wb") as png:
                result.save(png, "png", pnginfo=made_by)
            made += 1
            if stop.caught:
                break
    kept, stopped = len(jobs) - len(todo), stop.caught and made + unreadable < len(todo)
    counts = f"{made} made, {kept} kept that were there, {unreadable} unreadable"
    print(f"{'stopped' if stopped else 'done'}: {counts}, of {len(jobs)}; see {args.output}")
    return 128 + stop.caught if stopped else int(unreadable > 0)


@torch.no_grad()
def export_onnx(G, multiple, path):
    """Writes G without dropout as an ONNX model, x to y, both (1, 3, height, width) in [-1, 1].

    RunError where onnxruntime's y is not torch's.
    """
    missing = [name for name in ("onnx", "onnxruntime", "onnxscript") if not find_spec(name)]
    if missing:
        raise RunError(f"--onnx needs packages that are not here: pip install {' '.join(missing)}")
    import onnxruntime

    training, side = G.training, max(multiple, SMALLEST)
    G.eval()
    free = {"x": {2: "height", 3: "width"}}
    names = {"input_names": ["x"], "output_names": ["y"], "dynamic_shapes": free}
    x = torch.zeros(1, 3, 2 * side, 3 * side)
    model = torch.onnx.export(G, (x,), dynamo=True, verbose=False, **names).model_proto
    model.doc_string = f"height and width: multiples of {multiple}, at least {SMALLEST}; RGB"
    onnx_bytes = model.SerializeToString()
    session = onnxruntime.InferenceSession(onnx_bytes, providers=["CPUExecutionProvider"])
    for height, width in ((side, 2 * side), (3 * side, side)):
        x = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1
        y = torch.from_numpy(session.run(None, {"x": x.numpy()})[0])
        error = (y - G(x)).abs().max().item()
        if not error < 1e-3:
            raise RunError(f"onnxruntime differs from torch by {error} at {height}x{width}")
        print(f"{path}: onnxruntime differs from torch by {error:.0e} at {height}x{width}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, "wb") as file:
        file.write(onnx_bytes)
    G.train(training)


def main(argv=None):
    """Runs the command line. Returns the exit status."""
    args = parse_args(argv)
    try:
        device = pick_device(args)
        # Else the arithmetic, and so a result's last bits, depend on what the GPU does besides.
        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True
        jobs = plan(args) if args.input else []
        G, multiple = read_generator(args)
        if args.onnx and args.onnx.exists() and not args.overwrite:
            print(f"{args.onnx} is there already and kept; --overwrite makes it anew")
        elif args.onnx:
            export_onnx(G, multiple, args.onnx)
        if args.input:
            return translate_all(prepare(G, args, device), multiple, jobs, args, device)
    except (RunError, OSError) as error:
        print(f"translate.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # before the first picture
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())

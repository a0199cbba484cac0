"""Convert the weights of a generator.

    python convert.py latest_net_G.pth facades.pt                      # authors' file to checkpoint
    python convert.py latest_net_G.pth grumpy.pt --method CUT
    python convert.py pix2pix/model/facades/checkpoint.pt facades.onnx      # checkpoint to ONNX

FILE.pth is a *_net_G*.pth of the authors' PyTorch code: a U-Net becomes a checkpoint of pix2pix, a
ResNet one of cycleGAN or CUT, for translate.py. The architecture is inferred from the shapes.
The file does not record dropout: it is assumed; for a U-Net trained without, use translate.py
--no-dropout. A file holds one generator, so the checkpoint has G and no F.

An ONNX model maps x to y, (1, 3, height, width) in [-1, 1], RGB, with free height and width. It has
no dropout. It needs pip install onnx onnxruntime onnxscript.
"""

import argparse
import importlib
import io
import os
import shlex
import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn

ROOT = Path(__file__).resolve().parent
CONVOLUTIONS = nn.Conv2d | nn.ConvTranspose2d
NETWORKS = "expected a U-Net of pix2pix, or a ResNet of CycleGAN or CUT"


class UserError(Exception):
    """A problem that the user can fix. One line: what was found, what was expected, what to do."""


def parse_args(argv=None):
    style = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = argparse.ArgumentParser("convert.py", description=__doc__, **style)
    parser.error = lambda message: parser.exit(2, f"convert.py: error: {message}\n")
    flag = parser.add_argument
    flag("file", type=Path, metavar="FILE", help="the authors' *_net_G*.pth, or a checkpoint.pt")
    flag("output", type=Path, metavar="OUT", help="OUT.pt for a checkpoint, OUT.onnx for ONNX")
    flag("--method", choices=["cycleGAN", "CUT"], help="of a ResNet [CUT if it has anti-aliasing]")
    flag("--image-size", type=int, default=256, help="pixels that a ResNet was trained at [256]")
    flag("--direction", choices=["x2y", "y2x"], default="x2y", help="ONNX of cycleGAN: G or F [G]")
    args = parser.parse_args(argv)
    if args.output.suffix not in (".pt", ".onnx") or args.image_size < 1:
        parser.error("OUT must end in .pt or .onnx, and --image-size must be positive")
    return args


def read(path):
    """The dict in a file. UserError if it is something else."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a foreign file may raise anything
        if "GLOBAL" in str(error):
            remedy = "save the network's state_dict() instead"
            raise UserError(f"{path} contains pickled Python objects; {remedy}") from None
        reason = getattr(error, "strerror", None) or "it is damaged or not a file of torch.save"
        raise UserError(f"cannot read {path}: {reason}") from None
    if not isinstance(state, dict):
        raise UserError(f"{path} contains a {type(state).__name__}; {NETWORKS}")
    return state


def write(path, content):
    """Writes bytes to a new file, which appears once it is complete."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        aside.write_bytes(content)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def import_part(method, part):
    """The module <method>/<method>_<part>.py. UserError if its folder is missing."""
    if not (ROOT / method / f"{method}_{part}.py").exists():
        raise UserError(f"this needs the folder {ROOT / method}, which is not there")
    if str(ROOT / method) not in sys.path:
        sys.path.insert(0, str(ROOT / method))
    return importlib.import_module(f"{method}_{part}")


def authors_layers(state):
    """The convolutions, and the norms that have weights, of a state dict, in the data's order.

    The numbers in a key, as model.10.conv_block.5.weight, are its place in nested Sequentials.
    """
    layers = {}
    for key, tensor in state.items():
        *path, kind = key.split(".")
        place = tuple(int(part) for part in path if part.isdecimal())
        layers.setdefault(place, {})[kind] = tensor
    layers = [layers[place] for place in sorted(layers) if "weight" in layers[place]]
    return ([layer for layer in layers if layer["weight"].dim() == dim] for dim in (4, 1))


def fill(modules, layers):
    """Copies the tensors of layers into modules. ValueError if they do not fit.

    A bias that its module lacks is left out: the norm that follows would remove it.
    """
    try:
        for module, layer in zip(modules, layers, strict=True):
            module.load_state_dict({name: layer[name] for name in module.state_dict()})
    except (KeyError, RuntimeError, ValueError):
        raise ValueError("other layers than expected") from None


def convert_unet(convolutions, norms):
    """A checkpoint of pix2pix with the weights of a U-Net. ValueError if they are of another net.

    As in the authors' tests, batch norm uses the statistics of the image, not those of the file.
    """
    depth, ngf = len(convolutions) // 2, len(convolutions[0]["weight"])
    biased = [k for k, layer in enumerate(convolutions) if "bias" in layer]
    if depth < 5 or not (norms or len(biased) == len(convolutions)):
        raise ValueError("a U-Net without norms, or with fewer than 5 levels")
    # Paper: dropout on the decoder's layers 1 to 3. Authors' PyTorch code: on 2 to 4 of 8.
    dropout = list(range(2, depth - 3))
    G = import_part("pix2pix", "model").UNetGenerator(2**depth, ngf, dropout)
    places = [layer for layer in G.modules() if isinstance(layer, CONVOLUTIONS)]
    for k in {0, depth - 1} & {*biased}:  # instance norm; no norm follows these two
        places[k].bias = nn.Parameter(torch.zeros(len(places[k].weight)))
    fill(places, convolutions)
    if norms:  # without: instance norm is batch norm of one image with scales 1 and shifts 0
        fill([layer for layer in G.modules() if isinstance(layer, nn.BatchNorm2d)], norms)
    args = {"image_size": 2**depth, "ngf": ngf}
    return {"method": "pix2pix", "args": args, "G": G.state_dict(), "dropout": dropout}


def convert_resnet(convolutions, norms, blurs, method, image_size):
    """A checkpoint with the weights of a ResNet. ValueError if they are of another network.

    blurs: the sizes of its anti-aliasing filters. The statistics of instance norm are left out.
    """
    n_layers, ngf = (len(convolutions) - 6) // 2, len(convolutions[0]["weight"])
    if norms or n_layers < 1 or not all("bias" in layer for layer in convolutions):
        raise ValueError("a ResNet without instance norm, or without blocks")
    if blurs not in (set(), {(3, 3), (4, 4)}):
        raise ValueError(f"anti-aliasing by filters {sorted(blurs)}, not by 3x3 down and 4x4 up")
    method = method or ("CUT" if blurs else "cycleGAN")
    G = import_part(method, "model").ResnetGenerator(n_layers, ngf, bool(blurs))
    fill([layer for layer in G.modules() if isinstance(layer, CONVOLUTIONS)], convolutions)
    args = {"image_size": image_size, "ngf": ngf, "n_layers": n_layers, "antialias": bool(blurs)}
    return {"method": method, "args": args, "G": G.state_dict()}


def convert(path, state, args):
    """The checkpoint for what read gave. UserError, which says what the file is, if it cannot."""
    if "method" in state and "args" in state:
        raise UserError(f"{path} is a checkpoint already: {state['method']}/translate.py reads it")
    if "state_dict" in state:
        raise UserError(f"{path} contains a training state; save its 'state_dict' alone")
    networks = [str(name) for name, value in state.items() if isinstance(value, dict)]
    if networks:
        raise UserError(f"{path} contains {', '.join(networks)}; save one network's weights alone")
    if not state or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        raise UserError(f"{path} contains no weights, or not only weights; {NETWORKS}")
    convolutions, norms = authors_layers(state)
    first = tuple(convolutions[0]["weight"].shape) if convolutions else ()
    blurs = {tuple(tensor.shape[2:]) for key, tensor in state.items() if key.endswith(".filt")}
    try:
        if first[1:] == (3, 4, 4):
            return convert_unet(convolutions, norms)
        if first[1:] == (3, 7, 7):
            return convert_resnet(convolutions, norms, blurs, args.method, args.image_size)
        raise ValueError("another network")
    except ValueError as error:
        found = f"{len(convolutions)} convolutions, the first {first}, {len(norms)} norms"
        raise UserError(f"{path} contains {error}: {found} with weights; {NETWORKS}") from None


def read_generator(path, state, direction):
    """The generator of a checkpoint, and what height and width must be multiples of."""
    if state.get("method") not in ("pix2pix", "cycleGAN", "CUT"):
        raise UserError(f"{path} is not a checkpoint; convert it to one first: OUT.pt")
    method, name = state["method"], "F" if direction == "y2x" else "G"
    model, system = import_part(method, "model"), import_part(method, "system")
    try:
        state = system.read_checkpoint(path)
        flags, weights = state["args"], state.get(f"{name}_ema", state.get(name))
        if not isinstance(weights, dict):
            raise UserError(f"{path} has no {name}")
        if method == "pix2pix":
            G = model.UNetGenerator(flags["image_size"], flags["ngf"])
            for key, layer in G.named_modules():  # of U-Nets with instance norm
                if f"{key}.bias" in weights and layer.bias is None:
                    layer.bias = nn.Parameter(torch.zeros(layer.out_channels))
        else:
            G = model.ResnetGenerator(flags["n_layers"], flags["ngf"], flags["antialias"])
        system.load_part(G, weights, path)
    except system.UserError as error:
        raise UserError(str(error)) from None
    return G.eval(), flags["image_size"] if method == "pix2pix" else 4


@torch.no_grad()
def export_onnx(G, multiple):
    """The bytes of G as an ONNX model. UserError if onnxruntime computes something else."""
    missing = [name for name in ("onnx", "onnxruntime", "onnxscript") if not find_spec(name)]
    if missing:
        raise UserError(f"packages for ONNX are missing: pip install {' '.join(missing)}")
    import onnxruntime

    side = max(multiple, 32)
    names = {"input_names": ["x"], "output_names": ["y"], "dynamo": True, "verbose": False}
    free, x = {"x": {2: "height", 3: "width"}}, torch.zeros(1, 3, 2 * side, 3 * side)
    model = torch.onnx.export(G, (x,), dynamic_shapes=free, **names).model_proto
    model.doc_string = f"height and width: multiples of {multiple}, at least 32; RGB in [-1, 1]"
    content = model.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    for height, width in ((side, 2 * side), (3 * side, side)):
        x = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1
        y = torch.from_numpy(session.run(None, {"x": x.numpy()})[0])
        difference = (y - G(x)).abs().max().item()
        if not difference < 1e-3:
            raise UserError(f"onnxruntime differs from torch by {difference} at {height}x{width}")
        print(f"onnxruntime differs from torch by {difference:.0e} at {height}x{width}")
    return content


def main(argv=None):
    """Runs the command line. Returns the exit status."""
    args = parse_args(argv)
    try:
        if args.output.exists():
            raise UserError(f"{args.output} exists; choose another name, or delete it")
        state = read(args.file)
        if args.output.suffix == ".onnx":
            generator = read_generator(args.file, state, args.direction)
            write(args.output, export_onnx(*generator))
            return 0
        checkpoint, content = convert(args.file, state, args), io.BytesIO()
        torch.save(checkpoint, content)
        write(args.output, content.getvalue())
        use = f"{checkpoint['method']}/translate.py --checkpoint {shlex.quote(str(args.output))}"
        print(f"found {checkpoint['args']}; use it: python {use} --input IMAGES --output RESULTS")
    except (UserError, OSError) as error:
        print(f"convert.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

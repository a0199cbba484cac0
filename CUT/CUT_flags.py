"""The command line of CUT/train.py. No torch here, so that --help and typos answer at once."""

import argparse
import os
from difflib import get_close_matches
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SWITCH = argparse.BooleanOptionalAction
HELP = argparse.ArgumentDefaultsHelpFormatter
ZERO = {"buffer_size", "ema", "load_size", "max_steps", "num_workers", "seed"}  # may be 0
LIMITS = {"ema": 1, "num_workers": 257}  # values must be below
FAST = {"epochs": 200, "NCE_ratio": 10.0, "NCE_ratio_id": 0.0, "flip_equivariance": True}
# Idle OpenMP threads that spin slow down a busy machine: benchmarks/README.md. Before torch.
if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = "1000"


class Parser(argparse.ArgumentParser):
    """Answers an error with one line, and a mistyped flag with the nearest one."""

    def error(self, message):
        if message.startswith("unrecognized arguments: --"):
            flag, flags = message.split()[2].split("=")[0], self._option_string_actions
            near = [n for n in flags if flag in flags[n].help] or get_close_matches(flag, flags, 1)
            message = f"unknown flag {flag}; did you mean {[*near, '--help'][0]}?"
        self.exit(2, f"{self.prog}: error: {message}\n")


def add_common_flags(parser, epochs):
    """The flags that pix2pix, cycleGAN and CUT share. epochs: the method's default."""
    data = parser.add_argument_group("data").add_argument
    data("--data-folder", default="facades", help="name of the dataset")
    data("--data-root", default=f"{ROOT}/datasets", help="folder of the datasets")
    data("--swap-xy", action="store_true", help="swap x, the input, and y, the target")
    data("--load-size", type=int, default=0, help="resize to this first; 0: 286/256 image-size")
    data("--image-size", type=int, default=256, help="side of the training crops in pixels")
    data("--fit", choices=["stretch", "crop"], default="stretch", help="crop: keep aspect ratio")
    data("--jitter", action=SWITCH, default=True, help="random crop; off: no resize to load-size")
    data("--flip", action=SWITCH, default=True, help="flip horizontally with probability 1/2")
    data("--num-workers", type=int, default=min(4, os.cpu_count()), help="loader processes or 0")
    train = parser.add_argument_group("training").add_argument
    train("--epochs", type=int, default=epochs, help="passes over the training images")
    train("--batch-size", type=int, default=1, help="images per step, and per process of torchrun")
    train("--lr", type=float, default=2e-4, help="initial learning rate of Adam")
    train("--ngf", type=int, default=64, help="filters in the generator's first layer")
    train("--ndf", type=int, default=64, help="filters in the discriminator's first layer")
    train("--ema", type=float, default=0.0, help="decay of an average of G's weights; 0: off")
    train("--seed", type=int, default=0, help="seed of everything random, 0 or larger")
    train("--max-steps", type=int, default=0, help="stop after this many steps; 0: no limit")
    run = parser.add_argument_group("run").add_argument
    run("--output-root", default=str(ROOT), help="folder for visualize/ and <method>/model/")
    run("--run-name", default="<data-folder>", help="name of the run's folders")
    run("--sample-every", type=int, default=10, help="epochs between grids and checkpoints")
    run("--save-model", action="store_true", help="write a checkpoint to resume and translate with")
    run("--resume", action="store_true", help="continue from the checkpoint, with its flags")
    run("--init-from", default="", help="checkpoint or run to take weights from; empty: none")
    run("--overwrite", action="store_true", help="delete an earlier run of this name")
    run("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps")
    run("--precision", choices=["tf32", "fp32", "bf16"], default="tf32", help="tf32: only on CUDA")
    run("--compile", action=SWITCH, default=False, help="torch.compile; slow first step")


def parse(parser, argv, saved):
    """The flags, checked. saved: those of a checkpoint, which take the place of the defaults."""
    defaults = vars(parser.parse_args([]))
    saved = {n: v for n, v in (saved or {}).items() if n in defaults and v is not None}
    if saved.get("precision") == "auto":  # of an earlier version: it took fp32 or bf16
        del saved["precision"]
    parser.set_defaults(**saved)
    args = parser.parse_args(argv)
    for action in parser._actions[1:]:
        value, kind = getattr(args, action.dest), type(defaults[action.dest])
        low = 0 if action.dest in ZERO or "ratio" in action.dest else 1e-9
        high = LIMITS.get(action.dest, 1e10)
        valid = type(value) is kind and value in (action.choices or [value])
        if not valid or (kind in (int, float) and not low <= value < high):
            expected = action.choices or f"{kind.__name__} {'>' if low else '>='} 0 and < {high:g}"
            parser.error(f"{action.option_strings[0]} {value}: expected {expected}")
    args.data_root, args.output_root = map(os.path.abspath, (args.data_root, args.output_root))
    args.run_name = args.run_name.replace("<data-folder>", Path(args.data_folder).name)
    args.load_size = args.load_size or round(args.image_size * 286 / 256)
    if args.jitter and args.load_size < args.image_size:
        parser.error(f"--load-size {args.load_size} is below --image-size {args.image_size}")
    if Path(args.run_name).name != args.run_name or args.run_name[:1] == ".":
        parser.error(f"--run-name {args.run_name} is not a plain folder name")
    if args.resume and args.overwrite:
        parser.error("--resume continues a run, --overwrite deletes it: choose one")
    return args


# Differs from pix2pix/pix2pix_flags.py: its own flags
# Differs from cycleGAN/cycleGAN_flags.py: its own flags
def parse_args(argv=None, prog="train.py", saved=None):
    """The flags of CUT. saved: flags of a checkpoint, in place of the defaults."""
    parser = Parser(prog, description="Train CUT.", formatter_class=HELP, allow_abbrev=False)
    add_common_flags(parser, epochs=400)
    method = parser.add_argument_group("CUT").add_argument
    method("--n-layers", type=int, default=9, help="residual blocks of G (--netG)")
    method("--antialias", action="store_true", help="blur where layers change the resolution")
    method("--buffer-size", type=int, default=0, help="generated images kept for D; 0: off")
    method("--NCE-ratio", type=float, default=1.0, help="weight of NCE of x (--lambda_NCE); 0: off")
    method("--NCE-ratio-id", type=float, default=1.0, help="weight of NCE of y; 0: off, no halving")
    method("--fast", action="store_true", help="FastCUT: NCE 10, no identity, flips, 200 epochs")
    method("--flip-equivariance", action=SWITCH, default=False, help="flip G's input and features")
    method("--feat-str", default="pix, d128, d256, R256_1, R256_5", help="layers to compare")
    method("--num-patches", type=int, default=256, help="patches per image and layer")
    method("--tau", type=float, default=0.07, help="temperature of the NCE")
    method("--detach", action=SWITCH, default=True, help="no gradient through the keys")
    method("--nce", choices=["infonce", "ence", "hdce"], default="infonce", help="which NCE")
    method("--query", choices=["random", "attention"], default="random", help="choice of patches")
    method("--src-ratio", type=float, default=0.0, help="weight of semantic relations; 0: off")
    if parser.parse_args(argv).fast:
        parser.set_defaults(**FAST)
    return parse(parser, argv, saved)

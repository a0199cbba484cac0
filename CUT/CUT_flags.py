"""The command line of CUT/train.py. No torch here, so that --help and typos answer at once."""

import argparse
import difflib
import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SWITCH = argparse.BooleanOptionalAction
HELP = argparse.ArgumentDefaultsHelpFormatter
RENAMED = {"--dataroot": "--data-root", "--name": "--run-name", "--crop_size": "--image-size"}
RENAMED |= {"--lambda_L1": "--l1-ratio", "--lambda_A": "--cycle-ratio", "--netG": "--n-layers"}
FAST = {"epochs": 200, "NCE_ratio": 10.0, "NCE_ratio_id": 0.0, "flip_equivariance": True}


class Parser(argparse.ArgumentParser):
    """Answers an error with one line, and a mistyped flag with the nearest one."""

    def error(self, message):
        if message.startswith("unrecognized arguments: --"):
            flag = message.split()[2].split("=")[0]
            near = difflib.get_close_matches(flag, self._option_string_actions, 1) or ["--help"]
            message = f"unknown flag {flag}: did you mean {RENAMED.get(flag, near[0])}?"
        self.exit(2, f"{self.prog}: error: {message}\n")


def add_common_flags(parser, epochs):
    """The flags that pix2pix, cycleGAN and CUT share. epochs: the method's default."""
    data, cores = parser.add_argument_group("data").add_argument, os.cpu_count() or 1
    data("--data-folder", default="facades", help="name of the dataset")
    data(
        "--data-root",
        type=os.path.abspath,
        default=f"{ROOT}/datasets",
        help="folder of the datasets",
    )
    data("--swap-xy", action="store_true", help="swap x, the input, and y, the target")
    data("--load-size", type=int, help="pixels to resize to before the crop [286/256 image-size]")
    data("--image-size", type=int, default=256, help="pixels of the crops that are trained on")
    data("--fit", choices=["stretch", "crop"], default="stretch", help="crop: keep the aspect")
    data("--jitter", action=SWITCH, default=True, help="random crop; off: no resize to load-size")
    data("--flip", action=SWITCH, default=True, help="flip horizontally with probability 1/2")
    data("--num-workers", type=int, default=min(4, cores), help="loading processes; 0: none")
    train = parser.add_argument_group("training").add_argument
    train("--epochs", type=int, default=epochs, help="passes over the training images")
    train("--batch-size", type=int, default=1, help="images per step, and per process of torchrun")
    train("--lr", type=float, default=2e-4, help="initial learning rate of Adam")
    train("--ngf", type=int, default=64, help="filters in the generator's first layer")
    train("--ndf", type=int, default=64, help="filters in the discriminator's first layer")
    train("--ema", type=float, default=0.0, help="decay of the average of G's weights; 0: off")
    train("--seed", type=int, default=0, help="seed of everything random")
    train("--max-steps", type=int, help="stop after this many steps in total [no limit]")
    run = parser.add_argument_group("run").add_argument
    run(
        "--output-root",
        type=os.path.abspath,
        default=str(ROOT),
        help="folder for visualize/ and <method>/model/",
    )
    run("--run-name", help="name of the run's folders [the name of the dataset]")
    run("--sample-every", type=int, default=10, help="epochs between grids and checkpoints")
    run("--save-model", action="store_true", help="keep a checkpoint to resume and translate with")
    run("--resume", action="store_true", help="continue from the checkpoint, with its flags")
    run(
        "--init-from",
        type=os.path.abspath,
        help="checkpoint whose weights to start from [random weights]",
    )
    run("--overwrite", action="store_true", help="delete an earlier run of this name")
    run("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps")
    precisions = ["tf32", "fp32", "bf16"]
    run("--precision", choices=precisions, default="tf32", help="tf32: on CUDA; elsewhere fp32")
    run("--compile", action="store_true", help="torch.compile: slow first step, fast later ones")


def parse(parser, argv, zero_allowed=()):
    """The parsed flags, checked; args.typed names those on the command line."""
    defaults = vars(parser.parse_args([]))
    unset = argparse.Namespace(**dict.fromkeys(defaults))
    typed = {n: v for n, v in vars(parser.parse_args(argv, unset)).items() if v is not None}
    args = argparse.Namespace(**{**defaults, **typed}, typed=sorted(typed))
    args.run_name = args.run_name or Path(args.data_folder).name
    args.load_size = args.load_size or round(args.image_size * 286 / 256)
    for name, value in vars(args).items():
        zero = name in ("num_workers", "seed", "ema", *zero_allowed)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if number and not (0 if zero else 1e-12) <= value < 2**63:
            parser.error(f"--{name.replace('_', '-')} {value} must be {'0 or ' * zero}positive")
    if args.jitter and args.load_size < args.image_size:
        parser.error(f"--load-size {args.load_size} is below --image-size {args.image_size}")
    if Path(args.run_name).name != args.run_name or args.run_name[0] == ".":
        parser.error(f"--run-name {args.run_name} is not a plain folder name")
    return args


def parse_args(argv=None, prog="train.py"):
    """The flags of CUT."""
    parser = Parser(prog, description="Train CUT.", formatter_class=HELP, allow_abbrev=False)
    add_common_flags(parser, epochs=400)
    method = parser.add_argument_group("CUT").add_argument
    method("--n-layers", type=int, default=9, help="residual blocks of the generator")
    method("--antialias", action="store_true", help="blur where layers change the resolution")
    method("--buffer-size", type=int, default=0, help="generated images kept for D; 0: off")
    method("--NCE-ratio", type=float, default=1.0, help="weight of NCE of x and G(x); 0: off")
    method("--NCE-ratio-id", type=float, default=1.0, help="weight of NCE of y and G(y); 0: off")
    method("--fast", action="store_true", help="FastCUT: NCE 10, no identity, flips, 200 epochs")
    method("--flip-equivariance", action=SWITCH, default=False, help="flip G's input and features")
    taps = "pix, d128, d256, R256_1, R256_5"
    method("--feat-str", default=taps, help="layers of G whose features are compared")
    method("--num-patches", type=int, default=256, help="patches per image and layer")
    method("--tau", type=float, default=0.07, help="temperature of the NCE")
    method("--detach", action=SWITCH, default=True, help="no gradient through the keys")
    method("--nce", choices=["infonce", "ence", "hdce"], default="infonce", help="the contrast")
    query = {"choices": ["random", "attention"], "default": "random"}
    method("--query", **query, help="how patches are chosen at the two deepest layers")
    method("--src-ratio", type=float, default=0.0, help="weight of semantic relations; 0: off")
    args = parse(parser, argv, ["buffer_size", "NCE_ratio", "NCE_ratio_id", "src_ratio"])
    for name in set(FAST) - set(args.typed) if args.fast else ():
        setattr(args, name, FAST[name])
    return args

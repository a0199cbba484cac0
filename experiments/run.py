"""Train the runs behind the findings, on any machine and in any number of sessions.

    python experiments/run.py --dry-run                  # print the commands, train nothing
    python experiments/run.py antialias --jobs 2 --minutes 60
    python experiments/run.py --scale paper --dry-run --measure    # and the hours

Complete runs are skipped and interrupted ones resumed, so the same command continues after a stop.
Datasets: facades and monet2photo (download.py), and facades_unpaired (`prepare.py split facades
facades_unpaired --all`; for antialias without --all). Next: judge.py measures the runs.
"""

import argparse
import itertools
import math
import os
import re
import shlex
import signal
import sys
import tempfile
import time
from collections import namedtuple
from pathlib import Path
from subprocess import DEVNULL, Popen

ROOT = Path(__file__).resolve().parent.parent

Run = namedtuple("Run", "method name flags questions", defaults=[""])  # questions: it answers them
# What two CPU cores train in hours: 128 px, half the filters, six blocks, some 30,000 steps.
CPU = "--image-size 128 --load-size 143 --ngf 32 --ndf 32 --n-layers 6 --precision bf16"
PILOT = f"--data-folder facades_unpaired {CPU} --epochs 44 --sample-every 6"
FACADES = f"--data-folder facades_unpaired {CPU} --epochs 76 --sample-every 8"
MONET = f"--data-folder monet2photo {CPU} --epochs 56 --sample-every 6"  # for 540 photographs
PAIRS = "--data-folder facades --precision bf16 --sample-every 8"  # 256 px
RUNS = [
    Run("pix2pix", "facades-256-half", f"{PAIRS} --ngf 32 --ndf 32 --epochs 80", "pix2pix"),
    Run("pix2pix", "facades-256", f"{PAIRS} --epochs 76", "pix2pix"),
    Run("CUT", "facades-128-antialias", f"{FACADES} --antialias", "CUT steadiness patches detach"),
    Run("cycleGAN", "facades-128", FACADES, "cycleGAN"),
    Run("CUT", "facades-128-pilot", PILOT, "CUT"),
    Run("cycleGAN", "facades-128-pilot", PILOT, "cycleGAN"),
    Run("cycleGAN", "monet-128", MONET, "inversion"),
    Run("cycleGAN", "monet-128-pix-loss", f"{MONET} --pix-loss", "inversion"),
    Run("CUT", "monet-128", f"{MONET} --swap-xy", "change"),
    Run("CUT", "monet-no-pix", f"{MONET} --swap-xy --feat-str d128,d256,R256_1,R256_5", "change"),
    Run("CUT", "facades-128-ema", f"{FACADES} --antialias --ema 0.999", "steadiness"),
    Run("CUT", "facades-128-buffer-50", f"{FACADES} --antialias --buffer-size 50", "steadiness"),
    Run("CUT", "facades-128-patches-64", f"{FACADES} --antialias --num-patches 64", "patches"),
    Run("CUT", "facades-128-no-detach", f"{FACADES} --antialias --no-detach", "detach"),
]
SMALL = f"{CPU.replace('128', '64').replace('143', '72')} --sample-every 1 --seed"  # minutes each
for seed, method, own in itertools.product((0, 1), ("CUT", "cycleGAN"), ("", " --antialias")):
    flags = f"--data-folder facades_unpaired --epochs 6 {SMALL} {seed}{own}"
    RUNS.append(Run(method, f"facades{own[2:]}-seed-{seed}", flags, "antialias"))
for seed, ratio in itertools.product((0, 1), ("0.1", "1", "10")):
    flags = f"--data-folder monet2photo --swap-xy --epochs 3 {SMALL} {seed}"
    flags += f" --NCE-ratio {ratio} --NCE-ratio-id {ratio}"
    RUNS.append(Run("CUT", f"monet-NCE-{ratio}-seed-{seed}", flags, "weight"))

# The original README's eleven figures; CUT's paper-monet is two, of epochs 400 and 391.
PIX_LOSS = "--data-folder monet2photo --epochs 200 --pix-loss"
CUT_FACADES = "--data-folder facades_unpaired --epochs 400"
PAPER = [
    Run("pix2pix", "paper-facades", "--data-folder facades --epochs 200"),
    Run("cycleGAN", "paper-facades", "--data-folder facades_unpaired --epochs 200"),
    Run("cycleGAN", "paper-monet-pix-loss", PIX_LOSS),
    Run("cycleGAN", "paper-monet-pool", f"{PIX_LOSS} --pix-blur --pix-pool 4 --pix-ratio 10"),
    Run("CUT", "paper-facades", CUT_FACADES),
    Run("CUT", "paper-facades-buffer-50", f"{CUT_FACADES} --buffer-size 50"),
    Run("CUT", "paper-facades-patches-64", f"{CUT_FACADES} --num-patches 64"),
    Run("CUT", "paper-facades-no-detach", f"{CUT_FACADES} --no-detach"),
    Run("CUT", "paper-monet", "--data-folder monet2photo --swap-xy --epochs 400"),
    Run("cycleGAN", "paper-monet", "--data-folder monet2photo --epochs 200"),
]
METHODS = ("pix2pix", "cycleGAN", "CUT")


def parse(parser, argv):
    """Adds the flags that choose runs to a parser, and parses argv. args.runs is the choice."""
    parser.usage, parser.allow_abbrev = argparse.SUPPRESS, False  # without usage, one-line errors
    flag = parser.add_argument
    flag("only", nargs="*", metavar="RUN", help="beginning of a name, or a question [all runs]")
    flag("--scale", choices=["cpu", "paper"], default="cpu", help="paper: 256 px, full length")
    flag("--data-root", type=Path, default=ROOT / "datasets", help="folder of the datasets")
    flag("--output-root", type=Path, default=ROOT, help="folder of visualize/ and <method>/model/")
    args = parser.parse_args(argv)
    args.data_root, args.output_root = args.data_root.resolve(), args.output_root.resolve()
    names, table = tuple(args.only or [""]), RUNS if args.scale == "cpu" else PAPER
    args.runs = [r for r in table if {*names} & {*r.questions.split()} or r.name.startswith(names)]
    if not args.runs:
        parser.error(f"no run or question is called {' or '.join(names)}; see run.py --dry-run")
    return args


def parse_args(argv=None):
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("run.py", None, __doc__, formatter_class=style)
    flag = parser.add_argument
    flag("--dry-run", action="store_true", help="print the commands, and the hours if known")
    flag("--jobs", type=int, choices=range(1, 17), metavar="N", default=1, help="at a time [1]")
    flag("--minutes", type=float, default=math.inf, help="save and stop after this long [no limit]")
    steps = {"type": float, "nargs": 3, "metavar": METHODS, "default": [0.0] * 3}
    flag("--seconds-per-step", **steps, help="of each method, for the hours [unknown]")
    flag("--measure", action="store_true", help="find them: two short trainings of each run [off]")
    return parse(parser, argv)


def command(run, args):
    """What a reader would type, as words. The same command starts and resumes the run."""
    words = ["python", f"{run.method}/train.py", *shlex.split(run.flags), "--run-name", run.name]
    words += ["--data-root", str(args.data_root)] * (args.data_root != ROOT / "datasets")
    words += ["--output-root", str(args.output_root)] * (args.output_root != ROOT)
    return [*words, "--save-model", "--resume"]


def paths(args, run):
    """The folder with the run's losses.csv, args.json and grids, and its checkpoint."""
    root, method, name, *_ = args.output_root, *run
    return root / "visualize" / method / name, root / method / "model" / name / "checkpoint.pt"


def epochs_left(args, run):
    """How many epochs are to be trained; at least 1 if losses.csv is newer than the checkpoint."""
    epochs, (folder, model) = int(re.search(r"--epochs (\d+)", run.flags)[1]), paths(args, run)
    losses = folder / "losses.csv"
    if not (model.exists() and losses.exists()):
        return epochs
    done = len(losses.read_text().splitlines()) - 1
    return max(losses.stat().st_mtime > model.stat().st_mtime, epochs - done)


def print_plan(args):
    """The commands, and what is left: steps (of the whole dataset if none is here), and hours."""
    total, times = 0.0, dict(zip(METHODS, args.seconds_per_step, strict=True))
    for run in args.runs:
        folder = args.data_root / re.search(r"--data-folder (\S+)", run.flags)[1]
        sides = [folder / side for side in ("train", "train/x", "train/y", "trainA", "trainB")]
        counts = [len(list(side.glob("*.*"))) for side in sides if side.is_dir()]
        steps = epochs_left(args, run) * max(counts, default=6287 if "monet" in run.name else 400)
        print(shlex.join(command(run, args)), f" # {steps} steps", end="")
        if seconds := times[run.method] or (args.measure and steps and measure(args, run)):
            total += steps * seconds / 3600
            print(f", {steps * seconds / 3600:.1f} hours at {seconds:.3f} s each", end="")
        print(flush=True)
    print(f"# {total:.1f} hours in all; --measure or --seconds-per-step gives unknown ones")


def measure(args, run):
    """Seconds per step on this machine: two short runs, of which one has ten steps more."""
    seconds = []
    for steps in ("3", "13"):
        with tempfile.TemporaryDirectory() as folder:
            words = [sys.executable, *command(run, args)[1:-2], "--max-steps", steps]
            words += ["--output-root", folder]
            if Popen(words, cwd=ROOT, stdout=DEVNULL).wait():
                sys.exit(2)  # it has said why
            losses = Path(folder, "visualize", run.method, run.name, "losses.csv").read_text()
            seconds.append(sum(float(row.split(",")[1]) for row in losses.split()[1:]))
    return max(0.0, seconds[1] - seconds[0]) / 10


def train(args):
    """Trains what is left. After a signal or --minutes the runs in progress save and end."""
    waiting, children = [run for run in args.runs if epochs_left(args, run)], {}
    stops, end = [], time.monotonic() + 60 * args.minutes
    for number in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup sets SIGHUP
            signal.signal(number, lambda *_: stops.append(True))
    common = ["--data-root", args.data_root] + ["--num-workers", "0"] * (args.scale == "cpu")
    threads = str(max(1, (os.cpu_count() or 1) // args.jobs))  # each has its share of the cores
    (logs := args.output_root / "results" / "experiments").mkdir(parents=True, exist_ok=True)
    options = {"env": os.environ | {"OMP_NUM_THREADS": threads}, "start_new_session": True}
    while waiting or children:
        while waiting and len(children) < args.jobs:
            words = [sys.executable, *command(run := waiting.pop(0), args)[1:], *common]
            with open(logs / f"{run.method}-{run.name}.log", "a") as log:
                children[run] = Popen(words, cwd=ROOT, stdout=log, stderr=log, **options)
        time.sleep(0.2)
        if stops or time.monotonic() > end:
            for act, child in itertools.product((Popen.terminate, Popen.wait), children.values()):
                act(child)
            return
        for run in [run for run, child in children.items() if child.poll() is not None]:
            if children.pop(run).returncode:
                print(f"{run.method} {run.name} failed: see its log in {logs}", file=sys.stderr)
            else:  # its checkpoint is complete, also where git or cp made losses.csv newer
                paths(args, run)[1].touch()


def main(argv=None):
    if (args := parse_args(argv)).dry_run:
        return print_plan(args)
    train(args)
    left = sum(epochs_left(args, run) > 0 for run in args.runs)
    print(f"{len(args.runs) - left} of {len(args.runs)} runs are complete")
    return int(left > 0)


if __name__ == "__main__":
    sys.exit(main())

"""Trains the runs behind the README's findings, on any machine and in any number of sittings.

    python experiments/run.py --dry-run                    # prints the commands and trains nothing
    python experiments/run.py --data-root datasets --jobs 2
    python experiments/run.py --only facades-buffer-50     # those whose name begins so

A run that is complete is passed over; one that was stopped goes on; one without a checkpoint, as
those that the repository shows, is trained anew. Each writes to
visualize/<method>/<name>-seed-<seed>/, as every run does; judge.py then makes the tables. Data sets
wanted: facades, monet2photo (datasets/download.py), facades_unpaired (split_pairs.py) and
toy, toy_unpaired (make_toy.py).
"""

import argparse
import csv
import os
import shlex
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent

# What two CPU cores can do: small pictures, half the filters, few epochs.
SMALL = "--image-size 64 --load-size 72 --ngf 32 --ndf 32 --precision bf16 --sample-every 1"
MIDDLE = "--image-size 128 --load-size 143 --ngf 32 --ndf 32 --precision bf16"
FACADES = f"--data-folder facades_unpaired {SMALL} --n-layers 6 --epochs 6"
MONET = f"--data-folder monet2photo {SMALL} --n-layers 6 --epochs 2"
PHOTO_TO_MONET = f"{MONET} --swap-xy"
TOY = "--image-size 64 --load-size 72 --ngf 32 --ndf 32 --batch-size 4 --sample-every 3 --epochs 3"
TOY_UNPAIRED = f"--data-folder toy_unpaired {TOY}"


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


class Experiment(NamedTuple):
    """One setting. questions: those it helps to answer, by their number in QUESTIONS."""

    questions: tuple
    method: str
    name: str
    flags: str
    seeds: tuple = (0, 1)


# In the order of the original README, and of its "Things to try".
QUESTIONS = {
    1: "pix2pix on facades",
    2: "cycleGAN on facades",
    3: "cycleGAN, painting and photo: without --pix-loss, do light and dark change places?",
    4: "cycleGAN, --pix-blur and --pix-pool at ratio 10: does the barcode grow?",
    5: "CUT on facades",
    6: "CUT, a buffer of 50: does it steady the training, or harm it?",
    7: "CUT, 64 patches instead of 256",
    8: "CUT, gradient through the keys as well (--no-detach)",
    9: "CUT on photo to Monet: how much does it change, against the summed weighting?",
    10: "anti-aliasing on and off, in cycleGAN and CUT: barcode numbers",
    11: "CUT, fewer taps",
    12: "CUT, attention, hdce and ence against plain NCE",
    13: "bf16 against fp32 on the toy sets, whose truth is known",
}
NO_PIX = '--feat-str "d128, d256, R256_1, R256_5"'
DEEP = '--feat-str "R256_1, R256_5"'
HDCE = "--nce hdce --NCE-ratio 0.1 --NCE-ratio-id 0.1 --src-ratio 0.05"
SUMMED = "--NCE-ratio 10 --NCE-ratio-id 10"
BLUR_POOL = "--pix-loss --pix-blur --pix-pool 4 --pix-ratio 10"
EXPERIMENTS = [
    Experiment(
        (1,),
        "pix2pix",
        "facades-128",
        f"--data-folder facades {MIDDLE} --batch-size 4 --epochs 30 --sample-every 5",
        (0,),
    ),
    Experiment(
        (2,),
        "cycleGAN",
        "facades-128",
        f"--data-folder facades_unpaired {MIDDLE} --n-layers 6 --epochs 12 --sample-every 2",
        (0,),
    ),
    Experiment((5, 6, 7, 8, 10, 11, 12), "CUT", "facades", FACADES),
    Experiment((6,), "CUT", "facades-buffer-50", f"{FACADES} --buffer-size 50"),
    Experiment((7,), "CUT", "facades-patches-64", f"{FACADES} --num-patches 64"),
    Experiment((8,), "CUT", "facades-no-detach", f"{FACADES} --no-detach"),
    Experiment((2, 10), "cycleGAN", "facades", FACADES),
    Experiment((10,), "cycleGAN", "facades-antialias", f"{FACADES} --antialias"),
    Experiment((10,), "CUT", "facades-antialias", f"{FACADES} --antialias"),
    Experiment((3, 4), "cycleGAN", "monet", MONET),
    Experiment((3, 4), "cycleGAN", "monet-pix", f"{MONET} --pix-loss"),
    Experiment((4,), "cycleGAN", "monet-blur-pool", f"{MONET} {BLUR_POOL}"),
    Experiment((9, 11), "CUT", "monet", PHOTO_TO_MONET),
    Experiment((9,), "CUT", "monet-summed", f"{PHOTO_TO_MONET} {SUMMED}"),
    Experiment((9, 11), "CUT", "monet-no-pix", f"{PHOTO_TO_MONET} {NO_PIX}"),
    Experiment((11,), "CUT", "facades-no-pix", f"{FACADES} {NO_PIX}"),
    Experiment((11,), "CUT", "facades-deep", f"{FACADES} {DEEP}"),
    Experiment((12,), "CUT", "facades-attention", f"{FACADES} --query attention"),
    Experiment((12,), "CUT", "facades-hdce", f"{FACADES} {HDCE}"),
    Experiment((12,), "CUT", "facades-ence", f"{FACADES} --nce ence"),
    Experiment(
        (5,),
        "CUT",
        "facades-128",
        f"--data-folder facades_unpaired {MIDDLE} --n-layers 6 --epochs 12 --sample-every 2",
        (0,),
    ),
]
for precision in ("fp32", "bf16"):
    flags = f"--precision {precision}"
    toy = f"--data-folder toy {TOY} {flags}"
    EXPERIMENTS += [
        Experiment((13,), "pix2pix", f"toy-{precision}", toy, (0, 1, 2)),
        Experiment(
            (13,), "cycleGAN", f"toy-{precision}", f"{TOY_UNPAIRED} --n-layers 4 {flags}", (0, 1, 2)
        ),
        Experiment(
            (13,), "CUT", f"toy-{precision}", f"{TOY_UNPAIRED} --n-layers 6 {flags}", (0, 1, 2)
        ),
    ]


def number(text):
    """An argparse type: a whole number from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no whole number from 1 on")
    return int(text)


def parse_args(argv=None):
    style = argparse.RawDescriptionHelpFormatter
    parser = Parser("run.py", description=__doc__, formatter_class=style, allow_abbrev=False)
    parser.add_argument("--dry-run", action="store_true", help="print the commands only [off]")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="names, or beginnings [all]")
    parser.add_argument("--questions", nargs="+", type=int, choices=QUESTIONS, help="[all]")
    parser.add_argument("--seeds", nargs="+", type=int, help="of these seeds only [all]")
    parser.add_argument("--data-root", type=Path, default=ROOT / "datasets", help="[datasets/]")
    parser.add_argument("--jobs", type=number, default=1, help="runs at a time [1]")
    args = parser.parse_args(argv)
    args.data_root = args.data_root.expanduser().resolve()
    if not chosen(args):
        parser.error("--only, --questions and --seeds leave no run; --dry-run lists all")
    return args


def chosen(args):
    """(experiment, seed) pairs: the first seed of all, then the second, ..."""
    wanted = []
    for round_ in range(max(len(e.seeds) for e in EXPERIMENTS)):
        for experiment in EXPERIMENTS:
            if round_ < len(experiment.seeds):
                wanted.append((experiment, experiment.seeds[round_]))
    if args.only:
        wanted = [(e, s) for e, s in wanted if full_name(e, s).startswith(tuple(args.only))]
    if args.questions:
        wanted = [(e, s) for e, s in wanted if set(e.questions) & set(args.questions)]
    return [(e, s) for e, s in wanted if not args.seeds or s in args.seeds]


def full_name(experiment, seed):
    """The run's name, a folder below visualize/<method>/."""
    return f"{experiment.name}-seed-{seed}"


def command(experiment, seed):
    """The command line that a reader would type, as a list; without --data-root."""
    script = f"{experiment.method}/train.py"
    named = ["--seed", str(seed), "--run-name", full_name(experiment, seed), "--save-model"]
    return ["python", script, *shlex.split(experiment.flags), *named]


def run_folder(root, experiment, seed):
    """Where the checkout `root` has a run's losses.csv and args.json."""
    return root / "visualize" / experiment.method / full_name(experiment, seed)


def epochs_done(root, experiment, seed):
    """How many epochs of a run are in its losses.csv."""
    path = run_folder(root, experiment, seed) / "losses.csv"
    if not path.exists():
        return 0
    with open(path, newline="") as file:
        return max((int(row["epoch"]) for row in csv.DictReader(file)), default=0)


def epochs_wanted(experiment):
    """The --epochs of an experiment."""
    words = shlex.split(experiment.flags)
    return int(words[words.index("--epochs") + 1])


class Runner:
    """Runs commands, each on its share of the cores; Ctrl-C and SIGTERM stop all of them."""

    def __init__(self, args):
        self.args, self.children, self.stopping = args, set(), threading.Event()

    def stop(self, *_):
        self.stopping.set()
        for child in list(self.children):
            child.send_signal(signal.SIGTERM)

    def run(self, experiment, seed):
        """Trains, or goes on with, one run. Returns whether it is complete."""
        name = full_name(experiment, seed)
        # Without one: the runs that the repository shows, and those ended before their first.
        checkpoint = ROOT / experiment.method / "model" / name / "checkpoint.pt"
        has_checkpoint = checkpoint.exists()
        if has_checkpoint and epochs_done(ROOT, experiment, seed) >= epochs_wanted(experiment):
            losses = run_folder(ROOT, experiment, seed) / "losses.csv"
            if checkpoint.stat().st_mtime >= losses.stat().st_mtime:  # else it was not saved
                return True
        if self.stopping.is_set():
            return False
        words = [sys.executable, *command(experiment, seed)[1:]]
        if has_checkpoint:
            words = [*words[:2], "--run-name", name, "--resume"]
        elif run_folder(ROOT, experiment, seed).exists():
            words.append("--overwrite")
        words += ["--data-root", str(self.args.data_root), "--num-workers", "0"]
        cores = max(1, (os.cpu_count() or 1) // self.args.jobs)
        log = run_folder(ROOT, experiment, seed) / "log.txt"
        log.parent.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, "OMP_NUM_THREADS": str(cores)}
        with open(log, "a") as file:
            child = subprocess.Popen(
                words, cwd=ROOT, env=environment, stdout=file, stderr=file, start_new_session=True
            )
            self.children.add(child)
            status = child.wait()
            self.children.discard(child)
        if status and not self.stopping.is_set():
            print(f"{experiment.method} {name}: exit status {status}, see {log}", file=sys.stderr)
        return status == 0


def main(argv=None):
    args = parse_args(argv)
    wanted = chosen(args)
    if args.dry_run:
        for experiment, seed in wanted:
            print(shlex.join(command(experiment, seed)))
        return 0
    runner = Runner(args)
    signal.signal(signal.SIGINT, runner.stop)
    signal.signal(signal.SIGTERM, runner.stop)
    with ThreadPoolExecutor(args.jobs) as pool:
        done = list(pool.map(lambda pair: runner.run(*pair), wanted))
    print(f"{sum(done)} of {len(done)} runs are complete")
    return 0 if all(done) else 1


if __name__ == "__main__":
    sys.exit(main())

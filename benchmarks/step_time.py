"""Times the training step that <method>/train.py runs, in several configurations side by side.

    python benchmarks/step_time.py --method cycleGAN
    python benchmarks/step_time.py --method CUT --configs fp32 bf16 bf16+compile --minutes 20
    python benchmarks/step_time.py --method pix2pix --output results/pix2pix -- --ngf 32

Each configuration has a process of its own, and they take turns: what disturbs the machine disturbs
all of them, and one that fails costs its row only. "faster" is the median over rounds of the plain
step's time (plain.py: fp32, nothing shared) over the configuration's. Images come from the real
dataset and loader. The table is Markdown; with --output it also goes to a file, next to a JSON of
all timings that is rewritten after each turn. What follows -- goes to train.py.
"""

import argparse
import json
import math
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

METHODS = ("pix2pix", "cycleGAN", "CUT")
PARTS = ("plain", "fp32", "tf32", "bf16", "channels-last", "compile", "graph")  # of a name
DEFAULTS = {
    "cpu": ["fp32", "bf16"],
    "mps": ["fp32"],
    "cuda": ["fp32", "tf32", "bf16", "tf32+compile", "bf16+compile", "tf32+graph", "bf16+graph"],
}


def parse_args(argv):
    """The flags; those after -- are for train.py, as `rest`."""
    end = argv.index("--") if "--" in argv else len(argv)
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("step_time.py", None, __doc__, formatter_class=style)
    add = parser.add_argument
    add("--method", choices=METHODS, required=True, help="whose step")
    add("--configs", nargs="+", help=f"parts joined by +, of {', '.join(PARTS)} [by device]")
    add("--image-size", type=int, default=256, help="pixels [256]")
    add("--batch-size", type=int, default=1, help="images per step [1]")
    add("--device", default="auto", help="auto, cpu, cuda, mps [auto]")
    add("--rounds", type=int, help="turns of each configuration [4; on CUDA 20, of 20 steps]")
    add("--minutes", type=float, default=1e9, help="start no round after this long [no limit]")
    add("--output", type=Path, help="write <output>.md and <output>.json [none]")
    add("--serve", nargs=2, help=argparse.SUPPRESS)  # how this script calls itself
    args = parser.parse_args(argv[:end])
    args.rest = argv[end + 1 :]
    for name in args.configs or ():
        if set(name.split("+")) - set(PARTS):
            parser.error(f"--configs {name}: parts are {', '.join(PARTS)}")
    if args.rounds is not None and args.rounds < 1:
        parser.error(f"--rounds {args.rounds} must be at least 1")
    return args


if __name__ == "__main__":
    parse_args(sys.argv[1:])  # --help and mistyped flags answer before torch takes its seconds

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from configuration import ROOT, Configuration

# ------------------------------------------------------------------- what a configuration measures


def wait_for(device):
    """Waits until the device has finished its work."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize()


def rate(function, flops, device, calls):
    """FLOP/s of `calls` calls between two waits, the best of five."""
    seconds = []
    for _ in range(5):
        wait_for(device)
        start = time.perf_counter()
        for _ in range(calls):
            function()
        wait_for(device)
        seconds.append(time.perf_counter() - start)
    return calls * flops / min(seconds)


@torch.no_grad()
def ceilings(config):
    """FLOP/s of a large matrix product and of the residual blocks' convolution, forward."""
    args, device = config.args, config.device
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    n, size = (2048 if device.type == "cpu" else 8192), args.image_size // 4
    matrix = torch.ones(n, n, dtype=dtype, device=device)
    x = torch.ones(args.batch_size, 256, size + 2, size + 2, dtype=dtype, device=device)
    weight = torch.ones(256, 256, 3, 3, dtype=dtype, device=device)
    flops, calls = 2 * 256 * 256 * 9 * size**2 * len(x), 4 if device.type == "cpu" else 100
    product = rate(lambda: matrix @ matrix, 2 * n**3, device, max(1, calls // 4))
    return product, rate(lambda: torch.conv2d(x, weight), flops, device, calls)


def peak_memory(device):
    """Bytes at the peak: of the GPU's tensors, or of this process. 0 where that is unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def endless_batches(config):
    """x, y on the device from train.py's own dataset, epoch after epoch."""
    args, train, order = config.args, config.train, []
    data, pinned = train.build_data(args)[0], config.device.type == "cuda"
    workers = {"num_workers": args.num_workers, "persistent_workers": args.num_workers > 0}
    loader = DataLoader(data, batch_sampler=order, pin_memory=pinned, **workers)
    for epoch in range(1, 10**9):
        keys = [(epoch, index) for index in range(len(data))] * args.batch_size
        order[:] = [keys[k : k + args.batch_size] for k in range(0, len(keys), args.batch_size)]
        for batch in loader:
            yield [train.to_unit(t.to(config.device, non_blocking=pinned)) for t in batch]


def count_flops(function, *args):
    """Products and sums in the convolutions and matrix products of function(*args), both ways."""
    with FlopCounterMode(display=False) as counter:
        function(*args)
    return counter.get_total_flops()


def hardware(device):
    """The device in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    model = re.findall(r"model name\s*: (.*)", text) or [platform.machine()]
    fast = [flag for flag in ("avx2", "avx512_bf16", "amx_bf16") if f" {flag} " in text]
    return f"{model[0]}, {torch.get_num_threads()} threads, {' '.join(fast)}"


def serve(args):
    """A configuration's process: standard input asks for "ceilings" or a number of steps."""
    before = peak_memory(torch.device("cpu"))  # of the imports
    config = Configuration(args.serve[0], args, args.serve[1])
    device, batches = config.device, endless_batches(config)
    facts = {"device": device.type, "hardware": hardware(device)}
    if not {"compile", "graph"} & set(config.parts):
        facts["flops"] = count_flops(config, *next(batches))
    print(json.dumps(facts), flush=True)
    for line in sys.stdin:
        if line == "ceilings\n":
            print(json.dumps(ceilings(config)), flush=True)
            continue
        waits, start = 0.0, time.perf_counter()
        for _ in range(int(line)):
            asked = time.perf_counter()
            x, y = next(batches)
            waits += time.perf_counter() - asked
            losses = config(x, y)
        wait_for(device)
        seconds, memory = time.perf_counter() - start, peak_memory(device)
        memory -= before if device.type != "cuda" else 0
        bad = [name for name, loss in losses.items() if not loss.isfinite()]
        if bad:
            raise FloatingPointError(f"{', '.join(bad)} not finite")
        if device.type == "cuda":
            torch.cuda.empty_cache()  # for the other processes
        turn = {"seconds": seconds / int(line), "waited": waits / seconds, "memory": memory}
        print(json.dumps(turn), flush=True)


# ---------------------------------------------------------------------------------- the comparison


class Process:
    """A configuration in its process. ask(request) gives its reply, {} once it has failed."""

    def __init__(self, name, argv, data_root):
        self.name, self.turns, self.error, pipe = name, [], None, subprocess.PIPE
        command = [sys.executable, __file__, "--serve", name, str(data_root), *argv]
        self.stderr = tempfile.TemporaryFile("w+")  # noqa: SIM115 (it lives as long as the process)
        streams = {"stdin": pipe, "stdout": pipe, "stderr": self.stderr}
        self.process = subprocess.Popen(command, text=True, **streams)
        self.facts = self.read()

    def read(self):
        """The next line of JSON."""
        for line in self.process.stdout:
            if line[0] in "{[":
                return json.loads(line)
        self.stderr.seek(0)
        self.error = (self.stderr.read().strip().splitlines() or ["no message"])[-1]
        return {}

    def ask(self, request):
        with suppress(BrokenPipeError):
            print(request, file=self.process.stdin, flush=True)
        return {} if self.error else self.read()


def write_noise(root, method, count=16):
    """A dataset of noisy JPEGs, 256 px, in root/noise; train and test are the same."""
    rng = np.random.default_rng(0)
    width, sides = (64, [""]) if method == "pix2pix" else (32, ["x", "y"])
    for folder in [Path(root, "noise", split, s) for split in ("train", "test") for s in sides]:
        folder.mkdir(parents=True)
        for index in range(count):
            small = Image.fromarray(rng.integers(0, 256, (32, width, 3), np.uint8))
            small.resize((8 * width, 256)).save(folder / f"{index}.jpg")


def spread(values, digits):
    """Median (minimum to maximum)."""
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def row_of(process, args, plain_turns, flops):
    """A configuration's row in the table. flops: of a step, where its process did not count."""
    if process.error or not process.turns:
        return f"| {process.name} | failed: {process.error} |||||||"
    seconds, waited = ([turn[key] for turn in process.turns] for key in ("seconds", "waited"))
    plain_seconds, median = [turn["seconds"] for turn in plain_turns], statistics.median(seconds)
    faster = [a / b for a, b in zip(plain_seconds, seconds, strict=False)] or [math.nan]
    rates = [process.facts.get("flops", flops) / median, *process.ask("ceilings")]
    speed, *peaks = (f"{rate / 1e9:.0f}" for rate in rates)
    row = [process.name, spread([1e3 * s for s in seconds], 1), f"{args.batch_size / median:.2f}"]
    row += [spread(faster, 2), f"{process.turns[-1]['memory'] / 1e6:.0f}", speed, ", ".join(peaks)]
    return f"| {' | '.join(row)} | {statistics.median(waited):.2%} |"


def table(args, processes):
    """The results as Markdown."""
    flops = {p.name: p.facts["flops"] for p in processes if "flops" in p.facts}
    commit = subprocess.getoutput(f"git -C '{ROOT}' describe --always --dirty --exclude='*'")
    shared = next((flops[name] for name in flops if name != "plain"), math.nan)
    rows = "\n".join(row_of(process, args, processes[0].turns, shared) for process in processes)
    counts = ", ".join(f"{name} {count / 1e9:.1f}" for name, count in flops.items())
    return f"""{args.method}, {args.image_size} px, batch {args.batch_size} {" ".join(args.rest)}

{processes[0].facts.get("hardware")}; torch {torch.__version__}; commit {commit};
medians of {len(processes[0].turns)} rounds (minimum to maximum)

| | ms per step | images/s | faster | peak MB | GFLOP/s | ceilings: product, conv | data wait |
|---|---|---|---|---|---|---|---|
{rows}

GFLOP in the convolutions and matrix products of a step: {counts}.
"""


def compare(args, argv, data_root):
    """Runs the processes in turn. Returns them, the plain one first."""
    start, processes = time.monotonic(), [Process("plain", argv, data_root)]
    device = processes[0].facts.get("device", "cpu")
    rounds, steps, warm_up = (20, 20, 2) if device == "cuda" else (4, 1, 1)
    names = [name for name in args.configs or DEFAULTS[device] if name != "plain"]
    processes += [Process(name, argv, data_root) for name in names]
    for number in range(warm_up + (args.rounds or rounds)):
        if number > warm_up and time.monotonic() - start > 60 * args.minutes:
            break
        for process in processes:
            turn = process.ask(steps)
            process.turns += [turn] if turn and number >= warm_up else []
            facts = {p.name: {"turns": p.turns, "error": p.error, **p.facts} for p in processes}
            if args.output:
                args.output.with_suffix(".json").write_text(json.dumps(facts, indent=1))
    return processes


def main(argv=None):
    """Runs the command line. Returns the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    args = parse_args(argv)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
    if args.serve:
        serve(args)
        return 0
    with tempfile.TemporaryDirectory() as data_root:
        write_noise(data_root, args.method)
        processes = compare(args, argv, data_root)
        text = table(args, processes)
        for process in processes:
            process.process.communicate()
    print(text)
    if args.output:
        args.output.with_suffix(".md").write_text(text)
    return 2 * bool(processes[0].error)


if __name__ == "__main__":
    sys.exit(main())

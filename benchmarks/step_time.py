"""Times the training step that <method>/train.py runs, in several configurations side by side.

    python benchmarks/step_time.py --method cycleGAN
    python benchmarks/step_time.py --method CUT --configs fp32 bf16 bf16+compile --minutes 20
    python benchmarks/step_time.py --method pix2pix --configs fp32 fp32@GOMP_SPINCOUNT=1000 \\
        --neighbours 1 --output results/threads -- --ngf 32    # what follows -- goes to train.py

Each configuration has a process of its own (@ sets its environment), and they take turns: what
disturbs the machine disturbs all, and one that fails costs its row only. "faster" is the median
over rounds of the plain step's time (plain.py: fp32, nothing shared) over the configuration's.
Images come from the real dataset and loader. With --output, all timings go to a JSON as they come.
"""

import argparse
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from configuration import ROOT, Configuration

BUSY = "import os; parent = os.getppid()\nwhile os.getppid() == parent: pass"
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
    add("--neighbours", type=int, default=0, help="busy programs that run meanwhile [0]")
    add("--minutes", type=float, default=1e9, help="start no round after this long [no limit]")
    add("--output", type=Path, help="write <output>.md and <output>.json [none]")
    add("--serve", nargs=2, help=argparse.SUPPRESS)  # how this script calls itself
    args = parser.parse_args(argv[:end])
    args.rest = argv[end + 1 :]
    for name in args.configs or ():
        if set(name.split("@")[0].split("+")) - set(PARTS):
            parser.error(f"--configs {name}: parts are {', '.join(PARTS)}")
    return args


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
    status = Path("/proc/self/status").read_text() if sys.platform == "linux" else ""
    return sum(1024 * int(kilobytes) for kilobytes in re.findall(r"VmHWM:\s*(\d+)", status))


def endless_batches(config):
    """x, y on the device from train.py's own dataset, epoch after epoch."""
    args, train, order = config.args, config.train, []
    data, pinned = train.build_data(args)[0], config.device.type == "cuda"
    workers = {"num_workers": args.num_workers, "persistent_workers": args.num_workers > 0}
    loader = DataLoader(data, batch_sampler=order, pin_memory=pinned, **workers)
    for epoch in range(1, 10**9):
        order[:] = [[(epoch, index)] * args.batch_size for index in range(len(data))]
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
    text = Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else ""
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
        seconds = time.perf_counter() - start
        memory = peak_memory(device) - before * (device.type != "cuda")
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
        parts, _, setting = name.partition("@")
        command = [sys.executable, __file__, "--serve", parts, str(data_root), *argv]
        self.stderr = tempfile.TemporaryFile("w+")  # noqa: SIM115 (it lives as long as the process)
        options = {"stdin": pipe, "stdout": pipe, "stderr": self.stderr, "text": True}
        options["env"] = os.environ | dict([setting.split("=")] if setting else ())
        self.process = subprocess.Popen(command, **options)
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
    low, high = (f"{extreme(values):.{digits}f}" for extreme in (min, max))
    return f"{statistics.median(values):.{digits}f} ({low} to {high})"


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
    shared = [math.nan, *flops.values()][-1]
    commit = subprocess.getoutput(f"git -C '{ROOT}' describe --always --dirty --exclude='*'")
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
    if args.serve:
        return serve(args)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as data_root, ExitStack() as stack:
        for _ in range(args.neighbours):  # each ends with this process
            stack.callback(subprocess.Popen([sys.executable, "-c", BUSY]).kill)
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

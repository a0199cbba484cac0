"""Times the training step that <method>/train.py runs, in several configurations side by side.

    python benchmarks/step_time.py --method cycleGAN
    python benchmarks/step_time.py --method CUT --configs fp32 bf16 bf16+channels-last bf16+compile
    python benchmarks/step_time.py --method pix2pix --batch-size 8 --profile

Every round takes each configuration in turn, so that what disturbs the machine disturbs all of
them; "faster" is the median over rounds of the plain step's time (benchmarks/plain.py: fp32,
separate calls, no sharing) over the configuration's. Pictures come from the real loader. The table
goes to standard output in Markdown.
"""

import argparse
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
METHODS = ("pix2pix", "cycleGAN", "CUT")
PARTS = ("plain", "fp32", "tf32", "bf16", "channels-last", "compile", "graph")


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def parse_args(argv=None):
    """The flags; those that follow -- go to train.py as they are, as `rest`."""
    argv = list(sys.argv[1:] if argv is None else argv)
    cut = argv.index("--") if "--" in argv else len(argv)
    style = argparse.RawDescriptionHelpFormatter
    parser = Parser("step_time.py", description=__doc__, formatter_class=style, allow_abbrev=False)
    add = parser.add_argument
    add("--method", choices=METHODS, required=True, help="whose step")
    add("--image-size", type=int, default=256, help="pixels [256]")
    add("--batch-size", type=int, default=1, help="pictures a step [1]")
    add("--device", default="auto", help="auto, cpu, cuda [auto]")
    names = f"parts joined by +, of {', '.join(PARTS[1:])} [fp32 bf16; on CUDA all, one by one]"
    add("--configs", nargs="+", help=names)
    add("--rounds", type=int, help="timings of each configuration [4; on CUDA 20]")
    add("--burst", type=int, help="steps a timing [1; on CUDA 20]")
    add("--warm-up", type=int, help="rounds before, not counted [1; on CUDA 2]")
    add("--no-memory", action="store_true", help="no peak memory, which takes a process each [off]")
    add("--profile", action="store_true", help="also the operators that take the time [off]")
    add("--memory-of", help=argparse.SUPPRESS)  # how this script calls itself
    args = parser.parse_args(argv[:cut])
    args.rest = argv[cut + 1 :]
    for name in args.configs or ():
        if set(name.split("+")) - set(PARTS):
            parser.error(f"--configs {name}: parts are {', '.join(PARTS[1:])}")
    for name, low in (("rounds", 1), ("burst", 1), ("warm_up", 0)):
        if getattr(args, name) is not None and getattr(args, name) < low:
            given = f"--{name.replace('_', '-')} {getattr(args, name)}"
            parser.error(f"{given}: wanted is a number from {low} on")
    return args


args_of_script = parse_args() if __name__ == "__main__" else None  # before torch takes its seconds

import numpy as np
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(ROOT / "benchmarks"))
import plain


def load_train(method):
    """The module <method>/train.py: the real step, imported."""
    sys.path.insert(0, str(ROOT / method))
    spec = importlib.util.spec_from_file_location(f"{method}_train", ROOT / method / "train.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Configuration:
    """One way to run a step: config(x, y) runs it. name: parts joined by +, or "plain"."""

    def __init__(self, train, args, name, folder="."):
        self.name, self.parts, self.method = name, name.split("+"), args.method
        self.precision = next((p for p in self.parts if p in ("tf32", "bf16")), "fp32")
        flags = ["--image-size", str(args.image_size), "--batch-size", str(args.batch_size)]
        flags += ["--load-size", str(args.image_size * 286 // 256), "--device", args.device]
        flags += ["--precision", self.precision, "--data-root", str(folder), "--data-folder", "d"]
        flags += ["--compile"] if "compile" in self.parts else []
        self.train, self.args = train, train.parse_args([*flags, *args.rest])
        self.device = train.pick_device(self.args)
        torch.manual_seed(0)
        make = (lambda *a: plain.build(train, *a)) if name == "plain" else train.build
        self.nets, self.replay = make(self.args, self.device), None
        if "channels-last" in self.parts:
            for net in self.nets.values():
                if isinstance(net, torch.nn.Module):
                    net.to(memory_format=torch.channels_last)

    def __call__(self, x, y):
        torch.backends.cuda.matmul.allow_tf32 = self.precision == "tf32"
        torch.backends.cudnn.allow_tf32 = self.precision == "tf32"
        if "channels-last" in self.parts:
            x, y = (t.contiguous(memory_format=torch.channels_last) for t in (x, y))
        if "graph" in self.parts:
            return self.run_graph(x, y)
        if self.name == "plain":
            return plain.STEPS[self.method](self.train, self.nets, x, y, self.args)
        return self.train.training_step(self.nets, x, y, self.args)

    def run_graph(self, x, y):
        """One CUDA graph around the whole step. What the host draws, that is, what an image buffer
        gives, is as it was at the capture: good for timing, not for training."""
        if self.replay is None:
            for optimizer in self.nets.values():
                for group in getattr(optimizer, "param_groups", []):
                    group["capturable"] = True
            self.given = x.clone(), y.clone()
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):
                    self.train.training_step(self.nets, *self.given, self.args)
            torch.cuda.current_stream().wait_stream(stream)
            self.replay = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.replay):
                self.losses = self.train.training_step(self.nets, *self.given, self.args)
        for static, new in zip(self.given, (x, y), strict=True):
            static.copy_(new)
        self.replay.replay()
        return self.losses


def wait_for(device):
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def count_flops(function, *args):
    """Floating-point operations of function(*args): products and sums of convolutions and matrix
    products, forward and backward; nothing else is counted."""
    with FlopCounterMode(display=False) as counter:
        function(*args)
    return counter.get_total_flops()


def best_rate(function, flops, device, repeats=5):
    """FLOP/s of the fastest of some calls of function."""
    times = []
    for _ in range(repeats):
        wait_for(device)
        started = time.perf_counter()
        function()
        wait_for(device)
        times.append(time.perf_counter() - started)
    return flops / min(times)


def measure_ceilings(precision, args, device):
    """FLOP/s of a big matrix product, and of the step's main convolution, forward."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
    n, size = (8192 if device.type == "cuda" else 2048), args.image_size // 4 + 2
    matrix = torch.ones(n, n, dtype=dtype, device=device)
    x = torch.ones(args.batch_size, 256, size, size, dtype=dtype, device=device)
    weight = torch.ones(256, 256, 3, 3, dtype=dtype, device=device)
    flops = 2 * args.batch_size * 256 * 256 * 9 * (size - 2) ** 2
    with torch.no_grad():
        product = best_rate(lambda: matrix @ matrix, 2 * n**3, device)
        convolution = best_rate(lambda: torch.conv2d(x, weight), flops, device, 20)
    return {"matrix product": product, "convolution": convolution}


def write_pictures(folder, method, count=16):
    """A data set of noisy JPEGs, 256 px, in folder/d; train and test are the same."""
    noise = np.random.default_rng(0)
    sides = [""] if method == "pix2pix" else ["x", "y"]
    for place in [Path(folder, "d", split, side) for split in ("train", "test") for side in sides]:
        place.mkdir(parents=True)
        for index in range(count):
            small = noise.integers(0, 256, (32, 64 if method == "pix2pix" else 32, 3), np.uint8)
            image = Image.fromarray(small).resize((8 * small.shape[1], 256))
            image.save(place / f"{index}.jpg")


def endless_batches(config):
    """x, y on the device from train.py's own loader, epoch after epoch, and the seconds waited."""
    train, device = config.train, config.device
    loader = train.build_loader(config.args, train.build_data(config.args)[0], device)
    epoch, started = 1, time.perf_counter()
    while True:
        loader.batch_sampler.start(epoch, 0)
        for batch in loader:
            x, y = (train.to_unit(part.to(device, non_blocking=True)) for part in batch)
            yield x, y, time.perf_counter() - started
            started = time.perf_counter()
        epoch += 1


def peak_memory(train, args, name):
    """Bytes at the peak of two steps, beyond what the process holds before the networks are built.

    It takes a process of its own, since memory that was freed is not given back. 0 where that
    cannot be told, that is, on CPUs other than under Linux.
    """
    if name == args.memory_of:
        x, y = torch.rand(2, args.batch_size, 3, args.image_size, args.image_size) * 2 - 1
        before = resident("VmRSS", anew=True)
        config = Configuration(train, args, name)
        for _ in range(2):
            config(x.to(config.device), y.to(config.device))
        if config.device.type == "cuda":
            return torch.cuda.max_memory_allocated(config.device)
        return resident("VmHWM") - before
    sizes = ["--image-size", str(args.image_size), "--batch-size", str(args.batch_size)]
    flags = ["--method", args.method, *sizes, "--device", args.device, "--memory-of", name]
    command = [sys.executable, __file__, *flags, "--", *args.rest]
    return json.loads(subprocess.check_output(command, text=True).splitlines()[-1])


def resident(field, anew=False):
    """Bytes of memory, VmRSS now or VmHWM at the peak; anew: the peak starts here."""
    folder = Path("/proc/self")
    if not folder.exists():
        return 0
    if anew:
        (folder / "clear_refs").write_text("5")
    (line,) = (e for e in (folder / "status").read_text().splitlines() if e.startswith(field))
    return 1024 * int(line.split()[1])


def describe_machine(device):
    """Hardware, versions and commit, in one line."""
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    else:
        info = Path("/proc/cpuinfo")
        lines = info.read_text().splitlines() if info.exists() else []
        model = [line.split(": ")[1] for line in lines if line.startswith("model name")]
        fast = [f for f in ("avx2", "avx512_bf16", "amx_bf16") if any(f in line for line in lines)]
        hardware = f"{(model or [platform.machine()])[0]}, {os.cpu_count()} cores, "
        hardware += f"{torch.get_num_threads()} threads, {' '.join(fast)}"
    command = ["git", "describe", "--always", "--dirty", "--abbrev=10", "--exclude=*"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    return f"{hardware}; {versions}; commit {done.stdout.strip() or 'none'}"


def time_rounds(configs, args, batches):
    """{name: [seconds a step, of each round]} and {name: [share of them spent waiting for data]}"""
    seconds, waited = ({config.name: [] for config in configs} for _ in range(2))
    for number in range(args.warm_up + args.rounds):
        for config in configs:
            waits, started = 0.0, time.perf_counter()
            for _ in range(args.burst):
                asked = time.perf_counter()
                x, y, _ = next(batches)
                waits += time.perf_counter() - asked
                config(x, y)
            wait_for(config.device)
            took = time.perf_counter() - started
            if number >= args.warm_up:
                seconds[config.name].append(took / args.burst)
                waited[config.name].append(waits / took)
    return seconds, waited


def show_profile(config, x, y):
    """Prints the operators of one step that take the most time."""
    with torch.profiler.profile(record_shapes=True) as profile:
        config(x, y)
        wait_for(config.device)
    by = "self_cpu_time_total" if config.device.type == "cpu" else "self_device_time_total"
    events = profile.key_averages(group_by_input_shape=True)
    total = sum(getattr(event, by) for event in events)
    print(f"\n{config.name}: {total / 1e3:.0f} ms\n\n| share | ms | calls | operator | sizes |")
    print("|---|---|---|---|---|")
    for event in sorted(events, key=lambda event: -getattr(event, by))[:16]:
        spent, sizes = getattr(event, by), [s for s in event.input_shapes if s][:2]
        row = (f"{spent / total:.1%}", f"{spent / 1e3:.0f}", event.count, event.key, sizes)
        print("|", " | ".join(map(str, row)), "|")


def middle(values, scale, digits):
    """Median (least to most)."""
    low, high = (f"{scale * value:.{digits}f}" for value in (min(values), max(values)))
    return f"{scale * statistics.median(values):.{digits}f} ({low} to {high})"


def main(args):
    train = load_train(args.method)
    if args.memory_of:
        print(json.dumps(peak_memory(train, args, args.memory_of)))
        return 0
    try:
        return compare(train, args)
    except train.RunError as error:
        print(f"step_time.py: error: {error}", file=sys.stderr)
        return 2
    finally:
        train.end_loading()


def compare(train, args):
    """Measures, and prints the table."""
    with tempfile.TemporaryDirectory() as folder:
        write_pictures(folder, args.method)
        first = Configuration(train, args, "plain", folder)
        device = first.device
        cuda = device.type == "cuda"
        names = args.configs or (["fp32", *PARTS[2:]] if cuda else ["fp32", "bf16"])
        if not cuda and any("graph" in name for name in names):
            raise train.RunError(f"--configs graph is for CUDA devices, this is {device}")
        args.rounds, args.burst = args.rounds or (20 if cuda else 4), args.burst or 1 + 19 * cuda
        args.warm_up = 1 + cuda if args.warm_up is None else args.warm_up
        configs = [first]
        configs += [Configuration(train, args, n, folder) for n in names if n != "plain"]
        batches = endless_batches(first)
        x, y, _ = next(batches)
        shared = Configuration(train, args, "fp32", folder)
        flops = {"plain": count_flops(first, x, y), "": count_flops(shared, x, y)}
        del shared
        kinds = dict.fromkeys(config.precision for config in configs)
        before = {kind: measure_ceilings(kind, args, device) for kind in kinds}
        seconds, waited = time_rounds(configs, args, batches)
        after = {kind: measure_ceilings(kind, args, device) for kind in kinds}
        ceilings = {k: {n: max(r, after[k][n]) for n, r in before[k].items()} for k in kinds}
        memory = (
            {} if args.no_memory else {c.name: peak_memory(train, args, c.name) for c in configs}
        )

    print(f"{args.method}, {args.image_size} px, batch {args.batch_size} {' '.join(args.rest)}")
    print(f"\n{describe_machine(device)}; medians of {args.rounds} rounds (least to most)\n")
    print(
        "| | ms a step | pictures a second | faster | peak MB | GFLOP/s | of the convolution's |",
        end="",
    )
    print(" waiting for data |\n|---|---|---|---|---|---|---|---|")
    for config in configs:
        name, spent = config.name, seconds[config.name]
        faster = [a / b for a, b in zip(seconds["plain"], spent, strict=True)]
        rate = flops.get(name, flops[""]) / statistics.median(spent)
        row = [name, middle(spent, 1e3, 1), f"{args.batch_size / statistics.median(spent):.2f}"]
        row += [middle(faster, 1, 2), f"{memory.get(name, 0) / 1e6:.0f}" if memory else ""]
        row += [f"{rate / 1e9:.0f}", f"{rate / ceilings[config.precision]['convolution']:.0%}"]
        print("|", " | ".join([*row, f"{statistics.median(waited[name]):.2%}"]), "|")
    for kind, rates in ceilings.items():
        each = ", ".join(f"{name} {rate / 1e9:.0f} GFLOP/s" for name, rate in rates.items())
        print(f"\nCeiling in {kind}: {each}.")
    counts = ", ".join(f"{name or 'train.py'} {n / 1e9:.1f} GFLOP" for name, n in flops.items())
    print(f"\nCounted in one step: {counts}.")
    for config in configs if args.profile else ():
        show_profile(config, x, y)
    return 0


if __name__ == "__main__":
    sys.exit(main(args_of_script))

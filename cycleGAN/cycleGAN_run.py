"""What a run of cycleGAN needs whatever it learns: device and arithmetic, processes, signals,
the log of losses, grids, losses.csv and checkpoints. The method itself is in train.py. In pix2pix,
cycleGAN and CUT this file is the same but for its own name.
"""

import argparse
import contextlib
import csv
import datetime
import hashlib
import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
import torchvision
from matplotlib.figure import Figure

from cycleGAN_dataset import EpochBatches, RunError

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
# Differs from pix2pix/pix2pix_run.py: its own name
METHOD = "cycleGAN"


# --------------------------------------------------------------------------- device and arithmetic


def pick_device(args):
    """The torch device of --device, set up for --precision. RunError where it cannot be used."""
    usable = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available()
    usable.append("cpu")
    kind, card = args.device, os.environ.get("LOCAL_RANK")  # torchrun numbers its processes
    kind = usable[0] if kind == "auto" else kind
    try:
        device = torch.device(f"cuda:{card}" if card and kind == "cuda" else kind)
        if device.type not in usable:
            raise RuntimeError(f"not to be had here, only {' and '.join(usable)}")
        torch.zeros(1, device=device)
    except RuntimeError as error:
        raise RunError(f"--device {args.device}: {str(error).splitlines()[0]}") from None
    if args.precision == "tf32" and device.type != "cuda":
        raise RunError(f"--precision tf32 is for CUDA devices, this is {device}: fp32 or bf16")
    choose_precision(args, device)
    torch.backends.cuda.matmul.allow_tf32 = args.precision == "tf32"
    torch.backends.cudnn.allow_tf32 = args.precision == "tf32"
    torch.backends.cudnn.benchmark = True
    return device


def choose_precision(args, device):
    """Settles --precision auto. RunError where bf16 is asked for and much slower than fp32.

    A resumed run keeps what it began with, however slow that is here: it says so and goes on.
    """
    if args.precision in ("auto", "bf16"):
        gain = bf16_gain(device)
        if args.precision == "auto":  # on other devices neither gain nor quality was measured
            args.precision = "bf16" if gain > 1.2 and device.type == "cpu" else "fp32"
        elif gain < 0.5:
            slow = f"on this {device.type} device bf16 is {gain:.2g} times as fast as fp32"
            if not args.resume:
                raise RunError(f"--precision bf16: {slow}; give --precision fp32 or auto")
            print(f"warning: {slow}; the run began in bf16 and goes on in it", file=sys.stderr)


def bf16_gain(device):
    """How many times as fast as in fp32 a convolution is in bf16, forward and backward."""
    if device.type == "cuda":  # from Ampere on there are units for it; before, it is emulated
        return 2.0 if torch.cuda.get_device_capability(device) >= (8, 0) else 0.1
    if device.type == "mps":  # not measured
        return 1.0
    times = {torch.float32: [], torch.bfloat16: []}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more would wait for each other on a machine that is busy
    for dtype in [*times] * 10:
        x, weight = torch.ones(1, 128, 32, 32), torch.ones(128, 128, 3, 3)
        x, weight = (t.to(device, dtype).requires_grad_() for t in (x, weight))
        started = time.perf_counter()
        torch.nn.functional.conv2d(x, weight).sum().backward()
        times[dtype].append(time.perf_counter() - started)
    torch.set_num_threads(threads)
    return min(times[torch.float32]) / min(times[torch.bfloat16])


def prepare(net, args, device):
    """Moves a network to the device; its forward pass then obeys --precision and --compile."""
    net = net.to(device)
    # Weights and gradients, and with them the losses outside, stay in fp32.
    use_bf16 = torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16")
    net.forward = use_bf16(net.forward)
    if args.compile:
        net.compile()
    return net


def adam(args, *nets):
    """One Adam for all of nets, as the three papers set it; one fused kernel where there is one."""
    weights = [p for net in nets for p in net.parameters()]
    fused = weights[0].device.type in ("cpu", "cuda")
    return torch.optim.Adam(weights, args.lr, betas=(0.5, 0.999), fused=fused)


def random_states(device):
    """The states of torch's generators, by device type."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        states["mps"] = torch.mps.get_rng_state()
    return states


def set_random_states(states, device):
    """Puts back what random_states gave."""
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
    elif device.type == "mps" and "mps" in states:
        torch.mps.set_rng_state(states["mps"])


# ------------------------------------------------------------------------------- several processes


def ranks():
    """This process's number among those that torchrun has started, and how many they are: (0, 1)
    alone. Each trains on its own pictures; number 0 alone writes and prints."""
    group = torch.distributed
    return (group.get_rank(), group.get_world_size()) if group.is_initialized() else (0, 1)


def join_ranks(args, device):
    """Joins the processes of torchrun, where it has started more than this one."""
    if torch.distributed.is_torchelastic_launched() and int(os.environ["WORLD_SIZE"]) > 1:
        if args.device not in ("auto", "cpu", "cuda") or device.type == "mps":
            raise RunError(f"--device {args.device}: several processes want cuda or cpu")
        if device.type == "cuda":
            torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        # Long: the others wait while number 0 makes the grids. That one has ended is seen at once.
        wait = datetime.timedelta(days=1)
        torch.distributed.init_process_group(backend, timeout=wait)
        args.precision = gather(args.precision)[0]  # auto: number 0's, though they timed it each


def check_ranks(args, nets, train_set):
    """RunError, in every process, where they have not the same flags, pictures and weights."""
    if ranks()[1] == 1:
        return
    if len(train_set) < ranks()[1]:
        raise RunError(f"{ranks()[1]} processes for {len(train_set)} pictures: start fewer")
    files = ["/".join(file.parts[-3:]) for file in train_set.files]
    own = {"given", "data_root", "device", "num_workers", "cache", "compile"}
    flags = {name: value for name, value in vars(args).items() if name not in own}
    sums = [p.double().sum().item() for _, net in networks(nets) for p in net.parameters()]
    facts = {"flags": flags, "pictures": files, "weights": sums, "torch": torch.__version__}
    facts = {n: hashlib.sha256(repr(value).encode()).hexdigest() for n, value in facts.items()}
    for rank, other in enumerate(gather(facts)):
        differ = [name for name in facts if facts[name] != other[name]]
        if differ:
            ours = f"processes {ranks()[0]} and {rank} have different {', '.join(differ)}"
            raise RunError(f"{ours}; give all machines the same command, code and data")


def collective(function, *args):
    """A call of torch.distributed. RunError where another process has ended meanwhile."""
    try:
        return function(*args)
    except RuntimeError:
        lost = f"process {ranks()[0]} has lost the others"
        raise RunError(f"{lost}: one has ended, it says why itself") from None


def gather(value):
    """The value, of any kind, that each process gives: a list, in all of them."""
    values = [value] * ranks()[1]
    if len(values) > 1:
        collective(torch.distributed.all_gather_object, values, value)
    return values


def average_gradients(parameters):
    """Replaces each gradient by its mean over all processes; alone it does nothing."""
    if ranks()[1] > 1:
        gradients = [p.grad for p in parameters]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        collective(torch.distributed.all_reduce, flat)
        means = (flat / ranks()[1]).split([gradient.numel() for gradient in gradients])
        for gradient, mean in zip(gradients, means, strict=True):
            gradient.copy_(mean.view_as(gradient))


# ------------------------------------------------------------------------ signals, loading, losses


class StopSignal:
    """Turns Ctrl-C and SIGTERM into `caught`, read between steps; a second one ends at once."""

    def __enter__(self):
        self.caught = None
        self.before = {n: signal.signal(n, self.catch) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for signum, handler in self.before.items():
            signal.signal(signum, handler)

    def catch(self, signum, _frame):
        if self.caught:
            raise SystemExit(128 + signum)
        self.caught = signum
        print("\nstopping soon; a second time stops at once", file=sys.stderr)

    def agree(self):
        """Has every process catch what one of them has caught: all stop after the same step."""
        if ranks()[1] > 1:
            caught = torch.tensor(self.caught or 0)
            collective(torch.distributed.all_reduce, caught, torch.distributed.ReduceOp.MAX)
            self.caught = int(caught) or None
        return self.caught


def ignore_signals(_worker):
    """A signal to the whole group must not end the loading processes before the last step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def end_loading():
    """Ends the loading processes, which ignore_signals has made deaf to the usual way."""
    signal.signal(getattr(signal, "SIGCHLD", signal.SIGINT), signal.SIG_DFL)
    for process in multiprocessing.active_children():
        process.kill()


def build_loader(args, train_set, device):
    """Batches of train_set, in an order and with draws that the number of workers leaves alone."""
    return torch.utils.data.DataLoader(
        train_set,
        batch_sampler=EpochBatches(len(train_set), args.batch_size, args.seed, *ranks()),
        num_workers=args.num_workers,
        persistent_workers=args.num_workers > 0,
        pin_memory=device.type == "cuda",
        worker_init_fn=ignore_signals,
        generator=torch.Generator(),  # else it would draw from the generator that training uses
    )


def total_last(named):
    """Sorts (name, value) such that a term comes before the sum that it spoils."""
    return named[0].endswith("total")


class LossLog:
    """Losses stay on the device and are read many steps at once, so that no step waits for them.

    Of several processes each has its own; the progress bar and losses.csv show number 0's.
    """

    def __init__(self, progress):
        self.progress, self.pending, self.names, self.smooth = progress, [], [], {}
        self.last_read = time.monotonic()

    def add(self, losses):
        self.names = list(losses)
        self.pending.append(torch.stack([value.detach() for value in losses.values()]))

    def read(self):
        """Adds the pending losses to progress["sums"]. RunError at the first that is not finite."""
        rows = torch.stack(self.pending).tolist()
        for step, row in enumerate(rows, self.progress["step"] - len(rows) + 1):
            named = list(zip(self.names, row, strict=True))
            for name, value in sorted(named, key=total_last):
                if not math.isfinite(value):
                    where = f"step {step}, epoch {self.progress['epoch']}"
                    advice = "try a lower --lr or --precision fp32, and look for odd pictures"
                    kept = "a checkpoint from before is kept"
                    raise RunError(f"{name} is {value} at {where}; {kept}; {advice}")
            for name, value in named:
                self.progress["sums"][name] = self.progress["sums"].get(name, 0.0) + value
                self.smooth[name] = 0.95 * self.smooth.get(name, value) + 0.05 * value
        self.pending, self.last_read = [], time.monotonic()


# ---------------------------------------------------------------------------------- files of a run


def run_paths(args):
    """The folder of a run's grids, and its checkpoint."""
    model = HERE / "model" / args.run_name
    return ROOT / "visualize" / METHOD / args.run_name, model / "checkpoint.pt"


def open_run(args, folder, checkpoint, progress, device):
    """Makes the run's folders and args.json. RunError where another run's files would be lost."""
    old = [*folder.glob("val/[xy]*[0-9].png"), *folder.glob("losses.*"), *folder.glob("args.json")]
    old += [checkpoint] if checkpoint.exists() else []
    if old and not (args.resume or args.overwrite):
        options = "--run-name NAME starts another, --overwrite deletes it"
        if checkpoint.exists():
            options = f"--resume goes on with it, {options}"
        raise RunError(f"there is a run of this name already ({old[0]}): {options}")
    for file in old if args.overwrite else []:
        file.unlink()
    (folder / "val").mkdir(parents=True, exist_ok=True)
    if args.save_model:
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
    if args.resume:  # epochs that came after the checkpoint are done again
        write_rows(folder, [r for r in read_rows(folder) if int(r["epoch"]) < progress["epoch"]])
    facts = {"torch": torch.__version__, "device_used": str(device), "commit": git_commit()}
    (folder / "args.json").write_text(json.dumps({**vars(args), **facts}, indent=2) + "\n")


def git_commit():
    """The commit of this code, with "-dirty" where files differ from it; None outside git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.check_output(command, cwd=HERE, stderr=subprocess.DEVNULL, text=True)[:-1]
    except (OSError, subprocess.CalledProcessError):
        return None


def announce(args, nets, train_set, test_set, folder, device):
    """Says what will run, in numbers."""
    number = ranks()[1]
    steps = len(EpochBatches(len(train_set), args.batch_size, args.seed, 0, number))
    pictures = f"{number} x {args.batch_size}" if number > 1 else args.batch_size
    size = f"cropped from {args.load_size} to" if args.jitter else "resized to"
    kept = "" if args.save_model else "; without --save-model only grids and losses are kept"
    sizes = {n: sum(p.numel() for p in part.parameters()) for n, part in networks(nets)}
    print(
        f"{METHOD} on {args.data_folder}: {train_set} to train on ({train_set.cache}), {test_set} "
        f"to test with, {size} {args.image_size} px; {args.epochs} epochs of {steps} steps of "
        f"{pictures} on {device} in {args.precision}; "
        f"{', '.join(f'{n} {size / 1e6:.2f} M' for n, size in sizes.items())} "
        f"parameters; grids go to {folder}{kept}",
        flush=True,
    )


def networks(nets):
    """The (name, network) pairs among nets, which holds optimizers too."""
    return [(name, part) for name, part in nets.items() if isinstance(part, torch.nn.Module)]


def save_grid(images, path):
    """Writes pictures, each (1, 3, H, W) in [-1, 1], as one row of a PNG, pixel for pixel."""
    torchvision.utils.save_image((torch.cat(images) + 1) / 2, path, nrow=len(images))


@contextlib.contextmanager
def replacing(path, mode):
    """A file that takes path's place once it is whole. RunError where that fails; path is safe."""
    aside = path.with_suffix(".tmp")
    try:
        with open(aside, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except (OSError, RuntimeError) as error:  # torch.save makes the latter of a full disk
        aside.unlink(missing_ok=True)
        reason = str(error).splitlines()[0]
        raise RunError(f"cannot write {path}: {reason}; what was there before is whole") from None


def read_rows(folder):
    """The rows of losses.csv: a dict of strings each."""
    if not (folder / "losses.csv").exists():
        return []
    with open(folder / "losses.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    if not all((row.get("epoch") or "").isdigit() for row in rows):
        raise RunError(f"{folder / 'losses.csv'} has a row without an epoch; mend or remove it")
    return rows


def write_rows(folder, rows):
    """Writes losses.csv anew."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    with replacing(folder / "losses.csv", "w") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def append_losses(folder, progress, rate, measured):
    """Adds an epoch's row, means over its steps and what was measured then, to losses.csv."""
    seconds = max(progress["seconds"], 1e-9)
    row = {"epoch": progress["epoch"], "seconds": f"{seconds:.2f}"}
    row.update(images_per_second=f"{progress['images'] / seconds:.2f}", learning_rate=rate)
    row.update({name: total / progress["batch"] for name, total in progress["sums"].items()})
    rows = [*read_rows(folder), {**row, **measured}]
    write_rows(folder, rows)
    if measured:
        plot_losses(rows, folder / "losses.png")
        values = ", ".join(f"{name} {value:.4f}" for name, value in measured.items())
        print(f"epoch {progress['epoch']}: {values}", flush=True)


def plot_losses(rows, path):
    """Draws every column of losses.csv after the learning rate, four plots a line."""
    names = list(dict.fromkeys(name for row in rows for name in row))[4:]
    lines = math.ceil(len(names) / 4)
    figure = Figure(figsize=(14, 3 * lines), layout="constrained")
    places = list(figure.subplots(lines, 4, squeeze=False).flat)
    for unused in places[len(names) :]:
        unused.remove()
    for axes, name in zip(places, names, strict=False):
        points = [(int(row["epoch"]), float(row[name])) for row in rows if row.get(name)]
        axes.plot(*zip(*points, strict=True), ".-", markersize=3)
        axes.set_title(name)
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.3)
    figure.savefig(path)


def save_checkpoint(path, args, nets, progress, device):
    """Writes the whole run into one file. RunError where that fails or a weight is not finite.

    Processes that train together have the same weights, but each its own random states and image
    buffers. Those of the others are in the list state["others"]; all call this, number 0 writes.
    """
    state = {name: part.state_dict() for name, part in nets.items()}
    own = {name: state[name] for name in state if name.startswith("buffer")}
    own, *others = gather({**own, "random": random_states(device)})
    if ranks()[0] > 0:
        return
    state.update(own, method=METHOD, args=vars(args), progress=progress, others=others)
    if not all(p.isfinite().all() for _, net in networks(nets) for p in net.parameters()):
        step = progress["step"]
        raise RunError(f"a weight is not finite after step {step}; {path} stays as it was")
    with replacing(path, "wb") as file:
        torch.save(state, file)


def read_checkpoint(path):
    """A checkpoint's dict. RunError where there is none, or a damaged one, or another method's."""
    if not path.exists():
        raise RunError(f"no checkpoint {path}; --save-model writes one, --run-name says which")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        parts = [state[part] for part in ("args", "progress", "random", "method")]
    except Exception as error:  # a damaged file may raise nearly anything
        kind = type(error).__name__
        raise RunError(f"{path} is damaged ({kind}); --overwrite starts anew") from None
    if parts[-1] != METHOD:
        raise RunError(f"{path} is a checkpoint of {parts[-1]}, not of {METHOD}")
    return state


def load_checkpoint(path, nets, progress, device):
    """Puts everything that save_checkpoint wrote back in its place."""
    state, (rank, number) = read_checkpoint(path), ranks()
    was, now = state["progress"]["files"], progress["files"]
    if was != now:
        raise RunError(f"the training set has changed: {was} pictures at the checkpoint, {now} now")
    others = state.get("others", [])
    if len(others) + 1 != number:
        was = len(others) + 1
        raise RunError(f"{path} is of a run of {was} processes, not {number}: start as many")
    state.update(others[rank - 1] if rank else {})
    try:
        for name, part in nets.items():
            part.load_state_dict(state[name])
    except (KeyError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise RunError(f"{path} does not fit ({reason}); --overwrite starts anew") from None
    progress.update(state["progress"])
    set_random_states(state["random"], device)


def adopt_flags(args):
    """A resumed run's flags: the checkpoint's. RunError where the user typed one otherwise."""
    free = "data_root epochs num_workers cache sample_every save_model resume device compile"
    free += " max_steps"
    saved = read_checkpoint(run_paths(args)[1])["args"]
    typed = {name: getattr(args, name) for name in args.given}
    if args.precision == "auto":  # it was settled then
        typed.pop("precision", None)
    fixed = [name for name in typed if name in saved and name not in free.split()]
    differ = [name for name in fixed if typed[name] != saved[name]]
    if differ:
        each = (f"--{n.replace('_', '-')} is {typed[n]}, was {saved[n]}" for n in differ)
        raise RunError(f"the checkpoint has other flags: {'; '.join(each)}; leave them out")
    anew = {"max_steps": None, "overwrite": False, "given": args.given}
    return argparse.Namespace(**{**vars(args), **saved, **anew, **typed})


def say_how_it_ended(args, progress):
    """The last line of a run: whether it is complete and, if not, how to go on."""
    if progress["epoch"] > args.epochs:
        print(f"done: {args.epochs} epochs, {progress['step']} steps")
    elif args.save_model:
        number = ranks()[1]
        start = f"torchrun --nproc-per-node {number}" if number > 1 else "python"
        again = f"{start} {METHOD}/train.py --run-name {args.run_name} --resume"
        print(f"stopped after step {progress['step']}; to go on: {again}")
    else:
        print(f"stopped after step {progress['step']}; without --save-model nothing is kept")

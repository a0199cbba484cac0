"""What every run needs: device, processes, signals, losses, files, checkpoint. The method itself is
in train.py, which enters this file between steps. The same in pix2pix, cycleGAN and CUT.
"""

import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import zipfile
from argparse import Namespace
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import distributed
from torch.utils.data import DataLoader
from torchvision.utils import save_image
from tqdm import tqdm

from CUT_dataset import UserError, epoch_batches, to_unit
from CUT_flags import parse_args

HERE = Path(__file__).resolve().parent
METHOD = HERE.name
FREE = ["data_root", "output_root", "run_name", "epochs", "max_steps", "num_workers", "device"]
FREE += ["sample_every", "save_model", "resume", "compile"]  # flags that a resumed run may change

# ------------------------------------------------------------------------------ device, processes


def pick_device(args):
    """The torch device of --device, set up for --precision. UserError if it cannot be used."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    name = (accelerator.type if accelerator else "cpu") if args.device == "auto" else args.device
    if name == "cuda" and "LOCAL_RANK" in os.environ:  # set by torchrun
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = f"{str(error).splitlines()[0]}; use auto, cpu, cuda, cuda:1 or mps"
        raise UserError(f"--device {args.device}: {reason}") from None
    native = device.type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if device.type == "cuda":
        torch.cuda.set_device(device)
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    if args.precision == "bf16" and not native:
        raise UserError("--precision bf16 is slower than fp32 on this device; use tf32 or fp32")
    torch.backends.cudnn.allow_tf32 = args.precision == "tf32"
    torch.backends.cudnn.benchmark = True
    return device


def random_states(device, states=None):
    """The states of the random generators in use; first sets them to `states` if given."""
    modules = {device.type: torch.get_device_module(device)} if device.type != "cpu" else {}
    modules["cpu"] = torch
    for kind in modules.keys() & (states or {}).keys():
        modules[kind].set_rng_state(states[kind])
    return {kind: module.get_rng_state() for kind, module in modules.items()}


def ranks():
    """(rank, world_size): this process's number among those of torchrun; (0, 1) for one alone."""
    if not distributed.is_initialized():
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def join_ranks(args, device):
    """Joins the processes that torchrun started, if it started several."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        if device.type not in ("cpu", "cuda"):
            raise UserError(f"--device {args.device}: several processes need cpu or cuda")
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        # A day: the others wait while rank 0 samples. A process that has died is noticed at once.
        distributed.init_process_group(backend, timeout=timedelta(days=1))


def gather(value):
    """The values of all processes, as a list. Plain Python and CPU tensors, not GPU tensors."""
    values = [value] * ranks()[1]
    if len(values) > 1:
        distributed.all_gather_object(values, value)
    return values


def average_gradients(parameters):
    """Replaces each gradient by its mean over all processes."""
    if ranks()[1] > 1:
        flat = torch.cat([p.grad.flatten() for p in parameters])
        distributed.all_reduce(flat)
        means = (flat / ranks()[1]).split([p.numel() for p in parameters])
        for p, mean in zip(parameters, means, strict=True):
            p.grad.copy_(mean.view_as(p))


# ------------------------------------------------------------------------------------------ files


@contextmanager
def replacing(path):
    """A binary file that takes path's place once it is complete. Until then path stays as it is."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(aside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
        raise UserError(f"cannot write {path}: {str(error).splitlines()[0]}") from None
    finally:
        with suppress(OSError):
            aside.unlink()


def save_grid(images, path):
    """Writes images, each (1, 3, H, W) in [-1, 1], as one row of a PNG, pixel for pixel."""
    with replacing(path) as file:
        save_image((torch.cat(images) + 1) / 2, file, format="png", nrow=len(images))


def write_losses(rows, folder):
    """Writes losses.csv, one row per epoch, and plots its columns in losses.png."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [names, *([row.get(name, "") for name in names] for row in rows)]
    with replacing(folder / "losses.csv") as file:
        file.write("".join(",".join(map(str, line)) + "\n" for line in lines).encode())
    names, height = names[4:], -(-len(names[4:]) // 4)  # four panels side by side
    figure = Figure(figsize=(14, 3 * height), layout="constrained")
    for index, name in enumerate(names):
        points = [(row["epoch"], row[name]) for row in rows if name in row]
        axes = figure.add_subplot(height, 4, index + 1, title=name, xlabel="epoch")
        axes.plot(*zip(*points, strict=True), ".-", markersize=3)
    with replacing(folder / "losses.png") as file:
        figure.savefig(file, format="png")


def git_commit():
    """The commit of this code, with "-dirty" if files differ from it; None outside of git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    with suppress(OSError, subprocess.CalledProcessError):
        return subprocess.check_output(command, cwd=HERE, stderr=subprocess.DEVNULL, text=True)[:-1]


def checkpoint_path(args):
    """Where the checkpoint of a run is."""
    return Path(args.output_root) / METHOD / "model" / args.run_name / "checkpoint.pt"


def read_checkpoint(path):
    """The dict that Run.save wrote, checked. UserError if the file is damaged or something else."""
    hint = "train.py --save-model writes checkpoints, convert.py makes them of the authors' weights"
    if not path.is_file():
        raise UserError(f"no checkpoint {path}; {hint}")
    try:
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()  # compares checksums, which torch.load does not
        state = None if damaged else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a foreign file may raise anything
        kind = "contains Python objects" if "weights_only" in str(error) else "is no checkpoint"
        raise UserError(f"{path} {kind}, or is damaged; {hint}") from None
    if damaged:
        raise UserError(f"{path} is damaged: a checksum is wrong")
    if not (isinstance(state, dict) and isinstance(state.get("args"), dict)):
        raise UserError(f"{path} contains weights, but is not a checkpoint; {hint}")
    if state.get("method") != METHOD:
        raise UserError(f"{path} is a checkpoint of {state.get('method')}, not of {METHOD}")
    known = vars(parse_args([]))  # the flags are parsed again, which checks their types and ranges
    words = {
        n.replace("_", "-"): v for n, v in state["args"].items() if n in known and v is not None
    }
    words = [f"--{n}={v}" for n, v in words.items() if n != "typed" and not isinstance(v, bool)]
    parse_args(words, prog=f"{path}: flags of the checkpoint")
    return state


def load_part(part, state, path):
    """Loads a network, optimizer or buffer. UserError if `state` does not fit or is not finite."""
    try:
        part.load_state_dict(state)
        tensors = list(state.values()) if isinstance(part, torch.nn.Module) else []
        for weight, moments in getattr(part, "state", {}).items():  # of an optimizer
            tensors += [moments["step"], moments["exp_avg"], moments["exp_avg_sq"]]
            if any(tensor.shape != weight.shape for tensor in tensors[-2:]):
                raise ValueError("the optimizer has moments of another shape")
        if not all(tensor.isfinite().all() for tensor in tensors):
            raise ValueError("its weights are not finite")
    except Exception as error:  # damaged input may raise anything
        reason = str(error).strip().splitlines()[-1].strip() or type(error).__name__
        raise UserError(f"{path} does not fit: {reason}") from None


def adopt_flags(args):
    """The flags of a resumed run: the checkpoint's, but for those typed now that may change."""
    path, typed = checkpoint_path(args), {name: getattr(args, name) for name in args.typed}
    if not path.exists() and args.save_model:
        return args  # stopped before its first checkpoint, it starts from the beginning
    if not path.exists():
        runs = sorted(p.parent.name for p in path.parents[1].glob("*/checkpoint.pt"))
        raise UserError(f"no checkpoint {path}; --run-name can be: {', '.join(runs) or 'none yet'}")
    saved = read_checkpoint(path)["args"]
    for name in typed.keys() & saved.keys() - {*FREE}:
        if typed[name] != saved[name]:
            flag = f"--{name.replace('_', '-')}"
            raise UserError(f"{flag} {typed[name]}: the run has {saved[name]}; leave {flag} out")
    if typed.get("epochs", 0) > saved["epochs"]:
        print(f"--epochs {args.epochs}, not {saved['epochs']}: the learning rate rises again")
    saved = {**saved, "overwrite": False, "max_steps": None}
    return Namespace(**{**vars(args), **saved, **typed, "run_name": args.run_name})


# -------------------------------------------------------------------------------------------- run


def ignore_signals(_worker):
    """Has a loading process outlive a signal to the whole group, until the run has been saved."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


class Run:
    """A run from start to end: its files, lock, signals, losses and checkpoint.

    progress: the epoch (from 1); its batches, images, seconds and loss sums so far; steps in all;
    the rows of losses.csv; the names of the training images. intact: whether the networks are
    between two steps, so that they can be saved.
    """

    def __init__(self, args, nets, train_set, device):
        self.args, self.nets, self.train_set, self.device = args, nets, train_set, device
        (self.rank, self.world_size), self.checkpoint = ranks(), checkpoint_path(args)
        self.folder = Path(args.output_root) / "visualize" / METHOD / args.run_name
        names = ["/".join(file.parts[-2:]) for file in train_set.files]
        self.progress = {"epoch": 1, "batch": 0, "step": 0, "images": 0, "seconds": 0.0, "sums": {}}
        self.progress.update(rows=[], files=names)
        self.networks = {n: net for n, net in nets.items() if isinstance(net, torch.nn.Module)}
        self.epoch_images = len(train_set) - len(train_set) % self.world_size
        self.epoch_steps = -(-self.epoch_images // (args.batch_size * self.world_size))
        self.caught, self.intact, self.pending, self.handlers = None, True, [], {}
        self.order = []  # the epoch's batches; filled in place, since the loader holds this list
        workers = {"num_workers": args.num_workers, "persistent_workers": args.num_workers > 0}
        # A generator of its own keeps the loader from using numbers of the training's.
        workers.update(worker_init_fn=ignore_signals, generator=torch.Generator())
        pinned = device.type == "cuda"
        self.loader = DataLoader(train_set, batch_sampler=self.order, pin_memory=pinned, **workers)

    def __enter__(self):
        """Opens the run's files and resumes. From here on a signal stops the run between steps."""
        if self.rank == 0:
            self.open()
        if self.args.resume and self.checkpoint.exists():
            self.load()
        elif self.args.init_from:
            state = read_checkpoint(Path(self.args.init_from))
            for name in self.networks.keys() & state.keys():
                load_part(self.nets[name], state[name], self.args.init_from)
        facts = {n: v for n, v in vars(self.args).items() if n not in (*FREE, "typed")}
        facts.update(images=[(f.name, f.stat().st_size) for f in self.train_set.files])
        for rank, other in enumerate(gather(facts)):
            differ = ", ".join(name for name in facts if facts[name] != other.get(name))
            if differ:
                raise UserError(f"processes {self.rank} and {rank} have different {differ}")
        for name in {"SIGINT", "SIGTERM", "SIGHUP"} & set(dir(signal)):
            number = getattr(signal, name)
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup sets SIGHUP
                self.handlers[number] = signal.signal(number, self.catch)
        self.saved = self.last_read = time.monotonic()
        return self

    def __exit__(self, kind, error, _trace):
        """After an error between two steps, saves what it would lose."""
        wanted = self.args.save_model and self.progress["step"] and self.world_size == 1
        if wanted and self.intact and isinstance(error, Exception):
            with suppress(UserError):
                self.save()
                print(f"saved after step {self.progress['step']}", file=sys.stderr)
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def catch(self, number, _frame):
        """Notes a signal; a second one exits at once. Prints nothing: the streams may be gone."""
        if self.caught:
            raise SystemExit(128 + number)
        self.caught = number

    def open(self):
        """Makes and locks the run's folders and writes args.json, unless another run is there."""
        args, folder, trial = self.args, self.folder, self.checkpoint.with_name("trial")
        (folder / "val").mkdir(parents=True, exist_ok=True)
        with suppress(ImportError):  # Windows has no fcntl: there, two processes can share a run
            import fcntl

            self.lock = open(folder / ".lock", "w")  # noqa: SIM115 (locked until the process ends)
            try:
                fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"run {args.run_name} is in progress in another process") from None
        old = [*folder.glob("val/[xy]*[0-9].png"), *folder.glob("losses.*"), folder / "args.json"]
        old = [file for file in (*old, self.checkpoint) if file.exists()]
        if old and not (args.resume or args.overwrite):
            options = "--overwrite deletes it, another --run-name keeps it"
            options = f"--resume continues it, {options}" if self.checkpoint in old else options
            raise UserError(f"run {args.run_name} exists in {folder}: {options}")
        facts = {"torch": torch.__version__, "commit": git_commit()}
        facts = {"method": METHOD, **vars(args), "device_used": str(self.device), **facts}
        for path in [trial, folder / "args.json"] if args.save_model else [folder / "args.json"]:
            with replacing(path) as file:  # before anything is deleted
                file.write(json.dumps(facts, indent=2).encode() + b"\n")
        for file in [
            trial,
            *self.checkpoint.parent.glob(".*.tmp"),
            *(old if args.overwrite else []),
        ]:
            if file.name != "args.json":
                file.unlink(missing_ok=True)

    def announce(self, test_set):
        """Says what will run. Loads some images first, which notes what is odd about them."""
        args, device = self.args, self.device
        if self.rank == 0:
            for index in range(min(8, len(self.train_set))):
                self.train_set[1, index]
            sizes = {
                n: sum(p.numel() for p in net.parameters()) for n, net in self.networks.items()
            }
            print(f"{METHOD} on {args.data_folder}: {self.train_set}, tested with {test_set}")
            print(
                f"{args.epochs} epochs of {self.epoch_steps} steps of batch {args.batch_size} at "
                f"{args.image_size} px on {device} in {args.precision}; millions of weights: "
                f"{', '.join(f'{name} {size / 1e6:.2f}' for name, size in sizes.items())}"
            )
            if not args.save_model:
                print("the networks are not kept: --save-model keeps them")

    def unfinished(self):
        """Whether there is a step left before the last epoch, --max-steps or a signal."""
        progress, last = self.progress, self.args.max_steps or math.inf
        return progress["epoch"] <= self.args.epochs and progress["step"] < last and not self.caught

    def batches(self):
        """Yields what is left of the epoch, on the device and in [-1, 1], and counts it.

        The caller passes each step's losses to log. Ends early at --max-steps or for a signal.
        """
        args, progress = self.args, self.progress
        started = time.monotonic() - progress["seconds"]
        shape = (len(self.train_set), args.batch_size, args.seed, progress["epoch"], *ranks())
        self.order[:] = epoch_batches(*shape)[progress["batch"] :]
        done = (progress["epoch"] - 1) * self.epoch_images + progress["images"]
        bar = {"total": args.epochs * self.epoch_images, "initial": done, "unit": "img"}
        with tqdm(
            desc=f"epoch {progress['epoch']}/{args.epochs}", **bar, disable=self.rank > 0
        ) as bar:
            for batch in self.loader:
                self.intact = False  # until the step is complete
                pinned = self.loader.pin_memory
                yield [to_unit(images.to(self.device, non_blocking=pinned)) for images in batch]
                self.intact = True
                images = len(batch[0]) * self.world_size
                for name, count in (("step", 1), ("batch", 1), ("images", images)):
                    progress[name] += count
                progress["seconds"] = time.monotonic() - started
                self.caught = max(gather(self.caught or 0)) or None
                if time.monotonic() - self.last_read > 0.5:
                    self.read_losses()
                    means = {n: v / progress["batch"] for n, v in progress["sums"].items()}
                    bar.set_postfix({name: f"{mean:.3f}" for name, mean in means.items()})
                bar.update(images)
                if not self.unfinished():
                    break
        self.read_losses()

    def log(self, losses):
        """Keeps a step's losses on the device until read_losses: no step waits for them."""
        self.names = list(losses)
        self.pending.append(torch.stack([loss.detach() for loss in losses.values()]))

    def read_losses(self):
        """Adds the steps' losses to the epoch's sums. UserError at the first that is not finite."""
        rows, sums = (
            torch.stack(self.pending).tolist() if self.pending else [],
            self.progress["sums"],
        )
        for step, row in enumerate(rows, self.progress["step"] - len(rows) + 1):
            named = dict(zip(self.names, row, strict=True))
            bad = [name for name, value in named.items() if not math.isfinite(value)]
            if bad:
                self.intact = False
                name = min(bad, key=lambda name: "total" in name)  # a term, before its total
                kept = f"{self.checkpoint} is kept; " if self.checkpoint.exists() else ""
                advice = "try a lower --lr or --precision fp32, and look for odd images"
                raise UserError(f"{name} is {named[name]} at step {step}; {kept}{advice}")
            sums.update({name: sums.get(name, 0.0) + value for name, value in named.items()})
        self.pending, self.last_read = [], time.monotonic()

    def end_epoch(self, rate, sample):
        """Samples, logs and saves where that is due.

        rate: the epoch's learning rate. sample(folder, epoch) writes grids and returns measures.
        """
        args, progress, epoch = self.args, self.progress, self.progress["epoch"]
        complete, limit = progress["batch"] == self.epoch_steps, progress["step"] == args.max_steps
        due = limit or (complete and ((epoch - 1) % args.sample_every == 0 or epoch == args.epochs))
        speed = progress["images"] / max(progress["seconds"], 1e-9)
        row = {"epoch": epoch, "seconds": round(progress["seconds"], 2)}
        row.update(images_per_second=round(speed, 2), learning_rate=rate)
        row.update({name: total / progress["batch"] for name, total in progress["sums"].items()})
        measures, rows = {}, [*progress["rows"], row]
        if self.rank == 0 and (due or complete):
            try:
                measures = sample(self.folder / "val", epoch) if due else {}
                row.update(measures)
                write_losses(rows, self.folder)
            except (UserError, OSError) as error:  # the training matters more than its images
                print(f"warning: {error}", file=sys.stderr)
        if complete:
            progress.update(epoch=epoch + 1, batch=0, images=0, seconds=0.0, sums={}, rows=rows)
        late = complete and time.monotonic() - self.saved > 600
        self.caught, late = map(max, zip(*gather((self.caught or 0, late)), strict=True))
        if args.save_model and (due or self.caught or late):
            self.save()
        if measures:
            values = ", ".join(f"{name} {value:.4f}" for name, value in measures.items())
            print(f"epoch {epoch}: {values}", flush=True)

    def save(self):
        """Writes the checkpoint: all of rank 0, the random states and buffers of the others."""
        self.read_losses()
        state = {name: part.state_dict() for name, part in self.nets.items()}
        own = {name: state[name] for name in state if name.startswith("buffer")}
        own, *others = gather({**own, "random": random_states(self.device)})
        if self.rank == 0:
            if not all(p.isfinite().all() for n in self.networks.values() for p in n.parameters()):
                raise UserError(
                    f"a weight is not finite at step {self.progress['step']}; not saved"
                )
            state.update(own, others=others, method=METHOD, args=vars(self.args))
            with replacing(self.checkpoint) as file:
                torch.save({**state, "progress": self.progress}, file)
        self.saved = time.monotonic()

    def load(self):
        """Restores what save wrote."""
        path, state, names = (
            self.checkpoint,
            read_checkpoint(self.checkpoint),
            self.progress["files"],
        )
        own = [{}, *state.get("others", ())]
        if len(own) != self.world_size:
            raise UserError(
                f"{path} is of {len(own)} processes: torchrun --nproc-per-node {len(own)}"
            )
        state.update(own[self.rank])
        for name, part in self.nets.items():
            load_part(part, state.get(name), path)
        try:
            for name, value in self.progress.items():
                if type(state["progress"][name]) is not type(value):
                    raise ValueError(f"progress has no {name}")
            random_states(self.device, state["random"])
        except Exception as error:  # damaged input may raise anything
            raise UserError(f"{path} does not fit: {error}") from None
        self.progress.update(state["progress"])
        if self.progress["files"] != names:
            print("the training images have changed: the interrupted epoch starts again")
            self.progress.update(files=names, batch=0, images=0, seconds=0.0, sums={})

    def say_how_it_ended(self):
        """Where things are, and the next command."""
        args, step = self.args, self.progress["step"]
        start = f"torchrun --nproc-per-node {self.world_size}" if self.world_size > 1 else "python"
        again = f"{start} {METHOD}/train.py --run-name {args.run_name} --resume"
        if self.rank == 0 and self.progress["epoch"] <= args.epochs:
            again = (
                f"to continue: {again}" if args.save_model else "without --save-model it is lost"
            )
            print(f"stopped after step {step}; {again}")
        elif self.rank == 0:
            print(f"done: {args.epochs} epochs, {step} steps; grids: {self.folder / 'val'}")
            use = f"python {METHOD}/translate.py --checkpoint {self.checkpoint}"
            print(f"use it: {use} --input IMAGES --output results" if args.save_model else "")
            print("compare runs: python visualize/gallery.py")


# --------------------------------------------------------------------------------------- messages


class Quiet:
    """Standard output or error, but silent once it is closed or full: no message ends a run."""

    def __init__(self, stream):
        self.stream = stream or open(os.devnull, "w")  # noqa: SIM115
        with suppress(AttributeError):
            self.stream.reconfigure(errors="replace")  # for terminals that are not UTF-8

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        with suppress(OSError, ValueError):
            self.stream.write(text)

    def flush(self):
        with suppress(OSError, ValueError):
            self.stream.flush()


def explain(error):
    """An error in one line, with a way out; None for a bug, which deserves its traceback."""
    text = str(error).strip() or type(error).__name__
    if any(words in text.lower() for words in ("bus error", "shared memory", "/dev/shm")):
        return "shared memory is full: use --num-workers 0, or docker run --shm-size 2g"
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "out of memory" in text.lower():
        return "out of memory: use a smaller --batch-size, --image-size or --ngf"
    if "DataLoader worker" in text and not isinstance(error, UserError):
        return f"a loading process ended: {text.splitlines()[0]}; --num-workers 0 needs none"
    if isinstance(error, UserError | OSError) or distributed.is_initialized():
        return text.splitlines()[-1].split("UserError: ")[-1]  # a loading process adds a traceback
    return None


def run_command(train, argv):
    """Parses the command line and trains. Returns the exit status; an error is said in one line."""
    sys.stdout, sys.stderr = Quiet(sys.stdout), Quiet(sys.stderr)
    args = parse_args(argv)
    try:
        caught = train(adopt_flags(args) if args.resume else args)
        return 128 + caught if caught else 0
    except KeyboardInterrupt:  # before the first step
        return 130
    except Exception as error:
        if explain(error) is None:
            raise
        print(f"train.py: error: {explain(error)}", file=sys.stderr)
        return 2
    finally:
        signal.signal(getattr(signal, "SIGCHLD", signal.SIGINT), signal.SIG_DFL)
        for process in multiprocessing.active_children():  # they ignore what usually ends them
            process.kill()
        if distributed.is_initialized():
            distributed.destroy_process_group()

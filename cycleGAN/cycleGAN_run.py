"""What every run needs: device, processes, files, checkpoint, losses, signals. train.py has the
method and enters this file between steps. The same in pix2pix, cycleGAN and CUT.
"""

import atexit
import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import zipfile
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import distributed
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.utils.data import DataLoader
from tqdm import tqdm

from cycleGAN_dataset import UserError, epoch_batches, to_unit
from cycleGAN_flags import parse_args

HERE = Path(__file__).resolve().parent
METHOD = HERE.name
RANK = int(os.environ.get("RANK", 0))  # this process's number among those of torchrun
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))
FREE = "data_root output_root run_name epochs max_steps num_workers device sample_every save_model"
FREE = (
    *FREE.split(),
    "resume",
    "overwrite",
    "compile",
    "precision",
)  # what a resumed run may change

# ------------------------------------------------------------------------------ device, processes


def pick_device(args):
    """The torch device of --device, set up for --precision. Joins the processes of torchrun."""
    found = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        device = found if args.device == "auto" else torch.device(args.device)
        if device.type == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", device.index or 0)))
        torch.zeros(1, device=device).tolist()
    except (RuntimeError, AssertionError) as error:
        message = f"--device {args.device}: {str(error).splitlines()[0]}"
        raise UserError(f"{message}; use auto, cpu, cuda, cuda:1 or mps") from None
    native = device.type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    native = torch.cuda.is_bf16_supported(False) if device.type == "cuda" else native
    if args.precision == "bf16" and not native:
        raise UserError("--precision bf16 is slower than fp32 on this device; use tf32 or fp32")
    torch.backends.cudnn.allow_tf32 = args.precision == "tf32"
    torch.backends.cudnn.benchmark = True
    if WORLD_SIZE > 1 and not distributed.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        # A day: the others wait while rank 0 samples. A process that has died is noticed at once.
        distributed.init_process_group(backend, timeout=timedelta(days=1))
    return device


def random_states(device, states=()):
    """The states of the random generators in use; first sets them to `states`, if given."""
    modules = [torch] if device.type == "cpu" else [torch, torch.get_device_module(device)]
    for module, state in zip(modules, states, strict=False):
        module.set_rng_state(state)
    return [module.get_rng_state() for module in modules]


def gather(value):
    """The values of all processes, as a list. Plain Python and CPU tensors, not GPU tensors."""
    values = [value] * WORLD_SIZE
    if WORLD_SIZE > 1:
        distributed.all_gather_object(values, value)
    return values


def average_gradients(parameters):
    """Replaces each gradient by its mean over all processes."""
    if WORLD_SIZE > 1:
        gradients = [p.grad for p in parameters]
        flat = parameters_to_vector(gradients)
        distributed.all_reduce(flat)
        vector_to_parameters(flat / WORLD_SIZE, gradients)


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


@contextmanager
def warn_of_errors():
    """Turns an error into a warning: the training matters more than its images and plots."""
    try:
        yield
    except Exception as error:
        tqdm.write(f"warning: {explain(error) or repr(error)}", file=sys.stderr)


def write_losses(rows, folder):
    """Writes losses.csv, one row per epoch, and plots its columns in losses.png."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [names, *([row.get(name, "") for name in names] for row in rows)]
    with replacing(folder / "losses.csv") as file:
        file.write("".join(",".join(map(str, line)) + "\n" for line in lines).encode())
    figure = Figure(figsize=(14, 3 * math.ceil(len(names[4:]) / 4)), layout="constrained")
    for index, name in enumerate(names[4:]):
        points = [(row["epoch"], row[name]) for row in rows if name in row]
        axes = figure.add_subplot(math.ceil(len(names[4:]) / 4), 4, index + 1, title=name)
        axes.plot(*zip(*points, strict=True), ".-", markersize=3)
    with replacing(folder / "losses.png") as file:
        figure.savefig(file, format="png")


def checkpoint_path(args):
    """Where the checkpoint of a run is."""
    return Path(args.output_root) / METHOD / "model" / args.run_name / "checkpoint.pt"


def read_checkpoint(path):
    """The dict that Run.save wrote, its flags checked. UserError if the file is something else."""
    try:
        with zipfile.ZipFile(path) as file:
            if file.testzip():  # compares checksums, which torch.load does not
                raise ValueError("the file is damaged: a checksum is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not (isinstance(state, dict) and isinstance(state.get("args"), dict)):
            raise ValueError("it contains weights, but is not a checkpoint")
        if (method := state.get("method")) != METHOD:
            raise ValueError(f"it is a checkpoint of {method}: use {method}/translate.py")
    except Exception as error:  # a foreign file may raise anything
        reason = "it contains Python objects" if "weights_only" in str(error) else one_line(error)
        hint = "expected what train.py --save-model or convert.py writes"
        raise UserError(f"cannot read {path}: {reason}; {hint}") from None
    prog = f"{Path(sys.argv[0]).name}: error: {path}"
    return {**state, "args": vars(parse_args([], prog, state["args"]))}


def load_part(part, state, path):
    """Loads a network, optimizer or buffer. UserError if `state` does not fit or is not finite."""
    try:
        part.load_state_dict(state)
        tensors = list(state.values()) if isinstance(part, torch.nn.Module) else []
        for weight, moments in getattr(part, "state", {}).items():  # of an optimizer
            tensors += moments.values()
            if any(moments[name].shape != weight.shape for name in ("exp_avg", "exp_avg_sq")):
                raise ValueError("the optimizer has moments of another shape")
        if not all(tensor.isfinite().all() for tensor in tensors):
            raise ValueError("its weights are not finite")
    except Exception as error:  # damaged input may raise anything
        raise UserError(f"{path} does not fit: {one_line(error)}") from None


def adopt_flags(args, argv):
    """The flags of a resumed run: the checkpoint's, except those typed now that may change."""
    path = checkpoint_path(args)
    if not path.exists() and args.save_model:
        if (path.parents[3] / "visualize" / METHOD / args.run_name / "losses.csv").exists():
            raise UserError(f"run {args.run_name} was not saved: --overwrite or another --run-name")
        print("no checkpoint yet: the run starts from the beginning")
        return args
    if not path.exists():
        runs = sorted(p.parent.name for p in path.parents[1].glob("*/checkpoint.pt"))
        raise UserError(f"no checkpoint {path}; --run-name can be: {', '.join(runs) or 'none yet'}")
    saved = {**read_checkpoint(path)["args"], "overwrite": False, "max_steps": 0}
    saved.update(run_name=args.run_name, output_root=args.output_root)
    args = parse_args(argv, saved=saved)
    for name, value in vars(args).items():
        if name not in FREE and value != saved[name]:
            flag = f"--{name.replace('_', '-')}"
            raise UserError(f"{flag} {value}: the run has {saved[name]}; leave {flag} out")
    if args.epochs > saved["epochs"]:
        print(f"{args.epochs} epochs instead of {saved['epochs']}: the learning rate rises again")
    return args


# -------------------------------------------------------------------------------------------- run

# At exit, Python would wait for ever for loading processes, which ignore SIGTERM. Without this
# process they end by themselves.
atexit.register(multiprocessing.process._children.clear)


def ignore_signals(_worker):
    """Has a loading process outlive a signal to the whole group, until the run has been saved."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(getattr(signal, "SIGHUP", signal.SIGTERM), signal.SIG_IGN)


class Run:
    """A run from start to end: its files, lock, signals, losses and checkpoint.

    progress, saved with the networks: the epoch, from 1; its batches, seconds and loss sums so far;
    steps in all; the rows of losses.csv; the names of the training images. intact: whether the
    networks are between two steps, so that they can be saved. caught: the number of a signal that
    any process has noted, or 0.
    """

    def __init__(self, args, nets, train_set, device):
        self.args, self.nets, self.train_set, self.device = args, nets, train_set, device
        self.networks = {n: net for n, net in nets.items() if isinstance(net, torch.nn.Module)}
        self.folder = Path(args.output_root) / "visualize" / METHOD / args.run_name
        self.checkpoint = checkpoint_path(args)
        self.progress = {"epoch": 1, "batch": 0, "step": 0, "seconds": 0.0, "sums": {}, "rows": []}
        self.progress["files"] = ["/".join(file.parts[-2:]) for file in train_set.files]
        self.noted, self.caught, self.intact, self.pending = 0, 0, True, []
        self.saved = self.last_read = time.monotonic()
        self.epoch_steps = math.ceil(len(train_set) // WORLD_SIZE / args.batch_size)
        self.order = []  # the epoch's batches; filled in place, since the loader holds this list
        options = {"num_workers": args.num_workers, "persistent_workers": args.num_workers > 0}
        options.update(worker_init_fn=ignore_signals, pin_memory=device.type == "cuda")
        options.update(generator=torch.Generator())  # it would use numbers of the training's
        self.loader = DataLoader(train_set, batch_sampler=self.order, **options)

    def __enter__(self):
        """Opens the run's files and resumes. From here on a signal stops the run between steps."""
        args, resumed = self.args, self.args.resume and self.checkpoint.exists()
        if RANK == 0:
            self.lock()
        else:  # rank 0 keeps the single-process seed
            torch.manual_seed(args.seed + RANK)
        if resumed:
            self.load()
        elif args.init_from:
            state = read_checkpoint(Path(args.init_from))
            for name, net in self.networks.items():  # an average starts from the weights
                if found := state.get(name) or state.get(name.removesuffix("_ema")):
                    load_part(net, found, args.init_from)
        facts = [(n, v) for n, v in vars(args).items() if n not in FREE]
        facts += [(file.name, file.stat().st_size) for file in self.train_set.files]
        if any(other != facts for other in gather(facts)):
            raise UserError("the processes have different flags or different training images")
        for name in {"SIGINT", "SIGTERM", "SIGHUP"} & set(dir(signal)):
            if signal.getsignal(getattr(signal, name)) != signal.SIG_IGN:  # nohup ignores SIGHUP
                signal.signal(getattr(signal, name), self.catch)
        if args.save_model and not resumed:
            self.save()  # if this fails, nothing has been deleted
        if RANK == 0:
            self.begin()
        self.first_step = self.progress["step"]
        total = min(args.epochs * self.epoch_steps, args.max_steps or math.inf)
        self.bar = tqdm(total=total, initial=self.first_step, unit="step", disable=RANK > 0)
        return self

    def lock(self):
        """Makes the run's folder this process's own. UserError if another run is there."""
        name, folder = self.args.run_name, self.folder
        (folder / "val").mkdir(parents=True, exist_ok=True)
        with suppress(ImportError):  # Windows has no fcntl: there, two processes can share a run
            import fcntl

            self.locked = open(folder / ".lock", "w")  # noqa: SIM115 (until the process ends)
            try:
                fcntl.lockf(self.locked, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                raise UserError(f"run {name} is in progress in another process") from None
            except OSError:  # a file system without locks
                pass
        exists = (folder / "args.json").exists() or self.checkpoint.exists()
        if exists and not (self.args.resume or self.args.overwrite):
            ways = "--resume continues it, --overwrite deletes it, another --run-name keeps it"
            raise UserError(f"run {name} exists in {folder}: {ways}")

    def begin(self):
        """Deletes what an earlier run left, writes args.json and says what will run."""
        args, folder = self.args, self.folder
        old = [*folder.rglob(".*.tmp"), *self.checkpoint.parent.glob(".*.tmp")]
        if args.overwrite:
            old += [*folder.glob("val/[xy]*[0-9].png"), *folder.glob("losses.*")]
            old += [] if args.save_model else [self.checkpoint]
        for file in old:
            file.unlink(missing_ok=True)
        git = f"git -C '{HERE}' describe --always --dirty --abbrev=40 --exclude='*'"
        status, commit = subprocess.getstatusoutput(git)
        facts = {"method": METHOD, **vars(args), "device_used": str(self.device)}
        facts.update(torch=torch.__version__, commit=None if status else commit)
        with replacing(folder / "args.json") as file:
            file.write(json.dumps(facts, indent=2).encode() + b"\n")
        print(f"{METHOD}: {args.data_folder}, {len(self.train_set)} images, {self.device}")
        if not args.save_model:
            print("the networks will not be saved: --save-model saves them")

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
        shape = (len(self.train_set), args.batch_size, args.seed, progress["epoch"])
        self.order[:] = epoch_batches(*shape, RANK, WORLD_SIZE)[progress["batch"] :]
        self.bar.set_description(f"epoch {progress['epoch']}/{args.epochs}")
        batches = iter(self.loader)
        if hasattr(signal, "SIGCHLD"):  # else torch reports a dead loading process within a step
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for batch in batches:
            self.intact, pinned = False, self.loader.pin_memory  # not intact within a step
            yield [to_unit(images.to(self.device, non_blocking=pinned)) for images in batch]
            self.intact = True
            progress.update(batch=progress["batch"] + 1, step=progress["step"] + 1)
            progress["seconds"] = time.monotonic() - started
            self.bar.update()
            if progress["step"] == self.first_step + 20 and RANK == 0:
                left = (self.bar.total - self.bar.n) * progress["seconds"] / progress["batch"]
                tqdm.write(f"time left for the whole run: {timedelta(seconds=round(left))}")
            self.caught = max(gather(self.noted))
            if time.monotonic() - self.last_read > 0.5:
                self.read_losses()
                means = {n: f"{v / progress['batch']:.3f}" for n, v in progress["sums"].items()}
                self.bar.set_postfix(means)
            if not self.unfinished():
                break
        self.read_losses()

    def log(self, losses):
        """Keeps a step's losses on the device until read_losses: no step waits for them."""
        self.names = list(losses)
        self.pending.append(torch.stack([loss.detach() for loss in losses.values()]))

    def read_losses(self):
        """Adds the steps' losses to the epoch's sums. UserError at the first that is not finite."""
        rows, sums = [tensor.tolist() for tensor in self.pending], self.progress["sums"]
        self.pending, self.last_read = [], time.monotonic()
        for step, row in enumerate(rows, self.progress["step"] - len(rows) + 1):
            bad = [pair for pair in zip(self.names, row, strict=True) if not math.isfinite(pair[1])]
            if bad:
                self.intact = False
                kept = f"{self.checkpoint} is kept; " if self.checkpoint.exists() else ""
                advice = "try a lower --lr or --precision fp32, and look for odd images"
                name, value = bad[-1]  # a term; totals come first
                raise UserError(f"{name} is {value} at step {step}; {kept}{advice}")
            for name, value in zip(self.names, row, strict=True):
                sums[name] = sums.get(name, 0.0) + value

    def end_epoch(self, rate, sample):
        """Samples, logs and saves where that is due.

        rate: the epoch's learning rate. sample(folder, epoch) writes grids and returns measures.
        """
        args, progress, epoch = self.args, self.progress, self.progress["epoch"]
        complete, limit = progress["batch"] == self.epoch_steps, progress["step"] == args.max_steps
        due = limit or (complete and ((epoch - 1) % args.sample_every == 0 or epoch == args.epochs))
        images = min(progress["batch"] * args.batch_size * WORLD_SIZE, len(self.train_set))
        speed = round(images / max(progress["seconds"], 1e-9), 2)
        row = {"epoch": epoch, "seconds": round(progress["seconds"], 2), "images_per_second": speed}
        row["learning_rate"] = rate
        row.update({name: total / progress["batch"] for name, total in progress["sums"].items()})
        rows, measures = [*progress["rows"], row], {}
        if complete:
            progress.update(epoch=epoch + 1, batch=0, seconds=0.0, sums={}, rows=rows)
        if RANK == 0 and due:
            states = random_states(self.device)
            with warn_of_errors():
                measures = sample(self.folder / "val", epoch)
                row.update(measures)
            random_states(self.device, states)  # how often it samples does not change a training
        if RANK == 0 and (due or complete):
            with warn_of_errors():
                write_losses(rows, self.folder)
        late = complete and time.monotonic() - self.saved > 600
        self.caught, late = map(max, zip(*gather((self.noted, late)), strict=True))
        if args.save_model and (due or self.caught or late):
            self.save()
        if measures:
            text = ", ".join(f"{name} {value:.4f}" for name, value in measures.items())
            tqdm.write(f"epoch {epoch}: {text}")

    def save(self):
        """Writes the checkpoint: all of rank 0, the random states and buffers of each process."""
        self.read_losses()
        state = {name: part.state_dict() for name, part in self.nets.items()}
        own = {name: state[name] for name in state if name.startswith("buffer")}
        ranks = gather({**own, "random": random_states(self.device)})
        if not all(p.isfinite().all() for n in self.networks.values() for p in n.parameters()):
            raise UserError(f"a weight is not finite after step {self.progress['step']}; not saved")
        if RANK == 0:
            state.update(method=METHOD, args=vars(self.args), ranks=ranks, progress=self.progress)
            with replacing(self.checkpoint) as file:
                torch.save(state, file)
        self.saved = time.monotonic()

    def load(self):
        """Restores what save wrote. UserError if it does not fit."""
        path, state, progress = self.checkpoint, read_checkpoint(self.checkpoint), self.progress
        try:
            if "ranks" not in state:
                raise ValueError("an earlier version wrote it: use --init-from")
            ranks, found, files = state["ranks"], state["progress"], progress["files"]
            if len(ranks) != WORLD_SIZE:
                raise ValueError(f"needs torchrun --nproc-per-node {len(ranks)}")
            for name, part in self.nets.items():
                load_part(part, {**state, **ranks[RANK]}.get(name), path)
            random_states(self.device, ranks[RANK]["random"])
            values = [v for row in (*found["rows"], found["sums"]) for v in row.values()]
            types = [type(found[name]) is type(value) for name, value in progress.items()]
            values = all(isinstance(value, int | float) for value in values)
            counts = found["epoch"] > 0 <= found["step"] and found["batch"] >= 0
            inside = found["batch"] < self.epoch_steps or found["files"] != files
            if not (all(types) and values and counts and inside):
                raise ValueError("its progress is damaged")
        except Exception as error:  # damaged input may raise anything
            raise UserError(f"{path} does not fit: {one_line(error)}") from None
        progress.update(found)
        if progress["files"] != files:
            print("the training images have changed: the interrupted epoch starts again")
            progress.update(files=files, batch=0, seconds=0.0, sums={})

    def catch(self, number, _frame):
        """Notes a signal; another one, a second later, ends the process. No output: the streams may
        be closed. A closing terminal sends two signals at once.
        """
        if self.noted and time.monotonic() - self.noted_at > 1:
            os._exit(128 + number)
        if not self.noted:
            self.noted, self.noted_at = number, time.monotonic()

    def __exit__(self, kind, error, _trace):
        """After an error between two steps, saves what it would lose; else says what comes next."""
        args, step = self.args, self.progress["step"]
        self.bar.close()
        if self.loader._iterator:  # an error's traceback would keep its processes
            self.loader._iterator._shutdown_workers()
        if isinstance(error, Exception) and self.intact and args.save_model and WORLD_SIZE == 1:
            with suppress(UserError):
                self.save()
                print(f"saved after step {step}: --resume continues", file=sys.stderr)
        elif error is None and RANK == 0:
            start = f"torchrun --nproc-per-node {WORLD_SIZE}" if WORLD_SIZE > 1 else "python"
            command = f"to continue: {start} {METHOD}/train.py --run-name {args.run_name} --resume"
            if args.output_root != str(HERE.parent):
                command += f" --output-root {args.output_root}"
            if self.progress["epoch"] > args.epochs:
                use = f"--checkpoint {self.checkpoint} --input IMAGES --output results"
                command = f"to translate: python {METHOD}/translate.py {use}"
            print(f"ended after step {step}; grids: {self.folder / 'val'}")
            print("to compare runs: python visualize/gallery.py")
            print(command if args.save_model else "--save-model would have saved the networks")


# --------------------------------------------------------------------------------------- messages


class Quiet:
    """Standard output or error, but silent once it is closed or full: no message ends a run."""

    def __init__(self, stream):
        self.stream = stream or open(os.devnull, "w")  # noqa: SIM115

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        with suppress(OSError, ValueError):
            self.stream.write(text)

    def flush(self):
        with suppress(OSError, ValueError):
            self.stream.flush()


def one_line(error):
    """The line of an error's text that says most: the last one, which torch indents."""
    return (str(error).strip() or type(error).__name__).splitlines()[-1].strip()


def explain(error):
    """An error in one line, with a way out; None for a bug, which deserves its traceback."""
    text = str(error).lower()
    if any(words in text for words in ("bus error", "shared memory", "/dev/shm")):
        return "shared memory is full: use --num-workers 0, or docker run --shm-size 2g"
    if isinstance(error, MemoryError) or "out of memory" in text:
        return "out of memory: use a smaller --batch-size, --image-size or --ngf"
    if "dataloader worker (pid" in text:
        return "a loading process ended unexpectedly; --num-workers 0 needs none"
    if isinstance(error, UserError | OSError) or distributed.is_initialized():
        return one_line(error).split("UserError: ")[-1]  # a loading process adds a traceback
    return None


def run_command(train, argv):
    """Parses the command line and trains. Returns the exit status; an error is said in one line."""
    sys.stdout, sys.stderr = Quiet(sys.stdout), Quiet(sys.stderr)
    args = parse_args(argv)
    try:
        caught = train(adopt_flags(args, argv) if args.resume else args)
        return 128 + caught if caught else 0
    except KeyboardInterrupt:  # before the first step
        return 130
    except Exception as error:
        if explain(error) is None:
            raise
        print(f"train.py: error: {explain(error)}", file=sys.stderr)
        return 2
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()

"""What a run needs from the computer: device, processes, files, checkpoints, messages. The same in
pix2pix, cycleGAN and CUT. translate.py uses it too.
"""

import atexit
import math
import multiprocessing
import os
import signal
import sys
import zipfile
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import distributed
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from tqdm import tqdm

from cycleGAN_dataset import UserError
from cycleGAN_flags import parse_args

METHOD = Path(__file__).stem.removesuffix("_system")
RANK = int(os.environ.get("RANK", 0))  # this process's number among those of torchrun
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))
SIGNALS = [getattr(signal, n) for n in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, n)]
# What a resumed run may change.
FREE = {"data_root", "output_root", "run_name", "epochs", "max_steps", "num_workers", "device"}
FREE |= {"sample_every", "save_model", "resume", "overwrite", "compile", "precision"}

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
    mkldnn = torch.backends.mkldnn.is_available()  # not on Macs: the operator is missing there
    native = device.type != "cpu" or (mkldnn and torch.ops.mkldnn._is_mkldnn_bf16_supported())
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
        if module is torch or len(state) == len(module.get_rng_state()):  # else: of another device
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


# At exit, Python would wait forever for loader workers, which ignore SIGTERM. They exit by
# themselves once this process is gone.
atexit.register(multiprocessing.process._children.clear)


def ignore_signals(_worker):
    """Lets a loader worker survive a signal to the whole group, until the run has been saved."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


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
    # RuntimeError: torch.save on a full disk. ValueError: an image too large for its format.
    except (OSError, RuntimeError, ValueError) as error:
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


def lock(folder):
    """Locks a run's folder until this process ends. UserError if another process has locked it."""
    file = open(folder / ".lock", "w")  # noqa: SIM115 (until the process ends)
    with suppress(ImportError, OSError):  # Windows has no fcntl, some file systems have no locks
        import fcntl

        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            message = f"run {folder.name} is in progress in another process"
            raise UserError(message) from None
    return file


def find_checkpoint(path):
    """path, or if it is a run's folder, that run's checkpoint. UserError if there is none."""
    file = path.resolve()
    if not path.is_file() and file.parent.parent.name == "visualize":  # <method>/<run-name>
        file = file.parents[2] / file.parent.name / "model" / file.name / "checkpoint.pt"
    elif path.is_dir():
        file = file / "checkpoint.pt"
    if not file.exists():
        runs = sorted(p.parent.name for p in file.parent.parent.glob("*/checkpoint.pt"))
        raise UserError(f"no checkpoint {file}; runs that have one: {', '.join(runs) or 'none'}")
    return file


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
            raise ValueError(f"it is a checkpoint of {method}, not of {METHOD}")
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


def folders(args):
    """A run's folder of grids and losses, and its checkpoint."""
    root, run = Path(args.output_root), args.run_name
    return root / "visualize" / METHOD / run, root / METHOD / "model" / run / "checkpoint.pt"


def adopt_flags(args, argv):
    """The flags of a resumed run: the checkpoint's, except those typed now that may change."""
    folder, path = folders(args)
    if not path.exists() and (folder / "losses.csv").exists():
        raise UserError(f"run {args.run_name} has no checkpoint: --overwrite or a new --run-name")
    if not path.exists() and args.save_model:
        print("no checkpoint yet: the run starts from the beginning")
        return args
    saved = read_checkpoint(find_checkpoint(path))["args"]
    saved.update(run_name=args.run_name, output_root=args.output_root, overwrite=False, max_steps=0)
    args = parse_args(argv, saved=saved)
    for name, value in vars(args).items():
        if name not in FREE and value != saved[name]:
            flag = f"--{name.replace('_', '-')}"
            raise UserError(f"{flag} {value}: the run has {saved[name]}; leave {flag} out")
    if args.epochs != saved["epochs"]:
        print(f"{args.epochs} epochs instead of {saved['epochs']}: the learning rate adapts")
    return args


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
    """The most informative line of an error's text: the last one."""
    return (str(error).strip() or type(error).__name__).splitlines()[-1].strip()


def explain(error):
    """An error in one line, with a way out; None for a bug, which deserves its traceback."""
    text = str(error).lower()
    if any(words in text for words in ("bus error", "shared memory", "/dev/shm")):
        return "shared memory is full: use --num-workers 0, or docker run --shm-size 2g"
    if isinstance(error, MemoryError) or "out of memory" in text:
        return "out of memory: use a smaller --batch-size, --image-size or --ngf"
    if "dataloader worker (pid" in text:
        return "a data loader worker died; --num-workers 0 loads without workers"
    known = any(word in text for word in ("gloo", "nccl", "decompression bomb"))
    if isinstance(error, UserError | OSError) or known:
        return one_line(error).split("UserError: ")[-1]  # a loader worker adds a traceback
    return None

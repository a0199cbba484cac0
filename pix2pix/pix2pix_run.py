"""A run from start to end: files, signals, losses, checkpoint. train.py has the method and enters
this file between steps. The same in pix2pix, cycleGAN and CUT.
"""

import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed
from torch.utils.data import DataLoader
from tqdm import tqdm

import pix2pix_system as system
from pix2pix_dataset import UserError, epoch_batches, to_unit
from pix2pix_flags import ROOT, parse_args
from pix2pix_system import METHOD, RANK, WORLD_SIZE


def run_command(train, argv):
    """Parses the command line and trains. Returns the exit status. Errors print as one line."""
    sys.stdout, sys.stderr = system.Quiet(sys.stdout), system.Quiet(sys.stderr)
    args = parse_args(argv)
    try:
        caught = train(system.adopt_flags(args, argv) if args.resume else args)
        return 128 + caught if caught else 0
    except KeyboardInterrupt:  # before the first step
        return 130
    except Exception as error:
        if (message := system.explain(error)) is None:
            raise
        print(f"train.py: error: {message}", file=sys.stderr)
        return 2
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()


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
        self.folder, self.checkpoint = system.folders(args)
        self.progress = {"epoch": 1, "batch": 0, "step": 0, "seconds": 0.0, "sums": {}, "rows": []}
        self.progress["files"] = ["/".join(file.parts[-2:]) for file in train_set.files]
        self.noted, self.caught, self.intact, self.pending = 0, 0, True, []
        self.saved = self.last_read = time.monotonic()
        self.epoch_steps = math.ceil(len(train_set) // WORLD_SIZE / args.batch_size)
        if not self.epoch_steps:
            raise UserError(f"{len(train_set)} images are too few for {WORLD_SIZE} processes")
        self.order = []  # the epoch's batches; filled in place, since the loader holds this list
        options = {"num_workers": args.num_workers, "persistent_workers": args.num_workers > 0}
        options.update(worker_init_fn=system.ignore_signals, pin_memory=device.type == "cuda")
        options.update(generator=torch.Generator())  # it would use numbers of the training's
        self.loader = DataLoader(train_set, batch_sampler=self.order, **options)

    def __enter__(self):
        """Opens the run's files and resumes. From here on a signal stops the run between steps."""
        args, resumed = self.args, self.args.resume and self.checkpoint.exists()
        if RANK == 0:
            self.open_folder()
        else:  # rank 0 keeps the single-process seed
            torch.manual_seed(args.seed + RANK)
        if resumed:
            self.load()
        elif args.init_from:
            path = system.find_checkpoint(Path(args.init_from))
            state = system.read_checkpoint(path)
            for name, net in self.networks.items():  # an average starts from the weights
                if found := state.get(name) or state.get(name.removesuffix("_ema")):
                    system.load_part(net, found, path)
        facts = [(n, v) for n, v in vars(args).items() if n not in system.FREE]
        facts += [self.progress["step"]]
        facts += [(file.name, file.stat().st_size) for file in self.train_set.files]
        if any(other != facts for other in system.gather(facts)):
            raise UserError("the processes have different flags, checkpoints or training images")
        for number in system.SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
                signal.signal(number, self.catch)
        if args.save_model and not resumed:
            self.save()  # if this fails, nothing has been deleted
        if RANK == 0:
            self.begin()
        self.first_step = self.progress["step"]
        total = min(args.epochs * self.epoch_steps, args.max_steps or math.inf)
        self.bar = tqdm(total=total, initial=self.first_step, unit="step", disable=RANK > 0)
        return self

    def open_folder(self):
        """Creates and locks the run's folder. UserError if another run is there."""
        args, folder = self.args, self.folder
        (folder / "val").mkdir(parents=True, exist_ok=True)
        self.locked = system.lock(folder)
        exists = (folder / "args.json").exists() or self.checkpoint.exists()
        if exists and not (args.resume or args.overwrite):
            ways = "--resume continues it, " if self.checkpoint.exists() else ""
            ways += "--overwrite deletes it, another --run-name keeps it"
            raise UserError(f"run {args.run_name} exists in {folder}: {ways}")

    def begin(self):
        """Deletes what an earlier run left, writes args.json and says what will run."""
        args, folder = self.args, self.folder
        old = [*folder.rglob(".*.tmp"), *self.checkpoint.parent.glob(".*.tmp")]
        if args.overwrite:
            old += [*folder.glob("val/[xy]*[0-9].png"), *folder.glob("losses.*")]
            old += [] if args.save_model else [self.checkpoint]
        for file in old:
            file.unlink(missing_ok=True)
        git = f"git -C '{ROOT}' describe --always --dirty --abbrev=40 --exclude='*'"
        status, commit = subprocess.getstatusoutput(git)
        facts = {"method": METHOD, **vars(args), "device_used": str(self.device)}
        facts.update(torch=torch.__version__, commit=None if status else commit)
        with system.replacing(folder / "args.json") as file:
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
        if hasattr(signal, "SIGCHLD"):  # torch's handler of dead workers would raise within a step
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for batch in batches:
            self.intact, pinned = False, self.loader.pin_memory  # not intact within a step
            yield [to_unit(images.to(self.device, non_blocking=pinned)) for images in batch]
            self.intact, progress["seconds"] = True, time.monotonic() - started
            progress.update(batch=progress["batch"] + 1, step=progress["step"] + 1)
            self.bar.update()
            if progress["step"] == self.first_step + 50 and RANK == 0:
                left = (self.bar.total - self.bar.n) * progress["seconds"] / progress["batch"]
                tqdm.write(f"time left for the whole run: {timedelta(seconds=round(left))}")
            self.caught = max(system.gather(self.noted))
            if time.monotonic() - self.last_read > 0.5:
                self.read_losses()
                means = {n: f"{v / progress['batch']:.3f}" for n, v in progress["sums"].items()}
                self.bar.set_postfix(means)
            if not self.unfinished():
                break
        self.read_losses()
        progress["seconds"] = time.monotonic() - started  # read_losses has waited for the device

    def log(self, losses):
        """Keeps a step's losses on the device until read_losses: no step waits for them."""
        self.names = list(losses)
        self.pending.append(torch.stack(list(losses.values())).detach())

    def read_losses(self):
        """Adds the steps' losses to the epoch's sums. UserError at the first that is not finite."""
        rows, sums = [tensor.tolist() for tensor in self.pending], self.progress["sums"]
        self.pending, self.last_read = [], time.monotonic()
        for step, row in enumerate(rows, self.progress["step"] - len(rows) + 1):
            losses = dict(zip(self.names, row, strict=True))
            bad = [name for name, value in losses.items() if not math.isfinite(value)]
            if bad:  # totals come first: the last one is a term
                self.intact = False
                safe = f"{self.checkpoint} is kept; " if self.checkpoint.exists() else ""
                advice = "try a lower --lr or --precision fp32, and look for odd images"
                raise UserError(f"{bad[-1]} is {losses[bad[-1]]} at step {step}; {safe}{advice}")
            sums.update({name: sums.get(name, 0.0) + losses[name] for name in losses})

    def row(self, rate):
        """The epoch's row of losses.csv: what it took, and the mean of each loss."""
        progress, seconds = self.progress, self.progress["seconds"]
        images = min(progress["batch"] * self.args.batch_size * WORLD_SIZE, len(self.train_set))
        row = {"epoch": progress["epoch"], "seconds": round(seconds, 2)}
        row.update(images_per_second=round(images / max(seconds, 1e-9), 2), learning_rate=rate)
        return {**row, **{name: v / progress["batch"] for name, v in progress["sums"].items()}}

    def end_epoch(self, rate, sample):
        """Samples, logs and saves where due. sample(folder, epoch): writes grids, returns means."""
        args, progress, epoch = self.args, self.progress, self.progress["epoch"]
        complete, limit = progress["batch"] == self.epoch_steps, progress["step"] == args.max_steps
        due = limit or (complete and ((epoch - 1) % args.sample_every == 0 or epoch == args.epochs))
        if args.save_model and due:  # before sampling, so that a kill there costs no training
            self.save()
        row, measures = self.row(rate), {}
        rows = [*progress["rows"], row]
        if complete:
            progress.update(epoch=epoch + 1, batch=0, seconds=0.0, sums={}, rows=rows)
        if RANK == 0 and due:
            states = system.random_states(self.device)
            with system.warn_of_errors():
                measures = sample(self.folder / "val", epoch)
                row.update(measures)
            system.random_states(self.device, states)  # sampling does not change a training
        if RANK == 0 and (due or complete):
            with system.warn_of_errors():
                system.write_losses(rows, self.folder)
        late = complete and time.monotonic() - self.saved > 600
        self.caught, late = map(max, zip(*system.gather((self.noted, late)), strict=True))
        if args.save_model and (due or self.caught or late):
            self.save()
        if measures:
            means = ", ".join(f"{name} {value:.4f}" for name, value in measures.items())
            tqdm.write(f"epoch {epoch}: {means}")

    def save(self):
        """Writes the checkpoint: all of rank 0, the random states and buffers of each process."""
        self.read_losses()
        state = {name: part.state_dict() for name, part in self.nets.items()}
        buffers = {name: state[name] for name in state if name.startswith("buffer")}
        ranks = system.gather({**buffers, "random": system.random_states(self.device)})
        if not all(p.isfinite().all() for n in self.networks.values() for p in n.parameters()):
            raise UserError(f"a weight is not finite after step {self.progress['step']}; not saved")
        if RANK == 0:
            state.update(method=METHOD, args=vars(self.args), ranks=ranks, progress=self.progress)
            with system.replacing(self.checkpoint) as file:
                torch.save(state, file)
        self.saved = time.monotonic()

    def load(self):
        """Restores what save wrote. UserError if it does not fit."""
        path, progress = self.checkpoint, self.progress
        state = system.read_checkpoint(path)
        try:
            if "ranks" not in state:
                raise ValueError("an earlier version wrote it: use --init-from")
            ranks, found, files = state["ranks"], state["progress"], progress["files"]
            if len(ranks) != WORLD_SIZE:
                raise ValueError(f"needs torchrun --nproc-per-node {len(ranks)}")
            for name, part in self.nets.items():
                system.load_part(part, {**state, **ranks[RANK]}.get(name), path)
            system.random_states(self.device, ranks[RANK]["random"])
            types = [type(found[name]) is type(value) for name, value in progress.items()]
            counts = found["epoch"] >= 1 and found["step"] >= 0 and found["batch"] >= 0
            inside = found["batch"] <= self.epoch_steps or found["files"] != files
            for row in (*found["rows"], found["sums"]):
                sum(row.values())  # raises an error unless all are numbers
            if not (all(types) and counts and inside):
                raise ValueError("its progress is damaged")
        except Exception as error:  # damaged input may raise anything
            raise UserError(f"{path} does not fit: {system.one_line(error)}") from None
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
        """After an error between two steps, saves the run; otherwise prints what to do next."""
        args, step = self.args, self.progress["step"]
        self.bar.close()
        if self.loader._iterator:  # an error's traceback would keep its processes
            self.loader._iterator._shutdown_workers()
        if args.save_model and isinstance(error, Exception) and self.intact and WORLD_SIZE == 1:
            with suppress(UserError):
                self.save()
                print(f"saved after step {step}: --resume continues", file=sys.stderr)
        elif error is None and RANK == 0:
            print(f"ended after step {step}; grids: {self.folder / 'val'}")
            place, model = (shlex.quote(str(p)) for p in (self.folder.parents[1], self.checkpoint))
            print(f"to compare runs: python visualize/gallery.py --root {place}")
            if not args.save_model:
                print("--save-model would have saved the networks")
            elif self.progress["epoch"] > args.epochs:
                use = f"--checkpoint {model} --input IMAGES --output results"
                print(f"to translate: python {METHOD}/translate.py {use}")
            else:
                start = f"torchrun --nproc-per-node {WORLD_SIZE}" if WORLD_SIZE > 1 else "python"
                words = [f"{METHOD}/train.py", "--run-name", args.run_name, "--resume"]
                words += ["--output-root", args.output_root] * (args.output_root != str(ROOT))
                print(f"to continue: {start} {shlex.join(words)}")

"""What the three train.py promise alike: exact resume, safe files, plain errors, grids, flags."""

import csv
import errno
import io
import itertools
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import (
    METHODS,
    ROOT,
    draw_no_curves,
    load_script,
    redirect,
    run_module,
    write_pairs,
    write_unpaired,
)

# How a method's pictures are made, and the flags that make its networks small.
NETS = ["--ngf", "4", "--ndf", "4"]
SMALL = {
    "pix2pix": (write_pairs, NETS),
    "cycleGAN": (write_unpaired, [*NETS, "--n-layers", "1", "--buffer-size", "3"]),
    "CUT": (write_unpaired, [*NETS, "--n-layers", "5", "--num-patches", "16"]),
}
# Epochs of two steps, of 4 and of 2 pictures; grids and a checkpoint after each.
FOUR_EPOCHS = ["--epochs", "4", "--batch-size", "4", "--sample-every", "1", "--save-model"]


class Run:
    """Small runs of one method's train.py below `root`, by default called "run"."""

    def __init__(self, method, module, root, **data):
        self.method, self.module, self.root = method, module, root
        write, self.flags = SMALL[method]
        write(root, "data", **data)
        (root / method).mkdir(exist_ok=True)  # stands for the folder that train.py lies in
        self.folder = root / "visualize" / method / "run"
        self.checkpoint = root / method / "model" / "run" / "checkpoint.pt"

    def argv(self, *flags):
        data = ["--data-root", str(self.root), "--data-folder", "data", "--run-name", "run"]
        sizes = ["--image-size", "32", "--load-size", "36", "--num-workers", "0"]
        sizes += ["--precision", "fp32"]
        return [*data, *sizes, "--device", "cpu", *self.flags, *flags]

    def __call__(self, *flags):
        """The exit status."""
        try:
            return self.module.main(self.argv(*flags))
        except SystemExit as ended:
            return ended.code

    def state(self):
        return torch.load(self.checkpoint, weights_only=True)

    def rows(self):
        with open(self.folder / "losses.csv", newline="") as file:
            return list(csv.DictReader(file))

    def training_files(self):
        return sorted(self.root.glob("data/train/**/*.png"))

    def test_files(self):
        """The pictures that hold x of the test set."""
        x = self.root / "data" / "test" / ("" if self.method == "pix2pix" else "x")
        return sorted(x.iterdir())

    def traces(self):
        """All that the way a run came about must not change, that is, all but times and flags."""
        state = self.state()
        del state["args"], state["progress"]["seconds"]
        times = {"seconds", "images_per_second"}
        rows = [{k: v for k, v in row.items() if k not in times} for row in self.rows()]
        grids = {file.name: file.read_bytes() for file in self.folder.glob("val/*.png")}
        return {"checkpoint": state, "losses.csv": rows, "val": grids}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Two threads slow networks this small down, more so on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=METHODS)
def method(request):
    return request.param


@pytest.fixture
def run(method, script, tmp_path, monkeypatch):
    module = script(method)
    draw_no_curves(monkeypatch, method)
    monkeypatch.setattr(run_module(method), "bf16_gain", lambda _: 2.0)  # whatever it is here
    return Run(method, module, tmp_path)


@pytest.fixture(scope="module")
def straight(method, tmp_path_factory):
    """The traces of four epochs that nothing interrupts."""
    root, module = tmp_path_factory.mktemp(method), load_script(method)
    with pytest.MonkeyPatch.context() as patch:
        redirect(patch, method, root)
        draw_no_curves(patch, method)
        run = Run(method, module, root)
        assert run(*FOUR_EPOCHS) == 0
        traces = run.traces()
    assert traces["checkpoint"]["progress"]["step"] == 8
    return traces


def assert_same(found, wanted, where=""):
    """found equals wanted, tensors bit for bit; names the place where it does not."""
    assert type(found) is type(wanted), where
    if isinstance(wanted, dict):
        assert list(found) == list(wanted), where
        for key in wanted:
            assert_same(found[key], wanted[key], f"{where}/{key}")
    elif isinstance(wanted, list | tuple):
        assert len(found) == len(wanted), where
        for index, value in enumerate(wanted):
            assert_same(found[index], value, f"{where}/{index}")
    elif isinstance(wanted, torch.Tensor):
        assert found.dtype == wanted.dtype and torch.equal(found, wanted), where
    else:
        assert found == wanted, where


def same_weights(one, other):
    """Whether the networks in two checkpoints are equal."""
    names = [name for name in one if name.split("_")[0] in ("G", "F", "D", "H")]
    pairs = [(one[n][key], other[n][key]) for n in names for key in one[n]]
    assert len(pairs) > 10
    return all(torch.equal(a, b) for a, b in pairs)


def as_shown(text):
    """The lines of text as a terminal shows them, where a carriage return writes over a line."""
    lines = []
    for line in text.split("\n"):
        shown = ""
        for part in line.split("\r"):
            shown = part + shown[len(part) :]
        lines.append(shown.rstrip())
    return lines


def error_line(capsys):
    """The one error line of a run that has just failed. Fails where there is more or less."""
    shown = capsys.readouterr()
    assert "Traceback" not in shown.err + shown.out
    *bars, line, end = as_shown(shown.err)
    assert end == ""  # the line is ended
    assert line.startswith("train.py: error: "), repr(line)  # not glued to a progress bar
    assert all("img/s" in bar for bar in bars if bar), bars
    return line.removeprefix("train.py: error: ")


def at_step(run, monkeypatch, step, act):
    """Has act(losses) called after training step `step`; what it returns replaces the losses."""
    training_step, done = run.module.training_step, []

    def watched(nets, *rest):
        losses = training_step(nets, *rest)
        done.append(1)
        return (act(losses) or losses) if len(done) == step else losses

    monkeypatch.setattr(run.module, "training_step", watched)
    return done


# ---------------------------------------------------------------------------------- exact resume


@pytest.mark.parametrize("step, workers", [(3, "00"), (3, "20"), (5, "02"), (4, "00")])
def test_stopped_and_resumed_equals_never_stopped(run, straight, step, workers):
    """Steps 3 and 5 are in the middle of epochs 2 and 3, step 4 is the last of epoch 2."""
    first, second = workers
    assert run(*FOUR_EPOCHS, "--max-steps", str(step), "--num-workers", first) == 0
    assert run.state()["progress"]["step"] == step
    assert run.module.main(["--run-name", "run", "--resume", "--num-workers", second]) == 0
    assert_same(run.traces(), straight)


def test_stopped_at_every_step_equals_never_stopped(run, straight):
    for step in range(1, 9):
        go_on = ["--resume"] if step > 1 else FOUR_EPOCHS
        assert run(*go_on, "--max-steps", str(step)) == 0
        assert run.state()["progress"]["step"] == step
    assert_same(run.traces(), straight)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_batches_of_one_resume_in_the_middle_too(run, precision):
    flags = ["--epochs", "2", "--save-model", "--sample-every", "1", "--precision", precision]
    assert run(*flags) == 0
    wanted = run.traces()
    assert run(*flags, "--overwrite", "--max-steps", "8") == 0
    assert run("--resume", "--precision", precision) == 0
    assert_same(run.traces(), wanted)


def test_sampling_does_not_change_the_training(run, straight):
    """Grids after every epoch or only after the first and the last: the same weights."""
    assert run(*FOUR_EPOCHS, "--sample-every", "100") == 0
    assert_same(run.state()["random"], straight["checkpoint"]["random"])
    assert same_weights(run.state(), straight["checkpoint"])


def test_every_epoch_draws_order_and_crops_anew(run, monkeypatch):
    seen, training_step = [], run.module.training_step

    def watched(nets, x, *rest):
        seen.append(x)
        return training_step(nets, x, *rest)

    monkeypatch.setattr(run.module, "training_step", watched)
    assert run(*FOUR_EPOCHS) == 0
    epochs = [torch.cat(seen[first : first + 2]) for first in range(0, 8, 2)]
    assert [len(epoch) for epoch in epochs] == [6] * 4
    for one, other in itertools.combinations(epochs, 2):
        assert not torch.equal(one, other)  # nor is it the same in another order
        assert not torch.equal(one.sum((1, 2, 3)).sort()[0], other.sum((1, 2, 3)).sort()[0])


def test_the_seed_changes_weights_order_and_crops(run, monkeypatch):
    def first_epoch(*flags):
        """The weights at the start, and the pictures x in the order in which they come."""
        seen, training_step = [], run.module.training_step

        def watched(nets, x, *rest):
            weights = [p.detach().clone() for p in nets["G"].parameters()]
            seen.append((weights, x))
            return training_step(nets, x, *rest)

        with monkeypatch.context() as patch:
            patch.setattr(run.module, "training_step", watched)
            assert run("--epochs", "1", "--batch-size", "4", "--overwrite", *flags) == 0
        return seen[0][0], torch.cat([x for _, x in seen])

    weights, pictures = first_epoch("--no-jitter", "--no-flip")
    again, same_pictures = first_epoch("--no-jitter", "--no-flip")
    assert all(torch.equal(p, q) for p, q in zip(weights, again, strict=True))
    assert torch.equal(pictures, same_pictures)
    other, in_another_order = first_epoch("--no-jitter", "--no-flip", "--seed", "1")
    kernels = [(p, q) for p, q in zip(weights, other, strict=True) if p.dim() == 4]
    assert kernels and not any(torch.equal(p, q) for p, q in kernels)
    assert not torch.equal(pictures, in_another_order)

    def sums(seed):  # of each picture, whatever their order
        return first_epoch("--seed", seed)[1].sum((1, 2, 3)).sort()[0]

    assert not torch.allclose(sums("0"), sums("1"))


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_how_to_go_on(run, straight, monkeypatch, capsys, signum):
    before = signal.getsignal(signum)
    at_step(run, monkeypatch, 3, lambda _: os.kill(os.getpid(), signum))
    assert run(*FOUR_EPOCHS) == 128 + signum
    assert run.state()["progress"]["step"] == 3
    shown = capsys.readouterr().out.splitlines()[-1]
    assert "step 3" in shown
    assert f"python {run.method}/train.py --run-name run --resume" in shown
    assert signal.getsignal(signum) is before
    assert run("--resume") == 0
    assert_same(run.traces(), straight)


def test_without_save_model_a_signal_says_that_nothing_is_kept(run, monkeypatch, capsys):
    at_step(run, monkeypatch, 1, lambda _: os.kill(os.getpid(), signal.SIGTERM))
    assert run("--epochs", "4") == 143
    assert "without --save-model nothing is kept" in capsys.readouterr().out
    assert not run.checkpoint.exists()


def test_a_second_signal_ends_at_once(run, monkeypatch):
    def twice(_):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    done = at_step(run, monkeypatch, 1, twice)
    assert run(*FOUR_EPOCHS) == 130
    assert len(done) <= 1
    assert not run.checkpoint.exists()


def copy_method(run):
    """Copies the method's folder, and nothing else, below run.root."""
    leave = shutil.ignore_patterns("model", "__pycache__")
    shutil.copytree(ROOT / run.method, run.root / run.method, ignore=leave, dirs_exist_ok=True)
    return run.root / run.method / "train.py"


def environment():
    """This one with as many threads as the runs in this process, so that sums are the same."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def test_folder_copied_out_alone_trains_and_stops_cleanly(run, tmp_path):
    """The real command, from another folder, until SIGTERM; then on, equal to one never stopped."""
    script, elsewhere = copy_method(run), tmp_path / "elsewhere"
    elsewhere.mkdir()
    flags = ["--epochs", "10000", "--batch-size", "4", "--save-model"]
    command = [sys.executable, script, *run.argv(*flags, "--num-workers", "2")]
    pipes = {"text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(
        command, cwd=elsewhere, env=environment(), start_new_session=True, **pipes
    ) as process:
        deadline = time.monotonic() + 120
        while not (run.folder / "losses.csv").exists() and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGTERM)  # its loading processes get it, too
        out, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    assert "Traceback" not in err
    step = run.state()["progress"]["step"]
    assert f"stopped after step {step}; to go on: " in out
    assert list(elsewhere.iterdir()) == []
    assert run("--resume", "--max-steps", str(step + 2)) == 0
    resumed = run.state()
    assert resumed["progress"]["step"] == step + 2
    assert run(*flags, "--overwrite", "--max-steps", str(step + 2)) == 0
    assert_same(resumed["random"], run.state()["random"])
    assert same_weights(resumed, run.state())


# Runs a copied train.py in child processes, which it kills: in the middle of a save, then at any
# moment. argv: the folder of train.py, the flags of the first run, as JSON.
KILLER = """
import io, json, os, random, signal, sys, time
sys.path.insert(0, sys.argv[1])
import torch, train
sys.modules[train.append_losses.__module__].plot_losses = lambda *_: None
flags, save, saves = json.loads(sys.argv[2]), torch.save, 0
checkpoint = train.run_paths(train.parse_args(flags))[1]

def save_half(state, file):
    global saves
    saves += 1
    if saves < 3:
        return save(state, file)
    whole = io.BytesIO()
    save(state, whole)
    file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)

def child(flags):
    pid = os.fork()
    if pid == 0:
        os._exit(train.main(flags))
    return pid

torch.save = save_half
status = os.waitpid(child(flags), 0)[1]
assert os.WTERMSIG(status) == signal.SIGKILL, status
step = torch.load(checkpoint, weights_only=True)["progress"]["step"]
print("in the middle of the third save:", step, os.listdir(checkpoint.parent))
torch.save = save
for delay in [random.uniform(0, 0.3) for _ in range(5)]:
    pid = child([*flags, "--resume"])
    time.sleep(delay)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
"""


def test_killed_at_any_moment_and_resumed_equals_never_stopped(run, straight):
    folder = copy_method(run).parent
    command = [sys.executable, "-c", KILLER, folder, json.dumps(run.argv(*FOUR_EPOCHS))]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (told,) = [line for line in done.stdout.splitlines() if line.startswith("in the middle")]
    assert told.startswith("in the middle of the third save: 4 ")  # the second is whole
    assert "checkpoint.tmp" in told
    assert run("--resume") == 0
    assert_same(run.traces(), straight)
    assert [f.name for f in run.checkpoint.parent.iterdir()] == ["checkpoint.pt"]


# --------------------------------------------------------------------- what --resume takes, or not


@pytest.fixture
def stopped(run):
    """A run that has done one step of four epochs."""
    assert run(*FOUR_EPOCHS, "--max-steps", "1") == 0
    return run


def test_flags_that_differ_from_the_checkpoints_are_named(stopped, capsys):
    whole = stopped.checkpoint.read_bytes()
    capsys.readouterr()
    assert stopped("--resume", "--lr", "0.1", "--batch-size", "2", "--no-flip") == 2
    error = error_line(capsys)
    for flag in ("--lr", "0.1", "--batch-size", "2", "4", "flip"):
        assert flag in error
    assert "--image-size" not in error and "--num-workers" not in error
    assert stopped.checkpoint.read_bytes() == whole


def test_a_default_typed_against_the_checkpoint_is_named_too(run, capsys):
    assert run(*FOUR_EPOCHS, "--lr", "1e-3", "--max-steps", "1") == 0
    capsys.readouterr()
    assert run("--resume", "--lr", "2e-4") == 2
    assert "--lr" in error_line(capsys)


def test_more_epochs_may_be_asked_for(stopped):
    assert stopped("--resume", "--epochs", "5") == 0
    assert [row["epoch"] for row in stopped.rows()] == ["1", "2", "3", "4", "5"]
    assert stopped.state()["progress"]["step"] == 10


def test_a_complete_run_stays_as_it_is(run, capsys):
    flags = ["--epochs", "1", "--save-model"]
    assert run(*flags) == 0
    wanted = run.traces()
    assert run("--resume") == 0
    assert "done" in capsys.readouterr().out.splitlines()[-1]
    assert_same(run.traces(), wanted)


def test_max_steps_counts_from_the_start_of_the_run(run):
    assert run(*FOUR_EPOCHS, "--max-steps", "3") == 0
    assert run("--resume", "--max-steps", "2") == 0  # done already
    assert run.state()["progress"]["step"] == 3


def test_resume_without_a_checkpoint(run, capsys):
    assert run("--resume") == 2
    error = error_line(capsys)
    assert str(run.checkpoint) in error and "--save-model" in error
    assert not run.folder.exists()


@pytest.mark.parametrize("damage", ["cut off", "garbage", "empty", "another file", "no networks"])
def test_a_damaged_checkpoint(stopped, capsys, damage):
    whole, other, part = stopped.checkpoint.read_bytes(), io.BytesIO(), io.BytesIO()
    torch.save([1, 2], other)
    torch.save({"method": stopped.method}, part)
    bad = {"cut off": whole[: len(whole) // 2], "garbage": os.urandom(1000), "empty": b""}
    bad.update({"another file": other.getvalue(), "no networks": part.getvalue()})
    stopped.checkpoint.write_bytes(bad[damage])
    capsys.readouterr()
    assert stopped("--resume") == 2
    error = error_line(capsys)
    assert str(stopped.checkpoint) in error and "damaged" in error and "--overwrite" in error


class Trap:
    """Makes a file where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_checkpoint_runs_no_code(stopped, tmp_path, capsys):
    torch.save({**stopped.state(), "trap": Trap(tmp_path / "trapped")}, stopped.checkpoint)
    capsys.readouterr()
    assert stopped("--resume") == 2
    assert str(stopped.checkpoint) in error_line(capsys)
    assert not (tmp_path / "trapped").exists()


@pytest.mark.parametrize("part", ["G", "optimizer_G"])
def test_a_checkpoint_of_other_networks(stopped, capsys, part):
    """As from another version of the code: a part is missing, or it has other weights."""
    whole = stopped.state()
    missing = {name: value for name, value in whole.items() if name != part}
    if part == "G":
        other = {name: weight[:1] for name, weight in whole["G"].items()}
    else:
        group = {**whole[part]["param_groups"][0], "params": [0]}
        other = {**whole[part], "param_groups": [group]}
    for state in (missing, {**whole, part: other}):
        torch.save(state, stopped.checkpoint)
        capsys.readouterr()
        assert stopped("--resume") == 2
        error = error_line(capsys)
        assert str(stopped.checkpoint) in error and "--overwrite" in error


def test_a_checkpoint_of_another_method(stopped, capsys):
    torch.save({**stopped.state(), "method": "pix3pix"}, stopped.checkpoint)
    capsys.readouterr()
    assert stopped("--resume") == 2
    error = error_line(capsys)
    assert str(stopped.checkpoint) in error and "pix3pix" in error and stopped.method in error


def test_another_number_of_training_pictures(stopped, capsys):
    stopped.training_files()[0].unlink()
    capsys.readouterr()
    assert stopped("--resume") == 2
    assert "training set has changed" in error_line(capsys)


# ------------------------------------------------------------------------ what does not get saved


class FullDisk:
    """No file may grow beyond `size` bytes meanwhile."""

    def __init__(self, size):
        self.size = size

    def __enter__(self):
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.before[1]))

    def __exit__(self, *_):
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_a_full_disk_leaves_the_last_checkpoint(stopped, capsys, share):
    whole = stopped.checkpoint.read_bytes()
    capsys.readouterr()
    with FullDisk(int(share * len(whole))):
        assert stopped("--resume", "--max-steps", "3") == 2
    error = error_line(capsys)
    assert f"cannot write {stopped.checkpoint}" in error
    assert stopped.checkpoint.read_bytes() == whole
    assert [f.name for f in stopped.checkpoint.parent.iterdir()] == ["checkpoint.pt"]
    assert stopped("--resume") == 0  # once there is room


def test_a_full_disk_leaves_the_last_losses(stopped):
    table = stopped.folder / "losses.csv"
    whole, rows = table.read_bytes(), stopped.rows()
    with FullDisk(len(whole)), pytest.raises(stopped.module.RunError, match="cannot write"):
        run_module(stopped.method).write_rows(stopped.folder, rows * 2)
    assert table.read_bytes() == whole
    assert not list(stopped.folder.glob("*.tmp"))


def test_a_disk_that_becomes_read_only_leaves_the_last_checkpoint(stopped, monkeypatch, capsys):
    whole, replace = stopped.checkpoint.read_bytes(), os.replace

    def refuse(source, target):
        if Path(target).suffix == ".pt":
            raise OSError(errno.EROFS, "Read-only file system", str(target))
        replace(source, target)

    capsys.readouterr()
    monkeypatch.setattr(os, "replace", refuse)
    assert stopped("--resume") == 2
    assert "Read-only file system" in error_line(capsys)
    assert stopped.checkpoint.read_bytes() == whole
    assert [f.name for f in stopped.checkpoint.parent.iterdir()] == ["checkpoint.pt"]


def test_folders_that_cannot_be_made(run, capsys):
    (run.root / "visualize").write_text("a file where the folder belongs")
    assert run("--epochs", "1") == 2
    assert str(run.root / "visualize") in error_line(capsys)


def test_a_loss_that_is_not_finite_ends_the_run(run, monkeypatch, capsys):
    """Step 3 is the first of epoch 2, so the checkpoint is the one of epoch 1."""
    at_step(run, monkeypatch, 3, lambda losses: {n: v * torch.nan for n, v in losses.items()})
    assert run(*FOUR_EPOCHS) == 2
    error = error_line(capsys)
    assert "step 3" in error and "nan" in error
    terms = list(run.rows()[0])[4:]
    assert any(f"{name} is nan" in error for name in terms)
    assert run.state()["progress"]["step"] == 2
    assert [row["epoch"] for row in run.rows()] == ["1"]


def test_the_first_step_that_is_not_finite_is_named_however_late_it_is_read(
    run, monkeypatch, capsys
):
    at_step(run, monkeypatch, 2, lambda losses: {n: v / 0.0 for n, v in losses.items()})
    assert run("--epochs", "1", "--batch-size", "1") == 2  # read after the epoch's six steps
    error = error_line(capsys)
    assert "step 2" in error and "inf" in error


def test_weights_that_are_not_finite_are_not_saved(run, monkeypatch, capsys):
    """The loss is read before the step that spoils the weights: none of it is odd yet."""
    training_step, done = run.module.training_step, []

    def spoiled(nets, *rest):
        losses = training_step(nets, *rest)
        done.append(1)
        if len(done) == 4:
            with torch.no_grad():
                next(nets["G"].parameters()).fill_(torch.inf)
        return losses

    monkeypatch.setattr(run.module, "training_step", spoiled)
    assert run(*FOUR_EPOCHS) == 2
    assert "not finite" in error_line(capsys)
    assert run.state()["progress"]["step"] == 2


# --------------------------------------------------------------------------------- files of a run


def test_what_a_run_leaves(method, script, tmp_path):
    run = Run(method, script(method), tmp_path, test=10)
    flags = ["--epochs", "4", "--sample-every", "2", "--batch-size", "4", "--save-model"]
    assert run(*flags) == 0

    # Grids after epochs 1, 3 and the last, of the first eight test pictures, pixel for pixel.
    grids = {f.name for f in run.folder.glob("val/*.png")}
    assert {name for name in grids if name.startswith("x") and "_" not in name} == {
        "x1.png",
        "x3.png",
        "x4.png",
    }
    assert {"y_G1.png", "y_G3.png", "y_G4.png"} <= grids
    assert not {name for name in grids if "2" in name}
    x = np.asarray(Image.open(run.folder / "val" / "x1.png"))
    assert x.shape == (36, 2 + 8 * 34, 3)
    for index, file in enumerate(run.test_files()[:8]):
        right = np.asarray(Image.open(file))[:, -32:]
        assert (x[2:34, 2 + 34 * index : 34 + 34 * index] == right).all()
    for later in ("x3.png", "x4.png"):
        assert (run.folder / "val" / later).read_bytes() == (
            run.folder / "val" / "x1.png"
        ).read_bytes()
    fakes = [(run.folder / "val" / f"y_G{epoch}.png").read_bytes() for epoch in (1, 3, 4)]
    assert len(set(fakes)) == 3

    # One row an epoch.
    rows = run.rows()
    assert [row["epoch"] for row in rows] == ["1", "2", "3", "4"]
    assert list(rows[0])[:4] == ["epoch", "seconds", "images_per_second", "learning_rate"]
    assert len(rows[0]) > 6
    assert all(math.isfinite(float(value)) for row in rows for value in row.values() if value)
    assert all(float(row["seconds"]) >= 0 and float(row["images_per_second"]) > 0 for row in rows)
    rates = [float(row["learning_rate"]) for row in rows]
    assert rates == pytest.approx([2e-4, 2e-4, 2e-4 * 2 / 3, 2e-4 / 3])
    optimizers = [part for name, part in run.state().items() if name.startswith("optimizer")]
    assert optimizers
    for optimizer in optimizers:
        assert optimizer["param_groups"][0]["lr"] == pytest.approx(2e-4 / 3)

    with Image.open(run.folder / "losses.png") as curves:
        curves.load()
        assert curves.width > 500 and len(curves.getcolors(1 << 24)) > 10

    facts = json.loads((run.folder / "args.json").read_text())
    typed = vars(run.module.parse_args(run.argv(*flags)))
    assert {name: facts[name] for name in typed} == typed
    assert facts["torch"] == torch.__version__
    assert facts["device_used"] == "cpu"
    assert "commit" in facts
    assert sorted(f.name for f in run.folder.iterdir()) == [
        "args.json",
        "losses.csv",
        "losses.png",
        "val",
    ]


def test_losses_are_means_over_the_epochs_steps(run, monkeypatch):
    seen, training_step = [], run.module.training_step

    def watched(*args):
        seen.append(training_step(*args))
        return seen[-1]

    monkeypatch.setattr(run.module, "training_step", watched)
    assert run(*FOUR_EPOCHS) == 0
    for row, first in zip(run.rows(), range(0, 8, 2), strict=True):
        for name in seen[0]:
            mean = (seen[first][name] + seen[first + 1][name]).item() / 2
            assert float(row[name]) == pytest.approx(mean, rel=1e-6), name


def test_commit_is_that_of_the_code(method):
    """In a clone, the commit; outside git None, which test_what_a_run_leaves allows."""
    done = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    found = run_module(method).git_commit()
    assert (found or "").removesuffix("-dirty") == done.stdout.strip()


def test_fewer_than_eight_test_pictures(run):
    assert run("--epochs", "1") == 0
    assert Image.open(run.folder / "val" / "x1.png").size == (2 + 3 * 34, 36)


def test_nothing_is_saved_without_save_model(run, capsys):
    assert run("--epochs", "2", "--max-steps", "1") == 0
    assert not run.checkpoint.parent.exists()
    assert "without --save-model nothing is kept" in capsys.readouterr().out


def snapshot(folder):
    return {f: f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def test_a_second_run_of_the_same_name_is_refused(run, capsys):
    assert run("--epochs", "1", "--save-model") == 0
    before = snapshot(run.root)
    for flags in ([], ["--save-model"], ["--seed", "1"]):
        capsys.readouterr()
        assert run("--epochs", "1", *flags) == 2
        error = error_line(capsys)
        assert all(way in error for way in ("--resume", "--run-name", "--overwrite"))
        assert snapshot(run.root) == before
    shutil.rmtree(run.folder)  # a checkpoint alone is a run, too
    assert run("--epochs", "1", "--save-model") == 2
    assert run("--epochs", "1", "--run-name", "other") == 0


def test_overwrite_starts_anew_and_leaves_foreign_files(run):
    assert run(*FOUR_EPOCHS) == 0
    wanted = run.traces()
    foreign = [run.folder / "notes.txt", run.folder / "val" / "best.txt"]
    for file in foreign:
        file.write_text("mine")
    assert run("--epochs", "2", "--save-model", "--overwrite") == 0
    assert [row["epoch"] for row in run.rows()] == ["1", "2"]
    assert not (run.folder / "val" / "x3.png").exists()
    assert [file.read_text() for file in foreign] == ["mine", "mine"]
    assert run(*FOUR_EPOCHS, "--overwrite") == 0
    assert_same(run.traces(), wanted)
    assert run("--epochs", "1", "--overwrite") == 0  # its checkpoint would not belong to this run
    assert not run.checkpoint.exists()


# ------------------------------------------------------------------------------------------ flags

BAD_FLAGS = [
    ("--batch-size", "0"),
    ("--batch-size", "two"),
    ("--epochs", "-1"),
    ("--epochs", "0"),
    ("--image-size", "-32"),
    ("--load-size", "31"),
    ("--num-workers", "-1"),
    ("--lr", "0"),
    ("--lr", "nan"),
    ("--lr", "inf"),
    ("--ngf", "0"),
    ("--seed", "-1"),
    ("--sample-every", "0"),
    ("--max-steps", "0"),
    ("--precision", "fp16"),
    ("--precision", "tf32"),
    ("--device", "nonsense"),
    ("--device", "cuda:99"),
    ("--device", "meta"),
    ("--device", ""),
    ("--run-name", "../x"),
    ("--run-name", "a/b"),
    ("--run-name", ".."),
    ("--resume", "--overwrite"),
    ("--no-such-flag",),
    ("--epoch", "3"),
    ("--data-folder",),
    ("surplus",),
]


@pytest.mark.parametrize("flags", BAD_FLAGS, ids=" ".join)
def test_bad_flags(run, capsys, flags):
    assert run(*flags) == 2
    error = error_line(capsys)
    assert flags[0].lstrip("-").replace("-", "_") in error.replace("-", "_")
    assert len(error) < 400
    assert not (run.root / "visualize").exists()
    assert not run.checkpoint.exists()


def test_cuda_where_there_is_none(run, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if torch.cuda.device_count():
        pytest.skip("there is one")
    assert run("--device", "cuda") == 2
    error = error_line(capsys)
    assert "--device cuda" in error and "cpu" in error and len(error) < 400


def test_the_run_is_called_after_its_data(run):
    assert run("--max-steps", "1", "--run-name", "") == 0
    assert (run.folder.parent / "data" / "args.json").exists()


@pytest.mark.parametrize("unnamed", [".", "/"])
def test_data_that_have_no_name_need_one_for_the_run(run, capsys, unnamed):
    """Else the run's files would lie among the folders of all the others."""
    assert run("--data-folder", unnamed, "--run-name", "") == 2
    assert "--run-name" in error_line(capsys)


def test_every_flag_says_what_it_does(method, capsys):
    with pytest.raises(SystemExit) as ended:
        load_script(method).parse_args(["--help"])
    assert ended.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for flag in (
        *("data-folder", "data-root", "run-name", "epochs", "batch-size", "num-workers"),
        *("load-size", "image-size", "jitter", "no-jitter", "flip", "no-flip", "swap-xy"),
        *("ngf", "ndf", "lr", "seed", "sample-every", "save-model", "resume", "overwrite"),
        *("device", "precision", "compile", "max-steps"),
    ):
        assert f"--{flag}" in shown
    parser_flags = vars(load_script(method).parse_args([]))
    assert shown.count("[") >= len(parser_flags) - 2  # each help ends with its default


WITHOUT_TORCH = """
import runpy, sys
script = sys.argv[1]
for name in ("torch", "torchvision", "numpy", "PIL", "matplotlib", "tqdm"):
    sys.modules[name] = None  # importing it raises ImportError
for flag, status in (("--help", 0), ("--epochs=-1", 2), ("--epoch=3", 2)):
    sys.argv = ["train.py", flag]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as ended:
        assert ended.code == status, (flag, ended.code)
    else:
        raise AssertionError(flag)
"""


def test_help_and_mistyped_flags_do_not_wait_for_torch(method):
    command = [sys.executable, "-c", WITHOUT_TORCH, ROOT / method / "train.py"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "--data-folder" in done.stdout
    lines = done.stderr.splitlines()
    assert len(lines) == 2
    assert all(line.startswith("train.py: error: ") for line in lines)


# ------------------------------------------------------------------------------------------- data


def test_a_data_folder_that_is_not_there(run, capsys):
    (run.root / "facades").mkdir()
    assert run("--data-folder", "facade") == 2
    error = error_line(capsys)
    assert str(run.root / "facade") in error and "did you mean facades?" in error
    assert "python datasets/make_toy.py" in error and "python datasets/download.py" in error
    assert run("--data-root", str(run.root / "nowhere")) == 2
    assert str(run.root / "nowhere") in error_line(capsys)
    assert not run.folder.exists()


def test_a_data_folder_without_pictures(run, capsys):
    for file in run.training_files():
        file.unlink()
    assert run() == 2
    error = error_line(capsys)
    assert str(run.root / "data") in error and "train" in error and "expected" in error
    assert "python datasets/" in error  # the command that mends it
    shutil.rmtree(run.root / "data")
    (run.root / "data").mkdir()
    assert run() == 2
    assert "nothing" in error_line(capsys)


def test_a_data_folder_laid_out_for_something_else(run, capsys):
    """The other methods' layout, and pictures without a folder of their own."""
    other = write_unpaired if run.method == "pix2pix" else write_pairs
    other(run.root, "other")
    (run.root / "loose").mkdir()
    for file in run.training_files():
        shutil.copy(file, run.root / "loose")
    for name in ("other", "loose"):
        assert run("--data-folder", name) == 2
        error = error_line(capsys)
        assert str(run.root / name) in error
        found = "train" if name == "other" else "000.png"
        assert found in error and "expected" in error
        assert "python datasets/" in error


def test_no_test_pictures(run, capsys):
    shutil.rmtree(run.root / "data" / "test")
    assert run() == 2
    error = error_line(capsys)
    assert "expected" in error and "test" in error


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_cut_off_picture_found_while_training(run, capsys, workers):
    bad = run.training_files()[2]
    bad.write_bytes(bad.read_bytes()[:-100])
    assert run("--epochs", "1", "--num-workers", workers) == 2
    error = error_line(capsys)
    assert str(bad) in error and error.startswith("cannot read the image")


def test_the_script_ends_where_a_loading_process_meets_a_cut_off_picture(run):
    """Ends: it does not wait for the other loading processes for ever."""
    bad = run.training_files()[2]
    bad.write_bytes(bad.read_bytes()[:-100])
    command = [sys.executable, copy_method(run), *run.argv("--num-workers", "2")]
    with subprocess.Popen(
        command, start_new_session=True, stderr=subprocess.PIPE, text=True, env=environment()
    ) as process:
        try:
            assert process.wait(timeout=60) == 2
        finally:
            os.killpg(process.pid, signal.SIGKILL) if process.returncode is None else None
        error = process.stderr.read()
    assert "Traceback" not in error
    assert str(bad) in error.rpartition("train.py: error: ")[2]


def test_a_cut_off_picture_found_while_sampling(run, capsys):
    bad = run.test_files()[1]
    bad.write_bytes(bad.read_bytes()[:-100])
    assert run("--epochs", "1", "--batch-size", "4") == 2
    assert str(bad) in error_line(capsys)


def test_an_epoch_whose_sampling_failed_is_not_lost(run, straight):
    bad = run.test_files()[1]
    whole = bad.read_bytes()
    bad.write_bytes(whole[:-100])
    assert run(*FOUR_EPOCHS) == 2
    assert run.state()["progress"]["step"] == 2
    bad.write_bytes(whole)
    assert run("--resume") == 0
    assert same_weights(run.state(), straight["checkpoint"])
    assert [row["epoch"] for row in run.rows()] == ["1", "2", "3", "4"]


# ------------------------------------------------------------------------- --precision, --compile


def test_bf16_trains_and_keeps_its_weights_in_fp32(run, straight):
    assert run(*FOUR_EPOCHS, "--precision", "bf16") == 0
    state = run.state()
    assert not same_weights(state, straight["checkpoint"])  # it did something
    tensors = [t for part in state.values() if isinstance(part, dict) for t in part.values()]
    tensors = [t for t in tensors if isinstance(t, torch.Tensor) and t.is_floating_point()]
    assert len(tensors) > 10
    assert {t.dtype for t in tensors} == {torch.float32}
    mine, other = run.rows()[0], straight["losses.csv"][0]
    losses = [name for name in list(other)[3:] if not name.startswith("luminance")]
    assert len(losses) >= 6
    for name in losses:  # close to fp32 at first; then they drift apart
        assert float(mine[name]) == pytest.approx(float(other[name]), rel=0.1, abs=0.05)


def test_networks_return_fp32_under_bf16(run, monkeypatch):
    """Losses are sums over many values, for which bf16 has too few digits."""
    build, dtypes = run.module.build, []

    def note(_net, _inputs, output):
        if isinstance(output, list):
            return  # CUT's features: H makes fp32 of them
        dtypes.append((output[0] if isinstance(output, tuple) else output).dtype)

    def hooked(*args):
        nets = build(*args)
        for _, net in run_module(run.method).networks(nets):
            net.register_forward_hook(note)
        return nets

    monkeypatch.setattr(run.module, "build", hooked)
    assert run("--precision", "bf16", "--max-steps", "1") == 0
    assert len(dtypes) >= 3 and set(dtypes) == {torch.float32}


def test_compiled_networks_do_and_save_the_same(run, monkeypatch):
    """Traced as for --compile, but then run by torch itself: the compiler proper takes a minute."""
    graphs, compile_ = [], torch.nn.Module.compile

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    flags = ["--max-steps", "1", "--save-model"]
    assert run(*flags) == 0
    wanted = run.traces()
    monkeypatch.setattr(torch.nn.Module, "compile", lambda net: compile_(net, backend=backend))
    assert run(*flags, "--overwrite", "--compile") == 0
    assert len(graphs) >= 2
    assert_same(run.traces(), wanted)

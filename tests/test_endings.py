"""Every way a run can end keeps what it has done: signals, kills, errors, closed streams, locks."""

import functools
import multiprocessing
import os
import random
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch

from conftest import FOUR_EPOCHS, ROOT, assert_same, error_line, exit_status, one_method, patch_run

SELDOM = [*FOUR_EPOCHS, "--sample-every", "100"]  # checkpoints after steps 2 and 8 alone


def command(run, *flags, python=sys.executable):
    return [python, ROOT / run.method / "train.py", *run.argv(*flags)]


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_saves_and_says_how_to_continue(run, straight, at_step, capsys, name):
    number = getattr(signal, name)
    at_step(3, lambda *_: os.kill(os.getpid(), number))
    assert run(*FOUR_EPOCHS) == 128 + number
    assert run.state()["progress"]["step"] == 3
    words = f"{run.method}/train.py --run-name run --resume --output-root {run.root}"
    assert f"to continue: python {words}\n" in capsys.readouterr().out
    assert run.resume() == 0
    assert_same(run.traces(), straight)


@one_method
def test_a_hangup_that_nohup_ignores_changes_nothing(run, straight, at_step):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    at_step(3, lambda *_: os.kill(os.getpid(), signal.SIGHUP))
    assert run(*FOUR_EPOCHS) == 0
    assert_same(run.traces(), straight)


@one_method
def test_a_second_signal_ends_at_once(run, at_step):
    def twice(*_):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGHUP)  # as a closing terminal does: at once, so not a second
        time.sleep(1.1)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(30)

    at_step(3, twice)
    started = time.monotonic()
    assert exit_status(run.fork(*FOUR_EPOCHS)) == 130
    assert time.monotonic() - started < 20
    assert run.state()["progress"]["step"] == 2


@one_method
def test_the_command_survives_tee_and_a_signal_to_its_whole_group(run):
    """As `train.py 2>&1 | tee log` and Ctrl-C: tee dies first; loader workers get it, too."""
    flags = [*SELDOM, "--epochs", "10000", "--num-workers", "2"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(command(run, *flags), start_new_session=True, **pipes) as process:
        wait_for(lambda: (run.folder / "losses.csv").exists() and len(run.rows()) > 1)
        process.stdout.close()
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(60) == 130
    step = run.state()["progress"]["step"]
    assert step >= 4
    assert run.resume("--max-steps", str(step + 1), "--num-workers", "0") == 0
    resumed = run.state()
    assert run(*flags, "--num-workers", "0", "--overwrite", "--max-steps", str(step + 1)) == 0
    assert_same(resumed["G"], run.state()["G"])


@one_method
@pytest.mark.parametrize("redirection", [">&- 2>&-", "> /dev/full 2>&1", "2>&1 | head -c 100"])
def test_closed_and_full_streams_do_not_end_a_run(run, straight, redirection, warm_python):
    words = map(str, command(run, *FOUR_EPOCHS, python=warm_python))
    script = f"set -o pipefail; {shlex.join(words)} {redirection}"
    done = subprocess.run(["bash", "-c", script], check=False, timeout=120)
    assert done.returncode == 0
    assert_same(run.traces(), straight)


def test_killed_while_saving_and_at_any_moment_resumes_exactly(run, straight):
    saves = []

    def half_of_the_third():
        def save(state, file):
            saves.append(1)
            torch.serialization.save(state, file)
            if len(saves) == 3:
                file.truncate(file.tell() // 2)
                file.flush()
                os.kill(os.getpid(), signal.SIGKILL)

        torch.save = save  # in the child process

    assert exit_status(run.fork(*FOUR_EPOCHS, prepare=half_of_the_third)) == -signal.SIGKILL
    assert run.state()["progress"]["step"] == 2
    assert [f for f in run.checkpoint.parent.iterdir() if f.suffix == ".tmp"]
    for _ in range(2):
        pid = run.fork(resume=True)
        time.sleep(random.uniform(0, 0.6))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert run.resume() == 0
    assert_same(run.traces(), straight)
    assert [f.name for f in run.checkpoint.parent.iterdir()] == ["checkpoint.pt"]


@one_method
def test_killed_while_sampling_samples_again(run, straight):
    def prepare():  # in the child process
        run.module.sample = lambda *_: os.kill(os.getpid(), signal.SIGKILL)

    assert exit_status(run.fork(*FOUR_EPOCHS, prepare=prepare)) == -signal.SIGKILL
    assert run.state()["progress"]["step"] == 2 and not any((run.folder / "val").iterdir())
    assert run.resume("--num-workers", "2") == 0
    assert_same(run.traces(), straight)


@one_method
def test_one_run_one_process_until_it_is_killed(run, capsys, at_step):
    at_step(2, lambda *_: time.sleep(60))
    pid = run.fork(*FOUR_EPOCHS)
    wait_for(run.checkpoint.exists)
    for flags in (["--resume"], ["--overwrite"], []):
        assert run(*FOUR_EPOCHS, *flags) == 2
        assert "in progress in another process" in error_line(capsys)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert run.resume("--max-steps", "1") == 0


@one_method
def test_processes_that_ignore_signals_do_not_hang_the_interpreter(run):
    """Even where an exception passes by everything that ends them."""
    code = f"""
import sys
sys.path.insert(0, {str(ROOT / run.method)!r})
import torch, train
args = train.parse_args({run.argv("--num-workers", "2")!r})
device = torch.device("cpu")
run = train.Run(args, train.build(args, device), train.build_data(args)[0], device)
run.__enter__()
batches = run.batches()
next(batches)
sys.modules["kept"] = batches
raise SystemExit(3)
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 3


def assert_same_training(run, straight):
    """Weights, moments, buffers and random states are those of a run that nothing interrupted."""
    state = run.state()
    for name in state.keys() - {"args", "progress"}:
        assert_same(state[name], straight["checkpoint"][name], name)


@one_method
@pytest.mark.parametrize("workers", ["0", "2"])
def test_an_unreadable_image_saves_first(run, straight, at_step, capsys, workers):
    image = run.images()[2]
    whole = image.read_bytes()
    at_step(3, lambda *_: image.write_bytes(whole[:-100]) and None)
    assert run(*SELDOM, "--num-workers", workers) == 2
    assert f"cannot read {image}" in error_line(capsys)
    assert run.state()["progress"]["step"] > 2
    image.write_bytes(whole)
    assert run.resume() == 0
    assert_same_training(run, straight)


@one_method
def test_a_killed_loading_process_saves_first(run, straight, at_step, monkeypatch, capsys):
    """Killed in the middle of a step, as by the system when memory is short."""
    loader = torch.utils.data.dataloader._MultiProcessingDataLoaderIter
    monkeypatch.setattr(loader._try_get_data, "__defaults__", (0.3,))  # seconds between looks

    def kill(*_):
        os.kill(max(p.pid for p in multiprocessing.active_children()), signal.SIGKILL)
        time.sleep(0.2)

    at_step(3, kill)
    assert run(*SELDOM, "--num-workers", "2") == 2
    assert "data loader worker" in error_line(capsys)
    assert run.state()["progress"]["step"] > 2
    assert run.resume("--num-workers", "0") == 0
    assert_same_training(run, straight)


@one_method
def test_a_visualize_folder_that_cannot_be_written_is_a_warning(run, straight, at_step, capsys):
    """Full or read-only, while the model's disk is fine."""

    def replace_by_a_file(*_):
        shutil.rmtree(run.folder)
        run.folder.write_text("a file where the folder belongs")

    at_step(1, replace_by_a_file)
    assert run(*FOUR_EPOCHS) == 0
    shown = capsys.readouterr().err
    assert "warning: cannot write" in shown and str(run.folder) in shown
    assert_same_training(run, straight)


@one_method
@pytest.mark.parametrize("share", [0.1, 0.99])
def test_a_full_disk_leaves_the_last_checkpoint(stopped, straight, capsys, share):
    whole, limits = stopped.checkpoint.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(share * len(whole)), limits[1]))
    try:
        assert stopped.resume() == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f"cannot write {stopped.checkpoint}" in error_line(capsys)
    assert stopped.checkpoint.read_bytes() == whole
    assert [f.name for f in stopped.checkpoint.parent.iterdir()] == ["checkpoint.pt"]
    assert stopped.resume() == 0  # once there is room
    assert_same(stopped.traces(), straight)


@one_method
def test_it_saves_at_the_end_of_an_epoch_ten_minutes_after_the_last_save(run, monkeypatch):
    """A clock that gains four minutes a step. At grids (steps 2 and 8): before and after them."""
    clock, saved = [0.0], []
    save, training_step = run.module.Run.save, run.module.training_step

    def step(*rest):
        clock[0] += 240
        return training_step(*rest)

    def watched(self):
        saved.append(self.progress["step"])
        save(self)

    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(run.module, "training_step", step)
    monkeypatch.setattr(run.module.Run, "save", watched)
    assert run(*SELDOM) == 0
    assert saved == [0, 2, 2, 6, 8, 8]


@pytest.mark.parametrize("step, kept", [(1, False), (1, True), (3, True)])
def test_a_loss_that_is_not_finite_names_term_and_step(run, at_step, capsys, step, kept):
    at_step(step, lambda _, losses: {n: v * torch.nan for n, v in losses.items()})
    assert run(*(FOUR_EPOCHS if kept else FOUR_EPOCHS[:-1])) == 2
    error = error_line(capsys)
    assert f" is nan at step {step}" in error and "total" not in error.split(" is nan")[0]
    assert (str(run.checkpoint) in error) == kept
    if kept:
        assert run.state()["progress"]["step"] == step - 1


@one_method
def test_weights_that_are_not_finite_are_not_saved(run, at_step, capsys):
    """The losses of a step are computed before the update that spoils the weights."""

    def spoil(nets, _losses):
        with torch.no_grad():
            next(nets["G"].parameters()).fill_(torch.inf)

    at_step(4, spoil)
    assert run(*FOUR_EPOCHS) == 2
    assert "not finite" in error_line(capsys)
    assert run.state()["progress"]["step"] == 2


@one_method
@pytest.mark.parametrize("error, way_out", [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), "--batch-size"),
    (RuntimeError("MPS backend out of memory"), "--batch-size"),
    (MemoryError(), "--batch-size"),
    (RuntimeError("unable to open shared memory object </torch_1>"), "--shm-size"),
    (RuntimeError("DataLoader worker (pid 1) is killed by signal: Bus error."), "--shm-size"),
    (RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed."), "--num-workers 0"),
    (OSError(28, "No space left on device"), "No space left"),
])  # fmt: skip
def test_a_lack_of_memory_is_one_line_with_the_way_out(run, at_step, capsys, error, way_out):
    def fail(*_):
        raise error

    at_step(3, fail)
    assert run(*FOUR_EPOCHS) == 2
    assert way_out in error_line(capsys)
    assert run.state()["progress"]["step"] == 2  # it was within a step


@one_method
def test_a_bug_keeps_its_traceback(run, at_step):
    at_step(1, lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(*FOUR_EPOCHS)


def port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def two_processes(run, *flags):
    """The exit statuses of two gloo processes with the environment that torchrun gives them."""
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port()}

    def prepare(rank):
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), **shared)
        patch_run(pytest.MonkeyPatch(), run.method, RANK=rank, WORLD_SIZE=2)

    children = [run.fork(*flags, prepare=functools.partial(prepare, rank)) for rank in (0, 1)]
    return [exit_status(pid) for pid in children]


def test_two_processes_average_gradients_and_resume_exactly(run):
    flags = [*FOUR_EPOCHS, "--epochs", "2", "--batch-size", "2"]
    flags += ["--buffer-size", "0"] if run.method == "cycleGAN" else []
    assert two_processes(run, *flags) == [0, 0]
    straight, rows = run.traces(), run.rows()
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert straight["checkpoint"]["progress"]["step"] == 4
    assert two_processes(run, *flags, "--overwrite", "--max-steps", "1") == [0, 0]
    assert exit_status(run.fork(resume=True)) == 2  # one process cannot continue what two began
    assert two_processes(run, *flags, "--resume") == [0, 0]
    assert_same(run.traces(), straight)
    if run.method == "cycleGAN":  # the others' dropout and patches depend on the process
        assert exit_status(run.fork(*flags, "--overwrite", "--batch-size", "4")) == 0
        for name, weight in run.state()["G"].items():
            assert (weight - straight["checkpoint"]["G"][name]).abs().mean() < 1e-5, name


@one_method
def test_processes_that_differ_report_it(run, monkeypatch, capsys):
    """As on a second machine whose images have other sizes."""
    patch_run(monkeypatch, run.method, gather=lambda own: [own, [*own[:-1], ("000.png", 7)]])
    assert run(*FOUR_EPOCHS) == 2
    assert "different flags, checkpoints or training images" in error_line(capsys)


@one_method
def test_more_processes_than_images_are_refused(run, monkeypatch, capsys):
    monkeypatch.setattr(f"{run.method}_run.WORLD_SIZE", 100)
    assert run(*FOUR_EPOCHS) == 2
    assert "too few for 100 processes" in error_line(capsys)


@one_method
def test_torchrun_reports_the_real_error_of_a_process(run, warm_python):
    image = run.images()[0]
    image.write_bytes(image.read_bytes()[:-100])
    words = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", port()]
    words = [warm_python, *words, *command(run, *FOUR_EPOCHS)[1:]]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=180)
    assert done.returncode != 0
    assert f"train.py: error: cannot read {image}" in done.stderr
    assert "Traceback" not in done.stderr.split("train.py: error: ")[0]

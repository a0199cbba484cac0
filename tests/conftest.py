"""What the tests share: the three folders' modules, small images, and small runs of train.py."""

import csv
import importlib.util
import os
import signal
import subprocess
import sys
import traceback
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import MagicMock

# The tests' networks are too small for more threads; commands that tests start inherit this.
os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
METHODS = [name for name in ("pix2pix", "cycleGAN", "CUT") if (ROOT / name / "train.py").exists()]
UNPAIRED = [name for name in METHODS if name != "pix2pix"]
TOOLS = ["", "datasets", "visualize", "experiments", "benchmarks"]
sys.path[:0] = [str(ROOT / name) for name in METHODS + TOOLS]
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores it


def load_script(method, script="train"):
    """<method>/<script>.py as a module; the three train.py cannot all be called `train`."""
    name = f"{script}_of_{method}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / method / f"{script}.py")
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def patch_run(patch, method, **values):
    """Replaces names in <method>_run.py and <method>_system.py, wherever they are."""
    modules = [importlib.import_module(f"{method}_{part}") for part in ("run", "system")]
    for name, value in values.items():
        places = [module for module in modules if hasattr(module, name)]
        assert places, name
        for module in places:
            patch.setattr(module, name, value)


def picture(rng, width, height):
    """A random RGB image (PIL) of smooth blobs."""
    small = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def write_pairs(root, name="pairs", train=6, test=3, size=32, seed=0):
    """A paired set whose y, the left half, is the negative of x, the right half. Returns root."""
    rng = np.random.default_rng(seed)
    for split, count in (("train", train), ("test", test)):
        (root / name / split).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            x = np.asarray(picture(rng, size, size))
            pair = Image.fromarray(np.concatenate([255 - x, x], axis=1))
            pair.save(root / name / split / f"{index:03}.png")
    return root


def write_unpaired(root, name="unpaired", train=(6, 4), test=3, size=32, seed=0):
    """An unpaired set, y the negative of an x; test/x and test/y match by name. Returns root."""
    rng = np.random.default_rng(seed)
    for split, counts in (("train", train), ("test", (test, test))):
        for side in "xy":
            (root / name / split / side).mkdir(parents=True, exist_ok=True)
        for index in range(max(counts)):
            x = np.asarray(picture(rng, size, size))
            if index < counts[0]:
                Image.fromarray(x).save(root / name / split / "x" / f"{index:03}.png")
            if split == "train":
                x = np.asarray(picture(rng, size, size))
            if index < counts[1]:
                Image.fromarray(255 - x).save(root / name / split / "y" / f"{index:03}.png")
    return root


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image)


def tree(folder):
    """Every file of a folder as {relative path: bytes}, hidden ones too, sorted."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def status_of(main, *words):
    """The exit status of a script's main with these words."""
    try:
        return main([str(word) for word in words])
    except SystemExit as ended:
        return ended.code


def noise(*shape, seed=0):
    """Float64 in [-1, 1]."""
    return torch.from_numpy(np.tanh(np.random.RandomState(seed).randn(*shape)))


SMALL = {
    "pix2pix": (write_pairs, []),
    "cycleGAN": (write_unpaired, ["--n-layers", "1", "--buffer-size", "3"]),
    "CUT": (write_unpaired, ["--n-layers", "5", "--num-patches", "16"]),
}
# Four epochs of two steps, of 4 and of 2 images; grids and a checkpoint after each epoch.
FOUR_EPOCHS = ["--epochs", "4", "--batch-size", "4", "--sample-every", "1", "--save-model"]


NETS = {"pix2pix": ["G", "D"], "cycleGAN": ["G", "F", "D_X", "D_Y"], "CUT": ["G", "D", "H"]}
NARROW = ["--image-size", "32", "--ngf", "4", "--ndf", "4"]
LAYERS = {"pix2pix": [], "cycleGAN": ["--n-layers", "1"], "CUT": ["--n-layers", "2"]}
LAYERS["CUT"] += ["--feat-str", "pix,d128, d256, R256_1, R256_2", "--num-patches", "1024"]  # all


def parse(method, *flags):
    """The flags of small networks on the CPU."""
    words = [*NARROW, "--device", "cpu", "--precision", "fp32", *LAYERS[method], *flags]
    return load_script(method).parse_args(words)


def small_nets(method, *flags):
    """(nets, args) in float64, with weights so large that no output is near 0."""
    args = parse(method, *flags)
    torch.manual_seed(0)
    nets = load_script(method).build(args, torch.device("cpu"))
    for name in NETS[method]:
        for p in nets[name].double().parameters():
            torch.nn.init.normal_(p, 0.0, 0.3)
    return nets, args


class SmallRun:
    """Runs of a method's train.py on six images of 32 pixels below `root`, called "run"."""

    def __init__(self, method, root):
        self.method, self.root, self.module = method, root, load_script(method)
        write, self.flags = SMALL[method]
        write(root, "data")
        self.folder = root / "visualize" / method / "run"
        self.checkpoint = root / method / "model" / "run" / "checkpoint.pt"

    def argv(self, *flags):
        data = ["--data-root", self.root, "--data-folder", "data", "--output-root", self.root]
        rest = ["--num-workers", "0", "--run-name", "run", "--device", "cpu", *self.flags, *flags]
        return [str(word) for word in (*data, *NARROW, *rest)]

    def __call__(self, *flags):
        """The exit status of train.py with these flags."""
        return status_of(self.module.main, *self.argv(*flags))

    def resume(self, *flags):
        """The same with --resume and only what finds the run."""
        words = ["--output-root", self.root, "--run-name", "run", "--resume", *flags]
        return status_of(self.module.main, *words)

    def fork(self, *flags, prepare=lambda: None, resume=False):
        """Runs in a child process, without output. Returns its id."""
        pid = os.fork()
        if pid == 0:
            status = 99
            try:
                prepare()
                status = self.resume(*flags) if resume else self(*flags)
            except BaseException:
                traceback.print_exc()
            os._exit(status)
        return pid

    def state(self):
        return torch.load(self.checkpoint, weights_only=True)

    def rows(self):
        with open(self.folder / "losses.csv", newline="") as file:
            return list(csv.DictReader(file))

    def images(self):
        return sorted(self.root.glob("data/train/**/*.png"))

    def traces(self):
        """What a run leaves, but for times and flags: interruptions must not change it."""
        state = self.state()
        del state["args"], state["progress"]["seconds"]
        for row in state["progress"]["rows"]:
            del row["seconds"], row["images_per_second"]
        rows = [{k: v for k, v in row.items() if "second" not in k} for row in self.rows()]
        grids = {file.name: file.read_bytes() for file in self.folder.glob("val/*.png")}
        return {"checkpoint": state, "losses.csv": rows, "val": grids}


def exit_status(pid):
    """Waits for a child; its exit status, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def assert_same(found, expected, where=""):
    """found equals expected, tensors bit for bit; names the place where it does not."""
    assert type(found) is type(expected), where
    if isinstance(found, dict):
        assert list(found) == list(expected), where
        for key in found:
            assert_same(found[key], expected[key], f"{where}/{key}")
    elif isinstance(found, list | tuple):
        assert len(found) == len(expected), where
        for index, (a, b) in enumerate(zip(found, expected, strict=True)):
            assert_same(a, b, f"{where}/{index}")
    elif isinstance(found, torch.Tensor):
        assert found.dtype == expected.dtype and torch.equal(found, expected), where
    else:
        assert found == expected, where


def error_line(capsys):
    """The one error line of a run that has just failed, without its prefix."""
    shown = capsys.readouterr()
    assert "Traceback" not in shown.err + shown.out
    lines = [line for line in shown.err.splitlines() if "error: " in line]
    assert len(lines) == 1, shown.err
    assert lines[0].startswith("train.py: error: ") and shown.err.endswith(lines[0] + "\n")
    return lines[0].removeprefix("train.py: error: ")


@pytest.fixture(scope="module", params=METHODS)
def method(request):
    return request.param


@pytest.fixture(scope="session")
def warm_python(tmp_path_factory):
    """The path of a python that starts at once (warm_python.py)."""
    folder = tmp_path_factory.mktemp("warm")  # its path must be short, as a socket's
    command = [sys.executable, ROOT / "tests" / "warm_python.py", folder]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as server:
        assert server.stdout.readline() == b"ready\n"
        yield str(folder / "python")
        server.kill()


# For what *_run.py and *_system.py do alone: test_check_copies.py has them equal in all folders.
one_method = pytest.mark.parametrize("method", METHODS[:1], scope="module")


def spy(monkeypatch, module, name):
    """The list of (arguments, result) of each call of module.name from now on."""
    function, calls = getattr(module, name), []

    def watched(*args):
        calls.append((args, function(*args)))
        return calls[-1][1]

    monkeypatch.setattr(module, name, watched)
    return calls


@pytest.fixture
def float64_outputs(monkeypatch):
    """Networks in float64 return float64 too, not float32."""
    monkeypatch.setattr(torch.Tensor, "float", lambda self: self)


@contextmanager
def commands_here(*methods):
    """Has commands run in this process, without curves, which take nine tenths of a small run."""
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    with pytest.MonkeyPatch.context() as patch:
        for method in methods:
            patch_run(patch, method, Figure=MagicMock)
        for name, value in (("argv", ["train.py"]), ("stdout", sys.stdout), ("stderr", sys.stderr)):
            patch.setattr(sys, name, value)
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)


@pytest.fixture
def run(method, tmp_path):
    """A SmallRun that has not started."""
    with commands_here(method):
        yield SmallRun(method, tmp_path)


@pytest.fixture(scope="module")
def straight(method, tmp_path_factory):
    """The traces of FOUR_EPOCHS that nothing interrupts."""
    with commands_here(method):
        run = SmallRun(method, tmp_path_factory.mktemp(method))
        assert run(*FOUR_EPOCHS) == 0
    traces = run.traces()
    assert traces["checkpoint"]["progress"]["step"] == 8
    return traces


@pytest.fixture
def stopped(run):
    """A run that has done one step of FOUR_EPOCHS."""
    assert run(*FOUR_EPOCHS, "--max-steps", "1") == 0
    return run


@pytest.fixture
def at_step(run, monkeypatch):
    """at_step(n, act) has act(nets, losses) called after the n-th step; returns the steps done."""

    def watch(step, act):
        training_step, done = run.module.training_step, []

        def watched(nets, *rest):
            losses = training_step(nets, *rest)
            done.append(step)
            return (act(nets, losses) or losses) if len(done) == step else losses

        monkeypatch.setattr(run.module, "training_step", watched)
        return done

    return watch


def pytest_collection_modifyitems(items):
    """The endings come first: others start threads of autograd, after which no test can fork."""
    items.sort(key=lambda item: item.path.name != "test_endings.py")

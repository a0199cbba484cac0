"""What makes training fast leaves it as it is: cache, precision, processes, benchmark."""

import importlib
import math
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from conftest import (
    METHODS,
    ROOT,
    draw_no_curves,
    load_script,
    run_module,
    write_pairs,
    write_unpaired,
)
from test_every_method import Run, assert_same, error_line

sys.path.insert(0, str(ROOT / "benchmarks"))
import plain
import step_time


@pytest.fixture(params=METHODS)
def method(request):
    return request.param


@pytest.fixture
def run(method, script, tmp_path, monkeypatch):
    """Small runs of the method, with seven pictures to train on."""
    module = script(method)
    draw_no_curves(monkeypatch, method)
    return Run(method, module, tmp_path, train=7 if method == "pix2pix" else (7, 5))


def data_set(method, root, cache):
    """The training set of the method, 36 px cut to 32, from pictures of 48 px."""
    module = importlib.import_module(f"{method}_dataset")
    if not (root / "data").exists():
        (write_pairs if method == "pix2pix" else write_unpaired)(root, "data", size=48)
    kind = module.PairDataset if method == "pix2pix" else module.UnpairedDataset
    return kind(root, "data", "train", 36, 32, False, flip=True, seed=3, cache=cache)


# ------------------------------------------------------------------------------------------ cache


def test_cached_pictures_are_the_same_bit_for_bit(method, tmp_path):
    fresh, cached = (data_set(method, tmp_path, cache) for cache in (False, True))
    assert fresh.cache.pixels is None and cached.cache.pixels is not None
    for epoch in range(1, 9):
        for index in range(len(fresh)):
            for one, other in zip(fresh[epoch, index], cached[epoch, index], strict=True):
                assert one.dtype == torch.float32 and torch.equal(one, other)
    assert cached.cache.known.all()


def test_each_picture_is_decoded_once(method, tmp_path, monkeypatch):
    module, read = importlib.import_module(f"{method}_dataset"), []
    load_rgb = module.load_rgb
    monkeypatch.setattr(module, "load_rgb", lambda file: read.append(file) or load_rgb(file))
    cached = data_set(method, tmp_path, True)
    for epoch in range(1, 9):
        cached.__getitems__([(epoch, index) for index in range(len(cached))])
    assert sorted(read) == sorted(cached.files)


def test_what_the_loader_gives_is_what_the_data_set_holds(method, tmp_path):
    """It gives bytes, and the device makes floats of them."""
    data = data_set(method, tmp_path, True)
    keys = [(2, index) for index in range(len(data))]
    for key, pair in zip(keys, data.__getitems__(keys), strict=True):
        for pixels, wanted in zip(pair, data[key], strict=True):
            assert pixels.dtype == torch.uint8
            assert torch.equal(load_script(method).to_unit(pixels), wanted)


def test_a_run_with_and_without_cache_is_the_same(run):
    flags = ["--epochs", "3", "--batch-size", "4", "--save-model", "--sample-every", "1"]
    assert run(*flags, "--no-cache") == 0
    wanted = run.traces()
    assert run(*flags, "--cache", "--num-workers", "2", "--overwrite", "--max-steps", "3") == 0
    assert run("--resume", "--no-cache", "--max-steps", "5") == 0
    assert run("--resume", "--cache") == 0
    assert_same(run.traces(), wanted)


def test_the_cache_is_left_out_where_it_does_not_fit(method, tmp_path, monkeypatch):
    module = importlib.import_module(f"{method}_dataset")
    monkeypatch.setattr(module, "shared_memory", lambda: math.inf)
    auto = data_set(method, tmp_path, None)
    assert auto.cache.pixels is not None and "kept in" in str(auto.cache)
    monkeypatch.setattr(module, "shared_memory", lambda: 2 * auto.cache.bytes - 1)
    assert data_set(method, tmp_path, None).cache.pixels is None
    assert data_set(method, tmp_path, True).cache.pixels is not None  # as it was asked for

    def refuse(_tensor):
        raise RuntimeError("unable to allocate shared memory")

    monkeypatch.setattr(torch.Tensor, "share_memory_", refuse)
    with pytest.raises(module.RunError, match="unable to allocate shared memory; give --no-cache"):
        data_set(method, tmp_path, True)
    monkeypatch.setattr(module, "shared_memory", lambda: math.inf)
    assert data_set(method, tmp_path, None).cache.pixels is None  # nobody asked for it


# -------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("gain, wanted", [(2.0, "bf16"), (1.0, "fp32"), (0.04, "fp32")])
def test_auto_takes_bf16_where_it_is_faster(run, monkeypatch, gain, wanted):
    monkeypatch.setattr(run_module(run.method), "bf16_gain", lambda _: gain)
    argv = run.argv("--max-steps", "1", "--save-model")
    place = argv.index("--precision")
    assert run.module.main(argv[:place] + argv[place + 2 :]) == 0  # auto is the default
    assert run.state()["args"]["precision"] == wanted
    # Now it is otherwise.
    monkeypatch.setattr(run_module(run.method), "bf16_gain", lambda _: 3.0 - gain)
    resume = ["--run-name", "run", "--resume", "--precision", "auto", "--max-steps", "2"]
    assert run.module.main(resume) == 0
    assert run.state()["progress"]["step"] == 2
    assert run.state()["args"]["precision"] == wanted


def test_slow_bf16_is_refused(run, monkeypatch, capsys):
    monkeypatch.setattr(run_module(run.method), "bf16_gain", lambda _: 0.04)
    assert run("--precision", "bf16") == 2
    error = error_line(capsys)
    assert "--precision bf16" in error and "0.04 times as fast" in error and "fp32" in error
    assert not run.folder.exists()


def test_a_run_begun_in_bf16_goes_on_where_bf16_is_slow(run, monkeypatch, capsys):
    monkeypatch.setattr(run_module(run.method), "bf16_gain", lambda _: 3.0)
    assert run("--precision", "bf16", "--max-steps", "1", "--save-model") == 0
    monkeypatch.setattr(run_module(run.method), "bf16_gain", lambda _: 0.04)
    for step, flags in enumerate(([], ["--precision", "auto"], ["--precision", "bf16"]), 2):
        resume = ["--run-name", "run", "--resume", *flags, "--max-steps", str(step)]
        assert run.module.main(resume) == 0
        assert "began in bf16 and goes on" in capsys.readouterr().err
        assert run.state()["progress"]["step"] == step
        assert run.state()["args"]["precision"] == "bf16"


def test_the_probe_measures_and_leaves_no_trace(method):
    bf16_gain, threads = run_module(method).bf16_gain, torch.get_num_threads()
    random = torch.get_rng_state()
    assert 0 < bf16_gain(torch.device("cpu")) < math.inf
    assert torch.get_num_threads() == threads and torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("capability", [(7, 5), (8, 0)])
def test_on_cuda_auto_is_fp32_and_bf16_asks_for_ampere(method, monkeypatch, capability):
    train = load_script(method)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    args = train.parse_args([])
    run_module(method).choose_precision(args, torch.device("cuda"))
    assert args.precision == "fp32"
    args = train.parse_args(["--precision", "bf16"])
    if capability >= (8, 0):
        run_module(method).choose_precision(args, torch.device("cuda"))
        assert args.precision == "bf16"
    else:
        with pytest.raises(train.RunError, match="bf16"):
            run_module(method).choose_precision(args, torch.device("cuda"))


@pytest.mark.parametrize("method", ["cycleGAN", "CUT"])
def test_padding_stays_in_bf16(method):
    """The same values as in fp32, from which a convolution would make bf16 again."""
    ReflectionPad = importlib.import_module(f"{method}_model").ReflectionPad
    x = torch.randn(1, 2, 8, 8, dtype=torch.bfloat16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        padded = ReflectionPad(3)(x)
    assert padded.dtype == torch.bfloat16
    assert torch.equal(padded.float(), torch.nn.functional.pad(x.float(), (3,) * 4, "reflect"))


# ------------------------------------------------------------------------------ several processes


def in_processes(module, *argvs, kill=None):
    """The exit statuses of main(argv) for each of argvs, in processes that train together.

    kill: (number, step): the process that gets SIGTERM in the middle of that step.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def process(rank):
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank))
        os.environ.update(LOCAL_RANK=str(rank), WORLD_SIZE=str(len(argvs)))
        os.environ.update(TORCHELASTIC_RUN_ID="test", LOCAL_WORLD_SIZE=str(len(argvs)))
        torch.set_num_threads(1)
        training_step, done = module.training_step, []

        def watched(*args):
            done.append(1)
            if kill == (rank, len(done)):
                os.kill(os.getpid(), signal.SIGTERM)
            return training_step(*args)

        module.training_step = watched
        os._exit(module.main(argvs[rank]))

    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=process, args=(rank,)) for rank in range(len(argvs))]
    for started in processes:
        started.start()
    for started in processes:
        started.join(60)
    late = [started.kill() for started in processes if started.exitcode is None]
    assert not late, "they waited for each other"
    return [started.exitcode for started in processes]


def first_gradients(run):
    """Of all weights at the first step: with beta_1 = 0.5, half of them is what Adam remembers."""
    state = run.state()
    names = [name for name in state if name.startswith("optimizer")]
    return [2 * s["exp_avg"] for name in names for s in state[name]["state"].values()]


@pytest.mark.parametrize("method", ["cycleGAN", "CUT"])
def test_two_processes_with_a_picture_each_have_the_gradients_of_one_with_two(run):
    """All positions are compared and no buffer is full, so that nothing is left to chance."""
    flags = ["--max-steps", "1", "--save-model", "--lr", "1e-9"]
    flags += ["--num-patches", "9999"] if run.method == "CUT" else []
    assert run(*flags, "--batch-size", "2") == 0
    wanted = first_gradients(run)
    argv = run.argv(*flags, "--batch-size", "1", "--overwrite")
    assert in_processes(run.module, argv, argv) == [0, 0]
    found = first_gradients(run)
    assert len(found) == len(wanted) > 10
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3 * float(other.abs().max()))
    assert run(*flags, "--batch-size", "1", "--overwrite") == 0  # one of the two pictures alone
    alone = zip(first_gradients(run), wanted, strict=True)
    assert not all(
        torch.allclose(a, b, rtol=1e-3, atol=1e-3 * float(b.abs().max())) for a, b in alone
    )


def test_two_processes_resume_exactly(run, capfd):
    flags = ["--epochs", "3", "--batch-size", "2", "--save-model", "--sample-every", "1"]
    argv = run.argv(*flags)
    assert in_processes(run.module, argv, argv) == [0, 0]
    assert "3 epochs of 2 steps of 2 x 2" in capfd.readouterr().out
    wanted = run.traces()
    (other,) = wanted["checkpoint"]["others"]
    assert not torch.equal(other["random"]["cpu"], wanted["checkpoint"]["random"]["cpu"])
    assert len(run.rows()) == 3 and wanted["checkpoint"]["progress"]["step"] == 6
    again = run.argv(*flags, "--overwrite")
    assert in_processes(run.module, again, again, kill=(1, 3)) == [143, 143]
    assert run.state()["progress"]["step"] == 3  # in the middle of the second epoch
    shown = capfd.readouterr().out.splitlines()[-1]
    assert f"torchrun --nproc-per-node 2 {run.method}/train.py --run-name run --resume" in shown
    resume = ["--run-name", "run", "--resume"]
    assert in_processes(run.module, resume, resume) == [0, 0]
    assert_same(run.traces(), wanted)
    capfd.readouterr()
    assert run.module.main(resume) == 2
    error = capfd.readouterr().err
    assert "2 processes, not 1" in error and "Traceback" not in error


@pytest.mark.parametrize("method", ["cycleGAN"])
def test_processes_that_do_not_fit_together(run, capfd):
    flags = run.argv("--epochs", "1", "--save-model")
    assert in_processes(run.module, flags, [*flags, "--lr", "0.1"]) == [2, 2]
    error = capfd.readouterr().err
    assert "different flags" in error and "Traceback" not in error
    for file in run.training_files():
        file.unlink() if file.name != "000.png" else None
    assert in_processes(run.module, flags, flags) == [2, 2]
    error = capfd.readouterr().err
    assert "2 processes for 1 pictures" in error and "Traceback" not in error
    assert not run.folder.exists()


@pytest.mark.parametrize("method", ["cycleGAN"])
def test_no_process_waits_for_one_that_has_failed(run, capfd):
    for bad in run.root.glob("data/train/x/00[1-6].png"):
        bad.write_bytes(bad.read_bytes()[:-100])
    flags = run.argv("--epochs", "9", "--save-model")
    assert in_processes(run.module, flags, flags) == [2, 2]
    error = capfd.readouterr().err
    assert "cannot read the image" in error and "Traceback" not in error


@pytest.mark.parametrize("length, size, number", [(7, 1, 2), (8, 3, 2), (11, 2, 3), (6, 4, 1)])
def test_processes_share_an_epoch_evenly(method, length, size, number):
    kind = importlib.import_module(f"{method}_dataset").EpochBatches
    shares = [kind(length, size, 0, rank, number) for rank in range(number)]
    whole = kind(length, size * number, 0)
    for epoch in (1, 2):
        for sampler in (*shares, whole):
            sampler.start(epoch, 0)
        together = list(zip(*shares, strict=True))
        assert len(together) == len(shares[0])
        for batches, all_of_it in zip(together, whole, strict=False):
            assert len({len(batch) for batch in batches}) == 1
            keys = {key for batch in batches for key in batch}
            assert len(keys) == sum(map(len, batches)) and keys <= set(all_of_it)
        assert sum(len(b) for batches in together for b in batches) == length - length % number
    shares[0].start(2, 1)
    assert list(shares[0]) == [batches[0] for batches in together[1:]]


# -------------------------------------------------------------------------- the step, the benchmark

NARROW = ["--image-size", "32", "--load-size", "36", "--ngf", "4", "--ndf", "4"]
FLAGS = {
    "pix2pix": NARROW,
    "cycleGAN": [*NARROW, "--n-layers", "1"],
    "CUT": [*NARROW, "--n-layers", "5", "--num-patches", "64"],
}
MORE = {"pix2pix": [], "cycleGAN": ["--identity-ratio", "5"], "CUT": ["--NCE-ratio-id", "0"]}


@pytest.mark.parametrize("more", [False, True])
def test_the_plain_step_is_the_same_step(method, more):
    """The same losses, and, by Adam's memory of them, the same gradients."""
    train = load_script(method)
    args = train.parse_args([*FLAGS[method], *(MORE[method] if more else [])])
    x, y = torch.rand(2, 2, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1

    def once(build, step):
        torch.manual_seed(0)
        nets = build(args, torch.device("cpu"))
        torch.manual_seed(2)
        losses = step(nets, x, y, args)
        names = [name for name in nets if name.startswith("optimizer")]
        states = [s for name in names for s in nets[name].state.values()]
        return losses, [2 * state["exp_avg"] for state in states]

    losses, gradients = once(train.build, train.training_step)
    wanted, plain_gradients = once(
        lambda *a: plain.build(train, *a), lambda *a: plain.STEPS[method](train, *a)
    )
    assert len(wanted) >= 2
    for name, value in wanted.items():
        torch.testing.assert_close(losses[name], value, rtol=1e-5, atol=1e-6)
    assert len(gradients) == len(plain_gradients) > 10
    for one, other in zip(gradients, plain_gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3 * float(other.abs().max()))


@pytest.mark.parametrize(
    "method, flags",
    [
        ("pix2pix", []),
        ("cycleGAN", ["--identity-ratio", "5", "--pix-loss", "--pix-blur"]),
        *(("CUT", ["--nce", nce, "--src-ratio", "1"]) for nce in ("infonce", "ence", "hdce")),
        ("CUT", ["--query", "attention"]),
    ],
)
def test_the_step_reads_nothing_back_from_the_device(method, flags, monkeypatch):
    """Tensors without values: whoever asks for one fails, as a CUDA graph or a queue would."""
    train = load_script(method)
    monkeypatch.setattr(torch.nn.Module, "to", lambda net, *_: net)
    args = train.parse_args([*FLAGS[method], *flags])
    with FakeTensorMode():
        nets = train.build(args, torch.device("cpu"))
        losses = train.training_step(nets, *torch.rand(2, 1, 3, 32, 32), args)
    assert all(value.shape == () for value in losses.values())


def test_flops_of_a_convolution():
    """2 for each product: forward, then as many for the gradient of the input and of the weight."""
    layer = torch.nn.Conv2d(5, 7, 3, bias=False)
    x = torch.rand(2, 5, 12, 10, requires_grad=True)
    forward = 2 * 2 * 7 * 5 * 9 * 10 * 8
    assert step_time.count_flops(layer, x) == forward
    assert step_time.count_flops(lambda: layer(x).sum().backward()) == 3 * forward


def test_the_benchmark_prints_its_table(method, capsys):
    flags = [*FLAGS[method][4:], "--num-workers", "0"]
    sizes = ["--image-size", "32", "--rounds", "2", "--no-memory"]
    sizes += ["--profile"] if method == METHODS[0] else []
    names = ["--configs", "fp32", "fp32+channels-last"]
    args = step_time.parse_args(["--method", method, *sizes, *names, "--", *flags])
    assert step_time.main(args) == 0
    shown = capsys.readouterr().out
    rows = {
        line.split("|")[1].strip(): line.split("|")[2:-1]
        for line in shown.splitlines()
        if "|" in line
    }
    for name in ("plain", "fp32", "fp32+channels-last"):
        milliseconds, rate, faster, _, _, _, waiting = rows[name]
        median, low, high = map(float, re.findall(r"[\d.]+", milliseconds))
        assert 0 < low <= median <= high
        assert float(rate) == pytest.approx(1000 / median, rel=0.2)
        assert float(re.findall(r"[\d.]+", faster)[0]) > 0
        assert 0 <= float(waiting.strip().rstrip("%")) <= 100
    assert "commit" in shown and "torch" in shown and "Ceiling in fp32" in shown
    if method == METHODS[0]:
        assert "convolution" in shown.split("| share | ms |")[1]


def test_the_benchmark_refuses_what_it_does_not_know(capsys):
    with pytest.raises(SystemExit) as ended:
        step_time.parse_args(["--method", "CUT", "--configs", "bf16+magic"])
    assert ended.value.code == 2
    assert "bf16+magic" in capsys.readouterr().err
    for flags in (["--rounds", "0"], ["--burst", "-1"], ["--warm-up", "-1"]):
        with pytest.raises(SystemExit):
            step_time.parse_args(["--method", "CUT", *flags])
        assert f"step_time.py: error: {' '.join(flags)}: wanted" in capsys.readouterr().err
    if not torch.cuda.is_available():
        args = step_time.parse_args(["--method", METHODS[0], "--configs", "graph", "--no-memory"])
        assert step_time.main(args) == 2
        assert "graph is for CUDA devices" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="told by /proc")
def test_peak_memory_grows_with_the_pictures():
    """In processes of their own, as the benchmark has it: here freed memory would be used again."""
    script, peaks = ROOT / "benchmarks" / "step_time.py", []
    for size in ("64", "256"):
        sizes = ["--image-size", size, "--batch-size", "2", "--memory-of", "fp32"]
        command = [sys.executable, script, "--method", METHODS[0], *sizes, "--", "--ngf", "16"]
        peaks.append(int(subprocess.check_output(command, text=True).split()[-1]))
    x = 2 * 3 * 256 * 256 * 4
    assert peaks[1] > peaks[0] + 10 * x

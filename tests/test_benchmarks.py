"""The training step on CUDA, as far as it can be emulated without a GPU, and the benchmarks."""

import collections
import itertools
import json
import math
import os
import subprocess
import sys
from types import SimpleNamespace
from unittest.mock import MagicMock, call

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

import parity
import plain
import step_time
from conftest import METHODS, NARROW, ROOT, SMALL, UNPAIRED, load_script, patch_run, write_pairs

CUDA = torch.device("cuda:0")
FLAGS = {method: [*NARROW, *SMALL[method][1]] for method in METHODS}
VARIANTS = {
    "pix2pix": ["", "--ema 0.9"],
    "cycleGAN": ["", "--antialias --ema 0.9", "--identity-ratio 5 --pix-loss --pix-blur"],
    "CUT": ["", "--buffer-size 1 --antialias --ema 0.9", "--fast"],
}
VARIANTS["CUT"] += ["--query attention --nce ence", "--nce hdce --src-ratio 0.05 --no-detach"]
PRECISIONS = ("fp32", "bf16", "tf32")  # the last with the default flags alone
STEPS = [(m, f, p) for m in METHODS for f in VARIANTS[m] for p in PRECISIONS[: 2 + (not f)]]


@torch.no_grad()
def backward(loss, inputs):
    """What loss.backward(inputs=inputs) does: autograd's engine needs a GPU for CUDA tensors."""
    order, seen, stack = [], {loss.grad_fn}, [(loss.grad_fn, iter(loss.grad_fn.next_functions))]
    while stack:  # depth first: a node comes after those that it passes gradients to
        node, edges = stack[-1]
        following = next((n for n, _ in edges if n is not None and n not in seen), None)
        if following is None:
            order.append(stack.pop()[0])
        else:
            seen.add(following)
            stack.append((following, iter(following.next_functions)))
    gradients = collections.defaultdict(dict)
    gradients[loss.grad_fn][0] = torch.ones_like(loss)
    for node in reversed(order):
        arrived = gradients.pop(node)
        if hasattr(node, "variable"):
            if any(node.variable is weight for weight in inputs):
                node.variable.grad = arrived[0]
            continue
        results = node(*[arrived.get(k) for k in range(len(node._input_metadata))])
        results = results if isinstance(results, tuple) else (results,)
        for (following, k), result in zip(node.next_functions, results, strict=True):
            if following is not None and result is not None:
                place, known = gradients[following], following._input_metadata[k]
                result = result.sum_to_size(known.shape).to(known.dtype)
                place[k] = place[k] + result if k in place else result


class OnlyCuda(TorchDispatchMode):
    """Fails where an operator touches another device than CUDA; counts the operators' dtypes."""

    def __init__(self):
        super().__init__()
        self.dtypes = collections.Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        out = operator(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
        places = {str(t.device) for t in tensors}
        assert places <= {"cuda:0"}, f"{operator} has tensors on {places}"
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.dtypes[str(operator), tensor.dtype] += 1
        return out


@pytest.fixture
def fake_cuda(monkeypatch):
    """CUDA tensors without values. The coins of image buffers and flips stay on the host."""
    rand, randint = torch.rand, torch.randint
    coins = itertools.cycle((0.0, 0.8))

    def coin(*a, **k):
        return rand(*a, **k) if a != ((),) or k else next(coins)

    monkeypatch.setattr(torch, "rand", coin)
    monkeypatch.setattr(torch, "randint", lambda *a: randint(*a) if a[1] != () else 0)
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss, inputs: backward(loss, inputs))
    monkeypatch.setattr(torch.nn.Module, "to", lambda net, *_: net)  # cannot swap fake weights
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    monkeypatch.setattr(FakeTensorMode, "__deepcopy__", lambda mode, _: mode, raising=False)
    with FakeTensorMode():
        yield


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")  # deepcopy asks
@pytest.mark.parametrize("method, flags, precision", STEPS)
def test_a_step_on_cuda_is_on_cuda_alone(fake_cuda, method, flags, precision):
    """It neither mixes devices nor uploads nor reads."""
    train = load_script(method)
    args = train.parse_args([*FLAGS[method], *flags.split(), "--precision", precision])
    with CUDA:
        nets = train.build(args, CUDA)
    for name in nets:
        if name.startswith("buffer"):
            nets[name].size = min(nets[name].size, 1)  # full after the first step
    x, y = (torch.rand(1, 3, 32, 32, device=CUDA) for _ in "xy")
    with OnlyCuda() as watch:
        for _ in range(2):
            losses = train.training_step(nets, x, y, args)
            train.update_averages(nets, args.ema)
    assert all(loss.shape == () and loss.dtype == torch.float32 for loss in losses.values())
    for name, part in nets.items():
        if name.startswith("optimizer"):
            weights = [weight for group in part.param_groups for weight in group["params"]]
            assert part.defaults["fused"] and all(w.grad.dtype == torch.float32 for w in weights)
            assert {t.device for s in part.state.values() for t in s.values()} == {CUDA}
    dtypes = {dtype for operator, dtype in watch.dtypes if operator == "aten.convolution.default"}
    expected = torch.bfloat16 if precision == "bf16" else torch.float32
    assert dtypes - {torch.float32} == {expected} - {torch.float32}
    if "antialias" not in flags and "blur" not in flags:  # blurs stay in fp32
        assert dtypes == {expected}


@pytest.mark.parametrize("act, error", [
    (lambda x: x * torch.tensor([2.0]).to(x.device), "cpu"),
    (lambda x: x + x.new_tensor([2.0]), "cpu"),
    (lambda x: x[torch.tensor([0])], "cpu"),
    (lambda x: x.sum().item(), "_local_scalar_dense"),
    (lambda x: bool((x > 0).all()), "_local_scalar_dense"),
    (lambda x: x[x > 0], "nonzero"),
])  # fmt: skip
def test_uploads_and_reads_are_noticed(fake_cuda, act, error):
    with pytest.raises(Exception, match=error), OnlyCuda():
        act(torch.ones(2, device=CUDA))


@pytest.mark.parametrize("name, precision", [
    ("cuda:1", "tf32"), ("auto", "fp32"), ("cuda", "bf16"),
])  # fmt: skip
def test_the_gpu_is_selected_and_tf32_set(method, name, precision, monkeypatch):
    train, chosen = load_script(method), []
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device("cuda"))
    monkeypatch.setattr(torch, "zeros", lambda *_, device: SimpleNamespace(tolist=list))
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", precision != "tf32")
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    index = int(name == "cuda:1")
    device = train.pick_device(train.parse_args(["--device", name, "--precision", precision]))
    assert device.type == "cuda" and (device.index or 0) == index
    assert [getattr(d, "index", d) or 0 for d in chosen] == [index]
    assert torch.backends.cudnn.allow_tf32 == (precision == "tf32")
    assert torch.backends.cudnn.benchmark


@pytest.mark.parametrize("kind, pinned", [("cpu", False), ("cuda", True), ("mps", False)])
def test_copies_are_asynchronous_from_pinned_memory_to_cuda_only(method, kind, pinned, monkeypatch):
    images, loader, train = MagicMock(), MagicMock(), load_script(method)
    images.to.return_value = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    loader.return_value.__iter__.return_value = iter([(images, images)])
    loader.return_value.pin_memory = pinned
    patch_run(monkeypatch, method, DataLoader=loader)
    data, device = torch.nn.ParameterList([torch.zeros(1)]), torch.device(kind)
    data.files = []
    run = train.Run(train.parse_args([]), {}, data, device)
    run.bar = tqdm(total=1, leave=False)
    assert len(next(run.batches())) == 2 and loader.call_args.kwargs["pin_memory"] == pinned
    assert images.to.call_args_list == [call(device, non_blocking=pinned)] * 2


@pytest.mark.parametrize("kind, fused", [("cpu", 1), ("cuda", 1), ("mps", 1), ("meta", 0)])
def test_adam_is_fused_where_torch_can(method, kind, fused):
    train = load_script(method)
    with FakeTensorMode():
        net = torch.nn.ParameterList([torch.empty(2, 2, device=kind)])
        optimizer = train.adam(train.parse_args([]), net)
    assert optimizer.defaults["fused"] == fused


@pytest.mark.parametrize("method", UNPAIRED)
def test_processes_gather_cpu_tensors(method, monkeypatch, fake_cuda):
    """And a buffer that was loaded returns CUDA tensors."""
    train, gathered = load_script(method), []
    buffer = train.ImageBuffer(1)
    buffer(torch.rand(1, 3, 4, 4, device=CUDA))

    def gather(value):
        gathered.append(value)
        raise InterruptedError

    patch_run(monkeypatch, method, gather=gather, random_states=lambda *_: [])
    parts = {"nets": {"buffer_y": buffer}, "networks": {}, "device": CUDA}
    run = SimpleNamespace(**parts, read_losses=lambda: None)
    with pytest.raises(InterruptedError):
        train.Run.save(run)
    (image,) = [t for t in tree_leaves(gathered) if isinstance(t, torch.Tensor)]
    assert image.device.type == "cpu"
    loaded = train.ImageBuffer(1)
    loaded.load_state_dict({"images": [image]})
    assert loaded(torch.rand(1, 3, 4, 4, device=CUDA)).device == CUDA


def test_autocast_compile_and_fused_adam_work_together(method, monkeypatch):
    """On the CPU, with a compiler that traces as the default one does but generates no code."""
    train, compile = load_script(method), torch.nn.Module.compile
    compiled = []

    def compile_quickly(net):
        compiled.append(net)
        compile(net, backend="eager")

    monkeypatch.setattr(torch.nn.Module, "compile", compile_quickly)
    x, y = torch.rand(2, 1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    results = []
    for flags in ([], ["--compile"]):
        args = train.parse_args([*FLAGS[method], "--precision", "bf16", *flags])
        torch.manual_seed(0)
        nets = train.build(args, torch.device("cpu"))
        for layer in (m for net in nets.values() for m in getattr(net, "modules", list)()):
            if isinstance(layer, torch.nn.Dropout):
                layer.p = 0.0
        for _ in range(2):
            torch.manual_seed(0)
            losses = train.training_step(nets, x, y, args)
        results.append(torch.stack(list(losses.values())))
        assert all(p.defaults["fused"] for n, p in nets.items() if n.startswith("optimizer"))
    assert len(compiled) == sum(isinstance(net, torch.nn.Module) for net in nets.values())
    torch.testing.assert_close(*results, rtol=0.02, atol=0.01)


# --------------------------------------------------------------------------------- the benchmarks

MORE = {"pix2pix": [], "cycleGAN": ["--identity-ratio", "5"], "CUT": ["--NCE-ratio-id", "0"]}


@pytest.mark.parametrize("more", [False, True])
def test_the_plain_step_has_the_same_losses_and_gradients(method, more):
    train = load_script(method)
    args = train.parse_args([*FLAGS[method], *(MORE[method] if more else [])])
    x, y = torch.rand(2, 2, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    losses, gradients = [], []
    for is_plain in (True, False):
        torch.manual_seed(0)
        nets = train.build(args, torch.device("cpu"))
        nets = plain.with_default_adam(nets, args) if is_plain else nets
        torch.manual_seed(2)
        step = plain.STEPS[method] if is_plain else lambda _, *rest: train.training_step(*rest)
        losses.append(step(train, nets, x, y, args))
        names = [name for name in nets if name.startswith("optimizer")]
        moments = [state["exp_avg"] for name in names for state in nets[name].state.values()]
        gradients.append([2 * moment for moment in moments])  # beta_1 = 0.5
    assert len(losses[0]) >= 2 and len(gradients[0]) == len(gradients[1]) > 10
    for name, value in losses[0].items():
        torch.testing.assert_close(losses[1][name], value, rtol=1e-5, atol=1e-6)
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3 * float(other.abs().max()))


def test_flops_of_a_convolution():
    """2 for each product: forward, then as many for the gradient of the input and of the weight."""
    layer = torch.nn.Conv2d(5, 7, 3, bias=False)
    x = torch.rand(2, 5, 12, 10, requires_grad=True)
    forward = 2 * 2 * 7 * 5 * 9 * 10 * 8
    assert step_time.count_flops(layer, x) == forward
    assert step_time.count_flops(lambda: layer(x).sum().backward()) == 3 * forward


def test_the_table_of_medians_and_failures(tmp_path, monkeypatch, warm_python):
    monkeypatch.setattr(sys, "executable", warm_python)
    argv = ["--method", METHODS[-1], "--image-size", "32", "--device", "cpu"]
    failed = step_time.Process("fp32+graph", argv, tmp_path)
    assert "graph needs a CUDA device" in failed.error and failed.ask(1) == {}
    turns = [{"seconds": s, "waited": 0.5, "memory": 7e6} for s in (0.1, 0.3, 0.2)]
    fast = [{**turn, "seconds": 0.1} for turn in turns]
    common = {"error": None, "facts": {"flops": 2e9}, "ask": lambda _: [4e9, 5e9]}
    processes = [SimpleNamespace(name="plain", turns=turns, **common), failed]
    processes += [SimpleNamespace(name="bf16", turns=fast, **common)]
    rows = step_time.table(step_time.parse_args(argv), processes).splitlines()
    speed = "7 | 10 | 4, 5 | 50.00% |"
    assert f"| plain | 200.0 (100.0 to 300.0) | 5.00 | 1.00 (1.00 to 1.00) | {speed}" in rows
    assert any(row.startswith("| fp32+graph | failed: ") for row in rows)
    speed = "7 | 20 | 4, 5 | 50.00% |"
    assert f"| bf16 | 100.0 (100.0 to 100.0) | 10.00 | 2.00 (1.00 to 3.00) | {speed}" in rows


def test_the_benchmark_refuses_a_part_that_it_does_not_know(capsys):
    with pytest.raises(SystemExit) as ended:
        step_time.parse_args(["--method", "CUT", "--configs", "fp32@A=1", "bf16+magic@A=1"])
    assert ended.value.code == 2 and "--configs bf16+magic@A=1: " in capsys.readouterr().err


def test_a_configuration_sets_the_environment_of_its_process(tmp_path, monkeypatch):
    (tmp_path / "script.py").write_text("import os; print('{\"A\": ' + os.environ['A'] + '}')")
    monkeypatch.setattr(step_time, "__file__", str(tmp_path / "script.py"))
    assert step_time.Process("fp32@A=7", [], tmp_path).facts == {"A": 7}


@pytest.mark.parametrize("a, b, gap", [(2, 1, 0), (2.2, 1, 0.1), (2, math.nan, math.nan)])
def test_parity_takes_the_largest_difference_and_notices_nan(a, b, gap):
    found = parity.difference({"a": a, "b": b}, {"a": 2.0, "b": 1.0})
    assert found == pytest.approx(gap, nan_ok=True)


@pytest.mark.skipif(sys.platform != "linux", reason="needs bash and GNU timeout")
def test_rehearsal_of_the_first_hour_on_a_gpu(tmp_path, warm_python):
    write_pairs(tmp_path / "data", "facades", train=20, test=1)
    settings = {"PYTHON": warm_python, "DATA_ROOT": f"{tmp_path}/data", "METHODS": "pix2pix"}
    settings |= {"DEVICE": "cpu", "IMAGE_SIZE": "32", "CONFIGS": "fp32", "STEPS": "2"}
    settings |= {"ROUNDS": "1", "FLAGS": "--ngf 4 --ndf 4", "EXPERIMENTS": "--dry-run"}
    command = [ROOT / "benchmarks" / "gpu.sh", "100", "out"]
    subprocess.run(command, cwd=tmp_path, env=os.environ | settings, check=True)
    out = tmp_path / "out"
    summary = (out / "summary.txt").read_text().splitlines()
    names = ["parity-pix2pix.md", "step_time-pix2pix.txt", "resume-pix2pix.txt", "ranks.txt"]
    assert summary == [f"done: {name}" for name in (*names, "training.txt")]
    assert "| fp32 | 0.0e+00 | 0.0e+00 |" in (out / "parity-pix2pix.md").read_text()
    assert "| fp32 |" in (out / "step_time-pix2pix.md").read_text()
    timings = json.loads((out / "step_time-pix2pix.json").read_text())
    for name in ("plain", "fp32"):
        (turn,) = timings[name]["turns"]
        assert turn["seconds"] > 0 and turn["memory"] > 0 and timings[name]["flops"] > 1e6
    assert "largest relative difference: 0.0e+00" in (out / "resume-pix2pix.txt").read_text()
    assert "gradients are averaged" in (out / "ranks.txt").read_text()
    assert "pix2pix/train.py" in (out / "training.txt").read_text()


@pytest.mark.skipif(sys.platform != "linux", reason="needs bash and GNU timeout")
def test_without_time_the_gpu_script_runs_nothing_and_ends_cleanly(tmp_path, warm_python):
    command = [ROOT / "benchmarks" / "gpu.sh", "0", str(tmp_path / "out")]
    environment = os.environ | {"PYTHON": warm_python}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.count("not run, the time is over") == 11
    assert done.stdout == (tmp_path / "out" / "summary.txt").read_text()

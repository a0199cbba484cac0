"""What a run of each method promises: exact resume, its files, checked checkpoints and flags."""

import itertools
import json
import os
import runpy
import shutil
import subprocess
import sys
import zipfile
from argparse import Namespace

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from conftest import FOUR_EPOCHS, METHODS, ROOT, assert_same, error_line, one_method, patch_run, spy


@pytest.mark.parametrize("step, workers", [(3, "20"), (5, "02"), (4, "00")])
def test_stopped_and_resumed_equals_never_stopped(run, straight, step, workers):
    """Steps 3 and 5 are in the middle of epochs 2 and 3, step 4 is the last of epoch 2."""
    assert run(*FOUR_EPOCHS, "--max-steps", str(step), "--num-workers", workers[0]) == 0
    assert run.state()["progress"]["step"] == step
    assert run.resume("--num-workers", workers[1]) == 0
    assert_same(run.traces(), straight)


def test_stopped_at_every_step_equals_never_stopped(run, straight):
    assert run(*FOUR_EPOCHS, "--max-steps", "1") == 0
    for step in range(2, 9):
        assert run.resume("--max-steps", str(step)) == 0
        assert run.state()["progress"]["step"] == step
    assert_same(run.traces(), straight)


def test_bf16_resumes_exactly_and_keeps_fp32_weights(run, straight, monkeypatch):
    bf16 = [*FOUR_EPOCHS, "--epochs", "1", "--precision", "bf16"]
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    assert run(*bf16) == 0
    expected = run.traces()
    assert run(*bf16, "--overwrite", "--max-steps", "1") == 0
    assert run.resume() == 0
    assert_same(run.traces(), expected)
    weights = expected["checkpoint"]["G"]
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    assert not all(torch.equal(weights[n], straight["checkpoint"]["G"][n]) for n in weights)


def test_sampling_does_not_change_the_training(run, straight):
    assert run(*FOUR_EPOCHS, "--sample-every", "100") == 0
    for part in ("G", "ranks"):
        assert_same(run.state()[part], straight["checkpoint"][part])


def test_order_and_augmentation_depend_on_seed_epoch_and_index_alone(run, monkeypatch):
    calls = spy(monkeypatch, run.module, "training_step")
    for flags in (["--num-workers", "2"], ["--num-workers", "0"], ["--seed", "1"]):
        assert run(*FOUR_EPOCHS, "--epochs", "2", "--overwrite", *flags) == 0
    seen = [x for (_nets, x, *_), _ in calls]
    first, again, other = (torch.cat(seen[k : k + 4]) for k in (0, 4, 8))
    assert torch.equal(first, again)
    epochs = [first[:6], first[6:], other[:6]]
    for one, two in itertools.combinations(epochs, 2):
        assert not torch.equal(one, two)
        sums = [epoch.sum((1, 2, 3)).sort()[0] for epoch in (one, two)]  # whatever the order
        assert not torch.allclose(*sums)


@one_method
def test_the_seed_sets_the_initial_weights(run):
    weights = []
    for seed in "01":
        assert run(*FOUR_EPOCHS, "--max-steps", "1", "--overwrite", "--seed", seed) == 0
        weights.append(run.state()["G"])
    differences = [(weights[0][name] - weights[1][name]).abs().max() for name in weights[0]]
    assert max(differences) > 0.01  # one step of Adam changes 2e-4


@one_method
def test_bf16_is_refused_where_it_is_slow(run, monkeypatch, capsys):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    assert run("--precision", "bf16") == 2
    assert "use tf32 or fp32" in error_line(capsys)


@one_method
def test_max_steps_counts_from_the_start_of_the_run(run):
    assert run(*FOUR_EPOCHS, "--max-steps", "3") == 0
    assert run.resume("--max-steps", "2") == 0  # done already
    assert run.state()["progress"]["step"] == 3


@one_method
def test_more_epochs_may_be_asked_for(stopped):
    assert stopped.resume("--epochs", "5") == 0
    assert [row["epoch"] for row in stopped.rows()] == ["1", "2", "3", "4", "5"]
    assert stopped.state()["args"]["epochs"] == 5


@one_method
@pytest.mark.parametrize("typed", [["--lr", "0.1"], ["--no-flip"], ["--batch-size", "1"]])
def test_a_flag_that_differs_from_the_checkpoint_is_named(stopped, capsys, typed):
    assert stopped.resume(*typed) == 2
    assert typed[0].replace("no-", "") in error_line(capsys)


@one_method
def test_a_finished_run_stays_as_it_is(run, straight):
    assert run(*FOUR_EPOCHS) == 0
    assert run.resume() == 0
    assert_same(run.traces(), straight)


@one_method
def test_a_run_folder_that_was_renamed_resumes_under_its_new_name(run, straight):
    assert run(*FOUR_EPOCHS, "--max-steps", "3") == 0
    model = run.checkpoint.parent.rename(run.checkpoint.parents[1] / "renamed")
    run.folder = run.folder.rename(run.folder.with_name("renamed"))
    run.checkpoint = model / "checkpoint.pt"
    assert run.resume("--run-name", "renamed") == 0
    assert_same(run.traces(), straight)


@one_method
def test_before_the_first_checkpoint_resume_starts(run, straight):
    assert run(*FOUR_EPOCHS, "--resume") == 0
    assert_same(run.traces(), straight)


@one_method
@pytest.mark.parametrize("change", ["renamed", "removed"])
def test_a_changed_training_set_is_noticed_by_its_names(run, capsys, change):
    """Replacing an image keeps the number of images. The interrupted epoch starts again."""
    assert run(*FOUR_EPOCHS, "--max-steps", "3") == 0
    image = run.images()[0]
    image.rename(image.with_name("999.png")) if change == "renamed" else image.unlink()
    assert run.resume() == 0
    assert "training images have changed" in capsys.readouterr().out
    assert run.state()["progress"]["step"] == 9
    files = run.state()["progress"]["files"]
    assert any("999.png" in name for name in files) == (change == "renamed")


def test_what_a_run_leaves(run, monkeypatch):
    if run.method == "pix2pix":
        patch_run(monkeypatch, run.method, Figure=Figure)
    assert run(*FOUR_EPOCHS, "--sample-every", "2") == 0
    names = {"pix2pix": "x y y_G", "cycleGAN": "x y x_G y_G", "CUT": "x y_G"}[run.method].split()
    grids = {f"{name}{epoch}.png" for epoch in (1, 3, 4) for name in names}
    assert {file.name for file in run.folder.glob("val/*")} == grids
    assert Image.open(run.folder / "val" / "x1.png").size == (2 + 3 * 34, 36)  # of the test images
    assert len({(run.folder / "val" / f"y_G{epoch}.png").read_bytes() for epoch in (1, 3, 4)}) == 3
    rows = run.rows()
    assert list(rows[0])[:4] == ["epoch", "seconds", "images_per_second", "learning_rate"]
    assert [row["epoch"] for row in rows] == ["1", "2", "3", "4"]
    rates = [float(row["learning_rate"]) for row in rows]
    assert rates == pytest.approx([2e-4, 2e-4, 2e-4 * 2 / 3, 2e-4 / 3])
    adams = [part for name, part in run.state().items() if name.startswith("optimizer")]
    assert {adam["param_groups"][0]["lr"] for adam in adams} == {rates[3]}
    measure = {"pix2pix": "test_l1", "cycleGAN": "l1_xy", "CUT": "l1"}[run.method]
    assert [row[measure] != "" for row in rows] == [True, False, True, True]
    if run.method == "pix2pix":
        assert len(Image.open(run.folder / "losses.png").getcolors(1 << 24)) > 10
    facts = json.loads((run.folder / "args.json").read_text())
    typed = vars(run.module.parse_args(run.argv(*FOUR_EPOCHS, "--sample-every", "2")))
    assert {name: facts[name] for name in typed} == typed
    assert run.module.parse_args([], saved={"data_folder": "auto"}).data_folder == "auto"
    git = ["git", "rev-parse", "HEAD"]
    head = subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    assert (facts["commit"] or "").removesuffix("-dirty") == head
    found = [facts[name] for name in ("method", "torch", "device_used")]
    assert found == [run.method, torch.__version__, "cpu"]
    names = {"args.json", ".lock", "losses.csv", "losses.png", "val"}
    assert {f.name for f in run.folder.iterdir()} == names
    assert [f.name for f in run.checkpoint.parent.iterdir()] == ["checkpoint.pt"]


@pytest.mark.parametrize("method", sorted({*METHODS} - {"pix2pix"}), scope="module")
def test_the_original_repositorys_names_of_train_work(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "train", run.module)
    monkeypatch.setattr(sys, "argv", ["train.py", *run.argv("--epochs", "1")])
    with pytest.raises(SystemExit, match=r"^0$"):
        runpy.run_path(str(ROOT / run.method / f"{run.method}_train.py"), run_name="__main__")
    assert len(run.rows()) == 1


@one_method
def test_losses_are_means_over_the_epochs_steps(run, monkeypatch):
    calls = spy(monkeypatch, run.module, "training_step")
    assert run(*FOUR_EPOCHS) == 0
    seen = [losses for _, losses in calls]
    assert [name for name in run.rows()[0] if name in seen[0]] == [*seen[0]]  # G_total first
    for row, first in zip(run.rows(), range(0, 8, 2), strict=True):
        for name in seen[0]:
            mean = (seen[first][name] + seen[first + 1][name]).item() / 2
            assert float(row[name]) == pytest.approx(mean, rel=1e-6), name


@one_method
def test_without_save_model_it_says_so_at_the_start_and_saves_nothing(run, capsys):
    assert run("--epochs", "1") == 0
    _, start, *_, end = capsys.readouterr().out.strip().splitlines()
    assert "--save-model" in start and "--save-model" in end
    assert not run.checkpoint.parent.exists()
    assert (run.folder / "losses.csv").exists() and (run.folder / "val" / "x1.png").exists()
    assert run.resume() == 2
    assert "has no checkpoint: --overwrite or a new --run-name" in error_line(capsys)


@one_method
def test_the_start_tells_how_long_the_run_will_take(run, capsys):
    assert run("--epochs", "10", "--batch-size", "1") == 0
    shown = capsys.readouterr()
    assert "\ntime left for the whole run: 0:0" in shown.out
    assert "59/60" in shown.err.replace("60/60", "59/60")  # the bar counts the whole run's steps


@one_method
def test_a_second_run_of_the_same_name_is_refused(stopped, capsys):
    before = stopped.traces()
    assert stopped("--epochs", "1") == 2
    error = error_line(capsys)
    assert all(way in error for way in ("--resume", "--run-name", "--overwrite"))
    assert_same(stopped.traces(), before)
    assert stopped("--epochs", "1", "--run-name", "other") == 0


@one_method
def test_overwrite_replaces_the_run_but_no_foreign_files(run, straight):
    assert run(*FOUR_EPOCHS, "--epochs", "5") == 0
    (run.folder / "val" / "best.txt").write_text("mine")
    (run.checkpoint.parent / ".checkpoint.pt.1.tmp").write_text("what a kill left")
    assert run(*FOUR_EPOCHS, "--overwrite") == 0
    assert (run.folder / "val" / "best.txt").read_text() == "mine"
    assert_same(run.traces(), straight)
    assert [f.name for f in run.checkpoint.parent.iterdir()] == ["checkpoint.pt"]
    assert run("--epochs", "1", "--overwrite") == 0  # its checkpoint would not be of this run
    assert not run.checkpoint.exists()


@one_method
def test_a_model_folder_that_cannot_be_written_is_found_first(run, capsys):
    """Before the first step; and --overwrite deletes nothing then."""
    assert run("--epochs", "1") == 0
    before = run.rows()
    shutil.rmtree(run.root / run.method, ignore_errors=True)
    (run.root / run.method).write_text("a file where the folder belongs")
    assert run(*FOUR_EPOCHS, "--overwrite") == 2
    assert "cannot write" in error_line(capsys)
    assert run.rows() == before and (run.folder / "val" / "x1.png").exists()


def test_ema_averages_the_weights_that_it_leaves_alone(run, straight, monkeypatch):
    """The same G; G_ema follows the formula, resumes, and is what grids show."""
    weights, update = [], run.module.update_averages

    def watched(nets, decay):
        weights.append([p.detach().clone() for p in nets["G"].parameters()])
        update(nets, decay)

    monkeypatch.setattr(run.module, "update_averages", watched)
    assert run(*FOUR_EPOCHS, "--ema", "0.9", "--max-steps", "3") == 0
    assert run.resume() == 0
    state = run.state()
    assert_same(state["G"], straight["checkpoint"]["G"])
    assert len(weights) == 8
    torch.manual_seed(0)
    nets = run.module.build(run.module.parse_args(run.argv(*FOUR_EPOCHS)), torch.device("cpu"))
    average = {name: p.detach() for name, p in nets["G"].named_parameters()}
    for step in weights:
        average = {n: 0.9 * a + 0.1 * w for (n, a), w in zip(average.items(), step, strict=True)}
    torch.testing.assert_close(dict(state["G_ema"]), average, rtol=1e-4, atol=1e-7)
    assert (run.folder / "val" / "y_G4.png").read_bytes() != straight["val"]["y_G4.png"]


def test_init_from_takes_the_weights_only(run, monkeypatch):
    assert run(*FOUR_EPOCHS, "--max-steps", "2") == 0
    source, first = run.state(), []
    training_step = run.module.training_step

    def watched(nets, *rest):
        first.append({n: p.detach().clone() for n, p in nets["G"].state_dict().items()})
        assert not first[1:] or nets["optimizer_G"].state
        return training_step(nets, *rest)

    monkeypatch.setattr(run.module, "training_step", watched)
    flags = ["--run-name", "fine", "--init-from", run.folder, "--epochs", "1"]
    assert run(*flags, "--seed", "5") == 0
    assert_same(dict(first[0]), dict(source["G"]))
    assert len(first) == 6  # it starts at step 1


@one_method
def test_a_flipped_bit_is_noticed(stopped, capsys):
    """In the contents of the archive's files; torch.load alone would use the changed weights."""
    whole, rng = stopped.checkpoint.read_bytes(), np.random.default_rng(0)
    with zipfile.ZipFile(stopped.checkpoint) as archive:
        contents = [archive.read(name) for name in archive.namelist()]
    contents = [content for content in contents if len(content) > 100]
    for number in rng.integers(len(contents), size=20):
        damaged, start = bytearray(whole), whole.index(contents[number])
        damaged[start + rng.integers(len(contents[number]))] ^= 1 << rng.integers(8)
        stopped.checkpoint.write_bytes(damaged)
        assert stopped.resume() == 2, start
        assert str(stopped.checkpoint) in error_line(capsys)


class Trap:
    """Ends the process where it is unpickled."""

    def __reduce__(self):
        return sys.exit, (77,)


def change(*path, to):
    """A function that replaces what is at a path in a checkpoint."""

    def act(state):
        place = state
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = to(place[path[-1]]) if callable(to) else to
        return state

    return act


def first(weights, function):
    """weights with its first entry changed."""
    name = next(name for name, weight in weights.items() if weight.dim() > 1)
    return {**weights, name: function(weights[name])}


def without(name):
    return lambda state: {n: v for n, v in state.items() if n != name}


DAMAGE = [  # what the error says, and a function of the state, or of the bytes of the file
    ("cannot read", lambda whole: whole[: len(whole) // 2]),
    ("cannot read", lambda whole: b"garbage" * 100),
    ("cannot read", lambda whole: b""),
    ("not a checkpoint", lambda state: [1, 2]),
    ("Python objects", lambda state: {**state, "trap": Trap()}),
    ("Python objects", lambda state: torch.nn.Linear(2, 2)),
    ("not a checkpoint", lambda state: state["G"]),
    ("not a checkpoint", lambda state: {"state_dict": state["G"]}),
    ("not a checkpoint", without("args")),
    ("checkpoint of pix3pix", change("method", to="pix3pix")),
    ("does not fit", without("optimizer_D")),
    ("size mismatch", change("G", to=lambda weights: first(weights, lambda w: w[:1]))),
    ("not finite", change("G", to=lambda weights: first(weights, lambda w: w * torch.nan))),
    ("does not fit", change("G", to="text")),
    ("moments", change("optimizer_G", "state", 0, "exp_avg", to=lambda m: m.flatten()[:1])),
    ("not finite", change("optimizer_G", "state", 0, "exp_avg", to=lambda m: m * torch.nan)),
    ("--ngf", change("args", "ngf", to="four")),
    ("--lr", change("args", "lr", to=[1])),
    ("--flip", change("args", "flip", to=3)),
    ("--num-workers", change("args", "num_workers", to=100000)),
    ("--epochs", change("args", "epochs", to=-4)),
    ("--fit", change("args", "fit", to="fold")),
    ("does not fit", change("progress", "step", to="two")),
    ("progress", change("progress", "epoch", to=-1)),
    ("progress", change("progress", "batch", to=-1)),
    ("progress", change("progress", "batch", to=10**6)),
    ("does not fit", change("progress", "rows", to=[{"epoch": [1]}])),
    ("does not fit", change("progress", "sums", to={"G": None})),
    ("does not fit", without("progress")),
    ("use --init-from", without("ranks")),
    ("does not fit", change("ranks", 0, "random", to=[torch.zeros(3)])),
    ("does not fit", change("ranks", to=3)),
    ("--nproc-per-node 2", change("ranks", to=lambda ranks: ranks * 2)),
]


@one_method
def test_a_checkpoint_is_input_that_is_checked(stopped, capsys):
    whole = stopped.checkpoint.read_bytes()
    for number, (words, damage) in enumerate(DAMAGE):
        stopped.checkpoint.write_bytes(whole)
        if number < 3:
            stopped.checkpoint.write_bytes(damage(whole))
        else:
            torch.save(damage(stopped.state()), stopped.checkpoint)
        assert stopped.resume() == 2, (number, words)
        error = error_line(capsys)
        assert str(stopped.checkpoint) in error and words in error, (number, words, error)
    stopped.checkpoint.write_bytes(whole)
    assert stopped.resume("--max-steps", "2") == 0


BAD_FLAGS = [
    *("--batch-size 0", "--batch-size two", "--epochs -1", "--epochs 0", "--image-size -32"),
    *("--load-size 31", "--num-workers -1", "--num-workers 999", "--lr 0", "--lr nan", "--lr inf"),
    *("--ngf 0", "--seed -1", "--sample-every 0", "--max-steps -1", "--precision fp16", "--ema 1"),
    *("--device nonsense", "--device cuda:99", "--device meta", "--run-name ../x", "--run-name .."),
    *("--resume --overwrite", "--no-such-flag", "--epoch 3", "--data-folder", "surplus", "--fit x"),
]


@one_method
def test_bad_flags_get_one_line(run, capsys):
    for flags in BAD_FLAGS:
        assert run(*flags.split()) == 2, flags
        error = error_line(capsys)
        assert flags.split()[0] in error and len(error) < 300, flags
    assert not (run.root / "visualize").exists()


COMMON = {
    "data_folder": "facades", "data_root": f"{ROOT}/datasets", "output_root": str(ROOT),
    "run_name": "facades", "epochs": 200, "batch_size": 1, "num_workers": min(4, os.cpu_count()),
    "load_size": 286, "image_size": 256, "fit": "stretch", "jitter": True, "flip": True,
    "swap_xy": False, "ngf": 64, "ndf": 64, "lr": 2e-4, "ema": 0, "seed": 0, "sample_every": 10,
    "save_model": False, "resume": False, "init_from": "", "overwrite": False, "device": "auto",
    "precision": "tf32", "compile": False, "max_steps": 0,
}  # fmt: skip
DEFAULTS = {"pix2pix": {**COMMON, "l1_ratio": 100}}
DEFAULTS["cycleGAN"] = {
    **COMMON, "n_layers": 9, "buffer_size": 50, "cycle_ratio": 10, "pix_loss": False,
    "pix_ratio": 5, "pix_blur": False, "pix_pool": 1, "identity_ratio": 0, "antialias": False,
}  # fmt: skip
DEFAULTS["CUT"] = {
    **COMMON, "epochs": 400, "n_layers": 9, "buffer_size": 0, "num_patches": 256,
    "feat_str": "pix, d128, d256, R256_1, R256_5", "NCE_ratio": 1, "NCE_ratio_id": 1,
    "detach": True, "flip_equivariance": False, "antialias": False, "fast": False, "tau": 0.07,
    "nce": "infonce", "query": "random", "src_ratio": 0,
}  # fmt: skip


def test_the_defaults_are_the_papers_in_every_working_directory(run, monkeypatch):
    monkeypatch.chdir(run.root)
    assert vars(run.module.parse_args([])) == DEFAULTS[run.method]


def test_every_flag_is_there_and_read_by_somebody(run):
    read = set()

    class Watched(Namespace):
        def __getattribute__(self, name):
            read.add(name)
            return super().__getattribute__(name)

    args = vars(run.module.parse_args(run.argv("--epochs", "1", "--batch-size", "4")))
    assert args.keys() == DEFAULTS[run.method].keys()
    run.module.train(Watched(**{**args, **({"pix_loss": True} if "pix_loss" in args else {})}))
    assert set(args) - read == set()


@one_method
def test_the_end_names_the_next_command(run, capsys):
    assert run(*FOUR_EPOCHS, "--max-steps", "1") == 0
    assert f"python {run.method}/train.py --run-name run --resume" in capsys.readouterr().out
    assert run(*FOUR_EPOCHS, "--max-steps", "1", "--run-name", "a b") == 0
    assert "--run-name 'a b' --resume" in capsys.readouterr().out
    assert run.resume() == 0
    translate = f"python {run.method}/translate.py --checkpoint {run.checkpoint}"
    shown = capsys.readouterr().out
    assert translate in shown and f"grids: {run.folder / 'val'}\n" in shown

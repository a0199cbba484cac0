"""experiments/: what run.py starts, and what judge.py makes of the results."""

import csv
import importlib
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import METHODS, ROOT, load_script, write_pairs, write_unpaired

sys.path.insert(0, str(ROOT / "experiments"))
run, judge = (importlib.import_module(name) for name in ("run", "judge"))

RUNS = [(e, seed) for e in run.EXPERIMENTS for seed in e.seeds]


def printed(capsys, *flags):
    """The command lines of a dry run, as lists of words."""
    assert run.main(["--dry-run", *flags]) == 0
    return [shlex.split(line) for line in capsys.readouterr().out.splitlines()]


def runs_named(commands):
    return [words[words.index("--run-name") + 1] for words in commands]


def seeds_of(commands):
    return {words[words.index("--seed") + 1] for words in commands}


# --------------------------------------------------------------------------------------- run.py


def test_dry_run_prints_what_every_train_accepts(capsys):
    commands = printed(capsys)
    assert len(commands) == len(RUNS) > 50
    places = set()
    for python, script, *flags in commands:
        method = Path(script).parent.name
        assert python == "python" and Path(script).name == "train.py"
        if method in METHODS:
            args = load_script(method).parse_args(flags)
            assert args.save_model and args.run_name.endswith(f"-seed-{args.seed}")
        places.add((script, *runs_named([flags])))
    assert len(places) == len(commands)  # no run writes into another's folder


def test_every_question_has_its_runs():
    assert {q for e in run.EXPERIMENTS for q in e.questions} == run.QUESTIONS.keys()


def test_filters(capsys):
    everything = printed(capsys)
    some = printed(capsys, "--only", "facades-buffer-50", "toy-fp32-seed-1")
    assert sorted(set(runs_named(some))) == [
        *("facades-buffer-50-seed-0", "facades-buffer-50-seed-1", "toy-fp32-seed-1")
    ]
    seven = printed(capsys, "--questions", "7", "8")
    expected = {"facades", "facades-patches-64", "facades-no-detach"}
    assert {name[:-7] for name in runs_named(seven)} == expected
    assert seeds_of(everything) == {"0", "1", "2"}
    assert seeds_of(printed(capsys, "--seeds", "1")) == {"1"}
    assert len(printed(capsys, "--questions", "7", "--seeds", "1", "--only", "facades-p")) == 1
    assert [words[words.index("--seed") + 1] for words in everything][0::56] == ["0", "2"]


@pytest.mark.parametrize("module", [run, judge])
def test_a_choice_that_leaves_nothing_is_an_error(module, capsys):
    for flags in (["--only", "nosuch"], ["--questions", "1", "--seeds", "7"]):
        with pytest.raises(SystemExit) as ended:
            module.parse_args(flags)
        assert ended.value.code == 2
        assert "leave no run" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        judge.parse_args(["--root", "/no/such/folder"])
    assert capsys.readouterr().err == "judge.py: error: --root /no/such/folder is no folder\n"
    with pytest.raises(SystemExit):
        run.parse_args(["--dry"])
    assert capsys.readouterr().err == "run.py: error: unrecognized arguments: --dry\n"


def write_losses(root, experiment, seed, epochs, **columns):
    """losses.csv of a run of so many epochs. columns: what was measured, "" for epochs without."""
    folder = run.run_folder(root, experiment, seed)
    folder.mkdir(parents=True, exist_ok=True)
    columns = {"epoch": range(1, epochs + 1), **columns}
    with open(folder / "losses.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
    return folder


@pytest.fixture
def started(tmp_path, monkeypatch):
    """The commands that run.py starts, none of which is run."""
    commands = []

    class Child:
        def __init__(self, words, **options):
            commands.append(words)

        def wait(self):
            return 3 if "fails" in " ".join(commands[-1]) else 0

    monkeypatch.setattr(run, "ROOT", tmp_path)
    monkeypatch.setattr(run.subprocess, "Popen", Child)
    monkeypatch.setattr(run.signal, "signal", lambda *_: None)
    return commands


def test_complete_is_passed_over_and_stopped_goes_on(tmp_path, monkeypatch, started, capsys):
    names = ["complete", "stopped", "lost", "shown", "new", "fails"]
    table = [run.Experiment((1,), "CUT", name, "--epochs 3", (0,)) for name in names]
    complete, stopped, lost, shown, *_ = table
    monkeypatch.setattr(run, "EXPERIMENTS", table)
    write_losses(tmp_path, complete, 0, epochs=3)
    write_losses(tmp_path, stopped, 0, epochs=2)
    for name in ("complete-seed-0", "stopped-seed-0"):
        checkpoint = tmp_path / "CUT" / "model" / name / "checkpoint.pt"
        checkpoint.parent.mkdir(parents=True)
        checkpoint.touch()
    write_losses(tmp_path, lost, 0, epochs=1)
    write_losses(tmp_path, shown, 0, epochs=3)
    assert run.main(["--data-root", str(tmp_path)]) == 1
    assert "5 of 6 runs are complete" in (output := capsys.readouterr()).out
    assert "CUT fails-seed-0: exit status 3, see" in output.err
    place = ["--data-root", str(tmp_path), "--num-workers", "0"]
    script = [sys.executable, "CUT/train.py"]
    flags = ["--epochs", "3", "--seed", "0", "--run-name"]
    assert started == [
        [*script, "--run-name", "stopped-seed-0", "--resume", *place],
        [*script, *flags, "lost-seed-0", "--save-model", "--overwrite", *place],
        [*script, *flags, "shown-seed-0", "--save-model", "--overwrite", *place],
        [*script, *flags, "new-seed-0", "--save-model", *place],
        [*script, *flags, "fails-seed-0", "--save-model", *place],
    ]


@pytest.mark.skipif("CUT" not in METHODS, reason="no CUT folder")
def test_a_real_stopped_run_goes_on_and_is_judged(tmp_path):
    """A run of 2 epochs of 2 steps, stopped after its first; judged without translate.py."""
    for name in ("CUT", "experiments"):
        (tmp_path / name).mkdir()
        for file in (ROOT / name).glob("*.py"):
            if file.name != "translate.py":
                shutil.copy(file, tmp_path / name)
    write_unpaired(tmp_path / "datasets", train=(2, 2), test=2)
    flags = "--data-folder unpaired --image-size 32 --load-size 32 --ngf 4 --ndf 4 --n-layers 1"
    flags += " --epochs 2 --sample-every 1 --num-patches 8 --feat-str d128"
    tiny = f"[run.Experiment((5,), 'CUT', 'tiny', {flags!r}, (0,))]"
    sitting = f"import sys, run, judge; run.EXPERIMENTS[:] = {tiny}; "
    sitting += "judge.QUESTIONS = {5: 'tiny'}; "

    def python(*words, cwd=tmp_path):
        done = subprocess.run([sys.executable, *words], cwd=cwd, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    first = [*shlex.split(flags), "--seed", "0", "--run-name", "tiny-seed-0", "--save-model"]
    python("CUT/train.py", *first, "--max-steps", "1", "--num-workers", "0")
    here = tmp_path / "experiments"
    assert "1 of 1 runs" in python("-c", sitting + "sys.exit(run.main([]))", cwd=here)
    folder = tmp_path / "visualize" / "CUT" / "tiny-seed-0"
    log = (folder / "log.txt").read_text()
    assert "done: 2 epochs, 4 steps" in log
    assert json.loads((folder / "args.json").read_text())["resume"] is True
    before = (folder / "log.txt").stat()
    assert "1 of 1 runs" in python("-c", sitting + "sys.exit(run.main([]))", cwd=here)
    assert (folder / "log.txt").stat() == before  # nothing was started
    assert "there is no CUT/translate.py" in python("-c", sitting + "judge.main([])", cwd=here)
    (row,) = judge.read_results(here / "results.csv").values()
    last = list(csv.DictReader((folder / "losses.csv").open()))[-1]
    for name in judge.LOGGED:
        assert float(row[name]) == pytest.approx(float(last[name]), rel=1e-5)
    assert row["swd"] == row["shift_psnr"] == "" and row["epochs"] == "2"


# -------------------------------------------------------------------------------------- judge.py


def test_flags_of_a_run_are_compared_with_the_table():
    for experiment, seed in RUNS:
        if experiment.method in METHODS:
            args = load_script(experiment.method).parse_args(run.command(experiment, seed)[2:])
            judge.check_flags(experiment, vars(args))
    experiment = run.Experiment((1,), "CUT", "a", "--lr 2e-4 --epochs 3 --no-detach --antialias")
    flags = {"lr": 0.0002, "epochs": 3, "detach": False, "antialias": True}
    judge.check_flags(experiment, flags)
    for name, value in (("lr", 1e-4), ("epochs", 2), ("detach", True), ("antialias", False)):
        with pytest.raises(judge.RunError, match=f"trained with {value} for --(no-)?{name}"):
            judge.check_flags(experiment, {**flags, name: value})


def test_what_losses_csv_says(tmp_path):
    experiment = run.Experiment((2,), "cycleGAN", "a", "--epochs 3")
    columns = {"l1_xy": [0.5, "", 0.3, 0.4], "l1_yx": [0.9, "", 0.9, 0.8]}
    folder = write_losses(tmp_path, experiment, 0, 4, **columns, luminance_yx=["", "", "", -0.5])
    found = judge.logged(folder, "x2y")
    assert found["l1"] == 0.4 and found["l1_deviation"] == pytest.approx(0.1)
    assert found["l1_step"] == pytest.approx(0.15)
    assert "luminance" not in found and "change" not in found
    found = judge.logged(folder, "y2x")
    assert found["l1"] == 0.8 and found["luminance"] == -0.5 and "luminance_step" not in found
    folder = write_losses(tmp_path, experiment, 1, 1, test_l1=[0.7])
    assert judge.logged(folder, "x2y") == {"l1": 0.7}


@pytest.mark.parametrize("swapped", [False, True])
def test_the_test_pictures_are_those_of_train(tmp_path, swapped):
    from pix2pix_dataset import PairDataset

    write_pairs(tmp_path, size=48)
    flags = {"data_folder": "pairs", "image_size": 32, "swap_xy": swapped}
    theirs = PairDataset(tmp_path, "pairs", "test", 32, 32, swapped)
    sides = judge.test_pictures("pix2pix", flags, tmp_path)
    for side, k in zip(sides, (0, 1), strict=True):
        assert list(side) == ["000", "001", "002"]
        for index, image in enumerate(side.values()):
            tensor = theirs[0, index][k]
            ours = np.asarray(image).transpose(2, 0, 1) / 127.5 - 1
            np.testing.assert_allclose(ours, tensor.numpy(), atol=1e-6)


@pytest.mark.parametrize("swapped", [False, True])
def test_unpaired_test_pictures(tmp_path, swapped):
    write_unpaired(tmp_path, size=32)
    shutil.copytree(tmp_path / "unpaired" / "test" / "x", tmp_path / "authors" / "testA")
    shutil.copytree(tmp_path / "unpaired" / "test" / "y", tmp_path / "authors" / "testB")
    wanted = [np.asarray(Image.open(tmp_path / "unpaired/test" / s / "001.png")) for s in "xy"]
    for name in ("unpaired", "authors"):
        flags = {"data_folder": name, "image_size": 32, "swap_xy": swapped}
        sides = judge.test_pictures("CUT", flags, tmp_path)
        for side, k in zip(sides, (1, 0) if swapped else (0, 1), strict=True):
            assert np.array_equal(side["001"], wanted[k]) and len(side) == 3
    with pytest.raises(judge.RunError, match="no test pictures"):
        judge.test_pictures("CUT", {**flags, "data_folder": "nowhere"}, tmp_path)


TRANSLATE = """
import shutil, sys
words = dict(zip(sys.argv[1::2], sys.argv[2::2]))
shutil.copytree(words["--input"], words["--output"])
"""
EVALUATE = """
import json, pathlib, sys
made, true, *words = sys.argv[1:]
sets = [sorted(path.name for path in pathlib.Path(place).iterdir()) for place in (made, true)]
report = {"stripes": {"vertical_2": 1, "horizontal_2": 2, "vertical_4": 3, "horizontal_4": 6,
    "shift_psnr": None}, "change": {"l1": 0.25, "luminance": len(sets[0])}, "unpaired": {"swd": 7}}
if "--paired" in words:
    report["paired"] = {"l1": 0.5}
pathlib.Path(words[words.index("--json") + 1]).write_text(json.dumps(report))
log = pathlib.Path(__file__).with_name("log.json")
log.write_text(json.dumps([sets, words[words.index("--direction") + 1 :][:1]]))
"""


def test_what_evaluate_says(tmp_path, monkeypatch):
    write_unpaired(tmp_path / "datasets", test=2)
    extra = tmp_path / "datasets" / "unpaired" / "test" / "y" / "999.png"
    flags = {"data_folder": "unpaired", "image_size": 32, "swap_xy": False}
    experiment = run.Experiment((2,), "cycleGAN", "a", "", (0,))
    args = judge.parse_args(["--root", str(tmp_path)])
    monkeypatch.setattr(judge, "ROOT", tmp_path)
    checkpoint = judge.checkpoint(experiment, 0, args)
    for path, text in (
        (tmp_path / "cycleGAN" / "translate.py", TRANSLATE),
        (tmp_path / "evaluate.py", EVALUATE),
        (checkpoint, ""),
    ):
        with pytest.raises(judge.RunError, match=f"there is no .*{path.name}"):
            judge.evaluated(experiment, 0, "x2y", flags, args)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    found = judge.evaluated(experiment, 0, "x2y", flags, args)
    expected = {"stripes_2": 1.5, "stripes_4": 4.5, "shift_psnr": None, "swd": 7}
    assert found == {**expected, "change": 0.25, "luminance": 2, "l1": 0.5}
    shutil.copy(extra.with_name("000.png"), extra)  # now no pairs, and one y more
    found = judge.evaluated(experiment, 0, "y2x", flags, args)
    assert found == {**expected, "change": 0.25, "luminance": 3, "l1": None}
    (made, true), direction = json.loads((tmp_path / "log.json").read_text())
    assert made == ["000.png", "001.png", "999.png"] and true == made[:2] and direction == ["y2x"]
    (tmp_path / "evaluate.py").write_text("import sys; sys.exit('evaluate.py: error: no')")
    with pytest.raises(judge.RunError, match=r"evaluate.py failed: evaluate.py: error: no"):
        judge.evaluated(experiment, 0, "x2y", flags, args)


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """bench(flags) judges a table of three settings below tmp_path; translations are planted."""
    settings = [("plain", ""), ("buffer", "--buffer-size 50"), ("late", "--tau 1")]
    table = [run.Experiment((6,), "CUT", name, f"--epochs 2 {flags}") for name, flags in settings]
    for module in (run, judge):
        monkeypatch.setattr(module, "EXPERIMENTS", table)
    monkeypatch.setattr(judge, "HERE", tmp_path)
    monkeypatch.setattr(judge, "QUESTIONS", {6: "the buffer"})
    planted = {"calls": []}

    def evaluated(experiment, seed, direction, flags, args):
        planted["calls"].append((experiment.name, seed))
        if planted.get("missing"):
            raise judge.RunError("there is no CUT/translate.py")
        return {"swd": 10.0 + seed, "l1": 9.0, "shift_psnr": None}

    monkeypatch.setattr(judge, "evaluated", evaluated)
    values = {"plain": ([0.5, 0.4], [0.5, 0.3]), "buffer": ([0.4, 0.8],)}
    for experiment in table[:2]:
        for seed, l1 in enumerate(values[experiment.name]):
            folder = write_losses(tmp_path, experiment, seed, 2, l1=l1)
            flags = {"epochs": 2, "commit": "abc", "torch": "2.0", "buffer_size": 50}
            (folder / "args.json").write_text(json.dumps(flags))
    write_losses(tmp_path, table[1], 1, epochs=1)  # still training

    def start(*flags):
        return judge.main(["--root", str(tmp_path), *flags]), (tmp_path / "README.md").read_text()

    return start, planted, table


def rows_of(readme, start):
    """The cells of the README's table rows that begin with `start`."""
    lines = [line for line in readme.splitlines() if line.startswith(f"| {start}")]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


def test_tables_of_planted_numbers(bench, tmp_path, capsys):
    start, *_ = bench
    status, readme = start()
    assert status == 0 and "3 of 6 runs are complete" in capsys.readouterr().out
    (titles,) = rows_of(readme, "run |")
    assert titles == [
        *("run", "its own flags", "seeds", "L1 to the truth", "SWD"),
        *("L1 to the truth, deviation over epochs", "L1 to the truth, mean step"),
    ]
    deviations = [statistics.stdev([0.5, 0.4]), statistics.stdev([0.5, 0.3])]
    low, high = (f"{value:.3f}" for value in deviations)
    steady = [f"0.106 ({low} to {high})", "0.150 (0.100 to 0.200)"]
    assert rows_of(readme, "CUT plain") == [
        ["CUT plain", "", "0, 1", "0.350 (0.300 to 0.400)", "10.5 (10.0 to 11.0)", *steady]
    ]
    assert rows_of(readme, "CUT buffer") == [
        ["CUT buffer", "`--buffer-size 50`", "0, **missing: 1**", "0.800", "10.0", "0.283", "0.400"]
    ]
    late = ["CUT late", "`--tau 1`", "**missing: 0, 1**"]
    assert rows_of(readme, "CUT late") == [[*late, *["-"] * 4]]
    assert "All with `--epochs 2`." in readme
    assert "`python experiments/run.py --questions 6`" in readme
    assert "Commit of the runs: abc with torch 2.0." in readme


def test_both_directions_of_cyclegan_have_a_row():
    experiment = run.Experiment((2,), "cycleGAN", "a", "--epochs 2", (0,))
    rows = {
        judge.key_of(experiment, 0, way): {**dict.fromkeys(judge.METRICS, ""), "luminance": value}
        for way, value in (("x2y", "0.5"), ("y2x", "-0.25"))
    }
    lines = "\n".join(judge.settings_table([experiment], rows, judge.METRICS))
    assert rows_of(lines, "run") == [["run", "its own flags", "seeds", "luminance"]]
    assert rows_of(lines, "cycleGAN") == [
        ["cycleGAN a, x2y", "", "0", "0.50"],
        ["cycleGAN a, y2x", "", "0", "-0.25"],
    ]


def test_what_is_judged_is_not_judged_again(bench, tmp_path):
    start, planted, table = bench
    planted["missing"] = True
    _, readme = start("--seeds", "0")
    assert planted["calls"] == [("plain", 0), ("buffer", 0)]
    reason = "there is no CUT/translate.py"
    assert f"Not measured for CUT plain 0, CUT buffer 0: {reason}." in readme
    assert rows_of(readme, "CUT plain")[0][3:4] == ["0.400"]  # of losses.csv alone
    planted["missing"] = False
    start("--only", "plain")
    assert planted["calls"][2:] == [("plain", 0), ("plain", 1)]
    start()
    assert planted["calls"][4:] == [("buffer", 0)]
    _, readme = start()
    assert len(planted["calls"]) == 5 and reason not in readme
    start("--anew", "--only", "buffer")
    assert planted["calls"][5:] == [("buffer", 0)]
    flags = run.run_folder(tmp_path, table[0], 1) / "args.json"
    flags.write_text(flags.read_text().replace("abc", "def"))  # trained anew, at another commit
    _, readme = start()
    assert planted["calls"][6:] == [("plain", 1)]
    assert "abc with torch 2.0, def with torch 2.0" in readme


def test_words_around_the_tables_survive(bench, tmp_path, monkeypatch):
    start, _, table = bench
    text = "# Mine\n\nbefore\n\n<!-- table 6 -->\nold\n<!-- end -->\n\nThe buffer harms.\n"
    (tmp_path / "README.md").write_text(text)
    _, readme = start()
    first, rest = readme.split("<!-- table 6 -->")
    assert first == "# Mine\n\nbefore\n\n" and "old" not in readme
    assert rest.endswith("<!-- end -->\n\nThe buffer harms.\n")
    assert start()[1] == readme
    monkeypatch.setattr(judge, "QUESTIONS", {6: "the buffer", 7: "Is it so?"})
    table.append(table[0]._replace(questions=(7,)))
    _, longer = start()
    assert longer.startswith(readme + "\n## 7. Is it so?\n\n<!-- table 7 -->\n`python")
    (tmp_path / "README.md").write_text("<!-- table 6 -->")
    assert start()[0] == 2


def test_a_run_that_is_not_the_tables_is_refused(bench, tmp_path, capsys):
    start, _, table = bench
    flags = run.run_folder(tmp_path, table[1], 0) / "args.json"
    flags.write_text(json.dumps({"epochs": 2, "buffer_size": 0, "commit": "abc", "torch": "2"}))
    status, readme = start()
    assert status == 1 and "trained with 0 for --buffer-size" in capsys.readouterr().out
    assert rows_of(readme, "CUT buffer")[0][2] == "**missing: 0, 1**"


def test_a_checkpoint_that_is_not_the_last_one_waits(bench, tmp_path, capsys):
    start, planted, table = bench
    checkpoint = tmp_path / "CUT" / "model" / "plain-seed-0" / "checkpoint.pt"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.touch()
    start("--only", "plain-seed-0")
    assert len(planted["calls"]) == 1
    losses = run.run_folder(tmp_path, table[0], 0) / "losses.csv"
    os.utime(losses, (2e9, 2e9))
    start("--only", "plain-seed-0", "--anew")
    assert len(planted["calls"]) == 1 and "older than losses.csv" in capsys.readouterr().out


def test_precision_is_compared_seed_by_seed():
    table = [
        run.Experiment((13,), "CUT", f"toy-{kind}", f"--precision {kind}", (0, 1, 2))
        for kind in ("fp32", "bf16")
    ]
    planted = [(0, "fp32", 0.3), (1, "fp32", 0.4), (0, "bf16", 0.31), (1, "bf16", 0.38)]
    planted.append((2, "fp32", 0.5))
    rows = {
        ("CUT", f"toy-{kind}", str(seed), "x2y"): {"l1": str(l1), "swd": ""}
        for seed, kind, l1 in planted
    }
    lines = judge.precision_table(table, rows, {m: judge.METRICS[m] for m in ("l1", "swd")})
    assert [cells[2:5] for cells in rows_of("\n".join(lines), "CUT")] == [
        ["0.300", "0.310", "+0.010"],
        ["0.400", "0.380", "-0.020"],
        ["0.500", "-", "-"],
        ["0.400 (0.300 to 0.500)", "0.345 (0.310 to 0.380)", "-0.005 (-0.020 to +0.010)"],
    ]
    assert rows_of("\n".join(lines), "CUT")[2][1] == "2; **missing: bf16**"


def test_as_a_command(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "experiments" / "judge.py", "--questions", "99"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stderr.startswith("judge.py: error: argument --questions")
    assert done.stderr.count("\n") == 1

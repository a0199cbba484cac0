"""experiments/: what run.py starts, and what judge.py makes of the results."""

import argparse
import csv
import importlib
import json
import os
import re
import shlex
import shutil
from pathlib import Path

import judge
import numpy as np
import pytest
import run
from PIL import Image

from conftest import METHODS, ROOT, write_pairs, write_unpaired

Run = run.Run


def printed(capsys, *flags):
    """The command lines of a dry run, as lists of words, and its last line."""
    run.main(["--dry-run", *flags])
    *lines, last = capsys.readouterr().out.splitlines()
    return [shlex.split(line, comments=True) for line in lines], last


@pytest.mark.skipif(len(METHODS) < 3, reason="a method's folder is missing")
@pytest.mark.parametrize("scale", ["cpu", "paper"])
def test_every_train_accepts_its_commands(capsys, scale):
    names, paper = set(), scale == "paper"
    for _, script, *words in printed(capsys, "--scale", scale)[0]:
        method, _, _ = script.partition("/")
        args = importlib.import_module(f"{method}_flags").parse_args(words)
        assert args.save_model and args.resume and (method, args.run_name) not in names
        names.add((method, args.run_name))
        length = args.epochs / (2 if method == "CUT" else 1)  # epoch 391 is sampled
        full = (args.image_size, args.ngf, args.batch_size, length, args.sample_every)
        assert not paper or full == (256, 64, 1, 200, 10)
    assert len(names) == (10 if paper else len(run.RUNS))


def test_runs_are_chosen_by_name_or_question(capsys):
    def names(*flags):
        return [words[words.index("--run-name") + 1] for words in printed(capsys, *flags)[0]]

    assert names("patches") == ["facades-128-antialias", "facades-128-patches-64"]
    assert names("facades-128-e", "monet-no") == ["monet-no-pix", "facades-128-ema"]
    assert names("paper-monet-p", "--scale", "paper")[1:] == ["paper-monet-pool"]


def test_the_published_tables_are_those_of_results_csv():
    rows = judge.read_results(judge.HERE / "results.csv")
    text = (judge.HERE / "README.md").read_text()
    assert judge.fill(text, rows) == text
    forms = {"label_pixel": ".3f", "label_class": ".3f", "label_iou": ".3f", "swd": ".0f"}
    measured = {
        tuple(f"{float(row[name] or 'nan'):{form}}" for name, form in forms.items())
        for row in rows.values()
    }
    number = r" (0\.\d+) \|"
    shown = re.findall(rf"\|{number * 3} (\S+) \|", (ROOT / "README.md").read_text())
    assert len(shown) > 2
    assert {tuple(cell.replace("\u2013", "nan") for cell in row) for row in shown} <= measured


@pytest.mark.parametrize("module", [run, judge])
@pytest.mark.parametrize("word", ["no-such-run", "--dry"])
def test_errors_are_one_line(module, word, capsys):
    with pytest.raises(SystemExit) as ended:
        module.parse_args([word])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.count("\n") == 1 and word in error
    assert error.startswith(f"{module.__name__}.py: error: ")


TRAIN = """
import os, pathlib, sys, signal, time
flags = dict(zip(sys.argv[1:], sys.argv[2:]))
root, name = pathlib.Path(flags.get("--output-root", ".")), flags["--run-name"]
if "--max-steps" in flags:
    (folder := root / f"visualize/CUT/{name}").mkdir(parents=True)
    row = f"epoch,seconds\\n1,{0.1 * int(flags['--max-steps'])}\\n"
    sys.exit((folder / "losses.csv").write_text(row) and 0)
if name == "slow":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit((root / "saved").write_text("")))
with open(root / "started", "a") as file:
    print(*sys.argv[1:], os.environ["OMP_NUM_THREADS"], file=file)
time.sleep(60 * (name == "slow"))
if name == "fails":
    sys.exit("train.py: error: no")
for file in (root / f"visualize/CUT/{name}/losses.csv", root / f"CUT/model/{name}/checkpoint.pt"):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("epoch\\n" + "1\\n" * int(flags["--epochs"]))
os.utime(file, (1, 1))  # older than losses.csv, as after git or cp
"""


def plant(root, item, epochs, saved=True, **columns):
    """A run of so many epochs below root. columns: of losses.csv, "" for epochs without."""
    folder, model = run.paths(argparse.Namespace(output_root=root), item)
    for place in (folder, model.parent):
        place.mkdir(parents=True, exist_ok=True)
    columns = {"epoch": range(1, epochs + 1), **columns}
    with open(folder / "losses.csv", "w", newline="") as file:
        csv.writer(file).writerows([columns, *zip(*columns.values(), strict=True)])
    if saved:
        model.touch()
    return folder


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """bench(*names) makes a table of runs of 3 epochs, whose train.py only pretends to train."""
    (tmp_path / "CUT").mkdir()
    (tmp_path / "CUT" / "train.py").write_text(TRAIN)
    monkeypatch.setattr(run, "ROOT", tmp_path)
    monkeypatch.setattr(run.signal, "signal", lambda number, act: acts.append(act))
    acts = []

    def make(*names):
        table = [Run("CUT", name, "--data-folder a --epochs 3", "many") for name in names]
        monkeypatch.setattr(run, "RUNS", table)
        return table

    make.acts, make.roots = acts, ["--data-root", str(tmp_path), "--output-root", str(tmp_path)]
    return make


def test_complete_runs_are_skipped_and_the_others_started(tmp_path, bench, capsys):
    names = ["complete", "fails", "new", "shown", "stopped", "unsaved"]
    complete, _, _, shown, stopped, unsaved = bench(*names)
    plant(tmp_path, complete, 3)
    plant(tmp_path, stopped, 2)
    plant(tmp_path, shown, 3, saved=False)
    os.utime(plant(tmp_path, unsaved, 3) / "losses.csv", (2e9, 2e9))
    assert run.main([*bench.roots, "--jobs", "2"]) == 1
    output = capsys.readouterr()
    assert "5 of 6 runs are complete" in output.out and "CUT fails failed" in output.err
    started = sorted((tmp_path / "started").read_text().splitlines())
    at, threads = f"--data-root {tmp_path}", max(1, os.cpu_count() // 2)
    rest = f"{at} --save-model --resume {at} --num-workers 0 {threads}"
    assert started == [f"--data-folder a --epochs 3 --run-name {n} {rest}" for n in names[1:]]
    assert run.main(["complete", *bench.roots]) == 0


@pytest.mark.parametrize("reason", ["minutes", "signal"])
def test_a_stop_lets_the_run_save(tmp_path, bench, monkeypatch, reason):
    bench("slow", "later")

    def sleep(seconds, wait=run.time.sleep):
        wait(seconds)
        if (tmp_path / "started").exists() and reason == "signal":
            bench.acts[0](15, None)
        elif (tmp_path / "started").exists():
            monkeypatch.setattr(run.time, "monotonic", lambda: 1e9)

    monkeypatch.setattr(run.time, "sleep", sleep)
    assert run.main([*bench.roots, "--minutes", "10"]) == 1
    assert (tmp_path / "saved").exists() and "later" not in (tmp_path / "started").read_text()


def test_hours(tmp_path, bench, capsys):
    first, second = bench("first", "second")
    plant(tmp_path, first, 2)
    plant(tmp_path, second, 3)
    _, last = printed(capsys, *bench.roots, "--seconds-per-step", "0", "0", "9")
    assert last.startswith("# 1.0 hours in all")  # 1 epoch of 400 images, as downloaded
    write_unpaired(tmp_path, "a", train=(1, 2))
    run.main(["--dry-run", *bench.roots, "--measure"])
    one, two, _ = capsys.readouterr().out.splitlines()
    assert "# 2 steps, 0.0 hours at " in one and two.endswith("# 0 steps")
    assert float(one.split()[-3]) == pytest.approx(0.1)


def test_flags_of_a_run_are_compared_with_the_table():
    item = Run("CUT", "a", "--lr 2e-4 --epochs 3 --no-detach --antialias")
    flags = {"lr": 0.0002, "epochs": 3, "detach": False, "antialias": True}
    judge.check_flags(item, flags)
    for name, value in (("lr", 1e-4), ("epochs", 2), ("detach", True), ("antialias", False)):
        with pytest.raises(judge.UserError, match=f"trained with {value} for --(no-)?{name}"):
            judge.check_flags(item, {**flags, name: value})


def test_what_losses_csv_says(tmp_path):
    item, late = Run("cycleGAN", "a", ""), [0.5, 0.3] * 5
    columns = {"l1_xy": [9.0, "", *late], "l1_yx": [0.9] * 11 + [0.8]}
    folder = plant(tmp_path, item, 12, **columns, luminance_yx=[""] * 11 + [-0.5])
    found = judge.logged(folder, "x2y")  # the spread of the last ten
    assert found == {"l1": 0.3, "l1_spread": pytest.approx(np.std(late, ddof=1))}
    found = judge.logged(folder, "y2x")
    assert found["l1"] == 0.8 and found["luminance"] == -0.5 and "luminance_spread" not in found
    assert judge.logged(plant(tmp_path, item, 1, test_l1=[0.7]), "x2y") == {"l1": 0.7}


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("kind", ["pairs", "unpaired", "authors"])
def test_the_test_images_are_those_of_train(tmp_path, kind, swapped):
    write_pairs(tmp_path, size=48)
    write_unpaired(tmp_path, size=48)
    for side, name in (("x", "testA"), ("y", "testB")):
        shutil.copytree(tmp_path / "unpaired" / "test" / side, tmp_path / "authors" / name)
    flags = {"data_folder": kind, "image_size": 32, "swap_xy": swapped}
    item = Run("pix2pix" if kind == "pairs" else "CUT", "a", "")
    sides = judge.test_images(item, flags, tmp_path)
    x, y = (np.asarray(side["001"]) for side in (sides[::-1] if swapped else sides))
    path = "pairs/test/001.png" if kind == "pairs" else "unpaired/test/x/001.png"
    image = Image.open(tmp_path / path)
    image = image.crop((image.width - 48, 0, image.width, 48)).resize((32, 32), Image.BICUBIC)
    assert np.array_equal(x, image) and np.abs(255.0 - x - y).max() <= 2
    with pytest.raises(judge.UserError, match="no test images"):
        judge.test_images(item, {**flags, "data_folder": "nowhere"}, tmp_path)


def pretend(script, *words):
    """Does what run_script does, but copies images instead of translating them."""
    made, result = Path(words[0]), {"paired": {"l1": 0.5}} if "--paired" in words else {}
    if script.endswith("translate.py"):
        shutil.copytree(words[words.index("--input") + 1], words[-1])
    elif script == "evaluate.py":
        result |= {"unpaired": {"swd": len(list(made.iterdir())), "fid": None}}
        result["stripes"] = {"vertical_2": 1, "horizontal_2": 2, "vertical_4": 3, "horizontal_4": 6}
        words[-1].write_text(json.dumps(result | {"change": {"l1": 0.25, "luminance": -0.5}}))
    else:
        scores = {"noise": {"pixel": [1.0, 1.0]}, str(made): {"pixel": [0.25, 0.75], "iou": [0.25]}}
        words[-1].write_text(json.dumps(scores))


def test_what_the_scripts_say_of_a_run(tmp_path, monkeypatch):
    write_unpaired(tmp_path, "facades_unpaired", test=2)
    monkeypatch.setattr(judge, "run_script", pretend)
    item = Run("cycleGAN", "a", "--data-folder facades_unpaired --epochs 2")
    plant(tmp_path, item, 2, l1_xy=[0.1, 0.3], l1_yx=["", ""])
    args = argparse.Namespace(data_root=tmp_path, output_root=tmp_path)
    flags = {"data_folder": "facades_unpaired", "image_size": 32, "swap_xy": False, "epochs": 2}
    flags |= {"commit": "0123456789abcdef-dirty", "torch": "2.0"}
    rows = judge.judge(item, "x2y", flags, args)
    values = "cycleGAN a x2y 2 0123456789ab-dirty 2.0 0.3 0.25 -0.5 2 1.5 4.5 0.5 0.25 0.141421"
    columns = "method name direction epochs commit torch l1 change luminance swd stripes_2"
    columns = f"{columns} stripes_4 label_pixel label_iou l1_spread".split()
    assert rows["cycleGAN", "a", "x2y"] == dict(zip(columns, values.split(), strict=True))
    assert rows["-", "noise", "-"]["label_pixel"] == "1"
    extra = tmp_path / "facades_unpaired" / "test" / "y" / "999.png"
    shutil.copy(extra.with_name("000.png"), extra)  # now no pairs, and one y more
    (key, row), *others = judge.judge(item, "y2x", flags, args).items()
    assert key == ("cycleGAN", "a", "y2x") and row["swd"] == "3" and "l1" not in row and not others


def test_a_script_that_fails_is_an_error():
    with pytest.raises(judge.UserError, match=r"evaluate.py failed: evaluate.py: error: "):
        judge.run_script("evaluate.py", "nowhere", "nowhere")


@pytest.fixture
def page(tmp_path, monkeypatch):
    """page(*flags) judges two runs with planted numbers. Returns the exit status and README.md."""
    names = [("plain", "", "steadiness"), ("buffer", " --buffer-size 50", "steadiness CUT")]
    table = [Run("CUT", name, f"--epochs 2{flags}", asked) for name, flags, asked in names]
    table.append(Run("CUT", "late", "--epochs 9", "CUT"))
    for module in (run, judge):
        monkeypatch.setattr(module, "RUNS", table)
    monkeypatch.setattr(judge, "HERE", tmp_path)
    calls = []

    def measured(item, direction, flags, args):
        calls.append(item.name)
        row = {"swd": 10.0, "shift_psnr": None, "label_pixel": 0.25}
        return {(item.method, item.name, direction): row, ("-", "noise", "-"): {"label_pixel": 0.0}}

    monkeypatch.setattr(judge, "measured", measured)
    for item, l1 in zip(table, ([0.5, 0.4], [0.4, 0.8], [0.1, 0.1]), strict=True):
        flags = {"epochs": 2, "commit": "abc", "torch": "2.0", "buffer_size": 50}
        (plant(tmp_path, item, 2, l1=l1) / "args.json").write_text(json.dumps(flags))
    names = ("steadiness", "CUT", "labels", "12")
    marks = [f"<!-- table {name} -->\nold\n<!-- end -->\n\nShows: {name}.\n" for name in names]
    (tmp_path / "README.md").write_text("# Mine\n\n" + "\n".join(marks))

    def start(*flags):
        status = judge.main(["--output-root", str(tmp_path), *flags])
        return status, (tmp_path / "README.md").read_text(), calls

    return start


def test_tables_of_planted_numbers(page, tmp_path):
    status, text, _ = page()
    steadiness, cut, labels, rest, _ = text.split("\n<!-- end -->")
    titles, _, plain, buffer = steadiness.splitlines()[-4:]
    columns = ["run", "its own flags", "L1 to the truth", "SWD", "pixel accuracy"]
    assert titles == f"| {' | '.join([*columns, 'L1 to the truth, spread'])} |"
    cells = "0.400 | 10.0 | 0.250", "0.800 | 10.0 | 0.250"
    assert plain == f"| CUT plain |  | {cells[0]} | {0.1 / 2**0.5:.3f} |"
    assert buffer == f"| CUT buffer | `--buffer-size 50` | {cells[1]} | {0.4 / 2**0.5:.3f} |"
    assert "All with `--epochs 2`. Commit of the runs: abc (torch 2.0)." in steadiness
    assert "| CUT late: **missing** | `--epochs 9` | - | - | - |" in cut and "spread" not in cut
    assert labels.endswith("| CUT plain | 0.250 |\n| CUT buffer | 0.250 |\n| noise | 0.000 |")
    assert "\nold" in rest and text.startswith("# Mine\n\n<!-- table steadiness -->\n`python")
    assert text.count("\n\nShows: ") == 4
    assert page()[1] == text and status == 0
    rows = judge.read_results(tmp_path / "results.csv")
    assert [name for _, name, _ in rows] == ["plain", "buffer", "noise"]
    others = {("CUT", "gone", "x2y"): {"name": "gone"}}  # of no run of the table
    judge.write_results(tmp_path / "results.csv", others | dict(reversed(rows.items())))
    assert judge.read_results(tmp_path / "results.csv") == rows


def test_what_is_measured_is_not_measured_again(page, tmp_path, capsys):
    assert page("plain")[2] == ["plain"]
    assert page()[2] == ["plain", "buffer"]
    assert page("--again", "buffer")[2] == ["plain", "buffer", "buffer"]
    flags = tmp_path / "visualize" / "CUT" / "plain" / "args.json"
    flags.write_text(flags.read_text().replace("abc", "def"))  # trained again, at another commit
    assert page()[2][3:] == ["plain"]
    flags.write_text(flags.read_text().replace('"epochs": 2', '"epochs": 3'))
    status, *_ = page("--again", "plain")
    assert status == 1 and "trained with 3 for --epochs" in capsys.readouterr().out

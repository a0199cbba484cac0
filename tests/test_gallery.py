"""visualize/gallery.py: which runs it finds, what the page says, and the page in a browser."""

import json
import os
import re
import shutil
import subprocess
import sys

import gallery
import numpy as np
import pytest
from PIL import Image

from conftest import ROOT

SCRIPT = ROOT / "visualize" / "gallery.py"

FLAGS_MODULE = """
from argparse import Namespace
from pathlib import Path
data_root = Path(__file__).resolve().parent.parent / "datasets"
def parse_args(argv):
    return Namespace(data_folder="facades", data_root=data_root, n_layers=9, jitter=True, lr=2e-4)
"""


@pytest.fixture
def root(tmp_path, monkeypatch):
    """visualize/ of a repository whose one method, cycleGAN, has five flags."""
    monkeypatch.setattr(gallery, "HERE", tmp_path / "visualize")
    gallery.defaults.cache_clear()
    (tmp_path / "visualize").mkdir()
    shutil.copy(SCRIPT.with_suffix(".html"), tmp_path / "visualize")
    (tmp_path / "cycleGAN").mkdir()
    (tmp_path / "cycleGAN" / "cycleGAN_flags.py").write_text(FLAGS_MODULE)
    yield tmp_path / "visualize"
    gallery.defaults.cache_clear()


def write_grid(path, count=8, size=16, shade=0):
    """A grid as train.py writes it: one row of images with 2 px around each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    grid = np.zeros((size + 4, count * (size + 2) + 2, 3), dtype=np.uint8)
    grid[2:-2, :, 0] = 100 + shade
    Image.fromarray(grid).save(path)


def write_run(root, name="cycleGAN/first", epochs=(1, 11, 12), time=1000, typed=(), **flags):
    """A whole run. x and y are the same at each epoch, the generated ones are not."""
    run = root / name
    for kind in ("x", "y_G", "y", "x_G"):
        for epoch in epochs:
            write_grid(run / "val" / f"{kind}{epoch}.png", shade=epoch if "G" in kind else 0)
    rows = [f"{e},2.5,{10 / e},{0.5 if e in epochs else ''}\n" for e in range(1, epochs[-1] + 1)]
    (run / "losses.csv").write_text("epoch,seconds,G_total,l1\n" + "".join(rows))
    values = {"method": "cycleGAN", "run_name": "first", "data_folder": "facades", "n_layers": 9}
    facts = {"typed": list(typed), "torch": "2.0", "device_used": "cpu", "commit": "abc"}
    (run / "args.json").write_text(json.dumps({**values, **flags, **facts}))
    for part in gallery.PARTS:
        os.utime(run / part, (time, time))
    return run


def build(root, *flags):
    assert gallery.main(["--root", str(root), *flags]) == 0
    return (root / "index.html").read_text()


def read(page):
    """What the page was given: {"runs": {name: run}, "images": [...]}."""
    text = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1]
    data = json.loads(text)
    return {**data, "runs": {run["name"]: run for run in data["runs"]}}


def first_run(root):
    return read(build(root))["runs"]["cycleGAN/first"]


def test_the_newest_runs_come_first(root):
    for time, name in ((10, "CUT/middle"), (5, "CUT/old"), (20, "pix2pix/new")):
        write_run(root, name, time=time)
    assert list(read(build(root))["runs"]) == ["pix2pix/new", "CUT/middle", "CUT/old"]


@pytest.mark.skipif(not shutil.which("git"), reason="no git")
def test_committed_runs_come_last_unless_they_changed(root, monkeypatch):
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    git = ["git", "-C", root.parent, "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    for date, name in enumerate(("CUT/older", "CUT/newer", "CUT/changed", "CUT/again")):
        write_run(root, name, time=9000 - date)  # in the order opposite to the commits
        subprocess.run([*git, "add", root / name], check=True)
        monkeypatch.setenv("GIT_COMMITTER_DATE", f"@{2_000_000_000 + date} +0000")
        subprocess.run([*git, "commit", "-qm", name], check=True)
    subprocess.run([*git, "rm", "-rq", "--cached", root / "CUT/again"], check=True)
    subprocess.run([*git, "commit", "-qm", "not in git again"], check=True)
    (root / "CUT/changed/losses.csv").write_text("epoch,a\n")
    write_run(root, "CUT/mine", time=10)
    runs = read(build(root))["runs"]
    names = [name.removeprefix("CUT/") for name in runs]
    assert names == ["changed", "again", "mine", "newer", "older"]
    assert [run["committed"] for run in runs.values()] == [False, False, False, True, True]


@pytest.mark.parametrize("globs, names", [
    (["CUT/*"], ["CUT/one", "CUT/two"]), (["one"], ["CUT/one", "cycleGAN/one"]),
    (["t*", "CUT/one"], ["CUT/one", "CUT/two", "cycleGAN/two"]),
])  # fmt: skip
def test_runs_are_selected(root, capsys, globs, names):
    for name in ("CUT/one", "CUT/two", "cycleGAN/one", "cycleGAN/two"):
        write_run(root, name)
    assert sorted(read(build(root, "--runs", *globs))["runs"]) == names
    message = rf"index\.html: {len(names)} runs, \d+\.\d MB\n$"
    assert re.search(message, capsys.readouterr().out)


@pytest.mark.parametrize(("flags", "message"), [
    (["--root", "nowhere"], "no runs in nowhere: train one first"),
    (["--runs", "CUT/x*"], "--runs CUT/x* matches none of 1 runs: cycleGAN/first"),
    (["--output", "no/such/index.html"], "No such file"),
    (["--run", "x"], "unrecognized arguments: --run"),
])  # fmt: skip
def test_refusals(root, flags, message):
    write_run(root)
    command = [sys.executable, SCRIPT, "--root", root, *flags]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 2 and message in done.stderr, done.stderr
    assert done.stderr.startswith("gallery.py: error: ") and done.stderr.count("\n") == 1


def test_grids_and_losses(root):
    write_run(root)
    data = read(build(root))
    run = data["runs"]["cycleGAN/first"]
    assert run["epochs"] == [1, 11, 12] and run["notes"] == []
    assert [grid["kind"] for grid in run["grids"][0]] == list(gallery.KINDS.values())
    grid = run["grids"][1][1]
    assert (grid["file"], grid["width"], grid["height"]) == ("y_G11.png", 146, 20)
    images = np.array([[grid["image"] for grid in grids] for grids in run["grids"]])
    assert [len(set(column)) for column in images.T] == [1, 3, 1, 3]
    assert run["losses"][0][0] == "G_total" and run["losses"][0][1][:2] == [[1, 10.0], [2, 5.0]]
    assert run["losses"][1:] == [["l1", [[1, 0.5], [11, 0.5], [12, 0.5]]]]
    assert len(data["images"]) == 4  # x = y here, and y_G = x_G in each of three epochs


@pytest.mark.parametrize(("count", "size"), [(1, 64), (3, 64), (8, 256), (9, 16)])
def test_the_images_of_a_grid_are_counted(root, count, size):
    write_grid(root / "cycleGAN/first/val/y_G1.png", count, size)
    assert first_run(root)["grids"][0][0]["count"] == count


DAMAGED = {
    "cut off": lambda data: data[:-20],
    "a changed byte": lambda data: data[:60] + b"?" + data[61:],
    "the end only": lambda data: data[:8] + data[-12:],
    "another format": lambda data: b"hello",
}


@pytest.mark.parametrize("damage", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_grid_is_named(root, damage):
    file = write_run(root) / "val" / "y_G11.png"
    file.write_bytes(damage(file.read_bytes()))
    run = first_run(root)
    assert run["notes"] == ["y_G11.png is damaged"]
    assert [grid["image"] is None for grid in run["grids"][1]] == [False, True, False, False]


def test_missing_files_are_named(root):
    (write_run(root) / "val" / "x_G11.png").unlink()
    (root / "CUT" / "only-val" / "val").mkdir(parents=True)
    (root / "CUT" / "no-run").mkdir()
    (root / "cycleGAN/first/val/x_old.png").write_text("not a grid")
    runs = read(build(root))["runs"]
    assert set(runs) == {"cycleGAN/first", "CUT/only-val"}
    assert runs["cycleGAN/first"]["notes"] == ["x_G11.png is missing"]
    missing = ["no grids in val/", "losses.csv is missing", "args.json is missing"]
    assert runs["CUT/only-val"]["notes"] == missing


def test_losses_that_are_not_finite(root):
    table = "epoch,__proto__,constructor\n1,nan,1\n2,3,-inf\n3,,x\n4,5,1\n"
    (write_run(root) / "losses.csv").write_text(table)
    run = first_run(root)
    notes = ["__proto__ is not finite at epoch 1", "constructor is not finite at epoch 2, 3"]
    assert run["notes"] == [f"losses.csv: {note}" for note in notes]
    assert run["losses"][0] == ["__proto__", [[1, None], [2, 3.0], [4, 5.0]]]


NO_EPOCH = "losses.csv cannot be read, or a row has no epoch"
DEEP = '{"lr": ' + "[" * 100_000 + "]" * 100_000 + "}"


@pytest.mark.parametrize("name, text, note", [
    ("losses.csv", "", "losses.csv has no rows"),
    *(("losses.csv", text, NO_EPOCH)
      for text in ("loss\n1\n", "epoch,a\nx,1\n", "epoch,a\n" + "1" * 200_000)),
    *(("args.json", text, "args.json cannot be read")
      for text in ("", "{", "[1, 2]", '{"typed": 5}', '{"typed": [[]]}', DEEP)),
])  # fmt: skip
def test_odd_files(root, name, text, note):
    (write_run(root) / name).write_text(text)
    assert first_run(root)["notes"] == [note]


def test_flags_differ_from_the_default(root):
    write_run(root, typed=["lr"], n_layers=6, jitter=False, lr=2e-4, data_root="datasets", old=[[]])
    run = first_run(root)
    assert run["flags"] == [
        ["--data-folder", "facades", False],
        ["--n-layers", "6", True],
        ["--jitter", "off", True],
        ["--lr", "0.0002", False],
        ["--data-root", "datasets", False],
        ["--old", "[[]]", False],
    ]
    assert run["facts"] == "torch 2.0, on cpu, commit abc"


@pytest.mark.parametrize("key", ["typed", "given"])  # "given": args.json of older versions
def test_without_the_method_the_typed_flags_differ(root, key):
    run = write_run(root, "other/first")
    values = {"cache": 2, "n_layers": 9, key: ["n_layers"]}
    (run / "args.json").write_text(json.dumps(values))
    flags = read(build(root))["runs"]["other/first"]["flags"]
    assert flags == [["--cache", "2", False], ["--n-layers", "9", True]]


def test_defaults_of_the_methods(method):
    gallery.defaults.cache_clear()
    assert gallery.defaults(method)["lr"] == 2e-4


def test_nothing_in_a_name_or_a_flag_breaks_out(root):
    nasty = "</script><script>alert(1)</script><!-- & \" ' {{DATA}}"
    write_run(root, "cycleGAN/a<b & \"c\" 'd'", data_folder=nasty)
    page = build(root)
    assert page.count("<script") == page.count("</script>") == 2 and "alert(1)" in page
    run = read(page)["runs"]["cycleGAN/a<b & \"c\" 'd'"]
    assert ["--data-folder", nasty, True] in run["flags"]


def test_the_page_is_the_same_each_time_and_needs_no_other_file(root):
    write_run(root)
    write_run(root, "CUT/first")
    page = build(root)
    assert build(root, "--output", str(root / "index.html")) == page
    assert not re.search(r"https?:|//[a-z]|src=|@import|url\(|\{\{", page)
    assert not list(root.glob("*.tmp"))


def test_a_large_page_is_said(root, capsys, monkeypatch):
    write_run(root)
    monkeypatch.setattr(gallery, "LARGE", 0.01)
    build(root)
    assert "warning: browsers open a page above 0.01 MB slowly" in capsys.readouterr().out


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
CHROMIUM_FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-background-networking --disable-sync "
    "--no-first-run --window-size=1280,900 --virtual-time-budget=9000 --dump-dom"
)
USE_THE_PAGE = """<script>
const texts = [], errors = [], all = query => [...document.querySelectorAll(query)];
const say = query => texts.push(all(query).map(each => each.textContent).join(" | "));
const enter = (element, value) => {
  element.value = value;
  element.dispatchEvent(new Event("input"));
};
window.addEventListener("error", event => errors.push(event.message));
say(".epoch");
enter(all("input[type=range]")[0], 0);
say(".epoch");
all(".play")[0].click();
setTimeout(() => {
  say(".epoch");
  setTimeout(() => {
    say(".epoch");
    texts.push(all(".play")[0].ariaLabel);
    const curves = all("section:last-child .own").map(each => each.getAttribute("d"));
    texts.push(curves.map(line => line.replace(/[^ML]/g, "")).join(" | "));
    say("mark");
    all(".enlarge")[1].click();
    say("dialog[open] #what");
    all("dialog button")[0].click();
    say("dialog[open] #what");
    for (const words of ["n-layers CYCLE", "no such run"]) {
      enter(all("#filter")[0], words);
      say("#count, option:checked");
    }
    document.documentElement.style.width = "360px";
    const wide = all("main *").filter(each => each.getBoundingClientRect().right > 360);
    document.title = JSON.stringify({texts, errors, wide: wide.map(each => each.outerHTML)});
  }, 2000);
}, 1000);
</script></html>"""


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium")
def test_the_page_in_a_browser(root, tmp_path):
    write_run(root, "cycleGAN/left", time=3000, n_layers=6)
    losses = write_run(root, "cycleGAN/right", epochs=(1, 10)) / "losses.csv"
    losses.write_text("epoch,__proto__,constructor,a\n1,1,1,2\n2,2,nan,3\n3,3,4,5\n")
    os.utime(losses, (1000, 1000))
    (root / "pix2pix/odd/val").mkdir(parents=True)
    os.utime(root / "pix2pix/odd/val", (1, 1))
    page = tmp_path / "page.html"
    page.write_text(build(root).replace("</html>", USE_THE_PAGE))
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    command = [CHROMIUM, *CHROMIUM_FLAGS.split(), profile, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    result = json.loads(re.search(r"<title>(\{.*?\})</title>", done.stdout)[1])
    assert result["texts"] == [
        "epoch 12 (3 of 3) | epoch 10 (2 of 2)",
        "epoch 1 (1 of 3) | epoch 1 (1 of 2)",
        "epoch 11 (2 of 3) | epoch 10 (2 of 2)",  # playing; the other side shows the nearest
        "epoch 12 (3 of 3) | epoch 10 (2 of 2)",
        "play left epochs",
        "MLL | MM | MLL",  # a gap where a loss is not finite
        "6 | 9",  # the flags that differ
        "cycleGAN/left, epoch 12: generated y, 8 images, 146 \u00d7 20 px at 8\u00d7",
        "",
        "1 of 3 runs | cycleGAN/left | cycleGAN/left",
        "0 of 3 runs | cycleGAN/left | cycleGAN/left",
    ]
    assert result["errors"] == result["wide"] == []

"""visualize/gallery.py: what the page says, and the page in a real browser."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from conftest import METHODS, ROOT

SCRIPT = ROOT / "visualize" / "gallery.py"
spec = importlib.util.spec_from_file_location("gallery", SCRIPT)
gallery = importlib.util.module_from_spec(spec)
spec.loader.exec_module(gallery)


def write_grid(path, count=8, size=16, shade=0):
    """A grid as train.py writes it: one row of pictures with 2 px around each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    grid = np.zeros((size + 4, count * (size + 2) + 2, 3), dtype=np.uint8)
    grid[2:-2, :, 0] = 100 + shade
    Image.fromarray(grid).save(path)


def write_run(root, method="cycleGAN", name="first", epochs=(1, 11, 12), kinds=None, **flags):
    """A whole run. x and y are the same at each epoch, the generated ones are not."""
    run = root / method / name
    for kind in kinds or ("x", "y_G", "y", "x_G"):
        for epoch in epochs:
            write_grid(run / "val" / f"{kind}{epoch}.png", shade=epoch if "G" in kind else 0)
    lines = ["epoch,seconds,images_per_second,learning_rate,G_total,l1"]
    for epoch in range(1, epochs[-1] + 1):
        measured = 0.5 if epoch in epochs else ""
        lines.append(f"{epoch},2.5,10,0.0002,{10 / epoch},{measured}")
    (run / "losses.csv").write_text("\n".join(lines) + "\n")
    values = {"data_folder": "facades", "n_layers": 9, "jitter": True, "epochs": 200, **flags}
    facts = {"given": [], "torch": "2.0", "device_used": "cpu", "commit": "abc"}
    (run / "args.json").write_text(json.dumps({**values, **facts}))
    return run


def read(page):
    """What the page was given: {"runs": {name: run}, "pictures": [...]}."""
    text = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1]
    data = json.loads(text)
    return {**data, "runs": {run["name"]: run for run in data["runs"]}}


def build(root, *flags):
    assert gallery.main(["--root", str(root), *flags]) == 0
    return (root / "index.html").read_text()


def test_what_a_run_shows(tmp_path):
    write_run(tmp_path)
    data = read(build(tmp_path))
    run = data["runs"]["cycleGAN/first"]
    assert run["epochs"] == [1, 11, 12] and run["notes"] == []
    assert [grid["what"] for grid in run["grids"][0]] == list(gallery.KINDS.values())
    assert run["grids"][1][1]["alt"] == "epoch 11: generated y, eight test pictures"
    assert run["grids"][1][1]["file"] == "y_G11.png"
    assert run["losses"]["G_total"][:2] == [[1, 10.0], [2, 5.0]]
    assert run["losses"]["l1"] == [[1, 0.5], [11, 0.5], [12, 0.5]]
    assert list(run["losses"]) == ["G_total", "l1"]
    assert run["facts"] == "torch 2.0, on cpu, commit abc"
    x, y_G, y, x_G = zip(*(range(4) for _ in range(3)), strict=True)  # columns by kind
    pictures = np.array([[grid["picture"] for grid in grids] for grids in run["grids"]])
    assert len(set(pictures[:, x[0]])) == 1 == len(set(pictures[:, y[0]]))
    assert len(set(pictures[:, y_G[0]])) == 3 == len(set(pictures[:, x_G[0]]))
    assert len(data["pictures"]) == 4  # x = y here, and three epochs of y_G = x_G


@pytest.mark.skipif("cycleGAN" not in METHODS, reason="no cycleGAN folder")
def test_flags_that_differ_from_the_default_come_first(tmp_path):
    write_run(tmp_path, n_layers=6, jitter=False)
    flags = read(build(tmp_path))["runs"]["cycleGAN/first"]["flags"]
    assert flags == [
        ["--n-layers", "6", True],
        ["--jitter", "off", True],
        ["--data-folder", "facades", False],
        ["--epochs", "200", False],
    ]


@pytest.mark.parametrize("method", METHODS)
def test_defaults_are_those_of_train(method):
    from conftest import load_script

    theirs = vars(load_script(method).parse_args([]))
    assert gallery.defaults(method) == theirs and theirs["lr"] == 2e-4


def test_defaults_need_no_torch(tmp_path):
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    write_run(tmp_path / "runs")
    command = [sys.executable, SCRIPT, "--root", tmp_path / "runs"]
    done = subprocess.run(command, env={"PYTHONPATH": str(tmp_path)}, capture_output=True)
    assert done.returncode == 0, done.stderr


def test_without_the_method_the_typed_flags_come_first(tmp_path):
    run = write_run(tmp_path, method="other")
    args = json.loads((run / "args.json").read_text())
    (run / "args.json").write_text(json.dumps({**args, "given": ["n_layers"]}))
    flags = read(build(tmp_path))["runs"]["other/first"]["flags"]
    assert flags[0] == ["--n-layers", "9", True] and not any(flag[2] for flag in flags[1:])


def test_missing_and_broken_files_are_named(tmp_path):
    run = write_run(tmp_path, name="holes")
    (run / "val" / "x_G11.png").unlink()
    whole = (run / "val" / "y_G11.png").read_bytes()
    (run / "val" / "y_G11.png").write_bytes(whole[:-20])
    (run / "val" / "y_G12.png").write_bytes(whole[:60] + b"?" + whole[61:])
    (run / "val" / "y12.png").write_text("hello")
    (run / "val" / "x12.png").write_bytes(whole[:8] + whole[-12:])  # its end alone
    (run / "val" / "x_G12.png").unlink()
    (run / "val" / "x_G12.png").mkdir()
    (run / "val" / "x_old.png").write_text("not a grid")
    (run / "losses.csv").write_text("epoch,G_total,D\n1,nan,1\n2,3,-inf\n3,,x\n4,5,1\n")
    (run / "args.json").write_text("{")
    (tmp_path / "CUT" / "only-val" / "val").mkdir(parents=True)
    (tmp_path / "CUT" / "no-run").mkdir()
    runs = read(build(tmp_path))["runs"]
    assert set(runs) == {"cycleGAN/holes", "CUT/only-val"}
    assert runs["cycleGAN/holes"]["notes"] == [
        "y_G11.png is cut off",
        "x_G11.png is missing",
        "x12.png is damaged",
        "y_G12.png is damaged",
        "y12.png is no PNG",
        "x_G12.png cannot be read",
        "losses.csv: G_total is not finite at epoch 1",
        "losses.csv: D is not finite at epoch 2, 3",
        "args.json cannot be read",
    ]
    assert runs["cycleGAN/holes"]["losses"]["G_total"] == [[1, None], [2, 3.0], [4, 5.0]]
    assert [g["picture"] is None for g in runs["cycleGAN/holes"]["grids"][1]] == [0, 1, 0, 1]
    missing = ["no grids in val/", "losses.csv is missing", "args.json is missing"]
    assert runs["CUT/only-val"]["notes"] == missing


@pytest.mark.parametrize("text", ["", "loss\n1\n", "epoch,a\nx,1\n", "epoch,a\n1\n", "\0"])
def test_odd_losses_and_args(tmp_path, text):
    run = write_run(tmp_path)
    (run / "losses.csv").write_text(text)
    (run / "args.json").write_text("[1, 2]")
    assert read(build(tmp_path))["runs"]["cycleGAN/first"]["epochs"] == [1, 11, 12]


def test_grids_of_other_shapes(tmp_path):
    for count, size in ((1, 64), (3, 64), (8, 256), (9, 16)):
        write_grid(tmp_path / "CUT" / f"{count}" / "val" / "y_G1.png", count, size)
    runs = read(build(tmp_path))["runs"]
    grids = {count: runs[f"CUT/{count}"]["grids"][0][0] for count in (1, 3, 8, 9)}
    assert grids[1]["alt"] == "epoch 1: generated y, one test picture"
    assert grids[3]["alt"] == "epoch 1: generated y, three test pictures"
    assert grids[9]["alt"] == "epoch 1: generated y, test pictures"
    looks = {count: grid["looks"].split() for count, grid in grids.items()}
    assert looks == {1: ["small"], 3: ["small"], 8: ["halves"], 9: ["small"]}


def test_nothing_in_a_name_or_a_flag_breaks_out(tmp_path):
    nasty = "</script><script>alert(1)</script><!-- & \" ' DATA"
    write_run(tmp_path, name="a<b & \"c\" 'd'", data_folder=nasty)
    page = build(tmp_path)
    assert page.count("<script") == page.count("</script>") == 2 and "alert(1)" in page
    run = read(page)["runs"]["cycleGAN/a<b & \"c\" 'd'"]
    assert ["--data-folder", nasty, True] in run["flags"]


def test_the_page_is_the_same_each_time_and_whole(tmp_path):
    write_run(tmp_path)
    write_run(tmp_path, method="CUT")
    first = build(tmp_path)
    assert build(tmp_path, "--output", str(tmp_path / "index.html")) == first
    assert list(read(first)["runs"]) == ["CUT/first", "cycleGAN/first"]
    assert not re.search(r"https?:|//[a-z]|src=|@import|url\(", first)
    assert not list(tmp_path.glob("*.tmp"))


def test_runs_are_chosen(tmp_path, capsys):
    for name in ("one", "two"):
        write_run(tmp_path, name=name)
        write_run(tmp_path, method="CUT", name=name)
    page = build(tmp_path, "--runs", "CUT/*", "*/one", "--output", str(tmp_path / "index.html"))
    assert list(read(page)["runs"]) == ["CUT/one", "CUT/two", "cycleGAN/one"]
    assert re.search(r"index\.html: 3 runs, \d+\.\d MB\n$", capsys.readouterr().out)


def test_a_large_page_is_said(tmp_path, capsys, monkeypatch):
    write_run(tmp_path)
    monkeypatch.setattr(gallery, "LARGE", 0.01)
    build(tmp_path)
    assert "warning: above 0.01 MB" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--root", "nowhere"], "nowhere holds no run"),
        (["--runs", "CUT/x*"], "--runs CUT/x* names none of 1 runs: cycleGAN/first"),
        (["--output", "no/such/index.html"], "No such file"),
        (["--run", "x"], "unrecognized arguments: --run"),
    ],
)
def test_refusals(tmp_path, flags, message):
    write_run(tmp_path)
    command = [sys.executable, SCRIPT, "--root", tmp_path, *flags]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and message in done.stderr, done.stderr
    assert done.stderr.startswith("gallery.py: error: ") and done.stderr.count("\n") == 1


# ------------------------------------------------------------------------------------ a browser

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = (
    "headless=new no-sandbox disable-gpu disable-quic no-first-run disable-background-networking "
    "disable-component-update disable-sync"
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not CHROMIUM:
        pytest.skip("no Chromium")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in [*FLAGS.split(), f"user-data-dir={tmp_path_factory.mktemp('profile')}"]:
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    driver = webdriver.Chrome(options=options, service=service)
    driver.get("about:blank")
    driver.get_log("performance")  # that of the browser's own first page
    yield driver
    driver.quit()


@pytest.fixture
def page(browser, tmp_path):
    """page(width, height) opens the page of four runs; in the end nothing may have gone wrong."""
    write_run(tmp_path, method="CUT", name='a<b> & "c"', kinds=["x", "y_G"])
    write_run(tmp_path, epochs=(1, 10, 19, 20))
    run = write_run(tmp_path, name="one-epoch", epochs=(1,))
    (run / "losses.csv").write_text("epoch,G_total\n1,nan\n")
    (tmp_path / "pix2pix" / "empty" / "val").mkdir(parents=True)
    build(tmp_path)

    def open_page(width=1200, height=900):
        screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        browser.get((tmp_path / "index.html").as_uri())
        return browser

    yield open_page
    assert browser.get_log("browser") == []
    events = [json.loads(e["message"])["message"] for e in browser.get_log("performance")]
    requests = [e["params"]["request"]["url"] for e in events if e["method"].endswith("WillBeSent")]
    assert requests and all(url.startswith(("file:", "data:")) for url in requests)


def shown(browser, column):
    """The pictures to be seen in a column: [[natural width, src], ...], all of them loaded."""
    script = """
        const images = document.querySelectorAll("section")[arguments[0]].querySelectorAll("img");
        const seen = [...images].filter(image => image.checkVisibility());
        const loaded = image => image.decode().then(() => [image.naturalWidth, image.src]);
        return Promise.all(seen.map(loaded));
    """
    found = browser.execute_script(script, column)
    assert all(width > 0 for width, _ in found)
    return found


def choose(browser, column, name):
    """Picks a run by its name, as a reader does."""
    from selenium.webdriver.support.select import Select

    Select(browser.find_elements("tag name", "select")[column]).select_by_visible_text(name)


def test_the_slider_moves_all_grids_by_keyboard(page):
    browser = page()
    choose(browser, 1, "cycleGAN/first")
    slider = browser.find_elements("css selector", "input[type=range]")[1]
    says = browser.find_elements("tag name", "output")[1]
    last = shown(browser, 1)
    assert len(last) == 4 and says.text == "epoch 20, 4 of 4 sampled"
    slider.send_keys("\ue012")  # the left arrow key
    before = shown(browser, 1)
    assert says.text == slider.get_attribute("aria-valuetext") == "epoch 19, 3 of 4 sampled"
    changed = [old != new for old, new in zip(last, before, strict=True)]
    assert changed == [False, True, False, True]  # x and y are the same at each epoch
    assert [i.get_attribute("alt") for i in browser.find_elements("css selector", "section img")][
        -8::2
    ] == [f"epoch 19: {what}, eight test pictures" for what in gallery.KINDS.values()]
    slider.send_keys("\ue011")  # the home key
    assert says.text == "epoch 1, 1 of 4 sampled" and len(shown(browser, 1)) == 4
    values = browser.find_elements("css selector", "section:nth-of-type(2) .value")
    assert [value.text for value in values] == ["10", "0.5"]


def test_two_runs_together_or_not(page):
    browser = page()
    choose(browser, 1, "cycleGAN/first")
    outputs = browser.find_elements("tag name", "output")
    sliders = browser.find_elements("css selector", "input[type=range]")
    sliders[0].send_keys("\ue011")
    assert [output.text.split(",")[0] for output in outputs] == ["epoch 1", "epoch 1"]
    sliders[1].send_keys("\ue014")  # the right arrow key: epoch 10, and 11 is the nearest there
    assert [output.text.split(",")[0] for output in outputs] == ["epoch 11", "epoch 10"]
    browser.find_element("id", "together").send_keys(" ")
    sliders[1].send_keys("\ue010")  # the end key
    assert [output.text.split(",")[0] for output in outputs] == ["epoch 11", "epoch 20"]


def test_the_second_column_switches_runs(page):
    browser = page()
    left = shown(browser, 0)
    assert len(left) == 2
    for name, count in (("cycleGAN/first", 4), ("cycleGAN/one-epoch", 4), ("pix2pix/empty", 0)):
        choose(browser, 1, name)
        assert len(shown(browser, 1)) == count and shown(browser, 0) == left
    text = browser.find_elements("tag name", "section")[1].text
    for note in ("no grids in val/", "losses.csv is missing", "args.json is missing"):
        assert note in text
    choose(browser, 1, 'CUT/a<b> & "c"')
    assert shown(browser, 1) == left


def test_everything_has_a_name_and_can_be_reached(page):
    browser = page()
    inputs = browser.find_elements("css selector", "input, select")
    assert [element.accessible_name for element in inputs] == [
        "move both sliders to the same epoch",
        *("Left run", "Left epoch", "Right run", "Right epoch"),
    ]
    sections = browser.find_elements("tag name", "section")
    assert [section.accessible_name for section in sections] == ["Left run", "Right run"]
    for curve in browser.find_elements("tag name", "svg"):
        assert re.match(r"\w+: (\S+ at first, |no value)", curve.accessible_name)
    reached = []
    for _ in range(5):
        browser.switch_to.active_element.send_keys("\ue004")  # the tab key
        element = browser.switch_to.active_element
        reached.append(element.accessible_name)
        assert element.value_of_css_property("outline-style") == "solid"
    assert reached[0] == "move both sliders to the same epoch" and "Right epoch" not in reached[:3]
    assert browser.find_elements("css selector", "output[aria-live=polite]")


def test_narrow_and_dark(page):
    browser = page(400, 800)
    width = "return document.documentElement.scrollWidth"
    assert browser.execute_script(width) <= 400
    assert len(shown(browser, 0)) == 4  # a row of eight as two rows of four
    size = browser.find_element("tag name", "img").size
    assert size["width"] / size["height"] == pytest.approx(146 / 2 / 20, rel=0.02)
    dark = {"name": "prefers-color-scheme", "value": "dark"}
    paper = "return getComputedStyle(document.body).backgroundColor"
    assert browser.execute_script(paper) == "rgb(255, 255, 255)"
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [dark]})
    assert browser.execute_script(paper) == "rgb(20, 22, 26)"
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})

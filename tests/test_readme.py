"""The READMEs: every command runs, at a tiny size; every link leads somewhere; the limits hold."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from torch.distributed.run import get_args_parser

from conftest import METHODS, ROOT, commands_here, load_script, picture, write_pairs, write_unpaired

PAGES = subprocess.getoutput(f"git -C '{ROOT}' ls-files '*.md' 2>&-").split()
PAGES = [ROOT / name for name in PAGES] or [*ROOT.glob("*.md"), *ROOT.glob("[!.]*/*.md")]
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))

NOT_RUN = {  # beginnings of commands, and why
    "git clone": "needs the network",
    "pip install": "needs the network; .ci/run does it",
    "python -m pytest": "that is these tests; .ci/run does it",
    "benchmarks/gpu.sh": "test_benchmarks.py rehearses it",
    "head=$(scontrol": "needs SLURM",
}
NOT_RUN |= {} if find_spec("onnxscript") else {"python convert.py CUT/": "it is not installed"}
# Flags that follow those of the README. step_time.py does one step, without measuring it.
TRAIN = "--data-root datasets --output-root . --epochs 1 --image-size 32 --ngf 4 --num-workers 0"
TINY = {
    "pix2pix/train.py": TRAIN,
    "cycleGAN/train.py": f"{TRAIN} --n-layers 1",
    "CUT/train.py": f"{TRAIN} --n-layers 5 --num-patches 16",
    "datasets/make_toy.py": "--count 2 --test-count 2 --size 64 --root datasets",
    "datasets/download.py": "--list",  # the rest needs the network: test_download.py
    "datasets/prepare.py": "--data-root datasets",
    "visualize/gallery.py": "--root visualize",
    "benchmarks/step_time.py": "--image-size 32 --device cpu --configs fp32",
    "experiments/run.py": "--dry-run --seconds-per-step 1 1 1 --output-root .",  # not --measure
    "experiments/judge.py": "--output-root .",
}


def commands(page):
    """The commands of a README, as lists of words, in order: of code blocks and of `python ...`."""
    found, inline = [], r"`((?:python|torchrun) [^`<…]+)`"
    for match in re.finditer(rf"^```(\w*)\n(.*?)^```|{inline}", page.read_text(), re.M | re.S):
        block = match[2] if match[1] in ("", "sh", "bash") else match[3]
        lines = re.sub(r"\\\n", " ", block or "").splitlines()
        found += [shlex.split(line, comments=True) for line in lines]
    return [words for words in found if words]


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A working directory with the datasets, images and weights that the READMEs presuppose."""
    write_unpaired(write_pairs(tmp_path / "datasets", "facades", 2, 1), "monet2photo", (2, 2), 1)
    folders = "photos/summer photos/winter my_photos ~/photos ~/paintings ~/sketches DIR_X DIR_Y"
    for folder in (tmp_path / name for name in folders.split()):
        folder.mkdir(parents=True)
        for name in "abcde":
            picture(np.random.default_rng(0), 32, 32).save(folder / f"{name}.png")
    shutil.copy(folder / "a.png", tmp_path / "my_labels.png")
    shutil.copy(folder / "a.png", tmp_path / "one.jpg")
    G = load_script("cycleGAN").ResnetGenerator(1, 4)
    layers = [m for m in G.modules() if hasattr(m, "out_channels")]
    weights = {f"model.{k}.weight": m.weight for k, m in enumerate(layers)}
    biases = {f"model.{k}.bias": torch.zeros(m.out_channels) for k, m in enumerate(layers)}
    torch.save(weights | biases, tmp_path / "latest_net_G.pth")
    shutil.copy(ROOT / "experiments" / "README.md", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "~"))
    monkeypatch.setattr(import_module("judge"), "HERE", tmp_path)
    monkeypatch.setattr(import_module("evaluate"), "find_spec", lambda _: None)  # no weights


def start(words, patch):
    """Runs a command of a README in this process, at a tiny size. Returns its exit status."""
    if "torchrun" in words:  # as one process
        args = get_args_parser().parse_args(words[words.index("torchrun") + 1 :])
        words = ["python", args.training_script, *args.training_script_args]
    assert words[0] == "python" and (ROOT / words[1]).exists(), "no script, and not in NOT_RUN"
    script, *flags = map(os.path.expanduser, words[1:])
    folder, name = os.path.split(script.removesuffix(".py"))
    if folder in METHODS:
        patch.setitem(sys.modules, "train", load_script(folder))  # translate.py imports from it
    module = load_script(folder, name) if folder in METHODS else import_module(name)
    tiny, end = TINY.get(script, "").split(), (*flags, "--").index("--")
    if name == "train":
        patch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
        tiny += ["--epochs", "2"] if "--resume" in flags else ["--overwrite"]
    try:
        module.parse_args(flags)  # as it is typed
        flags[end:end] = tiny
        if name != "step_time":
            return module.main(flags)
        module.Configuration("fp32", module.parse_args(flags))(*torch.zeros(2, 1, 3, 32, 32))
    except SystemExit as ended:
        return ended.code


@pytest.mark.usefixtures("world")
@pytest.mark.skipif(len(METHODS) < 3, reason="a method's folder is missing")
@every_page
def test_every_command_runs(page, monkeypatch, capsys):
    """In the order of the page, in one working directory."""
    for words in commands(page):
        command = " ".join(words)
        if not command.startswith(tuple(NOT_RUN)):
            with commands_here(*METHODS), monkeypatch.context() as patch:
                assert not start(words, patch), f"{command}\n{capsys.readouterr().err}"


def test_no_exception_is_stale_and_the_common_commands_are_there():
    found = [" ".join(words) for page in PAGES for words in commands(page)]
    scripts = [f"{method}/{name}.py" for method in METHODS for name in ("train", "translate")]
    for beginning in [*NOT_RUN, *(f"python {name}" for name in (*scripts, *TINY))]:
        assert any(command.startswith(beginning) for command in found), beginning


def slug(heading):
    """The anchor that GitHub gives a heading."""
    heading = re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", r"\1", heading)
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


@every_page
def test_no_command_trains_over_a_run_that_is_here(page):
    for words in commands(page):
        method, _, script = " ".join(words[1:2]).partition("/")
        if script == "train.py" and "--help" not in words:
            args = load_script(method).parse_args(words[2:])
            folder = ROOT / "visualize" / method / args.run_name
            known = subprocess.getoutput(f"git -C '{ROOT}' ls-files '{folder}' 2>&-")
            assert args.resume or not known, args.run_name


@every_page
def test_every_link_and_image_exists(page):
    text = page.read_text()
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    for link in (link for link in links if not re.match("https?://", link)):
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.M)
            assert anchor in map(slug, headings), link


@every_page
def test_pages_are_short_and_their_commands_narrow(page):
    text = page.read_text()
    for block in re.findall(r"^```.*?^```", text, re.M | re.S):
        assert max(map(len, block.splitlines())) < 92
    assert len(text.split()) < 1900 or page.parent != ROOT
    limits = dict.fromkeys(METHODS, 150) | {ROOT.name: 200}
    assert len(text.splitlines()) < limits.get(page.parent.name, 1000)

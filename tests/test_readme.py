"""The READMEs: every command has valid flags, every link leads somewhere, the limits hold."""

import importlib.util
import re
import shlex
import sys

import pytest

from conftest import METHODS, ROOT

PAGES = sorted(
    [ROOT / "README.md", *ROOT.glob("*/README.md")], key=lambda page: (len(page.parts), page)
)
IDS = [page.relative_to(ROOT).as_posix() for page in PAGES]


def commands():
    """(page, words) of each `python ...` or `torchrun ...` line in a fenced block of a README."""
    for page, name in zip(PAGES, IDS, strict=True):
        for block in re.findall(r"^```(?:sh)?\n(.*?)^```", page.read_text(), re.M | re.S):
            for line in re.sub(r"\\\n\s*", "", block).splitlines():
                words = shlex.split(line, comments=True)
                scripts = [k for k, word in enumerate(words) if word.endswith(".py")]
                if scripts and words[0] in ("python", "torchrun"):
                    yield pytest.param(words[scripts[0] :], id=f"{name}: {' '.join(words)[:60]}")


def slug(heading):
    """The anchor that GitHub gives a heading."""
    heading = re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", r"\1", heading)
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


@pytest.mark.parametrize("words", list(commands()))
def test_every_command_has_a_script_and_valid_flags(words, monkeypatch):
    path = ROOT / words[0]
    if path.parent.name in ("pix2pix", "cycleGAN", "CUT") and path.parent.name not in METHODS:
        pytest.skip("this folder was removed")
    if path.name == "train.py":
        path = path.with_name(f"{path.parent.name}_flags.py")
    monkeypatch.syspath_prepend(str(path.parent))
    spec = importlib.util.spec_from_file_location(f"readme_{path.parent.name}_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    before = set(sys.modules)
    spec.loader.exec_module(module)
    module.parse_args(words[1:])
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) == str(path.with_name("train.py")):
            del sys.modules[name]  # the methods all have a module of this name


def test_there_are_commands_of_every_kind():
    scripts = {param.values[0][0] for param in commands()}
    assert {f"{m}/{s}.py" for m in METHODS for s in ("train", "translate")} <= scripts
    assert {"evaluate.py", "convert.py", "datasets/prepare.py", "datasets/download.py"} <= scripts


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_every_link_and_image_exists(page):
    text = page.read_text()
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    for link in links:
        if link.startswith(("http://", "https://")):
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.M)
            assert anchor in map(slug, headings), link


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_commands_are_narrow_enough_to_be_read(page):
    for block in re.findall(r"^```.*?^```", page.read_text(), re.M | re.S):
        assert max(map(len, block.splitlines())) < 92


def test_the_readme_is_short():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) < 200 and len(text.split()) < 1900
    for method in METHODS:
        assert len((ROOT / method / "README.md").read_text().splitlines()) < 150

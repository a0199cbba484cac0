"""The checker of copies, in folders made for it and on the repository itself."""

import subprocess
import sys

import pytest

import check_copies
from conftest import ROOT

MODEL = '''SIZES = (1, 2)


# He et al. 2015.
class Block(torch.nn.Module):
    """One block."""

    def forward(self, x):
        return x + 1


@torch.no_grad()
def init_weights(net, gain=0.02):
    for p in net.parameters():
        p.normal_(0, gain)
'''
BROKEN = MODEL.replace("p.normal_(0, gain)", "p.normal_(0, 2 * gain)")
MARK = "# Differs from cycleGAN/cycleGAN_model.py: "
PIX2PIX_MARK = "# Differs from pix2pix/pix2pix_model.py: "
DECORATOR = "@torch.no_grad()"


def check(root, fix=False, **models):
    """The complaints, after writing root/<folder>/<folder>_model.py for each folder given."""
    for folder, text in models.items():
        path = root / folder / f"{folder}_model.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
    return check_copies.check(root, fix)


def read(root, folder):
    return (root / folder / f"{folder}_model.py").read_bytes().decode()


def marked(text, line=DECORATOR, mark=f"{MARK}a reason"):
    """text with a mark above a line of it."""
    assert text.count(line) == 1
    return text.replace(line, f"{mark}\n{line}")


@pytest.mark.parametrize("name, old, new", [
    ("SIZES", "(1, 2)", "(1, 3)"), ("SIZES", "SIZES =", "SIZES: tuple ="),
    ("Block", "x + 1", "x - 1"), ("Block", "One block.", "Two blocks."),
    ("Block", "torch.nn.Module", "torch.nn.Identity"),
    ("init_weights", "@torch.no_grad()\n", ""), ("init_weights", "gain=0.02", "gain=0.2"),
    ("init_weights", "    for p in", "    pass\n    for p in"),
    ("init_weights", "def init", "async def init"),
])  # fmt: skip
def test_any_change_is_caught_and_fixed(tmp_path, name, old, new):
    (complaint,) = check(tmp_path, cycleGAN=MODEL, CUT=MODEL.replace(old, new))
    assert complaint.startswith("CUT/CUT_model.py:")
    assert f": {name} differs from cycleGAN/cycleGAN_model.py:" in complaint
    assert check(tmp_path, fix=True) == []
    assert read(tmp_path, "CUT") == MODEL


def test_comments_and_blank_lines_do_not_count(tmp_path):
    text = MODEL.replace("    for p in", "\n    # every one\n    for p in").replace("He et", "They")
    assert check(tmp_path, fix=True, cycleGAN=MODEL, CUT=text) == []
    assert read(tmp_path, "CUT") == text


def test_only_the_same_role_and_the_same_name_are_compared(tmp_path):
    other = BROKEN.replace("Block", "Stage").replace("SIZES", "sizes").replace("init_", "sample_")
    assert check(tmp_path, cycleGAN=MODEL, CUT=other) == []
    (tmp_path / "CUT" / "CUT_nce.py").write_text(BROKEN)
    assert check(tmp_path) == []


def test_files_without_the_prefix_are_compared_and_both_lines_named(tmp_path):
    for folder, text in (("pix2pix", MODEL), ("cycleGAN", BROKEN)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "train.py").write_text(text)
    assert check(tmp_path) == [
        "cycleGAN/train.py:15: init_weights differs from pix2pix/train.py:15\n"
        "    there: p.normal_(0, gain)\n"
        "    here:  p.normal_(0, 2 * gain)"
    ]


def test_missing_folders_are_fine(tmp_path):
    assert check(tmp_path) == []
    (tmp_path / "pix2pix").mkdir()
    assert check(tmp_path, CUT=marked(MODEL)) == []


@pytest.mark.parametrize("line", [DECORATOR, "# Two lines of comment."])
def test_mark_with_a_reason_is_accepted(tmp_path, line):
    text = BROKEN.replace(DECORATOR, f"# Two lines of comment.\n{DECORATOR}")
    assert check(tmp_path, fix=True, cycleGAN=MODEL, CUT=marked(text, line)) == []
    assert "2 * gain" in read(tmp_path, "CUT")


@pytest.mark.parametrize("mark", [MARK, MARK.strip(": "), MARK.strip(": ") + " as so"])
def test_mark_without_a_reason_is_reported(tmp_path, mark):
    (complaint,) = check(tmp_path, cycleGAN=MODEL, CUT=marked(BROKEN, mark=mark))
    assert "CUT/CUT_model.py:12: init_weights is marked without a reason" in complaint


@pytest.mark.parametrize("line", [f"\n{DECORATOR}", "    for p in net", "class Block"])
def test_mark_elsewhere_than_directly_above_does_not_count(tmp_path, line):
    complaints = check(tmp_path, cycleGAN=MODEL, CUT=marked(BROKEN, line))
    assert any("init_weights differs" in complaint for complaint in complaints)


@pytest.mark.parametrize("old, new, expected", [
    (MODEL, marked(MODEL, f"\n{DECORATOR}"), "it stands directly above no definition"),
    (MODEL, marked(MODEL), "init_weights is the same in cycleGAN/cycleGAN_model.py"),
    ("", marked(MODEL), "no older copy of init_weights in cycleGAN/cycleGAN_model.py"),
    ("", marked(MODEL, mark="# Differs from CUT/CUT_nce.py: so"), "no older copy of init"),
])  # fmt: skip
def test_stale_marks_are_reported(tmp_path, old, new, expected):
    (complaint,) = check(tmp_path, cycleGAN=old, CUT=new)
    assert f": stale mark: {expected}" in complaint


def test_each_differing_older_copy_needs_its_mark(tmp_path):
    cyclegan = marked(BROKEN, mark=f"{PIX2PIX_MARK}so")
    third = marked(MODEL.replace("p.normal_(0, gain)", "p.normal_(0, 3 * gain)"))
    (complaint,) = check(tmp_path, pix2pix=MODEL, cycleGAN=cyclegan, CUT=third)
    assert "init_weights differs from pix2pix/pix2pix_model.py" in complaint
    assert check(tmp_path, fix=True) == [complaint]  # it differs on purpose
    assert check(tmp_path, CUT=marked(third, mark=f"{PIX2PIX_MARK}so")) == []


# Tools outside the method folders

DATASET = """SUFFIXES = (".png", ".jpg")


def load_rgb(path):
    return path


def augmentation(args):
    return args
"""


@pytest.mark.parametrize("folder", ["", "datasets/", "experiments/", "visualize/", "benchmarks/"])
@pytest.mark.parametrize("mark", ["", "# Differs from pix2pix/pix2pix_dataset.py: a reason\n"])
def test_a_tool_must_copy_the_reading_of_images(tmp_path, folder, mark):
    same_reading = DATASET.replace("return args", "return 0")
    tool, text = tmp_path / folder / "tool.py", same_reading.replace("return path", "return 0")
    for path, content in ((tmp_path / "pix2pix" / "pix2pix_dataset.py", DATASET), (tool, text)):
        path.parent.mkdir(exist_ok=True)
        path.write_text(content.replace("def load_rgb", f"{mark * (path == tool)}def load_rgb"))
    (complaint,) = check(tmp_path)  # none about `augmentation`
    assert complaint.startswith(f"{folder}tool.py:")
    assert ": load_rgb differs from pix2pix/pix2pix_dataset.py:5" in complaint
    assert check(tmp_path, fix=True) == []
    assert tool.read_text() == same_reading


def test_fix_leaves_the_rest_of_the_file_alone(tmp_path):
    head = "#!/usr/bin/env python\n\n\ndef own():\t\n    return '\x0c\u2028'   \n\n\n"
    tail = "\n\n\nrest = 1;  other = 2\n\n# the end, without a newline"
    text = head + BROKEN.replace("x + 1", "x + 2\n\n    y = 3") + tail
    assert check(tmp_path, fix=True, cycleGAN=MODEL, CUT=text) == []
    assert read(tmp_path, "CUT") == head + MODEL + tail


def test_fix_takes_the_comment_above_along_through_all_folders(tmp_path):
    older = MODEL.replace(DECORATOR, f"# Why.\n# And how.\n{DECORATOR}")
    newer = BROKEN.replace(DECORATOR, f"# Outdated.\n{DECORATOR}")
    assert check(tmp_path, fix=True, pix2pix=older, cycleGAN=newer, CUT=newer) == []
    assert read(tmp_path, "cycleGAN") == read(tmp_path, "CUT") == older


@pytest.mark.parametrize("newest", [MODEL, BROKEN])  # BROKEN: cycleGAN's, but for the mark
def test_fix_copies_the_nearest_older_version_with_its_mark(tmp_path, newest):
    cyclegan = marked(BROKEN, mark=f"{PIX2PIX_MARK}so")
    assert len(check(tmp_path, pix2pix=MODEL, cycleGAN=cyclegan, CUT=newest)) == 1
    assert check(tmp_path, fix=True) == []
    assert read(tmp_path, "CUT") == cyclegan


def test_as_a_command(tmp_path):
    check(tmp_path, cycleGAN=MODEL, CUT=BROKEN)
    for flags, status, text in (([], 1, "init_weights differs"), (["--fix"], 0, "copied from")):
        command = [sys.executable, check_copies.__file__, "--root", tmp_path, *flags]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == status and text in result.stdout


def test_the_repository_is_in_step():
    assert check(ROOT) == []

"""The checker of copies, in folders made for it and on the repository's own."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "tests" / "check_copies.py"

spec = importlib.util.spec_from_file_location("check_copies", SCRIPT)
check_copies = importlib.util.module_from_spec(spec)
spec.loader.exec_module(check_copies)

MODEL = '''"""The model."""

import torch

SIZES = (1, 2)


# He et al. 2015.
class Block(torch.nn.Module):
    """One block."""

    def forward(self, x):
        return x + 1


@torch.no_grad()
def init_weights(net, gain=0.02):
    """Draw the weights."""
    for p in net.parameters():
        p.normal_(0, gain)


async def wait(seconds):
    await sleep(seconds)
'''
MARK = "# Differs from cycleGAN/cycleGAN_model.py: "


def write(root, **models):
    """root/<folder>/<folder>_model.py for each folder given."""
    for folder, text in models.items():
        path = root / folder / f"{folder}_model.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())


def read(root, folder):
    return (root / folder / f"{folder}_model.py").read_bytes().decode()


def marked(text, line, reason="the paper says so", mark=MARK):
    """text with a mark above a line of it."""
    assert text.count(line) == 1
    return text.replace(line, f"{mark}{reason}\n{line}")


def changed(text, old, new):
    assert text.count(old) == 1
    return text.replace(old, new)


BROKEN = changed(MODEL, "p.normal_(0, gain)", "p.normal_(0, 2 * gain)")


def test_identical_copies_pass(tmp_path):
    write(tmp_path, pix2pix=MODEL, cycleGAN=MODEL, CUT=MODEL)
    assert check_copies.check(tmp_path) == []


def test_changed_body_is_reported_with_both_lines(tmp_path):
    write(tmp_path, cycleGAN=MODEL, CUT="# one line more\n" + BROKEN)
    (complaint,) = check_copies.check(tmp_path)
    assert MODEL.splitlines()[20 - 1] == "        p.normal_(0, gain)"
    assert complaint == (
        "CUT/CUT_model.py:21: init_weights differs from cycleGAN/cycleGAN_model.py:20\n"
        "    there: p.normal_(0, gain)\n"
        "    here:  p.normal_(0, 2 * gain)"
    )


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("SIZES", "(1, 2)", "(1, 3)"),
        ("SIZES", "SIZES =", "SIZES: tuple ="),
        ("Block", "x + 1", "x - 1"),
        ("Block", "One block.", "Two blocks."),
        ("Block", "torch.nn.Module", "torch.nn.Identity"),
        ("init_weights", "@torch.no_grad()", "@torch.enable_grad()"),
        ("init_weights", "@torch.no_grad()\n", ""),
        ("init_weights", "gain=0.02", "gain=0.2"),
        ("init_weights", "    for p in", "    pass\n    for p in"),
        ("wait", "async def", "def"),
        ("wait", "sleep(seconds)", "sleep(seconds, 1)"),
    ],
)
def test_any_change_is_caught_and_fixed(tmp_path, capsys, name, old, new):
    new_text = changed(MODEL, old, new)
    if name == "wait" and new == "def":
        new_text = new_text.replace("await ", "")
    write(tmp_path, cycleGAN=MODEL, CUT=new_text)
    (complaint,) = check_copies.check(tmp_path)
    assert complaint.startswith("CUT/CUT_model.py:")
    assert f": {name} differs from cycleGAN/cycleGAN_model.py:" in complaint
    assert check_copies.main(["--root", str(tmp_path), "--fix"]) == 0
    assert f"{name} copied from cycleGAN" in capsys.readouterr().out
    assert read(tmp_path, "CUT") == MODEL


def test_comments_and_blank_lines_do_not_count(tmp_path):
    text = changed(MODEL, "    for p in", "\n    # every one\n    for p in").replace(
        "He et", "They"
    )
    write(tmp_path, cycleGAN=MODEL, CUT=text)
    assert check_copies.check(tmp_path) == []
    assert check_copies.check(tmp_path, fix=True) == []
    assert read(tmp_path, "CUT") == text


def test_only_the_same_role_and_the_same_name_are_compared(tmp_path):
    write(tmp_path, cycleGAN=MODEL + "\n\nsizes = (2, 3)\n")
    other = BROKEN.replace("Block", "Stage").replace("wait(", "linger(").replace("SIZES", "sizes")
    write(tmp_path, CUT=other.replace("init_weights", "draw_weights"))
    (tmp_path / "CUT" / "CUT_dataset.py").write_text(BROKEN)
    assert check_copies.check(tmp_path) == []


def test_files_without_the_prefix_are_compared(tmp_path):
    for folder, text in (("pix2pix", MODEL), ("cycleGAN", BROKEN)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "train.py").write_text(text)
    (complaint,) = check_copies.check(tmp_path)
    assert "cycleGAN/train.py:20: init_weights differs from pix2pix/train.py:20" in complaint


def test_missing_folders_are_fine(tmp_path):
    assert check_copies.check(tmp_path) == []
    (tmp_path / "pix2pix").mkdir()
    write(tmp_path, CUT=marked(MODEL, "class Block(torch.nn.Module):"))
    assert check_copies.check(tmp_path) == []


# Marks


@pytest.mark.parametrize("line", ["@torch.no_grad()", "# Two lines of comment."])
def test_mark_with_a_reason_is_accepted(tmp_path, line):
    text = changed(BROKEN, "@torch.no_grad()", "# Two lines of comment.\n@torch.no_grad()")
    write(tmp_path, cycleGAN=MODEL, CUT=marked(text, line))
    assert check_copies.check(tmp_path) == []
    assert check_copies.check(tmp_path, fix=True) == []
    assert "2 * gain" in read(tmp_path, "CUT")


@pytest.mark.parametrize(
    "mark", [MARK, MARK.strip(), MARK.strip(": "), MARK.strip(": ") + " as so"]
)
def test_mark_without_a_reason_is_reported(tmp_path, mark):
    write(tmp_path, cycleGAN=MODEL, CUT=marked(BROKEN, "@torch.no_grad()", "", mark))
    (complaint,) = check_copies.check(tmp_path)
    assert "CUT/CUT_model.py:16: init_weights is marked without a reason" in complaint


@pytest.mark.parametrize("line", ["\n@torch.no_grad()", "    for p in net", "class Block"])
def test_mark_elsewhere_than_directly_above_does_not_count(tmp_path, line):
    text = marked(BROKEN, line)
    write(tmp_path, cycleGAN=MODEL, CUT=text)
    assert any("init_weights differs" in complaint for complaint in check_copies.check(tmp_path))


def test_stray_mark_is_reported(tmp_path):
    write(tmp_path, cycleGAN=MODEL, CUT=marked(MODEL, "\n@torch.no_grad()"))
    (complaint,) = check_copies.check(tmp_path)
    assert complaint.startswith("CUT/CUT_model.py:15: stale mark: it stands directly above no")


def test_mark_on_identical_copies_is_stale(tmp_path):
    write(tmp_path, cycleGAN=MODEL, CUT=marked(MODEL, "@torch.no_grad()"))
    (complaint,) = check_copies.check(tmp_path)
    assert "CUT/CUT_model.py:16: stale mark: init_weights is the same in" in complaint


def test_mark_that_names_the_wrong_file_is_stale(tmp_path):
    wrong = marked(BROKEN, "@torch.no_grad()", mark="# Differs from cycleGAN/cycleGAN_dataset.py: ")
    write(tmp_path, cycleGAN=MODEL, CUT=wrong)
    differs, stale = check_copies.check(tmp_path)
    assert "init_weights differs from cycleGAN/cycleGAN_model.py" in differs
    assert "stale mark: no older copy of init_weights in cycleGAN/cycleGAN_dataset.py" in stale


def test_mark_that_names_no_such_definition_is_stale(tmp_path):
    write(tmp_path, cycleGAN='"""Nothing."""\n', CUT=marked(MODEL, "@torch.no_grad()"))
    (complaint,) = check_copies.check(tmp_path)
    assert "stale mark: no older copy of init_weights in cycleGAN/cycleGAN_model.py" in complaint


def test_mark_in_the_older_folder_is_stale(tmp_path):
    older = marked(BROKEN, "@torch.no_grad()", mark="# Differs from CUT/CUT_model.py: ")
    write(tmp_path, cycleGAN=older, CUT=MODEL)
    stale, differs = check_copies.check(tmp_path)
    assert stale.startswith("cycleGAN/cycleGAN_model.py:16: stale mark")
    assert differs.startswith("CUT/CUT_model.py:20: init_weights differs")


def test_each_differing_older_copy_needs_its_mark(tmp_path):
    pix2pix_mark = "# Differs from pix2pix/pix2pix_model.py: "
    cyclegan = marked(BROKEN, "@torch.no_grad()", mark=pix2pix_mark)
    write(tmp_path, pix2pix=MODEL, cycleGAN=cyclegan, CUT=cyclegan)
    assert check_copies.check(tmp_path) == []
    third = changed(MODEL, "p.normal_(0, gain)", "p.normal_(0, 3 * gain)")
    write(tmp_path, CUT=third)
    assert len(check_copies.check(tmp_path)) == 2
    write(tmp_path, CUT=marked(third, "@torch.no_grad()"))
    (complaint,) = check_copies.check(tmp_path)
    assert "init_weights differs from pix2pix/pix2pix_model.py" in complaint
    assert check_copies.check(tmp_path, fix=True) == [complaint]  # it is another on purpose
    both = marked(third, "@torch.no_grad()", f"a\n{pix2pix_mark}b")
    write(tmp_path, CUT=both)
    assert check_copies.check(tmp_path) == []


# Repair


def test_fix_leaves_the_rest_of_the_file_alone(tmp_path):
    head = "#!/usr/bin/env python\n\n\ndef own():\t\n    return '\x0c\u2028'   \n\n\n"
    tail = "\n\n\nrest = 1;  other = 2\n\n# the end, without a newline"
    write(tmp_path, cycleGAN=MODEL, CUT=head + BROKEN.replace("x + 1", "x + 2\n\n    y = 3") + tail)
    assert check_copies.check(tmp_path, fix=True) == []
    assert read(tmp_path, "CUT") == head + MODEL + tail
    before = (tmp_path / "CUT" / "CUT_model.py").stat().st_mtime_ns
    assert check_copies.check(tmp_path, fix=True) == []
    assert (tmp_path / "CUT" / "CUT_model.py").stat().st_mtime_ns == before


def test_fix_takes_the_comment_above_along(tmp_path):
    older = changed(MODEL, "@torch.no_grad()", "# Why.\n# And how.\n@torch.no_grad()")
    newer = changed(BROKEN, "@torch.no_grad()", "# Outdated.\n@torch.no_grad()")
    write(tmp_path, cycleGAN=older, CUT=newer)
    assert check_copies.check(tmp_path, fix=True) == []
    assert read(tmp_path, "CUT") == older


def test_fix_goes_through_all_folders_in_the_order_of_the_papers(tmp_path):
    write(tmp_path, pix2pix=MODEL, cycleGAN=BROKEN, CUT=BROKEN)
    assert check_copies.check(tmp_path, fix=True) == []
    assert read(tmp_path, "cycleGAN") == read(tmp_path, "CUT") == MODEL


def test_fix_copies_the_nearest_older_version_with_its_mark(tmp_path):
    cyclegan = marked(BROKEN, "@torch.no_grad()", mark="# Differs from pix2pix/pix2pix_model.py: ")
    write(tmp_path, pix2pix=MODEL, cycleGAN=cyclegan, CUT=MODEL)
    assert check_copies.check(tmp_path, fix=True) == []
    assert read(tmp_path, "CUT") == cyclegan
    write(tmp_path, CUT=BROKEN)  # as cycleGAN's, but for the mark
    assert len(check_copies.check(tmp_path)) == 1
    assert check_copies.check(tmp_path, fix=True) == []
    assert read(tmp_path, "CUT") == cyclegan


def test_as_a_command(tmp_path):
    def run(*flags):
        command = [sys.executable, SCRIPT, "--root", tmp_path, *flags]
        return subprocess.run(command, capture_output=True, text=True)

    write(tmp_path, cycleGAN=MODEL, CUT=BROKEN)
    result = run()
    assert result.returncode == 1 and "init_weights differs" in result.stdout
    assert read(tmp_path, "CUT") == BROKEN
    assert run("--fix").returncode == 0
    assert read(tmp_path, "CUT") == MODEL
    result = run()
    assert result.returncode == 0 and result.stdout == "every copy is in step\n"


# The repository itself


def folders_there(root):
    return [folder for folder in check_copies.FOLDERS if any((root / folder).glob("*.py"))]


def test_the_repository_is_in_step():
    assert check_copies.check(ROOT) == []


def test_a_broken_copy_in_the_repository_is_caught(tmp_path):
    folders = folders_there(ROOT)
    for folder in folders:
        (tmp_path / folder).mkdir()
        for file in (ROOT / folder).glob("*.py"):
            shutil.copy(file, tmp_path / folder)
    if len(folders) == 1:  # then its own files, under the names of a sibling
        twin = next(f for f in check_copies.FOLDERS if f != folders[0])
        (tmp_path / twin).mkdir()
        for file in (tmp_path / folders[0]).glob("*.py"):
            shutil.copy(file, tmp_path / twin / file.name.replace(folders[0], twin))
    assert check_copies.check(tmp_path) == []

    copies = [
        (name, new)
        for folder in folders_there(tmp_path)
        for file in sorted((tmp_path / folder).glob("*.py"))
        for older in check_copies.read_older(tmp_path, folder, file).values()
        for name, new in check_copies.read_definitions(file)[0].items()
        if name in older and hasattr(new.tree, "body") and not new.marks
    ]
    assert copies
    name, new = copies[0]
    lines = check_copies.read_lines(new.file)
    lines.insert(new.end, "    broken = True")
    new.file.write_text("\n".join(lines))
    where = new.file.relative_to(tmp_path).as_posix()
    complaints = check_copies.check(tmp_path)
    assert any(c.startswith(f"{where}:") and f": {name} differs from" in c for c in complaints)
    assert check_copies.check(tmp_path, fix=True) == []
    assert "broken = True" not in new.file.read_text()

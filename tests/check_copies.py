"""Check that code which exists in several files stays the same: no silent drift between copies.

    python tests/check_copies.py          report each difference, exit status 1 if there is one
    python tests/check_copies.py --fix    copy from the older method's folder into the newer one

A top-level function, class or UPPER_CASE constant that files of the same role define under the same
name (`pix2pix/pix2pix_model.py` and `CUT/CUT_model.py`, or the two `train.py`) must be the same
syntax tree, docstrings included and comments not. One that must differ says so in the comment
directly above it in the newer folder, one line for each older copy that is different:

    # Differs from cycleGAN/cycleGAN_model.py: <reason>

Tools outside the method folders copy the names in SHARED from pix2pix, without any difference, or
import them from datasets/images.py.
"""

import argparse
import ast
import re
import sys
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

FOLDERS = ("pix2pix", "cycleGAN", "CUT")  # in the order of the papers: 2016, 2017, 2020
TOOLS = ("*.py", "datasets/*.py", "experiments/*.py", "visualize/*.py", "benchmarks/*.py")
SOURCES = ("pix2pix/pix2pix_flags.py", "pix2pix/pix2pix_dataset.py")
SHARED = ("UserError", "SUFFIXES", "UPRIGHT", "NOTED", "note", "list_images", "load_rgb")
MARK = re.compile(r"# Differs from (\S+/[^\s:]+\.py)(?::\s*(.*))?")


class Definition(NamedTuple):
    """A top-level definition: its tree and its lines, from the comment above it to its end."""

    tree: ast.stmt
    file: Path
    start: int  # counted from 0, as the slice lines[start:end]
    end: int
    marks: dict  # {line number: (path, reason)}


def read_lines(file):
    """The lines as ast counts them; joined with newlines they are the file again, byte for byte."""
    return file.read_bytes().decode().split("\n")


def names_of(tree):
    """The name that a top-level statement defines, as a list of one or none."""
    if isinstance(tree, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [tree.name]
    if isinstance(tree, ast.Assign | ast.AnnAssign):
        target = tree.targets[0] if isinstance(tree, ast.Assign) else tree.target
        return [target.id] if isinstance(target, ast.Name) and target.id.isupper() else []
    return []


def read_definitions(file):
    """{name: Definition} of a file, and the marks in it that stand above none."""
    lines, found = read_lines(file), {}
    marks = {i: MARK.match(line).groups() for i, line in enumerate(lines, 1) if MARK.match(line)}
    for tree in ast.parse("\n".join(lines), str(file)).body:
        for name in names_of(tree):
            decorators = getattr(tree, "decorator_list", [])
            start = min(node.lineno for node in [tree, *decorators]) - 1
            while start and lines[start - 1].startswith("#"):
                start -= 1
            own = {i: marks.pop(i) for i in range(start + 1, tree.lineno) if i in marks}
            found[name] = Definition(tree, file, start, tree.end_lineno, own)
    return found, marks


def read_older(root, file):
    """{path: {name: Definition}} of the files that `file` copies from, the nearest one last."""
    folder = file.relative_to(root).parent.as_posix()
    if folder not in FOLDERS:  # a tool
        found = {
            path: read_definitions(root / path)[0] for path in SOURCES if (root / path).exists()
        }
        return {path: {n: d for n, d in old.items() if n in SHARED} for path, old in found.items()}
    role, older = file.name.removeprefix(folder), {}
    for other in FOLDERS[: FOLDERS.index(folder)]:
        path = f"{other}/{role if role == file.name else other + role}"
        if (root / path).is_file():
            older[path] = read_definitions(root / path)[0]
    return older


def first_difference(old, new, lines=(0, 0)):
    """The line numbers at which two differing trees part."""
    lines = getattr(old, "lineno", lines[0]), getattr(new, "lineno", lines[1])
    if type(old) is type(new):
        for pair in zip_longest(ast.iter_child_nodes(old), ast.iter_child_nodes(new)):
            if None in pair or ast.dump(pair[0]) != ast.dump(pair[1]):
                return first_difference(*pair, lines)
    return lines


def check_definition(root, older, name, new):
    """Complaints about one definition, and the nearest older copy where an unmarked one differs."""
    copies = {path: found[name] for path, found in older.items() if name in found}
    complaints, source = [], None
    where, marked = new.file.relative_to(root).as_posix(), {path for path, _ in new.marks.values()}
    if where.split("/")[0] not in FOLDERS:
        marked = set()  # a mark excuses no tool
    for path, old in copies.items():
        if ast.dump(old.tree) != ast.dump(new.tree) and path not in marked:
            i, j = first_difference(old.tree, new.tree)
            complaints.append(
                f"{where}:{j}: {name} differs from {path}:{i}\n"
                f"    there: {read_lines(old.file)[i - 1].strip()}\n"
                f"    here:  {read_lines(new.file)[j - 1].strip()}"
            )
            source = None if marked else list(copies.values())[-1]
    for line, (path, reason) in new.marks.items():
        if not reason:
            complaints.append(f"{where}:{line}: {name} is marked without a reason, after a colon")
        if path in copies and ast.dump(copies[path].tree) == ast.dump(new.tree):
            complaints.append(f"{where}:{line}: stale mark: {name} is the same in {path}")
        if path not in copies and not is_absent(root, path):
            complaints.append(f"{where}:{line}: stale mark: no older copy of {name} in {path}")
    return complaints, source


def is_absent(root, path):
    """Whether a mark names a method folder that was taken away: nothing can be said of it then."""
    folder = path.split("/")[0]
    return folder in FOLDERS and not any((root / folder).glob("*.py"))


def check(root, fix=False):
    """Every complaint, as text; with fix, after copying what may be copied."""
    complaints = []
    patterns = [*(f"{folder}/*.py" for folder in FOLDERS), *TOOLS]
    for file in [file for pattern in patterns for file in sorted(root.glob(pattern))]:
        lines, older = read_lines(file), read_older(root, file)
        found, stray = read_definitions(file)
        # From below, so that a copy of another length moves no definition still to come.
        for name, new in sorted(found.items(), key=lambda item: -item[1].start):
            source = check_definition(root, older, name, new)[1]
            if fix and source:
                lines[new.start : new.end] = read_lines(source.file)[source.start : source.end]
                print(f"{file.relative_to(root)}: {name} copied from {source.file.parent.name}")
        if lines != read_lines(file):
            file.write_bytes("\n".join(lines).encode())
            found, stray = read_definitions(file)
        for name, new in found.items():
            complaints += check_definition(root, older, name, new)[0]
        for line in stray:
            where = f"{file.relative_to(root).as_posix()}:{line}"
            complaints.append(f"{where}: stale mark: it stands directly above no definition")
    return complaints


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--fix", action="store_true", help="copy from the older folder, not marked")
    root = Path(__file__).resolve().parents[1]
    parser.add_argument("--root", type=Path, default=root, help="folder of the method folders")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    complaints = check(args.root, args.fix)
    print("\n".join(complaints) or "every copy is in step")
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())

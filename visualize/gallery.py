"""Write visualize/index.html: the grids, losses and flags of all runs, two runs side by side.

    python visualize/gallery.py
    python visualize/gallery.py --runs first 'CUT/*' --output some.html

The page contains everything it shows, images included, and needs no server: open it in a browser.
The same runs give the same page, byte for byte. The page is gallery.html; this script fills it.
"""

import argparse
import base64
import csv
import fnmatch
import functools
import importlib.util
import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path

from PIL import Image

HERE = Path(__file__).resolve().parent
LARGE = 100  # MB; browsers open a larger page slowly
PARTS = ("args.json", "losses.csv", "val")  # a folder with any of these is a run
KINDS = {"x": "real x", "y_G": "generated y", "y": "real y", "x_G": "generated x"}  # page order
NOT_LOSSES = ("epoch", "seconds", "images_per_second", "learning_rate")
NOT_FLAGS = ("method", "run_name", "typed", "given", "torch", "device_used", "commit")


class UserError(Exception):
    """A problem that the user can fix. One line: what was found, what was expected, what to do."""


class Parser(argparse.ArgumentParser):
    """Answers an error with one line."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def parse_args(argv=None):
    style = argparse.RawDescriptionHelpFormatter
    parser = Parser("gallery.py", description=__doc__, formatter_class=style, allow_abbrev=False)
    flag = parser.add_argument
    runs = "'CUT/first*', or run names of any method: 'first*' [all]"
    flag("--runs", nargs="+", metavar="GLOB", default=["*"], help=runs)
    flag("--root", type=Path, default=HERE, help="the folder of <method>/<run-name>/ [visualize/]")
    flag("--output", type=Path, metavar="FILE", help="the page to write [index.html in --root]")
    args = parser.parse_args(argv)
    args.output = args.output or args.root / "index.html"
    return args


# ----------------------------------------------------------------------------- finding the runs


def find_runs(root, globs):
    """The runs that match a glob, as {"<method>/<run-name>": whether it is committed in git}.

    Newest first, but committed runs after the others. A glob without a slash matches run names.
    """
    folders = [f for f in sorted(root.glob("*/*")) if any((f / part).exists() for part in PARTS)]
    names = [f"{folder.parent.name}/{folder.name}" for folder in folders]
    if not names:
        raise UserError(f"no runs in {root}: train one first, as in: python pix2pix/train.py")
    matches = set()
    for glob in globs:
        found = fnmatch.filter(names, glob if "/" in glob else f"*/{glob}")
        if not found:
            listed = ", ".join(names[:8]) + ", ..." * (len(names) > 8)
            raise UserError(f"--runs {glob} matches none of {len(names)} runs: {listed}")
        matches.update(found)
    committed = commit_times(root)
    times = {name: committed.get(name) or last_change(root / name) for name in sorted(matches)}
    order = sorted(times, key=lambda name: (name in committed, -times[name]))
    return {name: name in committed for name in order}


def last_change(folder):
    """The time of the last epoch (or of the start) of a run, in seconds."""
    return max(path.stat().st_mtime for path in map(folder.joinpath, PARTS) if path.exists())


def commit_times(root):
    """{"<method>/<run-name>": time of the last commit} of the committed, unchanged runs.

    Empty without git. The times of files say nothing here: a clone sets them all to now.
    """

    def git(*arguments):
        command = ["git", "-c", "core.quotePath=off", *arguments, "--", "."]
        try:
            done = subprocess.run(command, cwd=root, capture_output=True, check=False)
        except OSError:
            return []
        return done.stdout.decode(errors="replace").splitlines()

    def run_name(file):
        return "/".join(file.split("/")[:2])

    times, time = {}, 0
    for line in git("log", "--format=%x00%ct", "--name-only", "--relative"):
        if line.startswith("\0"):
            time = int(line[1:])
        else:
            times.setdefault(run_name(line), time)
    committed = {run_name(file) for file in git("ls-files")}
    changed = {run_name(file) for file in git("ls-files", "--modified")}
    return {name: time for name, time in times.items() if name in committed - changed}


# ----------------------------------------------------------------------------- reading one run


def read_run(folder, images):
    """All that the page shows of a run; "notes" says what is missing or broken.

    images: {base64 of a PNG: its number}; new ones are added, so equal grids are stored once.
    """
    notes = []
    run = {"method": folder.parent.name, "name": f"{folder.parent.name}/{folder.name}"}
    run["epochs"], run["grids"] = read_grids(folder, images, notes)
    run["losses"] = read_losses(folder, notes)
    run["flags"], run["facts"] = read_flags(folder, notes)
    return {**run, "notes": notes}


def read_grids(folder, images, notes):
    """(epochs, grids): for each epoch a list of grids, of the same kinds in each epoch."""
    found = {}
    for kind in KINDS:
        for file in folder.glob(f"val/{kind}*.png"):
            epoch = file.stem.removeprefix(kind)
            if epoch.isascii() and epoch.isdigit():
                found[int(epoch), kind] = file
    epochs = sorted({epoch for epoch, _ in found})
    kinds = [kind for kind in KINDS if any((epoch, kind) in found for epoch in epochs)]
    if not epochs:
        notes.append("no grids in val/")
    return epochs, [[read_grid(found, e, k, images, notes) for k in kinds] for e in epochs]


def read_grid(found, epoch, kind, images, notes):
    """One grid; its image is None if the file is missing or broken."""
    grid = {"kind": KINDS[kind], "file": f"{kind}{epoch}.png", "image": None, "problem": None}
    try:
        data = found[epoch, kind].read_bytes()
        image = Image.open(io.BytesIO(data), formats=["PNG"])
        image.verify()
    except Exception as error:  # Pillow raises many kinds for a damaged file
        grid["problem"] = "is missing" if isinstance(error, KeyError) else "is damaged"
        notes.append(f"{grid['file']} {grid['problem']}")
        return grid
    grid["image"] = images.setdefault(base64.b64encode(data).decode(), len(images))
    grid["width"], grid["height"] = image.size
    # torchvision's make_grid puts 2 px around each image.
    count, rest = divmod(image.width - 2, image.height - 2) if image.height > 2 else (0, 1)
    return {**grid, "count": 0 if rest else count}


def read_losses(folder, notes):
    """[[term, [[epoch, value], ...]], ...] of losses.csv; a value is None if it is not finite."""
    try:
        with open(folder / "losses.csv", newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
        epochs = [int(row["epoch"]) for row in rows]
    except FileNotFoundError:
        notes.append("losses.csv is missing")
        return []
    except (OSError, KeyError, TypeError, ValueError, csv.Error):
        notes.append("losses.csv cannot be read, or a row has no epoch")
        return []
    if not rows:
        notes.append("losses.csv has no rows")
    losses = []
    for term in [term for term in (rows[0] if rows else ()) if term and term not in NOT_LOSSES]:
        points = [[e, finite(r[term])] for e, r in zip(epochs, rows, strict=True) if r[term]]
        bad = [str(epoch) for epoch, value in points if value is None]
        if bad:
            listed = ", ".join(bad[:5]) + ", ..." * (len(bad) > 5)
            notes.append(f"losses.csv: {term} is not finite at epoch {listed}")
        losses.append([term, points])
    return losses


def finite(text):
    """A float, or None for nan, inf and text that is not a number."""
    try:
        return float(text) if math.isfinite(float(text)) else None
    except ValueError:
        return None


def read_flags(folder, notes):
    """(flags, facts) of args.json: flags is [[flag, value, whether it is not the default], ...]."""
    try:
        args = json.loads((folder / "args.json").read_text(encoding="utf-8"))
        typed = set(args.get("typed") or args.get("given") or ())  # "given": older versions
        usual = defaults(folder.parent.name)
        flags = []
        for name in [name for name in args if name not in NOT_FLAGS]:
            differs = not equal(args[name], usual[name]) if name in usual else name in typed
            flags.append(["--" + name.replace("_", "-"), in_words(args[name]), differs])
        facts = {"torch": "torch ", "device_used": "on ", "commit": "commit "}
        return flags, ", ".join(
            word + str(args[key]) for key, word in facts.items() if args.get(key)
        )
    except FileNotFoundError:
        notes.append("args.json is missing")
    except (OSError, ValueError, AttributeError, TypeError, RecursionError):
        notes.append("args.json cannot be read")
    return [], ""


def in_words(value):
    """A flag's value as text."""
    words = {True: "on", False: "off", None: "none"}
    return words[value] if value is None or isinstance(value, bool) else str(value)


def equal(value, default):
    """Whether a value of args.json is the default. Paths there are relative to the repository."""
    if isinstance(default, Path):
        return isinstance(value, str) and HERE.parent / value == default
    return value == default


@functools.cache
def defaults(method):
    """{flag: default} by <method>/<method>_flags.py; empty where there is none.

    args.json cannot tell: after a resume, its "typed" holds only the flags of the last command.
    """
    path = HERE.parent / method / f"{method}_flags.py"
    if not path.exists():
        return {}
    spec = importlib.util.spec_from_file_location(path.stem, path)
    flags = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(flags)
    return vars(flags.parse_args([]))


# ------------------------------------------------------------------------------------- the page


def build_page(root, names):
    """The whole page as text. names: {"<method>/<run-name>": whether it is committed}."""
    images = {}
    runs = [{**read_run(root / name, images), "committed": names[name]} for name in names]
    data = json.dumps({"runs": runs, "images": list(images)}, allow_nan=False)
    # Only "</script" or "<!--" can end the data inside <script>; without "<" there is neither.
    template = (HERE / "gallery.html").read_text(encoding="utf-8")
    return template.replace("{{DATA}}", data.replace("<", "\\u003c"), 1)


def main(argv=None):
    """Runs the command line. Returns the exit status."""
    args = parse_args(argv)
    aside = args.output.with_name(f"{args.output.name}.{os.getpid()}.tmp")
    try:
        names = find_runs(args.root, args.runs)
        page = build_page(args.root, names).encode()
        try:
            aside.write_bytes(page)
            os.replace(aside, args.output)
        finally:
            aside.unlink(missing_ok=True)
    except (UserError, OSError) as error:
        print(f"gallery.py: error: {error}", file=sys.stderr)
        return 2
    size = len(page) / 1e6
    print(f"{args.output}: {len(names)} run{'s' * (len(names) > 1)}, {size:.1f} MB")
    if size > LARGE:
        print(f"warning: browsers open a page above {LARGE} MB slowly; --runs selects runs")
    return 0


if __name__ == "__main__":
    sys.exit(main())

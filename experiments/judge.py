"""Measure the complete runs of run.py and fill the tables of experiments/README.md.

    python experiments/judge.py                        # the runs that are not in results.csv yet
    python experiments/judge.py steadiness --again     # those of one question, once more

results.csv gets a row for each run and direction. A run without a checkpoint is not measured; the
row that it has in results.csv stays. In README.md only the text between `<!-- table NAME -->` and
`<!-- end -->` is replaced, where NAME is a question of run.py, `labels` or `paper`.

Measured on the test images at the size of the training: l1, change and luminance as in losses.csv
after the last epoch, if train.py measures them, and how much they vary over the last ten sampling
epochs; the rest by evaluate.py and label_score.py on what translate.py makes of the images.
"""

import argparse
import csv
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from run import PAPER, ROOT, RUNS, epochs_left, parse, paths

sys.path.insert(0, str(ROOT))
from evaluate import UserError, list_images, load_rgb

HERE = Path(__file__).resolve().parent

# Columns of results.csv: the title in the tables, and the format.
LOGGED = {
    "l1": ("L1 to the truth", ".3f"),
    "change": ("change", ".3f"),
    "luminance": ("luminance", ".2f"),
}
MEASURED = {
    "swd": ("SWD", ".1f"),
    "fid": ("FID", ".1f"),
    "kid": ("KID", ".4f"),
    "stripes_2": ("stripes, 2 px (dB)", ".2f"),
    "stripes_4": ("stripes, 4 px (dB)", ".2f"),
    "shift_psnr": ("shift-PSNR (dB)", ".1f"),
}
LABELS = {
    "label_pixel": ("pixel accuracy", ".3f"),
    "label_class": ("class accuracy", ".3f"),
    "label_iou": ("class IoU", ".3f"),
}
STEADINESS = {f"{name}_spread": (f"{title}, spread", ".3f") for name, (title, _) in LOGGED.items()}
KEY = ("method", "name", "direction")
COLUMNS = (*KEY, "epochs", "commit", "torch", *LOGGED, *MEASURED, *LABELS, *STEADINESS)


def parse_args(argv=None):
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("judge.py", None, __doc__, formatter_class=style)
    parser.add_argument("--again", action="store_true", help="measure what is measured, too [off]")
    return parse(parser, argv)


def directions(run):
    """The directions that a run learns."""
    return ("x2y", "y2x") if run.method == "cycleGAN" else ("x2y",)


def flag_values(text):
    """{"--epochs": "10", "--antialias": "", ...} of a command line; the last one counts."""
    flags = {}
    for word in shlex.split(text):
        if word.startswith("--"):
            name = word
            flags[name] = ""
        else:
            flags[name] = word
    return flags


def check_flags(run, flags):
    """UserError if args.json of a run, `flags`, differs from the run's flags in run.py."""
    for flag, text in flag_values(run.flags).items():
        off = flag.startswith("--no-")
        found = flags[flag.removeprefix("--no-" if off else "--").replace("-", "_")]
        expected = type(found)(text) if text else not off
        if found != expected:
            raise UserError(f"trained with {found} for {flag}; run.py has {expected}")


def logged(folder, direction):
    """l1, change and luminance after the last epoch, and their spread, by column.

    The spread is the standard deviation over the last ten sampling epochs.
    """
    with open(folder / "losses.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    found = {}
    for name in LOGGED:
        for column in (name, f"{name}_{direction.replace('2', '')}", f"test_{name}"):
            values = [float(row[column]) for row in rows if row.get(column)]
            if values:
                found[name] = values[-1]
            if len(values) > 1:
                found[f"{name}_spread"] = statistics.stdev(values[-10:])
    return found


def test_images(run, flags, data_root):
    """The test images as train.py takes them: x and y, each {stem: PIL image of --image-size}."""
    root, size = data_root / flags["data_folder"], flags["image_size"]
    if run.method == "pix2pix":
        pairs = {file.stem: load_rgb(file) for file in list_images(root / "test")}
        x = {stem: pair.crop((pair.width // 2, 0, *pair.size)) for stem, pair in pairs.items()}
        y = {stem: pair.crop((0, 0, pair.width // 2, pair.height)) for stem, pair in pairs.items()}
    else:
        sides = (("test/x", "testA"), ("test/y", "testB"))
        files = [list_images(root / a) or list_images(root / b) for a, b in sides]
        x, y = ({file.stem: load_rgb(file) for file in side} for side in files)
    if not x or not y:
        raise UserError(f"no test images in {root}; --data-root is the folder of the datasets")
    x, y = ({stem: im.resize((size, size), 3) for stem, im in side.items()} for side in (x, y))
    return (y, x) if flags["swap_xy"] else (x, y)


def run_script(script, *words):
    """Runs a script of this repository. UserError, with its last line, if it fails."""
    command = [sys.executable, ROOT / script, *words]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        found = re.findall(r"\w+\.py: [^\r\n]+", done.stderr) or done.stderr.strip().splitlines()
        raise UserError(f"{script} failed: {(found or [f'exit status {done.returncode}'])[-1]}")


def measured(run, direction, flags, args):
    """What evaluate.py and label_score.py say of a run's translations, as {key: {column: value}}.

    From label_score.py also of the real test photographs, their mean, and noise.
    """
    sides, key = test_images(run, flags, args.data_root), (run.method, run.name, direction)
    source, truth = sides if direction == "x2y" else sides[::-1]
    with tempfile.TemporaryDirectory() as folder:
        given, made, real, file = (Path(folder) / n for n in ("given", "made", "real", "json"))
        for place, images in ((given, source), (real, truth)):
            place.mkdir()
            for stem, image in images.items():
                image.save(place / f"{stem}.png")
        words = ["--checkpoint", paths(args, run)[1], "--input", given]
        words += ["--direction", direction] if run.method == "cycleGAN" else []
        run_script(f"{run.method}/translate.py", *words, "--output", made)
        words += ["--paired"] if source.keys() == truth.keys() else []
        run_script("evaluate.py", made, real, *words, "--json", file)
        report = json.loads(file.read_text())
        found = report["stripes"] | report["unpaired"] | report["change"]
        found["change"], found["l1"] = report["change"]["l1"], report.get("paired", {}).get("l1")
        for period in (2, 4):
            both = [found[f"{way}_{period}"] for way in ("vertical", "horizontal")]
            found[f"stripes_{period}"] = statistics.mean(both)
        if not is_labels_to_photo(run, direction):
            return {key: found}
        run_script(
            "experiments/label_score.py", made, "--data-root", args.data_root, "--json", file
        )
        labels = {
            name: {f"label_{k}": statistics.mean(v) for k, v in scores.items()}
            for name, scores in json.loads(file.read_text()).items()
        }
    return {key: found | labels.pop(str(made))} | {("-", n, "-"): v for n, v in labels.items()}


def is_labels_to_photo(run, direction):
    """Whether label_score.py can judge a run: facades, from labels to photographs."""
    return direction == "x2y" and "--data-folder facades" in run.flags


def judge(run, direction, flags, args):
    """Rows of results.csv, {key: row}: of a run in one direction, and the label score's limits."""
    check_flags(run, flags)
    rows = measured(run, direction, flags, args)
    facts = {"epochs": flags["epochs"], "commit": commit_of(flags), "torch": flags["torch"]}
    rows[run.method, run.name, direction] |= logged(paths(args, run)[0], direction) | facts
    for key, row in rows.items():
        row = {name: row[name] for name in COLUMNS if row.get(name) is not None}
        row = {n: f"{v:.6g}" if isinstance(v, float) else str(v) for n, v in row.items()}
        rows[key] = row | dict(zip(KEY, key, strict=True))
    return rows


def commit_of(flags):
    """The commit that args.json names, shortened."""
    commit = flags["commit"] or "outside git"
    return commit[:12] + "-dirty" * commit.endswith("-dirty")


def read_results(path):
    """{key: row} of results.csv; {} if there is none."""
    if not path.exists():
        return {}
    with open(path, newline="") as file:
        return {tuple(row[name] for name in KEY): row for row in csv.DictReader(file)}


def write_results(path, rows):
    """Writes results.csv in the order of run.py, without rows of runs that run.py does not have."""
    keys = [(run.method, run.name, d) for run in RUNS + PAPER for d in directions(run)]
    keys += [key for key in rows if key[0] == "-"]
    with open(f"{path}.tmp", "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows[key] for key in keys if key in rows)
    os.replace(f"{path}.tmp", path)


def as_code(flags):
    """{flag: value} as a reader would type it, in backquotes; "" for none."""
    words = [word for pair in flags.items() for word in pair if word]
    return f"`{shlex.join(words)}`" if words else ""


def markdown(heads, cells, rows, metrics):
    """Lines of a table. cells, rows: of each key, its first cells and its row of results.csv."""
    found = {key: rows.get(key, {}) for key in cells}
    metrics = {m: v for m, v in metrics.items() if any(row.get(m) for row in found.values())}
    lines = [[*heads, *(title for title, _ in metrics.values())]]
    lines.append(["---"] * len(lines[0]))
    forms = {name: form for name, (_, form) in metrics.items()}
    for key, row in found.items():
        numbers = [f"{float(row[m]):{form}}" if row.get(m) else "-" for m, form in forms.items()]
        lines.append([*cells[key], *numbers])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def table(question, rows):
    """The text between the markers of a question: a line for each run and direction."""
    if question == "labels":
        cells = {key: [" ".join(key[:2]).removeprefix("- ")] for key in rows}
        cells = {key: cell for key, cell in cells.items() if rows[key].get("label_pixel")}
        return markdown(["images"], cells, rows, LABELS)
    runs = [run for run in RUNS if question in run.questions.split()] or PAPER
    flags = [flag_values(run.flags) for run in runs]
    shared = {f: v for f, v in flags[0].items() if all(own.get(f) == v for own in flags)}
    cells = {}
    for run, own in zip(runs, flags, strict=True):
        own = as_code({f: v for f, v in own.items() if f not in shared})
        for direction in directions(run):
            key = (run.method, run.name, direction)
            name = f"{run.method} {run.name}" + f", {direction}" * (run.method == "cycleGAN")
            cells[key] = [name + ": **missing**" * (key not in rows), own]
    commits = {
        f"{rows[key]['commit']} (torch {rows[key]['torch']})" for key in cells if key in rows
    }
    command = f"`python experiments/run.py {'--scale paper' if runs is PAPER else question}`"
    text = (
        f"{command}, then `python experiments/judge.py`. All with {as_code(shared)}. Commit of the"
    )
    text += f" runs: {', '.join(sorted(commits)) or 'none yet'}.\n\n"
    metrics = LOGGED | MEASURED | LABELS | (STEADINESS if question == "steadiness" else {})
    return text + markdown(["run", "its own flags"], cells, rows, metrics)


def fill(text, rows):
    """README.md's text with its tables written again."""
    questions = {name for run in RUNS for name in run.questions.split()} | {"paper", "labels"}

    def filled(match):
        known = match[2] in questions
        return f"{match[1]}\n{table(match[2], rows)}\n<!-- end -->" if known else match[0]

    return re.sub(r"(<!-- table (\S+) -->).*?<!-- end -->", filled, text, flags=re.DOTALL)


def main(argv=None):
    """Runs the command line. Returns the exit status."""
    args = parse_args(argv)
    results, readme = HERE / "results.csv", HERE / "README.md"
    rows, status = read_results(results), 0
    complete = [run for run in args.runs if not epochs_left(args, run)]
    for run in complete:
        for direction in directions(run):
            key = (run.method, run.name, direction)
            try:
                flags = json.loads((paths(args, run)[0] / "args.json").read_text())
                if rows.get(key, {}).get("commit") == commit_of(flags) and not args.again:
                    continue
                rows |= judge(run, direction, flags, args)
                message = "measured"
            except (UserError, OSError, ValueError, KeyError) as error:
                message, status = f"error: {error!r}", 1
            write_results(results, rows)
            print(*key, message, flush=True)
    write_results(results, rows)
    Path(f"{readme}.tmp").write_text(fill(readme.read_text(), read_results(results)))
    os.replace(f"{readme}.tmp", readme)
    print(f"{len(complete)} of {len(args.runs)} runs are complete; see {results} and {readme}")
    return status


if __name__ == "__main__":
    sys.exit(main())

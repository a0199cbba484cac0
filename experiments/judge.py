"""Measures the complete runs of run.py and fills the tables of experiments/README.md.

    python experiments/judge.py                               # runs that were not measured yet
    python experiments/judge.py --root ../other --anew        # all runs of another checkout

results.csv gets a row for each run and direction. A run that is still training is passed over, and
the tables say that it is missing. README.md's text between the tables is left alone.

Measured on the test pictures at the size trained at: l1, change and luminance as in losses.csv
after the last epoch, where train.py measures them; the rest, and those where it does not, by
evaluate.py on what translate.py makes of the pictures, in fp32.
"""

import argparse
import contextlib
import csv
import itertools
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image
from run import (
    EXPERIMENTS,
    QUESTIONS,
    Parser,
    chosen,
    epochs_done,
    epochs_wanted,
    full_name,
    run_folder,
)

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")

# Columns of results.csv: the title in the tables, and the format.
METRICS = {
    "l1": ("L1 to the truth", ".3f"),
    "change": ("change", ".3f"),
    "luminance": ("luminance", ".2f"),
    "swd": ("SWD", ".1f"),
    "stripes_2": ("stripes, 2 px (dB)", ".2f"),
    "stripes_4": ("stripes, 4 px (dB)", ".2f"),
    "shift_psnr": ("shift-PSNR (dB)", ".1f"),
}
LOGGED = ("l1", "change", "luminance")  # train.py measures these at each sampling epoch
STEADINESS = {
    f"{name}_{kind}": (f"{METRICS[name][0]}, {title}", ".3f")
    for name in LOGGED
    for kind, title in (("deviation", "deviation over epochs"), ("step", "mean step"))
}
KEY = ("method", "name", "seed", "direction")
COLUMNS = (*KEY, "epochs", "commit", "torch", *METRICS, *STEADINESS, "note")
TITLES = {**METRICS, **STEADINESS}


class RunError(Exception):
    """Ends a run. The message is one line: what was found, what was wanted, what to do."""


def parse_args(argv=None):
    style = argparse.RawDescriptionHelpFormatter
    parser = Parser("judge.py", description=__doc__, formatter_class=style, allow_abbrev=False)
    flag = parser.add_argument
    flag("--root", type=Path, default=ROOT, help="the checkout whose runs are measured [this one]")
    flag("--data-root", type=Path, help="where data sets are [datasets/ in --root]")
    flag("--anew", action="store_true", help="measure again what was measured [off]")
    flag("--only", nargs="+", metavar="NAME", help="names, or beginnings [all]")
    flag("--questions", nargs="+", type=int, choices=QUESTIONS, help="[all]")
    flag("--seeds", nargs="+", type=int, help="of these seeds only [all]")
    args = parser.parse_args(argv)
    args.root = args.root.expanduser().resolve()
    if not args.root.is_dir():
        parser.error(f"--root {args.root} is no folder")
    if not chosen(args):
        parser.error("--only, --questions and --seeds leave no run; run.py --dry-run lists all")
    args.data_root = (args.data_root or args.root / "datasets").expanduser().resolve()
    return args


# ------------------------------------------------------------------------------------- one run


def directions(method):
    """The directions that a method learns."""
    return ("x2y", "y2x") if method == "cycleGAN" else ("x2y",)


def flag_values(text):
    """{"--epochs": "10", "--antialias": "", ...} of a command line's flags; the last counts."""
    flags = {}
    for word in shlex.split(text):
        if word.startswith("--"):
            name = word
            flags[name] = ""
        else:
            flags[name] = word
    return flags


def check_flags(experiment, flags):
    """RunError where a run's args.json, `flags`, is not of this experiment."""
    for flag, text in flag_values(experiment.flags).items():
        off = flag.startswith("--no-")
        found = flags[flag.removeprefix("--no-" if off else "--").replace("-", "_")]
        wanted = type(found)(text) if text else not off
        if found != wanted:
            raise RunError(f"it was trained with {found} for {flag}; run.py has {wanted}")


def logged(folder, direction):
    """l1, change, luminance after the last epoch, and how steady they were before, by column.

    Their deviation is the standard deviation over the sampling epochs, their step the mean change
    from one sampling epoch to the next, without sign.
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
                found[f"{name}_deviation"] = statistics.stdev(values)
                steps = [abs(b - a) for a, b in itertools.pairwise(values)]
                found[f"{name}_step"] = statistics.mean(steps)
    return found


def list_images(folder):
    """The pictures directly inside `folder` (a Path), sorted by name; [] without folder."""
    if not folder.is_dir():
        return []
    return sorted(f for f in folder.iterdir() if f.suffix.lower() in SUFFIXES and f.name[0] != ".")


def read_pictures(*folders):
    """{stem: RGB picture} of the first of folders that holds any."""
    files = next(filter(None, map(list_images, folders)), [])
    return {file.stem: Image.open(file).convert("RGB") for file in files}


def test_pictures(method, flags, data_root):
    """The test set as train.py takes it: x and y, each {stem: RGB picture} at --image-size."""
    root, size = data_root / flags["data_folder"], flags["image_size"]
    if method == "pix2pix":
        pairs = read_pictures(root / "test", root / "val").items()
        x = {stem: pair.crop((pair.width // 2, 0, *pair.size)) for stem, pair in pairs}
        y = {stem: pair.crop((0, 0, pair.width // 2, pair.height)) for stem, pair in pairs}
    else:
        x = read_pictures(root / "test" / "x", root / "testA")
        y = read_pictures(root / "test" / "y", root / "testB")
    if not x or not y:
        raise RunError(f"{root} has no test pictures; --data-root says where data sets are")
    sides = [
        {stem: image.resize((size, size), Image.Resampling.BICUBIC) for stem, image in side.items()}
        for side in (x, y)
    ]
    return sides[::-1] if flags["swap_xy"] else sides


def run_script(script, *words):
    """Runs a script of this repository. RunError, with its last line, where it fails."""
    command = [sys.executable, script, *words]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise RunError(f"{script.relative_to(ROOT)} failed: {reason}")


def evaluated(experiment, seed, direction, flags, args):
    """What translate.py and evaluate.py of this checkout say of a run, by column."""
    method, paths = experiment.method, [ROOT / "evaluate.py", checkpoint(experiment, seed, args)]
    for path in (ROOT / method / "translate.py", *paths):
        if not path.exists():
            raise RunError(f"there is no {'/'.join(path.parts[-2:])}")
    sides = test_pictures(method, flags, args.data_root)
    source, truth = sides if direction == "x2y" else sides[::-1]
    with tempfile.TemporaryDirectory() as folder:
        given, made, true = (Path(folder) / name for name in ("given", "made", "true"))
        for place, pictures in ((given, source), (true, truth)):
            place.mkdir()
            for stem, picture in pictures.items():
                picture.save(place / f"{stem}.png")
        words = ["--checkpoint", paths[1], "--input", given]
        words += ["--direction", direction] if method == "cycleGAN" else []
        run_script(ROOT / method / "translate.py", *words, "--output", made)
        words += ["--paired"] if source.keys() == truth.keys() else []
        run_script(paths[0], made, true, *words, "--json", Path(folder) / "report.json")
        report = json.loads((Path(folder) / "report.json").read_text())
    stripes, change = report["stripes"], report["change"]
    found = {"change": change["l1"], "luminance": change["luminance"]}
    found.update(l1=report.get("paired", {}).get("l1"), swd=report["unpaired"]["swd"])
    for period in (2, 4):
        both = [stripes[f"{way}_{period}"] for way in ("vertical", "horizontal")]
        found[f"stripes_{period}"] = statistics.mean(both)
    return {**found, "shift_psnr": stripes["shift_psnr"]}


def judge(experiment, seed, direction, args):
    """The row of results.csv for one direction of a complete run."""
    folder = run_folder(args.root, experiment, seed)
    flags = json.loads((folder / "args.json").read_text())
    check_flags(experiment, flags)
    row = dict.fromkeys(COLUMNS, "")
    row.update(zip(KEY, key_of(experiment, seed, direction), strict=True))
    row.update(epochs=flags["epochs"], commit=commit_of(flags), torch=flags["torch"])
    values = logged(folder, direction)
    try:
        values = {**evaluated(experiment, seed, direction, flags, args), **values}
    except RunError as error:
        row["note"] = str(error)
    row.update({name: f"{value:.6g}" for name, value in values.items() if value is not None})
    return row


# ------------------------------------------------------------------------------------ all runs


def checkpoint(experiment, seed, args):
    """Where a run keeps its generator."""
    name = full_name(experiment, seed)
    return args.root / experiment.method / "model" / name / "checkpoint.pt"


def is_complete(experiment, seed, args):
    """Whether a run can be measured."""
    if epochs_done(args.root, experiment, seed) < epochs_wanted(experiment):
        return False
    last, losses = checkpoint(experiment, seed, args), run_folder(args.root, experiment, seed)
    if last.exists() and last.stat().st_mtime < (losses / "losses.csv").stat().st_mtime:
        print(f"{last} is older than losses.csv: in the writing, or copied without its time")
        return False
    return True


def is_measured(row, experiment, seed, args):
    """Whether a row of results.csv says all, and of this run, not of one trained before it."""
    flags = json.loads((run_folder(args.root, experiment, seed) / "args.json").read_text())
    return bool(row) and not row["note"] and row["commit"] == commit_of(flags) and not args.anew


def commit_of(flags):
    """The commit that args.json names, shortened."""
    commit = flags["commit"] or "outside git"
    return commit[:12] + "-dirty" * commit.endswith("-dirty")


def key_of(experiment, seed, direction):
    """What tells a row of results.csv from the others."""
    return experiment.method, experiment.name, str(seed), direction


def read_results(path):
    """{key: row} of results.csv; {} where there is none."""
    if not path.exists():
        return {}
    with open(path, newline="") as file:
        return {tuple(row[name] for name in KEY): row for row in csv.DictReader(file)}


def write_results(path, rows):
    """Writes results.csv anew, in the order of run.py; rows of runs it has no more come last."""
    keys = [key_of(e, s, d) for e in EXPERIMENTS for s in e.seeds for d in directions(e.method)]
    with replacing(path) as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(
            rows[key] for key in [*keys, *sorted(rows.keys() - set(keys))] if key in rows
        )


@contextlib.contextmanager
def replacing(path):
    """A text file that takes path's place once it is whole."""
    aside = path.with_name(path.name + ".tmp")
    with open(aside, "w", newline="") as file:
        yield file
    os.replace(aside, path)


# -------------------------------------------------------------------------------------- tables


def cells(line):
    return f"| {' | '.join(line)} |"


def heading(titles):
    return [cells(titles), "|---" * len(titles) + "|"]


def mean_and_range(values, form):
    """As in "0.412 (0.400 to 0.424)"; one value alone; a dash for none."""
    if len(values) < 2:
        return f"{values[0]:{form}}" if values else "-"
    mean = statistics.mean(values)
    return f"{mean:{form}} ({min(values):{form}} to {max(values):{form}})"


def as_code(flags):
    """Flags as a reader would type them, in backquotes; "" for none."""
    words = [word for pair in flags.items() for word in pair if word]
    return f"`{shlex.join(words)}`" if words else ""


def shared_flags(experiments):
    """What all experiments have in common: {flag: value}."""
    each = [flag_values(e.flags) for e in experiments]
    return {f: v for f, v in each[0].items() if all((f, v) in flags.items() for flags in each)}


def settings_table(experiments, rows, metrics):
    """Lines: for each setting and direction the mean, and the range over the seeds."""
    shared, body, there = shared_flags(experiments), [], set()
    settings = [(e, direction) for e in experiments for direction in directions(e.method)]
    for e, direction in settings:
        found = [rows.get(key_of(e, seed, direction)) for seed in e.seeds]
        missing = [str(s) for s, row in zip(e.seeds, found, strict=True) if not row]
        seeds = [str(s) for s, row in zip(e.seeds, found, strict=True) if row]
        if missing:
            seeds.append(f"**missing: {', '.join(missing)}**")
        own = {f: v for f, v in flag_values(e.flags).items() if (f, v) not in shared.items()}
        name = f"{e.method} {e.name}" + f", {direction}" * (e.method == "cycleGAN")
        values = {m: [float(row[m]) for row in found if row and row[m]] for m in metrics}
        there |= {metric for metric in metrics if values[metric]}
        body.append((name, as_code(own), ", ".join(seeds), values))
    metrics = {metric: title for metric, title in metrics.items() if metric in there}
    lines = [f"All with {as_code(shared)}.", ""]
    lines += heading(["run", "its own flags", "seeds", *(title for title, _ in metrics.values())])
    for *words, values in body:
        numbers = [mean_and_range(values[m], form) for m, (_, form) in metrics.items()]
        lines.append(cells([*words, *numbers]))
    return lines


def precision_table(experiments, rows, metrics):
    """Lines: for each method, direction and seed fp32 beside bf16, then mean and range of all."""
    forms = {}  # of each column
    for title, form in metrics.values():
        forms.update({f"{title}, fp32": form, f"{title}, bf16": form})
        forms[f"{title}, bf16 - fp32"] = f"+{form}"
    lines = [f"All with {as_code(shared_flags(experiments))}.", ""]
    lines += heading(["run", "seed", *forms])
    for full in [e for e in experiments if e.name.endswith("fp32")]:
        pair = {"fp32": full, "bf16": full._replace(name=full.name.replace("fp32", "bf16"))}
        for direction in directions(full.method):
            name, found = f"{full.method}, {direction}", []  # a dict of numbers for each seed
            for seed in full.seeds:
                both = {k: rows.get(key_of(e, seed, direction)) for k, e in pair.items()}
                found.append(compare(both, metrics))
                missing = ", ".join(kind for kind, row in both.items() if not row)
                seed = f"{seed}; **missing: {missing}**" if missing else str(seed)
                shown = (mean_and_range(found[-1][column], form) for column, form in forms.items())
                lines.append(cells([name, seed, *shown]))
            whole = {c: [number for numbers in found for number in numbers[c]] for c in forms}
            shown = (mean_and_range(whole[column], form) for column, form in forms.items())
            lines.append(cells([name, "all", *shown]))
    return lines


def compare(both, metrics):
    """{column: [number], or [] where it is missing} of {"fp32": row, "bf16": row}."""
    numbers = {}
    for metric, (title, _) in metrics.items():
        a, b = ([float(row[metric])] if row and row[metric] else [] for row in both.values())
        numbers.update({f"{title}, fp32": a, f"{title}, bf16": b})
        numbers[f"{title}, bf16 - fp32"] = [b[0] - a[0]] if a and b else []
    return numbers


def table(question, rows):
    """The text between the markers of a question."""
    experiments = [e for e in EXPERIMENTS if question in e.questions]
    keys = [key_of(e, s, d) for e in experiments for s in e.seeds for d in directions(e.method)]
    found = [rows[key] for key in keys if key in rows]
    commits = sorted({f"{row['commit']} with torch {row['torch']}" for row in found})
    made = ", ".join(commits) or "nothing is trained yet"
    lines = [f"`python experiments/run.py --questions {question}`, with `--dry-run` for the single"]
    lines[0] += f" commands, then `python experiments/judge.py`. Commit of the runs: {made}."
    lines.append("")
    if question == 13:
        lines += precision_table(experiments, rows, {m: METRICS[m] for m in ("l1", "swd")})
    else:
        lines += settings_table(experiments, rows, METRICS | (STEADINESS if question == 6 else {}))
    for note in sorted({row["note"] for row in found if row["note"]}):
        those = [f"{r['method']} {r['name']} {r['seed']}" for r in found if r["note"] == note]
        lines += ["", f"Not measured for {', '.join(dict.fromkeys(those))}: {note}."]
    return "\n".join(lines)


def fill(text, rows):
    """README.md's text with the tables anew; a question that it lacks gets a section at the end."""
    for question, title in QUESTIONS.items():
        start, end = f"<!-- table {question} -->", "<!-- end -->"
        if start not in text:
            text = f"{text.rstrip()}\n\n## {question}. {title}\n\n{start}\n{end}\n"
        before, after = text.split(start, 1)
        if end not in after:
            raise RunError(f"README.md: {start} has no {end} after it")
        text = f"{before}{start}\n{table(question, rows)}\n{end}{after.split(end, 1)[1]}"
    return text


def main(argv=None):
    """Runs the command line. Returns the exit status."""
    args = parse_args(argv)
    results, readme = HERE / "results.csv", HERE / "README.md"
    rows, failed, wanted = read_results(results), 0, chosen(args)
    complete = [pair for pair in wanted if is_complete(*pair, args)]
    for experiment, seed in complete:
        for direction in directions(experiment.method):
            key = key_of(experiment, seed, direction)
            try:
                if is_measured(rows.get(key), experiment, seed, args):
                    continue
                rows[key] = judge(experiment, seed, direction, args)
                write_results(results, rows)
                said = rows[key]["note"] or "measured"
            except (RunError, OSError, ValueError, KeyError, TypeError) as error:
                said, failed = f"error: {error!r}", 1
            print(*key, said, flush=True)
    try:
        text = fill(readme.read_text() if readme.exists() else "# Experiments\n", rows)
        with replacing(readme) as file:
            file.write(text)
    except (RunError, OSError) as error:
        print(f"judge.py: error: {error}", file=sys.stderr)
        return 2
    print(f"{len(complete)} of {len(wanted)} runs are complete; see {results} and {readme}")
    return failed


if __name__ == "__main__":
    sys.exit(main())

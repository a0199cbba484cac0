"""Writes visualize/index.html: every run's grids, losses and flags on one page, two side by side.

    python visualize/gallery.py
    python visualize/gallery.py --runs 'CUT/*' cycleGAN/first --output cut.html

The page holds all it shows, pictures included, and needs no server; open it in a browser. The same
runs give the same page, byte for byte. Needs nothing but Python.
"""

import argparse
import ast
import base64
import csv
import fnmatch
import json
import math
import os
import struct
import sys
import zlib
from pathlib import Path

HERE = Path(__file__).resolve().parent
LARGE = 100  # MB; a page above it is slow to open
# In the page's order.
KINDS = {"x": "real x", "y_G": "generated y", "y": "real y", "x_G": "generated x"}
NOT_LOSSES = ("epoch", "seconds", "images_per_second", "learning_rate")
NOT_FLAGS = ("given", "torch", "device_used", "commit")
COUNTS = ["no", "one", "two", "three", "four", "five", "six", "seven", "eight"]


class RunError(Exception):
    """Ends a run. The message is one line: what was found, what was wanted, what to do."""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def parse_args(argv=None):
    style = argparse.RawDescriptionHelpFormatter
    parser = Parser("gallery.py", description=__doc__, formatter_class=style, allow_abbrev=False)
    flag = parser.add_argument
    flag("--runs", nargs="+", metavar="GLOB", default=["*/*"], help="as in 'CUT/first*' [all]")
    flag("--root", type=Path, default=HERE, help="the folder with <method>/<run-name>/ [this one]")
    flag("--output", type=Path, metavar="FILE", help="[index.html in --root]")
    args = parser.parse_args(argv)
    args.output = args.output or args.root / "index.html"
    return args


# ----------------------------------------------------------------------------- reading one run


def find_runs(root, globs):
    """The folders <root>/<method>/<run-name> that hold anything of a run and that a glob names."""
    parts = ("val", "losses.csv", "args.json")
    runs = [r for r in sorted(root.glob("*/*")) if any((r / part).exists() for part in parts)]
    names = [f"{run.parent.name}/{run.name}" for run in runs]
    if not runs:
        raise RunError(f"{root} holds no run; python pix2pix/train.py makes one")
    for glob in globs:
        if not fnmatch.filter(names, glob):
            shown = ", ".join(names[:8]) + ", ..." * (len(names) > 8)
            raise RunError(f"--runs {glob} names none of {len(names)} runs: {shown}")
    chosen = {name for glob in globs for name in fnmatch.filter(names, glob)}
    return [run for run, name in zip(runs, names, strict=True) if name in chosen]


def png_size(data):
    """(width, height) of a PNG. ValueError where it is none, cut off, or a checksum is wrong."""
    if data[:8] != b"\x89PNG\r\n\x1a\n":
        raise ValueError("is no PNG")
    start, kind = 8, b""
    while kind != b"IEND":
        length, kind = struct.unpack(">I4s", data[start : start + 8].ljust(8))
        end = start + 12 + length  # after length, kind, data, checksum
        if end > len(data):
            raise ValueError("is cut off")
        if struct.pack(">I", zlib.crc32(data[start + 4 : end - 4])) != data[end - 4 : end]:
            raise ValueError("is damaged")
        start = end
    if data[12:16] != b"IHDR":
        raise ValueError("is damaged")
    return struct.unpack(">II", data[16:24])


def read_grids(folder, pictures, notes):
    """(epochs, grids): for each epoch a list of grids, as the page wants them.

    pictures: {base64: its number}, to which new ones are added; x and y are the same at each epoch
    and so are kept once.
    """
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
    return epochs, [[read_grid(found, e, k, pictures, notes) for k in kinds] for e in epochs]


def read_grid(found, epoch, kind, pictures, notes):
    """One grid for the page; its picture is None where the file is missing or broken."""
    grid = {"what": KINDS[kind], "file": f"{kind}{epoch}.png", "picture": None}
    try:
        data = found[epoch, kind].read_bytes()
        width, height = png_size(data)
    except (KeyError, OSError, ValueError) as error:
        wrong = "is missing" if isinstance(error, KeyError) else "cannot be read"
        wrong = str(error) if isinstance(error, ValueError) else wrong
        notes.append(f"{grid['file']} {wrong}")
        return {**grid, "file": f"{grid['file']} {wrong}"}
    count, rest = divmod(width - 2, height - 2) if height > 2 else (0, 1)  # 2 px between pictures
    how_many = f"{COUNTS[count]} " if not rest and 0 < count <= 8 else ""
    plural = "" if how_many == "one " else "s"
    grid["alt"] = f"epoch {epoch}: {KINDS[kind]}, {how_many}test picture{plural}"
    # Small pixels are shown as squares; in a narrow column two halves stand below each other.
    grid["looks"] = "small " * (height <= 68) + "halves " * bool(how_many and count % 2 == 0)
    grid["half"] = f"{width / 2:g} / {height}"
    number = pictures.setdefault(base64.b64encode(data).decode(), len(pictures))
    return {**grid, "picture": number}


def read_losses(folder, notes):
    """{term: [[epoch, value], ...]} of losses.csv; None where it is not finite, without blanks."""
    try:
        with open(folder / "losses.csv", newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        epochs = [int(row["epoch"]) for row in rows]
    except FileNotFoundError:
        notes.append("losses.csv is missing")
        return {}
    except (OSError, KeyError, TypeError, ValueError, csv.Error):
        notes.append("losses.csv cannot be read, or a row has no epoch")
        return {}
    if not rows:
        notes.append("losses.csv has no row")
    terms = {}
    for name in (n for n in (rows[0] if rows else ()) if n and n not in NOT_LOSSES):
        points = [[e, finite(r[name])] for e, r in zip(epochs, rows, strict=True) if r[name]]
        odd = [str(epoch) for epoch, value in points if value is None]
        if odd:
            some = ", ".join(odd[:5]) + ", ..." * (len(odd) > 5)
            notes.append(f"losses.csv: {name} is not finite at epoch {some}")
        terms[name] = points
    return terms


def finite(text):
    """A float, or None for nan, inf and what is no number."""
    try:
        return float(text) if math.isfinite(float(text)) else None
    except ValueError:
        return None


def read_flags(folder, notes):
    """(flags, facts) of args.json: [[flag, value, whether it differs from the default], ...]."""
    try:
        args = json.loads((folder / "args.json").read_text(encoding="utf-8"))
        given = set(args.get("given") or ())
    except FileNotFoundError:
        notes.append("args.json is missing")
        return [], ""
    except (OSError, ValueError, AttributeError, TypeError):
        notes.append("args.json cannot be read")
        return [], ""
    usual = defaults(folder.parent.name)
    flags = []
    for name, value in args.items():
        if name not in NOT_FLAGS:
            differs = value != usual[name] if name in usual else name in given
            flags.append(["--" + name.replace("_", "-"), in_words(value), differs])
    facts = [f"torch {args['torch']}"] if args.get("torch") else []
    facts += [f"on {args['device_used']}"] if args.get("device_used") else []
    facts += [f"commit {args['commit']}"] if args.get("commit") else []
    return sorted(flags, key=lambda flag: not flag[2]), ", ".join(facts)


def in_words(value):
    """A flag's value as text."""
    words = {True: "on", False: "off", None: "none"}
    return words[value] if value is None or isinstance(value, bool) else str(value)


def defaults(method):
    """{flag: default} by the method's train.py beside this folder; {} where there is none.

    Its parse_args stands above the imports of torch, so that part alone is run. args.json cannot
    say it: what a resumed run was "given" is what was typed last.
    """
    try:
        path = HERE.parent / method / "train.py"
        tree = ast.parse(path.read_text(encoding="utf-8"))
        ends = [i for i, node in enumerate(tree.body) if isinstance(node, ast.If)]
        tree.body = tree.body[: ends[0]]
        train = {"__name__": "train", "__file__": str(path)}
        exec(compile(tree, path, "exec"), train)
        return vars(train["parse_args"]([]))
    except (OSError, SyntaxError, LookupError):
        return {}


def read_run(folder, pictures):
    """All that the page shows of one run. What is missing or broken is named in "notes"."""
    notes = []
    run = {
        "method": folder.parent.name,
        "name": f"{folder.parent.name}/{folder.name}",
        "notes": notes,
    }
    run["epochs"], run["grids"] = read_grids(folder, pictures, notes)
    run["losses"] = read_losses(folder, notes)
    run["flags"], run["facts"] = read_flags(folder, notes)
    return run


# ------------------------------------------------------------------------------------- the page


def build_page(folders):
    """The whole page as text."""
    pictures = {}
    runs = [read_run(folder, pictures) for folder in folders]
    data = json.dumps({"runs": runs, "pictures": list(pictures)}, allow_nan=False)
    # Inside <script> nothing but "</script" or "<!--" ends the text; without "<" there is neither.
    return PAGE.replace("DATA", data.replace("<", "\\u003c"), 1)


PAGE = r"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:;
  style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<link rel="icon" href="data:,">
<title>Runs</title>
<style>
:root { color-scheme: light dark; --paper: #fff; --ink: #1b1d21; --soft: #5a606b; --line: #c9ced6;
  --blue: #0b57b7; --field: #f3f5f8; --odd: #9a3b00; --mark: #fff0b8; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #14161a; --ink: #e8eaee; --soft: #a6adb8; --line: #434a56; --blue: #82b7ff;
    --field: #1f2329; --odd: #ffb37a; --mark: #4d4210; }
}
* { box-sizing: border-box; }
html { scroll-padding-top: 8rem; }
body { margin: 0 auto; max-width: 140rem; padding: 0 clamp(.75rem, 2vw, 2rem) 3rem;
  background: var(--paper); color: var(--ink); font: 1rem/1.45 system-ui, sans-serif; }
header { display: flex; flex-wrap: wrap; align-items: baseline; gap: .25rem 2rem; }
h1 { font-size: 1.5rem; margin: .75rem 0 .25rem; }
h2 { font-size: 1.05rem; margin: 1.75rem 0 .5rem; }
main { display: grid; gap: 0 2.5rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); }
section { min-width: 0; container-type: inline-size; }
.controls { position: sticky; top: 0; z-index: 1; padding: .5rem 0; background: var(--paper);
  border-bottom: 1px solid var(--line); }
.controls label { display: flex; align-items: center; gap: .75rem; min-height: 2.25rem; }
.controls span { flex: 0 0 6rem; }
select { flex: 1; min-width: 0; padding: .4rem; font: inherit; color: inherit;
  background: var(--field); border: 1px solid var(--soft); border-radius: 4px; }
input[type=range] { flex: 1; min-width: 0; height: 1.75rem; accent-color: var(--blue); }
input[type=checkbox] { width: 1.1rem; height: 1.1rem; accent-color: var(--blue); }
:focus-visible { outline: 3px solid var(--blue); outline-offset: 2px; }
output, .value { font-variant-numeric: tabular-nums; }
.facts, .range, .file { color: var(--soft); overflow-wrap: anywhere; }
.facts { margin: .5rem 0; font-size: .9rem; }
.notes { color: var(--odd); margin: .5rem 0; padding-left: 1.25rem; }
figure { margin: 0 0 .75rem; }
figcaption { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 0 1rem; }
img { display: block; width: 100%; height: auto; background: var(--field); }
img.small { image-rendering: pixelated; }
img[hidden], img.second { display: none; }
@container (max-width: 32rem) {  /* a row of eight becomes two rows of four */
  img.halves { aspect-ratio: var(--half); object-fit: cover; object-position: left; }
  img.second.halves:not([hidden]) { display: block; object-position: right; }
}
.curves { display: grid; gap: .75rem 1.25rem;
  grid-template-columns: repeat(auto-fill, minmax(10.5rem, 1fr)); }
.curves figure { margin: 0; font-size: .85rem; min-width: 0; }
svg { display: block; width: 100%; height: 4.5rem; background: var(--field); }
path { fill: none; stroke: var(--blue); stroke-width: 2; stroke-linejoin: round;
  stroke-linecap: round; vector-effect: non-scaling-stroke; }
line { stroke: var(--soft); stroke-dasharray: 3 3; vector-effect: non-scaling-stroke; }
table { width: 100%; border-collapse: collapse; font-size: .9rem; }
caption { text-align: left; font-weight: 600; padding: .25rem 0; }
th, td { text-align: left; font-weight: 400; padding: .2rem .5rem .2rem 0; vertical-align: top;
  border-bottom: 1px solid var(--line); overflow-wrap: anywhere; }
th { width: 45%; }
mark { color: inherit; background: var(--mark); padding: 0 .2rem; }
mark::after { content: " ≠" / ", not as in the other run"; }
summary { cursor: pointer; padding: .5rem 0; }
</style>
<header>
  <h1>Runs</h1>
  <label><input type="checkbox" id="together" checked> move both sliders to the same epoch</label>
</header>
<noscript><p>This page needs JavaScript, all of which is in this file.</p></noscript>
<main></main>
<template id="column"><section>
  <div class="controls">
    <label><span class="run-label"></span><select></select></label>
    <label><span class="epoch-label"></span><input type="range" min="0" step="1"></label>
    <output aria-live="polite"></output>
  </div>
  <p class="facts"></p>
  <ul class="notes" aria-label="missing or broken"></ul>
  <h2>Test pictures</h2><div class="grids"></div>
  <h2>Losses<span class="epochs"></span></h2><div class="curves"></div>
  <h2>Flags</h2><div class="flags"></div>
</section></template>
<template id="curve"><svg viewBox="0 0 100 100" preserveAspectRatio="none" role="img">
  <line y1="0" y2="100"></line><path></path></svg></template>
<script type="application/json" id="data">DATA</script>
<script>
"use strict";
const {runs, pictures} = JSON.parse(document.getElementById("data").textContent);
const together = document.getElementById("together");

function add(parent, tag, text = "", properties = {}) {
  const child = parent.appendChild(document.createElement(tag));
  child.textContent = text;
  return Object.assign(child, properties);
}
const copy = id => document.getElementById(id).content.firstElementChild.cloneNode(true);
const short = value => value === null ? "not finite" : String(+value.toPrecision(4));
const finite = points => points.map(point => point[1]).filter(value => value !== null);

class Column {
  constructor(side, number) {
    this.root = document.querySelector("main").appendChild(copy("column"));
    const part = selector => this.root.querySelector(selector);
    this.root.setAttribute("aria-label", `${side} run`);
    part(".run-label").textContent = `${side} run`;
    part(".epoch-label").textContent = `${side} epoch`;
    this.select = part("select");
    this.slider = part("input");
    this.output = part("output");
    runs.forEach((run, index) => add(this.select, "option", run.name, {value: index}));
    this.select.value = Math.min(number, runs.length - 1);
    this.select.addEventListener("change", () => { this.open(); compare(); });
    this.slider.addEventListener("input", () => {
      this.show();
      if (together.checked) this.other.go(this.epoch);
    });
  }
  get run() { return runs[this.select.value]; }
  get epoch() { return this.run.epochs[this.slider.value]; }

  open() {  // another run: its last epoch
    const {epochs, facts, notes, grids} = this.run;
    this.slider.max = Math.max(0, epochs.length - 1);
    this.slider.value = this.slider.max;
    this.slider.disabled = epochs.length < 2;
    this.root.querySelector(".facts").textContent = facts;
    const list = this.root.querySelector(".notes");
    list.replaceChildren();
    list.hidden = !notes.length;
    for (const note of notes) add(list, "li", note);
    const box = this.root.querySelector(".grids");
    box.replaceChildren();
    if (!epochs.length) add(box, "p", "none");
    this.figures = (grids[0] || []).map(grid => {
      const figure = add(box, "figure"), caption = add(figure, "figcaption");
      add(caption, "b", grid.what);
      const file = add(caption, "span", "", {className: "file"});
      return {file, images: [add(figure, "img"), add(figure, "img", "", {alt: ""})]};
    });
  }
  show() {  // another epoch: all grids of the run, and the marks on its curves
    const {epochs, grids, losses} = this.run, at = +this.slider.value;
    const where = epochs.length ? `epoch ${this.epoch}, ${at + 1} of ${epochs.length} sampled`
      : "no epoch with pictures";
    this.slider.setAttribute("aria-valuetext", where);
    this.output.textContent = where;
    this.figures.forEach(({file, images}, index) => {
      const grid = grids[at][index];
      file.textContent = grid.file;
      images[0].alt = grid.alt;
      images.forEach((image, second) => {
        image.hidden = grid.picture === null;
        if (image.hidden) return;
        image.src = "data:image/png;base64," + pictures[grid.picture];
        image.className = grid.looks + (second ? "second" : "");
        image.style.setProperty("--half", grid.half);
      });
    });
    for (const {name, value, line, x} of this.curves) {
      const point = losses[name].find(([epoch]) => epoch === this.epoch);
      value.textContent = point ? short(point[1]) : "";
      line.style.display = epochs.length ? "" : "none";
      line.setAttribute("x1", x(this.epoch || 0));
      line.setAttribute("x2", x(this.epoch || 0));
    }
  }
  go(epoch) {  // to the sampled epoch that is nearest
    const away = this.run.epochs.map(each => Math.abs(each - epoch));
    this.slider.value = Math.max(0, away.indexOf(Math.min(...away)));
    this.show();
  }
  drawCurves() {  // with one scale for a term in two runs of one method
    const box = this.root.querySelector(".curves");
    box.replaceChildren();
    const {losses, epochs, method} = this.run;
    const theirs = this.other.run.method === method ? this.other.run.losses : {};
    const some = Object.keys(losses).length;
    if (!some) add(box, "p", "none");
    const ends = [...epochs, ...Object.values(losses).flat().map(point => point[0])];
    const first = Math.min(...ends), last = Math.max(...ends);
    const heading = this.root.querySelector(".epochs");
    heading.textContent = some ? `, epochs ${first} to ${last}` : "";
    const x = epoch => first === last ? 50 : 2 + 96 * (epoch - first) / (last - first);
    this.curves = Object.entries(losses).map(([name, points]) => {
      const values = [...finite(points), ...finite(theirs[name] || [])];
      const low = Math.min(...values), high = Math.max(...values);
      const y = value => low === high ? 50 : 95 - 90 * (value - low) / (high - low);
      const figure = add(box, "figure"), caption = add(figure, "figcaption");
      add(caption, "b", name);
      const value = add(caption, "span", "", {className: "value"});
      const svg = figure.appendChild(copy("curve")), own = finite(points);
      svg.setAttribute("aria-label", own.length ? `${name}: ${short(own[0])} at first, `
        + `${short(own.at(-1))} at last, between ${short(Math.min(...own))} and `
        + `${short(Math.max(...own))}` : `${name}: no value`);
      let pen = "M";
      svg.querySelector("path").setAttribute("d", points.map(([epoch, value]) => {
        const step = value === null ? "" : `${pen}${x(epoch)} ${y(value)}l0 0`;
        pen = value === null ? "M" : "L";
        return step;
      }).join(""));
      const range = own.length ? `${short(low)} to ${short(high)}` : "no value";
      add(figure, "div", range, {className: "range"});
      return {name, value, line: svg.querySelector("line"), x};
    });
  }
  listFlags() {  // those that differ from the default first; what differs from the other run marked
    const box = this.root.querySelector(".flags");
    const theirs = new Map(this.other.run.flags);
    box.replaceChildren();
    if (!this.run.flags.length) add(box, "p", "none");
    for (const differs of [true, false]) {
      const rows = this.run.flags.filter(flag => flag[2] === differs);
      if (!rows.length) continue;
      const place = differs ? box : add(box, "details");
      if (!differs) add(place, "summary", `at the default (${rows.length})`);
      const table = add(place, "table");
      if (differs) add(table, "caption", "not at the default (≠: not as in the other run)");
      for (const [flag, value] of rows) {
        const row = add(table, "tr");
        add(row, "th", flag, {scope: "row"});
        const same = !theirs.size || theirs.get(flag) === value;
        add(add(row, "td"), same ? "span" : "mark", value);
      }
    }
  }
}

const columns = [new Column("Left", 0), new Column("Right", 1)];
columns.forEach((column, index) => { column.other = columns[1 - index]; column.open(); });
function compare() {
  for (const column of columns) { column.drawCurves(); column.listFlags(); column.show(); }
}
compare();
</script>
</html>
"""


def main(argv=None):
    """Runs the command line. Returns the exit status."""
    args = parse_args(argv)
    try:
        folders = find_runs(args.root, args.runs)
        page = build_page(folders).encode()
        aside = args.output.with_name(args.output.name + ".tmp")
        aside.write_bytes(page)
        os.replace(aside, args.output)
    except (RunError, OSError) as error:
        print(f"gallery.py: error: {error}", file=sys.stderr)
        return 2
    size = len(page) / 1e6
    print(f"{args.output}: {len(folders)} run{'s' * (len(folders) > 1)}, {size:.1f} MB")
    if size > LARGE:
        print(f"warning: above {LARGE} MB browsers are slow; --runs picks some runs")
    return 0


if __name__ == "__main__":
    sys.exit(main())

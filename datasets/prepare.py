"""Lay out your own images for training, as datasets/NAME.

    python datasets/prepare.py unpaired ~/photos ~/paintings mine    for CUT and cycleGAN
    python datasets/prepare.py pairs ~/sketches ~/photos mine        for pix2pix
    python datasets/prepare.py split facades facades_unpaired        pairs to two sides

Folders are read at any depth and never changed. NAME appears only when it is complete.
"""

import argparse
import shlex
import shutil
import signal
import sys
from collections import Counter
from itertools import combinations
from pathlib import Path
from unicodedata import normalize

import numpy as np
from PIL import Image
from tqdm import tqdm

from images import SUFFIXES, UserError, load_rgb, note, replacing

ROOT = Path(__file__).resolve().parent.parent


def load(path):
    """load_rgb, or None after a message if the file is unreadable."""
    try:
        return load_rgb(path)
    except UserError as error:
        print(f"left out: {error}")


def report(reason, files):
    """Prints how many files are left out, and the first five."""
    if files:
        more = f", and {len(files) - 5} more" if len(files) > 5 else ""
        print(f"left out: {len(files)} {reason}: {', '.join(map(str, files[:5]))}{more}")


def find_images(folder):
    """The images in `folder` at any depth, sorted by path. Reports what is left out."""
    files = [f for f in folder.rglob("*") if "/." not in f"/{f.relative_to(folder).as_posix()}"]
    images = {f for f in files if f.suffix.lower() in SUFFIXES and f.is_file()}
    others = [f for f in files if f not in images and (f.is_symlink() or not f.is_dir())]
    report("of other formats (convert HEIC and GIF) or dead links", sorted(others))
    if not images:
        found = "no images" if folder.is_dir() else "no folder"
        raise UserError(f"{folder}: {found}; expected files {' '.join(sorted(SUFFIXES))}")
    return sorted(images)


def name_images(*folders, suffix=True):
    """For each folder {name: file}. The names are unique, by one rule for all folders: the stem; if
    stems repeat, sub-folders and stem; if these repeat (a.jpg, a.png) and `suffix`, the suffix too.
    """
    sides = [(folder, find_images(folder)) for folder in folders]
    rules = [lambda p: p.stem, lambda p: "-".join(p.with_suffix("").parts)]
    for rule in [*rules, lambda p: "-".join(p.parts)] if suffix else rules:
        named = [[(normalize("NFC", rule(f.relative_to(d))), f) for f in s] for d, s in sides]
        counts = Counter((k, n.lower()) for k, side in enumerate(named) for n, _ in side)
        [((_, name), count)] = counts.most_common(1)
        if count == 1:
            return list(map(dict, named))
    raise UserError(f"two files in {' or '.join(map(str, folders))} are called {name}; rename one")


def hold_out(names, args, side=""):
    """{name: "test" or "train"}. --test of them, at most a fifth, are sampled for testing."""
    order = np.random.default_rng([args.seed, *side.encode()]).permutation(sorted(names)).tolist()
    count = min(args.test, len(order) // 5)
    return dict.fromkeys(order[:count], "test") | dict.fromkeys(order[count:], "train")


def unpaired(args):
    """Copy two folders as they are; x is the input. a.jpg and a.tif, one photo, stay together."""
    for side, names in zip("xy", name_images(*args.sources), strict=True):
        parts = hold_out({n.removesuffix(f.suffix) for n, f in names.items()}, args, side)
        for name, file in names.items():
            if load(file):
                yield f"{parts[name.removesuffix(file.suffix)]}/{side}/{name}{file.suffix}", file


def pairs(args):
    """Glue the images of the same name: y left, x right, resized to y's size. For pix2pix."""
    xs, ys = name_images(*args.sources, suffix=False)  # cat.png and cat.jpg are a pair
    single = sorted(xs.keys() ^ ys.keys())
    report("without a partner of the same name", [(xs | ys)[name] for name in single])
    for name, part in hold_out(xs.keys() & ys.keys(), args).items():
        x, y = load(xs[name]), load(ys[name])
        if x and y:
            if abs(x.width * y.height / (x.height * y.width) - 1) > 0.02:
                note(name, f"{xs[name]} is stretched to the shape of {ys[name]}: is it a pair?")
            yield f"{part}/{name}.png", Image.fromarray(np.hstack([y, x.resize(y.size)]))


def split(args):
    """Cut pairs into sides: disjoint halves of the training pairs, or both sides of all."""
    [source] = args.sources
    for part in ["train", *[p for p in ("test", "val") if (source / p).is_dir()][:1]]:
        [names] = name_images(source / part)
        order = np.random.default_rng(args.seed).permutation(list(names)).tolist()
        sides = dict.fromkeys(order, "y") | dict.fromkeys(order[: (len(order) + 1) // 2], "x")
        if args.all or part != "train":
            sides = dict.fromkeys(order, "xy")
        for name, file in names.items():
            pair = load(file)
            if pair and pair.width % 2:
                print(f"left out: {file} is {pair.width} pixels wide; a pair has two equal halves")
            elif pair:
                halves = dict(zip("yx", np.split(np.asarray(pair), 2, axis=1), strict=True))
                for side in sides[name]:
                    new = f"{part.replace('val', 'test')}/{side}/{name}.png"
                    yield new, Image.fromarray(halves[side])


def build(args, folder):
    """Write what the command yields, (path in the dataset, image or file to copy), into folder."""
    command = {"unpaired": unpaired, "pairs": pairs, "split": split}[args.command]
    for path, image in tqdm(command(args), unit=" images", disable=None):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(image, Path):
            shutil.copyfile(image, folder / path)
        else:
            image.save(folder / path, compress_level=1)
    for part in ["train"] if command is pairs else ["train/x", "train/y"]:
        if not (folder / part).is_dir():
            raise UserError(f"no usable image for {args.name}/{part}; nothing was written")
    for part in sorted({file.parent for file in folder.rglob("*.*")}):
        print(f"{args.target / part.relative_to(folder)}: {len(list(part.iterdir()))} images")


def parse_args(argv=None):
    style = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = argparse.ArgumentParser("prepare.py", description=__doc__, **style)
    parser.error = lambda message: parser.exit(2, f"prepare.py: error: {message}\n")
    flag = parser.add_argument
    flag("command", choices=["unpaired", "pairs", "split"])
    flag("sources", metavar="DIR", nargs="+", help="x, the input, then y; split: dataset of pairs")
    flag("name", metavar="NAME", help="the dataset to make")
    flag("--test", type=int, default=50, help="test images, at most a fifth of all [50]")
    flag("--all", action="store_true", help="split: both training sides from every pair [halves]")
    flag("--seed", type=int, default=0, help="another seed samples other images [0]")
    flag("--data-root", type=Path, default=ROOT / "datasets", help="folder of the datasets")
    flag("--overwrite", action="store_true", help="replace the dataset if it exists [stop]")
    args = parser.parse_intermixed_args(argv)
    split = args.command == "split"
    if len(args.sources) != 2 - split or args.all > split:
        parser.error("expected unpaired or pairs DIR_X DIR_Y NAME, or split NAME NEW [--all]")
    if args.seed < 0 or args.test < 0:
        parser.error("--seed and --test must be 0 or more")
    args.sources = [args.data_root / s if split else Path(s) for s in args.sources]
    args.target = args.data_root / args.name
    return parser, args


def check(args):
    """UserError where the target must not be written: it would replace what is no dataset."""
    target = args.target
    if Path(args.name).name != args.name or args.name[:1] in ("", "."):
        raise UserError(f"{args.name!r} is not a plain folder name; --data-root says where it goes")
    for one, other in combinations([path.resolve() for path in (target, *args.sources)], 2):
        if one.is_relative_to(other) or other.is_relative_to(one):
            raise UserError(f"{one} and {other} overlap; expected separate folders")
    if args.command == "split" and (args.sources[0] / "train/x").is_dir():
        raise UserError(f"{args.sources[0]} has two sides already, train/x and train/y")
    if foreign := {path.name for path in target.glob("[!.]*")} - {"train", "test", "val"}:
        raise UserError(f"{target} is not a dataset, it holds {min(foreign)}; move it away")
    if target.exists() and not args.overwrite:
        raise UserError(f"{target} exists; --overwrite replaces it")


def main(argv=None):
    parser, args = parse_args(argv)
    for number in (signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup sets it
            signal.signal(number, signal.default_int_handler)
    sys.stdout.reconfigure(errors="backslashreplace")  # a file's name may be no text
    try:
        check(args)
        with replacing(args.target) as aside:
            build(args, aside / args.name)
    except (UserError, OSError) as error:
        parser.error(error)
    except KeyboardInterrupt:
        parser.exit(130, "prepare.py: interrupted; nothing was written\n")
    script = ROOT / ("pix2pix" if args.command == "pairs" else "CUT") / "train.py"
    root = [] if args.data_root == ROOT / "datasets" else ["--data-root", args.data_root]
    words = ["python", script, "--data-folder", args.name, *root, "--fit", "crop", "--save-model"]
    if args.command == "pairs":
        cut = ["python", ROOT / "datasets/prepare.py", "split", args.name, "NEW", "--all", *root]
        print("to cut pairs for translate.py:", shlex.join(map(str, cut)))
    print("next:", shlex.join(map(str, words)))


if __name__ == "__main__":
    main()

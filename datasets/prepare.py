"""Lay out your own images for training, as datasets/NAME.

    python datasets/prepare.py unpaired ~/photos ~/paintings mine    for CUT and cycleGAN
    python datasets/prepare.py pairs ~/sketches ~/photos mine        for pix2pix
    python datasets/prepare.py split facades facades_unpaired        pairs to two sides

Folders are read at any depth and never changed. NAME appears only when it is complete.
"""

import argparse
import io
import shlex
import shutil
import signal
import sys
import tempfile
from collections import Counter
from contextlib import suppress
from itertools import combinations
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
UPRIGHT = dict(zip(range(2, 9), (0, 3, 1, 5, 4, 6, 2), strict=True))  # EXIF to Image.Transpose
NOTED = set()


class UserError(Exception):
    """A problem that the user can fix. One line: what was found, what was expected, what to do."""


def note(kind, message):
    """Prints a warning about the data, one of each kind."""
    if kind not in NOTED:
        NOTED.add(kind)
        print(f"note: {message}", file=sys.stderr, flush=True)


def load_rgb(path):
    """Any image as 8-bit RGB (PIL), upright, in sRGB. 16 bits are scaled, transparency is white.

    Metadata never prevents reading the pixels. UserError, naming the file, if they are unreadable.
    """
    try:
        with Image.open(path) as file:
            image = file.copy()
            with suppress(Exception):  # a format without frames, or one with damaged later frames
                if file.n_frames > 1:
                    note("frames", f"{path}: only the first of its {file.n_frames} frames is read")
            with suppress(Exception):  # no orientation, or an odd one: the image stays as it is
                image = image.transpose(UPRIGHT[image.getexif()[0x0112]])
            profile = image.info.get("icc_profile") or b"sRGB"
            if image.mode == "F":
                raise ValueError("floating-point pixels; save it with 8 or 16 bits per channel")
            if image.mode[0] == "I":  # 16 bits: 65535 is white
                levels = np.asarray(image).astype(np.int64)
                low, high = levels.min(), levels.max()
                if low < 0 or high > 65535 or high < 8192:
                    note("levels", f"{path} has levels {low} to {high}; rescale them to 0 to 65535")
                levels[levels == image.info.get("transparency")] = 65535
                image = Image.fromarray(((levels.clip(0, 65535) + 128) // 257).astype(np.uint8))
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            image = image if image.mode in ("L", "CMYK") else image.convert("RGB")
            if b"sRGB" not in profile:
                with suppress(Exception):  # a damaged profile: the levels count as sRGB
                    source, srgb = io.BytesIO(profile), ImageCms.createProfile("sRGB")
                    image = ImageCms.profileToProfile(image, source, srgb, outputMode="RGB")
            return image.convert("RGB")
    except Exception as error:  # a decoder may raise anything
        raise UserError(f"cannot read {path}: {error}; replace or remove it") from None


def load(path, failed):
    """load_rgb, or None, with the error added to `failed`."""
    try:
        return load_rgb(path)
    except UserError as error:
        failed.append(error)


def report(reason, items):
    """Prints how many items are left out, and the first five."""
    if items:
        more = f", and {len(items) - 5} more" if len(items) > 5 else ""
        print(f"left out, {reason}: {len(items)}: {', '.join(map(str, items[:5]))}{more}")


def find_images(folder):
    """The images in `folder` at any depth, sorted by path. Reports what is left out."""
    files = sorted(folder.rglob("*"))
    files = [f for f in files if not any(p[0] == "." for p in f.relative_to(folder).parts)]
    images = [f for f in files if f.suffix.lower() in SUFFIXES and f.is_file()]
    others = [f for f in set(files) - set(images) if f.is_symlink() or not f.is_dir()]
    report("of another format (convert HEIC and gif) or a dead link", sorted(others))
    if not images:
        found = "no images" if folder.is_dir() else "no folder"
        raise UserError(f"{folder}: {found}; expected files {' '.join(sorted(SUFFIXES))}")
    return images


def name_images(*folders):
    """For each folder {name: file}. The names are unique, by one rule for all folders: the stem;
    if stems repeat, sub-folders and stem; if these repeat too (a.jpg and a.png), also the suffix.
    """
    found = [find_images(folder) for folder in folders]
    paths = [[f.relative_to(d) for f in files] for d, files in zip(folders, found, strict=True)]
    stems = [[path.stem for path in side] for side in paths]
    places = [["-".join(path.with_suffix("").parts) for path in side] for side in paths]
    for names in (stems, places, [["-".join(path.parts) for path in side] for side in paths]):
        if all(len({name.lower() for name in side}) == len(side) for side in names):
            return [dict(zip(*pair, strict=True)) for pair in zip(names, found, strict=True)]
    raise UserError(f"{' or '.join(map(str, folders))}: two files get the same name; rename one")


def hold_out(names, args, side=""):
    """{name: "test" or "train"}. --test of them, at most a fifth, are sampled for testing."""
    order = np.random.default_rng([args.seed, *side.encode()]).permutation(sorted(names)).tolist()
    count = min(args.test, len(order) // 5)
    return dict.fromkeys(order[:count], "test") | dict.fromkeys(order[count:], "train")


def unpaired(args, failed):
    """Copy two folders, the files as they are; DIR_X becomes x, the input. For CUT, cycleGAN."""
    for side, names in zip("xy", name_images(args.dir_x, args.dir_y), strict=True):
        for name, part in hold_out(names, args, side).items():
            if load(names[name], failed):
                yield f"{part}/{side}/{name}{names[name].suffix}", names[name]


def pairs(args, failed):
    """Glue the images of the same name: y left, x right, resized to y's size. For pix2pix."""
    xs, ys = name_images(args.dir_x, args.dir_y)
    lonely = sorted(xs.keys() ^ ys.keys())
    report("without a partner of the same name", [(xs | ys)[name] for name in lonely])
    for name, part in hold_out(xs.keys() & ys.keys(), args).items():
        x, y = load(xs[name], failed), load(ys[name], failed)
        if x and y:
            if abs(x.width * y.height / (x.height * y.width) - 1) > 0.02:
                note("shape", f"{xs[name]} is stretched to the shape of {ys[name]}: is it a pair?")
            pair = Image.new("RGB", (2 * y.width, y.height))
            pair.paste(y)
            pair.paste(x.resize(y.size, Image.Resampling.BICUBIC), (y.width, 0))
            yield f"{part}/{name}.png", pair


def split(args, failed):
    """Cut pairs into sides: disjoint halves of the training pairs, or both sides of all."""
    [source] = args.sources
    tests = [part for part in ("test", "val") if (source / part).is_dir()]
    for part in ["train", *tests[:1]]:
        [names] = name_images(source / part)
        order = np.random.default_rng(args.seed).permutation(len(names)).tolist()
        in_x, both = set(order[: (len(names) + 1) // 2]), args.all or part != "train"
        for index, (name, file) in enumerate(names.items()):
            pair = load(file, failed)
            if pair and pair.width % 2:
                failed.append(f"{file} is {pair.width} pixels wide; a pair has two equal halves")
            elif pair:
                for side in "xy" if both else "x" if index in in_x else "y":
                    left, width = pair.width // 2 * (side == "x"), pair.width // 2
                    half = pair.crop((left, 0, left + width, pair.height))
                    yield f"{part.replace('val', 'test')}/{side}/{name}.png", half


def build(args, new):
    """Write the dataset into the folder `new`, and report what it holds and what is left out."""
    failed, counts = [], Counter()
    for path, image in tqdm(args.command(args, failed), unit=" images", disable=None):
        folder = (new / path).parent
        folder.mkdir(parents=True, exist_ok=True)
        counts[folder.relative_to(new).as_posix()] += 1
        if isinstance(image, Path):
            shutil.copyfile(image, new / path)
        else:
            image.save(new / path, compress_level=1)
    report("unusable", failed)
    for folder in ["train"] if args.command is pairs else ["train/x", "train/y"]:
        if not counts[folder]:
            raise UserError(f"no usable image for {args.name}/{folder}; nothing was written")
    for folder, count in sorted(counts.items()):
        print(f"{args.target / folder}: {count} images")


class Parser(argparse.ArgumentParser):
    """Reports an error as one line."""

    def error(self, message):
        self.exit(2, f"prepare.py: error: {message}\n")


def parse_args(argv=None):
    parser = Parser("prepare.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in (unpaired, pairs, split):
        about = {"help": command.__doc__, "description": command.__doc__, "allow_abbrev": False}
        sub = commands.add_parser(command.__name__, **about)
        sub.set_defaults(command=command)
        flag = sub.add_argument
        if command is split:
            flag("source", metavar="NAME", help="the dataset of pairs")
            flag("name", metavar="NEW", help="the dataset to make")
            flag("--all", action="store_true", help="both training sides from every pair [halves]")
        else:
            flag("dir_x", metavar="DIR_X", type=Path, help="folder of x, the generator's input")
            flag("dir_y", metavar="DIR_Y", type=Path, help="folder of y, its target")
            flag("name", metavar="NAME", help="the dataset to make")
            flag("--test", type=int, default=50, help="test images, at most a fifth of all [50]")
        flag("--seed", type=int, default=0, help="another seed samples other images [0]")
        flag("--data-root", type=Path, default=ROOT / "datasets", help="folder of the datasets")
        flag("--overwrite", action="store_true", help="replace the dataset if it exists [stop]")
    args = parser.parse_args(argv)
    if Path(args.name).name != args.name or args.name[:1] in ("", "."):
        parser.error(f"{args.name!r} is not a plain folder name; --data-root says where it goes")
    if args.seed < 0 or getattr(args, "test", 0) < 0:
        parser.error("--seed and --test must be 0 or more")
    args.target = args.data_root / args.name
    args.sources = (
        [args.data_root / args.source] if args.command is split else [args.dir_x, args.dir_y]
    )
    return parser, args


def check_target(target, sources, overwrite):
    """UserError where the target exists, holds foreign files, or overlaps with a source."""
    for one, other in combinations([path.resolve() for path in (target, *sources)], 2):
        if one.is_relative_to(other) or other.is_relative_to(one):
            raise UserError(f"{one} and {other} overlap; expected separate folders")
    if target.exists() and not overwrite:
        raise UserError(f"{target} exists; --overwrite replaces it")
    foreign = {p.name for p in target.glob("[!.]*")} - {"train", "test", "val"}
    if foreign:
        raise UserError(
            f"{target} holds {min(foreign)}, so it is no dataset of this script; move it away"
        )


def main(argv=None):
    parser, args = parse_args(argv)
    target = args.target
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        check_target(target, args.sources, args.overwrite)
        args.data_root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{args.name}-", dir=args.data_root) as aside:
            new, old = Path(aside, "new"), Path(aside, "old")
            build(args, new)
            try:
                if target.exists():
                    target.rename(old)
                new.rename(target)
            finally:
                if old.exists() and not target.exists():
                    old.rename(target)
    except (UserError, OSError) as error:
        parser.error(error)
    except KeyboardInterrupt:
        parser.exit(130, "prepare.py: interrupted; nothing was written\n")
    script = ROOT / ("pix2pix" if args.command is pairs else "CUT") / "train.py"
    script = script.relative_to(ROOT) if Path.cwd() == ROOT else script
    root = [] if args.data_root == ROOT / "datasets" else ["--data-root", args.data_root]
    words = ["python", script, "--data-folder", args.name, *root, "--fit", "crop", "--save-model"]
    print("next:", shlex.join(map(str, words)))


if __name__ == "__main__":
    main()

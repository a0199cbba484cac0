"""Turn a set of side-by-side pairs into the unpaired layout that cycleGAN and CUT read.

    python datasets/split_pairs.py facades facades_unpaired
    python datasets/split_pairs.py path/to/maps path/to/maps_unpaired --all

From SRC/{train,val,test}, where a file holds y on the left and x on the right, to
DST/{train,test}/{x,y}/*.png. The two training sides come from disjoint halves of the files, so that
no training x has its y; the two test sides come from the same files and share their names.
"""

import argparse
import os
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

EXTENSIONS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}
HERE = Path(__file__).resolve().parent


class InputError(Exception):
    """Its message is the one line that the user reads."""


def find_folders(src, dst):
    """SRC from the working directory or else from datasets/; a bare DST name goes where SRC was."""
    base = Path() if src.is_dir() else HERE
    if not (base / src).is_dir():
        raise InputError(f"no folder {src}, neither here nor in {HERE}")
    bare = not {"/", os.sep} & set(dst)  # ./name is a path
    return base / src, (base / dst if bare else Path(dst))


def list_images(folder):
    """The images of a folder sorted by name; {} of them, or two of one stem, is an error."""
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    files = [f for f in files if f.suffix.lower() in EXTENSIONS and not f.name.startswith(".")]
    if not files:
        found = "holds no images" if folder.is_dir() else "does not exist"
        kinds = " ".join(sorted(e[1:] for e in EXTENSIONS))
        raise InputError(f"{folder} {found}; expected side-by-side pairs there ({kinds})")
    stems = {}
    for file in files:
        if file.stem in stems:
            raise InputError(
                f"{file} and {stems[file.stem].name} would both become {file.stem}.png"
            )
        stems[file.stem] = file
    return files


def read_rgb(path):
    """An image file as 8-bit RGB: 16-bit is scaled, transparency is put on white."""
    try:
        with Image.open(path) as opened:
            image = ImageOps.exif_transpose(opened)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{path} cannot be read as an image: {error}") from error
    if image.mode == "F":
        raise InputError(f"{path} has floating-point pixels; expected 8 or 16 bits a channel")
    if image.mode.startswith("I"):  # 16-bit gray: 65535 is white
        levels = np.asarray(image).astype(np.int64).clip(0, 65535)
        return Image.fromarray(((levels + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def split_pair(path, swap_xy):
    """A file's halves as {"x": right, "y": left}, exchanged by swap_xy."""
    image = read_rgb(path)
    width, height = image.size
    if width % 2:
        raise InputError(f"{path} is {width} pixels wide; two equal halves need an even width")
    left = image.crop((0, 0, width // 2, height))
    right = image.crop((width // 2, 0, width, height))
    return {"x": left, "y": right} if swap_xy else {"x": right, "y": left}


def plan_sides(train, test, every, seed):
    """Which sides of which files to write: a list of (file, split, sides)."""
    if every:
        plan = [(file, "train", "xy") for file in train]
    elif len(train) < 2:
        raise InputError(f"{train[0].parent} holds 1 image; disjoint halves need 2, or give --all")
    else:
        order = np.random.default_rng(seed).permutation(len(train))
        in_x = set(order[: (len(train) + 1) // 2].tolist())
        plan = [(file, "train", "x" if i in in_x else "y") for i, file in enumerate(train)]
    return plan + [(file, "test", "xy") for file in test]


def write_sides(plan, dst, swap_xy):
    """Write beside dst and move there when all is whole; an old dst makes way then."""
    dst.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{dst.name}-", dir=dst.parent) as staging:
        new = Path(staging) / "new"
        for split in ("train", "test"):
            for side in "xy":
                (new / split / side).mkdir(parents=True)
        with tqdm(plan, desc="splitting", unit="file") as progress:
            for file, split, sides in progress:
                halves = split_pair(file, swap_xy)
                for side in sides:
                    halves[side].save(new / split / side / f"{file.stem}.png", compress_level=1)
        if dst.exists():
            dst.rename(Path(staging) / "old")
        new.rename(dst)


def check_destination(src, dst, overwrite):
    """Refuse to replace anything but an older unpaired set, and never the source."""
    from_, to = src.resolve(), dst.resolve()
    if from_ == to or from_ in to.parents or to in from_.parents:
        raise InputError(f"DST {dst} and SRC {src} overlap; give DST a folder of its own")
    if not dst.exists():
        return
    if not overwrite:
        raise InputError(f"{dst} exists; --overwrite replaces it")
    if not dst.is_dir():
        raise InputError(f"{dst} is a file; expected a folder that this script made")
    foreign = sorted({p.name for p in dst.iterdir()} - {"train", "test"})
    if foreign:
        raise InputError(f"{dst} holds {foreign[0]}, so this script did not make it; remove it")


class Parser(argparse.ArgumentParser):
    """Reports an error as one line."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def parse_args(argv=None):
    parser = Parser(
        description="Turn side-by-side pairs into the unpaired layout {train,test}/{x,y}.",
        epilog="SRC is looked for in the working directory and then beside this script. DST as a "
        "bare name lies where SRC was looked for with success; any other DST is a plain path.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "src", metavar="SRC", type=Path, help="folder with train/ and test/ or val/"
    )
    parser.add_argument("dst", metavar="DST", help="folder to make")
    parser.add_argument(
        "--all", action="store_true", help="both training sides from every file [disjoint halves]"
    )
    parser.add_argument("--swap-xy", action="store_true", help="x is the left half [the right one]")
    parser.add_argument("--seed", type=int, default=0, help="of the division in halves [0]")
    parser.add_argument("--overwrite", action="store_true", help="replace DST if it exists [stop]")
    args = parser.parse_args(argv)
    if args.seed < 0:
        parser.error(f"--seed is {args.seed}; it must be 0 or more")
    return parser, args


def main(argv=None):
    parser, args = parse_args(argv)
    try:
        src, dst = find_folders(args.src, args.dst)
        check_destination(src, dst, args.overwrite)
        test_folder = src / "test" if (src / "test").is_dir() else src / "val"
        train, test = list_images(src / "train"), list_images(test_folder)
        plan = plan_sides(train, test, args.all, args.seed)
        write_sides(plan, dst, args.swap_xy)
    except InputError as error:
        parser.error(error)
    except OSError as error:
        parser.error(f"cannot write {args.dst}: {error}")
    except KeyboardInterrupt:
        parser.exit(130, f"{parser.prog}: interrupted; nothing was written\n")
    for split, folder in (("train", src / "train"), ("test", test_folder)):
        count = {side: sum(s == split and side in sides for _, s, sides in plan) for side in "xy"}
        print(f"{dst / split}: {count['x']} x and {count['y']} y from {folder}")
    if test_folder.name == "val":
        print(f"{src} has no test/, so the test images are those of val/")


if __name__ == "__main__":
    main()

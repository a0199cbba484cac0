"""Two sets of pictures, x and y, for CUT (Park et al. 2020, https://arxiv.org/abs/2007.15651).

``datasets/<name>/{train,test}/{x,y}/*.jpg``, or the authors' trainA, trainB, testA, testB (A is x,
B is y). The sides need neither be pairs nor be of one number; --swap-xy exchanges them.

    python datasets/make_toy.py                                            # makes toy_unpaired
    python datasets/split_pairs.py datasets/facades datasets/facades_unpaired
"""

import difflib

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import Dataset

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")


class RunError(Exception):
    """Ends a run. The message is one line: what was found, what was wanted, what to do."""


def list_images(folder):
    """The pictures directly inside `folder` (a Path), sorted by name; [] without folder."""
    if not folder.is_dir():
        return []
    files = (f for f in folder.iterdir() if f.suffix.lower() in SUFFIXES and f.name[0] != ".")
    return sorted(f for f in files if f.is_file())


def load_rgb(path):
    """Any picture as 8-bit RGB (PIL): 16 bits are scaled to 8, transparency is put on white.

    Raises RunError, naming the file, where it cannot be read.
    """
    try:
        with Image.open(path) as opened:
            image = ImageOps.exif_transpose(opened)  # reads all: finds a cut-off file
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise RunError(f"cannot read the image {path}: {error}; replace or remove it") from None
    if image.mode == "F":
        raise RunError(f"{path} has floating-point pixels; save it with 8 or 16 bits a channel")
    if image.mode.startswith("I"):  # 16-bit gray: 65535 is white
        levels = np.asarray(image).astype(np.int64).clip(0, 65535)
        return Image.fromarray(((levels + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def missing_data(root, name, wanted):
    """The RunError for a data folder that is not there, or not laid out as `wanted` says."""
    folder = root / name
    if folder.is_dir():
        found = ", ".join(sorted(f.name for f in folder.iterdir())[:8]) or "nothing"
        made = "python datasets/make_toy.py makes sets to compare with"
        return RunError(f"{folder} holds {found}; expected {wanted}; {made} (datasets/README.md)")
    sets = [f.name for f in root.iterdir() if f.is_dir()] if root.is_dir() else []
    sets = sorted(name for name in sets if name[0] not in "._")
    near = difflib.get_close_matches(name, sets, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    return RunError(
        f"no folder {folder}; {root} holds {', '.join(sets[:8]) or 'no data set'}; {hint}"
        f"python datasets/make_toy.py makes toy sets, python datasets/download.py {name} fetches "
        "the authors', --data-root names another place"
    )


def to_tensor(image):
    """An RGB picture (PIL) as a float tensor: (3, H, W) in [-1, 1]."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
    return pixels.float() / 127.5 - 1


def draw_geometry(rng, load_size, image_size, flip):
    """One crop and one flip: (left, top, mirrored); left, top in pixels."""
    left, top = (int(v) for v in rng.integers(0, load_size - image_size + 1, size=2))
    return left, top, bool(rng.random() < 0.5) and flip


def apply_geometry(image, geometry, load_size, image_size):
    """Resizes to load_size squared, crops image_size squared, mirrors: (3, H, W) in [-1, 1]."""
    left, top, mirrored = geometry
    image = image.resize((load_size, load_size), Image.Resampling.BICUBIC)
    image = image.crop((left, top, left + image_size, top + image_size))
    return to_tensor(ImageOps.mirror(image) if mirrored else image)


class EpochBatches:
    """A sampler of batches of (epoch, index), in an order that depends on seed and epoch alone.

    start(epoch, batch) sets where the next pass begins: an interrupted epoch goes on at its next
    step.
    """

    def __init__(self, length, batch_size, seed):
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.start(1, 0)

    def start(self, epoch, batch):
        self.epoch, self.first_batch = epoch, batch

    def __len__(self):
        return -(-self.length // self.batch_size)  # the last batch may be short

    def __iter__(self):
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.length).tolist()
        for first in range(self.first_batch * self.batch_size, self.length, self.batch_size):
            yield [(self.epoch, index) for index in order[first : first + self.batch_size]]


def find_side(root, name, split, side):
    """The pictures of one side, "x" or "y", of one split. RunError where there are none."""
    folder = root / name
    letter = {"x": "A", "y": "B"}[side]
    files = list_images(folder / split / side) or list_images(folder / f"{split}{letter}")
    if not files:
        wanted = f"pictures in {split}/{side} or {split}{letter}"
        pairs = list_images(folder / split)
        mend = f"; python datasets/split_pairs.py {folder} {folder}_unpaired splits its pairs"
        raise missing_data(root, name, wanted + (mend if pairs else ""))
    return files


class UnpairedDataset(Dataset):
    """dataset[epoch, index] -> (x, y), each (3, image_size, image_size) in [-1, 1], not a pair.

    An epoch is the longer side once; the other side's picture is drawn at random each time. That
    draw and the two crops and flips depend on (seed, epoch, index) alone, so that any number of
    workers draws the same. load_size: pixels resized to before the crop; where it equals image_size
    nothing is cropped.
    """

    def __init__(self, root, name, split, load_size, image_size, swap_xy, flip=False, seed=0):
        self.files_x, self.files_y = (find_side(root, name, split, side) for side in "xy")
        if swap_xy:
            self.files_x, self.files_y = self.files_y, self.files_x
        self.load_size, self.image_size, self.flip, self.seed = load_size, image_size, flip, seed

    def __len__(self):
        return max(len(self.files_x), len(self.files_y))

    def __str__(self):
        return f"{len(self.files_x)} x and {len(self.files_y)} y"

    @property
    def files(self):
        return self.files_x + self.files_y

    @property
    def names_match(self):
        """Whether each x has a y of its name, which then is taken for its true translation."""
        return [f.stem for f in self.files_x] == [f.stem for f in self.files_y]

    def __getitem__(self, key):
        epoch, index = key
        rng = np.random.default_rng([self.seed, epoch, index + 1])  # + 1: 0 would be the order's
        if len(self.files_x) >= len(self.files_y):
            files = self.files_x[index], self.files_y[rng.integers(len(self.files_y))]
        else:
            files = self.files_x[rng.integers(len(self.files_x))], self.files_y[index]
        x, y = (self.load(f, draw_geometry(rng, *self.sizes, self.flip)) for f in files)
        return x, y

    @property
    def sizes(self):
        return self.load_size, self.image_size

    def load(self, file, geometry=(0, 0, False)):
        """One picture: (3, image_size, image_size) in [-1, 1]."""
        return apply_geometry(load_rgb(file), geometry, *self.sizes)

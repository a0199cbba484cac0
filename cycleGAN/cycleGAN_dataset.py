"""Two sets of pictures, x and y, for CycleGAN (Zhu et al. 2017, https://arxiv.org/abs/1703.10593).

``datasets/<name>/{train,test}/{x,y}/*.jpg``, or the authors' trainA, trainB, testA, testB (A is x,
B is y). The sides need neither be pairs nor be of one number; --swap-xy exchanges them.

    python datasets/make_toy.py                                            # makes toy_unpaired
    python datasets/split_pairs.py datasets/facades datasets/facades_unpaired
"""

import difflib
import os
import shutil

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


def to_pixels(image):
    """An RGB picture (PIL) as a tensor: (3, H, W), uint8."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def to_unit(pixels):
    """0 to 255 (uint8) as float in [-1, 1], on whatever device the pixels are."""
    return pixels.float() / 127.5 - 1


def to_tensor(image):
    """An RGB picture (PIL) as a float tensor: (3, H, W) in [-1, 1]."""
    return to_unit(to_pixels(image))


def draw_geometry(rng, load_size, image_size, flip):
    """One crop and one flip: (left, top, mirrored); left, top in pixels."""
    left, top = (int(v) for v in rng.integers(0, load_size - image_size + 1, size=2))
    return left, top, bool(rng.random() < 0.5) and flip


def resize(image, size):
    """A picture (PIL) at size squared: (3, size, size), uint8."""
    return to_pixels(image.resize((size, size), Image.Resampling.BICUBIC))


def apply_geometry(pixels, geometry, image_size):
    """Crops image_size squared, mirrors. pixels, and what is returned: (3, H, W), uint8."""
    left, top, mirrored = geometry
    pixels = pixels[:, top : top + image_size, left : left + image_size]
    return pixels.flip(2) if mirrored else pixels.contiguous()


class PixelCache:
    """Pictures as they are before the crop, each decoded once, in memory that all loading processes
    share: cache(index, decode) is decode(), the first time, and then what that gave.

    shape: of all of them, (number, ..., 3, load_size, load_size), one byte a value. wanted: True,
    False, or None: where they take at most half of the free shared memory, for each process that
    trains here. RunError where True is wanted and they do not fit.
    """

    def __init__(self, shape, wanted):
        self.bytes = int(np.prod(shape))
        self.pixels = None
        if wanted or (wanted is None and self.bytes <= shared_memory() / 2):
            try:
                self.pixels = torch.empty(shape, dtype=torch.uint8).share_memory_()
                self.known = torch.zeros(shape[0], dtype=torch.bool).share_memory_()
            except RuntimeError as error:
                self.pixels = None
                if not wanted:
                    return
                reason = str(error).splitlines()[0]
                size = f"--cache wants {self.bytes / 1e6:.0f} MB of shared memory"
                raise RunError(f"{size}: {reason}; give --no-cache") from None

    def __call__(self, index, decode):
        if self.pixels is None:
            return decode()
        if not self.known[index]:
            self.pixels[index] = decode()
            self.known[index] = True
        return self.pixels[index]

    def __str__(self):
        return "read anew" if self.pixels is None else f"kept in {self.bytes / 1e6:.0f} MB"


def shared_memory():
    """Free bytes of shared memory for each process that trains on this machine; 0: none known."""
    if not os.path.isdir("/dev/shm"):
        return 0
    return shutil.disk_usage("/dev/shm").free / int(os.environ.get("LOCAL_WORLD_SIZE", 1))


class EpochBatches:
    """A sampler of batches of (epoch, index), in an order that depends on seed and epoch alone.

    start(epoch, batch) sets where the next pass begins: an interrupted epoch goes on at its next
    step. Of `number` processes that train together each, `rank`, takes batch_size pictures of
    number * batch_size. All take equally many, also of the last, short batch, so that the mean of
    their gradients is the mean over pictures; up to number - 1 pictures an epoch are left out.
    """

    def __init__(self, length, batch_size, seed, rank=0, number=1):
        self.length, self.batch_size, self.seed = length - length % number, batch_size, seed
        self.rank, self.number, self.files = rank, number, length
        self.start(1, 0)

    def start(self, epoch, batch):
        self.epoch, self.first_batch = epoch, batch

    def __len__(self):
        return -(-self.length // (self.batch_size * self.number))  # the last batch may be short

    def __iter__(self):
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.files).tolist()
        order, size = order[: self.length], self.batch_size * self.number
        for first in range(self.first_batch * size, self.length, size):
            mine = order[first : first + size][self.rank :: self.number]
            yield [(self.epoch, index) for index in mine]


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
    nothing is cropped. cache: whether PixelCache keeps them.
    """

    def __init__(
        self, root, name, split, load_size, image_size, swap_xy, flip=False, seed=0, cache=False
    ):
        self.files_x, self.files_y = (find_side(root, name, split, side) for side in "xy")
        if swap_xy:
            self.files_x, self.files_y = self.files_y, self.files_x
        self.load_size, self.image_size, self.flip, self.seed = load_size, image_size, flip, seed
        self.cache = PixelCache((len(self.files), 3, load_size, load_size), cache)

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
        return tuple(to_unit(pixels) for pixels in self.crops(key))

    def __getitems__(self, keys):
        """What a loader asks for: uint8, a quarter of the bytes; the device makes floats of it."""
        return [self.crops(key) for key in keys]

    def crops(self, key):
        """x and y of dataset[epoch, index], each (3, image_size, image_size), uint8."""
        epoch, index = key
        rng = np.random.default_rng([self.seed, epoch, index + 1])  # + 1: 0 would be the order's
        if len(self.files_x) >= len(self.files_y):
            number_x, number_y = index, int(rng.integers(len(self.files_y)))
        else:
            number_x, number_y = int(rng.integers(len(self.files_x))), index
        x, y = (
            self.crop(number, draw_geometry(rng, self.load_size, self.image_size, self.flip))
            for number in (number_x, len(self.files_x) + number_y)
        )
        return x, y

    def crop(self, number, geometry):
        """Picture `number` of files, cropped and flipped: (3, image_size, image_size), uint8."""
        file = self.files[number]
        pixels = self.cache(number, lambda: resize(load_rgb(file), self.load_size))
        return apply_geometry(pixels, geometry, self.image_size)

    def load(self, file, geometry=(0, 0, False)):
        """One picture: (3, image_size, image_size) in [-1, 1]."""
        pixels = resize(load_rgb(file), self.load_size)
        return to_unit(apply_geometry(pixels, geometry, self.image_size))

"""Two sides of images for cycleGAN: datasets/<name>/{train,test}/{x,y}/*, or trainA and trainB."""

import io
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageCms
from torchvision.transforms import v2

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


def list_images(folder):
    """The image files directly in `folder` (a Path), sorted by name. Notes what it skips."""
    files = sorted(f for f in folder.iterdir() if f.name[0] != ".") if folder.is_dir() else []
    images = [f for f in files if f.suffix.lower() in SUFFIXES and f.is_file()]
    if images and len(images) < len(files):
        skipped = sorted(set(files) - set(images))
        note(folder, f"skipped in {folder}: {len(skipped)}, such as {skipped[0].name}")
    return images


def load_rgb(path, least=10**6):
    """Any image as 8-bit RGB (PIL), upright, in sRGB. 16 bits are scaled, transparency is white.

    A JPEG of far more than `least` pixels a side is decoded smaller, which is fast. Metadata never
    prevents reading the pixels. UserError, naming the file, if they are unreadable.
    """
    try:
        with Image.open(path) as file:
            file.draft(None, (least, least))
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


def augmentation(args, training):
    """PIL images to uint8 tensors (3, image_size, image_size). One call has one crop and one flip;
    without `training`, the crop is at the center and there is no flip.
    """
    jitter = training and args.jitter
    size = args.load_size if jitter else args.image_size  # of the short side, or of both
    resize = v2.Resize(size if args.fit == "crop" else (size, size), v2.InterpolationMode.BICUBIC)
    crop = (v2.RandomCrop if jitter else v2.CenterCrop)(args.image_size)
    flip = v2.RandomHorizontalFlip(0.5 if training and args.flip else 0.0)
    return v2.Compose([resize, crop, flip, v2.PILToTensor()])


def to_unit(images):
    """uint8 images as float in [-1, 1], on the device where they are."""
    return images.float() / 127.5 - 1


def epoch_batches(length, batch_size, seed, epoch, rank=0, world_size=1):
    """One epoch: batches of (epoch, index), in an order set by seed and epoch alone. Each of
    world_size processes gets equally many; up to world_size - 1 images are left out.
    """
    order = np.random.default_rng([seed, epoch]).permutation(length).tolist()
    keys = [(epoch, index) for index in order[: length - length % world_size]]
    size = batch_size * world_size
    return [keys[k : k + size][rank::world_size] for k in range(0, len(keys), size)]


def find_side(args, split, side):
    """The images of side "x" or "y": in split/x or split/X, or in the authors' splitA (B for y)."""
    root = Path(args.data_root) / args.data_folder
    names = {"x": ("/[xX]/", "[aA]/"), "y": ("/[yY]/", "[bB]/")}[side]
    folders = [folder for name in names for folder in sorted(root.glob(split + name))]
    return [file for folder in folders for file in list_images(folder)]


class UnpairedDataset(torch.utils.data.Dataset):
    """dataset[epoch, index] -> (x, y), each (3, image_size, image_size), uint8. An epoch is the
    longer side, x if equal; the other is sampled. Random by seed, epoch and index alone.
    """

    def __init__(self, args, split, training):
        self.args, self.transform = args, augmentation(args, training)
        self.sides = [find_side(args, split, side) for side in ("yx" if args.swap_xy else "xy")]
        self.files = self.sides[0] + self.sides[1]

    def __len__(self):
        return max(map(len, self.sides))

    def __getitem__(self, key):
        epoch, index = key
        rng = np.random.default_rng([self.args.seed, epoch, index + 1])  # + 1: 0 is the order's
        longer = max(self.sides, key=len)  # Authors' code: x equally often, even if it is shorter
        files = [s[index if s is longer else rng.integers(len(s))] for s in self.sides]
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(rng.integers(2**63)))
            return tuple(self.load(file) for file in files)

    def load(self, file):
        """One image, (3, image_size, image_size), uint8."""
        image = load_rgb(file, 2 * self.args.load_size)
        if self.args.fit == "stretch" and not 3 / 4 <= image.width / image.height <= 4 / 3:
            note("aspect", f"{file} is stretched to a square; --fit crop keeps its aspect")
        return self.transform(image)

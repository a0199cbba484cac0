"""Images in, datasets out: what the tools outside the method folders share."""

import io
import sys
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms

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


@contextmanager
def replacing(*targets):
    """Yields a folder next to the targets. What the block writes there, under their names, replaces
    them at its end; nothing is left of a block that fails.
    """
    parent = targets[0].parent
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".new-", dir=parent) as aside:
        yield Path(aside)
        for target in targets:
            old = Path(aside, f"old {target.name}")
            try:
                if target.exists():
                    target.rename(old)
                Path(aside, target.name).rename(target)
            finally:
                if old.exists() and not target.exists():
                    old.rename(target)

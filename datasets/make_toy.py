"""Generate a small facades dataset: flat label maps (x) and "photographs" of them (y).

    python datasets/make_toy.py
    python datasets/make_toy.py --count 100 --size 64 --seed 1 --root /tmp/toy

It writes, under --root,

    toy/{train,val,test}/0001.png             a pair side by side: left half y, right half x
    toy_unpaired/train/{x,y}/0001.png         label maps and photographs of different scenes
    toy_unpaired/test/{x,y}/0001.png          both sides of the scenes of toy/test

A scene depends only on --seed and its index: a larger dataset begins with the smaller one, and the
same flags give the same bytes.
"""

import argparse
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image, ImageColor, ImageDraw
from tqdm import tqdm

from images import replacing

LABELS = """
    sky #000096, wall #003cff, window #00b4ff, door #00ffe6, sill #5aff96, balcony #b4ff3c,
    shutter #fff000, roof #ffaa00, cornice #ff5500, awning #ff003c, shop #aa0000,
    pillar #ff00ff, chimney #823c00, plant #00a028, street #5a008c
"""  # after the color map of CMP facades: blue ground, warm ornaments
PALETTE = {kind: ImageColor.getrgb(color) for kind, color in map(str.split, LABELS.split(","))}
STYLES = (  # texture, shape of the windows, their panes (columns, rows), roofs, extras
    ("brick", "arch", (2, 3), "steps hip", "belt shop"),
    ("plaster", "rect", (2, 2), "hip", "shutter flowers balcony shop"),
    ("stone", "rect", (2, 2), "mansard", "pillar belt balcony pediment"),
    ("plaster", "rect", (2, 3), "gable", "flowers shop"),
)
COLORS = (  # trim, roof, window frames, walls, accents (doors, shutters, shop fronts, awnings)
    ("#e2d6c0", "#5c6270", "#f0eee6", "#ac523e #944638 #ba6848", "#285442 #223a60"),
    ("#f6eedc", "#c46442", "#ece8dc", "#e8bc6c #e2a080 #f0dcb0", "#3e7054 #46748e"),
    ("#e8e2d4", "#608e82", "#544236", "#d6ccb6 #c0bcb6", "#683e2a #3a2e2c"),
    ("#faf8f2", "#964e42", "#fcfcfa", "#b0d4be #a0c0d8 #eec0c4", "#a83030 #2c4a74"),
)
TURN = np.linspace(0, 2 * np.pi, 24, endpoint=False)
STEPS = [(i // 2 / 9, 1 - (i + 1) // 2 / 4) for i in range(8)]
SHAPES = {  # corners in a box from (0, 0), the top left, to (1, 1)
    "rect": [(0, 0), (1, 0), (1, 1), (0, 1)],
    "round": np.stack([np.cos(TURN), np.sin(TURN)], axis=1) / 2 + 0.5,
    "arch": [(0, 1), *((0.5 - 0.5 * np.cos(t), 0.3 - 0.3 * np.sin(t)) for t in TURN[:13]), (1, 1)],
    "gable": [(0, 1), (0.5, 0), (1, 1)],
    "chevron": [(0, 0.73), (0.5, 0), (1, 0.73), (1, 1), (0.5, 0.27), (0, 1)],
    "hip": [(0, 1), (0.14, 0), (0.86, 0), (1, 1)],
    "mansard": [(0, 1), (0.06, 0), (0.94, 0), (1, 1)],
    "steps": STEPS + [(1 - x, y) for x, y in reversed(STEPS)],
}
# Blocks along a side of the image, courses, how much they differ, brightness added to the joints.
BLOCKS = {"brick": (32, 80, 0.09, 90), "stone": (12, 24, 0.03, 42), "tiles": (48, 56, 0.07, 0)}
# The number of the first scene of each split, and what is written of its scenes. The splits begin
# far apart, so that --count never changes the test scenes.
SPLITS = {
    "train": (0, {"toy/train": "yx", "toy_unpaired/train/y": "y"}),
    "val": (1_000_000, {"toy/val": "yx"}),
    "test": (2_000_000, {"toy/test": "yx", "toy_unpaired/test/x": "x", "toy_unpaired/test/y": "y"}),
    "unpaired x": (3_000_000, {"toy_unpaired/train/x": "x"}),
}
GROUND = 0.94  # height at which building and street meet; lengths are fractions of the image
DARK = (20, 16, 30)  # shadows
OVERSAMPLING = 2  # photographs are painted this many times larger, then averaged


def grow(box, margin):
    return box[0] - margin, box[1] - margin, box[2] + margin, box[3] + margin


def inside(box, left=0.0, top=0.0, right=1.0, bottom=1.0):
    """The box inside a box whose edges lie at these fractions of it."""
    x0, y0, x1, y1 = box
    width, height = x1 - x0, y1 - y0
    return x0 + left * width, y0 + top * height, x0 + right * width, y0 + bottom * height


def snap(box, size):
    """The box on whole pixels, at least one wide, so that label map and photograph agree on it."""
    x0, y0, x1, y1 = (round(v * size) for v in box)
    return x0 / size, y0 / size, max(x1, x0 + 1) / size, max(y1, y0 + 1) / size


def corners(box, shape, scale):
    """The corners in pixels, [x, y, x, y, ...], of a shape that fills the box."""
    start, end = np.array(box).reshape(2, 2)
    points = np.round((start + (end - start) * SHAPES[shape]) * scale)
    # Pillow also fills the last row and column, so the edges beyond the middle step back by 1.
    points -= points > (points.min(0) + points.max(0)) / 2
    return points.ravel().tolist()


class Scene:
    """A house. parts: (kind, box, shape), kind a key of PALETTE, in the order they are painted."""

    def __init__(self, seed, index):
        self.parts, self.rng = [], np.random.default_rng([seed, index])
        rng, style = self.rng, self.rng.integers(len(STYLES))
        self.texture, self.window, self.panes, roofs, self.extras = STYLES[style]
        roof = rng.choice(roofs.split())
        narrow = roof in ("gable", "steps")
        margin = rng.uniform(0.13, 0.19) if narrow else rng.uniform(0.06, 0.11)
        self.eaves = rng.uniform(0.34, 0.38) if narrow else rng.uniform(0.22, 0.28)
        bays, floors = (3, 3) if narrow else (rng.integers(3, 6), rng.integers(3, 5))
        self.half, self.bay = 0.5 - margin, (0.96 - 2 * margin) / bays  # widths
        self.xs = 0.5 + self.bay * (np.arange(bays) - (bays - 1) / 2)  # middles of the bays
        ground = self.eaves + (GROUND - self.eaves) * (floors - 1) / (floors + 0.2)
        levels = np.linspace(self.eaves, ground, floors)  # tops of the floors
        self.add("street", 0.5, 0.5, GROUND, 1)
        self.plan_roof(roof)
        if "pillar" in self.extras:
            xs = [0.52 - self.half, *(self.xs[1:] - self.bay / 2), 0.48 + self.half]
            self.add("pillar", xs, 0.016, self.eaves + 0.022, ground)
        if "belt" in self.extras:
            for y in levels[1:]:
                self.add("cornice", 0.5, self.half + 0.008, y - 0.012, y + 0.012)
        balcony_floor = rng.integers(floors - 1) if "balcony" in self.extras else -1
        for floor, (top, bottom) in enumerate(pairwise(levels)):
            self.plan_floor(top, bottom, floor == balcony_floor)
        self.plan_ground_floor(ground)
        for x in (margin / 2, 1 - margin / 2):
            if rng.random() < 0.6:
                half, height = rng.uniform(0.5, 0.75) * margin, rng.uniform(0.12, 0.3)
                self.add("plant", x, half, GROUND + 0.01 - height, GROUND + 0.01, "round")
        *colors, walls, accents = COLORS[style]
        colors += [rng.choice(walls.split()), rng.choice(accents.split())]
        self.trim, self.roof, self.frame, self.wall, self.accent = map(ImageColor.getrgb, colors)
        self.light = rng.choice([-1, 1])  # 1: the sun is on the left, -1: on the right

    def add(self, kind, xs, half, top, bottom, shape="rect"):
        """The same part with its middle at each of xs, and half its width."""
        self.parts += [(kind, (x - half, top, x + half, bottom), shape) for x in np.ravel(xs)]

    def plan_roof(self, shape):
        """The roof and what stands behind the edge of the wall, then the wall itself."""
        eaves, half, rng = self.eaves, self.half, self.rng
        if shape == "steps":
            self.add("cornice", 0.5, half + 0.015, 0.105, eaves, "steps")
            self.add("wall", 0.5, half, 0.12, eaves, "steps")
        elif shape == "gable":
            self.add("wall", 0.5, half, 0.15, eaves, "gable")
        else:
            top = eaves - rng.uniform(0.13, 0.16)
            xs = rng.choice([-0.6, -0.3, 0.3, 0.6], size=2, replace=False)
            self.add("chimney", 0.5 + half * xs, 0.025, top - 0.06, top + 0.05)
            self.add("roof", 0.5, half + 0.03, top, eaves, shape)
            count, y = rng.integers(2, 4), top + 0.3 * (eaves - top)
            xs = 0.5 + half * (2 * np.arange(count) + 1 - count) / count
            self.add("cornice", xs, 0.06, y - 0.04, y + 0.01, "gable")  # dormers
            self.add("window", xs, 0.045, y + 0.005, eaves - 0.02)
        self.add("wall", 0.5, half, eaves, GROUND)
        if shape == "gable":
            self.add("roof", 0.5, half + 0.05, 0.1, eaves + 0.05, "chevron")
        if shape in ("gable", "steps"):
            self.add("window", 0.5, 0.05, eaves - 0.11, eaves - 0.01, "round")
        else:
            self.add("cornice", 0.5, half + 0.025, eaves - 0.018, eaves + 0.022)

    def plan_floor(self, top, bottom, balcony):
        xs, extras, height = self.xs, self.extras, bottom - top
        half = min((0.22 if "shutter" in extras else 0.28) * self.bay, 0.085)
        y0, y1 = top + 0.24 * height, bottom - (0.06 if balcony else 0.18) * height
        joined = self.rng.random() < 0.5  # one balcony along the whole front
        self.add("window", xs, half, y0, y1, self.window)
        if "shutter" in extras:
            wing = 0.25 * half + 0.005  # half the width of a shutter
            self.add("shutter", [*(xs - half - wing), *(xs + half + wing)], wing, y0, y1)
        if balcony:
            middle, width = (0.5, self.half - 0.02) if joined else (xs, 0.42 * self.bay)
            self.add("balcony", middle, width, bottom - 0.36 * height, bottom - 0.02 * height)
            return
        self.add("sill", xs, half + 0.015, y1, y1 + 0.02)
        if "pediment" in extras:
            self.add("cornice", xs, half + 0.02, y0 - 0.035, y0, "gable")
        if "flowers" in extras:
            self.add("plant", xs[self.rng.random(len(xs)) < 0.5], half, y1 - 0.03, y1 + 0.008)

    def plan_ground_floor(self, top):
        height, entrance = GROUND - top, self.rng.integers(len(self.xs))
        door, others = self.xs[entrance], np.delete(self.xs, entrance)
        self.add("door", door, min(0.3 * self.bay, 0.07), top + 0.24 * height, GROUND, "arch")
        if "shop" in self.extras and self.rng.random() < 0.7:
            half, top, bottom = 0.44 * self.bay, top + 0.16 * height, GROUND - 0.008
            self.add("shop", others, half, top, bottom)
            self.add("awning", others, 1.08 * half, top, top + 0.36 * (bottom - top))
        else:
            half, bottom = min(0.25 * self.bay, 0.08), GROUND - 0.3 * height
            self.add("window", others, half, top + 0.26 * height, bottom, self.window)
            self.add("sill", others, half + 0.015, bottom, bottom + 0.02)


def draw_labels(scene, size):
    """x: the label map, an RGB image of size x size pixels that has only colors of PALETTE."""
    image = Image.new("RGB", (size, size), PALETTE["sky"])
    draw = ImageDraw.Draw(image)
    for kind, box, shape in scene.parts:
        draw.polygon(corners(snap(box, size), shape, size), fill=PALETTE[kind])
    return image


def to_image(array):
    return Image.fromarray(np.clip(array, 0, 255).astype(np.uint8))


def mottling(rng, scale, cells):
    """Smooth noise (scale, scale, 1), about -1 to 1, with `cells` bumps along each side."""
    coarse = Image.fromarray(rng.standard_normal((cells, cells), np.float32))
    return np.asarray(coarse.resize((scale, scale), Image.Resampling.BICUBIC))[:, :, None]


def sky(rng, scale):
    """An image of clouds."""
    down = np.linspace(0, 1, scale)[:, None, None]
    blue = (1 - down) * (104, 160, 222) + down * (222, 234, 244)
    cloud = 0.6 * mottling(rng, scale, 5) + 0.3 * mottling(rng, scale, 13) - 0.2
    return to_image(blue + (250 - blue) * np.clip(cloud, 0, 0.75))


def masonry(rng, scale, color, kind):
    """An image full of the blocks that BLOCKS lists, or of plaster."""
    light = 1 + 0.03 * mottling(rng, scale, 6) + 0.015 * mottling(rng, scale, 48)
    columns, rows, contrast, mortar = BLOCKS.get(kind, (1, 1, 0, 0))
    y, x = (axis[..., None] / scale for axis in np.ogrid[:scale, :scale])
    y, x = y * rows, x * columns + 0.5 * ((y * rows).astype(int) % 2)
    value = rng.standard_normal((rows, columns + 1))[y.astype(int), x.astype(int)]
    wall, x, y = light * (1 + contrast * value) * color, x % 1, y % 1
    if kind == "tiles":
        return to_image(wall * (1.1 - 0.3 * y) * (0.85 + 0.22 * np.sin(np.pi * x)))
    joint = (x < 0.0025 * columns) | (y < 0.0025 * rows)
    return to_image(np.where(joint, 0.6 * wall + mortar, wall))


def draw_photo(scene, size, rng):
    """y: the photograph of the scene, an RGB image of size x size pixels."""
    photo = Photo(scene, size * OVERSAMPLING, rng)
    for kind, box, shape in scene.parts:
        getattr(photo, kind)(snap(box, size), shape)
    image = np.asarray(photo.image.resize((size, size), Image.Resampling.BOX))
    light = 1 + scene.light * np.linspace(0.04, -0.04, size)[:, None]
    return to_image(image * light + 3 * rng.standard_normal((size, size, 1)))


class Photo:
    """A canvas, and one method for each kind of part."""

    def __init__(self, scene, scale, rng):
        self.scene, self.scale, self.rng = scene, scale, rng
        self.trim, self.accent = scene.trim, scene.accent
        self.image = sky(rng, scale)
        self.canvas = ImageDraw.Draw(self.image, "RGBA")
        self.bricks = masonry(rng, scale, scene.wall, scene.texture)
        self.tiles = masonry(rng, scale, scene.roof, "tiles")
        self.leaves = to_image((1 + 0.2 * mottling(rng, scale, 110)) * (78, 142, 64))

    def fill(self, box, color, shape="rect", light=1.0, alpha=255):
        """Paint a shape. light: brightness of the color; alpha: 255 hides what is behind."""
        color = np.clip(np.multiply(color, light), 0, 255).astype(int)
        self.canvas.polygon(corners(box, shape, self.scale), fill=(*color, alpha))

    def columns(self, box, edges, width, color, **look):
        """Vertical bars whose left edges are at `edges`."""
        for x in edges:
            self.fill((x, box[1], x + width, box[3]), color, **look)

    def rows(self, box, edges, height, color, **look):
        """Horizontal bars whose upper edges are at `edges`."""
        for y in edges:
            self.fill((box[0], y, box[2], y + height), color, **look)

    def shadow(self, box, reach, shape="rect"):
        """Darken the wall behind a part that stands out by `reach`."""
        limits = 0.5 - self.scene.half, 0.5 + self.scene.half
        for share in (0.4, 0.7, 1.0):  # three thin layers give a soft edge
            dx, dy = 0.6 * self.scene.light * share * reach, share * reach
            x0, x1 = np.clip((box[0] + dx, box[2] + dx), *limits)
            self.fill((x0, box[1] + dy, x1, box[3] + dy), DARK, shape, alpha=42)

    def paste(self, box, image, shape):
        """The part of an image as large as the canvas that lies inside a shape."""
        mask = Image.new("L", self.image.size)
        ImageDraw.Draw(mask).polygon(corners(box, shape, self.scale), fill=255)
        self.image.paste(image, mask=mask)

    def glass(self, box, shape="rect"):
        """A pane that reflects the sky: bright above, dark below."""
        self.fill(box, (150, 190, 222), shape)
        for top in np.linspace(0.05, 0.8, 14):
            self.fill(inside(box, top=top), (30, 40, 64), shape, alpha=30)

    def ledge(self, box, shape="rect", reach=0.018):
        """A part of stone that stands out, lit from above."""
        lower = (0.2, 0.4, 0.8, 0.85) if shape == "gable" else (0, 0.55, 1, 1)
        self.shadow(box, reach, shape)
        self.fill(box, self.trim, shape)
        self.fill(inside(box, *lower), self.trim, shape, light=0.8)

    cornice = sill = ledge

    def street(self, box, shape):
        self.fill(box, (150, 146, 142))
        self.columns(box, np.arange(0, 1, 0.07), 0.003, (126, 122, 118))
        self.fill(inside(box, top=0.6), (186, 182, 176))  # curb
        self.fill(inside(box, top=0.72), (96, 96, 102))

    def wall(self, box, shape):
        self.paste(box, self.bricks, shape)

    def roof(self, box, shape):
        self.shadow(box, 0.02, shape)
        self.paste(box, self.tiles, shape)

    def chimney(self, box, shape):
        self.fill(box, (150, 84, 66))
        self.rows(box, np.arange(box[1], box[3], 0.011), 0.002, (186, 150, 134))
        self.fill(inside(box, left=-0.1, right=1.1, bottom=0.13), (108, 62, 52))

    def pillar(self, box, shape):
        self.shadow(box, 0.01)
        self.fill(box, self.trim)
        for top in (0.04, 0.9):  # capital and base
            self.ledge(inside(box, -0.2, top, 1.2, top + 0.06), reach=0.004)

    def window(self, box, shape):
        frame, glass = self.scene.frame, grow(box, -0.006)
        self.fill(grow(box, 0.01), self.trim, shape)
        self.fill(box, frame, shape, light=0.95)
        self.glass(glass, shape)
        if shape != "round" and self.rng.random() < 0.3:  # curtains
            self.fill(inside(glass, top=0.35, right=0.3), (246, 240, 226), alpha=150)
            self.fill(inside(glass, top=0.35, left=0.7), (246, 240, 226), alpha=150)
        across, down = (2, 2) if shape == "round" else self.scene.panes
        self.columns(glass, np.linspace(*glass[::2], across + 1)[1:-1] - 0.002, 0.004, frame)
        self.rows(glass, np.linspace(*glass[1::2], down + 1)[1:-1] - 0.002, 0.004, frame)
        if shape == "rect":  # the wall's thickness throws a shadow on the glass
            self.rows(box, [box[1]], 0.012, DARK, alpha=90)

    def shutter(self, box, shape):
        self.shadow(box, 0.008)
        self.fill(box, self.accent)
        slats = np.arange(box[1] + 0.01, box[3] - 0.008, 0.011)
        self.rows(grow(box, -0.005), slats, 0.004, self.accent, light=0.7)

    def balcony(self, box, shape):
        rail, stone = inside(box, bottom=0.8), self.scene.texture == "stone"
        color, step, bar = (self.trim, 0.02, 0.011) if stone else ((44, 44, 50), 0.014, 0.005)
        self.fill(rail, DARK, alpha=60)
        self.columns(rail, np.arange(rail[0], rail[2] - bar, step), bar, color, light=0.92)
        self.rows(rail, [rail[1]], 0.012, color)
        self.ledge(inside(box, top=0.8), reach=0.035)

    def door(self, box, shape):
        self.fill(inside(box, -0.13, -0.08, 1.13), self.trim, shape)
        self.fill(box, self.accent, shape)
        self.glass(inside(box, 0.1, 0.07, 0.9, 0.32), shape)
        self.fill(inside(box, left=0.48, right=0.52), self.accent, light=0.6)
        for left, top in ((0.1, 0.37), (0.1, 0.68), (0.58, 0.37), (0.58, 0.68)):
            self.fill(inside(box, left, top, left + 0.32, top + 0.25), self.accent, light=0.72)
        self.fill(inside(box, left=-0.15, right=1.15, top=0.94), (190, 186, 180))  # step

    def shop(self, box, shape):
        pane, goods = grow(box, -0.012), ((204, 84, 70), (230, 180, 80), (110, 150, 96))
        self.fill(box, self.accent, light=0.85)
        self.glass(pane)
        self.fill(pane, (255, 214, 130), alpha=70)  # lamps inside
        shelf = inside(pane, top=0.78)
        for x in np.arange(pane[0] + 0.01, pane[2] - 0.018, 0.024):
            height = self.rng.uniform(0.014, 0.034)
            self.fill((x, shelf[1] - height, x + 0.016, shelf[1]), goods[self.rng.integers(3)])
        self.fill(shelf, self.accent, light=0.65)

    def awning(self, box, shape):
        x0, y0, x1, y1 = box
        self.shadow(box, 0.03)
        stripes = max(3, round((x1 - x0) / 0.026)) // 2 * 2 + 1
        for number, (left, right) in enumerate(pairwise(np.linspace(x0, x1, stripes + 1))):
            color = (246, 242, 232) if number % 2 else self.accent
            self.fill((left, y0, right, y1 - 0.012), color)
            self.fill((left, y1 - 0.024, right, y1), color, "round", light=0.88)

    def plant(self, box, shape):
        x0, y0, x1, y1 = box
        self.paste(box, self.leaves, shape)
        if shape == "round":  # a tree
            for top in np.linspace(0.3, 0.8, 6):
                self.fill(inside(box, top=top), DARK, "round", alpha=16)
        else:  # flowers in a window box
            for x in np.arange(x0, x1 - 0.009, 0.01):
                y = self.rng.uniform(y0, max(y0, y1 - 0.024))
                self.fill((x, y, x + 0.01, y + 0.01), (214, 52, 66), "round")
            self.fill((x0, y1 - 0.016, x1, y1), (136, 84, 58))


def write_scene(folder, seed, size, split, number):
    """Write the files of one scene."""
    first, files = SPLITS[split]
    scene = Scene(seed, first + number)
    sides = {"x": draw_labels(scene, size)}
    if split != "unpaired x":  # a photograph takes most of the time
        sides["y"] = draw_photo(scene, size, np.random.default_rng([seed, first + number, 1]))
    for place, content in files.items():
        (folder / place).mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(np.hstack([sides[side] for side in content]))
        image.save(folder / place / f"{number + 1:04d}.png", compress_level=1)


def parse_args(argv=None):
    here, about = Path(__file__).resolve().parent, __doc__.splitlines()[0]
    parser = argparse.ArgumentParser("make_toy.py", description=about, allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, f"make_toy.py: error: {message}\n")
    flag = parser.add_argument
    flag("--count", type=int, default=300, help="training images [%(default)s]")
    flag("--test-count", type=int, default=30, help="images in val and in test each [%(default)s]")
    flag("--size", type=int, default=256, help="side of x and of y, in pixels [%(default)s]")
    flag("--seed", type=int, default=0, help="another seed generates other scenes [%(default)s]")
    flag("--root", type=Path, default=here, help="where to write both datasets [datasets/]")
    flag("--overwrite", action="store_true", help="replace datasets that exist [stop]")
    args = parser.parse_args(argv)
    for name, lowest in {"count": 1, "test_count": 1, "size": 32, "seed": 0}.items():
        if (value := getattr(args, name)) < lowest:
            parser.error(f"--{name.replace('_', '-')} is {value}; expected {lowest} or more")
    return parser, args


def main(argv=None):
    parser, args = parse_args(argv)
    counts = {"val": args.test_count, "test": args.test_count}
    scenes = [(split, n) for split in SPLITS for n in range(counts.get(split, args.count))]
    targets = [args.root / "toy", args.root / "toy_unpaired"]
    for target in targets:
        if target.exists() and not args.overwrite:
            parser.error(f"{target} exists; --overwrite replaces it")
    try:
        with replacing(*targets) as folder:
            for split, number in tqdm(scenes, "generating", unit="scene"):
                write_scene(folder, args.seed, args.size, split, number)
    except OSError as error:
        parser.error(f"cannot write in {args.root}: {error}")
    except KeyboardInterrupt:
        parser.exit(130, "make_toy.py: interrupted; nothing was written\n")
    print(f"{args.count} training and {args.test_count} test scenes in", *targets, sep="\n  ")


if __name__ == "__main__":
    main()

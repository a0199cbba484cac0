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
import os
import signal
import tempfile
from itertools import pairwise
from multiprocessing import Pool
from pathlib import Path

import numpy as np
from PIL import Image, ImageColor, ImageDraw
from tqdm import tqdm

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
STEPS = [(i // 2 / 9, 1 - (i + 1) // 2 / 4) for i in range(8)]
SHAPES = {  # corners in a box from (0, 0), the top left, to (1, 1)
    "rect": [(0, 0), (1, 0), (1, 1), (0, 1)],
    "gable": [(0, 1), (0.5, 0), (1, 1)],
    "chevron": [(0, 0.73), (0.5, 0), (1, 0.73), (1, 1), (0.5, 0.27), (0, 1)],
    "hip": [(0, 1), (0.14, 0), (0.86, 0), (1, 1)],
    "mansard": [(0, 1), (0.06, 0), (0.94, 0), (1, 1)],
    "steps": STEPS + [(1 - x, y) for x, y in reversed(STEPS)],
}
# Blocks along a side of the image, courses, how much they differ, brightness added to the joints.
BONDS = {"brick": (32, 80, 0.09, 90), "stone": (12, 24, 0.03, 42)}
# The splits begin far apart, so that --count never changes the test scenes.
SETS = ("toy", "toy_unpaired")
FIRST_SCENE = {"train": 0, "val": 1_000_000, "test": 2_000_000, "unpaired x": 3_000_000}
GROUND = 0.94  # height at which building and street meet; lengths are fractions of the image
OVERSAMPLING = 2  # photographs are painted this many times larger, then averaged

# ---- Boxes (left, top, right, bottom) in [0, 1] ------------------------------------------------


def around(x, half, top, bottom):
    """The box centered on x."""
    return x - half, top, x + half, bottom


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
    """The corners in pixels of a shape that fills the box."""
    x0, y0, x1, y1 = box
    width, height = x1 - x0, y1 - y0
    if shape in SHAPES:
        xs, ys = np.array(SHAPES[shape]).T * [[width], [height]] + [[x0], [y0]]
    elif shape == "round":
        turn = np.linspace(0, 2 * np.pi, 24, endpoint=False)
        xs = (x0 + x1) / 2 + width / 2 * np.cos(turn)
        ys = (y0 + y1) / 2 + height / 2 * np.sin(turn)
    else:  # arch
        rise, turn = min(0.3 * height, 0.5 * width), np.linspace(np.pi, 0, 13)
        xs = [x0, *(x0 + x1) / 2 + width / 2 * np.cos(turn), x1]
        ys = [y1, *y0 + rise - rise * np.sin(turn), y1]
    xs, ys = [round(x * scale) for x in xs], [round(y * scale) for y in ys]
    # Pillow also fills the last row and column, so the edges beyond the middle step back by 1.
    middle_x, middle_y = (min(xs) + max(xs)) / 2, (min(ys) + max(ys)) / 2
    return [(x - (x > middle_x), y - (y > middle_y)) for x, y in zip(xs, ys, strict=True)]


# ---- Scenes: what a house is made of -----------------------------------------------------------


class Scene:
    """A house. parts: (kind, box, shape), kind a key of PALETTE, in the order they are painted."""

    def __init__(self, seed, index):
        self.parts, self.rng = [], np.random.default_rng([seed, index])
        rng, style = self.rng, self.rng.integers(len(STYLES))
        self.texture, self.window, self.panes, roofs, self.extras = STYLES[style]
        roof = self.choose(roofs.split())
        narrow = roof in ("gable", "steps")
        margin = rng.uniform(0.13, 0.19) if narrow else rng.uniform(0.06, 0.11)
        eaves = rng.uniform(0.34, 0.38) if narrow else rng.uniform(0.22, 0.28)
        self.body = (margin, eaves, 1 - margin, GROUND)
        bays = 3 if narrow else rng.integers(3, 6)
        floors = 3 if narrow else rng.integers(3, 5)
        self.edges = np.linspace(margin + 0.02, 1 - margin - 0.02, bays + 1)
        self.bay, self.middles = (
            self.edges[1] - self.edges[0],
            (self.edges[:-1] + self.edges[1:]) / 2,
        )
        ground = eaves + (GROUND - eaves) * (floors - 1) / (floors + 0.2)  # top of the lowest floor
        levels = np.linspace(eaves, ground, floors)
        self.add("street", (0, GROUND, 1, 1))
        self.plan_roof(roof)
        self.plan_ornament(levels, narrow)
        balcony_floor = rng.integers(floors - 1) if "balcony" in self.extras else -1
        for floor, (top, bottom) in enumerate(pairwise(levels)):
            self.plan_floor(top, bottom, floor == balcony_floor)
        self.plan_ground_floor(ground)
        for x in (margin / 2, 1 - margin / 2):
            if rng.random() < 0.6:
                half, height = rng.uniform(0.5, 0.75) * margin, rng.uniform(0.12, 0.3)
                tree = around(x, half, GROUND + 0.01 - height, GROUND + 0.01)
                self.add("plant", tree, "round")
        *colors, walls, accents = COLORS[style]
        colors += [self.choose(walls.split()), self.choose(accents.split())]
        self.trim, self.roof, self.frame, self.wall, self.accent = map(ImageColor.getrgb, colors)
        self.light = self.choose([-1, 1])  # 1: the sun is on the left, -1: on the right

    def add(self, kind, box, shape="rect"):
        self.parts.append((kind, box, shape))

    def choose(self, options):
        return options[self.rng.integers(len(options))]

    def plan_roof(self, shape):
        """The roof and what stands behind the edge of the wall, then the wall itself."""
        left, eaves, right, _ = self.body
        width, rng = right - left, self.rng
        if shape == "steps":
            self.add("wall", (left, 0.12, right, eaves), "steps")
            for i in range(3):
                x, y = left + i * width / 9, eaves - (i + 1) * (eaves - 0.12) / 4
                x0, x1 = x - 0.01, x + width / 9 + 0.015
                self.add("cornice", (x0, y, x1, y + 0.02))
                self.add("cornice", (1 - x1, y, 1 - x0, y + 0.02))
            self.add("cornice", around(0.5, width / 6 + 0.015, 0.12, 0.14))
        elif shape == "gable":
            self.add("wall", (left, 0.15, right, eaves), "gable")
        else:
            top = eaves - rng.uniform(0.13, 0.16)
            for x in rng.choice([0.2, 0.35, 0.65, 0.8], size=2, replace=False):
                self.add("chimney", around(left + x * width, 0.025, top - 0.06, top + 0.05))
            self.add("roof", (left - 0.03, top, right + 0.03, eaves), shape)
            count, y = rng.integers(2, 4), top + 0.3 * (eaves - top)
            for x in np.linspace(left, right, 2 * count + 1)[1::2]:  # dormers
                self.add("cornice", around(x, 0.06, y - 0.04, y + 0.01), "gable")
                self.add("window", around(x, 0.045, y + 0.005, eaves - 0.02))
        self.add("wall", self.body)
        if shape == "gable":
            self.add("roof", (left - 0.05, 0.1, right + 0.05, eaves + 0.05), "chevron")

    def plan_ornament(self, levels, narrow):
        left, eaves, right, _ = self.body
        if "pillar" in self.extras:
            for x in (left + 0.02, *self.edges[1:-1], right - 0.02):
                self.add("pillar", around(x, 0.016, eaves, levels[-1]))
        if "belt" in self.extras:
            for y in levels[1:]:
                self.add("cornice", (left - 0.008, y - 0.012, right + 0.008, y + 0.012))
        if narrow:
            self.add("window", around(0.5, 0.05, eaves - 0.11, eaves - 0.01), "round")
        else:
            self.add("cornice", (left - 0.025, eaves - 0.018, right + 0.025, eaves + 0.022))

    def plan_window(self, x, half, top, bottom, sill=True):
        self.add("window", around(x, half, top, bottom), self.window)
        if sill:
            self.add("sill", around(x, half + 0.015, bottom, bottom + 0.02))

    def plan_floor(self, top, bottom, balcony):
        height, extras = bottom - top, self.extras
        half = min((0.22 if "shutter" in extras else 0.28) * self.bay, 0.085)
        y0, y1 = top + 0.24 * height, bottom - (0.06 if balcony else 0.18) * height
        joined = self.rng.random() < 0.5  # one balcony along the whole front
        rail = bottom - 0.36 * height, bottom - 0.02 * height
        for x in self.middles:
            self.plan_window(x, half, y0, y1, sill=not balcony)
            if "pediment" in extras and not balcony:
                self.add("cornice", around(x, half + 0.02, y0 - 0.035, y0), "gable")
            if "shutter" in extras:
                width = 0.5 * half + 0.01
                self.add("shutter", (x - half - width, y0, x - half, y1))
                self.add("shutter", (x + half, y0, x + half + width, y1))
            if balcony and not joined:
                self.add("balcony", around(x, 0.42 * self.bay, *rail))
            if "flowers" in extras and not balcony and self.rng.random() < 0.5:
                self.add("plant", around(x, half, y1 - 0.03, y1 + 0.008))
        if balcony and joined:
            self.add("balcony", (self.edges[0], rail[0], self.edges[-1], rail[1]))

    def plan_ground_floor(self, top):
        height, entrance = GROUND - top, self.rng.integers(len(self.middles))
        shops = "shop" in self.extras and self.rng.random() < 0.7
        for number, x in enumerate(self.middles):
            if number == entrance:
                half = min(0.3 * self.bay, 0.07)
                self.add("door", around(x, half, top + 0.24 * height, GROUND), "arch")
            elif shops:
                shop = around(x, 0.44 * self.bay, top + 0.16 * height, GROUND - 0.008)
                self.add("shop", shop)
                self.add("awning", inside(shop, left=-0.04, right=1.04, bottom=0.36))
            else:
                half = min(0.25 * self.bay, 0.08)
                self.plan_window(x, half, top + 0.26 * height, GROUND - 0.3 * height)


def draw_labels(scene, size):
    """x: the label map, an RGB image of size x size pixels that has only colors of PALETTE."""
    scale = size * OVERSAMPLING
    image = Image.new("RGB", (scale, scale), PALETTE["sky"])
    draw = ImageDraw.Draw(image)
    for kind, box, shape in scene.parts:
        draw.polygon(corners(snap(box, size), shape, scale), fill=PALETTE[kind])
    return image.resize((size, size), Image.Resampling.NEAREST)


# ---- Textures (scale, scale) that a photograph is made of --------------------------------------


def to_image(array):
    return Image.fromarray(np.clip(array, 0, 255).astype(np.uint8))


def mottling(rng, scale, cells):
    """Smooth noise (scale, scale, 1), about -1 to 1, with `cells` bumps along each side."""
    coarse = Image.fromarray(rng.standard_normal((cells, cells), np.float32))
    return np.asarray(coarse.resize((scale, scale), Image.Resampling.BICUBIC))[:, :, None]


def sky_texture(rng, scale):
    down = np.linspace(0, 1, scale, dtype=np.float32)[:, None, None]
    high, low = np.array([(104, 160, 222), (222, 234, 244)], np.float32)
    cloud = mottling(rng, scale, 5) + 0.5 * mottling(rng, scale, 13)
    cloud = np.clip(0.6 * cloud - 0.2, 0, 0.75)
    return to_image(((1 - down) * high + down * low) * (1 - cloud) + 250 * cloud)


def blocks(rng, scale, columns, rows):
    """Rows of blocks: a random value of each one, (scale, scale, 1), and x and y within it."""
    y, x = np.arange(scale, dtype=np.float32)[:, None, None], np.arange(scale, dtype=np.float32)
    y, x = y / scale * rows, x[:, None] / scale * columns
    row = y.astype(np.int32)
    x = x + 0.5 * (row % 2).astype(np.float32)
    value = rng.standard_normal((rows, columns + 1), np.float32)
    return value[row, x.astype(np.int32)], x % 1, y % 1


def wall_texture(rng, scale, color, kind):
    light = 1 + 0.03 * mottling(rng, scale, 6) + 0.015 * mottling(rng, scale, 48)
    wall = light * np.array(color, np.float32)
    if kind in BONDS:
        columns, rows, contrast, mortar = BONDS[kind]
        value, x, y = blocks(rng, scale, columns, rows)
        joint = (x < 0.0025 * columns) | (y < 0.0025 * rows)
        wall = np.where(joint, 0.6 * wall + mortar, wall * (1 + contrast * value))
    return to_image(wall)


def roof_texture(rng, scale, color):
    value, x, y = blocks(rng, scale, 48, 56)
    light = (1.1 - 0.3 * y) * (0.85 + 0.22 * np.sin(np.pi * x)) * (1 + 0.07 * value)
    return to_image(light * np.array(color, np.float32))


# ---- Photographs -------------------------------------------------------------------------------


def shade(color, factor):
    return tuple(int(min(255, max(0, c * factor))) for c in color)


def dark(alpha):
    return 20, 16, 30, alpha


def draw_photo(scene, size, rng):
    """y: the photograph of the scene, an RGB image of size x size pixels."""
    photo = Photo(scene, size * OVERSAMPLING, rng)
    for kind, box, shape in scene.parts:
        getattr(photo, kind)(snap(box, size), shape)
    image = photo.image.resize((size, size), Image.Resampling.BOX)
    light = 1 + scene.light * np.linspace(0.04, -0.04, size, dtype=np.float32)[:, None]
    return to_image(
        np.asarray(image) * light + rng.standard_normal((size, size, 1), np.float32) * 3
    )


class Photo:
    """A canvas, and one method for each kind of part. A color may have an alpha, 0 to 255."""

    def __init__(self, scene, scale, rng):
        self.scene, self.scale, self.rng = scene, scale, rng
        self.trim, self.accent = scene.trim, scene.accent
        self.image = sky_texture(rng, scale)
        self.canvas = ImageDraw.Draw(self.image, "RGBA")
        self.wall_texture = wall_texture(rng, scale, scene.wall, scene.texture)
        self.roof_texture = roof_texture(rng, scale, scene.roof)

    def fill(self, box, color, shape="rect"):
        self.canvas.polygon(corners(box, shape, self.scale), fill=color)

    def columns(self, box, edges, width, color):
        """Vertical bars whose left edges are at `edges`."""
        for x in edges:
            self.fill((x, box[1], x + width, box[3]), color)

    def rows(self, box, edges, height, color):
        """Horizontal bars whose upper edges are at `edges`."""
        for y in edges:
            self.fill((box[0], y, box[2], y + height), color)

    def side(self, box, width, color, lit=True):
        """A strip along the side of the box that faces the sun, or along the other one."""
        left = (self.scene.light > 0) == lit
        self.columns(box, [box[0] if left else box[2] - width], width, color)

    def shadow(self, box, reach, shape="rect"):
        """Darken the wall behind a part that stands out by `reach`."""
        left, _, right, _ = self.scene.body
        for share in (0.4, 0.7, 1.0):  # three thin layers give a soft edge
            dx, dy = 0.6 * self.scene.light * share * reach, share * reach
            x0, x1 = np.clip((box[0] + dx, box[2] + dx), left, right)
            self.fill((x0, box[1] + dy, x1, box[3] + dy), dark(42), shape)

    def paste(self, box, texture, shape):
        """The part of a texture that lies inside a shape."""
        mask = Image.new("L", self.image.size)
        ImageDraw.Draw(mask).polygon(corners(box, shape, self.scale), fill=255)
        self.image.paste(texture, mask=mask)

    def glass(self, box, shape="rect"):
        """A pane that reflects the sky, bright above and dark below, with a streak of light."""
        x0, y0, x1, y1 = (round(v * self.scale) for v in box)
        v, u = np.mgrid[: max(y1 - y0, 1), : max(x1 - x0, 1)].astype(np.float32)[..., None]
        u, v = u / u.shape[1], v / v.shape[0]
        u = u if self.scene.light > 0 else 1 - u
        depth = np.clip(0.75 * v + 0.25 * u + self.rng.normal(0, 0.06), 0, 1)
        pane = (1 - depth) * np.array((142, 182, 216)) + depth * np.array((30, 40, 64))
        pane += 26 * (np.abs(u + 0.6 * v - self.rng.uniform(0.4, 0.9)) < 0.12)
        texture = Image.new("RGB", self.image.size)
        texture.paste(to_image(pane), (x0, y0))
        self.paste(box, texture, shape)

    def street(self, box, shape):
        x0, y0, x1, _ = box
        self.fill(box, (96, 96, 102))
        pavement = (x0, y0, x1, y0 + 0.036)
        self.fill(pavement, (150, 146, 142))
        self.columns(pavement, np.arange(0, 1, 0.07), 0.003, (126, 122, 118))
        self.fill((x0, y0 + 0.036, x1, y0 + 0.043), (186, 182, 176))  # curb

    def wall(self, box, shape):
        self.paste(box, self.wall_texture, shape)
        if shape == "rect":
            self.fill(inside(box, top=0.95), (*shade(self.scene.wall, 0.55), 150))  # plinth
            self.side(box, 0.012, dark(50), lit=False)

    def roof(self, box, shape):
        if shape == "chevron":
            self.shadow(box, 0.02, shape)
        self.paste(box, self.roof_texture, shape)
        if shape != "chevron":
            inset = SHAPES[shape][1][0] - 0.005
            ridge = inside(box, left=inset, right=1 - inset, bottom=0.08)
            self.fill(ridge, shade(self.scene.roof, 0.75))

    def chimney(self, box, shape):
        self.fill(box, (150, 84, 66))
        self.rows(box, np.arange(box[1], box[3], 0.011), 0.002, (186, 150, 134))
        self.side(box, 0.02, dark(60), lit=False)
        self.fill(inside(box, left=-0.1, right=1.1, bottom=0.13), (108, 62, 52))

    def cornice(self, box, shape):
        self.shadow(box, 0.018, shape)
        self.fill(box, self.trim, shape)
        if shape == "gable":
            self.fill(inside(box, 0.2, 0.4, 0.8, 0.85), shade(self.trim, 0.8), "gable")
        else:
            self.fill(inside(box, top=0.6), shade(self.trim, 0.8))
            self.fill(inside(box, bottom=0.2), shade(self.trim, 1.08))

    def pillar(self, box, shape):
        self.shadow(box, 0.01)
        self.fill(box, shade(self.trim, 0.94))
        self.side(box, 0.008, shade(self.trim, 1.06))
        self.side(box, 0.008, shade(self.trim, 0.74), lit=False)
        ends = grow(box, 0.006)
        self.rows(ends, (ends[1] + 0.018, ends[3] - 0.034), 0.016, self.trim)

    def window(self, box, shape):
        frame, glass = self.scene.frame, grow(box, -0.006)
        self.fill(grow(box, 0.01), self.trim, shape)
        self.fill(box, shade(frame, 0.95), shape)
        self.glass(glass, shape)
        if self.rng.random() < 0.3:  # curtains
            share = self.rng.uniform(0.2, 0.35)
            self.fill(inside(glass, top=0.35, right=share), (246, 240, 226, 150))
            self.fill(inside(glass, top=0.35, left=1 - share), (246, 240, 226, 150))
        x0, y0, x1, y1 = glass
        across, down = (2, 2) if shape == "round" else self.scene.panes
        self.columns(glass, np.linspace(x0, x1, across + 1)[1:-1] - 0.002, 0.004, frame)
        self.rows(glass, np.linspace(y0, y1, down + 1)[1:-1] - 0.002, 0.004, frame)
        if shape == "rect":  # the wall's thickness throws a shadow on the glass
            self.rows(box, [box[1]], 0.012, dark(90))
            self.side(box, 0.007, dark(70))

    def sill(self, box, shape):
        self.shadow(box, 0.018)
        self.fill(box, self.trim)
        self.fill(inside(box, top=0.5), shade(self.trim, 0.82))

    def shutter(self, box, shape):
        self.shadow(box, 0.008)
        self.fill(box, self.accent)
        slats = np.arange(box[1] + 0.01, box[3] - 0.008, 0.011)
        self.rows(grow(box, -0.005), slats, 0.004, shade(self.accent, 0.7))
        self.rows(box, [box[1]], 0.004, shade(self.accent, 1.25))

    def balcony(self, box, shape):
        x0, y0, x1, y1 = box
        rail, slab = (x0, y0, x1, y1 - 0.022), (x0, y1 - 0.022, x1, y1)
        stone = self.scene.texture == "stone"
        color, step, bar = (self.trim, 0.02, 0.011) if stone else ((44, 44, 50), 0.014, 0.005)
        self.shadow(slab, 0.035)
        self.fill(rail, dark(60))
        self.columns(rail, np.arange(x0, x1 - bar, step), bar, shade(color, 0.92))
        self.rows(rail, [y0], 0.012, color)
        self.fill(slab, shade(self.trim, 0.95))
        self.fill(inside(slab, top=0.6), shade(self.trim, 0.72))

    def door(self, box, shape):
        self.fill(inside(box, -0.13, -0.08, 1.13), self.trim, "arch")
        self.fill(box, self.accent, "arch")
        self.glass(inside(box, 0.1, 0.07, 0.9, 0.32), "arch")
        self.fill(inside(box, left=0.48, right=0.52), shade(self.accent, 0.6))
        for left, top in ((0.1, 0.37), (0.1, 0.68), (0.58, 0.37), (0.58, 0.68)):
            panel = inside(box, left, top, left + 0.32, top + 0.25)
            self.fill(panel, shade(self.accent, 0.72))
            self.fill(grow(panel, -0.004), shade(self.accent, 1.2))
        self.fill(inside(box, 0.52, 0.63, 0.6, 0.67), (226, 190, 96))  # knob
        self.fill(inside(box, left=-0.15, right=1.15, top=0.94), (190, 186, 180))  # step

    def shop(self, box, shape):
        pane, goods = grow(box, -0.012), ((204, 84, 70), (230, 180, 80), (110, 150, 96))
        self.fill(box, shade(self.accent, 0.85))
        self.glass(pane)
        self.fill(pane, (255, 214, 130, 70))  # lamps inside
        shelf = inside(pane, top=0.78)
        for x in np.arange(pane[0] + 0.01, pane[2] - 0.018, 0.024):
            height = self.rng.uniform(0.014, 0.034)
            self.fill((x, shelf[1] - height, x + 0.016, shelf[1]), goods[self.rng.integers(3)])
        self.fill(shelf, shade(self.accent, 0.65))
        self.columns(pane, [(pane[0] + pane[2]) / 2 - 0.003], 0.006, self.accent)

    def awning(self, box, shape):
        x0, y0, x1, y1 = box
        self.shadow(box, 0.03)
        stripes = max(3, round((x1 - x0) / 0.026)) // 2 * 2 + 1
        for number, (left, right) in enumerate(pairwise(np.linspace(x0, x1, stripes + 1))):
            color = (246, 242, 232) if number % 2 else shade(self.accent, 1.15)
            self.fill((left, y0, right, y1 - 0.012), color)
            self.fill((left, y1 - 0.024, right, y1), shade(color, 0.88), "round")
        self.rows(box, [y0], 0.008, dark(60))

    def plant(self, box, shape):
        """A tree where the shape is round, else a window box with flowers."""
        x0, y0, x1, y1 = box
        rng, x, y = self.rng, (x0 + x1) / 2, (y0 + y1) / 2
        if shape == "round":
            self.fill(around(x, 0.2 * (x1 - x0), y1 - 0.01, y1 + 0.008), dark(70), "round")
            self.fill(box, (46, 96, 48), "round")
            for turn, reach, light in rng.random((140, 3)):
                u, v = (f(2 * np.pi * turn) * np.sqrt(0.9 * reach) for f in (np.cos, np.sin))
                bright = 0.85 + 0.3 * light - 0.35 * v - 0.25 * u * self.scene.light
                leaf_x, leaf_y = x + u * (x1 - x), y + v * (y1 - y)
                leaf = around(leaf_x, 0.009, leaf_y - 0.007, leaf_y + 0.007)
                self.fill(leaf, shade((70, 128, 60), bright), "round")
            return
        self.fill((x0, y1 - 0.016, x1, y1), (136, 84, 58))
        for color, width in (((62, 120, 56), 0.016), ((214, 52, 66), 0.01)):
            for x in np.arange(x0, x1 - 0.006, 0.01):
                y = rng.uniform(y0, y1 - 0.024)
                self.fill((x, y, min(x + width, x1), y + width), color, "round")


# ---- Files and flags ---------------------------------------------------------------------------


def write_scene(job):
    """Write one scene's files in both datasets; runs in a worker process."""
    folder, seed, size, split, number = job
    index, name = FIRST_SCENE[split] + number, f"{number + 1:04d}.png"
    scene = Scene(seed, index)
    x, files = draw_labels(scene, size), {}
    if split == "unpaired x":
        files["toy_unpaired/train/x"] = x
    else:
        y = draw_photo(scene, size, np.random.default_rng([seed, index, 1]))
        files[f"toy/{split}"] = Image.fromarray(np.hstack([y, x]))
    if split in ("train", "test"):
        files[f"toy_unpaired/{split}/y"] = y
    if split == "test":
        files["toy_unpaired/test/x"] = x
    for place, image in files.items():
        (folder / place).mkdir(parents=True, exist_ok=True)
        image.save(folder / place / name, compress_level=1)


def write_sets(args):
    """Write both datasets next to their final places, and move them there when they are whole."""
    args.root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".make_toy-", dir=args.root) as aside:
        aside, jobs = Path(aside), []
        for split in FIRST_SCENE:
            count = args.test_count if split in ("val", "test") else args.count
            jobs += [(aside, args.seed, args.size, split, number) for number in range(count)]
        # The main process alone answers Ctrl-C.
        with Pool(min(os.cpu_count(), 8), signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
            done = pool.imap_unordered(write_scene, jobs, chunksize=4)
            list(tqdm(done, "generating", len(jobs), unit="scene"))
        for name in SETS:
            if (args.root / name).exists():
                (args.root / name).rename(aside / f"old {name}")
            (aside / name).rename(args.root / name)


class Parser(argparse.ArgumentParser):
    """Reports an error as one line."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def parse_args(argv=None):
    here = Path(__file__).resolve().parent
    parser = Parser("make_toy.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    flag = parser.add_argument
    flag("--count", type=int, default=300, help="training images [%(default)s]")
    flag("--test-count", type=int, default=30, help="images in val and in test each [%(default)s]")
    flag("--size", type=int, default=256, help="side of x and of y, in pixels [%(default)s]")
    flag("--seed", type=int, default=0, help="another seed generates other scenes [%(default)s]")
    flag("--root", type=Path, default=here, help="where to write both datasets [datasets/]")
    flag("--overwrite", action="store_true", help="replace datasets that exist [stop]")
    args = parser.parse_args(argv)
    limits = {"count": (1, 9999), "test_count": (1, 9999), "size": (32, 2048), "seed": (0, 2**63)}
    for name, (low, high) in limits.items():
        if not low <= getattr(args, name) <= high:
            value = f"--{name.replace('_', '-')} is {getattr(args, name)}"
            parser.error(f"{value}; expected {low} to {high}")
    return args


def main(argv=None):
    args, parser = parse_args(argv), Parser("make_toy.py")
    for name in SETS:
        if (args.root / name).exists() and not args.overwrite:
            parser.error(f"{args.root / name} exists; --overwrite replaces it")
    try:
        write_sets(args)
    except OSError as error:
        parser.error(f"cannot write in {args.root}: {error}")
    except KeyboardInterrupt:
        parser.exit(130, f"{parser.prog}: interrupted; nothing was written\n")
    print(f"{args.count} training, {args.test_count} val and {args.test_count} test scenes in")
    print("\n".join(f"  {args.root / name}" for name in SETS))


if __name__ == "__main__":
    main()

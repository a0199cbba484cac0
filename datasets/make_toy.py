"""Draw a small facades set from nothing: flat label maps (x) and "photographs" of them (y).

    python datasets/make_toy.py
    python datasets/make_toy.py --count 100 --size 64 --seed 1 --root /tmp/toy

It writes, under --root,

    toy/{train,val,test}/0001.png             a pair side by side: left half y, right half x
    toy_unpaired/train/{x,y}/0001.png         label maps and photographs of different scenes
    toy_unpaired/test/{x,y}/0001.png          both sides of the scenes of toy/test

A scene depends on --seed and on its own index alone, never on --count, so a larger set begins with
the smaller one, and the same flags give the same bytes.
"""

import argparse
import os
import signal
import tempfile
from dataclasses import dataclass, replace
from itertools import pairwise
from multiprocessing import Pool
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

# Label colours, after the colour map of CMP facades: blue ground, warm ornaments.
PALETTE = {
    "sky": (0, 0, 150),
    "wall": (0, 60, 255),
    "window": (0, 180, 255),
    "door": (0, 255, 230),
    "sill": (90, 255, 150),
    "balcony": (180, 255, 60),
    "shutter": (255, 240, 0),
    "roof": (255, 170, 0),
    "cornice": (255, 85, 0),
    "awning": (255, 0, 60),
    "shop": (170, 0, 0),
    "pillar": (255, 0, 255),
    "chimney": (130, 60, 0),
    "plant": (0, 160, 40),
    "street": (90, 0, 140),
}
SETS = ("toy", "toy_unpaired")
# A split's scenes start at their own index, so that --count never moves the test scenes.
FIRST_SCENE = {"train": 0, "val": 1_000_000, "test": 2_000_000, "unpaired x": 3_000_000}
GROUND = 0.94  # height at which the building meets the street; lengths are fractions of the image
SLANT = {"hip": 0.14, "mansard": 0.06}  # how far a roof's sides lean in, in its widths
# Blocks along a side of the image, courses, how much they differ, brightness added to the joints.
BONDS = {"brick": (32, 80, 0.09, 90), "stone": (12, 24, 0.03, 42)}
OVERSAMPLING = 2  # a photograph is drawn this many times larger and then averaged


@dataclass(frozen=True)
class Style:
    """What makes a family of houses; its shapes show in the labels, so a network can tell them."""

    walls: tuple  # a scene takes one of these colours
    texture: str  # brick, plaster or stone
    trim: tuple  # cornices, sills, window surrounds
    roof: tuple
    frame: tuple  # window frames
    accents: tuple  # doors, shutters, shop fronts and awnings take one of these
    roofs: tuple  # shapes to choose from
    window: str  # shape of a window
    panes: tuple  # columns, rows
    extras: frozenset  # shutter, flowers, balcony, pillar, belt, pediment, shop


STYLES = (
    Style(
        walls=((172, 82, 62), (148, 70, 56), (186, 104, 72)),
        texture="brick",
        trim=(226, 214, 192),
        roof=(92, 98, 112),
        frame=(240, 238, 230),
        accents=((40, 84, 66), (34, 58, 96)),
        roofs=("steps", "hip"),
        window="arch",
        panes=(2, 3),
        extras=frozenset({"belt", "shop"}),
    ),
    Style(
        walls=((232, 188, 108), (226, 160, 128), (240, 220, 176)),
        texture="plaster",
        trim=(246, 238, 220),
        roof=(196, 100, 66),
        frame=(236, 232, 220),
        accents=((62, 112, 84), (70, 116, 142)),
        roofs=("hip",),
        window="rect",
        panes=(2, 2),
        extras=frozenset({"shutter", "flowers", "balcony", "shop"}),
    ),
    Style(
        walls=((214, 204, 182), (192, 188, 182)),
        texture="stone",
        trim=(232, 226, 212),
        roof=(96, 142, 130),
        frame=(84, 66, 54),
        accents=((104, 62, 42), (58, 46, 44)),
        roofs=("mansard",),
        window="rect",
        panes=(2, 2),
        extras=frozenset({"pillar", "belt", "balcony", "pediment"}),
    ),
    Style(
        walls=((176, 212, 190), (160, 192, 216), (238, 192, 196)),
        texture="plaster",
        trim=(250, 248, 242),
        roof=(150, 78, 66),
        frame=(252, 252, 250),
        accents=((168, 48, 48), (44, 74, 116)),
        roofs=("gable",),
        window="rect",
        panes=(2, 3),
        extras=frozenset({"flowers", "shop"}),
    ),
)


@dataclass(frozen=True)
class Part:
    """One labelled thing: kind is a key of PALETTE, box (left, top, right, bottom) in [0, 1]."""

    kind: str
    box: tuple
    shape: str = "rect"


@dataclass(frozen=True)
class Scene:
    style: Style
    wall: tuple  # colour
    accent: tuple  # colour
    light: int  # 1: the sun is on the left, -1: on the right
    body: tuple  # box of the wall below the roof
    parts: tuple  # in painting order


def outline(box, shape):
    """Corners of a shape that fills its box."""
    x0, y0, x1, y1 = box
    middle, width, height = (x0 + x1) / 2, x1 - x0, y1 - y0
    if shape == "gable":
        return [(x0, y1), (middle, y0), (x1, y1)]
    if shape == "chevron":
        thick = 0.27 * height
        upper = [(x0, y1 - thick), (middle, y0), (x1, y1 - thick)]
        return upper + [(x, y + thick) for x, y in reversed(upper)]
    if shape in SLANT:
        inset = SLANT[shape] * width
        return [(x0, y1), (x0 + inset, y0), (x1 - inset, y0), (x1, y1)]
    if shape == "steps":
        corners = [(i // 2 * width / 9, (i + 1) // 2 * height / 4) for i in range(8)]
        left = [(x0 + x, y1 - y) for x, y in corners]
        return left + [(x0 + x1 - x, y) for x, y in reversed(left)]
    if shape == "round":
        turn = np.linspace(0, 2 * np.pi, 24, endpoint=False)
        return [
            (middle + width / 2 * np.cos(t), (y0 + y1) / 2 + height / 2 * np.sin(t)) for t in turn
        ]
    if shape == "arch":
        rise = min(0.3 * height, 0.5 * width)
        arc = [(np.cos(t), np.sin(t)) for t in np.linspace(np.pi, 0, 13)]
        top = [(middle + width / 2 * x, y0 + rise - rise * y) for x, y in arc]
        return [(x0, y1), *top, (x1, y1)]
    return [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]


def around(x, half, y0, y1):
    """The box centred on x."""
    return x - half, y0, x + half, y1


def grow(box, margin):
    return box[0] - margin, box[1] - margin, box[2] + margin, box[3] + margin


def part_of(box, left=0.0, top=0.0, right=1.0, bottom=1.0):
    """The box inside a box whose edges lie at these fractions of it."""
    x0, y0, x1, y1 = box
    width, height = x1 - x0, y1 - y0
    return x0 + left * width, y0 + top * height, x0 + right * width, y0 + bottom * height


# ---- Planning: which parts a scene has, in painting order --------------------------------------


def plan_scene(seed, index):
    rng = np.random.default_rng([seed, index])
    style = STYLES[rng.integers(len(STYLES))]
    roof = style.roofs[rng.integers(len(style.roofs))]
    narrow = roof in ("gable", "steps")
    margin = rng.uniform(0.13, 0.19) if narrow else rng.uniform(0.06, 0.11)
    eaves = rng.uniform(0.34, 0.38) if narrow else rng.uniform(0.22, 0.28)
    body = (margin, eaves, 1 - margin, GROUND)
    bays = 3 if narrow else rng.integers(3, 6)
    floors = 3 if narrow else rng.integers(3, 5)
    edges = np.linspace(margin + 0.02, 1 - margin - 0.02, bays + 1)
    ground = eaves + (GROUND - eaves) * (floors - 1) / (floors + 0.2)  # the lowest floor is higher
    levels = np.linspace(eaves, ground, floors)
    parts = [Part("street", (0, GROUND, 1, 1)), *plan_roof(rng, roof, body)]
    parts += plan_ornament(style, body, edges, levels, narrow)
    balcony_floor = rng.integers(floors - 1) if "balcony" in style.extras else -1
    for floor, (top, bottom) in enumerate(pairwise(levels)):
        parts += plan_floor(rng, style, edges, top, bottom, floor == balcony_floor)
    parts += plan_ground_floor(rng, style, edges, ground)
    for x in (margin / 2, 1 - margin / 2):
        if rng.random() < 0.6:
            half, height = rng.uniform(0.5, 0.75) * margin, rng.uniform(0.12, 0.3)
            tree = around(x, half, GROUND + 0.01 - height, GROUND + 0.01)
            parts += [Part("plant", tree, "round")]
    wall, accent = (c[rng.integers(len(c))] for c in (style.walls, style.accents))
    return Scene(style, wall, accent, int(rng.choice([-1, 1])), body, tuple(parts))


def plan_roof(rng, shape, body):
    """The roof and all that stands behind the wall's edge, then the wall itself."""
    left, eaves, right, _ = body
    width = right - left
    if shape == "steps":
        gable = (left, 0.12, right, eaves)
        yield Part("wall", gable, "steps")
        corners = outline(gable, "steps")
        for (x, y), (next_x, _) in zip(corners[1:7:2], corners[2:8:2], strict=True):
            yield Part("cornice", (x - 0.01, y, next_x + 0.015, y + 0.02))
            yield Part("cornice", (1 - next_x - 0.015, y, 1 - x + 0.01, y + 0.02))
        yield Part("cornice", around(0.5, width / 6 + 0.015, 0.12, 0.14))
    elif shape == "gable":
        yield Part("wall", (left, 0.15, right, eaves), "gable")
    else:
        top = eaves - rng.uniform(0.13, 0.16)
        for x in rng.choice([0.2, 0.35, 0.65, 0.8], size=2, replace=False):
            yield Part("chimney", around(left + x * width, 0.025, top - 0.06, top + 0.05))
        yield Part("roof", (left - 0.03, top, right + 0.03, eaves), shape)
        count, y = rng.integers(2, 4), top + 0.3 * (eaves - top)
        for x in np.linspace(left, right, 2 * count + 1)[1::2]:  # dormers
            yield Part("cornice", around(x, 0.06, y - 0.04, y + 0.01), "gable")
            yield Part("window", around(x, 0.045, y + 0.005, eaves - 0.02))
    yield Part("wall", body)
    if shape == "gable":
        yield Part("roof", (left - 0.05, 0.1, right + 0.05, eaves + 0.05), "chevron")


def plan_ornament(style, body, edges, levels, narrow):
    left, eaves, right, _ = body
    if "pillar" in style.extras:
        for x in (left + 0.02, *edges[1:-1], right - 0.02):
            yield Part("pillar", around(x, 0.016, eaves, levels[-1]))
    if "belt" in style.extras:
        for y in levels[1:]:
            yield Part("cornice", (left - 0.008, y - 0.012, right + 0.008, y + 0.012))
    if narrow:
        yield Part("window", around(0.5, 0.05, eaves - 0.11, eaves - 0.01), "round")
    else:
        yield Part("cornice", (left - 0.025, eaves - 0.018, right + 0.025, eaves + 0.022))


def plan_window(x, half, y0, y1, shape, sill=True):
    yield Part("window", around(x, half, y0, y1), shape)
    if sill:
        yield Part("sill", around(x, half + 0.015, y1, y1 + 0.02))


def plan_floor(rng, style, edges, top, bottom, balcony):
    bay, height = edges[1] - edges[0], bottom - top
    half = min((0.22 if "shutter" in style.extras else 0.28) * bay, 0.085)
    y0, y1 = top + 0.24 * height, bottom - (0.06 if balcony else 0.18) * height
    joined = rng.random() < 0.5  # one balcony along the whole front
    rail = bottom - 0.36 * height, bottom - 0.02 * height
    for x in (edges[:-1] + edges[1:]) / 2:
        yield from plan_window(x, half, y0, y1, style.window, sill=not balcony)
        if "pediment" in style.extras and not balcony:
            yield Part("cornice", around(x, half + 0.02, y0 - 0.035, y0), "gable")
        if "shutter" in style.extras:
            width = 0.5 * half + 0.01
            yield Part("shutter", (x - half - width, y0, x - half, y1))
            yield Part("shutter", (x + half, y0, x + half + width, y1))
        if balcony and not joined:
            yield Part("balcony", around(x, 0.42 * bay, *rail))
        if "flowers" in style.extras and not balcony and rng.random() < 0.5:
            yield Part("plant", around(x, half, y1 - 0.03, y1 + 0.008))
    if balcony and joined:
        yield Part("balcony", (edges[0], rail[0], edges[-1], rail[1]))


def plan_ground_floor(rng, style, edges, top):
    bay, height = edges[1] - edges[0], GROUND - top
    entrance = rng.integers(len(edges) - 1)
    shops = "shop" in style.extras and rng.random() < 0.7
    for number, x in enumerate((edges[:-1] + edges[1:]) / 2):
        if number == entrance:
            half = min(0.3 * bay, 0.07)
            yield Part("door", around(x, half, top + 0.24 * height, GROUND), "arch")
        elif shops:
            shop = around(x, 0.44 * bay, top + 0.16 * height, GROUND - 0.008)
            yield Part("shop", shop)
            yield Part("awning", part_of(shop, left=-0.04, right=1.04, bottom=0.36))
        else:
            half, y0, y1 = min(0.25 * bay, 0.08), top + 0.26 * height, GROUND - 0.3 * height
            yield from plan_window(x, half, y0, y1, style.window)


# ---- Drawing: a scene as a label map and as a photograph ---------------------------------------


def snap(part, size):
    """Move the part's edges onto whole pixels, so that both pictures agree on them."""
    x0, y0, x1, y1 = (round(v * size) for v in part.box)
    box = (x0, y0, max(x1, x0 + 1), max(y1, y0 + 1))
    return replace(part, box=tuple(v / size for v in box))


def pixels(points, scale):
    """Points in [0, 1] as pixels; Pillow fills the last pixel too, so far edges step back by 1."""
    xs, ys = ([round(v * scale) for v in axis] for axis in zip(*points, strict=True))
    x, y = (min(xs) + max(xs)) / 2, (min(ys) + max(ys)) / 2
    return [(a - (a > x), b - (b > y)) for a, b in zip(xs, ys, strict=True)]


def draw_labels(scene, size):
    """x: the label map, an RGB image of size x size pixels in colours of PALETTE alone."""
    scale = size * OVERSAMPLING
    image = Image.new("RGB", (scale, scale), PALETTE["sky"])
    draw = ImageDraw.Draw(image)
    for part in scene.parts:
        part = snap(part, size)
        draw.polygon(pixels(outline(part.box, part.shape), scale), fill=PALETTE[part.kind])
    return image.resize((size, size), Image.Resampling.NEAREST)


def draw_photo(scene, size, rng):
    """y: the photograph of the scene, an RGB image of size x size pixels."""
    photo = Photo(scene, size, rng)
    for part in scene.parts:
        PAINTERS[part.kind](photo, snap(part, size))
    image = photo.image.resize((size, size), Image.Resampling.BOX)
    light = 1 + scene.light * np.linspace(0.04, -0.04, size, dtype=np.float32)[:, None]
    grain = rng.standard_normal((size, size, 1), np.float32) * 3
    return to_image(np.asarray(image) * light + grain)


def to_image(array):
    return Image.fromarray(np.clip(array, 0, 255).astype(np.uint8))


def shade(colour, factor):
    return tuple(int(min(255, max(0, c * factor))) for c in colour)


def dark(alpha):
    return (20, 16, 30, alpha)


class Photo:
    """A canvas in unit coordinates that knows its scene; a colour may carry an alpha, 0 to 255."""

    def __init__(self, scene, size, rng):
        self.scene, self.rng, self.scale = scene, rng, size * OVERSAMPLING
        self.style, self.trim, self.accent = scene.style, scene.style.trim, scene.accent
        self.image = sky_texture(rng, self.scale)
        self.draw = ImageDraw.Draw(self.image, "RGBA")
        self.wall = wall_texture(rng, self.scale, scene.wall, scene.style.texture)
        self.roof = roof_texture(rng, self.scale, scene.style.roof)

    def fill(self, box, colour, shape="rect"):
        self.draw.polygon(pixels(outline(box, shape), self.scale), fill=colour)

    def columns(self, box, edges, width, colour):
        """Upright bars, `width` wide, that begin at these places."""
        for x in edges:
            self.fill((x, box[1], x + width, box[3]), colour)

    def rows(self, box, edges, height, colour):
        for y in edges:
            self.fill((box[0], y, box[2], y + height), colour)

    def side(self, box, width, lit):
        """The strip of a box on the side of the sun, or on the other one."""
        x0, y0, x1, y1 = box
        left = (self.scene.light > 0) == lit
        return (x0, y0, x0 + width, y1) if left else (x1 - width, y0, x1, y1)

    def shadow(self, box, reach, shape="rect"):
        """Darken the wall behind a thing that stands out by `reach`; call before painting it."""
        left, _, right, _ = self.scene.body
        for share in (0.4, 0.7, 1.0):  # three thin layers give a soft edge
            dx, dy = 0.6 * self.scene.light * share * reach, share * reach
            x0, x1 = (min(max(x + dx, left), right) for x in (box[0], box[2]))
            self.fill((x0, box[1] + dy, x1, box[3] + dy), dark(42), shape)

    def corners(self, box):
        x0, y0, x1, y1 = (round(v * self.scale) for v in box)
        return x0, y0, max(x1, x0 + 1), max(y1, y0 + 1)

    def paste(self, box, texture, shape="rect"):
        """Show the part of a texture, as large as the canvas, that lies inside a shape."""
        x0, y0, x1, y1 = corners = self.corners(box)
        mask = Image.new("L", (x1 - x0, y1 - y0))
        points = pixels(outline(box, shape), self.scale)
        ImageDraw.Draw(mask).polygon([(x - x0, y - y0) for x, y in points], fill=255)
        self.image.paste(texture.crop(corners), (x0, y0), mask)

    def glass(self, box, shape="rect"):
        """A pane: it mirrors the sky, bright above and dark below, and has a streak of light."""
        x0, y0, x1, y1 = self.corners(box)
        v, u = np.mgrid[: y1 - y0, : x1 - x0].astype(np.float32)[..., None]
        u, v = u / (x1 - x0), v / (y1 - y0)
        u = u if self.scene.light > 0 else 1 - u
        depth = np.clip(0.75 * v + 0.25 * u + self.rng.normal(0, 0.06), 0, 1)
        pane = (1 - depth) * np.array((142, 182, 216)) + depth * np.array((30, 40, 64))
        pane += 26 * (np.abs(u + 0.6 * v - self.rng.uniform(0.4, 0.9)) < 0.12)
        canvas = Image.new("RGB", (x1, y1))
        canvas.paste(to_image(pane), (x0, y0))
        self.paste(box, canvas, shape)


# ---- Textures, as large as the canvas ----------------------------------------------------------


def mottling(rng, scale, cells):
    """Smooth noise, (scale, scale, 1), about -1 to 1, with `cells` bumps along each side."""
    coarse = Image.fromarray(rng.standard_normal((cells, cells), np.float32))
    return np.asarray(coarse.resize((scale, scale), Image.Resampling.BICUBIC))[:, :, None]


def sky_texture(rng, scale):
    down = np.linspace(0, 1, scale, dtype=np.float32)[:, None, None]
    high, low = np.array([(104, 160, 222), (222, 234, 244)], np.float32)
    sky = (1 - down) * high + down * low
    cloud = mottling(rng, scale, 5) + 0.5 * mottling(rng, scale, 13)
    cloud = np.clip(0.6 * cloud - 0.2, 0, 0.75)
    return to_image(sky * (1 - cloud) + 250 * cloud)


def blocks(rng, scale, columns, rows):
    """A bond of blocks: each one's random value, (scale, scale, 1), and x and y within it."""
    y, x = (np.arange(scale, dtype=np.float32).reshape(shape) for shape in ((-1, 1, 1), (1, -1, 1)))
    y, x = y / scale * rows, x / scale * columns
    row = y.astype(np.int32)
    x = x + 0.5 * (row % 2).astype(np.float32)
    value = rng.standard_normal((rows, columns + 1), np.float32)
    return value[row, x.astype(np.int32)], x % 1, y % 1


def wall_texture(rng, scale, colour, kind):
    light = 1 + 0.03 * mottling(rng, scale, 6) + 0.015 * mottling(rng, scale, 48)
    wall = light * np.array(colour, np.float32)
    if kind in BONDS:
        columns, rows, contrast, mortar = BONDS[kind]
        value, x, y = blocks(rng, scale, columns, rows)
        joint = (x < 0.0025 * columns) | (y < 0.0025 * rows)
        wall = np.where(joint, 0.6 * wall + mortar, wall * (1 + contrast * value))
    return to_image(wall)


def roof_texture(rng, scale, colour):
    value, x, y = blocks(rng, scale, 48, 56)
    light = (1.1 - 0.3 * y) * (0.85 + 0.22 * np.sin(np.pi * x)) * (1 + 0.07 * value)
    return to_image(light * np.array(colour, np.float32))


# ---- Painters, one for each kind of part -------------------------------------------------------


def paint_street(photo, part):
    x0, y0, x1, _ = part.box
    photo.fill(part.box, (96, 96, 102))
    pavement = (x0, y0, x1, y0 + 0.036)
    photo.fill(pavement, (150, 146, 142))
    photo.columns(pavement, np.arange(0, 1, 0.07), 0.003, (126, 122, 118))
    photo.fill((x0, y0 + 0.036, x1, y0 + 0.043), (186, 182, 176))  # kerb


def paint_wall(photo, part):
    photo.paste(part.box, photo.wall, part.shape)
    if part.shape == "rect":
        photo.fill(part_of(part.box, top=0.95), (*shade(photo.scene.wall, 0.55), 150))  # plinth
        photo.fill(photo.side(part.box, 0.012, lit=False), dark(50))


def paint_roof(photo, part):
    if part.shape == "chevron":
        photo.shadow(part.box, 0.02, part.shape)
    photo.paste(part.box, photo.roof, part.shape)
    if part.shape in SLANT:
        inset = SLANT[part.shape] - 0.005
        ridge = part_of(part.box, left=inset, right=1 - inset, bottom=0.08)
        photo.fill(ridge, shade(photo.style.roof, 0.75))


def paint_chimney(photo, part):
    photo.fill(part.box, (150, 84, 66))
    photo.rows(part.box, np.arange(part.box[1], part.box[3], 0.011), 0.002, (186, 150, 134))
    photo.fill(photo.side(part.box, 0.02, lit=False), dark(60))
    photo.fill(part_of(part.box, left=-0.1, right=1.1, bottom=0.13), (108, 62, 52))


def paint_cornice(photo, part):
    photo.shadow(part.box, 0.018, part.shape)
    photo.fill(part.box, photo.trim, part.shape)
    if part.shape == "gable":
        photo.fill(part_of(part.box, 0.2, 0.4, 0.8, 0.85), shade(photo.trim, 0.8), "gable")
    else:
        photo.fill(part_of(part.box, top=0.6), shade(photo.trim, 0.8))
        photo.fill(part_of(part.box, bottom=0.2), shade(photo.trim, 1.08))


def paint_pillar(photo, part):
    photo.shadow(part.box, 0.01)
    photo.fill(part.box, shade(photo.trim, 0.94))
    photo.fill(photo.side(part.box, 0.008, lit=True), shade(photo.trim, 1.06))
    photo.fill(photo.side(part.box, 0.008, lit=False), shade(photo.trim, 0.74))
    x0, y0, x1, y1 = grow(part.box, 0.006)
    photo.rows((x0, y0, x1, y1), (y0 + 0.018, y1 - 0.034), 0.016, photo.trim)


def paint_window(photo, part):
    frame, glass = photo.style.frame, grow(part.box, -0.006)
    photo.fill(grow(part.box, 0.01), photo.trim, part.shape)
    photo.fill(part.box, shade(frame, 0.95), part.shape)
    photo.glass(glass, part.shape)
    if photo.rng.random() < 0.3:  # curtains
        share = photo.rng.uniform(0.2, 0.35)
        photo.fill(part_of(glass, top=0.35, right=share), (246, 240, 226, 150))
        photo.fill(part_of(glass, top=0.35, left=1 - share), (246, 240, 226, 150))
    x0, y0, x1, y1 = glass
    across, down = (2, 2) if part.shape == "round" else photo.style.panes
    photo.columns(glass, np.linspace(x0, x1, across + 1)[1:-1] - 0.002, 0.004, frame)
    photo.rows(glass, np.linspace(y0, y1, down + 1)[1:-1] - 0.002, 0.004, frame)
    if part.shape == "rect":  # the wall's thickness throws a shadow on the glass
        photo.rows(part.box, [part.box[1]], 0.012, dark(90))
        photo.fill(photo.side(part.box, 0.007, lit=True), dark(70))


def paint_sill(photo, part):
    photo.shadow(part.box, 0.018)
    photo.fill(part.box, photo.trim)
    photo.fill(part_of(part.box, top=0.5), shade(photo.trim, 0.82))


def paint_shutter(photo, part):
    photo.shadow(part.box, 0.008)
    photo.fill(part.box, photo.accent)
    slats = np.arange(part.box[1] + 0.01, part.box[3] - 0.008, 0.011)
    photo.rows(grow(part.box, -0.005), slats, 0.004, shade(photo.accent, 0.7))
    photo.rows(part.box, [part.box[1]], 0.004, shade(photo.accent, 1.25))


def paint_balcony(photo, part):
    x0, y0, x1, y1 = part.box
    rail, slab = (x0, y0, x1, y1 - 0.022), (x0, y1 - 0.022, x1, y1)
    stone = photo.style.texture == "stone"
    colour, step, bar = (photo.trim, 0.02, 0.011) if stone else ((44, 44, 50), 0.014, 0.005)
    photo.shadow(slab, 0.035)
    photo.fill(rail, dark(60))
    photo.columns(rail, np.arange(x0, x1 - bar, step), bar, shade(colour, 0.92))
    photo.rows(rail, [y0], 0.012, colour)
    photo.fill(slab, shade(photo.trim, 0.95))
    photo.fill(part_of(slab, top=0.6), shade(photo.trim, 0.72))


def paint_door(photo, part):
    photo.fill(part_of(part.box, -0.13, -0.08, 1.13), photo.trim, "arch")
    photo.fill(part.box, photo.accent, "arch")
    photo.glass(part_of(part.box, 0.1, 0.07, 0.9, 0.32), "arch")
    photo.fill(part_of(part.box, left=0.48, right=0.52), shade(photo.accent, 0.6))
    for left, right in ((0.1, 0.42), (0.58, 0.9)):
        for top, bottom in ((0.37, 0.62), (0.68, 0.93)):
            panel = part_of(part.box, left, top, right, bottom)
            photo.fill(panel, shade(photo.accent, 0.72))
            photo.fill(grow(panel, -0.004), shade(photo.accent, 1.2))
    photo.fill(part_of(part.box, 0.52, 0.63, 0.6, 0.67), (226, 190, 96))  # knob
    photo.fill(part_of(part.box, left=-0.15, right=1.15, top=0.94), (190, 186, 180))  # step


def paint_shop(photo, part):
    pane, goods = grow(part.box, -0.012), ((204, 84, 70), (230, 180, 80), (110, 150, 96))
    photo.fill(part.box, shade(photo.accent, 0.85))
    photo.glass(pane)
    photo.fill(pane, (255, 214, 130, 70))  # lamps inside
    shelf = part_of(pane, top=0.78)
    for x in np.arange(pane[0] + 0.01, pane[2] - 0.018, 0.024):
        height = photo.rng.uniform(0.014, 0.034)
        photo.fill((x, shelf[1] - height, x + 0.016, shelf[1]), goods[photo.rng.integers(3)])
    photo.fill(shelf, shade(photo.accent, 0.65))
    photo.columns(pane, [(pane[0] + pane[2]) / 2 - 0.003], 0.006, photo.accent)


def paint_awning(photo, part):
    x0, y0, x1, y1 = part.box
    photo.shadow(part.box, 0.03)
    stripes = max(3, round((x1 - x0) / 0.026)) // 2 * 2 + 1
    for number, (left, right) in enumerate(pairwise(np.linspace(x0, x1, stripes + 1))):
        colour = (246, 242, 232) if number % 2 else shade(photo.accent, 1.15)
        photo.fill((left, y0, right, y1 - 0.012), colour)
        photo.fill((left, y1 - 0.024, right, y1), shade(colour, 0.88), "round")
    photo.rows(part.box, [y0], 0.008, dark(60))


def paint_plant(photo, part):
    """A tree where the shape is round, else a window box with flowers."""
    x0, y0, x1, y1 = part.box
    rng, x, y = photo.rng, (x0 + x1) / 2, (y0 + y1) / 2
    if part.shape == "round":
        photo.fill(around(x, 0.2 * (x1 - x0), y1 - 0.01, y1 + 0.008), dark(70), "round")
        photo.fill(part.box, (46, 96, 48), "round")
        for turn, reach, light in rng.random((140, 3)):
            u, v = (f(2 * np.pi * turn) * np.sqrt(0.9 * reach) for f in (np.cos, np.sin))
            bright = 0.85 + 0.3 * light - 0.35 * v - 0.25 * u * photo.scene.light
            leaf = around(
                x + u * (x1 - x), 0.009, y + v * (y1 - y) - 0.007, y + v * (y1 - y) + 0.007
            )
            photo.fill(leaf, shade((70, 128, 60), bright), "round")
        return
    photo.fill((x0, y1 - 0.016, x1, y1), (136, 84, 58))
    for colour, width in (((62, 120, 56), 0.016), ((214, 52, 66), 0.01)):
        for x in np.arange(x0, x1 - 0.006, 0.01):
            y = rng.uniform(y0, y1 - 0.024)
            photo.fill((x, y, min(x + width, x1), y + width), colour, "round")


PAINTERS = {kind: globals()[f"paint_{kind}"] for kind in PALETTE if kind != "sky"}


# ---- Files and flags ---------------------------------------------------------------------------


def render(seed, index, size):
    """Scene `index` of the set `seed` as (photograph y, label map x)."""
    scene = plan_scene(seed, index)
    photo = draw_photo(scene, size, np.random.default_rng([seed, index, 1]))
    return photo, draw_labels(scene, size)


def save(image, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, compress_level=1)


def write_scene(job):
    """One scene's files in both sets; runs in a worker process."""
    folder, seed, size, split, number = job
    name, index = f"{number + 1:04d}.png", FIRST_SCENE[split] + number
    unpaired = folder / "toy_unpaired"
    if split == "unpaired x":
        save(draw_labels(plan_scene(seed, index), size), unpaired / "train" / "x" / name)
        return
    y, x = render(seed, index, size)
    pair = Image.new("RGB", (2 * size, size))
    pair.paste(y, (0, 0))
    pair.paste(x, (size, 0))
    save(pair, folder / "toy" / split / name)
    if split != "val":
        save(y, unpaired / split / "y" / name)
    if split == "test":
        save(x, unpaired / split / "x" / name)


def write_sets(args):
    """Write both sets beside their final places and move them there when they are whole."""
    args.root.mkdir(parents=True, exist_ok=True)
    counts = {"train": args.count, "val": args.test_count, "test": args.test_count}
    counts["unpaired x"] = args.count
    with tempfile.TemporaryDirectory(prefix=".make_toy-", dir=args.root) as staging:
        staging = Path(staging)
        jobs = [
            (staging, args.seed, args.size, split, number)
            for split, count in counts.items()
            for number in range(count)
        ]
        workers = min(os.cpu_count() or 1, 8)
        ignore_ctrl_c = (signal.SIGINT, signal.SIG_IGN)  # the main process answers it for all
        with (
            Pool(workers, signal.signal, ignore_ctrl_c) as pool,
            tqdm(total=len(jobs), desc="drawing", unit="scene") as progress,
        ):
            for _ in pool.imap_unordered(write_scene, jobs, chunksize=4):
                progress.update()
        for name in SETS:
            if (args.root / name).exists():
                (args.root / name).rename(staging / f"old {name}")
            (staging / name).rename(args.root / name)


class Parser(argparse.ArgumentParser):
    """Reports an error as one line."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def parse_args(argv=None):
    here = Path(__file__).resolve().parent
    parser = Parser(
        description="Draw a deterministic set of facades: toy (pairs) and toy_unpaired.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--count", type=int, default=300, help="training images")
    parser.add_argument(
        "--test-count", type=int, default=30, help="images in val, and as many again in test"
    )
    parser.add_argument("--size", type=int, default=256, help="side of x and of y, in pixels")
    parser.add_argument("--seed", type=int, default=0, help="another seed draws other scenes")
    parser.add_argument("--root", type=Path, default=here, help="folder to write the two sets in")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace sets that exist; without it, stop"
    )
    args = parser.parse_args(argv)
    for flag, value, low, high in (
        ("--count", args.count, 1, 9999),
        ("--test-count", args.test_count, 1, 9999),
        ("--size", args.size, 32, 2048),
        ("--seed", args.seed, 0, 2**63 - 1),
    ):
        if not low <= value <= high:
            parser.error(f"{flag} is {value}; it must be from {low} to {high}")
    for name in SETS:
        if (args.root / name).exists() and not args.overwrite:
            parser.error(f"{args.root / name} exists; --overwrite replaces it")
    return parser, args


def main(argv=None):
    parser, args = parse_args(argv)
    try:
        write_sets(args)
    except OSError as error:
        parser.error(f"cannot write the sets in {args.root}: {error}")
    except KeyboardInterrupt:
        parser.exit(130, f"{parser.prog}: interrupted; nothing was written\n")
    print(f"{args.count} training, {args.test_count} val and {args.test_count} test scenes:")
    for name in SETS:
        print(f"  {args.root / name}")


if __name__ == "__main__":
    main()

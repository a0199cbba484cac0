"""datasets/make_toy.py and datasets/split_pairs.py: layout, pixels, determinism, bad input."""

import importlib.util
import os
import shutil
import subprocess
import sys
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

DATASETS = Path(__file__).resolve().parents[1] / "datasets"
SIZE = 64
COUNTS = ("--count", 6, "--test-count", 3, "--size", SIZE)


def load(name):
    spec = importlib.util.spec_from_file_location(name, DATASETS / f"{name}.py")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make_toy = load("make_toy")
split_pairs = load("split_pairs")


def run(script, *flags, cwd=None):
    command = [sys.executable, str(script), *map(str, flags)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=60)


def toy(root, *flags):
    done = run(DATASETS / "make_toy.py", "--root", root, *COUNTS, *flags)
    assert done.returncode == 0, done.stderr
    return root


def tree(folder):
    """Every file of a folder as {relative path: bytes}, hidden ones too."""
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def pixels(path):
    return np.asarray(Image.open(path))


def assert_one_line(done, script, *words):
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(f"{script}: error: ")
    assert done.stderr.count("\n") == 1 and done.stderr.endswith("\n"), done.stderr
    for word in words:
        assert str(word) in done.stderr


# ---- make_toy.py -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def toy_root(tmp_path_factory):
    return toy(tmp_path_factory.mktemp("toy"), "--seed", 3)


def test_toy_layout_and_sizes(toy_root):
    names = {"train": 6, "val": 3, "test": 3}
    expected = {f"toy/{s}/{i + 1:04d}.png" for s, n in names.items() for i in range(n)}
    for split in ("train", "test"):
        for side in "xy":
            files = {f"{split}/{side}/{i + 1:04d}.png" for i in range(names[split])}
            expected |= {f"toy_unpaired/{f}" for f in files}
    assert set(tree(toy_root)) == expected
    for name in expected:
        with Image.open(toy_root / name) as image:
            assert image.mode == "RGB"
            assert image.size == ((2 * SIZE if name.startswith("toy/") else SIZE), SIZE)


def test_toy_same_seed_same_bytes(toy_root, tmp_path):
    assert tree(toy(tmp_path, "--seed", 3)) == tree(toy_root)


def test_toy_other_seed_other_scenes(toy_root, tmp_path):
    ours, other = tree(toy_root), tree(toy(tmp_path, "--seed", 4))
    assert ours.keys() == other.keys()
    assert not any(ours[name] == other[name] for name in ours)


def test_toy_scenes_do_not_depend_on_the_count(toy_root, tmp_path):
    larger = tree(toy(tmp_path, "--seed", 3, "--count", 8, "--test-count", 4))
    ours = tree(toy_root)
    assert len(larger) > len(ours)
    assert {name: larger[name] for name in ours} == ours


def test_toy_scenes_all_differ(toy_root):
    for folder in ("toy/train", "toy/val", "toy/test", "toy_unpaired/train/x"):
        files = list(tree(toy_root / folder).values())
        assert len(set(files)) == len(files)
    splits = [set(tree(toy_root / "toy" / split).values()) for split in ("train", "val", "test")]
    assert len(set.union(*splits)) == sum(map(len, splits))


def test_toy_left_half_is_a_photograph_and_right_half_a_label_map(toy_root):
    palette = set(make_toy.PALETTE.values())
    assert len(palette) == len(make_toy.PALETTE)
    for file in (toy_root / "toy" / "train").iterdir():
        pair = pixels(file)
        photo = [tuple(p) for p in pair[:, :SIZE].reshape(-1, 3).tolist()]
        label = [tuple(p) for p in pair[:, SIZE:].reshape(-1, 3).tolist()]
        assert set(label) <= palette
        assert len(set(label)) >= 6
        assert len(set(photo)) > 1000
        assert sum(p in palette for p in photo) < 0.01 * len(photo)


def test_toy_photograph_shows_what_the_label_says(toy_root):
    photos, labels = [], []
    for file in (toy_root / "toy" / "train").iterdir():
        photos.append(pixels(file)[:, :SIZE])
        labels.append(pixels(file)[:, SIZE:])
    photos, labels = np.concatenate(photos).astype(float), np.concatenate(labels)

    def mean(kind):
        return photos[(labels == make_toy.PALETTE[kind]).all(-1)].mean(0)

    green, blue = 1, 2
    assert mean("plant").argmax() == green
    assert mean("sky").argmax() == blue and mean("sky")[blue] > 200
    assert np.ptp(mean("street")) < 12
    assert mean("window")[blue] > mean("window")[0] + 10
    assert mean("wall")[blue] < mean("wall")[0] - 20
    assert mean("sill").mean() > mean("window").mean() + 25


def test_toy_edges_agree_in_label_and_photograph():
    """A lone window, drawn at an odd size: photo and label change in the very same columns."""
    scene = make_toy.plan_scene(0, 0)
    box = (0.301, 0.297, 0.703, 0.709)
    street = make_toy.Part("street", box)  # flat gray, no trim around it
    parts = (make_toy.Part("plant", (0, 0, 1, 1)), street)
    scene = make_toy.replace(scene, parts=parts)
    label = np.asarray(make_toy.draw_labels(scene, 67))
    inside = (label == make_toy.PALETTE["street"]).all(-1)
    rows, columns = np.where(inside)
    assert (columns.min(), columns.max() + 1) == (round(0.301 * 67), round(0.703 * 67))
    assert (rows.min(), rows.max() + 1) == (round(0.297 * 67), round(0.709 * 67))
    make_toy_photo = make_toy.draw_photo(
        make_toy.replace(scene, parts=(street,)), 67, np.random.default_rng(0)
    )
    photo = np.asarray(make_toy_photo).astype(int)
    row = photo[rows.max()]  # the asphalt below the kerb, darker than any sky
    asphalt = row.max(-1) < 125
    assert (np.where(asphalt)[0] == np.unique(columns)).all()


def test_toy_unpaired_training_sides_are_of_different_scenes(toy_root):
    """No x is the label map of a scene whose photograph is among the y."""
    x, y = (tree(toy_root / "toy_unpaired" / "train" / side) for side in "xy")
    maps_of_y = set()
    for name in y:
        index = int(name[:4]) - 1
        photo, label = make_toy.render(3, index, SIZE)
        assert (pixels(toy_root / "toy_unpaired/train/y" / name) == np.asarray(photo)).all()
        maps_of_y.add(label.tobytes())
    maps_of_x = {Image.open(toy_root / "toy_unpaired/train/x" / name).tobytes() for name in x}
    assert len(maps_of_x) == len(maps_of_y) == 6
    assert not maps_of_x & maps_of_y


def test_toy_unpaired_test_sides_are_the_pairs_of_toy(toy_root):
    for file in (toy_root / "toy" / "test").iterdir():
        pair = pixels(file)
        y, x = (pixels(toy_root / "toy_unpaired/test" / side / file.name) for side in "yx")
        assert (pair[:, :SIZE] == y).all() and (pair[:, SIZE:] == x).all()


@pytest.mark.parametrize("index", range(12))
def test_toy_draws_every_style_at_the_smallest_size(index):
    photo, label = make_toy.render(0, index, 32)
    assert photo.size == label.size == (32, 32)
    colours = {colour for _, colour in label.getcolors()}
    assert {make_toy.PALETTE[kind] for kind in ("sky", "wall", "window")} <= colours


def test_toy_overwrite_replaces_all(tmp_path):
    toy(tmp_path)
    before = tree(tmp_path)
    done = run(DATASETS / "make_toy.py", "--root", tmp_path, *COUNTS, "--seed", 1)
    assert_one_line(done, "make_toy.py", tmp_path / "toy", "--overwrite")
    assert tree(tmp_path) == before
    toy(tmp_path, "--seed", 1, "--count", 2, "--overwrite")
    after = tree(tmp_path)
    assert len(list((tmp_path / "toy/train").iterdir())) == 2
    assert not any(after[name] == before[name] for name in after)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["toy", "toy_unpaired"]


def test_toy_stops_where_only_the_second_set_exists(tmp_path):
    (tmp_path / "toy_unpaired").mkdir()
    done = run(DATASETS / "make_toy.py", "--root", tmp_path, *COUNTS)
    assert_one_line(done, "make_toy.py", tmp_path / "toy_unpaired")
    assert not (tmp_path / "toy").exists()


def test_toy_leaves_nothing_where_writing_fails(tmp_path, monkeypatch, capsys):
    saved = []

    def save(image, path):
        if len(saved) == 5:
            raise OSError(28, "No space left on device")
        saved.append(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)

    monkeypatch.setattr(make_toy, "save", save)
    monkeypatch.setattr(make_toy, "Pool", lambda *_: ThreadPool(1))
    with pytest.raises(SystemExit) as stop:
        make_toy.main(["--root", str(tmp_path), "--count", "4", "--size", "32"])
    assert stop.value.code == 2
    assert ": error: cannot write" in capsys.readouterr().err.splitlines()[-1]
    assert len(saved) == 5 and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--count", 0), ("--count", "0", "from 1")),
        (("--count", "many"), ("--count", "many")),
        (("--test-count", -1), ("--test-count",)),
        (("--size", 10), ("--size", "10", "from 32")),
        (("--seed", -1), ("--seed",)),
        (("--sise", 64), ("--sise",)),
    ],
)
def test_toy_bad_flags(tmp_path, flags, words):
    done = run(DATASETS / "make_toy.py", "--root", tmp_path / "new", *flags)
    assert_one_line(done, "make_toy.py", *words)
    assert list(tmp_path.iterdir()) == []


def test_toy_root_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    done = run(DATASETS / "make_toy.py", "--root", tmp_path / "file", *COUNTS)
    assert_one_line(done, "make_toy.py", tmp_path / "file")


def test_toy_help_names_units_and_defaults():
    text = " ".join(run(DATASETS / "make_toy.py", "--help").stdout.split())
    for phrase in ("default: 300", "default: 30)", "default: 256", "pixels", "--overwrite"):
        assert phrase in text


# ---- split_pairs.py ----------------------------------------------------------------------------

HALF, HEIGHT = 16, 12  # pixels
LEFT, RIGHT = 0, 255  # the blue channel says which half a pixel was in


def ramp_pair(number):
    """A pair whose halves both say where a pixel was: red the file, green the column and row."""
    row, column = np.mgrid[:HEIGHT, :HALF]
    half = np.stack([np.full_like(row, number), 13 * column + row, np.zeros_like(row)], -1)
    pair = np.concatenate([half, half + np.array([0, 0, RIGHT])], 1)
    return Image.fromarray(pair.astype(np.uint8))


@pytest.fixture
def pairs(tmp_path):
    """A set of nine training, four val and three test pairs in a folder of its own."""
    src = tmp_path / "in" / "pairs"
    number = 0
    for split, count in (("train", 9), ("val", 4), ("test", 3)):
        (src / split).mkdir(parents=True)
        for _ in range(count):
            number += 1
            ramp_pair(number).save(src / split / f"{number}.png")
    return src


def split(src, dst, *flags, cwd=None):
    done = run(DATASETS / "split_pairs.py", src, dst, *flags, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done


def file_numbers(folder, blue):
    """The files that a side's images come from, each checked against the ramp."""
    numbers = []
    for file in sorted(folder.iterdir()):
        image = pixels(file)
        number = image[0, 0, 0]
        expected = np.asarray(ramp_pair(number))[:, :HALF] + np.array([0, 0, blue], np.uint8)
        assert file.name == f"{number}.png"
        assert (image == expected).all()
        numbers.append(int(number))
    return set(numbers)


def test_split_halves_keep_every_pixel_and_training_sides_are_disjoint(pairs, tmp_path):
    dst = tmp_path / "out"
    split(pairs, dst)
    assert sorted(p.name for p in dst.iterdir()) == ["test", "train"]
    x = file_numbers(dst / "train" / "x", RIGHT)
    y = file_numbers(dst / "train" / "y", LEFT)
    assert not x & y
    assert x | y == set(range(1, 10))
    assert (len(x), len(y)) == (5, 4)
    assert file_numbers(dst / "test" / "x", RIGHT) == {14, 15, 16}
    assert file_numbers(dst / "test" / "y", LEFT) == {14, 15, 16}


def test_split_swap_xy_exchanges_the_halves(pairs, tmp_path):
    split(pairs, tmp_path / "out", "--swap-xy")
    for part in ("train", "test"):
        assert file_numbers(tmp_path / "out" / part / "x", LEFT)
        assert file_numbers(tmp_path / "out" / part / "y", RIGHT)


def test_split_all_uses_every_file_on_both_sides(pairs, tmp_path):
    split(pairs, tmp_path / "out", "--all")
    assert file_numbers(tmp_path / "out/train/x", RIGHT) == set(range(1, 10))
    assert file_numbers(tmp_path / "out/train/y", LEFT) == set(range(1, 10))


def test_split_depends_on_the_seed_alone(pairs, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        split(pairs, tmp_path / name, "--seed", seed)
    a, b, c = (tree(tmp_path / name) for name in "abc")
    assert a == b
    assert a.keys() != c.keys()


def test_split_is_shuffled(pairs, tmp_path):
    split(pairs, tmp_path / "out")
    x = sorted(file_numbers(tmp_path / "out/train/x", RIGHT))
    assert x not in ([1, 2, 3, 4, 5], [1, 3, 5, 7, 9])


def test_split_takes_val_where_there_is_no_test(pairs, tmp_path):
    assert "has no test/" not in split(pairs, tmp_path / "with").stdout
    shutil.rmtree(pairs / "test")
    assert "has no test/" in split(pairs, tmp_path / "without").stdout
    assert file_numbers(tmp_path / "without/test/x", RIGHT) == {10, 11, 12, 13}
    assert file_numbers(tmp_path / "without/test/y", LEFT) == {10, 11, 12, 13}


def two_tones(mode, left, right):
    image = Image.new(mode, (2 * HALF, HEIGHT), left)
    image.paste(right, (HALF, 0, 2 * HALF, HEIGHT))
    return image


@pytest.mark.parametrize(
    ("name", "image", "y", "x"),
    [
        ("a.JPG", two_tones("L", 40, 200), (40,) * 3, (200,) * 3),
        ("a.jpeg", two_tones("CMYK", (0, 0, 0, 0), (0, 0, 0, 255)), (255,) * 3, (0,) * 3),
        ("a.Png", two_tones("I;16", 65535, 25700), (255,) * 3, (100,) * 3),
        ("a.tif", two_tones("I;16", 0, 32896), (0,) * 3, (128,) * 3),
        ("a.TIFF", two_tones("RGB", (1, 2, 3), (4, 5, 6)), (1, 2, 3), (4, 5, 6)),
        ("a.bmp", two_tones("1", 0, 1), (0,) * 3, (255,) * 3),
        ("a.png", two_tones("RGBA", (9, 9, 9, 0), (9, 8, 7, 255)), (255,) * 3, (9, 8, 7)),
        ("a.png", two_tones("LA", (0, 0), (0, 255)), (255,) * 3, (0,) * 3),
        ("a.webp", two_tones("RGB", (255, 0, 0), (0, 0, 0)), (255, 0, 0), (0,) * 3),
        ("a.png", two_tones("RGB", (250, 0, 0), (0, 90, 0)).quantize(8), (250, 0, 0), (0, 90, 0)),
    ],
    ids=lambda v: v if isinstance(v, str) else getattr(v, "mode", None),
)
def test_split_reads_any_image_as_8_bit_rgb(pairs, tmp_path, name, image, y, x):
    shutil.rmtree(pairs / "train")
    (pairs / "train").mkdir()
    image.save(pairs / "train" / name, **({"lossless": True} if name.endswith("webp") else {}))
    split_pairs.main([str(pairs), str(tmp_path / "out"), "--all"])
    for side, colour in (("x", x), ("y", y)):
        with Image.open(tmp_path / "out" / "train" / side / "a.png") as half:
            assert half.mode == "RGB" and half.size == (HALF, HEIGHT)
            assert np.abs(np.asarray(half).astype(int) - colour).max() <= 1


def test_split_ignores_other_files(pairs, tmp_path):
    (pairs / "train" / "Thumbs.db").write_text("no image")
    (pairs / "train" / "._1.png").write_text("no image")
    split(pairs, tmp_path / "out", "--all")
    assert file_numbers(tmp_path / "out/train/x", RIGHT) == set(range(1, 10))


def test_split_finds_folders_here_or_beside_the_script(pairs, tmp_path):
    """A bare DST lies where SRC was found; a path is a path."""
    scripts, here = tmp_path / "scripts", tmp_path / "here"
    scripts.mkdir(), here.mkdir()
    script = shutil.copy(DATASETS / "split_pairs.py", scripts)
    shutil.copytree(pairs, scripts / "beside")
    shutil.copytree(pairs, here / "near")
    for src, dst, place in (
        ("beside", "out", scripts / "out"),
        ("near", "out", here / "out"),
        ("beside", os.path.join(".", "dotted"), here / "dotted"),
    ):
        done = run(script, src, dst, cwd=here)
        assert done.returncode == 0, done.stderr
        assert (place / "train" / "x").is_dir()
    assert not (scripts / "dotted").exists()


def test_split_overwrite_replaces_an_older_set_only(pairs, tmp_path):
    out = tmp_path / "out"
    split(pairs, out, "--all")
    before = tree(out)
    done = run(DATASETS / "split_pairs.py", pairs, out)
    assert_one_line(done, "split_pairs.py", out, "--overwrite")
    assert tree(out) == before
    split(pairs, out, "--overwrite")
    assert len(tree(out)) < len(before)
    (out / "thesis.txt").write_text("dear")
    done = run(DATASETS / "split_pairs.py", pairs, out, "--overwrite")
    assert_one_line(done, "split_pairs.py", out, "thesis.txt")
    assert (out / "thesis.txt").read_text() == "dear"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]


def remove_train(src):
    shutil.rmtree(src / "train")


def empty_train(src):
    remove_train(src)
    (src / "train").mkdir()


def one_image(src):
    for file in sorted((src / "train").iterdir())[1:]:
        file.unlink()


def no_test_no_val(src):
    shutil.rmtree(src / "test")
    shutil.rmtree(src / "val")


def odd_width(src):
    Image.new("RGB", (33, 12)).save(src / "train" / "5.png")


def corrupt(src):
    (src / "test" / "15.png").write_text("not an image")


def truncated(src):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    image.save(src / "train" / "5.png")
    data = (src / "train" / "5.png").read_bytes()
    (src / "train" / "5.png").write_bytes(data[: len(data) // 2])


def same_stem(src):
    ramp_pair(5).save(src / "train" / "5.bmp")


def floating(src):
    Image.new("F", (32, 12)).save(src / "train" / "5.tif")
    (src / "train" / "5.png").unlink()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (shutil.rmtree, ("no folder", "pairs")),
        (remove_train, ("train", "does not exist")),
        (empty_train, ("train", "holds no images")),
        (one_image, ("1 image", "--all")),
        (no_test_no_val, ("val", "does not exist")),
        (odd_width, ("5.png", "33 pixels")),
        (corrupt, ("15.png", "cannot be read")),
        (truncated, ("5.png", "cannot be read")),
        (same_stem, ("5.bmp", "5.png")),
        (floating, ("5.tif", "floating-point")),
    ],
    ids=lambda v: getattr(v, "__name__", None),
)
def test_split_bad_input(pairs, tmp_path, spoil, words):
    spoil(pairs)
    done = run(DATASETS / "split_pairs.py", pairs, tmp_path / "new" / "out")
    done.stderr = done.stderr.splitlines(keepends=True)[-1]  # below the progress bar
    assert_one_line(done, "split_pairs.py", *words)
    assert not list((tmp_path / "new").rglob("*"))


@pytest.mark.parametrize("place", [".", "train", "..", "new"])
def test_split_never_replaces_its_source(pairs, place):
    before = tree(pairs)
    done = run(DATASETS / "split_pairs.py", pairs, pairs / place, "--overwrite")
    assert_one_line(done, "split_pairs.py", "overlap")
    assert tree(pairs) == before


@pytest.mark.parametrize("flags", [("--seed", -1), ("--seed", "x"), ("--al",)])
def test_split_bad_flags(pairs, tmp_path, flags):
    done = run(DATASETS / "split_pairs.py", pairs, tmp_path / "out", *flags)
    assert_one_line(done, "split_pairs.py", flags[0])
    assert not (tmp_path / "out").exists()

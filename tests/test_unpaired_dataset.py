"""x and y without pairs, as cycleGAN and CUT read them: layouts, draws, crops, errors."""

import importlib

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import METHODS, load_script, picture, write_pairs, write_unpaired

UNPAIRED = [name for name in METHODS if name != "pix2pix"]


@pytest.fixture(params=UNPAIRED)
def method(request):
    return request.param


@pytest.fixture
def module(method):
    return importlib.import_module(f"{method}_dataset")


def folders(layout, split):
    """The folders of x and of y below the data folder."""
    if layout == "authors":
        return f"{split}A", f"{split}B"
    return f"{split}/x", f"{split}/y"


def write_ramps(root, counts=(5, 3), layout="x and y", size=40, split="train"):
    """Red is the column, green the row, blue the file's number; y's start at 100. Returns root."""
    rows, columns = np.mgrid[:size, :size]
    for folder, count, first in zip(folders(layout, split), counts, (0, 100), strict=True):
        (root / "ramps" / folder).mkdir(parents=True)
        for index in range(count):
            pixels = np.stack([columns, rows, np.full_like(rows, first + index)], axis=2)
            file = root / "ramps" / folder / f"{index:02}.png"
            Image.fromarray(pixels.astype(np.uint8)).save(file)
    return root


def ramps(module, root, load_size=40, swap_xy=False, flip=True, seed=0):
    dataset = module.UnpairedDataset
    return dataset(root, "ramps", "train", load_size, 32, swap_xy, flip=flip, seed=seed)


def read_ramp(ramp):
    """(number of the file, left, top, mirrored) of a square of a ramp; fails on any other."""
    assert ramp.shape == (3, 32, 32) and ramp.dtype == torch.float32
    pixels = (ramp.numpy().astype(np.float64) + 1) * 127.5
    np.testing.assert_allclose(pixels, pixels.round(), atol=1e-4)
    columns, rows, number = pixels.round().astype(int)
    mirrored = bool(columns[0, 0] > columns[0, -1])
    columns = columns[:, ::-1] if mirrored else columns
    left, top = int(columns[0, 0]), int(rows[0, 0])
    assert (columns == left + np.arange(32)).all()
    assert (rows == top + np.arange(32)[:, None]).all()
    assert (number == number[0, 0]).all()
    return int(number[0, 0]), left, top, mirrored


def read_epoch(dataset, epoch):
    """(of x, of y) for each index: what read_ramp tells."""
    pairs = [dataset[epoch, index] for index in range(len(dataset))]
    return [(read_ramp(x), read_ramp(y)) for x, y in pairs]


# --------------------------------------------------------------------------- which pictures when


@pytest.mark.parametrize("layout", ["x and y", "authors"])
def test_both_layouts_are_read(module, tmp_path, layout):
    dataset = ramps(module, write_ramps(tmp_path, (4, 3), layout))
    assert str(dataset) == "4 x and 3 y" and len(dataset) == 4
    x, y = folders(layout, "train")
    wanted = [*(f"{x}/0{n}.png" for n in range(4)), *(f"{y}/0{n}.png" for n in range(3))]
    assert [str(f.relative_to(tmp_path / "ramps")) for f in dataset.files] == wanted
    seen = read_epoch(dataset, 1)
    assert {x[0] for x, _ in seen} == {0, 1, 2, 3}
    assert {y[0] for _, y in seen} <= {100, 101, 102}


@pytest.mark.parametrize("layout", ["x and y", "authors"])
def test_swap_xy_exchanges_the_sides(module, tmp_path, layout):
    dataset = ramps(module, write_ramps(tmp_path, (4, 3), layout), swap_xy=True)
    assert str(dataset) == "3 x and 4 y" and len(dataset) == 4
    seen = read_epoch(dataset, 1)
    assert {y[0] for _, y in seen} == {0, 1, 2, 3}
    assert {x[0] for x, _ in seen} <= {100, 101, 102}


@pytest.mark.parametrize("counts", [(7, 3), (3, 7), (5, 5)])
def test_an_epoch_is_the_longer_side_once_and_draws_the_shorter_anew(module, tmp_path, counts):
    dataset = ramps(module, write_ramps(tmp_path, counts))
    assert len(dataset) == max(counts)
    long, short = (0, 1) if counts[0] >= counts[1] else (1, 0)
    drawn = []
    for epoch in range(1, 31):
        seen = read_epoch(dataset, epoch)
        assert [pair[long][0] % 100 for pair in seen] == list(range(max(counts)))
        drawn.append(tuple(pair[short][0] % 100 for pair in seen))
    assert len(set(drawn)) == 30  # no epoch is like another
    assert any(len(set(epoch)) < min(counts) for epoch in drawn)  # at random, not by turns
    times = np.bincount([number for epoch in drawn for number in epoch])
    mean = 30 * max(counts) / min(counts)
    assert len(times) == min(counts) and (abs(times - mean) < 5 * mean**0.5).all()


def test_draws_depend_on_seed_epoch_and_index_alone(module, tmp_path):
    dataset = ramps(module, write_ramps(tmp_path))
    first = {epoch: read_epoch(dataset, epoch) for epoch in (1, 2, 3)}
    np.random.seed(5)
    torch.manual_seed(5)
    again = ramps(module, tmp_path)
    for epoch in (3, 1, 2):
        backwards = [again[epoch, index] for index in reversed(range(5))]
        found = [(read_ramp(x), read_ramp(y)) for x, y in reversed(backwards)]
        assert found == first[epoch]
    everything = [pair for seen in first.values() for pair in seen]
    assert len(set(everything)) == len(everything)
    other = ramps(module, tmp_path, seed=1)
    assert all(read_epoch(other, epoch) != first[epoch] for epoch in first)


def test_draws_of_an_index_are_not_those_of_another(module, tmp_path):
    """Else two pictures of one epoch, or of two epochs, would move together."""
    dataset = ramps(module, write_ramps(tmp_path), seed=3)
    drawn = {}
    for epoch in range(1, 31):
        for index, (x, y) in enumerate(read_epoch(dataset, epoch)):
            drawn[epoch, index] = (*x[1:], *y)
    for moved in ((1, 0), (0, 1), (1, -1)):
        pairs = [(d, drawn.get(tuple(np.add(key, moved)))) for key, d in drawn.items()]
        pairs = [(a, b) for a, b in pairs if b is not None]
        assert sum(a == b for a, b in pairs) < 0.05 * len(pairs)


# --------------------------------------------------------------------------------------- geometry


def test_x_and_y_are_cropped_and_flipped_each_for_itself(module, tmp_path):
    dataset = ramps(module, write_ramps(tmp_path))
    seen = [pair for epoch in range(1, 101) for pair in read_epoch(dataset, epoch)]
    geometries = [[side[1:] for side in pair] for pair in seen]
    assert sum(x == y for x, y in geometries) < 0.05 * len(geometries)  # 1 of 162 by chance
    for side in (0, 1):
        lefts, tops, flips = zip(*[pair[side] for pair in geometries], strict=True)
        assert set(lefts) == set(tops) == set(range(9))  # each crop of 32 out of 40
        assert 0.4 < np.mean(flips) < 0.6
    for part in range(3):  # neither left nor top nor flip of y follows that of x
        pairs = np.array([(x[part], y[part]) for x, y in geometries], dtype=float)
        assert abs(np.corrcoef(pairs.T)[0, 1]) < 5 / len(pairs) ** 0.5


def test_without_flip_and_without_room_nothing_moves(module, tmp_path):
    still = ramps(module, write_ramps(tmp_path), flip=False)
    seen = [pair for epoch in range(1, 11) for pair in read_epoch(still, epoch)]
    assert {side[3] for pair in seen for side in pair} == {False}
    write_ramps(tmp_path / "b", size=32)
    whole = ramps(module, tmp_path / "b", load_size=32, flip=False)
    seen = [pair for epoch in range(1, 11) for pair in read_epoch(whole, epoch)]
    assert {side[1:] for pair in seen for side in pair} == {(0, 0, False)}


def test_load_gives_the_whole_picture_unless_told_otherwise(module, tmp_path):
    dataset = ramps(module, write_ramps(tmp_path, size=32), load_size=32)
    for file in dataset.files:
        assert read_ramp(dataset.load(file))[1:] == (0, 0, False)
    assert read_ramp(dataset.load(dataset.files_y[2], (0, 0, True))) == (102, 0, 0, True)


# ---------------------------------------------------------------------------- what the flags build


def build_data(method, root, *flags, name="ramps"):
    script = load_script(method)
    sizes = ["--image-size", "32", "--load-size", "40"]
    flags = ["--data-root", str(root), "--data-folder", name, *sizes, *flags]
    return script.build_data(script.parse_args(flags))


def test_test_pictures_are_never_augmented(method, tmp_path):
    write_unpaired(tmp_path, test=4, size=32)
    _, test_set = build_data(method, tmp_path, "--flip", "--jitter", name="unpaired")
    for side, files in (("x", test_set.files_x), ("y", test_set.files_y)):
        assert [f.parent.name for f in files] == [side] * 4
        assert [f.parent.parent.name for f in files] == ["test"] * 4
        for file in files:
            wanted = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1) / 127.5 - 1
            torch.testing.assert_close(test_set.load(file), wanted)
    for epoch in range(10):
        x, _ = test_set[epoch, 0]
        assert torch.equal(x, test_set.load(test_set.files_x[0]))


def test_flags_reach_the_data(method, tmp_path):
    root = write_ramps(write_ramps(tmp_path), split="test")

    def seen(*flags):
        train_set, _ = build_data(method, root, *flags)
        return [pair for epoch in range(1, 7) for pair in read_epoch(train_set, epoch)]

    default = seen()
    assert {x[3] for x, _ in default} == {y[3] for _, y in default} == {False, True}
    unflipped = seen("--no-flip")
    assert {side[3] for pair in unflipped for side in pair} == {False}
    assert len({x[1] for x, _ in unflipped}) > 3
    assert seen("--seed", "1") != default
    assert {x[0] for x, _ in seen("--swap-xy")} == {100, 101, 102}
    train_set, _ = build_data(method, root, "--no-jitter", "--no-flip")
    x = train_set[1, 0][0]
    assert all(torch.equal(train_set[epoch, 0][0], x) for epoch in range(10))
    assert x[0].min() == -1 and x[0].max() > 37 / 127.5 - 1  # all 40 columns, resized
    one, other = (build_data(method, root, *flag)[1] for flag in ([], ["--swap-xy"]))
    assert (one.files_x, one.files_y) == (other.files_y, other.files_x)


def test_names_match(module, tmp_path):
    write_unpaired(tmp_path, test=3)
    folder = tmp_path / "unpaired" / "test"

    def names_match():
        return module.UnpairedDataset(tmp_path, "unpaired", "test", 32, 32, False).names_match

    assert names_match()
    (folder / "y" / "001.png").rename(folder / "y" / "001.jpg")  # the suffix says nothing
    assert names_match()
    (folder / "y" / "001.jpg").rename(folder / "y" / "001b.jpg")
    assert not names_match()
    (folder / "y" / "001b.jpg").unlink()
    assert not names_match()
    (folder / "x" / "001.png").unlink()
    assert names_match()


# ----------------------------------------------------------------------------------------- errors


def error(method, root, name):
    with pytest.raises(load_script(method).RunError) as raised:
        build_data(method, root, name=name)
    (line,) = str(raised.value).splitlines()
    return line


def test_pairs_side_by_side_are_told_from_an_unpaired_set(method, tmp_path):
    write_pairs(tmp_path, "pairs")
    line = error(method, tmp_path, "pairs")
    folder = tmp_path / "pairs"
    assert f"python datasets/split_pairs.py {folder} {folder}_unpaired" in line
    assert "train/x" in line and "trainA" in line


@pytest.mark.parametrize("layout", ["x and y", "authors"])
@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("side", [0, 1])
def test_a_side_that_is_missing_is_named(method, tmp_path, layout, split, side):
    write_ramps(tmp_path, (2, 2), layout)
    write_ramps(tmp_path, (2, 2), layout, split="test")
    for file in (tmp_path / "ramps" / folders(layout, split)[side]).iterdir():
        file.unlink()
    line = error(method, tmp_path, "ramps")
    assert f"{split}/{'xy'[side]}" in line and f"{split}{'AB'[side]}" in line
    assert str(tmp_path / "ramps") in line and "split_pairs" not in line


def test_hidden_and_foreign_files_are_no_pictures(module, tmp_path):
    write_ramps(tmp_path, (2, 2))
    folder = tmp_path / "ramps" / "train" / "x"
    (folder / "._00.png").write_bytes(b"resource fork")
    (folder / "notes.txt").write_text("no picture")
    (folder / "folder.png").mkdir()
    picture(np.random.default_rng(0), 40, 40).save(folder / "99.JPG")
    dataset = ramps(module, tmp_path)
    assert [f.name for f in dataset.files_x] == ["00.png", "01.png", "99.JPG"]

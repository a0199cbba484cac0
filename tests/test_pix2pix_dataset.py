"""Pairs: what is cut out of a file, that one crop and flip serve both halves, and odd files."""

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import load_script, picture, write_pairs
from pix2pix_dataset import EpochBatches, PairDataset, RunError, list_images, load_rgb


def write_ramps(root, size=40, count=3):
    """Pairs whose two halves are the same: red is the column, green the row, blue the file."""
    rows, columns = np.mgrid[:size, :size]
    (root / "ramps" / "train").mkdir(parents=True)
    for index in range(count):
        half = np.stack([columns, rows, np.full_like(rows, index)], axis=2).astype(np.uint8)
        pair = Image.fromarray(np.concatenate([half, half], axis=1))
        pair.save(root / "ramps" / "train" / f"{index}.png")
    return root


def read_geometry(ramp):
    """The (left, top, mirrored) that made a square of pixels out of a ramp; fails on any other."""
    pixels = (ramp.numpy().astype(np.float64) + 1) * 127.5
    np.testing.assert_allclose(pixels, pixels.round(), atol=1e-4)
    columns, rows, _ = pixels.round().astype(int)
    mirrored = bool(columns[0, 0] > columns[0, -1])
    columns = columns[:, ::-1] if mirrored else columns
    left, top = int(columns[0, 0]), int(rows[0, 0])
    assert (columns == left + np.arange(len(rows))).all()
    assert (rows == top + np.arange(len(rows))[:, None]).all()
    return left, top, mirrored


def ramps(root, load_size=40, flip=True, seed=0):
    return PairDataset(root, "ramps", "train", load_size, 32, swap_xy=False, flip=flip, seed=seed)


# --------------------------------------------------------------------------------------- geometry


def test_one_crop_and_one_flip_serve_both_halves(tmp_path):
    dataset = ramps(write_ramps(tmp_path))
    seen = set()
    for epoch in range(1, 101):
        for index in range(len(dataset)):
            x, y = dataset[epoch, index]
            assert x.shape == y.shape == (3, 32, 32)
            assert torch.equal(x, y)
            seen.add(read_geometry(x))
    lefts, tops, flips = (set(values) for values in zip(*seen, strict=True))
    assert lefts == tops == set(range(9))  # each place that a crop of 32 out of 40 can have
    assert flips == {False, True}
    assert len(seen) > 100  # of 162: left, top and flip are drawn each for itself


def test_resizing_leaves_the_halves_aligned(tmp_path):
    dataset = ramps(write_ramps(tmp_path), load_size=46)
    for epoch in range(1, 21):
        x, y = dataset[epoch, 0]
        assert torch.equal(x, y)


def test_crop_and_flip_depend_on_seed_epoch_and_index_alone(tmp_path):
    dataset = ramps(write_ramps(tmp_path))
    keys = [(epoch, index) for epoch in range(1, 9) for index in range(3)]
    first = {key: read_geometry(dataset[key][0]) for key in keys}
    np.random.seed(5)
    torch.manual_seed(5)
    again = ramps(tmp_path)
    assert {key: read_geometry(again[key][0]) for key in reversed(keys)} == first
    assert len(set(first.values())) > 15  # neither the epoch nor the index is left out
    other = ramps(tmp_path, seed=1)
    assert {key: read_geometry(other[key][0]) for key in keys} != first


def test_draws_of_an_epoch_are_not_those_of_the_next_index_or_of_the_order(tmp_path):
    dataset = ramps(write_ramps(tmp_path), seed=3)
    geometry = {key: read_geometry(dataset[key][0]) for key in np.ndindex(40, 3)}
    for moved in ((1, 0), (0, 1), (1, -1)):
        pairs = [(g, geometry.get(tuple(np.add(key, moved)))) for key, g in geometry.items()]
        pairs = [(a, b) for a, b in pairs if b is not None]
        assert sum(a == b for a, b in pairs) < 0.1 * len(pairs)


def test_without_flip_and_without_room_nothing_moves(tmp_path):
    write_ramps(tmp_path)
    still = ramps(tmp_path, flip=False)
    assert {read_geometry(still[epoch, 0][0])[2] for epoch in range(30)} == {False}
    whole = PairDataset(write_ramps(tmp_path / "b", size=32), "ramps", "train", 32, 32, False)
    assert {read_geometry(whole[epoch, 1][0]) for epoch in range(30)} == {(0, 0, False)}


def test_flip_is_on_for_half_of_the_pictures(tmp_path):
    dataset = ramps(write_ramps(tmp_path))
    flips = [read_geometry(dataset[epoch, 0][0])[2] for epoch in range(300)]
    assert 0.4 < np.mean(flips) < 0.6


def test_x_is_the_right_half_and_y_the_left(tmp_path):
    halves = np.zeros((32, 64, 3), np.uint8)
    halves[:, :32], halves[:, 32:] = (255, 0, 0), (0, 0, 255)
    (tmp_path / "set" / "train").mkdir(parents=True)
    Image.fromarray(halves).save(tmp_path / "set" / "train" / "a.png")
    red, blue = torch.tensor([1.0, -1, -1]), torch.tensor([-1.0, -1, 1])
    for swap_xy, wanted in ((False, (blue, red)), (True, (red, blue))):
        pair = PairDataset(tmp_path, "set", "train", 36, 32, swap_xy)[1, 0]
        for half, colour in zip(pair, wanted, strict=True):
            torch.testing.assert_close(half, colour[:, None, None].expand(3, 32, 32))


def build_data(root, *flags):
    script = load_script("pix2pix")
    sizes = ["--image-size", "32", "--load-size", "40"]
    flags = ["--data-root", str(root), "--data-folder", "ramps", *sizes, *flags]
    return script.build_data(script.parse_args(flags))


def test_test_pictures_are_never_augmented(tmp_path):
    root = write_ramps(tmp_path)
    (root / "ramps" / "test").mkdir()
    pair = picture(np.random.default_rng(0), 64, 32)
    pair.save(root / "ramps" / "test" / "a.png")
    _, test_set = build_data(root, "--flip", "--jitter")
    wanted = torch.from_numpy(np.array(pair)).permute(2, 0, 1) / 127.5 - 1
    for epoch in range(20):
        x, y = test_set[epoch, 0]
        torch.testing.assert_close(x, wanted[:, :, 32:])
        torch.testing.assert_close(y, wanted[:, :, :32])


def test_flags_reach_the_data(tmp_path):
    root = write_ramps(tmp_path)
    write_pairs(root, "ramps", train=0, test=1)
    train_set, _ = build_data(root)
    assert {read_geometry(train_set[epoch, 0][0])[2] for epoch in range(20)} == {False, True}
    train_set, _ = build_data(root, "--no-flip")
    seen = [read_geometry(train_set[epoch, 0][0]) for epoch in range(20)]
    assert {mirrored for _, _, mirrored in seen} == {False}
    assert len({left for left, _, _ in seen}) > 3
    train_set, _ = build_data(root, "--no-jitter", "--no-flip")
    x = train_set[1, 0][0]
    assert all(torch.equal(train_set[epoch, 0][0], x) for epoch in range(20))
    assert x[0].min() == -1 and x[0].max() > 37 / 127.5 - 1  # all 40 columns, resized
    one, other = (build_data(root, *flag)[1][0, 0] for flag in ([], ["--swap-xy"]))
    assert torch.equal(one[0], other[1]) and torch.equal(one[1], other[0])
    seeds = [build_data(root, "--seed", seed)[0] for seed in ("0", "1")]
    one, other = ([read_geometry(s[epoch, 0][0]) for epoch in range(20)] for s in seeds)
    assert one != other


def test_val_stands_in_for_test_where_there_is_none(tmp_path):
    root = write_ramps(tmp_path)
    (root / "ramps" / "train").rename(root / "ramps" / "val")
    write_pairs(root, "ramps", train=2, test=0)
    assert [f.parent.name for f in build_data(root)[1].files] == ["val"] * 3
    write_pairs(root, "ramps", train=0, test=1)
    assert [f.parent.name for f in build_data(root)[1].files] == ["test"]


# ----------------------------------------------------------------------------------- order


def test_each_epoch_is_a_permutation_of_its_own():
    batches = EpochBatches(10, 4, seed=0)
    orders = []
    for epoch in (1, 2, 3):
        batches.start(epoch, 0)
        drawn = list(batches)
        assert [len(batch) for batch in drawn] == [4, 4, 2]
        assert len(batches) == 3
        assert {e for batch in drawn for e, _ in batch} == {epoch}
        orders.append([index for batch in drawn for _, index in batch])
        assert sorted(orders[-1]) == list(range(10))
        assert list(batches) == drawn  # the same again
    assert len({tuple(order) for order in orders}) == 3
    other = EpochBatches(10, 4, seed=1)
    assert [index for batch in other for _, index in batch] != orders[0]


def test_an_interrupted_epoch_goes_on_at_its_next_batch():
    batches = EpochBatches(10, 4, seed=0)
    batches.start(7, 0)
    whole = list(batches)
    for done in range(4):
        again = EpochBatches(10, 4, seed=0)
        again.start(7, done)
        assert list(again) == whole[done:]


# ---------------------------------------------------------------------------------------- formats


def colours(path):
    """The picture's pixels, (H, W, 3) uint8."""
    image = load_rgb(path)
    assert image.mode == "RGB"
    return np.asarray(image)


def test_gray_and_palette(tmp_path):
    Image.fromarray(np.array([[0, 77, 255]], np.uint8)).save(tmp_path / "gray.png")
    assert colours(tmp_path / "gray.png").tolist() == [[[0] * 3, [77] * 3, [255] * 3]]
    Image.fromarray(np.array([[0, 255]], np.uint8)).convert("1").save(tmp_path / "bits.png")
    assert colours(tmp_path / "bits.png").tolist() == [[[0] * 3, [255] * 3]]
    palette = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette.save(tmp_path / "palette.png")
    assert colours(tmp_path / "palette.png").tolist() == [[[10, 20, 30], [200, 100, 50]]]
    palette.save(tmp_path / "hole.png", transparency=1)
    assert colours(tmp_path / "hole.png").tolist() == [[[10, 20, 30], [255, 255, 255]]]


@pytest.mark.parametrize("suffix", ["png", "webp", "tif"])
def test_transparency_is_put_on_white(tmp_path, suffix):
    pixels = np.array([[[200, 0, 100, 255], [200, 0, 100, 0], [0, 0, 0, 51]]], np.uint8)
    exact = {"lossless": True, "exact": True} if suffix == "webp" else {}
    Image.fromarray(pixels, "RGBA").save(tmp_path / f"a.{suffix}", **exact)
    wanted = [[[200, 0, 100], [255, 255, 255], [204, 204, 204]]]
    np.testing.assert_allclose(colours(tmp_path / f"a.{suffix}"), wanted, atol=1)


def test_gray_with_transparency(tmp_path):
    pixels = np.array([[[90, 255], [90, 0]]], np.uint8)
    Image.fromarray(pixels, "LA").save(tmp_path / "a.png")
    assert colours(tmp_path / "a.png").tolist() == [[[90] * 3, [255] * 3]]


def test_cmyk(tmp_path):
    pixels = np.array([[[255, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 255]]], np.uint8)
    Image.fromarray(np.repeat(pixels, 8, axis=1), "CMYK").save(tmp_path / "a.tif")
    wanted = [[0, 255, 255], [255, 255, 255], [0, 0, 0]]
    assert colours(tmp_path / "a.tif")[0, ::8].tolist() == wanted
    flat = np.broadcast_to(np.array([255, 0, 0, 0], np.uint8), (16, 16, 4))
    Image.fromarray(np.ascontiguousarray(flat), "CMYK").save(tmp_path / "a.jpg", quality=100)
    np.testing.assert_allclose(colours(tmp_path / "a.jpg")[8, 8], [0, 255, 255], atol=3)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_are_scaled_to_eight(tmp_path, suffix):
    levels = np.array([[0, 128, 129, 257, 32896, 65407, 65535]], np.uint16)
    Image.fromarray(levels).save(tmp_path / f"a.{suffix}")
    gray = colours(tmp_path / f"a.{suffix}")
    assert gray[0, :, 0].tolist() == [0, 0, 1, 1, 128, 255, 255]
    assert (gray == gray[:, :, :1]).all()


@pytest.mark.parametrize("name", ["a.bmp", "a.webp", "a.tif", "a.tiff", "A.PNG", "a.JPG", "a.Jpeg"])
def test_the_other_suffixes(tmp_path, name):
    image = picture(np.random.default_rng(0), 40, 20)
    image.save(tmp_path / name, **({"lossless": True} if "webp" in name else {"quality": 100}))
    assert list_images(tmp_path) == [tmp_path / name]
    lossy = 4 * name.lower().endswith(("jpg", "jpeg"))
    assert np.abs(colours(tmp_path / name).astype(int) - np.asarray(image)).mean() <= lossy


def test_cameras_orientation_is_obeyed(tmp_path):
    image = Image.fromarray(np.arange(18, dtype=np.uint8).reshape(2, 3, 3) * 10)
    exif = Image.Exif()
    exif[0x0112] = 6  # taken with the camera turned: rotate by 90 degrees clockwise to see it
    image.save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(colours(tmp_path / "a.png"), np.rot90(np.asarray(image), -1))


def test_listing_is_sorted_and_leaves_other_files_out(tmp_path):
    for name in ("b.png", "a.jpg", "10.png", "9.PNG", ".b.png", "._a.jpg", "notes.txt", "c.gif"):
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    assert [f.name for f in list_images(tmp_path)] == ["10.png", "9.PNG", "a.jpg", "b.png"]
    assert list_images(tmp_path / "nowhere") == []


# -------------------------------------------------------------------------------------- bad files


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "tif"])
@pytest.mark.parametrize("damage", ["cut off", "garbage", "empty", "cut short"])
def test_a_damaged_file_is_named(tmp_path, suffix, damage):
    path = tmp_path / f"bad.{suffix}"
    picture(np.random.default_rng(0), 64, 64).save(path)
    whole = path.read_bytes()
    garbage = np.random.default_rng(0).bytes(500)
    left = {"cut off": whole[: len(whole) // 2], "garbage": garbage, "empty": b""}
    path.write_bytes(left.get(damage, whole[:20]))
    with pytest.raises(RunError) as error:
        load_rgb(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(RunError, match=r"gone\.png"):
        load_rgb(tmp_path / "gone.png")


def test_floating_point_pixels_are_refused(tmp_path):
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(RunError, match=r"a\.tif.*floating"):
        load_rgb(tmp_path / "a.tif")


def test_an_odd_width_is_refused(tmp_path):
    (tmp_path / "set" / "train").mkdir(parents=True)
    picture(np.random.default_rng(0), 65, 32).save(tmp_path / "set" / "train" / "a.png")
    dataset = PairDataset(tmp_path, "set", "train", 36, 32, False)
    with pytest.raises(RunError, match=r"a\.png is 65 pixels wide"):
        dataset[1, 0]


@pytest.mark.parametrize("size", [(2, 1), (20, 10), (20, 90), (600, 50)])
def test_halves_of_any_size_and_shape_are_resized(tmp_path, size):
    (tmp_path / "set" / "train").mkdir(parents=True)
    picture(np.random.default_rng(0), *size).save(tmp_path / "set" / "train" / "a.jpg")
    x, y = PairDataset(tmp_path, "set", "train", 36, 32, False, flip=True)[1, 0]
    assert x.shape == y.shape == (3, 32, 32)
    assert min(x.min(), y.min()) >= -1 and max(x.max(), y.max()) <= 1


def test_missing_empty_and_wrongly_laid_out_folders(tmp_path):
    def message(root, name="facades"):
        with pytest.raises(RunError) as error:
            PairDataset(root, name, "train", 36, 32, False)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "no data set" in message(tmp_path / "nowhere")
    (tmp_path / "facade").mkdir()
    (tmp_path / ".hidden").mkdir()
    absent = message(tmp_path)
    assert str(tmp_path / "facades") in absent and "did you mean facade?" in absent
    assert "python datasets/make_toy.py" in absent and "datasets/download.py facades" in absent
    assert "hidden" not in absent
    empty = message(tmp_path, "facade")
    assert "holds nothing" in empty and "expected train/" in empty
    write_pairs(tmp_path, "facade", train=0, test=1)  # train/ is there, without pictures
    (tmp_path / "facade" / "trainA").mkdir()
    laid_out_otherwise = message(tmp_path, "facade")
    assert "holds test, train, trainA" in laid_out_otherwise
    assert "python datasets/" in laid_out_otherwise  # the command that mends it

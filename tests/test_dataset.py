"""Files to tensors: formats, pairing, geometry, what is random, what is noted."""

import shutil
import struct
from importlib import import_module

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from torch.utils.data import DataLoader

from conftest import METHODS, UNPAIRED, load_script, picture

unpaired = pytest.mark.parametrize("method", UNPAIRED)
pix2pix = pytest.mark.skipif("pix2pix" not in METHODS, reason="pix2pix is not here")
any_dataset = import_module(f"{METHODS[0]}_dataset")  # the three read files alike
load_rgb, list_images = any_dataset.load_rgb, any_dataset.list_images
UserError = any_dataset.UserError
BICUBIC = Image.Resampling.BICUBIC


@pytest.fixture(autouse=True)
def forget_notes():
    """Each note is printed once per process: the tests start without any."""
    for method in METHODS:
        import_module(f"{method}_dataset").NOTED.clear()


def flags(method, root, *words):
    words = ["--data-root", str(root), "--data-folder", "set", "--image-size", "32", *words]
    return import_module(f"{method}_flags").parse_args(words)


def dataset(method, root, *words, split="train", training=True):
    module = import_module(f"{method}_dataset")
    kind = module.PairDataset if method == "pix2pix" else module.UnpairedDataset
    return kind(flags(method, root, *words), split, training)


def build_data(method, root, *words):
    return load_script(method).build_data(flags(method, root, *words))


def write(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(np.asarray(pixels))
    image.save(path, **options)


def write_images(method, root, images, split="train", names=("x", "y")):
    """images: (x, y) of numpy arrays. As pairs, or as two sides that need not be equally many."""
    for index, (x, y) in enumerate(images):
        if method == "pix2pix":
            write(root / "set" / split / f"{index:02}.png", np.concatenate([y, x], axis=1))
        for name, pixels in () if method == "pix2pix" else zip(names, (x, y), strict=True):
            if pixels is not None:
                write(root / "set" / split / name / f"{index:02}.png", pixels)
    return root


def ramp(number, size=36):
    """Red is the column, green the row, blue the file's number."""
    rows, columns = np.mgrid[:size, :size]
    return np.stack([columns, rows, np.full_like(rows, number)], axis=2).astype(np.uint8)


def write_ramps(method, root, x=4, y=4, **options):
    """x counts from 0, y from 100; the halves of a pair are equal."""
    first = 0 if method == "pix2pix" else 100
    sides = ([ramp(k) if k < x else None for k in range(max(x, y))],)
    sides += ([ramp(first + k) if k < y else None for k in range(max(x, y))],)
    return write_images(method, root, zip(*sides, strict=True), **options)


def read_ramp(image):
    """(number, left, top, flipped) of a crop of 32 pixels of a ramp; fails for anything else."""
    assert image.shape == (3, 32, 32) and image.dtype == torch.uint8
    columns, rows, number = image.numpy().astype(int)
    flipped = bool(columns[0, 0] > columns[0, -1])
    columns = columns[:, ::-1] if flipped else columns
    left, top = int(columns[0, 0]), int(rows[0, 0])
    assert (columns == left + np.arange(32)).all()
    assert (rows == top + np.arange(32)[:, None]).all() and (number == number[0, 0]).all()
    return int(number[0, 0]), left, top, flipped


def read_epoch(data, epoch):
    return [tuple(read_ramp(side) for side in data[epoch, index]) for index in range(len(data))]


def contains(image, tensor):
    """Whether the tensor (3, h, w) is a window of the image (PIL), unchanged."""
    pixels, window = np.asarray(image), tensor.permute(1, 2, 0).numpy()
    views = np.lib.stride_tricks.sliding_window_view(pixels, window.shape)
    return (views == window).all(axis=(-1, -2, -3)).any()


def noise(rng, width, height):
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_crops_and_flips(method, tmp_path):
    """Each of 5 x 5 x 2 occurs; one for both halves of a pair, two for images without pairs."""
    data = dataset(method, write_ramps(method, tmp_path))
    pairs = [pair for epoch in range(1, 101) for pair in read_epoch(data, epoch)]
    for side in (0, 1):
        assert len({pair[side][1:] for pair in pairs}) == 50
        assert 0.4 < np.mean([pair[side][3] for pair in pairs]) < 0.6
    equal = np.mean([x[1:] == y[1:] for x, y in pairs])
    assert equal == 1 if method == "pix2pix" else equal < 0.08
    for part in (1, 2, 3) if method != "pix2pix" else ():
        parts = np.array([(x[part], y[part]) for x, y in pairs], dtype=float)
        assert abs(np.corrcoef(parts.T)[0, 1]) < 0.2


def test_flags_reach_the_geometry(method, tmp_path):
    write_ramps(method, tmp_path)
    epochs = range(1, 11)
    still = [p for e in epochs for p in read_epoch(dataset(method, tmp_path, "--no-flip"), e)]
    assert {side[3] for pair in still for side in pair} == {False}
    assert len({pair[0][1:] for pair in still}) > 10
    data = dataset(method, tmp_path, "--no-flip", "--no-jitter")
    whole = Image.fromarray(ramp(0)).resize((32, 32), BICUBIC)
    for epoch in epochs:
        np.testing.assert_array_equal(data[epoch, 0][0].permute(1, 2, 0), whole)


def test_an_image_depends_on_seed_epoch_and_index_alone(method, tmp_path):
    """Not on the order, the workers or the global state, which it leaves as it was."""
    data, keys = dataset(method, write_ramps(method, tmp_path)), list(np.ndindex(3, 4))
    first = {key: [read_ramp(side) for side in data[key]] for key in keys}
    assert len({str([side[1:] for side in pair]) for pair in first.values()}) > 8
    torch.default_generator.manual_seed(5)
    np.random.seed(5)
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].tolist()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "manual_seed", None)  # it would also seed the accelerator
        assert {key: [read_ramp(side) for side in data[key]] for key in reversed(keys)} == first
    assert torch.equal(torch.get_rng_state(), state)
    assert np.random.get_state()[1].tolist() == numpy_state
    other = dataset(method, tmp_path, "--seed", "1")
    assert {key: [read_ramp(side) for side in other[key]] for key in keys} != first
    for workers in (1, 2):
        options = {"num_workers": workers, "generator": torch.Generator()}
        loader = DataLoader(data, batch_sampler=[[key] for key in keys], **options)
        loaded = [[read_ramp(side[0]) for side in batch] for batch in loader]
        assert loaded == list(first.values())


def test_neighbours_in_epoch_and_index_are_not_random_alike(method, tmp_path):
    data = dataset(method, write_ramps(method, tmp_path), "--seed", "3")
    seen = {(e, i): pair for e in range(40) for i, pair in enumerate(read_epoch(data, e))}
    for moved in ((1, 0), (0, 1), (1, -1)):
        both = [(pair, seen.get(tuple(np.add(key, moved)))) for key, pair in seen.items()]
        equal = [a[0][1:] == b[0][1:] for a, b in both if b]
        assert len(equal) > 100 and np.mean(equal) < 0.08


@pytest.mark.parametrize("size", [(70, 50), (50, 70), (10, 12), (1, 1)])
def test_stretch_is_the_resize_of_the_authors(method, tmp_path, size):
    rng = np.random.default_rng(0)
    x, y = noise(rng, *size), noise(rng, *size)
    write_images(method, tmp_path, [(x, y)])
    for words, sides in (((), (x, y)), (("--swap-xy",), (y, x))):
        jittered = dataset(method, tmp_path, "--no-flip", *words)[1, 0]
        still = dataset(method, tmp_path, *words, training=False)[1, 0]
        for pixels, crop, resized in zip(sides, jittered, still, strict=True):
            assert contains(Image.fromarray(pixels).resize((36, 36), BICUBIC), crop)
            exact = Image.fromarray(pixels).resize((32, 32), BICUBIC)
            np.testing.assert_array_equal(resized.permute(1, 2, 0), exact)


@pytest.mark.parametrize("size", [(90, 45), (45, 90), (10, 20), (32, 32)])
def test_fit_crop_keeps_the_aspect(method, tmp_path, size):
    """Training: short side to 36, random crop. Test: short side to 32, crop at the centre."""
    pixels = noise(np.random.default_rng(0), *size)
    write_images(method, tmp_path, [(pixels, pixels)])
    width, height = (round(36 * side / min(size)) for side in size)
    resized = Image.fromarray(pixels).resize((width, height), BICUBIC)
    data = dataset(method, tmp_path, "--fit", "crop", "--no-flip")
    crops = [data[epoch, 0] for epoch in range(1, 21)]
    assert all(contains(resized, side) for crop in crops for side in crop)
    assert len({side.numpy().tobytes() for crop in crops for side in crop}) > 5
    assert all(torch.equal(x, y) for x, y in crops) or method != "pix2pix"
    width, height = (round(32 * side / min(size)) for side in size)
    resized = Image.fromarray(pixels).resize((width, height), BICUBIC)
    left, top = (width - 32) // 2, (height - 32) // 2
    for side in dataset(method, tmp_path, "--fit", "crop", training=False)[1, 0]:
        exact = resized.crop((left, top, left + 32, top + 32))
        np.testing.assert_array_equal(side.permute(1, 2, 0), exact)


@pytest.mark.parametrize("size, load_size", [(256, 286), (128, 143), (512, 572), (64, 72)])
def test_load_size_follows_image_size(size, load_size):
    assert flags(METHODS[0], "root", "--image-size", str(size)).load_size == load_size


@unpaired
@pytest.mark.parametrize("counts", [(7, 3), (3, 7), (5, 5)])
def test_an_epoch_is_the_longer_side_and_samples_the_shorter(method, tmp_path, counts):
    data = dataset(method, write_ramps(method, tmp_path, *counts))
    assert len(data) == max(counts)
    longer, shorter = (0, 1) if counts[0] >= counts[1] else (1, 0)
    sampled = []
    for epoch in range(1, 31):
        pairs = read_epoch(data, epoch)
        assert [pair[longer][0] % 100 for pair in pairs] == list(range(max(counts)))
        sampled.append([pair[shorter][0] % 100 for pair in pairs])
    assert len(set(map(tuple, sampled))) == 30  # every epoch is another
    assert any(len(set(epoch)) < min(counts) for epoch in sampled)  # at random, not in turn
    times, mean = np.bincount(np.ravel(sampled)), 30 * max(counts) / min(counts)
    assert len(times) == min(counts) and (abs(times - mean) < 5 * mean**0.5).all()


@unpaired
@pytest.mark.parametrize("x, y", [("train/x", "train/y"), ("train/X", "train/Y"),
                                  ("trainA", "trainB"), ("traina", "trainb")])  # fmt: skip
def test_folders_of_the_two_sides(method, tmp_path, x, y):
    for folder in (x, y):
        write(tmp_path / "set" / folder / "a.png", ramp(0))
    sides = dataset(method, tmp_path).sides
    assert sides == [[tmp_path / "set" / folder / "a.png"] for folder in (x, y)]
    assert dataset(method, tmp_path, "--swap-xy").sides == sides[::-1]


def test_order_of_an_epoch():
    orders = []
    for seed, epoch in ((0, 1), (0, 2), (1, 1)):
        batches = any_dataset.epoch_batches(10, 4, seed, epoch)
        assert [len(batch) for batch in batches] == [4, 4, 2]
        assert {key[0] for batch in batches for key in batch} == {epoch}
        orders.append([index for batch in batches for _, index in batch])
        assert sorted(orders[-1]) == list(range(10))
        assert batches == any_dataset.epoch_batches(10, 4, seed, epoch)
    assert len(set(map(tuple, orders))) == 3
    ranks = [any_dataset.epoch_batches(11, 2, 0, 1, rank, 3) for rank in range(3)]
    assert [[len(batch) for batch in batches] for batches in ranks] == [[2, 1]] * 3
    keys = {key for batches in ranks for batch in batches for key in batch}
    assert len(keys) == 9  # no image twice; two of eleven are left out


def test_test_images_are_whole_and_never_augmented(method, tmp_path):
    rng = np.random.default_rng(0)
    images = [(noise(rng, 32, 32), noise(rng, 32, 32)) for _ in range(2)]
    write_images(method, write_ramps(method, tmp_path), images, split="test")
    _, test_set = build_data(method, tmp_path)
    for epoch in range(8):
        for side, pixels in zip(test_set[epoch, 0], images[0], strict=True):
            options = (pixels, images[1][1]) if method != "pix2pix" else (pixels,)
            assert any((side.permute(1, 2, 0).numpy() == p).all() for p in options)


def test_without_test_images_eight_training_images_are_shown(method, tmp_path, capsys):
    train_set, test_set = build_data(method, write_ramps(method, tmp_path, 9, 9))
    assert "eight training images" in capsys.readouterr().err
    sides = [test_set.files] if method == "pix2pix" else test_set.sides
    assert [len(side) for side in sides] == [8] * len(sides) and len(train_set) == 9
    assert sides[0] == train_set.files[:8] and len(test_set) == 8
    assert torch.equal(test_set[1, 3][0], test_set[2, 3][0])
    if method != "pix2pix":  # a lone side is shown
        shutil.copytree(sides[0][0].parent, sides[0][0].parents[2] / "test" / "x")
        assert [len(side) for side in build_data(method, tmp_path)[1].sides] == [9, 8]


@pix2pix
def test_val_replaces_a_missing_test_folder(tmp_path):
    for split in ("train", "val"):
        write_ramps("pix2pix", tmp_path, split=split)
    assert {file.parent.name for file in build_data("pix2pix", tmp_path)[1].files} == {"val"}
    write_ramps("pix2pix", tmp_path, split="test")
    assert {file.parent.name for file in build_data("pix2pix", tmp_path)[1].files} == {"test"}


@unpaired
@pytest.mark.parametrize("name, size, paired", [
    ("00.jpg", 36, True), ("00.png", 36, True), ("00b.png", 36, False), ("00.png", 35, False),
])  # fmt: skip
def test_true_pairs_agree_in_name_and_size(method, tmp_path, capsys, name, size, paired):
    write_ramps(method, write_ramps(method, tmp_path), 1, 0, split="test")
    write(tmp_path / "set" / "test" / "y" / name, ramp(0, size))
    _, test_set = build_data(method, tmp_path)
    assert load_script(method).true_pairs(test_set) == paired
    assert ("they are measured as pairs" in capsys.readouterr().err) == paired


def read(path):
    image = load_rgb(path)
    assert image.mode == "RGB"
    return np.asarray(image)


def palette():
    image = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    image.putpalette([10, 20, 30, 200, 100, 50])
    return image


GRAY16 = np.array([[0, 128, 129, 257, 32896, 65407, 65535]], np.uint16)
RGBA = np.array([[[200, 0, 100, 255], [200, 0, 100, 0], [0, 0, 0, 51]]], np.uint8)
ON_WHITE = [[200, 0, 100], [255, 255, 255], [204, 204, 204]]
INK = Image.fromarray(np.array([[[255, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 255]]], np.uint8), "CMYK")
LOSSLESS = {"lossless": True, "exact": True}


@pytest.mark.parametrize("name, pixels, options, expected", [
    ("gray.png", np.array([[0, 77, 255]], np.uint8), {}, [0, 77, 255]),
    ("gray.pgm", np.array([[0, 77, 255]], np.uint8), {}, [0, 77, 255]),
    ("bits.png", np.array([[False, True]]), {}, [0, 255]),
    ("palette.png", palette(), {}, [[10, 20, 30], [200, 100, 50]]),
    ("hole.png", palette(), {"transparency": 1}, [[10, 20, 30], [255, 255, 255]]),
    ("rgba.png", RGBA, {}, ON_WHITE),
    ("rgba.tif", RGBA, {}, ON_WHITE),
    ("rgba.webp", RGBA, LOSSLESS, ON_WHITE),
    ("la.png", Image.fromarray(np.array([[[90, 255], [90, 0]]], np.uint8), "LA"), {}, [90, 255]),
    ("cmyk.tif", INK, {}, [[0, 255, 255], [255, 255, 255], [0, 0, 0]]),
    ("16.png", GRAY16, {}, [0, 0, 1, 1, 128, 255, 255]),
    ("16.tif", GRAY16, {}, [0, 0, 1, 1, 128, 255, 255]),
    ("16.pgm", GRAY16, {}, [0, 0, 1, 1, 128, 255, 255]),
    ("hole16.png", GRAY16, {"transparency": 257}, [0, 0, 1, 255, 128, 255, 255]),
])  # fmt: skip
def test_every_mode_becomes_8_bit_rgb(tmp_path, capsys, name, pixels, options, expected):
    write(tmp_path / name, pixels, **options)
    gray = [[value] * 3 if isinstance(value, int) else value for value in expected]
    np.testing.assert_allclose(read(tmp_path / name)[0], gray, atol=name.startswith("rgba"))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("suffix", [
    "jpg", "jpeg", "jfif", "png", "webp", "bmp", "tif", "tiff", "ppm", "pgm", "JPG", "Jfif", "PNG",
])  # fmt: skip
def test_every_suffix(tmp_path, suffix):
    image, path = picture(np.random.default_rng(0), 40, 20), tmp_path / f"a.{suffix}"
    image.save(path, **(LOSSLESS if suffix == "webp" else {"quality": 100}))
    assert list_images(tmp_path) == [path]
    lossy = 4 * suffix.lower().startswith("j")
    assert np.abs(read(path).astype(int) - np.asarray(image)).mean() <= lossy


def test_a_jpeg_far_larger_than_needed_is_decoded_smaller(tmp_path):
    image, path = picture(np.random.default_rng(0), 1600, 1200), tmp_path / "a.jpg"
    image.save(path, quality=100)
    small = load_rgb(path, 300)
    assert small.size == (400, 300) and load_rgb(path, 601) == load_rgb(path)
    assert np.abs(np.asarray(small, int) - np.asarray(image.resize((400, 300)))).mean() < 3


@pytest.mark.parametrize("suffix", ["png", "tif", "jpg"])
def test_colour_profiles_are_converted_to_srgb(tmp_path, suffix):
    """A profile of sRGB with red and green exchanged; a damaged one changes nothing."""
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    profile = srgb.replace(b"rXYZ", b"----").replace(b"gXYZ", b"rXYZ").replace(b"----", b"gXYZ")
    options = {"quality": 100, "subsampling": 0} if suffix == "jpg" else {}
    for icc, color in ((profile, (179, 106, 72)), (profile[:200], None), (b"x", None)):
        flat = np.full((16, 16, 3), (106, 179, 72), np.uint8)
        write(tmp_path / f"a.{suffix}", flat, icc_profile=icc, **options)
        found = read(tmp_path / f"a.{suffix}")[8, 8]
        np.testing.assert_allclose(found, color or flat[8, 8], atol=2)


def exif(orientation):
    """EXIF with an ill-typed entry after the orientation: XResolution as the text "72"."""
    entries = struct.pack("<HHIHH", 0x0112, 3, 1, orientation, 0)
    entries += struct.pack("<HHI4s", 0x011A, 2, 3, b"72")
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + entries + bytes(4)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
@pytest.mark.parametrize("orientation, upright", [
    (1, lambda a: a), (2, lambda a: a[:, ::-1]), (3, lambda a: a[::-1, ::-1]),
    (4, lambda a: a[::-1]), (5, lambda a: a.swapaxes(0, 1)), (6, lambda a: np.rot90(a, -1)),
    (7, lambda a: np.rot90(a, 2).swapaxes(0, 1)), (8, np.rot90), (99, lambda a: a),
])  # fmt: skip
def test_exif_orientation(tmp_path, suffix, orientation, upright):
    pixels = noise(np.random.default_rng(0), 3, 2).repeat(16, axis=0).repeat(16, axis=1)
    options = LOSSLESS if suffix == "webp" else {"quality": 100, "subsampling": 0}
    write(tmp_path / f"a.{suffix}", pixels, exif=exif(orientation), **options)
    np.testing.assert_allclose(read(tmp_path / f"a.{suffix}"), upright(pixels), atol=2)


def test_the_other_frames_of_a_file_change_nothing(tmp_path):
    """Neither for a rotated scan of two pages, nor where the second page is damaged."""
    page, path = Image.fromarray(ramp(0)[:24]), tmp_path / "a.tif"
    write(path, page, tiffinfo={0x0112: 6}, save_all=True, append_images=[page])
    np.testing.assert_array_equal(read(path), np.rot90(page, -1))
    data = bytearray(path.read_bytes())
    (first,) = struct.unpack_from("<I", data, 4)
    (entries,) = struct.unpack_from("<H", data, first)
    struct.pack_into("<I", data, first + 2 + 12 * entries, len(data) + 9)  # where page two begins
    path.write_bytes(data)
    np.testing.assert_array_equal(read(path), np.rot90(page, -1))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF", "ignore:Truncated File Read")
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "tif", "ppm"])
@pytest.mark.parametrize("damage", ["half", "start", "garbage", "empty", "missing"])
def test_an_unreadable_file_is_named(tmp_path, suffix, damage):
    path = tmp_path / f"bad.{suffix}"
    write(path, noise(np.random.default_rng(0), 64, 64))
    whole = path.read_bytes()
    parts = {"half": whole[: len(whole) // 2], "start": whole[:20], "empty": b""}
    path.write_bytes(parts.get(damage, bytes(500)))
    if damage == "missing":
        path.unlink()
    with pytest.raises(UserError, match=rf"^cannot read .*bad\.{suffix}: .*; replace or remove"):
        load_rgb(path)


@pytest.mark.parametrize("error", [SyntaxError, RuntimeError, struct.error, MemoryError])
def test_whatever_a_decoder_raises(tmp_path, monkeypatch, error):
    write(tmp_path / "a.png", ramp(0))

    def load(_):
        raise error("broken")

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", load)
    with pytest.raises(UserError, match=r"a\.png: broken"):
        load_rgb(tmp_path / "a.png")


@pix2pix
@pytest.mark.parametrize("pixels, found", [
    (ramp(0, 35), "is 35 pixels wide"), (np.ones((4, 8), np.float32), "floating-point pixels"),
])  # fmt: skip
def test_odd_widths_and_floating_point_are_refused(tmp_path, pixels, found):
    write(tmp_path / "set" / "train" / "a.tif", pixels)
    with pytest.raises(UserError, match=rf"a\.tif:? {found}"):
        dataset("pix2pix", tmp_path)[1, 0]


def test_files_that_are_passed_over_are_noted_once(tmp_path, capsys):
    for name in ("b.png", "10.png", "9.PNG", ".b.png", "._b.png", "notes.txt", "c.heic"):
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "dangling.png").symlink_to("nowhere")
    for _ in range(2):
        assert [file.name for file in list_images(tmp_path)] == ["10.png", "9.PNG", "b.png"]
    [line] = capsys.readouterr().err.splitlines()
    assert line == f"note: skipped in {tmp_path}: 4, such as c.heic"
    assert list_images(tmp_path / "nowhere") == []


@pytest.mark.parametrize("name, frames, expected", [
    ("a.tif", [ramp(1), ramp(2)], "only the first of its 2 frames is read"),
    ("a.png", [np.array([[0, 8191]], np.uint16)], "levels 0 to 8191; rescale them to 0 to 65535"),
    ("a.tif", [np.array([[-5, 9999]], np.int32)], "levels -5 to 9999; rescale them"),
    ("a.tif", [np.array([[0, 65536]], np.int32)], "levels 0 to 65536; rescale them"),
])  # fmt: skip
def test_odd_files_are_noted_once(tmp_path, capsys, name, frames, expected):
    first, *others = (Image.fromarray(frame) for frame in frames)
    write(tmp_path / name, first, **({"save_all": True, "append_images": others} if others else {}))
    for _ in range(2):
        read(tmp_path / name)
    [line] = capsys.readouterr().err.splitlines()
    assert expected in line and str(tmp_path / name) in line


@pytest.mark.parametrize("size, fit, noted", [
    ((60, 40), "stretch", True), ((40, 60), "stretch", True), ((40, 30), "stretch", False),
    ((31, 40), "stretch", False), ((60, 40), "crop", False),
])  # fmt: skip
def test_the_aspect_is_noted_once(method, tmp_path, capsys, size, fit, noted):
    image = noise(np.random.default_rng(0), *size)
    data = dataset(method, write_images(method, tmp_path, [(image, image)] * 2), "--fit", fit)
    for index in (0, 1):
        data[1, index]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) <= 1 and any("--fit crop" in line for line in lines) == noted


@pix2pix
@pytest.mark.parametrize("fit, hint", [("stretch", "--fit crop keeps"), ("crop", "is it a pair?")])
@pytest.mark.parametrize("width", [60, 54, 40, 30, 110])
def test_a_file_that_is_hardly_a_pair_is_noted(tmp_path, capsys, fit, hint, width):
    write(tmp_path / "set" / "train" / "a.png", noise(np.random.default_rng(0), width, 40))
    dataset("pix2pix", tmp_path, "--fit", fit)[1, 0]
    [line] = capsys.readouterr().err.splitlines()
    assert f"{width}x40, not twice as wide as high" in line and hint in line

"""datasets/make_toy.py: layout, pixels, determinism, bad input."""

import hashlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import make_toy
from conftest import names_in, pixels, tree

SIZE = 64
COUNTS = ("--count", "6", "--test-count", "3", "--size", str(SIZE))

# Of the first eight scenes: the digest of the label maps, and the photographs' mean colors.
LABELS_OF_SEED_0 = "bacc224c2de25eeb"
PHOTOS_OF_SEED_0 = """
    148.264 169.847 181.297 156.609 167.777 174.093 159.324 177.444 187.004 154.465 166.257 172.286
    157.689 161.041 153.361 152.971 164.564 165.874 156.271 155.081 137.358 141.298 163.311 181.683
"""


def run(root, *flags):
    command = [sys.executable, make_toy.__file__, "--root", root, *COUNTS, *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def toy(root, *flags):
    done = run(root, *flags)
    assert done.returncode == 0, done.stderr
    return root


def assert_one_line(done, *words):
    assert done.returncode == 2 and done.stderr.startswith("make_toy.py: error: ")
    assert done.stderr.count("\n") == 1 and all(str(word) in done.stderr for word in words)


@pytest.fixture(scope="module")
def toy_root(tmp_path_factory):
    return toy(tmp_path_factory.mktemp("toy"), "--seed", "3")


def test_layout_and_sizes(toy_root):
    counts = {"train": 6, "val": 3, "test": 3}
    names = {split: [f"{i + 1:04d}.png" for i in range(n)] for split, n in counts.items()}
    expected = {f"toy/{split}/{name}" for split in names for name in names[split]}
    for split in ("train", "test"):
        expected |= {f"toy_unpaired/{split}/{s}/{name}" for s in "xy" for name in names[split]}
    assert set(tree(toy_root)) == expected
    assert len(set(tree(toy_root / "toy").values())) == 12  # no scene twice
    for name in expected:
        with Image.open(toy_root / name) as image:
            assert image.mode == "RGB"
            assert image.size == ((2 * SIZE if name.startswith("toy/") else SIZE), SIZE)


def test_the_default_scenes_stay_as_they_are():
    """The same flags give the same images on every machine: labels exactly, photographs nearly."""
    label_digest, means = hashlib.sha256(), []
    for index in range(8):
        scene = make_toy.Scene(0, index)
        label_digest.update(make_toy.draw_labels(scene, 256).tobytes())
        photo = make_toy.draw_photo(scene, 256, np.random.default_rng([0, index, 1]))
        means.append(np.asarray(photo).mean((0, 1)))
    assert label_digest.hexdigest()[:16] == LABELS_OF_SEED_0
    np.testing.assert_allclose(np.ravel(means), np.fromstring(PHOTOS_OF_SEED_0, sep=" "), atol=0.01)


def test_same_seed_same_bytes_and_count_does_not_change_scenes(toy_root, tmp_path):
    larger = tree(toy(tmp_path, "--seed", "3", "--count", "8", "--test-count", "4"))
    ours = tree(toy_root)
    assert {name: larger[name] for name in ours} == ours


def test_left_half_is_a_photograph_and_right_half_a_label_map(toy_root):
    palette = set(make_toy.PALETTE.values())
    assert len(palette) == len(make_toy.PALETTE) == 15
    for file in (toy_root / "toy" / "train").iterdir():
        photo, label = (half.reshape(-1, 3) for half in np.split(pixels(file), 2, axis=1))
        label, photo = [{tuple(p) for p in half.tolist()} for half in (label, photo)]
        assert label <= palette and len(label) >= 6
        assert len(photo) > 1000


def test_edges_agree_in_label_and_photograph_at_an_odd_size():
    scene, box = make_toy.Scene(0, 0), (0.301, 0.297, 0.703, 0.709)
    scene.parts = [("plant", (0, 0, 1, 1), "rect"), ("street", box, "rect")]  # flat gray, no trim
    label = np.asarray(make_toy.draw_labels(scene, 67))
    rows, columns = np.where((label == make_toy.PALETTE["street"]).all(-1))
    assert (columns.min(), columns.max() + 1) == (round(0.301 * 67), round(0.703 * 67))
    assert (rows.min(), rows.max() + 1) == (round(0.297 * 67), round(0.709 * 67))
    scene.parts = scene.parts[1:]
    photo = np.asarray(make_toy.draw_photo(scene, 67, np.random.default_rng(0)))
    asphalt = photo[rows.max()].max(-1) < 125  # darker than any sky
    assert (np.where(asphalt)[0] == np.unique(columns)).all()


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_unpaired_sides_show_the_same_scenes_in_testing_only(toy_root, split):
    pairs, labels = tree(toy_root / "toy" / split), set()
    for name in pairs:
        photo, label = np.split(pixels(toy_root / "toy" / split / name), 2, axis=1)
        x, y = (pixels(toy_root / "toy_unpaired" / split / side / name) for side in "xy")
        assert (y == photo).all() and (x == label).all() == (split == "test")
        labels |= {x.tobytes(), label.tobytes()}
    assert len(labels) == (12 if split == "train" else 3)


def test_overwrite_replaces_both_datasets(tmp_path):
    (tmp_path / "toy_unpaired").mkdir()
    assert_one_line(run(tmp_path), tmp_path / "toy_unpaired", "--overwrite")
    before = tree(toy(tmp_path, "--overwrite"))
    assert_one_line(run(tmp_path, "--seed", "1"), tmp_path / "toy", "--overwrite")
    assert tree(tmp_path) == before
    after = tree(toy(tmp_path, "--seed", "1", "--count", "2", "--overwrite"))
    assert names_in(tmp_path / "toy/train") == ["0001.png", "0002.png"]
    assert not any(after[name] == before[name] for name in after)
    assert names_in(tmp_path) == ["toy", "toy_unpaired"]


@pytest.mark.parametrize("error, code, message", [
    (OSError(28, "disk full"), 2, "cannot write"), (KeyboardInterrupt(), 130, "interrupted"),
])  # fmt: skip
def test_nothing_is_left_if_writing_ends_early(tmp_path, monkeypatch, capsys, error, code, message):
    saved, save = [], Image.Image.save

    def fail(image, path, **kwargs):
        if len(saved) == 5:
            raise error
        saved.append(path)
        save(image, path, **kwargs)

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(SystemExit) as stop:
        make_toy.main(["--root", str(tmp_path), "--count", "4", "--size", "32"])
    assert stop.value.code == code
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert len(saved) == 5 and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flags, words", [
    (("--count", "0"), ("--count is 0", "1 or more")),
    (("--size", "10"), ("--size is 10", "32 or more")), (("--siz", "64"), ("--siz",)),
])  # fmt: skip
def test_bad_flags_are_one_line(tmp_path, flags, words):
    assert_one_line(run(tmp_path / "new", *flags), *words)
    assert list(tmp_path.iterdir()) == []

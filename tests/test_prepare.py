"""datasets/prepare.py: people's own folders, pairs, and pairs cut in two."""

import shutil
import signal
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import images
import prepare
from conftest import ROOT, names_in, pixels, tree


def image(number, size=(16, 12), low=0):
    """Red says which image it is, green falls from left to right, blue is `low`."""
    width, height = size
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0], pixels[..., 1], pixels[..., 2] = number, np.linspace(200, 0, width), low
    return Image.fromarray(pixels)


def save(folder, names, low=0, **kwargs):
    for number, name in enumerate(names, 1):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        image(number, low=low, **kwargs).save(folder / name)


@pytest.fixture
def folders(tmp_path):
    """Two folders of ten and five images, partly in sub-folders."""
    save(tmp_path / "photos", [*[f"{i}.png" for i in range(7)], "a/7.JPG", "a/b c/8.tif", "9.ppm"])
    save(tmp_path / "art", [f"{i}.png" for i in range(4)] + ["deep/er/4.webp"], low=255)
    return tmp_path / "photos", tmp_path / "art"


@pytest.fixture
def pair_set(tmp_path):
    """datasets/pairs with nine training, four val and three test pairs: y blue, x not."""
    folder = tmp_path / "data" / "pairs"
    splits = {"train": range(1, 10), "val": range(10, 14), "test": range(14, 17)}
    for split, numbers in splits.items():
        (folder / split).mkdir(parents=True)
        for number in numbers:
            pair = np.hstack([image(number, low=255), image(number)])
            Image.fromarray(pair).save(folder / split / f"{number}.png")
    return folder


def run(tmp_path, *words):
    images.NOTED.clear()
    prepare.main([*map(str, words), "--data-root", str(tmp_path / "data")])
    return tmp_path / "data"


def error_of(capsys, tmp_path, *words):
    """The one-line error of a call that leaves the data root as it was."""
    before = tree(tmp_path / "data")
    with pytest.raises(SystemExit) as end:
        run(tmp_path, *words)
    error = capsys.readouterr().err.splitlines()[-1]
    assert end.value.code == 2 and error.startswith("prepare.py: error: ")
    assert tree(tmp_path / "data") == before and not [*tmp_path.glob("data/.*")]
    return error


def test_unpaired_copies_every_file_as_it_is_and_holds_out_a_fifth(folders, tmp_path, capsys):
    before = tree(tmp_path)
    new = run(tmp_path, "unpaired", *folders, "mine") / "mine"
    for side, folder, total in zip("xy", folders, (10, 5), strict=True):
        train, test = tree(new / "train" / side), tree(new / "test" / side)
        assert len(test) == total // 5 and len(train) == total - total // 5
        assert sorted((train | test).values()) == sorted(tree(folder).values())
        assert {Path(name).name for name in tree(folder)} == train.keys() | test.keys()
    assert {name: data for name, data in tree(tmp_path).items() if name in before} == before
    out = capsys.readouterr().out
    assert f"{new}/train/x: 8 images" in out and f"{new}/test/y: 1 images" in out
    assert names_in(tmp_path / "data") == ["mine"]


@pytest.mark.parametrize(("test", "train"), [(1, 9), (0, 10), (9, 8)])
def test_test_gives_the_number_of_test_images_up_to_a_fifth(folders, tmp_path, test, train):
    new = run(tmp_path, "unpaired", *folders, "mine", "--test", test) / "mine"
    assert len(tree(new / "train/x")) == train


def test_two_files_of_one_photo_are_both_for_testing_or_both_for_training(tmp_path):
    save(tmp_path / "x", [f"{i}.{suffix}" for i in range(20) for suffix in ("png", "bmp")])
    save(tmp_path / "y", ["1.png"])
    new = run(tmp_path, "unpaired", tmp_path / "x", tmp_path / "y", "mine") / "mine"
    test, train = ({n.split(".")[0] for n in names_in(new / p / "x")} for p in ("test", "train"))
    assert len(test) == 4 and not test & train


def test_the_seed_alone_samples_the_test_images_and_differently_on_each_side(tmp_path):
    for side in "xy":
        save(tmp_path / side, [f"{i:02}.png" for i in range(40)])
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(tmp_path, "unpaired", tmp_path / "x", tmp_path / "y", name, "--seed", seed)
    a, b, c = (tree(tmp_path / "data" / name) for name in "abc")
    assert a == b and a.keys() != c.keys()
    test_x, test_y = (names_in(tmp_path / "data/a/test" / side) for side in "xy")
    assert len(test_x) == len(test_y) == 8 and test_x != test_y
    assert test_x != [f"{i:02}.png" for i in range(8)]


def test_what_is_left_out_is_counted_and_named(folders, tmp_path, capsys):
    photos, _ = folders
    (photos / "phone.heic").write_bytes(b"heic")
    (photos / "a" / "moving.gif").write_bytes(b"GIF89a")
    (photos / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (photos / "linked").symlink_to(tmp_path / "art")
    (photos / "broken.png").write_bytes((photos / "1.png").read_bytes()[:60])
    for number in range(4):
        (photos / "text").mkdir(exist_ok=True)
        (photos / "text" / f"{number}.txt").write_text("text")
    (photos / ".hidden.png").write_bytes(b"thumbnail")
    new = run(tmp_path, "unpaired", *folders, "mine") / "mine"
    assert len(tree(new / "train/x") | tree(new / "test/x")) == 10
    others, broken = [li for li in capsys.readouterr().out.splitlines() if "left out" in li]
    assert "left out: 8 of other formats" in others and "HEIC" in others
    assert all(name in others for name in ("phone.heic", "a/moving.gif", "gone.jpg", "linked"))
    assert others.endswith("text/0.txt, and 3 more")
    assert "broken.png" in broken


@pytest.mark.parametrize("names, expected", [
    (["1.png", "a/2.png"], ["1.png", "2.png"]),
    (["1.png", "a/1.png", "a/b/c.png"], ["1.png", "a-1.png", "a-b-c.png"]),
    (["1.png", "1.bmp"], ["1.bmp.bmp", "1.png.png"]),
    (["A.png", "s/a.png"], ["A.png", "s-a.png"]),  # one file where letter case is ignored
])  # fmt: skip
def test_equal_names_get_those_of_the_sub_folders(tmp_path, names, expected):
    save(tmp_path / "x", names)
    save(tmp_path / "y", ["9.png"])
    new = run(tmp_path, "unpaired", tmp_path / "x", tmp_path / "y", "mine", "--test", "0")
    assert names_in(new / "mine/train/x") == expected


def test_pairs_have_y_left_and_x_right_by_name(tmp_path, capsys):
    save(tmp_path / "x", ["1.png", "2.png", "a/3.jpg", "lonely.png"])
    save(tmp_path / "y", ["1.bmp", "a/b/2.png", "3.png", "single.png"], low=255)
    new = run(tmp_path, "pairs", tmp_path / "x", tmp_path / "y", "mine") / "mine"
    assert names_in(new) == ["train"] and names_in(new / "train") == ["1.png", "2.png", "3.png"]
    for number in (1, 2):
        expected = np.hstack([image(number, low=255), image(number)])
        assert (pixels(new / "train" / f"{number}.png") == expected).all()
    [line] = [line for line in capsys.readouterr().out.splitlines() if "left out" in line]
    assert "left out: 2 without" in line and "x/lonely.png" in line and "y/single.png" in line


def test_pairs_of_equal_names_go_by_their_sub_folders(tmp_path):
    save(tmp_path / "x", ["a/1.png", "b/1.png"])
    save(tmp_path / "y", ["b/1.bmp"], low=255)
    new = run(tmp_path, "pairs", tmp_path / "x", tmp_path / "y", "mine") / "mine/train"
    assert names_in(new) == ["b-1.png"] and pixels(new / "b-1.png")[0, 16, 0] == 2  # b/1.png


def test_a_name_of_two_files_stops_pairs(tmp_path, capsys):
    save(tmp_path / "x", ["1.png", "2.png", "2.jpg"])
    save(tmp_path / "y", ["1.jpg", "2.jpg"])
    error = error_of(capsys, tmp_path, "pairs", tmp_path / "x", tmp_path / "y", "mine")
    assert f"two files in {tmp_path / 'x'} or {tmp_path / 'y'} are called 2; rename one" in error


def test_accents_of_a_mac_and_of_other_systems_are_the_same(tmp_path):
    save(tmp_path / "x", [unicodedata.normalize("NFD", "é.png")])
    save(tmp_path / "y", [unicodedata.normalize("NFC", "é.png")])
    new = run(tmp_path, "pairs", tmp_path / "x", tmp_path / "y", "mine")
    assert names_in(new / "mine/train") == [unicodedata.normalize("NFC", "é.png")]


def test_pairs_apply_the_rotation_and_resize_x_to_y(tmp_path, capfd):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: turn by 90 degrees to the right
    save(tmp_path / "y", ["1.png"], low=255, size=(30, 40))
    (tmp_path / "x").mkdir()
    upright = image(1, (60, 80))
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "x/1.png", exif=exif)
    new = run(tmp_path, "pairs", tmp_path / "x", tmp_path / "y", "mine") / "mine"
    pair = pixels(new / "train/1.png").astype(int)
    assert (pair[:, :30] == np.asarray(image(1, (30, 40), 255))).all()
    assert pair.shape == (40, 60, 3)
    assert np.abs(pair[:, 30:] - np.asarray(image(1, (30, 40)))).max() <= 4
    assert "stretched" not in capfd.readouterr().err
    image(1, (60, 60)).save(tmp_path / "x/1.png")
    run(tmp_path, "pairs", tmp_path / "x", tmp_path / "y", "mine", "--overwrite")
    assert "x/1.png is stretched to the shape of " in capfd.readouterr().err


def file_numbers(folder, low):
    """The numbers of the pairs that a folder's images come from, every pixel checked."""
    numbers = {int(file.stem) for file in folder.iterdir()}
    for number in numbers:
        assert (pixels(folder / f"{number}.png") == np.asarray(image(number, low=low))).all()
    return numbers


def test_split_gives_disjoint_training_halves_and_both_test_sides(pair_set, tmp_path):
    new = run(tmp_path, "split", "pairs", "cut") / "cut"
    x, y = file_numbers(new / "train/x", 0), file_numbers(new / "train/y", 255)
    assert not x & y and x | y == set(range(1, 10))
    order = np.random.default_rng(0).permutation(9)[:5]  # the rule of published results
    assert x == set((order + 1).tolist())
    for side, low in (("x", 0), ("y", 255)):
        assert file_numbers(new / "test" / side, low) == {14, 15, 16}


def test_split_all_takes_both_sides_of_every_pair(pair_set, tmp_path):
    shutil.rmtree(pair_set / "test")  # then val is for testing
    new = run(tmp_path, "split", "pairs", "cut", "--all") / "cut"
    for side, low in (("x", 0), ("y", 255)):
        assert file_numbers(new / "train" / side, low) == set(range(1, 10))
        assert file_numbers(new / "test" / side, low) == {10, 11, 12, 13}


def test_split_leaves_out_what_has_no_halves(pair_set, tmp_path, capsys):
    Image.new("RGB", (33, 12)).save(pair_set / "train" / "5.png")
    new = run(tmp_path, "split", "pairs", "cut", "--all") / "cut"
    assert file_numbers(new / "train/x", 0) == set(range(1, 10)) - {5}
    assert "5.png is 33 pixels wide" in capsys.readouterr().out


def test_an_existing_dataset_is_replaced_only_with_overwrite(folders, tmp_path, capsys):
    new = run(tmp_path, "unpaired", *folders, "mine") / "mine"
    assert "--overwrite" in error_of(capsys, tmp_path, "unpaired", *folders, "mine")
    run(tmp_path, "pairs", *folders, "mine", "--overwrite")
    assert names_in(new) == ["test", "train"] and any((new / "train").glob("*.png"))
    (new / "thesis.txt").write_text("dear")
    error = error_of(capsys, tmp_path, "unpaired", *folders, "mine", "--overwrite")
    assert "thesis.txt" in error
    for source in (new, new / "train", new.parent):  # a source is never replaced
        words = ["unpaired", source, folders[1], "mine", "--overwrite"]
        assert "overlap" in error_of(capsys, tmp_path, *words)


@pytest.mark.parametrize("ending", [KeyboardInterrupt, OSError(28, "disk full")])
def test_what_ends_early_leaves_the_old_dataset_and_nothing_else(
    folders, tmp_path, capsys, monkeypatch, ending
):
    root = run(tmp_path, "unpaired", *folders, "mine")
    before, copied, copy = tree(root), [], shutil.copyfile

    def fail(source, target):
        if len(copied) == 3:
            raise ending
        copied.append(copy(source, target))

    monkeypatch.setattr(shutil, "copyfile", fail)
    with pytest.raises(SystemExit) as end:
        run(tmp_path, "unpaired", *folders, "mine", "--overwrite")
    assert end.value.code == (130 if ending is KeyboardInterrupt else 2)
    assert tree(root) == before and names_in(root) == ["mine"] and len(copied) == 3
    for number in (signal.SIGTERM, signal.SIGHUP):
        assert signal.getsignal(number) is signal.default_int_handler


@pytest.mark.parametrize("words, expected", [
    ("unpaired nowhere art mine", "nowhere: no folder"),
    ("unpaired empty art mine", "empty: no images"),
    ("pairs photos other mine", "no usable image for mine/train"),
    ("unpaired photos photos mine", "overlap"), ("split sides cut", "has two sides already"),
    ("unpaired photos art a/b", "'a/b' is not a plain folder name"),
    ("unpaired photos art mine --test -1", "--test"), ("split nowhere cut", "train: no folder"),
    ("cut pairs mine", "invalid choice"), ("split photos art mine", "split NAME NEW"),
])  # fmt: skip
def test_bad_input_is_one_line(folders, tmp_path, capsys, monkeypatch, words, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    save(tmp_path / "other", ["unlike.png"])
    save(tmp_path / "data/sides/train/x", ["1.png"])
    assert expected in error_of(capsys, tmp_path, *words.split())


def test_the_last_line_is_the_next_command_and_torch_is_not_needed(folders, tmp_path):
    for command, method in (("unpaired", "CUT"), ("pairs", "pix2pix")):
        code = f"import sys; sys.modules['torch'] = None; sys.argv = ['prepare.py', \
{command!r}, {str(folders[0])!r}, {str(folders[1])!r}, {command!r}, '--data-root', 'my data']; \
sys.path.insert(0, {str(ROOT / 'datasets')!r}); import prepare; prepare.main()"
        call = [sys.executable, "-c", code]
        done = subprocess.run(call, cwd=tmp_path, capture_output=True, text=True, check=True)
        script = ROOT / method / "train.py"
        flags = f"--data-folder {command} --data-root 'my data' --fit crop --save-model"
        assert done.stdout.splitlines()[-1] == f"next: python {script} {flags}"

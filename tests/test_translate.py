"""What the three translate.py promise: sizes, names, options, plain errors, old checkpoints. The
images are random blobs; the networks are untrained."""

import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import METHODS, ROOT, commands_here, load_script, picture, pixels, status_of, tree

OLD = ROOT / "tests" / "old_checkpoints"  # written by commit c8368aa, with an image and its result
IDENTITY = (lambda x: x, 4, 32)


@pytest.fixture
def module(method, monkeypatch):
    """translate.py, which imports from the `train` of its folder."""
    monkeypatch.setitem(sys.modules, "train", load_script(method))
    sys.modules[f"{method}_dataset"].NOTED.clear()
    with commands_here(method):
        yield load_script(method, "translate")


@pytest.fixture
def unchanged(module, monkeypatch):
    """The generator returns its input."""
    monkeypatch.setattr(module, "load_generator", lambda *_: IDENTITY)


@pytest.fixture
def checkpoint(method, module, tmp_path):
    return write_checkpoint(method, module, tmp_path / "checkpoint.pt")


def write_checkpoint(method, module, path, names=("G",), **flags):
    """A checkpoint of small random networks."""
    torch.manual_seed(0)
    flags = {"image_size": 32, "ngf": 4, "n_layers": 5, **flags}
    state = {"method": method, "args": flags}
    for name in names:
        state[name] = make_generator(method, module, flags).state_dict()
        for weights in state[name].values():
            weights.normal_(std=1 if weights.dim() == 1 else weights[0].numel() ** -0.5)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path)
    return path


def make_generator(method, module, flags):
    if method == "pix2pix":
        return module.UNetGenerator(flags["image_size"], flags["ngf"])
    return module.ResnetGenerator(flags["n_layers"], flags["ngf"])


@torch.no_grad()
def expected_pixels(method, module, checkpoint, name, image, dropout=True):
    """What the network `name` of the checkpoint makes of an image, without translate.py."""
    state = torch.load(checkpoint, weights_only=True)
    G = make_generator(method, module, state["args"]).train(dropout)
    G.load_state_dict(state[name])
    x = torch.tensor(np.asarray(image)).permute(2, 0, 1)[None] / 127.5 - 1
    y = load_script(method).translate(G, x) if method == "pix2pix" else G(x)
    return np.rint((y[0].permute(1, 2, 0).numpy() + 1) * 127.5)


def write_images(folder, *sizes):
    """Random images 0.png, 1.png, ... of sizes (width, height). Returns folder."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for k, size in enumerate(sizes):
        picture(rng, *size).save(folder / f"{k}.png")
    return folder


def run(module, checkpoint, source, output, *flags):
    """The exit status of main."""
    sources = source if isinstance(source, list) else [source]
    argv = ["--checkpoint", checkpoint, "--input", *sources, "--output", output, "--device", "cpu"]
    return status_of(module.main, *argv, *flags)


def messages(capsys):
    """The lines of standard error, without the progress bar."""
    text = capsys.readouterr().err.replace("\r", "\n")
    return [line for line in text.splitlines() if line.strip() and "img/s" not in line]


@pytest.mark.parametrize("multiple", [4, 256])
def test_padding_reflects_and_is_cropped(module, monkeypatch, tmp_path, multiple):
    sizes, seen = [(300, 20), (1, 1), (1, 50), (33, 32), (257, 31)], []
    generator = (lambda x: seen.append(x) or x, multiple, 512)
    monkeypatch.setattr(module, "load_generator", lambda *_: generator)
    source = write_images(tmp_path / "in", *sizes)
    assert run(module, "c.pt", source, tmp_path / "out") == 0
    for k, ((width, height), x) in enumerate(zip(sizes, seen, strict=True)):
        image = pixels(source / f"{k}.png")
        np.testing.assert_array_equal(pixels(tmp_path / "out" / f"{k}.png"), image)
        padded = np.rint((x[0].permute(1, 2, 0).numpy() + 1) * 127.5)
        places = []
        for side, total in ((height, padded.shape[0]), (width, padded.shape[1])):
            assert total == max(32, -(-side // multiple) * multiple)
            period = max(2 * side - 2, 1)  # there and back, without repeating the ends
            offsets = [(k - (total - side) // 2) % period for k in range(total)]
            places.append([min(offset, period - offset) if side > 1 else 0 for offset in offsets])
        np.testing.assert_array_equal(padded, image[places[0]][:, places[1]])


@pytest.mark.usefixtures("unchanged")
def test_size_restore_size_and_side_by_side(module, tmp_path):
    source = write_images(tmp_path / "in", (60, 101))
    image = Image.open(source / "0.png")
    small = image.resize((48, 81), Image.Resampling.BICUBIC)
    restored = small.resize((60, 101), Image.Resampling.BICUBIC)
    for flags, expected in (
        ("--size 48", [small]),
        ("--size 48 --restore-size", [restored]),
        ("--side-by-side", [image, image]),
        ("--size 48 --side-by-side", [small, small]),
        ("--size 48 --side-by-side --restore-size", [image, restored]),
    ):
        assert run(module, "c.pt", source, tmp_path / "out", *flags.split()) == 0
        np.testing.assert_array_equal(pixels(tmp_path / "out" / "0.png"), np.hstack(expected))


def test_a_result_depends_on_its_image_alone(module, checkpoint, tmp_path):
    """Equal bytes alone, and last of many after an unreadable file."""
    source = write_images(tmp_path / "in", (40, 40), (65, 33))
    shutil.copy(source / "0.png", source / "same.png")
    (source / "1b.png").write_text("not an image")
    assert run(module, checkpoint, source, tmp_path / "many") == 1
    assert run(module, checkpoint, source / "same.png", tmp_path / "one") == 0
    many, one = tree(tmp_path / "many"), tree(tmp_path / "one")
    assert many["same.png"] == many["0.png"] == one["same.png"] != many["1.png"]
    assert not torch.backends.cudnn.benchmark and torch.backends.cudnn.deterministic


@pytest.mark.parametrize("method", ["pix2pix"] if "pix2pix" in METHODS else [])
def test_dropout_is_on_unless_switched_off(method, module, checkpoint, tmp_path):
    source = write_images(tmp_path / "in", (64, 64))
    for flag, dropout in (("--dropout", True), ("--no-dropout", False)):
        assert run(module, checkpoint, source, tmp_path / "out", flag) == 0
        image = Image.open(source / "0.png")
        expected = expected_pixels(method, module, checkpoint, "G", image, dropout)
        np.testing.assert_array_equal(pixels(tmp_path / "out" / "0.png"), expected)


@pytest.mark.parametrize("names", [("G", "F"), ("G", "F", "G_ema", "F_ema")])
def test_a_result_is_what_the_network_or_its_average_gives(method, module, tmp_path, names):
    checkpoint = write_checkpoint(method, module, tmp_path / "c.pt", names)
    source = write_images(tmp_path / "in", (64, 64))
    for flags, name in (([], "G"), (["--direction", "y2x"], "F")):
        if name == "G" or method == "cycleGAN":
            assert run(module, checkpoint, source, tmp_path / "out", *flags) == 0
            name = f"{name}_ema" if "G_ema" in names else name
            image = Image.open(source / "0.png")
            expected = expected_pixels(method, module, checkpoint, name, image)
            assert expected.std() > 20
            np.testing.assert_array_equal(pixels(tmp_path / "out" / "0.png"), expected)


@pytest.mark.parametrize("method, file", [(m, f) for m in METHODS for f in OLD.glob(f"{m}*.pt")])
def test_checkpoints_of_earlier_commits_give_the_same_pixels(method, module, file, tmp_path):
    old = torch.load(file, weights_only=True)
    Image.fromarray(old["x"].numpy()).save(tmp_path / "0.png")
    assert run(module, file, tmp_path / "0.png", tmp_path / "out") == 0
    difference = np.abs(pixels(tmp_path / "out" / "0.png").astype(int) - old["y"].numpy())
    assert difference.max() <= ("antialias" in file.name)  # the blurs round differently


def test_a_folder_copied_out_alone_works(method, checkpoint, tmp_path, warm_python):
    """And without streams."""
    code, source = tmp_path / "code" / method, write_images(tmp_path / "in", (45, 33))
    shutil.copytree(ROOT / method, code, ignore=shutil.ignore_patterns("__pycache__", "model"))
    command = [warm_python, code / "translate.py", "--checkpoint", checkpoint]
    command += ["--input", source, "--output", "out", "--device", "cpu"]
    shell = " ".join(map(str, command)) + " >&- 2>&-"
    assert subprocess.run(shell, shell=True, cwd=tmp_path, timeout=120, check=False).returncode == 0
    assert pixels(tmp_path / "out" / "0.png").shape == (33, 45, 3)


def test_the_folder_of_a_run_stands_for_its_checkpoint(method, module, tmp_path, monkeypatch):
    write_checkpoint(method, module, tmp_path / method / "model" / "first" / "checkpoint.pt")
    write_checkpoint(method, module, tmp_path / "visualize" / "any" / "x.pt")  # a file stays one
    source = write_images(tmp_path / "in", (32, 32))
    (tmp_path / "visualize" / method / "first").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "visualize")
    for folder in (f"{method}/first", f"../{method}/model/first", "any/x.pt"):
        assert run(module, folder, source, tmp_path / "out" / folder[:2]) == 0


@pytest.mark.usefixtures("unchanged")
def test_several_inputs_and_other_files(module, tmp_path, capsys):
    first, second = write_images(tmp_path / "a", (9, 8)), write_images(tmp_path / "b", (7, 6))
    shutil.move(second / "0.png", second / "photo.v2.JPG")
    (first / "notes.txt").write_text("not an image")
    source = [first, second / "photo.v2.JPG", first / "0.png"]
    assert run(module, "c.pt", source, tmp_path / "out" / "new") == 0
    assert list(tree(tmp_path / "out" / "new")) == ["0.png", "photo.v2.png"]
    out, err = capsys.readouterr()
    assert "notes.txt" in err and "2 translated, 0 skipped, 0 failed" in out


@pytest.mark.usefixtures("unchanged")
def test_output_can_be_an_image_file(module, tmp_path):
    source = write_images(tmp_path / "in", (40, 33))
    for name, kind in (("new/a.png", "PNG"), ("b.JPG", "JPEG")):
        assert run(module, "c.pt", source / "0.png", tmp_path / name) == 0
        with Image.open(tmp_path / name) as image:
            assert (image.format, image.size) == (kind, (40, 33))
    (tmp_path / "folder.png").mkdir()
    assert run(module, "c.pt", source / "0.png", tmp_path / "folder.png") == 0
    assert list(tree(tmp_path / "folder.png")) == ["0.png"]


@pytest.mark.usefixtures("unchanged")
def test_results_are_overwritten_unless_skipped(module, tmp_path, capsys):
    source, out = write_images(tmp_path / "in", (9, 8), (7, 6)), tmp_path / "out"
    assert run(module, "c.pt", source, out) == 0
    made = tree(out)
    (out / "0.png").write_bytes(b"mine")
    (out / "0001.tmp").write_bytes(b"mine")
    (out / "1.png").unlink()
    assert run(module, "c.pt", source, out, "--skip-existing") == 0
    assert "1 translated, 1 skipped, 0 failed" in capsys.readouterr().out
    assert tree(out) == {**made, "0.png": b"mine", "0001.tmp": b"mine"}
    assert run(module, "c.pt", source, out) == 0
    assert tree(out) == {**made, "0001.tmp": b"mine"}


def test_images_that_fail_are_named_and_skipped(module, monkeypatch, tmp_path, capsys):
    def no_memory(x):
        if x.shape[3] == 60:
            raise RuntimeError("can't allocate memory: you tried to allocate 99 bytes\nstack")
        return x

    monkeypatch.setattr(module, "load_generator", lambda *_: (no_memory, 4, 512))
    source = write_images(tmp_path / "in", (40, 40), (4, 2000), (60, 60), (40, 40))
    (source / "2b.jpg").write_bytes(b"not an image")
    assert run(module, "c.pt", source, tmp_path / "out") == 1
    assert list(tree(tmp_path / "out")) == ["0.png", "1.png", "3.png"]
    failed = [line for line in messages(capsys) if "failed: " in line]
    assert len(failed) == 2 and "2.png: can't allocate memory" in failed[0]
    assert failed[0].endswith("; try --size 512")
    assert "2b.jpg: cannot read" in failed[1]
    assert run(module, "c.pt", source, tmp_path / "large", "--size", 512) == 1
    out, err = capsys.readouterr()
    assert "1.png: 512x256000 pixels are too many" in err and "2 failed" in out


@pytest.mark.usefixtures("unchanged")
def test_images_far_larger_than_in_training_are_noted_once(module, tmp_path, capsys):
    source = write_images(tmp_path / "in", (48, 200), (49, 200), (60, 50))
    assert run(module, "c.pt", source, tmp_path / "out") == 0
    notes = messages(capsys)
    assert len(notes) == 1 and "49x200" in notes[0] and "--size 32" in notes[0]
    assert run(module, "c.pt", source, tmp_path / "out", "--size", 32) == 0
    assert messages(capsys) == []


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_ends_it_cleanly(module, tmp_path, monkeypatch, name):
    source, out = write_images(tmp_path / "in", (9, 8), (7, 6), (5, 4)), tmp_path / "out"
    number = getattr(signal, name)

    def interrupted(image, file, *args, **flags):
        original(image, file, *args, **flags)
        if image.size == (7, 6):
            os.kill(os.getpid(), number)

    original = Image.Image.save
    monkeypatch.setattr(Image.Image, "save", interrupted)
    assert run(module, "c.pt", source, out) == 128 + number
    assert set(tree(out)) - {"1.png"} == {"0.png"}  # and no temporary file
    for file in out.iterdir():
        np.testing.assert_array_equal(pixels(file), pixels(source / file.name))


def test_bad_inputs_and_outputs(module, tmp_path, capsys):
    source, twins = write_images(tmp_path / "in", (9, 8)), write_images(tmp_path / "two", (9, 8))
    Image.open(twins / "0.png").save(twins / "0.jpg")
    (tmp_path / "photos").mkdir()
    shutil.copy(twins / "0.jpg", tmp_path / "photos")
    nested = write_images(tmp_path / "mine" / "test" / "x", (9, 8)).parent
    (tmp_path / "empty").mkdir()
    (tmp_path / "linked").symlink_to(source)
    before = tree(source)
    for inputs, output, words in (
        (source, source, ["where inputs are", "--output"]),
        (source, tmp_path / "linked", ["where inputs are"]),
        (source, tmp_path / "IN", ["where inputs are"]),  # the same folder on many Macs
        (tmp_path / "photos", tmp_path / "photos", ["where inputs are"]),
        (source / "0.png", source / "0.png", ["where inputs are"]),
        (twins, tmp_path / "out", ["0.jpg", "0.png", "the result of"]),
        ([source, twins / "0.png"], tmp_path / "out", ["the result of"]),
        ([source / "0.png", nested / "x"], tmp_path / "a.png", ["the result of"]),
        (nested, tmp_path / "out", [f"try {nested / 'x'}"]),
        (tmp_path / "empty", tmp_path / "out", ["no images in", ".png"]),
        (tmp_path / "nowhere", tmp_path / "out", ["no file", "nowhere"]),
    ):
        assert run(module, "c.pt", inputs, output) == 2
        (error,) = messages(capsys)
        assert error.startswith("translate.py: error: ")
        assert all(word in error for word in words), error
    assert tree(source) == before and not (tmp_path / "out").exists()


def test_bad_checkpoints(method, module, checkpoint, tmp_path, capsys):
    source, state = write_images(tmp_path / "in", (32, 32)), torch.load(checkpoint)
    other = next(name for name in ("CUT", "pix2pix") if name != method)
    nan = {name: tensor * float("nan") for name, tensor in state["G"].items()}
    for change, words in (
        ({"method": other}, [other]),
        ({"G": nan}, ["not finite"]),
        ({"G": {}}, ["does not fit"]),
        ({"args": {**state["args"], "ngf": 5}}, ["does not fit"]),
        (None, ["no.pt"]),
    ):
        file = tmp_path / ("bad.pt" if change else "no.pt")
        torch.save({**state, **(change or {})}, tmp_path / "bad.pt")
        assert run(module, file, source, tmp_path / "out") == 2
        (error,) = messages(capsys)
        assert all(word in error for word in [str(file), *words]), error
    if method == "cycleGAN":
        assert run(module, checkpoint, source, tmp_path / "out", "--direction", "y2x") == 2
        assert "has no F" in messages(capsys)[0]
    assert not (tmp_path / "out").exists()

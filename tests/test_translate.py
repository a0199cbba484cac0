"""What the three translate.py promise: sizes, names, gray, order, resumption, the authors' weights,
ONNX, plain errors. Pictures are random blobs; the networks are untrained."""

import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn.functional import conv2d, conv_transpose2d, pad

from conftest import (
    METHODS,
    ROOT,
    draw_no_curves,
    load_script,
    picture,
    write_pairs,
    write_unpaired,
)

RESNETS = [method for method in METHODS if method != "pix2pix"]
only_pix2pix = pytest.mark.skipif("pix2pix" not in METHODS, reason="its folder is not here")


def load_translate(method):
    """The module. It imports from `train`, which must be that of its own folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "train", load_script(method))
        return load_script(method, "translate")


@pytest.fixture(params=METHODS)
def method(request):
    return request.param


@pytest.fixture
def module(method):
    return load_translate(method)


@pytest.fixture
def checkpoint(method, tmp_path):
    """A checkpoint of small networks, with the flags that read_generator needs and no others."""
    return write_checkpoint(method, tmp_path / "checkpoint.pt")


def write_checkpoint(method, path, **flags):
    torch.manual_seed(0)
    flags = {"image_size": 32, "ngf": 4, "n_layers": 2, **flags}
    state = {"method": method, "args": flags}
    for name in ("G", "F") if method == "cycleGAN" else ("G",):
        if method == "pix2pix":
            net = load_translate(method).UNetGenerator(flags["image_size"], flags["ngf"])
        else:
            shape = flags["n_layers"], flags["ngf"], flags.get("antialias", False)
            net = load_translate(method).ResnetGenerator(*shape)
        state[name] = spread(net).state_dict()
    torch.save(state, path)
    return path


def spread(net):
    """net with random weights whose output is not nearly constant."""
    for name, p in net.named_parameters():
        p.data = torch.randn_like(p) * (1 if p.dim() == 1 else p[0].numel() ** -0.5)
        if p.dim() == 1 and name.endswith("weight"):
            p.data = p.data.abs() + 0.5
    return net


def write_pictures(folder, sizes, seed=0):
    """Random pictures 0.png, 1.png, ... of sizes (width, height). Returns folder."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for k, (width, height) in enumerate(sizes):
        picture(rng, width, height).save(folder / f"{k}.png")
    return folder


def run(module, **flags):
    """The exit status of main. run(module, keep_gray=True) gives --keep-gray."""
    argv = ["--device", "cpu"]
    for name, value in flags.items():
        argv += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    try:
        return module.main(argv)
    except SystemExit as ended:
        return ended.code


def contents(folder):
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def pixels(file):
    with Image.open(file) as image:
        return np.asarray(image)


def as_levels(y):
    """A network's (1, 3, H, W) in [-1, 1] as (H, W, 3) from 0 to 255."""
    return np.rint((y[0].permute(1, 2, 0).numpy() + 1) * 127.5)


def error_line(capsys):
    """The one line of standard error that says what is wrong."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line and "img/s" not in line]
    assert len(lines) == 1 and lines[0].startswith("translate.py: error: "), lines
    return lines[0]


# ------------------------------------------------------------------------------------- any picture


@pytest.fixture
def identity(module, monkeypatch):
    """identity(multiple): the generator gives back its input. Returns the list of inputs it saw."""

    def install(multiple):
        seen, net = [], nn.Identity()
        net.register_forward_pre_hook(lambda _net, inputs: seen.append(inputs[0]))
        monkeypatch.setattr(module, "read_generator", lambda _args: (net, multiple))
        return seen

    return install


def write_every_format(folder):
    """Pictures of odd sizes in every format and many modes."""
    folder.mkdir()
    rgb = picture(np.random.default_rng(1), 37, 51)
    rgb.save(folder / "a.jpg")
    rgb.save(folder / "b.JPEG")
    rgb.save(folder / "c.d.png")
    rgb.save(folder / "e.webp")
    rgb.save(folder / "f.bmp")
    rgb.save(folder / "g.TIF")
    rgb.convert("CMYK").save(folder / "h.tiff")
    rgb.convert("L").save(folder / "gray.png")
    rgb.convert("1").save(folder / "bits.png")
    rgb.quantize(8).save(folder / "palette.png")
    clear = rgb.copy()
    clear.putalpha(rgb.convert("L"))
    clear.save(folder / "clear.png")
    deep = np.asarray(rgb.convert("L")).astype(np.uint16) * 257
    Image.fromarray(deep).save(folder / "deep.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees
    rgb.save(folder / "turned.jpg", exif=exif)
    (folder / "notes.txt").write_text("no picture")
    return folder


def test_every_format_becomes_a_png_of_its_name_and_size(module, identity, checkpoint, tmp_path):
    """With a network that changes nothing: the very pixels that training would see, unshifted."""
    identity(4)
    source = write_every_format(tmp_path / "in")
    assert run(module, checkpoint=checkpoint, input=source, output=tmp_path / "a" / "b") == 0
    files = module.list_images(source)
    assert len(files) == 13
    made = sorted(file.name for file in (tmp_path / "a" / "b").iterdir())
    assert made == sorted(f"{file.stem}.png" for file in files)
    for file in files:
        result, wanted = pixels(tmp_path / "a" / "b" / f"{file.stem}.png"), module.load_rgb(file)
        np.testing.assert_array_equal(result, np.asarray(wanted), str(file))
    assert pixels(tmp_path / "a" / "b" / "turned.png").shape == (37, 51, 3)


SIZES = [(300, 20), (20, 300), (1, 1), (1, 50), (2, 3), (33, 32), (64, 96), (257, 31)]


@pytest.mark.parametrize("multiple", [4, 32, 256])
def test_padding_reflects_and_is_cropped_again(module, identity, tmp_path, multiple, checkpoint):
    seen = identity(multiple)
    source = write_pictures(tmp_path / "in", SIZES)
    assert run(module, checkpoint=checkpoint, input=source, output=tmp_path / "out") == 0
    for k, ((width, height), x) in enumerate(zip(SIZES, seen, strict=True)):
        image = pixels(source / f"{k}.png")
        np.testing.assert_array_equal(pixels(tmp_path / "out" / f"{k}.png"), image)
        padded = as_levels(x)
        for axis, side in ((0, height), (1, width)):
            wanted = max(32, -(-side // multiple) * multiple)  # nothing less than 32 is trained on
            assert padded.shape[axis] == wanted
        # Going out over an end the pixels come back in mirror order, the end itself not repeated.
        rows, columns = (
            [mirrored(k - (total - side) // 2, side) for k in range(total)]
            for total, side in zip(padded.shape[:2], (height, width), strict=True)
        )
        np.testing.assert_array_equal(padded, image[rows][:, columns])


def mirrored(place, side):
    """Which pixel of a side is seen at a place outside between two mirrors at its ends."""
    while not 0 <= place < side:
        place = 0 if side == 1 else -place if place < 0 else 2 * (side - 1) - place
    return place


def test_a_file_as_input(module, identity, checkpoint, tmp_path):
    identity(4)
    source = write_pictures(tmp_path / "in", [(40, 33), (33, 40)])
    assert run(module, checkpoint=checkpoint, input=source / "1.png", output=tmp_path / "out") == 0
    assert list(contents(tmp_path / "out")) == ["1.png"]


def test_size_resizes_the_short_side_first(module, identity, checkpoint, tmp_path):
    identity(4)
    source = write_pictures(tmp_path / "in", [(100, 60), (60, 101), (7, 300), (48, 48)])
    flags = {"checkpoint": checkpoint, "input": source, "output": tmp_path / "out"}
    assert run(module, **flags, size=48) == 0
    for k, size in enumerate([(80, 48), (48, 81), (48, 2057), (48, 48)]):
        image = Image.open(source / f"{k}.png")
        wanted = np.asarray(image.resize(size, Image.Resampling.BICUBIC))
        np.testing.assert_array_equal(pixels(tmp_path / "out" / f"{k}.png"), wanted)


def test_gray_stays_gray_only_if_asked(module, checkpoint, tmp_path):
    source = write_pictures(tmp_path / "in", [(40, 40)])
    gray = Image.open(source / "0.png").convert("L")
    gray.save(source / "l.png")
    gray.convert("RGB").save(source / "rgb.png")
    nearly = np.array(gray.convert("RGB"))
    nearly[-1, -1, 2] ^= 1
    Image.fromarray(nearly).save(source / "nearly.png")
    flags = {"checkpoint": checkpoint, "input": source}
    assert run(module, **flags, output=tmp_path / "rgb") == 0
    assert all(pixels(file).shape == (40, 40, 3) for file in (tmp_path / "rgb").iterdir())
    assert run(module, **flags, output=tmp_path / "gray", keep_gray=True) == 0
    shapes = {name: pixels(tmp_path / "gray" / name).shape for name in contents(tmp_path / "gray")}
    whole = (40, 40, 3)
    assert shapes == {"0.png": whole, "l.png": (40, 40), "nearly.png": whole, "rgb.png": (40, 40)}
    luminance = np.asarray(Image.open(tmp_path / "rgb" / "l.png").convert("L"))
    np.testing.assert_array_equal(pixels(tmp_path / "gray" / "l.png"), luminance)


# --------------------------------------------------------------------- the network, and it alone


def test_a_result_is_what_the_network_gives(method, module, checkpoint, tmp_path):
    source = write_pictures(tmp_path / "in", [(64, 32)])
    assert run(module, checkpoint=checkpoint, input=source, output=tmp_path / "out") == 0
    state = torch.load(checkpoint, weights_only=True)
    if method == "pix2pix":
        G, call = module.UNetGenerator(32, 4), load_script(method).translate  # as training's grids
    else:
        G, call = module.ResnetGenerator(2, 4), lambda G, x: G(x)
    G.load_state_dict(state["G"])
    with torch.no_grad():
        y = call(G, module.to_tensor(Image.open(source / "0.png"))[None])
    assert as_levels(y).std() > 20
    np.testing.assert_array_equal(pixels(tmp_path / "out" / "0.png"), as_levels(y))


def test_a_result_depends_on_its_picture_alone(module, checkpoint, tmp_path):
    """Equal bytes alone, last of many, after an unreadable file, and in a second run."""
    source = write_pictures(tmp_path / "in", [(40, 40), (65, 33), (40, 40), (50, 70)])
    shutil.copy(source / "2.png", source / "same.png")
    (source / "1b.png").write_text("no picture")
    alone = write_pictures(tmp_path / "alone", [])
    shutil.copy(source / "same.png", alone)
    for name in ("many", "again"):
        assert run(module, checkpoint=checkpoint, input=source, output=tmp_path / name) == 1
    assert run(module, checkpoint=checkpoint, input=alone, output=tmp_path / "one") == 0
    many = contents(tmp_path / "many")
    assert many == contents(tmp_path / "again")
    assert many["same.png"] == many["2.png"] == contents(tmp_path / "one")["same.png"]
    assert many["0.png"] != many["2.png"]


def test_bf16_is_nearly_the_same(module, checkpoint, tmp_path):
    source = write_pictures(tmp_path / "in", [(64, 64)])
    for precision in ("fp32", "bf16"):
        flags = {"checkpoint": checkpoint, "input": source, "output": tmp_path / precision}
        assert run(module, **flags, precision=precision) == 0
    fp32, bf16 = (pixels(tmp_path / name / "0.png").astype(float) for name in ("fp32", "bf16"))
    assert 0 < np.abs(fp32 - bf16).mean() < 8


@only_pix2pix
def test_dropout_is_on_unless_switched_off(tmp_path):
    module, checkpoint = load_translate("pix2pix"), write_checkpoint("pix2pix", tmp_path / "c.pt")
    source = write_pictures(tmp_path / "in", [(64, 64)])
    for name, flags in {
        "default": {},
        "on": {"dropout": True},
        "off": {"no_dropout": True},
    }.items():
        flags.update(checkpoint=checkpoint, input=source, output=tmp_path / name)
        assert run(module, **flags) == 0
    default, on, off = (pixels(tmp_path / name / "0.png") for name in ("default", "on", "off"))
    np.testing.assert_array_equal(default, on)
    G = module.UNetGenerator(32, 4)
    G.load_state_dict(torch.load(checkpoint, weights_only=True)["G"])
    for layer in G.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
    with torch.no_grad():
        plain = G(module.to_tensor(Image.open(source / "0.png"))[None])
    np.testing.assert_array_equal(off, as_levels(plain))
    assert (on != off).mean() > 0.5


@pytest.mark.skipif("cycleGAN" not in METHODS, reason="its folder is not here")
def test_both_directions_of_cycleGAN(tmp_path):
    module, checkpoint = load_translate("cycleGAN"), write_checkpoint("cycleGAN", tmp_path / "c.pt")
    source = write_pictures(tmp_path / "in", [(64, 64)])
    state = torch.load(checkpoint, weights_only=True)
    for name, net, flags in (
        ("default", "G", {}),
        ("x2y", "G", {"direction": "x2y"}),
        ("y2x", "F", {"direction": "y2x"}),
    ):
        flags.update(checkpoint=checkpoint, input=source, output=tmp_path / name)
        assert run(module, **flags) == 0
        G = module.ResnetGenerator(2, 4)
        G.load_state_dict(state[net])
        with torch.no_grad():
            y = G(module.to_tensor(Image.open(source / "0.png"))[None])
        np.testing.assert_array_equal(pixels(tmp_path / name / "0.png"), as_levels(y))


@pytest.mark.parametrize("method", RESNETS)
def test_the_checkpoints_flags_make_its_network(module, method, tmp_path):
    path = write_checkpoint(method, tmp_path / "c.pt", n_layers=3, ngf=6, antialias=True)
    G, multiple = module.read_generator(
        module.parse_args(["--checkpoint", str(path), "--onnx", "o"])
    )
    assert multiple == 4 and len(G.layers) == 3 + 6
    blurs = [type(m).__name__ for m in G.modules() if "Blur" in type(m).__name__]
    assert blurs == ["BlurPool"] * 2 + ["BlurUpsample"] * 2


def test_a_training_runs_checkpoint_is_translated_by_a_folder_copied_out_alone(
    method, module, script, tmp_path, monkeypatch
):
    trainer = script(method)
    draw_no_curves(monkeypatch, method)
    (write_pairs if method == "pix2pix" else write_unpaired)(tmp_path, "data")
    small = (
        "--ngf 4 --ndf 4 --image-size 32 --load-size 36 --num-workers 0 --device cpu --max-steps 1"
    )
    argv = ["--data-root", str(tmp_path), "--data-folder", "data", "--save-model", *small.split()]
    blocks = {"pix2pix": [], "cycleGAN": ["--n-layers", "3"], "CUT": ["--n-layers", "5"]}[method]
    assert trainer.main([*argv, *blocks]) == 0
    checkpoint = tmp_path / method / "model" / "data" / "checkpoint.pt"
    source = write_pictures(tmp_path / "in", [(45, 70), (32, 32)])
    assert run(module, checkpoint=checkpoint, input=source, output=tmp_path / "here") == 0

    code, elsewhere = tmp_path / "code" / method, tmp_path / "elsewhere"
    shutil.copytree(ROOT / method, code, ignore=shutil.ignore_patterns("__pycache__", "model"))
    elsewhere.mkdir()
    flags = ["--checkpoint", checkpoint, "--input", source, "--output", "out", "--device", "cpu"]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    done = subprocess.run(
        [sys.executable, code / "translate.py", *flags],
        **{"cwd": elsewhere, "env": environment, "capture_output": True, "text": True},
        **{"check": False, "timeout": 120},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "done: 2 made, 0 kept that were there, 0 unreadable, of 2; see out\n"
    assert contents(elsewhere / "out") == contents(tmp_path / "here")


# ----------------------------------------------------------------- what is there, and interruptions


def test_unreadable_files_are_named_and_skipped(module, checkpoint, tmp_path, capsys):
    source = write_pictures(tmp_path / "in", [(40, 40), (40, 40)])
    (source / "0b.jpg").write_bytes(b"no picture")
    whole = (source / "1.png").read_bytes()
    (source / "1b.png").write_bytes(whole[: len(whole) // 2])
    assert run(module, checkpoint=checkpoint, input=source, output=tmp_path / "out") == 1
    out, err = capsys.readouterr()
    assert list(contents(tmp_path / "out")) == ["0.png", "1.png"]
    skipped = re.findall(r"translate.py: skipped: .*", err)
    assert len(skipped) == 2
    assert str(source / "0b.jpg") in skipped[0] and str(source / "1b.png") in skipped[1]
    assert "2 made, 0 kept that were there, 2 unreadable, of 4" in out


def test_what_is_there_is_kept_unless_overwritten(module, checkpoint, tmp_path, capsys):
    source, out = write_pictures(tmp_path / "in", [(40, 40)] * 3), tmp_path / "out"
    flags = {"checkpoint": checkpoint, "input": source, "output": out}
    assert run(module, **flags) == 0
    wanted = contents(out)
    (out / "1.png").write_bytes(b"mine")
    (out / "2.png").unlink()
    capsys.readouterr()
    assert run(module, **flags) == 0
    assert contents(out) == {**wanted, "1.png": b"mine"}
    assert "1 made, 2 kept that were there, 0 unreadable, of 3" in capsys.readouterr().out
    assert run(module, **flags, overwrite=True) == 0
    assert contents(out) == wanted


def test_what_is_kept_though_made_otherwise_is_named(module, checkpoint, tmp_path, capsys):
    source, out = write_pictures(tmp_path / "in", [(40, 40)] * 2), tmp_path / "out"
    flags = {"checkpoint": checkpoint, "input": source, "output": out}
    assert run(module, **flags) == 0
    assert run(module, **flags) == 0
    assert "warning" not in capsys.readouterr().err
    state = torch.load(checkpoint)
    state["G"] = {name: tensor + 0.01 for name, tensor in state["G"].items()}
    torch.save(state, tmp_path / "later.pt")
    others = [{"size": 36}, {"precision": "bf16"}, {"keep_gray": True}]
    others += [{"checkpoint": tmp_path / "later.pt"}]
    others += [{"direction": "y2x"}] * (module.METHOD == "cycleGAN")
    others += [{"no_dropout": True}] * (module.METHOD == "pix2pix")
    for other in others:
        assert run(module, **{**flags, **other}) == 0
        error = capsys.readouterr().err
        assert (
            "2 PNG files of another checkpoint or other flags" in error and "--overwrite" in error
        )
    if module.METHOD == "cycleGAN":
        assert run(module, **flags, direction="x2y") == 0
        assert "warning" not in capsys.readouterr().err


def test_a_size_that_would_fill_the_memory_is_refused(module, checkpoint, tmp_path, capsys):
    source = write_pictures(tmp_path / "in", [(5, 7)])
    flags = {"checkpoint": checkpoint, "input": source, "output": tmp_path / "out"}
    assert run(module, **flags, size=2000000) == 2
    assert "--size 2000000 makes pictures of 2000000x2800000" in capsys.readouterr().err


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_cleanly_and_the_same_command_goes_on(
    module, checkpoint, tmp_path, monkeypatch, capsys, signum
):
    source, out = write_pictures(tmp_path / "in", [(40, 40)] * 4), tmp_path / "out"
    flags = {"checkpoint": checkpoint, "input": source, "output": out}
    assert run(module, **flags) == 0
    wanted = contents(out)
    shutil.rmtree(out)
    capsys.readouterr()

    def interrupted(*args):
        result = original(*args)
        if len(list(out.iterdir())) == 1:
            os.kill(os.getpid(), signum)
        return result

    original = module.translate_picture
    with monkeypatch.context() as patch:
        patch.setattr(module, "translate_picture", interrupted)
        assert run(module, **flags) == 128 + signum
    assert "stopped: 2 made, 0 kept that were there, 0 unreadable, of 4" in capsys.readouterr().out
    assert list(contents(out)) == ["0.png", "1.png"]
    times = [file.stat().st_mtime_ns for file in (out / "0.png", out / "1.png")]
    assert run(module, **flags) == 0
    assert contents(out) == wanted
    assert times == [file.stat().st_mtime_ns for file in (out / "0.png", out / "1.png")]
    assert "done: 2 made, 2 kept" in capsys.readouterr().out


def save_half_and_die(_image, file, *_, **__):
    file.write(b"half")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_kill_leaves_no_half_picture(module, checkpoint, tmp_path):
    source, out = write_pictures(tmp_path / "in", [(40, 40)]), tmp_path / "out"
    flags = {"checkpoint": checkpoint, "input": source, "output": out}
    child = os.fork()
    if child == 0:
        Image.Image.save = save_half_and_die
        run(module, **flags)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert [file.read_bytes() for file in out.iterdir()] == [b"half"]  # it came so far
    assert not (out / "0.png").exists()
    assert run(module, **flags) == 0
    assert list(contents(out)) == ["0.png"] and pixels(out / "0.png").shape == (40, 40, 3)


def test_a_full_disk_leaves_what_was_there(module, checkpoint, tmp_path, monkeypatch, capsys):
    source, out = write_pictures(tmp_path / "in", [(40, 40)]), tmp_path / "out"
    flags = {"checkpoint": checkpoint, "input": source, "output": out}
    assert run(module, **flags) == 0
    before = contents(out)

    def fail(_image, file, *_, **__):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    capsys.readouterr()
    assert run(module, **flags, overwrite=True) == 2
    error = error_line(capsys)
    assert str(out / "0.png") in error and "No space left" in error
    assert contents(out) == before


def test_too_little_memory_names_the_picture(module, checkpoint, tmp_path, monkeypatch, capsys):
    def fail(*_, **__):
        raise RuntimeError("can't allocate memory: you tried to allocate 99 bytes\nstack")

    monkeypatch.setattr(module, "apply", fail)
    source = write_pictures(tmp_path / "in", [(40, 50)])
    assert run(module, checkpoint=checkpoint, input=source, output=tmp_path / "out") == 2
    error = error_line(capsys)
    assert f"{source / '0.png'}, (40, 50)" in error and "allocate" in error and "--size" in error


# -------------------------------------------------------------------------------------- bad input


def test_two_pictures_of_one_stem_are_an_error_before_the_start(
    module, checkpoint, tmp_path, capsys
):
    source = write_pictures(tmp_path / "in", [(40, 40)] * 2)
    Image.open(source / "1.png").save(source / "1.jpg")
    assert run(module, checkpoint=checkpoint, input=source, output=tmp_path / "out") == 2
    error = error_line(capsys)
    assert str(source / "1.jpg") in error and str(source / "1.png") in error
    assert not (tmp_path / "out").exists()


def test_originals_are_never_overwritten(module, checkpoint, tmp_path, capsys):
    source = write_pictures(tmp_path / "in", [(40, 40)])
    linked = tmp_path / "linked"
    linked.symlink_to(source)
    other = tmp_path / "other"
    other.mkdir()
    (other / "0.png").symlink_to(source / "0.png")  # read from here, it lies in `source`
    before = contents(source)
    for read, write, reason in (
        (source, source, "folder of their own"),
        (source, linked, "folder of their own"),
        (source / "0.png", source, "one of --input"),
        (other, source, "one of --input"),
    ):
        for overwrite in ({}, {"overwrite": True}):
            flags = {"checkpoint": checkpoint, "input": read, "output": write, **overwrite}
            assert run(module, **flags) == 2
            assert reason in error_line(capsys)
    assert contents(source) == before


def test_results_inside_the_input_do_not_become_inputs(module, checkpoint, tmp_path, capsys):
    source = write_pictures(tmp_path / "in", [(40, 40)] * 2)
    flags = {"checkpoint": checkpoint, "input": source, "output": source / "results"}
    for made in (2, 0):
        assert run(module, **flags) == 0
        assert f"{made} made, {2 - made} kept" in capsys.readouterr().out
    assert sorted(file.name for file in source.iterdir()) == ["0.png", "1.png", "results"]


def test_bad_paths_and_checkpoints(method, module, checkpoint, tmp_path, capsys):
    source = write_pictures(tmp_path / "in", [(40, 40)])
    empty, file = tmp_path / "empty", tmp_path / "file"
    empty.mkdir()
    file.write_text("a file")
    cut_off, code = tmp_path / "cut_off.pt", tmp_path / "code.pt"
    cut_off.write_bytes(checkpoint.read_bytes()[:5000])
    code.write_bytes(pickle.dumps(print, protocol=2))
    wholly, no_dict, strings, empty_run = (tmp_path / f"{k}.pt" for k in range(4))
    torch.save({"method": method}, empty_run)
    torch.save({**torch.load(checkpoint), "G": {}}, wholly)
    torch.save(torch.zeros(3), no_dict)
    torch.save({"a.weight": "text"}, strings)
    other = next(name for name in ("CUT", "pix2pix") if name != method)
    foreign, tampered = tmp_path / "foreign.pt", tmp_path / "tampered.pt"
    torch.save({**torch.load(checkpoint), "method": other}, foreign)
    state = torch.load(checkpoint)
    torch.save({**state, "args": {**state["args"], "ngf": 5}}, tampered)
    good = {"checkpoint": checkpoint, "input": source, "output": tmp_path / "out"}
    for change, words in (
        ({"checkpoint": tmp_path / "none.pt"}, ["none.pt", "--save-model"]),
        ({"checkpoint": tmp_path}, [str(tmp_path), "--save-model"]),
        ({"checkpoint": cut_off}, [str(cut_off), "damaged"]),
        ({"checkpoint": code}, [str(code), "damaged"]),
        ({"checkpoint": empty_run}, [str(empty_run), "damaged"]),
        ({"checkpoint": no_dict}, [str(no_dict), "no weights of a network"]),
        ({"checkpoint": strings}, [str(strings), "no weights of a network"]),
        ({"checkpoint": wholly}, [str(wholly), "does not fit"]),
        ({"checkpoint": tampered}, [str(tampered), "does not fit"]),
        ({"checkpoint": foreign}, [f"is a checkpoint of {other}", f"{other}/translate.py"]),
        ({"input": tmp_path / "nowhere"}, [str(tmp_path / "nowhere"), "folder"]),
        ({"input": empty}, [str(empty), "no pictures", "*.png"]),
        ({"output": file}, [str(file), "is a file"]),
        ({"output": file / "below"}, [str(file)]),
        ({"device": "toaster"}, ["--device toaster"]),
        ({"precision": "tf32"}, ["CUDA"]),
    ):
        assert run(module, **{**good, **change}) == 2, change
        error = error_line(capsys)
        assert all(word in error for word in words), error
    assert not (tmp_path / "out").exists()


def test_bad_flags(method, module, capsys):
    for flags, word in (
        ([], "--checkpoint"),
        (["--checkpoint", "c"], "nothing to do"),
        (["--checkpoint", "c", "--input", "i"], "belong together"),
        (["--checkpoint", "c", "--output", "o", "--onnx", "n"], "belong together"),
        (["--checkpoint", "c", "--input", "i", "--output", "o", "--size", "0"], "--size 0"),
        (["--checkpoint", "c", "--input", "i", "--output", "o", "--over"], "--over"),
        (["--checkpoint", "c", "--input", "i", "--output", "o", "--direction", "up"], "direction"),
    ):
        with pytest.raises(SystemExit) as ended:
            module.main(flags)
        assert ended.value.code == 2
        assert word in error_line(capsys)


def test_every_flag_says_what_it_does(module, capsys):
    with pytest.raises(SystemExit) as ended:
        module.parse_args(["--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    flags = ["checkpoint", "input", "output", "size", "keep-gray", "overwrite", "onnx", "device"]
    for flag in [*flags, "precision"]:
        assert re.search(rf"^  --{flag}\b", shown, re.MULTILINE)
    method = module.METHOD
    assert ("--direction" in shown) == (method == "cycleGAN")
    assert ("--no-dropout" in shown) == (method == "pix2pix")
    assert f"python {method}/translate.py --checkpoint {method}/model/" in shown


WITHOUT_TORCH = """
import runpy, sys
script = sys.argv[1]
for name in ("torch", "torchvision", "numpy", "PIL", "matplotlib", "tqdm"):
    sys.modules[name] = None  # importing it raises ImportError
for flag, status in (("--help", 0), ("--size=-1", 2), ("--inp=3", 2)):
    sys.argv = ["translate.py", flag]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as ended:
        assert ended.code == status, (flag, ended.code)
    else:
        raise AssertionError(flag)
"""


def test_help_and_mistyped_flags_do_not_wait_for_torch(method):
    command = [sys.executable, "-c", WITHOUT_TORCH, ROOT / method / "translate.py"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "--checkpoint" in done.stdout
    lines = done.stderr.splitlines()
    assert len(lines) == 2
    assert all(line.startswith("translate.py: error: ") for line in lines)


# ------------------------------------------------------------------------ the authors' networks

# Their networks, restated: the same names and shapes in the state dict, and what they compute.


class AuthorsBlock(nn.Module):
    """One level of the authors' U-Net, which holds the next inside. Level 0 is the outermost."""

    def __init__(self, level, depth, ngf, norm):
        super().__init__()
        self.outermost, self.innermost = level == 0, level == depth - 1
        width, below = (ngf * min(2**k, 8) for k in (level - 1, level))
        width = 3 if self.outermost else width
        biased = norm == "instance"
        down = nn.Conv2d(width, below, 4, 2, 1, bias=biased)
        from_below = below if self.innermost else 2 * below
        up = nn.ConvTranspose2d(from_below, width, 4, 2, 1, bias=biased or self.outermost)
        norms = [norms_of(norm, channels) for channels in (below, width)]
        if self.outermost:
            layers = [down, AuthorsBlock(1, depth, ngf, norm), nn.ReLU(), up, nn.Tanh()]
        elif self.innermost:
            layers = [nn.LeakyReLU(0.2), down, nn.ReLU(), up, norms[1]]
        else:
            inside = AuthorsBlock(level + 1, depth, ngf, norm)
            layers = [nn.LeakyReLU(0.2), down, norms[0], inside, nn.ReLU(), up, norms[1]]
        self.model = nn.Sequential(*layers)

    def forward(self, x):
        y = self.model(x)
        return y if self.outermost else torch.cat([x, y], 1)


def norms_of(kind, channels):
    return {"batch": nn.BatchNorm2d, "instance": nn.InstanceNorm2d}[kind](channels)


class AuthorsUNet(nn.Module):
    def __init__(self, depth=8, ngf=4, norm="batch"):
        super().__init__()
        self.model = AuthorsBlock(0, depth, ngf, norm)

    def forward(self, x):
        return self.model(x)


class AuthorsDown(nn.Module):
    def __init__(self, channels):
        super().__init__()
        row = torch.tensor([1.0, 2.0, 1.0]) / 4
        self.register_buffer("filt", (row[:, None] * row).repeat(channels, 1, 1, 1))

    def forward(self, x):
        return conv2d(pad(x, [1] * 4, "reflect"), self.filt, stride=2, groups=x.shape[1])


class AuthorsUp(nn.Module):
    def __init__(self, channels):
        super().__init__()
        row = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 4
        self.register_buffer("filt", (row[:, None] * row).repeat(channels, 1, 1, 1))

    def forward(self, x):
        x = pad(x, [1] * 4, "replicate")
        return conv_transpose2d(x, self.filt, stride=2, groups=x.shape[1])[..., 3:-3, 3:-3]


class AuthorsResnetBlock(nn.Module):
    def __init__(self, channels, norm, dropout):
        super().__init__()
        layers = [nn.ReflectionPad2d(1), nn.Conv2d(channels, channels, 3, bias=norm == "instance")]
        layers += [norms_of(norm, channels)]
        between = [nn.ReLU(), nn.Dropout(0.0)] if dropout else [nn.ReLU()]
        second = [nn.ReflectionPad2d(1), nn.Conv2d(channels, channels, 3, bias=norm == "instance")]
        self.conv_block = nn.Sequential(*layers, *between, *second, norms_of(norm, channels))

    def forward(self, x):
        return x + self.conv_block(x)


class AuthorsResnet(nn.Module):
    def __init__(self, blocks=3, ngf=4, down=False, up=False, norm="instance", dropout=False):
        super().__init__()
        bias = {"bias": norm == "instance"}
        layers = [nn.ReflectionPad2d(3), nn.Conv2d(3, ngf, 7, **bias)]
        layers += [norms_of(norm, ngf), nn.ReLU()]
        for width in (ngf, 2 * ngf):
            layers += [nn.Conv2d(width, 2 * width, 3, 1 if down else 2, 1, **bias)]
            layers += [norms_of(norm, 2 * width), nn.ReLU()]
            layers += [AuthorsDown(2 * width)] if down else []
        layers += [AuthorsResnetBlock(4 * ngf, norm, dropout) for _ in range(blocks)]
        for width in (2 * ngf, ngf):
            if up:
                layers += [AuthorsUp(2 * width), nn.Conv2d(2 * width, width, 3, 1, 1, **bias)]
            else:
                layers += [nn.ConvTranspose2d(2 * width, width, 3, 2, 1, 1, **bias)]
            layers += [norms_of(norm, width), nn.ReLU()]
        layers += [nn.ReflectionPad2d(3), nn.Conv2d(ngf, 3, 7), nn.Tanh()]
        self.model = nn.Sequential(*layers)

    def forward(self, x):
        return self.model(x)


def authors_state(net, prefix="", old=False):
    """The net's state dict, last layer first; old: with statistics of instance norms."""
    spread(net)
    state = {prefix + key: tensor for key, tensor in list(net.state_dict().items())[::-1]}
    if old:
        for name, layer in net.named_modules():
            if isinstance(layer, nn.InstanceNorm2d):
                for kind in ("running_mean", "running_var"):
                    state[f"{prefix}{name}.{kind}"] = torch.rand(layer.num_features)
    return state


def read(module, path, *flags):
    """The generator in a file, and its multiple."""
    return module.read_generator(
        module.parse_args(["--checkpoint", str(path), "--onnx", "o", *flags])
    )


UNETS = {
    "256": {"depth": 8},
    "128": {"depth": 7, "ngf": 6},
    "512": {"depth": 9, "ngf": 2},
    "instance": {"depth": 7, "norm": "instance"},
}
RESNET_KINDS = {
    "9 blocks": {"blocks": 9},
    "6 blocks": {"blocks": 6, "ngf": 6},
    "antialias": {"down": True, "up": True},
    "antialias down": {"down": True},
    "antialias up": {"up": True},
    "dropout": {"dropout": True},
}
FILES = [("pix2pix", kind) for kind in UNETS] + [
    (m, kind) for m in RESNETS for kind in RESNET_KINDS
]


@torch.no_grad()
@pytest.mark.parametrize("way", ["new", "old"])
@pytest.mark.parametrize("method, kind", [file for file in FILES if file[0] in METHODS])
def test_the_authors_weights_give_the_authors_pictures(module, method, kind, way, tmp_path):
    torch.manual_seed(3)
    net = AuthorsUNet(**UNETS[kind]) if method == "pix2pix" else AuthorsResnet(**RESNET_KINDS[kind])
    old = way == "old"  # PyTorch before 0.4, and several GPUs
    state = authors_state(net, "module." if old else "", old)
    file = tmp_path / "latest_net_G.pth"
    torch.save(state, file, _use_new_zipfile_serialization=not old)
    G, multiple = read(module, file, *(["--no-dropout"] if method == "pix2pix" else []))
    assert multiple == (2 ** UNETS[kind]["depth"] if method == "pix2pix" else 4)
    x = torch.rand(1, 3, max(32, multiple), max(64, multiple)) * 2 - 1
    wanted = net(x)
    assert wanted.std() > 0.1
    torch.testing.assert_close(G(x), wanted, rtol=1e-3, atol=1e-4)


def test_the_restated_networks_have_the_authors_names():
    unet = AuthorsUNet(8, 64).state_dict()
    assert unet["model.model.0.weight"].shape == (64, 3, 4, 4)
    assert unet["model.model.1.model.1.weight"].shape == (128, 64, 4, 4)
    assert unet["model.model.1.model.2.running_mean"].shape == (128,)
    innermost = "model.model.1" + ".model.3" * 6
    assert unet[f"{innermost}.model.1.weight"].shape == (512, 512, 4, 4)
    assert unet[f"{innermost}.model.4.weight"].shape == (512,)
    assert unet["model.model.3.bias"].shape == (3,)
    assert sum(p.numel() for p in AuthorsUNet(8, 64).parameters()) == 54_413_955
    resnet = AuthorsResnet(9, 64).state_dict()
    assert resnet["model.1.weight"].shape == (64, 3, 7, 7)
    assert resnet["model.10.conv_block.5.weight"].shape == (256, 256, 3, 3)
    assert resnet["model.19.weight"].shape == (256, 128, 3, 3)  # transposed
    assert resnet["model.26.bias"].shape == (3,)
    assert "model.10.conv_block.6.weight" in AuthorsResnet(1, 4, dropout=True).state_dict()
    blurred = AuthorsResnet(9, 64, down=True, up=True).state_dict()
    assert blurred["model.7.filt"].shape == (128, 1, 3, 3)
    assert blurred["model.21.filt"].shape == (256, 1, 4, 4)
    assert blurred["model.22.weight"].shape == (128, 256, 3, 3)


@only_pix2pix
@pytest.mark.parametrize("depth, wanted", [(8, [2, 3, 4]), (7, [2, 3]), (9, [2, 3, 4, 5])])
def test_the_authors_unets_have_dropout_where_theirs_had_it(depth, wanted, tmp_path):
    module = load_translate("pix2pix")
    torch.save(authors_state(AuthorsUNet(depth, 2)), tmp_path / "net_G.pth")
    G, _ = read(module, tmp_path / "net_G.pth")
    dropped = [any(isinstance(m, nn.Dropout) and m.training for m in up) for up in G.up]
    assert [k for k, has in enumerate(dropped, 1) if has] == wanted


def test_files_of_other_networks(method, module, tmp_path, capsys):
    unet, resnet = AuthorsUNet(8, 4).state_dict(), AuthorsResnet(3, 4).state_dict()
    good = unet if method == "pix2pix" else resnet
    gray = {
        k: v[:, :1] if k in ("model.model.0.weight", "model.1.weight") else v
        for k, v in good.items()
    }
    last = "model.model.3" if method == "pix2pix" else "model.20"
    cut = {key: tensor for key, tensor in good.items() if not key.startswith(last)}
    half = {key: tensor for key, tensor in good.items() if key != f"{last}.bias"}
    other = resnet if method == "pix2pix" else unet
    batch = AuthorsResnet(3, 4, norm="batch").state_dict()
    blurred = AuthorsResnet(3, 4, down=True).state_dict()
    wide = {k: v.repeat(1, 1, 2, 2)[..., :5, :5] if "filt" in k else v for k, v in blurred.items()}
    linear, patch = nn.Linear(3, 3).state_dict(), nn.Conv2d(3, 64, 4).state_dict()
    bare = {k: v for k, v in resnet.items() if "bias" not in k or k == "model.20.bias"}
    extra = nn.Conv2d(3, 3, 7).state_dict(prefix="model.model.99.")
    more = {**good, **extra}
    affine = {**resnet, "model.2.weight": torch.ones(4)}
    files = [gray, cut, half, other, batch, affine, wide, linear, patch, bare, more, {}]
    if method == "pix2pix":  # without the norm that comes last; without any
        files.append({k: v for k, v in good.items() if not k.startswith("model.model.1.model.6.")})
        files.append({k: v for k, v in good.items() if v.dim() == 4 or k == f"{last}.bias"})
    for k, state in enumerate(files):
        torch.save(state, tmp_path / "net_G.pth")
        assert run(module, checkpoint=tmp_path / "net_G.pth", onnx=tmp_path / "o.onnx") == 2, k
        error = error_line(capsys)
        assert str(tmp_path / "net_G.pth") in error and "fits no generator" in error
        assert "U-Net" in error and "ResNet" in error
        assert state is not gray or "RGB pictures" in error
    assert not (tmp_path / "o.onnx").exists()


@pytest.mark.skipif("cycleGAN" not in METHODS, reason="its folder is not here")
def test_an_authors_file_has_no_direction(tmp_path, capsys):
    module = load_translate("cycleGAN")
    torch.save(authors_state(AuthorsResnet()), tmp_path / "latest_net_G_A.pth")
    source = write_pictures(tmp_path / "in", [(33, 40)])
    flags = {
        "checkpoint": tmp_path / "latest_net_G_A.pth",
        "input": source,
        "output": tmp_path / "o",
    }
    assert run(module, **flags, direction="x2y") == 2
    assert "--direction" in error_line(capsys)
    assert run(module, **flags) == 0
    assert pixels(tmp_path / "o" / "0.png").shape == (40, 33, 3)


# ------------------------------------------------------------------------------------------- ONNX


def test_onnx_gives_torchs_pictures_at_any_size(
    method, module, checkpoint, tmp_path, monkeypatch, capsys
):
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    file, source = tmp_path / "new" / "G.onnx", write_pictures(tmp_path / "in", [(64, 64)])
    flags = {"checkpoint": checkpoint, "input": source}
    assert run(module, **flags, output=tmp_path / "plain") == 0
    assert run(module, **flags, output=tmp_path / "both", onnx=file) == 0
    assert contents(tmp_path / "plain") == contents(tmp_path / "both")  # dropout is on again
    out = capsys.readouterr().out
    assert len(re.findall(r"onnxruntime differs from torch by \de-\d\d at \d+x\d+", out)) == 2
    assert [f.name for f in file.parent.iterdir()] == ["G.onnx"]  # one file, weights inside

    session = runtime.InferenceSession(file.read_bytes(), providers=["CPUExecutionProvider"])
    (x_info,), (y_info,) = session.get_inputs(), session.get_outputs()
    assert (x_info.name, y_info.name) == ("x", "y")
    assert x_info.shape == [1, 3, "height", "width"]
    G, _ = read(module, checkpoint, *(["--no-dropout"] if method == "pix2pix" else []))
    for height, width in ((32, 160), (128, 96)):
        x = torch.rand(1, 3, height, width) * 2 - 1
        with torch.no_grad():
            y = G(x)
        found = torch.from_numpy(session.run(None, {"x": x.numpy()})[0])
        torch.testing.assert_close(found, y, rtol=1e-3, atol=1e-4)

    before = file.read_bytes()
    assert run(module, checkpoint=checkpoint, onnx=file) == 0
    assert "is there already" in capsys.readouterr().out
    # A model whose results are not torch's is an error, and is not written.
    wrong = onnx.load(file)
    for tensor in wrong.graph.initializer:
        if len(tensor.dims) == 4:
            tensor.raw_data = bytes(len(tensor.raw_data))
    exported = SimpleNamespace(model_proto=wrong)
    monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: exported)
    assert run(module, checkpoint=checkpoint, onnx=file, overwrite=True) == 2
    assert "onnxruntime differs from torch" in error_line(capsys)
    assert file.read_bytes() == before


def test_onnx_without_its_packages(module, checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, "find_spec", lambda name: None if "script" in name else True)
    assert run(module, checkpoint=checkpoint, onnx=tmp_path / "G.onnx") == 2
    assert "pip install onnxscript" in error_line(capsys)
    assert not (tmp_path / "G.onnx").exists()

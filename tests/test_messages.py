"""What a user reads after a mistake: one line with the remedy, exit status 2, no traceback."""

import os
import subprocess
import sys

import pytest

from conftest import METHODS, ROOT, error_line, load_script, write_pairs, write_unpaired


@pytest.fixture
def error(tmp_path, capsys):
    """error(method, *flags) is the line that train.py ends with. Datasets: toy, sides, own."""
    write_unpaired(write_unpaired(write_pairs(tmp_path, "toy"), "sides"), "own")
    (tmp_path / "own" / "train" / "x").rename(tmp_path / "own" / "train" / "cats")
    (tmp_path / "own" / "train" / "y").rename(tmp_path / "own" / "train" / "dogs")
    roots = ["--data-root", str(tmp_path), "--output-root", str(tmp_path / "runs")]

    def run(method, *flags):
        small = ["--image-size=32", "--ngf=2", "--ndf=2", "--num-workers=0", "--max-steps=1"]
        with pytest.raises(SystemExit, match=r"^2$"):
            sys.exit(load_script(method).main([*roots, *small, *flags]))
        return error_line(capsys)

    return run


@pytest.mark.parametrize("typed, meant, methods", [
    ("--batchsize", "--batch-size", METHODS), ("--batch_size", "--batch-size", METHODS),
    ("--n-epochs", "--epochs", METHODS), ("--n_epochs", "--epochs", METHODS),
    ("--dataroot", "--data-root", METHODS), ("--name", "--run-name", METHODS),
    ("--lambda_L1", "--l1-ratio", ["pix2pix"]), ("--netG", "--n-layers", ["cycleGAN", "CUT"]),
])  # fmt: skip
def test_a_mistyped_flag_or_one_of_the_authors(error, method, typed, meant, methods):
    line = error(method, typed, "4")
    suggested = f"did you mean {meant}?" in line
    assert f"unknown flag {typed}" in line and suggested == (method in methods)


@pytest.mark.parametrize("folder, expected", [
    ("own", "prepare.py"), ("toy/train", "did you mean --data-folder toy?"),
    ("datasets/{right}", "did you mean --data-folder {right}?"), ("{wrong}", "{remedy}"),
    ("sidez", "did you mean --data-folder sides?"), ("mine", "prepare.py lays out your images"),
    ("facades", "datasets/download.py --list shows"),
])  # fmt: skip
def test_a_dataset_that_cannot_be_used(error, method, folder, expected):
    pairs = method == "pix2pix"
    words = {"right": "toy" if pairs else "sides", "wrong": "sides" if pairs else "toy"}
    words["remedy"] = "cycleGAN and CUT train on two sides" if pairs else "split PAIRS NAME"
    line = error(method, "--data-folder", folder.format(**words))
    assert expected.format(**words) in line and "; expected " in line
    assert ("download.py" in line) == (folder in ("mine", "facades"))
    assert folder != "own" or ("train/cats, train/dogs" in line and "prepare.py" in line)


def test_a_device_that_does_not_exist(error, method):
    line = error(method, "--device", "gpu")
    assert "--device gpu" in line and "use auto, cpu, cuda, cuda:1 or mps" in line


DO_NOT_FIT = [
    ("pix2pix", "--image-size 48", "expected a power of two"),
    ("cycleGAN", "--image-size 34", "a multiple of 4"),
    ("cycleGAN", "--pix-loss --pix-pool 3", "of --pix-pool"),
    ("cycleGAN", "--pix-blur", "nothing without --pix-loss"),
    ("CUT", "--image-size 34", "a multiple of 4"), ("CUT", "--num-patches 1", "2 or more"),
    ("CUT", "--n-layers 4", "no layer 'R256_5'; the layers are pix, c7s1_64, d128, d256, R256_1"),
    ("CUT", "--query attention --feat-str d128,d256", "needs deep layers last"),
    ("CUT", "--feat-str ,", "--feat-str must name a layer"),
]  # fmt: skip


@pytest.mark.parametrize("method, flags, words", [d for d in DO_NOT_FIT if d[0] in METHODS])
def test_flags_that_do_not_fit_together(error, method, flags, words):
    data = "toy" if method == "pix2pix" else "sides"
    assert words in error(method, "--data-folder", data, *flags.split())


def test_resume_alone_lists_the_runs_that_can_be_resumed(error, method, tmp_path):
    for name in ("first", "second"):
        (tmp_path / "runs" / method / "model" / name).mkdir(parents=True)
        (tmp_path / "runs" / method / "model" / name / "checkpoint.pt").touch()
    line = error(method, "--resume")
    assert line.endswith("runs that have one: first, second")


def test_an_unreadable_training_image_is_named_at_the_start(error, method, tmp_path):
    data = "toy" if method == "pix2pix" else "sides"
    file = sorted((tmp_path / data / "train").rglob("*.png"))[1]
    file.write_bytes(file.read_bytes()[:99])
    assert f"cannot read {file}: " in error(method, "--data-folder", data)
    assert not (tmp_path / "runs").exists()  # before anything is written


@pytest.mark.parametrize("name, spin", [("OMP_WAIT_POLICY", None), ("UNRELATED", 1000)])
def test_idle_threads_yield_unless_the_user_set_openmp(method, name, spin):
    code = f"import os, {method}_flags; print(os.environ.get('GOMP_SPINCOUNT'))"
    environment = {k: v for k, v in os.environ.items() if "OMP" not in k} | {name: "ACTIVE"}
    options = {"cwd": ROOT / method, "env": environment, "text": True}
    assert subprocess.check_output([sys.executable, "-c", code], **options) == f"{spin}\n"


WITHOUT_TORCH = """
import os, runpy, sys
script, *attempts = sys.argv[1:]
sys.path.insert(0, os.path.dirname(script))
for name in ("torch", "torchvision", "numpy", "PIL", "matplotlib", "tqdm"):
    sys.modules[name] = None  # importing it raises ImportError
for words in attempts:
    sys.argv[:] = [os.path.basename(script), *words.split()]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as ended:
        assert ended.code == (0 if "--help" in words else 2), (words, ended.code)
"""


TRANSLATE = "checkpoint input output size restore_size side_by_side skip_existing device precision"


@pytest.mark.parametrize("script, needed, bad, typo", [
    ("train.py", "", "--epochs=-1", "--epoch=3"),
    ("translate.py", "--checkpoint=c --input=i --output=o", "--size=-1", "--inputt=3"),
])  # fmt: skip
def test_help_and_mistyped_flags_do_not_wait_for_torch(method, script, needed, bad, typo):
    attempts = [f"{needed} {words}" for words in (bad, typo, "--help")]
    command = [sys.executable, "-c", WITHOUT_TORCH, ROOT / method / script, *attempts]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    negative, meant = done.stderr.splitlines()
    assert negative.startswith(f"{script}: error: {bad.replace('=', ' ')}")
    assert f"did you mean {typo[:7]}" in meant
    shown = " ".join(done.stdout.split())
    args = vars(load_script(method).parse_args([])) if script == "train.py" else TRANSLATE.split()
    assert all(f"--{name.replace('_', '-')}" in shown for name in args) and "None" not in shown

"""What the tests share: the three folders' modules, and small pictures made on the spot."""

import importlib.util
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait let other programs run

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
METHODS = [name for name in ("pix2pix", "cycleGAN", "CUT") if (ROOT / name / "train.py").exists()]
sys.path[:0] = [str(ROOT / name) for name in METHODS]
torch.set_num_threads(1)  # the tests' networks are too small for more


def load_script(method, script="train"):
    """<method>/<script>.py as a module; the three train.py cannot all be called `train`."""
    name = f"{script}_of_{method}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / method / f"{script}.py")
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def run_module(method):
    """<method>/<method>_run.py as a module, the one that train.py imports from."""
    return importlib.import_module(f"{method}_run")


def redirect(monkeypatch, method, root):
    """Has a method's runs written below root."""
    monkeypatch.setattr(run_module(method), "ROOT", root)
    monkeypatch.setattr(run_module(method), "HERE", root / method)


def draw_no_curves(monkeypatch, method):
    """They take nine tenths of a small run."""
    monkeypatch.setattr(run_module(method), "plot_losses", lambda *_: None)


@pytest.fixture
def script(monkeypatch, tmp_path):
    """script(method) is that method's train.py, whose runs are redirected to tmp_path."""

    def get(method):
        redirect(monkeypatch, method, tmp_path)
        return load_script(method)

    return get


def picture(rng, width, height):
    """A random RGB picture (PIL) of smooth blobs."""
    small = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def write_pairs(root, name="pairs", train=6, test=3, size=32, seed=0):
    """A paired set whose y, the left half, is the negative of x, the right half. Returns root."""
    rng = np.random.default_rng(seed)
    for split, count in (("train", train), ("test", test)):
        (root / name / split).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            x = np.asarray(picture(rng, size, size))
            pair = Image.fromarray(np.concatenate([255 - x, x], axis=1))
            pair.save(root / name / split / f"{index:03}.png")
    return root


def write_unpaired(root, name="unpaired", train=(6, 4), test=3, size=32, seed=0):
    """An unpaired set, y the negative of an x; test/x and test/y match by name. Returns root."""
    rng = np.random.default_rng(seed)
    for split, counts in (("train", train), ("test", (test, test))):
        for side in "xy":
            (root / name / split / side).mkdir(parents=True, exist_ok=True)
        for index in range(max(counts)):
            x = np.asarray(picture(rng, size, size))
            if index < counts[0]:
                Image.fromarray(x).save(root / name / split / "x" / f"{index:03}.png")
            if split == "train":
                x = np.asarray(picture(rng, size, size))
            if index < counts[1]:
                Image.fromarray(255 - x).save(root / name / split / "y" / f"{index:03}.png")
    return root

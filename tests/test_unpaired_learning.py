"""cycleGAN and CUT learn, within seconds, a translation whose truth is known."""

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import picture, run_module

RED = np.array([1.0, 0.2, 0.2])  # y is what x looks like through a red glass


def write_filtered(root):
    """root/red: unpaired training pictures, test pictures that match by name. Returns root."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 16), ("test", 4)):
        for side in "xy":
            (root / "red" / split / side).mkdir(parents=True)
        for index in range(count):
            x, other = (np.asarray(picture(rng, 32, 32)) for _ in range(2))
            y = (other if split == "train" else x) * RED
            Image.fromarray(x).save(root / "red" / split / "x" / f"{index}.png")
            Image.fromarray(y.astype(np.uint8)).save(root / "red" / split / "y" / f"{index}.png")
    return root


@pytest.mark.parametrize("method, name", [("cycleGAN", "l1_xy"), ("CUT", "l1")])
def test_a_short_run_comes_nearer_to_the_truth(script, tmp_path, method, name):
    train = script(method)
    flags = (
        "--data-folder red --image-size 32 --load-size 36 --ngf 8 --ndf 8 --n-layers 1 --lr 1e-3"
    )
    flags += " --epochs 10 --sample-every 100 --num-workers 0 --run-name red --batch-size 2"
    flags += " --precision fp32"
    flags += " --feat-str d128,d256,R256_1" if method == "CUT" else ""
    argv = [*flags.split(), "--data-root", str(write_filtered(tmp_path))]

    args = train.parse_args(argv)
    torch.manual_seed(args.seed)
    test_set = train.build_data(args)[1]
    nets = train.build(args, torch.device("cpu"))
    untrained = train.sample(nets, test_set, tmp_path, {"epoch": 0}, torch.device("cpu"))
    pairs = zip(test_set.files_x, test_set.files_y, strict=True)
    identity = np.mean([(test_set.load(x) - test_set.load(y)).abs().mean() for x, y in pairs])

    assert train.main(argv) == 0
    trained = run_module(method).read_rows(tmp_path / "visualize" / method / "red")[-1]
    assert float(trained[name]) < 0.6 * min(untrained[name], identity)

"""Each method learns, within seconds, a translation whose truth is known."""

import numpy as np
import torch

from conftest import load_script, picture

SMALL = "--image-size 32 --ngf 8 --ndf 8 --lr 1e-3 --batch-size 2 --device cpu --precision fp32"
FLAGS = {"pix2pix": [], "cycleGAN": ["--n-layers", "1"]}
FLAGS["CUT"] = [*FLAGS["cycleGAN"], "--feat-str", "d128, d256, R256_1"]


def images(count, seed):
    """Smooth blobs, (count, 3, 32, 32) in [-1, 1]."""
    rng = np.random.default_rng(seed)
    pixels = np.stack([picture(rng, 32, 32) for _ in range(count)])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1


def through_red_glass(x):
    """The true translation: green and blue are darker."""
    return (x + 1) * torch.tensor([1.0, 0.2, 0.2]).view(3, 1, 1) - 1


def test_the_error_falls_far_below_that_of_the_input(method):
    train = load_script(method)
    args = train.parse_args([*SMALL.split(), *FLAGS[method]])
    torch.manual_seed(0)
    nets = train.build(args, torch.device("cpu"))
    x, test = images(16, seed=0), images(4, seed=1)
    y = through_red_glass(x if method == "pix2pix" else images(16, seed=2))  # pairs only there

    def error():
        with torch.no_grad():
            fakes = [nets["G"](image[None])[0] for image in test]
        return (torch.stack(fakes) - through_red_glass(test)).abs().mean()

    untrained, identity = error(), (test - through_red_glass(test)).abs().mean()
    for step in range(80):
        if step % 8 == 0:
            order = [torch.randperm(16) for _ in range(2)]
            order = order[:1] * 2 if method == "pix2pix" else order
        batch = slice(2 * (step % 8), 2 * (step % 8) + 2)
        train.training_step(nets, x[order[0][batch]], y[order[1][batch]], args)
    assert error() < 0.6 * min(untrained, identity)

"""pix2pix's networks against the authors' numbers, the paper's table and simple properties."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from conftest import ROOT
from pix2pix_model import PatchDiscriminator, UNetGenerator, initialize_weights

PARITY = ROOT / "tests" / "parity"


def convolutions(net):
    return [m for m in net.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)]


def normal_image(channels):
    """The reference's input: (1, channels, 256, 256) in [-1, 1], float64."""
    noise = np.random.RandomState({3: 1000, 6: 1001}[channels]).randn(1, channels, 256, 256)
    return torch.from_numpy(np.tanh(noise))


def reference_network(net):
    """net in float64, without dropout, with the weights that the reference outputs belong to."""
    for k, layer in enumerate(convolutions(net)):
        shape = tuple(layer.weight.shape)
        weight = np.random.RandomState(k).randn(*shape) * (1 / np.prod(shape[1:])) ** 0.5
        layer.weight.data = torch.from_numpy(weight)
        if layer.bias is not None:
            layer.bias.data.zero_()
    for layer in net.modules():
        if isinstance(layer, nn.Dropout):
            layer.eval()
    return net.double()


@torch.no_grad()
@pytest.mark.parametrize("name", ["unet256_batchnorm_nodropout", "patchgan70_batchnorm_6ch"])
def test_outputs_equal_the_authors(name):
    if name.startswith("unet"):
        out = reference_network(UNetGenerator(256, 64))(normal_image(3))
    else:
        out = reference_network(PatchDiscriminator(64))(*normal_image(6).split(3, dim=1))
    reference = np.load(PARITY / "reference_outputs.npz")
    every = max(1, out.shape[-1] // 16)
    tight = {"rtol": 1e-5, "atol": 1e-6}  # the networks return float32
    np.testing.assert_allclose(out[:, :, ::every, ::every].numpy(), reference[name], **tight)
    mean_std = [out.double().mean(), out.double().std(correction=0)]
    np.testing.assert_allclose(mean_std, reference[f"{name}_mean_std"], rtol=1e-5, atol=1e-7)


def test_layers_equal_the_authors():
    layers = json.loads((PARITY / "reference_layers.json").read_text())
    for name, net in (
        ("unet256_batchnorm_nodropout", UNetGenerator(256, 64)),
        ("patchgan70_batchnorm_6ch", PatchDiscriminator(64)),
    ):
        found = [[type(m).__name__, list(m.weight.shape)] for m in convolutions(net)]
        assert found == layers[name]["layers"]


def count(net):
    return sum(p.numel() for p in net.parameters())


def test_parameter_counts():
    # Every convolution is 4x4. Encoder: C64 to C512, then four 512 -> 512. Decoder: its first layer
    # sees the bottleneck alone, the others twice the width because of the skip. Only the last
    # layer has a bias (3), the others are followed by batch norm, which has a scale and a shift
    # per channel; C64 and the bottleneck have neither norm nor bias.
    encoder = 3 * 64 + 64 * 128 + 128 * 256 + 256 * 512 + 4 * 512 * 512
    decoder = 512 * 512 + 3 * 1024 * 512 + 1024 * 256 + 512 * 128 + 256 * 64 + 128 * 3
    norms = (128 + 256 + 4 * 512) + (4 * 512 + 256 + 128 + 64)
    assert count(UNetGenerator(256, 64)) == 16 * (encoder + decoder) + 3 + 2 * norms == 54_413_955
    # Biases in the first and the last layer, which have no norm.
    convs = 6 * 64 + 64 * 128 + 128 * 256 + 256 * 512 + 512 * 1
    norms = 128 + 256 + 512
    assert count(PatchDiscriminator(64)) == 16 * convs + 64 + 1 + 2 * norms == 2_768_705


def test_no_statistics_are_kept():
    """Every result comes from the batch at hand, as the paper has it."""
    for net in (UNetGenerator(32, 4), PatchDiscriminator(4)):
        assert list(net.buffers()) == []


@pytest.mark.parametrize("size", [32, 64, 128, 256])
def test_shapes_and_depth_follow_the_image_size(size):
    G, D = UNetGenerator(size, 4), PatchDiscriminator(4)
    depth = int(np.log2(size))
    assert len(G.down) == depth == len(G.up) + 1
    bottleneck = []
    G.down[-1].register_forward_hook(lambda _layer, _input, output: bottleneck.append(output))
    for batch in (1, 3):
        x = torch.rand(batch, 3, size, size) * 2 - 1
        y = G(x)
        assert y.shape == x.shape and y.dtype == torch.float32
        assert y.abs().max() <= 1
        assert bottleneck.pop().shape == (batch, 32, 1, 1)
        assert D(x, y).shape == (batch, 1, size // 8 - 2, size // 8 - 2)


@pytest.mark.parametrize("size", [32, 64, 128, 256])
def test_a_batch_of_one_reaches_and_trains_every_layer(size):
    """With a norm on the 1x1 bottleneck a batch of one would give 0 there, and no gradient."""
    torch.manual_seed(0)
    G = initialize_weights(UNetGenerator(size, 4))
    x = torch.rand(1, 3, size, size) * 2 - 1
    (G(x) - x).abs().mean().backward()
    for name, p in G.named_parameters():
        assert p.grad.isfinite().all(), name
        assert p.grad.abs().max() > 0, name


def test_the_output_depends_on_the_bottleneck_and_on_every_skip():
    torch.manual_seed(0)
    G = initialize_weights(UNetGenerator(64, 4))
    for layer in G.modules():
        if isinstance(layer, nn.Dropout):
            layer.eval()
    x = torch.rand(1, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        plain = G(x)
        for down in G.down:
            hook = down.register_forward_hook(lambda _layer, _input, output: output + 1)
            assert not torch.allclose(G(x), plain)
            hook.remove()


def test_dropout_on_the_first_three_decoder_layers():
    def has_dropout(G):
        return [any(isinstance(m, nn.Dropout) and m.p == 0.5 for m in up) for up in G.up]

    assert has_dropout(UNetGenerator(256, 4)) == [True] * 3 + [False] * 4
    assert has_dropout(UNetGenerator(64, 4)) == [True] * 2 + [False] * 3  # CD512 exists twice


def test_receptive_field_of_d_is_70_by_70():
    torch.manual_seed(0)
    D = PatchDiscriminator(4).double()
    for k, layer in enumerate(D.layers):
        if isinstance(layer, nn.BatchNorm2d):
            D.layers[k] = nn.Identity()  # its statistics would see the whole picture
    x, y = torch.randn(2, 1, 3, 256, 256, dtype=torch.float64)
    x.requires_grad_(), y.requires_grad_()
    D(x, y)[0, 0, 15, 15].backward()
    for image in (x, y):
        rows, columns = (image.grad[0].abs().sum(0) > 0).nonzero().unbind(1)
        assert len(rows) == 70 * 70
        assert (rows.max() - rows.min() + 1, columns.max() - columns.min() + 1) == (70, 70)
        assert rows.min() == columns.min() == 8 * 15 - 23  # strides 2 * 2 * 2, paddings 1


def test_initial_weights():
    torch.manual_seed(0)
    for net in (UNetGenerator(64, 32), PatchDiscriminator(32)):
        for layer in net.modules():  # so that nothing passes by chance
            for p in layer.parameters(recurse=False):
                nn.init.constant_(p, 7)
        assert initialize_weights(net) is net
        kernels = [m.weight for m in convolutions(net)]
        scales = [m.weight for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
        shifts = [p for name, p in net.named_parameters() if name.endswith("bias")]
        assert len(kernels) + len(scales) + len(shifts) == len(list(net.parameters()))
        assert scales and shifts
        for group, mean in ((kernels, 0.0), (scales, 1.0)):
            values = torch.cat([p.detach().flatten() for p in group])
            error = 0.02 / len(values) ** 0.5
            assert abs(values.mean() - mean) < 5 * error
            assert abs(values.std() - 0.02) < 5 * error
        for kernel in kernels:
            assert 0.015 < kernel.std() < 0.025
        assert all((shift == 0).all() for shift in shifts)

"""cycleGAN's networks against the authors' numbers; buffer, blurs and DownSampler against numpy."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from conftest import ROOT
from cycleGAN_model import (
    BlurPool,
    BlurUpsample,
    DownSampler,
    ImageBuffer,
    PatchDiscriminator,
    ResnetBlock,
    ResnetGenerator,
    initialize_weights,
)

PARITY = ROOT / "tests" / "parity"
NETWORKS = {
    "resnet9_instancenorm": lambda: ResnetGenerator(9, 64),
    "resnet6_instancenorm": lambda: ResnetGenerator(6, 64),
    "resnet9_instancenorm_antialias": lambda: ResnetGenerator(9, 64, antialias=True),
    "patchgan70_instancenorm_3ch": lambda: PatchDiscriminator(64),
    "patchgan70_instancenorm_3ch_antialias": lambda: PatchDiscriminator(64, antialias=True),
}


@pytest.fixture
def float64_outputs(monkeypatch):
    """Networks in float64 return float64 too, not float32."""
    monkeypatch.setattr(torch.Tensor, "float", lambda self: self)


def convolutions(net):
    return [m for m in net.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)]


def noise(*shape, seed=0):
    """Float64 in [-1, 1]."""
    return torch.from_numpy(np.tanh(np.random.RandomState(seed).randn(*shape)))


def reference_network(net):
    """net in float64 with the weights that the reference outputs belong to."""
    for k, layer in enumerate(convolutions(net)):
        shape = tuple(layer.weight.shape)
        weight = np.random.RandomState(k).randn(*shape) * (1 / np.prod(shape[1:])) ** 0.5
        layer.weight.data = torch.from_numpy(weight)
        if layer.bias is not None:
            layer.bias.data.zero_()
    return net.double()


@torch.no_grad()
@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_equal_the_authors(name, float64_outputs):
    net, x = reference_network(NETWORKS[name]()), noise(1, 3, 256, 256, seed=1000)
    tight = {"rtol": 1e-9, "atol": 1e-11}
    if name.startswith("resnet9"):  # 10 s in float64; the 6 blocks show as much
        net, x, tight = net.to(torch.float32), x.to(torch.float32), {"rtol": 1e-4, "atol": 1e-5}
    out = net(x)
    reference = np.load(PARITY / "reference_outputs.npz")
    every = max(1, out.shape[-1] // 16)
    np.testing.assert_allclose(out[:, :, ::every, ::every].numpy(), reference[name], **tight)
    mean_std = [out.double().mean(), out.double().std(correction=0)]
    np.testing.assert_allclose(mean_std, reference[f"{name}_mean_std"], **tight)


@pytest.mark.parametrize("name", NETWORKS)
def test_layers_equal_the_authors(name):
    layers = json.loads((PARITY / "reference_layers.json").read_text())
    found = [[type(m).__name__, list(m.weight.shape)] for m in convolutions(NETWORKS[name]())]
    assert found == layers[name]["layers"]


def count(net):
    return sum(p.numel() for p in net.parameters())


def test_parameter_counts():
    # No norm has a scale or a shift, and no layer before one has a bias: weights, and the biases of
    # the last layer (and of D's first).
    outer = 49 * 3 * 64 + 49 * 64 * 3 + 3  # c7s1-64 and c7s1-3
    down = 9 * (64 * 128 + 128 * 256)
    up = 9 * (256 * 128 + 128 * 64)
    block = 2 * 9 * 256 * 256
    for antialias in (False, True):  # the blurs learn nothing
        G = ResnetGenerator(9, 64, antialias)
        assert count(G) == outer + down + 9 * block + up == 11_372_931
        D = PatchDiscriminator(64, antialias)
        convs = 16 * (3 * 64 + 64 * 128 + 128 * 256 + 256 * 512 + 512 * 1)
        assert count(D) == convs + 64 + 1 == 2_763_841
    assert count(ResnetGenerator(6, 64)) == outer + down + 6 * block + up == 7_833_987


@pytest.mark.parametrize("antialias", [False, True])
def test_a_bias_where_no_norm_follows_and_nowhere_else(antialias):
    for net in (ResnetGenerator(2, 4, antialias), PatchDiscriminator(4, antialias)):
        layers = [m for m in net.modules() if not list(m.children())]  # in the order of the data
        found = [m.bias is not None for m in convolutions(net)]
        wanted = []
        for layer, following in zip(layers, [*layers[1:], None], strict=True):
            if layer in convolutions(net):
                wanted.append(not isinstance(following, nn.InstanceNorm2d))
        assert found == wanted
        assert found[-1] and sum(found) == (1 if isinstance(net, ResnetGenerator) else 2)


def test_norms_learn_and_keep_nothing():
    """Every result comes from the picture at hand."""
    for net in (ResnetGenerator(2, 4), PatchDiscriminator(4)):
        norms = [m for m in net.modules() if isinstance(m, nn.InstanceNorm2d)]
        assert len(norms) == (9 if isinstance(net, ResnetGenerator) else 3)
        assert not any(list(norm.parameters()) for norm in norms)
        assert list(net.buffers()) == []


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("height, width", [(32, 32), (64, 64), (40, 72)])
def test_shapes(antialias, height, width):
    G, D = ResnetGenerator(2, 4, antialias), PatchDiscriminator(4, antialias)
    for batch in (1, 3):
        x = noise(batch, 3, height, width).float()
        y = G(x)
        assert y.shape == x.shape and y.dtype == torch.float32
        assert y.abs().max() <= 1
        assert D(x).shape == (batch, 1, height // 8 - 2, width // 8 - 2)


@pytest.mark.parametrize("antialias", [False, True])
def test_a_picture_is_treated_alone_whatever_else_is_in_the_batch(antialias, float64_outputs):
    x = noise(3, 3, 32, 32)
    for net in (ResnetGenerator(2, 4, antialias), PatchDiscriminator(4, antialias)):
        reference_network(net)
        alone = torch.cat([net(x[k : k + 1]) for k in range(3)])
        torch.testing.assert_close(net(x), alone, rtol=1e-9, atol=1e-10)


def test_a_block_adds_to_its_input():
    block, x = ResnetBlock(4).double(), noise(2, 4, 8, 8)
    for p in block.parameters():
        nn.init.zeros_(p)
    assert torch.equal(block(x), x)


def test_the_layers_have_the_papers_names():
    names = ["c7s1_64", "d128", "d256", "R256_1", "R256_2", "R256_3", "u128", "u64", "c7s1_3"]
    assert list(ResnetGenerator(3, 4).layers) == names


def test_receptive_field_of_d_is_70_by_70():
    torch.manual_seed(0)
    D = PatchDiscriminator(4).double()
    for k, layer in enumerate(D.layers):
        if isinstance(layer, nn.InstanceNorm2d):
            D.layers[k] = nn.Identity()  # its statistics would see the whole picture
    x = noise(1, 3, 256, 256).requires_grad_()
    D(x)[0, 0, 15, 15].backward()
    rows, columns = (x.grad[0].abs().sum(0) > 0).nonzero().unbind(1)
    assert len(rows) == 70 * 70
    assert (rows.max() - rows.min() + 1, columns.max() - columns.min() + 1) == (70, 70)
    assert rows.min() == columns.min() == 8 * 15 - 23  # strides 2 * 2 * 2, paddings 1


def test_initial_weights():
    torch.manual_seed(0)
    for net in (ResnetGenerator(2, 16), PatchDiscriminator(16)):
        for p in net.parameters():  # so that nothing passes by chance
            nn.init.constant_(p, 7)
        assert initialize_weights(net) is net
        kernels = [m.weight.detach() for m in convolutions(net)]
        biases = [m.bias for m in convolutions(net) if m.bias is not None]
        assert len(kernels) + len(biases) == len(list(net.parameters()))
        assert biases and all((bias == 0).all() for bias in biases)
        values = torch.cat([kernel.flatten() for kernel in kernels])
        error = 0.02 / len(values) ** 0.5
        assert abs(values.mean()) < 5 * error
        assert abs(values.std() - 0.02) < 5 * error
        for kernel in kernels:
            assert 0.015 < kernel.std() < 0.025


# ------------------------------------------------------------------------------------------ blurs


def along_both(function, image):
    """function, from (length,) to another length, along the columns, then the rows, of (H, W)."""
    return np.apply_along_axis(function, 1, np.apply_along_axis(function, 0, image))


def blur_pool(line):
    return np.convolve(np.pad(line, 1, "reflect"), [0.25, 0.5, 0.25], "valid")[::2]


def blur_upsample(line):
    padded = np.pad(line, 1, "edge")
    spread = np.zeros(2 * len(padded) - 1)
    spread[::2] = padded
    return np.convolve(spread, [0.25, 0.75, 0.75, 0.25])[3:-3]


@pytest.mark.parametrize("height, width", [(8, 8), (6, 9), (7, 4)])
@pytest.mark.parametrize("layer, line", [(BlurPool(), blur_pool), (BlurUpsample(), blur_upsample)])
def test_blurs_equal_numpy(layer, line, height, width):
    x = noise(2, 3, height, width)
    wanted = [[along_both(line, channel) for channel in image] for image in x.numpy()]
    np.testing.assert_allclose(layer(x).numpy(), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layer, shape", [(BlurPool(), (4, 6)), (BlurUpsample(), (16, 24))])
def test_blurs_leave_a_constant_as_it_is(layer, shape):
    x = torch.tensor([0.7, -0.2]).view(1, 2, 1, 1).expand(1, 2, 8, 12)
    out = layer(x)
    torch.testing.assert_close(out, x[:, :, :1, :1].expand(1, 2, *shape))
    assert layer(x.double()).dtype == torch.float64 and list(layer.parameters()) == []


def gaussian_7x7(image):
    """(H, W), padded by reflection by 3, blurred with a standard deviation of 3 pixels."""
    distance = np.arange(-3, 4)
    weights = np.exp(-(distance**2) / (2 * 3.0**2))
    kernel = np.outer(weights, weights) / np.outer(weights, weights).sum()
    height, width = image.shape
    padded = np.pad(image, 3, "reflect")
    moved = [
        (kernel[a, b], padded[a : a + height, b : b + width]) for a in range(7) for b in range(7)
    ]
    return sum(weight * part for weight, part in moved)


@pytest.mark.parametrize("blur", [False, True])
@pytest.mark.parametrize("pool", [1, 2, 3])
def test_down_sampler_equals_numpy(blur, pool):
    x = noise(2, 3, 12, 18)
    wanted = np.stack([gaussian_7x7(c) if blur else c for c in x.numpy().reshape(6, 12, 18)])
    wanted = wanted.reshape(2, 3, 12 // pool, pool, 18 // pool, pool).mean((3, 5))
    found = DownSampler(blur, pool)(x)
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-12, atol=1e-12)


def test_down_sampler_that_is_off_is_the_identity():
    x = noise(2, 3, 8, 8)
    assert torch.equal(DownSampler()(x), x)


# ----------------------------------------------------------------------------------------- buffer


def numbered(first, count):
    """Pictures that hold their number: (count, 3, 2, 2)."""
    return torch.arange(first, first + count).float().view(-1, 1, 1, 1).expand(-1, 3, 2, 2)


def numbers(images):
    return [int(image[0, 0, 0]) for image in images]


@pytest.mark.parametrize("batch", [1, 3, 5])
def test_a_buffer_gives_back_the_same_until_it_is_full(batch):
    buffer = ImageBuffer(15)
    for first in range(0, 15, batch):
        images = numbered(first, batch)
        assert torch.equal(buffer(images), images)
    assert numbers(buffer.images) == list(range(15))


def test_a_full_buffer_gives_an_old_picture_half_of_the_time_and_each_one_once():
    torch.manual_seed(0)
    buffer, asked = ImageBuffer(50), range(50, 2050)
    buffer(numbered(0, 50))
    given = [numbers(buffer(numbered(n, 1)))[0] for n in asked]
    old = [(n, got) for n, got in zip(asked, given, strict=True) if got != n]
    assert abs(len(old) - 1000) < 5 * (2000 / 4) ** 0.5
    assert all(got < n for n, got in old)
    assert len(set(given)) == len(given)
    # Nothing is lost: each picture has been given, or waits.
    assert sorted(given + numbers(buffer.images)) == list(range(2050))
    # Any of the 50 may be the one: how long a picture has waited is 100 calls in the mean.
    assert not set(numbers(buffer.images)) & set(range(50))
    assert 80 < np.mean([n - got for n, got in old]) < 120


def test_a_buffer_of_size_0_gives_back_all():
    buffer = ImageBuffer(0)
    for first in range(0, 40, 2):
        assert torch.equal(buffer(numbered(first, 2)), numbered(first, 2))
    assert buffer.images == []


def test_a_buffer_keeps_copies_without_history():
    torch.manual_seed(0)
    buffer, weight = ImageBuffer(2), torch.ones((), requires_grad=True)
    images = numbered(1, 3) * weight
    given = buffer(images)
    assert not given.requires_grad and not any(image.requires_grad for image in buffer.images)
    before = numbers(buffer.images)
    with torch.no_grad():
        images.zero_()
        given.zero_()
    assert numbers(buffer.images) == before and 0 not in before
    while numbers(buffer.images) == before:  # the same for one that takes the place of another
        images = numbered(7, 1).clone()
        given = buffer(images)
    before = numbers(buffer.images)
    images.zero_()
    given.zero_()
    assert numbers(buffer.images) == before and 7 in before


def test_a_buffer_does_the_same_at_any_batch_size():
    given = {}
    for batch in (1, 4, 8):
        torch.manual_seed(3)
        buffer = ImageBuffer(6)
        batches = [buffer(numbered(first, batch)) for first in range(0, 40, batch)]
        given[batch] = numbers(torch.cat(batches))
    assert given[1] == given[4] == given[8] != list(range(40))


def test_a_buffer_goes_on_from_its_state(tmp_path):
    torch.manual_seed(0)
    buffer, other = ImageBuffer(4), ImageBuffer(4)
    buffer(numbered(0, 20))
    state, random = buffer.state_dict(), torch.get_rng_state()
    torch.save(state, tmp_path / "state.pt")
    wanted = numbers(buffer(numbered(20, 20)))
    for saved in (state, torch.load(tmp_path / "state.pt", weights_only=True)):
        other.load_state_dict(saved)
        torch.set_rng_state(random)
        assert numbers(other(numbered(20, 20))) == wanted

"""The networks of the three methods against the authors' reference outputs, the papers' tables and
numpy; the image buffer.
"""

import importlib
import json

import numpy as np
import pytest
import torch
from torch import nn

from conftest import METHODS, ROOT, UNPAIRED, noise

PARITY = ROOT / "tests" / "parity"
TAPS = ["pix", "c7s1_64", "d128", "d256", "R256_1", "R256_2", "R256_3"]
RESNET = {
    "resnet9_instancenorm": ("ResnetGenerator", 9, 64),
    "resnet6_instancenorm": ("ResnetGenerator", 6, 64),
    "resnet9_instancenorm_antialias": ("ResnetGenerator", 9, 64, True),
    "patchgan70_instancenorm_3ch": ("PatchDiscriminator", 64),
    "patchgan70_instancenorm_3ch_antialias": ("PatchDiscriminator", 64, True),
}
UNET = {
    "unet256_batchnorm_nodropout": ("UNetGenerator", 256, 64),
    "patchgan70_batchnorm_6ch": ("PatchDiscriminator", 64),
}
COUNTS = {"unet256_batchnorm_nodropout": 54_413_955, "patchgan70_batchnorm_6ch": 2_768_705}
COUNTS |= {"resnet9_instancenorm": 11_372_931, "resnet6_instancenorm": 7_833_987}
COUNTS |= {"patchgan70_instancenorm_3ch": 2_763_841}
REFERENCES = [(m, name) for m in METHODS for name in (UNET if m == "pix2pix" else RESNET)]


def model(method):
    """The module <method>_model."""
    return importlib.import_module(f"{method}_model")


def make(method, kind, *arguments):
    return getattr(model(method), kind)(*arguments)


def reference(method, name):
    return make(method, *(UNET if method == "pix2pix" else RESNET)[name])


def small_nets(method, antialias=False):
    """G and D with few channels, for images of 32 pixels."""
    if method == "pix2pix":
        return [make(method, "UNetGenerator", 32, 4), make(method, "PatchDiscriminator", 4)]
    D = make(method, "PatchDiscriminator", 4, antialias)
    return [make(method, "ResnetGenerator", 3, 4, antialias), D]


def convolutions(net):
    return [m for m in net.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)]


def give_weights(net):
    """net without dropout, with the weights that the reference outputs belong to, in float64."""
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


def judge(method, D, x):
    """D(x), or D(x, x) for pix2pix."""
    return D(x, x) if method == "pix2pix" else D(x)


@torch.no_grad()
@pytest.mark.parametrize("method, name", REFERENCES)
def test_outputs_equal_the_authors(method, name, float64_outputs):
    net, tight = give_weights(reference(method, name)), {"rtol": 1e-9, "atol": 1e-11}
    x = noise(1, 6, 256, 256, seed=1001) if "6ch" in name else noise(1, 3, 256, 256, seed=1000)
    if name.startswith(("resnet", "unet")):  # 10 s in float64
        net, x, tight = net.to(torch.float32), x.to(torch.float32), {"rtol": 1e-4, "atol": 1e-5}
    out = net(*x.split(3, dim=1))
    saved, every = np.load(PARITY / "reference_outputs.npz"), max(1, out.shape[-1] // 16)
    np.testing.assert_allclose(out[:, :, ::every, ::every].numpy(), saved[name], **tight)
    mean_std = [out.double().mean(), out.double().std(correction=0)]
    np.testing.assert_allclose(mean_std, saved[f"{name}_mean_std"], **tight)


@pytest.mark.parametrize("method, name", REFERENCES)
def test_layers_equal_the_authors(method, name):
    """And the papers' tables: no bias before a norm, no blur that learns."""
    parameters = reference(method, name).parameters()
    assert sum(p.numel() for p in parameters) == COUNTS[name.removesuffix("_antialias")]
    layers = json.loads((PARITY / "reference_layers.json").read_text())[name]["layers"]
    found = convolutions(reference(method, name))
    assert [[type(m).__name__, list(m.weight.shape)] for m in found] == layers


@pytest.mark.parametrize("antialias", [False, True])
def test_nothing_but_weights_is_saved(method, antialias):
    """No running statistics: every result comes from the current batch. No filter of a blur."""
    for net in small_nets(method, antialias):
        norms = [m for m in net.modules() if isinstance(m, nn.InstanceNorm2d | nn.BatchNorm2d)]
        assert norms and not any(norm.track_running_stats for norm in norms)
        assert all(norm.affine == (method == "pix2pix") for norm in norms)
        assert set(net.state_dict()) == {name for name, _ in net.named_parameters()}


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("height, width", [(32, 32), (64, 64), (96, 64)])
def test_shapes(method, antialias, height, width):
    for batch in (1, 3):
        G, D = small_nets(method, antialias)
        x = noise(batch, 3, height, width).float()
        y = G(x)
        assert y.shape == x.shape and y.dtype == torch.float32 and y.abs().max() <= 1
        assert judge(method, D, x).shape == (batch, 1, height // 8 - 2, width // 8 - 2)


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("method", UNPAIRED)
def test_an_image_is_translated_independently_of_its_batch(method, antialias, float64_outputs):
    x = noise(3, 3, 32, 32)
    for net in map(give_weights, small_nets(method, antialias)):
        alone = torch.cat([net(x[k : k + 1]) for k in range(3)])
        torch.testing.assert_close(net(x), alone, rtol=1e-9, atol=1e-10)


def test_receptive_field_of_D_is_70_by_70(method):
    D = make(method, "PatchDiscriminator", 4).double()
    for k, layer in enumerate(D.layers):
        if isinstance(layer, nn.InstanceNorm2d | nn.BatchNorm2d):
            D.layers[k] = nn.Identity()  # its statistics would see the whole image
    x = noise(1, 3, 128, 128).requires_grad_()
    judge(method, D, x)[0, 0, 7, 7].backward()
    rows, columns = (x.grad[0].abs().sum(0) > 0).nonzero().unbind(1)
    assert len(rows) == 70 * 70
    assert (rows.max() - rows.min() + 1, columns.max() - columns.min() + 1) == (70, 70)
    assert rows.min() == columns.min() == 8 * 7 - 23  # strides 2 * 2 * 2, paddings 1


def test_initial_weights(method):
    torch.manual_seed(0)
    xavier = method == "CUT"
    nets = small_nets(method)
    if xavier:
        nets.append(importlib.import_module("CUT_nce").ProjectionHeads([3, 64]))
    for net in nets:
        for p in net.parameters():  # so that nothing passes by chance
            nn.init.constant_(p, 7)
        assert model(method).initialize_weights(net) is net
        groups, found = {0.0: [], 1.0: []}, 0
        for layer in net.modules():
            if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear | nn.BatchNorm2d):
                weight, mean = layer.weight.detach(), float(isinstance(layer, nn.BatchNorm2d))
                fans = sum(weight.shape[:2]) * weight[0, 0].numel() if not mean else 1
                std = 0.02 * (2 / fans) ** 0.5 if xavier else 0.02
                groups[mean].append((weight.flatten() - mean) / std)
                assert layer.bias is None or (layer.bias == 0).all()
                found += 1 + (layer.bias is not None)
        assert found == len(list(net.parameters()))
        for values in map(torch.cat, filter(None, groups.values())):
            assert abs(values.mean()) < 5 / len(values) ** 0.5
            assert abs(values.std() - 1) < 5 / len(values) ** 0.5 and abs(values).max() > 2


def unet(*arguments):
    return pytest.importorskip("pix2pix_model").UNetGenerator(*arguments)


@pytest.mark.parametrize("size", [32, 64, 128, 256])
def test_the_bottleneck_is_one_pixel_and_a_batch_of_one_trains_every_layer(size):
    """With a norm at the 1x1 bottleneck a batch of one would give 0 there, and no gradient."""
    torch.manual_seed(0)
    G, bottleneck = unet(size, 4), []
    model("pix2pix").initialize_weights(G)
    assert len(G.down) == np.log2(size) == len(G.up) + 1
    G.down[-1].register_forward_hook(lambda _layer, _input, output: bottleneck.append(output))
    x = torch.rand(1, 3, size, size) * 2 - 1
    (G(x) - x).abs().mean().backward()
    assert bottleneck[0].shape == (1, 32, 1, 1)
    for name, p in G.named_parameters():
        assert p.grad.isfinite().all() and p.grad.abs().max() > 0, name


def test_dropout_in_the_first_three_layers_of_the_decoder():
    def places(G):
        return [any(isinstance(m, nn.Dropout) and m.p == 0.5 for m in up) for up in G.up]

    assert places(unet(256, 4)) == [True] * 3 + [False] * 4
    assert places(unet(64, 4)) == [True] * 2 + [False] * 3  # CD512 exists twice
    assert places(unet(256, 4, (2, 3, 4))) == [False] + [True] * 3 + [False] * 3
    assert not any(isinstance(m, nn.Dropout) for down in unet(256, 4).down for m in down)


@pytest.mark.parametrize("antialias", [False, True])
def test_taps_are_the_outputs_of_the_layers_of_that_name(antialias):
    G, x, outputs = give_weights(small_nets("CUT", antialias)[0]), noise(2, 3, 32, 32), {}
    for name, layer in G.layers.items():  # a copy, since a later layer could overwrite the output
        layer.register_forward_hook(
            lambda _l, _i, out, name=name: outputs.update({name: out.clone()})
        )
    image, features = G(x, TAPS)
    assert torch.equal(image, G(x)) and torch.equal(features[0], x)
    assert torch.equal(x, noise(2, 3, 32, 32))
    for name, feature in zip(TAPS[1:], features[1:], strict=True):
        assert torch.equal(feature, outputs[name]), name
    sizes = {"pix": 32, "c7s1_64": 32, "d128": 16}
    channels = model("CUT").tap_channels(TAPS, 3, 4)
    for name, feature, width in zip(TAPS, features, channels, strict=True):
        assert feature.shape == (2, width, sizes.get(name, 8), sizes.get(name, 8)), name


def test_tap_channels():
    tap_channels = model("CUT").tap_channels
    assert tap_channels(["pix", "d128", "d256", "R256_1", "R256_5"]) == [3, 128, 256, 256, 256]
    assert tap_channels(["R256_9", "c7s1_64"]) == [256, 64]
    for taps, n_layers in ((["R256_10"], 9), (["R256_4"], 3), (["u128"], 9), (["R256_0"], 9)):
        with pytest.raises(KeyError):
            tap_channels(taps, n_layers)


@pytest.mark.parametrize("last", range(len(TAPS)))
def test_encoding_stops_after_the_last_tap_with_the_same_result(last):
    G, x = give_weights(small_nets("CUT")[0]), noise(2, 3, 32, 32)
    expected = dict(zip(TAPS, G(x, TAPS)[1], strict=True))
    names, called = ["pix", *G.layers], []
    for name, layer in G.layers.items():
        layer.register_forward_hook(lambda *_, name=name: called.append(name))
    for taps in ([TAPS[last]], [TAPS[last], "pix"], TAPS[: last + 1]):
        called.clear()
        features = G(x, taps, encode_only=True)
        assert called == names[1 : last + 1] and len(features) == len(taps)
        for tap, feature in zip(taps, features, strict=True):
            assert torch.equal(feature, expected[tap]), tap


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


def upsampling(method):
    """The first layer of an antialiased u128."""
    return model(method).up(4, antialias=True)[0]


@pytest.mark.parametrize("height, width", [(8, 8), (6, 9), (7, 4)])
@pytest.mark.parametrize("method", UNPAIRED)
def test_blurs_equal_numpy(method, height, width):
    x = noise(2, 3, height, width)
    layers = (make(method, "BlurPool"), blur_pool), (upsampling(method), blur_upsample)
    for layer, line in layers:
        expected = [[along_both(line, channel) for channel in image] for image in x.numpy()]
        np.testing.assert_allclose(layer.double()(x).numpy(), expected, rtol=1e-12, atol=1e-14)
        assert list(layer.parameters()) == []
    assert [b.is_meta for b in layers[0][0].to("meta").buffers()] == [True]  # moves with the net


@pytest.mark.parametrize("method", UNPAIRED)
def test_the_blur_is_exact_in_bf16(method):
    """Autocast would round its sums; only input and output are rounded here."""
    x = noise(1, 2, 8, 8).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = make(method, "BlurPool")(x)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, make(method, "BlurPool").double()(x.double()).bfloat16())


def gaussian_7x7(image):
    """(H, W), padded by reflection by 3, blurred with a standard deviation of 3 pixels."""
    weights = np.exp(-(np.arange(-3, 4) ** 2) / (2 * 3.0**2))
    kernel = np.outer(weights, weights) / np.outer(weights, weights).sum()
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(image, 3, "reflect"), (7, 7))
    return (windows * kernel).sum((2, 3))


@pytest.mark.skipif("cycleGAN" not in METHODS, reason="--pix-loss is cycleGAN's")
@pytest.mark.parametrize("blur", [False, True])
@pytest.mark.parametrize("pool", [1, 2, 3])
def test_down_sampler_equals_numpy(blur, pool):
    x = noise(2, 3, 12, 18)
    expected = np.stack([gaussian_7x7(c) if blur else c for c in x.numpy().reshape(6, 12, 18)])
    expected = expected.reshape(2, 3, 12 // pool, pool, 18 // pool, pool).mean((3, 5))
    found = model("cycleGAN").blur_and_pool(x, blur, pool)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12, atol=1e-12)


def numbered(first, count):
    """Images that hold their number: (count, 3, 2, 2)."""
    return torch.arange(first, first + count).float().view(-1, 1, 1, 1).expand(-1, 3, 2, 2)


def numbers(images):
    return [int(image[0, 0, 0]) for image in images]


@pytest.fixture(params=UNPAIRED)
def new_buffer(request):
    return model(request.param).ImageBuffer


@pytest.mark.parametrize("batch", [1, 3, 5])
@pytest.mark.parametrize("size", [0, 15])
def test_a_buffer_returns_its_input_until_it_is_full_or_always_with_size_0(new_buffer, size, batch):
    buffer = new_buffer(size)
    for first in range(0, size or 60, batch):
        assert torch.equal(buffer(numbered(first, batch)), numbered(first, batch))
    assert numbers(buffer.images) == list(range(size))


def test_a_full_buffer_returns_an_old_image_half_of_the_time_and_each_once(new_buffer):
    torch.manual_seed(0)
    buffer, asked = new_buffer(50), range(50, 2050)
    buffer(numbered(0, 50))
    returned = [numbers(buffer(numbered(n, 1)))[0] for n in asked]
    old = [(n, got) for n, got in zip(asked, returned, strict=True) if got != n]
    assert abs(len(old) - 1000) < 5 * (2000 / 4) ** 0.5
    assert all(got < n for n, got in old) and len(set(returned)) == len(returned)
    # No image is lost: each was returned or is in the buffer.
    assert sorted(returned + numbers(buffer.images)) == list(range(2050))
    # Any of the 50 may be the one: an image stays 100 calls on average.
    assert not set(numbers(buffer.images)) & set(range(50))
    assert 80 < np.mean([n - got for n, got in old]) < 120


def test_a_buffer_keeps_copies_without_history(new_buffer):
    torch.manual_seed(0)
    buffer, weight = new_buffer(2), torch.ones((), requires_grad=True)
    for first in (1, 7, 14, 21, 28):  # fills it, then exchanges images
        images = numbered(first, 3) * weight
        returned = buffer(images)
        assert not returned.requires_grad and not any(i.requires_grad for i in buffer.images)
        before = numbers(buffer.images)
        with torch.no_grad():
            images.zero_(), returned.zero_()
        assert numbers(buffer.images) == before and 0 not in before


def test_a_buffer_resumes_from_its_state(new_buffer, tmp_path):
    torch.manual_seed(0)
    buffer, other = new_buffer(4), new_buffer(4)
    buffer(numbered(0, 20))
    torch.save(buffer.state_dict(), tmp_path / "state.pt")
    random = torch.get_rng_state()
    expected = numbers(buffer(numbered(20, 20)))
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    torch.set_rng_state(random)
    assert numbers(other(numbered(20, 20))) == expected

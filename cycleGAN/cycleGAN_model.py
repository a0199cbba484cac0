"""The networks of CycleGAN (Zhu et al. 2017, https://arxiv.org/abs/1703.10593) in the names of its
appendix, the image buffer, and the blur and pooling of --pix-loss.

    python cycleGAN/train.py --data-folder facades_unpaired      # trains them
    python -m pytest tests/test_models.py                        # compares with the authors' code
"""

import torch
from torch import nn
from torch.nn.functional import avg_pool2d, conv2d, pad
from torchvision.transforms.functional import gaussian_blur


class BlurPool(nn.Module):
    """Halves H and W after a blur of [1, 2, 1] / 4 along each axis, against aliasing (Zhang 2019,
    https://arxiv.org/abs/1904.11486). (N, C, H, W) -> (N, C, ceil(H / 2), ceil(W / 2)).
    """

    def __init__(self):
        super().__init__()
        filter = torch.tensor([1.0, 2.0, 1.0]) / 4
        self.register_buffer("filter", torch.outer(filter, filter)[None, None], persistent=False)

    def forward(self, x):
        # Under bf16 autocast the blur stays in fp32: exact, and 2 to 3 times faster on CPUs.
        with torch.autocast(x.device.type, enabled=False):
            filter = self.filter.expand(x.shape[1], 1, 3, 3)
            x_padded = pad(x, (1, 1, 1, 1), mode="reflect").to(filter.dtype)
            return conv2d(x_padded, filter, stride=2, groups=x.shape[1]).to(x.dtype)


class ReflectionPad(nn.ReflectionPad2d):
    """Reflection padding in the dtype of x: CPU autocast would keep an fp32 copy for backward."""

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x)


def norm_relu(channels):
    """Instance norm, then ReLU. A bias before the norm would cancel out."""
    # Authors' Lua code: with a learned scale and shift. Authors' PyTorch code, and here: without.
    return [nn.InstanceNorm2d(channels), nn.ReLU()]


class ResnetBlock(nn.Module):
    """R256: x plus two 3x3 convolutions of it."""

    def __init__(self, channels):
        super().__init__()
        self.layers = nn.Sequential(
            ReflectionPad(1),
            nn.Conv2d(channels, channels, 3, bias=False),
            *norm_relu(channels),
            ReflectionPad(1),
            nn.Conv2d(channels, channels, 3, bias=False),
            nn.InstanceNorm2d(channels),
        )

    def forward(self, x):
        return x + self.layers(x)  # (N, channels, H, W)


def down(channels, antialias):
    """d: a 3x3 convolution to twice as many channels at half the resolution."""
    stride, blur = (1, [BlurPool()]) if antialias else (2, [])
    conv = nn.Conv2d(channels, 2 * channels, 3, stride, 1, bias=False)
    return nn.Sequential(conv, *norm_relu(2 * channels), *blur)


def up(channels, antialias):
    """u: a 3x3 convolution to half as many channels at twice the resolution."""
    half = channels // 2
    if antialias:
        # Zhang 2019: insert zeros, then blur with [1, 3, 3, 1] / 4. That is bilinear upsampling.
        layers = [nn.Upsample(scale_factor=2, mode="bilinear")]
        layers += [nn.Conv2d(channels, half, 3, 1, 1, bias=False)]
    else:
        layers = [nn.ConvTranspose2d(channels, half, 3, 2, 1, output_padding=1, bias=False)]
    return nn.Sequential(*layers, *norm_relu(half))


class ResnetGenerator(nn.Module):
    """G: X -> Y: c7s1-64, d128, d256, n_layers times R256, u128, u64, c7s1-3.

    The paper's names give the widths for ngf = 64; the layers keep them for any ngf.
    """

    def __init__(self, n_layers=9, ngf=64, antialias=False):
        super().__init__()
        first = [ReflectionPad(3), nn.Conv2d(3, ngf, 7, bias=False), *norm_relu(ngf)]
        layers = {"c7s1_64": nn.Sequential(*first)}
        layers["d128"] = down(ngf, antialias)
        layers["d256"] = down(2 * ngf, antialias)
        for k in range(1, n_layers + 1):
            layers[f"R256_{k}"] = ResnetBlock(4 * ngf)
        layers["u128"] = up(4 * ngf, antialias)
        layers["u64"] = up(2 * ngf, antialias)
        layers["c7s1_3"] = nn.Sequential(ReflectionPad(3), nn.Conv2d(ngf, 3, 7))
        self.layers = nn.ModuleDict(layers)

    def forward(self, x):
        """x: (N, 3, H, W) in [-1, 1], H and W multiples of 4. Returns the same."""
        for layer in self.layers.values():
            x = layer(x)
        return torch.tanh(x.float())  # (N, 3, H, W)


# Differs from pix2pix/pix2pix_model.py: it sees one image, not a pair; instance norm
class PatchDiscriminator(nn.Module):
    """D: X -> a number for each 70x70 patch (antialias: 84x84). C64-C128-C256-C512, 1 channel."""

    def __init__(self, ndf=64, antialias=False):
        super().__init__()
        stride, blur = (1, [BlurPool()]) if antialias else (2, [])
        layers = [nn.Conv2d(3, ndf, 4, stride, 1), nn.LeakyReLU(0.2), *blur]
        for width in (ndf, 2 * ndf):
            layers += [nn.Conv2d(width, 2 * width, 4, stride, 1, bias=False)]
            layers += [nn.InstanceNorm2d(2 * width), nn.LeakyReLU(0.2), *blur]
        layers += [nn.Conv2d(4 * ndf, 8 * ndf, 4, 1, 1, bias=False)]
        layers += [nn.InstanceNorm2d(8 * ndf), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(8 * ndf, 1, 4, 1, 1))

    def forward(self, x):
        """x: (N, 3, H, W) in [-1, 1]. Returns (N, 1, H / 8 - 2, W / 8 - 2)."""
        return self.layers(x).float()


class ImageBuffer:
    """A pool of `size` generated images for D to learn from (Zhu et al. 2017, section 4).

    buffer(images): (N, 3, H, W) -> (N, 3, H, W). While the buffer fills, each image is stored and
    returned. Once it is full, with probability 1/2 an image replaces a random stored one, which is
    returned instead. Size 0: off.
    """

    def __init__(self, size):
        self.size, self.images = size, []

    def __call__(self, images):
        returned = []
        for image in images.detach():
            if len(self.images) < self.size:
                self.images.append(image.clone())
            elif self.size and torch.rand(()) < 0.5:
                place = int(torch.randint(self.size, ()))
                image, self.images[place] = self.images[place].to(image), image.clone()
            returned.append(image)
        return torch.stack(returned)

    def state_dict(self):
        return {"images": [image.cpu() for image in self.images]}

    def load_state_dict(self, state):
        self.images = list(state["images"])


def blur_and_pool(x, blur=False, pool=1):
    """What --pix-loss compares: an image after --pix-blur and --pix-pool.

    x: (N, 3, H, W) -> (N, 3, H // pool, W // pool). The blur is a 7x7 Gaussian with a standard
    deviation of 3 pixels, padded by reflection.
    """
    if blur:
        x = gaussian_blur(x, [7, 7], [3.0, 3.0])
    return avg_pool2d(x, pool)


def initialize_weights(net):
    """Returns net with convolutions N(0, 0.02), norm scales N(1, 0.02), biases and shifts 0."""
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.normal_(layer.weight, 0.0, 0.02)
        elif isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.weight, 1.0, 0.02)
        if getattr(layer, "bias", None) is not None:
            nn.init.zeros_(layer.bias)
    return net

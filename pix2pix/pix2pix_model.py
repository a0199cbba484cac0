"""The networks of pix2pix (Isola et al. 2017, https://arxiv.org/abs/1611.07004), as its appendix 6
names them.

    python pix2pix/train.py --data-folder facades      # trains them
    python -m pytest tests/test_pix2pix_model.py       # holds them against the authors' numbers
"""

import math

import torch
from torch import nn


def batch_norm(channels):
    """Batch norm that always takes the statistics of the batch at hand (paper 3.3)."""
    return nn.BatchNorm2d(channels, track_running_stats=False)


class UNetGenerator(nn.Module):
    """G: X -> Y, an encoder and a decoder with a skip between layers of equal size.

    image_size: a power of two, at least 32. 2**k gives k down-samplings, so that the bottleneck is
    1x1; at 256, C64-C128-C256-C512-C512-C512-C512-C512, then CD512-CD512-CD512-C512-C256-C128-C64.
    """

    def __init__(self, image_size=256, ngf=64):
        super().__init__()
        depth = int(math.log2(image_size))
        widths = [min(ngf * 2**k, ngf * 8) for k in range(depth)]  # of the encoder's outputs
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for k in range(depth):
            layers = [nn.LeakyReLU(0.2)] if k > 0 else []
            layers += [nn.Conv2d(widths[k - 1] if k > 0 else 3, widths[k], 4, 2, 1, bias=False)]
            if 0 < k < depth - 1:  # not on the 1x1 bottleneck: a batch of one would become all 0
                layers += [batch_norm(widths[k])]
            self.down.append(nn.Sequential(*layers))
        for k in reversed(range(1, depth)):
            from_skip = widths[k] if k < depth - 1 else 0
            width = widths[k] + from_skip
            layers = [nn.ReLU(), nn.ConvTranspose2d(width, widths[k - 1], 4, 2, 1, bias=False)]
            layers += [batch_norm(widths[k - 1])]
            # Paper and authors' Lua code: dropout on the decoder's layers 1 to 3. Authors' PyTorch
            # code: on 2 to 4. Here: the paper's, because its published pictures came from Lua.
            if depth - k <= 3 and widths[k - 1] == ngf * 8:
                layers += [nn.Dropout(0.5)]
            self.up.append(nn.Sequential(*layers))
        self.to_image = nn.Sequential(nn.ReLU(), nn.ConvTranspose2d(2 * ngf, 3, 4, 2, 1))

    def forward(self, x):
        """x: (N, 3, H, W) in [-1, 1], H and W multiples of image_size. Returns the same."""
        skips = []
        for down in self.down:
            x = down(x)  # (N, widths[k], H / 2**(k + 1), W / 2**(k + 1))
            skips.append(x)
        x = skips.pop()  # (N, 8 ngf, H / 2**depth, W / 2**depth): the bottleneck
        for up in self.up:
            x = torch.cat([skips.pop(), up(x)], 1)  # (N, 2 widths[k - 1], H / 2**k, W / 2**k)
        return torch.tanh(self.to_image(x).float())  # (N, 3, H, W)


class PatchDiscriminator(nn.Module):
    """D: (X, Y) -> a logit for each 70x70 patch of a pair. C64-C128-C256-C512, then 1 channel."""

    def __init__(self, ndf=64):
        super().__init__()
        layers = [nn.Conv2d(6, ndf, 4, 2, 1), nn.LeakyReLU(0.2)]
        for width, stride in ((ndf, 2), (2 * ndf, 2), (4 * ndf, 1)):
            layers += [nn.Conv2d(width, 2 * width, 4, stride, 1, bias=False)]
            layers += [batch_norm(2 * width), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(8 * ndf, 1, 4, 1, 1))

    def forward(self, x, y):
        """x, y: (N, 3, H, W) in [-1, 1]. Logits (N, 1, H / 8 - 2, W / 8 - 2), positive for real."""
        return self.layers(torch.cat([x, y], 1)).float()


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

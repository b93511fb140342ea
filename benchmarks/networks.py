"""The networks that are timed: a score MLP and a small U-Net of diffusers."""

from itertools import pairwise

import torch
from torch import nn


class ScoreMLP(nn.Module):
    """SiLU layers, time concatenated to the input."""

    def __init__(self, d: int, width: int, depth: int = 3):
        super().__init__()
        widths = [d + 1] + [width] * depth
        layers = [layer for a, b in pairwise(widths) for layer in (nn.Linear(a, b), nn.SiLU())]
        self.layers = nn.Sequential(*layers, nn.Linear(width, d))

    def forward(self, x_t, t):
        return self.layers(torch.cat([x_t, t[:, None].to(x_t.dtype)], 1))


def mlp(d: int, width: int, depth: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return ScoreMLP(d, width, depth).eval()


def unet() -> nn.Module:
    """Return a UNet2DModel for 32 x 32 colour images, 1.1 million parameters."""
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D", "DownBlock2D", "AttnDownBlock2D")}
    blocks |= {"up_block_types": ("AttnUpBlock2D", "UpBlock2D", "UpBlock2D")}
    return UNet2DModel(32, 3, 3, block_out_channels=(32, 64, 64), layers_per_block=1, **blocks).eval()


class ConvNet(nn.Module):
    """A residual convolutional network on colour images: the size of a small U-Net's work, in torch alone."""

    def __init__(self, width: int, depth: int = 8):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, 3, 3, padding=1)
        self.layers = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(depth))
        self.time = nn.Linear(1, width)

    def forward(self, x_t, t):
        h = self.first(x_t) + self.time(t[:, None].to(x_t.dtype))[..., None, None]
        for layer in self.layers:
            h = h + layer(nn.functional.silu(h))
        return self.last(h)

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
        return self.layers(torch.cat([x_t, t[:, None]], 1))


def mlp(d: int, width: int) -> nn.Module:
    torch.manual_seed(0)
    return ScoreMLP(d, width).eval()


def unet() -> nn.Module:
    """Return a UNet2DModel for 32 x 32 colour images, 1.1 million parameters."""
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D", "DownBlock2D", "AttnDownBlock2D")}
    blocks |= {"up_block_types": ("AttnUpBlock2D", "UpBlock2D", "UpBlock2D")}
    return UNet2DModel(32, 3, 3, block_out_channels=(32, 64, 64), layers_per_block=1, **blocks).eval()

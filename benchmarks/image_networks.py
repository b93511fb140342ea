"""A U-Net and a transformer of diffusers on patches of photographs, with weights that lie in this folder.

Both predict v at a log-SNR in [-10, 15] and see, beside x_t, its sines and cosines at two frequencies, which the lowest
bits of an image need (Kingma et al., 2021, https://arxiv.org/abs/2107.00630). In 32 x 32 pixels they work on squares
of 2 x 2 as if these were one pixel of 12 numbers.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import fastscore as fs

SCHEDULE = fs.LogSNR(-10.0, 15.0)
PREDICTS = "v"
FREQUENCIES = (8 * math.pi, 32 * math.pi)
FEATURES = 1 + 2 * len(FREQUENCIES)
TRAINED = Path(__file__).parent / "trained"
KINDS = ("unet", "dit")
SIZES = {"unet": (8, 16, 32), "dit": (16,)}


class ImageNetwork(nn.Module):
    """v(x_t, log-SNR) of patches (N, 3, size, size), by a network of diffusers."""

    def __init__(self, kind: str, size: int) -> None:
        super().__init__()
        self.square, self.has_classes = (2 if size == 32 else 1), kind == "dit"
        self.body = (_unet if kind == "unet" else _transformer)(size // self.square, self.square**2)

    def forward(self, x_t: Tensor, log_snr: Tensor) -> Tensor:
        waves = [wave(f * x_t) for f in FREQUENCIES for wave in (torch.sin, torch.cos)]
        seen = torch.cat([x_t, *waves], 1)
        time = 40.0 * (SCHEDULE.hi - log_snr)  # 0 to 1000, as the embeddings of diffusers expect
        if self.square > 1:
            seen = nn.functional.pixel_unshuffle(seen, self.square)
        labels = (
            {"class_labels": torch.zeros_like(log_snr, dtype=torch.int64)} if hasattr(self.body, "pos_embed") else {}
        )
        out = self.body(seen, time, **labels).sample
        return nn.functional.pixel_shuffle(out, self.square) if self.square > 1 else out


def _unet(size: int, square: int) -> nn.Module:
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=size,
        in_channels=3 * FEATURES * square,
        out_channels=3 * square,
        layers_per_block=1,
        block_out_channels=(32, 48, 64) if size > 8 else (32, 64),
        down_block_types=("DownBlock2D",) * (3 if size > 8 else 2),
        up_block_types=("UpBlock2D",) * (3 if size > 8 else 2),
        norm_num_groups=8,
        add_attention=False,
    )


def _transformer(size: int, square: int) -> nn.Module:
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=24,
        in_channels=3 * FEATURES * square,
        out_channels=3 * square,
        num_layers=4,
        patch_size=2,
        sample_size=size,
        num_embeds_ada_norm=1,
        norm_num_groups=8,
    )


def path_of(kind: str, size: int) -> Path:
    return TRAINED / f"{kind}_{size}.safetensors"


def save(network: ImageNetwork, kind: str, size: int, told: dict[str, str]) -> None:
    """Write the weights in half precision, with what a reader should know of them."""
    TRAINED.mkdir(exist_ok=True)
    save_file({name: value.half() for name, value in network.state_dict().items()}, path_of(kind, size), metadata=told)


def load(kind: str, size: int) -> ImageNetwork:
    """Return a trained network, float32, in eval mode."""
    network = ImageNetwork(kind, size)
    network.load_state_dict({name: value.float() for name, value in load_file(path_of(kind, size)).items()})
    return network.eval().requires_grad_(False)

"""Patches of the photographs that scikit-learn, scikit-image and matplotlib carry, split by photograph: no download.

Photographs are reduced two, three and four times by the mean over squares, and rounded to 8 bits again: at their full
size they show compression and sharpening more than what was photographed.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor

LEVELS = 256
REDUCED = (2, 3, 4)
TRAINING = ("coffee", "rocket", "motorcycle_left", "retina", "grace_hopper", "flower")
HELD_OUT = ("china", "astronaut", "chelsea")


def patches(size: int, names: tuple[str, ...], count: int, seed: int = 0) -> tuple[Tensor, list[str]]:
    """Return random patches, uint8, (count, 3, size, size), and the photographs that they are from.

    A photograph at one of its scales is drawn with a weight that goes with the square root of its area.
    """
    rng = np.random.default_rng(seed)
    scaled = [(name, photograph) for name in names for photograph in _scales(name) if min(photograph.shape[:2]) >= size]
    weight = np.sqrt([photograph.shape[0] * photograph.shape[1] for _, photograph in scaled])
    found, origins = np.empty((count, 3, size, size), np.uint8), []
    for i, k in enumerate(rng.choice(len(scaled), count, p=weight / weight.sum())):
        name, photograph = scaled[k]
        row, column = (rng.integers(0, side - size + 1) for side in photograph.shape[:2])
        found[i] = photograph[row : row + size, column : column + size].transpose(2, 0, 1)
        origins.append(name)
    return torch.from_numpy(found), origins


def dequantized(levels: Tensor, generator: torch.Generator) -> Tensor:
    """Return 8-bit levels with uniform noise of one level, float32, in [-1, 1)."""
    return (levels + torch.rand(levels.shape, generator=generator)) * (2 / LEVELS) - 1


@cache
def _scales(name: str) -> list[np.ndarray]:
    return [_reduced(_photograph(name), factor) for factor in REDUCED]


def _photograph(name: str) -> np.ndarray:
    if name in ("china", "flower"):
        return load_sample_images().images[("china", "flower").index(name)]
    if name == "grace_hopper":
        path = Path(matplotlib.get_data_path(), "sample_data", "grace_hopper.jpg")
    else:
        import skimage

        path = next(Path(skimage.__file__).parent.glob(f"data/{name}.*"))
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def _reduced(photograph: np.ndarray, factor: int) -> np.ndarray:
    height, width = (side // factor for side in photograph.shape[:2])
    cut = photograph[: height * factor, : width * factor].astype(np.float64)
    means = cut.reshape(height, factor, width, factor, 3).mean((1, 3))
    return np.rint(means).astype(np.uint8)

"""The references that deserve a pilot: which kinds of Gaussians are fitted to which data."""

from __future__ import annotations

import torch
from torch import Tensor

from ..process.masks import inside
from ..reference.fitting import fit_diagonal, fit_mixture
from ..reference.gaussians import Reference
from ..reference.turning import FEWEST, factors_of, turn

FULL_MAX_DIM = 1024
FULL_MIXTURE_MAX_DIM = 256
MIXTURE_SIZES = (5, 10, 20, 40)
FINALISTS = 3
IMAGE_SIZES = (1, 8, 16)

KINDS = ("auto", "isotropic", "diagonal", "full", "mixture", "images")


def candidates(
    train: Tensor, held_out: Tensor, kind: str, data_std: float, seed: int, shape: tuple[int, ...]
) -> list[Reference]:
    """Return the references that deserve a pilot, for samples of a shape.

    Raises:
        ValueError: for too few samples, or for a shape that a kind does not have.
    """
    n, d = train.shape
    images = _of_images(train, shape, seed, required=kind == "images") if kind in ("auto", "images") else []
    if kind == "images":
        return images
    if kind == "isotropic":
        return [Reference.isotropic(float(train.square().mean().sqrt())).on(train.device)]
    plain = {"diagonal": [False], "full": [True], "mixture": []}.get(kind, [False] + [True] * (d <= FULL_MAX_DIM))
    found = [fit_mixture(train, 1, full, seed) for full in plain]
    mixtures = []
    if kind == "mixture" or (kind == "auto" and not (images and d > FULL_MIXTURE_MAX_DIM)):
        for full in [False, True] if d <= FULL_MIXTURE_MAX_DIM else [False]:
            mixtures += [fit_mixture(train, k, full, seed) for k in MIXTURE_SIZES if len(train) >= 20 * k]
        mixtures.sort(key=lambda q: -float(q.log_prob(held_out).mean()))
    found += mixtures[:FINALISTS]
    if not found:
        raise ValueError(f"a mixture reference needs at least {20 * MIXTURE_SIZES[0]} training samples, got {n}")
    return found + [*images, Reference.isotropic(data_std).on(train.device)] * (kind == "auto")


def _of_images(train: Tensor, shape: tuple[int, ...], seed: int, required: bool) -> list[Reference]:
    """Return mixtures of Gaussians that are diagonal in cosines; none for other shapes, unless they are required."""
    factors = factors_of(train.to(torch.float64), shape)
    if factors is None and required:
        raise ValueError(
            f"reference='images' needs samples of shape (C, H, W) or (C, L) with at least {FEWEST} rows and columns, "
            f"got {shape}; use 'auto', which takes it where it fits"
        )
    sizes = [k for k in IMAGE_SIZES if len(train) >= 20 * k] if factors else []
    if required and not sizes:
        raise ValueError(f"reference='images' needs at least 20 training samples, got {len(train)}; give more data")
    x = turn(train.to(torch.float64), factors) if factors else train
    mixtures = (fit_mixture(x, k, False, seed) for k in sizes)
    return [Reference(q.weight, q.mean, q.variance, factors=factors) for q in mixtures]


def masked_candidates(train: Tensor, mask: Tensor, kind: str, data_std: float) -> list[Reference]:
    """Return the references that deserve a pilot where every sample has entries of its own.

    Raises:
        ValueError: for a kind whose parameters masked data do not give.
    """
    if kind not in ("auto", "isotropic", "diagonal"):
        raise ValueError(f"with a mask reference must be 'auto', 'isotropic' or 'diagonal', got {kind!r}")
    size = float((inside(train, mask).square().sum() / mask.sum()).sqrt())
    plain = [Reference.isotropic(size).on(train.device)] if kind == "isotropic" else [fit_diagonal(train, mask)]
    return plain + [Reference.isotropic(data_std).on(train.device)] * (kind == "auto")

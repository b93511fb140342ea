"""Masks: which entries of a sample a density is of. The others are given: neither noised nor counted.

With m the mask of x, the density is p(x_m | x outside of m): the network sees x_t = x outside, and its answers there
count for nothing. Padded sequences, point clouds of different sizes and imputation are all of this kind.

References:
    CSDI: Conditional Score-based Diffusion Models for Probabilistic Time Series Imputation (Tashiro et al., 2021),
    https://arxiv.org/abs/2107.03502
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..support.host import refuse_not_dense


def broadcast_mask(mask: Tensor, x: Tensor) -> Tensor:
    """Return a mask in the shape of x, bool: a view of it where possible.

    Arguments:
        mask: True or 1 where an entry counts, False or 0 else; any shape that broadcasts to that of x.
        x: data, shape (B, *shape).

    Raises:
        ValueError: if the mask is no tensor, has other numbers than 0 and 1, lies on another device, does not
            broadcast, or fits x in two ways, from the left and from the right.
    """
    if not isinstance(mask, Tensor):
        raise ValueError(
            f"mask must be a tensor of True and False (or 1 and 0), got {type(mask).__name__}; "
            "give torch.as_tensor(...) of it, on the device of x"
        )
    refuse_not_dense("mask", mask)
    if mask.device != x.device:
        raise ValueError(f"mask is on {mask.device} and x on {x.device}; move one of them with .to()")
    if mask.dtype != torch.bool:
        if not bool(((mask == 0) | (mask == 1)).all()):
            raise ValueError(
                "mask must be True (or 1) where an entry counts and False (or 0) elsewhere, got other numbers; "
                "give mask > 0.5 or the like"
            )
        mask = mask != 0
    if 1 < mask.ndim < x.ndim and mask.shape == x.shape[: mask.ndim] and _fits(mask, x):
        raise ValueError(
            f"mask {tuple(mask.shape)} fits x {tuple(x.shape)} in two ways; give it as many dimensions: "
            "mask[..., None] if its first one is that of the samples, mask[None] if all samples share it"
        )
    if not _fits(mask, x):
        raise ValueError(
            f"mask must broadcast to x {tuple(x.shape)}, got {tuple(mask.shape)}; a mask of one entry a sample and "
            "place, (B, L) for x (B, L, D), goes as mask[..., None]"
        )
    return mask.broadcast_to(x.shape)


def mask_rows(mask: Tensor, x: Tensor) -> Tensor:
    """Return a mask as one row a sample, bool, shape (B, d).

    Raises:
        ValueError: as `broadcast_mask`; if a sample has no entry that counts.
    """
    rows = broadcast_mask(mask, x).reshape(len(x), -1)
    empty = (~rows.any(1)).nonzero()
    if len(empty):
        raise ValueError(
            f"mask must be True for at least one entry of every sample, got none in {len(empty)} of {len(x)} samples, "
            f"first in sample {int(empty[0])}; leave these samples out"
        )
    return rows


def summed(value: Tensor, mask: Tensor | None) -> Tensor:
    """Return the sum of a value (d,), or with a mask (B, d) the sum over what counts of each sample, (B,)."""
    return value.sum(-1) if mask is None else mask.to(value) @ value


def inside(value: Tensor, mask: Tensor | None) -> Tensor:
    """Return a value with zeros outside of the mask, whatever stands there."""
    return value if mask is None else torch.where(mask, value, 0)


def _fits(mask: Tensor, x: Tensor) -> bool:
    try:
        return torch.broadcast_shapes(mask.shape, x.shape) == x.shape
    except RuntimeError:
        return False

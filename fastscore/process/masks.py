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
        mask: True or 1 where an entry counts, False or 0 else; its shape is as in `shape_of_mask`.
        x: data, shape (B, *shape).

    Raises:
        ValueError: if the mask is no tensor, has other numbers than 0 and 1, lies on another device, does not
            broadcast, or fits x in two ways, from the left and from the right.
    """
    mask = bool_mask(mask, x)
    return mask.reshape(shape_of_mask("mask", mask.shape, "x", x.shape)).broadcast_to(x.shape)


def bool_mask(mask: Tensor, x: Tensor) -> Tensor:
    """Return a mask of any shape as bool.

    Raises:
        ValueError: if it is no tensor, has other numbers than 0 and 1, or lies on another device than x.
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
    return mask


def shape_of_mask(what: str, own: tuple[int, ...], of: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of a mask with as many dimensions as the data, in which it broadcasts to them.

    One with fewer dimensions is of the first ones, (B, L) of data (B, L, D) says which places of a sample count, or of
    the last ones, (L, D) is shared by all samples: as it fits.

    Arguments:
        what, of: what the mask and the data are called, for the message.

    Raises:
        ValueError: if it fits in neither way, or in both.
    """
    own, shape = tuple(own), tuple(shape)
    ones = (1,) * (len(shape) - len(own))
    first, last = own + ones, ones + own
    by_sample, shared = (_fits(each, shape) for each in (first, last))
    if not by_sample and not shared:
        raise ValueError(
            f"{what} must broadcast to {of} {shape}, got {own}; {shape[:-1]} says which places count, {shape} which "
            "entries"
        )
    # A mask that says one thing for the whole of a sample is of no use: what it leaves out has no density.
    if by_sample and shared and first != last and max(own[1:], default=1) > 1:
        raise ValueError(
            f"{what} {own} fits {of} {shape} in two ways; give it as many dimensions: {first} if its first one is that "
            f"of the samples, {last} if all samples share it"
        )
    return last if shared else first


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


def _fits(own: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    return len(own) == len(shape) and all(size in (1, whole) for size, whole in zip(own, shape))

"""Checked data: what every estimate starts from, or one clear error."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..process.conditions import Conditions
from ..process.masks import mask_rows
from ..process.network import model_device
from ..support.host import all_finite, as_tensor, dense_form, kind_of, layout_of
from .rules import group_of

MOST_SAMPLES = 1 << 60  # whose noise is each its own: 60 bits of the counter are the index


@dataclass(frozen=True)
class Samples:
    """Checked data: x (B, d) in the dtype of the sums, each sample's index, its shape, and conditions.

    `index` lies on the CPU, since it says which samples share their nodes (`group`), without a question to the device.
    `conds` holds one set of keyword arguments for a density, two for a comparison with common noise. `mask` says which
    entries count, (B, d); all of them without one.
    """

    x: Tensor
    index: Tensor
    shape: tuple[int, ...]
    conds: tuple[Conditions, ...]
    mask: Tensor | None = None

    @property
    def device(self) -> torch.device:
        return self.x.device

    @property
    def dims(self) -> int | Tensor:
        """How many entries of a sample count: d, or with a mask each sample's own number, int64, (B,)."""
        return self.x.shape[1] if self.mask is None else self.mask.sum(1)

    @property
    def group(self) -> Tensor:
        """Which samples share their nodes, int64, shape (B,), on the CPU (`rules.group_of`)."""
        return group_of(self.index)

    def __len__(self) -> int:
        return len(self.x)

    def entries(self, samples: slice | Tensor) -> tuple[Tensor, Tensor | None]:
        """Return x and the mask of some samples."""
        return self.x[samples], None if self.mask is None else self.mask[samples]

    def select(self, samples: slice | Tensor, on_host: Tensor | None = None) -> Samples:
        """Return some of the samples; `on_host` are their numbers once more on the CPU, where these are known."""
        conds = tuple(cond.select(samples) for cond in self.conds)
        if on_host is None and isinstance(samples, Tensor):
            on_host = samples.cpu()
        x, mask = self.entries(samples)
        return Samples(x, self.index[samples if on_host is None else on_host], self.shape, conds, mask)

    def joined(self, other: Samples) -> Samples:
        """Return these samples and some others of the same shape and conditions."""
        conds = tuple(a.joined(b) for a, b in zip(self.conds, other.conds))
        x, index = torch.cat([self.x, other.x]), torch.cat([self.index, other.index])
        mask = None if self.mask is None else torch.cat([self.mask, other.mask])
        return Samples(x, index, self.shape, conds, mask)


def check_batch(x: Tensor) -> None:
    """Raise ValueError if x is not dense floating-point data of shape (B, *shape) with B >= 1."""
    if isinstance(x, Tensor) and (kind := layout_of(x)) is not None:
        raise ValueError(
            f"x must be a dense tensor, got a {kind} one; {dense_form(kind)}, and samples of different sizes "
            "or with entries missing go with torch.nn.utils.rnn.pad_sequence and mask="
        )
    if not isinstance(x, Tensor) or x.ndim < 2 or x.numel() == 0:
        got, remedy = (tuple(x.shape), "a single sample is x[None]") if isinstance(x, Tensor) else (
            type(x).__name__, "torch.as_tensor(x) makes one of an array, torch.stack of the samples of a Dataset"
        )  # fmt: skip
        raise ValueError(f"x must be a tensor of shape (B, *shape) with B >= 1, got {got}; {remedy}")
    if not x.is_floating_point():
        remedy = "dequantize integers first (fastscore.Levels)"
        if x.is_complex():
            remedy = "a density is one of real numbers: torch.view_as_real(x) makes two entries of each"
        raise ValueError(f"x must be floating point, got {x.dtype}; {remedy}")
    if x.is_meta:
        raise ValueError("x is on the meta device, where tensors have no values; create it on the network's device")


def check_samples(
    x: Tensor, sample_index: Tensor | None, conds: tuple[dict, ...], model: nn.Module, mask: Tensor | None = None
) -> Samples:
    """Return the data as rows in the dtype of the sums (float32, or float64 if x is), with every sample's index.

    Raises:
        ValueError: if x is not (B, *shape) with B >= 1, not floating point, on another device than the network, or
            holds NaN or inf; if sample_index is not B non-negative integers; if a condition is on another device; or as
            `Conditions.of` and `mask_rows`.
    """
    check_batch(x)
    device = model_device(model, x.device)
    if device != x.device:
        raise ValueError(f"x is on {x.device} and the network on {device}; move one of them with .to()")
    flat = as_rows(x)
    if not deferred(x.device):
        refuse_not_finite(flat, mask is not None)
    told_apart = tuple(Conditions.of(cond, len(x), model) for cond in conds)
    for cond in told_apart:
        for name, value in cond.per_sample.items():
            if value.device != x.device:
                raise ValueError(f"condition {name!r} is on {value.device} and x on {x.device}; move one of them")
    index = check_index(sample_index, len(x))
    counted = None if mask is None else mask_rows(mask, x)
    return Samples(flat, index, tuple(x.shape[1:]), told_apart, counted)


def as_rows(x: Tensor) -> Tensor:
    """Return data (B, *shape) as rows (B, d) in the dtype of the sums, one after the other as kernels read them."""
    return (x if x.dtype == torch.float64 else x.float()).reshape(len(x), -1).contiguous()


def refuse_not_finite(x: Tensor, masked: bool = False) -> None:
    """Raise ValueError if rows have NaN or inf, also in entries that a mask leaves out; this waits for the device."""
    if all_finite(x):
        return
    finite = torch.isfinite(x)
    bad = (~finite).any(1).nonzero()
    remedy = "remove them" + ", or give entries that the mask leaves out a number: torch.nan_to_num(x)" * masked
    raise ValueError(f"x has NaN or inf in {len(bad)} of {len(x)} samples, first in sample {int(bad[0])}; {remedy}")


def refuse_not_finite_at(name: str, x: Tensor, index: Tensor) -> None:
    """Raise ValueError if samples of these indices have NaN or inf."""
    bad = (~torch.isfinite(as_rows(x))).any(1).nonzero()
    if len(bad):
        raise ValueError(f"{name} has NaN or inf in sample {int(index[int(bad[0])])}; remove such samples")


def deferred(device: torch.device) -> bool:
    """Return whether NaN and inf are told when a number is read, since asking would wait for the device.

    The environment variable FASTSCORE_CHECK=now brings them at once.
    """
    return device.type == "cuda" and os.environ.get("FASTSCORE_CHECK") != "now"


def check_index(index: Tensor | None, count: int) -> Tensor:
    """Return the indices of `count` samples, int64, on the CPU; raise ValueError for what are none."""
    if index is None:
        return torch.arange(count, device="cpu")
    try:
        index = as_tensor(index).cpu()
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(
            f"sample_index must be {count} non-negative integers below 2^60, shape ({count},), got {kind_of(index)}"
        ) from None
    whole = not index.is_floating_point() and not index.is_complex() and index.dtype != torch.bool
    # A copy, since the caller's may be counted up for the next batch. What int64 does not hold of uint64 is negative.
    own = index.to(torch.int64, copy=True) if whole else index
    if index.shape != (count,) or not whole or int(own.min()) < 0 or int(own.max()) >= MOST_SAMPLES:
        values = f" from {int(own.min())} to {int(own.max())}" if whole and own.numel() else ""
        raise ValueError(
            f"sample_index must be {count} non-negative integers below 2^60, shape ({count},), "
            f"got {index.dtype} of shape {tuple(index.shape)}{values}"
        )
    return own

"""The buffer that a kernel reads weights from: those of one padded shape together, in few operations."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor


def weight_groups(
    shapes: Sequence[tuple[int, ...]],
) -> tuple[tuple[tuple[int, int, tuple[int, ...]], ...], tuple[tuple[int, int], ...]]:
    """Return groups (in, out, linear maps of that shape), and how many columns lie before A and G of every linear map.

    Arguments:
        shapes: (..., in, out) of every linear map, padded, in the order of their use.
    """
    members: dict[tuple[int, int], list[int]] = {}
    for k, (*_, in_, out) in enumerate(shapes):
        members.setdefault((in_, out), []).append(k)
    places, before, after = {}, 0, 0
    for (in_, out), own in members.items():
        for k in own:
            places[k] = before, after
            before, after = before + in_, after + out
    groups = tuple((in_, out, tuple(own)) for (in_, out), own in members.items())
    return groups, tuple(places[k] for k in range(len(shapes)))


def weight_buffer(
    weights: Sequence[Tensor], shapes: Sequence[tuple[int, int]], dtype: torch.dtype
) -> tuple[tuple[tuple[int, int, int], ...], Tensor]:
    """Return (offset, in, out) of every weight, and the buffer, where each is transposed and padded with zeros.

    Every operation is a launch, and every call packs anew: two for all weights of one shape.

    Arguments:
        weights: (out, in), in the order of their use.
        shapes: (in, out) of each, padded.
    """
    groups, _ = weight_groups(shapes)
    ends = list(accumulate(len(own) * in_ * out for in_, out, own in groups))
    whole = all(tuple(w.shape) == (out, in_) for w, (in_, out) in zip(weights, shapes, strict=True))
    buffer = weights[0].new_empty(ends[-1], dtype=dtype) if whole else weights[0].new_zeros(ends[-1], dtype=dtype)
    offsets = {}
    for end, (in_, out, own) in zip(ends, groups, strict=True):
        begin = end - len(own) * in_ * out
        offsets |= {k: begin + n * in_ * out for n, k in enumerate(own)}
        target = buffer[begin:end].view(len(own), in_, out)
        if len({weights[k].shape for k in own}) == 1:
            rows, columns = weights[own[0]].shape
            every = torch.stack([weights[k] for k in own]) if len(own) > 1 else weights[own[0]][None]
            target[:, :columns, :rows].copy_(every.transpose(1, 2))
        else:
            for n, k in enumerate(own):
                target[n, : weights[k].shape[1], : weights[k].shape[0]].copy_(weights[k].T)
    return tuple((offsets[k], *shape) for k, shape in enumerate(shapes)), buffer

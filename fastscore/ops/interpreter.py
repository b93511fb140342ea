r"""The definition of truth for row programs: an interpreter in plain PyTorch, for any device and floating dtype.

Without autograd it works in place on buffers of its own and hands a bias to the matrix product; under autograd every
instruction makes a new tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .activations import ACTIVATIONS
from .instructions import Act, Add, Affine, Instruction, Linear, Norm, Save


def run(code: Sequence[Instruction], weights: Sequence[Tensor], tables: Sequence[Tensor], x_t: Tensor) -> Tensor:
    """Return the program's output, shape (B, R, d_out), for x_t (B, R, d) in the dtype of weights and tables."""
    if torch.is_grad_enabled() and any(v.requires_grad for v in (x_t, *weights, *tables)):
        return run_differentiably(code, weights, tables, x_t)
    return _run_in_place(code, weights, tables, x_t)


# What an instruction makes of the accumulator where nothing but it and its numbers are needed.
COMPUTE: dict[type, Callable[[Instruction, Tensor], Tensor]] = {
    Act: lambda op, h: ACTIVATIONS[op.name].compute(h),
    Norm: lambda op, h: F.layer_norm(h, h.shape[-1:], eps=op.eps),
}


def run_differentiably(
    code: Sequence[Instruction], weights: Sequence[Tensor], tables: Sequence[Tensor], h: Tensor
) -> Tensor:
    """Return what `run` does, with a new tensor for every instruction."""
    saved: dict[int, Tensor] = {}
    for op in code:
        if isinstance(op, Linear):
            h = F.linear(h, weights[op.weight])
        elif isinstance(op, Affine):
            h = h if op.scale < 0 else h * tables[op.scale]
            h = h if op.shift < 0 else h + tables[op.shift]
        elif isinstance(op, Save):
            saved[op.slot] = h
        elif isinstance(op, Add):
            h = h + (saved[op.slot] if op.scale < 0 else saved[op.slot] * tables[op.scale])
        else:
            h = COMPUTE[type(op)](op, h)
    return h


@torch.no_grad()
def _run_in_place(
    code: Sequence[Instruction], weights: Sequence[Tensor], tables: Sequence[Tensor], h: Tensor
) -> Tensor:
    saved: dict[int, Tensor] = {}
    owned = False  # whether h is a buffer that nobody else reads
    done = 0
    while done < len(code):
        op, then = code[done], code[done + 1] if done + 1 < len(code) else None
        done += 1
        if isinstance(op, Linear):
            bias = _constant(then, tables, False)
            h, owned = F.linear(h, weights[op.weight], bias), True
            done += bias is not None
        elif isinstance(op, Norm):
            scaled = _constant(then, tables, True)
            scale, shift = scaled or (None, None)
            h, owned = F.layer_norm(h, h.shape[-1:], scale, shift, op.eps), True
            done += scaled is not None
        elif isinstance(op, Affine) and op.shift < 0 and isinstance(then, Add) and then.scale < 0:
            h, owned = torch.addcmul(saved[then.slot], h, tables[op.scale], out=h if owned else None), True
            done += 1
        elif isinstance(op, Affine):
            h, owned = _affine(op, tables, h, owned), True
        elif isinstance(op, Act):
            h, owned = ACTIVATIONS[op.name][int(owned)](h), True
        elif isinstance(op, Save):
            saved[op.slot], owned = h, False
        elif isinstance(op, Add):
            h, owned = _add(op, tables, h, saved[op.slot], owned), True
        else:
            h, owned = COMPUTE[type(op)](op, h), False  # it may be a view of what went in
    return h


def _constant(
    then: Instruction | None, tables: Sequence[Tensor], scaled: bool
) -> tuple[Tensor | None, ...] | Tensor | None:
    """Return the vectors of the next instruction if the one before can take them along, else None.

    A matrix product takes a shift (w,), a norm a scale (w,) with or without a shift.
    """
    if not isinstance(then, Affine) or (then.scale >= 0) != scaled:
        return None
    vectors = [tables[i] if i >= 0 else None for i in ((then.scale, then.shift) if scaled else (then.shift,))]
    if any(v is not None and v.shape[:2] != (1, 1) for v in vectors):
        return None
    vectors = [None if v is None else v.view(-1) for v in vectors]
    return tuple(vectors) if scaled else vectors[0]


def _affine(op: Affine, tables: Sequence[Tensor], h: Tensor, owned: bool) -> Tensor:
    if op.scale < 0:
        return h.add_(tables[op.shift]) if owned else h + tables[op.shift]
    if op.shift < 0:
        return h.mul_(tables[op.scale]) if owned else h * tables[op.scale]
    out = h if owned else torch.empty_like(h)
    return torch.addcmul(tables[op.shift], h, tables[op.scale], out=out)


def _add(op: Add, tables: Sequence[Tensor], h: Tensor, saved: Tensor, owned: bool) -> Tensor:
    if op.scale < 0:
        return h.add_(saved) if owned else h + saved
    return h.addcmul_(saved, tables[op.scale]) if owned else torch.addcmul(h, saved, tables[op.scale])

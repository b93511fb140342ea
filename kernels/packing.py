"""Lay out a network, its vector operands and a reference for the fused kernel; plain torch, on any device.

Code is a sequence of tuples, the row machine's instructions: ("linear", weight), ("affine", scale, shift),
("act", name), ("norm", eps), ("save", slot), ("add", slot, scale); -1 stands for an absent table. It splits into

    x_t -> PRE affine -> first linear -> BODY -> last linear -> POST: F scale + shift + x_t skip

and every table becomes columns of one of three matrices: per row (R, .), per sample (B, .), per pair (B, R, .).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate, groupby

import torch
from torch import Tensor

from .blocks import LEVELS, blocks
from .names import ACTIVATIONS, INSTRUCTIONS
from .weights import weight_buffer

Reference = tuple[Tensor, Tensor, Tensor, Tensor]  # weight, mean, variance and basis of a mixture
MAX_BLOCK_D = 128
CHUNK_D = 64


def padded(width: int) -> int:
    """Return the tile width: a power of two, 16 at least, as matrix products ask."""
    return max(16, 1 << (width - 1).bit_length())


def block_d(d: int) -> int:
    """Return how many dimensions a chunk holds: all of them up to 128."""
    return padded(d) if d <= MAX_BLOCK_D else CHUNK_D


def why_not(code: tuple, widths: list[tuple[int, int]], d: int, max_width: int) -> str | None:
    """Return why the fused kernel cannot run this code, or None. `widths` holds (out, in) of every weight."""
    linear = [i for i, op in enumerate(code) if op[0] == "linear"]
    if len(linear) < 2:
        return f"it needs two linear maps at least, the network has {len(linear)}"
    out = [widths[code[i][1]][0] for i in linear]
    if max(out[:-1]) > max_width:
        return f"hidden widths go up to {max_width}, the network has {max(out[:-1])}"
    if out[-1] != d:
        return f"the last linear map returns {out[-1]} values for {d} dimensions"
    x_slots = {op[1] for op in code[: linear[0]] if op[0] == "save"}
    unknown = [op[0] for op in code if op[0] not in INSTRUCTIONS]
    unknown += [op[1] for op in code if op[0] == "act" and op[1] not in ACTIVATIONS]
    if unknown:
        return f"its kernels have no {unknown[0]}"
    for i, op in enumerate(code):
        outside = i < linear[0] or i > linear[-1]
        if outside and op[0] in ("act", "norm"):
            return f"{op[0]} works on hidden layers only, not on the {d} data dimensions"
        if op[0] == "add" and i < linear[0]:
            return "a sum joins two hidden layers, or x_t and the output"
        if op[0] == "save" and i < linear[0] and any(o[0] == "affine" for o in code[:i]):
            return "it keeps x_t itself for later, not a scaled copy"
        if op[0] == "save":
            x_slots = x_slots if i < linear[0] else x_slots - {op[1]}
        if op[0] == "add" and (op[1] in x_slots) != outside:
            return "a sum joins two hidden layers, or x_t and the output"
    return None


def level_of(table: Tensor) -> str:
    """Return what a table (1 or B, 1 or R, w) has one vector of: "r", a row; "b", a sample; "br", a pair of them."""
    return "r" if table.shape[0] == 1 else "b" if table.shape[1] == 1 else "br"


@dataclass
class Tables:
    """The three matrices of vector operands while they grow.

    `hidden` and `data` are the columns that an operand of the hidden layers, or of the data, takes at least: zeros fill
    what is beyond its width.
    """

    batch: int
    rows: int
    hidden: int = 0
    data: int = 0
    columns: dict[str, list[Tensor]] = field(default_factory=lambda: {"r": [], "b": [], "br": []})
    zeros: dict[torch.dtype, Tensor] = field(default_factory=dict)

    def add(self, table: Tensor | None, width: int, at_least: int = 0) -> tuple:
        """Append a table that broadcasts to (B, R, width), in `at_least` columns; return its reference."""
        if table is None:
            return ()
        level = level_of(table)
        shape = {"r": (1, self.rows, width), "b": (self.batch, 1, width), "br": (self.batch, self.rows, width)}[level]
        flat = {"r": (self.rows, width), "b": (self.batch, width), "br": (self.batch, self.rows, width)}[level]
        offset = sum(t.shape[-1] for t in self.columns[level])
        self.columns[level].append(table.expand(shape).reshape(flat))
        if at_least > width:
            self.columns[level].append(self._zeros(table.dtype, table.device).expand(*flat[:-1], at_least - width))
        return level, offset, width

    def matrix(self, level: str, like: Tensor) -> Tensor:
        """Return all columns of a level in float32; where there are none, a tensor that nobody reads.

        Every operation is a launch, and every call packs anew: neighbours of one dtype are joined before they are
        rounded, not rounded one by one.
        """
        parts = self.columns[level]
        if not parts:
            return like.new_empty(1, 1, dtype=torch.float32)
        runs = [list(run) for _, run in groupby(parts, lambda part: part.dtype)]
        joined = [run[0] if len(run) == 1 else torch.cat(run, -1) for run in runs]
        if len(joined) == 1:
            return joined[0].to(torch.float32).contiguous()
        ends = list(accumulate(part.shape[-1] for part in joined))
        found = like.new_empty(*joined[0].shape[:-1], ends[-1], dtype=torch.float32)
        for end, part in zip(ends, joined, strict=True):
            found[..., end - part.shape[-1] : end].copy_(part)
        return found

    def _zeros(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        if dtype not in self.zeros:
            self.zeros[dtype] = torch.zeros(1, dtype=dtype, device=device)
        return self.zeros[dtype]


@dataclass(frozen=True)
class Layout:
    """The compile-time part of a packed network."""

    weights: tuple[tuple[int, int, int], ...]
    pre: tuple
    body: tuple
    post: tuple

    @property
    def width(self) -> int:
        """The widest hidden tile."""
        return max(spec[2] for spec in self.weights[:-1])

    @property
    def saved(self) -> tuple[int, ...]:
        """The slots of saved tiles."""
        return tuple(sorted({op[1] for op in self.body if op[0] == "save"}))

    def blocks(self, unrolled: bool) -> tuple:
        """Return the body as blocks (times, code, weight step, table steps); see `blocks`."""
        return ((1, self.body, 0, (0, 0, 0)),) if unrolled else blocks(self.body, self.weights)


def split_network(
    code: tuple, weights: list[Tensor], tables: list[Tensor], d: int, into: Tables
) -> tuple[tuple, tuple, tuple, list[int]]:
    """Return PRE, BODY and POST, their tables as references into `into`, and the weights in the order of their use.

    In BODY a linear map is numbered by that order, and a norm brings its width: ("norm", width, eps).
    """
    linear = [i for i, op in enumerate(code) if op[0] == "linear"]
    pre = compose(code[: linear[0]], tables, weights[0])
    post = compose(code[linear[-1] + 1 :], tables, weights[0])
    width, body, order = weights[code[linear[0]][1]].shape[0], [], [code[i][1] for i in linear]
    for op in code[linear[0] + 1 : linear[-1]]:
        if op[0] == "linear":
            body.append(("linear", sum(o[0] == "linear" for o in body) + 1))
            width = weights[op[1]].shape[0]
        elif op[0] == "affine":
            body.append(("affine", *(into.add(_get(tables, i), width, into.hidden) for i in op[1:])))
        elif op[0] == "norm":
            body.append(("norm", width, op[1]))
        elif op[0] == "add":
            body.append(("add", op[1], into.add(_get(tables, op[2]), width, into.hidden)))
        else:
            body.append(op)
    post = tuple(into.add(t, d, into.data) for t in post)
    return tuple(into.add(t, d, into.data) for t in pre[:2]), tuple(body), post, order


def pack_network(
    code: tuple, weights: list[Tensor], tables: list[Tensor], d: int, into: Tables, dtype: torch.dtype
) -> tuple[Layout, Tensor]:
    """Return the layout and one buffer of padded weights, each transposed to (in, out), in the operands' dtype."""
    pre, body, post, order = split_network(code, weights, tables, d, into)
    chunked, shapes = -(-d // block_d(d)) * block_d(d), []
    for n, k in enumerate(order):
        out, in_ = weights[k].shape
        shapes.append((chunked if n == 0 else padded(in_), chunked if n == len(order) - 1 else padded(out)))
    specs, buffer = weight_buffer([weights[k] for k in order], shapes, dtype)
    return Layout(specs, pre, body, post), buffer


def compose(code: tuple, tables: list[Tensor], like: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Fold affines, and sums with x_t, into one scale, shift and multiple of x_t; None stands for 1, 0, 0."""
    scale = shift = skip = None
    for op in code:
        if op[0] == "affine":
            by, plus = (_get(tables, i) for i in op[1:])
            if by is not None:
                scale = by if scale is None else scale * by
                shift, skip = (t if t is None else t * by for t in (shift, skip))
            if plus is not None:
                shift = plus if shift is None else shift + plus
        elif op[0] == "add":
            multiple = _get(tables, op[2])
            multiple = like.new_ones(1, 1, 1) if multiple is None else multiple
            skip = multiple if skip is None else skip + multiple
    return scale, shift, skip


def _get(tables: list[Tensor], index: int) -> Tensor | None:
    return None if index < 0 else tables[index]


def pack_control(
    reference: Reference | None, x: Tensor, alpha: Tensor, sigma: Tensor, into: Tables
) -> tuple[tuple, Tensor, Tensor]:
    """Return (CONTROL, q, y) for a mixture; see `control.py` for the kinds.

    Arguments:
        reference: float64; (K,), (K, d or 1), the same, and (K, d, d) or empty; None for no control variate.
        alpha, sigma: of each row, float64, shape (R,).
    """
    empty = x.new_empty(1, 1, dtype=torch.float32)  # nobody reads it
    if reference is None:
        return ("none",), empty, empty
    weight, mean, variance, basis = reference
    d, k, full = x.shape[1], len(weight), basis.numel() > 0
    mean, variance = (v.to(torch.float64).expand(k, d) for v in (mean, variance))
    alpha, sigma = (v.to(torch.float64)[:, None, None] for v in (alpha, sigma))
    signal = alpha.square() * variance
    total = signal + sigma.square()  # (R, K, d)
    q = empty
    if full:
        q = torch.zeros(k, padded(d), padded(d), device=x.device)
        q[:, :d, :d] = basis
    if k == 1:
        keep, pull = (v.transpose(0, 1) for v in (signal / total, alpha * sigma / total))  # (1, R, d)
        if not full:
            operands = (into.add(t, d, into.data) for t in (keep, pull, pull * mean))
            return ("diagonal", *operands), empty, empty
        y = (x.to(torch.float64) - mean) @ basis[0]
        return ("full", into.add(keep, d), into.add(pull, d)), q, y.float().contiguous()
    rows = len(total)
    if full:
        centre = (alpha * mean).reshape(1, rows, -1)
        bias = weight.log() - 0.5 * total.log().sum(-1)
        refs = [_narrow(into.add(t, k * w), w) for t, w in ((centre, d), (1 / total.reshape(1, rows, -1), d))]
        return ("full mixture", *refs, into.add(bias[None], k), k), q, empty
    about = weight @ mean  # expanding squares about it keeps float32 accurate
    shifted, gain = alpha * (mean - about), 1 / total
    bias = weight.log() - 0.5 * (total.log().sum(-1) + (gain * shifted**2).sum(-1))
    refs = [into.add((alpha[..., 0] * about)[None], d)]
    refs += [_narrow(into.add(t.reshape(1, rows, -1), k * d), d) for t in (gain, gain * shifted)]
    return ("mixture", *refs, into.add(bias[None], k), k, padded(k)), empty, empty


def number_references(*parts: tuple) -> tuple:
    """Replace the references in nested tuples by numbers; return (level, offset, width) of each, and the parts.

    An empty reference becomes -1.
    """
    refs: dict[tuple, int] = {}

    def number(value):
        if not isinstance(value, tuple):
            return value
        if value == ():
            return -1
        if len(value) == 3 and value[0] in LEVELS:
            return refs.setdefault(value, len(refs))
        return tuple(number(part) for part in value)

    # An empty part is an empty tuple, not an empty reference.
    numbered = [number(part) if part else () for part in parts]
    return tuple((LEVELS.index(level), *where) for level, *where in refs) or ((0, 0, 0),), *numbered


def _narrow(reference: tuple, width: int) -> tuple:
    """Read a table of K x width columns K times."""
    return (*reference[:2], width)

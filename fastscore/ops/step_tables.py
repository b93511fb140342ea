r"""The vectors of steps (`fastscore.ops.steps`), folded beforehand so that a kernel does least for every element.

With a = 1/2 for SiLU, whose kernel form is z + z tanh z of the halved input, and a = 1 for others, a step is

====================  ================================================================================================
step                  meaning
====================  ================================================================================================
`residual`            y = W ((h - mean) scale);  z = (a rstd) y + bias;  h = h + gate (W' act(z / a)) + gate_bias
`dense`               h = factor scale (W act(before h / a)) + shift
====================  ================================================================================================

A shift before a product leaves the operand and becomes a part of the bias behind it, through the weights as the kernel
has them: bias = a (W shift + b). What an activation multiplies its input by goes into the step before where that is a
first or dense one, and is `before` elsewhere. All of it is computed in float64, once for the rows of a call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..kernels.packing import compose
from .activations import ACTIVATIONS
from .steps import Affines, Last, Residual, Steps

INPUT_FACTOR = {"silu": 0.5}  # of the activations that a kernel evaluates at a multiple of their input


@dataclass(frozen=True)
class Folded:
    """A step with its vectors (1 or R, width), float64, in the order in which a kernel reads them.

    Vectors of a residual step: scale, bias, gate, gate_bias; of a dense or first one: scale, if there is one, and
    shift; of the last: scale, if it normalizes. A residual step without a norm has the scale alone.
    """

    kind: str  # "first", "residual", "dense", "last"
    weights: tuple[int, ...]
    vectors: tuple[Tensor, ...]
    activation: str | None = None
    eps: float | None = None
    before: float = 1.0  # of h, for its activation
    factor: float = 1.0  # of the product

    @property
    def scaled(self) -> bool:
        """Whether the product of a first or dense step is scaled by a vector."""
        return self.kind in ("first", "dense") and len(self.vectors) == 2


@dataclass(frozen=True)
class Ends:
    """What is around the steps: their input is x_t pre_scale, the prediction F post_scale + post_shift + x_t skip.

    Vectors (1 or R, d), float64. `post_shift` is always there; None stands for a scale of 1 and a skip of 0.
    """

    pre_scale: Tensor | None
    post_scale: Tensor | None
    post_shift: Tensor
    skip: Tensor | None


def fold(steps: Steps, weights: Sequence[Tensor], tables: Sequence[Tensor]) -> tuple[list[Folded], Ends]:
    """Return all steps, the first and the last among them, with their vectors, and what is around them."""
    folding = _Folding(weights, tables)
    d = weights[steps.first].shape[1]
    pre_scale, pre_shift, _ = folding.around(steps.pre, d)
    post_scale, post_shift, skip = folding.around(steps.post, d)
    first = folding.product("first", steps.first, steps.after)
    if pre_shift is not None:  # scale (W (x + shift)) = scale (W x) + scale (W shift)
        more = folding.through(steps.first, pre_shift)
        first = replace(first, vectors=(*first.vectors[:-1], _add(_times(more, _scale(first)), first.vectors[-1])))
    found = [first]
    for step in steps.middle:
        if isinstance(step, Residual):
            found.append(folding.residual(step))
        else:
            _halve(found, step.activation)
            dense = folding.product("dense", step.weight, step.after)
            found.append(replace(dense, activation=step.activation, before=_before(found, step.activation)))
    if steps.last.activation is not None:
        _halve(found, steps.last.activation)
    last, of_shift = folding.last(steps.last, _before(found, steps.last.activation))
    return [*found, last], Ends(pre_scale, post_scale, _add(_times(of_shift, post_scale), post_shift), skip)


class _Folding:
    """Products and sums of a network's vectors in float64."""

    def __init__(self, weights: Sequence[Tensor], tables: Sequence[Tensor]) -> None:
        self.weights, self.tables = weights, tables

    def table(self, index: int, width: int) -> Tensor:
        table = self.tables[index]
        return table.reshape(table.shape[-2:]).double().expand(-1, width)

    def compose(self, affines: Affines, width: int) -> tuple[Tensor | None, Tensor | None]:
        """Return one scale and shift for several; None stands for 1 and 0."""
        scale = shift = None
        for by, plus in affines:
            if by >= 0:
                by_vector = self.table(by, width)
                scale, shift = _times(by_vector, scale), None if shift is None else shift * by_vector
            if plus >= 0:
                shift = _add(self.table(plus, width), shift)
        return scale, shift

    def around(self, code: tuple, d: int) -> tuple[Tensor | None, ...]:
        """Return scale, shift and multiple of x_t of the instructions before or after all linear maps."""
        used = {i for op in code for i in {"affine": op[1:], "add": op[2:]}.get(op[0], ()) if i >= 0}
        tables = {i: self.tables[i].double() for i in used}
        found = compose(code, tables, self.weights[0].new_zeros((), dtype=torch.float64))
        return tuple(None if t is None else t.reshape(t.shape[-2:]).expand(-1, d) for t in found)

    def through(self, weight: int, vectors: Tensor) -> Tensor:
        return vectors @ self.weights[weight].double().T

    def ones(self, weight: int, axis: int) -> Tensor:
        return self.weights[weight].new_ones(1, self.weights[weight].shape[axis], dtype=torch.float64)

    def product(self, kind: str, weight: int, after: Affines) -> Folded:
        scale, shift = self.compose(after, self.weights[weight].shape[0])
        shift = torch.zeros_like(self.ones(weight, 0)) if shift is None else shift
        return Folded(kind, (weight,), (shift,) if scale is None else (scale, shift))

    def residual(self, step: Residual) -> Folded:
        a = INPUT_FACTOR.get(step.activation, 1.0)
        scale, shift = self.compose(step.before, self.weights[step.first].shape[1])
        _, bias = self.compose(step.middle, self.weights[step.first].shape[0])
        gate, gate_bias = self.compose(step.after, self.weights[step.second].shape[0])
        bias = _add(None if shift is None else self.through(step.first, shift), bias)
        out = self.ones(step.second, 0)
        vectors = (
            self.ones(step.first, 1) if scale is None else scale,
            torch.zeros_like(self.ones(step.first, 0)) if bias is None else a * bias,
            out if gate is None else gate,
            torch.zeros_like(out) if gate_bias is None else gate_bias,
        )
        return Folded("residual", (step.first, step.second), vectors, step.activation, step.eps, factor=a)

    def last(self, step: Last, before: float) -> tuple[Folded, Tensor]:
        """Return the last step, and what the shift of its norm adds to the prediction."""
        scale, shift = self.compose(step.before, self.weights[step.weight].shape[1])
        nothing = torch.zeros_like(self.ones(step.weight, 0))
        vectors = () if step.eps is None else (self.ones(step.weight, 1) if scale is None else scale,)
        folded = Folded("last", (step.weight,), vectors, step.activation, step.eps, before)
        return folded, nothing if shift is None else self.through(step.weight, shift)


def _scale(step: Folded) -> Tensor | None:
    return step.vectors[0] if step.scaled else None


def _times(one: Tensor, other: Tensor | None) -> Tensor:
    return one if other is None else one * other


def _add(one: Tensor | None, other: Tensor | None):
    return other if one is None else one if other is None else one + other


def _halve(found: list[Folded], activation: str) -> None:
    """Let a first or dense step make the multiple that the activation behind it takes; both scale and shift do."""
    a, before = INPUT_FACTOR.get(activation, 1.0), found[-1]
    if a == 1.0 or before.kind == "residual":
        return
    *scale, shift = before.vectors
    scaled = tuple(a * v for v in scale)
    found[-1] = replace(before, vectors=(*scaled, a * shift), factor=before.factor if scaled else a * before.factor)


def _before(found: list[Folded], activation: str | None) -> float:
    """Return what is left to multiply h by, before an activation."""
    return INPUT_FACTOR.get(activation, 1.0) if activation and found[-1].kind == "residual" else 1.0


Rounding = Callable[[Tensor], Tensor]


def run(
    steps: Sequence[Folded],
    ends: Ends,
    weights: Sequence[Tensor],
    x_t: Tensor,
    operand: Rounding = lambda t: t,
    saved: Rounding = lambda t: t,
) -> Tensor:
    """Return the prediction (B, R, d) for x_t (B, R, d), as a kernel computes it.

    Arguments:
        operand: what becomes of the operand of every product, rounding to bfloat16 in a kernel.
        saved: and of the tile that waits beside a residual block.
    """

    def product(a: Tensor, weight: int) -> Tensor:
        return operand(a) @ weights[weight].to(a.dtype).T

    h = x_t if ends.pre_scale is None else x_t * ends.pre_scale
    rstd: Tensor | float = 1.0
    for step in steps:
        if step.kind == "first":
            h = _finish(step, product(h, step.weights[0]))
        elif step.kind == "residual":
            scale, bias, gate, gate_bias = step.vectors
            centred, rstd = _normalize(step, h)
            z = step.factor * rstd * product(centred * scale, step.weights[0]) + bias
            h = saved(h) + gate * product(_activate(step, z), step.weights[1]) + gate_bias
        elif step.kind == "dense":
            h = _finish(step, product(_activate(step, step.before * h), step.weights[0]))
        else:
            centred, rstd = _normalize(step, h)
            a = centred * step.vectors[0] if step.vectors else centred
            h = rstd * product(a if step.activation is None else _activate(step, step.before * a), step.weights[0])
    h = h if ends.post_scale is None else h * ends.post_scale
    return h + ends.post_shift + (0.0 if ends.skip is None else x_t * ends.skip)


def _finish(step: Folded, y: Tensor) -> Tensor:
    return step.factor * y * (step.vectors[0] if step.scaled else 1.0) + step.vectors[-1]


def _activate(step: Folded, z: Tensor) -> Tensor:
    return ACTIVATIONS[step.activation or ""].compute(z / INPUT_FACTOR.get(step.activation or "", 1.0))


def _normalize(step: Folded, h: Tensor) -> tuple[Tensor, Tensor | float]:
    """Return h without its mean, and what it has to be multiplied by then."""
    if step.eps is None:
        return h, 1.0
    centred = h - h.mean(-1, keepdim=True)
    return centred, (centred.square().mean(-1, keepdim=True) + step.eps).rsqrt()

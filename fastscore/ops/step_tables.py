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

from torch import Tensor

from ..kernels.packing import compose
from .activations import ACTIVATIONS
from .steps import Affines, Last, Residual, Steps

INPUT_FACTOR = {"silu": 0.5}  # of the activations that a kernel evaluates at a multiple of their input


@dataclass(frozen=True)
class Vector:
    """factor (base + W shift) of some rows, which nobody has computed yet: few operations compute all of a call."""

    width: int
    base: Tensor | float  # (1 or R, width)
    factor: float = 1.0
    weight: int = -1  # W, where there is a shift (1 or R, inputs)
    shift: Tensor | None = None

    def evaluate(self, weights: Sequence[Tensor]) -> Tensor:
        """Return its numbers, float64, (1 or R, width)."""
        base = self.base
        found = base.double() if isinstance(base, Tensor) else weights[0].new_full((1, self.width), base).double()
        if self.shift is not None:
            found = found + self.shift.double() @ weights[self.weight].double().T
        return self.factor * found


@dataclass(frozen=True)
class Folded:
    """A step with its vectors in the order in which a kernel reads them.

    Those of a residual step: scale, bias, gate, gate_bias; of a dense or first one: scale, if there is one, and shift;
    of the last: scale, if it normalizes. A residual step without a norm has the scale alone.
    """

    kind: str  # "first", "residual", "dense", "last"
    weights: tuple[int, ...]
    vectors: tuple[Vector, ...]
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

    `post_shift` is always there; None stands for a scale of 1 and a skip of 0.
    """

    pre_scale: Vector | None
    post_scale: Vector | None
    post_shift: Vector
    skip: Vector | None


def fold(steps: Steps, weights: Sequence[Tensor], tables: Sequence[Tensor]) -> tuple[list[Folded], Ends]:
    """Return all steps, the first and the last among them, with their vectors, and what is around them."""
    folding = _Folding(weights, tables)
    d = weights[steps.first].shape[1]
    pre_scale, pre_shift, _ = folding.around(steps.pre, d)
    post_scale, post_shift, skip = folding.around(steps.post, d)
    found = [folding.product("first", steps.first, steps.after, pre_shift)]
    for step in steps.middle:
        if isinstance(step, Residual):
            found.append(folding.residual(step))
        else:
            _halve(found, step.activation)
            dense = folding.product("dense", step.weight, step.after)
            found.append(replace(dense, activation=step.activation, before=_before(found, step.activation)))
    if steps.last.activation is not None:
        _halve(found, steps.last.activation)
    last, of_norm = folding.last(steps.last, _before(found, steps.last.activation))
    post = folding.sum(steps.last.weight, post_scale, of_norm, post_shift)
    ends = (None if v is None else Vector(d, v) for v in (pre_scale, post_scale, skip))
    return [*found, last], Ends(next(ends), next(ends), post, next(ends))


class _Folding:
    """What a network's vectors are made of; sums and products that are rare are made at once, in float64."""

    def __init__(self, weights: Sequence[Tensor], tables: Sequence[Tensor]) -> None:
        self.weights, self.tables = weights, tables

    def compose(self, affines: Affines, width: int) -> tuple[Tensor | None, Tensor | None]:
        """Return one scale and shift for several; None stands for 1 and 0."""
        scale = shift = None
        for by, plus in affines:
            by, plus = (None if i < 0 else self.table(i, width, len(affines) > 1) for i in (by, plus))
            if by is not None:
                scale, shift = by if scale is None else scale * by, None if shift is None else shift * by
            if plus is not None:
                shift = plus if shift is None else shift + plus
        return scale, shift

    def table(self, index: int, width: int, exact: bool) -> Tensor:
        table = self.tables[index]
        return (table.double() if exact else table).reshape(table.shape[-2:]).expand(-1, width)

    def around(self, code: tuple, d: int) -> tuple[Tensor | None, ...]:
        """Return scale, shift and multiple of x_t of the instructions before or after all linear maps."""
        exact = sum(op[0] in ("affine", "add") for op in code) > 1
        used = {i for op in code for i in {"affine": op[1:], "add": op[2:]}.get(op[0], ()) if i >= 0}
        tables = {i: self.tables[i].double() if exact else self.tables[i] for i in used}
        found = compose(code, tables, self.weights[0])
        return tuple(None if t is None else t.reshape(t.shape[-2:]).expand(-1, d) for t in found)

    def sum(self, weight: int, scale: Tensor | None, shift: Tensor | None, plus: Tensor | None) -> Vector:
        """Return scale (W shift) + plus."""
        width = self.weights[weight].shape[0]
        base = 0.0 if plus is None else plus
        if shift is None or scale is None:
            return Vector(width, base, weight=weight, shift=shift)
        through = Vector(width, 0.0, weight=weight, shift=shift).evaluate(self.weights)
        return Vector(width, scale.double() * through + base)

    def product(self, kind: str, weight: int, after: Affines, before: Tensor | None = None) -> Folded:
        """Return a first or dense step: scale (W (h + before)) + shift."""
        width = self.weights[weight].shape[0]
        scale, shift = self.compose(after, width)
        shift = self.sum(weight, scale, before, shift)
        return Folded(kind, (weight,), (shift,) if scale is None else (Vector(width, scale), shift))

    def residual(self, step: Residual) -> Folded:
        a = INPUT_FACTOR.get(step.activation, 1.0)
        inner, width = self.weights[step.first].shape
        scale, shift = self.compose(step.before, width)
        _, bias = self.compose(step.middle, inner)
        gate, gate_bias = self.compose(step.after, width)
        vectors = (
            Vector(width, 1.0 if scale is None else scale),
            replace(self.sum(step.first, None, shift, bias), factor=a),
            Vector(width, 1.0 if gate is None else gate),
            Vector(width, 0.0 if gate_bias is None else gate_bias),
        )
        return Folded("residual", (step.first, step.second), vectors, step.activation, step.eps, factor=a)

    def last(self, step: Last, before: float) -> tuple[Folded, Tensor | None]:
        """Return the last step, and the shift of its norm."""
        width = self.weights[step.weight].shape[1]
        scale, shift = self.compose(step.before, width)
        vectors = () if step.eps is None else (Vector(width, 1.0 if scale is None else scale),)
        return Folded("last", (step.weight,), vectors, step.activation, step.eps, before), shift


def _halve(found: list[Folded], activation: str) -> None:
    """Let a first or dense step make the multiple that the activation behind it takes; both scale and shift do."""
    a, before = INPUT_FACTOR.get(activation, 1.0), found[-1]
    if a == 1.0 or before.kind == "residual":
        return
    vectors = tuple(replace(v, factor=a * v.factor) for v in before.vectors)
    found[-1] = replace(before, vectors=vectors, factor=before.factor if before.scaled else a * before.factor)


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
    vectors: Rounding = lambda t: t,
) -> Tensor:
    """Return the prediction (B, R, d) for x_t (B, R, d), as a kernel computes it.

    Arguments:
        operand: what becomes of the operand of every product, rounding to bfloat16 in a kernel.
        saved: and of the tile that waits beside a residual block.
        vectors: and of all vectors, rounding to float32.
    """

    def product(a: Tensor, weight: int) -> Tensor:
        return operand(a) @ weights[weight].to(a.dtype).T

    def number(vector: Vector) -> Tensor:
        return vectors(vector.evaluate(weights))

    def finish(step: Folded, y: Tensor) -> Tensor:
        return step.factor * y * (number(step.vectors[0]) if step.scaled else 1.0) + number(step.vectors[-1])

    h = x_t if ends.pre_scale is None else x_t * number(ends.pre_scale)
    for step in steps:
        if step.kind == "first":
            h = finish(step, product(h, step.weights[0]))
        elif step.kind == "residual":
            scale, bias, gate, gate_bias = map(number, step.vectors)
            centred, rstd = _normalize(step, h)
            z = step.factor * rstd * product(centred * scale, step.weights[0]) + bias
            h = saved(h) + gate * product(_activate(step, z), step.weights[1]) + gate_bias
        elif step.kind == "dense":
            h = finish(step, product(_activate(step, step.before * h), step.weights[0]))
        else:
            centred, rstd = _normalize(step, h)
            a = centred * number(step.vectors[0]) if step.vectors else centred
            h = rstd * product(a if step.activation is None else _activate(step, step.before * a), step.weights[0])
    h = h if ends.post_scale is None else h * number(ends.post_scale)
    return h + number(ends.post_shift) + (0.0 if ends.skip is None else x_t * number(ends.skip))


def _activate(step: Folded, z: Tensor) -> Tensor:
    return ACTIVATIONS[step.activation or ""].compute(z / INPUT_FACTOR.get(step.activation or "", 1.0))


def _normalize(step: Folded, h: Tensor) -> tuple[Tensor, Tensor | float]:
    """Return h without its mean, and what it has to be multiplied by then."""
    if step.eps is None:
        return h, 1.0
    centred = h - h.mean(-1, keepdim=True)
    return centred, (centred.square().mean(-1, keepdim=True) + step.eps).rsqrt()

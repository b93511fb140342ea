r"""Row programs with their derivative: every instruction acts on the accumulator and on its tangents, forward mode.

The tangent of h in entry i of x_t is :math:`\partial h / \partial x_{t,i}`. Where d is small all d of them go through
the layers beside h, with the same d products of matrices that d backward passes would take, without a graph and
without a second way through the code. Instructions that are linear act on both alike; a nonlinear one multiplies
tangents by its derivative at h:

.. math:: \dot h \leftarrow \mathrm{act}'(h) \odot \dot h, \qquad
    \dot h \leftarrow \frac{1}{s} \Big(\dot h - \overline{\dot h} - \hat h\, \overline{\hat h \odot \dot h}\Big)

for a norm with :math:`\hat h = (h - \bar h) / s`, bars being means over the last dimension. Until the first nonlinear
instruction the tangents are those of all rows, (d, 1, 1, w), and cost nothing to speak of; from there on h and tangents
lie one after the other in one tensor, which a linear layer multiplies at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .activations import ACTIVATIONS
from .instructions import Act, Add, Affine, Instruction, Linear, Norm, Save

# On one core tangents took less time than backward passes in 1 to 64 dimensions; more were not tried.
MOST_DIM = 64
DTYPES = (torch.float32, torch.float64)
KNOWN = (Linear, Affine, Act, Norm, Save, Add)


def why_not(d: int, dtype: torch.dtype) -> str | None:
    """Return why data of d numbers in a dtype do not get their trace by tangents, None where they do."""
    if d > MOST_DIM:
        return f"{d} dimensions are more than {MOST_DIM}"
    if dtype not in DTYPES:
        return f"the network computes in {dtype}, whose roundings tangents would add up in another way"
    return None


def why_no_rule(code: Sequence[Instruction]) -> str | None:
    """Return why a program's tangents are not known, None where they are."""
    for op in code:
        if not isinstance(op, KNOWN):
            return f"the instruction {type(op).__name__.lower()!r} has no rule for tangents"
        if isinstance(op, Act) and ACTIVATIONS[op.name].derivative is None:
            return f"the activation {op.name!r} has no derivative in fastscore/ops/activations.py"
    return None


@torch.no_grad()
def run_with_tangents(
    code: Sequence[Instruction], weights: Sequence[Tensor], tables: Sequence[Tensor], x_t: Tensor
) -> tuple[Tensor, Tensor]:
    """Return a program's output and its derivative in every entry of x_t, without a graph.

    Arguments:
        code: instructions for which `why_no_rule` has no objection.
        weights, tables: what they index, in the dtype of x_t.
        x_t: shape (B, R, d).

    Returns:
        The output f, shape (B, R, d_out), and its derivatives, (d, B, R, d_out), the i-th in entry i of x_t. Where f is
        linear in x_t, B or R of the derivatives may be one for all.
    """
    d = x_t.shape[-1]
    h = _Pair(x_t, torch.eye(d, dtype=x_t.dtype, device=x_t.device)[:, None, None])
    saved: dict[int, _Pair] = {}
    for op in code:
        if isinstance(op, Linear):
            h = h.linear(weights[op.weight])
        elif isinstance(op, Affine):
            h = h if op.scale < 0 else h.scaled(tables[op.scale])
            h = h if op.shift < 0 else h.shifted(tables[op.shift])
        elif isinstance(op, Act):
            h = h.activated(op.name)
        elif isinstance(op, Norm):
            h = h.normed(op.eps)
        elif isinstance(op, Save):
            saved[op.slot] = h = h.shared()
        elif isinstance(op, Add):
            h = h.plus(saved[op.slot], None if op.scale < 0 else tables[op.scale])
        else:
            raise ValueError(why_no_rule(code))
    return h.value, h.tangents


class _Pair:
    """An accumulator (B, R, w) and its tangents (d, B, R, w) or (d, 1, 1, w); `both` where one tensor holds both.

    What is `owned` nobody else reads, and it is written in place.
    """

    def __init__(self, value: Tensor, tangents: Tensor, both: Tensor | None = None, owned: bool = False) -> None:
        self.value, self.tangents, self.both, self.owned = value, tangents, both, owned

    @classmethod
    def of(cls, both: Tensor) -> _Pair:
        return cls(both[0], both[1:], both, owned=True)

    def shared(self) -> _Pair:
        return _Pair(self.value, self.tangents, self.both)

    def linear(self, weight: Tensor) -> _Pair:
        if self.both is not None:
            return _Pair.of(F.linear(self.both, weight))
        return _Pair(F.linear(self.value, weight), F.linear(self.tangents, weight))

    def scaled(self, scale: Tensor) -> _Pair:
        if self.both is None:
            return _Pair(self.value * scale, self.tangents * scale)
        return _Pair.of(self.both.mul_(scale) if self.owned else self.both * scale)

    def shifted(self, shift: Tensor) -> _Pair:
        if self.both is None or not self.owned:
            return _Pair(self.value + shift, self.tangents)
        self.value.add_(shift)
        return self

    def activated(self, name: str) -> _Pair:
        act = ACTIVATIONS[name]
        value = act.compute(self.value)
        slope = act.derivative(self.value, value)
        both = self._room()
        torch.mul(self.tangents, slope, out=both[1:])
        both[0].copy_(value)
        return _Pair.of(both)

    def normed(self, eps: float) -> _Pair:
        shape = self.value.shape[-1:]
        value, _, inverse = torch.native_layer_norm(self.value, shape, None, None, eps)
        tangents, rows = self.tangents, (len(self.tangents), *self.value.shape)
        along = torch.linalg.vecdot(tangents, value)[..., None] / shape[0]
        both = self._room()
        new = torch.sub(tangents.expand(rows), tangents.mean(-1, keepdim=True), out=both[1:])
        new.addcmul_(value, along, value=-1).mul_(inverse)
        both[0].copy_(value)
        return _Pair.of(both)

    def plus(self, other: _Pair, scale: Tensor | None) -> _Pair:
        pairs = (self.value, other.value), (self.tangents, other.tangents)
        if self.both is None or not self.owned:
            return _Pair(*(a + b if scale is None else torch.addcmul(a, b, scale) for a, b in pairs))
        for own, more in pairs if other.both is None else ((self.both, other.both),):
            own.add_(more) if scale is None else own.addcmul_(more, scale)
        return self

    def _room(self) -> Tensor:
        """Return a tensor for both, which may be where they are."""
        if self.both is not None and self.owned:
            return self.both
        return self.value.new_empty(1 + len(self.tangents), *self.value.shape)

r"""Whether autograd knows the whole of a network's derivative, which the ODE's divergence is made of.

A forward that runs partly under no_grad (self-conditioning), detaches a branch, rounds with a straight-through gradient
or leaves torch on the way returns an answer with a graph, and a trace that is wrong by any number of nats. Differences
tell: for signs v and J the Jacobian, any cotangents c have

.. math:: c^T \frac{f(x + h v) - f(x - h v)}{2h} = (J^T c)^T v

with the error of the difference. The cotangents are the difference itself, at length one, plus or minus v, so that
neither a part that is missing nor one that is made up cancels. What kinks, curvature, roundings and random answers do
to a difference shows in f(x + hv) + f(x - hv) - 2 f(x): an answer is judged where that is at most a twentieth of the
difference, so none of them passes for a gap of a tenth. One length of step at which both agree is enough: coarse ones,
which come first, see the slope of fine roundings, and fine ones that of waves and between kinks.
"""

from __future__ import annotations

import weakref
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..estimator.network import Network
from ..estimator.samples import Samples
from ..process.masks import inside
from ..process.network import predict, switches_of
from ..process.taken_dtype import model_dtype
from ..support.untouched import uncompiled
from .flow_field import log_snr_of, vjp

ROWS = 8
TIMES = 0.2, 0.5, 0.8  # of the path
STEPS = 0.1, 0.01, 0.001, 0.0001  # of the root mean square of x_t
BEND = 0.05  # most second difference of a row that is judged, in units of its first one
GAP = 0.1  # least share of the derivative that is called missing, or made up
RESOLVED = 2**-7  # least change, of the answer, that shows a gap: what a network in bfloat16 within does not lose
ROUNDINGS = 32  # of the network's dtype: the least change that is judged at all, of the answer, and the least gap

# Networks that have passed, by their switches (`switches_of`).
_WHOLE: weakref.WeakKeyDictionary[nn.Module, set[int]] = weakref.WeakKeyDictionary()


class _Slopes(NamedTuple):
    """The rate at which the answer changes, by differences and by autograd, summed over the rows that can be judged.

    They are summed since rows may see each other.
    """

    differences: float
    autograd: float
    rows: int
    resolved: bool  # whether the changes are above what arithmetic in bfloat16 resolves

    def agree(self, gap: float) -> bool:
        return abs(self.autograd - self.differences) <= gap * max(self.differences, abs(self.autograd))


def refuse_cut_graph(network: Network, samples: Samples, scale: float) -> None:
    """Raise ValueError where autograd knows only a part of how a network's answer depends on x_t.

    A network that has passed is not asked again until a switch of it changes. At each of three times it is called for 8
    rows, once with its graph and twice a step, of which the first or the second is enough for most; each time answers
    for itself, since a branch may be taken at some of them only.

    Arguments:
        scale: of the data, so that half of the path's times have more noise than data.
    """
    passed, now = _WHOLE.setdefault(network.model, set()), switches_of(network.model)
    if now in passed:
        return
    with uncompiled(), torch.enable_grad():
        for log_snr in log_snr_of(torch.tensor(TIMES, dtype=torch.float64, device="cpu"), scale)[:, None]:
            _check(network, samples, network.schedule.time(log_snr.clamp(*network.log_snr_range)))
    passed.add(now)


def _check(network: Network, samples: Samples, time: Tensor) -> None:
    rows = samples.select(torch.arange(ROWS, device=samples.device) % len(samples))
    generator = torch.Generator().manual_seed(0)
    shape = rows.x.shape
    noise = torch.randn(shape, generator=generator, device="cpu").to(rows.x)
    v = (2.0 * torch.randint(2, shape, generator=generator, device="cpu") - 1).to(rows.x)
    alpha, sigma = (value.to(rows.x) for value in network.schedule.alpha_sigma(time))
    v, x = inside(v, rows.mask), alpha * rows.x + sigma * noise
    x = (x if rows.mask is None else torch.where(rows.mask, x, rows.x)).detach().requires_grad_()

    def answer(x_t: Tensor) -> Tensor:  # one time for all rows, as the ODE asks
        here = time.to(x_t.device)
        answers = predict(network.model, x_t[:, None], here, rows.conds[0], rows.shape, network.time_dtype)
        return inside(answers[:, 0].clone(), rows.mask)  # the network may write every answer into the same memory

    middle = answer(x)
    if not middle.requires_grad:  # a constant
        return
    gap = None
    rounding = ROUNDINGS * torch.finfo(model_dtype(network.model, x.dtype)).eps
    for step in STEPS:
        h = step * x.detach().square().mean(1, keepdim=True).sqrt()
        with torch.no_grad():
            ends = answer(x + h * v), answer(x - h * v)
        found = _slopes(middle, ends, x, v, h, rounding)
        if found.rows >= ROWS / 2:
            if found.agree(max(GAP, rounding)):
                return
            if found.resolved:
                gap = gap or found
    if gap is not None:
        raise ValueError(
            f"the network's answer changes with x_t at a rate of {gap.differences / gap.rows:.3g} and autograd knows "
            f"of {gap.autograd / gap.rows:.3g}, where the two must agree, so that the ODE's divergence would be wrong: "
            "a part of its forward runs under no_grad, detaches, rounds with a gradient made up, or leaves torch; take "
            "that out, or use estimate, which needs no derivative"
        )


def _slopes(middle: Tensor, ends: tuple[Tensor, Tensor], x: Tensor, v: Tensor, h: Tensor, rounding: float) -> _Slopes:
    up, down, at, h = (value.detach().double() for value in (*ends, middle, h))
    first, second = (up - down) / (2 * h), (up + down - 2 * at) / (2 * h)
    length, side = torch.linalg.vector_norm(first, dim=1), v.double() / v.shape[1] ** 0.5
    along = torch.linalg.vecdot(first, side)
    cotangents = first / length.clamp(min=torch.finfo(torch.float64).tiny)[:, None]
    cotangents = cotangents + torch.where(along < 0, -1.0, 1.0)[:, None] * side
    (product,) = vjp(middle, x, cotangents.to(middle)[None], create_graph=False)
    by_differences, by_autograd = length + along.abs(), torch.linalg.vecdot(product.double(), v.double())
    size = torch.maximum(by_differences, by_autograd.abs())
    change, answer = 2 * h[:, 0] * size, torch.linalg.vector_norm(at, dim=1)
    judged = (torch.linalg.vector_norm(second, dim=1) <= BEND * size) & (change > rounding * answer)
    resolved = bool((change > RESOLVED * answer)[judged].all())
    return _Slopes(float(by_differences[judged].sum()), float(by_autograd[judged].sum()), int(judged.sum()), resolved)

r"""How far the ODE's log-density is from the data's own because its path ends before the noise does, at either end.

At the noisy end the prior is the reference's, q instead of p; at the clean end the answer is the density of data with
some noise left, instead of that of the data. The network's Jacobian at either end tells what is missing, if p
is taken as a Gaussian there. On the path, with noise t, :math:`\hat\epsilon` the noise that the network sees in y, and
:math:`\Gamma = t\, \partial\hat\epsilon / \partial y` the share of the noise in the variance, a Gaussian has, up to a
constant,

.. math:: \log p_t(y) = \tfrac12 \log\det\Gamma - \tfrac12\, \hat\epsilon^T \Gamma^{-1} \hat\epsilon, \qquad
    \log p_0(y) - \log p_t(y) = -\tfrac12 \log\det(1 - \Gamma)
    - \tfrac12\, \hat\epsilon^T (1 - \Gamma)^{-1} \hat\epsilon

The first, of p less of q, is what is missing at the noisy end, the second at the clean one. It is the rate of
log(p / q) along the path, continued with the right power, and does not vanish where that rate happens to. The matrix
1 - M, with M that share which vanishes at the end itself, is known by two moments of M: of its eigenvalues, and as
:math:`\hat\epsilon` sees them. M counts as having the one eigenvalue :math:`n = m_2 / m_1` beside 0 that has both. So
it is exact for isotropic Gaussians of any place and width, and for those with some directions that are wide, or narrow;
for any density it is so to second order in what is left of the path, as far as the Gaussian goes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..process.masks import inside
from ..support.autocast import own_dtypes
from .flow_field import COLUMNS, TABLES, Field, Time, dot, vjp
from .flow_program import Point, ProgramField

einsum = own_dtypes(torch.einsum)
LEAST = 1e-3  # share of the variance: no network that was trained tells finer widths from the noise around them


class Shape(NamedTuple):
    """The noise seen (its square), and the share of noise in the variance: two moments of it, and as the noise has it.

    All are of shape (B,): means over the d eigenvalues, and over the squared components of the noise along them.
    """

    square: Tensor
    mean: Tensor
    mean_square: Tensor
    seen: Tensor
    seen_square: Tensor

    def rest(self) -> Shape:
        """Return the same of the share of the data, one less the noise's."""
        first, second = 1 - self.mean, 1 - 2 * self.mean + self.mean_square
        return Shape(self.square, first, second, 1 - self.seen, 1 - 2 * self.seen + self.seen_square)


def seen_at(field: Field | ProgramField, time: Time | Point, y: Tensor) -> tuple[Tensor, Shape]:
    """Return the velocity of the path, (B, d), and what the network sees there, by one evaluation with its trace.

    Arguments:
        field: the right-hand side of the ODE.
        time: an end of the path.
        y: where the path of each sample is then, (B, d).
    """
    if field.whole:
        velocity, eps, jacobian = field.noise_and_jacobian(time, y)
        return velocity, _shape_of(eps, jacobian, time.t, field.samples.dims)
    with torch.enable_grad():
        y = y.detach().requires_grad_()
        velocity = field.velocity(time, y)
        eps = inside(y, field.samples.mask) + (1 - time.t) * velocity
        return velocity.detach(), _shape(field, eps, y, time.t)


def truncation(field: Field | ProgramField, clean: Shape, at_noisy: Time | Point, noisy: Tensor) -> Tensor:
    """Estimate what the ends of the path leave out of log p, nats, float64, shape (B,): of both, their sizes' sum.

    It takes an evaluation of the network with its trace.

    Arguments:
        field: the right-hand side of the ODE.
        clean: what the network sees where the path of each sample starts (`seen_at`).
        at_noisy, noisy: the noisy end, and where the path of each sample is then, (B, d).
    """
    d, mask = field.samples.dims, field.samples.mask
    _, p = seen_at(field, at_noisy, noisy)
    # In closed form where that is not too many numbers: a pass a column is slower.
    if field.whole or (field.exact and noisy.numel() * noisy.shape[1] <= TABLES):
        return _beyond(clean, p, _shape_of(*at_noisy.level.eps_and_jacobian(noisy, mask), at_noisy.t, d), d)
    with torch.enable_grad():
        y = noisy.detach().requires_grad_()
        eps_q, _ = at_noisy.level.eps_and_divergence(y, mask)
        return _beyond(clean, p, _shape(field, eps_q, y, at_noisy.t), d)


def _beyond(noise: Shape, p: Shape, q: Shape, d: int | Tensor) -> Tensor:
    """Return what is missing at both ends: of the noise at the clean one, of p less of q at the noisy one."""
    every = (torch.stack(torch.broadcast_tensors(*each)) for each in zip(noise, p.rest(), q.rest()))
    (clean, *log_det), (form, *forms) = _of_the_rest(Shape(*every), d)
    return 0.5 * ((clean + form).abs() + (log_det[0] - forms[0] - log_det[1] + forms[1]).abs())


def _of_the_rest(shape: Shape, d: int | Tensor) -> tuple[Tensor, Tensor]:
    """Return log det (1 - M) and eps^T (1 - M)^-1 eps."""
    node, weight = _node(shape.mean, shape.mean_square)
    seen_node, seen_weight = _node(shape.seen, shape.seen_square)
    log_det = d * weight * (1 - node).log()
    return log_det, shape.square * (1 + seen_weight * seen_node / (1 - seen_node))


def _node(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Return the eigenvalue beside 0 with its share of the directions; the mean where there is no such one below 1."""
    node = second / first
    node = torch.where((first > 0) & (node < 1), node, first).clamp(max=1 - LEAST)
    return node, (first / node).nan_to_num(1.0).clamp(max=1)


def _shape(field: Field, eps: Tensor, y: Tensor, t: float) -> Shape:
    """Return what is known of a Gaussian from the noise seen in y, (B, d)."""
    mask, first = field.samples.mask, 0
    mean, mean_square = torch.zeros(2, len(y), dtype=torch.float64, device=y.device)
    product, noise = torch.zeros_like(y), eps.detach()
    for v in field.cotangents.split(COLUMNS):
        v = v.expand(-1, *y.shape)
        found, last = inside(vjp(eps, y, v, create_graph=False), mask), first + len(v)
        mean += dot(found, v).sum(0)
        mean_square += found.square().sum((0, 2))
        if field.exact:  # row i of the Jacobian, by y
            product += einsum("bi,ibj->bj", noise[:, first:last], found)
        first = last
    if not field.exact:
        product = inside(vjp(eps, y, noise[None], create_graph=False)[0], mask)
    copies = 1 if field.exact else len(field.cotangents)
    return _seen(noise, product, mean / copies, mean_square / copies, t, field.samples.dims)


@own_dtypes
def _shape_of(eps: Tensor, jacobian: Tensor, t: float, dims: int | Tensor) -> Shape:
    """Return `_shape` from the noise (B, d) and its whole Jacobian, entry (j, i) by y_i at (b, i, j), or one of all."""
    exact = jacobian.double()
    mean = torch.diagonal(exact, dim1=1, dim2=2).sum(1)
    entries = exact.flatten(1)
    mean_square = torch.linalg.vecdot(entries, entries)
    return _seen(eps, (jacobian @ eps[:, :, None])[:, :, 0], mean, mean_square, t, dims)


def _seen(eps: Tensor, product: Tensor, trace: Tensor, square_trace: Tensor, t: float, dims: int | Tensor) -> Shape:
    """Return the shape from the noise, its product with the Jacobian, and the traces of that and of its square."""
    eps, product = eps.double(), product.double()
    square = eps.square().sum(1)
    total = square.clamp(min=torch.finfo(torch.float64).tiny)
    seen, seen_square = torch.linalg.vecdot(product, eps), product.square().sum(1)
    return Shape(square, t * trace / dims, t**2 * square_trace / dims, t * seen / total, t**2 * seen_square / total)

r"""Fit a Gaussian mixture reference to data by expectation-maximization.

The reference only steers variance, so the fit favours safety: covariances are shrunk towards the pooled one by the
share d / (d + N_k) that sampling noise has in them, and no variance falls under 1e-6 of the average.

References:
    Maximum Likelihood from Incomplete Data via the EM Algorithm (Dempster et al., 1977)
    k-means++: The Advantages of Careful Seeding (Arthur and Vassilvitskii, 2007)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..process.masks import inside
from .gaussians import Reference

ITERATIONS = 60
ROUNDING = 1e-14  # of a difference of squares, in float64
CONSTANT = 1e-12  # variance for data that have none
TOLERANCE = 1e-3  # nats per sample between two steps


def fit_mixture(data: Tensor, components: int = 1, full: bool = False, seed: int = 0) -> Reference:
    """Fit a mixture of `components` Gaussians with diagonal or full covariances.

    Arguments:
        data: training data, shape (N, d), N >= 2 components.
        components: K.
        full: full covariances instead of diagonal ones.
        seed: of the k-means++ start.

    Raises:
        ValueError: if there are fewer than 2 samples a component.
    """
    x = data.detach().to(torch.float64)
    if len(x) < 2 * components:
        raise ValueError(
            f"a mixture of {components} needs at least {2 * components} samples, got {len(x)}; fit fewer components"
        )
    responsibility = _kmeans(x, components, seed)
    previous = -math.inf
    for _ in range(ITERATIONS if components > 1 else 1):
        reference = _maximize(x, responsibility, full)
        if components == 1:
            break
        logits = _log_joint(x, reference)
        score = float(torch.logsumexp(logits, 1).mean())
        responsibility = logits.softmax(1)
        if score - previous < TOLERANCE:
            break
        previous = score
    return reference


def fit_diagonal(data: Tensor, mask: Tensor) -> Reference:
    r"""Fit one diagonal Gaussian to data of which every sample has entries of its own.

    Every dimension has a further observation from the mean m and variance v of all entries together, so that one seen
    seldom, or never, is taken to be like the others: with n, S_1 and S_2 the count and the sums of x and x^2 there,

    .. math:: m_i = \frac{S_{1} + m}{n + 1}, \qquad v_i = \frac{S_{2} + m^2 + v}{n + 1} - m_i^2

    Arguments:
        data: training data, shape (N, d).
        mask: which entries are there, bool, shape (N, d).
    """
    x, count = inside(data.detach().to(torch.float64), mask), mask.sum(0)
    center = x.sum() / count.sum()
    y = inside(x - center, mask)  # sums of squares about the common mean keep their digits
    pooled = y.square().sum() / count.sum()
    mean = y.sum(0) / (count + 1)
    variance = (y.square().sum(0) + pooled) / (count + 1) - mean.square()
    floor = _floor(pooled, pooled + center.square())
    return Reference(x.new_ones(1).to(x), (center + mean)[None], variance.clamp(min=floor)[None])


def _floor(average: Tensor, size: Tensor) -> Tensor:
    """Return the least variance of a component: in units of the data's own, whatever their scale.

    Arguments:
        average: variance.
        size: mean of the squared data, of which rounding leaves a variance where they have none.
    """
    return torch.where(average > ROUNDING * size, 1e-6 * average, CONSTANT)


def _kmeans(x: Tensor, components: int, seed: int, steps: int = 10) -> Tensor:
    """Return hard responsibilities (N, K) of a few Lloyd steps from a k-means++ start."""
    generator = torch.Generator().manual_seed(seed)
    centers = x[torch.randint(len(x), (1,), generator=generator, device="cpu")]
    for _ in range(components - 1):
        distance = torch.cdist(x, centers).amin(1) ** 2 + 1e-12
        pick = torch.multinomial(distance.cpu(), 1, generator=generator).to(x.device)
        centers = torch.cat([centers, x[pick]])
    for _ in range(steps):
        label = torch.cdist(x, centers).argmin(1)
        hard = torch.nn.functional.one_hot(label, components).to(x.dtype)
        count = hard.sum(0)[:, None]
        centers = torch.where(count > 0, hard.T @ x / count.clamp(min=1), centers)
    return hard


def _maximize(x: Tensor, responsibility: Tensor, full: bool) -> Reference:
    d = x.shape[1]
    count = responsibility.sum(0).clamp(min=1e-9)  # (K,)
    mean = responsibility.T @ x / count[:, None]
    share = (d if full else 1) / ((d if full else 1) + count)
    second = responsibility.T @ x**2 / count[:, None]
    variance = (second - mean**2).clamp(min=0)
    weight = count / count.sum()
    pooled = weight @ variance
    floor = _floor(pooled.mean(), (weight @ second).mean())
    if not full:
        shrunk = (1 - share)[:, None] * variance + share[:, None] * pooled
        return Reference(weight, mean, shrunk.clamp(min=floor))
    cov = torch.stack([_covariance(x, responsibility[:, k], mean[k], count[k]) for k in range(len(count))])
    if len(count) == 1:
        # Nothing to pool with: shrunk towards its diagonal, and by less, since that costs small eigenvalues most.
        target, share = torch.diag(pooled), share**2
    else:
        target = torch.einsum("k,kij->ij", weight, cov)
    cov = (1 - share)[:, None, None] * cov + share[:, None, None] * target
    eigenvalue, basis = torch.linalg.eigh(cov)
    return Reference(weight, mean, eigenvalue.clamp(min=floor), basis)


def _covariance(x: Tensor, responsibility: Tensor, mean: Tensor, count: Tensor) -> Tensor:
    y = (x - mean) * responsibility.sqrt()[:, None]
    return y.T @ y / count


def _log_joint(x: Tensor, q: Reference) -> Tensor:
    """Return log(weight_k) + log N(x; k), shape (N, K)."""
    d = x.shape[1]
    norm = q.weight.log() - 0.5 * (d * math.log(2 * math.pi) + q.variance.log().sum(1))
    quadratic = []
    for k in range(q.components):
        y = x - q.mean[k]
        y = y @ q.basis[k] if q.full else y
        quadratic.append(y.square() @ (1 / q.variance[k]))
    return norm - 0.5 * torch.stack(quadratic, 1)

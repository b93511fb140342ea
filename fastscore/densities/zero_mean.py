r"""The density of point clouds without a position: molecules, whose atoms are known up to a translation.

Networks that are invariant under translations give no density of positions x (n, D), which would not integrate to one,
but one of centred positions, in the subspace where the atoms' mean is zero. It has (n - 1) D dimensions. With the
Helmert basis h_1 ... h_{n-1}, orthonormal and orthogonal to (1, ..., 1),

.. math:: z = H^T x, \qquad x = H z, \qquad
    h_k = \frac{(1, \dots, 1, -k, 0, \dots, 0)}{\sqrt{k (k + 1)}} \;\text{ with k ones}

z are coordinates of the subspace, log p(x) = log p(z) as H is orthonormal, and the network of z is
:math:`H^T f(H z, t)`, whatever it predicts, since all predictions are linear in data and noise. For n atoms of M the
first n - 1 vectors serve, so that molecules of different sizes go in one call, with a mask on z.

References:
    Equivariant Diffusion for Molecule Generation in 3D (Hoogeboom et al., 2022), https://arxiv.org/abs/2203.17003
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..density import ScoreDensity
from ..estimator.estimate import Comparison, Estimate
from ..process.conditions import merged, per_sample
from ..process.masks import broadcast_mask, inside
from ..process.network import read_output
from ..process.schedules import Schedule

# Of the largest coordinate. What is left of a mean below it is projected away and counts for nothing.
TOLERANCE = 1e-3


class ZeroMeanDensity(nn.Module):
    r"""Log-density of centred positions under a network of positions: (n - 1) D dimensions for n atoms in D.

    Positions alone are noised: features of the atoms are conditions; a joint density of both is out of scope.

    Arguments:
        model: the network, called as `model(x_t, t, **cond)` with x_t of shape (rows, M, D), where the atoms have mean
            zero; the mean of its answers is projected away.
        schedule, predicts, options: as in `ScoreDensity`.

    Attributes:
        density: the `ScoreDensity` of z, shape (B, M - 1, D).

    Raises:
        TypeError, ValueError: as `ScoreDensity`.

    Example:
        >>> density = ZeroMeanDensity(egnn, DDPM.cosine(1000), "eps")
        >>> density.estimate(x, mask=atoms, node_mask=node_mask).log_prob
    """

    def __init__(self, model: nn.Module, schedule: Schedule, predicts: str = "eps", **options):
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}; wrap a function in a Module")
        self.density = ScoreDensity(_OfCoordinates(model), schedule, predicts, **options)

    def log_prob(self, x: Tensor, *, mask: Tensor | None = None, cond: dict | None = None, **options) -> Tensor:
        """Return log p(x) in nats, shape (B,), differentiable in x and the network's parameters.

        Arguments:
            x, mask, cond: as in `coordinates`.
            options: as in `ScoreDensity.log_prob`, keyword arguments of the network among them.

        Raises:
            ValueError: as `coordinates` and `ScoreDensity.log_prob`.
        """
        z, given = self.coordinates(x, mask, cond)
        return self.density.log_prob(z, **given, **options)

    def estimate(self, x: Tensor, *, mask: Tensor | None = None, cond: dict | None = None, **options) -> Estimate:
        """Return log p(x) with its standard error; `dims` are (n - 1) D. Arguments and errors as in `log_prob`."""
        z, given = self.coordinates(x, mask, cond)
        return self.density.estimate(z, **given, **options)

    def compare(self, x: Tensor, cond_a: dict, cond_b: dict, *, mask: Tensor | None = None, **options) -> Comparison:
        """Return log p(x | a) - log p(x | b), as `ScoreDensity.compare`."""
        z, given = self.coordinates(x, mask)
        own = given.pop("cond")
        return self.density.compare(z, merged(cond_a, own), merged(cond_b, own), **given, **options)

    def fit(self, data: Tensor, *, mask: Tensor | None = None, cond: dict | None = None, **options) -> ZeroMeanDensity:
        """Fit the reference and the nodes to centred positions, as `ScoreDensity.fit`; return self."""
        z, given = self.coordinates(data, mask, cond)
        self.density.fit(z, **given, **options)
        return self

    def coordinates(
        self, x: Tensor, mask: Tensor | None = None, cond: dict | None = None
    ) -> tuple[Tensor, dict[str, object]]:
        """Return z, shape (B, M - 1, D), and the keyword arguments mask and cond that `self.density` takes with it.

        They go to `density_loss(self.density, z, seed=step, **given)` and to what else takes a `ScoreDensity`.

        Arguments:
            x: positions, floating point, shape (B, M, D), centred: those of a sample's atoms have mean zero.
            mask: which atoms there are, shape (B, M) or (B, M, 1), bool or 0 and 1: at least two a sample, at any
                place; all by default. At the other places the network sees what x has there.
            cond: keyword arguments of the network.

        Raises:
            ValueError: if x is no batch of positions, or not centred; if a sample has fewer than two atoms; if the mask
                does not fit.
        """
        if not isinstance(x, Tensor) or x.ndim != 3 or x.shape[1] < 2 or not x.is_floating_point():
            got = f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"x must be floating-point positions of shape (B, M, D) with M >= 2 atoms, got {got}")
        if mask is None:
            _check_centred(x, None)
            return (helmert(x.shape[1], x.device).mT @ x.to(torch.float64)).to(x.dtype), {"cond": merged(cond, {})}
        atoms = _atoms(mask, x)
        _check_centred(x, atoms)
        order = (~atoms).to(torch.uint8).argsort(dim=1, stable=True)  # the atoms first, as they come
        ordered = inside(x, atoms[..., None]).to(torch.float64).gather(1, _along(order, x))
        counted = (torch.arange(1, x.shape[1], device=x.device) < atoms.sum(1, keepdim=True))[..., None]
        z = inside(helmert(x.shape[1], x.device).mT @ ordered, counted).to(x.dtype)
        own = {"_order": per_sample(order), "_atoms": per_sample(atoms), "_others": per_sample(x.detach())}
        return z, {"mask": counted, "cond": merged(cond, own)}


class _OfCoordinates(nn.Module):
    """A network of positions as one of coordinates: H^T f(H z, t)."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(
        self,
        z: Tensor,
        t: Tensor,
        *,
        _order: Tensor | None = None,
        _atoms: Tensor | None = None,
        _others: Tensor | None = None,
        **cond,
    ) -> Tensor:
        """Arguments: which atoms come first, (rows, M); where there are any; and what stands where there are none."""
        basis = helmert(z.shape[1] + 1, z.device).to(z.dtype)
        x = basis @ z
        if _order is not None:
            along = _along(_order, x)
            x = torch.where(_atoms[..., None], torch.zeros_like(x).scatter(1, along, x), _others.to(x.dtype))
        answer = read_output(self.model(x, t, **cond), x)
        return basis.mT @ (answer if _order is None else answer.gather(1, along))


def helmert(atoms: int, device: torch.device) -> Tensor:
    """Return the Helmert basis of vectors with sum zero, in columns: float64, shape (M, M - 1).

    The first n - 1 columns are zero below row n, and are the basis of n atoms.
    """
    row = torch.arange(1, atoms + 1, dtype=torch.float64, device=device)[:, None]
    k = torch.arange(1, atoms, dtype=torch.float64, device=device)
    raw = torch.where(row <= k, 1.0, torch.where(row == k + 1, -k, 0.0))
    return raw / (k * (k + 1)).sqrt()


def _along(order: Tensor, x: Tensor) -> Tensor:
    return order[..., None].expand(*order.shape, x.shape[-1])


def _atoms(mask: Tensor, x: Tensor) -> Tensor:
    """Return which atoms there are, bool, shape (B, M)."""
    if isinstance(mask, Tensor) and mask.ndim == 3 and mask.shape[2] > 1:
        raise ValueError(
            f"mask must say which atoms there are, shape (B, M) or (B, M, 1), got {tuple(mask.shape)}; "
            "an atom is there with all its coordinates"
        )
    column = mask[..., None] if isinstance(mask, Tensor) and mask.ndim == 2 else mask
    atoms = broadcast_mask(column, x[..., :1])[..., 0]
    few = (atoms.sum(1) < 2).nonzero()
    if len(few):
        raise ValueError(
            f"every sample needs two atoms at least, got fewer in {len(few)} of {len(x)} samples, first in sample "
            f"{int(few[0])}; one alone has no density once it is centred"
        )
    return atoms


def _check_centred(x: Tensor, atoms: Tensor | None) -> None:
    x = inside(x.detach().to(torch.float64), None if atoms is None else atoms[..., None])
    count = x.shape[1] if atoms is None else atoms.sum(1)[:, None]
    off = (x.sum(1) / count).abs().amax(1)
    bad = (off > TOLERANCE * x.abs().amax((1, 2))).nonzero()
    if len(bad):
        raise ValueError(
            f"x must be centred, its atoms having mean zero, got a mean of {float(off[bad[0]]):.3g} in sample "
            f"{int(bad[0])}, the first of {len(bad)}; subtract the mean over the atoms that are there"
        )

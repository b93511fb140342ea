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

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..density import ScoreDensity
from ..estimator.comparison import Comparison
from ..estimator.estimate import Estimate
from ..estimator.protocol import Density, of_core
from ..estimator.samples import check_batch
from ..process.conditions import merged, per_sample
from ..process.masks import broadcast_mask, inside
from ..process.network import read_output
from ..process.predictions import must_say_what_it_predicts
from ..process.schedules import Schedule
from ..reference.gaussians import Reference
from ..support.autocast import own_dtypes
from ..support.modes import differentiable, ordinary

# Of the largest coordinate. What is left of a mean below it is projected away and counts for nothing.
TOLERANCE = 1e-3
_product = own_dtypes(torch.matmul)


class ZeroMeanDensity(Density):
    r"""Log-density of centred positions under a network of positions: (n - 1) D dimensions for n atoms in D.

    All that takes a `ScoreDensity` takes it, with positions x and masks of atoms: metrics, losses, the ODE, the
    classifier, data sets, CUDA graphs. Not so `Transformed` and `discrete_log_prob`, which know entries with densities
    of their own. Positions alone are noised: features of the atoms are conditions; a joint density of both is out of
    scope.

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

    subspace = "centred positions"

    @must_say_what_it_predicts
    def __init__(self, model: nn.Module, schedule: Schedule, predicts: str, **options: Any) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}; wrap a function in a Module")
        self.density = ScoreDensity(_OfCoordinates(model), schedule, predicts, **options)

    model, schedule, predicts = of_core("model"), of_core("schedule"), of_core("predicts")
    nfe, log_snr_range = of_core("nfe"), of_core("log_snr_range")

    @property
    def core(self) -> ScoreDensity:
        """The `ScoreDensity` of z."""
        return self.density

    @differentiable
    def log_prob(
        self, x: Tensor, *, mask: Tensor | None = None, cond: dict[str, Any] | None = None, **options: Any
    ) -> Tensor:
        """Return log p(x) in nats, shape (B,), differentiable in x and the network's parameters.

        Arguments:
            x, mask: as in `to_network`.
            cond, options: as in `ScoreDensity.log_prob`, keyword arguments of the network among them.

        Raises:
            ValueError: as `to_network` and `ScoreDensity.log_prob`.
        """
        z, given = self.coordinates(x, mask, cond)
        return self.density.log_prob(z, **given, **options)

    @ordinary
    def estimate(
        self, x: Tensor, *, mask: Tensor | None = None, cond: dict[str, Any] | None = None, **options: Any
    ) -> Estimate:
        """Return log p(x) with its standard error; `dims` are (n - 1) D. Arguments and errors as in `log_prob`."""
        z, given = self.coordinates(x, mask, cond)
        return self.density.estimate(z, **given, **options)

    def compare(
        self, x: Tensor, cond_a: dict[str, Any], cond_b: dict[str, Any], *, mask: Tensor | None = None, **options: Any
    ) -> Comparison:
        """Return log p(x | a) - log p(x | b), as `ScoreDensity.compare`."""
        z, given = self.coordinates(x, mask, cond_a)
        _, other = self.network_arguments(x, mask, merged(cond_b, {}))
        return self.density.compare(z, given["cond"], other, mask=given["mask"], **options)

    def fit(
        self, data: Tensor, *, mask: Tensor | None = None, cond: dict[str, Any] | None = None, **options: Any
    ) -> ZeroMeanDensity:
        """Fit the reference and the nodes to centred positions, as `ScoreDensity.fit`; return self."""
        z, given = self.coordinates(data, mask, cond)
        self.density.fit(z, **given, **options)
        return self

    def with_reference(self, reference: Reference | None) -> ZeroMeanDensity:
        """Return the density of the same network with another reference of z, as `ScoreDensity` does."""
        other = ZeroMeanDensity(self.model.model, self.schedule, self.predicts)
        other.density = self.density.with_reference(reference)
        return other

    def to_network(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return z, shape (B, M - 1, D), and zero: H is orthonormal.

        Its first n - 1 rows are coordinates of the atoms; the others, which do not count, are the other positions.

        Arguments:
            x: positions, floating point, shape (B, M, D), centred: those of a sample's atoms have mean zero.
            mask: which atoms there are, shape (B, M) or (B, M, 1), bool or 0 and 1: at least two a sample, at any
                place; all by default. At the other places the network sees what x has there.

        Raises:
            ValueError: if x is no batch of positions, or not centred; if a sample has fewer than two atoms; if the mask
                does not fit.
        """
        if not isinstance(x, Tensor) or x.ndim != 3 or x.shape[1] < 2 or not x.is_floating_point():
            got = f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"x must be floating-point positions of shape (B, M, D) with M >= 2 atoms, got {got}")
        check_batch(x)
        basis, nothing = helmert(x.shape[1], x.device), torch.zeros(len(x), dtype=torch.float64, device=x.device)
        if mask is None:
            _check_centred(x, None)
            return (basis.mT @ x.to(torch.float64)).to(x.dtype), nothing
        places = _Places.of(mask, x)
        _check_centred(x, places.atoms)
        ordered = x.to(torch.float64).gather(1, _along(places.order, x))
        of_atoms = basis.mT @ inside(ordered, places.first(x.shape[1]))
        return torch.where(places.counted, of_atoms, ordered[:, 1:]).to(x.dtype), nothing

    def network_arguments(
        self, x: Tensor, mask: Tensor | None, cond: dict[str, object]
    ) -> tuple[Tensor | None, dict[str, object]]:
        """Return which rows of z count, (B, M - 1, 1), and the keyword arguments with the places of the atoms."""
        if mask is None:
            return None, cond
        places = _Places.of(mask, x)
        return places.counted, merged(cond, {"_order": per_sample(places.order), "_atoms": per_sample(places.atoms)})

    def coordinates(
        self, x: Tensor, mask: Tensor | None = None, cond: dict[str, Any] | None = None
    ) -> tuple[Tensor, dict[str, object]]:
        """Return z and the keyword arguments mask and cond that `self.density` takes with it.

        Arguments:
            x, mask: as in `to_network`.
            cond: keyword arguments of the network.

        Raises:
            ValueError: as `to_network`.
        """
        z, _ = self.to_network(x, mask)
        counted, given = self.network_arguments(x, mask, merged(cond, {}))
        return z, {"mask": counted, "cond": given}


class _Places(NamedTuple):
    """Where the atoms stand: which places have one, (B, M), and all places in order, those of atoms first, (B, M)."""

    atoms: Tensor
    order: Tensor

    @classmethod
    def of(cls, mask: Tensor, x: Tensor) -> _Places:
        atoms = _atoms(mask, x)
        return cls(atoms, (~atoms).to(torch.uint8).argsort(dim=1, stable=True))

    def first(self, count: int, less: int = 0) -> Tensor:
        """Return which of `count` rows are among the first n - less, (B, count, 1)."""
        rows = torch.arange(count, device=self.atoms.device)
        return (rows < self.atoms.sum(1, keepdim=True) - less)[..., None]

    @property
    def counted(self) -> Tensor:
        """Which rows of z are coordinates of atoms, (B, M - 1, 1)."""
        return self.first(self.atoms.shape[1] - 1, less=1)


class _OfCoordinates(nn.Module):
    """A network of positions as one of coordinates: H^T f(H z, t)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, z: Tensor, t: Tensor, *, _order: Tensor | None = None, _atoms: Tensor | None = None, **cond: Any
    ) -> Tensor:
        """Arguments: where the atoms stand, as in `_Places`, both (rows, M); without them all places have one."""
        basis = helmert(z.shape[1] + 1, z.device).to(z.dtype)
        if _order is None:
            x = _product(basis, z)
            return _product(basis.mT, read_output(self.model(x, t, **cond), x))
        places = _Places(_atoms, _order)
        of_atoms, others = _product(basis, inside(z, places.counted)), torch.cat([z[:, :1], z], 1)
        ordered = torch.where(places.first(len(basis)), of_atoms, others)
        along = _along(_order, ordered)
        x = torch.zeros_like(ordered).scatter(1, along, ordered)
        return _product(basis.mT, read_output(self.model(x, t, **cond), x).gather(1, along))


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
    atoms = broadcast_mask(mask, x[..., :1])[..., 0]
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

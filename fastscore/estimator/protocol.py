r"""What a density is, for everything that takes one: metrics, bounds, classifiers, losses, the ODE, whole data sets.

A density knows the user's data x through a network that knows z, and the exact change of variables between them:

.. math:: \log p(x) = \log p_z(z) - \log|\det \partial x / \partial z|

What is computed with the network is computed on z, by the `core`; `to_network` says what z is, and what the determinant
adds. So there is one way for data that the network saw as they are, where the two are the same and the determinant is
one, and for data that it saw standardized, squashed or whitened; and for centred point clouds, whose z has fewer
dimensions than x, where mask and conditions of the network are others too (`network_arguments`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, TypeVar

from torch import Tensor, nn

from ..process.schedules import Schedule
from ..reference.gaussians import Reference
from .comparison import Comparison
from .estimate import Estimate

Self = TypeVar("Self", bound="Density")


class Density(nn.Module, ABC):
    """log p(x) of a network's data in the user's space: `ScoreDensity`, `Transformed` around one, `ZeroMeanDensity`.

    Attributes:
        model: the network, a function of z.
        schedule: its forward process.
        predicts: what it returns, see `fastscore.process.predictions`.
        nfe: network evaluations per sample, where a call does not say.
        log_snr_range: range (lowest, highest) of the log-SNR that estimates integrate over.
        subspace: why entries of x have no densities of their own, in words, where z has fewer dimensions; empty else.
    """

    subspace: str = ""

    model: nn.Module
    schedule: Schedule
    predicts: str
    nfe: int
    log_snr_range: tuple[float, float]

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Raise TypeError: a density is no function of the data; its methods are."""
        raise TypeError(
            f"a {type(self).__name__} is not called, since a log-density comes with and without an error bar; use "
            "estimate(x), or log_prob(x), which has gradients"
        )

    @property
    @abstractmethod
    def core(self) -> Density:
        """The `ScoreDensity` of z, with the network, its schedule, the reference and the nodes."""

    @abstractmethod
    def to_network(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return z, in the dtype of x, and log|det dx/dz|, float64, shape (B,); both differentiable in x.

        With a mask the determinant is that of the entries that count.

        Raises:
            ValueError: if x is no batch of floating-point data, or no data of this density.
        """

    def network_arguments(
        self, x: Tensor, mask: Tensor | None, cond: dict[str, object]
    ) -> tuple[Tensor | None, dict[str, object]]:
        """Return the mask of z and the keyword arguments that the network gets with it; here they are those of x."""
        return mask, cond

    @abstractmethod
    def log_prob(self, x: Tensor, **options: Any) -> Tensor:
        """Return log p(x) in nats, shape (B,), differentiable; options as in `ScoreDensity.log_prob`."""

    @abstractmethod
    def estimate(self, x: Tensor, **options: Any) -> Estimate:
        """Return log p(x) with its standard error; options as in `ScoreDensity.estimate`."""

    @abstractmethod
    def compare(self, x: Tensor, cond_a: dict[str, Any], cond_b: dict[str, Any], **options: Any) -> Comparison:
        """Return log p(x | a) - log p(x | b), paired; options as in `ScoreDensity.compare`."""

    @abstractmethod
    def fit(self: Self, data: Tensor, **options: Any) -> Self:
        """Fit reference and nodes to data of the user's space, in place; options as in `ScoreDensity.fit`."""

    @abstractmethod
    def with_reference(self: Self, reference: Reference | None) -> Self:
        """Return a density with the same network and another reference, which is one of z."""


def of_core(name: str) -> property:
    """Return a property of a density that is its core's."""
    return property(lambda density: getattr(density.core, name), doc=f"`{name}` of the `core`.")


def check_density(density: object) -> Density:
    """Return a density.

    Raises:
        TypeError: if it is none.
    """
    if isinstance(density, Density):
        return density
    remedy = "wrap the network in a ScoreDensity" if isinstance(density, nn.Module) else "give one"
    kinds = "a ScoreDensity, a Transformed one or a ZeroMeanDensity"
    raise TypeError(f"density must be {kinds}, got {type(density).__name__}; {remedy}")

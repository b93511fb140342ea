"""The map of a bayesflow Adapter, as a bijection of parameters: from the network's variables to the user's."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Transform, constraints

PARAMETERS = "inference_variables"
STEP = 0.1  # standard deviations by which a parameter is moved to see how the map stretches it
SPREAD = 64  # points at which a map is compared with the identity, up to 30 standard deviations away


class Parameters(Transform):
    """Columns of parameters as a user gives them, from what an adapter makes of them; its log-determinant is its own.

    The adapter computes in numpy, or without a graph, and so nothing here has a gradient.

    Attributes:
        columns: name of the parameter in each column.
        is_identity: whether the adapter leaves parameters as they are.

    Raises:
        ValueError: if the adapter has no inverse or log-determinant, changes the number of columns, or says another
            log-determinant than its map has.
    """

    bijective = True
    domain = codomain = constraints.independent(constraints.real, 1)

    def __init__(self, adapter: Any, width: int, standard: Transform) -> None:
        super().__init__()
        self.adapter = adapter
        generator = torch.Generator("cpu").manual_seed(0)
        far = (
            torch.randn(SPREAD, width, generator=generator, dtype=torch.float64, device="cpu")
            * torch.logspace(-1, 1, SPREAD, device="cpu")[:, None]
        )
        self.parts = self._parts_of(standard(far))
        self.columns = [name for name, size in self.parts.items() for _ in range(size)]
        self.is_identity = self._changes_nothing(standard(far))
        if not self.is_identity:
            self._compare_log_det(width, standard)

    def _parts_of(self, z: Tensor) -> dict[str, int]:
        """Return the number of columns of each parameter."""
        found = {name: _array(value) for name, value in self._inverted(z).items()}
        shapes = {name: value.shape for name, value in found.items()}
        if sum(s[-1] for s in shapes.values() if len(s) == 2) != z.shape[1] or any(
            len(s) != 2 for s in shapes.values()
        ):
            listed = ", ".join(f"{name} {shape[1:]}" for name, shape in shapes.items())
            raise ValueError(
                f"the adapter must give parameters in vectors of {z.shape[1]} numbers in all, got {listed}; give "
                "from_bayesflow the inference_network, whose density is that of what the adapter makes"
            )
        return {name: shape[1] for name, shape in shapes.items()}

    def _inverted(self, z: Tensor) -> dict[str, Any]:
        return self.adapter({PARAMETERS: z.detach().cpu().numpy()}, inverse=True, strict=False)

    def _call(self, z: Tensor) -> Tensor:
        found = self._inverted(z.reshape(-1, z.shape[-1]))
        joined = np.concatenate([_array(found[name]) for name in self.parts], axis=-1)
        return torch.as_tensor(joined, dtype=z.dtype, device=z.device).reshape(z.shape)

    def _inverse(self, x: Tensor) -> Tensor:
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                "the adapter's transforms have no gradient, and x asks for one; differentiate log_prob of "
                "from_bayesflow(approximator.inference_network) in the adapter's own variables"
            )
        return self._forward(x)[0]

    def log_abs_det_jacobian(self, z: Tensor, x: Tensor) -> Tensor:
        return -self._forward(x)[1]

    def _forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the adapter makes of parameters, and the log-determinant that it says, shape (B,)."""
        rows = x.detach().cpu().reshape(-1, x.shape[-1]).numpy()
        ends = np.cumsum(list(self.parts.values()))[:-1]
        data = dict(zip(self.parts, np.split(rows, ends, axis=1)))
        try:
            with np.errstate(all="ignore"):  # what has no image is NaN, and is told of as such
                adapted, log_det = self.adapter(data, strict=False, log_det_jac=True, stage="inference")
        except NotImplementedError as error:
            raise ValueError(
                f"the adapter must have a log-determinant, got a transform without ({error}); give from_bayesflow the "
                "inference_network, whose density is that of what the adapter makes"
            ) from error
        z = torch.as_tensor(_array(adapted[PARAMETERS]), dtype=x.dtype, device=x.device).reshape(x.shape)
        log_det = torch.as_tensor(
            _array(log_det.get(PARAMETERS, np.zeros(len(rows)))), dtype=torch.float64, device="cpu"
        )
        return z, log_det.to(x.device).expand(len(rows)).reshape(x.shape[:-1])

    def _changes_nothing(self, z: Tensor) -> bool:
        x = self._call(z)
        close = torch.allclose(x, z, rtol=1e-6, atol=1e-6 * float(z.std(0).min()))
        return close and bool((self._forward(x)[1] == 0).all())

    def _compare_log_det(self, width: int, standard: Transform) -> None:
        """Compare the log-determinant at the mean with that of differences, which a forgotten part of it fails."""
        unit = torch.eye(width, dtype=torch.float64, device="cpu")
        steps = torch.cat([unit, -unit]) * STEP
        centre = standard(torch.zeros(1, width, dtype=torch.float64, device="cpu"))
        x, z = self._call(standard(steps)), standard(steps)
        slopes = (x[:width] - x[width:]) / (z[:width] - z[width:]).diagonal()[:, None]
        measured = float(torch.linalg.slogdet(slopes)[1])
        said = -float(self._forward(self._call(centre.expand(2, -1)))[1][0])
        if not abs(measured - said) < 0.05 * (1 + width):
            raise ValueError(
                f"the adapter's log-determinant must be that of its map, got {-said:.4g} where differences give "
                f"{-measured:.4g}; transform parameters before they are joined, by transforms that have a log_det_jac"
            )


def _array(value: Any) -> np.ndarray:
    return value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)

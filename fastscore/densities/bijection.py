"""Whether a transform is what it says: its inverse undoes it, and its log-determinant is that of its own derivative.

A wrong one gives a log-density that is off by as many nats and looks like any other. torch's own transforms and those
of `fastscore.transforms` are believed; others are asked at one sample.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import Transform
from torch.distributions.transforms import _InverseTransform

BELIEVED = "torch.distributions", "fastscore"
SHARE = 0.01  # of the largest entry that a round trip may be off; nats an entry that a log-determinant may be
MOST = 64  # entries of which a whole Jacobian is taken


def believed(transform: Transform) -> bool:
    """Return whether a transform and all that it is made of belong to libraries that test them."""
    own = vars(transform)
    parts = [*own.get("parts", ()), *own.get("transforms", ())]
    if "base_transform" in own:
        parts.append(own["base_transform"])
    if isinstance(transform, _InverseTransform):  # by its class: zuko gives it another name
        parts.append(transform.inv)
    return type(transform).__module__.startswith(BELIEVED) and all(map(believed, parts))


@torch.no_grad()
def check_bijection(transform: Transform, z: Tensor, x: Tensor, log_det: Tensor) -> None:
    """Raise ValueError where z = T^-1(x) does not lead back to x, or log|det dx/dz| is not that of T's derivative.

    Arguments:
        z, x: one sample before and after the transform, float64, shape (1, *shape).
        log_det: as the transform says, of this sample, nats.
    """
    z, x = z.detach(), x.detach()
    off = float((transform(z) - x).abs().max())
    if off > SHARE * float(x.abs().max()):
        raise ValueError(
            f"the inverse of {transform} must undo it, got x that comes back {off:.3g} away, with entries up to "
            f"{float(x.abs().max()):.3g}; correct its _inverse, which makes z of x, or its _call"
        )
    found = _log_det(transform, z)
    stated = float(log_det.detach().sum())
    if found is not None and abs(found - stated) > SHARE * (1 + z.numel()) + 1e-3 * abs(found):
        raise ValueError(
            f"log_abs_det_jacobian of {transform} must be log|det dx/dz|, got {stated:.5g} nats for a sample of "
            f"{z.numel()} entries, where the derivative of the transform says {found:.5g}; correct it: a number for "
            "every entry where its domain has no event dimensions, else one a sample"
        )


def _log_det(transform: Transform, z: Tensor) -> float | None:
    """Return log|det dx/dz| at one sample by autograd; None where that does not tell."""
    elementwise = max(transform.domain.event_dim, transform.codomain.event_dim) == 0
    if not elementwise and z.numel() > MOST:
        return None
    try:
        with torch.enable_grad():
            if elementwise:
                given = z.clone().requires_grad_()
                (slope,) = torch.autograd.grad(transform(given).sum(), given)
                found = float(slope.abs().log().sum())
            else:
                jacobian = torch.autograd.functional.jacobian(transform, z).reshape(z.numel(), z.numel())
                found = float(torch.linalg.slogdet(jacobian).logabsdet)
    except RuntimeError:  # of a map that autograd does not follow
        return None
    return found if abs(found) < float("inf") else None

"""What may be wrong on a GPU: told when somebody reads a number, since every look for it would wait for the device."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ..reference.gaussians import Reference
from .curve import CurveSum
from .degenerate import are_far, warn_of_far
from .samples import Samples, refuse_not_finite


class Faults:
    """What may be wrong with an estimate whose numbers nobody has read yet.

    Arguments:
        samples: what was evaluated; let go once all has been found finite.
        value: log-density of every sample, shape (B,).
        curve_sum: sums of the integrand over the samples, which say at which log-SNR a fault arose.
        reference: of the density, which samples of another scale are far from.
    """

    def __init__(self, samples: Samples, value: Tensor, curve_sum: CurveSum, reference: Reference) -> None:
        self._open = [(samples, value, curve_sum, reference)]

    @classmethod
    def joined(cls, parts: Iterable[Faults | None]) -> Faults | None:
        """Return what may be wrong with any of some estimates, None where nothing may."""
        still = [each for part in parts if part is not None for each in part._open]
        if not still:
            return None
        joined = cls(*still[0])
        joined._open = still
        return joined

    def tell(self) -> None:
        """Raise ValueError if a number is not finite, with the first sample and the log-SNR; the first call waits.

        Samples that are far from the reference are warned of.
        """
        for samples, value, curve_sum, _ in self._open:
            _refuse(samples, value, curve_sum)
        told, self._open = self._open, []
        for samples, _, _, reference in told:
            if are_far(samples, reference):
                warn_of_far(samples, reference)


def _refuse(samples: Samples, value: Tensor, curve_sum: CurveSum) -> None:
    bad = ~torch.isfinite(value).cpu()
    if bool(bad.any()):
        refuse_not_finite(samples.x, samples.mask is not None)
        curve = curve_sum.curve()
        where = (~torch.isfinite(curve.mean)).nonzero().flatten()
        at = f" at log-SNR {float(curve.log_snr[where[0]]):.4g}" if len(where) else ""
        raise ValueError(
            f"the network returned NaN or inf for sample {int(samples.index[bad][0])}{at}, {int(bad.sum())} of "
            f"{len(bad)} samples in this call; check its weights and the data, use a wider dtype than half, or narrow "
            "the schedule's range"
        )

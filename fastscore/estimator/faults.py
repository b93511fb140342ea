"""NaN and inf on a GPU: told when somebody reads a number, since every look for them would wait for the device."""

from __future__ import annotations

import torch
from torch import Tensor

from .curve import CurveSum
from .samples import Samples, refuse_not_finite


class Faults:
    """What may be wrong with an estimate whose numbers nobody has read yet.

    Arguments:
        samples: what was evaluated; let go once all has been found finite.
        value: log-density of every sample, shape (B,).
        curve_sum: sums of the integrand over the samples, which say at which log-SNR a fault arose.
    """

    def __init__(self, samples: Samples, value: Tensor, curve_sum: CurveSum):
        self._open: tuple[Samples, Tensor, CurveSum] | None = (samples, value, curve_sum)

    def tell(self) -> None:
        """Raise ValueError if a number is not finite, with the first sample and the log-SNR; the first call waits."""
        if self._open is None:
            return
        samples, value, curve_sum = self._open
        bad = ~torch.isfinite(value).cpu()
        if not bool(bad.any()):
            self._open = None
            return
        refuse_not_finite(samples.x, samples.mask is not None)
        curve = curve_sum.curve()
        where = (~torch.isfinite(curve.mean)).nonzero().flatten()
        at = f" at log-SNR {float(curve.log_snr[where[0]]):.4g}" if len(where) else ""
        raise ValueError(
            f"the network returned NaN or inf for sample {int(samples.index[bad][0])}{at}, {int(bad.sum())} of "
            f"{len(bad)} samples in this call; check its weights, use a wider dtype than half, or narrow the "
            "schedule's range"
        )

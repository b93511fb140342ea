r"""The continuous process through a table of timesteps, for what asks between its entries: the ODE.

Log-SNR is interpolated over the timestep by the monotone cubic of Fritsch and Carlson: with differences
:math:`\delta_i = \lambda_{i+1} - \lambda_i < 0`, the slope at an entry is the harmonic mean
:math:`2 \delta_{i-1} \delta_i / (\delta_{i-1} + \delta_i)`. So it passes through every entry, falls strictly, and has a
continuous derivative. Solvers of trained networks have always asked between timesteps in this way (DPM-Solver, with
straight lines); whether a network answers there is another question (`fastscore.densities.between_timesteps`).

References:
    Monotone Piecewise Cubic Interpolation (Fritsch and Carlson, 1980), https://doi.org/10.1137/0717021
    DPM-Solver (Lu et al., 2022), https://arxiv.org/abs/2206.00927
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..support.host import as_float64
from .ddpm import DDPM
from .schedules import Schedule

HALVINGS = 53  # of a cell, to the last bit of float64


class ContinuousDDPM(Schedule):
    """A table's process at fractional timesteps, t in [0, T - 1], variance-preserving.

    Arguments:
        table: the schedule to go through.

    Raises:
        TypeError: if it is no `DDPM`.

    Example:
        >>> ScoreDensity(model, ContinuousDDPM(DDPM.linear(1000)), "eps")  # model takes t = 12.5
    """

    def __init__(self, table: DDPM) -> None:
        if not isinstance(table, DDPM):
            raise TypeError(f"table must be a DDPM such as DDPM.linear(1000), got {type(table).__name__}")
        self.table, self.time_range = table.entries(), table.time_range
        self.slope = _monotone_slopes(self.table.diff())

    def log_snr(self, t: Tensor) -> Tensor:
        t = as_float64(t)
        last = len(self.table) - 1
        if t.numel() and not bool(((t >= 0) & (t <= last)).all()):
            raise ValueError(f"{self!r} knows timesteps from 0 to {last}, got {float(t.min())} to {float(t.max())}")
        cell = t.detach().floor().clamp(max=last - 1).long()
        return self._in_cell(cell, t - cell)

    def time(self, log_snr: Tensor) -> Tensor:
        log_snr = as_float64(log_snr)
        flat = log_snr.detach().reshape(-1).cpu()
        below = torch.searchsorted(self.table.flip(0).contiguous(), flat)  # entries with a lower log-SNR
        cell = (len(self.table) - 1 - below).clamp(0, len(self.table) - 2)
        u = torch.zeros_like(flat)
        for power in range(1, HALVINGS + 1):
            step = u + 0.5**power
            u = torch.where(self._in_cell(cell, step) >= flat, step, u)
        u = torch.where(flat >= self.table[cell], 0.0, torch.where(flat <= self.table[cell + 1], 1.0, u))  # entries
        return (cell + u).reshape(log_snr.shape).to(log_snr.device)

    def range_for(self, smallest: float, largest: float) -> tuple[float, float]:
        # As the table's own, or as its ends were set: the network knows no other.
        clean, noisy = (self._entry(t) for t in self.time_range)
        return noisy, clean

    def _entry(self, t: float) -> float:
        """Return the log-SNR at a time, to the bit that of the table's entry where it is one."""
        return float(self.table[int(t)]) if t == int(t) else float(self.log_snr(t))

    def _in_cell(self, cell: Tensor, u: Tensor) -> Tensor:
        """Return the cubic between entries cell and cell + 1 at a share u of the way."""
        table, slope = self.table.to(u.device), self.slope.to(u.device)
        first, last, at_first, at_last = table[cell], table[cell + 1], slope[cell], slope[cell + 1]
        rise = last - first
        return first + u * (at_first + u * (3 * rise - 2 * at_first - at_last + u * (at_first + at_last - 2 * rise)))

    def __repr__(self) -> str:
        lo, hi = self.log_snr_range
        return f"ContinuousDDPM({len(self.table)} timesteps, log-SNR {lo:.2f} to {hi:.2f})"


def _monotone_slopes(rise: Tensor) -> Tensor:
    """Return the slope at each entry from the differences of all, which have one sign."""
    inner = 2 * rise[:-1] * rise[1:] / (rise[:-1] + rise[1:])
    if len(rise) == 1:
        return rise.repeat(2)
    ends = torch.stack([1.5 * rise[0] - 0.5 * rise[1], 1.5 * rise[-1] - 0.5 * rise[-2]])
    near = rise[[0, -1]]
    share = (ends / near).clamp(0, 3)  # of the cell's own difference: no bend back, none that overshoots
    return torch.cat([share[:1] * near[:1], inner, share[1:] * near[1:]])

"""The process of a table of timesteps, as DDPM has it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..support.host import as_float64, as_tensor, finite, numbers, whole
from .schedules import Schedule, require

MOST_STEPS = 1 << 24


class DDPM(Schedule):
    r"""A table of timesteps 0 .. T-1 with cumulative products :math:`\bar\alpha_t`, variance-preserving.

    The network is called with the integer timestep and evaluated nowhere between the table's entries.

    Arguments:
        alphas_cumprod: the table, shape (T,), strictly decreasing, inside (0, 1).

    Raises:
        ValueError: if the table is not one-dimensional, not strictly decreasing, or leaves (0, 1).

    References:
        Denoising Diffusion Probabilistic Models (Ho et al., 2020), https://arxiv.org/abs/2006.11239
    """

    discrete = True

    def __init__(self, alphas_cumprod: Tensor) -> None:
        table = numbers("alphas_cumprod", alphas_cumprod, "a table of timesteps, shape (T,)").detach().cpu().clone()
        require(
            table.ndim == 1 and len(table) >= 2,
            f"DDPM needs a table of at least 2 timesteps, shape (T,), got shape {tuple(table.shape)}",
        )
        inside = bool(((table > 0) & (table < 1)).all())
        require(
            inside,
            f"DDPM needs alphas_cumprod inside (0, 1), got values from {float(table.min())} to {float(table.max())}",
        )
        rises = (table.diff() >= 0).nonzero()
        if len(rises):
            i = int(rises[0])
            raise ValueError(
                f"DDPM needs a strictly decreasing alphas_cumprod, got {float(table[i]):.6g} then "
                f"{float(table[i + 1]):.6g} at timesteps {i}, {i + 1}; if the table starts at the noise, flip it"
            )
        self.table = torch.logit(table)  # log-SNR of each timestep, decreasing

    @property
    def time_range(self) -> tuple[float, float]:
        return 0, len(self.table) - 1

    @time_range.setter
    def time_range(self, ends: tuple[float, float]) -> None:
        raise ValueError(
            f"the range of a table is all of its timesteps, 0 to {len(self.table) - 1}, got time_range {ends!r}; give "
            "ContinuousDDPM(table) other ends if the network takes real times"
        )

    @classmethod
    def from_betas(cls, betas: Tensor) -> DDPM:
        """Build the table from the variances beta_t, shape (T,)."""
        betas = numbers("betas", betas, "the variances of the timesteps, shape (T,)")
        require(betas.ndim == 1, f"betas must have the shape (T,), got {tuple(betas.shape)}")
        return cls(torch.cumprod(1 - betas, 0))

    @classmethod
    def linear(cls, steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> DDPM:
        """Return the table with beta linear in t, the choice of DDPM."""
        return cls.from_betas(torch.linspace(*_betas(beta_start, beta_end, steps), dtype=torch.float64, device="cpu"))

    @classmethod
    def scaled_linear(cls, steps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012) -> DDPM:
        """sqrt(beta) linear in t, the choice of latent diffusion."""
        start, end, steps = _betas(beta_start, beta_end, steps)
        root = torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64, device="cpu")
        return cls.from_betas(root**2)

    @classmethod
    def cosine(cls, steps: int = 1000, shift: float = 0.008, max_beta: float = 0.999) -> DDPM:
        """The cosine table of Improved DDPM (Nichol and Dhariwal, 2021), https://arxiv.org/abs/2102.09672."""
        shift, max_beta = finite("shift of DDPM", shift), finite("max_beta of DDPM", max_beta)
        t = torch.linspace(0, 1, _steps(steps) + 1, dtype=torch.float64, device="cpu")
        bar = torch.cos((t + shift) / (1 + shift) * math.pi / 2) ** 2
        return cls.from_betas((1 - bar[1:] / bar[:-1]).clamp(max=max_beta))

    def log_snr(self, t: Tensor) -> Tensor:
        t = as_tensor(t)
        index = t.cpu()
        if index.is_floating_point() and bool((index != index.round()).any()):
            raise ValueError(f"{self!r} knows only whole timesteps, got a fraction between them; round it first")
        index = index.long()
        if index.numel() and (int(index.min()) < 0 or int(index.max()) >= len(self.table)):
            raise ValueError(
                f"{self!r} knows timesteps 0 to {len(self.table) - 1}, got {int(index.min())} to {int(index.max())}"
            )
        return self.entries()[index].to(t.device)

    def entries(self) -> Tensor:
        """Return the table; raise ValueError where it was given another dtype, in which entries run together."""
        require(
            self.table.dtype == torch.float64,
            f"the table of DDPM must stay float64, got {self.table.dtype}; build the schedule anew and leave it out of "
            "what is cast",
        )
        return self.table

    def time(self, log_snr: Tensor) -> Tensor:
        """Return the nearest timestep, int64."""
        rising = self.entries().flip(0).contiguous()
        middles = (rising[1:] + rising[:-1]) / 2
        log_snr = as_float64(log_snr)
        return (len(rising) - 1 - torch.searchsorted(middles, log_snr.cpu().contiguous())).to(log_snr.device)

    def range_for(self, smallest: float, largest: float) -> tuple[float, float]:
        # The whole table counts, and nothing but it: a discrete network has no other nodes to offer.
        return float(self.table[-1]), float(self.table[0])

    def __repr__(self) -> str:
        lo, hi = self.log_snr_range
        return f"DDPM({len(self.table)} timesteps, log-SNR {lo:.2f} to {hi:.2f})"


def _steps(steps: object) -> int:
    steps = whole("steps of DDPM", steps)
    require(steps >= 2, f"DDPM needs at least 2 timesteps, got steps={steps}")
    require(steps <= MOST_STEPS, f"DDPM needs at most {MOST_STEPS} timesteps, got one of {len(str(steps))} digits")
    return steps


def _betas(start: object, end: object, steps: object) -> tuple[float, float, int]:
    start, end = finite("beta_start of DDPM", start), finite("beta_end of DDPM", end)
    require(min(start, end) > 0, f"DDPM needs beta_start and beta_end above 0, got {start:g}, {end:g}")
    return start, end, _steps(steps)

r"""Ways to the log-density of images, each as a function of samples, evaluations and a seed.

The plain formula in the form that most code has, Variational Diffusion Models' continuous bound

.. math:: \log q(x) - \tfrac12 \int_{lo}^{hi} \big(E\|\epsilon - \hat\epsilon\|^2 - E\|\epsilon - \epsilon_q\|^2\big)
    \, d\lambda, \qquad q = N(0, I)

with the known second term in closed form, so that all noise is the network's; what differs is where the log-SNRs lie.

- "low-discrepancy times": one uniform shift of n equidistant log-SNRs a sample (VDM, appendix I.1);
- "learned schedule": the same in a time whose variance is the least, which is what VDM trains its schedule for:
  log-SNRs as dense as the integrand's standard deviation, which a pilot measures on training patches;
- "importance-sampled times": independent log-SNRs, uniform, which are Song et al.'s weights for the likelihood;
- "all timesteps": DDPM's sum over a table of n timesteps, once each, as improved-diffusion's evaluation loop.

References:
    Variational Diffusion Models (Kingma et al., 2021), https://arxiv.org/abs/2107.00630
    Maximum Likelihood Training of Score-Based Diffusion Models (Song et al., 2021), https://arxiv.org/abs/2101.09258
    Improved Denoising Diffusion Probabilistic Models (Nichol and Dhariwal, 2021), https://arxiv.org/abs/2102.09672
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import image_ode
import torch
from image_networks import PREDICTS, SCHEDULE, ImageNetwork
from peers import Outcome
from torch import Tensor

import fastscore as fs

ROWS = 256  # of the network at once
FIT_EVALUATIONS = 40_000  # reference and nodes; noise stays independent
PILOT_BINS, PILOT_SAMPLES, PILOT_DRAWS = 25, 48, 8

# n -> log-SNRs and their weights in an integral over a range
Rule = Callable[[int, torch.Generator], tuple[Tensor, Tensor, tuple[float, float]]]
RANGE = SCHEDULE.lo, SCHEDULE.hi


class Method(NamedTuple):
    """One way to log p(x).

    Attributes:
        name: as the table says it.
        run: of (x, evaluations per sample, seed).
        evaluations: to try; 0 where the method chooses them.
    """

    name: str
    run: Callable[[Tensor, int, int], Outcome]
    evaluations: tuple[int, ...]


class Ways:
    """All ways for one network, with the densities that they need.

    Arguments:
        training: dequantized patches (N, 3, size, size) of the training photographs.
    """

    def __init__(self, network: ImageNetwork, training: Tensor) -> None:
        self.network, self.plain = network, Plain(network, training)
        self.unfitted = fs.ScoreDensity(network, SCHEDULE, PREDICTS)
        self.fitted = fs.ScoreDensity(network, SCHEDULE, PREDICTS)
        self.fitted.fit(training, reference="images", evaluations=FIT_EVALUATIONS, progress=False)

    def methods(self, evaluations: tuple[int, ...], most: int | None = None) -> list[Method]:
        """Return all ways; those of which a limit is of interest have `most` evaluations too."""
        more = evaluations if most is None else (*evaluations, most)
        plain, alone, own = self.plain, {"control": "reference"}, {"control": "self"}
        return [
            *(Method(f"ODE, {name}", _solved(make(self.network)), (0,)) for name, make in image_ode.LIBRARIES.items()),
            Method("plain, all timesteps", plain.method(all_timesteps), (1000,)),
            Method("plain, importance-sampled times", plain.method(independent), evaluations),
            Method("plain, low-discrepancy times", plain.method(low_discrepancy), more),
            Method("plain, learned schedule", plain.method(plain.learned), more),
            Method("fastscore, unfitted", _estimated(self.unfitted, **alone), evaluations),
            Method("fastscore, fitted", _estimated(self.fitted, **alone), evaluations),
            Method("fastscore, self, unfitted", _estimated(self.unfitted, **own), more),
            Method("fastscore, self, fitted", _estimated(self.fitted, **own), more),
        ]


def _estimated(density: fs.ScoreDensity, **options: str) -> Callable[[Tensor, int, int], Outcome]:
    def run(x: Tensor, nfe: int, seed: int) -> Outcome:
        found = density.estimate(x, nfe=nfe, seed=seed, progress=False, **options)
        return Outcome(found.log_prob.double(), float(found.nfe.double().mean()))

    return run


def _solved(likelihood: image_ode.Likelihood) -> Callable[[Tensor, int, int], Outcome]:
    return lambda x, _, seed: Outcome(*likelihood(x, seed))


def low_discrepancy(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor, tuple[float, float]]:
    lo, hi = RANGE
    u = (torch.arange(n) + torch.rand((), generator=generator, dtype=torch.float64)) / n
    return lo + (hi - lo) * u, torch.full((n,), (hi - lo) / n, dtype=torch.float64), RANGE


def independent(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor, tuple[float, float]]:
    lo, hi = RANGE
    u = torch.rand(n, generator=generator, dtype=torch.float64)
    return lo + (hi - lo) * u, torch.full((n,), (hi - lo) / n, dtype=torch.float64), RANGE


def all_timesteps(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor, tuple[float, float]]:
    """Return a cosine table's log-SNRs, with the weights SNR(t - 1) / SNR(t) - 1 of the bound (VDM, equation 14).

    The sum goes as far as the table does; beyond its first timestep a decoder would stand, and here q does.
    """
    log_snr = fs.DDPM.cosine(n).log_snr(torch.arange(n)).flip(0).clamp(*RANGE)
    return log_snr[:-1], torch.expm1(log_snr.diff()), (float(log_snr[0]), float(log_snr[-1]))


class Plain:
    """The plain formula of a network, sample by sample.

    Arguments:
        training: patches of a pilot, which measures where the integrand varies.
    """

    def __init__(self, network: ImageNetwork, training: Tensor) -> None:
        self.network = network
        self.edges = torch.linspace(SCHEDULE.lo, SCHEDULE.hi, PILOT_BINS + 1, dtype=torch.float64)
        log_snr = ((self.edges[1:] + self.edges[:-1]) / 2).repeat(PILOT_DRAWS)
        generator = torch.Generator().manual_seed(1)
        f = torch.stack([self.residuals(x, log_snr, generator) for x in training[:PILOT_SAMPLES]])
        self.deviation = f.reshape(len(f), PILOT_DRAWS, PILOT_BINS).var(1).mean(0).sqrt()

    def learned(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor, tuple[float, float]]:
        """Log-SNRs as dense as the integrand's standard deviation, of which each bin has at least 3 % of the mean."""
        mass = self.deviation + 0.03 * self.deviation.mean()
        cumulative = torch.cat([mass.new_zeros(1), mass.cumsum(0)]) / mass.sum()
        u = (torch.arange(n) + torch.rand((), generator=generator, dtype=torch.float64)) / n
        k = (torch.searchsorted(cumulative, u, right=True) - 1).clamp(0, PILOT_BINS - 1)
        width, share = self.edges.diff()[k], cumulative.diff()[k]
        return self.edges[k] + (u - cumulative[k]) / share * width, width / share / n, RANGE

    def method(self, rule: Rule) -> Callable[[Tensor, int, int], Outcome]:
        """Return log p(x) by a rule that places the log-SNRs of every sample anew."""

        def run(x: Tensor, nfe: int, seed: int) -> Outcome:
            found, generator = [], torch.Generator().manual_seed(seed)
            for each in x:
                log_snr, weight, span = rule(nfe, generator)
                found.append(-0.5 * (weight @ self.residuals(each, log_snr, generator)))
            return Outcome(torch.stack(found) + known(x, *span), len(log_snr))

        return run

    def residuals(self, x: Tensor, log_snr: Tensor, generator: torch.Generator) -> Tensor:
        """Return the squared error of the noise of one sample at log-SNRs (n,), float64, (n,)."""
        found = []
        for part in log_snr.split(ROWS):
            alpha, sigma = (v.to(x)[:, None, None, None] for v in SCHEDULE.scale(part))
            eps = torch.randn(len(part), *x.shape, generator=generator)
            x_t = alpha * x + sigma * eps
            with torch.inference_mode():
                v = self.network(x_t, part.to(x))
            found.append((eps - alpha * v - sigma * x_t).square().flatten(1).sum(1))
        return torch.cat(found).double()


def known(x: Tensor, lo: float, hi: float) -> Tensor:
    r"""Return :math:`\log q(x) + \tfrac12 \int E\|\epsilon-\epsilon_q\|^2 d\lambda` of q = N(0, I), float64, (B,).

    With a = sigmoid of the log-SNR, the expectation is :math:`a^2 d + a (1 - a) \|x\|^2`; the integral of a - a (1 - a)
    is that of a, softplus, less a itself.
    """
    norm, d = x.double().square().flatten(1).sum(1), x[0].numel()
    ends = torch.tensor([lo, hi], dtype=torch.float64)
    rise, area = float(ends.sigmoid().diff()), float(torch.nn.functional.softplus(ends).diff())
    return -0.5 * (d * math.log(2 * math.pi) + norm) + 0.5 * (d * (area - rise) + norm * rise)

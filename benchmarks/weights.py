r"""Li and Yan's discrete coefficients beside DDPM's, and both sums beside the exact integral: docs/weights.md.

    python benchmarks/weights.py   # writes the tables into docs/weights.md

Everything is exact up to quadrature on a line. For data with mean square error mmse(s) at signal-to-noise ratio s the
exact network has E|eps - eps_hat|^2 = s mmse(s), and for a Gaussian mixture in one dimension

.. math:: \mathrm{mmse}(s) = \int \mathrm{Var}(x \,|\, y)\, p(y)\, dy, \qquad y = \sqrt s\, x + \epsilon

is one sum over a grid, as is the negative entropy, which is the mean of log p that all sums aim at.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import fastscore as fs
from fastscore.training.weights import density_weights, elbo_weights

PAGE = Path(__file__).parent.parent / "docs" / "weights.md"
CELLS = 10  # of a quadrature, in a standard deviation: the trapezoid rule is then exact to rounding
REACH = 12.0  # standard deviations that a grid reaches beyond the outermost mean
EXACT = 1e-8  # nats; below it a table says 0
LENGTHS = (1000, 250, 100, 50, 25, 10)
SHOWN = (1, 2, 10, 100, 250, 500, 750, 900, 990, 1000)  # the paper's t, from 1


@dataclass(frozen=True)
class Line:
    """A Gaussian mixture on a line: weights, means, and one standard deviation for all; float64."""

    weight: Tensor
    mean: Tensor
    std: float

    @classmethod
    def of(cls, weight: list[float], mean: list[float], std: float) -> Line:
        return cls(torch.tensor(weight, dtype=torch.float64), torch.tensor(mean, dtype=torch.float64), std)

    @property
    def second_moment(self) -> float:
        return float(self.weight @ self.mean.square()) + self.std**2

    def residual(self, log_snr: Tensor) -> Tensor:
        """Return E|eps - eps_hat|^2 = s mmse(s) of the exact network, shape of log_snr (S,)."""
        s = log_snr.exp()[:, None, None]
        y, cell, spread = self._grid(s.sqrt(), (s * self.std**2 + 1).sqrt())
        z = y - s.sqrt() * self.mean  # (S, grid, components)
        log_joint = self.weight.log() - 0.5 * (z / spread) ** 2
        posterior = log_joint.softmax(2)
        mean = self.mean + s.sqrt() * (self.std / spread) ** 2 * z  # of x given y and the component
        # The posterior's own variance: no difference of large numbers at high s.
        x_hat = (posterior * mean).sum(2, keepdim=True)
        variance = (self.std / spread[..., 0]) ** 2 + (posterior * (mean - x_hat) ** 2).sum(2)
        density = torch.logsumexp(log_joint, 2).exp() / (math.sqrt(2 * math.pi) * spread[..., 0])
        return log_snr.exp() * (density * variance).sum(1) * cell

    def negative_entropy(self) -> float:
        """Return the mean of log p over the data, nats."""
        one = torch.ones(1, 1, 1, dtype=torch.float64)
        x, cell, std = self._grid(one, self.std * one)
        norm = self.weight.log() - math.log(self.std * math.sqrt(2 * math.pi))
        log_p = torch.logsumexp(norm - 0.5 * ((x - self.mean) / std) ** 2, 2)
        return float((log_p.exp() * log_p).sum() * cell)

    def _grid(self, scale: Tensor, spread: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return points (S, grid, 1), their distance (S,) and the spread, for components at scale x mean."""
        lo = scale * self.mean.min() - REACH * spread
        width = scale * (self.mean.max() - self.mean.min()) + 2 * REACH * spread
        cells = math.ceil(float((width / spread).max()) * CELLS)
        return (
            lo + width * torch.linspace(0, 1, cells + 1, dtype=torch.float64)[:, None],
            width[:, 0, 0] / cells,
            spread,
        )


TARGETS = {
    "N(0, 1)": Line.of([1.0], [0.0], 1.0),
    "N(0, 0.1²)": Line.of([1.0], [0.0], 0.1),
    "three peaks of 0.1": Line.of([0.5, 0.3, 0.2], [-1.0, 0.4, 1.5], 0.1),
}


def schedules(length: int) -> dict[str, fs.DDPM]:
    """Return DDPM's linear table of 1,000 steps, respaced to a length, and the cosine table of that length."""
    linear = torch.sigmoid(fs.DDPM.linear(1000).table)
    kept = torch.linspace(0, 999, length, dtype=torch.float64).round().long()
    return {"linear": fs.DDPM(linear[kept]), "cosine": fs.DDPM.cosine(length)}


def weight_difference(schedule: fs.DDPM) -> tuple[Tensor, Tensor, Tensor]:
    """Return both weights of every timestep (of the squared error of eps, nats), and their relative difference."""
    t = torch.arange(len(schedule.table))
    density, elbo = density_weights(schedule, t, "eps"), elbo_weights(schedule, t, "eps")
    return density, elbo, density / elbo - 1


def mean_log_prob(schedule: fs.DDPM, target: Line) -> dict[str, float]:
    """Return each sum's mean of log p over the data with the exact network, nats."""
    t, table = torch.arange(len(schedule.table)), schedule.table
    f, m2 = target.residual(table), target.second_moment
    sigma2 = torch.sigmoid(-table)
    first, last = float(sigma2[0]), float(sigma2[-1])
    prior = 0.5 * ((1 - last) * m2 + last - 1 - math.log(last))
    # The trapezoid rule sums the difference to q = N(0, 1), whose mean residual is known.
    f_q = (1 - sigma2).square() + sigma2 * (1 - sigma2) * m2
    return {
        "paper": -0.5 * (1 + math.log(2 * math.pi * first)) - float(density_weights(schedule, t, "eps") @ f),
        "DDPM": -0.5 * math.log(2 * math.pi * first) - prior - float(elbo_weights(schedule, t, "eps") @ f),
        "trapezoid": -0.5 * (math.log(2 * math.pi) + m2)
        - float(density_weights(schedule, t, "eps", rule="density") @ (f - f_q)),
    }


def weights_table() -> str:
    """Return both coefficients at some timesteps of the two tables of 1,000 steps."""
    rows = []
    for name, schedule in schedules(1000).items():
        density, elbo, relative = weight_difference(schedule)
        for t in SHOWN:
            i = t - 1
            cells = (f"{float(schedule.table[i]):.2f}", f"{float(density[i]):.4g}", f"{float(elbo[i]):.4g}")
            rows.append((name, str(t), *cells, f"{float(relative[i]):+.2%}"))
    return _markdown(("schedule", "t", "log-SNR", "paper's w_t", "DDPM's w_t", "paper / DDPM - 1"), rows)


def errors_table() -> str:
    """Return every sum's error against the exact mean of log p, for all schedules, lengths and targets."""
    rows = []
    for name in schedules(10):
        for length in LENGTHS:
            schedule = schedules(length)[name]
            _, _, relative = weight_difference(schedule)
            middle = float(relative[1:-1].abs().median())  # the ends have weights of their own kind
            for label, target in TARGETS.items():
                found, exact = mean_log_prob(schedule, target), target.negative_entropy()
                errors = {method: value - exact for method, value in found.items()}
                gap = found["paper"] - found["DDPM"]
                cells = (f"{v:+.2e}" if abs(v) > EXACT else "0" for v in (*errors.values(), gap))
                rows.append((name, str(length), f"{middle:.2%}", label, *cells))
    titles = ("schedule", "T", "median difference of weights", "data", "paper", "DDPM", "trapezoid", "paper - DDPM")
    return _markdown(titles, rows)


def regenerate(text: str) -> str:
    """Return a page's text with the tables between its markers made anew."""
    for name, make in (("weights", weights_table), ("errors", errors_table)):
        head, rest = text.split(f"<!-- table: {name} -->\n")
        _, tail = rest.split("<!-- end -->", 1)
        text = f"{head}<!-- table: {name} -->\n{make()}\n<!-- end -->{tail}"
    return text


def _markdown(titles: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (titles, ("---",) * len(titles), *rows))


if __name__ == "__main__":
    PAGE.write_text(regenerate(PAGE.read_text()))

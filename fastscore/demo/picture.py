"""The picture of the demonstration: densities, integrands with error bands, and the likeliest digits."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
import numpy as np
import torch

from ..density import ScoreDensity
from ..estimator.estimate import Curve
from ..reference.gaussians import Reference
from .problems import Problem

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GRID = 110
GRID_NFE = 64
LOWEST = -8.0  # nats; what lies below is drawn in the colour of the lowest
BAND_BINS = 40
NAMES = ("highest", "median", "lowest")
COLOURS = {"N(0, 1) as reference": "#c4692b", "fitted reference": "#20639b"}


def draw(path: Path, moons: tuple[Problem, ScoreDensity], digits: tuple[Problem, ScoreDensity]) -> None:
    """Write the picture to a file."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(12.5, 7.6), layout="constrained")
    _draw_moons(figure, axes[0], *moons)
    _draw_integrand(axes[1, 0], "two moons: integrand and its 95 % band", *moons)
    _draw_integrand(axes[1, 1], "digits: integrand and its 95 % band", *digits)
    _draw_digits(axes[1, 2], *digits)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_moons(figure: Figure, axes: np.ndarray, problem: Problem, density: ScoreDensity) -> None:
    side_x, side_y = torch.linspace(-1.6, 2.6, GRID), torch.linspace(-1.1, 1.6, GRID)
    points = torch.cartesian_prod(side_y, side_x).flip(1)
    found = density.estimate(points, nfe=GRID_NFE).log_prob
    images = {
        "log-density of the network (fastscore)": found,
        "log-density of the data (exact)": problem.exact(points),
    }
    axes[0].scatter(*problem.test.T.numpy(), s=4, color="#333333", linewidths=0)
    axes[0].set(xlim=(-1.6, 2.6), ylim=(-1.1, 1.6), title=f"{problem.name}: {len(problem.test)} held-out samples")
    for ax, (title, values) in zip(axes[1:], images.items()):
        shown = values.reshape(GRID, GRID).clamp(min=LOWEST)
        image = ax.imshow(shown.numpy(), origin="lower", extent=(-1.6, 2.6, -1.1, 1.6), vmin=LOWEST, vmax=0.5)
        ax.set_title(title)
    for ax in axes:
        ax.set_aspect("equal")
    figure.colorbar(image, ax=list(axes[1:]), label="nats", shrink=0.8)


def _draw_integrand(ax: Axes, title: str, problem: Problem, density: ScoreDensity) -> None:
    plain = density.with_reference(Reference.isotropic())
    for (label, colour), which in zip(COLOURS.items(), (plain, density)):
        found = which.estimate(problem.test, nfe=256)
        at, mean, error = _binned(found.log_snr_curve)
        ax.fill_between(at, mean - 1.96 * error, mean + 1.96 * error, color=colour, alpha=0.35, linewidth=0)
        ax.plot(at, mean, color=colour, linewidth=1.2, label=label)
    ax.axhline(0, color="#999999", linewidth=0.6)
    ax.set(title=title, xlabel="log-SNR", ylabel="integrand, nats per unit of log-SNR")
    ax.set_ylim(top=1.25 * ax.get_ylim()[1])  # room for the legend
    ax.legend(frameon=False, loc="upper right", fontsize="small")


def _binned(curve: Curve) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Average neighbouring draws; every one has its own noise, so their errors are independent."""
    parts = [torch.tensor_split(part, BAND_BINS) for part in curve]
    at, mean = (torch.stack([p.mean() for p in part]) for part in parts[:2])
    error = torch.stack([p.square().sum().sqrt() / len(p) for p in parts[2]])
    return at.numpy(), mean.numpy(), error.numpy()


def _draw_digits(ax: Axes, problem: Problem, density: ScoreDensity) -> None:
    found = density.estimate(problem.test, nfe=256)
    order = found.log_prob.argsort(descending=True)
    rows = [order[:5], order[len(order) // 2 - 2 : len(order) // 2 + 3], order[-5:]]
    tiles = [torch.cat(list(problem.test[row].reshape(-1, 8, 8)), 1) for row in rows]
    ax.imshow(torch.cat(tiles).numpy(), cmap="gray_r", vmin=-1, vmax=1)
    for edge in range(8, 40, 8):
        ax.axvline(edge - 0.5, color="#c4692b", linewidth=1.5)
    for edge in (8, 16):
        ax.axhline(edge - 0.5, color="#c4692b", linewidth=1.5)
    names = [f"{name}\n{float(found.log_prob[row].mean()):.0f} nats" for name, row in zip(NAMES, rows)]
    ax.set_yticks([3.5, 11.5, 19.5], names)
    ax.set_xticks([])
    ax.set_title("held-out digits in the order of their density")

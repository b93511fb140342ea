"""docs/images.png: error against evaluations and time, where the variance is, and patches by bits per dimension."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from photographs import HELD_OUT, patches
from pictures import FASTSCORE, ODE, PEER, PLAIN

NETWORK = "unet, 32 x 32 x 3"
STYLES = {
    "plain, all timesteps": (PLAIN, ""),
    "plain, importance-sampled times": (PLAIN, ":"),
    "plain, low-discrepancy times": (PLAIN, "--"),
    "plain, learned schedule": (PLAIN, "-"),
    "fastscore, unfitted": (ODE, "--"),
    "fastscore, fitted": (ODE, "-"),
    "fastscore, self, unfitted": (FASTSCORE, "--"),
    "fastscore, self, fitted": (FASTSCORE, "-"),
}
SHOWN = 12  # patches at either end


def images(rows: list[dict], variance: list[dict], ranked: list[dict]) -> Figure:
    """Four panels for the U-Net on 32 x 32 pixels."""
    figure = Figure(figsize=(13, 7.2), layout="constrained")
    grid = figure.add_gridspec(2, 3, height_ratios=(2.2, 1))
    evaluations, seconds, place = (figure.add_subplot(grid[0, k]) for k in range(3))
    for name, (colour, line) in STYLES.items():
        own = [row for row in rows if (row["network"], row["method"]) == (NETWORK, name)]
        error = [(row["variance x evaluations"] / row["evaluations"]) ** 0.5 for row in own]
        style = {"color": colour, "linestyle": line, "marker": "." if line else "s", "label": name}
        evaluations.plot([row["evaluations"] for row in own], error, **style)
        seconds.plot([row["ms a sample"] / 1000 for row in own], error, **style)
        for row in variance:
            if (row["network"], row["method"]) == (NETWORK, name):
                density = [value or np.nan for value in row["density"]]  # no draw was there
                place.plot(row["log-SNR"], density, color=colour, linestyle=line)
    for row in (row for row in rows if row["network"] == NETWORK and row["method"].startswith("ODE")):
        error = (row["variance x evaluations"] / row["evaluations"]) ** 0.5
        mark = {
            "color": PEER,
            "marker": "^" if "flow" in row["method"] else "v",
            "linestyle": "",
            "label": row["method"],
        }
        evaluations.plot(row["evaluations"], error, **mark)
        seconds.plot(row["ms a sample"] / 1000, error, **mark)
    evaluations.set(xscale="log", yscale="log", xlabel="evaluations per sample", ylabel="standard deviation, nats")
    seconds.set(xscale="log", yscale="log", xlabel="seconds per sample, one thread", ylabel="standard deviation, nats")
    place.set(yscale="log", xlabel="log-SNR", ylabel="nats² per unit of log-SNR", title="variance x 256 evaluations")
    evaluations.set_title(NETWORK)
    for ax in (evaluations, seconds, place):
        ax.grid(alpha=0.25)
    figure.legend(*evaluations.get_legend_handles_labels(), loc="outside upper center", ncols=5, frameon=False)
    _rank(figure.add_subplot(grid[1, :]), next(row for row in ranked if row["network"] == NETWORK))
    return figure


def _rank(ax, row: dict) -> None:
    """Show the patches with the fewest bits per dimension and those with the most, ascending."""
    bits, size = np.array(row["bits per dimension"]), row["size"]
    levels, _ = patches(size, HELD_OUT, len(bits), seed=1)
    order = np.argsort(bits)
    order = np.concatenate([order[:SHOWN], order[-SHOWN:]])
    strip = np.full((size, 2 * SHOWN * (size + 2), 3), 255, np.uint8)
    for place, k in enumerate(order):
        strip[:, place * (size + 2) : place * (size + 2) + size] = levels[k].permute(1, 2, 0).numpy()
        ax.text(place * (size + 2) + size / 2, size + 1, f"{bits[k]:.1f}", ha="center", va="top", fontsize=8)
    ax.imshow(strip)
    ax.set_axis_off()
    ax.set_title(f"held-out patches with the fewest and the most bits per dimension of {len(bits)}", fontsize=10)

"""The pictures of docs/: accuracy against seconds, growth in time and memory, and a GPU's roofline."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

FASTSCORE, PLAIN, ODE, PEER = "#20639b", "#7f7f7f", "#3caea3", "#c4692b"


def save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=80, metadata={"Software": None})  # the same bytes whatever matplotlib's version says


def race(rows: list[dict]) -> Figure:
    """Error against seconds, one panel a target: fastscore's methods in blue and green, peers in orange."""
    targets = list(dict.fromkeys(row["target"] for row in rows))
    figure = Figure(figsize=(13, 7.6), layout="constrained")
    axes = figure.subplots(2, 3)
    styles = {"fastscore, fitted": (FASTSCORE, "o", 2.4), "fastscore, no data": (FASTSCORE, ".", 1.0),
              "plain formula": (PLAIN, ".", 1.2), "fastscore ODE midpoint, fitted": (ODE, "s", 2.4),
              "fastscore ODE midpoint, no data": (ODE, ".", 1.0)}  # fmt: skip
    marks = dict(zip(("flow_matching", "score_sde", "sbi", "zuko", "score_models", "MONAI"), "^v<>DP"))
    for ax, target in zip(axes.flat, targets):
        for row in (row for row in rows if row["target"] == target and row["rungs"]):
            name = row["method"]
            if name.startswith("fastscore ODE") and name not in styles:
                continue  # its other solvers: in the table
            peer = next((mark for library, mark in marks.items() if name.startswith(library)), ".")
            colour, mark, width = styles.get(name, (PEER, peer, 0.8))
            label = name if name in styles else name.split(" ")[0].rstrip(",")
            seconds, errors = zip(*((rung["seconds"], rung["rmse"]) for rung in row["rungs"]))
            ax.plot(seconds, errors, color=colour, marker=mark, markersize=4, linewidth=width, label=label)
        ax.set(xscale="log", yscale="log", title=target, xlabel="seconds, one thread", ylabel="RMSE, nats")
        ax.grid(alpha=0.25)
    handles = {}
    for ax in axes.flat:
        handles |= {label: line for line, label in zip(*ax.get_legend_handles_labels())}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=6, frameon=False)
    return figure


def scaling(rows: list[dict]) -> Figure:
    """Processor seconds and the tensors' peak against B x S, grown in either; beside them what an array would take."""
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    time, memory = figure.subplots(1, 2)
    for axis, colour, mark in (("samples", FASTSCORE, "o"), ("evaluations", ODE, "s")):
        own = [row for row in rows if row["axis"] == axis]
        size = [row["B x S"] for row in own]
        time.plot(size, [row["processor seconds"] for row in own], color=colour, marker=mark, label=f"more {axis}")
        memory.plot(size, [row["tensors' peak, MB"] for row in own], color=colour, marker=mark, label=f"more {axis}")
    whole = sorted({(row["B x S"], row["B x S x d, MB"]) for row in rows if row["axis"] in ("samples", "evaluations")})
    memory.plot(*zip(*whole), color=PLAIN, linestyle=":", label="one array B x S x d")
    memory.axhline(rows[0]["budget, MB"], color=PEER, linewidth=1, label="budget")
    time.set(xlabel="B x S", ylabel="processor seconds, one thread", title="time")
    memory.set(xlabel="B x S", ylabel="MB of tensors", title="memory")
    for ax in (time, memory):
        ax.set(xscale="log", yscale="log")
        sizes = [size for size, _ in whole]
        ax.set_xticks(sizes, [f"{size / 1000:.0f}k" for size in sizes])
        ax.set_xticks([], minor=True)
        ax.grid(alpha=0.25)
        ax.legend(frameon=False)
    return figure


def roofline(rows: list[dict], ceilings: dict, machine: str) -> Figure:
    """TFLOP/s of every kernel against its FLOPs a byte of global memory, under what a copy and a product reached."""
    figure = Figure(figsize=(7, 4.6), layout="constrained")
    ax = figure.subplots()
    intensity = [row["FLOP / byte"] for row in rows]
    bandwidth, most = ceilings["copy, GB/s"] / 1e3, ceilings["bf16 product, TFLOP/s"]
    ends = [most / bandwidth / 10, most / bandwidth, 2 * max(*intensity, most / bandwidth)]
    ax.plot(ends, [min(most, bandwidth * x) for x in ends], color=PLAIN, label="copy bandwidth, bf16 product")
    ways = {"Triton": "o", "compiled kernel": "s", "compile + graph": "^", "eager": "."}
    for (way, mark), colour in zip(ways.items(), (FASTSCORE, ODE, PEER, PLAIN)):
        known = [(x, row["GFLOP"] / row[f"{way}, ms"]) for x, row in zip(intensity, rows) if row.get(f"{way}, ms")]
        if known:
            ax.plot(*zip(*known), color=colour, marker=mark, linestyle="", label=way)
    ax.set(xscale="log", yscale="log", xlabel="FLOP a byte of global memory", ylabel="TFLOP/s", title=machine)
    ax.grid(alpha=0.25)
    ax.legend(frameon=False)
    return figure

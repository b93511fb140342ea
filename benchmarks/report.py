"""Make docs/results.md, docs/race.png and the README's table from benchmarks/results; `make report`.

Every number in them comes from a JSON file there, with its machine, versions and date.
"""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib

ROOT = Path(__file__).resolve().parent.parent
RESULTS, DOCS = ROOT / "benchmarks" / "results", ROOT / "docs"
BEGIN, END = "<!-- race: made by `make report` -->", "<!-- end of race -->"
# Other pages show these: docs/kernels.md and docs/training.md.
OTHERS = {"native_resources", "aot", "gan"}
FASTSCORE, PLAIN, ODE, PEER = "#20639b", "#7f7f7f", "#3caea3", "#c4692b"


def tables() -> dict[str, dict]:
    """Return every recorded table by its name."""
    paths = sorted(path for path in RESULTS.glob("*.json") if path.stem not in OTHERS)
    return {path.stem: json.loads(path.read_text()) for path in paths}


def markdown(rows: list[dict]) -> str:
    titles = [title for title, value in rows[0].items() if not isinstance(value, list)]
    lines = [titles, ["---"] * len(titles), *([cell(row.get(t)) for t in titles] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def write_results(found: dict[str, dict]) -> None:
    """Write all tables to docs/results.md."""
    parts = [
        "# Results",
        "",
        "Every table of `benchmarks/results`, as its last run wrote it: `make bench` measures them again,",
    ]
    parts += [
        "`make report` writes this page. Benchmarks are explained in [benchmarks/README.md](../benchmarks/README.md).",
        "",
    ]
    for name, table in found.items():
        versions = ", ".join(f"{package} {version}" for package, version in table["versions"].items())
        parts += [f"## {name.replace('_', ' ')}", "", markdown(table["rows"]), ""]
        parts += [f"{table['date']}, {table['device']} ({table['cores']} cores, {table['threads']} threads), "
                  f"Python {table['python']}, {versions}.", ""]  # fmt: skip
    (DOCS / "results.md").write_text("\n".join(parts))


def readme_table(best: list[dict]) -> str:
    """Return the README's rows: of every target the largest and the smallest error."""
    rows = []
    for target in dict.fromkeys(row["target"] for row in best):
        own = [row for row in best if row["target"] == target]
        for row in (own[0], own[-1]) if len(own) > 1 else own:
            ours = row["fastscore"] or "not reached"
            line = {"target": target, "RMSE, nats": row["error, nats"], "fastscore": ours, "s": row["s"]}
            peer = row["best peer"] or ("none computes it" if row["fastscore"] else "not reached")
            line |= {"best peer": peer, "its s": row["peer's s"]}
            line |= {"peer / fastscore": row["peer / fastscore"]}
            rows.append(line | {"plain / fitted evaluations": row["plain nfe / fitted nfe"]})
    return markdown(rows)


def write_readme(table: str) -> None:
    path = ROOT / "README.md"
    head, rest = path.read_text().split(BEGIN)
    path.write_text(head + BEGIN + "\n" + table + "\n" + END + rest.split(END)[1])


def draw(rows: list[dict], path: Path) -> None:
    """Draw error against seconds, one panel a target: fastscore's methods in blue and green, peers in orange."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    targets = list(dict.fromkeys(row["target"] for row in rows))
    figure, axes = plt.subplots(2, 3, figsize=(13, 7.6), layout="constrained")
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
    figure.savefig(path, dpi=80)
    plt.close(figure)


def main() -> None:
    found = tables()
    write_results(found)
    write_readme(readme_table(found["race_best"]["rows"]))
    draw(found["race"]["rows"], DOCS / "race.png")


if __name__ == "__main__":
    main()

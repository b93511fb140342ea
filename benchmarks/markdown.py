"""Markdown tables of recorded rows."""

from __future__ import annotations


def markdown(rows: list[dict]) -> str:
    """Return rows as a table; lists are for pictures."""
    titles = list(dict.fromkeys(title for row in rows for title, value in row.items() if not isinstance(value, list)))
    lines = [titles, ["---"] * len(titles), *([cell(row.get(t)) for t in titles] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cell(value: object) -> str:
    """Return a value as tables show it."""
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def aot_table(rows: list[dict]) -> str:
    """Return the table of what Triton's compiler made of every kernel."""
    shown = []
    for row in rows:
        products = f"{row['matrix']} {'wgmma' if row['wgmma'] else 'mma'}" if row["matrix"] else "-"
        line = {"kernel": row["case"], "sm": row["sm"], "samples, warps": f"{row['samples']}, {row['warps']}"}
        line |= {"weights": row["weights"], "registers": row["registers"], "stack, B": row["stack"]}
        line |= {"shared, KB": f"{row['shared'] / 1024:.0f}", "matrix instructions": products}
        shown.append(line | {"loop": row["loop"] or "-"})
    return markdown(shown)


def instructions_table(traces: list[dict]) -> str:
    """Return the table of a warp's instructions for a row of a network, by the kernels of instructions and of steps."""
    found: dict[str, dict] = {}
    for trace in sorted(traces, key=lambda trace: (trace["width"], trace["network"])):
        how = "as steps" if "_steps_" in trace["kernel"] else "by instructions"
        line = found.setdefault(trace["network"], {"network, d = 64": trace["network"], "by instructions": None})
        line[how] = f"{trace['instructions']:,}"
    return markdown(list(found.values()))


def spills_table(rows: list[dict]) -> str:
    """Return the table of kernels that use local memory: bytes of stack, and the instructions that read and write."""
    names = {"kernel": "kernel", "stack": "stack, bytes of a thread", "ldl": "loads", "stl": "stores"}
    shown = (row | {"kernel": f"`{row['kernel']}`"} for row in rows if row["stack"])
    return markdown([{title: row[name] for name, title in names.items()} for row in shown])

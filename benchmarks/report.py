"""Make docs/results.md, its pictures and other pages' numbers from benchmarks/results; `make report`.

Every number in them comes from a JSON file there, with its machine, versions and date.
"""

from __future__ import annotations

import json
from pathlib import Path

import pictures
from markdown import aot_table, markdown
from record import RESULTS

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
# Other pages show these: docs/kernels.md and docs/training.md.
OTHERS = {"native_resources", "aot", "gan"}


def tables() -> dict[str, dict]:
    """Return every recorded table by its name."""
    paths = sorted(path for path in RESULTS.glob("*.json") if path.stem not in OTHERS)
    return {path.stem: json.loads(path.read_text()) for path in paths}


def results(found: dict[str, dict]) -> str:
    """Return docs/results.md: all tables."""
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
        parts += [f"## {name.replace('_', ' ')}", ""]
        parts += [f"![{name}]({name}.png)", ""] if (DOCS / f"{name}.png").exists() else []
        parts += [markdown(table["rows"]), ""]
        cores = f"{table['cores']} cores" + (f", {table['threads']} threads" if "threads" in table else "")
        parts += [f"{table['date']}, {table['device']} ({cores}), Python {table['python']}, {versions}.", ""]
        parts += [table["note"], ""] if "note" in table else []
    return "\n".join(parts)


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


def readme_costs(overhead: list[dict], program: list[dict]) -> str:
    """Return the README's sentences on what an estimate costs beside its network, and a row program beside a module."""

    def each(rows: list[dict], digits: int) -> str:
        return " and ".join(f"{row['ratio']:.{digits}f} ({row['network']})" for row in rows)

    return (
        f"An estimate takes {each(overhead, 2)} times\nthe bare forward passes for the same rows. "
        f"As row programs, networks run\n{each(program, 1)} times as fast as their modules."
    )


def readme_kernels(kernels: list[dict], calls: list[dict]) -> str:
    """Return the README's sentences on the kernels, and on the calls around them."""

    def least(row: dict) -> float:
        return min(row[way] for way in ("Triton, ms", "compiled kernel, ms") if isinstance(row[way], float))

    each = [f"- {row['network']}: {least(row):.3g} ({row['compile + graph, ms']:.3g})" for row in kernels]
    worst, best = (pick(row["best over compile"] for row in kernels) for pick in (min, max))
    whole = [f"{row['compiled, ms']:.3g} ms of which the kernel {row['of which the kernel, ms']:.2g} ({row['network']})"
             for row in calls if isinstance(row["compiled, ms"], float)]  # fmt: skip
    return "\n".join([
        "Milliseconds of the faster of two kernels for 2^20 rows, d = 64, bfloat16, on an NVIDIA H200 (2026-11-28),",
        "and in brackets of torch.compile for the same evaluation in one CUDA graph:",
        "",
        *each,
        "",
        f"The kernels are {worst:.3g} to {best:.3g} times as fast. A whole `estimate` of those rows took far longer",
        f"than its kernel: {whole[0]},\n{', '.join(whole[1:])}.",
    ])  # fmt: skip


def replaced(text: str, parts: dict[str, str]) -> str:
    """Return a page with its measured parts made anew, each between two marks."""
    for name, part in parts.items():
        begin, end = f"<!-- {name}: made by `make report` -->\n", f"\n<!-- end of {name} -->"
        head, rest = text.split(begin)
        text = head + begin + part + end + rest.split(end)[1]
    return text


def readme(text: str, found: dict[str, dict]) -> str:
    rows = {name: table["rows"] for name, table in found.items()}
    parts = {"race": readme_table(rows["race_best"]), "costs": readme_costs(rows["overhead"], rows["program"])}
    return replaced(text, parts | {"kernels": readme_kernels(rows["h200_kernels"], rows["h200_estimate"])})


def kernels_page(text: str, found: dict[str, dict], compiled: dict) -> str:
    """Return docs/kernels.md with what a GPU measured, and with the table of what the compiler made."""
    names = ("h200_kernels", "h200_counters", "h200_estimate", "h200_calls")
    parts = {name.replace("_", " "): markdown(found[name]["rows"]) for name in names}
    return replaced(text, parts | {"compiled kernels": aot_table(compiled["rows"])})


def main() -> None:
    found = tables()
    page = ROOT / "README.md"
    page.write_text(readme(page.read_text(), found))
    pictures.save(pictures.race(found["race"]["rows"]), DOCS / "race.png")
    pictures.save(pictures.scaling(found["scaling"]["rows"]), DOCS / "scaling.png")
    for name in (name for name in found if name.endswith("-kernels")):  # of a GPU
        machine = name.removesuffix("-kernels")
        ceilings = found[f"{machine}-ceilings"]["rows"][0]
        pictures.save(pictures.roofline(found[name]["rows"], ceilings, machine), DOCS / f"{name}.png")
    (DOCS / "results.md").write_text(results(found))
    page = DOCS / "kernels.md"
    page.write_text(kernels_page(page.read_text(), found, json.loads((RESULTS / "aot.json").read_text())))


if __name__ == "__main__":
    main()

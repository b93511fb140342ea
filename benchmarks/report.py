"""Make docs/results.md, its pictures and the README's numbers from benchmarks/results; `make report`.

Every number in them comes from a JSON file there, with its machine, versions and date.
"""

from __future__ import annotations

import json
from pathlib import Path

import pictures
from record import RESULTS, markdown

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
        parts += [f"{table['date']}, {table['device']} ({table['cores']} cores, {table['threads']} threads), "
                  f"Python {table['python']}, {versions}.", ""]  # fmt: skip
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


def readme(text: str, found: dict[str, dict]) -> str:
    """Return the README with its measured parts made anew, each between two marks."""
    rows = {name: table["rows"] for name, table in found.items()}
    parts = {"race": readme_table(rows["race_best"]), "costs": readme_costs(rows["overhead"], rows["program"])}
    for name, part in parts.items():
        begin, end = f"<!-- {name}: made by `make report` -->\n", f"\n<!-- end of {name} -->"
        head, rest = text.split(begin)
        text = head + begin + part + end + rest.split(end)[1]
    return text


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


if __name__ == "__main__":
    main()

"""Make docs/results.md, its pictures and other pages' numbers from benchmarks/results; `make report`.

Every number in them comes from a JSON file there, with its machine, versions and date.
"""

from __future__ import annotations

import json
from pathlib import Path

import image_pictures
import pictures
from markdown import aot_table, instructions_table, markdown, spills_table
from record import RESULTS

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
# Other pages show these, docs/kernels.md and docs/training.md, and docs/images.png shows the last two.
OTHERS = {"native_resources", "aot", "gan", "images_variance", "images_ranked"}
IMAGES = ("images", "images_variance", "images_ranked")


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
    """Return the README's rows: of every target the largest error, and the smallest if somebody else reaches it too."""
    rows = []
    for target in dict.fromkeys(row["target"] for row in best):
        own = [row for row in best if row["target"] == target]
        for row in (own[0], *(row for row in own[1:][-1:] if row["peer's s"])):
            ours = row["fastscore"].replace("fastscore, ", "estimate, ").removeprefix("fastscore ")
            line = {"target": target, "error, nats": f"{row['error, nats']:.2g}"}
            line |= {"fastscore": _with_time(ours, row["s"])}
            rows.append(line | {"the fastest of the others": _with_time(row["best peer"], row["peer's s"])})
    return markdown(rows)


def _with_time(method: str | None, seconds: float | None) -> str:
    if not method or not seconds:
        return "none"
    return f"{float(f'{1000 * seconds:.2g}'):g} ms, {method}"


def readme_kernels(kernels: list[dict], calls: list[dict]) -> str:
    """Return the README's sentence on the kernels, and on the calls around them."""
    worst, best = (pick(row["best over compile"] for row in kernels) for pick in (min, max))
    call = next(row for row in calls if isinstance(row["compiled, ms"], float))
    return (
        "On an NVIDIA H200 (2026-11-28) one [kernel](docs/kernels.md) evaluates an MLP, with its noise and reference, "
        f"{worst:.3g} to {best:.3g} times\nas fast as torch.compile in one CUDA graph. A whole `estimate` of an "
        f"earlier version took {call['compiled, ms']:.3g} ms, {call['of which the kernel, ms']:.2g} ms of them in the "
        "kernel."
    )


def replaced(text: str, parts: dict[str, str]) -> str:
    """Return a page with its measured parts made anew, each between two marks."""
    for name, part in parts.items():
        begin, end = f"<!-- {name}: made by `make report` -->\n", f"\n<!-- end of {name} -->"
        head, rest = text.split(begin)
        text = head + begin + part + end + rest.split(end)[1]
    return text


def readme(text: str, found: dict[str, dict]) -> str:
    rows = {name: table["rows"] for name, table in found.items()}
    kernels = readme_kernels(rows["h200_kernels"], rows["h200_estimate"])
    return replaced(text, {"race": readme_table(rows["race_best"]), "kernels": kernels})


def kernels_page(text: str, found: dict[str, dict], compiled: dict, native: dict) -> str:
    """Return docs/kernels.md with what a GPU measured, and with the tables of what Triton and nvcc compiled."""
    names = ("h200_kernels", "h200_counters", "h200_estimate", "h200_calls")
    parts = {name.replace("_", " "): markdown(found[name]["rows"]) for name in names}
    parts |= {"compiled kernels": aot_table(compiled["rows"]), "spills": spills_table(native["rows"])}
    return replaced(text, parts | {"instructions of a row": instructions_table(native["traces"])})


def images_table(rows: list[dict]) -> str:
    """Return the table of docs/images.md: variance times evaluations of the plain formula and of fits to own draws."""
    found = {(row["network"], row["method"], row["evaluations"]): row for row in rows}
    lines = []
    for network, _, nfe in (key for key in found if key[1] == "plain, learned schedule"):
        line: dict[str, object] = {"network": network, "evaluations": f"{nfe:,}"}
        for title, method in (("equidistant", "low-discrepancy times"), ("learned schedule", "learned schedule")):
            line[f"plain, {title}"] = f"{found[network, f'plain, {method}', nfe]['variance x evaluations']:,.0f}"
        for title in ("unfitted", "fitted"):
            row = found[network, f"fastscore, self, {title}", nfe]
            line[title] = f"{row['variance x evaluations']:,.0f} ± {row['its error']:,.0f}"
            gains = (f"{row[column]:.3g}" for column in ("uniform / this", "learned / this"))
            line[f"gain, {title}"] = " and ".join(gains)
        lines.append(line)
    return markdown(lines)


def main() -> None:
    found = tables()
    page = ROOT / "README.md"
    page.write_text(readme(page.read_text(), found))
    pictures.save(pictures.race(found["race"]["rows"]), DOCS / "race.png")
    pictures.save(pictures.scaling(found["scaling"]["rows"]), DOCS / "scaling.png")
    drawn = (json.loads((RESULTS / f"{name}.json").read_text())["rows"] for name in IMAGES)
    pictures.save(image_pictures.images(*drawn), DOCS / "images.png")
    for name in (name for name in found if name.endswith("-kernels")):  # of a GPU
        machine = name.removesuffix("-kernels")
        ceilings = found[f"{machine}-ceilings"]["rows"][0]
        pictures.save(pictures.roofline(found[name]["rows"], ceilings, machine), DOCS / f"{name}.png")
    (DOCS / "results.md").write_text(results(found))
    page = DOCS / "images.md"
    page.write_text(replaced(page.read_text(), {"images": images_table(found["images"]["rows"])}))
    page = DOCS / "kernels.md"
    compiled, native = (json.loads((RESULTS / f"{name}.json").read_text()) for name in ("aot", "native_resources"))
    page.write_text(kernels_page(page.read_text(), found, compiled, native))


if __name__ == "__main__":
    main()

"""Read what nvcc made of the CUDA kernels: registers, stack, shared memory and instructions, without a GPU.

    python benchmarks/native_resources.py [WHEEL]                 prints a table
    python benchmarks/native_resources.py [WHEEL] --json > benchmarks/results/native_resources.json
                                                                  records what the tests hold kernels to

A second table follows the kernels' threads through a row of a network (`traced_kernels.py`): what a warp issues for it,
and the milliseconds that the issue model predicts for 4,096 samples x 256 rows beside those of the last run on an H200,
of the kernels that were there then. Predictions are no measurements: `issue_model.py` says how far off they were.

WHEEL is a wheel with kernels for this Python, as `make wheel` puts into dist/; else the one of FASTSCORE_WHEEL, or the
installed module. Shared memory is the static part: what a launch adds is not in the binary.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ExtensionFileLoader
from importlib.util import find_spec, module_from_spec, spec_from_loader
from pathlib import Path

import sass
from markdown import markdown
from record import RESULTS
from traced_kernels import ARCHITECTURE, trace_all

COLUMNS = ("registers", "stack", "shared", "hgmma", "hmma", "ldl", "stl", "instructions", "loop")


@contextmanager
def library(wheel: str | None = None) -> Iterator[Path | None]:
    """Yield the path of fastscore._C, out of a wheel or as installed, or None where there is none."""
    wheel = wheel or os.environ.get("FASTSCORE_WHEEL")
    if not wheel:
        spec = find_spec("fastscore._C")
        yield spec and Path(spec.origin)
        return
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if re.fullmatch(r"fastscore/_C\..*\.so", name)]
        yield Path(archive.extract(names[0], folder)) if names else None


def measure(path: Path) -> dict:
    """Return the compiler's version and a row for every kernel and architecture."""
    loader = ExtensionFileLoader("_C", str(path))
    module = module_from_spec(spec_from_loader("_C", loader))
    loader.exec_module(module)
    found = sass.kernels(path)
    mangled = "\n".join(name for _, name in found)
    names = subprocess.run(["c++filt"], input=mangled, capture_output=True, text=True, check=True).stdout.splitlines()
    rows = [
        {"kernel": _short(name), "architecture": architecture} | row
        for name, ((architecture, _), row) in zip(names, found.items(), strict=True)
    ]
    rows.sort(key=lambda row: (row["kernel"], row["architecture"]))
    hopper = {_short(name): key[1] for name, key in zip(names, found, strict=True) if key[0] == ARCHITECTURE}
    return {"nvcc": module.build_info()["nvcc"], "rows": rows, "traces": trace_all(path, module, hopper)}


def _short(name: str) -> str:
    """Leave a kernel's own name and template arguments: fastscore::(anonymous namespace)::f<2>(int) -> f<2>."""
    name = re.sub(r"\(anonymous namespace\)::|fastscore::|\bvoid ", "", name)
    return re.sub(r"\((?:[^()]|\([^()]*\))*\)(?: const)?$", "", name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheel", nargs="?")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with library(options.wheel) as path:
        if path is None:
            parser.error("no CUDA kernels in the wheel or the installed package; name a wheel that make wheel built")
        found = measure(path)
    if options.json:
        json.dump(found, sys.stdout, indent=1)
        print()
        return
    print(f"| kernel | architecture | {' | '.join(COLUMNS)} |")
    print("|---" * (2 + len(COLUMNS)) + "|")
    for row in found["rows"]:
        print(f"| {row['kernel']} | {row['architecture']} | {' | '.join(str(row[c]) for c in COLUMNS)} |")
    before = json.loads((RESULTS / "h200_kernels.json").read_text())
    measured = {row["network"]: row["compiled kernel, ms"] for row in before["rows"]}
    title = f"measured at commit {before['commit']}, ms"
    print("\n" + markdown([row | {title: measured.get(row["network"])} for row in found["traces"]]))


if __name__ == "__main__":
    main()

"""E7: the counters of Nsight Compute for one launch of each width, as the package chooses it.

    python benchmarks/experiment_counters.py      the launches alone, for a profiler around them

Metrics are asked for by their names, since the text that the sections print holds rules and no table of stalls.
"""

from __future__ import annotations

import csv
import io
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import torch
from experiment_launches import ADALN, Launches
from experiment_micro import TABLE
from measuring import REHEARSING, Row
from steps import PYTHON

STALLED = "smsp__average_warps_issue_stalled_"
# Two runs: where a version of the profiler knows no such metrics, the other run's are there all the same.
ASKED = {
    "stalls": ("--section", "WarpStateStats", "--section", "SourceCounters", "--metrics", f"regex:{STALLED}.*"),
    "pipes": ("--metrics", "regex:l1tex__data_pipe_lsu_wavefronts.*,regex:sm__inst_executed_pipe_.*"),
}
PREFIXES = {
    "stalls": ("smsp__", "sm__warps", "smsp__pcsamp"),
    "pipes": ("l1tex__data_pipe_lsu_wavefronts", "sm__inst_executed_pipe_"),
}


def profiler() -> str | None:
    """Return where ncu is, or None."""
    return shutil.which("ncu") or shutil.which("ncu", path="/usr/local/cuda/bin")


def why_not() -> str:
    """Return why no counters can be read here, or nothing."""
    if profiler() is None:
        return "found no ncu on PATH nor in /usr/local/cuda/bin"
    return "a rehearsal launches nothing that a profiler could count" if REHEARSING else ""


def counted() -> Iterator[Row]:
    """A row for each width: the reasons for which warps wait most, and all counters as a list."""
    found = {kind: _profiled(kind) for kind in ASKED}
    for number, case in enumerate(ADALN.values()):
        row = Row(TABLE, case.name, experiment="E7", what=case.name, variant="counters")
        for kind, kernels in found.items():
            row.measure(kind, lambda kernels=kernels, number=number: _values(kernels, number))
        if row["stalls"]:
            waits = sorted(stalls(dict(row["stalls"])).items(), key=lambda item: -item[1])
            row["waits most for"] = ", ".join(f"{reason} {value:.2g}" for reason, value in waits[:4])
            row.tell()
        yield row


def _values(kernels: list[dict[str, float]] | str, number: int) -> list[list]:
    if isinstance(kernels, str):
        raise RuntimeError(kernels)
    return [[name, value] for name, value in kernels[number].items()]


def _profiled(kind: str) -> list[dict[str, float]] | str:
    """Return the counters of every launch in order, or what the profiler said instead."""
    command = [str(profiler()), "--csv", "--page", "raw", "--print-units", "base", "--kernel-name", "regex:sm90_"]
    command += [*ASKED[kind], *PYTHON, str(Path(__file__).resolve())]
    done = subprocess.run(command, capture_output=True, text=True)
    kernels = read(done.stdout, PREFIXES[kind])
    if len(kernels) == len(ADALN):
        return kernels
    said = [
        line for line in (done.stdout + done.stderr).splitlines() if line.startswith("==ERROR==") or "Error" in line
    ]
    return f"ncu counted {len(kernels)} launches of {len(ADALN)}: {said[0] if said else f'exit code {done.returncode}'}"


def read(text: str, prefixes: tuple[str, ...]) -> list[dict[str, float]]:
    """Return the metrics of every kernel from ncu's page of raw values: names, units, then a line a launch."""
    lines = text.splitlines()
    first = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    table = list(csv.DictReader(io.StringIO("\n".join(line for line in lines[first:] if line.startswith('"')))))
    return [
        {
            name: _number(value)
            for name, value in row.items()
            if name.startswith(prefixes) and _number(value) is not None
        }
        for row in table
        if row["ID"]  # that of units has none
    ]


def _number(text: str) -> float | None:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None


def stalls(counters: dict[str, float]) -> dict[str, float]:
    """Return by its name how many warps wait for a reason, on average, whenever one issues."""
    end = "_per_issue_active.ratio"
    return {n[len(STALLED) : -len(end)]: v for n, v in counters.items() if n.startswith(STALLED) and n.endswith(end)}


@torch.no_grad()
def main() -> None:
    """Launch every width once."""
    for case in ADALN.values():
        launches = Launches("E7", case)
        launches.launch(launches.empty())
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()

"""Benchmarks share one thing: tables, printed at the end and written to benchmarks/results with what they ran on."""

import datetime
import json
import os
import platform
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from rehearsal import REHEARSING

RESULTS = Path(__file__).parent / "results"
TABLES = {}


@pytest.fixture(scope="session")
def table():
    """Return a function that adds one row (a dict) to a named table."""
    return lambda name, row: TABLES.setdefault(name, []).append(row)


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pytest_terminal_summary(terminalreporter):
    for name, rows in TABLES.items():
        terminalreporter.section(name)
        terminalreporter.write_line(_markdown(rows))


def pytest_sessionfinish(session, exitstatus):
    if exitstatus != 0 or REHEARSING:
        return  # a failed benchmark leaves the last good numbers alone
    RESULTS.mkdir(exist_ok=True)
    on_gpu = torch.cuda.is_available()
    for name, rows in TABLES.items():
        found = {"table": name, **_environment(), "rows": rows}
        name = f"{_device().lower().replace(' ', '-')}-{name}" if on_gpu else name
        (RESULTS / f"{name}.json").write_text(json.dumps(found, indent=2) + "\n")
        (RESULTS / f"{name}.md").write_text(_markdown(rows) + "\n")


def _environment():
    packages = ("fastscore", "torch", "triton", "numpy", "torchdiffeq", "diffusers", "flow_matching", "sbi")
    packages += ("zuko", "score_models", "monai")
    return {
        "date": datetime.date.today().isoformat(),
        "device": _device(),
        "architecture": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in packages if find_spec(package)},
    }


def _device():
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def _markdown(rows):
    titles = [title for title, value in rows[0].items() if not isinstance(value, list)]  # lists are for pictures
    lines = [titles, ["---"] * len(titles), *([_cell(row[t]) for t in titles] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(value):
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)

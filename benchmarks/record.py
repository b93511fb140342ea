"""What benchmarks write to benchmarks/results: tables, with what they ran on and when."""

from __future__ import annotations

import datetime
import json
import os
import platform
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("fastscore", "torch", "triton", "numpy", "torchdiffeq", "diffusers", "flow_matching", "sbi", "zuko")
PACKAGES += ("score_models", "monai")


def environment() -> dict:
    """Return date, device, machine and versions."""
    on_gpu = torch.cuda.is_available()
    return {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if on_gpu else "CPU",
        "architecture": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in PACKAGES if find_spec(package)}
        | ({"CUDA": torch.version.cuda} if on_gpu else {}),
    }


def file_name(table: str, device: str) -> str:
    """Return the name of a table's file, without its ending: a GPU's begin with its own."""
    return table if device == "CPU" else f"{device.lower().replace(' ', '-')}-{table}"


def read_steps(folder: Path, table: str, environment: dict) -> tuple[dict[str, dict], dict[str, dict]]:
    """Return rows and failures by step that an earlier run wrote on the same machine with the same versions.

    A run of some steps so adds to the table of all; on anything else a table begins anew.
    """
    path = folder / f"{file_name(table, environment['device'])}.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    if any(found.get(key) != value for key, value in environment.items() if key != "date"):
        return {}, {}
    return dict(zip(found.get("steps", ()), found["rows"])), found.get("failed", {})


def write(folder: Path, table: str, environment: dict, rows: list[dict], **more: object) -> Path:
    """Write a table as JSON, whole or not at all; return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{file_name(table, environment['device'])}.json"
    part = path.with_suffix(".part")
    part.write_text(json.dumps({"table": table, **environment, "rows": rows, **more}, indent=2) + "\n")
    part.replace(path)
    return path

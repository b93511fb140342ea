"""Imports go down only, by the contract in pyproject.toml, and `import fastscore` brings little with it."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from steps import PYTHON

ROOT = Path(__file__).resolve().parent.parent
CHECK = "from importlinter.cli import lint_imports; raise SystemExit(lint_imports(no_cache=True, is_debug_mode=True))"


def lint(folder):
    """Return the exit code and the report of the contracts of a folder."""
    done = subprocess.run([sys.executable, "-c", CHECK], capture_output=True, text=True, cwd=folder)
    return done.returncode, done.stdout + done.stderr


def planted(folder, file="", text=""):
    """Copy the package under another name, with a line added to one file, and return the folder."""
    package = folder / "planted"
    shutil.copytree(ROOT / "fastscore", package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "kernels", package / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    contracts = (ROOT / "pyproject.toml").read_text().partition("[tool.importlinter]")
    (folder / "pyproject.toml").write_text("".join(contracts[1:]).replace('"fastscore"', '"planted"'))
    if file:
        with open(package / file, "a") as module:
            module.write(f"\n{text}\n")
    return folder


def test_imports_go_down_only():
    code, report = lint(ROOT)
    assert code == 0, report
    assert "2 kept, 0 broken" in report


@pytest.mark.parametrize(
    ("file", "text", "reported"),
    [
        ("ops/noise.py", "from ..program import chain", "planted.ops is not allowed to import planted.program"),
        (
            "ops/noise.py",
            "def f():\n    from .. import density",
            "planted.ops is not allowed to import planted.density",
        ),
        ("support/host.py", "import planted.density as d", "planted.support is not allowed to import planted.density"),
        ("process/masks.py", "from ..ops import noise", "planted.process is not allowed to import planted.ops"),
        ("demo/picture.py", "from ..cli import commands", "planted.demo is not allowed to import planted.cli"),
        ("training/gan.py", "from ..classify import elimination", "planted.training is not allowed to import"),
        ("kernels/noise.py", "from ..ops import noise", "planted.kernels is not allowed to import planted.ops"),
        ("ops/noise.py", "from . import definitions", "No circles BROKEN"),
        ("attic.py", "", "planted.attic"),  # a room without a place
    ],
)
def test_a_planted_violation_is_reported(tmp_path, file, text, reported):
    code, report = lint(planted(tmp_path, file, text))
    assert code == 1
    assert reported in re.sub(r"\s+", " ", report)


def test_the_copy_without_a_violation_passes(tmp_path):
    assert lint(planted(tmp_path))[0] == 0


def test_importing_fastscore_touches_no_gpu_and_no_optional_package():
    check = """
import sys, torch
before = set(sys.modules)
def refuse(*args, **kwargs):
    raise AssertionError("import fastscore asks for CUDA")
for name in ("_lazy_init", "init", "is_available", "device_count", "get_device_properties", "current_device"):
    setattr(torch.cuda, name, refuse)
import fastscore
new = set(sys.modules) - before
print("new:", *sorted({name.partition(".")[0] for name in new} & OPTIONAL))
print("rooms:", *sorted(name for name in new if name in ROOMS))
print("initialized:", torch.cuda.is_initialized())
"""
    optional = {"click", "lightning", "matplotlib", "pytorch_lightning", "safetensors", "sklearn", "torchdiffeq"}
    optional |= {"torchmetrics", "triton"}
    rooms = {f"fastscore.{room}" for room in ("adapters", "cli", "demo", "lightning", "metrics", "runs")}
    check = f"OPTIONAL, ROOMS = {optional!r}, {rooms!r}\n{check}"
    done = subprocess.run([*PYTHON, "-c", check], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:3] == ["new:", "rooms:", "initialized: False"]

"""Imports go down only: every module has a rank, and imports from lower ranks alone."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "fastscore"
OPTIONAL = {"lightning", "matplotlib", "pytorch_lightning", "sklearn", "torchdiffeq", "torchmetrics"}

RANKS = {
    "structure": -1,
    "backends": 0,
    "buffers": 0,
    "conditions": 0,
    "dataset": 0,
    "host": -2,
    "instructions": 0,
    "masks": -1,
    "memory": 0,
    "progress": 0,
    "modes": 0,
    "ranks": 0,
    "noise": 0,
    "run_folder": 0,
    "schedules": 0,
    "training": 0,
    "untouched": 0,
    "warn": -1,
    "watch": 0,
    "code_reader": 1,
    "transforms": 0,
    "adapters.checks": 0,
    "adapters.diffusers_conventions": 0,
    "adapters.table_denoiser": 1,
    "backends.program": 1,
    "backends.select": 1,
    "backends.weight_image": 0,
    "chain": 1,
    "conditional_flow": 1,
    "adapters.clocks": 1,
    "condition_data": 1,
    "module_state": 1,
    "network": 1,
    "nodes": 1,
    "predictions": 1,
    "reference": 1,
    "rules": 2,
    "samples": 3,
    "backends.measured": 0,
    "backends.task": 1,
    "backends.choice": 2,
    "backends.torch": 2,
    "coincidence": 4,
    "backends.triton": 3,
    "backends.cuda": 4,
    "statistics": 3,
    "curve": 3,
    "probe": 4,
    "calibration": 4,
    "estimate": 4,
    "methods": 3,
    "mixture": 2,
    "tracing": 2,
    "elimination": 4,
    "hoisting": 3,
    "ops": 3,
    "tables": 3,
    "matching": 4,
    "verification": 4,
    "program": 5,
    "protocol": 5,
    "integrand": 6,
    "coupling": 7,
    "degenerate": 1,
    "pilot": 7,
    "density": 8,
    "classify": 9,
    "discrete": 9,
    "blocks": 9,
    "evaluate": 10,
    "explain": 9,
    "graph": 9,
    "loading": 9,
    "flow_field": 9,
    "flow_ends": 10,
    "cut_graph": 10,
    "probability_flow": 11,
    "training.nodes": 2,
    "training.weights": 3,
    "training.losses": 9,
    "transformed": 9,
    "zero_mean": 9,
    "adapters.flow_matching": 9,
    "adapters.score_models": 9,
    "adapters.diffusers": 9,
    "adapters.edm": 9,
    "adapters.guided_diffusion": 9,
    "adapters.k_diffusion": 9,
    "adapters.score_sde": 9,
    "adapters.lucidrains": 10,
    "adapters.sbi": 10,
    "adapters": 11,
    "metrics": 9,
    "training.diffusion_loss": 10,
    "training.gan": 10,
    "lightning": 10,
    "": 11,  # the public names
    "demo.training": 10,
    "demo.problems": 11,
    "demo.comparison": 12,
    "demo.picture": 12,
    "demo": 13,
    "cli": 14,
    "__main__": 15,
}
# The kernels lie below everything: `fastscore.kernels` when installed, `kernels/` in the repository.
NOT_IN_THE_PACKAGE_ITSELF = {"cli", "blocks", "evaluate", "ranks", "demo", "loading", "__main__"} | OPTIONAL


def modules(folder, package):
    """Return {module name: path} of a folder's Python files."""
    found = {}
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        found[".".join([package, *(p for p in parts if p != "__init__")])] = path
    return found


def imported(name, path, known):
    """Return every module that a file imports, in functions too; names that are no module count as their package."""
    inside = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            up = inside.split(".")[: len(inside.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*up, *([node.module] if node.module else [])])
            found.update(f"{source}.{a.name}" if f"{source}.{a.name}" in known else source for a in node.names)
    return found


def violations(fastscore, kernels):
    """Return one line for every import that goes up or sideways, and for every file without a rank."""
    inside = modules(fastscore, "fastscore")
    native = modules(kernels, "fastscore.kernels")
    ranks = {f"fastscore.{name}".rstrip("."): rank for name, rank in RANKS.items()}
    found = [f"{name} has no rank" for name in inside if name not in ranks]
    for name, path in (inside | native).items():
        for other in sorted(imported(name, path, inside | native)):
            if other.startswith(("fastscore.kernels", "kernels")):
                continue
            known = other == "fastscore" or other.startswith("fastscore.")
            if name in native and known:
                found.append(f"{name} imports {other}")
            elif name == "fastscore":
                top = other.removeprefix("fastscore.").partition(".")[0]
                found += [f"fastscore imports {other}"] * (top in NOT_IN_THE_PACKAGE_ITSELF)
            elif known and other not in ranks:
                found.append(f"{name} imports {other}, which has no rank")
            elif known and ranks.get(name, -1) <= ranks[other]:
                found.append(f"{name} ({ranks.get(name)}) imports {other} ({ranks[other]})")
    return found


def test_modules_import_from_lower_ranks_alone():
    assert violations(PACKAGE, ROOT / "kernels") == []


def test_every_rank_belongs_to_a_file():
    assert {f"fastscore.{name}".rstrip(".") for name in RANKS} - set(modules(PACKAGE, "fastscore")) == set()


def test_only_the_command_imports_the_command_line():
    inside = modules(PACKAGE, "fastscore")
    assert {n for n, p in inside.items() if "fastscore.cli" in imported(n, p, inside)} == {"fastscore.__main__"}


@pytest.mark.parametrize(
    ("file", "text", "reported"),
    [
        ("noise.py", "from .schedules import VP", "fastscore.noise (0) imports fastscore.schedules (0)"),
        ("noise.py", "def f():\n    from . import density", "fastscore.noise (0) imports fastscore.density (8)"),
        ("noise.py", "import fastscore.density as d", "fastscore.noise (0) imports fastscore.density (8)"),
        ("noise.py", "from fastscore import ScoreDensity", "fastscore.noise (0) imports fastscore (11)"),
        ("backends/torch.py", "from ..ops import perturb", "fastscore.backends.torch (2) imports fastscore.ops (3)"),
        ("backends/torch.py", "from .. import ops", "fastscore.backends.torch (2) imports fastscore.ops (3)"),
        ("backends/__init__.py", "from .torch import x", "fastscore.backends (0) imports fastscore.backends.torch (2)"),
        ("demo/__init__.py", "from ..cli import main", "fastscore.demo (13) imports fastscore.cli (14)"),
        ("new.py", "", "fastscore.new has no rank"),
        ("__init__.py", "from .cli import main", "fastscore imports fastscore.cli"),
        ("__init__.py", "import matplotlib.pyplot", "fastscore imports matplotlib.pyplot"),
        ("__init__.py", "def f():\n    from torchdiffeq import odeint", "fastscore imports torchdiffeq"),
        ("../kernels/bad.py", "from ..noise import words", "fastscore.kernels.bad imports fastscore.noise"),
        ("../kernels/bad.py", "import fastscore", "fastscore.kernels.bad imports fastscore"),
    ],
)
def test_a_planted_violation_is_reported(tmp_path, file, text, reported):
    for name in ("noise", "schedules", "density", "ops", "cli", "backends/torch", "backends/__init__", "__init__"):
        path = tmp_path / "fastscore" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "good.py").write_text("from . import other\nimport torch\n")
    (tmp_path / "fastscore" / "density.py").write_text(
        "from . import noise\nfrom .backends import torch\nimport torch\n"
    )
    assert violations(tmp_path / "fastscore", tmp_path / "kernels") == []
    path = tmp_path / "fastscore" / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    assert reported in violations(tmp_path / "fastscore", tmp_path / "kernels")


def test_importing_fastscore_touches_no_gpu_and_no_optional_package():
    check = """
import sys, torch
before = set(sys.modules)
def refuse(*args, **kwargs):
    raise AssertionError("import fastscore asks for CUDA")
for name in ("_lazy_init", "init", "is_available", "device_count", "get_device_properties", "current_device"):
    setattr(torch.cuda, name, refuse)
import fastscore
new = {name.partition(".")[0] for name in set(sys.modules) - before}
print("new:", *sorted(new & {"triton", "matplotlib", "sklearn", "torchdiffeq", "safetensors", "click"}))
print("initialized:", torch.cuda.is_initialized())
"""
    done = subprocess.run([sys.executable, "-P", "-c", check], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:2] == ["new:", "initialized: False"]

"""Choose the backend of the ops; one predicate serves the choice, the error message and `fastscore info`."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from types import ModuleType

import torch

from ..support.host import chosen
from .interpreting import interpreting


@dataclass(frozen=True)
class Backend:
    """A backend, `why_not(device, dtype)`: the reason why it cannot run there, or None, and where "auto" takes it."""

    name: str
    why_not: Callable[[torch.device, torch.dtype], str | None]
    devices: tuple[str, ...]


def _torch_why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    if dtype not in (torch.float32, torch.float64):
        return f"sums need float32 or float64, got {dtype}"
    return None


@cache
def triton_version() -> str | None:
    """Return the version of the installed package triton, None without it; reading it takes half a millisecond."""
    return version("triton") if find_spec("triton") else None


def _package_why_not() -> str | None:
    found = triton_version()
    if found is None:
        return "the package triton is not installed"
    if tuple(int(part) for part in found.split(".")[:2]) < TRITON:
        return f"its kernels need Triton {TRITON[0]}.{TRITON[1]}, found {found}"
    return None


def _triton_why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    reason = _package_why_not()
    if reason is not None:
        return reason
    if dtype != torch.float32:
        return f"its kernels sum in float32, got {dtype}"
    if device.type == "cpu" and interpreting():
        return None
    if device.type != "cuda":
        return f"needs tensors on a CUDA device, got {device.type}"
    if torch.version.hip is not None:
        return "its kernels are written for NVIDIA's GPUs"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"needs compute capability 8.0, got {capability[0]}.{capability[1]}"
    return None


TRITON = (3, 6)  # older ones cannot hold a network's weights in one tuple


@cache
def native() -> ModuleType | str:
    """Return fastscore._C, the CUDA kernels, or the reason why it cannot be imported; importing it asks no driver."""
    try:
        return importlib.import_module("fastscore._C")
    except ModuleNotFoundError:
        return PURE_WHEEL
    except ImportError as error:
        return f"unusable: {error}"


PURE_WHEEL = (
    "absent: this wheel is pure Python; where there is nvcc of CUDA 13, FASTSCORE_REQUIRE_CUDA=1 pip install . "
    "builds the CUDA kernels or says why it cannot"
)


def _cuda_why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    kernels = native()
    if isinstance(kernels, str):
        return f"fastscore._C is {kernels}"
    if (reason := _package_why_not()) is not None:
        return f"Triton's kernels do what the compiled ones do not cover: {reason}"
    if dtype != torch.float32:
        return f"its kernels sum in float32, got {dtype}"
    if device.type != "cuda":
        return f"needs tensors on a CUDA device, got {device.type}"
    if torch.version.hip is not None:
        return "its kernels are written for NVIDIA's GPUs"
    return kernels.why_not(torch.cuda.current_device() if device.index is None else device.index)


# In order of preference where nothing is measured of a network; `choice.py` orders them for one.
BACKENDS = (
    Backend("cuda", _cuda_why_not, ("cuda",)),
    Backend("triton", _triton_why_not, ("cuda",)),
    Backend("torch", _torch_why_not, ("cpu", "cuda")),
)


def check_name(name: str) -> None:
    """Raise ValueError, naming the valid ones, if there is no backend of that name."""
    known = [backend.name for backend in BACKENDS]
    if not chosen(name, ["auto", *known]):
        raise ValueError(f"backend must be 'auto' or one of {', '.join(known)}; got {name!r}")


def runnable(device: torch.device, dtype: torch.dtype, name: str = "auto") -> tuple[str, ...]:
    """Return the names of the backends that can run, or of the one asked for, in order.

    What the compiled kernels do not cover goes to Triton's: "cuda" stands for both.

    Raises:
        ValueError: for an unknown name, or with each backend's reason where the choice cannot run.
    """
    check_name(name)
    asked = tuple(backend for backend in BACKENDS if name in ("auto", backend.name))
    # Triton's interpreter can run on a CPU, and nobody but a test would want it to.
    wanted = (b for b in asked if name != "auto" or device.type in b.devices or b.name == "torch")
    found = tuple(backend.name for backend in wanted if backend.why_not(device, dtype) is None)
    if found:
        return ("cuda", "triton") if found == ("cuda",) else found
    listed = "; ".join(f"{backend.name}: {backend.why_not(device, dtype)}" for backend in asked)
    raise ValueError(
        f"no backend can run on {device} in {dtype}: {listed}. Use backend='auto' with float32 or float64 data"
    )


def select(device: torch.device, dtype: torch.dtype, name: str = "auto") -> str:
    """Return the first of `runnable`: who makes noise, and evaluates networks that are no row programs."""
    return runnable(device, dtype, name)[0]


@cache
def implementation(name: str) -> ModuleType:
    """Return the module that computes for a backend; imported at first use, since Triton takes a second."""
    return importlib.import_module(f".{name}", __package__)

"""Settings of PyTorch and numpy that a network's code may ask for: they steer a trace, and may change afterwards.

`SETTINGS` maps a name that stands in code, such as "get_num_threads" or "allow_tf32", to a function that returns the
setting as a tuple of plain values, whichever backend it is of. Whether gradients are on, the default dtype and autocast
on the device of the data are no part of it: programs are kept apart by them.
"""

from __future__ import annotations

import decimal
import gc
import locale
import logging
import os
import sys
import threading
import types
from collections.abc import Callable

import numpy as np
import torch

_PLAIN = ("are_deterministic_algorithms_enabled", "is_deterministic_algorithms_warn_only_enabled")
_PLAIN += ("get_deterministic_debug_mode", "get_float32_matmul_precision", "is_warn_always_enabled", "initial_seed")
_PLAIN += ("get_num_threads", "get_num_interop_threads", "is_anomaly_enabled", "is_anomaly_check_nan_enabled")
_PLAIN += ("is_autocast_cache_enabled", "get_default_device", "is_inference_mode_enabled")
_OF_DEVICE = ("is_autocast_enabled", "get_autocast_dtype")
_OLD_AUTOCAST = ("is_autocast_cpu_enabled", "get_autocast_cpu_dtype", "get_autocast_gpu_dtype")
_KERNELS = ("flash_sdp_enabled", "mem_efficient_sdp_enabled", "math_sdp_enabled", "cudnn_sdp_enabled")
_KERNELS += ("fp16_bf16_reduction_math_sdp_allowed", "preferred_linalg_library", "preferred_blas_library")
_OF_MATMUL = ("allow_tf32", "allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction")
_OF_MATMUL += ("allow_fp16_accumulation", "fp32_precision")
_OF_GROUP = ("get_rank", "get_world_size", "is_initialized")

# Of Python itself, by the name of what asks for it, or depends on it.
_OF_PYTHON: dict[str, Callable[[], object]] = {
    "getrecursionlimit": sys.getrecursionlimit,
    "getswitchinterval": sys.getswitchinterval,
    "gettrace": lambda: sys.gettrace() is None,
    "getprofile": lambda: sys.getprofile() is None,
    "isenabled": gc.isenabled,
    "get_threshold": gc.get_threshold,
    **dict.fromkeys(("getcwd", "getcwdb", "cwd", "abspath", "absolute", "relpath"), lambda: _directory()),
    "getpid": os.getpid,
    "get_ident": threading.get_ident,
    "current_thread": lambda: (threading.get_ident(), threading.current_thread().name),
    "active_count": threading.active_count,
    "get_printoptions": lambda: repr((np.get_printoptions(), vars(torch._tensor_str.PRINT_OPTS))),
    **dict.fromkeys(("getcontext", "localcontext", "Decimal"), lambda: _decimal()),
    **dict.fromkeys(("setlocale", "getlocale", "localeconv"), lambda: locale.setlocale(locale.LC_ALL)),
    **dict.fromkeys(("getLogger", "isEnabledFor", "getEffectiveLevel"), lambda: _levels()),
}


def _directory() -> str:
    """Return the working directory, nothing where it is gone."""
    try:
        return os.getcwd()
    except OSError:
        return ""


def _decimal() -> tuple:
    """Return how decimals are rounded, without the flags that a calculation sets."""
    context = decimal.getcontext()
    return tuple(getattr(context, name) for name in ("prec", "rounding", "Emin", "Emax", "capitals", "clamp"))


def _levels() -> tuple:
    """Return the levels of all loggers but those of torch, which a trace keeps quiet."""
    known = [logging.root, *logging.root.manager.loggerDict.values()]
    levels = [(each.name, each.level, each.disabled) for each in known if isinstance(each, logging.Logger)]
    return logging.root.manager.disable, *(each for each in sorted(levels) if not each[0].startswith("torch"))


def _holders() -> list[object]:
    """Return the modules and objects of torch.backends whose attributes are settings."""
    modules = [module for name, module in sorted(sys.modules.items()) if name.startswith("torch.backends")]
    inner = [getattr(module, name, None) for module in modules for name in ("matmul", "conv", "rnn")]
    return [*modules, *(holder for holder in inner if holder is not None)]


def _is_setting(holder: object, name: str) -> bool:
    return isinstance(holder, types.ModuleType) and type(vars(type(holder)).get(name)).__name__ == "ContextProp"


def _find() -> dict[str, Callable[[], tuple]]:
    found: dict[str, list[Callable[[], object]]] = {}

    def add(name: str, read: Callable[[], object]) -> None:
        found.setdefault(name, []).append(read)

    for name in _PLAIN:
        add(name, getattr(torch, name))
    for name in _OLD_AUTOCAST:
        add(name, lambda: tuple((torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda")))
    for name in _OF_DEVICE:
        for device in ("cpu", "cuda"):
            add(name, lambda name=name, device=device: getattr(torch, name)(device))
    for name in _KERNELS:
        if hasattr(torch.backends.cuda, name):
            add(name, lambda name=name: str(getattr(torch.backends.cuda, name)()))
    for holder in _holders():
        names = {key for key in vars(type(holder)) if _is_setting(holder, key)} | {"benchmark_limit"}
        names |= set(() if isinstance(holder, types.ModuleType) else _OF_MATMUL)
        for name in names:
            if _answer(holder, name) is not None:
                add(name, lambda holder=holder, name=name: _answer(holder, name))
    if hasattr(torch.backends, "mha"):
        add("get_fastpath_enabled", torch.backends.mha.get_fastpath_enabled)
    for name, read in _OF_PYTHON.items():
        add(name, read)
    add("geterr", lambda: tuple(np.geterr().values()))
    add("current_device", lambda: torch.cuda.current_device() if torch.cuda.is_initialized() else -1)
    if torch.distributed.is_available():
        for name in _OF_GROUP:
            add(name, _group)
    return {name: lambda reads=tuple(reads): tuple(read() for read in reads) for name, reads in found.items()}


def _answer(holder: object, name: str) -> object:
    """Return a setting, None where a backend does not have it or mixed settings make it raise."""
    try:
        value = getattr(holder, name, None)
    except RuntimeError:
        return None
    return value if isinstance(value, bool | int | str) else None


def of_matrix_products() -> tuple:
    """Return how a GPU's matrix products are to be rounded and summed: which kernels a call takes."""
    return tuple(_answer(torch.backends.cuda.matmul, name) for name in _OF_MATMUL)


def _group() -> tuple:
    group = torch.distributed
    return (group.get_rank(), group.get_world_size()) if group.is_initialized() else ()


SETTINGS = _find()

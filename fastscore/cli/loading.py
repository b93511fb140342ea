"""Turn the words of a command line into objects: schedules, data arrays, and networks from files or factories."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import os
import re
import sys
import traceback
import zipfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.export.passes import move_to_device_pass
from torch.utils._pytree import tree_leaves, tree_unflatten

from ..adapters import from_model
from ..adapters.any_model import adapters_of
from ..density import ScoreDensity
from ..estimator.protocol import Density
from ..process.conditions import shared
from ..process.predictions import what_it_must_say
from ..process.schedules import DDPM, EDM, VE, VP, Cosine, FlowMatching, LiYan, LogSNR, Schedule
from ..support.host import as_tensor
from ..support.spelling import did_you_mean

SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "ddpm-linear": DDPM.linear,
    "ddpm-scaled-linear": DDPM.scaled_linear,
    "ddpm-cosine": DDPM.cosine,
    "vp": VP,
    "cosine": Cosine,
    "ve": VE,
    "edm": EDM,
    "flow": FlowMatching,
    "li-yan": LiYan,
    "log-snr": LogSNR,
}

# How other libraries call them.
ELSEWHERE = {
    "ddpm": "'ddpm-linear' or 'ddpm-cosine'",
    "linear": "'ddpm-linear'",
    "scaled-linear": "'ddpm-scaled-linear', that of Stable Diffusion",
    "squaredcos-cap-v2": "'ddpm-cosine'",
    "vpsde": "'vp'",
    "vesde": "'ve'",
    "flow-matching": "'flow'",
    "rectified-flow": "'flow'",
    "logsnr": "'log-snr'",
}

_ARRAY = re.compile(r"(?P<path>.+\.(?P<kind>npy|npz|pt|safetensors))(?::(?P<key>.+))?")


def schedule_usage() -> str:
    """Return every name that `parse_schedule` knows with its arguments and their defaults, comma-separated."""
    return ", ".join(_usage(name) for name in SCHEDULES)


def parse_schedule(text: str) -> Schedule:
    """Return the schedule of "name", "name:number,number" or a .npy, .npz, .pt or .safetensors file of alphas_cumprod.

    Raises:
        ValueError: for an unknown name (the message lists the valid ones), or arguments that it does not take.
    """
    if _ARRAY.fullmatch(text):
        return DDPM(as_tensor(load_array(text)))
    name, _, given = text.partition(":")
    if name not in SCHEDULES:
        raise ValueError(
            f"schedule must be one of {schedule_usage()}, or a .npy or .pt file with alphas_cumprod; got {text!r}"
            + did_you_mean(name, SCHEDULES, ELSEWHERE)
        )
    wrong = f"schedule {name!r} takes {_usage(name)}, numbers separated by commas; got {text!r}"
    try:
        numbers = [_number(word) for word in given.split(",")] if given else []
    except ValueError:
        raise ValueError(wrong) from None
    try:
        return SCHEDULES[name](*numbers)
    except TypeError:  # too many, or a fraction where a count belongs
        raise ValueError(wrong) from None


def load_array(spec: str) -> np.ndarray | Tensor:
    """Return the array of a .npy, .npz, .pt or .safetensors file; "FILE:key" chooses one of several.

    .npy and .pt files are mapped into memory, so they may be larger than it.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for another kind of file, an unreadable one, or a key that is missing or needed.
        ModuleNotFoundError: for .safetensors without that package.
    """
    match = _ARRAY.fullmatch(spec)
    if match is None:
        raise ValueError(
            f"data must be a .npy, .npz, .pt or .safetensors file, with :key for one of several; got {spec!r}"
        )
    path, kind, key = match["path"], match["kind"], match["key"]
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no data file {path!r} in {os.getcwd()}; check the path")
    try:
        return _READERS[kind](path, key)
    except (_KeyProblem, ModuleNotFoundError):
        raise
    except Exception as error:
        raise ValueError(f"{path} cannot be read as a .{kind} file of plain numbers: {_first_line(error)}") from error


def load_conditions(own: Sequence[str], all_share: Sequence[str]) -> dict[str, object]:
    """Return keyword arguments of the network from texts such as "y=labels.npy", "added.size=sizes.npz:px" or "w=1.5".

    Arguments:
        own: with one entry a sample; a number is shared in any case.
        all_share: shared by all samples.

    Raises:
        ValueError: for a text of another form, or a name that is given twice; and as `load_array`.
    """
    found: dict[str, object] = {}
    for text, is_shared in (*((text, False) for text in own), *((text, True) for text in all_share)):
        name, equals, value = text.partition("=")
        parts = name.split(".")
        if not equals or not all(part.isidentifier() for part in parts):
            raise ValueError(f"a condition must be NAME=FILE or NAME=NUMBER, such as y=labels.npy; got {text!r}")
        inside = found
        for part in parts[:-1]:
            inside = inside.setdefault(part, {})
        if not isinstance(inside, dict) or parts[-1] in inside:
            raise ValueError(f"condition {name!r} is given twice; give it once")
        if _ARRAY.fullmatch(value):
            array = load_array(value)
            if not isinstance(array, Tensor) and array.dtype.kind not in "biufc":
                raise ValueError(
                    f"condition {name!r} must hold numbers, got {array.dtype} in {value}; convert them first"
                )
            inside[parts[-1]] = shared(array) if is_shared else array
            continue
        try:
            inside[parts[-1]] = _number(value)
        except ValueError:
            raise ValueError(
                f"condition {name!r} must be a .npy, .npz, .pt or .safetensors file or a number, got {value!r}"
            ) from None
    return found


def load_density(
    spec: str, schedule: str | None, predicts: str | None, device: torch.device
) -> tuple[Density, dict[str, str]]:
    """Return the density of MODEL on a device, and what identifies the model beside its weights.

    Arguments:
        spec: a .pt2 file of `torch.export.save`, or "package.module:factory".
        schedule, predicts: as in `parse_schedule` and `ScoreDensity`; None where the factory returns a density.

    Raises:
        ValueError: if the model cannot be loaded, or if schedule and predicts are missing or not wanted.
    """
    if spec.endswith(".pt2"):
        model, time = _load_exported(spec, device)
        identity = hashlib.sha256(Path(spec).read_bytes()).hexdigest()
    elif ":" in spec:
        model, time, identity = _call_factory(spec), None, spec
    else:
        raise ValueError(f"the model must be a .pt2 file of torch.export or package.module:factory, got {spec!r}")
    with suppress(NotImplementedError):  # an exported module has no modes
        model.eval()
    if isinstance(model, Density):
        if schedule is not None or predicts is not None:
            raise ValueError(
                f"{spec} returns a ready {type(model).__name__}, which brings its own; drop --schedule and --predicts"
            )
        return model.to(device), {"model": identity}
    if schedule is None or predicts is None:
        missing = "--schedule is" if predicts else "--predicts is" if schedule else "both are"
        needed = ". ".join(
            [what_it_must_say("--predicts")] * (predicts is None)
            + [f"Schedules: {schedule_usage()}"] * (schedule is None)
        )
        raise ValueError(
            f"{spec} is a network; say with --schedule and --predicts how it was trained ({missing} missing): {needed}"
            ". Where another library's objects say both, the factory may return fastscore.from_model(...) of them"
        )
    process = parse_schedule(schedule)
    if time is not None and not time.is_floating_point and not process.discrete:
        raise ValueError(f"{spec} takes {time} timesteps, but schedule {schedule!r} gives fractions; use a ddpm table")
    return ScoreDensity(model, process, predicts, time_dtype=time).to(device), {"model": identity}


def _usage(name: str) -> str:
    parameters = inspect.signature(SCHEDULES[name]).parameters.values()
    arguments = ",".join(f"{p.name}={p.default}" for p in parameters)
    return f"{name}[:{arguments}]" if arguments else name


def _number(word: str) -> int | float:
    return int(word) if re.fullmatch(r"\s*[+-]?\d+\s*", word) else float(word)


def _load_exported(path: str, device: torch.device) -> tuple[nn.Module, torch.dtype]:
    """Return the module of an exported program on a device, and the dtype that it takes times in."""
    if not zipfile.is_zipfile(path):
        what = "is not a file that torch.export.save wrote" if Path(path).exists() else "does not exist"
        raise ValueError(f"the model {path} {what}; expected a .pt2 file, check the path")
    try:
        program = torch.export.load(path)
    except Exception as error:  # a zip file of something else raises whatever its reader meets first
        raise ValueError(
            f"the model {path} is not a file that torch.export.save wrote: {_first_line(error)}"
        ) from error
    names = program.graph_signature.user_inputs
    inputs = [n.meta["val"] for n in program.graph.nodes if n.op == "placeholder" and n.name in names]
    positional = len(tree_leaves(tree_unflatten(range(len(names)), program.call_spec.in_spec)[0]))
    if positional != 2 or not all(isinstance(value, Tensor) for value in inputs[:2]):
        raise ValueError(
            f"{path} takes the inputs {names[:positional]} by position, expected (x_t, t); export a module whose "
            "forward takes these, and conditions as keyword arguments"
        )
    for name, value in zip(names[:2], inputs):
        batch = value.shape[0] if value.ndim else 0
        if isinstance(batch, int):
            raise ValueError(
                f"{path} was exported for {name} of the fixed shape {tuple(value.shape)}; use {_export(names)}"
            )
        highest = program.range_constraints[batch.node.expr].upper
        if highest < 2**31:
            raise ValueError(
                f"{path} was exported for at most {highest} rows at once; use {_export(names)}, without a max"
            )
    random = [str(node.target) for node in program.graph.nodes if _in_train_mode(node)]
    if random:
        raise ValueError(
            f"{path} was exported in train mode ({random[0]}), which makes its density random; "
            "call model.eval() before torch.export.export"
        )
    if inputs[0].device != device:
        program = move_to_device_pass(program, device)
    return program.module(), inputs[1].dtype


def _export(names: tuple[str, ...]) -> str:
    """Return the call of torch.export that leaves the number of rows open, for inputs of these names."""
    if len(names) == 2:
        each = "{0: torch.export.Dim('batch')}"
        return f"torch.export.export(model, (x_t, t), dynamic_shapes=({each}, {each}))"
    given = ", ".join(f"{name!r}: {name}" for name in names[2:])
    shapes = ", ".join(f"{name!r}: {{0: batch}}" for name in names)
    return (
        f"torch.export.export(model, (x_t, t), {{{given}}}, dynamic_shapes={{{shapes}}}) with batch = "
        "torch.export.Dim('batch')"
    )


def _in_train_mode(node: torch.fx.Node) -> bool:
    """Whether a node is a dropout or a normalization that was traced while training."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return False
    given = {**{a.name: value for a, value in zip(schema.arguments, node.args)}, **node.kwargs}
    return given.get("train", given.get("training")) is True and given.get("p", 1) > 0


def _call_factory(spec: str) -> nn.Module:
    module_name, _, name = spec.partition(":")
    if not module_name or not name:
        raise ValueError(f"the model must be a .pt2 file of torch.export or package.module:factory, got {spec!r}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        factory = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{module_name}.".startswith(f"{error.name}."):
            named = module_name.removesuffix(".py")
            remedy = (
                f"write {named}:{name}" if named != module_name else f"it must lie in {os.getcwd()} or be installed"
            )
            raise ValueError(f"there is no module {error.name!r} for the model {spec}; {remedy}") from None
        raise ModuleNotFoundError(f"{spec} imports {error.name!r}, which is not installed; install it") from error
    except Exception as error:
        raise ValueError(f"the module of {spec} cannot be imported: {raised_as(error)}") from error
    try:
        for part in name.split("."):
            factory = getattr(factory, part)
    except AttributeError:
        raise ValueError(
            f"module {module_name!r} has no {name!r}; expected a function without arguments"
            + did_you_mean(name, vars(sys.modules[module_name]), {})
        ) from None
    _check_factory(spec, factory)
    try:
        model = factory()
    except Exception as error:
        raise ValueError(f"{spec} was called without arguments and raised {raised_as(error)}") from error
    return model if isinstance(model, nn.Module) else _opened(spec, model)


def _opened(spec: str, held: object) -> nn.Module:
    """Return the density of what a factory returned that is no network: a pipeline, or (network, scheduler)."""
    parts = held if isinstance(held, tuple) and held else (held,)
    if not adapters_of(*parts):
        raise ValueError(
            f"{spec} must return a torch.nn.Module, a ScoreDensity or what fastscore.from_model opens, such as a "
            f"pipeline of diffusers, got {type(held).__name__}"
        )
    try:
        return from_model(*parts)
    except Exception as error:
        raise ValueError(f"{spec} returns what fastscore.from_model refuses: {error}") from error


def _check_factory(spec: str, factory: object) -> None:
    """Raise ValueError for what is no function, or one that has to be given something."""
    if not callable(factory):
        raise ValueError(
            f"{spec} is a {type(factory).__name__}, expected a function without arguments that returns the network"
        )
    try:
        parameters = inspect.signature(factory).parameters.values()
    except ValueError:  # some built-in functions have no signature
        return
    fixed = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    needed = [p.name for p in fixed if p.default is p.empty]
    if needed:
        raise ValueError(
            f"{spec} needs the argument{'s' * (len(needed) > 1)} {', '.join(needed)}, expected a function without any; "
            "write one that calls it, such as def build(): return ..., and name that"
        )


def raised_as(error: BaseException) -> str:
    """Return an error's kind, the first line of its message, and the line of code that raised it."""
    place = traceback.extract_tb(error.__traceback__)[-1:]
    if isinstance(error, SyntaxError):
        return f"{_first_line(error)} ({error.filename}, line {error.lineno})"
    return _first_line(error) + "".join(f" ({frame.filename}, line {frame.lineno})" for frame in place)


class _KeyProblem(ValueError):
    """A key that is missing, needed or not possible."""


def _pick(path: str, keys: list[str], key: str | None) -> str:
    listed = ", ".join(sorted(keys))
    if key is None and len(keys) == 1:
        return keys[0]
    if key is None:
        raise _KeyProblem(f"{path} holds {len(keys)} arrays ({listed}); choose one as {path}:NAME")
    if key not in keys:
        raise _KeyProblem(f"{path} has no {key!r}; it holds {listed}")
    return key


def _only(path: str, value: np.ndarray | Tensor, key: str | None) -> np.ndarray | Tensor:
    if key is not None:
        raise _KeyProblem(f"{path} holds one array without a name, got the key {key!r}; drop :{key}")
    return value


def _read_npy(path: str, key: str | None) -> np.ndarray:
    return _only(path, np.load(path, mmap_mode="c"), key)  # copy-on-write: torch wants arrays that it may write to


def _read_npz(path: str, key: str | None) -> np.ndarray:
    with np.load(path) as arrays:
        return arrays[_pick(path, arrays.files, key)]


def _read_pt(path: str, key: str | None) -> Tensor:
    stored = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    if isinstance(stored, Tensor):
        return _only(path, stored.detach(), key)
    if not isinstance(stored, dict):
        raise ValueError(f"it holds a {type(stored).__name__}, expected a tensor or a dictionary of tensors")
    return stored[_pick(path, [name for name, value in stored.items() if isinstance(value, Tensor)], key)].detach()


def _read_safetensors(path: str, key: str | None) -> Tensor:
    try:
        from safetensors import safe_open
    except ModuleNotFoundError:
        raise ModuleNotFoundError(f"reading {path} needs the package safetensors; pip install safetensors") from None
    with safe_open(path, framework="pt") as tensors:
        return tensors.get_tensor(_pick(path, list(tensors.keys()), key))


_READERS = {"npy": _read_npy, "npz": _read_npz, "pt": _read_pt, "safetensors": _read_safetensors}


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0]}"

"""Networks, and densities, from functions without arguments that a command line names."""

from __future__ import annotations

import importlib
import inspect
import os
import sys

from torch import nn

from ..adapters import from_model
from ..adapters.any_model import adapters_of
from ..support.spelling import did_you_mean
from .words import raised_as


def call_factory(spec: str) -> nn.Module:
    """Return the network or density that the function of "package.module:factory" returns.

    Raises:
        ValueError: where there is no such function, it needs an argument, or it raises or returns something else.
        ModuleNotFoundError: if its module imports one that is not installed.
    """
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
            f"{spec} is of type {type(factory).__name__}, expected a function without arguments that returns a network"
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

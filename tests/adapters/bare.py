"""Import a module of an installed library without the library's own __init__, torchvision, POT and gdown.

k-diffusion and denoising-diffusion-pytorch import logging, image folders and evaluation suites when they are imported;
their denoisers need none of it. torchvision exists for the CUDA build of torch alone on the package index. POT, which
torchcfm imports as `ot`, takes 170 MB for its optimal transport, and azula downloads pretrained weights with gdown.
"""

import importlib
import importlib.util
import sys
import types
from pathlib import Path

import pytest

STAND_INS = (
    "gdown",
    "ot",
    "torchvision",
    "torchvision.transforms",
    "torchvision.transforms.functional",
    "torchvision.utils",
)


def load(package, *names):
    """Return modules of a package; skip the tests where it or what they import is not installed."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        pytest.skip(f"{package} is not installed", allow_module_level=True)
    added = {}
    if package not in sys.modules:
        added[package] = types.ModuleType(package)
        added[package].__path__, added[package].__spec__ = [str(Path(spec.origin).parent)], spec
    added.update({name: types.ModuleType(name) for name in STAND_INS if name not in sys.modules})
    for name in added:
        parent, _, child = name.rpartition(".")
        if parent in added:
            setattr(added[parent], child, added[name])
    sys.modules.update(added)
    try:
        return [importlib.import_module(f"{package}.{name}") for name in names]
    except ModuleNotFoundError as error:
        pytest.skip(f"{package} needs {error.name}", allow_module_level=True)
    finally:
        for name in added:
            if name != package:
                del sys.modules[name]

"""The arrays of an estimate by name, as a .npz file holds them without pickle."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ..support.files import read_arrays, write_arrays
from ..support.host import kind_of
from .curve import SUMS
from .methods import METHODS

PER_SAMPLE = "log_prob", "stderr", "variance", "jump", "nfe", "seed", "sample_index", "ends", "rule_error"
WORDS = "method", "noise", "control"  # files of before had no control
OF_A_DATA_SET = "sample_index", "log_prob", "stderr", "nfe"  # what `evaluate_dataset` writes
IN_A_FILE = {*PER_SAMPLE, *WORDS[:2], *(f"curve_{name}" for name in (*SUMS, "count")), "dims", "offset"}
WHOLE = "nfe", "seed", "sample_index"
LEAST = {"stderr": 0, "variance": 0, "nfe": 1, "dims": 1, "curve_count": 0}
NUMBERS = "log_prob", "offset", *LEAST  # never NaN
SHAPES = {"ends": (2, 7), "rule_error": (2,)}  # a sample; of all others one number
SAID = {
    "method": (*METHODS, "discrete_log_prob"),
    "noise": ("sobol", "independent"),
    "control": ("reference", "self"),
}


def path_of(path: object) -> Path:
    """Return the path of a file; raise ValueError for what is none."""
    if not isinstance(path, str | os.PathLike):
        raise ValueError(f"path must be the name of a .npz file, such as 'estimate.npz', got {kind_of(path)}")
    return Path(path)


def write(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write the arrays of an estimate to a .npz file, as `Estimate.save`."""
    if path.suffix != ".npz":
        raise ValueError(f"an estimate is saved to a .npz file, got {str(path)!r}")
    if path.is_dir():
        raise ValueError(f"an estimate is saved to a file, got the folder {str(path)!r}; give another name")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {str(path.parent)!r} for {path.name}; make it first")
    write_arrays(path, arrays)


def read(path: Path) -> dict[str, np.ndarray]:
    """Return the arrays in a file of `Estimate.save`, checked, with what `Estimate.load` raises."""
    try:
        arrays = read_arrays(path)
    except OSError:
        raise
    except Exception as error:
        raise ValueError(
            f"{path} is no .npz file of Estimate.save, or damaged ({type(error).__name__}); a .csv or .npz result "
            "of fastscore evaluate is read with numpy"
        ) from error
    if set(OF_A_DATA_SET) <= set(arrays) and "variance" not in arrays:
        raise ValueError(
            f"{path} is a result of fastscore evaluate or evaluate_dataset, which holds one number a sample and "
            "not all of an Estimate; read it with numpy.load"
        )
    if missing := sorted(IN_A_FILE - set(arrays)):
        raise ValueError(f"{path} is no file of Estimate.save: it has no {', '.join(missing)}")
    try:
        _check(arrays)
    except ValueError as error:
        raise ValueError(f"{path} is no file of Estimate.save, or was changed: {error}") from error
    return arrays


def _check(arrays: Mapping[str, np.ndarray]) -> None:
    """Raise ValueError for the first array that is not what `to_arrays` makes."""
    count, draws = (arrays[name].shape[:1] for name in ("log_prob", "curve_log_snr"))
    expected = {name: ("i" if name in WHOLE else "f", count + SHAPES.get(name, ())) for name in PER_SAMPLE}
    expected |= {f"curve_{name}": ("f", draws) for name in SUMS}
    expected |= {"curve_count": ("i", ()), "offset": ("f", ()), "dims": ("i", arrays["dims"].shape and count)}
    if "table" in arrays:
        expected["table"] = ("f", arrays["table"].shape[:1])
    for name, (kind, shape) in expected.items():
        found = arrays[name]
        if (found.dtype.kind, found.shape) != (kind, shape):
            said = {"i": "integers", "f": "floating point numbers"}[kind]
            raise ValueError(f"{name} must be {said} of shape {shape}, got {found.dtype} of {found.shape}")
        if found.itemsize > 8 or not found.dtype.isnative:
            raise ValueError(f"{name} must be numbers of this machine, 8 bytes at most, got {found.dtype.str}")
    for name in NUMBERS:
        least = LEAST.get(name)
        if np.isnan(arrays[name]).any() or (least is not None and bool((arrays[name] < least).any())):
            wanted = "numbers" if least is None else f"{least} or more"
            raise ValueError(f"{name} must be {wanted}, got {np.ravel(arrays[name]).tolist()[:4]}")
    for name, words in SAID.items():
        if name in arrays and str(arrays[name]) not in words:
            raise ValueError(f"{name} must be one of {', '.join(words)}; got {str(arrays[name])!r}")

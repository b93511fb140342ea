"""Evaluate a whole data set in blocks that survive whatever interrupts them.

Beside the result `out` a folder `out.partial` holds, while the work lasts,

- ``manifest.json``: the fingerprint, which says what determines every number, and the number of blocks;
- ``fitted.npz``: what `ScoreDensity.fit` learned, so that a resumed run need not fit again;
- ``block-000012.npz``: the estimates of one finished block;
- ``lock`` and ``pid``: the lock of the process at work, which the system drops when that process ends.

Every file is written under another name, synced to the disk and renamed, so it is whole or absent. A sample's noise is
keyed by its index in the data set: blocks, interruptions and the split over processes change no number beyond rounding,
and with the same blocks on the same machine not one bit.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor
from tqdm.auto import tqdm

from .density import ScoreDensity
from .estimate import CurveSum, Estimate, discretization_bound, truncation_bound
from .memory import parse_bytes
from .network import predict
from .nodes import Rule, make_rule, method_table
from .samples import check_samples

Block = dict[str, np.ndarray]
BLOCK_KEYS = ("sample_index", "log_prob", "stderr", "nfe", "curve_mean", "curve_stderr", "discretization", "noise")


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during `evaluate_dataset`; the message says how many blocks are kept and how to resume."""


def evaluate_dataset(
    density: ScoreDensity,
    data: Tensor | np.ndarray,
    out: str | os.PathLike,
    *,
    nfe: int | None = None,
    seed: int = 0,
    method: str = "density",
    target_stderr: float | None = None,
    max_nfe: int = 16384,
    memory: int | str | None = None,
    batch: int = 256,
    fit: Tensor | np.ndarray | None = None,
    bins: int | None = None,
    low: float = -1.0,
    high: float = 1.0,
    indices: Sequence[int] | Tensor | None = None,
    identity: dict[str, str] | None = None,
    restart: bool = False,
    progress: bool = False,
) -> Estimate:
    """Write the log-density of every sample to a file, resuming where an earlier call with the same arguments stopped.

    Arguments:
        density: is fitted in place if `fit` is given.
        data: floating point, shape (N, *shape); an array mapped into memory may be larger than it.
        out: a .npz or .csv file with sample_index, log_prob and stderr (nats), nfe, and bits_per_dim if `bins` is given.
        nfe, seed, method, target_stderr, max_nfe, memory: as in `ScoreDensity.estimate`; the sample index is that of
            the data set.
        batch: samples in a block: what an interruption may cost.
        fit: training data, shape (M, *shape), for `ScoreDensity.fit` with this seed.
        bins, low, high: as in `Estimate.bits_per_dim`.
        indices: which samples, all by default. A process of several takes `range(rank, N, world_size)` and its own out.
        identity: further names and values that must agree on resuming, such as the hash of a model file.
        restart: discard an unfinished run and replace a finished result.
        progress: show a progress bar and say what is resumed, on stderr.

    Returns:
        The `Estimate` of all the samples, as `ScoreDensity.estimate` would return it.

    Raises:
        ValueError: for data or arguments that do not fit together, or an unfinished run with other arguments.
        FileExistsError: if the result is there already.
        BlockingIOError: if another process works on the same out.
        Interrupted: on Ctrl-C; finished blocks are kept.
    """
    out = Path(out)
    if out.suffix not in (".npz", ".csv"):
        raise ValueError(f"out must be a .npz or .csv file, got {str(out)!r}")
    index = _check_index(indices, len(_check_data("data", data)))
    first = _rows(data, index[:1], density)
    _check_network(density, first)
    if fit is not None and tuple(_check_data("fit", fit).shape[1:]) != tuple(data.shape[1:]):
        raise ValueError(f"fit has samples of shape {tuple(fit.shape[1:])}, but data has {tuple(data.shape[1:])}")
    nfe = density.nfe if nfe is None else nfe
    make_rule(density.nodes.density, nfe, density.schedule, method)  # raises now rather than after the fit
    options = {
        "nfe": nfe,
        "seed": seed,
        "method": method,
        "target_stderr": target_stderr,
        "max_nfe": max_nfe,
        "memory": _budget(memory, first.device),
    }
    blocks = index.split(batch)
    run = _Run(out, batch, progress)
    with run.locked():
        fingerprint = {**_fingerprint(density, data, blocks, fit), **options, "batch": batch, **(identity or {})}
        options["memory"] = run.open(fingerprint, len(blocks), restart, keep_memory=memory is None)["memory"]
        try:
            if fit is not None:
                _fit(density, fit, seed, options["memory"], run)
            finished = _evaluate_blocks(density, data, blocks, options, run)
        except KeyboardInterrupt:
            kept = f"{len(run.finished())} of {len(blocks)} blocks are kept in {run.folder}"
            raise Interrupted(f"interrupted; {kept}. Run the same command again to resume") from None
        result = _merge(
            density, finished, data[0].size if isinstance(data, np.ndarray) else data[0].numel(), nfe, method
        )
        _write_result(run, finished, result, None if bins is None else result.bits_per_dim(bins, low, high))
        run.remove()
    return result

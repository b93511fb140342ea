"""Evaluate a whole data set in blocks that survive whatever interrupts them.

Beside the result `out` a folder `out.partial` (`RunFolder`) keeps the estimates of every finished block, and what
`ScoreDensity.fit` learned, until all are merged. A sample's noise is keyed by its index in the data set: blocks,
interruptions and the split over processes change no number beyond rounding, and an interruption not one bit.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from .dataset import Array, check_data, digest, digest_data, take
from .density import ScoreDensity
from .estimate import CurveSum, Estimate, discretization_bound, log_width, truncation_bound
from .memory import parse_bytes
from .network import predict
from .nodes import make_rule, method_table
from .run_folder import RunFolder
from .samples import check_samples

Block = dict[str, np.ndarray]
BLOCK_KEYS = {"sample_index", "log_prob", "stderr", "nfe", "curve_mean", "curve_stderr", "discretization", "noise"}
FIT_BLOCK = 4096


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during `evaluate_dataset`; the message says how many blocks are kept and how to resume."""


def evaluate_dataset(
    density: ScoreDensity,
    data: Array,
    out: str | os.PathLike,
    *,
    nfe: int | None = None,
    seed: int = 0,
    method: str = "density",
    target_stderr: float | None = None,
    max_nfe: int = 16384,
    memory: int | str | None = None,
    batch: int = 256,
    fit: Array | None = None,
    bins: int | None = None,
    low: float = -1.0,
    high: float = 1.0,
    indices: Sequence[int] | None = None,
    identity: dict[str, str] | None = None,
    restart: bool = False,
    progress: bool = False,
) -> Estimate:
    """Write the log-density of every sample to a file, going on where a call with the same arguments was interrupted.

    Arguments:
        density: the density, on the device to use; fitted in place if `fit` is given.
        data: floating point, shape (N, *shape); an array mapped into memory may be larger than it.
        out: a .npz or .csv file: sample_index, log_prob and stderr in nats, nfe, and with `bins` bits_per_dim.
        nfe, seed, method, target_stderr, max_nfe, memory: as in `ScoreDensity.estimate`.
        batch: samples in a block: what an interruption may cost.
        fit: training data, shape (M, *shape), for `ScoreDensity.fit` with this seed.
        bins, low, high: as in `Estimate.bits_per_dim`.
        indices: which samples, all by default. Of several processes each takes `range(rank, N, world_size)` and an out.
        identity: further names and values that a resumed run must share, such as the hash of a model file.
        restart: discard an unfinished run and replace a finished result.
        progress: show a progress bar on stderr.

    Returns:
        The `Estimate` of these samples, as `ScoreDensity.estimate` would return it.

    Raises:
        ValueError: for data or arguments that do not fit together, or an unfinished run with other ones.
        FileExistsError: if the result is there already.
        BlockingIOError: if another process works on the same out.
        Interrupted: on Ctrl-C; finished blocks are kept.
    """
    run = RunFolder(_check_out(out))
    device = next(density.model.parameters(), density.reference.weight).device
    options = {
        "nfe": density.nfe if nfe is None else nfe,
        "seed": seed,
        "method": method,
        "target_stderr": target_stderr,
        "max_nfe": max_nfe,
    }
    log_width(bins, low, high)  # what is wrong with them is better said before the work than after it
    with run.locked():
        options["memory"] = _budget(memory, device, run)
        work = _Work.check(density, data, indices, batch, device, options)
        try:
            run.open({**(identity or {}), **work.fingerprint(fit)}, restart)
            if fit is not None:
                work.fit(fit, run, progress)
            finished = work.finish(run, progress)
        except KeyboardInterrupt:
            raise Interrupted(
                f"interrupted: {len(run.blocks())} of {len(work.blocks)} blocks are kept in {run.folder}; "
                "run the same again to resume"
            ) from None
        result = work.merge(finished)
        bits = {} if bins is None else {"bits_per_dim": result.bits_per_dim(bins, low, high)}
        _write_result(run, work, result, bits)
        run.clear()
    return result


@dataclass(frozen=True)
class _Work:
    """What to estimate: checked data, the data-set indices of each block, and the arguments of `estimate`."""

    density: ScoreDensity
    data: Array
    blocks: tuple[Tensor, ...]
    device: torch.device
    options: dict

    @classmethod
    def check(
        cls,
        density: ScoreDensity,
        data: Array,
        indices: Sequence[int] | None,
        batch: int,
        device: torch.device,
        options: dict,
    ) -> _Work:
        """Raise ValueError where data, indices, network and options do not fit together, before work begins."""
        check_data("data", data)
        if batch < 1:
            raise ValueError(f"batch must be at least 1 sample, got {batch}")
        index = torch.arange(len(data)) if indices is None else torch.as_tensor(indices, dtype=torch.int64)
        if index.ndim != 1 or not len(index) or int(index.min()) < 0 or int(index.max()) >= len(data):
            raise ValueError(f"indices must be a list of numbers from 0 to {len(data) - 1}, got {indices!r}")
        if options["target_stderr"] is not None and not options["target_stderr"] > 0:
            raise ValueError(f"target_stderr must be positive (nats), got {options['target_stderr']}")
        make_rule(density.nodes.density, options["nfe"], density.schedule, options["method"])
        work = cls(density, data, index.split(batch), device, options)
        _check_network(density, work.rows(index[:1]))
        return work

    def rows(self, index: Tensor) -> Tensor:
        return take(self.data, index).to(self.device)

    def fingerprint(self, fit: Array | None) -> dict:
        """Return by name all that the numbers depend on, so that a resumed run can say what differs."""
        density, shape = self.density, tuple(self.data.shape)
        if fit is not None:
            check_data("fit data", fit, shape[1:])
        chosen, kind = torch.cat(self.blocks), str(self.data.dtype).removeprefix("torch.")
        fitted = digest(_fitted_state(density)) if fit is None else "from fit data"
        fit_blocks = () if fit is None else torch.arange(len(fit)).split(FIT_BLOCK)
        return {
            "network": digest(density.model.state_dict()),
            "schedule": f"{density.schedule!r} {digest({'log_snr': method_table(density.schedule)[1]})}",
            "predicts": density.predicts,
            "noise": density.noise,
            "time dtype": str(density.time_dtype),
            "reference and nodes": fitted,
            "fit data": digest_data("fit data", fit, fit_blocks),
            "data": f"{kind} {shape} {digest_data('data', self.data, self.blocks)}",
            "indices": f"{len(chosen)} {digest({'index': chosen})}",
            "batch": len(self.blocks[0]),
            "device": self.device.type,
            "fastscore": version("fastscore"),
            "torch": torch.__version__,
            **self.options,
        }

    def fit(self, data: Array, run: RunFolder, progress: bool) -> None:
        """Fit the density, or load what this run fitted before."""
        path = run.folder / "fitted.npz"
        stored = run.read_arrays(path)
        if stored is None:
            x = take(data, slice(None)).to(self.device)
            self.density.fit(x, seed=self.options["seed"], memory=self.options["memory"], progress=progress)
            stored = {name: value.cpu().numpy() for name, value in _fitted_state(self.density).items()}
            run.write_arrays(path, stored)
        else:
            state = {name: torch.from_numpy(value) for name, value in stored.items()}
            self.density.load_state_dict(state, strict=False)

    def finish(self, run: RunFolder, progress: bool) -> list[Block]:
        """Estimate every block that is not finished yet; return all."""
        finished = [_read_block(run, i, index) for i, index in enumerate(self.blocks)]
        done = [index for index, block in zip(self.blocks, finished) if block is not None]
        if done and progress:
            tqdm.write(f"resuming: {len(done)} of {len(self.blocks)} blocks done", file=sys.stderr)
        counts = {"total": sum(map(len, self.blocks)), "initial": sum(map(len, done))}
        with tqdm(**counts, disable=not progress, unit="sample", desc=self.options["method"]) as bar:
            for i, index in enumerate(self.blocks):
                if finished[i] is None:
                    finished[i] = self.estimate(index)
                    run.write_arrays(run.block(i), finished[i])
                    bar.update(len(index))
        return finished

    def estimate(self, index: Tensor) -> Block:
        result = self.density.estimate(self.rows(index), sample_index=index, **self.options)
        return {
            "sample_index": index.numpy(),
            "log_prob": result.log_prob.cpu().numpy(),
            "stderr": result.stderr.cpu().numpy(),
            "nfe": result.nfe.cpu().numpy(),
            "curve_mean": result.log_snr_curve.mean.numpy(),
            "curve_stderr": result.log_snr_curve.stderr.numpy(),
            "discretization": np.float64(result.discretization),
            "noise": np.array(result.noise),
        }

    def merge(self, blocks: list[Block]) -> Estimate:
        """Return the estimate of all blocks, with the curve and the bounds of all samples together."""
        nfe, method = self.options["nfe"], self.options["method"]
        rule = make_rule(self.density.nodes.density, nfe, self.density.schedule, method)
        total, offset = CurveSum(rule), 0.0
        for block in blocks:
            mean, stderr = (torch.from_numpy(block[name]) for name in ("curve_mean", "curve_stderr"))
            count = len(block["log_prob"])
            total.count += count
            total.total += count * mean
            total.squares += count * (mean**2 + ((count - 1) * stderr**2 if count > 1 else 0.0))
            offset += count * float(block["discretization"])
        curve = total.curve()
        joined = {k: torch.from_numpy(np.concatenate([b[k] for b in blocks])) for k in ("log_prob", "stderr", "nfe")}
        return Estimate(
            **joined,
            log_snr_curve=curve,
            truncation=truncation_bound(curve),
            discretization=discretization_bound(curve, rule) if method == "density" else offset / total.count,
            dims=math.prod(self.data.shape[1:]),
            method=method,
            noise=str(blocks[0]["noise"]),
        )


def _read_block(run: RunFolder, number: int, index: Tensor) -> Block | None:
    """Return a finished block; None if its file is missing, damaged or another's."""
    block = run.read_arrays(run.block(number))
    if block is None or set(block) != BLOCK_KEYS or not np.array_equal(block["sample_index"], index.numpy()):
        return None
    return block


def _write_result(run: RunFolder, work: _Work, result: Estimate, bits: dict[str, Tensor]) -> None:
    columns = {"sample_index": torch.cat(work.blocks), "log_prob": result.log_prob, "stderr": result.stderr}
    arrays = {name: column.numpy() for name, column in {**columns, "nfe": result.nfe, **bits}.items()}
    if run.out.suffix == ".npz":
        run.write_arrays(run.out, arrays)
        return

    def write_csv(file: BinaryIO) -> None:
        for row in chain([list(arrays)], zip(*arrays.values())):
            # str of a numpy number is the shortest text that reads back as the same number.
            file.write((",".join(map(str, row)) + "\n").encode())

    run.write(run.out, write_csv)


def _check_out(out: str | os.PathLike) -> Path:
    path = Path(out)
    if path.suffix not in (".npz", ".csv"):
        raise ValueError(f"out must be a .npz or .csv file, got {str(out)!r}")
    return path


def _check_network(density: ScoreDensity, x: Tensor) -> None:
    """Call the network on two rows of the first sample; raise ValueError with its reason if it cannot take them."""
    samples = check_samples(x, None, ({},), density.model)
    ends = torch.tensor(density.schedule.log_snr_range, dtype=torch.float64)
    time = density.schedule.time(ends).to(x.device)
    try:
        with torch.no_grad():
            rows, cond = samples.x[:, None].expand(1, 2, -1), samples.conds[0]
            predict(density.model, rows, time, cond, samples.shape, density.time_dtype)
    except Exception as error:
        reason = (str(error).strip().splitlines() or ["no message"])[0]
        raise ValueError(
            f"the network does not take data of shape {samples.shape} a sample: {type(error).__name__}: {reason}"
        ) from error


def _budget(memory: int | str | None, device: torch.device, run: RunFolder) -> int | None:
    """Return the bytes of the whole run: a resumed run must cut the same chunks, whatever is free by then."""
    if memory is not None:
        return parse_bytes(memory)
    if device.type != "cuda":
        return None
    return run.fingerprint.get("memory") or torch.cuda.mem_get_info(device)[0] // 2


def _fitted_state(density: ScoreDensity) -> dict[str, Tensor]:
    return {k: v for k, v in density.state_dict().items() if not k.startswith("model.")}

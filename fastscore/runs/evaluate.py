"""Evaluate a whole data set in blocks that survive whatever interrupts them, with one process or many.

Beside the result `out` a folder `out.partial` (`RunFolder`) keeps the estimates of every finished block, and what
`ScoreDensity.fit` learned, until all are merged. Several processes (`Ranks`) share the blocks that are missing. They
meet before the work, to agree on what it is, and after it, so that rank 0 can merge; in between none waits for another.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from ..density import ScoreDensity
from ..estimator.bins import HIGH, LOW, Bins, in_numbers, log_width, warn_if_outside
from ..estimator.estimate import Estimate, from_arrays
from ..estimator.protocol import Density, check_density
from ..process.network import model_device
from ..process.taken_dtype import model_dtype
from ..support.host import flag, seed_of, whole
from ..support.memory import parse_bytes
from ..support.progress import progress_bar
from .answers import alike
from .blocks import Work, fitted_state
from .condition_data import DataConditions
from .data_mask import DataMask
from .dataset import Array, check_data, take
from .ranks import OtherRankFailed, Ranks
from .run_folder import RunFolder


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during `evaluate_dataset`; the message says how many blocks are kept and how to resume."""


def evaluate_dataset(
    density: Density,
    data: Array,
    out: str | os.PathLike[str],
    *,
    nfe: int | None = None,
    seed: int = 0,
    method: str = "density",
    control: str = "auto",
    target_stderr: float | None = None,
    max_nfe: int = 16384,
    memory: int | str | None = None,
    batch: int = 256,
    cond: dict[str, object] | None = None,
    mask: Array | None = None,
    fit: Array | None = None,
    fit_cond: dict[str, object] | None = None,
    fit_mask: Array | None = None,
    fit_evaluations: int | None = None,
    bins: Bins = None,
    low: float = LOW,
    high: float = HIGH,
    indices: Sequence[int] | None = None,
    identity: dict[str, str] | None = None,
    restart: bool = False,
    progress: bool | None = None,
    ranks: Ranks | None = None,
    **named: object,
) -> Estimate | None:
    """Write the log-density of every sample to a file, going on where a call with the same arguments was interrupted.

    Arguments:
        density: `ScoreDensity` or `Transformed`, on the device to use; fitted in place if `fit` is given.
        data: floating point, shape (N, *shape); an array mapped into memory may be larger than it.
        out: a .npz or .csv file: sample_index, log_prob and stderr in nats, nfe, the estimates truncation and
            discretization of each sample in nats, with `bins` bits_per_dim, and with a mask dims.
        nfe, seed, method, control, target_stderr, max_nfe, memory: as in `ScoreDensity.estimate`.
        batch: samples in a block: what an interruption may cost.
        cond: keyword arguments of the network: arrays with one entry a sample of the data, shape (N, ...), which go
            along in blocks; what all samples share is a number, a text, or in `fastscore.shared`. Fractions come in the
            dtype of the network's parameters.
        mask: True (or 1) for the entries that count, as in `ScoreDensity.estimate`: of each sample, with a first size
            of N, or one for all; fewer dimensions than the data are those of places, (N, L) for data (N, L, D). Bits
            per dimension are by each sample's own number of entries.
        fit: training data, shape (M, *shape), for `ScoreDensity.fit` with this seed.
        fit_cond: keyword arguments of the network for these, as `cond`, with M entries.
        fit_mask: which entries of these count; it has to be given with a mask, unless that is one for all.
        fit_evaluations: bound of the network evaluations that the fit spends; that of `ScoreDensity.fit` by default.
        bins, low, high: as in `Estimate.bits_per_dim`; data outside [low, high) are warned of.
        indices: which samples, all by default.
        identity: further names and values that a resumed run must share, such as the hash of a model file.
        restart: discard an unfinished run and replace a finished result.
        progress: show a progress bar of rank 0's own share; by default where stderr is a terminal
            (`fastscore.support.progress`). Unless it is False, a run that is resumed says so in a line on stderr.
        ranks: this process among those that call with the same arguments and share a file system; see
            `Ranks.of_environment`. Their number changes no result, and may be another when a run is resumed.

    Returns:
        The `Estimate` of these samples, as `ScoreDensity.estimate` would return it; on other ranks than 0, None.

    Raises:
        TypeError: if the density is none.
        ValueError: for data or arguments that do not fit together, or an unfinished run with other ones.
        FileExistsError: if the result is there already.
        BlockingIOError: if another process works on the same out.
        Interrupted: on Ctrl-C; finished blocks are kept.
        OtherRankFailed: if another rank failed, or is gone; finished blocks are kept.
    """
    if named:
        name = next(iter(named))
        raise ValueError(
            f"{name} is no argument of evaluate_dataset; a keyword of the network goes as cond={{{name!r}: ...}}, an "
            "array with one entry a sample of the data"
        )
    run, ranks = RunFolder(_check_out(out)), ranks or Ranks()
    core = check_density(density).core
    device = model_device(core.model, core.reference.weight.device)
    options = {
        "nfe": density.nfe if nfe is None else nfe,
        "seed": seed_of(seed),
        "method": method,
        "control": control,
        "target_stderr": target_stderr,
        "max_nfe": whole("max_nfe", max_nfe),
    }
    if not isinstance(identity, dict | None):
        raise ValueError(
            f"identity must be a dict of names and values, got {identity!r}, such as {{'model': its hash}}"
        )
    restart = flag("restart", restart)
    if fit is not None:
        check_data("fit data", fit)
    if fit is None and fit_evaluations is not None:
        raise ValueError(
            f"fit_evaluations={fit_evaluations} (--fit-evaluations) bounds a fit and there is no training data; give "
            "fit (--fit), or leave it out"
        )
    fit_conditions = DataConditions.of("fit_cond", fit_cond, 0 if fit is None else len(fit))
    fitted_mask = _mask_of_fit(mask, data, fit_mask, fit)
    bins, low, high = in_numbers(bins, low, high)
    log_width(bins, low, high)  # what is wrong with them is better said before the work than after it
    with run.locked() if ranks.first else nullcontext():
        options["memory"] = ranks.on_first(lambda: _budget(memory, device, run))
        try:
            work, digests, outside = _agree(
                ranks,
                lambda: Work.check(density, data, indices, batch, device, options, cond, mask),
                None if bins is None else (low, high),
            )

            def begin() -> tuple[str, list[int]]:
                found = work.fingerprint(digests, fit, fit_conditions, fitted_mask)
                found["fit evaluations"] = fit_evaluations
                key = run.open({**(identity or {}), **found}, restart)
                if fit is not None:
                    spent = {} if fit_evaluations is None else {"evaluations": fit_evaluations}
                    _fit(work, fit, fit_conditions, fitted_mask, run, progress=progress, **spent)
                return key, [i for i in range(len(work.blocks)) if work.read(run, i, key) is None]

            if ranks.first and bins is not None:
                warn_if_outside(outside, bins, low, high)
            key, missing = ranks.on_first(begin)
            if fit is not None and not ranks.first:
                _load_fit(core, run)
            _finish(work, missing, key, run, ranks, progress)
            ranks.gather(lambda: None)  # all blocks are written
        except (KeyboardInterrupt, OtherRankFailed) as error:
            raise _with_what_is_kept(error, run, -(-_count(data, indices) // batch)) from None
        if not ranks.first:
            return None
        blocks = (work.read(run, i, key) or work.estimate(i) for i in range(len(work.blocks)))
        result = Estimate.cat([from_arrays(block) for block in blocks])
        bits = {} if bins is None else {"bits_per_dim": result.bits_per_dim(bins, low, high)}
        _write_result(run, work, result, bits)
        run.clear()
    return result


def _agree(
    ranks: Ranks, check: Callable[[], Work], ends: tuple[float, float] | None
) -> tuple[Work, list[tuple[str, str, str]], Tensor]:
    """Return the checked work, every block's digests, and how many entries lie outside of the ends of the levels.

    Of the data each rank reads its share.
    """
    work = None

    def look() -> tuple[dict, list[tuple[str, str, str]], Tensor]:
        nonlocal work
        work = check()
        share = ranks.share(work.blocks)
        return work.setting(), work.digests(share), work.outside(share, *ends) if ends else torch.zeros(3, device="cpu")

    found = ranks.gather(look)
    settings = [setting for setting, *_ in found]
    differs = [key for key in settings[0] if not all(alike(setting[key], settings[0][key]) for setting in settings)]
    if differs:
        values = [setting[differs[0]] for setting in settings]
        raise ValueError(
            f"the processes do not do the same work: {differs[0]} is {', '.join(map(str, values))} on ranks 0 to "
            f"{ranks.size - 1}; start all with the same arguments, and seed a network that is random at its start"
        )
    digests = [found[i % ranks.size][1][i // ranks.size] for i in range(len(work.blocks))]
    return work, digests, sum(counts for *_, counts in found)


def _mask_of_fit(mask: Array | None, data: Array, fit_mask: Array | None, fit: Array | None) -> DataMask | None:
    """Return which entries of the training data count: as in the data, if all of these have the same mask."""
    if fit is None:
        return None
    if fit_mask is not None or mask is None:
        return DataMask.of("fit_mask", fit_mask, tuple(fit.shape))
    same = DataMask.of("mask", mask, tuple(data.shape))
    if same.shared:
        return same
    raise ValueError(
        "the data have a mask for each sample and the fit data none; give fit_mask (--fit-mask), with ones where all "
        "of their entries count"
    )


def _fit(
    work: Work,
    data: Array,
    conditions: DataConditions,
    mask: DataMask | None,
    run: RunFolder,
    **options: Any,
) -> None:
    """Fit the density, or load what this run fitted before."""
    if not _load_fit(work.density.core, run):
        # Where they are: `fit` takes those that it uses to the network's device.
        x, where = take(data, slice(None)), torch.device("cpu")
        cond = conditions.at(slice(None), where, model_dtype(work.density.model, torch.float32))
        given = {"cond": cond, "mask": None if mask is None else mask.at(slice(None), x.device)} | options
        work.density.fit(x, seed=work.options["seed"], memory=work.options["memory"], **given)
        stored = {name: value.cpu().numpy() for name, value in fitted_state(work.density.core).items()}
        run.write_arrays(run.fitted, stored)


def _load_fit(core: ScoreDensity, run: RunFolder) -> bool:
    stored = run.read_arrays(run.fitted)
    if stored is None:
        return False
    core.load_state_dict({name: torch.from_numpy(value) for name, value in stored.items()}, strict=False)
    return True


def _finish(work: Work, missing: list[int], key: str, run: RunFolder, ranks: Ranks, progress: bool | None) -> None:
    """Estimate this rank's share of the missing blocks."""
    done, progress = len(work.blocks) - len(missing), progress if ranks.first else False
    if done and progress is not False:
        print(f"resuming: {done} of {len(work.blocks)} blocks done", file=sys.stderr, flush=True)
    mine = ranks.share(missing)
    name = work.options["method"] + (f", 1 of {ranks.size} processes" if ranks.size > 1 else "")
    with progress_bar(progress, total=sum(len(work.blocks[i]) for i in mine), unit="sample", desc=name) as bar:
        for i in mine:
            run.write_arrays(run.block(i), work.estimate(i) | {"run": np.array(key)})
            bar.update(len(work.blocks[i]))


def _with_what_is_kept(error: BaseException, run: RunFolder, blocks: int) -> BaseException:
    kept = len(run.blocks())
    resume = f"{kept} of {blocks} blocks are kept in {run.folder}; run the same again to resume"
    if isinstance(error, OtherRankFailed):
        return OtherRankFailed(f"{error}; {resume}" if kept else str(error))
    return Interrupted(f"interrupted: {resume}")


def _count(data: Array, indices: Sequence[int] | None) -> int:
    return len(data) if indices is None else len(indices)


def _write_result(run: RunFolder, work: Work, result: Estimate, bits: dict[str, Tensor]) -> None:
    columns = {"sample_index": torch.cat(work.blocks), "log_prob": result.log_prob, "stderr": result.stderr}
    columns |= {"nfe": result.nfe, "truncation": result.truncation_per_sample.to(result.log_prob)}
    columns |= {"discretization": result.discretization_per_sample.to(result.log_prob)}
    own = {"dims": result.dims} if isinstance(result.dims, Tensor) else {}
    arrays = {name: column.numpy() for name, column in {**columns, **own, **bits}.items()}
    if run.out.suffix == ".npz":
        run.write_arrays(run.out, arrays)
        return

    def write_csv(file: BinaryIO) -> None:
        for row in chain([list(arrays)], zip(*arrays.values())):
            # str of a numpy number is the shortest text that reads back as the same number.
            file.write((",".join(map(str, row)) + "\n").encode())

    run.write(run.out, write_csv)


def _check_out(out: str | os.PathLike[str]) -> Path:
    path = Path(out) if isinstance(out, str | os.PathLike) else None
    if path is None or path.suffix not in (".npz", ".csv"):
        raise ValueError(f"out must be a .npz or .csv file, got {out!r}")
    return path


def _budget(memory: int | str | None, device: torch.device, run: RunFolder) -> int | None:
    """Return the bytes of the whole run: a resumed run must cut the same chunks, whatever is free by then."""
    if memory is not None:
        return parse_bytes(memory)
    if device.type != "cuda":
        return None
    return run.fingerprint.get("memory") or torch.cuda.mem_get_info(device)[0] // 2

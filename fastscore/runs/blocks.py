"""The work on a data set, cut into blocks: what its numbers depend on, and the estimate of one.

A sample's noise is keyed by its index in the data set: blocks, and who works on them, change no number beyond rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..density import ScoreDensity
from ..estimator.bins import count_outside
from ..estimator.control import check_control
from ..estimator.estimate import to_arrays
from ..estimator.methods import method_of, table_of
from ..estimator.protocol import Density
from ..estimator.rules import make_rules
from ..estimator.saved import IN_A_FILE
from ..process.taken_dtype import model_dtype
from ..support.host import positive, whole
from .answers import answers
from .condition_data import DataConditions
from .data_mask import DataMask
from .dataset import Array, check_data, digest, digest_of, digest_rows, take
from .run_folder import RunFolder

Block = dict[str, np.ndarray]
FIT_BLOCK = 4096


@dataclass(frozen=True)
class Work:
    """What to estimate: checked data, the data-set indices of each block, and the arguments of `estimate`."""

    density: Density
    data: Array
    blocks: tuple[Tensor, ...]
    batch: int
    device: torch.device
    options: dict
    conditions: DataConditions
    mask: DataMask | None = None
    answers: dict | None = None

    @classmethod
    def check(
        cls,
        density: Density,
        data: Array,
        indices: Sequence[int] | None,
        batch: int,
        device: torch.device,
        options: dict,
        cond: dict[str, Any] | None = None,
        mask: Array | None = None,
    ) -> Work:
        """Raise ValueError where data, indices, network and options do not fit together, before work begins."""
        check_data("data", data)
        if whole("batch", batch) < 1:
            raise ValueError(f"batch must be at least 1 sample, got {batch}")
        index = torch.arange(len(data), device="cpu") if indices is None else _numbers(indices)
        if index.ndim != 1 or not len(index) or int(index.min()) < 0 or int(index.max()) >= len(data):
            raise ValueError(f"indices must be a list of numbers from 0 to {len(data) - 1}, got {indices!r}")
        if len(index.unique()) < len(index):
            raise ValueError(
                f"indices must name every sample once, whose noise would be the same again, got {len(index)} indices "
                f"of {len(index.unique())} samples"
            )
        if options["target_stderr"] is not None:
            positive("target_stderr", options["target_stderr"], "nats")
        check_control(options["control"], options["method"], options["nfe"], mask is not None)
        make_rules(density.core.nodes.density, options["nfe"], density.schedule, method_of(options["method"]))
        conditions = DataConditions.of("cond", cond, len(data))
        counted = DataMask.of("mask", mask, tuple(data.shape))
        work = cls(density, data, index.split(min(batch, len(index))), batch, device, options, conditions, counted)
        first = index[:1]
        return replace(work, answers=answers(density, work.rows(first), work.conditions_at(first), work.mask_at(first)))

    def rows(self, index: Tensor) -> Tensor:
        return take(self.data, index).to(self.device)

    def conditions_at(self, index: Tensor) -> dict[str, object]:
        """Return the keyword arguments of the network for these samples."""
        return self.conditions.at(index, self.device, model_dtype(self.density.model, torch.float32))

    def mask_at(self, index: Tensor) -> Tensor | None:
        """Return which entries of these samples count."""
        return None if self.mask is None else self.mask.at(index, self.device)

    def digests(self, blocks: Sequence[Tensor]) -> list[tuple[str, str, str]]:
        """Return the digests of data, conditions and mask in each of some blocks; raise ValueError for bad rows."""
        return [
            (digest_rows("data", self.data, index), self.conditions.digest_rows(index), _of_mask(self.mask, index))
            for index in blocks
        ]

    def outside(self, blocks: Sequence[Tensor], low: float, high: float) -> Tensor:
        """Return what `count_outside` does, of all entries of some blocks: int64, (3,)."""
        of_blocks = (count_outside(self.rows(index), self.mask_at(index), low, high) for index in blocks)
        return sum(of_blocks, torch.zeros(3, dtype=torch.int64, device=self.device)).cpu()

    def setting(self) -> dict:
        """Return by name all that the numbers depend on beside the data, which every process has to share."""
        density, first = self.density.core, self.blocks[0][:1]
        seen, log_det = self.density.to_network(self.rows(first), self.mask_at(first))
        return {
            "transform": digest({"z": seen, "log_det": log_det}),  # of the first sample, which tells transforms apart
            "network": digest(density.model.state_dict()),
            "network's answer": self.answers,
            "schedule": f"{density.schedule!r} {digest({'log_snr': table_of(density.schedule)[1]})}",
            "predicts": density.predicts,
            "noise": density.noise,
            "time dtype": str(density.time_dtype),
            "reference and nodes": digest(fitted_state(density)),
            "conditions": self.conditions.setting(),
            "batch": self.batch,
            "device": self.device.type,
            "fastscore": version("fastscore"),
            "torch": torch.__version__,
            **self.options,
        }

    def fingerprint(
        self,
        digests: Sequence[tuple[str, str, str]],
        fit: Array | None,
        fit_conditions: DataConditions,
        fit_mask: DataMask | None,
    ) -> dict:
        """Return by name all that the numbers depend on, so that a resumed run can say what differs."""
        shape, chosen = tuple(self.data.shape), torch.cat(self.blocks)
        kind = str(self.data.dtype).removeprefix("torch.")
        every = torch.equal(chosen, torch.arange(len(self.data), device="cpu"))
        found = self.setting() | {
            "fit data": None,
            "data": f"{kind} {shape} {digest_of([of_data for of_data, *_ in digests])}",
            "conditions": f"{self.conditions.setting()} {_of_parts([of_cond for _, of_cond, _ in digests])}",
            "mask": None if self.mask is None else _of_parts([of_mask for *_, of_mask in digests]),
            "indices": "all" if every else f"{len(chosen)} {digest({'index': chosen})}",
        }
        if fit is not None:
            check_data("fit data", fit, shape[1:])
            parts = torch.arange(len(fit), device="cpu").split(FIT_BLOCK)
            found["fit data"] = digest_of([digest_rows("fit data", fit, part) for part in parts])
            if fit_conditions:
                of_conditions = [fit_conditions.digest_rows(part) for part in parts]
                found["fit conditions"] = digest_of([fit_conditions.setting(), *of_conditions])
            found["fit mask"] = digest_of([_of_mask(fit_mask, part) for part in parts]) if fit_mask else None
            found["reference and nodes"] = "from fit data"
        return found

    def estimate(self, number: int) -> Block:
        index = self.blocks[number]
        given = {"cond": self.conditions_at(index), "progress": False, **self.options}
        options = {"sample_index": index, "mask": self.mask_at(index), **given}
        return to_arrays(self.density.estimate(self.rows(index), **options))

    def read(self, run: RunFolder, number: int, key: str) -> Block | None:
        """Return a finished block of the run with this key; None if its file is missing, damaged or another's."""
        block, index = run.read_arrays(run.block(number)), self.blocks[number].numpy()
        if block is None or not set(block) >= {"run", *IN_A_FILE} or block["run"] != key:
            return None
        return block if np.array_equal(block["sample_index"], index) else None


def _numbers(indices: Sequence[int]) -> Tensor:
    """Return indices as int64; raise ValueError for what are none, such as a mask."""
    try:
        given = torch.as_tensor(indices, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        given = torch.full((1,), torch.nan, device="cpu")
    if given.dtype == torch.bool:
        raise ValueError(
            f"indices must be the numbers of the samples, got {given.numel()} of torch.bool; of a mask give "
            "mask.nonzero().flatten()"
        )
    if given.numel() and (given.is_floating_point() or given.is_complex()):
        raise ValueError(f"indices must be the whole numbers of the samples, got {indices!r}; give torch.int64")
    return given.to(torch.int64)


def _of_mask(mask: DataMask | None, index: Tensor) -> str:
    return "" if mask is None else mask.digest_rows(index)


def _of_parts(digests: Sequence[str]) -> str:
    """Return one digest of all parts; of what samples share it is the same, however many parts there are."""
    return digest_of(digests if len(set(digests)) > 1 else digests[:1])


def fitted_state(density: ScoreDensity) -> dict[str, Tensor]:
    """Return what `ScoreDensity.fit` finds, by its names in the state_dict."""
    return {k: v for k, v in density.state_dict().items() if not k.startswith("model.")}

"""The work on a data set, cut into blocks: what its numbers depend on, the estimate of one, and all merged into one.

A sample's noise is keyed by its index in the data set: blocks, and who works on them, change no number beyond rounding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version

import numpy as np
import torch
from torch import Tensor

from .condition_data import DataConditions
from .dataset import Array, check_data, digest, digest_of, digest_rows, take
from .density import ScoreDensity
from .estimate import CurveSum, Estimate, discretization_bound, truncation_bound
from .network import model_dtype, predict
from .nodes import make_rule, method_table
from .run_folder import RunFolder
from .samples import check_samples

Block = dict[str, np.ndarray]
ESTIMATE_KEYS = {"sample_index", "log_prob", "stderr", "nfe", "curve_mean", "curve_stderr", "discretization", "noise"}
FIT_BLOCK = 4096


@dataclass(frozen=True)
class Work:
    """What to estimate: checked data, the data-set indices of each block, and the arguments of `estimate`."""

    density: ScoreDensity
    data: Array
    blocks: tuple[Tensor, ...]
    device: torch.device
    options: dict
    conditions: DataConditions

    @classmethod
    def check(
        cls,
        density: ScoreDensity,
        data: Array,
        indices: Sequence[int] | None,
        batch: int,
        device: torch.device,
        options: dict,
        cond: dict | None = None,
    ) -> Work:
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
        conditions = DataConditions.of("cond", cond, len(data))
        work = cls(density, data, index.split(batch), device, options, conditions)
        _check_network(density, work.rows(index[:1]), work.conditions_at(index[:1]))
        return work

    def rows(self, index: Tensor) -> Tensor:
        return take(self.data, index).to(self.device)

    def conditions_at(self, index: Tensor) -> dict[str, object]:
        """Return the keyword arguments of the network for these samples."""
        return self.conditions.at(index, self.device, model_dtype(self.density.model, torch.float32))

    def digests(self, blocks: Sequence[Tensor]) -> list[tuple[str, str]]:
        """Return the digests of data and conditions in each of some blocks; raise ValueError for NaN or inf in data."""
        return [(digest_rows("data", self.data, index), self.conditions.digest_rows(index)) for index in blocks]

    def setting(self) -> dict:
        """Return by name all that the numbers depend on beside the data, which every process has to share."""
        density = self.density
        return {
            "network": digest(density.model.state_dict()),
            "schedule": f"{density.schedule!r} {digest({'log_snr': method_table(density.schedule)[1]})}",
            "predicts": density.predicts,
            "noise": density.noise,
            "time dtype": str(density.time_dtype),
            "reference and nodes": digest(fitted_state(density)),
            "conditions": self.conditions.setting(),
            "batch": len(self.blocks[0]),
            "device": self.device.type,
            "fastscore": version("fastscore"),
            "torch": torch.__version__,
            **self.options,
        }

    def fingerprint(
        self, digests: Sequence[tuple[str, str]], fit: Array | None, fit_conditions: DataConditions | None = None
    ) -> dict:
        """Return by name all that the numbers depend on, so that a resumed run can say what differs."""
        shape, chosen = tuple(self.data.shape), torch.cat(self.blocks)
        kind = str(self.data.dtype).removeprefix("torch.")
        found = self.setting() | {
            "fit data": digest_of([]),
            "data": f"{kind} {shape} {digest_of([of_data for of_data, _ in digests])}",
            "conditions": f"{self.conditions.setting()} {digest_of([of_conditions for _, of_conditions in digests])}",
            "indices": f"{len(chosen)} {digest({'index': chosen})}",
        }
        if fit is not None:
            check_data("fit data", fit, shape[1:])
            parts = torch.arange(len(fit)).split(FIT_BLOCK)
            found["fit data"] = digest_of([digest_rows("fit data", fit, part) for part in parts])
            of_conditions = [fit_conditions.digest_rows(part) for part in parts] if fit_conditions else []
            found["fit conditions"] = digest_of([fit_conditions.setting() if fit_conditions else "", *of_conditions])
            found["reference and nodes"] = "from fit data"
        return found

    def estimate(self, number: int) -> Block:
        index = self.blocks[number]
        result = self.density.estimate(
            self.rows(index), sample_index=index, cond=self.conditions_at(index), **self.options
        )
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

    def read(self, run: RunFolder, number: int, key: str) -> Block | None:
        """Return a finished block of the run with this key; None if its file is missing, damaged or another's."""
        block, index = run.read_arrays(run.block(number)), self.blocks[number].numpy()
        if block is None or set(block) != ESTIMATE_KEYS | {"run"} or block["run"] != key:
            return None
        return block if np.array_equal(block["sample_index"], index) else None

    def merge(self, blocks: Sequence[Block]) -> Estimate:
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


def _check_network(density: ScoreDensity, x: Tensor, cond: dict[str, object]) -> None:
    """Call the network on two rows of the first sample; raise ValueError with its reason if it cannot take them."""
    samples = check_samples(x, None, (cond,), density.model)
    ends = torch.tensor(density.schedule.log_snr_range, dtype=torch.float64)
    time = density.schedule.time(ends).to(x.device)
    try:
        with torch.no_grad():
            rows = samples.x[:, None].expand(1, 2, -1)
            predict(density.model, rows, time, samples.conds[0], samples.shape, density.time_dtype)
    except ValueError:
        raise  # says so itself
    except Exception as error:
        reason = (str(error).strip().splitlines() or ["no message"])[0]
        raise ValueError(
            f"the network does not take data of shape {samples.shape} a sample: {type(error).__name__}: {reason}"
        ) from error


def fitted_state(density: ScoreDensity) -> dict[str, Tensor]:
    """Return what `ScoreDensity.fit` finds, by its names in the state_dict."""
    return {k: v for k, v in density.state_dict().items() if not k.startswith("model.")}

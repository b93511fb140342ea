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

from .dataset import Array, check_data, digest, digest_of, digest_rows, take
from .density import ScoreDensity
from .estimate import CurveSum, Estimate, discretization_bound, truncation_bound
from .network import predict
from .nodes import make_rule, method_table
from .run_folder import RunFolder

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

    @classmethod
    def check(
        cls,
        density: ScoreDensity,
        data: Array,
        indices: Sequence[int] | None,
        batch: int,
        device: torch.device,
        options: dict,
    ) -> Work:
        """Raise ValueError where data, indices, network and options do not fit together, before work begins."""
        check_data("data", data)
        if batch < 1:
            raise ValueError(f"batch must be at least 1 sample, got {batch}")
        whole = torch.arange(len(data), device="cpu")
        index = whole if indices is None else torch.as_tensor(indices, dtype=torch.int64, device="cpu")
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

    def digests(self, blocks: Sequence[Tensor]) -> list[str]:
        """Return the digest of the data in each of some blocks; raise ValueError if one has NaN or inf."""
        return [digest_rows("data", self.data, index) for index in blocks]

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
            "batch": len(self.blocks[0]),
            "device": self.device.type,
            "fastscore": version("fastscore"),
            "torch": torch.__version__,
            **self.options,
        }

    def fingerprint(self, digests: Sequence[str], fit: Array | None) -> dict:
        """Return by name all that the numbers depend on, so that a resumed run can say what differs."""
        shape, chosen = tuple(self.data.shape), torch.cat(self.blocks)
        kind = str(self.data.dtype).removeprefix("torch.")
        found = self.setting() | {
            "fit data": digest_of([]),
            "data": f"{kind} {shape} {digest_of(digests)}",
            "indices": f"{len(chosen)} {digest({'index': chosen})}",
        }
        if fit is not None:
            check_data("fit data", fit, shape[1:])
            parts = torch.arange(len(fit), device="cpu").split(FIT_BLOCK)
            found["fit data"] = digest_of([digest_rows("fit data", fit, part) for part in parts])
            found["reference and nodes"] = "from fit data"
        return found

    def estimate(self, number: int) -> Block:
        index = self.blocks[number]
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


def _check_network(density: ScoreDensity, x: Tensor) -> None:
    """Call the network on two rows of the first sample; raise ValueError with its reason if it cannot take them."""
    samples = density.check(x, None, {})
    ends = torch.tensor(density.schedule.log_snr_range, dtype=torch.float64, device="cpu")
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


def fitted_state(density: ScoreDensity) -> dict[str, Tensor]:
    """Return what `ScoreDensity.fit` finds, by its names in the state_dict."""
    return {k: v for k, v in density.state_dict().items() if not k.startswith("model.")}

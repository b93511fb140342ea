"""Call a user's network: rows, time, conditions and dtype in; a checked (B, R, d) prediction out."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

_WARNED: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_NOISY_LAYERS = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._BatchNorm)


def model_dtype(model: nn.Module, default: torch.dtype) -> torch.dtype:
    """Return the dtype of the network's floating parameters, or the default if it has none."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), default)


def model_device(model: nn.Module, default: torch.device | None = None) -> torch.device | None:
    """Return the device of the network's parameters, or the default if it has none."""
    return next((p.device for p in model.parameters()), default)


def warn_if_training(model: nn.Module, stacklevel: int = 5) -> None:
    """Warn, once a network, where train mode makes every answer random: dropout or batch norm in train mode."""
    if model in _WARNED:
        return
    for name, layer in model.named_modules():
        if isinstance(layer, _NOISY_LAYERS) and layer.training and getattr(layer, "p", 1) > 0:
            _WARNED.add(model)
            warnings.warn(
                f"the network is in train mode and its layer {name!r} ({type(layer).__name__}) makes the density "
                "random; call model.eval() first",
                UserWarning,
                stacklevel=stacklevel,
            )
            return


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put every layer of a network into eval mode, and each back into the mode that it was in."""
    training = [layer for layer in model.modules() if layer.training]
    model.eval()
    try:
        yield
    finally:
        for layer in training:
            layer.training = True


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Let no gradient reach a network's parameters: what is computed inside depends on its inputs alone."""
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in learned:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learned:
            parameter.requires_grad_(True)


@dataclass(frozen=True)
class Conditions:
    """Keyword arguments of the network, told apart once: one entry a sample, or shared by the whole batch.

    A tensor is per sample if its first dimension is the batch size of the call. Chunks keep that verdict, so a shared
    tensor that happens to have as many rows as a chunk has samples stays shared.
    """

    per_sample: dict[str, Tensor]
    shared: dict[str, object]

    @classmethod
    def of(cls, given: dict[str, object], batch: int) -> Conditions:
        own = {k for k, v in given.items() if isinstance(v, Tensor) and v.ndim > 0 and v.shape[0] == batch}
        return cls({k: given[k] for k in own}, {k: v for k, v in given.items() if k not in own})

    def to(self, device: torch.device) -> Conditions:
        def moved(given: dict) -> dict:
            return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in given.items()}

        return Conditions(moved(self.per_sample), moved(self.shared))

    def select(self, samples: slice | Tensor) -> Conditions:
        return Conditions({k: v[samples] for k, v in self.per_sample.items()}, self.shared)

    def repeated(self, rows: int) -> dict[str, object]:
        """Return the keyword arguments for `rows` consecutive rows of every sample."""
        return {k: v.repeat_interleave(rows, 0) for k, v in self.per_sample.items()} | self.shared


def predict(
    model: nn.Module,
    x_t: Tensor,
    time: Tensor,
    cond: Conditions,
    shape: tuple[int, ...],
    time_dtype: torch.dtype | None,
) -> Tensor:
    """Return the network's prediction for every row, shape (B, R, d), in the dtype of x_t.

    The network is called once as `model(x_t, t, **cond)` with x_t (B R, *shape) in the dtype of its parameters and t
    (B R,): int64 for a discrete table, the dtype of x_t else, or `time_dtype`. Conditions with one entry a sample are
    repeated along the rows. It may return a tensor, a tuple or list whose first entry counts, or an object with
    `.sample`. Channels beyond those of the data (a learned variance, say) are cut off.

    Raises:
        ValueError: if what comes back does not have the rows and the shape of what was passed.
    """
    batch, rows, d = x_t.shape
    time = cast_time(time, x_t.dtype, time_dtype)
    passed = x_t.reshape(batch * rows, *shape).to(model_dtype(model, x_t.dtype))
    prediction = read_output(model(passed, time.repeat(batch), **cond.repeated(rows)), passed)
    return prediction.reshape(batch, rows, d).to(x_t.dtype)


def cast_time(time: Tensor, dtype: torch.dtype, time_dtype: torch.dtype | None) -> Tensor:
    """Return times as the network gets them: in `time_dtype`, or int64 for a table and the dtype of x_t else."""
    return time.to(time_dtype or (dtype if time.is_floating_point() else time.dtype))


def read_output(output: object, passed: Tensor) -> Tensor:
    """Return the prediction in what a network returned for x_t = `passed`, in the shape of x_t.

    Raises:
        ValueError: as in `predict`.
    """
    output = _tensor_of(output)
    more = output.ndim == passed.ndim and output.shape[1] > passed.shape[1]
    prediction = output[:, : passed.shape[1]] if more else output
    if prediction.shape != passed.shape:
        raise ValueError(
            f"the network was called with x_t {tuple(passed.shape)} and t ({len(passed)},) and returned "
            f"{tuple(output.shape)}; it must return the shape of x_t (more channels in dimension 1 are allowed)"
        )
    return prediction


def _tensor_of(output: object) -> Tensor:
    if isinstance(output, Tensor):
        return output
    if isinstance(output, tuple | list) and output and isinstance(output[0], Tensor):
        return output[0]
    if isinstance(getattr(output, "sample", None), Tensor):
        return output.sample
    raise ValueError(
        f"the network must return a tensor, a tuple that starts with one, or an object with .sample; "
        f"got {type(output).__name__}"
    )

"""A callback of Lightning that logs the density of validation data.

Needs lightning (or pytorch-lightning): `pip install lightning torchmetrics`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from .metrics import NegativeLogLikelihood

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError:
    try:
        from pytorch_lightning import Callback, LightningModule, Trainer
    except ImportError as error:
        raise ImportError(
            "fastscore.lightning needs the package lightning; install it with: pip install lightning"
        ) from error

if TYPE_CHECKING:
    from torch import Tensor


class LogDensity(Callback):
    """Log a metric of `fastscore.metrics` over every validation epoch, under the metric's own names.

    Its values (`bits_per_dim`, `bits_per_dim_stderr`, ...) are over all processes; other callbacks may monitor them.

    Arguments:
        metric: `BitsPerDim` or `NegativeLogLikelihood` of a density whose network the module trains.
        unpack: how a batch becomes the metric's arguments: returns x, or x and a dict of keyword arguments. By default
            the batch itself, or the first entry of a tuple or list.
        every: evaluate in every so many validation epochs; sanity checks before training are left out,
            and `trainer.validate` always evaluates.
        prefix: before the metric's names in the log, where a trainer has several of these callbacks.
        loader: which of several validation loaders is looked at, from 0 on.

    Raises:
        ValueError: if `every` is less than 1; and when validation begins, if another callback of the trainer logs
            under the same names, of which Lightning would log the average, or if there are several loaders and none
            is chosen.
    """

    def __init__(
        self,
        metric: NegativeLogLikelihood,
        unpack: Callable | None = None,
        every: int = 1,
        prefix: str = "",
        loader: int | None = None,
    ) -> None:
        if every < 1:
            raise ValueError(f"every must be at least 1 epoch, got {every}")
        self.metric, self.unpack, self.every = metric, unpack or _first, every
        self.prefix, self.loader = prefix, loader

    @property
    def name(self) -> str:
        """What the mean is called in the log; its errors' names begin with it."""
        return self.prefix + self.metric.name

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        alike = [each for each in trainer.callbacks if isinstance(each, LogDensity) and each.name == self.name]
        if len(alike) > 1:
            raise ValueError(
                f"{len(alike)} LogDensity callbacks log under the name {self.name!r}, of which Lightning would log the "
                "average; give each a prefix= of its own"
            )
        loaders = len(trainer.num_val_batches)
        if self.loader not in ((None,) if loaders == 1 else ()) + tuple(range(loaders)):
            raise ValueError(
                f"loader must say which of the {loaders} validation loaders LogDensity looks at, got {self.loader}; "
                "give one callback for each, with loader= and a prefix="
            )
        self.metric.to(pl_module.device).reset()

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Tensor | Mapping[str, Any] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._is_due(trainer) and self.loader in (None, dataloader_idx):
            found = self.unpack(batch)
            x, cond = found if isinstance(found, tuple) else (found, {})
            self.metric.update(x, cond=cond)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._is_due(trainer):
            # Synchronised already: every process logs the same values. Lightning keeps float32.
            values = {self.prefix + name: value.float() for name, value in self.metric.compute().items()}
            pl_module.log_dict(values, prog_bar=True)

    def _is_due(self, trainer: Trainer) -> bool:
        if trainer.state.fn == "validate":  # asked for, outside of a training
            return True
        return not trainer.sanity_checking and (trainer.current_epoch + 1) % self.every == 0


def _first(batch: Any) -> Any:
    return batch[0] if isinstance(batch, tuple | list) else batch

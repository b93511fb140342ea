"""A callback of Lightning that logs the density of validation data.

Needs lightning (or pytorch-lightning): `pip install lightning torchmetrics`.
"""

from __future__ import annotations

from collections.abc import Callable

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


class LogDensity(Callback):
    """Log a metric of `fastscore.metrics` over every validation epoch, under the metric's own names.

    Its values (`bits_per_dim`, `bits_per_dim_stderr`, ...) are over all processes; other callbacks may monitor them.

    Arguments:
        metric: `BitsPerDim` or `NegativeLogLikelihood` of a density whose network the module trains.
        unpack: how a batch becomes the metric's arguments: returns x, or x and a dict of keyword arguments. By default
            the batch itself, or the first entry of a tuple or list.
        every: evaluate in every so many validation epochs; sanity checks before training are left out,
            and `trainer.validate` always evaluates.

    Raises:
        ValueError: if `every` is less than 1.
    """

    def __init__(self, metric: NegativeLogLikelihood, unpack: Callable | None = None, every: int = 1) -> None:
        if every < 1:
            raise ValueError(f"every must be at least 1 epoch, got {every}")
        self.metric, self.unpack, self.every = metric, unpack or _first, every

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.metric.to(pl_module.device).reset()

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs, batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self._is_due(trainer):
            found = self.unpack(batch)
            x, cond = found if isinstance(found, tuple) else (found, {})
            self.metric.update(x, cond=cond)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._is_due(trainer):
            # Synchronised already: every process logs the same values. Lightning keeps float32.
            pl_module.log_dict({name: value.float() for name, value in self.metric.compute().items()}, prog_bar=True)

    def _is_due(self, trainer: Trainer) -> bool:
        if trainer.state.fn == "validate":  # asked for, outside of a training
            return True
        return not trainer.sanity_checking and (trainer.current_epoch + 1) % self.every == 0


def _first(batch):
    return batch[0] if isinstance(batch, tuple | list) else batch

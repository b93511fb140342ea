"""How does one train for likelihood in Lightning, and watch held-out bits per dimension with their error?

`fastscore.density_loss` is the loss of the module's training step: an unbiased estimate of -log p(x), so that less of
it is fewer bits. The callback `fastscore.lightning.LogDensity` evaluates a metric of `fastscore.metrics` on the
validation data and logs it with two errors: `_stderr`, by which other held-out images would change the mean, and
`_estimate_stderr`, by which another seed would. Any callback of Lightning may monitor these names; here one keeps the
curve.

Data: scikit-learn's digits, 8 x 8 pixels of 17 grey levels, spread anew within their levels in every batch.

Needs:   fastscore, lightning, torchmetrics, scikit-learn, matplotlib
Prints:  bits per dimension on 297 held-out digits with both errors; log2(17) = 4.09 is a guess that knows nothing
Draws:   the curve of validation, with error bars, into the file of --out
Takes:   42 s of one processor; --small some seconds
"""

from __future__ import annotations

import argparse
import warnings

import lightning
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fastscore as fs
from fastscore.lightning import LogDensity
from fastscore.metrics import BitsPerDim

LEVELS = fs.Levels(17)
HELD_OUT = 297


class Net(nn.Module):
    """A residual MLP with waves of the log-SNR at its input."""

    def __init__(self, d: int = 64, width: int = 256) -> None:
        super().__init__()
        self.register_buffer("frequency", 2.0 ** torch.arange(-3, 3))
        self.first, self.time, self.last = nn.Linear(d, width), nn.Linear(12, width), nn.Linear(width, d)
        self.hidden = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.dropout = nn.Dropout(0.2)

    def forward(self, x_t: Tensor, log_snr: Tensor) -> Tensor:
        angle = log_snr[:, None] * self.frequency
        h = nn.functional.silu(self.first(x_t) + self.time(torch.cat([angle.sin(), angle.cos()], 1)))
        for layer in self.hidden:
            h = h + nn.functional.silu(layer(self.dropout(h)))
        return self.last(h)


class Likelihood(lightning.LightningModule):
    """A network that is trained to make the training data probable."""

    def __init__(self) -> None:
        super().__init__()
        # The density holds the network: one submodule is enough, and its weights are stored once.
        self.density = fs.ScoreDensity(Net(), fs.LogSNR(-8.0, 10.0), predicts="v")
        self.nodes = fs.AdaptiveNodes(self.density.schedule)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        # A fresh seed for every step and process, so that no two share their noise.
        seed = self.global_step * self.trainer.world_size + self.global_rank
        x = LEVELS.dequantize(batch[0], seed=seed)
        return fs.density_loss(self.density, x, seed=seed, antithetic=True, nodes=self.nodes)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """The callback does it all; Lightning wants this method, or it runs no validation."""

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.AdamW(self.parameters(), 2e-3, weight_decay=0.0)
        total = int(self.trainer.estimated_stepping_batches)
        cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=total, pct_start=0.1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cycle, "interval": "step"}}


class Curve(lightning.Callback):
    """Keeps the bits per dimension of every validation, with their error."""

    def __init__(self) -> None:
        self.points: list[tuple[int, float, float]] = []

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        found = trainer.callback_metrics
        if not trainer.sanity_checking and trainer.state.fn == "fit" and "bits_per_dim" in found:
            both = float(found["bits_per_dim"]), float(found["bits_per_dim_stderr"])
            self.points.append((trainer.current_epoch + 1, *both))


def draw(points: list[tuple[int, float, float]], out: str) -> None:
    """Save the curve of validation with bars of 1.96 standard errors."""
    figure, axis = plt.subplots(figsize=(5, 3), layout="constrained")
    epochs, bits, errors = zip(*points)
    axis.errorbar(epochs, bits, [1.96 * error for error in errors], capsize=2)
    axis.set(xlabel="epoch", ylabel="held-out bits per dimension")
    figure.savefig(out, dpi=120)
    plt.close(figure)


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Train, validate, print and draw; return what the last validation logged."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", default="lightning_training.png", help="file of the picture")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--small", action="store_true", help="a few seconds: fewer epochs")
    args = parser.parse_args(argv)
    epochs, every = (10, 5) if args.small else (200, 10)

    lightning.seed_everything(args.seed, verbose=False)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")  # tensors in memory need none
    images = torch.tensor(load_digits().images, dtype=torch.int64).flatten(1)
    images = images[torch.randperm(len(images))]
    held_out = LEVELS.dequantize(images[:HELD_OUT], seed=args.seed)
    train = DataLoader(TensorDataset(images[HELD_OUT:]), batch_size=125, shuffle=True, drop_last=True)
    validation = DataLoader(TensorDataset(held_out), batch_size=99)

    module, curve = Likelihood(), Curve()
    metric = BitsPerDim(module.density, LEVELS.bins, LEVELS.low, LEVELS.high, nfe=64)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(
        max_epochs=epochs,
        check_val_every_n_epoch=every,
        callbacks=[LogDensity(metric), curve],
        enable_checkpointing=False,
        accelerator="cpu",
        **quiet,
    )
    trainer.fit(module, train, validation)
    (found,) = trainer.validate(module, validation, verbose=False)
    print(f"{HELD_OUT} held-out digits after {epochs} epochs")
    print(f"bits per dimension  {found['bits_per_dim']:.3f} +- {found['bits_per_dim_stderr']:.3f}", end="")
    print(f"  (another seed changes it by {found['bits_per_dim_estimate_stderr']:.4f})")
    draw(curve.points, args.out)
    print(f"picture in {args.out}")
    return found


if __name__ == "__main__":
    main()

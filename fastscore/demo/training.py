"""A small score network, and its training with fastscore's own loss."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..density import ScoreDensity
from ..support.progress import progress_bar
from ..training.losses import density_loss

LEARNING_RATE = 2e-3


class ScoreMLP(nn.Module):
    """A residual network of SiLU layers with sines and cosines of the log-SNR at the input."""

    def __init__(self, d: int, width: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.register_buffer("frequency", 2.0 ** torch.arange(-3, 3))
        self.time = nn.Linear(2 * len(self.frequency), width)
        self.first = nn.Linear(d, width)
        self.hidden = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.dropout = nn.Dropout(dropout)
        self.last = nn.Linear(width, d)

    def forward(self, x_t: Tensor, log_snr: Tensor) -> Tensor:
        angle = log_snr[:, None] * self.frequency
        h = self.first(x_t) + self.time(torch.cat([angle.sin(), angle.cos()], 1))
        h = nn.functional.silu(h)
        for layer in self.hidden:
            h = h + nn.functional.silu(layer(self.dropout(h)))
        return self.last(h)


def train(density: ScoreDensity, batches: Iterable[Tensor], steps: int) -> None:
    """Maximize the density of the training data: AdamW, one cycle of the learning rate, uniform log-SNR."""
    density.model.train()
    optimizer = torch.optim.AdamW(density.model.parameters(), LEARNING_RATE, weight_decay=0.0)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
    with progress_bar(None, batches, total=steps, desc="  train", unit="step") as bar:
        for step, x in enumerate(bar):
            loss = density_loss(density, x, seed=step)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            cycle.step()
            if step % 100 == 99:
                bar.set_postfix_str(f"-log p {loss.item():.2f} nats", refresh=False)
    density.model.eval()

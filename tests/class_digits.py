"""scikit-learn's handwritten digits, and a small class-conditional score network trained on them in a minute."""

import torch
from sklearn.datasets import load_digits
from torch import nn

import fastscore as fs
from fastscore.demo.training import ScoreMLP

HELD_OUT = 597
LEVELS = fs.Levels(17)
SCHEDULE = fs.VP()  # its time is no multiple of log-SNR, so that uniform in time is another weighting
LEARNING_RATE = 2e-3


class ClassMLP(nn.Module):
    """The demo's residual network on log-SNR, with a label added to its hidden layer."""

    def __init__(self, schedule, d=64, width=192, classes=10, dropout=0.2):
        super().__init__()
        self.schedule, self.body = schedule, ScoreMLP(d, width, dropout=dropout)
        self.label = nn.Embedding(classes, width)

    def forward(self, x_t, t, y):
        log_snr = self.schedule.log_snr(t.double()).to(x_t.dtype)
        body = self.body
        angle = log_snr[:, None] * body.frequency
        h = body.first(x_t) + body.time(torch.cat([angle.sin(), angle.cos()], 1)) + self.label(y)
        h = nn.functional.silu(h)
        for layer in body.hidden:
            h = h + nn.functional.silu(layer(body.dropout(h)))
        return body.last(h)


def split(seed=0):
    """Return (levels, labels) of the 1,200 training digits and of the 597 held out."""
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(seed))
    x = torch.tensor(data.images, dtype=torch.int64).flatten(1)[order]
    y = torch.tensor(data.target)[order]
    return (x[HELD_OUT:], y[HELD_OUT:]), (x[:HELD_OUT], y[:HELD_OUT])


def train(x, y, steps, seed=0, batch=256):
    """Return the density of a class-conditional network trained with density_loss, dequantized anew every epoch."""
    torch.manual_seed(seed)
    density = fs.ScoreDensity(ClassMLP(SCHEDULE), SCHEDULE, "v")
    optimizer = torch.optim.AdamW(density.model.parameters(), LEARNING_RATE, weight_decay=0.0)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        chosen = torch.randint(len(x), (batch,), generator=generator)
        loss = fs.density_loss(density, LEVELS.dequantize(x[chosen], seed=step), seed=step, y=y[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        cycle.step()
    density.model.eval()
    return density

"""Two problems: the two-moons toy, whose density is known, and scikit-learn's handwritten digits, real and discrete."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits, make_moons
from torch import Tensor, nn

from ..densities.discrete import Levels
from ..process.schedules import LogSNR, Schedule
from .training import ScoreMLP

MOON_NOISE = 0.1
HELD_OUT_DIGITS = 297
SCHEDULE = LogSNR(-8.0, 10.0)  # both data sets are smooth below a standard deviation of exp(-5)


@dataclass(frozen=True)
class Problem:
    """Data and network of one demonstration.

    Attributes:
        train: training data of an epoch, float32, shape (N, d); discrete data are dequantized anew in each.
        test: held-out data, shape (M, d).
        exact: the data's own log-density, nats, where it is known.
        levels: the levels of discrete data.
    """

    name: str
    train: Callable[[int], Tensor]
    test: Tensor
    network: Callable[[], nn.Module]
    steps: int
    batch: int
    exact: Callable[[Tensor], Tensor] | None = None
    levels: Levels | None = None
    schedule: Schedule = SCHEDULE
    predicts: str = "v"

    @property
    def dims(self) -> int:
        return self.test.shape[1]

    def batches(self, seed: int) -> Iterator[Tensor]:
        """Yield one batch a training step, every epoch in another order."""
        generator = torch.Generator().manual_seed(seed)
        left, epoch = self.steps, 0
        while left:
            data = self.train(epoch)
            parts = data[torch.randperm(len(data), generator=generator)].split(self.batch)
            whole = [part for part in parts if len(part) == self.batch][:left]
            yield from whole
            left, epoch = left - len(whole), epoch + 1


def two_moons(seed: int) -> Problem:
    """Two interleaved half circles of radius 1, blurred by Gaussian noise of standard deviation 0.1."""

    def moons(count: int, state: int) -> Tensor:
        return torch.tensor(make_moons(count, noise=MOON_NOISE, random_state=state)[0], dtype=torch.float32)

    data = moons(20_000, seed)
    return Problem(
        name="two moons",
        train=lambda epoch: data,
        test=moons(1000, seed + 1),
        network=lambda: ScoreMLP(2, 128),
        steps=4000,
        batch=512,
        exact=moons_log_prob,
    )


def digits(seed: int) -> Problem:
    """1,797 handwritten digits of 8 x 8 pixels with 17 grey levels (Alpaydin and Kaynak, 1998)."""
    images = torch.tensor(load_digits().images, dtype=torch.int64).flatten(1)
    images = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))]
    levels = Levels(17)
    train, test = images[HELD_OUT_DIGITS:], images[:HELD_OUT_DIGITS]
    return Problem(
        name="digits",
        train=lambda epoch: levels.dequantize(train, seed=epoch),
        test=levels.dequantize(test, seed=seed, sample_index=torch.arange(len(train), len(images))),
        network=lambda: ScoreMLP(64, 256, dropout=0.2),
        steps=2000,
        batch=256,
        levels=levels,
    )


def moons_log_prob(x: Tensor) -> Tensor:
    """Return the exact log-density of two moons, nats, shape (B,): the blur integrated along both half circles."""
    angle = torch.linspace(0, math.pi, 501, dtype=torch.float64)
    outer = torch.stack([angle.cos(), angle.sin()], 1)
    inner = torch.stack([1 - angle.cos(), 0.5 - angle.sin()], 1)
    weight = torch.ones_like(angle)
    weight[[0, -1]] = 0.5  # trapezoid rule
    log_weight = (weight / weight.sum() / 2).log().repeat(2)
    blur = 2 * MOON_NOISE**2
    parts = [
        torch.logsumexp(log_weight - (part[:, None] - torch.cat([outer, inner])).square().sum(2) / blur, 1)
        for part in x.double().split(1000)
    ]
    return torch.cat(parts) - math.log(math.pi * blur)

r"""A GAN whose exact divergence is known: does the term of `fastscore.score_regularization` lower it?

The generator is a stack of affine couplings, so that its density is known at every sample it makes, and the data are two
moons, whose density is known everywhere. With z ~ N(0, I),

.. math:: KL(p_G \| p) = E_z\big[\log N(z; 0, I) - \log|\det G'(z)| - \log p(G(z))\big]

is a mean of exact numbers. It is recorded over the second half of the training, because a GAN goes up and down. The score
network is a small MLP trained on the same data with `density_loss`; both generators start from the same weights and see
the same batches and latents.

    python benchmarks/toy_gan.py   # writes benchmarks/results/gan.json
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from sklearn.datasets import make_moons
from torch import Tensor, nn
from torch.nn import functional as F

import fastscore as fs
from fastscore.demo.problems import MOON_NOISE, SCHEDULE, moons_log_prob
from fastscore.demo.training import ScoreMLP

RESULT = Path(__file__).parent / "results" / "gan.json"
WEIGHTS, SEEDS = (0.0, 0.01, 0.03, 0.1), (0, 1, 2)
STEPS, SCORE_STEPS, BATCH, SAMPLES = 2000, 1500, 256, 5000
EVERY, LATENTS = 50, 4000


class Coupling(nn.Module):
    """One coordinate scaled and shifted by functions of the other; the identity at first."""

    def __init__(self, flip: bool, width: int = 64):
        super().__init__()
        self.flip = flip
        self.net = nn.Sequential(nn.Linear(1, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.last = nn.Linear(width, 2)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return the image of z (N, 2) and the log-determinant (N,)."""
        kept, moved = z.flip(1).unbind(1) if self.flip else z.unbind(1)
        log_scale, shift = self.last(self.net(kept[:, None])).unbind(1)
        log_scale = 2 * torch.tanh(log_scale / 2)
        image = torch.stack([kept, moved * log_scale.exp() + shift], 1)
        return image.flip(1) if self.flip else image, log_scale


class Generator(nn.Module):
    """Six couplings, and a shift to the middle of the moons."""

    def __init__(self):
        super().__init__()
        self.couplings = nn.ModuleList(Coupling(bool(i % 2)) for i in range(6))
        self.register_buffer("middle", torch.tensor([0.5, 0.25]))

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return samples (N, 2) and the log-determinant of G' (N,)."""
        total = z.new_zeros(len(z))
        for coupling in self.couplings:
            z, log_det = coupling(z)
            total = total + log_det
        return z + self.middle, total


@torch.no_grad()
def divergence(generator: Generator) -> float:
    """Return KL(p_G || p) in nats on latents of their own, the same for all generators."""
    z = torch.randn(LATENTS, 2, generator=torch.Generator().manual_seed(12345))
    x, log_det = generator(z)
    log_g = -0.5 * z.square().sum(1) - math.log(2 * math.pi) - log_det
    return float((log_g.double() - moons_log_prob(x)).mean())


def moons(seed: int) -> Tensor:
    """Return the training data of a seed."""
    return torch.tensor(make_moons(SAMPLES, noise=MOON_NOISE, random_state=seed)[0], dtype=torch.float32)


def score_network(data: Tensor, seed: int, steps: int = SCORE_STEPS) -> fs.ScoreDensity:
    """Return the density of a score network trained on the data."""
    torch.manual_seed(seed)
    density = fs.ScoreDensity(ScoreMLP(2, 64), SCHEDULE, "v")
    nodes = fs.AdaptiveNodes(SCHEDULE)
    optimizer = torch.optim.Adam(density.model.parameters(), 3e-3)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        x = data[torch.randint(len(data), (BATCH,), generator=generator)]
        optimizer.zero_grad()
        fs.density_loss(density, x, seed=step, antithetic=True, nodes=nodes).backward()
        optimizer.step()
        cycle.step()
    return density.eval()


def train_gan(data: Tensor, density: fs.ScoreDensity, weight: float, seed: int, steps: int = STEPS) -> list[float]:
    """Train with the non-saturating loss, plus `weight` times the score network's -log p of the samples.

    Returns the exact divergence every 50 steps of the second half, nats.
    """
    torch.manual_seed(seed)
    made = Generator()
    judge = nn.Sequential(nn.Linear(2, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1))
    optimizers = [torch.optim.Adam(net.parameters(), 1e-3, betas=(0.5, 0.9)) for net in (made, judge)]
    generator, found = torch.Generator().manual_seed(seed), []
    for step in range(steps):
        real = data[torch.randint(len(data), (BATCH,), generator=generator)]
        fake, _ = made(torch.randn(BATCH, 2, generator=generator))
        optimizers[1].zero_grad()
        (F.softplus(-judge(real)) + F.softplus(judge(fake.detach()))).mean().backward()
        optimizers[1].step()
        loss = F.softplus(-judge(fake)).mean()
        if weight:
            loss = loss + weight * fs.score_regularization(density, fake, seed=step)
        optimizers[0].zero_grad()
        loss.backward()
        optimizers[0].step()
        if (step + 1) % EVERY == 0 and step >= steps // 2:
            found.append(divergence(made))
    return found


def main() -> None:
    """Train three seeds with every weight and write what was found."""
    rows = []
    for seed in SEEDS:
        data = moons(seed)
        density = score_network(data, seed)
        for weight in WEIGHTS:
            values = torch.tensor(train_gan(data, density, weight, seed), dtype=torch.float64)
            row = {"weight": weight, "seed": seed}
            rows.append(row | {"kl_mean": float(values.mean()), "kl_median": float(values.median())})
            print(rows[-1], flush=True)
    found = {"table": "gan", "torch": torch.__version__, "steps": STEPS, "rows": rows}
    RESULT.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()

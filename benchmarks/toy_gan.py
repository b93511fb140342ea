r"""A GAN on a line whose exact divergence is known: does the term of `fastscore.score_regularization` lower it?

The generator is an increasing function of a standard normal z, so its density is known at every sample it makes, and

.. math:: KL(p_G \| p) = \int N(z; 0, 1) \big[\log N(z; 0, 1) - \log G'(z) - \log p(G(z))\big]\, dz

is a sum over a grid of z. It is averaged over two stretches of the training, because a GAN goes up and down. The data
are three peaks, the discriminators small: of 4 and of 16 hidden units. The score network is an MLP trained on the same
data with `density_loss`; with and without the term, all starts from the same weights, batches and latents.

    python benchmarks/toy_gan.py   # writes benchmarks/results/gan.json and gan.md
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import torch
from digits_training import mean_and_error
from torch import Tensor, nn
from torch.distributions import Categorical, MixtureSameFamily, Normal
from torch.nn import functional as F

import fastscore as fs
from fastscore.demo.training import ScoreMLP

RESULTS = Path(__file__).parent / "results"
WIDTHS, WEIGHTS, SEEDS = (4, 16), (0.0, 0.1), (0, 1, 2)
STEPS, SCORE_STEPS, BATCH, SAMPLES, EVERY = 2000, 1000, 256, 4000, 25
STRETCHES = ((300, 600), (1000, 2000))
SCHEDULE = fs.LogSNR(-8.0, 8.0)
PEAKS = Normal(torch.tensor([-1.5, 0.5, 2.0], dtype=torch.float64), 0.3)
DATA = MixtureSameFamily(Categorical(torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)), PEAKS)
GRID = torch.linspace(-6, 6, 4001, dtype=torch.float64)


class Generator(nn.Module):
    """x = shift + a z + sum_k b_k tanh(c_k z + d_k) with positive a, b and c: increasing in z."""

    def __init__(self, width: int = 32):
        super().__init__()
        self.shift, self.slope = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(()))
        self.height, self.steep = nn.Parameter(torch.full((width,), -3.0)), nn.Parameter(3 + torch.randn(width))
        self.place = nn.Parameter(4 * torch.randn(width))

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return G(z) and G'(z), each of shape (N,)."""
        slope, height, steep = (F.softplus(v) for v in (self.slope, self.height, self.steep))
        bend = torch.tanh(steep * z[:, None] + self.place)
        return self.shift + slope * z + bend @ height, slope + (1 - bend.square()) @ (steep * height)


@torch.no_grad()
def divergence(generator: Generator) -> float:
    """Return KL(p_G || p) in nats, by quadrature in float64."""
    x, slope = copy.deepcopy(generator).double()(GRID)
    log_normal = Normal(0.0, 1.0).log_prob(GRID)
    return float(torch.trapezoid(log_normal.exp() * (log_normal - slope.log() - DATA.log_prob(x)), GRID))


def samples(seed: int) -> Tensor:
    """Return the training data of a seed, (N, 1)."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return DATA.sample((SAMPLES, 1)).float()


def score_network(data: Tensor, seed: int, steps: int = SCORE_STEPS) -> fs.ScoreDensity:
    """Return the density of a score network trained on the data."""
    torch.manual_seed(seed)
    density = fs.ScoreDensity(ScoreMLP(1, 64), SCHEDULE, "v")
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


def train_gan(
    data: Tensor, density: fs.ScoreDensity, weight: float, width: int, seed: int, steps: int
) -> dict[int, float]:
    """Train with the non-saturating loss, plus `weight` times the score network's -log p of the samples.

    Returns the exact divergence, nats, every 25 steps.
    """
    torch.manual_seed(seed)
    made, judge = Generator(), nn.Sequential(nn.Linear(1, width), nn.Tanh(), nn.Linear(width, 1))
    optimizers = [torch.optim.Adam(net.parameters(), 2e-3, betas=(0.5, 0.9)) for net in (made, judge)]
    generator, found = torch.Generator().manual_seed(seed), {}
    for step in range(steps):
        real = data[torch.randint(len(data), (BATCH,), generator=generator)]
        fake = made(torch.randn(BATCH, generator=generator))[0][:, None]
        optimizers[1].zero_grad()
        (F.softplus(-judge(real)) + F.softplus(judge(fake.detach()))).mean().backward()
        optimizers[1].step()
        loss = F.softplus(-judge(fake)).mean()
        if weight:
            loss = loss + weight * fs.score_regularization(density, fake, seed=step)
        optimizers[0].zero_grad()
        loss.backward()
        optimizers[0].step()
        if step % EVERY == 0:
            found[step] = divergence(made)
    return found


def mean_between(found: dict[int, float], first: int, last: int) -> float:
    """Return the mean of the divergence over a stretch of steps."""
    chosen = [value for step, value in found.items() if first <= step < last]
    return sum(chosen) / len(chosen)


def main() -> None:
    """Train three seeds with every discriminator and weight, and write what was found."""
    found = {}
    for seed in SEEDS:
        data = samples(seed)
        density = score_network(data, seed)
        for width in WIDTHS:
            for weight in WEIGHTS:
                found[width, weight, seed] = train_gan(data, density, weight, width, seed, STEPS)
    rows = []
    for width in WIDTHS:
        for stretch in STRETCHES:
            values = {w: [mean_between(found[width, w, seed], *stretch) for seed in SEEDS] for w in WEIGHTS}
            for weight in WEIGHTS:
                mean, error = mean_and_error(values[weight])
                gain, gain_error = mean_and_error([a - b for a, b in zip(values[0.0], values[weight])])
                row = {"discriminator": width, "steps": "{} to {}".format(*stretch), "weight of the term": weight}
                row |= {"KL, nats": f"{mean:.3f} ± {error:.3f}", "less than without": f"{gain:.3f} ± {gain_error:.3f}"}
                rows.append(row | {"of each seed": [round(v, 3) for v in values[weight]]})
                print(rows[-1])
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([str(v) for v in row.values()] for row in rows)]
    (RESULTS / "gan.md").write_text("\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n")
    about = {"table": "gan", "torch": torch.__version__, "steps": STEPS, "batch": BATCH}
    (RESULTS / "gan.json").write_text(json.dumps({**about, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()

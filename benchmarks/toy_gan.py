r"""A GAN on a line whose exact divergence is known: does the term of `fastscore.score_regularization` lower it?

The generator is an increasing function of a standard normal z, so its density is known at every sample,

.. math:: \log p_G(G(z)) = \log N(z; 0, 1) - \log G'(z), \qquad
    KL(p_G \| p) = \int N(z; 0, 1) \big[\log p_G(G(z)) - \log p(G(z))\big]\, dz

and both divergences are sums over a grid of z. The data are three narrow peaks; the score network is a small MLP trained on
the same data with `density_loss`. Both generators start from the same weights and see the same batches and latents.
"""

from __future__ import annotations

import torch
from analytic import Target
from torch import Tensor, nn
from torch.nn import functional as F

import fastscore as fs
from fastscore.demo.training import ScoreMLP

DATA = Target(
    torch.tensor([0.5, 0.3, 0.2]), torch.tensor([[-1.5], [0.5], [2.0]]), 0.15**2 * torch.eye(1).expand(3, 1, 1)
)
SCHEDULE = fs.LogSNR(-8.0, 8.0)
WEIGHT = 0.1  # gamma
STEPS, BATCH, SAMPLES = 3000, 256, 4000
SCORE_STEPS = 2000
GRID = torch.linspace(-7, 7, 20_001, dtype=torch.float64)


class Generator(nn.Module):
    """x = shift + a z + sum_k b_k tanh(c_k z + d_k) with positive a, b and c: increasing in z."""

    def __init__(self, width: int = 32):
        super().__init__()
        self.shift, self.slope = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(()))
        self.height, self.steep = nn.Parameter(torch.full((width,), -3.0)), nn.Parameter(torch.randn(width))
        self.place = nn.Parameter(2 * torch.randn(width))

    def forward(self, z: Tensor) -> Tensor:
        """Return G(z), shape of z (N,)."""
        bend = torch.tanh(F.softplus(self.steep) * z[:, None] + self.place)
        return self.shift + F.softplus(self.slope) * z + bend @ F.softplus(self.height)

    def slope_at(self, z: Tensor) -> Tensor:
        """Return G'(z)."""
        steep = F.softplus(self.steep)
        bend = 1 - torch.tanh(steep * z[:, None] + self.place).square()
        return F.softplus(self.slope) + bend @ (steep * F.softplus(self.height))


@torch.no_grad()
def divergences(generator: Generator) -> tuple[float, float]:
    """Return KL(p_G || p) and KL(p || p_G) in nats; the latter within the reach of |z| <= 7."""
    exact = Generator().double()
    exact.load_state_dict(generator.state_dict())
    normal = torch.distributions.Normal(0.0, 1.0).log_prob(GRID)
    x, slope = exact(GRID), exact.slope_at(GRID)
    log_g, log_p = normal - slope.log(), DATA.log_prob(x[:, None])
    forward = torch.trapezoid(normal.exp() * (log_g - log_p), GRID)
    backward = torch.trapezoid(log_p.exp() * slope * (log_p - log_g), GRID)
    return float(forward), float(backward)


def score_network(data: Tensor, seed: int, steps: int = SCORE_STEPS) -> fs.ScoreDensity:
    """Return the density of a score network trained on the data."""
    torch.manual_seed(seed)
    density = fs.ScoreDensity(ScoreMLP(1, 64), SCHEDULE, "v")
    nodes = fs.AdaptiveNodes(SCHEDULE)
    optimizer = torch.optim.Adam(density.model.parameters(), 2e-3)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        x = data[torch.randint(len(data), (BATCH,), generator=generator)]
        optimizer.zero_grad()
        fs.density_loss(density, x, seed=step, antithetic=True, nodes=nodes).backward()
        optimizer.step()
        cycle.step()
    return density


def train_gan(data: Tensor, density: fs.ScoreDensity, weight: float, seed: int, steps: int = STEPS) -> Generator:
    """Train with the non-saturating loss, plus `weight` times the score network's -log p of the samples."""
    torch.manual_seed(seed)
    made = Generator()
    judge = nn.Sequential(nn.Linear(1, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1))
    optimizers = [torch.optim.Adam(net.parameters(), 1e-3, betas=(0.5, 0.9)) for net in (made, judge)]
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        real = data[torch.randint(len(data), (BATCH,), generator=generator)]
        z = torch.randn(BATCH, generator=generator)
        judged = F.softplus(-judge(real)) + F.softplus(judge(made(z)[:, None].detach()))
        optimizers[1].zero_grad()
        judged.mean().backward()
        optimizers[1].step()
        fake = made(z)[:, None]
        loss = F.softplus(-judge(fake)).mean()
        if weight:
            loss = loss + weight * fs.score_regularization(density, fake, seed=step)
        optimizers[0].zero_grad()
        loss.backward()
        optimizers[0].step()
    return made

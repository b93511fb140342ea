"""Check an installed package in a few seconds: an estimate of a known integral; prints where the package lies."""

import math

import torch

import fastscore

print(fastscore.__file__)


class Standard(torch.nn.Module):
    def forward(self, x_t, t):
        return schedule.alpha_sigma(t)[1].to(x_t)[:, None] * x_t / 2  # half of what N(0, 1) has


schedule = fastscore.LogSNR(-14, 16)
x = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
found = fastscore.ScoreDensity(Standard(), schedule, "eps").estimate(x, nfe=256)
# Against q = N(0, 1) with eps_q = sigma x_t the integrand is, with s = sigma^2 and a = alpha^2 = 1 - s,
# d ((1 - s / 2)^2 - a^2) + |x|^2 (s a / 4 - s a).
step = torch.linspace(-14, 16, 300001, dtype=torch.float64)
s = torch.sigmoid(-step)
a = 1 - s
constant, slope = 3 * ((1 - s / 2) ** 2 - a**2), s * a / 4 - s * a
x2 = x.double().square().sum(1)
exact = (
    -1.5 * math.log(2 * math.pi) - x2 / 2 - 0.5 * (torch.trapezoid(constant, step) + x2 * torch.trapezoid(slope, step))
)
z = (found.log_prob - exact) / found.stderr
# 200 samples: none beyond 5 of its standard errors, their mean within 4 of its own.
assert float(z.abs().max()) < 5, z
assert abs(float(z.mean())) < 4 / 200**0.5, z

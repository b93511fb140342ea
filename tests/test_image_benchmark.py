"""The ways that benchmarks/bench_images.py compares give the log-density where it is known."""

import math

import image_methods
import photographs
import pytest
import torch
from image_networks import SCHEDULE
from torch import nn

STD = 0.4
X = STD * torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(0))


class Exact(nn.Module):
    """v of N(0, STD^2): the best guess of x is alpha STD^2 x_t / (alpha^2 STD^2 + sigma^2)."""

    def forward(self, x_t, log_snr):
        alpha, sigma = (v.to(x_t)[:, None, None, None] for v in SCHEDULE.scale(log_snr))
        x = alpha * STD**2 / (alpha**2 * STD**2 + sigma**2) * x_t
        return (alpha * x_t - x) / sigma


@pytest.fixture(scope="module")
def ways():
    training = STD * torch.randn(200, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    return {method.name: method for method in image_methods.Ways(Exact(), training).methods((64,))}


def bound_of_the_table(x):
    """What the sum over a table gives on average: at alpha^2 = a the network's error is kappa eps + m."""
    log_snr, weight, span = image_methods.all_timesteps(1000, torch.Generator())
    a = log_snr.sigmoid()
    kappa = a * STD**2 / (a * STD**2 + 1 - a)
    own = 48 * kappa**2 + a * (1 - a) / (a * STD**2 + 1 - a) ** 2 * x.double().square().flatten(1).sum(1)[:, None]
    return image_methods.known(x, *span) - 0.5 * own @ weight


def test_every_way_gives_the_log_density_of_a_gaussian(ways):
    truth = -0.5 * (X.double().square().flatten(1).sum(1) / STD**2 + 48 * math.log(2 * math.pi * STD**2))
    for name, method in ways.items():
        (nfe,) = method.evaluations
        found = torch.stack([method.run(X, nfe, seed).log_prob for seed in range(16)])
        expected = bound_of_the_table(X) if name == "plain, all timesteps" else truth
        # The spread over 16 seeds and 6 samples says how exact the mean is; 1e-3 is for the ends of the range. Probes
        # have no spread here, where the divergence is a multiple of the identity: dopri5's own error is left, of a
        # tolerance of 1e-3 in 49 numbers.
        stderr = float(found.var(0).mean() / found.numel()) ** 0.5
        assert abs(float((found - expected).mean())) < 4 * stderr + (0.05 if name.startswith("ODE") else 1e-3), name
    assert float((truth - bound_of_the_table(X)).min()) > 0  # a bound


def test_the_learned_schedule_has_less_variance_than_equidistant_times(ways):
    spread = {}
    for name in ("plain, low-discrepancy times", "plain, learned schedule", "plain, importance-sampled times"):
        found = torch.stack([ways[name].run(X, 64, seed).log_prob for seed in range(40)])
        spread[name] = float(found.var(0).mean())
    # 39 degrees of freedom at 6 samples: each variance has a standard error of 9 %.
    assert spread["plain, learned schedule"] < 0.9 * spread["plain, low-discrepancy times"]
    assert spread["plain, low-discrepancy times"] < 0.5 * spread["plain, importance-sampled times"]


def test_patches_are_those_of_other_photographs_and_the_same_every_time():
    training, origins = photographs.patches(16, photographs.TRAINING, 50)
    held_out, others = photographs.patches(16, photographs.HELD_OUT, 50)
    assert not set(photographs.TRAINING) & set(photographs.HELD_OUT)
    assert set(origins) <= set(photographs.TRAINING)
    assert set(others) == set(photographs.HELD_OUT)
    assert torch.equal(training, photographs.patches(16, photographs.TRAINING, 50)[0])
    levels = photographs.dequantized(held_out, torch.Generator().manual_seed(0))
    assert torch.equal(((levels + 1) * 128).floor().to(torch.uint8), held_out)
    assert float(held_out.double().std()) > 30  # photographs, no empty arrays

r"""How many evaluations an error takes: fastscore beside the formula as it stands, on densities known exactly.

Root-mean-square errors in nats over 256 points of each target, the exact network in float32, log-SNR in [-14, 16]. The
plain formula gets stratified log-SNRs and independent noise, and nothing else:

.. math:: -\tfrac d2 \log(2\pi e) - \tfrac12\int (E\|\epsilon-\hat\epsilon\|^2 - d\,\mathrm{sigmoid}(\lambda))\,d\lambda
"""

import math

import pytest
import torch
from analytic import ExactNet, mixture

import fastscore as fs

POINTS, SEEDS = 256, 4
TARGETS = {f"mixture of 5, d = {d}": d for d in (2, 16, 64)}
SCHEDULE = fs.LogSNR()


def plain_formula(net, x, nfe, seed):
    """Return the plain estimate, nats, shape (B,)."""
    generator = torch.Generator().manual_seed(seed)
    lo, hi = SCHEDULE.log_snr_range
    d, cell = x.shape[1], (hi - lo) / nfe
    log_snr = lo + cell * (torch.arange(nfe) + torch.rand(nfe, generator=generator, dtype=torch.float64))
    alpha, sigma = (v.float()[:, None] for v in SCHEDULE.alpha_sigma(log_snr))
    integral = []
    for sample in x:
        eps = torch.randn(nfe, d, generator=generator)
        error = (eps - net(alpha * sample + sigma * eps, log_snr)).square().sum(1)
        integral.append(cell * (error.double() - d * torch.sigmoid(log_snr)).sum())
    return -0.5 * d * math.log(2 * math.pi * math.e) - 0.5 * torch.stack(integral)


@pytest.fixture(scope="module", params=TARGETS)
def case(request):
    """A target with its points, its exact network, and the density before and after `fit`."""
    target = mixture(TARGETS[request.param])
    net = ExactNet(target, SCHEDULE)
    fitted = fs.ScoreDensity(net, SCHEDULE, "eps").fit(target.sample(4000, seed=5).float(), progress=False)
    return request.param, target, net, fs.ScoreDensity(net, SCHEDULE, "eps"), fitted


@pytest.mark.parametrize("nfe", [32, 128, 512])
def test_error_for_evaluations(benchmark, table, case, nfe):
    name, target, net, unfitted, fitted = case
    x = target.sample(POINTS, seed=17).float()
    exact = target.log_prob(x)

    def rmse(estimates):
        return float((torch.stack(estimates) - exact).square().mean().sqrt())

    found = [fitted.estimate(x, nfe=nfe, seed=seed) for seed in range(SEEDS)]
    covered = torch.stack([(e.log_prob - exact).abs() < 1.96 * e.stderr + e.truncation_per_sample for e in found])
    # 1,024 intervals of 95 %, whose calibration has an error of its own.
    assert 0.91 <= float(covered.double().mean()) <= 0.99
    row = {
        "target": name,
        "nfe": nfe,
        "plain formula": rmse([plain_formula(net, x, nfe, seed) for seed in range(SEEDS)]),
        "fastscore, no data": rmse([unfitted.estimate(x, nfe=nfe, seed=seed).log_prob for seed in range(SEEDS)]),
        "fastscore, fitted": rmse([e.log_prob for e in found]),
    }
    row["ratio"] = row["plain formula"] / row["fastscore, fitted"]
    row["95 % intervals that cover"] = float(covered.double().mean())
    assert row["ratio"] > 1
    table("accuracy", row)
    benchmark.extra_info.update(row)
    benchmark.pedantic(lambda: fitted.estimate(x, nfe=nfe), rounds=3, warmup_rounds=1)

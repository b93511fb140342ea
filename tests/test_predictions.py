"""Predictions: every parametrization against its definition."""

import pytest
import torch
from analytic import PREDICTIONS, SCHEDULES

from fastscore.process.predictions import check_prediction, coefficients, eps_from


def targets(schedule, t, x, eps):
    """The definitions, as their papers write them."""
    alpha, sigma = (v[:, None] for v in schedule.alpha_sigma(t))
    found = {"eps": eps, "x0": x, "denoiser": x, "v": alpha * eps - sigma * x, "score": -eps / sigma}
    if not schedule.discrete:
        d_alpha, d_sigma = (v[:, None] for v in schedule.derivatives(t))
        found["flow"] = d_alpha * x + d_sigma * eps
    return found, alpha, sigma


@pytest.mark.parametrize("predicts", PREDICTIONS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_coefficients_recover_the_noise(name, predicts):
    schedule = SCHEDULES[name]
    if predicts == "flow" and schedule.discrete:
        with pytest.raises(ValueError, match="no time derivative"):
            coefficients(predicts, schedule, torch.tensor([1]))
        return
    generator = torch.Generator().manual_seed(1)
    t = schedule.time(torch.linspace(-8, 8, 9, dtype=torch.float64))
    x, eps, other = torch.randn(3, 9, 4, dtype=torch.float64, generator=generator)
    exact, alpha, sigma = targets(schedule, t, x, eps)
    a, b, c = (v[:, None] for v in coefficients(predicts, schedule, t))
    assert torch.allclose(a * eps + b * x, exact[predicts], rtol=1e-10, atol=1e-10)
    # A network that believes in other noise answers with the target of that noise and the data that fits x_t.
    x_t = alpha * x + sigma * eps
    believed, _, _ = targets(schedule, t, (x_t - sigma * other) / alpha, other)
    assert torch.allclose(c * (a * eps + b * x - believed[predicts]), eps - other, rtol=1e-7, atol=1e-7)
    c_f, c_x = (v[:, None] for v in eps_from(predicts, schedule, t))
    assert torch.allclose(c_f * believed[predicts] + c_x * x_t, other, rtol=1e-7, atol=1e-7)


def test_unknown_prediction_lists_the_valid_ones():
    with pytest.raises(ValueError, match="denoiser, eps, flow, score, v, x0; got 'noise'"):
        check_prediction("noise")

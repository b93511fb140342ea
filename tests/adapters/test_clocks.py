"""The schedules that adapters add: time and log-SNR are inverse, alpha and sigma follow their definitions."""

import pytest
import torch

from fastscore.adapters.clocks import OffsetFlow, SubVP, TargetFlow, Trigonometric, noise_table, table

T = torch.linspace(1e-3, 0.999, 50, dtype=torch.float64)
ANGLE = torch.pi / 2 * T


def sub_vp(beta_min, beta_max):
    square = torch.exp(-0.5 * (beta_max - beta_min) * T**2 - beta_min * T)
    return square.sqrt(), 1 - square


@pytest.mark.parametrize(
    ("schedule", "alpha", "sigma"),
    [
        (SubVP(0.1, 20.0), *sub_vp(0.1, 20.0)),
        (SubVP(0.01, 10.0), *sub_vp(0.01, 10.0)),
        (OffsetFlow(1e-3), 1 - T, T + 1e-3),
        (OffsetFlow(0.1), 1 - T, T + 0.1),
        (TargetFlow(0.01), T, 1 - 0.99 * T),
        (Trigonometric(), torch.sin(ANGLE), torch.cos(ANGLE)),
        (Trigonometric(0.1), torch.sin(ANGLE), (torch.cos(ANGLE) ** 2 + 0.01).sqrt()),
    ],
    ids=["subvp", "subvp-sbi", "flow", "flow-large-offset", "target", "circle", "circle-noise"],
)
def test_continuous_clocks(schedule, alpha, sigma):
    found = schedule.alpha_sigma(T)
    # Both sides lose digits where 1 - alpha^2 is small, or where it is not: 1e-16 / 1e-6.
    assert torch.allclose(found[0], alpha, rtol=1e-9)
    assert torch.allclose(found[1], sigma, rtol=1e-9)
    assert torch.allclose(schedule.log_snr(T), 2 * torch.log(alpha / sigma), rtol=1e-9, atol=1e-9)
    assert torch.allclose(schedule.time(schedule.log_snr(T)), T, rtol=1e-9)
    lowest, highest = schedule.log_snr_range
    assert lowest < highest <= 16


def test_the_range_of_an_offset_flow_ends_at_its_least_noise():
    schedule = OffsetFlow(1e-3)
    assert schedule.log_snr_range == pytest.approx((-14.0, 2 * torch.log(torch.tensor(1e3)).item()), rel=1e-6)
    assert float(schedule.time(torch.tensor(schedule.log_snr_range[1]))) == pytest.approx(0.0, abs=1e-15)


def test_tables():
    sigmas = torch.tensor([0.01, 1.0, 3.0, torch.inf])
    schedule = noise_table(sigmas)
    assert torch.allclose(schedule.log_snr(torch.arange(3)), -2 * sigmas[:3].double().log(), atol=1e-9)
    assert schedule.time_range == (0, 2)  # infinite noise is left out
    assert table(torch.tensor([0.9, 0.5])).time_range == (0, 1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OffsetFlow(0.0), "0 < offset < 1, got 0.0; without one use FlowMatching"),
        (lambda: noise_table(torch.tensor([2.0, 1.0])), "strictly decreasing"),
        (lambda: table(torch.tensor([0.5, 0.0, 0.0])), r"inside \(0, 1\)"),
    ],
)
def test_bad_input_is_explained(make, message):
    with pytest.raises(ValueError, match=message):
        make()

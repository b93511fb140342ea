"""Schedules: clocks and scalings against their definitions, in float64."""

import math

import pytest
import torch
from analytic import SCHEDULES

import fastscore as fs


@pytest.mark.parametrize("name", SCHEDULES)
def test_time_and_log_snr_are_inverse_and_monotone(name):
    schedule = SCHEDULES[name]
    lo, hi = schedule.log_snr_range
    log_snr = torch.linspace(lo, hi, 501, dtype=torch.float64)
    if schedule.discrete:
        log_snr = schedule.table.flip(0)
    time = schedule.time(log_snr)
    steps = time.double().diff()
    assert bool((steps > 0).all()) or bool((steps < 0).all())
    # Near t = 1 a float64 time resolves log-SNR to about 2^-52 e^8: 1e-12.
    assert torch.allclose(schedule.log_snr(time), log_snr, rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", SCHEDULES)
def test_log_snr_is_the_ratio_of_alpha_and_sigma(name):
    schedule = SCHEDULES[name]
    log_snr = torch.linspace(*schedule.log_snr_range, 101, dtype=torch.float64)
    alpha, sigma = schedule.scale(log_snr)
    assert torch.allclose(2 * (alpha / sigma).log(), log_snr, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", SCHEDULES)
def test_trained_range_is_the_time_range(name):
    schedule = SCHEDULES[name]
    lo, hi = schedule.log_snr_range
    clean, noisy = (float(schedule.log_snr(torch.tensor(t))) for t in schedule.time_range)
    assert lo == pytest.approx(max(noisy, -14.0) if not schedule.discrete else noisy, abs=0.01)  # 1 - t rounds
    assert hi == pytest.approx(min(clean, 16.0) if not schedule.discrete else clean, abs=0.01)


def test_definitions_at_known_times():
    t = torch.tensor(0.3, dtype=torch.float64)
    alpha, sigma = fs.LiYan().alpha_sigma(t)
    assert float(alpha) == pytest.approx(math.sqrt(0.7), rel=1e-14)
    assert float(sigma) == pytest.approx(math.sqrt(0.3), rel=1e-14)
    alpha, sigma = fs.VP(0.1, 20.0).alpha_sigma(t)
    assert float(alpha) == pytest.approx(math.exp(-0.25 * 0.09 * 19.9 - 0.5 * 0.3 * 0.1), rel=1e-14)
    alpha, sigma = fs.Cosine().alpha_sigma(t)
    assert float(alpha) == pytest.approx(math.cos(0.15 * math.pi), rel=1e-14)
    alpha, sigma = fs.VE(0.01, 50.0).alpha_sigma(t)
    assert (float(alpha), float(sigma)) == pytest.approx((1.0, 0.01 * 5000**0.3), rel=1e-14)
    alpha, sigma = fs.EDM().alpha_sigma(t)
    assert (float(alpha), float(sigma)) == pytest.approx((1.0, 0.3), rel=1e-14)
    alpha, sigma = fs.FlowMatching(1).alpha_sigma(t)
    assert (float(alpha), float(sigma)) == pytest.approx((0.3, 0.7), rel=1e-14)
    alpha, sigma = fs.FlowMatching(0).alpha_sigma(t)
    assert (float(alpha), float(sigma)) == pytest.approx((0.7, 0.3), rel=1e-14)


def test_numbers_of_python_are_not_rounded_to_float32():
    # 1e-7 of a time would move a log-SNR by as much; math's logarithms and torch's agree to the last bits.
    close = {"rel": 1e-14, "abs": 1e-14}
    assert fs.EDM(0.002, 80.0).log_snr_range == pytest.approx((-2 * math.log(80.0), -2 * math.log(0.002)), **close)
    assert float(fs.EDM().log_snr(0.1)) == pytest.approx(-2 * math.log(0.1), **close)
    assert float(fs.EDM().time(0.1)) == pytest.approx(math.exp(-0.05), **close)
    assert float(fs.FlowMatching().log_snr(0.1)) == pytest.approx(2 * math.log(0.1 / 0.9), **close)
    tenth = torch.tensor(0.1, dtype=torch.float64)
    assert float(fs.ConditionalFlow(0.3).log_snr(0.1)) == float(fs.ConditionalFlow(0.3).log_snr(tenth))


def test_tables_are_those_of_their_papers():
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    bar = torch.cumprod(1 - betas, 0)
    alpha, sigma = fs.DDPM.linear(1000).alpha_sigma(torch.arange(1000))
    assert torch.allclose(alpha**2, bar, rtol=1e-12)
    assert torch.allclose(sigma**2, 1 - bar, rtol=1e-12)
    assert float(fs.DDPM.scaled_linear(1000).alpha_sigma(torch.tensor([0]))[1] ** 2) == pytest.approx(0.00085, rel=1e-9)
    # Improved DDPM, eq. 17, away from the clipped end.
    f = [math.cos((i / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(1001)]
    alpha, _ = fs.DDPM.cosine(1000).alpha_sigma(torch.tensor([499]))
    assert float(alpha**2) == pytest.approx(f[500] / f[0], rel=1e-9)


@pytest.mark.parametrize("name", [n for n in SCHEDULES if not SCHEDULES[n].discrete])
def test_derivatives_match_finite_differences(name):
    schedule = SCHEDULES[name]
    lo, hi = schedule.log_snr_range
    t = schedule.time(torch.linspace(lo + 6, hi - 6, 7, dtype=torch.float64))
    h = 1e-6 * t.abs().clamp(min=1e-3)
    for derivative, ahead, behind in zip(
        schedule.derivatives(t), schedule.alpha_sigma(t + h), schedule.alpha_sigma(t - h), strict=True
    ):
        # Central differences: truncation h^2, rounding 1e-16 / h.
        assert torch.allclose(derivative, (ahead - behind) / (2 * h), rtol=1e-5, atol=1e-5)


def test_flow_matching_moves_in_straight_lines():
    d_alpha, d_sigma = fs.FlowMatching(1).derivatives(torch.tensor([0.1, 0.5, 0.9]))
    assert torch.allclose(d_alpha, torch.ones(3).double())
    assert torch.allclose(d_sigma, -torch.ones(3).double())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fs.DDPM(torch.tensor([0.5, 0.9])), "strictly decreasing.*timesteps 0, 1.*flip it"),
        (lambda: fs.DDPM(torch.tensor([0.9, 0.0])), r"inside \(0, 1\)"),
        (lambda: fs.DDPM(torch.ones(2, 2)), r"shape \(T,\), got shape \(2, 2\)"),
        (lambda: fs.VP(2.0, 1.0), "0 < beta_min < beta_max"),
        (lambda: fs.VE(0.0, 1.0), "0 < sigma_min < sigma_max"),
        (lambda: fs.VP("a", 2), "beta_min of VP must be a finite number, got 'a'"),
        (lambda: fs.VE(0.1, torch.inf), "sigma_max of VE must be a finite number, got inf"),
        (lambda: fs.EDM(None), "sigma_min of EDM must be a finite number, got None"),
        (lambda: fs.LogSNR(0, torch.nan), "hi of LogSNR must be a finite number, got nan"),
        (lambda: fs.Levels(2.5), r"bins must be an integer, got 2\.5"),
        (lambda: fs.EDM(sigma_data=0.0), "sigma_data of EDM must be positive"),
        (lambda: fs.FlowMatching(2), "data_at = 0 or 1"),
        (lambda: fs.LogSNR(1.0, -1.0), "lo < hi"),
        (lambda: fs.DDPM.linear(10).log_snr(torch.tensor([0.5])), "whole timesteps"),
        (lambda: fs.DDPM.linear(10).log_snr(torch.tensor([10])), "timesteps 0 to 9, got 10"),
        (lambda: fs.DDPM.linear(10).derivatives(torch.tensor([1])), "no time derivative"),
    ],
)
def test_bad_schedules_say_what_is_wrong(make, message):
    with pytest.raises(ValueError, match=message):
        make()

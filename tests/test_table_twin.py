"""The continuous process through a table, and which networks the ODE may ask between its timesteps."""

import math

import pytest
import torch
from analytic import ExactNet, Target, mixture
from torch import nn

import fastscore as fs
from fastscore.adapters.clocks import noise_table

pytestmark = pytest.mark.usefixtures("one_thread")

TABLES = {
    "linear": fs.DDPM.linear(1000),
    "scaled linear": fs.DDPM.scaled_linear(50),
    "cosine": fs.DDPM.cosine(1000),
    "noise levels": noise_table(torch.logspace(-2, 2, 30)),
    "two": fs.DDPM(torch.tensor([0.9, 0.1])),
    "bent": fs.DDPM(torch.tensor([0.999, 0.998, 0.2, 0.19, 0.01, 0.0099])),
}


@pytest.mark.parametrize("name", TABLES)
def test_it_goes_through_the_table_falls_and_comes_back(name):
    table = TABLES[name]
    twin = fs.ContinuousDDPM(table)
    whole = torch.arange(len(table.table))
    torch.testing.assert_close(twin.log_snr(whole), table.log_snr(whole), rtol=0, atol=1e-14)
    assert twin.log_snr_range == table.log_snr_range
    assert twin.range_for(1e-3, 1e3) == table.range_for(1e-3, 1e3)
    t = torch.linspace(0, len(table.table) - 1, 20_001, dtype=torch.float64)
    log_snr = twin.log_snr(t)
    assert bool((log_snr.diff() < 0).all())
    torch.testing.assert_close(twin.log_snr(twin.time(log_snr)), log_snr, rtol=0, atol=1e-13)
    torch.testing.assert_close(twin.time(log_snr), t, rtol=0, atol=1e-9)
    assert torch.equal(twin.time(table.table[[0, -1]]), torch.tensor([0.0, len(whole) - 1], dtype=torch.float64))


def test_between_the_entries_of_a_smooth_process_it_is_that_process():
    """VP's beta is linear in time, and so is the table's: t = (i + 1) / 1000 but for terms of beta^2 / 2."""
    twin = fs.ContinuousDDPM(fs.DDPM.linear(1000))
    continuous = fs.VP(0.1, 20.0)
    i = torch.tensor([20.5, 100.25, 500.5, 900.75])
    expected = continuous.log_snr((i + 1) / 1000)
    torch.testing.assert_close(twin.log_snr(i), expected, rtol=0.02, atol=0.02)
    # Between neighbours the cubic is off the middle of both by the curvature alone.
    chord = (twin.log_snr(i.floor()) + twin.log_snr(i.ceil())) / 2
    assert float((twin.log_snr(i.floor() + 0.5) - chord).abs().max()) < 1e-3


def test_what_is_no_table_or_no_timestep_is_refused():
    with pytest.raises(TypeError, match=r"table must be a DDPM such as DDPM\.linear"):
        fs.ContinuousDDPM(fs.VP())
    with pytest.raises(ValueError, match=r"knows timesteps from 0 to 999, got -1\.0 to 5\.0"):
        fs.ContinuousDDPM(fs.DDPM.linear(1000)).log_snr(torch.tensor([-1.0, 5.0]))


TARGET, TABLE = mixture(2, components=3), fs.DDPM.linear(1000)
X = TARGET.sample(6, seed=2)


@pytest.mark.parametrize("predicts", ["eps", "v"])
def test_the_ode_of_a_table_is_that_of_its_process(predicts):
    """To the density at the clean end; the network has dtype float64 and takes the timestep as it comes."""
    net = ExactNet(TARGET, fs.ContinuousDDPM(TABLE), predicts)
    found = fs.probability_flow_log_prob(fs.ScoreDensity(net, TABLE, predicts), X, error=1e-3)
    variance = math.exp(-TABLE.log_snr_range[1])
    exact = Target(TARGET.weight, TARGET.mean, TARGET.cov + variance * torch.eye(2)).log_prob(X)
    # At the noisy end alpha = 0.006: the prior is off by about z times the mean's size times that.
    assert float((found.log_prob - exact).abs().max()) < 0.02
    twin = fs.ScoreDensity(net, fs.ContinuousDDPM(TABLE), predicts)
    assert torch.equal(found.log_prob, fs.probability_flow_log_prob(twin, X, error=1e-3).log_prob)
    # And of the formula, which asks at whole timesteps: within its errors.
    formula = fs.ScoreDensity(net, TABLE, predicts).estimate(X, nfe=1000)
    gap = (formula.log_prob - found.log_prob).abs()
    assert bool((gap < 4 * formula.stderr + found.truncation + formula.truncation_per_sample + 0.05).all())


class Waves(nn.Module):
    """A network that turns the timestep into waves, as U-Nets do; `fastest` in radians a step."""

    def __init__(self, fastest=1.0, frequencies=16):
        super().__init__()
        torch.manual_seed(0)
        self.register_buffer("w", fastest * torch.logspace(-4, 0, frequencies))
        self.net = nn.Sequential(nn.Linear(2 + 2 * frequencies, 64), nn.SiLU(), nn.Linear(64, 2))

    def embedded(self, t):
        return torch.cat([(t[:, None] * self.w).sin(), (t[:, None] * self.w).cos()], 1)

    def forward(self, x_t, t):
        return self.net(torch.cat([x_t, self.embedded(t)], 1))


class Rounding(Waves):
    def forward(self, x_t, t):
        return super().forward(x_t, t.long())


class LookingUp(Waves):
    def embedded(self, t):
        return super().embedded(torch.arange(1000.0))[t]


class Branching(Waves):
    def forward(self, x_t, t):
        return super().forward(x_t, 1000 * t if t.is_floating_point() else t)


def test_a_network_of_waves_is_asked_between_and_once():
    calls = []
    net = Waves()
    net.register_forward_hook(lambda *of: calls.append(of[1][1].dtype))
    density = fs.ScoreDensity(net, TABLE, "eps")
    options = {"method": "midpoint", "steps": 4}
    first = fs.probability_flow_log_prob(density, X.float(), **options)
    asked = len(calls)
    assert torch.int64 in calls
    calls.clear()
    again = fs.probability_flow_log_prob(density, X.float(), **options)
    assert torch.equal(first.log_prob, again.log_prob)
    assert set(calls) == {torch.float32}
    assert len(calls) < asked


@pytest.mark.parametrize(
    ("net", "reason"),
    [
        (Rounding, r"half way between neighbours its answers are 0\.5 of their"),
        (LookingUp, "does not take data.*IndexError"),
        (Branching, r"it answers otherwise to t = 124\.0 than to the integer 124"),
        (lambda: Waves(fastest=300.0), "waves faster than a step"),
    ],
    ids=["rounds", "looks up", "branches", "fast waves"],
)
def test_a_network_of_whole_timesteps_is_refused(net, reason):
    density = fs.ScoreDensity(net(), TABLE, "eps")
    with pytest.raises(ValueError, match=rf"the ODE asks between the timesteps of DDPM\(1000.*{reason}.*use estimate"):
        fs.probability_flow_log_prob(density, X.float())
    assert bool(density.estimate(X.float(), nfe=16).log_prob.isfinite().all())  # the remedy


def test_a_time_dtype_that_the_user_set_stays():
    seen = set()

    class Joined(Waves):
        def forward(self, x_t, t):
            seen.add(t.dtype)
            return super().forward(x_t, t.float())

    for given, expected in ((torch.float32, {torch.float32}), (torch.float16, {torch.float16})):
        seen.clear()
        density = fs.ScoreDensity(Joined(), TABLE, "eps", time_dtype=given)
        fs.probability_flow_log_prob(density, X.float(), method="midpoint", steps=2)
        assert seen == expected


def test_a_network_that_looks_its_levels_up_in_the_table_is_told_of_the_twin():
    """Rounding a time, the table's own remedy, would make another network of it, which the ODE refuses too."""
    table, target = fs.DDPM.linear(100), mixture(2)
    density = fs.ScoreDensity(ExactNet(target, table), table, "eps", program=False)
    message = (
        r"knows only whole .* between them \(where the network itself asks it, fs.ContinuousDDPM .*\); use estimate"
    )
    with pytest.raises(ValueError, match=message) as refused:
        fs.probability_flow_log_prob(density, target.sample(3).float())
    assert "round it first" not in str(refused.value)
    twin = fs.ScoreDensity(ExactNet(target, fs.ContinuousDDPM(table)), table, "eps", program=False)
    assert fs.probability_flow_log_prob(twin, target.sample(3).float()).log_prob.shape == (3,)

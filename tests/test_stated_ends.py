"""An end that somebody stated is one of training, whatever the number: only a schedule without one follows the data."""

import copy
import math
import pickle

import pytest
import torch
from mixtures import ExactEps, Mixture
from test_contradicting_schedules import Slope

import fastscore as fs
from fastscore.estimator.methods import table_of
from fastscore.process.settings import settings_of


class Own(fs.Cosine):
    """A class of a user's, who writes down the times of log-SNR 16 and -14 as the ends of training."""

    time_range = tuple(2 / math.pi * math.atan(math.exp(-end / 2)) for end in (16.0, -14.0))


class Endless(fs.Cosine):
    """A class of a user's that goes on for ever: its log-SNR is infinite at both ends."""

    time_range = (0.0, 1.0)

    def log_snr(self, t):
        t = torch.as_tensor(t).double()
        return torch.where(t == 1, -math.inf, super().log_snr(t))  # the tangent of half of pi is rounded to 1.6e16


def stated(schedule):
    schedule.time_range = tuple(map(float, schedule.time_range))
    return schedule


STATED = {
    "LogSNR": lambda: fs.LogSNR(-14, 16),
    "LogSNR in float": lambda: fs.LogSNR(lo=-14.0, hi=16.0),
    "LogSNR that was set": lambda: stated(fs.LogSNR()),
    "EDM": lambda: fs.EDM(math.exp(-8), math.exp(7)),
    "VE": lambda: fs.VE(math.exp(-8), math.exp(7)),
    "flow": lambda: stated(fs.FlowMatching()),
    "flow to data": lambda: stated(fs.FlowMatching(0)),
    "Cosine": lambda: stated(fs.Cosine()),
    "LiYan": lambda: stated(fs.LiYan()),
    "a class": Own,
}
FOLLOWS = {
    "LogSNR": fs.LogSNR, "flow": fs.FlowMatching, "to data": lambda: fs.FlowMatching(0), "Cosine": fs.Cosine,
    "LiYan": fs.LiYan, "a class": Endless,
}  # fmt: skip
COPIES = {
    "itself": lambda v: v,
    "copy": copy.copy,
    "deep": copy.deepcopy,
    "file": lambda v: pickle.loads(pickle.dumps(v)),
}


@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize("name", STATED)
def test_an_end_that_is_stated_is_never_exceeded(name, copied):
    schedule = COPIES[copied](STATED[name]())
    # The times of a flow and of LiYan are near 1 at one of the ends, and tell log-SNR 16 to 1e-11 there.
    assert schedule.range_for(1e-4, 1e4) == pytest.approx((-14.0, 16.0), abs=1e-9)


@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize("name", FOLLOWS)
def test_a_schedule_without_an_end_follows_the_scale_of_the_data(name, copied):
    schedule = COPIES[copied](FOLLOWS[name]())
    for smallest, largest in ((1e-4, 1e4), (1.0, 1.0), (30.0, 40.0)):
        expected = -14 - 2 * math.log(largest), 16 - 2 * math.log(smallest)
        assert schedule.range_for(smallest, largest) == pytest.approx(expected, abs=1e-9)


def test_one_end_may_be_stated_alone():
    assert fs.LogSNR(hi=16).range_for(1e-4, 1e4) == (-14 - 2 * math.log(1e4), 16.0)
    assert fs.LogSNR(lo=-14).range_for(1e-4, 1e4) == (-14.0, 16 - 2 * math.log(1e-4))
    own = fs.ConditionalFlow(0.1)
    assert own.range_for(1e-4, 1e4) == pytest.approx((-14 - 2 * math.log(1e4), -2 * math.log(0.1)), abs=1e-6)


def test_ends_and_cuts_are_told_apart():
    endless, ends = fs.LogSNR(), fs.LogSNR(-14, 16)
    assert settings_of(endless) == settings_of(fs.LogSNR()) != settings_of(ends)
    assert settings_of(fs.FlowMatching()) != settings_of(stated(fs.FlowMatching()))
    assert [repr(each) for each in (endless, ends, fs.LogSNR(-8))] == [
        "LogSNR()",
        "LogSNR(lo=-14, hi=16)",
        "LogSNR(lo=-8)",
    ]
    assert endless.time_range == ends.time_range == (16.0, -14.0)


class Trained(ExactEps):
    """Exact as far as it was trained, and of no use beyond."""

    def forward(self, x, t):
        beyond = (self.schedule.log_snr(t) > 16.001)[:, None]  # t is float32
        return torch.where(beyond, 0.5, super().forward(x, t))


NARROW = Mixture(torch.tensor([[0.0, 0.0, 0.0, 0.0]]), torch.tensor([[0.002]]))


@pytest.mark.parametrize("name", ["LogSNR", "EDM", "a class"])
def test_a_network_is_not_asked_beyond_its_training(name):
    """It was asked up to log-SNR 28.5, where 8 dimensions were 12.6 nats too low and no interval covered the truth."""
    schedule = STATED[name]()
    density = fs.ScoreDensity(Trained(NARROW, schedule), schedule, "eps", program=False)
    density.fit(NARROW.sample(500, torch.Generator().manual_seed(2)), evaluations=3000, progress=False)
    assert density.log_snr_range[1] == pytest.approx(16.0, abs=1e-9)
    x = NARROW.sample(64, torch.Generator().manual_seed(3))
    found = density.estimate(x, nfe=64)
    # Of a Gaussian the fitted reference is the truth but for the fit itself: its variance is known to 6 % of 500
    # samples, which beyond log-SNR 16, where e^16 0.002^2 = 36, adds up to 0.06 x 4 / 2 nats.
    assert float((found.log_prob.double() - NARROW.log_prob(x)).mean().abs()) < 0.12


def test_a_living_density_whose_ends_are_stated_keeps_to_them():
    schedule = fs.LogSNR()
    density = fs.ScoreDensity(ExactEps(NARROW, schedule), schedule, "eps")
    density.fit(NARROW.sample(500, torch.Generator().manual_seed(2)), evaluations=3000, progress=False)
    assert density.log_snr_range[1] == pytest.approx(16 - 2 * math.log(0.002), abs=0.3)
    schedule.time_range = (16.0, -14.0)
    density.estimate(NARROW.sample(4, torch.Generator().manual_seed(3)), nfe=16)
    assert density.log_snr_range[1] == 16.0


def test_the_times_of_other_methods_are_finite_where_a_schedule_of_ones_own_is_endless():
    """Its first time was that of a log-SNR of minus infinity, and Li and Yan's sum was NaN."""
    for own, ours in zip(table_of(Endless()), table_of(fs.Cosine())):
        assert torch.allclose(own, ours, rtol=1e-9)


def test_a_flow_with_a_stated_end_has_one():
    assert Slope().range_for(1e-4, 1e4) == pytest.approx((2 * math.log(1 / 999), 2 * math.log(999)), abs=1e-9)

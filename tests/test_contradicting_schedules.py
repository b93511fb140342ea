"""A schedule whose methods contradict each other gives numbers off by nats: refused where a density is made."""

import math
import warnings

import pytest
import torch
from test_refused_schedules import made

import fastscore as fs
from fastscore.process.alpha_sigma import AlphaSigma


class Squared(fs.VP):
    def scale(self, log_snr):
        return torch.sigmoid(log_snr), torch.sigmoid(-log_snr)  # the roots are forgotten


class OtherAlphaSigma(fs.VP):
    def alpha_sigma(self, t):
        angle = 0.5 * math.pi * torch.as_tensor(t).double()
        return torch.cos(angle), torch.sin(angle)


class Half(OtherAlphaSigma, fs.Cosine):
    """log(alpha / sigma), with its own right inverse."""

    def log_snr(self, t):
        return -torch.log(torch.tan(0.5 * math.pi * torch.as_tensor(t).double()))

    def time(self, log_snr):
        return 2 / math.pi * torch.atan(torch.exp(-log_snr))


class Swapped(fs.EDM):
    def alpha_sigma(self, t):
        return super().alpha_sigma(t)[::-1]


class NoNoise(fs.VP):
    def scale(self, log_snr):
        return torch.ones_like(log_snr), torch.zeros_like(log_snr)


class Rounded(fs.VP):
    """In float32, where 1 - alpha^2 loses most of sigma; `factor` is a contradiction that is no rounding."""

    factor = 1.0

    def scale(self, log_snr):
        alpha = torch.sigmoid(log_snr).sqrt().float()
        return alpha, self.factor * (1 - alpha**2).sqrt()


class RoundedTwice(Rounded):
    factor = 2.0


class Slope(AlphaSigma):
    """Straight paths with derivatives of their own; `sign` is that of noise."""

    time_range, sign = (0.999, 0.001), -1.0

    def alpha_sigma(self, t):
        return torch.as_tensor(t).double(), 1 - torch.as_tensor(t).double()

    def time(self, log_snr):
        return torch.sigmoid(0.5 * log_snr)

    def derivatives(self, t):
        one = torch.ones_like(torch.as_tensor(t).double())
        return one, self.sign * one


class OtherSlope(Slope):
    sign = 1.0


class Table(fs.Schedule):
    """A table of timesteps of a user's own."""

    discrete, time_range, squares, late = True, (0, 49), False, 0

    def __init__(self):
        self.entries = torch.linspace(8, -9, 50, dtype=torch.float64)

    def log_snr(self, t):
        return self.entries[torch.as_tensor(t).long()]

    def time(self, log_snr):
        nearest = (self.entries - log_snr[..., None]).abs().argmin(-1)
        return (nearest + self.late).clamp(max=49)

    def scale(self, log_snr):
        alpha, sigma = super().scale(log_snr)
        return (alpha**2, sigma**2) if self.squares else (alpha, sigma)


class SquaredTable(Table):
    squares = True


class FromOne(Table):
    late = 1


class Shuffled(Table):
    def __init__(self):
        super().__init__()
        self.entries[[20, 30]] = self.entries[[30, 20]]


class SquaredDDPM(fs.DDPM):
    def scale(self, log_snr):
        return torch.sigmoid(log_snr), torch.sigmoid(-log_snr)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Squared, r"scale\(\) of Squared must return alpha and sigma whose log\(alpha\^2 / sigma\^2\) is its log_snr"),
        (OtherAlphaSigma, r"alpha_sigma\(\) of OtherAlphaSigma must return"),
        (Half, r"alpha_sigma\(\) of Half must return .*mend one of the two \(.* nor log\(alpha / sigma\)\)"),
        (Swapped, r"alpha_sigma\(\) of Swapped must return"),
        (NoNoise, r"scale\(\) of NoNoise must return .*got alpha 1 and sigma 0 at time"),
        (RoundedTwice, r"scale\(\) of RoundedTwice must return"),
        (SquaredTable, r"scale\(\) of SquaredTable must return"),
        (lambda: SquaredDDPM.linear(10), r"scale\(\) of SquaredDDPM must return"),
        (FromOne, r"time\(\) of FromOne must be the inverse of its log_snr\(\), .*nearest timestep, counted from 0"),
        (Shuffled, r"log_snr\(\) of Shuffled must not rise from timestep to timestep, got .* at timesteps \d+, \d+;"),
    ],
)  # fmt: skip
def test_a_schedule_that_contradicts_itself_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        made(make())


def test_derivatives_of_another_process_are_refused_where_a_flow_asks_them():
    made(Slope(), "flow"), made(OtherSlope(), "eps")
    with pytest.raises(ValueError, match=r"derivatives\(\) of OtherSlope .* got 1 and 1 at time .* say 1 and -1; mend"):
        made(OtherSlope(), "flow")


@pytest.mark.parametrize("kind", [Rounded, Table, Slope])
def test_rounding_is_no_contradiction(kind, recwarn):
    made(kind())
    assert not recwarn.list


@pytest.mark.parametrize("base", [fs.VP, fs.Cosine, fs.VE])
@pytest.mark.parametrize("factor", [0.5, 1 / math.log(10)])
def test_a_log_snr_in_another_unit_is_warned_of(base, factor):
    """Alpha and sigma are made of it, so that only the network can contradict it: by 1.0 nats for one half of VP."""

    class Other(base):
        def log_snr(self, t):
            return factor * super().log_snr(t)

        def time(self, log_snr):
            return super().time(log_snr / factor)

    message = rf"log_snr\(\) of Other must be log\(alpha\^2 / sigma\^2\), got {factor:.4g} times .* {base.__name__}"
    with pytest.warns(UserWarning, match=message):
        made(Other())


def test_another_clock_is_no_contradiction():
    class LogSigma(fs.LogSNR):
        """The logarithm of sigma as time."""

        time_range = (-8.0, 7.0)

        def log_snr(self, t):
            return -2 * torch.as_tensor(t).double()

        def time(self, log_snr):
            return -0.5 * torch.as_tensor(log_snr).double()

    class Backwards(fs.FlowMatching):
        """Time that runs the other way, by another formula."""

        def __init__(self):
            super().__init__()
            self.time_range = (1e-3, 0.999)

        def log_snr(self, t):
            return super().log_snr(1 - torch.as_tensor(t).double())

        def time(self, log_snr):
            return 1 - super().time(log_snr)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made(LogSigma()), made(Backwards())


class RoundedBefore(Rounded):
    """The same, handed on in float64: what float32 has lost is lost."""

    def scale(self, log_snr):
        return tuple(each.double() for each in super().scale(log_snr))


def test_what_was_rounded_in_float32_and_handed_on_in_float64_is_right():
    made(RoundedBefore())


class Equal(fs.Schedule):
    """A user's table whose log-SNR is limited, so that neighbours at its ends are equal."""

    discrete, time_range = True, (0, 99)
    table = torch.linspace(9, -9, 100).double().clamp(-5, 5)

    def log_snr(self, t):
        return self.table[torch.as_tensor(t).long()]

    def time(self, log_snr):
        return (self.table - torch.as_tensor(log_snr)[..., None]).abs().argmin(-1)

    def scale(self, log_snr):
        return torch.sigmoid(log_snr).sqrt(), torch.sigmoid(-log_snr).sqrt()


def test_neighbours_of_a_table_may_be_equal():
    made(Equal())


class Kinked(AlphaSigma):
    """Straight paths of flows that turn at half of the time, with the derivative of the right side there."""

    # From log-SNR 2 log 3 + 5 to 2 log 3 - 5, so that the check meets the kink in the middle.
    time_range = (2 / (1 + 3 * math.exp(2.5)), (3 + 3 * math.exp(-2.5)) / (3 + 9 * math.exp(-2.5)))

    def alpha_sigma(self, t):
        t = torch.as_tensor(t).double()
        return torch.where(t < 0.5, 1 - 0.5 * t, 1.5 * (1 - t)), torch.where(t < 0.5, 0.5 * t, 0.25 + 1.5 * (t - 0.5))

    def time(self, log_snr):
        ratio = torch.exp(0.5 * torch.as_tensor(log_snr).double())
        return torch.where(ratio > 3, 2 / (1 + ratio), (3 + ratio) / (3 * (1 + ratio)))

    def derivatives(self, t):
        late = torch.as_tensor(t).double() >= 0.5
        return torch.where(late, -1.5, -0.5).double(), torch.where(late, 1.5, 0.5).double()


def test_a_kink_has_the_slope_of_either_side():
    made(Kinked(), predicts="flow")

"""Schedules and times that would give a wrong number without a word are refused where a density is made."""

import math

import pytest
import torch
from torch import nn

import fastscore as fs


class Answer(nn.Module):
    def forward(self, x, t):
        return x


def made(schedule, predicts="eps", **options):
    return fs.ScoreDensity(Answer(), schedule, predicts, **options)


class AtOne(fs.FlowMatching):
    """A class of a user's, with the data at t = 1, who writes its times in ascending order."""

    def __init__(self):
        super().__init__(data_at=1)
        self.time_range = (1e-4, 1 - 1e-4)


class Cosine(fs.Schedule):
    """The cosine process with its offset s in continuous time; `forgets` leaves s out of the inverse."""

    time_range, forgets = (1e-3, 0.999), False

    def log_snr(self, t):
        start = math.cos(0.008 / 1.008 * math.pi / 2) ** 2
        return torch.logit(torch.cos((torch.as_tensor(t).double() + 0.008) / 1.008 * math.pi / 2) ** 2 / start)

    def time(self, log_snr):
        start = math.cos(0.008 / 1.008 * math.pi / 2) ** 2
        angle = torch.acos((torch.sigmoid(torch.as_tensor(log_snr).double()) * start).sqrt()) * 2 / math.pi
        return angle if self.forgets else angle * 1.008 - 0.008


class Forgets(Cosine):
    forgets = True


class NoNumber(Cosine):
    def time(self, log_snr):
        return super().time(log_snr) * math.nan


def moved(schedule, ends):
    schedule.time_range = ends
    return schedule


@pytest.mark.parametrize(
    "schedule",
    [AtOne(), moved(fs.FlowMatching(), (0.001, 0.999)), moved(fs.VP(), (1.0, 1e-3)), moved(fs.VP(), (math.nan, 1.0))],
    ids=["a class", "FlowMatching", "VP", "NaN"],
)
def test_ends_the_other_way_round_are_refused(schedule):
    # They gave numbers 8 to 30 nats too low, and a truncation of NaN.
    with pytest.raises(
        ValueError, match=r"log-SNR must go up from the noisy end.*set its time_range to \(least noisy,"
    ):
        made(schedule)


@pytest.mark.parametrize("kind", [Forgets, NoNumber])
def test_a_time_that_is_no_inverse_is_refused(kind):
    made(Cosine())
    # One without its offset was off by 0.12 nats, one with another scale by 0.94, without a word.
    with pytest.raises(
        ValueError, match=rf"time\(\) of {kind.__name__} must be the inverse of its log_snr\(\), got log_s"
    ):
        made(kind())


SCHEDULES = {
    "VP": fs.VP, "Cosine": fs.Cosine, "VE": fs.VE, "EDM": fs.EDM, "LiYan": fs.LiYan, "LogSNR": fs.LogSNR,
    "flow": fs.FlowMatching, "to data": lambda: fs.FlowMatching(data_at=0), "sigma": lambda: fs.ConditionalFlow(0.1),
    "wide": lambda: fs.EDM(1e-7, 1e6), "twin": lambda: fs.ContinuousDDPM(fs.DDPM.cosine(1000)),
    "twin of few": lambda: fs.ContinuousDDPM(fs.DDPM.linear(5, 1e-3, 0.9)), "table": lambda: fs.DDPM.linear(3),
}  # fmt: skip


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("scale", [1e-5, 1.0, 1e5])
def test_every_schedule_of_ours_is_one(name, scale):
    if (name, scale) == ("sigma", 1e-5):  # no level of noise of this flow is below such data
        with pytest.raises(ValueError, match=r"for data of scales 1e-05 to 1e-05; .* not far below its least noise"):
            made(SCHEDULES[name](), reference=fs.Reference.isotropic(scale))
        return
    made(SCHEDULES[name](), reference=fs.Reference.isotropic(scale))


@pytest.mark.parametrize(
    ("schedule", "time_dtype", "message"),
    [
        (fs.VP(), torch.int64, "be floating point for VP, whose times are real numbers, got torch.int64"),
        (fs.ContinuousDDPM(fs.DDPM.linear(20)), torch.int32, "be floating point for ContinuousDDPM"),
        (
            fs.DDPM.linear(1000),
            torch.uint8,
            "hold every timestep of the table, 0 to 999, got torch.uint8, which counts to 255",
        ),
        (fs.DDPM.linear(1000), torch.bool, "0 to 999, got torch.bool, which counts to 0"),
        (fs.DDPM.linear(1000), torch.bfloat16, "0 to 999, got torch.bfloat16, which counts to 256"),
    ],
)
def test_times_that_a_dtype_would_cut_are_refused(schedule, time_dtype, message):
    # Cut to whole numbers or to another timestep they gave numbers up to 22 nats off.
    with pytest.raises(ValueError, match=f"^time_dtype must .*{message}"):
        made(schedule, time_dtype=time_dtype)


def test_dtypes_that_hold_every_timestep_are_taken():
    for time_dtype in (torch.float16, torch.int16, torch.int32, torch.float32, torch.float64):
        made(fs.DDPM.linear(1000), time_dtype=time_dtype)
    made(fs.DDPM.linear(100), time_dtype=torch.uint8)
    made(fs.VP(), time_dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fs.DDPM.linear(-1), "DDPM needs at least 2 timesteps, got steps=-1"),
        (lambda: fs.DDPM.cosine(1), "DDPM needs at least 2 timesteps, got steps=1"),
        (lambda: fs.DDPM.linear(1.5), "steps of DDPM must be an integer, got 1.5"),
        (lambda: fs.DDPM.scaled_linear(10, -1.0, 0.5), "DDPM needs beta_start and beta_end above 0, got -1, 0.5"),
        (lambda: fs.DDPM.linear(10, "a"), "beta_start of DDPM must be a finite number, got 'a'"),
        (lambda: fs.ConditionalFlow("a"), "sigma of ConditionalFlow must be a finite number, got 'a'"),
        (lambda: fs.FlowMatching("1"), "FlowMatching needs data_at = 0 or 1 .*, got '1'"),
    ],
)
def test_arguments_that_make_no_schedule_are_explained(make, message):
    with pytest.raises(ValueError, match=message):
        make()

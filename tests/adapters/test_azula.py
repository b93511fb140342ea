"""azula: its own denoisers and schedules, and exact backbones inside its preconditioning."""

import math

import pytest
import torch
from adapters.bare import load
from adapters.exact import assert_exact, column, exact, noised, relative
from torch import nn

from fastscore.adapters import from_azula
from fastscore.adapters.azula import AzulaClock

noise, denoise, guidance, edm, adm = load("azula", "noise", "denoise", "guidance", "plugins.edm", "plugins.adm")
SCHEDULES = {
    "VE": lambda: noise.VESchedule(0.01, 50.0),
    "VP": noise.VPSchedule,
    "Cosine": lambda: noise.CosineSchedule(1e-2, 1e-2),
    "Rectified": noise.RectifiedSchedule,
    "Decay": noise.DecaySchedule,
    "Elucidated": edm.ElucidatedSchedule,
}


class Backbone(nn.Module):
    """A small network of scaled data, a time and a label."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x, t, label=None):
        out = self.conv(x) * t.reshape(-1, 1, 1, 1).sin()
        return out if label is None else out + label.reshape(-1, 1, 1, 1)


class Exact(nn.Module):
    """The target's exact backbone, float64: the data, or what the preconditioning of Karras et al. leaves of them."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.anchor = kind, nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def forward(self, z, c_time, class_labels=None):
        sigma = c_time.exp()
        if self.kind == "Elucidated":
            return exact(z, torch.ones(1), c_time)[1]
        alpha = 1 / (1 + sigma**2).sqrt()
        x0 = exact(z, alpha, sigma * alpha)[1]
        a, s = column(alpha, z), column(sigma * alpha, z)
        return x0 if self.kind == "Simple" else (x0 - a * z) / s


class Elucidated(edm.ElucidatedDenoiser):
    """The plugin asks for a one-hot label; its networks have one, the exact one does not."""

    def forward(self, x_t, t):
        return super().forward(x_t, t, label=torch.zeros(1))


DENOISERS = {"Simple": denoise.SimpleDenoiser, "Karras": denoise.KarrasDenoiser, "Elucidated": Elucidated}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("kind", ["Simple", "Karras"])
def test_outputs_are_the_mean_of_the_denoiser(kind, schedule):
    denoiser = DENOISERS[kind](Backbone(), SCHEDULES[schedule]())
    density = from_azula(denoiser, program=False)
    x, t, label = torch.randn(4, 1, 2, 2), torch.tensor([0.01, 0.3, 0.7, 1.0]), torch.tensor([0.0, 1.0, 2.0, 3.0])
    with torch.no_grad():
        assert torch.equal(density.model(x, t, label=label), denoiser(x, t, label=label).mean)
    found = density.estimate(x, nfe=16, label=label).log_prob
    assert float((found - density.estimate(x, nfe=16, label=label.flip(0)).log_prob).abs().min()) > 1e-3


@pytest.mark.parametrize("name", SCHEDULES)
def test_noise_is_that_of_the_schedule(name):
    own = SCHEDULES[name]()
    schedule = from_azula(denoise.KarrasDenoiser(Backbone(), own)).schedule
    t = torch.linspace(0, 1, 60, dtype=torch.float64)
    x, eps, x_t = noised(schedule, t)
    alpha, sigma = own(t)
    assert torch.equal(x_t, column(alpha, x) * x + column(sigma, x) * eps)
    log_snr = schedule.log_snr(t)
    assert float((schedule.log_snr(schedule.time(log_snr)) - log_snr).abs().max()) < 1e-6  # 2^-60 of a steep clock
    assert relative(torch.stack(schedule.scale(log_snr), 1), torch.stack([alpha, sigma], 1)) < 1e-6
    assert schedule.time_range == (0.0, 1.0)
    assert schedule.log_snr_range == pytest.approx((max(float(log_snr[-1]), -14.0), float(log_snr[0])))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("kind", DENOISERS)
def test_log_prob_of_an_exact_network(kind, schedule):
    denoiser = DENOISERS[kind](Exact(kind), SCHEDULES[schedule]())
    assert_exact(from_azula(denoiser, program=False))


def test_an_end_without_noise_is_cut():
    class Whole:
        def __call__(self, t):
            return 1 - t, t

    schedule = AzulaClock(Whole())
    assert schedule.log_snr_range == pytest.approx((-14.0, 16.0))
    assert schedule.time_range == pytest.approx((1 / (1 + math.exp(8)), 1 / (1 + math.exp(-7))))


class Rising(noise.Schedule):
    def __call__(self, t):
        return t + 0.1, 1.1 - t


def half():
    return denoise.KarrasDenoiser(Backbone().half(), noise.VPSchedule())


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: nn.Identity(), TypeError, "denoiser must be an azula Denoiser.*got Identity without schedule; wrap"),
        (
            lambda: guidance.CFGDenoiser(denoise.KarrasDenoiser(Backbone(), noise.VPSchedule())),
            (TypeError, ValueError),
            "denoiser must be .*got CFGDenoiser",
        ),
        (lambda: adm.AblatedDenoiser(Backbone()), ValueError, "got AblatedDenoiser, which rounds its times to a table"),
        (lambda: denoise.KarrasDenoiser(Backbone(), Rising()), ValueError, "log-SNR of Rising must be falling"),
        (half, ValueError, "got weights of torch.float16; call .float"),
    ],
)
def test_bad_input_is_explained(make, error, message):
    with pytest.raises(error, match=message):
        from_azula(make())

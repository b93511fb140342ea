"""EDM's preconditioned interface. The networks of NVlabs are on no package index, so the classes here are our own, with
the same arguments, attributes, dtypes and preconditioning."""

import math

import pytest
import torch
from adapters.exact import assert_exact, column, exact, noised, relative
from torch import nn

from fastscore.adapters import from_edm
from fastscore.process.predictions import eps_from

RANGES = {"edm": (0, math.inf), "vp": (0.004, 152.0), "ve": (0.02, 100), "iddpm": (0.01, 150.0)}


class Precond(nn.Module):
    """net(x, sigma, class_labels) -> denoised, float32 whatever comes in; F is the raw network."""

    def __init__(self, model, kind="edm", label_dim=0, sigma_data=0.5):
        super().__init__()
        self.model, self.kind, self.label_dim = model, kind, label_dim
        self.sigma_min, self.sigma_max = RANGES[kind]
        if kind == "edm":
            self.sigma_data = sigma_data
        if kind == "iddpm":
            self.register_buffer("u", torch.cat([torch.logspace(2.2, -2, 400), torch.zeros(1)]))

    def scalings(self, sigma):
        if self.kind == "edm":
            total = sigma**2 + self.sigma_data**2
            skip, out, noise = self.sigma_data**2 / total, sigma * self.sigma_data / total.sqrt(), sigma.log() / 4
            return skip, out, 1 / total.sqrt(), noise
        if self.kind == "vp":
            return 1, -sigma, 1 / (sigma**2 + 1).sqrt(), sigma
        if self.kind == "iddpm":
            nearest = (sigma.reshape(-1, 1).float() - self.u).abs().argmin(1).reshape(sigma.shape)
            return 1, -sigma, 1 / (sigma**2 + 1).sqrt(), nearest
        return 1, sigma, 1, (0.5 * sigma).log()

    def forward(self, x, sigma, class_labels=None, force_fp32=False, **model_kwargs):
        x, sigma = x.to(torch.float32), sigma.to(torch.float32).reshape(-1, 1, 1, 1)
        labels = None
        if self.label_dim:
            labels = (
                torch.zeros(1, self.label_dim) if class_labels is None else class_labels.reshape(-1, self.label_dim)
            )
        skip, out, scale, noise = self.scalings(sigma)
        f = self.model(scale * x, noise.flatten(), class_labels=labels, **model_kwargs)
        return skip * x + out * f.to(torch.float32)


class Raw(nn.Module):
    """A small raw network with labels."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.label = nn.Conv2d(1, 1, 3, padding=1), nn.Linear(3, 1)

    def forward(self, x, noise, class_labels=None):
        return self.conv(x) * noise.reshape(-1, 1, 1, 1).sin() + self.label(class_labels).reshape(-1, 1, 1, 1)


class ExactRaw(nn.Module):
    """The F for which the preconditioned network is the target's exact denoiser."""

    owner = ()

    def forward(self, x, noise, class_labels=None):
        (net,) = self.owner
        sigma = {
            "edm": lambda: (4 * noise).exp(),
            "vp": lambda: noise,
            "ve": lambda: 2 * noise.exp(),
            "iddpm": lambda: net.u[noise],
        }[net.kind]()
        sigma = sigma.double().reshape(-1, 1, 1, 1)
        skip, out, scale, _ = net.scalings(sigma)
        x = x.double() / scale
        return (exact(x, torch.ones(1), sigma)[1] - skip * x) / out


def test_outputs_are_those_of_the_network_itself():
    net = Precond(Raw(), label_dim=3)
    density = from_edm(net)
    x, sigma, labels = torch.randn(4, 1, 2, 2), torch.tensor([0.01, 0.5, 3.0, 70.0]), torch.eye(3)[[0, 1, 2, 1]]
    assert torch.equal(density.model(x, sigma, class_labels=labels), net(x, sigma, class_labels=labels))
    a = density.estimate(x, nfe=16, class_labels=labels).log_prob
    assert float((a - density.estimate(x, nfe=16, class_labels=labels.roll(1, 0)).log_prob).abs().min()) > 1e-3


def test_noise_level_is_the_time_and_the_slope_of_its_sampler_is_eps():
    density = from_edm(Precond(Raw(), label_dim=3))
    sigma = torch.logspace(-2, 1.9, 9, dtype=torch.float64)
    x, eps, x_t = noised(density.schedule, sigma)
    assert relative(x_t, x + column(sigma, x) * eps) < 1e-12
    denoised = torch.randn_like(x)
    c_f, c_x = (column(c, x) for c in eps_from("denoiser", density.schedule, sigma))
    slope = (x_t - denoised) / column(sigma, x)  # dx/dsigma of the sampler in Karras et al., algorithm 1
    assert relative(c_f * denoised + c_x * x_t, slope) < 1e-12


@pytest.mark.parametrize("kind", RANGES)
def test_log_prob_of_an_exact_network(kind):
    raw = ExactRaw()
    net = Precond(raw, kind)
    raw.owner = (net,)  # in a tuple, so that it does not become a submodule of its own submodule
    # A float32 denoiser knows eps to 6e-8 / sigma, 3e-5 at the least noise.
    assert_exact(from_edm(net, program=False), rounding=1e-3)


@pytest.mark.parametrize(
    ("kind", "given", "expected"),
    [
        ("edm", {}, (0.002, 80.0)),
        ("ve", {}, (0.02, 100.0)),
        ("vp", {"sigma_max": 50}, (0.004, 50.0)),
        ("edm", {"sigma_min": 0.01, "sigma_max": 10}, (0.01, 10.0)),
    ],
)
def test_the_range_of_noise(kind, given, expected):
    schedule = from_edm(Precond(Raw(), kind), **given).schedule
    assert (schedule.sigma_min, schedule.sigma_max, schedule.data_std) == (*expected, 0.5)


def test_the_data_scale_of_the_network_is_that_of_the_reference():
    assert float(from_edm(Precond(Raw(), sigma_data=2.0)).reference.variance) == 4.0


def test_bad_input_is_explained():
    with pytest.raises(
        TypeError, match=r"net must be a preconditioned network.*got dict; give the pickle's 'ema' entry"
    ):
        from_edm({"ema": None})
    with pytest.raises(ValueError, match=r"noise range must be 0 < sigma_min < sigma_max, got 5.0 to 1.0"):
        from_edm(Precond(Raw()), sigma_min=5, sigma_max=1)

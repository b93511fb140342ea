"""k-diffusion: its own denoisers, their losses, and exact inner models in them."""

from types import SimpleNamespace

import pytest
import torch
from adapters.bare import load
from adapters.exact import assert_exact, column, exact, noised, relative
from torch import nn

import fastscore as fs
from fastscore.adapters import from_k_diffusion
from fastscore.process.predictions import coefficients, eps_from

external, layers, sampling = load("k_diffusion", "external", "layers", "sampling")
BAR = fs.DDPM.linear(1000).table.sigmoid()


class Inner(nn.Module):
    """A small inner model of `outputs` times the channels, with a condition."""

    def __init__(self, outputs=1):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(1, outputs, 3, padding=1)

    def forward(self, x, t, label=None):
        out = self.conv(x) * torch.as_tensor(t).to(x.dtype).reshape(-1, 1, 1, 1).sin()
        return out if label is None else out + label.to(x.dtype).reshape(-1, 1, 1, 1)


class Callable(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x, t):
        return self.function(x, t)


def exact_table(x, t, v=False, learned=False):
    """eps or v of a variance-preserving x at a table's timestep, with twice the channels if asked."""
    bar = BAR[t.round().long()]
    eps, x0 = exact(x, bar.sqrt(), (1 - bar).sqrt())
    out = column(bar.sqrt(), x) * eps - column((1 - bar).sqrt(), x) * x0 if v else eps
    return torch.cat([out, torch.full_like(out, 1e3)], 1) if learned else out


def exact_v(x, t):
    alpha, sigma = torch.cos(t * torch.pi / 2), torch.sin(t * torch.pi / 2)
    eps, x0 = exact(x, alpha, sigma)
    return column(alpha, x) * eps - column(sigma, x) * x0


def exact_karras(x, sigma, sigma_data):
    total = column(sigma**2 + sigma_data**2, x)
    x, wide = x * total.sqrt(), column(sigma, x)
    x0 = exact(x, torch.ones(1), sigma)[1]
    return (x0 - sigma_data**2 / total * x) * total.sqrt() / (wide * sigma_data)


def openai(model, **options):
    return external.OpenAIDenoiser(model, SimpleNamespace(alphas_cumprod=BAR.numpy()), **options)


CONTINUOUS = {
    "Denoiser": lambda inner: layers.Denoiser(inner, sigma_data=0.7),
    "SimpleLossDenoiser": lambda inner: layers.SimpleLossDenoiser(inner, sigma_data=0.7),
    "VDenoiser": external.VDenoiser,
}
TABLES = {
    "DiscreteEpsDDPMDenoiser": lambda inner: external.DiscreteEpsDDPMDenoiser(inner, BAR.float(), quantize=True),
    "OpenAIDenoiser": lambda inner: openai(inner, has_learned_sigmas=False),
    "DiscreteVDDPMDenoiser": lambda inner: external.DiscreteVDDPMDenoiser(inner, BAR.float(), quantize=False),
}


@pytest.mark.parametrize("name", CONTINUOUS)
def test_continuous_outputs_are_those_of_the_denoiser(name):
    denoiser = CONTINUOUS[name](Inner())
    density = from_k_diffusion(denoiser)
    x, sigma = torch.randn(3, 1, 2, 2), torch.tensor([0.02, 1.0, 60.0])
    assert torch.equal(density.model(x, sigma, label=sigma), denoiser(x, sigma, label=sigma))


@pytest.mark.parametrize("name", TABLES)
def test_table_outputs_are_those_of_the_denoiser_at_its_sigmas(name):
    denoiser = TABLES[name](Inner())
    density = from_k_diffusion(denoiser)
    i = torch.tensor([0, 3, 500, 999])
    assert relative(density.schedule.log_snr(i), -2 * denoiser.sigmas[i].double().log()) < 1e-6
    x, eps, x_t = noised(density.schedule, i)
    exploding = (x + column(denoiser.sigmas[i], x) * eps).float()
    own = denoiser(exploding, denoiser.sigmas[i], label=i)
    # x_t is scaled by sqrt(1 + sigma^2) here and by its inverse there, in float32.
    assert relative(density.model(x_t.float(), i, label=i), own) < 1e-6


@pytest.mark.parametrize("name", [*CONTINUOUS, *TABLES])
def test_losses_are_the_residuals_of_the_formula(name):
    """|eps - eps_hat|^2 from our coefficients against the library's own loss for the same noise, and its to_d."""
    denoiser = (CONTINUOUS | TABLES)[name](Inner().double()).double()
    density = from_k_diffusion(denoiser)
    if name in TABLES:
        t = torch.tensor([1, 40, 400, 900])
        sigma = denoiser.sigmas[t]
    else:
        t = sigma = torch.tensor([0.03, 0.5, 2.0, 40.0], dtype=torch.float64)
    x, eps, x_t = noised(density.schedule, t)
    output = density.model(x_t, t)
    a, b, c = (column(v, x) for v in coefficients(density.predicts, density.schedule, t))
    residual = (c * (a * eps + b * x - output)).flatten(1).square().sum(1)
    scale = 1.0  # SimpleLossDenoiser and the eps tables: the mean square of eps - eps_hat itself
    if name in ("Denoiser", "VDenoiser", "DiscreteVDDPMDenoiser"):
        scale = (denoiser.get_scalings(sigma)[1] / sigma) ** 2
    loss = denoiser.loss(x, eps, sigma)
    assert relative(residual, scale * loss * 4) < 1e-6
    c_f, c_x = (column(v, x) for v in eps_from(density.predicts, density.schedule, t))
    exploding = x + column(sigma, x) * eps
    own = sampling.to_d(exploding, sigma, denoiser(exploding, sigma))
    assert relative(c_f * output + c_x * x_t, own) < 1e-6


@pytest.mark.parametrize(
    "build",
    [
        lambda: layers.Denoiser(Callable(lambda x, s: exact_karras(x, s, 0.7)), sigma_data=0.7),
        lambda: external.VDenoiser(Callable(exact_v)),
        lambda: external.DiscreteEpsDDPMDenoiser(Callable(exact_table), BAR, quantize=True),
        lambda: openai(Callable(lambda x, t: exact_table(x, t, learned=True))),
        lambda: external.DiscreteVDDPMDenoiser(Callable(lambda x, t: exact_table(x, t, v=True)), BAR, quantize=False),
    ],
    ids=["Denoiser", "VDenoiser", "eps", "OpenAI", "v"],
)
def test_log_prob_of_an_exact_inner_model(build):
    # Their float32 tables know sigma to 1e-7, which log-SNR 9 turns into 1e-5 of the data.
    assert_exact(from_k_diffusion(build(), program=False), count=16, rounding=1e-3)


def test_bad_input_is_explained():
    with pytest.raises(TypeError, match="denoiser must be a k-diffusion denoiser, got function; wrap the network in"):
        from_k_diffusion(lambda x, sigma: x)
    with pytest.raises(ValueError, match="got Identity without sigma_data"):
        from_k_diffusion(nn.Identity())
    with pytest.raises(ValueError, match=r"noise range must be 0 < sigma_min < sigma_max, got 1 to 0.5"):
        from_k_diffusion(layers.Denoiser(Inner()), sigma_min=1, sigma_max=0.5)
    with pytest.raises(ValueError, match="strictly decreasing"):
        from_k_diffusion(external.DiscreteEpsDDPMDenoiser(Inner(), BAR.flip(0), quantize=True))

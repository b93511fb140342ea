"""Autocast is the network's: what is computed around it has the dtypes and the numbers that it has without."""

import traceback

import pytest
import torch
from analytic import ill_conditioned
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastscore as fs
from fastscore.transforms import whiten

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore::UserWarning")]
D = 8
DATA = ill_conditioned(D).sample(400, seed=3).float()
IMAGES = torch.randn(400, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Apart(nn.Module):
    """A network that leaves autocast by itself, so that all that differs is around it."""

    def __init__(self, d=D):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.inside = nn.Linear(d, d)

    def forward(self, x, t):
        with torch.autocast("cpu", enabled=False):
            return torch.tanh(self.inside(x.flatten(1))).reshape(x.shape) * t[:, None].reshape(-1, *[1] * (x.ndim - 1))


class Atoms(nn.Module):
    def forward(self, x, t):
        return torch.tanh(x) * t[:, None, None]


def density(d=D, **options):
    return fs.ScoreDensity(Apart(d), fs.VP(), "eps", program=False, **options)


def fitted(kind, data=DATA, d=D):
    return density(d).fit(data, reference=kind, evaluations=3000, progress=False)


def in_eps_of(kind, data=DATA, d=D):
    """The reference's own prediction, which the ODE and the clean end ask for."""
    reference, x = fitted(kind, data, d).reference, data[:4].flatten(1)[:, None]
    return (reference.eps(x, *torch.tensor([[0.8], [0.6]], dtype=torch.float64)),)


def gradient(made):
    x = DATA[:6].clone().requires_grad_()
    value = made.log_prob(x, nfe=32)
    with torch.autocast("cpu", enabled=False):  # as PyTorch has it: backward passes lie outside
        (slope,) = torch.autograd.grad(value.sum(), x)
    return value, slope


def told(found):
    return found.log_prob, found.stderr


CLOUDS = torch.randn(40, 4, 2, generator=torch.Generator().manual_seed(1))
CALLS = {
    **{kind: lambda kind=kind: told(fitted(kind).estimate(DATA[:6], nfe=32))
       for kind in ("isotropic", "diagonal", "full", "mixture")},
    "images": lambda: told(fitted("images", IMAGES, 192).estimate(IMAGES[:3], nfe=64, control="reference")),
    "self": lambda: told(density(192).estimate(IMAGES[:3], nfe=64, control="self")),
    "self, fitted": lambda: told(fitted("images", IMAGES, 192).estimate(IMAGES[:3], nfe=64, control="self")),
    "self, full": lambda: told(fitted("full").estimate(DATA[:3], nfe=64, control="self")),
    "default": lambda: told(density().estimate(DATA[:6], nfe=32)),
    "a mask": lambda: told(fitted("diagonal").estimate(DATA[:6], nfe=32, mask=torch.arange(D) % 3 > 0)),
    "eps": lambda: in_eps_of("mixture"),
    "eps in cosines": lambda: in_eps_of("images", IMAGES, 192),
    "gradient": lambda: gradient(fitted("full")),
    "levels": lambda: told(fs.discrete_log_prob(
        fitted("diagonal"), torch.arange(48).reshape(6, 8) % 16, fs.Levels(16))),
    "whitened": lambda: told(fs.Transformed(density(), whiten(DATA)).estimate(DATA[:6], nfe=32)),
    "loss": lambda: (fs.density_loss(density(), DATA[:6], seed=0),),
    "clouds": lambda: told(fs.ZeroMeanDensity(Atoms(), fs.VP(), "eps", program=False).estimate(
        CLOUDS - CLOUDS.mean(1, keepdim=True), nfe=32)),
}  # fmt: skip


class Looking(TorchDispatchMode):
    """Notes where a bfloat16 tensor is made, which nobody has asked for here."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        made = operation(*args, **(kwargs or {}))
        if isinstance(made, Tensor) and made.dtype == torch.bfloat16:
            own = [f for f in traceback.extract_stack() if "/fastscore/" in f.filename and "support" not in f.filename]
            self.found.add(f"{own[-1].filename}:{own[-1].lineno} {own[-1].line}")
        return made


@pytest.mark.parametrize("name", CALLS)
def test_nothing_around_the_network_is_cast(name):
    expected = CALLS[name]()
    with torch.autocast("cpu", torch.bfloat16):
        found = CALLS[name]()
        with Looking() as looking:
            CALLS[name]()
    assert looking.found == set()
    for got, wanted in zip(found, expected, strict=True):
        # The same operations in the same order.
        assert torch.equal(got, wanted)


@pytest.mark.parametrize(("kind", "options"), [("full", {}), ("mixture", {"trace": "hutchinson", "probes": 2})])
def test_of_the_ode_the_networks_own_derivatives_are_cast(kind, options):
    made, options = fitted(kind), {"method": "midpoint", "steps": 3} | options
    with torch.autocast("cpu", torch.bfloat16), Looking() as looking:
        found = fs.probability_flow_log_prob(made, DATA[:4], **options)
    assert all("torch.autograd.grad(" in line for line in looking.found)
    expected = fs.probability_flow_log_prob(made, DATA[:4], **options)
    # Its linear layer's derivatives round by 2^-9, and a trace of eight entries of theirs by less than a hundredth.
    assert torch.allclose(found.log_prob, expected.log_prob, rtol=0.01, atol=0.03)

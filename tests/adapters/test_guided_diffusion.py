"""guided-diffusion's conventions. It is on no package index, so the process here is our own, with the attributes of its
GaussianDiffusion and SpacedDiffusion and the call of its wrapped model."""

import enum

import pytest
import torch
from adapters.exact import assert_exact, exact, relative
from torch import nn

import fastscore as fs
from fastscore.adapters import from_guided_diffusion

ModelMeanType = enum.Enum("ModelMeanType", "PREVIOUS_X START_X EPSILON")


class Diffusion:
    """A process over `betas`; with `use` the spaced one that keeps only these timesteps."""

    def __init__(self, betas, use=None, mean_type="EPSILON", rescale=False):
        self.alphas_cumprod = (1 - betas).cumprod(0).numpy()
        self.model_mean_type, self.rescale_timesteps = ModelMeanType[mean_type], rescale
        self.original_num_steps = len(betas)
        if use is not None:
            self.timestep_map = sorted(use)
            self.alphas_cumprod = self.alphas_cumprod[self.timestep_map]

    def labels(self, i):
        """What the network is called with at entry i of the process."""
        t = torch.tensor(self.timestep_map)[i] if hasattr(self, "timestep_map") else i
        return t.float() * (1000.0 / self.original_num_steps) if self.rescale_timesteps else t


BETAS = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
USED = set(range(0, 1000, 4))


class Net(nn.Module):
    """A small network with a learned variance and class labels."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.embed = nn.Conv2d(1, 2, 3, padding=1), nn.Embedding(3, 2)

    def forward(self, x, t, y):
        return self.conv(x) * (t.float() / 100).cos().reshape(-1, 1, 1, 1) + self.embed(y)[..., None, None]


class Exact(nn.Module):
    """The target's exact network from the label that it gets, with twice the channels."""

    def __init__(self, bars, factor, data):
        super().__init__()
        self.bars, self.factor, self.data = bars, factor, data

    def forward(self, x, t):
        bar = self.bars[(t / self.factor).round().long()]
        out = exact(x, bar.sqrt(), (1 - bar).sqrt())[1 if self.data else 0]
        return torch.cat([out, torch.full_like(out, 1e3)], 1)


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("use", [None, USED])
def test_outputs_are_those_at_the_original_timesteps(use, rescale):
    diffusion = Diffusion(BETAS, use, rescale=rescale)
    net = Net()
    density = from_guided_diffusion(net, diffusion)
    i, y, x = torch.tensor([0, 7, 100, 249]), torch.tensor([0, 1, 2, 1]), torch.randn(4, 1, 2, 2)
    assert torch.equal(density.model(x, i, y=y), net(x, diffusion.labels(i), y=y))
    bar = torch.tensor(diffusion.alphas_cumprod)[i]
    alpha, sigma = density.schedule.alpha_sigma(i)
    assert relative(alpha, bar.sqrt()) < 1e-12
    assert relative(sigma, (1 - bar).sqrt()) < 1e-12
    found = density.estimate(x, nfe=4, y=y).log_prob
    assert float((found - density.estimate(x, nfe=4, y=y.roll(1)).log_prob).abs().min()) > 1e-4


@pytest.mark.parametrize(
    ("steps", "use", "mean_type", "rescale"),
    [
        (1000, None, "EPSILON", False),
        (1000, USED, "EPSILON", False),
        (500, None, "START_X", True),
        (500, set(range(0, 500, 2)), "EPSILON", True),
    ],
)
def test_log_prob_of_an_exact_network(steps, use, mean_type, rescale):
    betas = BETAS[:: 1000 // steps] * (1000 // steps)
    diffusion = Diffusion(betas, use, mean_type, rescale)
    net = Exact((1 - betas).cumprod(0), 1000 / steps if rescale else 1, mean_type == "START_X")
    assert_exact(from_guided_diffusion(net, diffusion, program=False))


def test_bad_input_is_explained():
    diffusion = Diffusion(BETAS)
    with pytest.raises(
        TypeError, match=r"model must be a guided-diffusion model.*got Diffusion; give model, diffusion"
    ):
        from_guided_diffusion(diffusion, Net())
    with pytest.raises(TypeError, match="got DDPM without alphas_cumprod, model_mean_type, rescale_timesteps"):
        from_guided_diffusion(Net(), fs.DDPM.linear(10))
    with pytest.raises(ValueError, match="model_mean_type must be one of EPSILON, START_X, got 'PREVIOUS_X'"):
        from_guided_diffusion(Net(), Diffusion(BETAS, mean_type="PREVIOUS_X"))

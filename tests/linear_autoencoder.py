"""A linear autoencoder with a Gaussian encoder, whose bound under a Gaussian prior of the latents is a closed form."""

import math
from types import SimpleNamespace

import torch
from analytic import ExactNet, Target
from torch import nn

import fastscore as fs
from fastscore.ops import noise

LATENT, SHAPE = (2, 4, 3), (1, 6, 6)
D, M = math.prod(SHAPE), math.prod(LATENT)
DECODER_STD = 0.3
SCHEDULE = fs.LogSNR(-14, 14)


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Linear(nn.Module):
    """q(z|x) = N(A x + a, diag(std^2)), decode(z) = W z + w."""

    def __init__(self, weight, offset, inverse, shift, std, config=None, latent=LATENT):
        super().__init__()
        for name, value in {"W": weight, "w": offset, "A": inverse, "a": shift, "std": std}.items():
            self.register_parameter(name, nn.Parameter(value.double()))
        self.config, self.latent, self.rows = config, latent, []

    def encode(self, x):
        self.rows.append(len(x))
        mean = (x.flatten(1).to(self.A) @ self.A.T + self.a).unflatten(1, self.latent)
        return SimpleNamespace(
            latent_dist=SimpleNamespace(mean=mean, std=self.std.reshape(self.latent).expand_as(mean))
        )

    def decode(self, z):
        return SimpleNamespace(sample=(z.flatten(1).to(self.W) @ self.W.T + self.w).unflatten(1, SHAPE))


class Case:
    """An autoencoder, the exact density of its scaled latents, and what the bound is.

    Attributes:
        prior_mean, prior_variance: of the latents z, independent Gaussians.
    """

    def __init__(self, posterior=False, config=None, shift=0.0, factor=1.0):
        """Arguments: whether q(z|x) is p(z|x); the autoencoder's config, and what it means for each of two channels."""
        self.prior_mean, self.prior_variance = 0.5 * normal(M, seed=1), 0.5 + normal(M, seed=2).square()
        weight, offset = normal(D, M, seed=3) / D**0.5, 0.2 * normal(D, seed=4)
        if posterior:
            # Orthogonal columns, so that the exact posterior is diagonal.
            weight = torch.linalg.qr(weight)[0] * (0.5 + normal(M, seed=5).square())
            variance = 1 / (1 / self.prior_variance + weight.square().sum(0) / DECODER_STD**2)
            inverse = variance[:, None] * weight.T / DECODER_STD**2
            start, std = variance * self.prior_mean / self.prior_variance - inverse @ offset, variance.sqrt()
        else:
            inverse, start, std = (
                torch.linalg.pinv(weight),
                0.1 * normal(M, seed=6),
                0.2 + 0.3 * normal(M, seed=7).abs(),
            )
        self.autoencoder = Linear(weight, offset, inverse, start, std, config)
        shift, factor = (
            torch.as_tensor(v, dtype=torch.float64).expand(2).repeat_interleave(M // 2) for v in (shift, factor)
        )
        mean, cov = (self.prior_mean - shift) * factor, torch.diag(self.prior_variance * factor**2)
        self.target = Target(torch.ones(1), mean[None], cov[None])
        self.density = fs.ScoreDensity(ExactNet(self.target, SCHEDULE), SCHEDULE, "eps", program=False)

    def made(self, **options):
        return fs.LatentBound(self.density, self.autoencoder, **{"decoder_std": DECODER_STD} | options)

    @torch.no_grad()
    def terms(self, x, decoder_std=DECODER_STD):
        """Return E log p(x|z), E log p(z) and the entropy, (B,) each."""
        net, flat = self.autoencoder, x.flatten(1).double()
        mean, variance = flat @ net.A.T + net.a, net.std.square()
        error = (flat - mean @ net.W.T - net.w).square().sum(1) + (net.W.square() @ variance).sum()
        fit = -0.5 * error / decoder_std**2 - D * math.log(decoder_std) - 0.5 * D * math.log(2 * math.pi)
        apart = (mean - self.prior_mean).square() + variance
        prior = -0.5 * (apart / self.prior_variance + (2 * math.pi * self.prior_variance).log()).sum(1)
        return fit, prior, (net.std.log() + 0.5 * math.log(2 * math.pi * math.e)).sum().expand(len(x))

    @torch.no_grad()
    def log_prob(self, x):
        """Return log p(x) of the whole model, a Gaussian."""
        net = self.autoencoder
        cov = (net.W * self.prior_variance) @ net.W.T + DECODER_STD**2 * torch.eye(D, dtype=torch.float64)
        mean = net.W @ self.prior_mean + net.w
        return torch.distributions.MultivariateNormal(mean, cov).log_prob(x.flatten(1).double())

    @torch.no_grad()
    def sample(self, count, seed=0):
        net = self.autoencoder
        z = self.prior_mean + self.prior_variance.sqrt() * normal(count, M, seed=10 + seed)
        return (z @ net.W.T + net.w + DECODER_STD * normal(count, D, seed=20 + seed)).unflatten(1, SHAPE)


def draw(found, index, seed, k):
    """Return draw k of an encoder's Gaussians, as the definition has it."""
    words = noise.words(seed, index, k, noise.STREAM_ENCODER, found.mean[0].numel())
    return found.mean + found.std * noise.normal(words, dtype=found.mean.dtype).reshape(found.mean.shape)

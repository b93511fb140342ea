"""What every adapter is tested with: one target whose density is known, its exact networks, and the comparison."""

from functools import cache

import torch
from analytic import mixture

from fastscore.reference.fitting import fit_mixture
from fastscore.reference.gaussians import Reference

SHAPE = (1, 2, 2)
TARGET = mixture(4)


def exact(x_t, alpha, sigma, target=TARGET):
    """Return (eps, x0) that the exact network of a target finds in x_t, float64, for alpha and sigma of each row."""
    flat = x_t.reshape(len(x_t), -1).double()
    alpha, sigma = (torch.as_tensor(v).double().reshape(-1).expand(len(x_t)) for v in (alpha, sigma))
    x0 = target.denoised(flat, alpha, sigma)
    eps = (flat - alpha[:, None] * x0) / sigma[:, None]
    return eps.reshape(x_t.shape), x0.reshape(x_t.shape)


def column(values, x):
    """Return values of each row in a shape that multiplies x."""
    return values.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))


def noised(schedule, t, shape=SHAPE, dtype=torch.float64, seed=7):
    """Return (x, eps, x_t) at times t by the schedule's own alpha and sigma."""
    generator = torch.Generator().manual_seed(seed)
    x, eps = (torch.randn(len(t), *shape, generator=generator, dtype=dtype) for _ in range(2))
    alpha, sigma = (column(v, x) for v in schedule.alpha_sigma(t))
    return x, eps, alpha * x + sigma * eps


def relative(found, expected):
    """Return the largest error of a row relative to that row's largest expected value."""
    error, size = (v.detach().reshape(len(v), -1).abs().amax(1) for v in (found - expected, expected))
    return float((error / size).max())


@cache
def near():
    """A mixture fitted to samples of the target: near enough for small errors, and not the target itself."""
    return fit_mixture(TARGET.sample(20_000, seed=1), components=5)


def assert_exact(
    density,
    shape=SHAPE,
    to_user=lambda z: z,
    log_det=0.0,
    shift=0.0,
    dtype=torch.float64,
    count=64,
    rounding=1e-6,
    **cond,
):
    """Assert that the log_prob of an exact network is the target's; return (worst, mean) error in standard errors.

    With a reference near the target: to 4 standard errors, every sample and their mean. With the target itself as
    reference the integrand is that of the network's mistakes alone, so that a convention that is off by anything
    shows, and `rounding` nats are left for the network's dtype. `to_user` maps the target's samples to the user's data,
    `log_det` is its log-determinant; the network's data are the target's plus `shift`.
    """
    inner = getattr(density, "density", density)
    z = TARGET.sample(count, seed=2)
    x, truth = to_user(z.reshape(-1, *shape)).to(dtype), TARGET.log_prob(z) - log_det
    inner.reference = moved(near(), shift)
    found = density.estimate(x, nfe=256, seed=3, **cond)
    error = found.log_prob.double() - truth
    outside = found.truncation + found.discretization
    worst = float((error.abs() / found.stderr).max())
    mean_error = float(found.variance.mean().sqrt()) / count**0.5
    inner.reference = moved(Reference(TARGET.weight, TARGET.mean, TARGET.eigenvalue), shift)
    left = float((density.estimate(x[:16], nfe=32, seed=4, **cond).log_prob.double() - truth[:16]).abs().max())
    print(
        f"stderr {float(found.stderr.mean()):.4f}, worst sample {worst:.2f} standard errors, mean "
        f"{float(error.mean()):+.4f} +- {mean_error:.4f} (outside {outside:.4f}); own reference: {left:.1e} nats"
    )
    assert float(found.stderr.mean()) < 0.1, "too noisy to tell"
    assert bool((error.abs() < 4 * found.stderr + outside).all()), worst
    assert abs(float(error.mean())) < 4 * mean_error + outside, (float(error.mean()), mean_error)
    assert left < rounding
    return worst, float(error.mean()) / mean_error


def moved(reference, shift):
    return Reference(reference.weight, reference.mean + shift, reference.variance)

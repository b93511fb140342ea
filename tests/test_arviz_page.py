"""docs/arviz.md runs as it stands, and leave-one-out of its array is that of the exact likelihood."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import fastscore as fs

CODE = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[1] / "docs" / "arviz.md").read_text(), re.DOTALL)
N, D, CHAINS, DRAWS = 12, 3, 4, 100


class Likelihood(nn.Module):
    """The exact network of x ~ N(theta, 1) in each dimension, variance-preserving."""

    def forward(self, x_t, t, theta):
        alpha, sigma = (each[:, None].to(x_t.dtype) for each in fs.VP().alpha_sigma(t))
        return sigma * (x_t - alpha * theta)


def posterior():
    """Observations, and draws from the posterior of theta ~ N(0, 1), float64."""
    generator = torch.Generator().manual_seed(0)
    observed = 0.5 + torch.randn(N, D, generator=generator, dtype=torch.float64)
    noise = torch.randn(CHAINS, DRAWS, D, generator=generator, dtype=torch.float64)
    return observed, observed.sum(0) / (N + 1) + noise / (N + 1) ** 0.5


def test_numpy_is_what_the_estimate_says():
    density = fs.ScoreDensity(Likelihood(), fs.VP(), "eps")
    found = density.estimate(torch.randn(5, D), nfe=16, seed=3, theta=torch.zeros(5, D))
    arrays = found.numpy()
    assert {*arrays} == {
        "log_prob",
        "stderr",
        "variance",
        "truncation",
        "discretization",
        "nfe",
        "seed",
        "sample_index",
    }
    for name, array in arrays.items():
        own = getattr(found, f"{name}_per_sample" if name in ("truncation", "discretization") else name)
        assert isinstance(array, np.ndarray)
        assert array.shape == (5,)
        assert np.array_equal(array, own.numpy())
    arrays["log_prob"][:] = 0
    assert bool((found.log_prob != 0).all())


def test_leave_one_out_is_that_of_the_exact_likelihood():
    az = pytest.importorskip("arviz")
    observed, theta = posterior()
    names = {"density": fs.ScoreDensity(Likelihood(), fs.VP(), "eps"), "observed": observed, "theta": theta}
    for block in CODE:
        exec(block, names)
    normal = torch.distributions.Normal(theta[:, :, None], 1.0)
    exact = normal.log_prob(observed).sum(-1)
    array, stderr = (torch.as_tensor(names["found"][name].reshape(exact.shape)) for name in ("log_prob", "stderr"))
    assert bool(((array - exact).abs() < 4.5 * stderr + 0.01).all())
    index = torch.arange(N).repeat(CHAINS * DRAWS)
    common = names["density"].estimate(names["rows"], nfe=256, seed=1, sample_index=index, theta=names["every"]).numpy()
    arrays = {"exact": exact.numpy(), "own": array.numpy(), "common": common["log_prob"].reshape(exact.shape)}
    elpd, p = {}, {}
    for name, each in arrays.items():
        groups = names["groups"] | {"log_likelihood": {"x": each}}
        data = az.from_dict(groups) if az.__version__ >= "1" else az.from_dict(**groups)
        elpd[name], p[name] = elpd_and_parameters(az.loo(data))
    assert elpd_and_parameters(az.loo(names["data"])) == (elpd["own"], p["own"])
    print(f"elpd {elpd}, parameters {p}, stderr {stderr.mean():.3f}")
    variance = float(stderr.square().mean())
    # Half the variance an observation, and as much again for what importance sampling makes of it.
    assert -N * variance < elpd["own"] - elpd["exact"] < 0.02
    assert abs(elpd["common"] - elpd["exact"]) < 4 * (N * variance) ** 0.5  # four errors of a sum of N
    assert abs(p["common"] - p["exact"]) < 0.3 * abs(p["own"] - p["exact"])


def elpd_and_parameters(found):
    """By what a version of ArviZ calls them."""
    elpd, p = ("elpd_loo", "p_loo") if hasattr(found, "elpd_loo") else ("elpd", "p")
    return float(getattr(found, elpd)), float(getattr(found, p))

"""Networks that call torch.func inside have densities with gradients: without a checkpoint, and with a word of it."""

import warnings

import pytest
import torch
from torch import nn

import fastscore as fs

pytestmark = pytest.mark.usefixtures("one_thread")
VP = fs.VP()
X = 0.5 * torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
TRUTH = torch.distributions.Normal(0, 0.5).log_prob(X.double()).sum(1)


class Energy(nn.Module):
    """The exact score of N(0, 1/4), as the gradient of an energy by torch.func."""

    def __init__(self, how):
        super().__init__()
        self.how, self.variance = how, nn.Parameter(torch.tensor(0.25))

    def energy(self, x, alpha, sigma):
        return (-x.square() / (2 * (alpha**2 * self.variance + sigma**2))).sum()

    def forward(self, x_t, t):
        alpha, sigma = (v.float()[:, None] for v in VP.alpha_sigma(t))
        if self.how == "grad":
            return torch.func.grad(self.energy)(x_t, alpha, sigma)
        if self.how == "vjp":
            return torch.func.vjp(lambda x: self.energy(x, alpha, sigma), x_t)[1](torch.ones(()))[0]
        return torch.vmap(torch.func.grad(self.energy))(x_t, alpha, sigma)


@pytest.mark.parametrize("how", ["grad", "vjp", "vmap"])
def test_the_gradient_is_the_exact_one(how):
    density = fs.ScoreDensity(Energy(how), VP, "score", reference=fs.Reference.isotropic(0.5))
    x = X.clone().requires_grad_()
    with pytest.warns(UserWarning, match="calls torch.func inside, which allows no checkpoint"):
        found = density.log_prob(x, nfe=32)
    found.sum().backward()
    # The reference is the density: nothing but float32's rounding of sums of 32 rows is left.
    assert torch.allclose(found.double(), TRUTH, atol=1e-4)
    assert torch.allclose(x.grad, -4 * X, atol=1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it was said once
        assert torch.equal(density.log_prob(x, nfe=32), found)


def test_the_ode_has_it_too():
    density = fs.ScoreDensity(Energy("grad"), VP, "score", reference=fs.Reference.isotropic(0.5))
    x = X.clone().requires_grad_()
    found = fs.probability_flow_log_prob(density, x, method="midpoint", steps=16).log_prob
    with pytest.warns(UserWarning, match="allows no checkpoint"):  # its steps are taken again on the way back
        found.sum().backward()
    assert torch.allclose(x.grad, -4 * X, atol=1e-3)  # the error of 16 steps is 2e-5


def test_another_error_is_still_the_networks_own():
    class Broken(Energy):
        def forward(self, x_t, t):
            raise RuntimeError("nothing of hooks")

    density = fs.ScoreDensity(Broken("grad"), VP, "score")
    with pytest.raises(ValueError, match="nothing of hooks"):
        density.log_prob(X.clone().requires_grad_(), nfe=32)


def test_hooks_that_somebody_else_forbids_are_no_matter_of_the_network():
    class Plain(Energy):
        def forward(self, x_t, t):
            alpha, sigma = (v.float()[:, None] for v in VP.alpha_sigma(t))
            return -x_t / (alpha**2 * self.variance + sigma**2)

    density = fs.ScoreDensity(Plain("plain"), VP, "score", program=False, reference=fs.Reference.isotropic(0.5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wanted = density.log_prob(X.clone().requires_grad_(), nfe=32)
        with torch.autograd.graph.disable_saved_tensors_hooks("forbidden here"):
            found = density.log_prob(X.clone().requires_grad_(), nfe=32)
    assert torch.equal(found, wanted)

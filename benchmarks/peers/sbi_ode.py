"""sbi: the log_prob of its score and flow estimators (zuko's ODE, exact trace), the exact network inside them."""

import torch
from race_targets import Exact
from torch import nn

from . import TOLERANCES, Method, counted

NOISE_SCALE = 1e-3  # of sbi's flow: what it computes is the density of data with that much noise


class Inside(nn.Module):
    """The raw network for which an estimator with mean 0 and standard deviation 1 is exact."""

    def __init__(self, exact, kind):
        super().__init__()
        self.exact, self.kind = exact, kind

    def forward(self, theta, condition, time):
        s = time[:, None]
        if self.kind == "flow":
            alpha, sigma = 1 - s, s + NOISE_SCALE
            theta_t = theta * (alpha**2 + s**2 + 1e-6).sqrt()
            eps, x0 = self.exact.denoised(theta_t, alpha, sigma)
            return (eps - x0) / 2**0.5
        alpha, sigma = (1 - s**2).sqrt(), s  # the time encoding of a score estimator is its sigma
        eps, _ = self.exact.denoised(theta, alpha, sigma)  # alpha^2 + sigma^2 = 1
        return (eps / s - theta) * s / alpha


def methods(problem):
    if problem.target is None:
        return []
    from sbi.inference.potentials.vector_field_potential import VectorFieldBasedPotential
    from sbi.neural_nets.estimators.flowmatching_estimator import FlowMatchingEstimator
    from sbi.neural_nets.estimators.score_estimator import VPScoreEstimator

    d = problem.d
    prior = torch.distributions.MultivariateNormal(torch.zeros(d), 100 * torch.eye(d))

    def way(kind, estimator_class):
        network = Exact(problem.target, None, kind)
        estimator = estimator_class(Inside(network, kind), torch.Size([d]), torch.Size([1]))
        potential = VectorFieldBasedPotential(estimator, prior, x_o=torch.zeros(1, 1))

        def run(x, tolerance, seed):
            potential.set_x(torch.zeros(1, 1), atol=tolerance, rtol=tolerance)
            return counted(network, x, lambda: potential(x), vectors=d)

        return run

    return [
        Method("sbi flow estimator, exact trace", way("flow", FlowMatchingEstimator), TOLERANCES, random=False),
        Method("sbi VP score estimator, exact trace", way("vp", VPScoreEstimator), TOLERANCES, random=False),
    ]

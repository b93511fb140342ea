"""score_models: ScoreModel.log_likelihood, Euler's and Heun's steps with Hutchinson's trace, on its VP process."""

import torch
from race_targets import Exact
from torch import nn

from . import Method, counted

CLEAN = 1e-4  # at its default, t0 = 0, the VP process has no noise and the score is not finite
LADDER = ((16, 1), (32, 1), (64, 4), (128, 16), (256, 64), (512, 256))  # steps, probes


class Inside(nn.Module):
    """The raw network of a ScoreModel, called as (t, x): the score times sigma."""

    def __init__(self, exact):
        super().__init__()
        self.exact, self.sde = exact, None

    def forward(self, t, x):
        alpha, sigma = (v[:, None] for v in self.sde.marginal_prob_scalars(t))
        return -self.exact.denoised(x, alpha, sigma)[0]


def methods(problem):
    if problem.target is None:
        return []
    import score_models

    network = Exact(problem.target, None, "eps")
    inside = Inside(network)
    model = score_models.ScoreModel(inside, sde="vp", device="cpu", beta_min=0.1, beta_max=20.0)
    inside.sde = model.sde

    def way(solver):
        def run(x, effort, seed):
            steps, probes = effort
            torch.manual_seed(seed)
            options = {"ode_steps": steps, "n_cotangent_vectors": probes, "method": solver, "t0": CLEAN}
            return counted(network, x, lambda: _log_likelihood(model, x, options))

        return run

    return [Method(f"score_models {solver}, Hutchinson", way(solver), LADDER) for solver in ("Euler", "Heun")]


def _log_likelihood(model, x, options):
    """Its divergence comes as one number a tiled row, so several probes need the mean that it leaves to the caller."""
    probes = options["n_cotangent_vectors"]
    if probes == 1:
        return model.log_likelihood(x, **options)
    many = x.repeat(probes, 1)
    return model.log_likelihood(many, **(options | {"n_cotangent_vectors": 1})).reshape(probes, -1).mean(0)

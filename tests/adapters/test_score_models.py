"""score_models: its own ScoreModel and processes."""

import pytest
import torch
from adapters.exact import assert_exact, column, exact, noised, relative
from torch import nn

from fastscore.adapters import from_score_models
from fastscore.process.predictions import eps_from

score_models = pytest.importorskip("score_models")
SDES = {"ve": {"sigma_min": 0.01, "sigma_max": 20.0}, "vp": {"beta_min": 0.1, "beta_max": 20.0}}


def wrap(net, sde):
    return score_models.ScoreModel(net, sde=sde, device="cpu", **SDES[sde])


class Exact(nn.Module):
    """The target's exact network: eps with the sign of a score, of (t, x)."""

    def __init__(self):
        super().__init__()
        self.sde = None

    def forward(self, t, x):
        alpha, sigma = self.sde.marginal_prob_scalars(t.double())
        return -exact(x, alpha, sigma)[0]


@pytest.mark.parametrize("sde", SDES)
def test_scores_and_noise_are_those_of_the_library(sde):
    net = score_models.MLP(dimensions=4, units=8, layers=2, time_embedding_dimensions=8)
    model = wrap(net, sde)
    density = from_score_models(model)
    t = torch.tensor([0.01, 0.3, 0.7, 1.0])
    x, eps, x_t = noised(density.schedule, t, shape=(4,))
    with torch.no_grad():
        own = model.score(t, x_t.float())
        output = density.model(x_t.float(), t)
    assert torch.equal(output, own)
    alpha, sigma = model.sde.marginal_prob_scalars(t.double())
    assert relative(x_t, column(alpha, x) * x + column(sigma, x) * eps) < 1e-12
    c_f, c_x = (column(c, x) for c in eps_from("score", density.schedule, t))
    assert relative(c_f * own, -column(sigma, x) * own.double()) < 1e-12
    assert float(c_x.abs().max()) == 0


@pytest.mark.parametrize("sde", SDES)
def test_log_prob_of_an_exact_network(sde):
    net = Exact()
    model = wrap(net, sde)
    net.sde = model.sde
    assert_exact(from_score_models(model, program=False), rounding=1e-5)


def test_bad_input_is_explained():
    with pytest.raises(TypeError, match="must be a ScoreModel of score_models, got Identity without score, sde"):
        from_score_models(nn.Identity())
    model = wrap(Exact(), "ve")
    model.sde.T = 2.0
    with pytest.raises(ValueError, match=r"T must be 1, got 2.0"):
        from_score_models(model)

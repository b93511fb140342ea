"""Networks of layers go through adapters as row programs: what an adapter adds does not stand in the way."""

import pytest
import torch
from adapters.bare import load
from torch import nn

from fastscore.adapters import from_azula, from_edm, from_flow_matching, from_sbi, from_score_models, from_torchcfm

B, D, CONDITION = 6, 4, 3


class Layers(nn.Module):
    """Layers of x and a time of any shape, called with whatever a library adds."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(D + 1, 16), nn.Linear(16, D)

    def forward(self, x, t, **extra):
        t = t.reshape(-1, 1).expand(x.shape[0], 1).to(x)
        return self.last(nn.functional.silu(self.first(torch.cat([x, t], 1))))


class Preconditioned(nn.Module):
    """EDM's preconditioning around layers, as its reference code has it."""

    sigma_min, sigma_max, sigma_data = 0.002, 80.0, 0.5

    def __init__(self):
        super().__init__()
        self.model = Layers()

    def round_sigma(self, sigma):
        return torch.as_tensor(sigma)

    def forward(self, x, sigma, class_labels=None, **extra):
        sigma = sigma.to(torch.float32).reshape(-1, 1)
        total = sigma**2 + self.sigma_data**2
        inner = self.model(x / total.sqrt(), sigma.log().flatten() / 4)
        return self.sigma_data**2 / total * x + sigma * self.sigma_data / total.sqrt() * inner


def sbi(kind, network, fixed):
    builders = pytest.importorskip("sbi.neural_nets.net_builders.vector_field_nets")
    theta, x = 3 + 2 * torch.randn(100, D), torch.randn(100, CONDITION)
    which = ("flow", {}) if kind == "flow" else ("score", {"sde_type": kind})
    options = {"net": network, "hidden_features": 16, "num_layers": 2, **which[1]}
    estimator = builders.build_vector_field_estimator(theta, x, which[0], **options).eval()
    for parameter in estimator.parameters():  # sbi starts with outputs of zero
        nn.init.normal_(parameter, std=0.1)
    given = {} if fixed else {"condition": x[:B]}
    return lambda **options: from_sbi(estimator, x[0] if fixed else None, **options), given


def azula():
    denoise, noise = load("azula", "denoise", "noise")
    denoiser = denoise.KarrasDenoiser(Layers(), noise.VPSchedule())
    return lambda **options: from_azula(denoiser, **options), {}


def flow_matching():
    pytest.importorskip("flow_matching")
    from flow_matching.path.scheduler import CondOTScheduler
    from flow_matching.utils import ModelWrapper

    model = ModelWrapper(Layers())
    return lambda **options: from_flow_matching(model, CondOTScheduler(), **options), {}


def score_models():
    library = pytest.importorskip("score_models")
    net = library.MLP(dimensions=D, units=16, layers=2, time_embedding_dimensions=8)
    model = library.ScoreModel(net, sde="ve", sigma_min=0.01, sigma_max=20.0, device="cpu")
    return lambda **options: from_score_models(model, **options), {}


def torchcfm():
    matching, models = load("torchcfm", "conditional_flow_matching", "models")

    class TimeFirst(nn.Module):
        """The library's MLP takes x and t as one tensor, and its solvers call a model as (t, x)."""

        def __init__(self):
            super().__init__()
            self.mlp = models.MLP(dim=D, time_varying=True)

        def forward(self, t, x, y=None):
            return self.mlp(torch.cat([x, t[:, None]], 1))

    model = TimeFirst()
    matcher = matching.ConditionalFlowMatcher(sigma=0.1)
    return lambda **options: from_torchcfm(model, matcher, **options), {}


def edm():
    model = Preconditioned()
    return lambda **options: from_edm(model, **options), {}


CASES = {
    f"sbi, {kind}, {network}, {'one observation' if fixed else 'one a sample'}": lambda *a, of=(kind, network, fixed): (
        sbi(*of)
    )
    for kind in ("flow", "vp")
    for network in ("mlp", "ada_mlp")
    for fixed in (True, False)
}
CASES |= {make.__name__: make for make in (azula, flow_matching, score_models, torchcfm, edm)}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
def test_layers_behind_an_adapter_are_a_program(name):
    torch.manual_seed(0)
    make, given = CASES[name]()
    x = 3 + 2 * torch.randn(B, D)
    # program=True raises where there is none.
    found, right = (make(program=mode).estimate(x, nfe=16, **given).log_prob for mode in (True, False))
    torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-3)  # sums of float32 in another order

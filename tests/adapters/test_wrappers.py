"""Adapters read the network inside of a wrapper: what it does not forward must not be taken for unsaid."""

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import fastscore as fs
from fastscore.adapters import from_edm, from_lucidrains, from_sbi, from_score_models
from fastscore.adapters.diffusers_conventions import known_class
from fastscore.adapters.wrappers import bare


def ema(net):
    return pytest.importorskip("ema_pytorch").EMA(net)


WRAPPERS = {
    "DataParallel": nn.DataParallel,
    "torch.compile": lambda net: torch.compile(net, backend="eager"),
    "AveragedModel": AveragedModel,
    "EMA": ema,
    "two of them": lambda net: nn.DataParallel(AveragedModel(net)),
}


class States(nn.Module):
    """A preconditioned network that returns x, and states what it is told to."""

    def __init__(self, label_dim=0, table=None, **stated):
        super().__init__()
        self.label_dim = label_dim
        for name, value in stated.items():
            setattr(self, name, value)
        if table is not None:
            self.register_buffer("u", table)

    def forward(self, x, sigma, class_labels=None):
        return 0.5 * x


class Unknown(nn.Module):
    """A wrapper of nobody's package, which forwards no attribute."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, sigma, class_labels=None):
        return self.net(x, sigma, class_labels)


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.parametrize("make", [from_edm, fs.from_model])
def test_a_wrapped_network_has_its_own_range_of_noise(wrap, make):
    schedule = make(wrap(States(sigma_min=0.02, sigma_max=100.0, sigma_data=0.7))).schedule
    assert (schedule.sigma_min, schedule.sigma_max, schedule.data_std) == (0.02, 100.0, 0.7)


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_a_wrapped_network_is_evaluated_at_its_own_table_and_gives_the_same_density(wrap):
    net = States(table=torch.cat([torch.logspace(2, -2, 60), torch.zeros(1)])).eval()
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    plain, wrapped = from_edm(net), from_edm(wrap(net))
    assert isinstance(wrapped.schedule, fs.DDPM)
    # The same evaluations in float32, whose sums are of some tens of nats.
    expected = plain.estimate(x, nfe=64, progress=False).log_prob
    torch.testing.assert_close(wrapped.estimate(x, nfe=64, progress=False).log_prob, expected, rtol=1e-5, atol=1e-4)


def test_an_end_that_nothing_states_is_asked_for():
    net = Unknown(States(sigma_min=0.02, sigma_max=100.0))
    asked = r"sigma_min must be that of training, got none, since Unknown states neither .*; pass sigma_min=, or give"
    with pytest.raises(ValueError, match=asked):
        from_edm(net)
    with pytest.raises(ValueError, match=r"sigma_max must be that of training"):
        from_edm(net, sigma_min=0.02)
    schedule = from_edm(net, sigma_min=0.02, sigma_max=100.0).schedule
    assert (schedule.sigma_min, schedule.sigma_max) == (0.02, 100.0)


def test_a_network_that_takes_any_noise_says_so_by_sigma_data():
    """EDM2's Precond states no range at all, EDMPrecond 0 and infinity."""
    for stated in ({}, {"sigma_min": 0, "sigma_max": float("inf")}):
        schedule = from_edm(States(sigma_data=1.5, **stated)).schedule
        assert (schedule.sigma_min, schedule.sigma_max, schedule.data_std) == (0.002, 80.0, 1.5)


def test_k_diffusion_reads_the_table_of_a_wrapped_denoiser():
    denoiser = States(sigma_data=1.0, sigmas=torch.logspace(-2, 2, 30))
    schedule = fs.adapters.from_k_diffusion(AveragedModel(denoiser)).schedule
    assert isinstance(schedule, fs.DDPM)
    assert schedule.time_range == (0, 29)


class Labelled(nn.Module):
    """A classifier-free-guidance network: all that it is asked for is whether labels are dropped."""

    def __init__(self):
        super().__init__()
        self.cond_drop_prob = 0.5

    def forward(self, x, t, cond_drop_prob=None):
        return x * (self.cond_drop_prob if cond_drop_prob is None else cond_drop_prob)


class Diffusion(nn.Module):
    objective = "pred_noise"

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.register_buffer("sqrt_recipm1_alphas_cumprod", torch.linspace(0.01, 50, 100, dtype=torch.float64))

    def normalize(self, x):
        return 2 * x - 1


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_a_wrapped_network_keeps_its_labels(wrap):
    x, t = torch.ones(2, 3), torch.zeros(2, dtype=torch.int64)
    for diffusion in (Diffusion(wrap(Labelled())), wrap(Diffusion(Labelled()))):
        assert float(from_lucidrains(diffusion).density.model(x, t).abs().max()) == 0


def test_what_diffusers_makes_of_a_class_is_that_of_the_averaged_network():
    net = nn.Linear(2, 2)
    named = type("UNet2DModel", (nn.Linear,), {"__module__": "diffusers.models.unet"})(2, 2)
    for wrap in WRAPPERS.values():
        assert known_class(wrap(named)) == "UNet2DModel"
        assert type(bare(wrap(net))) is nn.Linear


def score_model():
    library = pytest.importorskip("score_models")
    net = library.MLP(dimensions=4, units=8, layers=2, time_embedding_dimensions=8)
    return library.ScoreModel(net, sde="ve", sigma_min=0.01, sigma_max=20.0, device="cpu")


def estimator():
    builders = pytest.importorskip("sbi.neural_nets.net_builders.vector_field_nets")
    theta = torch.randn(50, 4)
    made = builders.build_vector_field_estimator(theta, theta, "score", net="mlp", hidden_features=8, num_layers=2)
    return made.eval()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.parametrize(
    ("make", "adapter"), [(score_model, from_score_models), (estimator, lambda net: from_sbi(net, torch.zeros(4)))]
)
def test_a_wrapped_network_that_is_called_by_another_method_is_its_own(wrap, make, adapter):
    net, x = make(), torch.randn(3, 4)
    expected = adapter(net).estimate(x, nfe=8).log_prob
    torch.testing.assert_close(adapter(wrap(net)).estimate(x, nfe=8).log_prob, expected)

"""What arguments cannot be is refused in one sentence: numbers, options, schedules, and what fits and losses get."""

import copy
import math
import re
from functools import partial

import numpy as np
import pytest
import torch
from test_refusals import CALLS, Net, X, density
from torch import nn

import fastscore as fs
from fastscore.estimator import calibration, pilot
from fastscore.estimator.nodes import NodeDensity
from fastscore.process.settings import settings_of


@pytest.mark.parametrize("value", [1.5, 16.0, "16", None, torch.tensor(1.5), 1j], ids=str)
def test_counts_and_seeds_are_integers(value):
    x, d = X[:2], density()
    if value is not None:  # no nfe stands for the default
        with pytest.raises(ValueError, match="nfe must be an integer, got"):
            d.estimate(x, nfe=value)
    for call in (
        lambda: d.estimate(x, seed=value),
        lambda: d.compare(x, {}, {}, seed=value),
        lambda: d.fit(X, seed=value),
        lambda: fs.probability_flow_log_prob(d, x, seed=value, trace="hutchinson"),
        lambda: fs.density_loss(d, x, seed=value),
    ):
        with pytest.raises(ValueError, match="seed must be an integer, got"):
            call()


@pytest.mark.parametrize(
    ("value", "message"), [(-1, "4 or more for an error bar, got -1"), (True, "must be an integer")]
)
def test_evaluations_of_a_density_are_refused_where_it_is_made(value, message):
    with pytest.raises(ValueError, match=f"nfe .*{message}"):
        fs.ScoreDensity(Net(), fs.VP(), "eps", nfe=value)


@pytest.mark.parametrize("value", [np.int64(3), torch.tensor(3)], ids=["numpy", "tensor"])
def test_seeds_are_integers_of_any_kind(value):
    x, d = X[:2], density()
    ode = partial(fs.probability_flow_log_prob, d, x, method="midpoint", steps=4, trace="hutchinson")
    for call in (
        lambda seed: d.estimate(x, nfe=16, seed=seed).log_prob,
        lambda seed: d.log_prob(x, nfe=16, seed=seed),
        lambda seed: fs.density_loss(d, x, seed=seed),
        lambda seed: fs.score_regularization(d, x, seed=seed),
        lambda seed: ode(seed=seed).log_prob,
        lambda seed: fs.Levels(4).dequantize(torch.zeros(2, 3, dtype=torch.int64), seed=seed),
    ):
        assert torch.equal(call(value), call(3))
    own = [copy.deepcopy(d).fit(X, evaluations=2000, seed=seed, progress=False) for seed in (value, 3)]
    assert all(map(torch.equal, *(each.state_dict().values() for each in own)))


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf"), "much", [1.0]], ids=str)
def test_budgets_are_positive_numbers(value):
    for name in ("target_stderr", "memory"):
        with pytest.raises(ValueError, match=f"{name} must be"):
            density().estimate(X, nfe=16, **{name: value})
    with pytest.raises(ValueError, match="evaluations must be an integer"):
        density().fit(X, evaluations="many")


@pytest.mark.parametrize("value", ["x", 0, -1e-3, float("nan"), [1e-5]], ids=str)
def test_tolerances_of_solvers_are_positive_numbers(value):
    for name in ("rtol", "atol"):
        with pytest.raises(ValueError, match=f"{name} must be positive"):
            fs.probability_flow_log_prob(density(), X, method="dopri5", **{name: value})


@pytest.mark.parametrize("method", [["dopri5"], None, 3], ids=str)
def test_a_solver_has_a_name(method):
    with pytest.raises(ValueError, match="method must be one of auto, midpoint"):
        fs.probability_flow_log_prob(density(), X, method=method)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64], ids=str)
def test_levels_are_not_dequantized_into_a_few_numbers(dtype):
    with pytest.raises(ValueError, match="dequantized data must be float32 or float64, got"):
        fs.Levels(256).dequantize(torch.zeros(2, 3, dtype=torch.int64), dtype=dtype)


def test_data_sets_are_arrays_and_conditions_of_the_network_go_in_a_dict(tmp_path):
    wrong = torch.utils.data.TensorDataset(X)
    with pytest.raises(
        ValueError, match=r"data must be one tensor or array of numpy .* got TensorDataset; torch.stack"
    ):
        fs.evaluate_dataset(density(), wrong, tmp_path / "x.npz")
    with pytest.raises(
        ValueError, match=r"class_labels is no argument of evaluate_dataset; .* cond={'class_labels': ...}"
    ):
        fs.evaluate_dataset(density(), X, tmp_path / "x.npz", class_labels=X)
    with pytest.raises(ValueError, match=r"got DataLoader; .*torch.stack of the samples of a Dataset"):
        density().fit(torch.utils.data.DataLoader(wrong))


@pytest.mark.parametrize("sixteen", [np.int64(16), torch.tensor(16), np.uint8(16)], ids=lambda v: type(v).__name__)
def test_integers_of_every_kind_are_integers(sixteen):
    expected = density().estimate(X, nfe=16, seed=16).log_prob
    assert torch.equal(density().estimate(X, nfe=sixteen, seed=sixteen).log_prob, expected)


@pytest.mark.parametrize("nfe", [10**8, 10**9, 10**20])
def test_more_evaluations_than_fit_into_memory(nfe):
    with pytest.raises(ValueError, match="nfe must be at most 16777216 evaluations per sample"):
        density().estimate(X, nfe=nfe)
    with pytest.raises(ValueError, match="max_nfe must be between the 256 evaluations to start from and 16777216"):
        density().estimate(X, target_stderr=0.1, max_nfe=nfe)


def test_warnings_name_the_callers_line():
    with pytest.warns(UserWarning, match="1 constant") as caught:
        density().fit(torch.cat([X, torch.zeros(30, 1)], 1))
    assert [warning.filename for warning in caught] == [__file__]


class Labelled(nn.Module):
    """A network that takes whatever it is called with."""

    def forward(self, x, t, **given):
        y = given.get("y", torch.zeros(len(x)))
        return torch.tanh(x) + 0.1 * y[:, None].expand(len(x), 1)


def test_a_call_that_was_refused_says_nothing_of_the_next_one():
    made = fs.ScoreDensity(Labelled(), fs.VP(), "eps")
    with pytest.raises(ValueError, match=r"y \(29,\) shared by all"):
        made.estimate(X, nfe=16, y=torch.ones(29))
    expected = made.estimate(X, nfe=16, y=fs.per_sample(torch.ones(30))).log_prob
    assert torch.equal(made.estimate(X, nfe=16, y=torch.ones(30)).log_prob, expected)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nfee", "nfee is no option of estimate, did you mean nfe"),
        ("nef", "nef is no option of estimate, did you mean nfe"),
        ("max_nfes", "max_nfes is no option of estimate, did you mean max_nfe"),
        ("target_sterr", "did you mean target_stderr"),
        ("samples", None),  # not near enough
        ("backend", r"backend is an argument of ScoreDensity\(...\), not of estimate"),
        ("predicts", "predicts is an argument of ScoreDensity"),
    ],
)
def test_options_that_are_misspelt_do_not_go_to_the_network(name, message):
    made = fs.ScoreDensity(Labelled(), fs.VP(), "eps")
    if message is None:
        made.estimate(X, **{"nfe": 16, name: 1})
        return
    with pytest.raises(ValueError, match=message):
        made.estimate(X, **{name: 1})
    made.estimate(X, nfe=16, cond={name: 1})  # said to be the network's

    class Spells(Labelled):
        def forward(self, x, t, nfee=0, nef=0, backend="", predicts="", max_nfes=0, target_sterr=0):
            return torch.tanh(x)

    fs.ScoreDensity(Spells(), fs.VP(), "eps").estimate(X, **{"nfe": 16, name: 1})


def test_an_error_that_was_not_reached_is_said():
    for most, spent in ((64, 64), (100, 64), (128, 128)):
        message = (
            f"30 of 30 samples are above target_stderr=1e-06 after {spent} evaluations.*more than max_nfe={most}; "
        )
        with pytest.warns(UserWarning, match=message):
            found = density().estimate(X, nfe=16, target_stderr=1e-6, max_nfe=most)
        assert int(found.nfe.max()) == spent


def test_fit_names_the_sample_by_its_place_in_the_data():
    data = torch.zeros(400, 3)
    data[37, 1] = torch.inf
    with pytest.raises(ValueError, match="data has NaN or inf in sample 37; remove"):
        density().fit(data)


def test_arguments_of_another_kind():
    with pytest.raises(ValueError, match="cond must be a dict of the network's keyword arguments"):
        density().compare(X, torch.ones(30), torch.zeros(30))
    with pytest.raises(ValueError, match=r"levels must be fastscore.Levels such as Levels\(256\), got int"):
        fs.discrete_log_prob(density(), X.long(), 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("call", ["estimate", "log_prob", "loss", "ode"])
def test_a_table_that_was_cast_is_refused(dtype, call):
    made = fs.ScoreDensity(Net(), fs.DDPM.linear(100), "eps")
    made.estimate(X, nfe=16)
    made.schedule.table = made.schedule.table.to(dtype)
    assert settings_of(made.schedule) != settings_of(fs.DDPM.linear(100))
    with pytest.raises(ValueError, match=f"the table of DDPM must stay float64, got {dtype}; build the schedule anew"):
        CALLS[call](made, X)


class Loss(nn.Module):
    """A loss of a density as a module, whose weights torch.func.functional_call replaces."""

    def __init__(self, loss):
        super().__init__()
        self.density, self.loss = density(), loss

    def forward(self, x):
        return self.loss(self.density, x, seed=0, reduction="none")


@pytest.mark.parametrize("name", ["density_loss", "score_regularization"])
def test_losses_under_vmap(name):
    taken = Loss(getattr(fs, name))
    message = rf"^{name} does not run under torch.func.vmap; give all samples as one batch.*loop over networks"
    with pytest.raises(ValueError, match=message):
        torch.func.vmap(taken)(X.reshape(2, 15, 3))
    weights = {"density.model.weight": torch.ones(4, 1)}
    with pytest.raises(ValueError, match=message):
        torch.func.vmap(partial(torch.func.functional_call, taken), (0, None))(weights, (X,))


def test_the_loss_has_derivatives_of_torch_func():
    made, x = density(), X.clone().requires_grad_()
    (expected,) = torch.autograd.grad(fs.density_loss(made, x, seed=0), x)
    assert torch.allclose(torch.func.grad(lambda x: fs.density_loss(made, x, seed=0))(X), expected, rtol=1e-5)


def test_a_class_is_no_object():
    for given, message in (((Net, fs.VP()), "model .*the class Net"), ((Net(), fs.VP), "schedule .*the class VP")):
        with pytest.raises(TypeError, match=f"{message} and no object of it"):
            fs.ScoreDensity(*given, "eps")


class Gaussian(nn.Module):
    """The exact noise prediction of N(0, 0.25), called with the time that it was trained on."""

    def forward(self, x, t):
        alpha, sigma = (v[:, None].to(x) for v in fs.VP().alpha_sigma(t))
        return sigma * x / (0.25 * alpha**2 + sigma**2)


def test_fit_warns_of_a_network_that_explains_its_data_worse_than_a_gaussian(recwarn):
    data = 0.5 * torch.randn(2000, 3, generator=torch.Generator().manual_seed(0))
    fs.ScoreDensity(Gaussian(), fs.VP(), "eps").fit(data, progress=False)
    assert [str(warning.message) for warning in recwarn] == []
    message = (
        r"nats per sample below that of a reference fitted to them: is predicts=, the time .* or the scale of the data"
    )
    for wrong, scale in (
        (fs.ScoreDensity(Gaussian(), fs.VP(), "x0"), 1),
        (fs.ScoreDensity(Gaussian(), fs.VP(), "eps"), 10),
    ):
        with pytest.warns(UserWarning, match=message):
            wrong.fit(scale * data, progress=False)


@pytest.mark.parametrize("wide", [False, True])
def test_fit_warns_by_the_likeliest_reference_and_not_by_the_chosen_one(wide, monkeypatch, recwarn):
    """Near a network that is wrong lies a reference that is: it leaves the least, and says nothing of the network."""
    kept, chosen = pilot.pilot, fs.Reference.isotropic(3.0)

    def choose(network, samples, weight, references, plan):
        if not wide:
            return kept(network, samples, weight, references, plan)
        references.append(chosen)
        return pilot.Fitted(chosen, NodeDensity.uniform(*network.log_snr_range), calibration.uncalibrated())

    monkeypatch.setattr(pilot, "pilot", choose)
    data = 0.5 * torch.randn(2000, 3, generator=torch.Generator().manual_seed(0))
    fs.ScoreDensity(Gaussian(), fs.VP(), "eps").fit(data, evaluations=30_000, progress=False)
    said = [str(warning.message) for warning in recwarn if "of a reference fitted to them" in str(warning.message)]
    assert len(said) == wide
    if wide:  # log 6 a dimension, less what the widths' quotients take: (1 - 1/36) / 2; held out are 400 samples
        below = float(re.search(r"log-density is (\S+) nats", said[0])[1])
        assert below == pytest.approx(3 * (math.log(6) - 35 / 72), abs=0.15)

"""Densities inside inference mode and under torch.func: the same numbers and gradients, or one sentence."""

from functools import partial

import pytest
import torch
from analytic import ExactNet, mixture
from torch.autograd import forward_ad

import fastscore as fs
from fastscore.metrics import NegativeLogLikelihood
from fastscore.transforms import Logit

pytestmark = pytest.mark.usefixtures("one_thread")

SCHEDULE, TARGET, TRANSFORM = fs.LogSNR(-8, 6), mixture(2, components=3), Logit(-9.0, 9.0)
Z = TARGET.sample(3, seed=2)
X = TRANSFORM(Z)


def plain(gain=0.9, program=False):
    return fs.ScoreDensity(ExactNet(TARGET, SCHEDULE, gain=gain), SCHEDULE, "eps", program=program)


class Mlp(torch.nn.Module):
    """A network of ordinary layers, which runs as a row program."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.time, self.first, self.last = (torch.nn.Linear(n, m) for n, m in ((1, 64), (2, 64), (64, 2)))

    def forward(self, x_t, t):
        return self.last(torch.tanh(self.first(x_t) + self.time(t[:, None].to(x_t.dtype))))


DENSITIES = {
    "plain": lambda: (plain(), Z),
    "transformed": lambda: (fs.Transformed(plain(), TRANSFORM), X),
    "program": lambda: (fs.ScoreDensity(Mlp().double(), SCHEDULE, "eps", program=True), Z),
}
CALLS = {
    "log_prob": lambda d, x: d.log_prob(x, nfe=16),
    "ODE": lambda d, x: fs.probability_flow_log_prob(d, x, method="midpoint", steps=4).log_prob,
    "ODE by probes": lambda d, x: (
        fs.probability_flow_log_prob(d, x, method="midpoint", steps=4, trace="hutchinson", probes=2).log_prob
    ),
}
EVALUATIONS = {
    "estimate": lambda d, x: d.estimate(x, nfe=16).log_prob,
    "captured": lambda d, x: fs.CapturedDensity(d, x, nfe=16)(x)[0],
    "classifier": lambda d, x: fs.DiffusionClassifier(d, CLASSES).classify(x, nfe=32, error=None).log_posterior,
}
CLASSES = {"shift": 0.3 * torch.arange(3.0).double()[:, None].expand(3, 2)}


def evaluations(kind):
    return [call for name, call in EVALUATIONS.items() if (kind, name) != ("program", "classifier")]


@pytest.mark.parametrize("kind", DENSITIES)
def test_inference_mode_gives_the_same_numbers(kind):
    density, x = DENSITIES[kind]()
    for call in (*CALLS.values(), *evaluations(kind)):
        expected = call(density, x)
        with torch.inference_mode():
            found, own = call(density, x), call(density, x.clone())  # normal data, and data made in inference mode
        assert torch.equal(found, expected)
        assert torch.equal(own, expected)
        assert not found.requires_grad


@pytest.mark.parametrize("kind", DENSITIES)
def test_nothing_that_was_learned_in_inference_mode_stands_in_the_way_of_training(kind):
    density, x = DENSITIES[kind]()
    with torch.inference_mode():
        data = TARGET.sample(60, seed=1)
        density.fit(TRANSFORM(data) if kind == "transformed" else data, evaluations=4000, progress=False)
        for call in CALLS.values():
            call(density, x.clone())
        x = x.clone()
    assert x.is_inference()
    assert not any(value.is_inference() for value in density.state_dict().values())
    for call in CALLS.values():
        density.zero_grad()
        call(density, x).sum().backward()
        assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in density.parameters())


def test_conditions_made_in_inference_mode():
    density, shift = plain(), torch.ones(3, 2).double()
    for call in (partial(fs.probability_flow_log_prob, method="midpoint", steps=1), fs.ScoreDensity.log_prob):
        found = call(density, Z, shift=shift)
        with torch.inference_mode():
            own = call(density, Z, shift=shift.clone())
        pairs = zip(found, own) if isinstance(found, tuple) else [(found, own)]
        assert all(torch.allclose(a, b, rtol=0, atol=0, equal_nan=True) for a, b in pairs)


def test_a_metric_of_a_test_loop():
    metric = NegativeLogLikelihood(plain(), nfe=16)
    with torch.inference_mode():
        metric.update(Z.clone())
        metric.update(Z.clone())
    assert float(metric.compute()["nll"]) == pytest.approx(
        -float(plain().estimate(Z.repeat(2, 1), nfe=16).log_prob.mean()), abs=1e-12
    )


def test_a_network_made_in_inference_mode_is_refused_where_gradients_are_needed():
    with torch.inference_mode():
        density = plain()
    assert bool(torch.isfinite(density.estimate(Z, nfe=16).log_prob).all())
    for call in CALLS.values():
        with pytest.raises(ValueError, match=r"'gain' was made in inference mode.*outside of torch.inference_mode"):
            call(density, Z)


@pytest.mark.parametrize("kind", DENSITIES)
@pytest.mark.parametrize("name", CALLS)
def test_torch_func_has_the_gradient_of_autograd(kind, name):
    density, x = DENSITIES[kind]()
    call, leaf = CALLS[name], x.clone().requires_grad_()
    value = call(density, leaf)
    (expected,) = torch.autograd.grad(value.sum(), leaf)
    exactly = {"rtol": 1e-12, "atol": 1e-10}

    def run(z):
        return call(density, z)

    torch.testing.assert_close(torch.func.grad(lambda z: run(z).sum())(x), expected, **exactly)
    found, pull = torch.func.vjp(run, x)
    torch.testing.assert_close(found, value.detach(), **exactly)
    torch.testing.assert_close(
        pull(torch.tensor([2.0, 0.0, -1.0]).double())[0], expected * torch.tensor([[2.0], [0], [-1]]), **exactly
    )
    tangent = torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found, slope = torch.func.jvp(run, (x,), (tangent,))
    torch.testing.assert_close(slope, (expected * tangent).sum(1), **exactly)
    jacobian = torch.diag_embed(expected.T).movedim(0, 2)  # rows are independent
    torch.testing.assert_close(torch.func.jacrev(run)(x), jacobian, **exactly)
    torch.testing.assert_close(torch.func.jacfwd(run)(x), jacobian, **exactly)
    # Each sample alone counts as sample 0.
    alone = [
        torch.autograd.grad(call(density, row).sum(), row)[0] for row in (r[None].clone().requires_grad_() for r in x)
    ]
    by_row = torch.func.vmap(torch.func.grad(lambda row: run(row[None])[0]))(x)
    torch.testing.assert_close(by_row, torch.cat(alone), **exactly)
    torch.testing.assert_close(
        torch.func.vmap(lambda row: run(row[None])[0])(x), torch.cat([run(r[None]) for r in x]).detach(), **exactly
    )


def test_torch_func_inside_inference_mode():
    density = plain()
    expected = torch.func.grad(lambda z: density.log_prob(z, nfe=16).sum())(Z)
    with torch.inference_mode():
        found = torch.func.jvp(lambda z: density.log_prob(z, nfe=16), (Z.clone(),), (torch.ones_like(Z),))[1]
    torch.testing.assert_close(found, expected.sum(1), rtol=1e-12, atol=1e-10)


def test_other_results_of_the_ode_are_constants():
    density = plain()
    found = fs.probability_flow_log_prob(density, Z, trace="hutchinson", probes=3)

    def run(z):
        each = fs.probability_flow_log_prob(density, z, trace="hutchinson", probes=3)
        return each.log_prob.sum(), each

    _, own = torch.func.grad(run, has_aux=True)(Z)
    assert type(own) is fs.FlowLogProb
    assert torch.equal(own.nfe, found.nfe)
    assert torch.equal(own.stderr, found.stderr.detach())
    assert not found.stderr.requires_grad


@pytest.mark.parametrize("kind", ["plain", "transformed"])
def test_what_torch_func_cannot_do_is_refused_in_one_sentence(kind):
    density, x = DENSITIES[kind]()
    for call in CALLS.values():
        with pytest.raises(ValueError, match=r"first derivatives under torch.func, got a derivative of order 2"):
            torch.func.hessian(lambda z, call=call: call(density, z).sum())(x)
        weights = dict(density.named_parameters())
        with pytest.raises(ValueError, match=r"function of x alone, got a transformed parameter or condition"):
            torch.func.grad(
                lambda w, call=call: torch.func.functional_call(
                    Called(density, call), {f"of.{k}": v for k, v in w.items()}, (x,)
                ).sum()
            )(weights)
    with pytest.raises(ValueError, match=r"function of x alone, got a transformed parameter or condition"):
        torch.func.grad(lambda s: density.log_prob(x, nfe=16, shift=s).sum())(torch.zeros(3, 2).double())
    for call in (lambda d, z: d.estimate(z).log_prob, lambda d, z: d.compare(z, {}, {}).difference):
        with pytest.raises(ValueError, match=r"does not run under the transforms of torch.func"):
            torch.func.grad(lambda z, call=call: call(density, z).sum())(x)


class Called(torch.nn.Module):
    """A module that calls a function of a density, for `functional_call`."""

    def __init__(self, density, call):
        super().__init__()
        self.of, self.call = density, call

    def forward(self, x):
        return self.call(self.of, x)


@pytest.mark.parametrize("kind", ["plain", "transformed", "program"])
@pytest.mark.parametrize("name", [*CALLS, "estimate"])
def test_forward_mode_tensors_are_refused_and_jvp_is_the_gradient(kind, name):
    """A part of the tangent got through: that of the reference, without the network's."""
    density, x = DENSITIES[kind]()
    call = {**CALLS, **EVALUATIONS}[name]
    tangent = torch.linspace(-1, 1, x.numel(), dtype=x.dtype).reshape(x.shape)
    with forward_ad.dual_level(), pytest.raises(ValueError, match=r"dual tensor; use torch\.func\.jvp"):
        call(density, forward_ad.make_dual(x, tangent))
    if name in CALLS:
        leaf = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(call(density, leaf).sum(), leaf)
        found = torch.func.jvp(partial(call, density), (x,), (tangent,))[1]
        torch.testing.assert_close(found, (gradient * tangent).sum(1), rtol=1e-9, atol=1e-9)  # the same sums, float64


@pytest.mark.parametrize("name", [*CALLS, "estimate"])
def test_a_compiled_step_around_a_call_gives_its_numbers(name):
    """The first call of a density looks into its network, which raised a RuntimeError of torch.compile."""
    call = {**CALLS, **EVALUATIONS}[name]
    density, x = plain(), Z
    found = torch.compile(lambda z: 2 * call(density, z), backend="eager")(x)
    torch.testing.assert_close(found, 2 * call(plain(), x), rtol=1e-12, atol=1e-12)  # the same operations


def test_a_dual_tensor_in_the_place_of_a_weight_is_refused():
    density, x = DENSITIES["program"]()
    layer = density.model.last
    weight = layer.weight.detach()
    with forward_ad.dual_level():
        del layer.weight
        layer.weight = forward_ad.make_dual(weight, torch.ones_like(weight))
        with pytest.raises(ValueError, match="dual tensor"):
            density.log_prob(x, nfe=16)

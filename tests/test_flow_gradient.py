"""Gradients of the ODE's density: differences in float64, the score of an exact network, and bounded memory."""

import gc

import pytest
import torch
from analytic import ExactNet, Target, mixture

import fastscore as fs
from fastscore.densities.flow_field import COLUMNS
from fastscore.densities.probability_flow import probability_flow_log_prob
from fastscore.support.memory import _LiveBytes, peak_bytes

pytestmark = pytest.mark.usefixtures("one_thread")

SCHEDULE = fs.LogSNR(-8, 6)
TARGET = mixture(2, components=3)
METHODS = {
    "auto": {"error": 1.0},
    "midpoint": {"method": "midpoint", "steps": 6},
    "probes": {"method": "midpoint", "steps": 6, "trace": "hutchinson", "probes": 3},
    "auto by probes": {"trace": "hutchinson", "probes": 2, "error": 1.0},
    "rk4": {"method": "rk4", "steps": 3},
}


def density(gain=0.9, predicts="eps"):
    reference = fs.Reference(torch.tensor([0.4, 0.6]), torch.tensor([[0.5, 0.0], [-1.0, 0.3]]), torch.ones(2, 2))
    return fs.ScoreDensity(ExactNet(TARGET, SCHEDULE, predicts, gain=gain), SCHEDULE, predicts, reference=reference)


def differences(value, tensor, step=1e-5):
    """Central differences of a number in every element of a tensor, which is changed in place and put back."""
    found = torch.zeros_like(tensor)
    with torch.no_grad():
        for i in range(tensor.numel()):
            ends = []
            for sign in (1, -1):
                tensor.view(-1)[i] += sign * step
                ends.append(float(value()))
                tensor.view(-1)[i] -= sign * step
            found.view(-1)[i] = (ends[0] - ends[1]) / (2 * step)
    return found


@pytest.mark.parametrize("method", METHODS)
def test_gradients_are_those_of_the_number(method):
    """In x, in a parameter and in a condition of each sample; truncation of the differences is step^2 = 1e-10."""
    if method == "rk4":
        pytest.importorskip("torchdiffeq")
    model = density()
    x, shift = TARGET.sample(2, seed=2), torch.tensor([[0.1, 0.0], [-0.2, 0.3]]).double()

    def value():
        return (probability_flow_log_prob(model, x, shift=shift, **METHODS[method]).log_prob * weight).sum()

    weight, inputs = torch.tensor([1.0, -0.5]).double(), (x, shift, model.model.gain)
    expected = [differences(value, tensor.detach()) for tensor in inputs]
    for tensor in (x, shift):
        tensor.requires_grad_()
    for found, wanted in zip(torch.autograd.grad(value(), inputs), expected):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("predicts", ["eps", "flow"])
def test_the_gradient_of_an_exact_network_is_the_score(predicts):
    x = TARGET.sample(2, seed=4).requires_grad_()
    clean = float(torch.exp(torch.tensor(-6.0)))
    convolved = Target(TARGET.weight, TARGET.mean, TARGET.cov + clean * torch.eye(2))
    (score,) = torch.autograd.grad(convolved.log_prob(x).sum(), x)
    found = probability_flow_log_prob(density(None, predicts), x, error=0.01)
    (gradient,) = torch.autograd.grad(found.log_prob.sum(), x)
    # The number is right to 1e-3 nats and third moments of the prior at sigma = e^4; scores have the size 1 / 0.3.
    assert float((gradient - score).abs().max()) < 0.02, float((gradient - score).abs().max())
    assert float(score.abs().max()) > 2


def test_gradients_of_a_condition_that_comes_from_an_encoder():
    model, x = density(), TARGET.sample(2, seed=2)
    encoder = torch.nn.Linear(1, 2).double()
    embedded = torch.linspace(0, 1, 2).double()[:, None]

    def value():
        return probability_flow_log_prob(model, x, shift=encoder(embedded), error=1.0).log_prob.sum()

    expected = [differences(value, p.detach()) for p in encoder.parameters()]
    for found, wanted in zip(torch.autograd.grad(value(), list(encoder.parameters())), expected):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_the_number_is_the_same_with_and_without_a_graph():
    model, x = density(), TARGET.sample(4, seed=2)
    for options in METHODS.values():
        found = probability_flow_log_prob(model, x.clone().requires_grad_(), **options)
        with torch.no_grad():
            plain = probability_flow_log_prob(model, x, **options)
        assert all(torch.equal(a, b) or bool(torch.isnan(a).all()) for a, b in zip(found, plain))
        assert found.log_prob.requires_grad
        assert not any(value.requires_grad for value in (*found[1:], *plain))


def test_a_network_that_vmap_cannot_batch_and_one_that_is_linear():
    class Net(torch.nn.Module):
        def __init__(self, power):
            super().__init__()
            self.power, self.gain = power, torch.nn.Parameter(torch.tensor(0.5).double())

        def forward(self, x_t, t):
            if self.power > 1 and float(x_t.detach().abs().max()) > 1e9:  # asks for a number
                raise OverflowError
            return self.gain * x_t**self.power

    x = torch.tensor([[0.3, -0.4], [0.1, 0.2]]).double()
    for power in (1, 2):
        model = fs.ScoreDensity(Net(power), SCHEDULE, "eps")
        for trace in ("exact", "hutchinson"):

            def value(model=model, trace=trace, x=x):
                options = {"method": "midpoint", "steps": 3, "trace": trace}
                return probability_flow_log_prob(model, x, **options).log_prob.sum()

            expected = differences(value, x), differences(value, model.model.gain.detach())
            x.requires_grad_()
            found = torch.autograd.grad(value(), (x, model.model.gain))
            x = x.detach()
            for own, wanted in zip(found, expected):
                torch.testing.assert_close(own, wanted, rtol=1e-5, atol=1e-5)


def test_memory_does_not_grow_with_the_steps():
    """What a step keeps are states of B x d numbers; a graph of the whole solution would keep the network's."""
    width, d, batch = 512, 4, 64
    net = torch.nn.Sequential(torch.nn.Linear(d, width), torch.nn.Tanh(), torch.nn.Linear(width, d))

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x_t, t):
            return self.net(x_t)

    model, x = (
        fs.ScoreDensity(Net(), SCHEDULE, "eps"),
        torch.randn(batch, d, generator=torch.Generator().manual_seed(0)),
    )

    def kept_and_peak(steps):
        leaf = x.clone().requires_grad_()
        with _LiveBytes() as mode:
            value = probability_flow_log_prob(model, leaf, method="midpoint", steps=steps).log_prob.sum()
            gc.collect()
            kept = mode.live
        return kept, peak_bytes(value.backward)

    probability_flow_log_prob(model, x, method="midpoint", steps=1)  # traces the network, which keeps its program
    (kept, peak), (kept_more, peak_more) = kept_and_peak(4), kept_and_peak(32)
    assert kept == kept_more
    assert kept < 8 * x.nbytes + 4096  # data, results and small tensors
    # Two states and the changes of log p a step, with an allowance for what small tensors autograd keeps.
    assert peak_more - peak < 28 * 8 * x.nbytes
    assert peak_more - peak < 28 * batch * width * 4 / 8  # an eighth of one layer's activations a step
    assert d <= COLUMNS


def test_what_has_no_gradient_says_so():
    pytest.importorskip("torchdiffeq")
    x = TARGET.sample(2, seed=2).requires_grad_()
    found = probability_flow_log_prob(density(), x, method="dopri5")
    with pytest.raises(ValueError, match=r"chooses its own steps has no gradient.*method='auto'"):
        found.log_prob.sum().backward()
    (gradient,) = torch.autograd.grad(probability_flow_log_prob(density(), x).log_prob.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="the ODE's density has first derivatives alone"):
        gradient.sum().backward()


def test_a_weight_that_changed_before_the_backward_pass_is_noticed():
    model, x = density(), TARGET.sample(2, seed=2).requires_grad_()
    value = probability_flow_log_prob(model, x, method="midpoint", steps=1).log_prob.sum()
    with torch.no_grad():
        model.model.gain += 0.1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


class Weightless(torch.nn.Module):
    """An exact network of N(0, 1/4), without parameters; `cut` takes its answer out of the graph."""

    def __init__(self, cut=None):
        super().__init__()
        self.cut = cut

    def forward(self, x, t):
        alpha, sigma = (v[:, None].to(x) for v in SCHEDULE.alpha_sigma(t))
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.cut != "no_grad"):
            answer = sigma * x / (0.25 * alpha**2 + sigma**2)
        if self.cut == "numpy":
            return torch.from_numpy(answer.detach().numpy())
        return answer.detach() if self.cut == "detach" else answer


@pytest.mark.parametrize("cut", ["no_grad", "detach", "numpy"])
def test_a_network_out_of_the_graph_is_refused_where_its_derivative_counts(cut):
    found, x = (
        fs.ScoreDensity(Weightless(cut), SCHEDULE, "eps"),
        torch.randn(3, 2, generator=torch.Generator().manual_seed(0)),
    )
    with pytest.raises(ValueError, match="depends on x_t and has no graph"):
        probability_flow_log_prob(found, x)
    with pytest.raises(ValueError, match="depends on x_t and has no graph"):
        found.log_prob(x.clone().requires_grad_())
    assert torch.isfinite(found.log_prob(x)).all()
    assert torch.isfinite(found.estimate(x.clone().requires_grad_()).log_prob).all()


def test_a_constant_network_has_no_derivative_and_needs_none():
    class Zero(torch.nn.Module):
        def forward(self, x, t):
            return torch.zeros_like(x)

    found = probability_flow_log_prob(
        fs.ScoreDensity(Zero(), SCHEDULE, "eps"), torch.zeros(1, 2), method="midpoint", steps=64
    )
    assert torch.isfinite(found.log_prob).all()


def test_second_derivatives_are_refused_without_parameters_and_by_their_name():
    x = torch.randn(3, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()
    value = probability_flow_log_prob(
        fs.ScoreDensity(Weightless(), SCHEDULE, "eps"), x, method="midpoint", steps=8
    ).log_prob
    (gradient,) = torch.autograd.grad(value.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="the ODE's density has first derivatives alone"):
        torch.autograd.grad(gradient.sum(), x)

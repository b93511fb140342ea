"""What "auto" returns where some samples are not within `error`: a number with what was reached, or NaN."""

import math

import pytest
import torch
from analytic import ExactNet, Target, mixture
from torch import nn

import fastscore as fs
from fastscore.densities import flow_steps, probability_flow

pytestmark = pytest.mark.usefixtures("one_thread")

WIDE, TARGET = fs.LogSNR(-14, 16), mixture(2, components=3)
X = TARGET.sample(5, seed=1) * torch.tensor([[1.0], [1.0], [10.0], [100.0], [1.0]])  # two of them far out
BENT = torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0])


class Bent(nn.Module):
    """An exact network, but for samples with bent=1: along their paths it turns faster than any grid looks."""

    def __init__(self):
        super().__init__()
        self.exact = ExactNet(TARGET, WIDE)

    def forward(self, x_t, t, bent):
        return self.exact(x_t, t) + bent[:, None].to(x_t) * (300 * x_t).sin()


def evaluate(x, bent, **options):
    return fs.probability_flow_log_prob(fs.ScoreDensity(Bent(), WIDE, "eps"), x, bent=fs.per_sample(bent), **options)


@pytest.fixture
def few_steps(monkeypatch):
    monkeypatch.setattr(flow_steps, "MAX_STEPS", 128)
    monkeypatch.setattr(probability_flow, "MAX_STEPS", 128)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_others_keep_their_numbers_and_each_says_what_it_reached(dtype, few_steps):
    x = X.to(dtype)
    with pytest.warns(UserWarning, match="is not reached") as raised:
        found = evaluate(x, BENT, error=0.01)
    assert len(raised) == 1
    assert raised[0].filename == __file__  # the caller's line
    message, known = str(raised[0].message), found.log_prob.isfinite()
    assert (found.discretization <= 0.01).tolist() == [True, True, False, False, False]
    assert known.tolist() == [True, True, True, True, False]
    worst = float(found.discretization[3])
    assert message == (
        "error=0.01 nats is not reached with 128 steps by 3 of 5 samples, sample 2 the first: "
        f"up to {worst:.2g} nats are left by their discretization; 1 do not settle, and their log_prob is NaN; "
        "give a larger error or float64 data, fit the density to data if it is not, or take method='midpoint' with "
        "more steps"
    )
    assert float(found.discretization[4]) == math.inf
    alone = evaluate(x[:2], BENT[:2], error=0.01)
    torch.testing.assert_close(found.log_prob[:2], alone.log_prob, rtol=1e-6, atol=1e-6)
    # On a grid eight times as fine, with 1/64 of the error; and the rounding of sums of thousands in float32.
    exact = evaluate(x.double(), BENT, method="midpoint", steps=1024).log_prob
    beyond = (found.log_prob.double() - exact).abs() - 8 * torch.finfo(dtype).eps * exact.abs()
    assert bool((beyond <= found.discretization.double())[known].all())


def test_it_is_refused_only_where_no_sample_has_a_number(few_steps):
    density = fs.ScoreDensity(Bent(), WIDE, "eps")
    with pytest.warns(UserWarning, match="by 2 of 2 samples, sample 0 the first"):
        found = fs.probability_flow_log_prob(density, X[:2], bent=fs.per_sample(BENT[:2]), error=1e-9)
    assert bool(found.log_prob.isfinite().all())
    with pytest.raises(ValueError, match="not reached with 128 steps by any of 1 samples, and no answer settles"):
        fs.probability_flow_log_prob(density, X[4:], bent=fs.per_sample(BENT[4:]))


def test_moves_tell_what_is_left():
    nan, inf = math.nan, math.inf
    rows = [  # the last move, the one before, the one before that, and what is left
        ((0.1, 0.3, 0.2), 0.1),
        ((0.3, 2.0, 9.0), 0.5),
        ((0.02, 0.03, 0.01), 0.03),
        ((0.03, 0.02, 7.0), 0.03),
        ((3.0, 12.0, 48.0), 3.0),
        ((3.0, 12.0, 20.0), inf),  # halved once
        ((3.0, 5.0, 20.0), inf),
        ((9.0, 3.0, 12.0), inf),
        ((nan, 0.1, 0.1), inf),
        ((0.1, nan, 0.1), inf),
        ((0.1, inf, inf), inf),
        ((0.1, 0.2, nan), 0.1),
    ]
    moves, expected = (torch.tensor(each) for each in zip(*rows))
    torch.testing.assert_close(flow_steps._left(*moves.unbind(1)), expected)


class Holes(nn.Module):
    """An exact network that returns NaN for data beyond 50 on its first axis, whatever the noise."""

    def __init__(self):
        super().__init__()
        self.exact = ExactNet(TARGET, WIDE, gain=0.9)

    def forward(self, x_t, t, far):
        return self.exact(x_t, t) * torch.where(far > 0, math.nan, 1.0)[:, None]


@pytest.mark.parametrize("options", [{"error": 1.0}, {"method": "midpoint", "steps": 16}], ids=["auto", "midpoint"])
@pytest.mark.parametrize("trace", ["exact", "hutchinson"])
def test_nan_for_one_sample_is_nan_for_that_sample_alone(options, trace, few_steps):
    options = options | {"trace": trace, "probes": 2 if trace == "hutchinson" else 1}
    net, x, far = Holes(), TARGET.sample(3, seed=2), torch.tensor([0.0, 1.0, 0.0])
    holes = fs.ScoreDensity(net, WIDE, "eps")
    x.requires_grad_()
    with pytest.warns(UserWarning, match=r"1 of 3 samples, sample 1 the first.*log_prob is NaN"):
        found = fs.probability_flow_log_prob(holes, x, far=far, **options)
    assert found.log_prob.isnan().tolist() == [False, True, False]
    assert bool(found.stderr[[0, 2]].isfinite().all())
    kept = found.log_prob[found.log_prob.isfinite()]
    got = torch.autograd.grad(kept.sum(), (x, net.exact.gain), retain_graph=True)
    others = x.detach()[[0, 2]].requires_grad_()
    # Of samples that are keyed anew, so by the exact trace alone.
    if trace == "exact":
        alone = fs.probability_flow_log_prob(holes, others, far=far[[0, 2]], **options).log_prob
        torch.testing.assert_close(kept, alone)
        of_x, of_gain = torch.autograd.grad(alone.sum(), (others, net.exact.gain))
        torch.testing.assert_close(got[0][[0, 2]], of_x)
        torch.testing.assert_close(got[1], of_gain)
    assert bool((got[0][1] == 0).all())
    assert all(bool(part.isfinite().all()) for part in got)
    of_x, of_gain = torch.autograd.grad(found.log_prob.sum(), (x, net.exact.gain))
    assert of_x.isnan().any(1).tolist() == [False, True, False]
    assert bool(of_gain.isnan())
    with pytest.raises(ValueError, match="the ODE gives NaN or inf for all of 1 samples"):
        fs.probability_flow_log_prob(holes, x[1:2], far=far[1:2], **options)


def test_gradients_are_those_of_numbers_above_the_error(monkeypatch):
    monkeypatch.setattr(flow_steps, "MAX_STEPS", 16)
    model, x = fs.ScoreDensity(ExactNet(TARGET, WIDE, gain=0.9), WIDE, "eps"), X[[0, 2]]

    def value(x):
        with pytest.warns(UserWarning, match="is not reached"):
            return fs.probability_flow_log_prob(model, x, error=1e-6)

    leaf = x.clone().requires_grad_()
    assert float(value(leaf).discretization.min()) > 0.01
    (found,) = torch.autograd.grad(value(leaf).log_prob.sum(), leaf)
    expected = torch.zeros_like(x)
    for i in range(2):
        step = torch.zeros_like(x)
        step[:, i] = 1e-5
        expected[:, i] = (value(x + step).log_prob - value(x - step).log_prob) / 2e-5
    # Central differences: third derivatives times 1e-10, and 1e-16 / 1e-5 of numbers up to 1e4.
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_the_result_is_one_readable_line(few_steps):
    density = fs.ScoreDensity(ExactNet(TARGET, WIDE), WIDE, "eps")
    found = fs.probability_flow_log_prob(density, X[:2], trace="hutchinson", probes=4)
    text = repr(found)
    assert text.startswith(f"FlowLogProb(2 samples, log_prob {float(found.log_prob.mean()):.4g} +- ")
    assert "stderr" not in text  # in two dimensions there are two probes, and both give the exact trace
    assert f"largest discretization about {float(found.discretization.max()):.2g}" in text
    assert "\n" not in text
    with pytest.warns(UserWarning, match="is not reached"):
        found = evaluate(X, BENT)
    assert repr(found).startswith("FlowLogProb(5 samples, 1 of them NaN, log_prob ")
    assert "nan" not in repr(found)
    gaussian = Target(torch.ones(1), torch.zeros(1, 2), torch.eye(2)[None])
    one = fs.ScoreDensity(ExactNet(gaussian, WIDE), WIDE, "eps")
    assert repr(fs.probability_flow_log_prob(one, torch.zeros(1, 2), method="midpoint", steps=1)).startswith(
        "FlowLogProb(1 samples, log_prob -1.838 nats, 3 evaluations per sample, discretization unknown, "
        "largest truncation about "
    )


def test_a_network_in_train_mode_is_told_of_by_the_ode_too():
    class Dropped(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.drop = torch.nn.Dropout(0.5)

        def forward(self, x, t):
            return self.drop(x)

    with pytest.warns(UserWarning, match=r"train mode and its layer 'drop' \(Dropout\)"):
        fs.probability_flow_log_prob(
            fs.ScoreDensity(Dropped(), fs.VP(), "eps"), torch.randn(2, 3), method="midpoint", steps=4
        )

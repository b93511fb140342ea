"""The probability-flow ODE against the densities that it has to reproduce."""

import importlib
import sys
from contextlib import nullcontext

import pytest
import torch
from analytic import PREDICTIONS, SCHEDULES, ExactNet, Target, mixture
from torch import nn

import fastscore as fs
from fastscore.densities import flow_field, flow_steps
from fastscore.densities.probability_flow import READ, probability_flow_log_prob

pytestmark = pytest.mark.usefixtures("one_thread")

CONTINUOUS = [name for name, schedule in SCHEDULES.items() if not schedule.discrete]
TARGET = mixture(2, components=3)
RANGE = fs.LogSNR(-8, 6)
TIGHT = dict(method="dopri5", rtol=1e-6, atol=1e-6)


def correlated(d=3):
    """A Gaussian whose Jacobian has off-diagonal elements, so that Hutchinson's probes have noise."""
    generator = torch.Generator().manual_seed(3)
    root = torch.randn(d, d, generator=generator)
    return Target(torch.ones(1), torch.randn(1, d, generator=generator), (root @ root.T / d + 0.1 * torch.eye(d))[None])


def split(gaussian, share=0.6):
    """A mixture of two with the mean and the covariance of a Gaussian, and a shape of its own."""
    variance, direction = gaussian.variance[0].clone(), gaussian.basis[0][:, -1]
    step = (share * variance[-1]).sqrt() * direction
    variance[-1] *= 1 - share
    mean = torch.stack([gaussian.mean[0] + step, gaussian.mean[0] - step])
    return fs.Reference(torch.ones(2) / 2, mean, variance.repeat(2, 1), gaussian.basis.repeat(2, 1, 1))


def matched(target, schedule, predicts="eps"):
    """The exact network, with a reference that has the target's mean and covariance and is not the target."""
    gaussian = fs.Reference(target.weight, target.mean, target.eigenvalue, target.basis).gaussian()
    return fs.ScoreDensity(ExactNet(target, schedule, predicts), schedule, predicts, reference=split(gaussian))


def at_clean_end(target, schedule):
    """The density where the ODE starts: the target convolved with the noise of the highest log-SNR."""
    variance = torch.exp(torch.tensor(-schedule.log_snr_range[1], dtype=torch.float64))
    return Target(target.weight, target.mean, target.cov + variance * torch.eye(target.mean.shape[1]).double())


@pytest.mark.parametrize("name", CONTINUOUS)
def test_exact_trace_gives_the_density_of_a_gaussian_on_every_schedule(name):
    target, schedule = correlated(2), SCHEDULES[name]
    x = target.sample(3, seed=2)
    found = probability_flow_log_prob(matched(target, schedule), x, method="dopri5")
    # The prior differs by fourth cumulants, of the order of the highest noise^-4 <= 1e-4; the rest is the solver's,
    # some hundred steps of 1e-5.
    assert torch.allclose(found.log_prob, at_clean_end(target, schedule).log_prob(x), atol=5e-4)
    assert float(found.stderr.abs().max()) == 0


def test_the_error_is_the_solvers():
    target = correlated(2)
    x = target.sample(3, seed=2)
    tight = probability_flow_log_prob(matched(target, RANGE), x, method="dopri5", rtol=1e-9, atol=1e-9)
    # Beside the solver's, the prior's error: fourth cumulants of order one at sigma = e^4.
    assert torch.allclose(tight.log_prob, at_clean_end(target, RANGE).log_prob(x), atol=2e-6)


def test_exact_trace_gives_the_density_of_a_mixture():
    schedule = SCHEDULES["edm"]
    x = TARGET.sample(4, seed=2)
    density = matched(TARGET, schedule)
    loose, tight = (probability_flow_log_prob(density, x, method="dopri5", rtol=t, atol=t) for t in (1e-4, 1e-7))
    exact = at_clean_end(TARGET, schedule).log_prob(x)
    # At the noisy end sigma / alpha is 80 at least, and the target differs from the reference with its mean and
    # covariance by third moments, of the order 80^-3; the rest is the solver's tolerance.
    assert torch.allclose(tight.log_prob, exact, atol=2e-5)
    assert float((tight.log_prob - exact).abs().max()) < float((loose.log_prob - exact).abs().max()) < 1e-2
    assert bool((loose.nfe < tight.nfe).all())


@pytest.mark.parametrize("name", CONTINUOUS)
def test_every_prediction_has_the_same_flow(name):
    x = TARGET.sample(4, seed=2)
    # One Runge-Kutta step over the whole range: no accuracy to speak of, but all see the same four points.
    found = [
        probability_flow_log_prob(matched(TARGET, SCHEDULES[name], predicts), x, method="rk4", steps=1).log_prob
        for predicts in PREDICTIONS
    ]
    # Rounding, 1e-16 times the factor exp(16 / 2) between data and noise at the clean end.
    assert all(torch.allclose(other, found[0], rtol=1e-11, atol=0) for other in found)


def test_the_network_is_asked_only_inside_the_schedules_range():
    class Recording(ExactNet):
        def forward(self, x_t, t):
            seen.append(float(t[0]))
            return super().forward(x_t, t)

    seen = []
    schedule = fs.VP()
    density = fs.ScoreDensity(Recording(TARGET, schedule), schedule, "eps")
    probability_flow_log_prob(density, TARGET.sample(2))
    # Times come from log-SNRs in float64.
    assert min(seen) > 1e-5 * (1 - 1e-6)
    assert max(seen) < 1 + 1e-9


def test_it_agrees_with_the_formula_for_an_exact_score():
    schedule = SCHEDULES["log-snr"]
    density, x = matched(TARGET, schedule), TARGET.sample(8, seed=5)
    flow, formula = probability_flow_log_prob(density, x, method="dopri5"), density.estimate(x, nfe=2048)
    # 4 standard errors of the formula; the solver's tolerance of 1e-5 over some hundred steps.
    assert bool(((flow.log_prob - formula.log_prob).abs() < 4 * formula.stderr + formula.truncation + 1e-3).all())


class Counting(nn.Module):
    """An image network with a label, whose calls are counted; exact for N(label, 1)."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x_t, t, label):
        self.calls += 1
        alpha, sigma = (v.to(x_t)[:, None, None, None] for v in RANGE.alpha_sigma(t))
        return sigma * (x_t - alpha * label.reshape(-1, 1, 1, 1))


@pytest.mark.parametrize(
    "options", [{"method": "dopri5"}, {"trace": "hutchinson", "probes": 3}, {"method": "rk4", "steps": 1}]
)
def test_nfe_is_the_number_of_calls_and_conditions_go_with_their_samples(options):
    net = Counting()
    x = torch.randn(4, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    label = torch.tensor([-1.0, 0.0, 0.5, 2.0], dtype=torch.float64)
    density = fs.ScoreDensity(net, RANGE, "eps")
    # Once, before it is counted: whether its graph is whole. Marked: what the sizes alone say is one more call.
    probability_flow_log_prob(density, x, method="midpoint", steps=1, label=fs.per_sample(label))
    net.calls = 0
    found = probability_flow_log_prob(density, x, **options, label=fs.per_sample(label))
    assert int(found.nfe.max()) == net.calls > 3
    if options.get("method") == "rk4":  # one step over the whole range: no accuracy to speak of
        return
    variance = 1 + torch.exp(torch.tensor(-6.0))
    exact = torch.distributions.Normal(label.reshape(-1, 1, 1, 1), variance.sqrt()).log_prob(x).flatten(1).sum(1)
    # The prior N(0, 1 + e^8) does not know the label: z label e^-4 with |z| < 4 a dimension, 4 of them.
    assert float((found.log_prob - exact).abs().max()) < 4 * 4 * 2 * 0.0184
    alone = probability_flow_log_prob(density, x[2:3], **TIGHT, label=label[2:3]).log_prob
    together = probability_flow_log_prob(density, x, **TIGHT, label=label).log_prob[2]
    # The batch shares its steps, so they agree to some steps of the tolerance.
    assert float(alone) == pytest.approx(float(together), abs=1e-4)


def test_float32_data_get_float32_answers_and_no_gradient_is_kept():
    x = TARGET.sample(4, seed=2).float()
    found = probability_flow_log_prob(matched(TARGET, RANGE), x)
    assert found.log_prob.dtype == found.stderr.dtype == torch.float32
    assert not found.log_prob.requires_grad
    exact = at_clean_end(TARGET, RANGE).log_prob(x)
    # float32 sums over some hundred steps at a tolerance of 1e-5; the prior's mismatch at sigma = e^4 is 1e-5.
    assert float((found.log_prob - exact).abs().max()) < 2e-3
    with torch.no_grad():
        assert torch.equal(probability_flow_log_prob(matched(TARGET, RANGE), x).log_prob, found.log_prob)


@pytest.mark.parametrize(
    ("d", "trace", "warns"), [(256, "exact", True), (255, "exact", False), (256, "hutchinson", False)]
)
def test_an_exact_trace_of_an_image_says_what_it_takes(d, trace, warns):
    density = fs.ScoreDensity(ExactNet(mixture(d), RANGE, "eps"), RANGE, "eps")
    with pytest.warns() if warns else nullcontext() as told:
        probability_flow_log_prob(density, torch.randn(1, d), trace=trace, method="midpoint", steps=1)
    if warns:
        (said,) = [str(warning.message) for warning in told]
        assert "takes 256 vector-Jacobian products of the network at every evaluation" in said
        assert 'trace="hutchinson", probes=8' in said


def test_what_cannot_work_gets_one_clear_error(monkeypatch):
    density, x = matched(TARGET, RANGE), TARGET.sample(2)
    with pytest.raises(ValueError, match="exact, hutchinson with probes >= 1; got 'skilling', probes=1"):
        probability_flow_log_prob(density, x, trace="skilling")
    with pytest.raises(ValueError, match="got 'hutchinson', probes=0"):
        probability_flow_log_prob(density, x, trace="hutchinson", probes=0)
    with pytest.raises(ValueError, match="NaN or inf in 1 of 2 samples"):
        probability_flow_log_prob(density, x * torch.tensor([[1.0], [torch.nan]]))
    monkeypatch.setitem(sys.modules, "torchdiffeq", None)
    with pytest.raises(ImportError, match=r"needs torchdiffeq: pip install torchdiffeq$"):
        probability_flow_log_prob(density, x, method="dopri5")


def test_the_midpoint_rule_converges_with_its_order_on_half_the_traces(monkeypatch):
    traces, vjp = [], flow_field.vjp
    monkeypatch.setattr(flow_field, "vjp", lambda *of, **how: (traces.append(1), vjp(*of, **how))[1])
    density, x = matched(TARGET, RANGE), TARGET.sample(20, seed=4)
    exact, error = probability_flow_log_prob(density, x, method="dopri5", rtol=1e-9, atol=1e-9).log_prob, {}
    for steps in (64, 128, 256):
        traces.clear()
        found = probability_flow_log_prob(density, x, method="midpoint", steps=steps)
        assert (found.nfe.tolist(), len(traces)) == ([2 * steps + 1] * 20, steps + 2)  # one at either end
        error[steps] = float((found.log_prob - exact).square().mean().sqrt())
    # Second order: a quarter of the error for twice the steps, up to the next order's share.
    assert error[64] / error[128] == pytest.approx(4, rel=0.2)
    assert error[128] / error[256] == pytest.approx(4, rel=0.1)


def test_what_the_reference_explains_is_exact_whatever_the_steps():
    target = correlated(4)
    gaussian = fs.Reference(target.weight, target.mean, target.eigenvalue, target.basis)
    density, x = fs.ScoreDensity(ExactNet(target, RANGE), RANGE, "eps", reference=gaussian), target.sample(50, seed=1)
    exact = at_clean_end(target, RANGE).log_prob(x)
    for options in ({}, {"trace": "hutchinson", "probes": 2}):
        found = probability_flow_log_prob(density, x, method="midpoint", steps=1, **options)
        # Rounding of float64 over one step, whatever the path and the signs.
        torch.testing.assert_close(found.log_prob, exact, rtol=0, atol=1e-10)
        assert float(found.stderr.max()) < 1e-10


FITTED = {"two parts": mixture(2, components=2), "five parts": mixture(8, components=5)}


@pytest.mark.parametrize("error", [0.3, 0.03, 0.003])
@pytest.mark.parametrize("name", FITTED)
def test_auto_stays_within_its_error_and_says_how_far(name, error):
    target, wide = FITTED[name], fs.LogSNR(-14, 16)
    density = fs.ScoreDensity(ExactNet(target, wide), wide, "eps")  # the default reference: the steps have work to do
    x = target.sample(200, seed=4)
    found = probability_flow_log_prob(density, x, error=error)
    actual = (found.log_prob - target.log_prob(x)).abs()
    prior = 3e-3  # the target's mean of about 3 against the reference's 0, times e^-7 and a normal number
    assert float((actual > error + prior).double().mean()) <= 0.01
    assert float((actual > found.discretization + prior).double().mean()) <= 0.02
    assert float(found.discretization.max()) <= error
    assert int(found.nfe.min()) >= 2 * (4 + 8 + 16)  # three grids at least: two may agree by chance


def test_auto_decides_sample_by_sample():
    density, x = matched(TARGET, RANGE), TARGET.sample(12, seed=4)
    found = probability_flow_log_prob(density, x, error=0.01)
    assert len(set(found.nfe.tolist())) > 1
    alone = [probability_flow_log_prob(density, one[None], error=0.01) for one in x]
    assert torch.equal(torch.cat([one.nfe for one in alone]), found.nfe)
    # Rounding: matrix products of another number of rows.
    torch.testing.assert_close(torch.cat([one.log_prob for one in alone]), found.log_prob, rtol=1e-12, atol=1e-12)


def test_auto_needs_no_other_package_and_says_where_it_does_not_get(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchdiffeq", None)
    density, x = matched(TARGET, RANGE), TARGET.sample(3, seed=4)
    assert bool(probability_flow_log_prob(density, x).log_prob.isfinite().all())
    monkeypatch.setattr(flow_steps, "MAX_STEPS", 16)
    with pytest.warns(UserWarning, match=r"error=1e-12 nats is not reached with \d+ steps by 3 of 3 samples, sample 0"):
        probability_flow_log_prob(density, x, error=1e-12)
    with pytest.raises(ValueError, match="error must be positive"):
        probability_flow_log_prob(density, x, error=0)


def test_steps_belong_to_a_fixed_grid():
    density, x = matched(TARGET, RANGE), TARGET.sample(2, seed=4)
    with pytest.raises(ValueError, match="steps=0"):
        probability_flow_log_prob(density, x, method="rk4", steps=0)
    for method in ("midpoint", "euler", "heun2", "heun3", "rk4", "explicit_adams", "implicit_adams", "fixed_adams"):
        with pytest.raises(ValueError, match=rf"method='{method}' has a fixed grid and needs steps=.*method='auto'"):
            probability_flow_log_prob(density, x, method=method)
    for method in ("auto", "dopri5", "adaptive_heun", "scipy_solver"):
        assert probability_flow_log_prob(density, x, method=method).log_prob.isfinite().all()


REFUSED = {
    "unknown": (dict(method="rk5"), r"method must be one of auto, midpoint, .*rk4.*dopri5.*scipy_solver; got 'rk5'"),
    "unknown, with steps": (dict(method="Midpoint", steps=8), "method must be one of .*; got 'Midpoint'"),
    "steps of auto": (
        dict(steps=8),
        r"'auto' does not read steps, got steps=8; leave it out \(it reads error\)",
    ),
    "steps of an adaptive one": (dict(method="dopri5", steps=1), "does not read steps.* does: midpoint, euler"),
    "steps of scipy": (dict(method="scipy_solver", steps=8), "does not read steps"),
    "error of a grid": (dict(method="midpoint", steps=8, error=0.1), "does not read error, .* does: auto"),
    "error of an adaptive one": (dict(method="dopri5", error=0.01), "does not read error, got error=0.01"),
    "rtol of auto": (dict(rtol=1e-6), "method='auto' does not read rtol, .* does: implicit_adams, fixed_adams, dopri8"),
    "atol of a grid": (dict(method="rk4", steps=8, atol=1e-6), "method='rk4' does not read atol"),
    "probes of the exact trace": (dict(probes=4), "trace='exact' has no probes, got probes=4; trace='hutchinson'"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_methods_are_named_and_options_that_they_do_not_read_refused(kind):
    options, message = REFUSED[kind]
    with pytest.raises(ValueError, match=message):
        probability_flow_log_prob(matched(TARGET, RANGE), TARGET.sample(2, seed=4), **options)


def test_the_methods_are_those_of_torchdiffeq():
    solvers = importlib.import_module("torchdiffeq._impl.odeint").SOLVERS
    assert set(READ) == {"auto", *solvers}


def test_a_network_that_vmap_cannot_batch_gives_the_same_trace():
    class Double(torch.autograd.Function):
        generate_vmap_rule = False

        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, grad):
            return 2 * grad if float(grad.abs().max()) >= 0 else grad  # reads the numbers: vmap refuses

    class Odd(ExactNet):
        def forward(self, x_t, t):
            return Double.apply(super().forward(x_t, t)) / 2

    target = correlated(3)
    density, x = matched(target, RANGE), target.sample(4, seed=4)
    odd = fs.ScoreDensity(Odd(target, RANGE), RANGE, "eps", reference=density.reference)
    found, expected = (probability_flow_log_prob(d, x, method="midpoint", steps=4) for d in (odd, density))
    torch.testing.assert_close(found.log_prob, expected.log_prob, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("options", [{}, {"trace": "hutchinson", "probes": 5}], ids=["exact", "hutchinson"])
@pytest.mark.parametrize("at_once", [1, 2])
def test_how_many_traces_run_at_once_changes_nothing(monkeypatch, options, at_once):
    target = correlated(3)
    density, x = matched(target, RANGE), target.sample(4, seed=4)
    expected = probability_flow_log_prob(density, x, method="midpoint", steps=4, **options)
    monkeypatch.setattr(flow_field, "COLUMNS", at_once)
    found = probability_flow_log_prob(density, x, method="midpoint", steps=4, **options)
    # Sums in another order; d = 3 and 5 probes, so that the last pass is narrower.
    torch.testing.assert_close(found.log_prob, expected.log_prob, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(found.stderr, expected.stderr, rtol=1e-9, atol=1e-11)


def test_numbers_that_are_none_and_counts_that_fit_nowhere_are_refused():
    density, x = fs.ScoreDensity(ExactNet(mixture(2), fs.VP()), fs.VP(), "eps"), torch.randn(3, 2)
    with pytest.raises(ValueError, match="the ODE gives NaN or inf for all of 3 samples"):
        probability_flow_log_prob(density, 1e30 * x, method="midpoint", steps=1)
    for options, message in (
        ({"method": "midpoint", "steps": 10**9}, "steps must be at most 131072, got 1000000000"),
        ({"method": "midpoint", "steps": 2.5}, "steps must be an integer, got 2.5"),
        ({"trace": "hutchinson", "probes": 10**9}, "probes must be at most 131072"),
    ):
        with pytest.raises(ValueError, match=message):
            probability_flow_log_prob(density, x, **options)


def test_a_grid_need_not_be_finer_than_the_probes_tell():
    """A tenth of their standard error is enough, where nobody asked for an error: 64 steps instead of some hundreds."""
    target, schedule = mixture(24), fs.VP()
    density = fs.ScoreDensity(ExactNet(target, schedule), schedule, "eps", program=False)
    x = target.sample(6, seed=3)
    found, strict = (
        fs.probability_flow_log_prob(density, x, trace="hutchinson", probes=4, **options)
        for options in ({}, {"error": 0.01})
    )
    assert bool((found.discretization <= (found.stderr / 10).clamp(min=0.01)).all())
    assert float(found.discretization.max()) > 0.01
    assert bool((strict.discretization <= 0.01).all())
    assert int(found.nfe.sum()) < int(strict.nfe.sum()) / 2
    assert bool(((found.log_prob - strict.log_prob).abs() <= found.stderr / 10 + 0.01).all())

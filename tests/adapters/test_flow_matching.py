"""flow_matching: its own paths, schedulers, model wrapper and likelihood."""

import math

import pytest
import torch
from adapters.exact import TARGET, assert_exact, column, exact, near, noised, relative
from torch import nn
from torch.distributions import Independent, Normal

from fastscore.adapters import from_flow_matching, from_model
from fastscore.process.predictions import coefficients

path = pytest.importorskip("flow_matching.path")
schedulers = pytest.importorskip("flow_matching.path.scheduler")
solver = pytest.importorskip("flow_matching.solver")
ModelWrapper = pytest.importorskip("flow_matching.utils").ModelWrapper

SCHEDULERS = {
    "CondOT": schedulers.CondOTScheduler,
    "Polynomial": lambda: schedulers.PolynomialConvexScheduler(2.0),
    "VP": schedulers.VPScheduler,
    "LinearVP": schedulers.LinearVPScheduler,
    "Cosine": schedulers.CosineScheduler,
}


class Velocity(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(6, 4)

    def forward(self, x, t, label):
        return self.layer(torch.cat([x, t[:, None], label[:, None]], 1))


class Exact(nn.Module):
    """The target's exact model of a path: velocity, data (x_1) or noise (x_0)."""

    def __init__(self, scheduler, predicts="flow"):
        super().__init__()
        self.scheduler, self.predicts = scheduler, predicts

    def forward(self, x, t):
        at = self.scheduler(t.double().clamp(max=1 - 1e-9))  # at t = 1 sigma is zero
        eps, x0 = exact(x, at.alpha_t, at.sigma_t)
        if self.predicts == "flow":
            return column(at.d_alpha_t, x0) * x0 + column(at.d_sigma_t, eps) * eps
        return {"x0": x0, "eps": eps}[self.predicts]


def test_outputs_are_those_of_the_wrapper():
    model = ModelWrapper(Velocity())
    density = from_flow_matching(model)
    x, t, label = torch.randn(3, 4), torch.tensor([0.1, 0.5, 0.9]), torch.tensor([0.0, 1.0, 2.0])
    assert torch.equal(density.model(x, t, label=label), model(x, t, label=label))
    found = density.estimate(x, nfe=16, label=label).log_prob
    assert float((found - density.estimate(x, nfe=16, label=label + 1).log_prob).abs().min()) > 1e-3


@pytest.mark.parametrize("name", SCHEDULERS)
def test_samples_and_velocities_are_those_of_the_path(name):
    scheduler = SCHEDULERS[name]()
    own = path.AffineProbPath(scheduler)
    density = from_flow_matching(nn.Identity(), None if name == "CondOT" else scheduler)
    t = torch.linspace(0.01, 0.99, 12, dtype=torch.float64)
    x, eps, x_t = noised(density.schedule, t)
    sample = own.sample(t=t, x_0=eps, x_1=x)
    assert relative(x_t, sample.x_t) < 1e-6
    a, b, _ = (column(v, x) for v in coefficients("flow", density.schedule, t))
    assert relative(a * eps + b * x, sample.dx_t) < 1e-6
    ends = torch.tensor([-12.0, 1.0, 14.0], dtype=torch.float64)
    assert relative(density.schedule.log_snr(density.schedule.time(ends)), ends) < 1e-6


@pytest.mark.parametrize("name", SCHEDULERS)
def test_no_model_is_asked_outside_of_its_times(name):
    """A variance-preserving path has an end at t = 0, at log-SNR -10.05; its model was asked at t = -0.18."""
    schedule = from_flow_matching(nn.Identity(), SCHEDULERS[name](), "eps").schedule
    ends = schedule.range_for(1e-4, 1e4)
    times = schedule.time(torch.tensor(ends, dtype=torch.float64))
    assert float(times.min()) >= -1e-9  # the inverse of an end rounds
    assert float(times.max()) <= 1 + 1e-9
    assert ends[0] == pytest.approx(-10.05 if name == "VP" else -14 - 2 * math.log(1e4), abs=1e-3)
    assert ends[1] == pytest.approx(16 - 2 * math.log(1e-4), abs=1e-3)


@pytest.mark.parametrize("predicts", ["flow", "x0", "eps"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_log_prob_of_an_exact_model(name, predicts):
    scheduler = SCHEDULERS[name]()
    density = from_flow_matching(
        ModelWrapper(Exact(scheduler, predicts)), None if name == "CondOT" else scheduler, predicts, program=False
    )
    assert_exact(density)


def test_likelihood_of_the_librarys_own_ode():
    scheduler = schedulers.CondOTScheduler()
    model = ModelWrapper(Exact(scheduler))
    density = from_flow_matching(model, program=False)
    density.reference = near()
    x = TARGET.sample(16, seed=2)
    source = Independent(Normal(torch.zeros(4).double(), 1.0), 1)
    _, own = solver.ODESolver(model).compute_likelihood(
        x, source.log_prob, step_size=None, method="dopri5", exact_divergence=True, atol=1e-5, rtol=1e-5
    )
    found = density.estimate(x, nfe=512)
    # The library's solver is accurate to a few hundredths of a nat at these tolerances.
    assert float((own - TARGET.log_prob(x)).abs().max()) < 0.03
    assert bool(((found.log_prob - own).abs() < 4 * found.stderr + 0.03 + found.truncation).all())


@pytest.mark.parametrize("make", [from_flow_matching, from_model])
def test_solvers_whose_paths_have_no_density_are_refused(make):
    net = nn.Linear(2, 2)
    riemannian = solver.RiemannianODESolver.__new__(solver.RiemannianODESolver)
    nn.Module.__init__(riemannian)
    riemannian.velocity_model = net
    for other in (riemannian, solver.MixtureDiscreteEulerSolver(net, path=None, vocabulary_size=3)):
        with pytest.raises(
            ValueError, match=f"a velocity in flat space, or an ODESolver of one, got {type(other).__name__}"
        ):
            make(other)
    assert make(solver.ODESolver(net)).model is net


def test_bad_input_is_explained():
    with pytest.raises(TypeError, match=r"model must be a torch module.*wrap the function in a Module"):
        from_flow_matching(lambda x, t: x)
    with pytest.raises(ValueError, match="predicts must be one of flow, x0, eps, got 'velocity'"):
        from_flow_matching(nn.Identity(), predicts="velocity")
    with pytest.raises(TypeError, match=r"AffineProbPath without __call__, snr_inverse; give path.scheduler"):
        from_flow_matching(nn.Identity(), path.AffineProbPath(schedulers.CosineScheduler()))

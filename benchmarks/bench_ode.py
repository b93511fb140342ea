"""fastscore beside the probability-flow ODE on densities known exactly: error, evaluations, seconds.

The peer is the ODE solver of flow_matching (dopri5 with the exact trace) on the velocity of the same exact network.
"""

import time

import pytest
import torch
from analytic import ExactNet, mixture

import fastscore as fs

POINTS = 100
SCHEDULE = fs.FlowMatching(data_at=1)


class Counted(torch.nn.Module):
    """A network that counts its calls."""

    def __init__(self, net):
        super().__init__()
        self.net, self.calls = net, 0

    def forward(self, *args, **kwargs):
        self.calls += 1
        return self.net(*args, **kwargs)


def flow_matching_log_prob(net, x):
    """Return the peer's log-density, nats, shape (B,); its prior at t = 0 is N(0, I)."""
    from flow_matching.solver import ODESolver

    solver = ODESolver(velocity_model=lambda x, t: net(x, t.expand(len(x)).clamp(*SCHEDULE.time_range[::-1])))
    prior = torch.distributions.Independent(torch.distributions.Normal(torch.zeros_like(x[0]), 1.0), 1)
    options = {"method": "dopri5", "step_size": None, "exact_divergence": True, "atol": 1e-5, "rtol": 1e-5}
    return solver.compute_likelihood(x_1=x, log_p0=prior.log_prob, **options)[1]


def ways(density, target):
    """Return every method as a function from data to log-densities."""
    fitted = fs.ScoreDensity(density.model, SCHEDULE, "flow").fit(target.sample(4000, seed=5), progress=False)
    density.model.calls = 0
    return {
        "fastscore, fitted, nfe = 256": lambda x: fitted.estimate(x, nfe=256).log_prob,
        "fastscore ODE, exact trace": lambda x: fs.probability_flow_log_prob(density, x).log_prob,
        "fastscore ODE, Hutchinson, 1 probe": lambda x: (
            fs.probability_flow_log_prob(density, x, trace="hutchinson").log_prob
        ),
        "flow_matching, dopri5, exact trace": lambda x: flow_matching_log_prob(density.model, x),
    }


@pytest.mark.parametrize("d", [2, 16])
def test_ode(benchmark, table, d):
    target = mixture(d)
    density = fs.ScoreDensity(Counted(ExactNet(target, SCHEDULE, "flow")), SCHEDULE, "flow")
    x = target.sample(POINTS, seed=17)
    exact, rows = target.log_prob(x), []
    for name, log_prob in ways(density, target).items():
        density.model.calls = 0
        start = time.perf_counter()
        error = log_prob(x) - exact
        seconds, calls = time.perf_counter() - start, density.model.calls
        forward = 256 if "fitted" in name else calls
        vjps = {"fitted": 0, "Hutch": 1}.get("fitted" if "fitted" in name else "Hutch" if "Hutch" in name else "", d)
        row = {"target": f"mixture of 5, d = {d}", "method": name, "rmse, nats": float(error.square().mean().sqrt())}
        rows.append(row | {"forward passes": forward, "backward passes": forward * vjps, "seconds": seconds})
        table("ode", rows[-1])
    # The ODE with an exact trace is exact to its tolerance; otherwise the comparison is of something else.
    assert rows[1]["rmse, nats"] < 0.01
    assert rows[3]["rmse, nats"] < 0.05
    benchmark.extra_info["rows"] = rows
    benchmark.pedantic(lambda: density.estimate(x, nfe=256), rounds=3)

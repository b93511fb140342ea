"""Seconds and network passes that every method needs to reach a given error, on densities known exactly.

All methods see the same points, the same exact network in float32 and one thread; `race.py` says how they climb,
`peers/` how each is called. On the learned network only the methods that compute the formula compete: the ODE's number
is another one there, the density of the deterministic sampler.
"""

import importlib
import importlib.util

import pytest
import torch
from analytic import Target
from race import race
from race_targets import digits_problem, exact_problem, five, spirals

import fastscore as fs

pytestmark = pytest.mark.usefixtures("one_thread")

PEERS = {
    "formula": "fastscore",
    "fastscore_ode": "fastscore",
    "flow_matching_ode": "flow_matching",
    "score_sde_ode": "torchdiffeq",
    "sbi_ode": "sbi",
    "zuko_ode": "zuko",
    "score_models_ode": "score_models",
    "monai_bound": "monai",
}
ERRORS = (0.5, 0.1, 0.02, 0.01)  # nats
TARGETS = {
    "mixture of 5, d = 2": lambda name: exact_problem(name, five(2), 128, ERRORS),
    "mixture of 5, d = 16": lambda name: exact_problem(name, five(16), 128, ERRORS),
    "mixture of 5, d = 64": lambda name: exact_problem(name, five(64), 128, ERRORS),
    "mixture of 5, d = 784": lambda name: exact_problem(name, five(784), 16, ERRORS, fit_evaluations=40_000),
    "two spirals, d = 2": lambda name: exact_problem(name, spirals(), 128, ERRORS),
    "digits, learned, d = 64": lambda name: digits_problem(32, 16_384),
}
FASTSCORE = "fastscore"


@pytest.mark.parametrize("name", TARGETS)
def test_race(benchmark, table, name):
    problem = TARGETS[name](name)
    methods = []
    for module, package in PEERS.items():
        if importlib.util.find_spec(package) is None:
            table("race", row_without(problem, package))
            continue
        methods += importlib.import_module(f"peers.{module}").methods(problem)
    check_network(problem)
    check(problem, methods[0])
    climbs = race(problem, methods)
    for climb in climbs:
        table("race", row(problem, climb))
    best = [comparison(problem, climbs, threshold) for threshold in problem.thresholds]
    for line in best:
        table("race_best", line)
    benchmark.extra_info.update(name=name, best=best)
    fitted, nfe = methods[0], (climbs[0].first(problem.thresholds[0]) or climbs[0].rungs[-1]).effort
    benchmark.pedantic(lambda: fitted.run(problem.x, nfe, 0), rounds=3)


def check_network(problem):
    """Assert that the exact network and density are those of tests/analytic.py, which was written apart from them."""
    own = problem.target
    if own is None or own.d > 64:  # the other keeps full covariances
        return
    cov = own.std**2 * torch.eye(own.d, dtype=torch.float64).expand(len(own.weight), -1, -1)
    other, x = Target(own.weight, own.mean, cov), problem.x
    torch.testing.assert_close(problem.truth, other.log_prob(x), rtol=1e-9, atol=1e-8)
    for log_snr in (-10.0, 0.0, 3.0, 12.0):
        alpha, sigma = (v.float() for v in fs.LogSNR(-14, 16).alpha_sigma(torch.full((len(x), 1), log_snr).double()))
        eps, x0 = own.denoised(x, alpha, sigma)
        exact = other.denoised(x.double(), alpha[:, 0].double(), sigma[:, 0].double())
        # Rounding of logits of some hundreds, times the distance between components.
        torch.testing.assert_close(x0.double(), exact, rtol=0, atol=2e-4)
        torch.testing.assert_close((alpha * x0 + sigma * eps).double(), x.double(), rtol=0, atol=2e-5)


def check(problem, fitted):
    """Assert that what is about to be timed is right: the error of an estimate is what its network allows."""
    few, many = (fitted.run(problem.x, nfe, 0).log_prob.double() - problem.truth for nfe in (32, 512))
    assert float(many.abs().median()) < 0.6 * float(few.abs().median())  # 1/4 for independent noise, less for Sobol's
    assert abs(float(many.mean())) < 5 * float(many.std()) / len(many) ** 0.5 + 0.01  # no bias


def row(problem, climb):
    """Return a line of the table of all methods; its rungs go to the picture."""
    line = {"target": problem.name, "method": climb.method.name}
    for error in ERRORS:
        line[f"{error} nats"] = cell(problem, climb, error) if problem.target else ""
    line["0.01 bits/dim"] = "" if problem.target else cell(problem, climb, problem.thresholds[0])
    least = min((rung.rmse for rung in climb.rungs), default=None)
    line |= {
        "least error": least,
        "stopped": climb.stopped,
        "fit, s": climb.method.fit or None,
    }
    return line | {"rungs": [vars(rung) for rung in climb.rungs]}


def cell(problem, climb, threshold):
    """Forward + backward passes a sample and seconds for all points at the least effort that reaches a threshold."""
    if threshold not in problem.thresholds:
        return ""
    rung = climb.first(threshold)
    if rung is None:
        return "not reached"
    passes = f"{rung.forward:.0f}" + (f" + {rung.backward:.0f}" if rung.backward else "")
    return f"{passes}, {rung.seconds:.3g} s"


def row_without(problem, package):
    """Return the line of a peer that is not installed."""
    titles = ["target", "method", *(f"{e} nats" for e in ERRORS), "0.01 bits/dim", "least error", "stopped", "fit, s"]
    values = dict.fromkeys(titles) | {"target": problem.name, "method": package, "stopped": "not installed"}
    return values | {"rungs": []}


def comparison(problem, climbs, threshold):
    """Return fastscore's fastest way to a threshold beside the fastest peer's and the plain formula's evaluations."""
    ways = [(climb, climb.first(threshold)) for climb in climbs]
    plain, plain_rung = next(way for way in ways if way[0].method.name == "plain formula")
    ours, peers = ([w for w in ways if w[1] and w[0].method.name.startswith(FASTSCORE) is own] for own in (True, False))
    line = {"target": problem.name, "error, nats": threshold}
    line |= dict.fromkeys(["fastscore", "s", "best peer", "peer's s", "peer / fastscore", "plain nfe / fitted nfe"])
    line |= dict.fromkeys(["fit, s", "samples until the fit is paid"])
    fitted, fitted_rung = ways[0]
    if fitted_rung:
        more = ">" * (plain_rung is None)
        line["plain nfe / fitted nfe"] = f"{more}{(plain_rung or plain.rungs[-1]).forward / fitted_rung.forward:.3g}"
        line["fit, s"] = fitted.method.fit
    if ours:
        climb, rung = min(ours, key=lambda way: way[1].seconds)
        line |= {"fastscore": climb.method.name, "s": rung.seconds}
    if peers:
        climb, rung = min(peers, key=lambda way: way[1].seconds)
        line |= {"best peer": climb.method.name, "peer's s": rung.seconds}
        if fitted_rung and rung.seconds > fitted_rung.seconds:
            saved = (rung.seconds - fitted_rung.seconds) / len(problem.x)
            line["samples until the fit is paid"] = round(fitted.method.fit / saved)
    if ours and peers:
        line["peer / fastscore"] = f"{rung.seconds / line['s']:.3g}"
    elif ours and problem.target:
        # What is known of every peer: the one that ran shortest without reaching it bounds the ratio, if it ran longer.
        known = min(c.seconds_without(threshold) for c in climbs if not c.method.name.startswith(FASTSCORE))
        line |= {"best peer": "none", "peer / fastscore": f">{known / line['s']:.3g}" if known > line["s"] else None}
    return line

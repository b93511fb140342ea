"""Hutchinson's trace of the ODE's density: its probes, and the error that they state."""

import pytest
import torch
from analytic import ExactNet, Target, mixture
from test_probability_flow import RANGE, correlated, matched

import fastscore as fs
from fastscore.densities import flow_field
from fastscore.densities.probability_flow import probability_flow_log_prob

pytestmark = pytest.mark.usefixtures("one_thread")

WIDER = {4: 3.182 / 1.96, 16: 2.131 / 1.96}  # Student's t over the normal quantile, by the number of probes


def test_hutchinson_is_unbiased_within_its_standard_error():
    target, count = correlated(6), 200
    density, x = matched(target, RANGE), target.sample(count, seed=1)
    exact = probability_flow_log_prob(density, x, method="midpoint", steps=64).log_prob
    found = probability_flow_log_prob(density, x, trace="hutchinson", probes=16, method="midpoint", steps=64)
    assert float(found.stderr.mean()) > 0.03  # not the rounding of two equal paths
    error, expected = found.log_prob - exact, (found.stderr / WIDER[16]).square().mean()
    assert abs(float(error.mean())) < 4 * float(expected / count) ** 0.5
    # A mean of 200 squares is known to sqrt(2 / 200): 4 of them. (Ratios a sample have heavy tails: few sign patterns.)
    assert float(error.square().mean() / expected) == pytest.approx(1, abs=0.4)


@pytest.mark.parametrize(("d", "probes"), [(2, 2), (2, 3), (3, 2), (4, 2), (4, 4), (4, 8), (6, 3)])
def test_few_probes_in_few_dimensions_say_how_far_they_are_off(d, probes):
    target = mixture(d)
    density, x = fs.ScoreDensity(ExactNet(target, fs.VP()), fs.VP(), "eps"), target.sample(100, seed=1)
    options = {"method": "midpoint", "steps": 8}
    exact = probability_flow_log_prob(density, x, **options).log_prob
    found = probability_flow_log_prob(density, x, trace="hutchinson", probes=probes, seed=3, **options)
    error = (found.log_prob - exact).abs()
    every = probes >= 2 ** (d - 1)
    assert bool((found.stderr == 0).all()) == every  # it was so for half of the samples of two probes in two dimensions
    # 100 intervals: 95 % less 4 standard errors of 2.2 %. Two probes covered 49 % and 53 %.
    assert float((error <= 1.96 * found.stderr + 1e-9).double().mean()) >= 0.86
    assert not every or float(error.max()) < 1e-9


def test_as_many_probes_as_there_are_may_repeat_in_more_dimensions(monkeypatch):
    """Drawn with repetition they are not all of them, and have an error."""
    monkeypatch.setattr(flow_field, "FEW_DIM", 3)
    target = correlated(4)
    density, x = matched(target, RANGE), target.sample(20, seed=1)
    found = probability_flow_log_prob(density, x, trace="hutchinson", probes=8, method="midpoint", steps=4)
    assert float((found.stderr > 0).double().mean()) > 0.9


def test_hutchinson_error_falls_with_the_probes_and_seeds_differ():
    target = correlated(8)
    density, x = matched(target, RANGE), target.sample(50, seed=1)

    def run(**options):
        return probability_flow_log_prob(density, x, trace="hutchinson", method="midpoint", steps=32, **options)

    few, many = run(probes=4), run(probes=16)
    # Half the error. A standard deviation from 4 probes is known to 41 %, its mean over 50 samples to 6 %, and is
    # 8 % too small on average: 4 standard errors.
    ratio = float(many.stderr.mean() / few.stderr.mean()) * WIDER[4] / WIDER[16]
    assert ratio == pytest.approx(0.5 / 0.92, rel=4 * 0.06)
    assert torch.equal(run(probes=4).log_prob, few.log_prob)
    assert not torch.allclose(run(probes=4, seed=1).log_prob, few.log_prob, atol=1e-2)


def test_hutchinson_needs_no_luck_where_the_jacobian_is_diagonal():
    target = Target(torch.ones(1), torch.tensor([[0.3, -1.0, 0.5]]), torch.diag(torch.tensor([0.2, 1.0, 3.0]))[None])
    density, x = matched(target, RANGE), target.sample(5)
    exact, found = (
        probability_flow_log_prob(density, x, method="dopri5", **options)
        for options in ({}, {"trace": "hutchinson", "probes": 2})
    )
    # Signs square to one: v J v is the trace itself, on a path that differs by the solver's tolerance.
    assert torch.allclose(found.log_prob, exact.log_prob, atol=1e-3)
    assert float(found.stderr.max()) < 1e-6


def test_a_closer_reference_takes_the_noise_out_of_the_probes():
    target = correlated(6)
    x, options = target.sample(50, seed=1), dict(trace="hutchinson", probes=4, method="midpoint", steps=32)
    far = fs.ScoreDensity(ExactNet(target, RANGE), RANGE, "eps", reference=fs.Reference.isotropic())
    near, far = (probability_flow_log_prob(d, x, **options).stderr for d in (matched(target, RANGE), far))
    # The two share the target's covariance; noise comes from what is left of the Jacobian off its diagonal.
    assert float(near.mean()) < 0.2 * float(far.mean())


def test_one_probe_has_no_error_and_says_so():
    density, x = matched(correlated(), RANGE), correlated().sample(2)
    for probes in (1, 2):
        options = dict(trace="hutchinson", method="midpoint", steps=4, probes=probes)
        found = probability_flow_log_prob(density, x, **options)
        assert bool(found.stderr.isnan().all()) == (probes == 1)
        assert ("no stderr from one probe, probes=2 or more give one" in repr(found)) == (probes == 1)

"""Data of another scale than those of the fit are warned of; outliers, and a density without a fit, are not."""

import dataclasses
import warnings

import pytest
import torch
from analytic import ExactNet, mixture

import fastscore as fs
from fastscore.estimator.degenerate import are_far
from fastscore.estimator.faults import Faults

TARGET, SCHEDULE = mixture(4), fs.VP()


class Shrinks(torch.nn.Module):
    def forward(self, x_t, t):
        return 0.3 * x_t


def fitted(kind="auto"):
    density = fs.ScoreDensity(ExactNet(TARGET, SCHEDULE), SCHEDULE, "eps")
    return density.fit(TARGET.sample(300, seed=1), reference=kind, evaluations=0, progress=False)


@pytest.mark.parametrize("kind", ["auto", "diagonal", "full", "mixture"])
def test_images_of_levels_are_far_from_a_fit_to_scaled_ones(kind):
    density, x = fitted(kind), TARGET.sample(30, seed=2)
    with pytest.warns(
        UserWarning, match=r"most samples are \d+ standard deviations of the fitted reference from its mean"
    ):
        density.estimate(127.5 * (x + 1), nfe=16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        density.estimate(127.5 * (x + 1), nfe=16)  # is said once


FAR = r"most samples are \d+ standard deviations of the fitted reference from its mean"
CALLS = {
    "estimate": lambda density, x: density.estimate(x, nfe=16),
    "log_prob": lambda density, x: density.log_prob(x, nfe=16),
    "compare": lambda density, x: density.compare(x, {}, {}, nfe=16),
    "the ODE": lambda density, x: fs.probability_flow_log_prob(density, x, method="midpoint", steps=2),
    "a replayed shape": lambda density, x: fs.CapturedDensity(density, x, nfe=16),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_call_with_other_data_is_warned_of_though_one_with_good_data_came_before(call):
    density, x = fitted(), TARGET.sample(30, seed=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        density.estimate(x, nfe=16)
    with pytest.warns(UserWarning, match=FAR):
        call(density, 127.5 * (x + 1))


def test_on_a_device_it_is_said_when_a_number_is_read():
    density, x = fitted(), TARGET.sample(30, seed=2)
    samples = density.check(x, None, {})
    far = dataclasses.replace(samples, x=255 * samples.x)
    assert (are_far(samples, density.reference), are_far(far, density.reference)) == (False, True)
    curve_sum = density.estimate(x, nfe=16).curve_sum
    faults = Faults.joined([Faults(each, torch.zeros(30), curve_sum, density.reference) for each in (samples, far)])
    with pytest.warns(UserWarning, match=FAR):
        faults.tell()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        faults.tell()


def test_data_with_axes_in_another_order_than_in_fit_are_refused():
    density = fs.ScoreDensity(Shrinks(), SCHEDULE, "eps").fit(
        torch.randn(30, 3, 2, 4), evaluations=1000, progress=False
    )
    density.estimate(torch.randn(5, 3, 2, 4), nfe=16)
    density.estimate(torch.randn(5, 24), nfe=16)  # the same order, flat
    said = r"x has shape \(2, 4, 3\) a sample and fit saw \(3, 2, 4\).* permute x, or fit"
    for each in (density, density.with_reference(density.reference)):
        with pytest.raises(ValueError, match=said):
            each.estimate(torch.randn(5, 2, 4, 3), nfe=16)


def test_outliers_and_unfitted_densities_are_not_warned_of():
    x = TARGET.sample(30, seed=2)
    x[:14] *= 1e4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fitted().estimate(x, nfe=16)
        fs.ScoreDensity(ExactNet(TARGET, SCHEDULE), SCHEDULE, "eps").estimate(255 * x, nfe=16)

"""Data of another scale than those of the fit are warned of; outliers, and a density without a fit, are not."""

import warnings

import pytest
from analytic import ExactNet, mixture

import fastscore as fs

TARGET, SCHEDULE = mixture(4), fs.VP()


def fitted(kind="auto"):
    density = fs.ScoreDensity(ExactNet(TARGET, SCHEDULE), SCHEDULE, "eps")
    return density.fit(TARGET.sample(300, seed=1), reference=kind, evaluations=1000, progress=False)


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


def test_outliers_and_unfitted_densities_are_not_warned_of():
    x = TARGET.sample(30, seed=2)
    x[:14] *= 1e4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fitted().estimate(x, nfe=16)
        fs.ScoreDensity(ExactNet(TARGET, SCHEDULE), SCHEDULE, "eps").estimate(255 * x, nfe=16)

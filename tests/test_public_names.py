"""What people find on a density is what they call: how the package plans a call is kept elsewhere."""

import pytest
from torch import nn

import fastscore as fs
from fastscore.estimator.network_density import network_of
from fastscore.runs import evaluate_dataset

DENSITIES = {
    "ScoreDensity": lambda: fs.ScoreDensity(nn.Identity(), fs.VP(), "eps"),
    "Transformed": lambda: fs.Transformed(fs.ScoreDensity(nn.Identity(), fs.VP(), "eps"), fs.transforms.zscore(0, 2)),
    "ZeroMeanDensity": lambda: fs.ZeroMeanDensity(nn.Identity(), fs.VP(), "eps"),
}


@pytest.mark.parametrize("name", DENSITIES)
def test_a_density_shows_no_plan_and_no_network_with_its_parts(name):
    density = DENSITIES[name]()
    assert not {"network", "prepare"} & set(dir(density))
    assert network_of(density.core).model is density.model


def test_every_name_of_the_package_is_there():
    assert [name for name in fs.__all__ if name not in dir(fs) or not hasattr(fs, name)] == []
    assert fs.evaluate_dataset is evaluate_dataset
    with pytest.raises(AttributeError, match="module 'fastscore' has no attribute 'estimate_dataset'"):
        _ = fs.estimate_dataset

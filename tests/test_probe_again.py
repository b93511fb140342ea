"""Rows are asked with different conditions, by the ODE and classifiers too, and again when a switch has changed."""

import warnings

import pytest
import torch
from test_probe import SCHEDULE, Net

import fastscore as fs
from fastscore.estimator.probe import NetworkWarning


@pytest.mark.parametrize(
    "labels", [[0, 1, 1, 0, 1, 0], [0, 0, 0, 0, 0, 1], [2, 0, 2, 2, 2, 2]], ids=["ends alike", "last", "second"]
)
def test_two_samples_with_other_conditions_are_asked_wherever_they_are(labels):
    density = fs.ScoreDensity(Net("first label"), SCHEDULE, "eps")
    with pytest.warns(NetworkWarning, match="the condition of the first row alone"):
        density.estimate(torch.randn(6, 3), nfe=8, y=fs.per_sample(torch.tensor(labels)))


def test_rows_are_asked_once_more_when_their_conditions_differ():
    net = Net("first label")
    density, x = fs.ScoreDensity(net, SCHEDULE, "eps"), torch.randn(6, 3)
    one, other = (fs.per_sample(torch.tensor([0] * 5 + [last])) for last in (0, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error", NetworkWarning)
        density.estimate(x, nfe=8, y=one)
        density.estimate(x, nfe=8, y=one)
    with pytest.warns(NetworkWarning, match="the condition of the first row alone"):
        density.estimate(x, nfe=8, y=other)
    calls = len(net.rows)
    density.estimate(x, nfe=8, y=other)
    assert len(net.rows) == calls + 1


@pytest.mark.parametrize("count", [1, 6])
def test_a_classifier_asks_rows_of_different_classes(count):
    classifier = fs.DiffusionClassifier(fs.ScoreDensity(Net("first label"), SCHEDULE, "eps"), {"y": torch.arange(3)})
    with pytest.warns(NetworkWarning, match="the condition of the first row alone"):
        classifier.classify(torch.randn(count, 3), nfe=32)


@pytest.mark.parametrize("wrong", ["a weak mean", "first label"])
@pytest.mark.parametrize(
    "options",
    [pytest.param({"method": "auto"}, marks=pytest.mark.long), {"method": "midpoint", "steps": 4}],
    ids=["auto", "midpoint"],
)
def test_the_ode_asks_too(wrong, options):
    density, x, y = fs.ScoreDensity(Net(wrong), SCHEDULE, "eps"), torch.randn(6, 3), torch.arange(6)
    with pytest.warns(NetworkWarning, match="first row alone" if wrong == "first label" else "see each other"):
        fs.probability_flow_log_prob(density, x, y=y, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error", NetworkWarning)
        fs.probability_flow_log_prob(density, x, y=y, **options)


@pytest.mark.parametrize("wrong", ["first time", "largest time", "smallest time"])
def test_the_ode_has_one_time_a_batch(wrong):
    density, x = fs.ScoreDensity(Net(wrong), SCHEDULE, "eps"), torch.randn(6, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error", NetworkWarning)
        fs.probability_flow_log_prob(density, x, method="midpoint", steps=4)
    with pytest.warns(NetworkWarning):
        density.estimate(x, nfe=8)


def test_what_an_estimate_has_asked_the_ode_does_not_ask_again():
    net = Net("a weak mean")
    density, x = fs.ScoreDensity(net, SCHEDULE, "eps", program=False), torch.randn(6, 3)
    with pytest.warns(NetworkWarning, match="see each other"):
        density.estimate(x, nfe=8)
    with warnings.catch_warnings():
        warnings.simplefilter("error", NetworkWarning)
        fs.probability_flow_log_prob(density, x, method="midpoint", steps=4)


def test_a_network_is_asked_again_when_a_switch_of_it_has_changed():
    net = Net("nothing")
    density, x, y = fs.ScoreDensity(net, SCHEDULE, "eps"), torch.randn(6, 3), torch.arange(6)
    with warnings.catch_warnings():
        warnings.simplefilter("error", NetworkWarning)
        density.estimate(x, nfe=8, y=y)
    net.wrong = "attention over the batch"
    with pytest.warns(NetworkWarning, match="see each other"):
        density.estimate(x, nfe=8, y=y)

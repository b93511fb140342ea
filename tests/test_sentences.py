"""What is asked in a way that cannot be answered gets one sentence with a remedy, and no error from the inside."""

import re

import pytest
import torch
from analytic import ExactNet, mixture
from torch import nn

import fastscore as fs

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))


def density():
    return fs.ScoreDensity(ExactNet(mixture(4), fs.VP()), fs.VP(), "eps")


class Grey(nn.Module):
    """An autoencoder of images with one channel."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(1, 1, 1)

    def encode(self, x):
        return self.layer(x)

    def decode(self, z):
        return self.layer(z)


def bound(x):
    return fs.LatentBound(density(), Grey(), decoder_std=1.0).estimate(x, nfe=64)


CASES = {
    "classes of texts": (
        lambda tmp: fs.DiffusionClassifier(density(), {"text": ["a cat", "a dog"]}),
        r"classes must name keyword arguments of the network with one row a class.*a cat",
    ),
    "a batch that is no integer": (
        lambda tmp: fs.evaluate_dataset(density(), X, tmp, batch=2.5),
        r"batch must be a whole number|batch must be an integer",
    ),
    "a batch that is a text": (lambda tmp: fs.evaluate_dataset(density(), X, tmp, batch="8"), "batch must be"),
    "a mask for indices": (
        lambda tmp: fs.evaluate_dataset(density(), X[:2], tmp, indices=torch.tensor([True, False])),
        r"indices must be the numbers of the samples, got 2 of torch.bool; of a mask give mask.nonzero\(\)",
    ),
    "fractions for indices": (
        lambda tmp: fs.evaluate_dataset(density(), X, tmp, indices=[0.5, 1.0]),
        "indices must be the whole numbers of the samples",
    ),
    "labels in a list": (
        lambda tmp: fs.evaluate_dataset(density(), X, tmp, cond={"y": [0, 1, 2, 0, 1, 2]}, batch=3),
        "cond 'y' is a list or tuple of 6 entries and there are 6 samples; give one array",
    ),
    "joining one": (lambda tmp: fs.Estimate.cat(density().estimate(X, nfe=16)), "got a single Estimate; give"),
    "joining others": (lambda tmp: fs.Estimate.cat([density().estimate(X, nfe=16), 5]), "got a list with int; give"),
    "calling a density": (lambda tmp: density()(X), r"a ScoreDensity is not called.*use estimate\(x\), or log_prob"),
    "images of other channels": (
        lambda tmp: bound(torch.randn(3, 3, 4, 4)),
        r"the autoencoder's encode does not take samples of shape \(3, 4, 4\) in torch.float32: RuntimeError: .*; give",
    ),
    "padding outside of a transform's range": (
        lambda tmp: fs.Transformed(density(), torch.distributions.ExpTransform()).estimate(
            X.exp() * torch.tensor([1.0, 1, 1, 0]), nfe=16, mask=torch.tensor([1, 1, 1, 0])
        ),
        "or give the entries that the mask leaves out a number inside of the range",
    ),
    **{
        f"{name} of a distribution": (
            lambda tmp, ask=ask: ask(fs.as_distribution(density(), (4,))),
            f"has log_prob and no {name}; estimate it over samples",
        )
        for name, ask in {
            "mean": lambda d: d.mean,
            "variance": lambda d: d.stddev,
            "entropy": lambda d: d.entropy(),
            "cdf": lambda d: d.cdf(X),
            "icdf": lambda d: d.icdf(X),
        }.items()
    },
}


@pytest.mark.parametrize("name", CASES)
def test_what_cannot_be_answered_gets_a_sentence(name, tmp_path):
    ask, message = CASES[name]
    with pytest.raises((ValueError, TypeError, NotImplementedError)) as refused:
        ask(tmp_path / "out.npz")
    assert re.search(message, str(refused.value)), str(refused.value)
    assert "\n" not in str(refused.value)


def test_estimates_are_joined_from_any_iterable():
    parts = [density().estimate(X[i : i + 3], nfe=16, sample_index=torch.arange(i, i + 3)) for i in (0, 3)]
    assert torch.equal(fs.Estimate.cat(iter(parts)).log_prob, fs.Estimate.cat(parts).log_prob)

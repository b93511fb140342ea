"""The diffusion classifier on scikit-learn's digits, beside QDA and an MLP on the same 1,200 and 597 images.

Evaluations an image count every class.
"""

import class_digits
import pytest
import torch
from classifier_measures import measures
from sklearn.discriminant_analysis import QuadraticDiscriminantAnalysis
from sklearn.neural_network import MLPClassifier

import fastscore as fs

STEPS, NFE = 3000, 128
CASES = {
    "density": {"error": None},
    "density, 5 % error": {"error": 0.05},
    "density, 5 % error, nfe 64": {"error": 0.05, "nfe": 64},
    "uniform in time (Li et al.)": {"error": None, "weighting": "uniform"},
    "uniform in time, 5 % error": {"error": 0.05, "weighting": "uniform"},
}


@pytest.fixture(scope="module")
def digits():
    """A fitted classifier with the held-out digits, and what it says of them without elimination."""
    (levels, labels), (held, truth) = class_digits.split()
    density = class_digits.train(levels, labels, STEPS, batch=128)
    classifier = fs.DiffusionClassifier(density, {"y": torch.arange(10)})
    classifier.fit(class_digits.LEVELS.dequantize(levels, seed=1), progress=False)
    x = class_digits.LEVELS.dequantize(held, seed=2)
    full = {w: classifier.classify(x, nfe=NFE, error=None, weighting=w) for w in ("density", "uniform")}
    return classifier, x, truth, full


@pytest.mark.parametrize("case", CASES)
def test_diffusion_classifier(benchmark, table, digits, case):
    classifier, x, truth, by_weighting = digits
    options = {"nfe": NFE} | CASES[case]
    full = by_weighting[options.get("weighting", "density")]
    found = full if options["error"] is None else classifier.classify(x, **options)
    row = {"classifier": case, **measures(found.log_posterior.double().exp(), truth)}
    row["evaluations an image"] = float(found.nfe.double().mean())
    row["decided"] = float(found.decided.double().mean())
    assert row["accuracy"] > 0.95
    # A mistake of elimination would show as another prediction: at most 5 % of the images.
    assert float((found.prediction == full.prediction).double().mean()) > 0.95
    assert options["error"] is None or row["evaluations an image"] < 0.5 * float(full.nfe.double().mean())
    table("classifier", row)
    benchmark.extra_info.update(row)
    benchmark.pedantic(lambda: classifier.classify(x[:64], **options), rounds=2, warmup_rounds=0)


PEERS = {
    "scikit-learn QDA, reg_param 0.01": lambda: QuadraticDiscriminantAnalysis(reg_param=0.01),
    "scikit-learn MLP, 64 hidden": lambda: MLPClassifier((64,), max_iter=1000, random_state=0),
}


@pytest.mark.parametrize("name", PEERS)
def test_peers(benchmark, table, name):
    (levels, labels), (held, truth) = class_digits.split()
    train, x = (class_digits.LEVELS.values(part).numpy() for part in (levels, held))
    peer = PEERS[name]().fit(train, labels.numpy())
    row = {"classifier": name, **measures(torch.from_numpy(peer.predict_proba(x)).double(), truth)}
    assert row["accuracy"] > 0.9
    table("classifier", row | {"evaluations an image": 1, "decided": 1.0})
    benchmark.extra_info.update(row)
    benchmark.pedantic(lambda: peer.predict_proba(x[:64]), rounds=2, warmup_rounds=1)

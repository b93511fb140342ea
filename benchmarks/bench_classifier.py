"""The diffusion classifier on scikit-learn's digits, beside QDA and an MLP on the same 1,200 and 597 images.

Expected calibration error: the mean over ten bins of the highest posterior, weighted by their images, of the difference
between posterior and accuracy. Evaluations an image count every class.
"""

import class_digits
import pytest
import torch
from sklearn.discriminant_analysis import QuadraticDiscriminantAnalysis
from sklearn.neural_network import MLPClassifier

import fastscore as fs

STEPS, NFE = 4000, 256
CASES = {
    "density": {"error": None},
    "density, 5 % error": {"error": 0.05},
    "density, 5 % error, at most 64 a class": {"error": 0.05, "nfe": 64},
    "uniform in time (Li et al.)": {"error": None, "weighting": "uniform"},
    "uniform in time, 5 % error": {"error": 0.05, "weighting": "uniform"},
}


def measures(probability, truth):
    """Return accuracy, mean negative log-posterior of the truth, and expected calibration error."""
    highest, prediction = probability.max(1)
    right = (prediction == truth).double()
    bins = (highest * 10).long().clamp(max=9)
    gaps = [abs(float((highest[bins == b] - right[bins == b]).sum())) for b in range(10)]
    return {
        "accuracy": float(right.mean()),
        "-log p(y | x)": float(-probability.gather(1, truth[:, None]).clamp(min=1e-12).log().mean()),
        "calibration error": sum(gaps) / len(truth),
    }


@pytest.fixture(scope="module")
def digits():
    (levels, labels), (held, truth) = class_digits.split()
    density = class_digits.train(levels, labels, STEPS)
    classifier = fs.DiffusionClassifier(density, {"y": torch.arange(10)})
    classifier.fit(class_digits.LEVELS.dequantize(levels, seed=1), progress=False)
    return classifier, class_digits.LEVELS.dequantize(held, seed=2), truth


@pytest.mark.parametrize("case", CASES)
def test_diffusion_classifier(benchmark, table, digits, case):
    classifier, x, truth = digits
    options = {"nfe": NFE} | CASES[case]
    found = classifier.classify(x, **options)
    row = {"classifier": case, **measures(found.log_posterior.double().exp(), truth)}
    row["evaluations an image"] = float(found.nfe.double().mean())
    row["decided"] = float(found.decided.double().mean())
    assert row["accuracy"] > 0.96
    if options["error"] is not None:
        assert row["evaluations an image"] < 0.8 * 10 * options["nfe"]
        # A mistake of elimination would show as another prediction: at most 5 % of the images.
        full = classifier.classify(x, **options | {"error": None})
        assert float((found.prediction == full.prediction).double().mean()) > 0.95
    table("classifier", row)
    benchmark.extra_info.update(row)
    benchmark.pedantic(lambda: classifier.classify(x[:64], **options), rounds=2, warmup_rounds=1)


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

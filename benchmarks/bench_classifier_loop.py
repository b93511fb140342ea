"""A diffusers U-Net as a classifier: the plain PyTorch loop of Li et al. beside fastscore, on the same network.

Both see the same 200 held-out digits. The loop draws timesteps and noise independently; fastscore takes antithetic
pairs at stratified timesteps ("uniform", the same mean of squared errors) or the density formula's weights. An accuracy
of 98.5 % has a standard error of 0.9 % from the images, which are common to all rows, so that differences are more
accurate than that.
"""

import time

import plain_classifier
import pytest
import torch
from class_digits import split
from classifier_ladder import Classifier, Outcome, climb, comparison
from diffusers_digits import CLASSES, images, train

import fastscore as fs
from fastscore.adapters import from_diffusers

IMAGES = 200
LOOP, UNIFORM = "plain loop (Li et al.)", "fastscore, uniform in time"
LADDER = (8, 16, 32, 64)  # evaluations a class; fastscore takes at least 8
TOP = LADDER[-1]


@pytest.mark.long
@pytest.mark.usefixtures("one_thread")
def test_plain_loop_beside_fastscore(benchmark, table):
    (levels, labels), (held, truth) = split()
    unet, scheduler = train(levels, labels)
    x, truth = images(held[:IMAGES], seed=2), truth[:IMAGES]
    classifiers = [*peers(unet, scheduler, x), *own(unet, scheduler, x, images(levels, seed=1))]
    for one in (c for c in classifiers if c.ladder[0] == LADDER[0]):
        one.run(LADDER[0], 0)  # what the libraries allocate and probe once is nobody's seconds
    climb(classifiers, truth)
    loop, uniform = (next(one for one in classifiers if one.name == name) for name in (LOOP, UNIFORM))
    check_errors(loop.outcomes[TOP].errors, uniform.outcomes[TOP].errors)
    for one in classifiers:
        assert one.rows[-1]["accuracy"] > 0.95, one.name
        check_decisions(one.outcomes[one.ladder[-1]].prediction, loop.outcomes[TOP].prediction, truth)
        for row in one.rows:
            table("classifier_loop", row)
    best = loop.rows[-1]["accuracy"]
    stderr = (best * (1 - best) / IMAGES) ** 0.5  # what the images leave open
    lines = [line for k in (2, 1) for line in comparison(classifiers, loop, best - k * stderr)]
    for line in lines:
        table("classifier_loop_equal", line)
    benchmark.extra_info.update(equal=lines)
    benchmark.pedantic(lambda: uniform.run(LADDER[0], 0), rounds=1)


def peers(unet, scheduler, x):
    """Return the plain loop and its staged version."""

    def whole(draws, seed):
        mean = plain_classifier.classify(unet, scheduler, x, CLASSES, draws, seed).mean(2)
        return Outcome(mean.argmin(1), CLASSES * draws, (-mean.double()).softmax(1), errors=mean)

    def staged(draws, seed):
        first, keep = 8, 5
        prediction = plain_classifier.classify_in_stages(unet, scheduler, x, CLASSES, draws, seed, first, keep)
        return Outcome(prediction, CLASSES * first + keep * (draws - first))

    return [Classifier(LOOP, whole, LADDER), Classifier(f"{LOOP}, in stages", staged, LADDER[1:-1])]


def own(unet, scheduler, x, data):
    """Return fastscore's classifiers, with and without elimination."""
    start = time.process_time()
    density = from_diffusers(unet, scheduler)
    classifier = fs.DiffusionClassifier(density, {"class_labels": torch.arange(CLASSES)}).fit(data, progress=False)
    fit = time.process_time() - start

    def way(name, weighting, error, ladder, fit=None):
        def run(draws, seed):
            found = classifier.classify(x, nfe=draws, error=error, weighting=weighting, seed=seed)
            decided = None if error is None else float(found.decided.double().mean())
            posterior = found.log_posterior.double().exp()
            return Outcome(
                found.prediction, float(found.nfe.double().mean()), posterior, decided, -found.log_likelihood
            )

        return Classifier(name, run, ladder, fit)

    return [
        way(UNIFORM, "uniform", None, LADDER),
        way(f"{UNIFORM}, 5 % error", "uniform", 0.05, (TOP,)),
        way("fastscore, density", "density", None, LADDER, fit),
        way("fastscore, density, 5 % error", "density", 0.05, (TOP,), fit),
    ]


def check_errors(theirs, ours):
    """Assert that the mean squared errors of every class, and their differences, are the same number on both ways."""
    # Classes of an image share their noise; images are independent, their spread gives the standard error. Of 11 normal
    # numbers one is beyond 4 in 1,400 runs.
    for difference in ((theirs - ours).mean(1), (theirs - theirs.mean(1, True)) - (ours - ours.mean(1, True))):
        z = difference.mean(0) / (difference.std(0) / len(difference) ** 0.5)
        assert float(z.abs().max()) < 4, z


def check_decisions(prediction, other, truth):
    """Assert that two classifiers are as often right, to three standard errors of the images they differ on."""
    right, also = prediction == truth, other == truth
    only, missed = int((right & ~also).sum()), int((also & ~right).sum())
    assert abs(only - missed) <= 3 * max(1, only + missed) ** 0.5, (only, missed)

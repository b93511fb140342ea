"""What a type checker says of the public calls, seen from outside; `make lint` checks it with pyright's strict rules.

Nothing here runs. `assert_type` holds what a call returns; a line with `pyright: ignore` has to be wrong, since
pyright reports one that is not needed.
"""

from pathlib import Path

from torch import Tensor, nn
from typing_extensions import assert_type

import fastscore as fs
from fastscore import adapters, transforms


def of_densities(model: nn.Module, x: Tensor, labels: Tensor) -> None:
    density = fs.ScoreDensity(model, fs.DDPM.linear(1000), predicts="eps")
    assert_type(density, fs.ScoreDensity)
    assert_type(density.fit(x, evaluations=10_000, y=labels), fs.ScoreDensity)
    assert_type(density.log_prob(x, seed=1), Tensor)
    assert_type(density.estimate(x, nfe=64, y=labels), fs.Estimate)
    assert_type(density.compare(x, {"y": labels}, {"y": 1}), fs.Comparison)
    assert_type(fs.compare_densities(density, density, x, nfe=64, y=labels), fs.Comparison)
    assert_type(fs.Comparison.cat([density.compare(x, {"y": labels}, {"y": 1})]), fs.Comparison)
    assert_type(density.log_snr_range, tuple[float, float])
    assert_type(fs.Transformed(density, transforms.zscore(0.0, 2.0)).estimate(x), fs.Estimate)
    assert_type(fs.ZeroMeanDensity(model, fs.VP(), "eps").estimate(x), fs.Estimate)
    assert_type(fs.LatentBound(density, model, 0.1).fit(x).estimate(x, nfe=64, y=labels), fs.BoundEstimate)
    assert_type(fs.probability_flow_log_prob(density, x), fs.FlowLogProb)
    assert_type(fs.as_distribution(density, (2,), nfe=64, y=1).log_prob(x), Tensor)


def of_estimates(found: fs.Estimate, path: Path) -> None:
    assert_type(found.log_prob, Tensor)
    assert_type(found.mean(), tuple[float, float])
    assert_type(found.interval(0.9), tuple[Tensor, Tensor])
    assert_type(found.bits_per_dim(256), Tensor)
    assert_type(found.mean_bits_per_dim(fs.Levels(256)), tuple[float, float])
    assert_type(found.log_snr_curve, fs.Curve)
    assert_type(found.truncation, float)
    found.save(path)
    assert_type(fs.Estimate.cat([found, fs.Estimate.load(path)]), fs.Estimate)


def of_schedules(t: Tensor) -> None:
    for schedule in (fs.DDPM.cosine(10), fs.VP(), fs.VE(), fs.EDM(), fs.FlowMatching(), fs.LiYan(), fs.LogSNR()):
        assert_type(schedule.log_snr(t), Tensor)
        assert_type(schedule.alpha_sigma(t), tuple[Tensor, Tensor])


def of_the_rest(density: fs.ScoreDensity, model: nn.Module, x: Tensor, labels: Tensor, path: Path) -> None:
    classifier = fs.DiffusionClassifier(density, {"y": labels})
    assert_type(classifier.classify(x, nfe=64), fs.Classification)
    assert_type(fs.density_loss(density, x, seed=0), Tensor)
    assert_type(fs.DiffusionLoss(model, predicts="v").estimate(x, labels), fs.Estimate)
    assert_type(fs.density_weights(fs.DDPM.linear(10), labels, "eps"), Tensor)
    assert_type(fs.evaluate_dataset(density, x, path), fs.Estimate | None)
    assert_type(fs.explain(model, (2,)), str)


def that_is_wrong(model: nn.Module, x: Tensor) -> None:
    fs.ScoreDensity(model, fs.VP())  # pyright: ignore[reportCallIssue]
    fs.DiffusionLoss(model)  # pyright: ignore[reportCallIssue]
    fs.ScoreDensity(model, "vp", "eps")  # pyright: ignore[reportArgumentType]
    fs.ScoreDensity(model, fs.VP(), "eps").estimate(x, nfe="many")  # pyright: ignore[reportArgumentType]


def of_adapters(model: nn.Module) -> None:
    assert_type(adapters.from_edm(model, nfe=32), fs.ScoreDensity)
    assert_type(adapters.from_diffusers(model, object()), fs.ScoreDensity)
    assert_type(adapters.from_k_diffusion(model), fs.ScoreDensity)
    assert_type(adapters.from_flow_matching(model), fs.ScoreDensity)
    adapters.from_edm(model, 3, 4, 5)  # pyright: ignore[reportCallIssue]

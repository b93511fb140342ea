"""Coverage of images' bars under exact networks that switch between components: the tables of docs/images.md.

PYTHONPATH=tests python benchmarks/switching_bars.py [clusters] [widths]
"""

from __future__ import annotations

import sys

import torch
from markdown import markdown
from mixtures import ExactEps, Mixture
from torch import Tensor, nn

import fastscore as fs
from fastscore.estimator import statistics

SHAPE = (3, 8, 8)
CLUSTERS = {1: (64, 256, 512), 2: (64, 256), 4: (64, 128, 192, 256, 512, 1024), 8: (64, 256, 512), 32: (256,)}
WIDTHS = (((1.0, 0.5), (0.8, 0.2)), ((1.0, 0.5), (0.5, 0.5)), ((1.0, 0.7), (0.5, 0.5)))
INTERVALS = 512


class OfImages(nn.Module):
    """The exact network of a mixture, of images."""

    def __init__(self, target: Mixture) -> None:
        super().__init__()
        self.exact = ExactEps(target, fs.VP())

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.exact(x.flatten(1), t).reshape(x.shape)


def clusters(count: int, generator: torch.Generator) -> Mixture:
    """Return smooth images as the centres of clusters alike."""
    mean = 0.5 * torch.randn(count, *SHAPE, generator=generator)
    mean = (mean + mean.roll(1, 3) + mean.roll(1, 2)).flatten(1)
    return Mixture(mean, torch.full((count, 1), 0.05 if count == 8 else 0.3))


def row(target: Mixture, x: Tensor, nfe: int) -> dict[str, object]:
    """Return the error of estimates and what bars cover of it, by the draws alone and with the floor of a switch."""
    density, truth = fs.ScoreDensity(OfImages(target), fs.VP(), "eps", program=False), target.log_prob(x)
    seeds = max(4, INTERVALS // len(x) * min(256, nfe) // nfe)
    unseen, told = statistics.unseen, {}
    for name, floor in (("draws alone", lambda terms, _: terms.new_zeros(terms.shape[:-1])), ("covered", unseen)):
        statistics.unseen = floor
        images = x.view(-1, *SHAPE)
        found = [density.estimate(images, nfe=nfe, seed=seed, control="self", progress=False) for seed in range(seeds)]
        error = torch.stack([each.log_prob.double() for each in found]) - truth
        stderr = torch.stack([each.stderr.double() for each in found])
        told[name] = f"{float((error.abs() < 1.96 * stderr).double().mean()):.1%}"
        told[f"median stderr, {name}"] = float(stderr.median())
    statistics.unseen = unseen
    rms = float(error.square().mean().sqrt())
    return {"evaluations": nfe, "intervals": error.numel(), "error, rms": rms, **told}


def main(asked: list[str]) -> None:
    torch.set_num_threads(1)
    if not asked or "clusters" in asked:
        rows = []
        for count, evaluations in CLUSTERS.items():
            generator = torch.Generator().manual_seed(2)
            target = clusters(count, generator)
            x = target.sample(32, generator)
            rows += [{"clusters": count} | row(target, x, nfe) for nfe in evaluations]
        print(markdown(rows))
    if not asked or "widths" in asked:
        rows = []
        for widths, weights in WIDTHS:
            target = Mixture(torch.zeros(2, 192), torch.tensor(widths)[:, None], torch.tensor(weights))
            x = target.sample(64, torch.Generator().manual_seed(2))
            rows += [{"widths": widths, "weights": weights} | row(target, x, nfe) for nfe in (64, 256, 1024)]
        print(markdown(rows))


if __name__ == "__main__":
    main(sys.argv[1:])

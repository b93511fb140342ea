"""Does a density of photograph patches find patches that do not belong, and where does it fail?

A small convolutional network learns 8 x 8 colour patches of the upper part of one photograph ("china.jpg" of
scikit-learn, a Chinese palace). Held-out patches of its lower part are then ranked among patches that do not belong:
others of them with noise, blurred or upside down, and those of another photograph ("flower.jpg").

The density finds noise. Blurred patches, and the smooth background of the flower, are *more* probable than what
belongs, so that their scores are below one half: a high density is no proof of belonging (Nalisnick et al., 2019).
The remedy is a ratio to a density that knows smoothness and nothing else (Ren et al., 2019), here a Gaussian of the
same training patches: it finds what is too smooth, and loses the noise. Patches that are turned upside down are found
by neither.

Needs:   fastscore, scikit-learn, pillow, matplotlib
Prints:  the area under the ROC curve (AUROC; 0.5 is a coin, 1 finds all) by both for each kind, with bootstrap errors
Draws:   the least and the most probable patches of all, into the file of --out
Takes:   55 s of one processor; --small some seconds
"""

from __future__ import annotations

import argparse

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_sample_images
from torch import Tensor, nn

import fastscore as fs

LEVELS = fs.Levels(256)
SIZE = 8


def patches(image: Tensor) -> Tensor:
    """Return all patches that do not overlap, in random order: levels 0 .. 255, int64, shape (N, 3, 8, 8)."""
    cut = image.unfold(0, SIZE, SIZE).unfold(1, SIZE, SIZE).reshape(-1, 3, SIZE, SIZE)
    return cut[torch.randperm(len(cut))]


def corrupted(levels: Tensor, seed: int) -> dict[str, Tensor]:
    """Return patches that do not belong, made of those that do."""
    noise = 10 * torch.randn(levels.shape, generator=torch.Generator().manual_seed(seed))
    padded = nn.functional.pad(levels.float(), (1, 1, 1, 1), mode="replicate")
    return {
        "noise": (levels + noise).round().clamp(0, 255).long(),
        "blurred": nn.functional.avg_pool2d(padded, 3, 1).round().long(),
        "upside down": levels.flip(2),
    }


class Net(nn.Module):
    """Residual convolutions, with waves of the log-SNR added to every channel."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.register_buffer("frequency", 2.0 ** torch.arange(-3, 3))
        self.time = nn.Linear(12, width)
        self.first, self.last = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, 3, 3, padding=1)
        self.hidden = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(3))

    def forward(self, x_t: Tensor, log_snr: Tensor) -> Tensor:
        angle = log_snr[:, None] * self.frequency
        shift = self.time(torch.cat([angle.sin(), angle.cos()], 1))[:, :, None, None]
        h = self.first(x_t) + shift
        for layer in self.hidden:
            h = h + layer(nn.functional.silu(h + shift))
        return self.last(nn.functional.silu(h))


def sampled(image: Tensor, count: int, seed: int) -> Tensor:
    """Return dequantized patches from anywhere in the image."""
    views = image.unfold(0, SIZE, 1).unfold(1, SIZE, 1)
    return LEVELS.dequantize(views[torch.randint(len(views), (count,)), torch.randint(views.shape[1], (count,))], seed)


def trained(image: Tensor, steps: int, seed: int) -> fs.ScoreDensity:
    """Return a density trained by maximum likelihood on patches from anywhere in the image."""
    torch.manual_seed(seed)  # of the network's weights, and of the patches
    density = fs.ScoreDensity(Net(), fs.LogSNR(-8.0, 12.0), predicts="v")
    optimizer = torch.optim.Adam(density.parameters(), 2e-3)
    nodes = fs.AdaptiveNodes(density.schedule)
    for step in range(steps):
        loss = fs.density_loss(density, sampled(image, 64, step), seed=step, antithetic=True, nodes=nodes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return density.eval()


def auroc(known: Tensor, foreign: Tensor, seed: int) -> tuple[float, float]:
    """Return how often a foreign score is above a known one, and its standard error over 200 resamplings of both."""
    above = (foreign[:, None] > known).double() + 0.5 * (foreign[:, None] == known)
    draw = torch.Generator().manual_seed(seed)
    rows, columns = (torch.randint(n, (200, n), generator=draw) for n in above.shape)
    again = torch.stack([above[i][:, j].mean() for i, j in zip(rows, columns)])
    return float(above.mean()), float(again.std())


def draw(levels: Tensor, log_prob: Tensor, out: str) -> None:
    """Save the 12 least and the 12 most probable patches."""
    order = log_prob.argsort()
    figure, axes = plt.subplots(2, 12, figsize=(12, 2.6), layout="constrained")
    for axis, index in zip(axes.flat, torch.cat([order[:12], order[-12:]]).tolist()):
        axis.imshow(levels[index].permute(1, 2, 0).byte().numpy())
        axis.set_title(f"{log_prob[index]:.0f} nats", fontsize=8)
        axis.axis("off")
    figure.savefig(out, dpi=120)
    plt.close(figure)


def main(argv: list[str] | None = None) -> dict[str, tuple[float, ...]]:
    """Train, rank, print and draw; return for each kind the AUROC of the density, its error, and both of the ratio."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", default="anomalies.png", help="file of the picture")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--small", action="store_true", help="a few seconds: fewer steps and patches")
    args = parser.parse_args(argv)
    steps, count = (100, 60) if args.small else (1500, 300)

    china, flower = (torch.tensor(image).long() for image in load_sample_images().images)
    upper, lower = china[:240], china[240:]
    density = trained(upper, steps, args.seed)
    smooth = sampled(upper, 5000, args.seed).flatten(1).double()
    gaussian = torch.distributions.MultivariateNormal(smooth.mean(0), smooth.T.cov())

    torch.manual_seed(args.seed)
    known, others, *_ = patches(lower).split(count)
    foreign, *_ = patches(flower).split(count)
    sets = {"known": known, **corrupted(others, args.seed), "another photograph": foreign}
    every = torch.cat(list(sets.values()))
    x = LEVELS.dequantize(every, seed=args.seed)
    result = density.estimate(x, nfe=64, seed=args.seed)  # images are fitted to their own draws: docs/images.md
    ratio = result.log_prob - gaussian.log_prob(x.flatten(1).double())

    print(f"{count} patches of each kind, {steps} steps, standard error {float(result.stderr.mean()):.1f} nats a patch")
    found, scores = {}, [-score.reshape(len(sets), count) for score in (result.log_prob, ratio)]
    for index, name in list(enumerate(sets))[1:]:
        one, two = (auroc(score[0], score[index], args.seed) for score in scores)
        found[name] = (*one, *two)
        print(f"{name:24}AUROC {one[0]:.3f} +- {one[1]:.3f}, by the ratio {two[0]:.3f} +- {two[1]:.3f}")
    draw(every, result.log_prob, args.out)
    return found


if __name__ == "__main__":
    main()

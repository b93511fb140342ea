"""Transforms of every kind, the density of a known target through them, and the exact determinant."""

import torch
from analytic import ExactNet, mixture
from torch.distributions import AffineTransform, ComposeTransform, TanhTransform
from torch.distributions.transforms import ReshapeTransform

import fastscore as fs
from fastscore.transforms import Logit, Whitening, whiten, zscore

SHAPE, D, COUNT = (1, 2, 2), 4, 5
TARGET, SCHEDULE = mixture(D), fs.LogSNR(-8, 6)
MEAN, STD = torch.tensor([1.0, -20.0, 0.0, 3.0]).reshape(SHAPE), torch.tensor([0.1, 5.0, 1.0, 30.0]).reshape(SHAPE)
Z = TARGET.sample(COUNT, seed=3).reshape(COUNT, *SHAPE)


def whitening():
    normal = torch.randn(200, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = whiten(normal @ torch.diag(STD.double().flatten()) + 3)
    return Whitening(found.mean.reshape(SHAPE), found.basis, found.std)


TRANSFORMS = {
    "zscore": [zscore(0.5, 0.5)],
    "zscore of elements": [zscore(MEAN, STD)],
    "negative scale": [AffineTransform(2.0, -3.0)],
    "logit": [Logit(0.0, 255.0)],
    "whitening": [whitening()],
    "composed": [ComposeTransform([TanhTransform(), AffineTransform(2.0, 3.0)])],
    "reshaped": [ReshapeTransform(SHAPE, (D,))],
    "twice": [zscore(MEAN, STD), AffineTransform(0.0, 1 / 60), Logit(-1.0, 1.0), AffineTransform(0.0, 7.0)],
}


def core(reference=None, gain=0.9):
    net = ExactNet(TARGET, SCHEDULE, gain=gain)
    return fs.ScoreDensity(net, SCHEDULE, "eps", reference=reference, program=False)


def through(density, transforms):
    for transform in transforms:
        density = fs.Transformed(density, transform)
    return density


def forward(z, transforms):
    for transform in transforms:
        z = transform(z)
    return z


def log_det(z, transforms):
    """log|det dx/dz| of each sample, from the Jacobian of the whole map."""

    def whole(row):
        return forward(row.reshape(1, *SHAPE), transforms).flatten()

    jacobian = torch.stack([torch.autograd.functional.jacobian(whole, row.flatten()) for row in z])
    return torch.linalg.slogdet(jacobian)[1]

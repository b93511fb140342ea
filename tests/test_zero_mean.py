"""Centred point clouds: the density in the subspace where the atoms have mean zero, for clouds of different sizes."""

import math

import pytest
import torch
from torch import nn

import fastscore as fs
from fastscore.densities.zero_mean import helmert

pytestmark = pytest.mark.usefixtures("one_thread")

SCHEDULE, STD = fs.LogSNR(-12, 12), torch.tensor([0.7, 1.1, 1.6], dtype=torch.float64)
SIZES = torch.tensor([3, 5, 4, 2])
THERE = torch.arange(5) < SIZES[:, None]


def centred(x, there):
    weight = there[..., None].to(x)
    return (x - (x * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True)) * weight


class Cloud(nn.Module):
    """The exact network of independent N(0, diag(STD^2)) atoms, centred."""

    def __init__(self, predicts="eps", uncentred=0.0):
        super().__init__()
        self.predicts, self.uncentred = predicts, uncentred

    def forward(self, x, t, node_mask):
        alpha, sigma = (v[:, None, None] for v in SCHEDULE.alpha_sigma(t))
        eps = centred(x.double(), node_mask) * sigma / (alpha**2 * STD**2 + sigma**2) + self.uncentred
        return (eps if self.predicts == "eps" else (x - sigma * eps) / alpha).to(x.dtype)


def log_prob(x, there):
    """Of (n - 1) degrees of freedom in every dimension."""
    degrees = there.sum(1).double() - 1
    norm = 0.5 * degrees[:, None] * (2 * math.pi * STD**2).log()
    return -(norm + 0.5 * (x.square() * there[..., None]).sum(1) / STD**2).sum(1)


X = centred(torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * STD, THERE)


def density(predicts="eps", uncentred=0.0, **options):
    return fs.ZeroMeanDensity(Cloud(predicts, uncentred), SCHEDULE, predicts, program=False, **options)


def test_the_basis_is_orthonormal_nested_and_centred():
    basis = helmert(6, torch.device("cpu"))
    assert torch.allclose(basis.T @ basis, torch.eye(5, dtype=torch.float64), atol=1e-14)
    assert float(basis.sum(0).abs().max()) < 1e-14
    assert torch.equal(basis[:4, :3], helmert(4, torch.device("cpu")))
    assert bool((basis[4:, :3] == 0).all())


@pytest.mark.parametrize("predicts", ["eps", "x0"])
@pytest.mark.parametrize("uncentred", [0.0, 3.0])
def test_clouds_of_different_sizes_have_their_densities(predicts, uncentred):
    """Also of a network whose answers are not centred: what it says of the mean is projected away."""
    if predicts == "x0" and uncentred:
        uncentred = 0.1  # a prediction of the noise is divided by alpha
    found = density(predicts, uncentred).estimate(X, mask=THERE, nfe=2048, node_mask=THERE)
    assert found.dims.tolist() == [6, 12, 9, 3]
    assert bool(((found.log_prob - log_prob(X, THERE)).abs() < 4 * found.stderr).all())
    assert float(found.stderr.max()) < 0.4


def test_each_is_what_it_is_alone():
    found = density().estimate(X, mask=THERE.float()[..., None], nfe=64, node_mask=THERE)
    for i, n in enumerate(SIZES.tolist()):
        own, all_there = X[i : i + 1, :n], torch.ones(1, n) > 0
        alone = density().estimate(own, nfe=64, sample_index=torch.tensor([i]), node_mask=all_there)
        assert alone.dims == 3 * (n - 1)
        assert float(alone.log_prob) == pytest.approx(float(found.log_prob[i]), rel=1e-10)
        assert float(alone.stderr) == pytest.approx(float(found.stderr[i]), rel=1e-8)


def test_atoms_may_stand_anywhere_in_the_padding():
    """In the same order, so the coordinates and the noise are the same; the network sees the places as they are."""
    place = torch.tensor([1, 2, 4, 0, 3])  # of the padded atoms, order kept among those that are there
    x, there = torch.zeros_like(X), torch.zeros_like(THERE)
    for i, n in enumerate(SIZES.tolist()):
        chosen = place[:n].sort().values
        x[i, chosen], there[i, chosen] = X[i, :n], True
    found = density().estimate(X, mask=THERE, nfe=32, node_mask=THERE)
    spread = density().estimate(x, mask=there, nfe=32, node_mask=there)
    assert torch.allclose(found.log_prob, spread.log_prob, rtol=1e-10)


def test_what_stands_elsewhere_is_given():
    """Atoms that are not in the mask are there for the network to see, as a pocket is for a ligand."""

    class Pocket(nn.Module):
        def forward(self, x, t, ligand):
            self.seen = x[~ligand]
            return torch.zeros_like(x)

    net, x = Pocket(), X.clone()
    x[~THERE] = 5.0
    fs.ZeroMeanDensity(net, SCHEDULE, "eps", program=False).estimate(x, mask=THERE, nfe=16, ligand=THERE)
    assert bool((net.seen == 5).all())
    assert len(net.seen) > 0


def test_reflections_change_nothing_on_average():
    """A symmetry of this network, as rotations are of the equivariant ones."""
    flipped = X * torch.tensor([-1.0, 1, 1], dtype=torch.float64)
    found, turned = (density().estimate(x, mask=THERE, nfe=1024, node_mask=THERE) for x in (X, flipped))
    error = (found.stderr.square() + turned.stderr.square()).sqrt()
    assert bool(((found.log_prob - turned.log_prob).abs() < 4 * error).all())


def test_gradients_stay_in_the_subspace():
    x = X.clone().requires_grad_()
    exact = density()
    exact.log_prob(x, mask=THERE, nfe=16, node_mask=THERE).sum().backward()
    assert float((x.grad * THERE[..., None]).sum(1).abs().max()) < 1e-10
    assert bool((x.grad[~THERE] == 0).all())
    way, step = centred(torch.randn_like(X), THERE), 1e-5
    low, high = (float(exact.log_prob(X + s * step * way, mask=THERE, nfe=16, node_mask=THERE).sum()) for s in (-1, 1))
    assert float((x.grad * way).sum()) == pytest.approx((high - low) / (2 * step), rel=1e-5)


def test_fit_and_loss():
    sizes = 2 + torch.arange(400) % 4
    there = torch.arange(5) < sizes[:, None]
    noise = torch.randn(400, 5, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    data = centred(noise * STD, there)
    fitted = density().fit(data, mask=there, reference="diagonal", evaluations=20_000, node_mask=there)
    spread = fitted.density.reference.variance[0].reshape(4, 3).sqrt() / STD
    # Of 320 samples all have the first coordinate, 80 the last: four standard errors of a standard deviation.
    assert float((spread[0] - 1).abs().max()) < 4 / (2 * 320) ** 0.5
    assert float((spread[3] - 1).abs().max()) < 4 / (2 * 80) ** 0.5
    found, plain = (d.estimate(X, mask=THERE, nfe=64, node_mask=THERE) for d in (fitted, density()))
    assert bool(((found.log_prob - log_prob(X, THERE)).abs() < 5 * found.stderr).all())
    assert float(found.stderr.mean()) < 0.5 * float(plain.stderr.mean())
    z, given = fitted.coordinates(X, THERE, {"node_mask": THERE})
    losses = torch.stack([fs.density_loss(fitted.density, z, seed=s, reduction="none", **given) for s in range(100)])
    assert bool(((losses.mean(0) + log_prob(X, THERE)).abs() < 4.5 * losses.std(0) / 10).all())
    same = {"node_mask": THERE}
    assert float(fitted.compare(X, same, same, mask=THERE, nfe=16).difference.abs().max()) == 0


@pytest.mark.parametrize(
    ("x", "mask", "sentence"),
    [
        (X + 0.5, THERE, "x must be centred.*subtract the mean over the atoms that are there"),
        (X[:, :3] - X[:, :3].mean(1, keepdim=True) + 1, None, "x must be centred"),
        (X, THERE & (torch.arange(5) < 1), "every sample needs two atoms at least, got fewer in 4 of 4"),
        (X, THERE[..., None].expand(4, 5, 3), "mask must say which atoms there are"),
        (X[0], None, r"positions of shape \(B, M, D\)"),
        (X, torch.ones(4, 4), "mask must broadcast"),
    ],
)
def test_what_is_no_centred_cloud_is_refused(x, mask, sentence):
    with pytest.raises(ValueError, match=sentence):
        density().estimate(x, mask=mask, node_mask=THERE)

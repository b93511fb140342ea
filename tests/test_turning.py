"""The basis of images: what it is, and what a reference in it is worth."""

import pytest
import torch
from torch import nn

import fastscore as fs
from fastscore.reference import turning

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPES = {"colours": (3, 4, 6), "one channel": (1, 5, 4), "signals": (2, 7), "too many channels": (65, 4)}


def _truth():
    """Waves along rows and columns in colours of their own, a few of them strong; of two contrasts."""
    colours = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(9)).double())[0]
    falls = 1 / (1 + torch.arange(8).double())
    variance = (torch.tensor([2.0, 0.5, 0.2])[:, None, None] * falls[:, None] * falls).square().reshape(1, -1)
    factors = [colours, turning.cosines(8), turning.cosines(8)]
    contrast = torch.tensor([[0.01], [1.0]]).double()
    return fs.Reference(torch.ones(2) / 2, torch.zeros(2, D), contrast * variance, factors=factors)


D = 192
TRUTH = _truth()


def images(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    which = (torch.rand(count, generator=generator) < 0.5).long()
    waves = TRUTH.variance[which].sqrt() * torch.randn(count, D, generator=generator)
    return turning.turn_back(waves, TRUTH.factors).reshape(count, 3, 8, 8).float()


class Exact(nn.Module):
    """The exact noise of such images, as far as `off` is zero."""

    def __init__(self, off=0.0):
        super().__init__()
        self.off = off

    def forward(self, x_t, t):
        alpha, sigma = (v.to(torch.float64) for v in fs.VP().alpha_sigma(t))
        eps = TRUTH.eps(x_t.flatten(1)[None], alpha, sigma)[0].reshape(x_t.shape)
        return eps + self.off * sigma.to(x_t)[:, None, None, None] * torch.tanh(x_t.roll(1, -1))


@pytest.mark.parametrize("size", [1, 4, 5, 32])
def test_cosines_are_orthonormal_and_get_faster(size):
    basis = turning.cosines(size)
    torch.testing.assert_close(basis.mT @ basis, torch.eye(size).double(), rtol=0, atol=1e-13)
    assert (basis.diff(dim=0).sign().diff(dim=0) != 0).sum(0).tolist() == sorted(
        (basis.diff(dim=0).sign().diff(dim=0) != 0).sum(0).tolist()
    )
    torch.testing.assert_close(basis[:, 0], torch.full((size,), size**-0.5).double())


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_turning_is_one_orthonormal_matrix_and_can_be_undone(shape):
    x = torch.randn(50, *shape, dtype=torch.float64).flatten(1)
    factors = turning.factors_of(x, shape)
    matrix = torch.ones(1, 1, dtype=torch.float64)
    for size, factor in zip(shape, factors):
        matrix = torch.kron(matrix, factor.contiguous() if factor.numel() else torch.eye(size).double())
    torch.testing.assert_close(turning.turn(x, factors), x @ matrix, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(turning.turn_back(turning.turn(x, factors), factors), x, rtol=1e-12, atol=1e-12)
    rows = torch.randn(2, 3, x.shape[1])  # further dimensions in front, and another dtype
    torch.testing.assert_close(turning.turn(rows, factors), rows @ matrix.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(12,), (3, 3, 8), (3, 8, 3), (2, 3, 4, 4)])
def test_other_shapes_have_none(shape):
    data = torch.randn(100, *shape)
    assert turning.factors_of(data.flatten(1), shape) is None
    density = fs.ScoreDensity(nn.Identity(), fs.VP(), "eps", program=False)
    with pytest.raises(ValueError, match="reference='images' needs samples of shape"):
        density.fit(data, reference="images", evaluations=1000, progress=False)


def test_channels_are_turned_to_where_they_do_not_depend_on_each_other():
    x = images(400).flatten(1).double()
    factors = turning.factors_of(x, (3, 8, 8))
    channels = turning.turn(x, factors).reshape(400, 3, -1).transpose(0, 1).flatten(1)
    correlation = torch.corrcoef(channels)
    assert float((correlation - torch.eye(3)).abs().max()) < 0.05


def test_fit_takes_it_where_it_leaves_the_least_and_the_number_stays():
    density, x = fs.ScoreDensity(Exact(), fs.VP(), "eps"), images(24, seed=1)
    density.fit(images(1000), evaluations=30_000, progress=False)
    assert density.reference.turned
    found = density.estimate(x, nfe=64)
    error = found.log_prob - TRUTH.log_prob(x.flatten(1))
    assert bool((error.abs() < 4 * found.stderr + found.truncation_per_sample).all())
    assert abs(float(error.mean())) < 4 * float(found.stderr.square().mean().sqrt()) / 24**0.5 + found.truncation
    # The same evaluations with covariances along the pixels, the choice there was in many dimensions.
    axes = fs.ScoreDensity(Exact(), fs.VP(), "eps")
    axes.fit(images(1000), reference="diagonal", evaluations=30_000, progress=False)
    assert float(found.variance.mean()) < 0.2 * float(axes.estimate(x, nfe=64).variance.mean())


def test_a_fitted_density_is_saved_and_differentiated():
    density = fs.ScoreDensity(Exact(0.1), fs.VP(), "eps")
    density.fit(images(400), reference="images", evaluations=3000, progress=False)
    again, x = fs.ScoreDensity(Exact(0.1), fs.VP(), "eps"), images(4, seed=2)
    again.load_state_dict(density.state_dict())
    assert torch.equal(density.estimate(x, nfe=32).log_prob, again.estimate(x, nfe=32).log_prob)
    leaf = x.double().requires_grad_()
    value = density.log_prob(leaf, nfe=32)
    (slope,) = torch.autograd.grad(value.sum(), leaf)
    step = torch.randn_like(leaf)
    ends = [density.log_prob(leaf + sign * 1e-5 * step, nfe=32).sum() for sign in (1, -1)]
    # Central differences of a smooth function in float64.
    assert float(((ends[0] - ends[1]) / 2e-5).detach()) == pytest.approx(float((slope * step).sum()), rel=1e-5)
    with pytest.raises(ValueError, match="a mask needs a reference that is diagonal in the entries"):
        density.estimate(x, mask=torch.rand(8, 8) > 0.5)


def test_losses_and_the_ode_take_it():
    density = fs.ScoreDensity(Exact(), fs.VP(), "eps")
    density.fit(images(400), reference="images", evaluations=3000, progress=False)
    x = images(4, seed=3)
    assert bool(torch.isfinite(fs.density_loss(density, x, seed=0)))
    found = fs.probability_flow_log_prob(density, x.double(), method="rk4", steps=64)
    # 64 steps of order four, to a thousandth of a nat, beside what the ends leave out, stated to a few percent.
    error = (found.log_prob - TRUTH.log_prob(x.flatten(1).double())).abs()
    assert bool((error < 1.05 * found.truncation + 1e-3).all())


def test_few_samples_and_constant_ones_are_told():
    density = fs.ScoreDensity(Exact(), fs.VP(), "eps")
    with pytest.raises(
        ValueError, match="reference='images' needs at least 20 training samples, got 16; give more data"
    ):
        density.fit(images(20), reference="images", progress=False)
    with pytest.warns(UserWarning, match="constant"):
        density.fit(torch.full((200, 3, 8, 8), 0.5), reference="images", evaluations=3000, progress=False)
    lo, hi = density.log_snr_range
    assert lo < hi

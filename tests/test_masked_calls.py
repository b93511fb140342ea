"""Losses, comparisons, classifiers, transforms, metrics, the ODE and the page count the same entries as `estimate`."""

import math
import re
from pathlib import Path

import pytest
import torch
from masked_data import (
    MASK,
    MIXTURE,
    REFERENCES,
    SCHEDULE,
    ConditionalEps,
    MarginalEps,
    Plain,
    X,
    assert_covers,
    conditional,
    density,
    draw,
    marginal,
    seen,
)
from mixtures import Mixture
from torch import nn

import fastscore as fs

pytestmark = pytest.mark.usefixtures("one_thread")

PAGE = Path(__file__).parent.parent / "docs" / "masks.md"


def test_the_loss_is_the_density_on_average():
    exact, repeats = density("mixture"), 200
    for antithetic in (False, True):
        options = {"reduction": "none", "antithetic": antithetic, "draws": 2}
        losses = torch.stack(
            [fs.density_loss(exact, X, mask=MASK, seed=s, cond=seen(MASK), **options) for s in range(repeats)]
        )
        error = losses.std(0) / repeats**0.5
        assert_covers(losses.mean(0), -marginal(MIXTURE, X, MASK), error)


def test_the_loss_shows_the_others_as_they_are():
    class Recording(nn.Module):
        def forward(self, x, t, there):
            self.others = x[~there]
            return torch.zeros_like(x)

    net, x = Recording(), torch.where(MASK, X, 5.0)
    fs.density_loss(fs.ScoreDensity(net, SCHEDULE, "eps"), x, mask=MASK, seed=0, draws=3, antithetic=True, there=MASK)
    assert len(net.others) == 6 * int((~MASK).sum())
    assert bool((net.others == 5).all())


def test_a_difference_of_conditions():
    a, b = (masked_and(shift) for shift in (0.0, 0.4))
    found = density().compare(X, a, b, mask=MASK, nfe=512)
    moved = Mixture(MIXTURE.mean + 0.4, MIXTURE.std, MIXTURE.weight)
    truth = marginal(MIXTURE, X, MASK) - marginal(moved, X, MASK)
    assert_covers(found.difference, truth, found.stderr)


def masked_and(shift):
    return {"mask": MASK, "shift": torch.full((40,), shift)}


def test_a_classifier_sees_the_same_entries():
    classes = {"shift": torch.tensor([0.0, 1.0])}
    found = fs.DiffusionClassifier(density(), classes).classify(X, mask=MASK, nfe=256, error=None, cond=seen(MASK))
    logs = [marginal(Mixture(MIXTURE.mean + s, MIXTURE.std, MIXTURE.weight), X, MASK) for s in (0.0, 1.0)]
    truth = torch.stack(logs, 1).log_softmax(1)
    assert float((found.log_posterior.exp() - truth.exp()).abs().max()) < 0.25
    assert float((found.log_posterior.exp() - truth.exp()).abs().mean()) < 0.05


def test_captured_is_the_estimate():
    options = {"mask": MASK, "nfe": 32, "cond": seen(MASK)}
    exact = density("mixture")
    log_prob, stderr = fs.CapturedDensity(exact, X, **options)(X)
    found = exact.estimate(X, **options)
    assert torch.allclose(log_prob, found.log_prob, rtol=1e-12)
    assert torch.allclose(stderr, found.stderr, rtol=1e-10)


def test_an_elementwise_transform_counts_its_own_determinant():
    mean, std = draw(6, seed=40), 0.5 + draw(6, seed=41).abs()
    user = mean + std * X
    found = fs.Transformed(density(), fs.transforms.zscore(mean, std)).estimate(
        user, mask=MASK, nfe=64, cond=seen(MASK)
    )
    inner = density().estimate((user - mean) / std, mask=MASK, nfe=64, cond=seen(MASK))
    assert torch.allclose(found.log_prob, inner.log_prob - (MASK * std.log()).sum(1), rtol=1e-10)
    white = fs.Transformed(density(), fs.transforms.whiten(X))
    with pytest.raises(ValueError, match="a mask needs a transform that acts on every entry by itself"):
        white.log_prob(X, mask=MASK, cond=seen(MASK))


def test_levels_outside_of_the_mask_have_no_probability():
    """The bound for four levels in all, against that of data which have only these; the same noise."""
    k = torch.randint(0, 8, (10, 6), generator=torch.Generator().manual_seed(50))
    levels, kept = fs.Levels(8, -1, 1), (torch.arange(6) < 4)
    full = seen(torch.ones(10, 4) > 0)
    found = fs.discrete_log_prob(density(), k, levels, mask=kept, nfe=32, cond=seen(kept.expand(10, 6)))
    alone = fs.discrete_log_prob(density(), k[:, :4], levels, nfe=32, cond=full)
    assert torch.allclose(found.log_prob, alone.log_prob, rtol=1e-4)  # float32 data
    assert torch.allclose(found.bits_per_dim(), alone.bits_per_dim(), rtol=1e-4)


def test_metrics_divide_by_the_sample_s_own_dimensions():
    metrics = pytest.importorskip("fastscore.metrics", exc_type=ImportError)
    found = density().estimate(X, mask=MASK, nfe=32, cond=seen(MASK))
    for metric, want in (
        (metrics.NegativeLogLikelihood(density(), nfe=32), -found.log_prob),
        (metrics.BitsPerDim(density(), 256, -2, 2, nfe=32), found.bits_per_dim(256, -2, 2)),
    ):
        for part in (slice(0, 25), slice(25, 40)):
            metric.update(X[part], mask=MASK[part], cond=seen(MASK[part]))
        assert float(metric.compute()[metric.name]) == pytest.approx(float(want.mean()), rel=1e-9)
    least, most = int(MASK.sum(1).min()), int(MASK.sum(1).max())
    assert f"{least} to {most} dims" in repr(found)


def test_a_row_program_runs_with_a_mask():
    net = Plain(8).double()
    both = [
        fs.ScoreDensity(net, SCHEDULE, "eps", program=program).estimate(X, mask=MASK, nfe=32).log_prob
        for program in (False, True)
    ]
    assert torch.allclose(*both, rtol=1e-10)


def test_the_page_s_blocks_run():
    class Padded(nn.Module):
        def forward(self, x, t, lengths=None, mask=None, node_mask=None):
            assert lengths is None or len(lengths) == len(x)
            return x

    atoms = torch.arange(4) < torch.tensor([[3], [4]])
    positions = torch.randn(2, 4, 3) * atoms[..., None]
    positions -= positions.sum(1, keepdim=True) / atoms.sum(1)[:, None, None] * atoms[..., None]
    names = {"imputer": Padded(), "sequences": Padded(), "egnn": Padded(), "step": 1, "atoms": atoms}
    names |= {"x": torch.randn(3, 4), "missing": torch.eye(3, 4) > 0, "padded": torch.randn(3, 5, 2)}
    names |= {"positions": positions}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
        exec(block, names)
    assert names["result"].dims.tolist() == [10, 4, 8]
    assert names["found"].dims.tolist() == [6, 9]
    assert bool(torch.isfinite(names["loss"]))


def imputation(count=4):
    """The exact network of a Gaussian that imputes, data, and which entries are given."""
    half = draw(5, 5, seed=8)
    cov = half @ half.T + 0.2 * torch.eye(5, dtype=torch.float64)
    x = draw(count, 5, seed=9) @ torch.linalg.cholesky(cov).T
    given = torch.rand(count, 5, generator=torch.Generator().manual_seed(1)) < 0.5
    given[:, 0], given[:, 1] = True, False
    reference = fs.Reference(torch.ones(1), torch.zeros(1, 5), cov.diagonal()[None])
    return cov, x, given, fs.ScoreDensity(ConditionalEps(cov), SCHEDULE, "eps", reference=reference, program=False)


def conditional_log_prob(cov, x, given):
    """With the noise that is left where the ODE starts."""
    rows = []
    for point, known in zip(x, given):
        mean, own = conditional(cov, point, known)
        own = own + math.exp(-SCHEDULE.log_snr_range[1]) * torch.eye(len(own), dtype=torch.float64)
        rows.append(torch.distributions.MultivariateNormal(mean, own).log_prob(point[~known]))
    return torch.stack(rows)


@pytest.mark.parametrize("trace", ["exact", "hutchinson"])
def test_the_ode_moves_the_entries_that_count_and_gives_their_conditional_density(trace):
    cov, x, given, exact = imputation()
    options = {"method": "midpoint", "steps": 256, "trace": trace, "probes": 64 if trace == "hutchinson" else 1}
    found = fs.probability_flow_log_prob(exact, x, mask=~given, given=given, **options)
    truth = conditional_log_prob(cov, x, given)
    # 256 steps of a second-order rule over a smooth path; the prior's mean is off by e^-6 of the conditional's.
    assert bool(((found.log_prob - truth).abs() < 0.01 + 4 * found.stderr).all())
    assert float(found.stderr.max()) < 0.5
    assert bool((found.truncation < 0.05).all())


def test_the_ode_of_masked_data_has_gradients_in_what_counts_and_in_what_is_given():
    cov, x, given, exact = imputation(2)
    leaf, plain = x.clone().requires_grad_(), x.clone().requires_grad_()
    found = fs.probability_flow_log_prob(exact, leaf, mask=~given, given=given, method="midpoint", steps=256).log_prob
    (gradient,) = torch.autograd.grad(found.sum(), leaf)
    (expected,) = torch.autograd.grad(conditional_log_prob(cov, plain, given).sum(), plain)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=0.01)
    assert float(expected[given].abs().max()) > 0.1


@pytest.mark.parametrize("reference", REFERENCES)
def test_the_ode_of_some_entries_is_that_of_shorter_data(reference):
    """Whatever stands outside, and whatever the network answers there; "auto" stops at the same steps."""
    kept, q = torch.arange(6) < 4, REFERENCES[reference]
    shorter = q if q.mean.shape[1] == 1 else fs.Reference(q.weight, q.mean[:, :4], q.variance[:, :4])
    plain = fs.ScoreDensity(MarginalEps(MIXTURE), SCHEDULE, "eps", reference=shorter, program=False)
    # The grid follows the reference's widest and narrowest dimension, so those have to be the same.
    masked = density(reference)
    smallest, largest = shorter.scales()
    if (smallest, largest) != q.scales():
        masked = fs.ScoreDensity(masked.model, SCHEDULE, "eps", reference=_padded(shorter), program=False)
    x = torch.where(kept, X[:3], 50.0)
    found = fs.probability_flow_log_prob(masked, x, mask=kept, cond=seen(kept.expand(3, 6)), error=0.05)
    alone = fs.probability_flow_log_prob(plain, X[:3, :4], cond=seen(torch.ones(3, 4) > 0), error=0.05)
    for name in ("log_prob", "discretization", "truncation"):
        torch.testing.assert_close(getattr(found, name), getattr(alone, name), rtol=1e-8, atol=1e-8)
    assert torch.equal(found.nfe, alone.nfe)


def _padded(reference):
    """The same mixture with two more dimensions that repeat its first."""
    mean, variance = (torch.cat([v, v[:, :2]], 1) for v in (reference.mean, reference.variance))
    return fs.Reference(reference.weight, mean, variance)


def test_nan_in_what_a_mask_leaves_out_is_told_with_its_own_remedy():
    x, mask = torch.zeros(2, 3), torch.tensor([True, True, False])
    x[:, 2] = math.nan
    density = fs.ScoreDensity(nn.Identity(), fs.VP(), "eps")
    with pytest.raises(ValueError, match=r"NaN or inf in 2 of 2 samples.* mask leaves out a number: torch.nan_to_num"):
        density.estimate(x, mask=mask, nfe=8)
    with pytest.raises(ValueError, match=r"; remove them$"):
        density.estimate(x, nfe=8)

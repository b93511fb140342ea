"""The generator's regularization term: unbiased in value and gradient, and lower exact divergence of a toy GAN."""

import pytest
import torch
import toy_gan
from analytic import ExactNet, mixture

import fastscore as fs

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

TARGET, SCHEDULE = mixture(2), fs.LogSNR(-12, 12)
X = TARGET.sample(24, seed=2)


@pytest.mark.parametrize("antithetic", [False, True])
def test_value_and_gradient_are_unbiased_for_every_sample(antithetic):
    density = fs.ScoreDensity(ExactNet(TARGET, SCHEDULE), SCHEDULE, "eps")
    x = X.clone().requires_grad_()
    (exact,) = torch.autograd.grad(-TARGET.log_prob(x).sum(), x)
    values, gradients = [], []
    for seed in range(200):
        each = fs.score_regularization(density, x, seed=seed, draws=8, antithetic=antithetic, reduction="none")
        values.append(each.detach())
        gradients.append(torch.autograd.grad(each.sum(), x)[0])
    # The range leaves out 2 e^-12 (1 / 0.09 - 1). 24 values and 48 gradients, each within 4.5 of its standard errors.
    for found, truth in ((values, -TARGET.log_prob(X)), (gradients, exact)):
        found = torch.stack(found)
        error = found.std(0) / 200**0.5
        assert bool(((found.mean(0) - truth).abs() < 4.5 * error + 1e-3).all())
    assert float(error.mean()) < 0.3 * float(exact.abs().mean())


def test_the_gradient_reaches_the_samples_and_not_the_network():
    density = fs.ScoreDensity(ExactNet(TARGET, SCHEDULE, gain=1.0), SCHEDULE, "eps")
    x = X.clone().requires_grad_()
    fs.score_regularization(density, x, seed=0).backward()
    assert density.model.gain.grad is None
    assert density.model.gain.requires_grad
    assert float(x.grad.abs().max()) > 0
    fs.density_loss(density, X, seed=0).backward()
    assert float(density.model.gain.grad.abs()) > 0


def test_descending_it_moves_samples_to_where_the_data_are():
    density = fs.ScoreDensity(ExactNet(TARGET, SCHEDULE), SCHEDULE, "eps")
    x = (X + 1.5).requires_grad_()
    before = float(TARGET.log_prob(x.detach()).mean())
    optimizer = torch.optim.Adam([x], lr=0.05)
    for step in range(60):
        optimizer.zero_grad()
        fs.score_regularization(density, x, seed=step).backward()
        optimizer.step()
    after = TARGET.log_prob(x.detach())
    assert before < -10
    assert float(after.mean()) > float(TARGET.log_prob(X).mean())  # on the peaks, which is also what it does alone


def test_the_divergence_of_the_toy_is_exact():
    torch.manual_seed(0)
    made = toy_gan.Generator()
    with torch.no_grad():
        made.steep.zero_()
        z = torch.randn(200_000, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        x, slope = made.double()(z)
        terms = torch.distributions.Normal(0.0, 1.0).log_prob(z) - slope.log() - toy_gan.DATA.log_prob(x)
    # Monte Carlo of the same integral; and G' is the derivative of G.
    assert abs(toy_gan.divergence(made) - float(terms.mean())) < 4 * float(terms.std()) / 200_000**0.5
    h = 1e-5
    with torch.no_grad():
        moved = (made(z[:9] + h)[0] - made(z[:9] - h)[0]) / (2 * h)
    assert torch.allclose(moved, slope[:9], rtol=1e-8)


@pytest.mark.long
def test_the_term_lowers_the_exact_divergence_of_a_toy_gan():
    """Three seeds, shorter than benchmarks/toy_gan.py, with the smaller of its discriminators."""
    found = {0.0: [], 0.1: []}
    for seed in range(3):
        data = toy_gan.samples(seed)
        density = toy_gan.score_network(data, seed, 400)
        for weight, values in found.items():
            values.append(toy_gan.mean_between(toy_gan.train_gan(data, density, weight, 4, seed, 600), 300, 600))
    print("KL without and with the term:", *([round(v, 3) for v in values] for values in found.values()))
    assert all(b < a for a, b in zip(*found.values()))
    assert sum(found[0.1]) < 0.9 * sum(found[0.0])

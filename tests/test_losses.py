"""The training objective: an unbiased estimate of -log p, with an exact gradient and the right minimum."""

import math

import pytest
import torch
from analytic import ExactNet, mixture
from torch import nn

import fastscore as fs
from fastscore.training.losses import density_loss

TARGET, WIDE = mixture(2), fs.LogSNR(-14, 16)
MANY = TARGET.sample(8192, seed=6)
X = MANY[:256]


@pytest.fixture(autouse=True)
def one_thread():
    """On a busy machine a second thread for so small tensors takes forty times the time that it saves."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def loss_of(schedule=WIDE, predicts="eps", gain=None):
    return fs.ScoreDensity(ExactNet(TARGET, schedule, predicts, gain), schedule, predicts)


def mean_loss(density, x=MANY, seeds=30, **cond):
    """Return the mean over seeds and its standard error."""
    with torch.no_grad():
        losses = torch.stack([density_loss(density, x, seed=seed, **cond) for seed in range(seeds)])
    return float(losses.mean()), float(losses.std()) / seeds**0.5


@pytest.mark.parametrize(
    ("schedule", "predicts"), [(WIDE, "eps"), (WIDE, "v"), (fs.Cosine(), "x0"), (fs.FlowMatching(), "flow")]
)
def test_loss_is_an_unbiased_estimate_of_minus_log_p(schedule, predicts):
    mean, error = mean_loss(loss_of(schedule, predicts))
    assert error < 0.06
    # 4 standard errors; the tails beyond [-14, 16] are e^-14 times the distance to N(0, 1).
    assert abs(mean + float(TARGET.log_prob(MANY).mean())) < 4 * error + 1e-5


def test_a_standard_normal_costs_its_entropy_constant():
    class Standard(nn.Module):
        def forward(self, x_t, t):
            return WIDE.alpha_sigma(t)[1][:, None] * x_t

    x = torch.randn(8192, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mean, error = mean_loss(fs.ScoreDensity(Standard(), WIDE), x)
    exact = 1.5 * math.log(2 * math.pi) + 0.5 * float(x.square().sum(1).mean())
    assert abs(mean - exact) < 4 * error


def test_log_snrs_are_stratified_over_the_batch_in_no_order_of_the_data():
    class Recording(nn.Module):
        def forward(self, x_t, t):
            seen.append(t)
            return x_t

    seen = []
    density = fs.ScoreDensity(Recording(), WIDE)
    for seed in range(2):
        density_loss(density, X, seed=seed)
    cells = [((t + 14) / 30 * 256).floor().long() for t in seen]
    for cell in cells:
        assert torch.equal(cell.sort().values, torch.arange(256))  # each cell of equal mass once
        # Ranks without order have a correlation of 0 +- 1/16.
        assert abs(float(torch.corrcoef(torch.stack([cell, torch.arange(256)]).double())[0, 1])) < 4 / 16
    assert not torch.equal(*cells)


def test_same_seed_same_loss_and_another_seed_another():
    density = loss_of()
    first = density_loss(density, X, seed=3)
    assert torch.equal(density_loss(density, X, seed=3), first)
    assert float((density_loss(density, X, seed=4) - first).abs()) > 1e-3
    assert first.ndim == 0
    assert density_loss(density, X.float(), seed=3).dtype == torch.float32
    # The same noise in float32: residuals near a few hundred, rounded by 1e-7, times c of e^8.
    assert float(density_loss(density, X.float(), seed=3)) == pytest.approx(float(first), abs=1e-2)


@pytest.mark.parametrize("predicts", ["eps", "x0", "v"])
def test_gradient_matches_finite_differences_at_a_fixed_seed(predicts):
    schedule = fs.LogSNR(-8, 8)
    density, x = loss_of(schedule, predicts, gain=0.9), X[:16].clone().requires_grad_()
    gain = density.model.gain
    by_gain, by_x = torch.autograd.grad(density_loss(density, x, seed=1), (gain, x))
    h = 1e-6

    def moved(step=0.0, shift=0.0):
        with torch.no_grad():
            gain.add_(step)
            value = float(density_loss(density, x + shift, seed=1))
            gain.sub_(step)
        return value

    # The loss is a quadratic of the gain: central differences are exact to rounding, 1e-13 / h.
    assert float(by_gain) == pytest.approx((moved(h) - moved(-h)) / (2 * h), rel=1e-5)
    direction = torch.zeros_like(x)
    direction[3, 1] = h
    ahead, behind = moved(shift=direction), moved(shift=-direction)
    assert float(by_x[3, 1]) == pytest.approx((ahead - behind) / (2 * h), rel=1e-4)


def test_the_exact_network_has_the_lowest_loss():
    density, found = loss_of(fs.LogSNR(-8, 8), gain=1.0), {}
    for gain in (0.9, 1.0, 1.1):
        with torch.no_grad():
            density.model.gain.fill_(gain)
            found[gain] = torch.stack([density_loss(density, MANY, seed=seed) for seed in range(10)])
    for gain in (0.9, 1.1):
        # The same noise on both sides.
        difference = found[gain] - found[1.0]
        assert float(difference.mean()) > 4 * float(difference.std()) / 10**0.5


def test_descending_the_loss_finds_the_exact_network():
    density = loss_of(fs.LogSNR(-6, 4), gain=0.5)
    optimizer = torch.optim.Adam(density.parameters(), lr=0.02)
    for step in range(100):
        optimizer.zero_grad()
        density_loss(density, MANY[:1024], seed=step).backward()
        optimizer.step()
    # Adam goes on in steps of 0.02 at most around the minimum, which 1,024 samples know to about as much.
    assert float(density.model.gain.detach()) == pytest.approx(1, abs=0.1)


def test_conditions_go_along_with_their_samples():
    schedule = fs.LogSNR(-14, 8)
    label = torch.randn(len(MANY), 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) * 3
    moved = MANY + label

    class Shifted(ExactNet):
        def forward(self, x_t, t, label, scale):
            assert scale.shape == (1,)
            alpha, _ = self.schedule.alpha_sigma(t)
            return super().forward(x_t - alpha[:, None] * label * scale, t)

    density = fs.ScoreDensity(Shifted(TARGET, schedule), schedule)
    shared = torch.ones(1, dtype=torch.float64)
    mean, error = mean_loss(density, moved, label=label, scale=shared)
    truth = -float(TARGET.log_prob(MANY).mean())
    # Above 8 the integrand misses 2 e^-8 (tr C^-1 / d - 1); below -14 the mean of |x|^2 times e^-14. 4 standard errors.
    slack = 0.5 * math.exp(-8) * 2 * (1 / 0.09 - 1) + 1e-3
    assert abs(mean - truth) < 4 * error + slack
    wrong, _ = mean_loss(density, moved, seeds=2, label=label.roll(1, 0), scale=shared)
    assert wrong > truth + 10


def test_images_and_extra_channels():
    class Wide(nn.Module):
        def forward(self, x_t, t):
            sigma = WIDE.alpha_sigma(t)[1].to(x_t)[:, None, None, None]
            return torch.cat([sigma * x_t, torch.full_like(x_t, torch.nan)], 1)

    x = torch.randn(4096, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mean, error = mean_loss(fs.ScoreDensity(Wide(), WIDE), x)
    exact = 2 * math.log(2 * math.pi) + 0.5 * float(x.square().flatten(1).sum(1).mean())
    assert abs(mean - exact) < 4 * error


def test_a_table_gives_the_sum_over_its_cells():
    table = fs.DDPM(torch.sigmoid(torch.linspace(14, -14, 1000, dtype=torch.float64)))
    times = set()

    class Recording(ExactNet):
        def forward(self, x_t, t):
            assert t.dtype == torch.int64
            times.update(t.tolist())
            return super().forward(x_t, t)

    density = fs.ScoreDensity(Recording(TARGET, table), table)
    mean, error = mean_loss(density)
    # Cells of 0.028 in log-SNR have an error of second order, 1e-4; 4 standard errors of noise.
    assert abs(mean + float(TARGET.log_prob(MANY).mean())) < 4 * error + 1e-3
    assert len(times) == 1000


def test_fitted_nodes_keep_it_unbiased():
    schedule = fs.LogSNR(-14, 12)
    density = loss_of(schedule)
    uniform = mean_loss(density)
    density.fit(TARGET.sample(400, seed=9), evaluations=20_000, progress=False)
    assert len(density.nodes.share) == 48
    mean, error = mean_loss(density)
    truth = -float(TARGET.log_prob(MANY).mean())
    # Above 12 the integrand misses e^-12 (tr C^-1 - d) / 2.
    assert abs(mean - truth) < 4 * error + 1e-4
    assert abs(uniform[0] - truth) < 4 * uniform[1] + 1e-4


def test_bad_data_get_the_errors_of_an_estimate():
    with pytest.raises(ValueError, match=r"floating point, got torch.int64; dequantize"):
        density_loss(loss_of(), torch.zeros(4, 2, dtype=torch.int64), seed=0)
    with pytest.raises(ValueError, match="NaN or inf in 1 of 2 samples, first in sample 1"):
        density_loss(loss_of(), torch.tensor([[0.0, 0.0], [0.0, torch.inf]]), seed=0)

"""The training objective: an unbiased estimate of -log p, with an exact gradient and the right minimum."""

import math

import pytest
import torch
from analytic import ExactNet, mixture
from torch import nn

import fastscore as fs
from fastscore.training.losses import density_loss
from fastscore.training.nodes import AdaptiveNodes

pytestmark = pytest.mark.usefixtures("one_thread")

TARGET, WIDE = mixture(2), fs.LogSNR(-14, 16)
MANY = TARGET.sample(8192, seed=6)
X = MANY[:256]


def loss_of(schedule=WIDE, predicts="eps", gain=None):
    return fs.ScoreDensity(ExactNet(TARGET, schedule, predicts, gain), schedule, predicts)


def mean_loss(density, x=MANY, seeds=30, **options):
    """Return the mean over seeds and its standard error."""
    with torch.no_grad():
        losses = torch.stack([density_loss(density, x, seed=seed, **options) for seed in range(seeds)])
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
    exact = 1.5 * math.log(2 * math.pi) + 0.5 * float(x.square().sum(1).mean())
    # The default reference is the network's own density and leaves no noise at all, only rounding.
    mean, error = mean_loss(fs.ScoreDensity(Standard(), WIDE, "eps"), x, seeds=2)
    assert error < 1e-12
    assert mean == pytest.approx(exact, abs=1e-12)
    mean, error = mean_loss(fs.ScoreDensity(Standard(), WIDE, "eps", reference=fs.Reference.isotropic(2.0)), x)
    assert error > 1e-3
    assert abs(mean - exact) < 4 * error


def test_log_snrs_are_stratified_over_the_batch_in_no_order_of_the_data():
    class Recording(nn.Module):
        def forward(self, x_t, t):
            seen.append(t)
            return x_t

    seen = []
    density = fs.ScoreDensity(Recording(), WIDE, "eps")
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

    density = fs.ScoreDensity(Shifted(TARGET, schedule), schedule, "eps")
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
    mean, error = mean_loss(fs.ScoreDensity(Wide(), WIDE, "eps", reference=fs.Reference.isotropic(2.0)), x)
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

    density = fs.ScoreDensity(Recording(TARGET, table), table, "eps")
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


@pytest.mark.parametrize("options", [{"antithetic": True}, {"draws": 3}, {"draws": 2, "antithetic": True}])
def test_more_evaluations_a_sample_keep_it_unbiased(options):
    schedule = fs.LogSNR(-14, 12)
    one, more = (mean_loss(loss_of(schedule), MANY[:1024], seeds=20, **chosen) for chosen in ({}, options))
    truth = -float(TARGET.log_prob(MANY[:1024]).mean())
    assert abs(more[0] - truth) < 4 * more[1] + 1e-4
    assert more[1] < one[1]  # 20 seeds know an error to a sixth, and each option lowers it by a third or more


def test_every_sample_has_its_own_unbiased_loss():
    density = loss_of(fs.LogSNR(-14, 12))
    with torch.no_grad():
        losses = [density_loss(density, X[:64], seed=s, draws=4, antithetic=True, reduction="none") for s in range(60)]
    losses = torch.stack(losses)
    assert losses.shape == (60, 64)
    error = losses.std(0) / 60**0.5
    # 64 points, each within 4 of its own standard errors; heavy tails may take one of them further.
    assert int(((losses.mean(0) + TARGET.log_prob(X[:64])).abs() > 4 * error + 1e-3).sum()) <= 1
    scalar = density_loss(density, X[:64], seed=0, draws=4, antithetic=True)
    assert float(scalar) == pytest.approx(float(losses[0].mean()), abs=1e-12)


def test_draws_have_noise_of_their_own():
    class Recording(nn.Module):
        def forward(self, x_t, t):
            alpha, sigma = WIDE.alpha_sigma(t)
            seen.append((x_t - alpha[:, None] * X.repeat(4, 1)) / sigma[:, None])
            return x_t

    seen = []
    density_loss(fs.ScoreDensity(Recording(), WIDE, "eps"), X, seed=0, draws=2, antithetic=True)
    eps = seen[0].reshape(2, 2, 256, 2)  # sign, draw, sample
    # At the clean end eps is read off x_t with a rounding error of 1e-16 e^8.
    assert torch.allclose(eps[0], -eps[1], atol=1e-8)
    assert abs(float(torch.corrcoef(eps[0].reshape(2, -1))[0, 1])) < 4 / 512**0.5


def test_a_fitted_reference_lowers_the_noise_of_the_loss_and_leaves_the_gradient():
    losses, gradients = [], []
    exact = fs.Reference(TARGET.weight, TARGET.mean, torch.full((5, 2), 0.09))
    for reference in (None, exact):
        density = fs.ScoreDensity(
            ExactNet(TARGET, fs.LogSNR(-8, 8), gain=1.0), fs.LogSNR(-8, 8), "eps", reference=reference
        )
        losses.append(mean_loss(density, X)[1])
        (gradient,) = torch.autograd.grad(density_loss(density, X, seed=0), density.parameters())
        gradients.append(float(gradient))
    assert losses[1] < 1e-6 < 0.01 < losses[0]  # the target itself: rounding of its float32 means is left
    assert gradients[0] == pytest.approx(gradients[1], rel=1e-9)


def test_adaptive_nodes_follow_the_gradient_and_keep_the_loss_unbiased():
    schedule = fs.LogSNR(-14, 12)
    density, nodes = loss_of(schedule), AdaptiveNodes(schedule)
    assert torch.allclose(nodes.density.share, torch.full((24,), 1 / 24, dtype=torch.float64))
    losses = []
    with torch.no_grad():
        for seed in range(60):
            losses.append(density_loss(density, X, seed=seed, nodes=nodes))
    losses, truth = torch.stack(losses), -float(TARGET.log_prob(X).mean())
    assert abs(float(losses.mean()) - truth) < 4 * float(losses.std()) / 60**0.5 + 1e-4
    # E|eps - eps_hat|^2 rises from 0 at the noise to d = 2 at the data; 0.1 / 24 of the draws go anywhere.
    middle = (nodes.edges[1:] + nodes.edges[:-1]) / 2
    residual = torch.stack([mean_residual(schedule, at) for at in middle])
    expected = 0.9 * residual.sqrt() / residual.sqrt().sum() + 0.1 / 24
    # Each bin remembers 64 squares, of mean 2 and deviation 2 or wider: an error of an eighth or two, half in the root.
    assert torch.allclose(nodes.density.share, expected, rtol=0.4)
    again = AdaptiveNodes(schedule)
    again.load_state_dict(nodes.state_dict())
    assert torch.equal(again.density.share, nodes.density.share)


def mean_residual(schedule, log_snr):
    alpha, sigma = schedule.alpha_sigma(log_snr.expand(len(MANY)))
    eps = torch.randn(MANY.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    x_t = alpha[:, None] * MANY + sigma[:, None] * eps
    eps_hat = (x_t - alpha[:, None] * TARGET.denoised(x_t, alpha, sigma)) / sigma[:, None]
    return (eps - eps_hat).square().sum(1).mean()


def test_antithetic_noise_and_adaptive_nodes_lower_the_variance_of_the_gradient():
    """At equal evaluations: 128 pairs beside 256 single rows."""
    torch.manual_seed(0)
    schedule = fs.LogSNR(-8, 8)
    net = MLP()
    density, nodes = fs.ScoreDensity(net, schedule, "v"), AdaptiveNodes(schedule)
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for step in range(300):
        x = MANY[torch.randperm(len(MANY), generator=torch.Generator().manual_seed(step))[:128]].float()
        optimizer.zero_grad()
        density_loss(density, x, seed=step, antithetic=True, nodes=nodes).backward()
        optimizer.step()
    ways = {"plain": (256, {}), "pairs": (128, {"antithetic": True})}
    ways["pairs, adaptive"] = (128, {"antithetic": True, "nodes": nodes})
    variance = {}
    for name, (batch, options) in ways.items():
        gradients = []
        for seed in range(80):
            x = MANY[torch.randperm(len(MANY), generator=torch.Generator().manual_seed(seed))[:batch]].float()
            loss = density_loss(density, x, seed=1000 + seed, **options)
            gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, net.parameters())]))
        variance[name] = float(torch.stack(gradients).var(0).sum())
    # Measured 0.5 and 0.4 of it; 80 seeds know a sum of many variances to a tenth.
    assert variance["pairs"] < 0.75 * variance["plain"], variance
    assert variance["pairs, adaptive"] < variance["pairs"], variance


class MLP(nn.Module):
    def __init__(self, width=64):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.last = nn.Linear(width, 2)

    def forward(self, x_t, log_snr):
        angle = log_snr[:, None] / 8
        return self.last(self.net(torch.cat([x_t, angle, angle.sin(), angle.cos()], 1)))


def test_unknown_options_are_refused():
    with pytest.raises(ValueError, match="reduction must be one of mean, none; got 'sum'"):
        density_loss(loss_of(), X, seed=0, reduction="sum")
    with pytest.raises(ValueError, match="draws must be at least 1, got 0"):
        density_loss(loss_of(), X, seed=0, draws=0)


def test_bad_data_get_the_errors_of_an_estimate():
    with pytest.raises(ValueError, match=r"floating point, got torch.int64; dequantize"):
        density_loss(loss_of(), torch.zeros(4, 2, dtype=torch.int64), seed=0)
    with pytest.raises(ValueError, match="NaN or inf in 1 of 2 samples, first in sample 1"):
        density_loss(loss_of(), torch.tensor([[0.0, 0.0], [0.0, torch.inf]]), seed=0)


@pytest.mark.parametrize("schedule", [fs.VP(), fs.DDPM.linear(100), fs.EDM()])
@pytest.mark.parametrize("size", [1e10, 1e19, 1e30, 1e38])
def test_a_loss_is_a_number_or_a_sentence(schedule, size):
    """Where an estimate refuses squares that overflow, so does the loss; its nodes learn nothing from them."""
    density = fs.ScoreDensity(ExactNet(mixture(3), schedule), schedule, "eps")
    x = torch.randn(4, 3)
    x[1] *= size
    nodes = AdaptiveNodes(schedule)
    for loss in (
        lambda: density_loss(density, x, seed=0, nodes=nodes),
        lambda: density_loss(density, x.double(), seed=0),
        lambda: fs.DiffusionLoss(WithCondition(density.model), schedule, predicts="eps")(x, torch.zeros(4, 1), seed=0),
    ):
        try:
            assert bool(torch.isfinite(loss()))
        except ValueError as error:
            assert "for sample 1, the first of 1 among 4" in str(error)  # noqa: PT017
            assert size > 1e18
            assert "too large for squares in torch.float" in str(error)  # noqa: PT017
    assert bool(torch.isfinite(nodes.density.quantile(torch.linspace(0.1, 0.9, 5, dtype=torch.float64))).all())


class WithCondition(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x_t, t, c):
        return self.net(x_t, t)


def test_a_network_that_answers_nan_has_no_loss():
    class NaN(nn.Module):
        def forward(self, x_t, t):
            return x_t * torch.nan

    with pytest.raises(ValueError, match=r"the loss is nan for sample 0, the first of 4 among 4: .*check its weights"):
        density_loss(fs.ScoreDensity(NaN(), fs.VP(), "eps"), torch.randn(4, 3), seed=0)

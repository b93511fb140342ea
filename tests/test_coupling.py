"""A flow of coupled noise is seen, and no flow of independent noise is taken for one, exact, learned or untrained."""

import math
import warnings

import pytest
import torch
from analytic import ExactNet, Target, ill_conditioned, mixture
from torch import nn

import fastscore as fs
from fastscore.adapters.clocks import OffsetFlow
from fastscore.estimator.coupling import coupled_shares
from fastscore.estimator.network_density import network_of
from fastscore.metrics import NegativeLogLikelihood
from fastscore.transforms import zscore

MESSAGE = "looks trained with coupled noise.*use fastscore.probability_flow_log_prob"


class Coupled(nn.Module):
    """The exact velocity where noise and data N(mean, C) are jointly Gaussian: x = mean + root(C) (rho eps + ...).

    With rho = 1 it is the flow of optimal transport, with rho = 0 that of independent noise.
    """

    def __init__(self, mean, cov, rho=1.0, data_at=1, calls=None):
        super().__init__()
        value, self.basis = torch.linalg.eigh(cov.double())
        self.root, self.mean, self.rho, self.data_at = value.sqrt(), mean.double(), rho, data_at
        self.rows = 0

    def forward(self, x_t, t, shift=None):
        self.rows += len(x_t)
        mean = self.mean if shift is None else self.mean + shift.double()
        a = (t.double() if self.data_at == 1 else 1 - t.double())[:, None]
        s, c, rho = 1 - a, self.root, self.rho
        # Cov(x - eps, x_t) / Var(x_t) in the eigenbasis of C, with x_t = a x + s eps and Cov(x, eps) = rho c.
        gain = (a * c**2 - s + rho * c * (s - a)) / (a**2 * c**2 + s**2 + 2 * rho * a * s * c)
        v = mean + ((x_t.double() - a * mean) @ self.basis * gain) @ self.basis.T
        return (v if self.data_at == 1 else -v).to(x_t.dtype)


class WithSigma(nn.Module):
    """Conditional flow matching with x_t = t x + (1 - t) eps + sigma z, data N(mean, std^2)."""

    def __init__(self, sigma):
        super().__init__()
        self.sigma, self.mean, self.std = sigma, torch.tensor([1.0, -2.0]).double(), torch.tensor([0.5, 1.5]).double()

    def forward(self, x_t, t):
        t = t[:, None].double()
        r = (x_t.double() - t * self.mean) / (t**2 * self.std**2 + (1 - t) ** 2 + self.sigma**2)
        return (self.mean + (t * self.std**2 - (1 - t)) * r).to(x_t.dtype)


def gaussian(mean, cov):
    return Target(torch.ones(1), torch.as_tensor(mean)[None], torch.as_tensor(cov)[None])


def share(density, x, **cond):
    """Return the share of the data's variance that predictions have of the noise, 0 where nothing looks coupled."""
    shares = coupled_shares(network_of(density), density.check(x, None, cond), density.reference)
    return 0.0 if shares is None else shares[0]


NARROW = torch.eye(2) * torch.tensor([0.25, 2.25])
ROTATED = torch.tensor([[1.0, 0.8], [0.8, 1.0]])
GAUSSIANS = {
    "narrow": (torch.tensor([1.0, -2.0]), NARROW),
    "rotated": (torch.tensor([0.5, 0.5]), ROTATED),
    "d=32": (torch.zeros(32), torch.diag(torch.linspace(0.2, 3.0, 32))),
}


@pytest.mark.parametrize("data_at", [0, 1])
@pytest.mark.parametrize("rho", [1.0, 0.8])
@pytest.mark.parametrize("name", GAUSSIANS)
def test_a_coupled_flow_is_warned_of_once_and_its_remedy_is_right(name, rho, data_at):
    mean, cov = GAUSSIANS[name]
    target = gaussian(mean, cov)
    x = target.sample(24, seed=1)
    density = fs.ScoreDensity(Coupled(mean, cov, rho, data_at), fs.FlowMatching(data_at), "flow")
    with pytest.warns(UserWarning, match=MESSAGE):
        found = density.estimate(x, nfe=128)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        density.estimate(x, nfe=64)
    # The formula is wrong by nats, the ODE right to its tolerance of 0.01.
    assert float((found.log_prob - target.log_prob(x)).mean()) < -2.0
    ode = fs.probability_flow_log_prob(density, x[:4]).log_prob
    assert float((ode - target.log_prob(x[:4])).abs().max()) < 0.05


@pytest.mark.parametrize("count", [1, 2, 5, 12])
def test_a_few_samples_are_enough(count):
    mean, cov = GAUSSIANS["d=32"]
    density = fs.ScoreDensity(Coupled(mean, cov), fs.FlowMatching(), "flow")
    # Var x_hat = C; in units of what is known of Var x, 51 in all.
    assert 0.5 < share(density, gaussian(mean, cov).sample(count, seed=3)) < 2


def test_conditions_go_with_their_samples():
    mean, cov = GAUSSIANS["narrow"]
    shift = 0.3 * torch.randn(16, 2, generator=torch.Generator().manual_seed(0))
    x = gaussian(mean, cov).sample(16, seed=1) + shift
    density = fs.ScoreDensity(Coupled(mean, cov), fs.FlowMatching(), "flow")
    with pytest.warns(UserWarning, match=MESSAGE):
        density.estimate(x, nfe=16, shift=shift)


def scaled(target, factor):
    return Target(target.weight, target.mean * factor, target.cov * factor**2)


TARGETS = {
    "mixture d=2": mixture(2),
    "mixture d=8": mixture(8),
    "mixture d=64": mixture(64, std=0.1),
    "ill conditioned": ill_conditioned(),
    "one direction": gaussian(torch.zeros(16), torch.diag(torch.tensor([25.0] + [0.01] * 15))),
    "large": scaled(mixture(4), 100.0),
    "small": scaled(mixture(4), 0.01),
    "far": gaussian(torch.full((4,), 30.0), torch.eye(4)),
    "standard": gaussian(torch.zeros(8), torch.eye(8)),
    "two far modes": Target(
        torch.tensor([0.98, 0.02]), torch.tensor([[0.0, 0.0], [40.0, 0.0]]), torch.eye(2).expand(2, 2, 2)
    ),
}


@pytest.mark.parametrize("fitted", [False, True])
@pytest.mark.parametrize("count", [1, 16])
@pytest.mark.parametrize("schedule", [fs.FlowMatching(0), fs.FlowMatching(1), OffsetFlow(1e-3), fs.VP()], ids=repr)
@pytest.mark.parametrize("name", TARGETS)
def test_no_exact_flow_of_independent_noise_looks_coupled(name, schedule, count, fitted):
    target = TARGETS[name]
    x = target.sample(count, seed=1)
    density = fs.ScoreDensity(ExactNet(target, schedule, "flow"), schedule, "flow")
    if fitted:
        density.reference = fs.Reference(
            torch.ones(1), target.sample(500, seed=2).mean(0)[None], target.sample(500, seed=2).var(0)[None]
        )
    assert share(density, x) == 0
    assert share(density, 5 * x) == 0  # outliers


@pytest.mark.parametrize("sigma", [0.0, 0.01, 0.1])
def test_noise_that_is_added_to_the_path_is_no_coupling(sigma):
    net = WithSigma(sigma)
    x = gaussian(net.mean, torch.diag(net.std**2)).sample(16, seed=1)
    density = fs.ScoreDensity(net, fs.FlowMatching(), "flow")
    assert share(density, x) == 0


@pytest.mark.parametrize("sigma", [0.01, 0.1, 0.5])
def test_a_conditional_flow_with_added_noise_is_exact_on_its_own_schedule(sigma):
    net = WithSigma(sigma)
    target = gaussian(net.mean, torch.diag(net.std**2))
    x = target.sample(16, seed=1)
    density = fs.ScoreDensity(net, fs.ConditionalFlow(sigma), "flow")
    # With the target as reference the integrand is that of a wrong convention alone: rounding is left.
    density.reference = fs.Reference(torch.ones(1), net.mean[None], (net.std**2)[None])
    right = density.estimate(x, nfe=128).log_prob
    assert float((right - target.log_prob(x)).abs().max()) < 1e-8
    plain = fs.ScoreDensity(net, fs.FlowMatching(), "flow", reference=density.reference)
    wrong = (plain.estimate(x, nfe=128).log_prob - target.log_prob(x)).abs().max()
    assert float(wrong) > (0.01 if sigma > 0.01 else 1e-5)


@pytest.mark.parametrize("data_at", [0, 1])
@pytest.mark.parametrize("sigma", [1e-3, 0.1, 0.9])
def test_times_and_noise_of_a_conditional_flow(sigma, data_at):
    schedule = fs.ConditionalFlow(sigma, data_at)
    t = torch.linspace(0.001, 0.999, 50, dtype=torch.float64)
    s = t if data_at == 1 else 1 - t
    alpha, std = schedule.alpha_sigma(t)
    assert torch.equal(alpha, s)
    assert torch.allclose(std, ((1 - s) ** 2 + sigma**2).sqrt())
    assert torch.allclose(schedule.time(schedule.log_snr(t)), t, rtol=1e-9, atol=1e-9)
    again = schedule.scale(schedule.log_snr(t))
    assert torch.allclose(again[0], alpha, rtol=1e-9)
    assert torch.allclose(again[1], std, rtol=1e-9)
    d_alpha, d_sigma = schedule.derivatives(t)
    sign = 1 if data_at == 1 else -1
    assert torch.allclose(d_alpha, torch.full_like(t, sign))
    assert torch.allclose(d_sigma, -sign * (1 - s) / std)
    low, high = schedule.log_snr_range
    assert high == pytest.approx(-2 * math.log(sigma))
    assert low < -10


@pytest.mark.parametrize("sigma", [0.0, 1.0, -0.1])
def test_a_conditional_flow_needs_noise(sigma):
    with pytest.raises(ValueError, match=f"ConditionalFlow needs 0 < sigma < 1, got {sigma}; without added noise use"):
        fs.ConditionalFlow(sigma)


class Untrained(nn.Module):
    """Its last layer starts at zero, as those of many networks do."""

    def __init__(self, calls=None):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, x, t):
        return self.weight * x


def test_an_untrained_network_is_called_that_and_is_the_transport_of_a_standard_normal():
    x = torch.randn(24, 2, generator=torch.Generator().manual_seed(0))
    density = fs.ScoreDensity(Untrained(), fs.FlowMatching(), "flow")
    with pytest.warns(UserWarning, match="looks trained with coupled noise .*, or not trained to the end: where"):
        density.estimate(x, nfe=32)
    # The velocity zero carries N(0, 1) to itself: each number is right for the other reading.
    expected = torch.distributions.Normal(0.0, 1.0).log_prob(x).sum(1)
    assert torch.allclose(fs.probability_flow_log_prob(density, x).log_prob.float(), expected, atol=0.05)


@pytest.mark.parametrize("mean", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("std", [1.0, 0.9, 0.5, 0.1])
@pytest.mark.parametrize("d", [2, 8])
def test_the_transport_to_standardized_data_is_seen_though_it_is_short(d, std, mean):
    cov, mean = std**2 * torch.eye(d), torch.full((d,), mean)
    x = gaussian(mean, cov).sample(60, seed=0).float()
    density = fs.ScoreDensity(Coupled(mean, cov), fs.FlowMatching(), "flow")
    with pytest.warns(UserWarning, match=MESSAGE):
        found = density.estimate(x, nfe=64)
    # Wrong by 3.5 nats a dimension at least, of which a mean over 60 samples with 64 evaluations shows most.
    assert float((found.log_prob - gaussian(mean, cov).log_prob(x)).mean()) < -2.0 * d


class Monotone(nn.Module):
    """The transport of N(0, 1) to two modes at +-m of variance 1 in all, each entry by itself."""

    def __init__(self, m):
        super().__init__()
        self.z = torch.linspace(-7, 7, 4001, dtype=torch.float64)
        x = torch.linspace(-9, 9, 20001, dtype=torch.float64)
        std = math.sqrt(1 - m * m)
        cdf = 0.5 * (torch.special.ndtr((x - m) / std) + torch.special.ndtr((x + m) / std))
        self.x = self._at(torch.special.ndtr(self.z), cdf, x)

    @staticmethod
    def _at(value, grid, of):
        i = torch.searchsorted(grid, value.contiguous()).clamp(1, len(grid) - 1)
        w = ((value - grid[i - 1]) / (grid[i] - grid[i - 1]).clamp(min=1e-12)).clamp(0, 1)
        return of[i - 1] + w * (of[i] - of[i - 1])

    def forward(self, x_t, t):
        v = torch.empty_like(x_t)
        for u in t.unique():
            path = (1 - u.double()) * self.z + u.double() * self.x
            v[t == u] = self._at(x_t[t == u].double(), path, self.x - self.z).float()
        return v


@pytest.mark.parametrize("d", [2, 8])
@pytest.mark.parametrize("m", [0.3, 0.8, 0.97])
def test_the_transport_to_standardized_modes_is_seen(m, d):
    generator = torch.Generator().manual_seed(0)
    side = 2.0 * torch.randint(0, 2, (100, d), generator=generator) - 1
    x = m * side + math.sqrt(1 - m * m) * torch.randn(100, d, generator=generator)
    # A transport of noise to data of variance 1, both by definition; 4 and 16 samples tell it to a third.
    assert 0.6 < share(fs.ScoreDensity(Monotone(m), fs.FlowMatching(), "flow"), x) < 1.5


CALLS = {
    "log_prob": lambda density, x: density.log_prob(x, nfe=16),
    "estimate": lambda density, x: density.estimate(x, nfe=16),
    "compare": lambda density, x: density.compare(x, {}, {}, nfe=16),
    "fit": lambda density, x: density.fit(x, evaluations=1600, progress=False),
    "as_distribution": lambda density, x: fs.as_distribution(density, (2,)).log_prob(x),
    "CapturedDensity": lambda density, x: fs.CapturedDensity(density, x, nfe=16)(x),
    "compare_densities": lambda density, x: fs.compare_densities(density, density.with_reference(None), x, nfe=16),
    "metrics": lambda density, x: NegativeLogLikelihood(density, nfe=16).update(x),
    "Transformed": lambda density, x: fs.Transformed(density, zscore(0.0, 1.0)).estimate(x, nfe=16),
}


@pytest.mark.parametrize("call", CALLS)
def test_every_call_of_the_formula_warns_and_a_second_one_asks_nothing(call):
    mean, cov = GAUSSIANS["narrow"]
    x = gaussian(mean, cov).sample(24, seed=1).float()
    density = fs.ScoreDensity(Coupled(mean, cov), fs.FlowMatching(), "flow")
    with pytest.warns(UserWarning, match=MESSAGE):
        CALLS[call](density, x)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*coupled noise")
        if call != "compare_densities":  # whose second density is another one every time
            CALLS[call](density, x)


def test_the_ode_is_not_warned_of():
    mean, cov = GAUSSIANS["narrow"]
    density = fs.ScoreDensity(Coupled(mean, cov), fs.FlowMatching(), "flow")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*coupled noise")
        fs.probability_flow_log_prob(density, gaussian(mean, cov).sample(24, seed=1))


def test_log_prob_under_autograd_asks_once():
    mean, cov = GAUSSIANS["narrow"]
    x = gaussian(mean, cov).sample(24, seed=1).float()
    net = Coupled(mean, cov)
    density, rows = fs.ScoreDensity(net, fs.FlowMatching(), "flow"), []
    for seed in range(3):
        net.rows = 0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            density.log_prob(x.clone().requires_grad_(), nfe=16, seed=seed).sum().backward()
        rows.append(net.rows)
    assert rows[1] == rows[2]
    assert rows[0] > rows[1]


class Small(nn.Module):
    def __init__(self, d, width=64):
        super().__init__()
        layers = [nn.Linear(d + 1, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, d)]
        self.net = nn.Sequential(*layers)

    def forward(self, x, t):
        return self.net(torch.cat([x, t[:, None].to(x)], 1))


def test_a_learning_network_is_silent_at_every_step_and_a_coupled_one_is_not():
    """Two moons: the loss of plain flow matching, and of pairs matched in minibatches by their angle's order."""
    generator = torch.Generator().manual_seed(0)

    def moons(count):
        angle, side = (torch.rand(count, generator=generator) for _ in range(2))
        side = (side < 0.5).float() * 2 - 1
        x = torch.stack([side * (math.pi * angle).cos() + 0.5 * (1 - side), side * (math.pi * angle).sin()], 1)
        return (x - torch.tensor([0.5, 0.0])) / 0.8 + 0.05 * torch.randn(count, 2, generator=generator)

    shares = {}
    for coupled in (False, True):
        torch.manual_seed(0)
        net = Small(2)
        optimizer, test = torch.optim.Adam(net.parameters(), 2e-3), moons(16)
        for step in range(601):
            if step % 100 == 0:
                density = fs.ScoreDensity(net, fs.FlowMatching(), "flow")
                shares[coupled, step] = share(density, test)
            x, eps, t = moons(128), torch.randn(128, 2, generator=generator), torch.rand(128, 1, generator=generator)
            if coupled:  # each half in the order of the other coordinate: near to optimal transport
                x = x[x[:, 0].argsort()]
                eps = eps[eps[:, 0].argsort()]
                for part in torch.arange(128).split(16):
                    x[part], eps[part] = x[part][x[part, 1].argsort()], eps[part][eps[part, 1].argsort()]
            loss = (net(t * x + (1 - t) * eps, t[:, 0]) - (x - eps)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    print(shares)
    assert all(shares[False, step] == 0 for step in range(200, 601, 100))
    assert all(shares[True, step] > 0.4 for step in range(300, 601, 100))


def test_other_predictions_are_not_called_and_the_check_is_cheap():
    mean, cov = GAUSSIANS["narrow"]
    net = Coupled(mean, cov)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", MESSAGE)
        fs.ScoreDensity(net, fs.FlowMatching(), "eps").estimate(torch.randn(16, 2), nfe=16)
        fs.ScoreDensity(net, fs.FlowMatching(), "flow").estimate(torch.randn(8, 2), nfe=16)  # too few to tell
    mean = torch.zeros(64)
    independent = Coupled(mean, torch.eye(64), rho=0.0)
    share(fs.ScoreDensity(independent, fs.FlowMatching(), "flow"), torch.randn(64, 64))
    assert independent.rows == 4 * 8  # and twice 16 more only where that looks coupled


def test_a_call_of_few_numbers_leaves_the_question_to_the_next():
    mean = torch.linspace(-1, 1, 6)
    density = fs.ScoreDensity(Coupled(mean, 0.25 * torch.eye(6)), fs.FlowMatching(), "flow")
    x = mean + 0.5 * torch.randn(48, 6, generator=torch.Generator().manual_seed(0))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", MESSAGE)
        density.estimate(x[:2], nfe=16)
    with pytest.warns(UserWarning, match=MESSAGE):
        density.estimate(x, nfe=16)

"""torchcfm: its own flow matchers and networks, without its optimal transport, which needs a library of 170 MB."""

import pytest
import torch
from adapters.bare import load
from adapters.exact import TARGET, assert_exact, column, exact, noised, relative
from torch import nn

from fastscore.adapters import from_torchcfm
from fastscore.process.predictions import coefficients

matching, models, unet = load("torchcfm", "conditional_flow_matching", "models", "models.unet")
MATCHERS = {
    "straight": lambda: matching.ConditionalFlowMatcher(sigma=0.0),
    "straight, noise": lambda: matching.ConditionalFlowMatcher(sigma=0.1),
    "target": lambda: matching.TargetConditionalFlowMatcher(sigma=0.0),
    "target, noise": lambda: matching.TargetConditionalFlowMatcher(sigma=0.02),
    "circle": lambda: matching.VariancePreservingConditionalFlowMatcher(sigma=0.0),
    "circle, noise": lambda: matching.VariancePreservingConditionalFlowMatcher(sigma=0.1),
}


class Velocity(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(5, 4)

    def forward(self, t, x, y=None):
        return self.layer(torch.cat([x, t[:, None]], 1)) * (1 if y is None else y[:, None])


class Exact(nn.Module):
    """E[u_t | x_t] of a matcher, from the definition: u is linear in data and source, whose means given x_t are known.

    The source x_0 and the matcher's own noise z make up the noise n of x_t, and E[x_0 | n] is its regression on n.
    """

    def __init__(self, matcher):
        super().__init__()
        self.matcher = matcher

    def forward(self, t, x):
        matcher, wide, zero, one = self.matcher, t.double(), torch.zeros(1, 1), torch.ones(1, 1)
        alpha, source = (matcher.compute_mu_t(*pair, wide[:, None]).reshape(-1) for pair in ((zero, one), (one, zero)))
        added = torch.as_tensor(matcher.compute_sigma_t(wide), dtype=torch.float64).expand(len(wide))
        total = (source**2 + added**2).sqrt()
        noise, x1 = exact(x, alpha, total)
        x0 = column(source / total, x) * noise
        # The target's u is a function of x_1 and x_t; the others' are linear in x_0 and x_1.
        return matcher.compute_conditional_flow(x0, x1, column(wide, x), x.double()).to(x.dtype)


def test_outputs_are_those_of_the_network_however_it_is_called():
    x, t, y = torch.randn(3, 4), torch.tensor([0.1, 0.5, 0.9]), torch.tensor([1.0, 2.0, 3.0])
    net, matcher = Velocity(), MATCHERS["straight"]()
    density = from_torchcfm(net, matcher)
    assert torch.equal(density.model(x, t, y=y), net(t, x, y=y))
    found = density.estimate(x, nfe=16, y=y).log_prob
    assert float((found - density.estimate(x, nfe=16, y=y.flip(0)).log_prob).abs()[[0, 2]].min()) > 1e-3
    mlp = models.MLP(4, time_varying=True)
    both = from_torchcfm(mlp, matcher).model(x, t)
    assert torch.equal(both, mlp(torch.cat([x, t[:, None]], 1)))
    images = unet.UNetModel(dim=(1, 8, 8), num_channels=32, num_res_blocks=1, channel_mult=(1, 2), num_classes=3,
                            class_cond=True).eval()  # fmt: skip
    pictures, labels = torch.randn(3, 1, 8, 8), torch.tensor([0, 1, 2])
    with torch.no_grad():
        own = images(t, pictures, labels)
        assert torch.equal(from_torchcfm(images, matcher).model(pictures, t, y=labels), own)

    class DataFirst(nn.Module):
        def forward(self, x, time):
            return x * time[:, None]

    class Unnamed(nn.Module):
        def forward(self, *args):
            return args[0] - args[1][:, None]

    assert torch.equal(from_torchcfm(DataFirst(), matcher).model(x, t), x * t[:, None])
    assert torch.equal(from_torchcfm(Unnamed(), matcher, call="x, t").model(x, t), x - t[:, None])
    with pytest.raises(ValueError, match="call must be one of 't, x', 'x, t', 'cat', got None for Unnamed; say how"):
        from_torchcfm(Unnamed(), matcher)


@pytest.mark.parametrize("name", MATCHERS)
def test_samples_and_velocities_are_those_of_the_matcher(name):
    """Without noise of its own sample by sample, with it in mean and variance, of which 200,000 draws know 0.5 %."""
    matcher, t = MATCHERS[name](), torch.linspace(0.02, 0.98, 9, dtype=torch.float64)
    schedule = from_torchcfm(Velocity(), matcher).schedule
    x, eps, x_t = noised(schedule, t, shape=(4,))
    a, b, _ = (column(c, x) for c in coefficients("flow", schedule, t))
    if "noise" not in name or "target" in name:  # whose path has no other noise than its own
        _, own, u, drawn = matcher.sample_location_and_conditional_flow(eps, x, t=t, return_noise=True)
        if "target" in name:
            eps = drawn
            x_t = sum(column(scale, x) * part for scale, part in zip(schedule.alpha_sigma(t), (x, eps)))
        assert relative(x_t, own) < 1e-12
        assert relative(a * eps + b * x, u) < 1e-9
        return
    generator = torch.Generator().manual_seed(0)
    for i in (0, 4, 8):
        source = torch.randn(200_000, 1, generator=generator, dtype=torch.float64)
        with torch.random.fork_rng():
            torch.manual_seed(1)
            each = torch.full((len(source),), float(t[i]), dtype=torch.float64)
            _, own, u = matcher.sample_location_and_conditional_flow(source, torch.full_like(source, 0.7), t=each)
        alpha, sigma = (float(v) for v in schedule.alpha_sigma(t[i]))
        noise = (own - alpha * 0.7) / sigma
        assert float(noise.mean()) == pytest.approx(0, abs=0.01)
        assert float(noise.var()) == pytest.approx(1, abs=0.015)
        slope = float((noise * (u - u.mean())).mean())  # the regression of u on the noise is what a network learns
        assert slope == pytest.approx(float(a[i, 0]), abs=0.02 * abs(float(a[i, 0])) + 0.01)
        assert float(u.mean()) == pytest.approx(0.7 * float(b[i, 0]), abs=0.02)


@pytest.mark.parametrize("name", MATCHERS)
def test_log_prob_of_an_exact_network(name):
    assert_exact(from_torchcfm(Exact(MATCHERS[name]()), MATCHERS[name](), program=False))


def test_it_is_the_likelihood_by_the_ode_of_its_own_velocity():
    """The library integrates velocities itself: dx/dt = v, and log p by its divergence, from noise at t = 0."""
    from fastscore import probability_flow_log_prob

    density = from_torchcfm(Exact(MATCHERS["circle"]()), MATCHERS["circle"](), program=False)
    x = TARGET.sample(4, seed=2).reshape(-1, 1, 2, 2)
    found = probability_flow_log_prob(density, x, method="midpoint", steps=64)
    assert float((found.log_prob - TARGET.log_prob(x.flatten(1))).abs().max()) < 0.05  # of second order in the step


def without_init(kind):
    made = object.__new__(getattr(matching, kind))
    made.sigma = 0.1
    return made


class Cosine(matching.ConditionalFlowMatcher):
    """A path of one's own under the name of a known one."""

    def compute_mu_t(self, x0, x1, t):
        t = t.reshape(-1, 1)
        return torch.cos(torch.pi / 2 * t) ** 2 * x0 + torch.sin(torch.pi / 2 * t) ** 2 * x1


class SameStraight(matching.ConditionalFlowMatcher):
    """A class of one's own with the path of its base."""


def test_the_path_is_what_a_matcher_does_and_not_its_name():
    own, known = (from_torchcfm(Velocity(), kind(0.1)) for kind in (SameStraight, matching.ConditionalFlowMatcher))
    assert repr(own.schedule) == repr(known.schedule)


class torch_wrapper(nn.Module):  # as torchcfm.utils has it, whose import wants torchdyn
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, t, x, *args, **kwargs):
        return self.model(torch.cat([x, t.repeat(x.shape[0])[:, None]], 1))


def test_the_wrapper_for_torchdyn_is_looked_through():
    net = nn.Linear(5, 4)
    x, t = torch.randn(3, 4), torch.tensor([0.1, 0.5, 0.9])
    density = from_torchcfm(torch_wrapper(net), MATCHERS["straight"]())
    assert torch.equal(density.model(x, t), net(torch.cat([x, t[:, None]], 1)))
    assert torch.equal(density.model(x[1:2], t[1:2]), torch_wrapper(net)(t[1], x[1:2]))  # one time, as it is called


@pytest.mark.parametrize(
    ("give", "error", "message"),
    [
        (lambda: (lambda x: x, None), TypeError, "model must be a torch module, got function; wrap"),
        (lambda: (Velocity(), None), TypeError, "matcher must be a flow matcher of torchcfm .* got NoneType without"),
        (
            lambda: (Velocity(), without_init("ExactOptimalTransportConditionalFlowMatcher")),
            ValueError,
            "matcher must be one that draws noise independently of the data, got ExactOptimal.*; take probability_flow",
        ),
        (
            lambda: (Velocity(), without_init("SchrodingerBridgeConditionalFlowMatcher")),
            ValueError,
            "got SchrodingerBridgeConditionalFlowMatcher",
        ),
        (
            lambda: (Velocity(), Cosine(0.0)),
            ValueError,
            r"matcher must be one whose mean, noise and velocity are those of Cond.*, got Cosine with another path;",
        ),
        (lambda: (Velocity(), matching.ConditionalFlowMatcher(1.5)), ValueError, "sigma must be between 0 and 1, got"),
    ],
)  # fmt: skip
def test_bad_input_is_explained(give, error, message):
    with pytest.raises(error, match=message):
        from_torchcfm(*give())

"""sbi: its own estimators, networks and potential; exact networks inside its estimators' preconditioning."""

import pytest
import torch
from adapters.exact import TARGET, assert_exact, column, exact, noised, relative
from analytic import Target
from torch import nn

from fastscore import as_distribution, from_model, per_sample
from fastscore.adapters import from_sbi
from fastscore.process.predictions import eps_from
from fastscore.reference.fitting import fit_mixture

estimators = pytest.importorskip("sbi.neural_nets.estimators.score_estimator")
flow = pytest.importorskip("sbi.neural_nets.estimators.flowmatching_estimator")
builders = pytest.importorskip("sbi.neural_nets.net_builders.vector_field_nets")
posteriors = pytest.importorskip("sbi.inference.posteriors.vector_field_posterior")
potentials = pytest.importorskip("sbi.inference.potentials.vector_field_potential")

D, CONDITION = 4, 2
MEAN_0, STD_0 = torch.tensor([0.3, -0.2, 0.1, 0.0]), torch.tensor([0.8, 1.1, 0.9, 1.2])
# sbi ends its ODE in the Gaussian that N(0, 1) in every dimension becomes, so its likelihood wants such marginals.
CORRELATED = Target(torch.ones(1), torch.zeros(1, D), (0.6 ** (torch.arange(D)[:, None] - torch.arange(D)).abs())[None])
CLASSES = {
    "vp": estimators.VPScoreEstimator,
    "subvp": estimators.SubVPScoreEstimator,
    "ve": estimators.VEScoreEstimator,
    "flow": flow.FlowMatchingEstimator,
}


def shifted(condition):
    """The target is theta - (c1, c2, -c1, -c2): what an exact posterior must do with its observation."""
    return torch.cat([condition, -condition], -1)


class Exact(nn.Module):
    """The raw network for which the estimator of a kind is exact: sbi's preconditioning solved for it."""

    def __init__(self, kind, target, noise_scale=1e-3):
        super().__init__()
        self.kind, self.target, self.noise_scale, self.estimator = kind, target, noise_scale, ()

    def forward(self, theta, condition, time):
        theta, condition, time = theta.double(), condition.double(), time.double()
        (estimator,) = self.estimator
        mean_0, std_0 = estimator.mean_0.double(), estimator.std_0.double()
        if self.kind == "flow":
            alpha, sigma = 1 - time, time + self.noise_scale
            a, t = alpha[:, None], time[:, None]
            theta_t = theta * ((a * std_0) ** 2 + t**2 + 1e-6).sqrt() + a * mean_0
            eps, x0 = exact(theta_t - a * shifted(condition), alpha, sigma, self.target)
            velocity = eps - x0 - shifted(condition)
            return (velocity + mean_0) / (1 + std_0**2).sqrt()
        sigma = time  # the score estimators' time encoding is the noise's standard deviation
        alpha = {"vp": (1 - sigma**2).sqrt(), "subvp": (1 - sigma).sqrt(), "ve": torch.ones_like(sigma)}[self.kind]
        a, s = alpha[:, None], sigma[:, None]
        std = (a**2 * std_0**2 + s**2).sqrt()
        theta_t = theta * std + a * mean_0
        eps, _ = exact(theta_t - a * shifted(condition), alpha, sigma, self.target)
        return -(-eps / s + (theta_t - a * mean_0) / std**2) * s / a


def build(kind, composed=False, target=TARGET):
    """An exact estimator in float64, so that what is tested is the convention and not float32."""
    net = Exact(kind, target)
    stats = {} if composed else {"mean_0": MEAN_0, "std_0": STD_0}
    estimator = CLASSES[kind](net, torch.Size([D]), torch.Size([CONDITION]), **stats)
    net.estimator = (estimator,)
    net.anchor = nn.Parameter(torch.zeros(1))
    if composed:
        estimator._theta_shift.copy_(torch.tensor([5.0, -3.0, 0.0, 100.0]))
        estimator._theta_scale.copy_(torch.tensor([0.1, 2.0, 1.0, 30.0]))
        estimator._compose_standardization.fill_(True)
    return estimator.double()


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("network", ["mlp", "ada_mlp"])
def test_outputs_are_those_of_the_estimator(kind, network):
    torch.manual_seed(0)
    theta, x = 3 + 2 * torch.randn(100, D), torch.randn(100, CONDITION)
    make = builders.build_flow_matching_estimator if kind == "flow" else builders.build_score_matching_estimator
    options = {} if kind == "flow" else {"sde_type": kind}
    estimator = make(theta, x, net=network, hidden_features=16, num_layers=2, **options).eval()
    for parameter in estimator.parameters():  # sbi starts with outputs of zero
        nn.init.normal_(parameter, std=0.3)
    density = from_sbi(estimator, x[0], program=False)
    t = torch.tensor([0.01, 0.5, 0.99])
    with torch.no_grad():
        call = estimator.forward if kind == "flow" else estimator.score
        assert torch.equal(density.density.model(theta[:3], t), call(theta[:3], x[:1], t))
        own = density.density.model(theta[:3], t, condition=x[:3])
        assert torch.equal(own, call(theta[:3], x[:3], t))
        assert float((own - density.density.model(theta[:3], t)).abs().max()) > 1e-4
    each = from_sbi(estimator, program=False).estimate(theta[:5], nfe=16, condition=x[:5]).log_prob
    one = density.estimate(theta[:5], nfe=16).log_prob
    assert float(each[0]) == pytest.approx(float(one[0]), rel=1e-4)  # the same observation, in another batch
    assert float((each[1:] - one[1:]).abs().min()) > 1e-4


@pytest.mark.parametrize("kind", CLASSES)
def test_noise_and_scores_are_those_of_the_estimator(kind):
    estimator = build(kind)
    density = from_sbi(estimator, torch.zeros(CONDITION)).density
    t = torch.tensor([0.01, 0.2, 0.5, 0.8, 0.98], dtype=torch.float64)
    x, eps, x_t = noised(density.schedule, t, shape=(D,))
    assert relative(x_t, estimator.mean_t_fn(t) * x + estimator.std_fn(t) * eps) < 1e-6
    condition = torch.zeros(1, CONDITION, dtype=torch.float64)
    c_f, c_x = (column(c, x) for c in eps_from(density.predicts, density.schedule, t))
    eps_hat = c_f * density.model(x_t, t) + c_x * x_t
    if kind == "flow":
        # sbi's score of a flow leaves the noise scale out of one term; with the exact velocity this is the score.
        score = -exact(x_t, 1 - t, t + 1e-3)[0] / column(t + 1e-3, x)
    else:
        score = estimator.score(x_t, condition, t)
    assert relative(eps_hat, -estimator.std_fn(t) * score) < 1e-6
    # The range ends where the estimator's own times end, or at the schedule's bounds of -14 and 16.
    first, last = (torch.tensor([end], dtype=torch.float64) for end in (estimator.t_min, estimator.t_max))
    ends = [2 * float((estimator.mean_t_fn(t) / estimator.std_fn(t)).log()) for t in (last, first)]
    expected = [-14.0 if kind == "flow" else ends[0], min(ends[1], 16.0)]
    assert density.schedule.log_snr_range == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("composed", [False, True], ids=["own-units", "composed"])
@pytest.mark.parametrize("kind", CLASSES)
def test_log_prob_of_an_exact_estimator(kind, composed):
    estimator = build(kind, composed)
    observation = torch.tensor([0.5, -0.25], dtype=torch.float64)
    shift = shifted(observation)
    loc, scale = estimator._theta_shift[0], estimator._theta_scale[0]
    density = from_sbi(estimator, observation, program=False)
    assert_exact(
        density,
        shape=(D,),
        to_user=lambda z: loc + scale * (z + shift),
        log_det=float(scale.log().sum()),
        shift=shift,
        count=32,
        rounding=1e-5,
    )


@pytest.mark.parametrize("kind", CLASSES)
def test_likelihood_of_sbis_own_ode(kind):
    estimator = build(kind, composed=True, target=CORRELATED).float()
    loc, scale = estimator._theta_shift[0], estimator._theta_scale[0]
    observation = torch.zeros(1, CONDITION)
    theta = loc + scale * CORRELATED.sample(6, seed=2).float()
    prior = torch.distributions.MultivariateNormal(loc, torch.diag(1e4 * scale**2))
    potential = potentials.VectorFieldBasedPotential(estimator, prior, x_o=observation)
    with torch.no_grad():
        own = potential(theta)
    density = from_sbi(estimator, observation, program=False)
    density.density.reference = fit_mixture(CORRELATED.sample(1000, seed=1), full=True)
    found = density.estimate(theta, nfe=1024)
    difference = (found.log_prob - own).abs()
    print(f"{kind} {float(difference.max()):.4f} {float(found.stderr.mean()):.4f}")
    # The correlation that is left at t_max, alpha^2 = 0.007 for VP, is not in sbi's base distribution.
    assert bool((difference < 4 * found.stderr + 0.03).all())


def test_observation_can_come_with_the_call():
    estimator = build("vp")
    theta, x = TARGET.sample(3, seed=1), torch.tensor([[0.5, 0.1]] * 3, dtype=torch.float64)
    fixed = from_sbi(estimator, x[0], program=False).estimate(theta, nfe=32)
    given = from_sbi(estimator, program=False).estimate(theta, nfe=32, condition=x)
    assert torch.allclose(fixed.log_prob, given.log_prob, atol=1e-9)
    with pytest.raises(ValueError, match=r"observation, got none; .*from_model\(posterior, x\), or as condition="):
        from_sbi(estimator).estimate(theta)


SEVERAL = r"is, up to a constant, the sum over i of log_prob\(theta\) of .* x_i alone, minus \(N - 1\) prior"


def test_several_observations_are_refused_with_a_remedy_that_works():
    estimator, observations = build("vp"), torch.tensor([[0.5, 0.1], [0.2, -0.3], [0.0, 0.0], [0.1, 0.4], [0.3, 0.3]])
    observations = observations.double()
    theta = TARGET.sample(3, seed=1)
    with pytest.raises(
        ValueError, match=rf"x must be one observation of shape \(2,\), got \(5, 2\); .*condition=x\); .*{SEVERAL}"
    ):
        from_sbi(estimator, observations)
    density = from_sbi(estimator, program=False)
    for wrong in (observations, observations[0, :1], observations[:, :1]):
        message = rf"^condition must be one observation of shape \(2,\), or one a sample, got .*; .*{SEVERAL}"
        with pytest.raises(ValueError, match=message):
            density.estimate(theta, nfe=8, condition=wrong)
    prior = torch.distributions.MultivariateNormal(torch.zeros(D).double(), 100 * torch.eye(D).double())
    single = [from_sbi(estimator, x_i, program=False).estimate(theta, nfe=512) for x_i in observations]
    found = sum(s.log_prob for s in single) - (len(observations) - 1) * prior.log_prob(theta)
    exact_sum = sum(TARGET.log_prob(theta - shifted(x_i)) for x_i in observations) - 4 * prior.log_prob(theta)
    error = sum(s.stderr.square() for s in single).sqrt()
    outside = sum(s.truncation + s.discretization for s in single)
    assert bool(((found - exact_sum).abs() < 4 * error + outside).all())
    density, other = (from_sbi(estimator, program=False) for _ in range(2))
    shared = density.estimate(theta, nfe=16, condition=observations[0]).log_prob  # one for all
    own = other.estimate(theta, nfe=16, condition=observations[:1].expand(3, -1)).log_prob
    assert torch.allclose(shared, own, atol=1e-9)


def test_a_posterior_of_sbi_is_read_as_its_estimator():
    estimator = build("vp").float()
    prior = torch.distributions.MultivariateNormal(torch.zeros(D), 100 * torch.eye(D))
    posterior = posteriors.VectorFieldPosterior(estimator, prior)
    assert from_sbi(posterior, torch.zeros(CONDITION)).density.model.estimator is estimator


def test_a_posterior_brings_its_default_observation():
    prior = torch.distributions.MultivariateNormal(torch.zeros(D), 100 * torch.eye(D))
    posterior = posteriors.VectorFieldPosterior(build("vp").float(), prior)
    theta, x = TARGET.sample(3, seed=1), torch.tensor([0.5, 0.1])
    expected = from_sbi(posterior, x, program=False).estimate(theta, nfe=16).log_prob
    with pytest.raises(ValueError, match="needs an observation, got none"):
        from_model(posterior).estimate(theta, nfe=16)
    posterior.set_default_x(x)
    for make in (from_sbi, from_model):  # the same network, noise and nodes: equal to the bit
        assert torch.equal(make(posterior, program=False).estimate(theta, nfe=16).log_prob, expected)
    other = make(posterior, -x, program=False).estimate(theta, nfe=16).log_prob
    assert float((other - expected).abs().min()) > 0.1
    posterior.set_default_x(torch.zeros(5, CONDITION))
    with pytest.raises(ValueError, match=r"^default_x of the posterior must be one observation .*, got \(5, 2\)"):
        from_model(posterior)


def test_a_batch_of_posteriors_as_one_distribution():
    """One for each of three observations, at the same parameters, against the exact posteriors."""
    observations = torch.randn(3, CONDITION, generator=torch.Generator().manual_seed(5))
    density, theta = from_sbi(build("vp"), program=False), TARGET.sample(8, seed=6)
    many = as_distribution(density, (D,), nfe=256, condition=per_sample(observations))
    assert (many.batch_shape, many.event_shape) == ((3,), (D,))
    found = many.log_prob(theta[:, None])
    flat = theta.repeat_interleave(3, 0), observations.repeat(8, 1)
    own = density.estimate(flat[0], nfe=256, condition=flat[1])
    torch.testing.assert_close(found.flatten(), own.log_prob, rtol=0, atol=1e-9)
    exactly = TARGET.log_prob(flat[0] - shifted(flat[1].double()))
    assert bool(((own.log_prob - exactly).abs() < 4 * own.stderr + own.truncation).all())


def test_the_default_reference_is_the_gaussian_of_the_standardization():
    reference = from_sbi(build("vp")).density.reference
    assert torch.equal(reference.mean[0], MEAN_0.double())
    assert relative(reference.variance[0], STD_0.double() ** 2) < 1e-6


def test_bad_input_is_explained():
    with pytest.raises(TypeError, match=r"estimator must be an sbi score or flow estimator, got Linear without score"):
        from_sbi(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"x must be one observation of shape \(2,\), got \(3,\); .*trained on"):
        from_sbi(build("vp"), torch.zeros(3))
    with pytest.raises(ValueError, match=r"x must be one observation of shape \(2,\), got list; torch.as_tensor"):
        from_sbi(build("vp"), [0.0, 0.0])

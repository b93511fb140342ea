"""What the ends of the path leave out of the ODE's log-density, as estimated and as exact densities have it."""

import pytest
import torch
from analytic import ExactNet, Target, ill_conditioned, mixture
from mixtures import MIXTURES, ExactEps

import fastscore as fs

pytestmark = pytest.mark.usefixtures("one_thread")

SHORT = {"vp": fs.VP(), "little noise": fs.VP(0.01, 5.0), "much noise left": fs.LogSNR(-6, 6), "both": fs.LogSNR(-2, 3)}
TRACES = {"exact": {}, "hutchinson": {"trace": "hutchinson", "probes": 2}}


def gaussian(mean, std, d=3):
    return Target(torch.ones(1), torch.full((1, d), float(mean)), std**2 * torch.eye(d)[None])


def fitted(density, target):
    """The density with the Gaussian of 2,000 samples as its reference."""
    data = samples_of(target, 2000, 1)
    variance, basis = torch.linalg.eigh(torch.cov(data.T))
    return density.with_reference(fs.Reference(torch.ones(1), data.mean(0)[None], variance[None], basis[None]))


def samples_of(target, count, seed):
    if isinstance(target, Target):
        return target.sample(count, seed=seed)
    return target.sample(count, torch.Generator().manual_seed(seed)).double()


def errors(target, schedule, fit, options, steps=512, count=40):
    """Return the sizes of the errors and their estimates, on a grid whose own error is far smaller."""
    net = ExactNet(target, schedule) if isinstance(target, Target) else ExactEps(target, schedule)
    density, x = fs.ScoreDensity(net, schedule, "eps"), samples_of(target, count, 0)
    density = fitted(density, target) if fit else density
    found = fs.probability_flow_log_prob(density, x, method="midpoint", steps=steps, **options)
    return (found.log_prob - target.log_prob(x)).abs(), found.truncation


# Every Gaussian on every schedule, with the traces by turns: neither of them takes part in what the ends leave out.
PLACES = [(100, 1), (0, 0.01), (0, 30), (2, 0.3)]
ENDS = [
    pytest.param(*place, name, trace, marks=[pytest.mark.long] if (i + j + k) % 2 else [])
    for i, place in enumerate(PLACES)
    for j, name in enumerate(SHORT)
    for k, trace in enumerate(TRACES)
]


@pytest.mark.parametrize(("mean", "std", "name", "trace"), ENDS)
def test_it_is_the_error_itself_for_gaussians_of_any_place_and_width(name, mean, std, trace):
    error, estimate = errors(gaussian(mean, std), SHORT[name], False, TRACES[trace])
    # The clean end's and the noisy end's parts are added as sizes; of the cases here one of them dominates, or the
    # sum is more than the error. 0.02: of 512 steps over a path with errors of 4,000 nats of log q at its ends.
    assert bool((error <= 1.001 * estimate + 0.02).all())
    assert float(estimate.mean()) <= 1.15 * float(error.mean()) + 0.02


@pytest.mark.parametrize("fit", [False, True], ids=["default", "fitted"])
@pytest.mark.parametrize("name", ["much noise left", "both"])
@pytest.mark.parametrize("kind", [*MIXTURES, "ill-conditioned", "five parts"])
def test_it_is_of_the_size_of_the_error_for_mixtures(name, kind, fit):
    target = {"ill-conditioned": ill_conditioned(), "five parts": mixture(2)}.get(kind) or MIXTURES[kind]
    error, estimate = errors(target, SHORT[name], fit, {}, steps=128)
    # Of the right size on average (2.6 times the error are the most that was seen, heavy tails), and for most samples
    # each: 15 % of them were seen below half of theirs (spirals, whose arms are narrower than the noise that is left).
    assert 0.7 * float(error.mean()) < float(estimate.mean()) < 3 * float(error.mean())
    assert float(((estimate < 0.5 * error) & (error > 0.02)).double().mean()) <= 0.2


def test_data_far_narrower_than_the_noise_count_with_the_least_share_that_a_network_tells():
    error, estimate = errors(gaussian(0, 0.001), SHORT["much noise left"], False, {})
    # w^2 / sigma^2 = 4e-4 a dimension, taken as 1e-3: log(2.5) / 2 too little in each of three.
    assert float((error - estimate).mean()) == pytest.approx(0.6, abs=0.8)
    assert float(error.mean()) > 9


def test_nothing_is_missing_where_the_reference_is_the_density():
    schedule, target = fs.LogSNR(-6, 20), ill_conditioned()
    reference = fs.Reference(target.weight, target.mean, target.eigenvalue, target.basis)
    density = fs.ScoreDensity(ExactNet(target, schedule), schedule, "eps", reference=reference)
    found = fs.probability_flow_log_prob(density, target.sample(10), method="midpoint", steps=1)
    # The clean end's: e^-20 over the least variance of 1e-3 is 2e-6, times z^2 of a few; and it counts with a share of
    # n = m_2 / m_1 of the directions. At the noisy end e^6 is the variance of the noise, the widest 10, and p is q.
    assert float(found.truncation.max()) < 1e-3


@pytest.mark.parametrize("method", ["auto", "midpoint", "rk4"])
def test_every_solver_states_it_and_it_is_a_constant(method):
    if method == "rk4":
        pytest.importorskip("torchdiffeq")
    target = gaussian(2, 0.3)
    density = fs.ScoreDensity(ExactNet(target, SHORT["both"], gain=0.99), SHORT["both"], "eps")
    x = target.sample(5).float()
    steps = {} if method == "auto" else {"steps": 64}
    with torch.no_grad():
        plain = fs.probability_flow_log_prob(density, x, method=method, **steps)
    found = fs.probability_flow_log_prob(density, x.clone().requires_grad_(), method=method, **steps)
    assert found.truncation.shape == (5,)
    assert found.truncation.dtype == torch.float32
    assert float(found.truncation.min()) > 0.1
    assert not found.truncation.requires_grad
    assert torch.equal(found.truncation, plain.truncation)
    # Each sample's is its own, whatever the batch: matrix products of another number of rows, in float32.
    alone = torch.cat(
        [fs.probability_flow_log_prob(density, row[None], method=method, **steps).truncation for row in x]
    )
    torch.testing.assert_close(alone, plain.truncation, rtol=1e-3, atol=1e-3)

    def run(z):
        each = fs.probability_flow_log_prob(density, z, method=method, **steps)
        return each.log_prob.sum(), each.truncation

    gradient, own = torch.func.grad(run, has_aux=True)(x)
    assert torch.equal(own, plain.truncation)
    assert bool(gradient.isfinite().all())

"""The bound of latent diffusion models: closed forms of a linear autoencoder, seeds, chunks, and what is refused."""

import math
from types import SimpleNamespace

import pytest
import torch
from linear_autoencoder import DECODER_STD, LATENT, SHAPE, Case, D, M, draw, normal
from torch import nn

import fastscore as fs
from fastscore.densities.bound_estimate import BoundEstimate, widened_for
from fastscore.ops import noise
from fastscore.transforms import zscore

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIGS = {
    "nothing": (None, 0.0, 1.0),
    "nothing but None": ({"scaling_factor": None, "shift_factor": None}, 0.0, 1.0),
    "a factor": (SimpleNamespace(scaling_factor=0.4), 0.0, 0.4),
    "a shift": ({"scaling_factor": 3.0, "shift_factor": 0.7}, 0.7, 3.0),
    "of each channel": (
        {"scaling_factor": 0.5, "latents_mean": [0.3, -0.4], "latents_std": [2.0, 0.5], "shift_factor": None},
        [0.3, -0.4],
        [0.25, 1.0],
    ),
}


def z_of_mean(found, exact, variance=None):
    """Return how many errors a mean over samples is off, by the spread of what is off or by stated variances."""
    off = found.double() - exact
    error = off.std() / len(off) ** 0.5 if variance is None else variance.sum().sqrt() / len(off)
    return abs(float(off.mean() / error))


@pytest.mark.parametrize("name", CONFIGS)
def test_the_bound_and_its_terms_are_the_closed_form(name):
    config, shift, factor = CONFIGS[name]
    case = Case(config=config, shift=shift, factor=factor)
    x = case.sample(600)
    found = case.made().estimate(x, nfe=128, seed=5)
    fit, prior, entropy = case.terms(x)
    # Four errors: once in sixteen thousand.
    assert z_of_mean(found.log_prob, fit + prior + entropy, found.variance) < 4
    assert z_of_mean(found.reconstruction, fit) < 4
    assert z_of_mean(found.rate, -prior - entropy) < 4
    # Float64 throughout.
    assert torch.allclose(found.entropy, entropy, rtol=1e-12)
    assert torch.allclose(found.log_prob, found.reconstruction - found.rate, rtol=1e-10)
    assert found.nfe.tolist() == [128] * len(x)
    assert sum(int(each.nfe[0]) for each in found.latents) == 128
    # An encoder that is no posterior: the whole model's density is larger, by much more than the error of a mean.
    assert float(case.log_prob(x).mean() - found.log_prob.mean()) > 1


def test_with_the_exact_posterior_the_bound_is_the_density():
    case = Case(posterior=True)
    x = case.sample(600)
    found, exact = case.made().estimate(x, nfe=256, seed=3), case.log_prob(x)
    assert torch.allclose(sum(case.terms(x)), exact, rtol=1e-9)  # of the test's own closed forms, float64
    assert z_of_mean(found.log_prob, exact, found.variance) < 4
    assert found.mean()[0] == pytest.approx(float(exact.mean()), abs=4 * float(found.variance.sum().sqrt()) / len(x))


@pytest.mark.parametrize("draws", [2, 3, 4, 8])
@pytest.mark.parametrize("posterior", [False, True])
def test_intervals_cover(draws, posterior):
    case = Case(posterior=posterior)
    x = case.sample(3000, seed=1)
    index = torch.randperm(1_000_000, generator=torch.Generator().manual_seed(0))[: len(x)]
    found = case.made().estimate(x, nfe=24 * draws, draws=draws, seed=11, sample_index=index)
    error = found.log_prob - sum(case.terms(x))
    # A share of 95 % of 3,000 has a standard error of 0.4 %.
    assert 0.93 <= float((error.abs() < 1.96 * found.stderr).double().mean()) <= 0.97
    # And the variances are right in the mean: 3,000 with at least one degree of freedom, four errors.
    spread = 4 * (2 / 3000 / max(1, draws - 1) + 2 / 3000) ** 0.5 + 0.05
    assert float(error.square().mean() / found.variance.mean()) == pytest.approx(1, abs=spread)


def test_bars_know_how_few_draws_there_are():
    one = torch.ones(3, dtype=torch.float64)
    many = 10_000_000  # latents, so that they have no skewness
    for draws, quantile in {2: 12.706, 3: 4.303, 4: 3.182, 6: 2.571, 8: 2.365, 16: 2.131}.items():
        # Student's two-sided 95 %, to the 1 % that the expansion has.
        assert float(widened_for(one, draws, many)[0].sqrt()) * 1.96 == pytest.approx(quantile, rel=0.01)
    # Of a squared norm in two dimensions, four draws: skewness squared 4, over four.
    few = widened_for(one, 4, 2) / widened_for(one, 4, many)
    assert float(few[0].sqrt()) == pytest.approx(1 + 1.08, rel=1e-5)


def test_the_error_of_a_mean_is_its_spread_over_seeds():
    case = Case()
    x = case.sample(64)
    means = []
    for seed in range(40):
        found = case.made().estimate(x, nfe=64, seed=seed)
        means.append((float(found.log_prob.mean()), float(found.variance.sum()) / 64**2))
    mean, variance = torch.tensor(means, dtype=torch.float64).T
    # 40 repetitions know a standard deviation to 11 %.
    assert float(mean.std()) == pytest.approx(float(variance.mean().sqrt()), rel=4 / 80**0.5)


def test_the_same_seed_gives_the_same_answer_whatever_the_batch():
    case = Case()
    x = case.sample(70)
    whole = case.made().estimate(x, nfe=64, seed=2)
    order = torch.randperm(70, generator=torch.Generator().manual_seed(1))
    parts = [
        case.made().estimate(x[chosen], nfe=64, seed=2, sample_index=chosen, memory=memory)
        for chosen, memory in zip(order.split([1, 40, 29]), (None, "2MB", "40KB"))
    ]
    for name in ("log_prob", "stderr", "reconstruction", "rate", "entropy", "nfe", "variance"):
        joined = torch.cat([getattr(part, name) for part in parts])
        # Sums of float64 in another order.
        assert torch.allclose(joined.double(), getattr(whole, name)[order].double(), rtol=1e-9), name
    assert not torch.equal(case.made().estimate(x, nfe=64, seed=3).log_prob, whole.log_prob)


def test_chunks_keep_within_the_budget():
    case = Case()
    x = case.sample(70)
    case.autoencoder.rows.clear()
    free = case.made().estimate(x, nfe=64)
    assert max(case.autoencoder.rows) == 70
    case.autoencoder.rows.clear()
    # Encoding one sample makes 36 + 2 x 24 numbers of 8 bytes and a few more.
    tight = case.made().estimate(x, nfe=64, memory="40KB")
    assert 1 < max(case.autoencoder.rows) < 60
    assert sum(case.autoencoder.rows) == 71  # and one to measure by
    assert torch.allclose(free.log_prob, tight.log_prob, rtol=1e-9)
    with pytest.raises(ValueError, match="does not hold one row"):
        case.made().estimate(x, nfe=64, memory=100)


def test_draws_have_noise_of_their_own():
    case = Case()
    x = case.sample(3)
    four, eight = (case.made().estimate(x, nfe=32 * draws, draws=draws) for draws in (4, 8))
    for a, b in zip(four.latents, eight.latents):
        assert torch.equal(a.log_prob, b.log_prob)  # the first draws of more are the same
    seeds = {int(each.seed[0]) for each in eight.latents} | {0}
    assert len(seeds) == 9
    values = torch.stack([each.log_prob for each in eight.latents])
    assert len(values.unique()) == values.numel()


def test_a_measured_decoder_std_is_the_best_constant():
    case, data = Case(), Case().sample(2000)
    made = case.made(decoder_std=None)
    with pytest.raises(
        ValueError, match=r"decoder_std, the standard deviation of p.x.z., is not known.*fit_decoder_std"
    ):
        made.estimate(data[:2], nfe=64)
    assert made.fit_decoder_std(data) is made
    # By the closed form: at sigma 1 the first term is minus half of the error and a constant.
    error = -2 * (case.terms(data, 1.0)[0] + 0.5 * D * math.log(2 * math.pi))
    # A mean over 2,000 x 36 squares: half a per cent.
    assert made.decoder_std == pytest.approx(float(error.mean() / D) ** 0.5, rel=0.02)
    means = [
        float(case.made(decoder_std=made.decoder_std * by).estimate(data, nfe=32, draws=2).log_prob.mean())
        for by in (0.9, 1, 1.1)
    ]
    assert means[1] == max(means)


def test_another_fit_measures_it_again_and_one_that_was_given_stays():
    case, data = Case(), Case().sample(200)
    made = case.made(decoder_std=None).fit(data, evaluations=200, progress=False)
    first = made.decoder_std
    made.fit(5 * data, evaluations=200, progress=False)
    assert made.decoder_std == case.made(decoder_std=None).fit_decoder_std(5 * data).decoder_std > 1.5 * first
    assert case.made(decoder_std=0.7).fit(data, evaluations=200, progress=False).decoder_std == 0.7


def test_fit_fits_the_density_to_scaled_latents():
    config, shift, factor = CONFIGS["a shift"]
    case = Case(posterior=True, config=config, shift=shift, factor=factor)
    data = case.sample(1500)
    before = case.made().estimate(data[:100], nfe=64)
    made = case.made().fit(data, reference="diagonal", evaluations=60_000, progress=False)
    assert made.decoder_std == DECODER_STD  # it was given
    # Under the exact posterior latents of the model's data are the prior's: 1,200 samples, four errors of a variance.
    wanted = case.prior_variance * factor**2
    ratio = case.density.reference.variance[0].double() / wanted
    assert float((ratio - 1).abs().max()) < 4 * (2 / 1200) ** 0.5
    found = made.estimate(data[:100], nfe=64)
    assert z_of_mean(found.log_prob, sum(case.terms(data[:100])), found.variance) < 4
    assert float(found.variance.mean()) < float(before.variance.mean())
    fresh = case.made(decoder_std=None).fit(data, reference="diagonal", evaluations=1000, progress=False)
    assert fresh.decoder_std == pytest.approx(case.made().fit_decoder_std(data).decoder_std, rel=1e-12)


def test_conditions_go_to_the_network():
    """A shift of the network's prediction, which its own density has too."""
    case = Case()
    x, shift = case.sample(8), 0.3 * normal(8, M, seed=3).reshape(8, *LATENT)
    found = case.made().estimate(x, nfe=64, shift=fs.per_sample(shift))
    for k, each in enumerate(found.latents):
        u = draw(case.autoencoder.encode(x).latent_dist, torch.arange(8), 0, k)
        seed = noise.derived_seed(0, k)
        direct = case.density.estimate(u, nfe=16, seed=seed, shift=shift)
        assert torch.allclose(each.log_prob, direct.log_prob, rtol=1e-10)
    assert not torch.allclose(found.log_prob, case.made().estimate(x, nfe=64).log_prob, rtol=1e-3)
    one = case.made().estimate(x[:1], nfe=64, cond={"shift": shift[:1]})
    assert float(one.log_prob) == pytest.approx(float(found.log_prob[0]), rel=1e-9)


def test_a_transformed_density_may_scale_instead():
    config, shift, factor = CONFIGS["a shift"]
    case = Case(config=config, shift=shift, factor=factor)
    x, scaled = case.sample(5), case.made().estimate(case.sample(5), nfe=64)
    case.autoencoder.config = None
    through = fs.Transformed(case.density, zscore(*torch.tensor([shift, 1 / factor], dtype=torch.float64)))
    found = fs.LatentBound(through, case.autoencoder, DECODER_STD).estimate(x, nfe=64)
    # Latents differ by roundings of float64, which the clean end, sigma^2 = e^-14, makes a million times as large.
    assert torch.allclose(found.log_prob, scaled.log_prob, rtol=1e-8)


def test_bits_and_words():
    case = Case()
    x = case.sample(20)
    found = case.made().estimate(x, nfe=64)
    bits = found.bits_per_dim(bins=256, low=0, high=1)
    assert torch.allclose(bits, -(found.log_prob / D - math.log(256)) / math.log(2))
    assert torch.allclose(found.bits_per_dim(), -found.log_prob / D / math.log(2))
    assert torch.allclose(found.bits_per_dim_stderr(), found.stderr / D / math.log(2))
    assert repr(found).startswith("BoundEstimate(20 samples, 36 dims, lower bound of log_prob ")
    assert "64 evaluations per sample in 4 draws, decoder_std 0.3)" in repr(found)
    assert found.check() is found
    assert found.truncation_per_sample.shape == (20,)
    mean, error = found.mean()
    assert mean == pytest.approx(float(found.log_prob.mean()))
    assert error == pytest.approx(float(found.log_prob.std()) / 20**0.5, rel=0.2)  # and a little by common nodes
    again = case.made().estimate(x, nfe=64, sample_index=torch.zeros(20, dtype=torch.int64))
    repr(again)  # says nothing of it
    for mean in (again.mean, again.mean_bits_per_dim):
        with pytest.warns(UserWarning, match="19 of 20 samples have the sample_index of another one"):
            mean()
    in_bits = found.mean_bits_per_dim(fs.Levels(256))
    assert in_bits[0] == pytest.approx(float(found.bits_per_dim(fs.Levels(256)).mean()), rel=1e-6)
    assert in_bits[1] == pytest.approx(error / D / math.log(2), rel=1e-4)  # float32 values


class Learning(nn.Module):
    """An autoencoder in train mode that would learn from being called, and that draws random numbers."""

    def __init__(self):
        super().__init__()
        self.into, self.norm, self.out = nn.Conv2d(1, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(2, 1, 1)
        self.norm.momentum = 0.5

    def encode(self, x):
        mean, log = self.norm(self.into(x)).chunk(2, 1)
        torch.rand(3)
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=mean, std=(0.1 * log).exp()))

    def decode(self, z):
        return SimpleNamespace(sample=self.out(z))


@pytest.mark.filterwarnings("ignore:the network is in train mode")
def test_nothing_of_the_users_is_changed():
    net = Learning().train()
    density = fs.ScoreDensity(nn.Identity(), fs.VP(), "eps", program=False)
    density.model.forward = lambda x, t: torch.tanh(x)
    x, before = torch.randn(6, 1, 6, 6), {k: v.clone() for k, v in net.state_dict().items()}
    kept, names = x.clone(), sorted(vars(net))
    random = torch.get_rng_state()
    made = fs.LatentBound(density, net)
    made.fit_decoder_std(x)
    with torch.inference_mode():
        found = made.estimate(x, nfe=64)
    assert torch.equal(x, kept)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert all(layer.training for layer in net.modules())
    assert all(p.requires_grad and p.grad is None for p in net.parameters())
    assert sorted(vars(net)) == names
    assert torch.is_grad_enabled()
    assert not found.log_prob.requires_grad
    assert not found.log_prob.is_inference()
    assert isinstance(found, BoundEstimate)


def answering(encode=None, decode=None, **config):
    """A module with encode and decode that return what is said."""

    class Answering(nn.Module):
        def encode(self, x):
            return encode(x)

        def decode(self, z):
            return decode(z)

    net = Answering()
    net.config = config
    return net


def gaussian(mean, std):
    return SimpleNamespace(latent_dist=SimpleNamespace(mean=mean, std=std))


X = normal(3, 1, 6, 6, seed=0)
ZERO = torch.zeros(3, 2, 4, 3, dtype=torch.float64)
REFUSED = {
    "one latent": (lambda x: SimpleNamespace(latents=x), None, "needs an encoder with a density.*got Answering"),
    "no std": (lambda x: gaussian(ZERO[: len(x)], None), None, "needs an encoder with a density"),
    "std zero": (lambda x: gaussian(ZERO[: len(x)], ZERO[: len(x)]), None, "got standard deviations of zero"),
    "one for all": (lambda x: gaussian(ZERO[:2], ZERO[:2] + 1), None, "one Gaussian for each sample, got 2 for 1"),
    "NaN": (lambda x: gaussian(ZERO[: len(x)] / 0, ZERO[: len(x)] + 1), None, "encode returned NaN or inf for 1 of 1"),
    "shape": (
        lambda x: gaussian(ZERO[: len(x)], ZERO[: len(x)] + 1),
        lambda z: SimpleNamespace(sample=z.new_zeros(len(z), 1, 4, 4)),
        r"\.sample of the shape of x, \(1, 1, 6, 6\), got \(1, 1, 4, 4\)",
    ),
    "inf": (
        lambda x: gaussian(ZERO[: len(x)], ZERO[: len(x)] + 1),
        lambda z: SimpleNamespace(sample=z.new_zeros(len(z), *SHAPE) + math.inf),
        "decode returned NaN or inf.*float32",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_autoencoders_without_a_bound_are_refused(name):
    encode, decode, sentence = REFUSED[name]
    made = fs.LatentBound(Case().density, answering(encode, decode), 0.3)
    with pytest.raises(ValueError, match=sentence):
        made.estimate(X, nfe=64)


@pytest.mark.parametrize("wrapped", [False, True])
def test_an_encoder_may_return_a_distribution_of_torch(wrapped):
    def own(x):
        mean, std = ZERO[: len(x)] + 0.3, ZERO[: len(x)] + 0.5
        normal = torch.distributions.Normal(mean, std)
        return mean, std, torch.distributions.Independent(normal, 3) if wrapped else normal

    def decode(z):
        return SimpleNamespace(sample=z.new_zeros(len(z), *SHAPE))

    plain, found = (
        fs.LatentBound(Case().density, answering(encode, decode), 0.3).estimate(X, nfe=16, progress=False)
        for encode in (lambda x: gaussian(*own(x)[:2]), lambda x: SimpleNamespace(latent_dist=own(x)[2]))
    )
    assert torch.equal(plain.log_prob, found.log_prob)


def test_wrong_arguments_are_refused():
    case = Case()
    with pytest.raises(TypeError, match="density must be a ScoreDensity"):
        fs.LatentBound(case.autoencoder, case.autoencoder)
    with pytest.raises(TypeError, match=r"autoencoder must be a torch.nn.Module with encode and decode.*pipeline.vae"):
        fs.LatentBound(case.density, nn.Identity())
    with pytest.raises(ValueError, match="decoder_std must be positive"):
        case.made(decoder_std=0)
    with pytest.raises(ValueError, match=r"finite numbers other than zero.*'scaling_factor': 0"):
        fs.LatentBound(case.density, answering(scaling_factor=0))
    cloud = fs.ZeroMeanDensity(nn.Identity(), fs.VP(), "eps", program=False)
    with pytest.raises(ValueError, match="centred positions do not have"):
        fs.LatentBound(cloud, case.autoencoder)
    with pytest.raises(ValueError, match="draws must be 2 at least, got 1"):
        case.made().estimate(X, nfe=64, draws=1)
    with pytest.raises(ValueError, match="nfe must be at least 16, 4 evaluations for each of 4 draws, got 8"):
        case.made().estimate(X, nfe=8)
    with pytest.raises(ValueError, match="x has NaN or inf in 3 of 3 samples"):
        case.made().estimate(X / 0, nfe=64)
    with pytest.raises(ValueError, match="x has NaN or inf in 3 of 3 samples"):
        case.made(decoder_std=None).fit(X / 0)
    for name in ("mask", "target_stderr", "method", "max_nfe"):  # of ScoreDensity.estimate, not of a bound
        with pytest.raises(ValueError, match=f"{name} is an option of .*, and this estimate has none"):
            case.made().estimate(X, nfe=64, **{name: 1})
    with pytest.raises(ValueError, match="draw is no option of estimate, did you mean draws"):
        case.made().estimate(X, nfe=64, draw=2)

"""Constant and linearly dependent columns are counted, and nothing else is."""

import warnings

import pytest
import torch
from analytic import ExactNet, Target, mixture

import fastscore as fs
from fastscore.estimator.degenerate import count_degenerate
from fastscore.reference.fitting import fit_mixture
from fastscore.transforms import zscore

G = torch.Generator().manual_seed(0)
BASE = torch.randn(400, 3, generator=G)


def with_columns(*extra):
    return torch.cat([BASE, *extra], 1)


@pytest.mark.parametrize(
    ("data", "counts"),
    [
        (BASE, (0, 0)),
        (with_columns(torch.zeros(400, 2)), (2, 0)),
        (with_columns(torch.full((400, 1), 1e3)), (1, 0)),
        (with_columns(BASE[:, :1]), (0, 1)),
        (with_columns(-2 * BASE[:, :1] + 5), (0, 1)),
        (with_columns(BASE.sum(1, keepdim=True), torch.ones(400, 1)), (1, 1)),
        (with_columns(BASE[:, :1], BASE[:, :1], BASE[:, 1:2]), (0, 3)),
        # Scales apart, near-copies with noise of their own, and few samples are no degeneracy.
        (BASE * torch.tensor([1e-4, 1.0, 1e4]), (0, 0)),
        (with_columns(BASE[:, :1] + 1e-3 * torch.randn(400, 1, generator=G)), (0, 0)),
        (torch.randn(30, 200, generator=G), (0, 0)),
        (torch.randn(30, 200, generator=G)[:, [0, *range(200)]], (0, 1)),
        (
            torch.randn(30, 200, generator=G).repeat(1, 2) * torch.tensor([1.0, -2.0]).repeat_interleave(200) + 5,
            (0, 200),
        ),
        (torch.ones(30, 3), (3, 0)),
        (torch.tensor([0.0, 1.0]).repeat(30)[:, None], (0, 0)),
        # A few columns of an image that one sample in 400 touches vary.
        (with_columns((torch.arange(400) == 7).float()[:, None]), (0, 0)),
        (with_columns(BASE[:, :1]).double(), (0, 1)),
    ],
)
def test_what_is_counted(data, counts):
    assert count_degenerate(data) == counts


def test_fit_warns_with_the_counts_and_the_least_noise():
    data = with_columns(torch.zeros(400, 2), BASE[:, :1])
    density = fs.ScoreDensity(ExactNet(mixture(6), fs.VP()), fs.VP(), "eps")
    with pytest.warns(
        UserWarning, match=r"of the data's 6 dimensions 2 constant and 1 linearly dependent on others.*"
    ) as found:
        density.fit(data, evaluations=0, progress=False)
    # VP's least noise: sigma^2 = 1e-6 at t = 1e-5.
    assert "least noise (standard deviation 0.001)" in str(found[0].message)
    with pytest.warns(UserWarning, match="2 constant"):
        fs.Transformed(density, zscore(0.0, 2.0)).fit(data, evaluations=0, progress=False)


def test_fit_counts_columns_that_are_narrower_than_the_least_noise_beside_constant_ones():
    data = with_columns(torch.zeros(400, 1), 1e-4 * BASE[:, :1], 1e6 * torch.ones(400, 1))
    density = fs.ScoreDensity(ExactNet(mixture(data.shape[1]), fs.VP()), fs.VP(), "eps")
    with pytest.warns(UserWarning, match="2 constant") as found:
        density.fit(data, evaluations=0, progress=False)
    assert "before training; beside these, 1 narrower than that noise, where log_prob is the" in str(found[0].message)


def test_fit_counts_the_columns_that_a_mask_leaves_in_all_samples():
    data = with_columns(torch.zeros(400, 2))
    density = fs.ScoreDensity(ExactNet(mixture(5), fs.VP()), fs.VP(), "eps")
    with pytest.warns(UserWarning, match="of the data's 4 dimensions 1 constant"):
        density.fit(data, mask=torch.tensor([True] * 4 + [False]), evaluations=0, progress=False)


@pytest.mark.parametrize(
    ("schedule", "std", "said"),
    [
        (fs.VP(), 1e-5, "below the least noise of the schedule, 0.001, in 3 of 3 dimensions: there log_prob is the"),
        (fs.EDM(), 1e3, "above the most noise of the schedule, 80, in 3 of 3 dimensions"),
        (fs.VE(0.01, 1.0), 0.5, None),
        (fs.Cosine(), 1e-5, None),  # which has no ends of its own
        (fs.EDM(), 0.01, None),
    ],
)
def test_fit_says_where_data_lie_beyond_the_noise(schedule, std, said):
    # There the number is the reference's, off by its own sampling error of about sqrt(d / N) nats: 0.02 in the mean at
    # N = 400 and d = 3, with a stderr of 1e-8 and a truncation of 1e-4 to 1e-6.
    density = fs.ScoreDensity(ExactNet(mixture(3), schedule), schedule, "eps")
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        density.fit(std * BASE, evaluations=0, progress=False)
    assert [said in str(w.message) for w in found] == ([] if said is None else [True])


def test_fit_says_where_a_direction_across_the_dimensions_is_narrow():
    """No column is: each has a standard deviation of 0.5. Scales that are apart both ways are both named."""
    basis, _ = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(1)))
    density = fs.ScoreDensity(ExactNet(mixture(3), fs.VP()), fs.VP(), "eps")
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        density.fit((BASE * torch.tensor([5e-5, 1.0, 1.0])) @ basis, evaluations=0, progress=False)
    assert [f"{w.message}"[:51] for w in found] == ["the data have a standard deviation of 5e-05, below "]
    assert "0.001, in a direction across the 3 dimensions: there" in str(found[0].message)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        density.fit(BASE * torch.tensor([5e-5, 1.0, 1e4]), evaluations=0, progress=False)
    assert ["above the most" in str(w.message) for w in found] == [True, False]
    assert ", in 1 of 3 dimensions: there log_prob" in str(found[1].message)
    assert ["discrete_log_prob of the levels" in str(w.message) for w in found] == [False, True]


@pytest.mark.parametrize("scale", [1e-9, 1e-5, 1e5])
def test_a_fitted_reference_follows_the_scale_of_the_data(scale):
    for fit in (fit_mixture(BASE * scale), fit_mixture(BASE * scale, 5, full=True)):
        plain = fit_mixture(BASE) if fit.components == 1 else fit_mixture(BASE, 5, full=True)
        expected = plain.log_prob(BASE) - 3 * torch.tensor(scale, dtype=torch.float64).log()
        # The k-means start of small data is another one, whose mixture differs by a tenth of a nat.
        assert float((fit.log_prob((BASE * scale).double()) - expected).mean().abs()) < 0.2


def test_fit_is_silent_about_data_that_fill_their_space():
    density = fs.ScoreDensity(ExactNet(mixture(3), fs.VP()), fs.VP(), "eps")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        density.fit(BASE, evaluations=0, progress=False)


@pytest.mark.parametrize(("steps", "said"), [(10, "0.25"), (20, "0.13"), (1000, None)])
def test_fit_says_where_clusters_are_narrower_than_the_least_noise(steps, said):
    """The tables of diffusion policies end at noise of 0.25 and 0.13; the clusters have 0.1, the data as a whole 0.6.

    There an exact network leaves errors of 0.1 nats for single samples, under bars of 0.003.
    """
    t = torch.arange(1, steps + 1, dtype=torch.float64)
    schedule = fs.DDPM.from_betas(1 - torch.exp(-0.1 / steps - 4.95 * (2 * t - 1) / steps**2))
    mean = 0.6 * torch.tensor([[1.0, -1, 1], [-1, 1, 1], [1, 1, -1]])
    target = Target(torch.ones(3) / 3, mean, 0.01 * torch.eye(3).expand(3, 3, 3))
    density = fs.ScoreDensity(ExactNet(target, schedule), schedule, "eps")
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        density.fit(target.sample(1000, 1).float(), evaluations=50_000, progress=False)
    told = [str(w.message) for w in found if "clusters" in str(w.message)]
    expected = [] if said is None else [f"below the least noise of the schedule, {said}: within them"]
    assert len(told) == len(expected)
    assert all(words in each for words, each in zip(expected, told))

"""Data below the schedule's least noise: the estimate says so where the reference does not stand in, and only there."""

import warnings

import pytest
import torch
from analytic import ExactNet, Target, mixture
from torch import nn

import fastscore as fs

SAID = r"the integrand does not decay at the clean end: in {} of {} dimensions the data are far narrower"
SCHEDULES = {"VE": fs.VE(0.3, 5.0), "table": fs.DDPM.linear(1000), "VP": fs.VP(), "EDM": fs.EDM()}


def gaussian(*stds, turned=False):
    d, scale = len(stds), torch.tensor(stds, dtype=torch.float64)
    basis = torch.eye(d, dtype=torch.float64)
    if turned:
        basis, _ = torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    return Target(torch.ones(1), torch.zeros(1, d), ((basis * scale**2) @ basis.T)[None])


def said_at_estimate(target, schedule, predicts="eps", fit=False, dtype=torch.float32, **options):
    """Return what an estimate warns of, and the estimate."""
    density = fs.ScoreDensity(ExactNet(target, schedule, predicts), schedule, predicts)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        if fit:
            density.fit(target.sample(600, 1).to(dtype), evaluations=20_000, progress=False)
        found.clear()
        result = density.estimate(target.sample(16).to(dtype), nfe=32, **options)
    return [str(w.message) for w in found], result


NARROW = {
    "all, by 3e4": (gaussian(1e-5, 1e-5, 1e-5), 3),
    "all, by 3e6": (gaussian(1e-7, 1e-7), 2),
    "two of four": (gaussian(1e-5, 0.5, 1e-5, 0.5), 2),
    "one of 16": (gaussian(1e-5, *[0.5] * 15), 1),
    "one direction of 16": (gaussian(1e-5, *[0.5] * 15, turned=True), 1),
    "one direction of 64": (gaussian(1e-5, *[0.5] * 63, turned=True), 1),
    "one of 80": (gaussian(1e-5, *[0.5] * 79), 1),
    "one, and one far wider than the most noise": (gaussian(1e-5, 1.0, 1e3), 1),
    "points": (Target(torch.ones(4) / 4, 5 * torch.eye(4)[:, :3], 1e-10 * torch.eye(3).expand(4, 3, 3)), 3),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", NARROW)
def test_data_below_the_least_noise(name, schedule):
    target, count = NARROW[name]
    said, result = said_at_estimate(target, SCHEDULES[schedule])
    assert [SAID.format(count, len(target.mean[0])) in text for text in said] == [True]
    if name != "one, and one far wider than the most noise":
        # What the number lacks, and truncation does not show: log(least noise / 1e-5) nats for every such direction.
        least = torch.tensor(-SCHEDULES[schedule].log_snr_range[1] / 2).exp()
        low = target.log_prob(target.sample(16)).mean() - result.log_prob.double().mean()
        assert float(low) > count * float((least / 1e-5).log()) - 6 * float(result.stderr.max())


def test_a_schedule_that_has_less_noise_than_is_asked_for_is_not_blamed():
    """The least noise of LogSNR(-30, 30) is 3e-7, and the sentence named 0.00034 as its own."""
    said, _ = said_at_estimate(gaussian(1e-5, 1.0), fs.LogSNR(-30, 30), dtype=torch.float64)
    (text,) = [text for text in said if "does not decay at the clean end" in text]
    assert "than the least noise that a reference of this scale asks for (standard deviation 0.00034)" in text
    assert text.endswith("fit(data) a reference")


@pytest.mark.parametrize("stds", [(1e-4,) * 3, (1e-4, 1e-4, 1.0), (1e-4, 1e-4, 1.0, 1e-4)])
def test_directions_as_narrow_as_one_that_is_found_count_with_it(stds):
    """The share is 0.0099 in each, by 32 rows 0.007 to 0.013, and the limit 0.01."""
    said, _ = said_at_estimate(gaussian(*stds), fs.VP())
    assert [SAID.format(stds.count(1e-4), len(stds)) in text for text in said] == [True]


@pytest.mark.parametrize("predicts", ["x0", "v", "score", "flow"])
def test_every_prediction_tells(predicts):
    schedule = fs.VP(0.5, 10.0)
    said, _ = said_at_estimate(gaussian(1e-5, 0.5), schedule, predicts, dtype=torch.float64)
    assert [SAID.format(1, 2) in text for text in said] == [True]


@pytest.mark.parametrize("fit", [False, True])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    "target",
    [
        gaussian(0.5, 0.5, 0.5),
        gaussian(*[2 / 256 / 12**0.5] * 4, *[0.5] * 4),  # pixels that are all but constant, in 8 bits
        gaussian(30.0, 30.0),
        gaussian(1e3, 1e3),
        mixture(8, std=0.05),
    ],
    ids=["ordinary", "8 bits", "wide", "wider", "mixture"],
)
def test_ordinary_data_are_silent(target, schedule, fit):
    if schedule == "VE":  # whose least noise is 0.3
        target = Target(target.distribution.mixture_distribution.probs, 100 * target.mean, 1e4 * target.cov)
    assert said_at_estimate(target, SCHEDULES[schedule], fit=fit)[0] == []


def test_a_sample_in_the_middle_is_no_narrow_one():
    """There the network misses a share e of the noise and nothing else, e^2 of its square."""
    schedule = fs.DDPM.linear(1000)
    density = fs.ScoreDensity(ExactNet(gaussian(*[0.00226] * 8), schedule), schedule, "eps")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        density.estimate(torch.zeros(1, 8), nfe=16)


def test_a_fitted_reference_stands_in_and_is_asked_again_without():
    target, schedule = gaussian(1e-5, 1e-5), fs.VE(0.3, 5.0)
    density = fs.ScoreDensity(ExactNet(target, schedule), schedule, "eps")
    x = target.sample(400).float()
    with pytest.warns(UserWarning, match=SAID.format(2, 2)):
        density.estimate(x[:8], nfe=16)
    with pytest.warns(UserWarning, match="below the least noise"):
        density.fit(x, evaluations=0, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        density.estimate(x[:8], nfe=16)
    with pytest.warns(UserWarning, match=SAID.format(2, 2)):
        density.with_reference(None).estimate(x[:8], nfe=16)


def test_a_mask_leaves_out_what_it_hides():
    target, schedule = gaussian(1e-5, 0.5, 0.5), fs.VE(0.3, 5.0)
    density = fs.ScoreDensity(ExactNet(target, schedule), schedule, "eps")
    x = target.sample(4).float()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        density.estimate(x, nfe=16, mask=torch.tensor([False, True, True]))
    other = density.with_reference(None)
    with pytest.warns(UserWarning, match=SAID.format(1, 2)):
        other.estimate(x, nfe=16, mask=torch.tensor([True, True, False]))


def test_a_network_that_does_not_look_at_its_input_is_no_narrow_one():
    class Zero(nn.Module):
        def forward(self, x_t, t):
            return 0 * x_t

    with warnings.catch_warnings():
        warnings.filterwarnings("error", "the integrand does not decay")
        fs.ScoreDensity(Zero(), fs.EDM(), "denoiser").estimate(torch.randn(4, 8), nfe=16)


def test_a_sum_that_is_no_integral_has_no_clean_end():
    schedule = fs.DDPM.linear(1000)
    assert said_at_estimate(gaussian(1e-5, 1e-5), schedule, method="elbo")[0] == []

"""Which control variate "auto" is: fitted to each image's own draws where that goes and pays, else the reference."""

import io
from dataclasses import replace

import pytest
import torch
from test_self_fit import Exact, images, photograph_like

import fastscore as fs
import fastscore.density
from fastscore.estimator import control, nodes, self_pilot
from fastscore.estimator.pilot import run_pilot
from fastscore.estimator.statistics import GroupSums

SCHEDULE = fs.LogSNR(-12, 17)
TARGET = photograph_like()
X = images(TARGET, 40)


def make(**options):
    return fs.ScoreDensity(Exact(TARGET, SCHEDULE), SCHEDULE, "eps", program=False, **options)


def same(one, other):
    return torch.equal(one.log_prob, other.log_prob) and torch.equal(one.stderr, other.stderr)


def test_images_have_it_without_being_told():
    density = make()
    found = density.estimate(X, nfe=64)
    assert (found.control, found.noise) == ("self", "independent")
    assert same(found, density.estimate(X, nfe=64, control="self"))
    # Twelve to thirty times less variance than the reference alone, here and on photographs (docs/images.md).
    assert float(found.variance.mean()) < 0.1 * float(density.estimate(X, nfe=64, control="reference").variance.mean())


@pytest.mark.parametrize(
    ("options", "made", "reason"),
    [
        ({"nfe": 63}, {}, '"self" needs nfe >= 64, evaluations to fit a sample\'s residuals to, got 63; give more'),
        ({"method": "elbo"}, {}, '"self" is for method="density", got \'elbo\'; leave the method out'),
        ({"mask": torch.ones(3, 8, 8)}, {}, '"self" is for whole samples, got a mask; leave the mask out'),
        ({}, {"noise": "sobol"}, 'noise="sobol" was asked for'),
    ],
)
def test_a_call_that_it_does_not_go_with_has_the_reference(options, made, reason):
    density, options = make(**made), {"nfe": 64} | options
    found = density.estimate(X, **options)
    assert found.control == "reference"
    assert same(found, density.estimate(X, control="reference", **options))
    samples = density.check(X, None, {}, mask=options.get("mask"))
    wanted = density.wanted(options["nfe"], 0, samples, None, options.get("method", "density"))
    assert control.why_reference(density.noise, density.nodes, samples, wanted).startswith(reason)


class Flat(Exact):
    def forward(self, x, t):
        return super().forward(x.reshape(-1, 3, 8, 8), t).reshape(x.shape)


@pytest.mark.parametrize("shape", [(192,), (3, 64), (1, 3, 8, 8)])
def test_what_is_no_image_has_the_reference(shape):
    density = fs.ScoreDensity(Flat(TARGET, SCHEDULE), SCHEDULE, "eps", program=False)
    assert density.estimate(X.reshape(-1, *shape), nfe=64).control == "reference"


def test_small_images_and_long_samples_have_the_reference(monkeypatch):
    monkeypatch.setattr(control, "LEAST_DIMS", 193)
    assert make().estimate(X[:2], nfe=64).control == "reference"
    monkeypatch.setattr(control, "LEAST_DIMS", 192)
    monkeypatch.setattr(control, "MOST_BYTES", 2 * 64 * 192 * 4)
    assert make().estimate(X[:2], nfe=64).control == "self"
    with pytest.warns(UserWarning, match=r'so that control="auto" is "reference".*give control="self"'):
        assert make().estimate(X[:2], nfe=65).control == "reference"
    assert make().estimate(X[:2], nfe=65, control="self").control == "self"


def test_the_memory_is_no_reason_for_another_number():
    density = make()
    expected = density.estimate(X, nfe=64)
    assert density.estimate(X, nfe=64, memory="20MB").control == "self"
    assert torch.allclose(density.estimate(X, nfe=64, memory="20MB").log_prob, expected.log_prob, atol=1e-3)
    with pytest.raises(ValueError, match="does not hold one sample's residuals"):
        density.estimate(X, nfe=64, memory="100KB")


@pytest.mark.parametrize(("own", "pays"), [(1.2, True), (1.3, False)])
def test_fit_measures_whether_it_pays(own, pays, monkeypatch):
    measured = {"reference": torch.ones(8), "self": torch.full((8,), own)}
    monkeypatch.setattr(self_pilot, "_variance", lambda density, control, *_: measured[control])
    monkeypatch.setattr(self_pilot, "_missed", lambda *_: 0.0)
    density = make().fit(images(TARGET, 400), reference="images", evaluations=20_000, progress=False)
    assert bool(density.nodes.own_pays) is pays
    other = make()
    other.load_state_dict(density.state_dict())
    for each in (density, other):
        assert each.estimate(X, nfe=64).control == ("self" if pays else "reference")


@pytest.mark.parametrize(("own", "pays"), [(1.2, True), (1.3, False)])
def test_noise_is_calibrated_where_it_will_be_used(own, pays, monkeypatch):
    measured = {"reference": torch.ones(8), "self": torch.full((8,), own)}
    monkeypatch.setattr(self_pilot, "_variance", lambda density, control, *_: measured[control])
    monkeypatch.setattr(self_pilot, "_missed", lambda *_: 0.0)
    # 24,576 of them for the pilot, 6,144 for both controls, and what sixteen samples take at all numbers of draws.
    density = make().fit(images(TARGET, 400), reference="images", evaluations=120_000, progress=False)
    assert (density.nodes.calibration.shape[1] == 0) is pays
    assert density.estimate(X, nfe=64, control="reference").noise == ("independent" if pays else "sobol")


def test_what_fit_measures_is_the_variance_of_both():
    data, found = images(TARGET, 400), {}
    density = make().fit(data, reference="isotropic", evaluations=20_000, progress=False)
    samples = density.check(data[:32], None, {})
    wanted = density.wanted(128, 0, samples, None)
    for name in ("reference", "self"):
        error = [density.estimate(data[:32], nfe=128, seed=s, control=name).log_prob.double() for s in range(8)]
        found[name] = float(torch.stack(error).var(0).mean())
        # 7 degrees of freedom at 32 samples: a standard error of 10 %, and as much for what the draws say.
        stated = float(self_pilot._variance(density, name, samples, wanted).mean())
        assert 0.6 * found[name] < stated < 1.8 * found[name]
    assert found["self"] < 0.1 * found["reference"]


def test_a_target_does_not_ask_for_the_memory_of_the_most_evaluations():
    class Net(torch.nn.Module):
        def forward(self, x, t):
            return 0.5 * x

    density = fs.ScoreDensity(Net(), fs.VP(), "eps", program=False)
    found = density.estimate(torch.randn(1, 4, 64, 64), nfe=64, target_stderr=1e5)
    assert (found.control, int(found.nfe)) == ("reference", 64)
    assert density.estimate(torch.randn(1, 4, 64, 64), nfe=64, target_stderr=1e5, max_nfe=128).control == "self"


@pytest.mark.parametrize("planted", [False, pytest.param(True, marks=pytest.mark.long)])
def test_the_mean_of_a_batch_far_from_the_reference_has_its_error(planted, monkeypatch):
    """Steps of the nodes' density are an error that all samples of a group have, and no difference of terms shows."""
    if planted:
        monkeypatch.setattr(nodes, "SMOOTH_BINS", 400)
    mean = TARGET.mean + 5 * torch.eye(1, 192, dtype=torch.float64)[0] * 8  # 5 in every number of the first channel
    far = fs.Reference(TARGET.weight, mean, TARGET.variance, factors=TARGET.factors)
    schedule = fs.LogSNR(-14, 16)
    density = fs.ScoreDensity(Exact(far, schedule), schedule, "eps", program=False)
    x = images(far, 64)
    truth = far.log_prob(x.flatten(1))
    error, told = [], []
    for seed in range(12):
        found = density.estimate(x, nfe=256, seed=seed)
        error.append(float((found.log_prob.double() - truth).mean()))
        common = GroupSums.of(found.log_prob, found.jump, found.group).common_variance()
        told.append(float(found.variance.mean() / len(x) + common))
    # 12 seeds: the spread has a standard error of 20 %.
    spread = float(torch.tensor(error).std())
    assert (spread < 1.7 * float(torch.tensor(told).mean().sqrt())) is not planted


def test_fit_says_where_to_begin_and_where_to_evaluate():
    density = make().fit(images(TARGET, 400), reference="isotropic", evaluations=20_000, progress=False)
    own = density.nodes.own
    assert (float(own.edges[0]), float(own.edges[-1])) == density.log_snr_range
    # Half of the draws go everywhere alike, and neighbouring bins differ by little.
    assert float((own.share * len(own.share)).min()) >= 0.5
    assert float((own.share[1:] / own.share[:-1]).log().abs().max()) < 0.03
    # More of them where the cosines' variances, 0.002 to 6, meet the noise, than where all is noise or all is signal.
    at = own.density_at(torch.tensor([-11.0, 2.0, 16.0], dtype=torch.float64))
    assert float(at[1]) > 1.5 * float(at[[0, 2]].max())


def test_measuring_stays_within_the_evaluations():
    density, asked = make(), []
    density.model.register_forward_hook(lambda model, args, output: asked.append(len(output)))
    density.estimate(X[:1], nfe=64)  # probes, once
    asked.clear()
    density.fit(images(TARGET, 400), reference="isotropic", evaluations=6_000, progress=False)
    # Measuring memory asks for a few rows more; what is measured here takes 6,144.
    assert sum(asked) < 6_000 + 500


def test_a_large_fit_leaves_evaluations_to_measure_it(monkeypatch):
    """A calibration takes all that it is given: of 400,000 evaluations it left some hundreds, which measure nothing."""
    given = []

    def pilot(network, samples, kind, plan):
        given.append(plan.evaluations)
        return run_pilot(network, samples, kind, replace(plan, evaluations=2000))

    monkeypatch.setattr(fastscore.density, "run_pilot", pilot)
    make().fit(X, evaluations=400_000, progress=False)
    make(noise="sobol").fit(X, evaluations=400_000, progress=False)
    make().fit(X, evaluations=20_000, progress=False)
    assert given == [400_000 - self_pilot.EVALUATIONS, 400_000, 20_000]


def test_one_sample_far_off_does_not_decide(monkeypatch):
    """Seven of eight samples have four times the variance, and one a hundredth of it, which is most of the mean."""
    reference = torch.tensor([1.0] * 7 + [1000.0])
    told = {"reference": reference, "self": reference * torch.tensor([4.0] * 7 + [0.01])}
    monkeypatch.setattr(self_pilot, "_variance", lambda density, control, *_: told[control])
    density = make().fit(X, evaluations=20_000, progress=False)
    assert not bool(density.nodes.own_pays)


def test_an_estimate_keeps_its_control(tmp_path):
    density = make()
    found = density.estimate(X[:20], nfe=64)
    found.save(tmp_path / "found.npz")
    assert fs.Estimate.load(tmp_path / "found.npz").control == "self"
    rest = {"nfe": 64, "sample_index": torch.arange(20, 40)}
    assert fs.Estimate.cat([found, density.estimate(X[20:], **rest)]).control == "self"
    with pytest.raises(ValueError, match="same control variates, got self, reference"):
        fs.Estimate.cat([found, density.estimate(X[20:], control="reference", **rest)])


def test_a_file_of_before_had_the_reference(tmp_path):
    import numpy as np

    make().estimate(X[:4], nfe=16).save(tmp_path / "now.npz")
    with np.load(tmp_path / "now.npz") as arrays:
        kept = {name: arrays[name] for name in arrays if name != "control"}
    written = io.BytesIO()
    np.savez(written, **kept)
    (tmp_path / "before.npz").write_bytes(written.getvalue())
    assert fs.Estimate.load(tmp_path / "before.npz").control == "reference"

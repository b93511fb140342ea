"""A schedule's ends may move under a living density: set by hand, or learned. Its nodes go with them."""

import copy
import math

import pytest
import torch
from mixtures import ExactEps, Mixture

import fastscore as fs
from fastscore.estimator.calibration import uncalibrated
from fastscore.estimator.nodes import FittedNodes, NodeDensity

MIXTURE = Mixture(torch.tensor([[-1.0, 0.5], [1.0, -0.5]]), torch.tensor([[0.3, 0.4]]))
X = MIXTURE.sample(256, torch.Generator().manual_seed(1))


class Ends(fs.VP):
    """Another class than our own, whose answers may come from anywhere."""

    most = 20.0

    def log_snr(self, t):
        self.beta_max = type(self).most
        return super().log_snr(t)


def with_range(schedule, ends):
    schedule.time_range = ends


def with_noise(schedule, beta_max):
    schedule.beta_max = beta_max


MOVES = [
    pytest.param(lambda: fs.VP(), with_range, (0.01, 0.7), id="time_range is set"),
    pytest.param(lambda: fs.VP(), with_noise, 12.0, id="a setting is changed"),
    pytest.param(lambda: fs.VE(0.01, 50.0), with_range, (0.1, 0.9), id="a variance-exploding one"),
    pytest.param(lambda: fs.EDM(), lambda schedule, most: setattr(schedule, "sigma_max", most), 20.0, id="sigma_max"),
    pytest.param(lambda: fs.LogSNR(-10, 12), lambda schedule, hi: setattr(schedule, "hi", hi), 9.0, id="hi"),
]


@pytest.mark.parametrize(("made", "move", "to"), MOVES)
def test_a_density_whose_schedules_ends_move_is_one_of_the_new_schedule(made, move, to):
    schedule = made()
    density = fs.ScoreDensity(ExactEps(MIXTURE, schedule), schedule, "eps")
    before = density.estimate(X, nfe=32)
    move(schedule, to)
    fresh = fs.ScoreDensity(ExactEps(MIXTURE, schedule), schedule, "eps")
    found, expected = density.estimate(X, nfe=32), fresh.estimate(X, nfe=32)
    assert density.log_snr_range == fresh.log_snr_range
    assert torch.equal(found.log_prob, expected.log_prob)
    assert not torch.equal(found.log_prob, before.log_prob)
    assert torch.equal(density.log_prob(X, nfe=32), fresh.log_prob(X, nfe=32))


def test_a_class_of_a_users_is_asked_at_every_call():
    schedule = Ends()
    density = fs.ScoreDensity(ExactEps(MIXTURE, schedule), schedule, "eps")
    before = density.log_snr_range
    try:
        Ends.most = 8.0
        density.log_prob(X, nfe=32)
        # The noisy end of VP is at -log(exp(int beta) - 1), int beta = (0.1 + most) / 2.
        assert before[0] == pytest.approx(-10.05, abs=0.01)
        assert density.log_snr_range[0] == pytest.approx(-4.03, abs=0.01)
    finally:
        Ends.most = 20.0


def test_fitted_nodes_stay_right_over_another_range():
    schedule = fs.VP()
    density = fs.ScoreDensity(ExactEps(MIXTURE, schedule), schedule, "eps")
    density.fit(MIXTURE.sample(1000, torch.Generator().manual_seed(2)), progress=False)
    assert density.nodes.calibration.numel()
    inside = density.nodes.density.density_at(torch.tensor([0.0, 2.0], dtype=torch.float64))
    schedule.beta_max = 14.0
    found = [density.estimate(X, nfe=64, seed=seed) for seed in range(8)]
    assert density.log_snr_range[0] == pytest.approx(-7.05, abs=0.01)
    # What is cut off leaves more for the rest, by the same factor everywhere.
    more = density.nodes.density.density_at(torch.tensor([0.0, 2.0], dtype=torch.float64)) / inside
    assert more[0] == pytest.approx(float(more[1]), rel=1e-9)
    assert more[0] > 1
    assert not density.nodes.calibration.numel()
    error = torch.stack([e.log_prob.double() for e in found]) - MIXTURE.log_prob(X)
    stderr = torch.stack([e.stderr.double() for e in found])
    # 2048 intervals of 95 %, at 256 points: two standard errors of the share are 2 %.
    assert 0.92 <= float((error.abs() < 1.96 * stderr).double().mean()) <= 0.985
    assert abs(float(error.mean())) < 4 * float(stderr.square().mean().sqrt()) / error.numel() ** 0.5


def spread(density, seeds=6):
    found = torch.stack([density.estimate(X, nfe=32, seed=seed).log_prob for seed in range(seeds)]).double()
    return float((found - MIXTURE.log_prob(X)).square().mean().sqrt())


@pytest.mark.parametrize("ends", [(-5.0, 6.0), (-12.0, 15.0)], ids=["cut", "extended"])
def test_moved_nodes_are_about_as_good_as_fresh_ones(ends):
    """Nodes that were stretched instead would have their evaluations at other noise than where the data need them."""
    errors, data = [], MIXTURE.sample(1000, torch.Generator().manual_seed(2))
    for schedule in (fs.LogSNR(-8, 10), fs.LogSNR(*ends)):
        density = fs.ScoreDensity(ExactEps(MIXTURE, schedule), schedule, "eps", noise="independent")
        density.fit(data, evaluations=60_000, progress=False)
        schedule.lo, schedule.hi = ends
        errors.append(spread(density))
    # An error of 1,536 estimates at 256 points is known to some 5 %.
    assert errors[0] < 1.2 * errors[1]


def test_a_state_dict_of_another_schedules_density_keeps_to_its_own_schedule():
    data, asked = MIXTURE.sample(1000, torch.Generator().manual_seed(2)), []
    wide, narrow = fs.VE(0.005, 80.0), fs.VE(0.02, 30.0)
    fitted, other = (fs.ScoreDensity(ExactEps(MIXTURE, each), each, "eps", program=False) for each in (wide, narrow))
    fitted.fit(data, evaluations=100_000, progress=False)
    other.estimate(X[:16], nfe=16)
    other.load_state_dict(fitted.state_dict(), strict=False)
    other.model.register_forward_pre_hook(lambda _, args: asked.append(args[1].aminmax()))
    # Its evaluations are where a fit of its own would have them; the loaded calibration is of other nodes, and gone.
    fresh = fs.ScoreDensity(ExactEps(MIXTURE, narrow), narrow, "eps", noise="independent")
    assert spread(other) < 1.2 * spread(fresh.fit(data, evaluations=60_000, progress=False))
    assert not other.nodes.calibration.numel()
    assert min(float(least) for least, _ in asked) >= 0
    assert max(float(most) for _, most in asked) <= 1
    assert other.log_snr_range == pytest.approx(narrow.log_snr_range, abs=1e-9)


@pytest.mark.parametrize("schedule", [fs.VE(0.005, 80.0), fs.LogSNR()], ids=["ends of its own", "endless"])
def test_a_state_dict_of_the_same_schedules_density_brings_all_that_was_fitted(schedule):
    """A pilot's range is that of the first candidate: of an endless schedule another than the kept reference's."""
    fitted = fs.ScoreDensity(ExactEps(MIXTURE, schedule), schedule, "eps")
    fitted.fit(MIXTURE.sample(1000, torch.Generator().manual_seed(2)), evaluations=100_000, progress=False)
    same = fs.ScoreDensity(ExactEps(MIXTURE, schedule), schedule, "eps")
    same.load_state_dict(fitted.state_dict(), strict=False)
    for other in (same, copy.deepcopy(fitted)):
        assert torch.equal(other.estimate(X, nfe=32).log_prob, fitted.estimate(X, nfe=32).log_prob)
        assert other.nodes.calibration.numel()


def test_ends_that_a_schedule_learns_by_less_than_counts_keep_the_nodes():
    schedule = fs.VP()
    density = fs.ScoreDensity(ExactEps(MIXTURE, schedule), schedule, "eps")
    density.estimate(X, nfe=32)
    nodes, kept = density.nodes, copy.deepcopy(density.nodes.state_dict())
    schedule.beta_max += 1e-3
    density.estimate(X, nfe=32)
    assert density.nodes is nodes
    assert all(map(torch.equal, density.nodes.state_dict().values(), kept.values()))


def test_ends_that_come_back_bring_back_the_nodes():
    schedule = fs.VP()
    density = fs.ScoreDensity(ExactEps(MIXTURE, schedule), schedule, "eps")
    density.fit(MIXTURE.sample(1000, torch.Generator().manual_seed(2)), evaluations=100_000, progress=False)
    before = density.estimate(X, nfe=32)
    for beta_max in (14.0, 9.0, 20.0):
        schedule.beta_max = beta_max
        found = density.estimate(X, nfe=32)
    assert torch.equal(found.log_prob, before.log_prob)
    assert torch.equal(found.stderr, before.stderr)


@pytest.mark.parametrize("std", [1e-3, 100.0])
def test_ends_are_followed_at_the_scale_of_the_data(std):
    """The range for data of standard deviation one is cut where these data still change, or long after they do not."""
    mixture = Mixture(std * MIXTURE.mean, std * MIXTURE.std)
    schedule = fs.LogSNR(-14, 30) if std < 1 else fs.VE(0.01, 1e5)
    density, asked = fs.ScoreDensity(ExactEps(mixture, schedule), schedule, "eps", program=False), []
    density.fit(mixture.sample(400, torch.Generator().manual_seed(2)), evaluations=10_000, progress=False)
    if std < 1:
        schedule.hi = 18.0
    else:
        schedule.sigma_max = 2000.0
    density.model.register_forward_pre_hook(lambda _, args: asked.append(args[1].aminmax()))
    density.estimate(mixture.sample(16, torch.Generator().manual_seed(3)), nfe=32)
    assert density.log_snr_range == pytest.approx(schedule.range_for(*density.nodes.scales.tolist()), abs=0.01)
    ends = sorted(schedule.time_range)
    assert min(float(least) for least, _ in asked) >= ends[0] - 1e-6
    assert max(float(most) for _, most in asked) <= ends[1] + 1e-6


@pytest.mark.parametrize("ends", [(-10.0, 12.0), (1.0, 1.0), (float("nan"), -10.0)])
def test_ends_that_are_no_range_are_refused(ends):
    schedule = fs.LogSNR(-10, 12)
    density = fs.ScoreDensity(ExactEps(MIXTURE, schedule), schedule, "eps")
    density.estimate(X, nfe=16)
    schedule.time_range = ends
    for _ in range(2):  # again and again
        with pytest.raises(ValueError, match=r"must go up from the noisy end to the clean one, got .*set its"):
            density.estimate(X, nfe=16)


@pytest.mark.parametrize("moved", ["set", "loaded"])
def test_a_bound_of_levels_follows_the_ends_at_its_first_call(moved):
    """A mixture reference is replaced by its Gaussian there, in a density of its own."""
    levels, data = fs.Levels(64, -2.0, 2.0), MIXTURE.sample(400, torch.Generator().manual_seed(2)).clamp(-2, 2)
    k = ((data[:64] - levels.first) / levels.width).round().long().clamp(0, 63)

    def fitted(sigma_min):
        schedule = fs.EDM(sigma_min, 80.0, 1.0)
        density = fs.ScoreDensity(ExactEps(MIXTURE, schedule), schedule, "eps")
        return density.fit(data, reference="mixture", evaluations=10_000, progress=False)

    fresh, density = fitted(0.05), fitted(0.002)
    if moved == "set":
        density.schedule.sigma_min = 0.05
    else:
        state, schedule = density.state_dict(), fs.EDM(0.05, 80.0, 1.0)
        density = fs.ScoreDensity(ExactEps(MIXTURE, schedule), schedule, "eps")
        density.load_state_dict(state, strict=False)
    mean, expected = (fs.discrete_log_prob(each, k, levels, nfe=256).mean()[0] for each in (density, fresh))
    # One data set, whose estimates have errors of some 0.03; with the old range they are 2.7 apart.
    assert abs(mean - expected) < 0.15


def test_nodes_that_are_put_in_their_place_stay_and_a_bound_of_levels_has_one_range():
    schedule = fs.LogSNR()
    density = fs.ScoreDensity(ExactEps(MIXTURE, schedule), schedule, "eps")
    density.nodes = FittedNodes(NodeDensity.uniform(-9.0, 11.0), uncalibrated())
    density.estimate(X[:16], nfe=16)
    assert density.log_snr_range == (-9.0, 11.0)

    narrow = Mixture(MIXTURE.mean, MIXTURE.std / 10)
    levels, data = fs.Levels(2000, -2.0, 2.0), narrow.sample(1000, torch.Generator().manual_seed(2)).clamp(-2, 2)
    density = fs.ScoreDensity(ExactEps(narrow, schedule), schedule, "eps")
    density.fit(data, reference="mixture", evaluations=10_000, progress=False)
    k = ((data[:256] - levels.first) / levels.width).round().long().clamp(0, 1999)
    mean, _ = fs.discrete_log_prob(density, k, levels, nfe=1024).mean()
    # At the least noise, a tenth of a level, the exact network of continuous data still knows nothing of levels: the
    # bound is what is known of x there. These 256 estimates have a common error of some 0.02.
    least = -0.5 * density.log_snr_range[1]
    expected = float(narrow.log_prob(levels.values(k)).mean()) + 2 * least + math.log(2 * math.pi * math.e)
    assert abs(mean - expected) < 0.1, (mean, expected)


def test_the_clean_end_is_asked_about_again_where_it_has_moved():
    mixture, schedule = Mixture(torch.zeros(1, 3), torch.tensor([[0.01]])), fs.EDM(1e-4, 80.0, 1.0)
    density = fs.ScoreDensity(ExactEps(mixture, schedule), schedule, "eps")
    x = mixture.sample(8, torch.Generator().manual_seed(1))
    density.estimate(x, nfe=16)
    schedule.sigma_min = 2.0
    with pytest.warns(UserWarning, match="the integrand does not decay at the clean end"):
        density.estimate(x, nfe=16)


def test_a_state_dict_is_not_written_into_a_reference_that_others_hold():
    reference, schedule = fs.Reference.isotropic(2.0), fs.VP()
    one, other = (fs.ScoreDensity(ExactEps(MIXTURE, schedule), schedule, "eps", reference=reference) for _ in range(2))
    before = other.estimate(X, nfe=16).log_prob
    fitted = fs.ScoreDensity(ExactEps(MIXTURE, schedule), schedule, "eps")
    fitted.fit(MIXTURE.sample(400, torch.Generator().manual_seed(2)), evaluations=10_000, progress=False)
    one.load_state_dict(fitted.state_dict(), strict=False)
    assert torch.equal(reference.variance, torch.full_like(reference.variance, 4.0))
    assert torch.equal(other.estimate(X, nfe=16).log_prob, before)
    assert torch.equal(one.estimate(X, nfe=32).log_prob, fitted.estimate(X, nfe=32).log_prob)


@pytest.mark.parametrize("schedule", [fs.EDM(), fs.LogSNR(), fs.VP(), fs.DDPM.linear(50)], ids=repr)
def test_a_density_goes_through_a_file(schedule, tmp_path):
    density = fs.ScoreDensity(ExactEps(MIXTURE, schedule), schedule, "eps")
    before = density.estimate(X, nfe=16)
    torch.save(density, tmp_path / "density.pt")
    again = torch.load(tmp_path / "density.pt", weights_only=False)
    assert torch.equal(again.estimate(X, nfe=16).log_prob, before.log_prob)


@pytest.mark.parametrize("end", ["a", None, 0.0, -1.0])
def test_an_end_that_is_no_noise_is_refused_in_a_sentence(end):
    schedule = fs.VE(0.01, 50.0)
    density = fs.ScoreDensity(ExactEps(MIXTURE, schedule), schedule, "eps")
    schedule.sigma_max = end
    with pytest.raises(ValueError, match=r"the ends of VE must be numbers that its log-SNR is known at, got .*set its"):
        density.estimate(X, nfe=16)


def test_a_table_has_the_range_of_its_entries_and_its_twin_the_one_that_is_set():
    table = fs.DDPM.linear(100)
    with pytest.raises(
        ValueError, match=r"the range of a table is all of its timesteps, 0 to 99, got time_range \(0, 9\)"
    ):
        table.time_range = (0, 9)
    twin, entries = fs.ContinuousDDPM(table), table.entries()
    twin.time_range = (4.0, 60.0)
    assert twin.log_snr_range == pytest.approx((float(entries[60]), float(entries[4])), abs=1e-12)
    density = fs.ScoreDensity(ExactEps(MIXTURE, twin), twin, "eps")
    found = density.estimate(X, nfe=256)
    error = (found.log_prob.double() - MIXTURE.log_prob(X)).abs()
    assert float((error < 1.96 * found.stderr + found.truncation_per_sample).double().mean()) > 0.9

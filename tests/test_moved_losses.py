"""Losses draw where their density integrates: after a fit, a load, or a move of its schedule's ends."""

import pytest
import torch
from mixtures import ExactEps, Mixture

import fastscore as fs
from fastscore import density_loss
from fastscore.training.nodes import AdaptiveNodes

MIXTURE = Mixture(torch.tensor([[-1.0, 0.5], [1.0, -0.5]]), torch.tensor([[0.3, 0.4]]))
SMALL = Mixture(1e-4 * MIXTURE.mean, 1e-4 * MIXTURE.std)
X = MIXTURE.sample(256, torch.Generator().manual_seed(1))


class Wrong(ExactEps):
    """A network with a factor: the integrand differs from the reference's at the clean end as well."""

    gain = 0.8

    def forward(self, x_t, t):
        return self.gain * super().forward(x_t, t)


def density_of(schedule, mixture=MIXTURE, network=ExactEps):
    """Return a density, and the lowest and highest times that its network was asked for, as a list that grows."""
    density, asked = fs.ScoreDensity(network(mixture, schedule), schedule, "eps", program=False), []
    density.model.register_forward_pre_hook(lambda _, args: asked.extend(map(float, args[1].aminmax())))
    return density, asked


def fitted(density, mixture=MIXTURE):
    data = mixture.sample(400, torch.Generator().manual_seed(2))
    return density.fit(data, evaluations=10_000, progress=False)


def assert_inside(schedule, asked):
    lowest, highest = sorted(schedule.time_range)
    assert lowest - 1e-6 * abs(lowest) <= min(asked)  # times are float32
    assert max(asked) <= highest + 1e-6 * abs(highest)


def mean_loss(density, x, seeds=40, **options):
    """Return the mean over seeds and its standard error."""
    with torch.no_grad():
        found = torch.stack([density_loss(density, x, seed=seed, draws=4, **options) for seed in range(seeds)]).double()
    return float(found.mean()), float(found.std()) / seeds**0.5


def shrink(density):
    density.schedule.sigma_min, density.schedule.sigma_max = 0.2, 10.0


def load_wider(density):
    density.load_state_dict(fitted(density_of(fs.EDM(2e-4, 800.0, 1.0))[0]).state_dict(), strict=False)


@pytest.mark.parametrize("change", [shrink, load_wider])
@pytest.mark.parametrize("adaptive", [False, True], ids=["the density's nodes", "adaptive nodes"])
def test_the_first_loss_after_a_change_asks_nothing_outside_and_is_that_of_any_later_call(change, adaptive):
    schedule = fs.EDM(0.002, 80.0, 1.0)
    density, asked = density_of(schedule)
    nodes = AdaptiveNodes(schedule) if adaptive else None
    change(density)
    asked.clear()
    first = density_loss(density, X, seed=0, nodes=nodes)
    assert_inside(schedule, asked)
    again = density_loss(density, X, seed=0, nodes=AdaptiveNodes(schedule) if adaptive else None)
    # The same log-SNRs and noise; adaptive nodes were made for ends that differ by rounding.
    assert float(first) == pytest.approx(float(again), rel=1e-6)


@pytest.mark.parametrize("move", [(0.002, 20.0), (0.2, 80.0), (2e-4, 800.0)], ids=["noisy", "clean", "wider"])
def test_adaptive_nodes_follow_ends_with_what_they_have_seen(move):
    schedule = fs.EDM(0.002, 80.0, 1.0)
    density, asked = density_of(schedule)
    nodes = AdaptiveNodes(schedule)
    mean_loss(density, X, nodes=nodes)
    before, at = nodes.density, torch.tensor([-3.0, 0.0, 3.0], dtype=torch.float64)
    schedule.sigma_min, schedule.sigma_max = move
    asked.clear()
    density_loss(density, X, seed=100, nodes=nodes)
    assert_inside(schedule, asked)
    assert nodes.density.edges[[0, -1]].tolist() == pytest.approx(schedule.log_snr_range, abs=0.01)
    # Relative to one another the densities inside stay, but for bins of another width and one more call.
    ratio = nodes.density.density_at(at) / before.density_at(at)
    assert torch.allclose(ratio / ratio[1], torch.ones_like(ratio), atol=0.35)


def test_adaptive_nodes_cover_the_range_of_a_fitted_density():
    """Data of deviation 1e-4 change up to log-SNR 34; an endless schedule says 16, for data of deviation one."""
    schedule = fs.LogSNR()
    density, asked = density_of(schedule, SMALL, Wrong)
    nodes = AdaptiveNodes(schedule)
    fitted(density, SMALL)
    asked.clear()
    x = SMALL.sample(256, torch.Generator().manual_seed(3))
    (plain, error), (adaptive, own_error) = (mean_loss(density, x, nodes=each) for each in (None, nodes))
    assert max(asked) > 33
    assert nodes.density.edges[[0, -1]].tolist() == pytest.approx(density.log_snr_range, abs=0.01)
    # Over the schedule's own range the loss is half a nat from this.
    assert abs(adaptive - plain) < 4 * (error**2 + own_error**2) ** 0.5
    assert own_error < 0.05


def test_a_loss_of_tokens_covers_the_range_of_its_fitted_density():
    class Head(Wrong):
        def forward(self, x_t, t, c):
            return super().forward(x_t, t)

    schedule, z = fs.LogSNR(), torch.zeros(256, 1)
    x = SMALL.sample(256, torch.Generator().manual_seed(3))
    loss = fs.DiffusionLoss(Head(SMALL, schedule), schedule, predicts="eps", program=False)
    loss.density.fit(x, c=z, evaluations=10_000, progress=False)
    loss(x, z, seed=0)
    assert loss.nodes.density.edges[[0, -1]].tolist() == pytest.approx(loss.density.log_snr_range, abs=0.01)


def test_nodes_of_another_schedule_go_over_to_that_of_the_density():
    density, _ = density_of(fs.VP())
    for other in (fs.LogSNR(0.0, 1.0), fs.LogSNR(20.0, 30.0), fs.LogSNR()):
        found = density_loss(density, X, seed=0, nodes=AdaptiveNodes(other))
        assert float(found) == pytest.approx(float(density_loss(density, X, seed=0, nodes=AdaptiveNodes(fs.VP()))))


def test_what_was_seen_goes_over_by_the_common_width():
    nodes = AdaptiveNodes(fs.LogSNR(-8.0, 4.0))
    nodes.moment.copy_(torch.arange(24.0))
    nodes.seen.copy_(torch.arange(24) % 3 != 0)  # one draw in a bin or none
    nodes.cover(-5.0, 19.0)
    assert torch.equal(nodes.edges, torch.linspace(-5.0, 19.0, 25, dtype=torch.float64))
    # Bins [-5, -4), [-4, -3), [-3, -2) hold the old 6 and 7, 8 and 9, 10 and 11, of which 6 and 9 have seen nothing.
    assert nodes.moment[:3].tolist() == [7.0, 8.0, 10.5]
    assert nodes.seen[:3].tolist() == [1.0, 1.0, 2.0]
    assert not nodes.seen[9:].any()
    # Those that have seen nothing count like the average of the others.
    root = torch.cat([nodes.moment[:9], nodes.moment[:9].mean().expand(15)]).sqrt()
    assert torch.allclose(nodes.density.share, 0.9 * root / root.sum() + 0.1 / 24, rtol=1e-9)


@pytest.mark.parametrize("ends", [(1.0, 1.0), (2.0, -2.0), (float("nan"), 1.0), (float("-inf"), 1.0)])
def test_a_range_that_does_not_go_up_is_refused(ends):
    nodes = AdaptiveNodes(fs.VP())
    before = nodes.density
    with pytest.raises(ValueError, match=r"must go up from the noisy end to the clean one, got \(.*set the schedule's"):
        nodes.cover(*ends)
    assert torch.equal(nodes.density.edges, before.edges)


def test_a_density_of_nodes_stays_when_they_move():
    nodes = AdaptiveNodes(fs.VP())
    before = nodes.density
    edges = before.edges.clone()
    nodes.cover(-3.0, 3.0)
    assert torch.equal(before.edges, edges)

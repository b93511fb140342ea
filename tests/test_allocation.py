"""How draws are shared out among the entries of a table."""

import pytest
import torch
from analytic import ExactNet, mixture

import fastscore as fs
from fastscore.estimator.allocation import Allocation
from fastscore.estimator.methods import DENSITY
from fastscore.estimator.nodes import NodeDensity
from fastscore.estimator.rules import Rules
from fastscore.estimator.statistics import GroupSums

SHARES = {
    "even": torch.ones(50),
    "one outweighs all": torch.tensor([1000.0, *[1.0] * 30]),
    "two stretches": torch.tensor([5.0] * 4 + [0.2] * 20 + [7.0] * 3 + [0.1] * 20),
    "almost all certain": torch.tensor([3.0] * 15 + [0.01]),
    "falling": 1 / (1 + torch.arange(200)) ** 2,
}


@pytest.mark.parametrize("draws", [4, 7, 16, 64, 1000])
@pytest.mark.parametrize("share", SHARES.values(), ids=SHARES)
def test_every_entry_is_drawn_as_often_as_its_count_says(share, draws):
    share = share.double() / share.sum()
    found = Allocation.of(share, draws)
    drawn = torch.stack([found.entries((k + 0.5) / 400).bincount(minlength=len(share)) for k in range(400)])
    assert drawn.sum(1).unique().tolist() == [draws]
    # 400 shifts: an entry's share of them is right to one shift.
    torch.testing.assert_close(drawn.double().mean(0), found.count, rtol=0, atol=1 / 400 + 1e-9)
    assert bool((drawn[:, found.certain] == drawn[:1, found.certain]).all())
    assert bool((found.count[found.certain] >= 1).all())
    assert bool((found.count > 0).all())


@pytest.mark.parametrize("steps", [20, 50, 1000])
@pytest.mark.parametrize("draws", [16, 64, 256])
def test_a_constant_is_summed_right_by_every_shift(steps, draws):
    schedule = fs.DDPM.linear(steps)
    density = NodeDensity.uniform(*schedule.log_snr_range)
    sums = [float(Rules(density, draws, schedule, DENSITY, k / 40).of(0).weight.sum()) for k in range(40)]
    whole = float(schedule.log_snr_range[1] - schedule.log_snr_range[0])
    assert sums == pytest.approx([whole] * 40, rel=1e-9)


@pytest.mark.parametrize("nfe", [32, 64])
@pytest.mark.parametrize("method", ["density", "discrete", "elbo"])
def test_means_over_a_short_table_have_the_error_that_they_state(method, nfe, one_thread):
    """Where half of the entries are drawn in any case, the others' number must not depend on the shift."""
    target, schedule = mixture(64), fs.DDPM.linear(50)
    density, x = (
        fs.ScoreDensity(ExactNet(target, schedule), schedule, "eps", program=False),
        target.sample(32, seed=1).float(),
    )
    found = [density.estimate(x, nfe=nfe, seed=seed, method=method) for seed in range(24)]
    spread = float(torch.tensor([float(each.log_prob.double().mean()) for each in found]).std())
    stated = []
    for each in found:
        common = GroupSums.of(each.log_prob, each.jump, each.group).common_variance()
        stated.append(float((each.variance.sum() / 32**2 + common).sqrt()))
    # 24 seeds know a spread to 15 %; DDPM's bound has weights of its own beside the draws' density.
    assert spread < (1.8 if method == "elbo" else 1.5) * sum(stated) / 24

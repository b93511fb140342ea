"""Small tables that are made on the host for every call: ends of the range, rules of groups, constants of bars."""

import math

import pytest
import torch

from fastscore import LogSNR
from fastscore.estimator import calibration
from fastscore.estimator.curve import EndTable
from fastscore.estimator.methods import DENSITY
from fastscore.estimator.nodes import NodeDensity
from fastscore.estimator.rules import Rules

CLOSE = {"rtol": 1e-12, "atol": 1e-12}  # a handful of operations in float64


def test_the_table_of_ends():
    # One draw beyond each end; within one unit of the first that is inside lie two, and of the last three, of which a
    # quarter of the twelve inside is the most.
    inside = [-3.0, -2.1, -1.9, -1.0, 0.0, 0.5, 1.0, 1.2, 2.0, 2.6, 2.9, 3.5]
    table = EndTable.of(torch.tensor([-4.5, *inside, 4.5], dtype=torch.float64), (-4.0, 4.0))
    mean, spread = torch.zeros(14, 4).double(), torch.zeros(13, 4).double()
    mean[1:3, 0], mean[3:5, 1] = 1 / 2, 1 / 2
    mean[10:13, 2], mean[7:10, 3] = 1 / 3, 1 / 3
    spread[1, 0] = spread[3, 1] = 1 / 4
    spread[10:12, 2] = spread[7:9, 3] = 1 / 12
    torch.testing.assert_close(table.mean, mean, **CLOSE)
    torch.testing.assert_close(table.spread, spread, **CLOSE)
    outer, inner = (2.6 + 2.9 + 3.5) / 3, (1.0 + 1.2 + 2.0) / 3
    at = torch.tensor([[-1.45 + 2.55, -2.55 + 4.0], [outer - inner, 4.0 - outer]], dtype=torch.float64)
    torch.testing.assert_close(table.at, at, **CLOSE)


def test_fewer_than_four_draws_inside_say_nothing():
    table = EndTable.of(torch.tensor([-3.0, 0.0, 1.0, 2.0], dtype=torch.float64), (-2.0, 2.0))
    assert bool(table.mean.isnan().all() and table.at.isnan().all())


def test_rules_that_are_made_together_are_those_made_alone():
    density = NodeDensity.uniform(-6.0, 10.0)
    together, alone = (Rules(density, 9, LogSNR(-6, 10), DENSITY, 0.3) for _ in range(2))
    groups = (0, 5, 2)
    shifts = [(0.3 + place / 16) % 1 for place in (0, 10, 4)]  # bits of the group's number reversed
    for rule, group, shift in zip(together.made_of(groups), groups, shifts, strict=True):
        own = alone.of(group)
        assert all(map(torch.equal, rule.kept(), own.kept()))
        log_snr = -6 + 16 * (torch.arange(9, dtype=torch.float64) + shift) / 9
        torch.testing.assert_close(rule.log_snr, log_snr, **CLOSE)
        torch.testing.assert_close(rule.weight, torch.full((9,), 16 / 9, dtype=torch.float64), **CLOSE)
        assert rule.ends.tolist() == [-1.0, *[0.0] * 7, 1.0]


@pytest.mark.parametrize("nfe", [8, 16, 24, 32, 48, 64, 256])
def test_constants_lie_on_lines_between_the_measured_ones_and_go_on_as_the_variance_does(nfe):
    at = torch.tensor([4.0, 5.0, 6.0], dtype=torch.float64)
    rows = torch.stack([at, -2 * at, 3 * at, 5 * at, at + 1, at + 2])
    u = min(max(math.log2(nfe), 4.0), 6.0)
    beyond = math.log(2) * (math.log2(nfe) - u)
    assert calibration.constants(nfe, rows) == pytest.approx((-2 * u - beyond, 3 * u, 5 * u, u + 1, u + 2), rel=1e-12)

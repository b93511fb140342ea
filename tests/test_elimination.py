"""Rounds of a classifier by themselves: how large they are, what they weigh, and when a class drops."""

import pytest
import torch

from fastscore.classify import elimination
from fastscore.classify.elimination import Rounds, round_sizes


@pytest.mark.parametrize(
    ("nfe", "sizes"),
    [(8, [8]), (32, [32]), (63, [63]), (64, [32, 32]), (200, [32, 32, 64, 72]), (256, [32, 32, 64, 128])],
)
def test_rounds_double_what_was_spent(nfe, sizes):
    assert round_sizes(nfe) == sizes


@pytest.mark.parametrize("course", [1.0, 0.0])
def test_a_class_drops_by_whichever_order_of_differences_says_so_first(course):
    """A difference that rises without noise is clear from second differences, one of even noise from first ones."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2000, 16, generator=generator, dtype=torch.float64)
    rising = course * torch.linspace(-10, 10.8, 16, dtype=torch.float64) + noise * (0.1 if course else 1.0)
    terms = torch.stack([rising + 1.2 * (1 - course), torch.zeros_like(rising)], 1)
    pairs = torch.stack([torch.arange(4000) // 2, torch.arange(4000) % 2], 1)

    def dropped(*orders):
        rounds = Rounds(torch.full((2,), 0.5).double().log(), 2000)
        flat = terms.flatten(0, 1)
        rounds.add(pairs, flat.sum(1), flat, torch.zeros_like(flat), 32)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(elimination, "VARIANCES", orders or elimination.VARIANCES)
            rounds.drop(0.002)
        return float((~rounds.active[:, 1]).double().mean())

    first, second = (dropped(by, by) for by in elimination.VARIANCES)
    assert (first < second - 0.5) if course else (first > second + 0.05)
    assert dropped() >= max(first, second)


def test_rounds_weigh_by_their_evaluations():
    rounds = Rounds(torch.full((2,), 0.5).double().log(), 1)
    both = torch.tensor([[0, 0], [0, 1]])
    terms = torch.tensor([[1.0, 2.0, 1.0, 2.0], [0.0, 1.0, 0.0, 1.0]])
    rounds.add(both, terms.double().sum(1), terms, torch.zeros_like(terms), 8)
    torch.testing.assert_close(rounds.log_likelihood(), torch.tensor([[6.0, 2.0]]).double())
    rounds.drop(0.05)  # the difference is 4 without any noise
    assert rounds.active.tolist() == [[True, False]]
    assert rounds.open().tolist() == []
    terms = torch.tensor([[4.0, 4.0, 4.0, 6.0]])
    rounds.add(both[:1], terms.double().sum(1), terms, torch.zeros_like(terms), 24)
    # The first class: (8 * 6 + 24 * 18) / 32 = 15; the second keeps its distance of 4 from the shared round.
    torch.testing.assert_close(rounds.log_likelihood(), torch.tensor([[15.0, 11.0]]).double())
    assert rounds.nfe.tolist() == [8 * 2 + 24]

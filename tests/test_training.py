"""The loss earns its place: the demo's digits network, trained for a short time with it and with DDPM's plain loss."""

import pytest
import torch
from digits_training import held_out, mean_and_error, train

pytestmark = pytest.mark.slow

STEPS = 200


def test_density_loss_reaches_fewer_bits_than_the_plain_loss():
    """Same network, initial weights, steps, and evaluations a step; benchmarks/bench_training.py is longer."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    found = {}
    for loss in ("eps-loss, cosine times", "density_loss, antithetic, adaptive nodes"):
        found[loss] = [held_out(*train(loss, "eps", seed, STEPS), nfe=32) for seed in range(2)]
    torch.set_num_threads(before)
    plain, ours = found.values()
    gain, error = mean_and_error([float((a - b).mean()) for a, b in zip(plain, ours)])
    print(f"bits/dim: {mean_and_error([float(a.mean()) for a in plain])} plain,", end=" ")
    print(f"{mean_and_error([float(b.mean()) for b in ours])} density_loss, gain {gain:.3f} +- {error:.3f}")
    assert gain > 4 * error
    assert gain > 0.05

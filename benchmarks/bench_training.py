"""Held-out bits per dimension of the demo's digits network after the plain eps-loss and after `density_loss`.

Same network, same initial weights, same optimizer, same steps, same number of network evaluations a step; three seeds.
"""

import pytest
from digits_training import LOSSES, held_out, mean_and_error, train

SEEDS, STEPS = (0, 1, 2), 2000
FIRST = next(iter(LOSSES))
FOUND = {}


@pytest.mark.long
@pytest.mark.parametrize("predicts", ["eps", "v"])
@pytest.mark.parametrize("loss", LOSSES)
def test_bits_per_dimension(benchmark, table, loss, predicts):
    # The benchmark's seconds are those of one training.
    last = benchmark.pedantic(lambda: train(loss, predicts, SEEDS[-1], STEPS), rounds=1)
    densities = [*(train(loss, predicts, seed, STEPS) for seed in SEEDS[:-1]), last]
    bits = FOUND[loss, predicts] = [held_out(*density) for density in densities]
    mean, error = mean_and_error([float(b.mean()) for b in bits])
    # Every digit under both losses, so that their own differences cancel.
    gain, gain_error = mean_and_error([float((base - b).mean()) for base, b in zip(FOUND[FIRST, predicts], bits)])
    row = {
        "network predicts": predicts,
        "loss": loss,
        "bits/dim": f"{mean:.4f} ± {error:.4f}",
        "less than with the first loss": f"{gain:.4f} ± {gain_error:.4f}",
        "of each seed": [round(float(b.mean()), 4) for b in bits],
    }
    if loss.startswith("density_loss"):
        assert gain > 4 * gain_error
    table("training", row)
    benchmark.extra_info.update(row)

"""A run that goes on where it stopped is of the same network: its weights, and what it answers with them."""

import json

import numpy as np
import pytest
import torch
from test_evaluate import BATCH, Net, samples

import fastscore as fs
from fastscore.runs.answers import CLOSE, alike, answers
from fastscore.runs.run_folder import RunFolder


class Scaled(Net):
    """A network with an attribute, and a layer that may be random."""

    def __init__(self, scale=1.0, dropout=0.0, **options):
        super().__init__(**options)
        self.scale, self.dropout = scale, torch.nn.Dropout(dropout)

    def forward(self, x, t):
        return self.scale * self.dropout(super().forward(x, t))


def evaluate(network, out):
    density = fs.ScoreDensity(network, fs.VP(), "eps", program=False)
    return fs.evaluate_dataset(density, samples(), out, nfe=32, seed=3, batch=BATCH, progress=False)


def interrupted(out, **options):
    with pytest.raises(KeyboardInterrupt):
        evaluate(Scaled(calls=10, **options), out)
    assert RunFolder(out).blocks()


def test_another_attribute_is_another_network(tmp_path):
    interrupted(out := tmp_path / "found.npz")
    with pytest.raises(ValueError, match=r"of another run: network's answer is -?[.\de-]+ \.\.\. there and -?[.\de-]+"):
        evaluate(Scaled(0.5), out)
    whole = evaluate(Scaled(), tmp_path / "whole.npz")
    assert torch.equal(evaluate(Scaled(), out).log_prob, whole.log_prob)
    assert out.read_bytes() == (tmp_path / "whole.npz").read_bytes()


def test_rounding_is_not_another_network(tmp_path):
    interrupted(out := tmp_path / "found.npz")
    manifest = RunFolder(out).folder / "manifest.json"
    stored = json.loads(manifest.read_text())
    numbers = stored["network's answer"]["numbers"]
    largest = max(map(abs, numbers))
    stored["network's answer"]["numbers"] = [value + 0.5 * CLOSE * largest for value in numbers]
    # Blocks carry a digest of their manifest; those of the other one are evaluated anew.
    manifest.write_text(json.dumps(stored, indent=1))
    assert np.isfinite(evaluate(Scaled(), out).log_prob).all()
    assert not alike(stored["network's answer"], {"numbers": [1.1 * v for v in numbers], "close": CLOSE})


def test_a_random_network_has_no_answer_to_compare(tmp_path):
    torch.manual_seed(0)  # one seed in 64 drops the same of six numbers twice
    density = fs.ScoreDensity(Scaled(dropout=0.5).train(), fs.VP(), "eps")
    state = torch.get_rng_state()
    assert answers(density, samples(1), {}, None) is None
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.warns(UserWarning, match="train mode"):
        interrupted(out := tmp_path / "found.npz", dropout=0.5)
    with pytest.warns(UserWarning, match="train mode"):
        evaluate(Scaled(dropout=0.5), out)
    assert out.exists()

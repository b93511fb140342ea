"""The code of docs/training.md runs as it stands, and what it computes is right."""

import re
from pathlib import Path

import pytest
import real_networks as nets
import torch
from analytic import ExactNet, mixture
from torch import nn

import fastscore as fs

PAGE = Path(__file__).parent.parent / "docs" / "training.md"


def test_the_code_of_the_page_runs(capsys):
    for package in ("torchmetrics", "lightning", "accelerate"):
        pytest.importorskip(package)
    loop, metric, callback, accelerate, tokens, gan = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(loop.splitlines()) <= 13  # ten lines of loop after the imports
    torch.manual_seed(0)
    target, schedule = mixture(2), fs.Cosine()
    names = {
        "model": ExactNet(target, schedule, "v", gain=0.9),
        "data": target.sample(2000, seed=1).float(),
        "test_data": target.sample(200, seed=2).float(),
        "steps": 20,
    }
    before = names["model"].gain.item()
    exec(loop, names)
    assert names["model"].gain.item() > before + 0.02  # 20 of Adam's steps of 0.002 towards 1
    exec(metric, names)
    whole = names["density"].estimate(names["test_data"], nfe=32).bits_per_dim(256, -1, 1)
    assert float(names["found"]["bits_per_dim"]) == pytest.approx(float(whole.mean()), rel=1e-5)
    exec(callback, names)
    assert names["callback"] in names["trainer"].callbacks
    exec(accelerate, names)
    assert "bits_per_dim_estimate_stderr" in capsys.readouterr().out
    names |= {
        "head": nets.MARHead(),
        "tokens": torch.randn(3, 4, 5),
        "z": torch.randn(3, 4, 7, requires_grad=True),
        "masked": torch.rand(3, 4) < 0.5,
    }
    exec(tokens, names)
    assert names["log_p"].shape == (3, 4)
    # Only the tokens that the mask chose have a gradient.
    assert torch.equal(names["z"].grad.abs().sum(2) > 0, names["masked"])
    assert "13% of the multiplications" in capsys.readouterr().out
    names |= {"generator": nn.Linear(2, 2), "gan_loss": lambda fake: fake.mean(), "step": 0}
    exec(gan, names)
    assert float(names["generator"].weight.grad.abs().max()) > 0

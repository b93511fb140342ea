"""The demonstration: its exact density, its plain estimator, and a short run from end to end."""

import dataclasses
import json

import pytest
import torch
from analytic import ExactNet, mixture

import fastscore as fs
from fastscore import demo
from fastscore.demo.comparison import plain_monte_carlo
from fastscore.demo.problems import digits, moons_log_prob, two_moons
from fastscore.demo.training import train


def test_the_density_of_two_moons_is_a_density():
    side_x, side_y = (torch.arange(lo, hi, 0.025, dtype=torch.float64) for lo, hi in ((-1.8, 2.8), (-1.3, 1.8)))
    mass = moons_log_prob(torch.cartesian_prod(side_x, side_y)).exp().sum() * 0.025**2
    # Cells of a quarter of the blur: the sum is exact to rounding, and 8 blurs leave out 1e-15.
    assert float(mass) == pytest.approx(1, abs=1e-9)
    # And it is scikit-learn's: the mean log-density of samples exceeds that under any shifted copy.
    x = two_moons(0).test
    assert float(moons_log_prob(x).mean()) > float(moons_log_prob(x + 0.02).mean()) > -1.2


def test_plain_monte_carlo_is_the_same_formula():
    target, schedule = mixture(2), fs.LogSNR()
    density, x = fs.ScoreDensity(ExactNet(target, schedule), schedule, "eps"), target.sample(200)
    runs = torch.stack([plain_monte_carlo(density, x, 64, seed) for seed in range(30)])
    error = runs.mean(0) - target.log_prob(x)
    spread = runs.std(0) / 30**0.5
    assert float((error.abs() < 4 * spread).double().mean()) >= 0.98


def test_digits_keep_training_and_held_out_images_apart():
    problem = digits(0)
    back = ((problem.test - problem.levels.low) / problem.levels.width).floor()
    seen = ((problem.train(0) - problem.levels.low) / problem.levels.width).floor()
    assert float(back.min()) == 0
    assert float(back.max()) == 16
    assert int((torch.cdist(back, seen).amin(1) == 0).sum()) == 0
    assert not torch.equal(problem.train(0), problem.train(1))  # dequantized anew


def test_training_raises_the_density():
    problem = dataclasses.replace(two_moons(0), steps=60, batch=128)
    torch.manual_seed(0)
    density = fs.ScoreDensity(problem.network(), problem.schedule, problem.predicts)
    before = density.estimate(problem.test[:200], nfe=64).mean()
    train(density, problem.batches(0), problem.steps)
    after = density.estimate(problem.test[:200], nfe=64).mean()
    assert after[0] > before[0] + 4 * (before[1] + after[1])


def test_a_short_run_from_end_to_end(monkeypatch, tmp_path, capsys):
    def shrink(problem):
        few = problem.train(0)[:300]
        return dataclasses.replace(problem, steps=20, batch=64, test=problem.test[:30], train=lambda epoch: few)

    for make in (two_moons, digits):
        monkeypatch.setattr(demo, make.__name__, lambda seed, make=make: shrink(make(seed)))
    monkeypatch.setattr("fastscore.demo.picture.GRID", 12)
    demo.run_demo(str(tmp_path / "out"))
    assert (tmp_path / "out" / "demo.png").read_bytes()[:4] == b"\x89PNG"
    numbers = json.loads((tmp_path / "out" / "demo.json").read_text())
    fitted, plain, _ = numbers["two moons"]
    assert fitted["error"] < plain["error"]
    assert f"{fitted['log_prob']:.3f} +- {fitted['log_prob_error']:.3f}" in capsys.readouterr().out
    fitted, plain, ode = numbers["digits"]
    # The two estimates of one integral agree within the noise of the worse one, whose error 30 samples share.
    assert abs(fitted["log_prob"] - plain["log_prob"]) < 4 * plain["error"] / 30**0.5
    assert ode["passes"] > 9

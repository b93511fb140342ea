"""The scripts of examples/ run in small, and what they print is right: by closed forms, and by the formula itself."""

import importlib
import math
import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
NAMES = ["anomalies", "diffusers_unet", "flow_matching_model", "lightning_training", "ppo_step", "sbi_posterior"]
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """sbi writes a log of its training into the current folder."""
    monkeypatch.chdir(tmp_path)


def load(name, *packages):
    """Return an example as a module, where the packages that it needs are there."""
    for package in ("matplotlib", *packages):
        pytest.importorskip(package)
    return importlib.import_module(name)


def run(example, folder, capsys):
    """Run an example in small; return what it found and what it printed."""
    out = folder / "picture.png"
    found = example.main(["--small", "--out", str(out)])
    assert out.read_bytes().startswith(b"\x89PNG")
    return found, capsys.readouterr().out


def mean_log_prob(eps_hat, log_snr, x, seed=0, each=8):
    """Return the mean of log p over x by the formula as it stands, and its standard error.

    The reference is N(0, 1), of which eps_q = sigma x_t; the integral is a trapezoid sum over all log-SNRs, with
    `each` samples at every one of them.
    """
    generator = torch.Generator().manual_seed(seed)
    order = log_snr.argsort()
    log_snr, number = log_snr[order].double(), order.repeat_interleave(each)
    step = torch.cat([log_snr.diff(), torch.zeros(1)]) / 2
    weight = step + step.roll(1)
    rows = x[torch.randint(len(x), (len(number),), generator=generator)]
    eps = torch.randn(rows.shape, generator=generator)
    alpha, sigma = (
        sign.sigmoid().sqrt().float().repeat_interleave(each).reshape(-1, *[1] * (x.ndim - 1))
        for sign in (log_snr, -log_snr)
    )
    x_t = alpha * rows + sigma * eps
    with torch.no_grad():
        f = (eps - eps_hat(x_t, number, alpha, sigma)).square() - (eps - sigma * x_t).square()
    f = f.flatten(1).sum(1).double().reshape(-1, each)
    log_q = torch.distributions.Normal(0.0, 1.0).log_prob(x).flatten(1).sum(1).double().mean()
    error = 0.5 * (weight.square() * f.var(1) / each).sum().sqrt()
    return float(log_q - 0.5 * (weight * f.mean(1)).sum()), float(error)


def in_bits(log_prob, error, levels, d):
    return -(log_prob / d + math.log((levels.high - levels.low) / levels.bins)) / math.log(2), error / d / math.log(2)


def test_every_example_is_listed_and_stays_short():
    scripts = {path.stem for path in (ROOT / "examples").glob("*.py")}
    listed = re.findall(r"^\| \[(\w+)\.py\]\(\1\.py\)", (ROOT / "examples" / "README.md").read_text(), re.MULTILINE)
    assert sorted(scripts - {"ten_lines"}) == sorted(listed) == NAMES  # the README's own, which test_readme runs
    for name in NAMES:
        assert len((ROOT / "examples" / f"{name}.py").read_text().splitlines()) < 150


def test_bits_of_the_diffusers_unet_are_those_of_the_formula(tmp_path, monkeypatch, capsys):
    example = load("diffusers_unet", "diffusers", "sklearn")
    seen, adapt = [], example.from_diffusers

    def keep(*pair):
        seen.extend(pair)
        return adapt(*pair)

    monkeypatch.setattr(example, "from_diffusers", keep)
    found, printed = run(example, tmp_path, capsys)
    unet, scheduler = seen
    x = example.LEVELS.dequantize(example.digits(0)[1][:40], seed=0)
    bar = scheduler.alphas_cumprod.double()

    def eps_hat(x_t, t, alpha, sigma):
        parts = zip(x_t.split(1000), t.split(1000))
        return alpha * torch.cat([unet(rows, times).sample for rows, times in parts]) + sigma * x_t

    by_formula = in_bits(*mean_log_prob(eps_hat, (bar / (1 - bar)).log(), x, each=4), example.LEVELS, 64)
    own_error = math.hypot(by_formula[1], found["estimate_stderr"])
    assert abs(found["bits_per_dim"] - by_formula[0]) < 4 * own_error
    assert own_error < 0.05
    # The same nats in bits: float32 has seven digits of them.
    same = adapt(unet, scheduler).estimate(x, nfe=64, control="self").log_prob
    assert found["bits_per_dim"] == pytest.approx(
        in_bits(float(same.double().mean()), 0, example.LEVELS, 64)[0], rel=1e-5
    )
    # Anything learned is below a guess.
    assert found["bits_per_dim"] < math.log2(17) - 4 * found["stderr"]
    assert f"{found['bits_per_dim']:.3f} +- {found['stderr']:.3f}" in printed


def test_the_posterior_of_sbi_is_near_the_truth_and_not_above_it(tmp_path, capsys):
    example = load("sbi_posterior", "sbi")
    found, printed = run(example, tmp_path, capsys)
    # Over samples of the truth the mean of log q - log p is minus a Kullback-Leibler divergence, and of a bound of
    # log q less. Twenty epochs leave 0.3 nats here; the prior in the posterior's place would be 3.6 nats below it.
    assert -1.0 < found["bias"] < 4 * found["bias_stderr"]
    assert found["stderr"] < 0.1
    assert found["rms"] < 1.0
    assert f"{found['rms']:.3f} (root mean square)" in printed
    # The closed form by Bayes' rule: log p(theta | x) - log p(theta) - log p(x | theta) is the same for all theta.
    theta, x = torch.randn(20, 3, generator=torch.Generator().manual_seed(1)), torch.tensor([0.3, -1.0, 0.5, 0.2])
    likelihood = torch.distributions.Normal(theta @ example.A.T, example.NOISE).log_prob(x).sum(1)
    constant = example.true_posterior(x).log_prob(theta) - example.PRIOR.log_prob(theta) - likelihood
    assert float(constant.std()) < 1e-4  # rounding of float32 at values up to 60


class ExactVelocity(torch.nn.Module):
    """E[x_1 - x_0 | x_t] of the moons: a mixture of Gaussians at every time."""

    def __init__(self, target):
        super().__init__()
        self.centres = target.component_distribution.base_dist.loc.double()

    def forward(self, x_t, t):
        alpha = t.double().clamp(1e-7, 1 - 1e-9)[:, None]
        away = x_t.double()[:, None] - alpha[:, None] * self.centres
        variance = (0.1 * alpha).square() + (1 - alpha).square()
        share = (-away.square().sum(2) / (2 * variance)).softmax(1)
        eps = (1 - alpha) * (share[:, :, None] * away).sum(1) / variance
        return (x_t - (1 - alpha) * eps) / alpha - eps


@pytest.mark.filterwarnings("ignore:on these data the network's log-density")  # which is so, after 300 steps
def test_the_flow_is_below_the_truth_and_its_bound_at_the_clean_end(tmp_path, monkeypatch, capsys):
    example = load("flow_matching_model", "flow_matching")
    kept, train = [], example.train

    def keep(*given):
        kept.append(train(*given))
        return kept[0]

    monkeypatch.setattr(example, "train", keep)
    found, printed = run(example, tmp_path, capsys)
    # -KL again: 300 steps leave 0.3 nats by the ODE, and the bound of the same network is lower.
    assert -1.5 < found["off"] < 4 * found["off_stderr"]
    assert -3.0 < found["gap"] < 4 * found["gap_stderr"]
    assert f"minus ODE   {found['gap']:+.3f}" in printed

    target = example.moons()
    torch.manual_seed(1)
    x = target.sample((200,)).double()
    exact = example.from_flow_matching(ExactVelocity(target), program=False).estimate(x, nfe=512)
    assert bool(((exact.log_prob - target.log_prob(x)).abs() < 4 * exact.stderr + exact.truncation).all())
    # Unfitted, both are asked at the same log-SNRs: what the network loses, by where it loses it.
    learned = example.from_flow_matching(kept[0].double(), program=False).estimate(x, nfe=512)
    lost, where = exact.log_snr_curve.mean - learned.log_snr_curve.mean, exact.log_snr_curve.log_snr
    assert float(lost[where > 2].sum()) > 0.8 * float(lost.sum()) > 0


def test_anomalies_are_ranked_as_the_page_says(tmp_path, capsys):
    example = load("anomalies", "sklearn", "PIL")
    found, printed = run(example, tmp_path, capsys)
    # Noise of 10 levels is wider than the differences of most neighbouring pixels; blur is more probable than what
    # belongs, and found by the ratio; and patches that are turned over are as probable as others.
    noise, blurred, turned = (found[name] for name in ("noise", "blurred", "upside down"))
    assert noise[0] - 2 * noise[1] > 0.55
    assert blurred[0] + 4 * blurred[1] < 0.5 < 0.6 < blurred[2] - 2 * blurred[3]
    assert abs(turned[0] - 0.5) < 4 * turned[1]
    assert f"AUROC {noise[0]:.3f} +- {noise[1]:.3f}, by the ratio {noise[2]:.3f} +- {noise[3]:.3f}" in printed
    # Two normals a standard deviation apart: Phi(1 / sqrt 2) = 0.7602, and by Hanley and McNeil (1982) for n = 300 each
    # an error of 0.0195, from Q1 = A / (2 - A) and Q2 = 2 A^2 / (1 + A) for exponentials; those of normals are close.
    known, foreign = torch.randn(2, 300, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    area, error = example.auroc(known, foreign + 1, seed=0)
    assert abs(area - 0.7602) < 4 * 0.0195
    assert error == pytest.approx(0.0195, rel=0.25)


def test_anomalies_repeat_by_their_seed_alone(tmp_path, capsys):
    example = load("anomalies", "sklearn", "PIL")
    torch.manual_seed(1)
    first = run(example, tmp_path, capsys)
    torch.manual_seed(2)
    assert run(example, tmp_path, capsys) == first


def test_ppo_begins_at_ratio_one_and_earns_more(tmp_path, capsys):
    example = load("ppo_step")
    history, printed = run(example, tmp_path, capsys)
    assert max(each["first_ratio_off"] for each in history) < 1e-5  # rounding of a log-density of ten nats
    assert min(each["last_ratio_std"] for each in history) > 0.01
    # The cloned policy is N(0, 0.7^2) in the plane: with h = 0.1 and s = h + 0.49, E exp(-|a - goal|^2 / 2h) is
    # h / s exp(-1 / 2s) = 0.0726. Cloning for 200 steps leaves a few hundredths.
    first, last = history[0], history[-1]
    assert abs(first["reward"] - 0.0726) < 4 * first["stderr"]
    assert last["reward"] - first["reward"] > 4 * math.hypot(first["stderr"], last["stderr"])
    assert last["reward"] > 0.3
    assert f"reward {last['reward']:.3f} +- {last['stderr']:.3f}" in printed


def test_what_lightning_logs_is_the_formula_of_the_trained_network(tmp_path, monkeypatch, capsys):
    example = load("lightning_training", "lightning", "torchmetrics", "sklearn")
    kept, metric = [], example.BitsPerDim

    def keep(density, *levels, **options):
        kept.append(density)
        return metric(density, *levels, **options)

    monkeypatch.setattr(example, "BitsPerDim", keep)
    found, printed = run(example, tmp_path, capsys)
    (density,) = kept
    images = torch.tensor(importlib.import_module("sklearn.datasets").load_digits().images, dtype=torch.int64)
    torch.manual_seed(0)
    chosen = images.flatten(1)[torch.randperm(len(images))][:297]
    x = example.LEVELS.dequantize(chosen, seed=0)
    log_snr = torch.linspace(-8, 10, 1000, dtype=torch.float64)
    net = density.model.eval()

    def eps_hat(x_t, number, alpha, sigma):
        return alpha * net(x_t, log_snr[number].float()) + sigma * x_t

    by_formula = in_bits(*mean_log_prob(eps_hat, log_snr, x), example.LEVELS, 64)
    own_error = math.hypot(by_formula[1], found["bits_per_dim_estimate_stderr"])
    assert abs(found["bits_per_dim"] - by_formula[0]) < 4 * own_error
    assert own_error < 0.02
    assert found["bits_per_dim"] < math.log2(17) - 4 * found["bits_per_dim_stderr"]
    assert f"{found['bits_per_dim']:.3f} +- {found['bits_per_dim_stderr']:.3f}" in printed

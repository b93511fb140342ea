"""A captured density gives the numbers of `estimate`, for new data, new noise and new parameters."""

import pytest
import torch
from analytic import ExactNet, mixture
from test_backends import Net

import fastscore as fs
from fastscore.estimator.network_density import prepare

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("fitted", [False, True])
def test_captured_numbers_are_the_estimates(fitted):
    target = mixture(5)
    density = fs.ScoreDensity(Net(5).eval(), fs.DDPM.linear(1000), "eps").to(DEVICE)
    if fitted:
        density.fit(target.sample(2000, seed=2).float().to(DEVICE), progress=False)
    first, second = (target.sample(20, seed=seed).float().to(DEVICE) for seed in (3, 4))
    captured = fs.CapturedDensity(density, first, nfe=32)
    kept = None
    for x, seed in ((first, 0), (second, 0), (second, 9), (first, 0)):
        log_prob, stderr = captured(x, seed)
        expected = density.estimate(x, nfe=32, seed=seed)
        # The same sums in float64 over the same float32 rows.
        assert torch.allclose(log_prob, expected.log_prob, rtol=1e-5, atol=1e-4)
        assert torch.allclose(stderr, expected.stderr, rtol=1e-4)
        kept = log_prob if kept is None else kept
    assert torch.equal(kept, log_prob)  # results are the caller's own, and the same seed gives the same answer


def test_new_parameters_count():
    density = fs.ScoreDensity(Net(5).eval(), fs.DDPM.linear(1000), "eps").to(DEVICE)
    x = mixture(5).sample(6).float().to(DEVICE)
    captured = fs.CapturedDensity(density, x, nfe=32)
    before = captured(x)[0]
    with torch.no_grad():
        for p in density.model.parameters():
            p.mul_(1.1)
    after = captured(x)[0]
    assert torch.allclose(after, density.estimate(x, nfe=32).log_prob, rtol=1e-5, atol=1e-4)
    assert float((after - before).abs().min()) > 1e-3


def test_general_networks_in_chunks():
    target, schedule = mixture(2), fs.LogSNR(-8, 6)
    density = fs.ScoreDensity(ExactNet(target, schedule), schedule, "eps")
    x = target.sample(9).float()
    captured = fs.CapturedDensity(density, x, nfe=64, memory="60KB")
    assert prepare(density, x, 64, 0, None, "60KB", {})[1].chunks.rows < 9 * 64
    assert torch.allclose(captured(x)[0], density.estimate(x, nfe=64).log_prob, rtol=1e-5, atol=1e-4)


def test_another_shape_and_nan_are_errors():
    density = fs.ScoreDensity(Net(5).eval(), fs.DDPM.linear(1000), "eps").to(DEVICE)
    captured = fs.CapturedDensity(density, torch.zeros(4, 5, device=DEVICE), nfe=32)
    with pytest.raises(ValueError, match=r"takes x of shape \(4, 5\), got \(3, 5\); capture another"):
        captured(torch.zeros(3, 5, device=DEVICE))
    with torch.no_grad():
        density.model.out.bias.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"NaN or inf for sample 0 at log-SNR"):
        captured(torch.zeros(4, 5, device=DEVICE))


def test_data_of_other_dtypes():
    density = fs.ScoreDensity(Net(5).eval(), fs.DDPM.linear(1000), "eps").to(DEVICE)
    x = mixture(5).sample(4).float().to(DEVICE)
    captured = fs.CapturedDensity(density, x, nfe=32)
    assert captured(x.half())[0].dtype == torch.float32
    with pytest.raises(ValueError, match=r"floating point tensor, got torch\.int64"):
        captured(x.long())
    with pytest.raises(TypeError, match="must be a ScoreDensity, a Transformed one or a ZeroMeanDensity, got Net"):
        fs.CapturedDensity(density.model, x)

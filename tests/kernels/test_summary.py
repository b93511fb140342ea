"""The kernel that sums up the draws of samples, against the torch code that defines what it computes."""

import math

import pytest
import torch
from mixtures import Mixture

import fastscore as fs
from fastscore.estimator.methods import DENSITY
from fastscore.estimator.network_density import prepare
from fastscore.estimator.round import Round
from fastscore.estimator.summary import Summary, with_rounding
from fastscore.ops.interpreting import interpreting

DEVICE = "cpu" if interpreting() else "cuda"
D = 5
REFERENCES = {
    "isotropic": lambda: fs.Reference.isotropic(1.3),
    "diagonal": lambda: fs.Reference(torch.ones(1), torch.randn(1, D), torch.rand(1, D) + 0.5),
    "mixture": lambda: fs.Reference(torch.ones(2) / 2, torch.randn(2, D), torch.rand(2, D) + 0.5),
}
# Made up: at 16, 64 and 256 evaluations typical log v, rho, tau, and both ends of the ramp.
MEASURED = torch.tensor(
    [[4.0, 6, 8], [-1.0, -2, -3], [-0.5, -0.6, -0.7], [-0.1, -0.1, -0.2], [0.1] * 3, [1.0] * 3], dtype=torch.float64
)


class Shrinks(torch.nn.Module):
    def forward(self, x_t, t):
        return 0.3 * x_t + t.reshape(-1, *[1] * (x_t.ndim - 1))


def parts_of(reference, batch, memory, schedule=None):
    torch.manual_seed(0)
    schedule = schedule or fs.VP()
    density = fs.ScoreDensity(
        Shrinks(), schedule, "eps", backend="torch", program=False, reference=REFERENCES[reference]()
    )
    x = torch.randn(batch, D).to(DEVICE)
    samples, plan, programs = prepare(density, x, 21, 0, None, memory, {})
    with torch.no_grad():
        return density, samples, plan, list(plan.run(samples, programs, density.reference))


@pytest.mark.parametrize("measured", [False, True], ids=["", "calibrated"])
@pytest.mark.parametrize("reference", REFERENCES)
@pytest.mark.parametrize(
    ("batch", "memory"),
    [(1, None), *(pytest.param(b, None, marks=pytest.mark.long) for b in (7, 70)), (130, None), (70, 20_000)],
)
def test_a_round_is_the_same_by_kernel_and_by_torch(batch, memory, reference, measured):
    # Of a table whose entries are drawn once, twice or not at all, with weights of their own; or of none.
    density, samples, plan, parts = parts_of(reference, batch, memory, fs.DDPM.linear(20) if measured else None)
    assert (len(parts) > 1) == (memory is not None)
    assert (parts[0].stack is None) == (memory is not None or batch <= 64)
    calibration = MEASURED if measured else density.nodes.calibration
    q, nfe = density.reference, plan.draws.rules.nfe
    says = Summary(DENSITY, q, density.schedule, density.nodes, calibration, nfe, "triton")
    rounds = [Round.empty(batch, len(plan.draws), nfe, samples.device) for _ in range(2)]
    for part in parts:
        for found, put in zip(rounds, (says._by_kernel, says._by_torch)):
            if found.curve_sum.count == 0:
                # What is not written shows; the rule's error, two of twenty, is of tables alone.
                found.block[: (20 if measured else 18) * batch] = math.nan
            put(part, samples, found)
    by_kernel, by_torch = rounds
    # Sums in float64 in another order.
    torch.testing.assert_close(by_kernel.block, by_torch.block, rtol=1e-12, atol=1e-12)
    assert by_kernel.curve_sum.count == by_torch.curve_sum.count == batch
    assert torch.equal(by_kernel.nfe, by_torch.nfe)
    variance = with_rounding(by_torch.variance, by_torch.value, samples, density.log_snr_range)
    told, plain = by_kernel.numbers
    torch.testing.assert_close(told, torch.stack([by_torch.value, variance[0].sqrt()]).float())
    torch.testing.assert_close(plain, variance[1], rtol=1e-6, atol=0)  # the rounding's numbers are float32


def test_a_sample_that_is_not_finite_stays_so_and_harms_no_other():
    density, samples, plan, parts = parts_of("isotropic", 70, None)
    (part,) = parts
    part.f[3, 2] = math.nan
    says = Summary(DENSITY, density.reference, density.schedule, density.nodes, density.nodes.calibration, 21, "triton")
    found = Round.empty(70, len(plan.draws), 21, samples.device)
    says._by_kernel(part, samples, found)
    bad = torch.isnan(found.value)
    assert bad.nonzero().flatten().tolist() == [int(part.samples[3])]
    assert torch.isnan(found.variance[0]).equal(bad)
    assert bool(torch.isnan(found.curve_sum.total[2]))


def test_an_estimate_by_kernel_is_that_by_torch(monkeypatch):
    target = Mixture(torch.tensor([[0.5, -1.0, 0.0]]), torch.tensor([[0.7]]))
    x = target.sample(3, torch.Generator().manual_seed(1)).float().to(DEVICE)
    density = fs.ScoreDensity(Shrinks(), fs.VP(), "eps", backend="triton", program=False)
    found = density.estimate(x, nfe=8, progress=False)
    calls = []
    monkeypatch.setattr(Summary, "_by_kernel", lambda *given: calls.append(1) or Summary._by_torch(*given))
    by_torch = density.estimate(x, nfe=8, progress=False)
    assert calls
    for name in ("log_prob", "stderr", "variance", "jump", "nfe", "truncation_per_sample"):
        torch.testing.assert_close(getattr(found, name), getattr(by_torch, name), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(found.log_snr_curve.mean, by_torch.log_snr_curve.mean, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[::2],
        lambda x: x[:, ::2],
        lambda x: x.T,
        lambda x: x[:1].expand(5, -1),
        lambda x: x[:4].unfold(0, 2, 1),
    ],
    ids=["every other sample", "every other column", "transposed", "one sample repeated", "overlapping windows"],
)
def test_data_may_lie_in_memory_as_they_like(view):
    x = view(torch.randn(6, 5).to(DEVICE))
    density = fs.ScoreDensity(Shrinks(), fs.VP(), "eps", backend="triton", program=False)
    found, packed = (density.estimate(each, nfe=8, progress=False) for each in (x, x.contiguous()))
    assert torch.equal(found.log_prob, packed.log_prob)
    assert torch.equal(found.stderr, packed.stderr)

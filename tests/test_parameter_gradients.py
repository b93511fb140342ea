"""Gradients of `log_prob` in a network's parameters, by Triton's kernel and by PyTorch, from end to end."""

import pytest
import torch
from torch import nn

import fastscore as fs
from fastscore.estimator import rows
from fastscore.ops import choice
from fastscore.ops.interpreting import interpreting

pytest.importorskip("triton")
from fastscore.kernels import density_mlp_dp

DEVICE = torch.device("cpu" if interpreting() else "cuda")


class Net(nn.Module):
    """Residual blocks with norms, modulated by time, by a sample's label, and by both."""

    def __init__(self, d, width=20):
        super().__init__()
        torch.manual_seed(0)
        self.time = nn.Sequential(nn.Linear(1, width), nn.SiLU(), nn.Linear(width, 3 * width))
        self.label, self.both = nn.Linear(3, width), nn.Linear(width, width)
        self.inside, self.hidden, self.out = nn.Linear(d, width), nn.Linear(width, width), nn.Linear(width, d)

    def forward(self, x_t, t, label=None):
        scale, shift, gate = self.time(t[:, None].to(x_t) / 1000).chunk(3, 1)
        h = self.inside(x_t)
        if label is not None:
            own = self.label(label)
            h = h + own + 0.1 * self.both(torch.tanh(own + scale))
        y = nn.functional.layer_norm(h, h.shape[-1:]) * (1 + scale) + shift
        return self.out(h + gate * self.hidden(nn.functional.silu(y)))


@pytest.fixture
def launches(monkeypatch):
    """The rows of every launch of the kernel."""
    found, host = [], density_mlp_dp.density_mlp_dp
    monkeypatch.setattr(density_mlp_dp, "density_mlp_dp", lambda grad, *a: found.append(grad.numel()) or host(grad, *a))
    return found


def gradients(backend, dtype=torch.float32, of_x=True, memory=None, label=True, frozen=(), **options):
    """Return log_prob, and the gradients of its sum in x and every parameter, for samples of two groups."""
    model = Net(5).eval().to(DEVICE, dtype)
    for name in frozen:
        getattr(model, name).requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 5, generator=generator).to(DEVICE).requires_grad_(of_x)
    cond = {"label": torch.randn(3, 3, generator=generator).to(DEVICE, dtype)} if label else {}
    density = fs.ScoreDensity(model, fs.DDPM.linear(1000), "eps", backend=backend, program=True, **options)
    index = torch.tensor([0, 64, 65])
    found = density.log_prob(x, nfe=8, sample_index=index, memory=memory, **cond)
    found.sum().backward()
    return [found.detach(), x.grad, *(p.grad for p in model.parameters())]


def agree(found, expected, tolerance):
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            scale = float(other.abs().max())
            torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize("label", [True, False])
@pytest.mark.parametrize("of_x", [True, False])
def test_the_kernel_gives_what_pytorch_gives(of_x, label, launches):
    expected = gradients("torch", of_x=of_x, label=label)
    assert not launches
    found = gradients("triton", of_x=of_x, label=label)
    assert sorted(launches) == [8, 16]  # one launch a group of samples, of all its rows
    agree(found, expected, 1e-4)  # sums of 24 rows' gradients in float32


@pytest.mark.parametrize("reference", [fs.Reference.isotropic(1.3), None], ids=["isotropic", "mixture"])
def test_references(reference, launches):
    if reference is None:
        mean, variance = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(2))
        reference = fs.Reference(torch.ones(3) / 3, mean, variance.exp())
    options = {"reference": reference, "of_x": reference.components == 1}
    agree(gradients("triton", **options), gradients("torch", **options), 1e-4)
    assert launches
    launches.clear()
    gradients("triton", **options | {"of_x": True})
    assert bool(launches) == (reference.components == 1)  # PyTorch stands in, and says so to `explain`


def test_chunks_of_any_size_give_the_same_numbers_within_the_budget(launches):
    whole = gradients("triton")
    launches.clear()
    memory = 30_000
    agree(gradients("triton", memory=memory), whole, 1e-5)  # other sums of 24 rows
    # A and G of three layers alone, of 16 and 32 columns in float32.
    assert 4 * max(launches) * 2 * (16 + 3 * 32 + 32) < memory
    assert sum(launches) == 24
    assert len(launches) > 4


@pytest.mark.parametrize("frozen", [(), ("inside", "hidden", "out")], ids=["all", "tables alone"])
@pytest.mark.parametrize("capability", [(9, 0), (8, 0)])
def test_the_automatic_choice_stays_with_pytorch_until_a_gpu_has_measured_the_kernel(
    capability, frozen, launches, monkeypatch
):
    monkeypatch.setattr(choice, "_capability", lambda device: capability)
    monkeypatch.setattr(rows, "runnable", lambda *a: ("triton", "torch"))
    found = gradients("auto", frozen=frozen)
    assert not launches
    agree(found, gradients("torch", frozen=frozen), 1e-4)


def test_half_precision(launches):
    found, expected = gradients("triton", torch.bfloat16), gradients("torch", torch.bfloat16)
    assert launches
    for one, other in zip(found[1:], expected[1:], strict=True):
        if other is not None:
            # Both round to 2^-9 at every operand, PyTorch at every operation; of the root of the sum of squares.
            assert float((one - other).float().norm() / other.float().norm()) < 0.05

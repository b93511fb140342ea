"""The pretended device behaves as a GPU does, and finds the faults that the first run on a real one found."""

import pytest
import torch
from pretended_device import CPU, CUDA, PretendedDevice
from torch import nn

import fastscore as fs
from fastscore.estimator import integrand, pilot
from fastscore.ops import noise
from fastscore.ops.select import select
from fastscore.reference.gaussians import Reference
from fastscore.support.buffers import FittedBuffers


@pytest.fixture
def device():
    with PretendedDevice() as pretended:
        yield pretended


def here(*shape):
    return torch.ones(shape, device="cuda")


def test_tensors_are_where_they_are_put(device):
    host = torch.ones(3)
    for made in (
        host.cuda(), host.to("cuda"), host.to(CUDA, torch.float64), host.to(here(1)), torch.arange(3, device=CUDA),
        torch.tensor([1.0], device="cuda:0"), torch.as_tensor([1.0], device=CUDA), torch.randn(2, device="cuda"),
        here(3)[1:], here(3).view(3, 1), here(3).double(), here(3).new_zeros(2), here(3).new_tensor([1.0]),
        torch.zeros_like(here(3)), here(3) + 1, here(3) * torch.tensor(2.0), here(3).detach(), here(3).sum(),
        here(3)[torch.tensor([0, 2])], nn.functional.one_hot(torch.arange(3, device=CUDA), 4), here(3).quantile(0.5),
    ):  # fmt: skip
        assert made.device == CUDA
        assert made.is_cuda
    for made in (host, here(3).cpu(), here(3).to("cpu"), torch.zeros_like(here(3), device="cpu"), host.copy_(here(3))):
        assert made.device == CPU
        assert not made.is_cuda
        assert isinstance(made.numpy().sum(), object)
    assert torch.equal(here(3).cpu(), host)


def test_modules_and_gradients_go_along(device):
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).to("cuda")
    assert {t.device for t in (*net.parameters(), *net.buffers())} == {CUDA}
    leaf = torch.ones(2, 3, requires_grad=True)
    net(leaf.cuda()).square().sum().backward()
    assert leaf.grad.device == CPU
    assert {p.grad.device for p in net.parameters()} == {CUDA}
    torch.optim.AdamW(net.parameters()).step()
    assert {p.device for p in net.cpu().parameters()} == {CPU}


@pytest.mark.parametrize(
    "mix",
    [
        lambda: here(3) + torch.ones(3),
        lambda: torch.ones(2, 3) @ here(3),
        lambda: torch.cat([here(3), torch.ones(3)]),
        lambda: torch.stack([here(), torch.ones(())]),
        lambda: torch.where(torch.ones(3, dtype=torch.bool), here(3), here(3)),
        lambda: here(3).add_(torch.ones(3)),
        lambda: torch.ones(3).gather(0, torch.zeros(1, dtype=torch.int64, device=CUDA)),
        lambda: torch.searchsorted(torch.ones(3), here(3)),
        lambda: torch.func.vmap(lambda row: row + torch.ones(3))(here(2, 3)),
    ],
)
def test_mixed_devices_are_refused(device, mix):
    with pytest.raises(RuntimeError, match=r"Expected all tensors to be on the same device.* cuda:0 and cpu"):
        mix()


def test_what_else_a_gpu_refuses(device):
    with pytest.raises(RuntimeError, match="indices should be either on cpu or on the same device"):
        torch.ones(3)[torch.zeros(1, dtype=torch.int64, device=CUDA)]
    for to_numpy in (torch.Tensor.numpy, torch.Tensor.__array__):
        with pytest.raises(TypeError, match="can't convert cuda:0 device type tensor to numpy"):
            to_numpy(here(3))
    for draw in (torch.randn, torch.rand, torch.randperm):
        with pytest.raises(RuntimeError, match="Expected a 'cuda' device type for generator but found 'cpu'"):
            draw(3, generator=torch.Generator(), device="cuda")
    with pytest.raises(RuntimeError, match="Expected a 'cuda' device type for generator"):
        here(3).normal_(generator=torch.Generator())


@pytest.mark.parametrize(
    ("call", "expected"),  # launches, to device, to host, waits
    [
        (lambda x: x + 1, (1, 0, 0, 0)),
        (lambda x: x.view(3, 1).T[0].detach(), (0, 0, 0, 0)),
        (lambda x: torch.empty(3, device=CUDA), (0, 0, 0, 0)),
        (lambda x: torch.zeros(3, device=CUDA), (1, 0, 0, 0)),
        (lambda x: x.mul_(2), (1, 0, 0, 0)),
        (lambda x: torch.ones(3).cuda(), (0, 1, 0, 0)),
        (lambda x: torch.tensor([1.0], device=CUDA), (0, 1, 0, 0)),
        (lambda x: x.cpu(), (0, 0, 1, 1)),
        (lambda x: x.tolist(), (0, 0, 1, 1)),
        (lambda x: float(x[0]), (0, 0, 0, 1)),
        (lambda x: bool(x.any()), (1, 0, 0, 1)),
        (lambda x: x[torch.tensor([0])], (1, 1, 0, 0)),
        (lambda x: x[x > 0], (2, 0, 0, 1)),
        (lambda x: x.copy_(torch.ones(3)), (1, 1, 0, 0)),
        (lambda x: x.to(CUDA), (0, 0, 0, 0)),
        (lambda x: torch.ones(3) + 1, (0, 0, 0, 0)),
    ],
)  # fmt: skip
def test_counts(device, call, expected):
    x = here(3)
    with device.counting() as counts:
        call(x)
    assert (counts.launches, counts.to_device, counts.to_host, counts.waits) == expected


def test_a_graph_replays_and_refuses_what_crosses_or_waits(device):
    x, graph = here(3), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = (x * 2).cumsum(0)
        y += 1
    x.fill_(5)
    graph.replay()
    assert y.tolist() == [11, 21, 31]
    for forbidden in (
        lambda: torch.ones(3).cuda(),
        lambda: x.cpu(),
        lambda: x.copy_(torch.ones(3)),
        lambda: float(x[0]),
    ):
        with pytest.raises(RuntimeError, match=r"during CUDA graph capture|when stream is capturing"):  # noqa: SIM117
            with torch.cuda.graph(torch.cuda.CUDAGraph()):
                forbidden()


def test_nothing_stays_when_it_ends():
    names = [(torch.Tensor, n) for n in ("device", "to", "numpy")] + [(torch, "tensor"), (torch.cuda, "mem_get_info")]
    before = [getattr(owner, name) for owner, name in names]
    with PretendedDevice():
        made = here(3)
    assert [getattr(owner, name) for owner, name in names] == before
    assert made.device == CPU


def test_no_kernels_run_there(device):
    assert select(CUDA, torch.float32) == "torch"
    for name in ("triton", "cuda"):
        with pytest.raises(ValueError, match=r"compute capability|pretended"):
            select(CUDA, torch.float32, name)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inside, self.out = nn.Linear(4, 16), nn.Linear(16, 4)

    def forward(self, x_t, t):
        return self.out(torch.tanh(self.inside(x_t) + t[:, None].float() / 1000))


def estimate():
    """README's first lines, with the network and the data on the device."""
    density = fs.ScoreDensity(Net().cuda(), fs.DDPM.linear(1000), predicts="eps", program=False)
    return density.estimate(torch.zeros(3, 4, device="cuda"), nfe=16)


def fit():
    """README's fit, after `.cuda()`."""
    density = fs.ScoreDensity(Net(), fs.DDPM.linear(1000), predicts="eps", program=False).cuda()
    data = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
    return density.fit(data.cuda(), evaluations=2000, progress=False)


def philox_of_the_host(counter, key):
    c0, c1, c2, c3 = torch.broadcast_tensors(*(torch.as_tensor(c, dtype=torch.int64) & 0xFFFFFFFF for c in counter))
    return philox((c0, c1, c2, c3), key)


def sample_keys_with_a_constant_of_the_host(kind, seed, sample_index, d, round_=0):
    streams = range(noise.STREAM_SHIFT, noise.STREAM_MULTIPLIER + 1)
    odd = torch.tensor([[0], [1]], dtype=torch.int32)
    return noise.words(seed, sample_index, round_, streams, d) | odd


def candidates_with_one_on_the_host(train, held_out, kind, data_std, *others):
    return [*candidates(train, held_out, kind, data_std, *others)[:-1], Reference.isotropic(data_std)]


philox, candidates = noise.philox, pilot.candidates
FAULTS = {
    "1: philox makes its counters on the host": (estimate, noise, "philox", philox_of_the_host),
    "2: sample_keys has a constant without device=": (
        estimate, integrand.noise, "sample_keys", sample_keys_with_a_constant_of_the_host,
    ),
    "3: the density of a network on the device stays on the host": (estimate, FittedBuffers, "on", lambda q, _: q),
    "4: the isotropic candidate stays on the host": (fit, pilot, "candidates", candidates_with_one_on_the_host),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_the_first_run_on_a_gpu_are_caught_when_they_are_put_back(device, fault, monkeypatch):
    call, owner, name, broken = FAULTS[fault]
    call()
    monkeypatch.setattr(owner, name, broken)
    # A ValueError where the fault shows while the network's memory is measured.
    with pytest.raises((RuntimeError, ValueError), match="Expected all tensors to be on the same device") as caught:
        call()
    print(f"\n{fault}: {caught.value}")


class NaNAbove(nn.Module):
    """A network that fails at low noise, for samples far out alone."""

    def forward(self, x_t, t):
        bad = (t > 0.5) & (x_t[:, 0].abs() > 50)
        return torch.where(bad[:, None], torch.nan, x_t)


def test_nan_is_told_when_a_number_is_read_and_nothing_waits_before(device, monkeypatch):
    density, x = fs.ScoreDensity(NaNAbove(), fs.LogSNR(-8, 8), "eps"), torch.zeros(3, 4, device="cuda")
    density.estimate(x, nfe=16)
    x = x.clone()
    x[1] = 100.0
    with device.counting() as counts:
        found = density.estimate(x, nfe=16)
    assert (counts.waits, counts.to_host) == (0, 0)
    for read in (lambda: found.mean(), lambda: repr(found), lambda: found.log_snr_curve, lambda: found.truncation):
        with pytest.raises(ValueError, match=r"NaN or inf for sample 1 at log-SNR (0\.[5-9]|1\.)"):
            read()
    assert density.log_prob(x, nfe=16).isnan().cpu().tolist() == [False, True, False]
    x[2, 0] = torch.inf
    with pytest.raises(ValueError, match="x has NaN or inf in 1 of 3 samples, first in sample 2; remove"):
        density.estimate(x, nfe=16).check()
    monkeypatch.setenv("FASTSCORE_CHECK", "now")
    with pytest.raises(ValueError, match="x has NaN or inf"):
        density.estimate(x, nfe=16)
    with pytest.raises(ValueError, match="NaN or inf for sample 1 at log-SNR"):
        density.estimate(x[:2], nfe=16)

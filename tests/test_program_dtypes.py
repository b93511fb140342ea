"""Row programs of networks in which numbers of several dtypes meet, as torch lets them: whole ones, half and double."""

import pytest
import torch
from torch import nn

import fastscore as fs
from fastscore.program.row_program import NoProgram, RowProgram, run


class Joined(nn.Module):
    """A linear layer of x beside the time, or beside a condition, in a dtype of its own."""

    def __init__(self, own: torch.dtype | None = None, cond: bool = False):
        super().__init__()
        self.layer, self.own, self.cond = nn.Linear(5, 4), own, cond

    def forward(self, x, t, y=None):
        beside = y if self.cond else t
        return self.layer(torch.cat([x, beside[:, None].to(self.own or beside.dtype)], 1))


class Scaled(nn.Module):
    """Factors, shifts and a divisor in the dtype that the time is given in this network."""

    def __init__(self, own: torch.dtype):
        super().__init__()
        self.layer, self.own = nn.Linear(4, 4), own

    def forward(self, x, t):
        a = torch.exp(-t)[:, None].to(self.own)
        return (self.layer(x) * a + (3 * t)[:, None].to(self.own)) / (a**2 + 1)


def agrees(net: nn.Module, time: torch.Tensor, dtype: torch.dtype, own: dict[str, torch.Tensor]) -> bool:
    net.to(dtype)
    program = RowProgram.trace(net, (4,), time, own, {}, dtype)
    x = torch.randn(3, len(time), 4, generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.no_grad():
        found = run(program.code, *program.bind(time, own, {}), x)
        given = {name: value.repeat_interleave(len(time)) for name, value in own.items()}
        expected = net(x.flatten(0, 1), time.repeat(3), **given).reshape(found.shape)
    # The same sums in another order.
    return float((found - expected).abs().max()) < 20 * torch.finfo(dtype).eps * float(expected.abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("own", [None, torch.float16, torch.bfloat16, torch.float32])
def test_a_time_of_another_dtype_goes_over_to_that_of_x(dtype, own):
    assert agrees(Joined(own), torch.linspace(0.1, 0.9, 4, dtype=dtype), dtype, {})
    if own is not None:
        assert agrees(Scaled(own), torch.linspace(0.1, 0.9, 4, dtype=dtype), dtype, {})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_whole_timesteps_and_labels_go_over_too(dtype):
    assert agrees(Joined(), torch.tensor([3, 70, 500, 999]), dtype, {})
    time = torch.linspace(0.1, 0.9, 4, dtype=dtype)
    for labels in (torch.tensor([2, 0, 1]), torch.tensor([True, False, True])):
        assert agrees(Joined(cond=True), time, dtype, {"y": labels})


def test_x_that_goes_over_to_less_than_its_own_dtype_is_no_program():
    net = nn.Module()
    net.forward = lambda x, t: x.float() * t[:, None].float()
    with pytest.raises(NoProgram, match=r"computes in torch\.float32, not in the torch\.float64 of x"):
        RowProgram.trace(net, (4,), torch.linspace(0.1, 0.9, 4).double(), {}, {}, torch.float64)


@pytest.mark.parametrize("schedule", [fs.DDPM.linear(50), fs.VP()])
@pytest.mark.filterwarnings("ignore:at the")
def test_estimates_take_the_program_and_give_the_networks_own_numbers(schedule):
    """The first network that many write: the timestep beside x, as the schedule has it."""
    torch.manual_seed(0)
    net, x = Joined(), torch.randn(8, 4)
    nn.init.uniform_(net.layer.weight, -0.01, 0.01)
    found, own = (
        fs.ScoreDensity(net, schedule, "eps", program=way).estimate(x, nfe=32, progress=False) for way in (True, False)
    )
    torch.testing.assert_close(found.log_prob, own.log_prob, rtol=1e-5, atol=1e-4)

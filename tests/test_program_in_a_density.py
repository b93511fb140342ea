"""A density gives the same numbers by a row program as by its network, in every mode, and after every change."""

import copy
import io
import pickle

import pytest
import torch
from program_networks import SCHEDULE, Odd, control_flow, make
from torch import nn

import fastscore as fs
from fastscore.estimator.integrand import cost_of_row
from fastscore.estimator.network_density import network_of
from fastscore.process.conditions import Conditions
from fastscore.program.row_program import NoProgram, Programs

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["MAR, one condition", "sbi VectorFieldMLP", "TabSyn, EDM", "DPPO"])
def test_estimates_do_not_change(name):
    net, shape, own, shared = make(name)
    x = torch.randn(9, *shape)
    cond = own(9) | shared
    on, off = (fs.ScoreDensity(net, SCHEDULE, "flow", program=program) for program in (True, False))
    expected = off.estimate(x, nfe=48, **cond)
    for memory in (None, "60KB"):  # in one chunk, and in pieces of a sample
        found = on.estimate(x, nfe=48, memory=memory, **cond)
        # float32 sums over the draws, of terms that the control variate leaves large at one end.
        assert torch.allclose(found.log_prob, expected.log_prob, rtol=1e-4, atol=1e-3)
        assert torch.allclose(found.stderr, expected.stderr, rtol=1e-3, atol=1e-3)


def test_log_prob_has_the_same_gradient_and_follows_the_parameters():
    net, shape, _, shared = make("sbi AdaMLP, one condition", torch.float64)
    x = torch.randn(5, *shape, dtype=torch.float64, requires_grad=True)

    def gradient(program, memory=None):
        density = fs.ScoreDensity(net, SCHEDULE, "flow", program=program)
        total = density.log_prob(x, nfe=24, memory=memory, **shared).sum()
        return total, torch.autograd.grad(total, [x, *net.parameters()])

    def agree(memory=None):
        (value, ours), (expected, theirs) = gradient(True, memory), gradient(False)
        assert float(value) == pytest.approx(float(expected), rel=1e-10)
        for a, b in zip(ours, theirs):
            assert float((a - b).abs().max()) <= 1e-9 * max(1.0, float(b.abs().max()))

    agree()
    agree("200KB")
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    agree()


def test_a_program_is_bound_to_what_the_network_is_now():
    net, shape, *_ = make("TabDDPM")
    density = fs.ScoreDensity(net, SCHEDULE, "flow", program=True)
    general = fs.ScoreDensity(net, SCHEDULE, "flow", program=False)
    x = torch.randn(4, *shape)

    def agree():
        a, b = (d.estimate(x, nfe=16).log_prob for d in (density, general))
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-3)
        return a

    first = agree()
    net.load_state_dict({k: v + 0.05 for k, v in net.state_dict().items()})
    second = agree()
    net.blocks[0][1] = nn.Tanh()
    third = agree()
    net.head.register_forward_hook(lambda *args: args[2] * 2)
    fourth = agree()
    for a, b in [(first, second), (second, third), (third, fourth)]:
        assert not torch.allclose(a, b, rtol=1e-3)
    net.train()
    with pytest.raises(NoProgram, match=r"layer 'blocks.0.2', operation dropout: is random"):
        density.estimate(x, nfe=16)


def test_copies_and_states_leave_programs_behind():
    net, shape, *_ = make("torchcfm")
    density, x = fs.ScoreDensity(net, SCHEDULE, "flow", program=True), torch.randn(4, *shape)
    expected = density.estimate(x, nfe=16).log_prob
    assert density._programs._found
    assert not any("program" in key for key in density.state_dict())
    file = io.BytesIO()
    torch.save(density, file)
    file.seek(0)
    for other in (copy.deepcopy(density), pickle.loads(pickle.dumps(density)), torch.load(file, weights_only=False)):
        assert other._programs.mode is True
        assert not other._programs._found
        assert torch.equal(other.estimate(x, nfe=16).log_prob, expected)


def test_the_mode():
    x = torch.randn(4, 4)
    with pytest.raises(ValueError, match="program must be True, False or 'auto', got 'always'"):
        fs.ScoreDensity(Odd(control_flow), SCHEDULE, "eps", program="always")
    with pytest.raises(NoProgram, match="data-dependent"):
        fs.ScoreDensity(Odd(control_flow), SCHEDULE, "eps", program=True).estimate(x, nfe=16)
    automatic = fs.ScoreDensity(Odd(control_flow), SCHEDULE, "eps")
    automatic.estimate(x, nfe=16)
    (found,) = automatic._programs._found.values()
    assert found.program is None
    assert "data-dependent" in found.reason
    net, shape, own, _ = make("MAR, a condition a token")
    cond = Conditions.of(own(4), 4)
    times = lambda: torch.linspace(0.1, 0.9, 4)  # noqa: E731
    assert Programs(True).find(net, shape, torch.float32, CPU, cond, times, torch.float32) is not None
    assert Programs(False).find(net, shape, torch.float32, CPU, cond, times, torch.float32) is None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert Programs("auto").find(net, shape, torch.float32, CPU, cond, times, torch.float32) is None


def test_half_precision_and_integer_time():
    net, shape, *_ = make("torchcfm", torch.bfloat16)
    x = torch.randn(16, *shape)
    a, b = (fs.ScoreDensity(net, SCHEDULE, "flow", program=p, time_dtype=torch.bfloat16) for p in (True, False))
    # bfloat16 rounds each prediction by 2^-9 and often; the sums are float32.
    assert torch.allclose(a.estimate(x, nfe=64).log_prob, b.estimate(x, nfe=64).log_prob, rtol=0.02, atol=0.3)
    net, shape, *_ = make("MAR, no condition")
    x = torch.randn(4, *shape)
    a, b = (
        fs.ScoreDensity(net, fs.DDPM.linear(100), "eps", program=p).estimate(x, nfe=32).log_prob for p in (True, False)
    )
    assert torch.allclose(a, b, rtol=1e-4, atol=1e-3)


def test_memory_is_measured_on_the_program():
    net, shape, _, shared = make("MAR, one condition")
    x = torch.randn(4, *shape)
    on, off = (fs.ScoreDensity(net, SCHEDULE, "flow", program=program) for program in (True, False))
    with torch.no_grad():
        samples = on.check(x, None, shared)
        program, module = (
            cost_of_row(network_of(d), samples, network_of(d).find_programs(samples), d.reference) for d in (on, off)
        )
    assert program.row < module.row
    # Two blocks of three tables and a final layer's two, 24 floats wide, besides the evaluation's own tensors.
    assert program.draw >= 4 * 24 * 8
    assert module.draw == 4 * x[0].numel()  # a word of noise an element, and no table

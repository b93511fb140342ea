"""Tangents of row programs against autograd, in float64: random programs, and real networks."""

import pytest
import torch
from program_networks import NETWORKS, make, rows_of
from step_programs import Program

from fastscore.ops import activations, interpreter, tangents
from fastscore.ops.instructions import INSTRUCTIONS, Act, Linear
from fastscore.program.row_program import RowProgram

B, R, D = 4, 3, 5
DIFFERENTIABLE = [name for name, act in activations.ACTIVATIONS.items() if act.derivative]


def by_autograd(code, weights, tables, x_t):
    """Return the output, and its derivative of shape (d, B, R, d_out), one backward pass an entry of the output."""
    x_t = x_t.detach().requires_grad_()
    output = interpreter.run_differentiably(code, weights, tables, x_t)
    rows = [torch.autograd.grad(output[..., j].sum(), x_t, retain_graph=True)[0] for j in range(output.shape[-1])]
    return output.detach(), torch.stack(rows, -1).permute(2, 0, 1, 3)


def agree(found, expected):
    (value, derivative), (wanted, wanted_derivative) = found, expected
    derivative = derivative.expand_as(wanted_derivative)
    # The same sums of up to 64 products over some ten layers: hundreds of roundings of 2^-53; norms of three values
    # can magnify them by the root of their variance over eps.
    for got, true in ((value, wanted), (derivative, wanted_derivative)):
        assert float((got - true).abs().max() / true.abs().max()) < 1e-10


def test_random_programs_have_the_derivative_of_autograd():
    seen = set()
    for seed in range(300):
        program = Program(seed, D, R, (3, 4, 6, 7, 9), activations=DIFFERENTIABLE)
        code = [INSTRUCTIONS[name](*arguments) for name, *arguments in program.code]
        x_t = program.randn(B, R, D)
        kept = [tensor.clone() for tensor in (x_t, *program.weights, *program.tables)]
        found = tangents.run_with_tangents(code, program.weights, program.tables, x_t)
        agree(found, by_autograd(code, program.weights, program.tables, x_t))
        assert all(map(torch.equal, kept, (x_t, *program.weights, *program.tables)))
        seen |= {name for name, *_ in program.code} | {op[1] for op in program.code if op[0] == "act"}
    assert seen == {*INSTRUCTIONS, *DIFFERENTIABLE}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_have_the_derivative_of_autograd(name):
    net, shape, own, shared = make(name, torch.float64)
    x_t, time = rows_of(B, R, shape, torch.float64)
    own = own(B)
    with torch.no_grad():
        program = RowProgram.trace(net, shape, time, own, shared, torch.float64)
        bound = program.bind(time, own, shared)
    assert tangents.why_no_rule(program.code) is None
    found = tangents.run_with_tangents(program.code, *bound, x_t)
    agree(found, by_autograd(program.code, *bound, x_t))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_derivatives_of_activations_are_those_of_their_backward_passes(name, dtype):
    act = activations.ACTIVATIONS[name]
    h = torch.cat([torch.linspace(-30, 30, 121, dtype=dtype), torch.zeros(1, dtype=dtype)]).requires_grad_()
    y = act.compute(h)
    (expected,) = torch.autograd.grad(y.sum(), h)
    # Most are the very kernels of the backward passes; another formula of a number up to one has a few roundings.
    close = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(act.derivative(h.detach(), y.detach()), expected, rtol=close, atol=close)


def test_what_has_no_rule_says_so(monkeypatch):
    code = Linear(0), Act("silu"), Linear(1)
    assert tangents.why_no_rule(code) is None
    assert "the instruction 'tuple' has no rule" in tangents.why_no_rule([*code, ()])
    with pytest.raises(ValueError, match="the instruction 'tuple' has no rule"):
        tangents.run_with_tangents([()], [], [], torch.ones(1, 1, 2))
    monkeypatch.setitem(activations.ACTIVATIONS, "silu", activations.Activation(torch.sin, torch.sin_))
    assert "the activation 'silu' has no derivative" in tangents.why_no_rule(code)

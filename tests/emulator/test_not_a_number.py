"""NaN in a network reaches f through every activation, and so does a tile beyond what float16 holds."""

import pytest
import torch
from emulator import build as builder
from emulator.comparison import AMPERE, HOPPER, Case, Problem, emulate, load, problem_of_steps
from fastscore.kernels.names import ACTIVATIONS

pytestmark = pytest.mark.slow
D, BATCH, ROWS = 13, 3, 2


@pytest.fixture(scope="module")
def library():
    return load(builder.CSRC, "sm80_density_mlp", "sm90_density_mlp", "sm90_steps_64", "sm90_steps_256")


def network(width: int, name: str) -> tuple[tuple, list[torch.Tensor], list[torch.Tensor]]:
    """Return two layers with this activation, one weight of the first of which is NaN."""
    generator = torch.Generator().manual_seed(0)
    shapes = (width, D), (width, width), (D, width)
    weights = [(torch.randn(*s, generator=generator) / s[1] ** 0.5).bfloat16() for s in shapes]
    weights[0][0, 0] = torch.nan
    return (("linear", 0), ("act", name), ("linear", 1), ("act", name), ("linear", 2)), weights, []


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_nan_of_a_weight_reaches_every_f(library, name):
    """Hidden by max(x, 0), it would be a finite and wrong log-density, with an error bar."""
    for width, device, steps in ((64, HOPPER, True), (256, HOPPER, True), (64, HOPPER, False), (64, AMPERE, False)):
        case, made = Case(width, D, 2, BATCH, ROWS, maps=1), network(width, name)
        problem = problem_of_steps(library, device, case, made) if steps else Problem(case, made=made)
        assert isinstance(problem.steps, str) != steps
        problem.f.fill_(0.0)
        emulate(library, device, problem)
        assert problem.f.isnan().all(), (width, device, steps)


def test_a_tile_beyond_float16_is_infinite_and_no_finite_number(library):
    """At width 256 a residual block's input waits as float16, which ends at 65,504."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(*s, generator=generator) for s in ((256, D), *[(256, 256)] * 3, (D, 256))]
    weights[0] *= 1e6
    block = ("save", 0), ("linear", 1), ("act", "relu"), ("linear", 2), ("add", 0, -1)
    made = (
        (("linear", 0), *block, *[op for k in (3, 4) for op in (("act", "relu"), ("linear", k))]),
        [w.bfloat16() for w in weights],
        [],
    )
    problem = problem_of_steps(library, HOPPER, Case(256, D, 1, BATCH, ROWS, maps=2), made)
    problem.f.fill_(0.0)
    emulate(library, HOPPER, problem)
    assert not isinstance(problem.steps, str)
    assert not problem.f.isfinite().any()

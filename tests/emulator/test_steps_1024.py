"""The kernel of width 1,024, in which two blocks divide the outputs of the same samples, on the emulated GPU."""

import itertools

import pytest
import torch
from emulator import build as builder
from emulator.comparison import HOPPER, Case, Module, compare_steps, emulate, load, problem_of_steps
from emulator.test_steps import SCHEDULES, cases
from step_programs import Program

from fastscore.ops import cuda_steps
from fastscore.ops.cuda import Config
from fastscore.ops.steps import Last, Residual, Steps
from fastscore.ops.weight_image import rings_of_halves

pytestmark = pytest.mark.slow
# Both kinds of network, padded or not, one tile of samples (a pair of blocks) and more (two pairs), every schedule.
FEW = (
    Case(520, 3, 1, 65, 3, maps=2),
    Case(1000, 64, 1, 63, 3, maps=2, antithetic=False),
    Case(1024, 3, 1, 67, 1, norm=False, maps=2),
    Case(1000, 3, 1, 63, 5, False, 0, False, reference=False),
    Case(1024, 64, 1, 67, 3, maps=2),
    Case(520, 64, 2, 65, 1, False, 1, False),
)


@pytest.fixture(scope="module")
def library():
    return load(builder.CSRC, "sm90_steps_1024")


@pytest.mark.parametrize(("number", "case"), list(enumerate(FEW)))
def test_the_kernel_agrees_with_the_definition(library, number, case):
    errors = compare_steps(library, HOPPER, case, SCHEDULES[number % 3])
    assert errors.complaint() is None
    # With a thousand operands a product nearly every pair has one at a boundary. A rounding that flips is one of
    # thousands: the largest error of these cases was 1.1e-3, and 0.4 without the sums of one of the four warpgroups.
    assert float(errors.error.max()) < 4e-3


def test_how_clusters_share_the_work_changes_no_bit(library):
    problem, found = problem_of_steps(library, HOPPER, Case(1024, 13, 0, 150, 3, maps=2)), []
    for cluster, clusters in ((0, 0), (1, 2), (2, 1)):
        problem.f.fill_(float("nan"))
        emulate(library, HOPPER, problem, builder.RANDOM, Config(cluster, clusters=clusters))
        found.append(problem.f.clone())
    assert problem.errors().complaint() is None
    assert all(f.equal(found[0]) for f in found)
    with pytest.raises(AssertionError, match="clusters of width 1024 are of 1 or 2, got 4"):
        emulate(library, HOPPER, problem, builder.RANDOM, Config(4))


def test_a_plan_fits_shared_memory_up_to_three_blocks(library):
    module = Module(library, HOPPER)
    found = []
    for depth in range(5):
        residual = Residual(1e-6, (), 1, (), "silu", 2, ())
        steps = Steps((), 0, (), (residual,) * depth, Last(1e-6, (), None, 3), ())
        shape = cuda_steps.shape_of(steps, [(1024, 64), (1024, 1024), (1024, 1024), (64, 1024)], 64)
        assert isinstance(shape, cuda_steps.Shape)
        found.append(module.steps_plan(*shape, *HOPPER))
    assert all(isinstance(plan, dict) and plan["shared_bytes"] <= HOPPER[1] for plan in found[:4])
    assert all(plan["threads"] == 384 and plan["stages"] == 8 for plan in found[:4])
    assert found[4] == (
        "a ring of 8 stages (64 KB), operands (132 KB), a row's vectors (38 KB) of steps do not fit 227 KB "
        "of shared memory"
    )
    assert module.steps_plan(1024, 64, False, 4, 5000, 80, 166_912) == "steps run on compute capability 9.0"


def test_a_network_has_a_shape_or_a_reason():
    steps = Steps((), 0, (), (), Last(None, (), "silu", 1), ())
    assert cuda_steps.shape_of(steps, [(513, 3), (3, 513)], 3) == (1024, 64, False, 2, 16 + 512 + 5 * 64)
    assert cuda_steps.shape_of(steps, [(1025, 3), (3, 1025)], 3) == (
        "steps run at widths up to 1024, the network has 1025"
    )
    assert cuda_steps.shape_of(steps, [(1000, 65), (65, 1000)], 65) == "steps run at d up to 64, got 65"


def test_the_image_has_a_blocks_own_inputs_first_and_every_weight_once():
    """Numbers up to 2^15 need two bytes, so weights are told apart by a row's and a column's number apart."""
    shapes = ((1024, 64), (1024, 1024), (64, 1024))
    for by_rows in (True, False):
        weights = []
        for out, in_ in shapes:
            number = torch.arange(out)[:, None] if by_rows else torch.arange(in_)[None, :]
            weights.append((number % 256).expand(out, in_).bfloat16())
        found = rings_of_halves(weights, shapes, 8192).float().reshape(2, -1, 2, 4096)  # block, stage, ring
        assert found.shape[1] == 4 + 64 + 4
        for block, ring in itertools.product(range(2), range(2)):
            hidden = found[block, 4:68, ring].reshape(64, 256, 2, 8)  # 16 inputs a stage, lines of 2 chunks
            if by_rows:  # line 4 is output 8, by the order of columns in 16
                assert hidden[:, 4].eq((512 * block + 256 * ring + 8) % 256).all()
                continue
            first = [(512 * block + 16 * stage) % 1024 % 256 for stage in range(64)]
            # Chunk 0 of line 3 lies first, of line 4 behind the other; its first number is the group's first column.
            assert hidden[:, 3, 0, 0].tolist() == first
            assert hidden[:, 4, 1, 0].tolist() == first


@pytest.mark.long
def test_cases_of_every_dimension_and_depth_agree_with_the_definition(library):
    drawn = cases(1024, 600)
    complaints = {
        case: compare_steps(library, HOPPER, case, SCHEDULES[number % 3]).complaint()
        for number, case in enumerate(drawn)
    }
    assert not any(complaints.values()), {case: text for case, text in complaints.items() if text}


@pytest.mark.long
@pytest.mark.parametrize("seed", range(8))
def test_programs_of_every_step_and_activation_agree_with_the_definition(library, seed):
    d = (5, 33)[seed % 2]
    program = Program(seed, d, 3, (515, 1019, 1024), most=3)
    made = tuple(program.code), [w.bfloat16() for w in program.weights], [t.float() for t in program.tables]
    problem = problem_of_steps(library, HOPPER, Case(1024, d, 5, 21, 3, maps=2), made)
    assert isinstance(problem.steps, Steps), problem.steps
    emulate(library, HOPPER, problem, SCHEDULES[seed % 3])
    assert problem.errors().complaint() is None, program.code

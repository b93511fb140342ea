"""The kernels of steps, unchanged, on the emulated GPU against the torch backend with the same rounding of operands."""

import itertools
import random

import kernel_cover
import pytest
from emulator import build as builder
from emulator.comparison import HOPPER, Case, Module, compare_steps, emulate, load, problem_of_steps
from fastscore.kernels.names import ACTIVATIONS
from step_programs import Program

from fastscore.ops import cuda, cuda_steps
from fastscore.ops.cuda import Config
from fastscore.ops.steps import Last, Residual, Steps

pytestmark = pytest.mark.slow
DIMENSIONS, DEPTHS = (1, 13, 16, 50, 64), (0, 1, 2, 3, 4, 6)
BATCHES, ROWS = (1, 63, 150), (1, 5, 9)
SCHEDULES = (builder.IN_ORDER, builder.RANDOM, builder.ADVERSARIAL)


def cases(hidden: int, narrower: int) -> list[Case]:
    """Return a case for every pair of a dimension and a depth, all else drawn, half of them padded from `narrower`.

    Blocks of two linear maps are residual, with a norm or without; layers of one are not.
    """
    draw = random.Random(0).choice
    drawn = []
    depths = DEPTHS if hidden < 512 else [min(depth, 3) for depth in DEPTHS]  # as many blocks as fit
    for d, depth in itertools.product(DIMENSIONS, depths):
        width, batch, rows, two = draw((hidden, narrower)), draw(BATCHES), draw(ROWS), draw((True, True, False))
        ends = draw((True, False)), draw((True, False))
        inner = (draw((True, True, False)), draw((0, 1)), True) if two else (False, draw((0, 1)), False)
        drawn.append(Case(width, d, depth, batch, rows, *inner, *ends, maps=2 if two else 1))
    return drawn


CASES = {64: cases(64, 50), 128: cases(128, 100), 256: cases(256, 200), 512: cases(512, 300)}


@pytest.fixture(scope="module")
def library():
    return load(builder.CSRC, *(f"sm90_steps_{hidden}" for hidden in CASES))


def test_the_cases_meet_every_value_beside_every_kind_of_step():
    for drawn in CASES.values():
        kinds = {(case.maps, case.norm) for case in drawn}
        assert kinds == {(2, True), (2, False), (1, False)}
        for i in (0, 1, 3, 4, 6, 8, 9):
            values = {case[i] for case in drawn}
            assert {(case.maps, case[i]) for case in drawn} == set(itertools.product((1, 2), values)), i


@pytest.mark.parametrize("hidden", CASES)
def test_the_kernels_agree_with_the_definition(library, hidden):
    complaints = {
        case: compare_steps(library, HOPPER, case, SCHEDULES[number % 3]).complaint()
        for number, case in enumerate(CASES[hidden])
    }
    assert not any(complaints.values()), {case: text for case, text in complaints.items() if text}


@pytest.mark.parametrize("hidden", CASES)
def test_programs_of_every_step_and_activation_agree_with_the_definition(library, hidden):
    rows, met = 3, set()
    for seed in range(16):
        d = (5, 33)[seed % 2]
        program = Program(seed, d, rows, (hidden // 2 + 3, hidden - 5, hidden), most=5 if hidden < 512 else 3)
        met |= {op[1] for op in program.code if op[0] == "act"}
        made = tuple(program.code), [w.bfloat16() for w in program.weights], [t.float() for t in program.tables]
        problem = problem_of_steps(library, HOPPER, Case(hidden, d, 5, 21, rows, maps=2), made)
        assert isinstance(problem.steps, Steps), problem.steps
        emulate(library, HOPPER, problem, SCHEDULES[seed % 3])
        assert problem.errors().complaint() is None, (seed, program.code)
    assert met == set(ACTIVATIONS)


@pytest.mark.parametrize("hidden", CASES)
def test_how_clusters_share_the_work_changes_no_bit(library, hidden):
    problem, found = problem_of_steps(library, HOPPER, Case(hidden, 13, 2, 450, 5, maps=2)), []
    for cluster, clusters in ((0, 0), (1, 1), (2, 2), (1, 5), (2, 100), (4, 3)):
        problem.f.fill_(float("nan"))
        emulate(library, HOPPER, problem, builder.RANDOM, Config(cluster, clusters=clusters))
        found.append(problem.f.clone())
    assert problem.errors().complaint() is None
    assert all(f.equal(found[0]) for f in found)


def test_a_device_that_runs_no_cluster_of_two_gets_blocks_alone(library):
    problem = problem_of_steps(library, HOPPER, Case(256, 13, 2, 300, 3, maps=2))
    # How many run at once is kept by the bytes that a block takes; these are no other test's.
    emulate(library, HOPPER, problem, builder.RANDOM, Config(shared_limit=HOPPER[1] - 16_384), multiprocessors=1)
    assert problem.errors().complaint() is None


@pytest.mark.parametrize("hidden", CASES)
def test_clusters_that_no_kernel_is_made_for_are_refused(library, hidden):
    problem = problem_of_steps(library, HOPPER, Case(hidden, 13, 3, 450, 1, maps=2))
    streams = problem.packed.shape.hidden > 128  # weights that stay have no clusters
    for cluster in (3, 8) if streams else ():
        with pytest.raises(AssertionError, match=f"are of 1, 2 or 4, got {cluster}"):
            emulate(library, HOPPER, problem, builder.RANDOM, Config(cluster))


@pytest.mark.parametrize(
    ("depth", "found"),
    [
        (3, True),
        (4, False),  # another 16 KB of weights: keys and x are fetched for every row
        (11, False),
        (12, "weights (208 KB), two rows' vectors (28 KB) of steps do not fit 227 KB of shared memory"),
    ],
)
def test_keys_and_samples_leave_shared_memory_to_the_weights_of_deep_networks(library, depth, found):
    residual = Residual(1e-6, (), 1, (), "silu", 2, ())
    steps = Steps((), 0, (), (residual,) * depth, Last(1e-6, (), None, 3), ())
    shape = cuda_steps.shape_of(steps, [(64, 64)] * 4, 64)
    assert isinstance(shape, cuda_steps.Shape)
    plan = Module(library, HOPPER).steps_plan(*shape, *HOPPER)
    assert (plan if isinstance(plan, str) else bool(plan["kept"])) == found


@pytest.mark.parametrize(
    ("hidden", "d", "most"),  # residual blocks, as docs/kernels.md says
    [
        (64, 64, 11),
        (64, 16, 9),
        (128, 64, 80),
        (128, 16, 34),
        (256, 64, 23),
        (256, 16, 24),
        (512, 64, 3),
        (1024, 64, 3),
    ],
)
def test_networks_of_so_many_blocks_are_taken_and_no_deeper_ones(library, hidden, d, most):
    """The predicate of the choice itself: what steps hold does not depend on what instructions would."""
    with kernel_cover.device(90, Module(library, HOPPER)):
        for depth in (1, most, most + 1):
            case = kernel_cover.Case("depth", str(depth), width=hidden, d=d)
            taken = isinstance(cuda.steps_of(case.task(depth)), Steps)
            assert taken == (depth <= most), depth
            assert not taken or cuda.why_not_fused(case.task(depth)) is None, depth


@pytest.mark.parametrize("hidden", [64, 128, 256, 512])
def test_every_plan_fits_shared_memory(library, hidden):
    module = Module(library, HOPPER)
    for depth in range(81):
        residual = Residual(1e-6, (), 1, (), "silu", 2, ())
        steps = Steps((), 0, (), (residual,) * depth, Last(1e-6, (), None, 3), ())
        shape = cuda_steps.shape_of(steps, [(hidden, hidden)] * 4, 64)
        assert isinstance(shape, cuda_steps.Shape)
        plan = module.steps_plan(*shape, *HOPPER)
        if isinstance(plan, dict):
            assert plan["shared_bytes"] <= HOPPER[1]
            assert plan["threads"] == (512 if hidden == 64 else 384)

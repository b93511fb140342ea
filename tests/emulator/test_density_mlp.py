"""The CUDA kernels, unchanged, on the emulated GPU against the torch backend with the same rounding of operands."""

import itertools
import random

import pytest
from emulator import build as builder
from emulator.comparison import AMPERE, HOPPER, Case, Problem, compare, emulate, load
from fastscore.kernels.names import ACTIVATIONS
from step_programs import Program

from fastscore.ops.cuda import Config

pytestmark = pytest.mark.slow
DIMENSIONS, DEPTHS = (1, 2, 13, 50, 64, 100, 128), (1, 2, 3, 4, 5, 6)
BATCHES, ROWS = (1, 63, 150), (1, 5, 9)
SCHEDULES = (builder.IN_ORDER, builder.RANDOM, builder.ADVERSARIAL)


def cases(hidden: int, narrower: int) -> list[Case]:
    """Return a case for every pair of a dimension and a depth, all else drawn: half of them padded from `narrower`."""
    draw = random.Random(0).choice  # a seed whose draws meet every pair of values, see the test
    return [
        Case(
            draw((hidden, narrower)), d, depth, draw(BATCHES), draw(ROWS), draw((True, False)), draw((0, 1, 2, 3)),
            draw((True, False)), draw((True, False)), draw((True, False)),
        )
        for d, depth in itertools.product(DIMENSIONS, DEPTHS)
    ]  # fmt: skip


CASES = {64: cases(64, 50), 128: cases(128, 100), 256: cases(256, 200), 512: cases(512, 300)}


@pytest.fixture(scope="module")
def library():
    return load(builder.CSRC, "sm80_density_mlp", "sm90_density_mlp", "sm90_density_mlp_wide")


def test_the_cases_meet_every_value_of_every_choice_beside_every_other():
    for drawn in CASES.values():
        for i, j in itertools.combinations([0, *range(3, len(Case._fields))], 2):
            values = [{case[k] for case in drawn} for k in (i, j)]
            assert {(case[i], case[j]) for case in drawn} == set(itertools.product(*values)), (i, j)


@pytest.mark.parametrize("hidden", CASES)
def test_hoppers_kernels_agree_with_the_definition(library, hidden):
    complaints = {
        case: compare(library, HOPPER, case, SCHEDULES[number % 3]).complaint()
        for number, case in enumerate(CASES[hidden])
    }
    assert not any(complaints.values()), {case: text for case, text in complaints.items() if text}


@pytest.mark.parametrize("hidden", [64, 128])
def test_amperes_kernel_agrees_with_the_definition(library, hidden):
    complaints, refusals = {}, []
    for number, case in enumerate(CASES[hidden]):
        try:
            complaints[case] = compare(library, AMPERE, case, SCHEDULES[number % 3]).complaint()
        except AssertionError as error:
            refusals.append(str(error))
    assert not any(complaints.values()), {case: text for case, text in complaints.items() if text}
    assert all("do not fit 163 KB" in text for text in refusals)
    assert len(refusals) == {64: 8, 128: 32}[hidden]


@pytest.mark.parametrize("hidden", CASES)
def test_programs_of_every_activation_agree_with_the_definition(library, hidden):
    met = set()
    for seed in range(12):
        program = Program(seed, (5, 33)[seed % 2], 3, (hidden // 2 + 3, hidden - 5, hidden), most=3)
        met |= {op[1] for op in program.code if op[0] == "act"}
        made = tuple(program.code), [w.bfloat16() for w in program.weights], [t.float() for t in program.tables]
        problem = Problem(Case(hidden, (5, 33)[seed % 2], 3, 21, 3, maps=2), made=made)
        emulate(library, HOPPER, problem, SCHEDULES[seed % 3])
        assert problem.errors().complaint() is None, (seed, program.code)
    assert met == set(ACTIVATIONS)


@pytest.mark.parametrize("hidden", CASES)
def test_blocks_that_share_their_weights_agree_with_the_definition(library, hidden):
    # More than two blocks of samples: Hopper's blocks form clusters where they stream weights.
    for number, case in enumerate([Case(hidden, 13, 6, 300, 2), Case(hidden, 64, 4, 450, 3, modulated=3)]):
        assert compare(library, HOPPER, case, SCHEDULES[1 + number]).complaint() is None


def test_how_blocks_share_the_work_changes_no_bit(library):
    problem, found = Problem(Case(128, 13, 6, 450, 5)), []
    for cluster, splits in ((0, 0), (1, 1), (2, 3), (4, 5)):
        problem.f.fill_(float("nan"))
        emulate(library, HOPPER, problem, builder.RANDOM, Config(cluster, splits))
        found.append(problem.f.clone())
    assert all(f.equal(found[0]) for f in found)


def test_what_does_not_fit_ampere_is_refused_with_its_sizes(library):
    with pytest.raises(
        AssertionError, match=r"weights \(144 KB\), noise \(\d+ KB\), three rows' vectors .* do not fit 163 KB"
    ):
        compare(library, AMPERE, Case(64, 128, 6, 63, 5, modulated=3))

"""Row programs as steps, against the interpreter of instructions in float64, and which programs are none."""

import pytest
from step_programs import Program

from fastscore.ops import interpreter, step_tables
from fastscore.ops.instructions import INSTRUCTIONS
from fastscore.ops.steps import Dense, Last, Residual, Steps, cut

B, R, D, WIDTHS = 4, 3, 5, (3, 4, 6, 7, 9)  # no hidden width is d: a scale of data alone may be one number a row


def test_steps_compute_what_the_instructions_do():
    met = set()
    for seed in range(300):
        program = Program(seed, D, R, WIDTHS)
        steps = cut(tuple(program.code), ("r",) * len(program.tables))
        assert isinstance(steps, Steps), (steps, program.code)
        folded, ends = step_tables.fold(steps, program.weights, program.tables)
        x_t = program.randn(B, R, D)
        found = step_tables.run(folded, ends, program.weights, x_t)
        code = [INSTRUCTIONS[name](*arguments) for name, *arguments in program.code]
        expected = interpreter.run(code, program.weights, program.tables, x_t)
        # Sums of up to 20 products and 10 layers in another order: some hundred roundings of 2^-53, and norms of three
        # values can magnify them by the root of their variance over eps.
        scale = expected.abs().max()
        assert float((found - expected).abs().max() / scale) < 1e-10, (seed, program.code)
        met |= {(s.kind, s.scaled, s.eps is None, s.before) for s in folded}
    # Every kind of step was among them: with norm and without, a scale of its own, an input to be halved.
    kinds = {("first", True, True, 1.0), ("residual", False, True, 1.0), ("residual", False, False, 1.0)}
    kinds |= {("dense", scaled, True, before) for scaled in (True, False) for before in (0.5, 1.0)}
    assert met >= kinds | {("last", False, False, 1.0), ("last", False, True, 0.5)}


SAVE, NORM, LINEAR, ACT, ADD = ("save", 0), ("norm", 1e-6), ("linear", 1), ("act", "silu"), ("add", 0, -1)
BLOCK = (SAVE, NORM, ("affine", 0, 1), LINEAR, ("affine", -1, 2), ACT, ("linear", 2), ("affine", 3, 4), ADD)


def test_a_network_of_adaptive_norms_is_cut_at_its_products():
    code = (("linear", 0), ("affine", -1, 5), *BLOCK, NORM, ("affine", 0, 1), ("linear", 3), ("affine", -1, 6))
    residual = Residual(1e-6, ((0, 1),), 1, ((-1, 2),), "silu", 2, ((3, 4),))
    last = Last(1e-6, ((0, 1),), None, 3)
    found = cut(code, ("r",) * 7)
    assert found == Steps((), 0, ((-1, 5),), (residual,), last, (("affine", -1, 6),))
    assert found.weights == (0, 1, 2, 3)
    assert cut((("linear", 0), ACT, LINEAR, ACT, ("linear", 2)), ()).middle == (Dense("silu", 1, ()),)


@pytest.mark.parametrize(
    ("body", "levels", "reason"),
    [
        (BLOCK, "rrbrr", "steps take vectors that all samples share, and one of the program's is a sample's own"),
        ((NORM, ACT, LINEAR), "", "a layer outside of residual blocks has norm where a step has act"),
        ((SAVE, ACT, LINEAR, ADD), "", "a residual block has act where a step has linear"),
        ((SAVE, LINEAR, ("affine", 0, -1), ACT, ("linear", 2), ADD), "r",
         "a residual block scales what its activation takes"),
        ((SAVE, LINEAR, ACT, ("linear", 2), ("add", 0, 0)), "r",
         "a residual block adds another tile than its own input, or a multiple of it"),
        ((SAVE, LINEAR, ACT, ("linear", 2)), "", "a residual block has end where a step has add"),
    ],
)  # fmt: skip
def test_what_is_no_sequence_of_steps_has_a_reason(body, levels, reason):
    assert cut((("linear", 0), *body, ("linear", 9)), tuple(levels)) == reason


def test_a_program_needs_two_linear_maps():
    assert cut((("linear", 0),), ()) == "steps need two linear maps at least, the program has 1"

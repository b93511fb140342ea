"""What csrc/density_mlp.h and Python both have to know of a program's bytes is the same in both.

Python lays out programs and weights where there is no compiled module too, so it reads nothing from it.
"""

import re
import struct
from itertools import product
from pathlib import Path

import pytest
import torch
from fastscore.kernels.blocks import LEVELS
from fastscore.kernels.names import ACTIVATIONS, INSTRUCTIONS

from fastscore.ops import activations, cuda, instructions, select

HEADER = (Path(__file__).parents[1] / "csrc" / "density_mlp.h").read_text()
# What a table's vectors are of.
LEVEL = {"PerRow": "r", "PerSample": "b", "PerPair": "br"}


def names(enum):
    """Return the enumerators of an enumeration without their k, in order."""
    body = re.search(rf"enum {enum} : int32_t {{(.*?)}};", HEADER, re.S)[1]
    return [re.fullmatch(r"k(\w+)", name)[1] for name in re.findall(r"\w+", body)]


def in_python(name):
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()


def constant(name):
    return int(re.search(rf"constexpr int {name} = (\d+);", HEADER)[1])


def test_numbers_stand_for_the_same_names():
    assert tuple(map(in_python, names("OpCode"))) == INSTRUCTIONS == tuple(instructions.INSTRUCTIONS)
    assert tuple(map(in_python, names("Activation"))) == ACTIVATIONS
    assert set(ACTIVATIONS) <= set(activations.ACTIVATIONS)
    assert tuple(LEVEL[name] for name in names("Level")) == LEVELS


def test_limits_are_the_same():
    assert constant("kMaxInstructions") == cuda.MAX_INSTRUCTIONS
    assert constant("kLevelShift") == cuda.LEVEL_SHIFT


def test_an_instruction_has_as_many_bytes():
    fields = re.search(r"struct Instruction {(.*?)};", HEADER, re.S)[1]
    words = sum(len(line.split(",")) for line in fields.split(";") if line.strip())
    assert len(cuda._instruction(("act", ACTIVATIONS[0]), [])) == 4 * words == struct.calcsize("<iiiif")


@pytest.mark.parametrize(("hidden", "data"), list(product(cuda.WIDTHS, cuda.DATA)))
def test_a_network_has_as_many_tiles_of_as_many_bytes(hidden, data):
    """What the compiled module copies into shared memory is what Python has laid out."""
    module = select.native()
    if isinstance(module, str):
        pytest.skip(f"fastscore._C is {module}")
    if hidden == cuda.WIDTHS[-1] and data < cuda.DATA[-1]:
        pytest.skip("such a network is padded to 128 dimensions")
    shapes = [(hidden, data), (hidden, hidden), (data, hidden)]
    weights, numbers = [torch.zeros(shape, dtype=torch.bfloat16) for shape in shapes], torch.zeros(1, data)
    code = tuple(("linear", layer) for layer in range(3))
    packed = cuda.pack(
        numbers, numbers.expand(1, 2, data), numbers, torch.zeros(1, 6), torch.ones(1), torch.ones(1), code, weights,
        [], [],
    )  # fmt: skip
    plan = module.plan(*packed.shape, 0, 90, 232_448)
    assert packed.weights.nbytes == plan["tiles"] * plan["stage_bytes"]

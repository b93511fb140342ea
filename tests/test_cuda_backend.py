"""Which networks the compiled kernels take, and the image of their weights; tests/emulator runs the kernels."""

from collections import Counter

import pytest
import real_networks
import torch
from fastscore.kernels import packing
from torch.utils._python_dispatch import TorchDispatchMode

import fastscore as fs
from fastscore.ops import cuda, noise
from fastscore.ops.instructions import decode, encode
from fastscore.ops.steps import cut
from fastscore.ops.task import plain
from fastscore.ops.weight_image import image
from fastscore.program.row_program import RowProgram


def network(width=64, d=8, dtype=torch.bfloat16, slots=1):
    weights = [
        torch.ones(width, d, dtype=dtype),
        torch.ones(width, width, dtype=dtype),
        torch.ones(d, width, dtype=dtype),
    ]
    saves = [("save", slot) for slot in range(slots)]
    return (("linear", 0), *saves, ("linear", 1), *(("add", s[1], -1) for s in saves), ("linear", 2)), weights


@pytest.mark.parametrize(
    ("options", "d", "found"),
    [
        ({}, 8, cuda.Shape(64, 16, 3)),
        ({"width": 100, "d": 50}, 50, cuda.Shape(128, 64, 3)),
        ({"slots": 2}, 8, cuda.Shape(64, 16, 3)),
        ({"dtype": torch.float32}, 8, "weights are torch.float32, the compiled kernels take bfloat16"),
        ({"d": 129}, 129, "d goes up to 128, got 129"),
        ({"width": 300}, 8, cuda.Shape(512, 128, 3)),
        ({"width": 513}, 8, "hidden widths go up to 512, the network has 513"),
        ({"width": 128, "slots": 2}, 8, "2 tiles are saved at width 128; one goes, two up to width 64"),
    ],
)
def test_a_network_has_a_shape_or_a_reason(options, d, found):
    code, weights = network(**options)
    assert cuda.shape_of(code, [tuple(w.shape) for w in weights], weights[0].dtype, d) == found


def test_scales_of_the_output_have_to_be_shared_by_all_samples():
    code = (("linear", 0), ("affine", -1, 0), ("linear", 1), ("affine", -1, 1))
    assert cuda.shared_by_samples(code, ["b", "r"])
    assert not cuda.shared_by_samples(code, ["r", "b"])


def test_the_image_holds_every_weight_where_the_swizzle_puts_it():
    weight = torch.arange(1.0, 16 * 16 + 1).reshape(16, 16).bfloat16()
    found = image([weight], ((16, 16),), 128 * 16).reshape(16, 8, 8)
    # Line 3 is output 5 (positions 0 1 2 3 are columns 0 1 4 5), and its chunk 0 lies at 0 xor 3.
    columns = [0, 1, 4, 5, 8, 9, 12, 13]
    assert found[3, 3].equal(weight[5, columns])
    assert found[3, 2].equal(weight[5, [c + 2 for c in columns]])
    assert int((found != 0).sum()) == 256


class Operations(TorchDispatchMode):
    """Counts what would be launched on a GPU: operations that make or fill a tensor, but for views and empty ones."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not function.is_view and "empty" not in str(function):
            self.counts[str(function).removeprefix("aten.")] += 1
        return function(*args, **(kwargs or {}))


def packed_again(d, width, depth=3):
    """Return a second packing of a head of MAR, and its operations: the first one makes what is kept."""
    time = torch.linspace(0.1, 0.9, 16)
    head = real_networks.MARHead(d, width, depth).eval().to(torch.bfloat16)
    program = RowProgram.trace(head, (d,), time[:4], dtype=torch.bfloat16)
    weights, tables = program.bind(time)
    keys = noise.sample_keys("independent", 0, torch.arange(32), d)
    points = noise.points("independent", 0, range(16), 16, d, torch.device("cpu"))
    alpha, reference = torch.rand(16, dtype=torch.float64), fs.Reference.isotropic().tensors()
    arguments = torch.randn(32, d), keys, points, torch.ones(16, 6), alpha, alpha
    arguments = *arguments, plain(decode(encode(program.code))), weights, tables, reference
    cuda.pack(*arguments)
    with Operations() as operations:
        found = cuda.pack(*arguments)
    return found, operations.counts, arguments


def test_packing_takes_few_operations():
    """Each is a launch of some microseconds in every call, beside kernels that take three hundred."""
    # The reference 8, the rows' columns, weights joined and gathered, of two dtypes of tables a join and a rounding.
    found, counts, arguments = packed_again(64, 64)
    assert sum(counts.values()) == 15, counts
    assert found.x is arguments[0], "nothing is padded, nothing is copied"
    # Padded: x, keys and points, and zeros for the tables of each dtype.
    _, counts, _ = packed_again(50, 100)
    assert sum(counts.values()) == 20, counts


def test_packing_steps_takes_few_operations():
    # Beside the 15 of instructions: signs of the rows and of the reference, shifts and weights joined, made float64,
    # multiplied and added to the biases, and the factors of activations.
    _, _, arguments = packed_again(64, 64)
    code, tables = arguments[6], arguments[8]
    steps = cut(code, tuple(map(packing.level_of, tables)))
    cuda.pack(*arguments, steps)
    with Operations() as operations:
        cuda.pack(*arguments, steps)
    assert sum(operations.counts.values()) == 30, operations.counts


def test_packing_reads_the_weights_of_the_moment():
    """A parameter's data can change without moving its version."""
    found, _, arguments = packed_again(64, 64)
    code, weights = arguments[6], arguments[7]
    weights[0].data.add_(1)
    again = cuda.pack(*arguments)
    assert not again.weights.equal(found.weights)
    assert again.weights.equal(cuda.pack(*arguments[:6], code, [w.clone() for w in weights], *arguments[8:]).weights)


def test_tables_of_two_dtypes_are_one_matrix_with_zeros_between():
    into = packing.Tables(batch=1, rows=3, hidden=4, data=0)
    tables = [torch.rand(1, 1, 2).bfloat16(), torch.rand(1, 3, 4).bfloat16(), torch.rand(1, 3, 3, dtype=torch.float64)]
    places = [into.add(table, table.shape[-1], 4) for table in tables]
    found = into.matrix("r", torch.zeros(1))
    assert found.dtype == torch.float32
    assert places == [("r", 0, 2), ("r", 4, 4), ("r", 8, 3)]
    assert found.shape == (3, 12)
    for table, (_, start, width) in zip(tables, places, strict=True):
        assert found[:, start : start + width].equal(table[0].float().expand(3, -1))
        assert int(found[:, start + width : start + 4].count_nonzero()) == 0

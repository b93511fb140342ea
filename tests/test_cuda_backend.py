"""Which networks the compiled kernels take, and the image of their weights; tests/emulator runs the kernels."""

import pytest
import torch

from fastscore.ops import cuda
from fastscore.ops.weight_image import image


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

"""The pictures of docs/ show the numbers of their tables."""

from pictures import roofline, scaling


def lines(ax):
    return {line.get_label(): line.get_xydata().tolist() for line in ax.get_lines()}


def test_roofline_places_kernels_under_what_the_machine_reached():
    ceilings = {"copy, GB/s": 2000.0, "bf16 product, TFLOP/s": 500.0}
    row = {"GFLOP": 80.0, "FLOP / byte": 1000.0, "Triton, ms": 0.4, "compiled kernel, ms": None, "eager, ms": 8.0}
    (ax,) = roofline([row], ceilings, "a machine").axes
    drawn = lines(ax)
    assert drawn["Triton"] == [[1000.0, 200.0]]  # 80 GFLOP in 0.4 ms
    assert drawn["eager"] == [[1000.0, 10.0]]
    assert "compiled kernel" not in drawn
    # The ridge is where 2 TB/s feed 500 TFLOP/s.
    assert drawn["copy bandwidth, bf16 product"] == [[25.0, 50.0], [250.0, 500.0], [2000.0, 500.0]]


def test_scaling_shows_both_axes_beside_the_budget():
    def row(axis, size, peak):
        whole = {"B x S": size, "processor seconds": size / 1e5, "budget, MB": 64.0, "B x S x d, MB": size / 4e3}
        return {"axis": axis, "tensors' peak, MB": peak, **whole}

    time, memory = scaling([row("samples", 1e5, 5.0), row("evaluations", 2e5, 6.0), row("width", 1.0, 9.0)]).axes
    assert lines(time) == {"more samples": [[1e5, 1.0]], "more evaluations": [[2e5, 2.0]]}
    drawn = lines(memory)
    assert drawn["more samples"] == [[1e5, 5.0]]
    assert drawn["one array B x S x d"] == [[1e5, 25.0], [2e5, 50.0]]
    assert {y for _, y in drawn["budget"]} == {64.0}

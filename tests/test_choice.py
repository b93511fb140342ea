"""Which backend a network gets: by the measured table, by what kernels cover, and the same for `explain`."""

import json
import sys
import types
from pathlib import Path

import pytest
import torch
from real_networks import MARHead
from torch import nn

import fastscore as fs
from fastscore.estimator import integrand, rows
from fastscore.ops import choice, cuda, measured
from fastscore.ops import triton as through_triton
from fastscore.ops.choice import choose
from fastscore.ops.instructions import Affine
from fastscore.ops.task import Task

pytest.importorskip("triton")
import random_networks

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
NAMES = ("cuda", "triton", "torch")
HOPPER = (90, 232448)


@pytest.fixture
def hopper(monkeypatch):
    """Let a CPU pass for a Hopper with compiled kernels; nothing is launched."""
    monkeypatch.setattr(choice, "_capability", lambda device: (9, 0))
    monkeypatch.setattr(
        cuda, "native", lambda: types.SimpleNamespace(plan=lambda *shape: {}, steps_plan=lambda *shape: {})
    )
    monkeypatch.setattr(cuda, "_device", lambda device: HOPPER)
    cuda.why_not_fused.cache_clear()
    cuda.steps_of.cache_clear()
    yield
    cuda.why_not_fused.cache_clear()
    cuda.steps_of.cache_clear()


def task(family=random_networks.adaln, width=64, dtype=torch.bfloat16, d=64, depth=3):
    network = random_networks.problem(family, width, depth, d, "diagonal", "bf16")
    shapes, levels = tuple(tuple(w.shape) for w in network.weights), ("r",) * len(network.tables)
    return Task(network.code, shapes, levels, d, 1, False, dtype, torch.device("cpu"))


def recorded(name):
    return json.loads((RESULTS / f"{name}.json").read_text())


def test_the_table_is_the_recorded_one():
    columns = {"Triton, ms": "triton", "compiled kernel, ms": "cuda"}
    kernels = recorded("h200_kernels")
    rows = [
        measured.Row("forward", name.split()[0], int(name.split()[1].removeprefix("H=")), times)
        for name, times in (
            (row["network"], tuple((n, row[c]) for c, n in columns.items() if isinstance(row[c], float)))
            for row in kernels["rows"]
        )
    ]
    known = [row for row in measured.ROWS if row.work == "forward"]
    assert [(r.kind, r.width, dict(r.milliseconds)) for r in known] == [
        (r.kind, r.width, dict(r.milliseconds)) for r in rows
    ]
    (gradient,) = (row for row in measured.ROWS if row.work == "gradient")
    (call,) = (row for row in recorded("h200_calls")["rows"] if "backward" in row["call"])
    times = dict(gradient.milliseconds)
    assert (f"Triton {times['triton']} ms", f"torch backend {times['torch']} ms") == (
        call["fastscore"],
        call["beside it"],
    )
    assert measured.SOURCE.startswith(f"{kernels['device']}, {kernels['date']}")


@pytest.mark.parametrize(
    ("network", "backend"),
    [
        *(({"width": width}, "cuda") for width in (20, 64, 100, 128, 256, 512)),
        ({"family": random_networks.plain, "width": 64}, "triton"),
        ({"family": random_networks.plain, "width": 128}, "triton"),
        ({"family": random_networks.plain, "width": 130}, "cuda"),
        ({"family": random_networks.plain, "width": 256}, "cuda"),
        ({"family": random_networks.plain, "width": 512}, "cuda"),
        ({"dtype": torch.float32}, "triton"),
        ({"dtype": torch.float16}, "triton"),
        ({"d": 200}, "triton"),
    ],
)
def test_the_fastest_that_covers_a_network_runs_it(hopper, network, backend):
    found = choose(NAMES, task(**network))
    assert (found.backend, found.fused) == (backend, True)
    assert measured.SOURCE in found.reason
    assert choose(NAMES[1:], task(width=64)).backend == "triton"


def test_the_reason_names_the_measurement_and_what_does_not_cover(hopper):
    assert choose(NAMES, task()).reason == (
        f"measured at adaLN, width 64: cuda 0.825 ms, triton 1.054 ms ({measured.SOURCE})"
    )
    reason = choose(NAMES, task(dtype=torch.float32)).reason
    assert reason.endswith("; cuda: weights are torch.float32, the compiled kernels take bfloat16")
    nothing = choose(NAMES, task(width=600))
    assert not nothing.fused
    assert nothing.reason == (
        "cuda: measurements end at width 512; backend='cuda' takes it; "
        "triton: hidden widths go up to 512, the network has 600"
    )


def test_the_compiled_kernel_of_the_widest_layers_is_taken_where_it_is_asked_for(hopper):
    assert choose(("cuda",), task(width=1000)) == ("cuda", True, "asked for")
    beyond = choose(("cuda",), task(width=1025))
    assert not beyond.fused
    assert beyond.reason.endswith("cuda: hidden widths go up to 1024, the network has 1025")
    of_instructions = choose(("cuda",), task(family=random_networks.two_tiles, width=600))
    assert not of_instructions.fused
    assert "cuda: networks wider than 512 run as steps alone, and " in of_instructions.reason


def test_the_kernel_of_wide_layers_is_taken_where_it_is_asked_for(hopper):
    """It has run in the interpreter alone, and "auto" takes what a GPU has run."""
    wide = task(width=512, dtype=torch.float16)
    found = choose(NAMES, wide)
    assert not found.fused
    assert found.reason.endswith("triton: its kernel of wide layers is not measured yet; backend='triton' takes it")
    asked = choose(("triton",), wide)
    assert asked == ("triton", True, "asked for")


def test_a_program_without_linear_maps_has_no_kernel(hopper):
    found = choose(NAMES, Task.of([Affine(0, -1)], [], ["r"], 5, torch.device("cpu"), 1))
    assert not found.fused
    assert "two linear maps at least, the network has 0" in found.reason


def test_what_does_not_fit_gives_way_with_the_reason(hopper, monkeypatch):
    small = classmethod(lambda cls, device: cls(75, 16_384))
    monkeypatch.setattr(through_triton.launch.Device, "of", small)
    monkeypatch.setattr(through_triton, "precision", lambda dtype: "bf16")  # the interpreter's is another
    through_triton._way.cache_clear()
    found = choose(("triton", "torch"), task(width=256))
    through_triton._way.cache_clear()
    assert not found.fused
    assert "triton: it takes 18,432 bytes of shared memory at least, the device grants 16,384" in found.reason


def test_other_architectures_and_gradients(hopper, monkeypatch):
    found = choose(NAMES, task(), gradient=True)
    assert (found.backend, found.fused) == ("torch", False)
    assert "torch 17.3 ms, triton 23.8 ms" in found.reason
    monkeypatch.setattr(choice, "_capability", lambda device: (8, 0))
    found = choose(NAMES, task(), gradient=True)
    assert (found.backend, found.fused) == ("torch", False)
    assert found.reason.startswith("nothing is measured for compute capability 8.0")
    # Who asks for a backend gets it.
    assert choose(("triton",), task(), gradient=True)[:2] == ("triton", True)
    assert choose(("cuda", "triton"), task(width=128, family=random_networks.plain))[:2] == ("cuda", True)
    monkeypatch.setattr(choice, "_capability", lambda device: (8, 0))
    assert choose(NAMES, task())[:2] == ("triton", True)
    assert choose(NAMES, task()).reason.startswith("nothing is measured for compute capability 8.0")


def test_explain_says_which_kernel_and_why(hopper, monkeypatch):
    explain = sys.modules["fastscore.program.explain"]
    monkeypatch.setattr(explain, "runnable", lambda device, dtype, name: NAMES)
    torch.manual_seed(0)
    lines = fs.explain(MARHead(5, 64, 2).bfloat16(), (5,)).splitlines()
    assert lines[-2] == (
        "on cpu: one kernel of backend cuda: measured at adaLN, width 64: cuda 0.825 ms, triton 1.054 ms "
        "(NVIDIA H200, 2026-11-28, Triton 3.6, kernels of that day); it runs as steps, which no GPU has timed yet"
    )
    assert lines[-1].startswith(
        "  with gradients of its weights backend torch: measured at adaLN, width 64: torch 17.3"
    )
    assert lines[-1].endswith("; in a backward pass of cuda, asked for by name, one kernel evaluates the rows again")
    wide = fs.explain(MARHead(200, 64, 2).bfloat16(), (200,)).splitlines()[-1]
    assert wide.endswith("PyTorch evaluates the rows again: gradients go up to 128 dimensions in a kernel, got 200")


def test_an_evaluation_makes_the_same_choice(monkeypatch):
    """Triton's kernel without gradients, PyTorch with them, and the same numbers."""
    monkeypatch.setattr(choice, "_capability", lambda device: (9, 0))
    monkeypatch.setattr(rows, "runnable", lambda *a: ("triton", "torch"))
    fused, run = [], integrand._fused
    monkeypatch.setattr(integrand, "_fused", lambda *a: fused.append(1) or run(*a))
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 16), nn.SiLU(), nn.Linear(16, 2))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network

        def forward(self, x, t):
            return self.net(torch.cat([x, t[:, None]], 1))

    density, x = fs.ScoreDensity(Net(), fs.VP(), "eps"), torch.randn(3, 2)
    with torch.no_grad():
        found = density.log_prob(x, nfe=8)
    assert fused
    fused.clear()
    expected = density.log_prob(x, nfe=8)
    assert expected.requires_grad
    assert not fused
    # Sums of eight rows in float32.
    torch.testing.assert_close(found, expected.detach(), rtol=1e-5, atol=1e-5)
    density.model.requires_grad_(False)
    density.log_prob(x.requires_grad_(), nfe=8).sum().backward()
    assert fused  # the gradient of the data alone has a kernel of its own


def test_explain_answers_for_a_backend_asked_for_by_name():
    network = MARHead(5, 64, 2)
    assert fs.explain(network, (5,), backend="torch") == fs.explain(network, (5,))
    with pytest.raises(ValueError, match=r"no backend can run on cpu in torch.float32: cuda: "):
        fs.explain(network, (5,), backend="cuda")
    with pytest.raises(ValueError, match="backend must be 'auto' or one of cuda, triton, torch; got 'gpu'"):
        fs.explain(network, (5,), backend="gpu")

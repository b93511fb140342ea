"""Say as what a network runs: its row program, one instruction a line, or why there is none."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .backends.select import implementation, select
from .chain import Core
from .instructions import Act, Add, Affine, Instruction, Linear, NoProgram, Norm, Save
from .network import Conditions, model_dtype
from .program import Programs, RowProgram
from .schedules import Schedule
from .tracing import SAMPLE, TIME

_EVALUATED = {0: "constant", TIME: "per draw", SAMPLE: "per sample", TIME | SAMPLE: "per row"}
EXAMPLE_TIMES = 4


@torch.no_grad()
def explain(model: nn.Module, shape: tuple[int, ...], schedule: Schedule | None = None, **cond: object) -> str:
    """Return a network's row program, one instruction a line, or the reason why there is none.

    Every line has the layer, the width, and for tables on what they depend. `ScoreDensity` runs a program by itself.

    Arguments:
        model: called as `model(x_t, t, **cond)`, with x_t (rows, *shape).
        shape: of one sample.
        schedule: whose times the network gets; times in (0, 1) by default.
        cond: keyword arguments of the network. Tensors go with their samples if their first dimension is that of the
            longest; a single sample's condition of shape (1, ...) is shared.

    Raises:
        ProgramMismatch: if program and network differ, as when the network is random.
    """
    batch = max((len(v) for v in cond.values() if isinstance(v, Tensor) and v.ndim > 0), default=0)
    conditions = Conditions.of(cond, batch if batch > 1 else -1)
    dtype = model_dtype(model, torch.get_default_dtype())
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    span = (0.1, 0.9) if schedule is None else schedule.log_snr_range
    points = torch.linspace(*span, EXAMPLE_TIMES, dtype=torch.float64, device="cpu")
    time = points if schedule is None else schedule.time(points)
    try:
        program = Programs(True).find(model, tuple(shape), dtype, conditions, lambda: time.to(device), None)
    except NoProgram as reason:
        return f"no row program: {reason}"
    lines = [_line(program, instruction, core) for instruction, core in zip(program.code, program.matched.cores)]
    width = max((len(left) for left, _ in lines), default=0)
    text = [f"row program of {type(model).__name__}, x_t {tuple(shape)}"]
    text += [f"{left:<{width}}  {right}".rstrip() for left, right in lines]
    spared = f"{program.spared:.0%} of the multiplications run once per draw or sample, the rest for every row"
    text += [spared + ("" if program.pays else "; too few to run it unless program=True")]
    return "\n".join([*text, _kernel(program, time.to(device), conditions.shared, math.prod(shape))])


def _kernel(program: RowProgram, time: Tensor, shared: dict[str, object], d: int) -> str:
    """Return what runs the program on its network's device, by the predicate that an evaluation asks."""
    name = select(time.device, torch.float32)
    if name == "torch":
        return f"on {time.device}: one PyTorch operation after another; kernels need a GPU"
    weights = program.at(time, shared).weights
    reason = implementation(name).why_not_fused(program.code, weights, d)
    return f"on {time.device}: " + (
        f"one kernel of backend {name}" if reason is None else f"no single kernel: {reason}"
    )


def _line(program: RowProgram, instruction: Instruction, core: Core | None) -> tuple[str, str]:
    if isinstance(instruction, Save):
        return f"save {instruction.slot}", ""
    if isinstance(instruction, Linear):
        return f"linear {core.parent.width} -> {core.width}", core.layer
    if isinstance(instruction, Affine):
        parts = [f"{sign} {_table(program, i)}" for sign, i in (("*", instruction.scale), ("+", instruction.shift))]
        return "affine " + ", ".join(p for p, i in zip(parts, instruction) if i >= 0), core.layer
    if isinstance(instruction, Act):
        return f"{instruction.name} {core.width}", core.layer
    if isinstance(instruction, Norm):
        return f"norm {core.width}, eps {instruction.eps:g}", core.layer
    assert isinstance(instruction, Add)
    scale = "" if instruction.scale < 0 else f" * {_table(program, instruction.scale)}"
    return f"add {instruction.slot}{scale}", core.layer


def _table(program: RowProgram, index: int) -> str:
    table, _ = program.matched.tables[index]
    return _EVALUATED[0 if isinstance(table, int | float) else table.meta["level"]]

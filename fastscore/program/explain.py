"""Say as what a network runs: its row program, one instruction a line, or why there is none."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import tangents
from ..ops.choice import choose
from ..ops.gradient import by_kernel
from ..ops.instructions import Act, Add, Affine, Instruction, Linear, NoProgram, Norm, Save
from ..ops.select import implementation, runnable
from ..ops.task import Task, WithRespectTo
from ..process.conditions import Conditions, takes_conditions
from ..process.network import time_dtype_of
from ..process.schedules import Schedule
from ..process.taken_dtype import model_dtype
from ..support.host import kind_of
from ..support.structure import flatten
from .chain import Core
from .row_program import Programs, RowProgram
from .tracing import SAMPLE, TIME

_EVALUATED = {0: "constant", TIME: "per draw", SAMPLE: "per sample", TIME | SAMPLE: "per row"}
EXAMPLE_TIMES = 4


@takes_conditions
@torch.no_grad()
def explain(
    model: nn.Module,
    shape: tuple[int, ...],
    schedule: Schedule | None = None,
    *,
    cond: dict[str, Any] | None = None,
    backend: str = "auto",
    **named: Any,
) -> str:
    """Return a network's row program, one instruction a line, or the reason why there is none.

    Every line has the layer, the width, and for tables on what they depend. `ScoreDensity` runs a program by itself.

    Arguments:
        model: called as `model(x_t, t, **cond)`, with x_t (rows, *shape).
        shape: of one sample.
        schedule: whose times the network gets; times in (0, 1) by default.
        cond, named: keyword arguments of the network, as in `ScoreDensity.estimate`. Tensors that are not marked
            go with their samples if their first size is that of the longest; one of shape (1, ...) alone is shared.
        backend: as in `ScoreDensity`: what one asked for by name runs, or why it does not.

    Raises:
        ValueError: if the backend cannot run on the network's device at all, with the reason.
        TypeError: if the model is no module, or a density and no network; if shape is no tuple of integers, or schedule
            none.
        ProgramMismatch: if program and network differ, as when the network is random.
    """
    _check(model, shape, schedule)
    conditions = Conditions.of(cond, _batch_of(cond))
    dtype = model_dtype(model, torch.get_default_dtype())
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    span = (0.1, 0.9) if schedule is None else schedule.log_snr_range
    points = torch.linspace(*span, EXAMPLE_TIMES, dtype=torch.float64, device="cpu")
    time = points if schedule is None else schedule.time(points)
    time_dtype = time_dtype_of(schedule, dtype, None)
    try:
        program = Programs(True).find(model, tuple(shape), dtype, device, conditions, lambda: time, time_dtype)
    except NoProgram as reason:
        return f"no row program: {reason}"
    lines = [_line(program, instruction, core) for instruction, core in zip(program.code, program.matched.cores)]
    width = max((len(left) for left, _ in lines), default=0)
    text = [f"row program of {type(model).__name__}, x_t {tuple(shape)}"]
    text += [f"{left:<{width}}  {right}".rstrip() for left, right in lines]
    spared = f"{program.spared:.0%} of the multiplications run once per draw or sample, the rest for every row"
    text += [spared + ("" if program.pays else "; too few to run it unless program=True")]
    time = time.to(device, time_dtype)
    return "\n".join(
        [*text, _trace(program, shape), _kernel(program, time, conditions.shared, math.prod(shape), backend)]
    )


explain_program = explain  # the same by a longer name, for those who read it away from the package's


def _check(model: object, shape: object, schedule: object) -> None:
    """Raise TypeError for what is none of these."""
    is_density = hasattr(model, "network_arguments")
    if not isinstance(model, nn.Module) or is_density:
        remedy = "give density.model" if is_density else "wrap a function in a Module"
        raise TypeError(f"model must be a network, a torch.nn.Module, got {kind_of(model)}; {remedy}")
    if not isinstance(shape, tuple | list) or not all(isinstance(size, int) for size in shape):
        given = f"a tensor {tuple(shape.shape)}" if isinstance(shape, Tensor) else repr(shape)
        raise TypeError(f"shape must be that of one sample, a tuple of integers, got {given}; give tuple(x.shape[1:])")
    if not isinstance(schedule, Schedule | None):
        raise TypeError(f"schedule must be a fastscore Schedule such as VP(), got {kind_of(schedule)}")


def _batch_of(cond: dict[str, object]) -> int:
    """Return the number of samples that conditions are of: what was marked says it, or the longest."""
    leaves = [leaf for leaf in flatten(cond)[0].values() if isinstance(leaf.value, Tensor) and leaf.value.ndim > 0]
    said = {len(leaf.value) for leaf in leaves if leaf.per_sample}
    batch = max(said or {len(leaf.value) for leaf in leaves if leaf.per_sample is None}, default=0)
    return batch if batch > 1 or said else -1


def _kernel(program: RowProgram, time: Tensor, shared: dict[str, object], d: int, backend: str) -> str:
    """Return what runs the program on its network's device, by the choice that an evaluation makes."""
    names = runnable(time.device, torch.float32, backend)
    task = Task.of(program.code, program.at(time, shared).weights, program.levels, d, time.device, components=1)
    choice, backward = (choose(names, task, gradient) for gradient in (False, True))
    if not choice.fused:
        if names == ("torch",):
            return f"on {time.device}: {choice.reason}"
        instead = "PyTorch runs the program between a kernel of noise and one of residuals"
        return f"on {time.device}: no single kernel; {instead}: {choice.reason}"
    line = f"on {time.device}: one kernel of backend {choice.backend}: {choice.reason}"
    if choice.backend == "cuda":
        line += f"; it runs {implementation(choice.backend).how(task)}"
    line += f"\n  with gradients of its weights backend {backward.backend}: {backward.reason}"
    reason = by_kernel(choice.backend, task, WithRespectTo(of_x=False, of_weights=True, of_tables=True))
    instead = "one kernel evaluates the rows again" if reason is None else f"PyTorch evaluates the rows again: {reason}"
    return f"{line}; in a backward pass of {choice.backend}, asked for by name, {instead}"


def _trace(program: RowProgram, shape: tuple[int, ...]) -> str:
    """Return how the ODE takes the exact trace of the program's Jacobian."""
    reason = tangents.why_not(math.prod(shape), program.dtype) or tangents.why_no_rule(program.code)
    if reason is None:
        return "exact trace of the ODE: tangents beside each sample, in one pass"
    return f"exact trace of the ODE: a backward pass a dimension, since {reason}"


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
    if not isinstance(instruction, Add):
        return f"{type(instruction).__name__.lower()} {core.width}", core.layer
    scale = "" if instruction.scale < 0 else f" * {_table(program, instruction.scale)}"
    return f"add {instruction.slot}{scale}", core.layer


def _table(program: RowProgram, index: int) -> str:
    table, _ = program.matched.tables[index]
    return _EVALUATED[0 if isinstance(table, int | float) else table.meta["level"]]

"""A random network through a CUDA kernel on the emulated GPU, beside the torch backend with the same rounding.

Both round the operands of every product to bfloat16. Where an operand lies at the boundary of two bfloat16 numbers,
float32's sums can round it the other way than float64's, and the pair (sample, row) that it belongs to is off by 2^-9
of one of hundreds of terms: such pairs are known beforehand, so that all others can be held to float32's rounding.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from fastscore.kernels import packing
from torch import Tensor

from fastscore import Reference
from fastscore.ops import cuda, cuda_steps, noise, step_tables
from fastscore.ops import torch as truth
from fastscore.ops.activations import ACTIVATIONS
from fastscore.ops.steps import Steps

from . import build as builder

HERE = Path(__file__).parent
HOPPER, AMPERE = (90, 232448), (80, 166912)  # compute capability, shared memory that a block may have
# Of the rms of f. Measured in 80,000 unambiguous pairs: up to 5.5e-6.
TOLERANCE = 1e-5
# An operand this close to a boundary, relative to its row's rms, may round either way: the largest error of a sum of
# 256 products in float32 that was seen was 5e-7.
BOUNDARY = 1e-6
# Pairs whose rounding did flip, a share of 1e-4 an operand, and of few pairs three standard deviations more: in 600
# random cases at most half of that, and off by up to 2.1e-2.
FLIPPED, FLIP = 1e-4, 0.1


class Case(NamedTuple):
    """A network and a batch."""

    hidden: int
    d: int
    depth: int
    batch: int
    rows: int
    norm: bool = True
    modulated: int = 1  # by vectors of 1: every row, 2: sample, 3: pair; 0: not at all
    residual: bool = True
    antithetic: bool = True
    reference: bool = True
    maps: int = 1  # linear maps of a block; with two and a norm, as an adaLN network has them, it is a residual step


@dataclass(frozen=True)
class Errors:
    """|f - truth| / rms(truth) of every sample and row, and where a rounding could go either way."""

    error: Tensor  # (B, R)
    ambiguous: Tensor  # (B, R), bool
    operands: int  # that a pair rounds

    def complaint(self) -> str | None:
        """Return what is wrong with the kernel's numbers, or None."""
        wrong = ~(self.error < TOLERANCE)  # NaN is wrong
        if (wrong & ~self.ambiguous).any():
            return f"{int((wrong & ~self.ambiguous).sum())} of {int((~self.ambiguous).sum())} unambiguous pairs differ"
        share = FLIPPED * self.operands
        if wrong.double().mean() > share + 3 * (share / wrong.numel()) ** 0.5 and wrong.sum() > 1:
            return f"{float(wrong.double().mean()):.3f} of all pairs differ"
        return None if (self.error < FLIP).all() else f"a pair is off by {float(self.error.max()):.1e}"


class Module:
    """Stands in for fastscore._C on a device of a given capability and shared memory."""

    def __init__(self, library: ctypes.CDLL, device: tuple[int, int]):
        self.library, self.device = library, device

    def density_mlp(self, hidden, data, linears, pointers, sizes, operands, program, device, stream, cluster, splits):
        message = self.library.launch(
            hidden, data, linears, (ctypes.c_uint64 * 9)(*pointers), (ctypes.c_int32 * 5)(*sizes),
            (ctypes.c_int32 * 8)(*operands), program, len(program), *self.device,
            cluster, splits,
        )  # fmt: skip
        assert not message, (message.decode(), self.library.emulator_error())

    def plan(self, *shape_and_limits):
        found = (ctypes.c_int32 * 2)()
        reason = self.library.plan_of(*shape_and_limits, found)
        return reason.decode() or dict(zip(("shared_bytes", "threads"), found))

    def steps_plan(self, *shape_and_limits):
        found, (*shape, capability, shared) = (ctypes.c_int32 * 5)(), shape_and_limits
        reason = self.library.plan_of_steps((ctypes.c_int32 * 5)(*shape), capability, shared, found)
        return reason.decode() or dict(zip(("shared_bytes", "threads", "kept", "stages", "tiles"), found))

    def steps(
        self, hidden, data, padded, linears, record, pointers, sizes, columns, steps, device, stream, cluster, clusters,
        shared_limit,
    ):  # fmt: skip
        capability, granted = self.device
        message = self.library.launch_of_steps(
            (ctypes.c_int32 * 5)(hidden, data, padded, linears, record), (ctypes.c_uint64 * 5)(*pointers),
            (ctypes.c_int32 * 2)(*sizes), (ctypes.c_int32 * 4)(*columns), steps, len(steps), capability,
            min(shared_limit or granted, granted), cluster, clusters,
        )  # fmt: skip
        assert not message, (message.decode(), self.library.emulator_error())


def host_sources(csrc: Path) -> list[Path]:
    """Return what runs on the host, whatever the kernels."""
    return [csrc / "density_mlp.cpp", csrc / "steps.cpp", HERE / "density_mlp.cpp"]


def load(csrc: Path, *kernels: str, host: list[Path] | None = None) -> ctypes.CDLL:
    """Compile kernel families for the emulator and load them, with what is compiled for the host already if given."""
    sources = [csrc / f"{name}.cu" for name in kernels]
    compiled = builder.objects([*sources, *host_sources(csrc)]) if host is None else [*host, *builder.objects(sources)]
    library = builder.link(compiled)
    for function in (library.launch, library.launch_of_steps, library.plan_of, library.plan_of_steps):
        function.restype = ctypes.c_char_p
    return library


def network(case: Case, generator: torch.Generator) -> tuple[tuple, list[Tensor], list[Tensor]]:
    """Return code, weights in bfloat16 and tables of a random network."""

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    hidden, rows = case.hidden, case.rows
    weights, tables = [randn(hidden, case.d) / case.d**0.5], [0.3 * randn(1, rows, hidden)]
    code = [("linear", 0), ("affine", -1, 0)]
    for _ in range(case.depth):
        weights.append(randn(hidden, hidden) / hidden**0.5)
        code += [("save", 1)] * case.residual + [("norm", 1e-6)] * case.norm
        if case.modulated:
            levels = {1: (1, rows), 2: (case.batch, 1), 3: (case.batch, rows)}[case.modulated]
            tables += [1 + 0.3 * randn(*levels, hidden), 0.3 * randn(1, rows, hidden)]
            code += [("affine", len(tables) - 2, len(tables) - 1)]
        if case.maps == 2:
            weights.append(randn(hidden, hidden) / hidden**0.5)
            tables.append(0.3 * randn(1, 1, hidden))
            code += [("linear", len(weights) - 2), ("affine", -1, len(tables) - 1)]
        tables += [1 + 0.3 * randn(1, rows, hidden), 0.3 * randn(1, 1, hidden)]
        code += [("act", "silu"), ("linear", len(weights) - 1), ("affine", len(tables) - 2, len(tables) - 1)]
        code += [("add", 1, -1)] * case.residual
    if case.maps == 2 and case.norm and case.modulated:
        tables += [1 + 0.3 * randn(1, rows, hidden), 0.3 * randn(1, rows, hidden)]
        code += [("norm", 1e-6), ("affine", len(tables) - 2, len(tables) - 1)]
    else:
        code += [("act", "silu")]
    weights.append(randn(case.d, hidden) / hidden**0.5)
    tables += [0.3 * randn(1, rows, case.d)]
    code += [("linear", len(weights) - 1), ("affine", -1, len(tables) - 1)]
    return tuple(code), [w.bfloat16() for w in weights], tables


def prediction(code: tuple, weights: list[Tensor], tables: list[Tensor], x_t: Tensor) -> tuple[Tensor, Tensor]:
    """Return the network's output with operands rounded to bfloat16, and for which pairs one lies at a boundary."""
    h, saved = x_t.double(), {}
    ambiguous = torch.zeros(h.shape[:2], dtype=torch.bool)
    for op in code:
        if op[0] == "linear":
            margin = BOUNDARY * h.square().mean(-1, keepdim=True).sqrt()
            ambiguous |= ((h + margin).bfloat16() != (h - margin).bfloat16()).any(-1)
            h = h.bfloat16().double() @ weights[op[1]].double().T
        elif op[0] == "affine":
            h = h if op[1] < 0 else h * tables[op[1]]
            h = h if op[2] < 0 else h + tables[op[2]]
        elif op[0] == "act":
            h = ACTIVATIONS[op[1]].compute(h)
        elif op[0] == "norm":
            h = torch.nn.functional.layer_norm(h, h.shape[-1:], eps=op[1])
        elif op[0] == "save":
            saved[op[1]] = h.half().double() if h.shape[-1] > 256 else h
        else:
            h = h + (saved[op[1]] if op[2] < 0 else saved[op[1]] * tables[op[2]])
    return h, ambiguous


def prediction_of_steps(
    steps: Steps, weights: list[Tensor], tables: list[Tensor], x_t: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the same of a program of steps, whose folded vectors are float32."""
    folded, ends = step_tables.fold(steps, weights, tables)
    ambiguous = torch.zeros(x_t.shape[:2], dtype=torch.bool)

    def operand(h):
        margin = BOUNDARY * h.square().mean(-1, keepdim=True).sqrt()
        ambiguous.logical_or_(((h + margin).bfloat16() != (h - margin).bfloat16()).any(-1))
        return h.bfloat16().double()

    wide = max(w.shape[0] for w in weights) > 128
    saved = (lambda h: h.half().double()) if wide else (lambda h: h)
    predicted = step_tables.run(folded, ends, weights, x_t.double(), operand, saved, lambda v: v.float().double())
    return predicted, ambiguous


class Problem:
    """A case's data and network on a device: laid out for a kernel, and what the definition says in float64.

    Arguments:
        fitting: called with code, shapes, levels and d, says as which steps the program runs, or why it is run by
            instructions, as all are where it is None.
        made: code, weights in bfloat16 and tables in place of the case's random network.
    """

    def __init__(
        self,
        case: Case,
        device: str = "cpu",
        fitting: Callable[..., Steps | str] | None = None,
        made: tuple[tuple, list[Tensor], list[Tensor]] | None = None,
    ):
        generator = torch.Generator().manual_seed(case.hidden + case.d + case.depth + case.batch)
        code, weights, tables = made or network(case, generator)
        self.operands = case.hidden * (case.maps * case.depth + 2)
        levels = [packing.level_of(table) for table in tables]
        self.steps = fitting(code, [tuple(w.shape) for w in weights], levels, case.d) if fitting else "asked for"
        d, rows = case.d, case.rows
        x = torch.randn(case.batch, d, generator=generator)
        keys = noise.sample_keys("independent", 3, torch.arange(case.batch), d)
        points = noise.points("independent", 3, range(rows), rows, d, torch.device("cpu"))
        log_snr = torch.linspace(-4, 4, rows, dtype=torch.float64)
        alpha, sigma = torch.sigmoid(log_snr).sqrt(), torch.sigmoid(-log_snr).sqrt()
        sign = torch.where(torch.arange(rows) % 2 == 0, 1.0, -1.0) if case.antithetic else torch.ones(rows)
        coefficients = torch.randn(rows, 3, generator=generator)
        table = torch.cat([torch.stack([sign, alpha.float(), sigma.float()], 1), coefficients], 1)
        reference = Reference.isotropic(1.3).tensors() if case.reference else []

        def there(tensors):
            return [t.to(device) for t in tensors]

        self.packed = cuda.pack(
            *there((x, keys, points, table, alpha, sigma)), code, there(weights), there(tables), there(reference),
            self.steps,
        )  # fmt: skip
        x_t, eps = truth.perturb(x, keys, points, sign, alpha.float(), sigma.float())
        predict = prediction if isinstance(self.steps, str) else prediction_of_steps
        program = code if isinstance(self.steps, str) else self.steps
        predicted, ambiguous = predict(program, weights, [t.double() for t in tables], x_t)
        words = keys, points, sign.double()
        want = truth.residual(predicted, x.double(), eps.double(), *words, *coefficients.double().unbind(1))
        if reference:
            data = x.double(), x_t.double(), eps.double()
            want = want - Reference.from_tensors(reference).residual(*data, alpha, sigma)
        self.want, self.ambiguous = want, ambiguous.expand_as(want)
        self.f = torch.full(want.shape, float("nan"), device=device)  # an element that no thread writes shows

    def errors(self) -> Errors:
        return Errors(
            (self.f.cpu() - self.want).abs() / self.want.square().mean().sqrt(), self.ambiguous, self.operands
        )


def emulate(
    library: ctypes.CDLL,
    device: tuple[int, int],
    problem: Problem,
    schedule: int = 0,
    config: cuda.Config | None = None,
    multiprocessors: int = 5,
) -> None:
    """Run a problem on the emulated device, whose threads take turns by `schedule`."""
    library.emulator_device(*divmod(device[0], 10), multiprocessors)
    library.emulator_seed(ctypes.c_uint64(7), schedule)
    cuda.launch(Module(library, device), problem.packed, problem.f, 0, 0, config or cuda.Config())


def compare(library: ctypes.CDLL, device: tuple[int, int], case: Case, schedule: int = 0) -> Errors:
    """Run a case by instructions on the emulated device."""
    problem = Problem(case)
    emulate(library, device, problem, schedule)
    return problem.errors()


def problem_of_steps(library: ctypes.CDLL, device: tuple[int, int], case: Case, made: tuple | None = None) -> Problem:
    """Return a problem as an emulated device dispatches it: as steps where they fit, else by instructions."""
    module = Module(library, device)
    return Problem(case, fitting=lambda *program: cuda_steps.fitting(*program, module, device), made=made)


def compare_steps(library: ctypes.CDLL, device: tuple[int, int], case: Case, schedule: int = 0) -> Errors:
    """Run a case as steps on the emulated device."""
    problem = problem_of_steps(library, device, case)
    assert isinstance(problem.steps, Steps), problem.steps
    emulate(library, device, problem, schedule)
    return problem.errors()

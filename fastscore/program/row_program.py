r"""RowProgram: the partial evaluation of a score network on rows that share their times.

A density evaluates its network on B samples at the same R times. Everything in the network that depends on the time
alone, or on conditions that the batch shares, is evaluated once per draw, what depends on a sample's own conditions
once per sample, and the rest becomes straight-line code (`fastscore.ops.instructions`) for one accumulator.

    >>> program = RowProgram.trace(model, (16,), time)
    >>> weights, tables = program.bind(time)
    >>> prediction = run(program.code, weights, tables, x_t)  # (B, R, 16)
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor, nn

from ..ops.instructions import Act, Add, Affine, Bound, Instruction, Linear, NoProgram, Norm, Save
from ..ops.interpreter import run, run_differentiably
from ..process.conditions import Conditions, has_shape
from ..process.taken_dtype import model_dtype
from ..support.compiled import Compiled
from ..support.host import chosen
from ..support.structure import is_plain
from ..support.untouched import layers_of, uncompiled
from ..support.warn import warn
from .chain import Matched, Table
from .code_reader import watch_calls, watch_code
from .hoisting import BOTH, Hoisted, Values
from .matching import match
from .module_state import restored
from .tracing import SAMPLE, TIME, Traced, X, operation_of, refuse_layers, trace
from .verification import ProgramMismatch, check
from .watch import Watch, exactly

__all__ = ["Act", "Add", "Affine", "Bound", "Linear", "NoProgram", "Norm", "RowProgram", "Save", "run"]

MODES = (True, False, "auto")
# torch.export keeps state of the whole process: hooks of all modules, stand-ins for the network's own parameters, and
# symbolic sizes, which matching compares. Two traces at once break each other and all that follow, and who looks at a
# network or at the hooks meanwhile sees what is no part of them.
ONE_AT_A_TIME = threading.RLock()
MIN_SPARED = 0.1
MOST_TRACES = 8  # of a network whose settings change, until it runs itself


class RowProgram:
    """The row program of a network for one shape of data and one structure of conditions.

    `code` is a list of instructions; `bind` gives the tensors that they index. Make one with `trace`.
    """

    def __init__(self, model: nn.Module, traced: Traced, matched: Matched, dtype: torch.dtype, watch: Watch) -> None:
        self.model, self.traced, self.matched, self.dtype, self.watch = model, traced, matched, dtype, watch
        self.code: list[Instruction] = matched.code
        nodes = [table for table, _ in matched.tables if not isinstance(table, int | float)]
        self.hoisted = Hoisted(traced, [*matched.weights, *nodes])

    @classmethod
    def trace(
        cls,
        model: nn.Module,
        shape: tuple[int, ...],
        time: Tensor,
        own: dict[str, Tensor] | None = None,
        shared: dict[str, object] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> RowProgram:
        """Return the program of a network, checked against the network on random rows.

        Arguments:
            model: called as `model(x_t, t, **own, **shared)` with x_t (rows, *shape).
            time: example times, (R,), as the network gets them.
            own: conditions with one entry a sample, e.g. those of a first batch.
            shared: conditions shared by the batch: tensors, numbers, strings, and lists or dicts of these.
            dtype: of x_t.

        Raises:
            NoProgram: naming the first layer that does not fit, and why.
            ProgramMismatch: if program and network differ: the network is not deterministic, or we are wrong.
        """
        return cls.of(model, shape, time, Conditions(own or {}, shared or {}), dtype)

    @classmethod
    def of(
        cls, model: nn.Module, shape: tuple[int, ...], time: Tensor, cond: Conditions, dtype: torch.dtype
    ) -> RowProgram:
        """Return the program under conditions that may be nested, as `trace`; it knows them by their paths."""
        x_t = torch.zeros(1, *shape, dtype=dtype, device=time.device)
        devices = [time.device] if time.is_cuda else []
        with ONE_AT_A_TIME, uncompiled(), torch.random.fork_rng(devices), restored(model):
            refuse_layers(model, x_t, time[:1], cond)
            watch = watch_code(model)
            try:
                traced = trace(model, x_t, time[:1], cond, watch)
                program = cls(model, traced, match(traced), dtype, watch)
            except NoProgram:
                raise
            except Exception as error:  # of a graph that nobody foresaw: its network runs without a program
                raise NoProgram(f"its graph cannot be read: {type(error).__name__}: {error}") from error
            finally:
                watch.put_back()  # no cache may keep the tensors of a trace
            check(program, shape, time, cond)
            watch_calls(watch)
        return program

    @cached_property
    def compiled(self) -> Compiled:
        """What makes the output of weights, tables and x_t, compiled; in place it would be nothing to fuse."""
        return Compiled(partial(run_differentiably, self.code))

    @cached_property
    def levels(self) -> tuple[str, ...]:
        """Of every table, what it has one entry of: "r", a draw; "b", a sample; "br", a pair of them."""
        names = {0: "r", TIME: "r", SAMPLE: "b", BOTH: "br"}
        return tuple(names[_level(table)] for table, _ in self.matched.tables)

    @property
    def spared(self) -> float:
        """The share of the network's multiplications that a row does not repeat; the rest of them stays."""
        return 1 - (self._multiplications[X] + self._multiplications[BOTH]) / max(
            1, sum(self._multiplications.values())
        )

    @property
    def pays(self) -> bool:
        """Whether fewer operations a row make up for tables with one entry a row, which networks do without."""
        return self._multiplications[BOTH] == 0 or self.spared >= MIN_SPARED

    @cached_property
    def _multiplications(self) -> dict[int, int]:
        """Multiplications of matrices by what they depend on; parameters alone do not count.

        Columns of a layer that is given more than x count by what is in them.
        """
        found = {0: 0, TIME: 0, SAMPLE: 0, BOTH: 0, X: 0}
        for node in self.traced.graph.nodes:
            level = min(node.meta.get("level", 0), X)
            matrix = {"linear": 1, "mm": 1, "matmul": 1, "addmm": 2}.get(operation_of(node))
            if level and matrix and "val" in node.meta:
                found[level] += node.args[matrix].meta["val"].numel()
            columns = node.meta.get("multiplications", 0)
            found[level] += columns
            found[X] -= columns
        return found

    def reads(self) -> list[Tensor]:
        """Return the parameters and buffers that the program reads, as the network has them now."""
        leaves = self.hoisted.leaves.values()
        return [self.hoisted.state(self.model, name) for kind, name in leaves if kind == "state"]

    def at(self, time: Tensor, shared: dict[str, object] | None = None) -> Timed:
        """Evaluate what depends on parameters, the times (R,) and shared conditions; differentiable."""
        return Timed(self, self.hoisted.at(self.model, time, shared or {}), time.device)

    def at_each(self, times: Sequence[Tensor], shared: dict[str, object] | None = None) -> list[Timed]:
        """Return the program at several sets of times, all of which are evaluated together."""
        if len(times) == 1 or any(_level(table) & SAMPLE for table, _ in self.matched.tables):
            return [self.at(time, shared) for time in times]
        return self.at(torch.cat(list(times)), shared).parts([len(time) for time in times])

    def bind(
        self, time: Tensor, own: dict[str, Tensor] | None = None, shared: dict[str, object] | None = None
    ) -> Bound:
        """Return the tensors that the code indexes, from the module's present parameters; differentiable.

        Arguments:
            time: the draws' times, (R,), as the network gets them.
            own: conditions with one entry a sample, (B, ...).
            shared: conditions shared by the batch.

        Returns:
            Weights (out, in), and tables (1, 1, w), (1, R, w), (B, 1, w) or (B, R, w).
        """
        return self.at(time, shared).bind(own or {})


class Timed:
    """A program at given times: weights and tables that need no sample's condition are evaluated once, here."""

    def __init__(self, program: RowProgram, values: Values, device: torch.device) -> None:
        self.program, self.values, self.device = program, values, device
        hoisted = program.hoisted
        self.weights = [hoisted.value(values, node) for node in program.matched.weights]
        self.tables = [
            None if _level(table) & SAMPLE else self._table(values, table, width)
            for table, width in program.matched.tables
        ]

    def parts(self, sizes: list[int]) -> list[Timed]:
        """Return the same at so many of the times each, for a program none of whose tables need a sample's condition.

        A table is cut by one operation, so that the parts' gradients come together in one.
        """
        pairs = zip(self.tables, self.program.levels)
        tables = [
            table.split(sizes, 1) if level == "r" and table.shape[1] > 1 else [table] * len(sizes)
            for table, level in pairs
        ]
        found = [copy(self) for _ in sizes]
        for part, own in zip(found, zip(*tables) if tables else [()] * len(sizes)):
            part.tables = list(own)
        return found

    def bind(self, own: dict[str, Tensor]) -> Bound:
        """Return weights and all tables, given the conditions with one entry a sample."""
        if not own:
            return Bound(self.weights, self.tables)
        values = self.program.hoisted.with_samples(self.values, own)
        tables = [
            self._table(values, *wanted) if table is None else table
            for table, wanted in zip(self.tables, self.program.matched.tables)
        ]
        return Bound(self.weights, tables)

    def predict(self, x_t: Tensor, own: dict[str, Tensor], compiled: bool = False) -> Tensor:
        """Return the network's prediction for every row, (B, R, d), in the dtype of x_t (B, R, d)."""
        weights, tables = self.bind(own)
        evaluate = self.program.compiled if compiled else partial(run, self.program.code)
        return evaluate(weights, tables, x_t.to(self.program.dtype)).to(x_t.dtype)

    def _table(self, values: Values, table: Table, width: int) -> Tensor:
        level = _level(table)
        if isinstance(table, int | float):
            return torch.full((1, 1, width), table, dtype=self.program.dtype, device=self.device)
        value = self.program.hoisted.value(values, table)
        if not isinstance(value, Tensor):  # a number that the network read of a tensor
            return torch.full((1, 1, width), value, dtype=self.program.dtype, device=self.device)
        value = value.to(self.program.dtype)
        if value.ndim == 0 and value.device != self.device:
            # The network's number may lie on the host: a factor brings it here without a copy, in a graph too.
            value = value * torch.ones((), dtype=value.dtype, device=self.device)
        draws, batch = values.rows[TIME] if level & TIME else 1, values.rows[SAMPLE] if level & SAMPLE else 1
        if value.ndim > 1:
            value = value.reshape(batch, draws, value.shape[-1])
        return value.expand(batch, draws, width)


def _level(table: Table) -> int:
    return 0 if isinstance(table, int | float) else table.meta["level"]


@dataclass(frozen=True)
class _Found:
    """An entry of the cache: a program, or the reason why there is none."""

    model: nn.Module  # kept, so that its id stays its own
    program: RowProgram | None
    reason: str = ""
    traces: int = 0

    def changed(self) -> tuple[str, object] | None:
        """Return where the network reads something else than when it was traced, and what; None if nowhere."""
        return self.program and self.program.watch.changed()


class Programs:
    """The programs of one network by structure of data and conditions, traced at first use.

    Arguments:
        mode: True raises where a network has no program, "auto" and False say None; False never traces. Where a program
            differs from a network that gives its own answer twice, True raises, and "auto" warns and says None.
    """

    def __init__(self, mode: bool | str = "auto") -> None:
        if not chosen(mode, MODES):
            raise ValueError(f"program must be True, False or 'auto', got {mode!r}")
        self.mode = mode
        self._found: dict[object, _Found] = {}

    def __reduce__(self) -> tuple:
        return Programs, (self.mode,)  # programs are no state: a copy traces its own network

    def find(
        self,
        model: nn.Module,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        cond: Conditions,
        times: Callable[[], Tensor],
        time_dtype: torch.dtype,
    ) -> RowProgram | None:
        """Return the network's program, or None.

        Arguments:
            dtype: of the sums; the network gets x_t in the dtype that it takes.
            device, cond: of the data, and conditions of a batch.
            times: gives four times of the schedule, on the CPU, for a trace.
            time_dtype: as the network gets them.

        Raises:
            NoProgram: in mode True, with the reason.
            ProgramMismatch: as `RowProgram.trace`, in mode "auto" only if the network gives another answer every time.
        """
        if self.mode is False:
            return None
        try:
            return self.need(model, shape, dtype, device, cond, times, time_dtype)
        except NoProgram:
            if self.mode is True:
                raise
            return None

    def need(
        self,
        model: nn.Module,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        cond: Conditions,
        times: Callable[[], Tensor],
        time_dtype: torch.dtype,
    ) -> RowProgram:
        """Return the network's program as `find` does, or raise NoProgram with the reason in every mode."""
        if self.mode is False:
            raise NoProgram("program=False is set")
        if device.type == "meta":
            raise NoProgram("its parameters are on the meta device, where they have no values")
        if torch.is_autocast_enabled(device.type):
            raise NoProgram("autocast chooses dtypes layer by layer")
        found = self._look_up(model, shape, model_dtype(model, dtype), device, cond, times, time_dtype)
        if found.program is None:
            raise NoProgram(found.reason)
        if self.mode == "auto" and not found.program.pays:
            raise NoProgram("most of its work depends on time and a sample's condition together")
        return found.program

    def _look_up(
        self,
        model: nn.Module,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        cond: Conditions,
        times: Callable[[], Tensor],
        time_dtype: torch.dtype,
    ) -> _Found:
        training = tuple(layer.training for layer in layers_of(model))
        where = (time_dtype, device, torch.is_grad_enabled(), torch.get_default_dtype())
        key = (id(model), shape, dtype, where, training, _structure(cond))
        found = self._found.get(key)
        if found is not None and not found.changed():
            return found
        with ONE_AT_A_TIME:  # another thread may have traced it meanwhile, or its trace looked like a change
            found = self._found.get(key)
            stale = found and found.changed()
            if found is None or stale:
                found = self._trace(model, shape, times().to(device, time_dtype), cond, dtype, found, stale)
                self._keep(key, found)
        return found

    def _keep(self, key: object, found: _Found) -> None:
        """Keep an entry, and of older networks those of the last one alone."""
        models = list({id(entry.model): entry.model for entry in self._found.values()}.values())
        kept = [found.model, *[model for model in models if model is not found.model][-1:]]
        entries = {k: e for k, e in self._found.items() if any(e.model is model for model in kept) and k != key}
        self._found = entries | {key: found}

    def _trace(
        self,
        model: nn.Module,
        shape: tuple[int, ...],
        time: Tensor,
        cond: Conditions,
        dtype: torch.dtype,
        before: _Found | None,
        stale: tuple[str, object] | None,
    ) -> _Found:
        traces = before.traces + 1 if before else 1
        try:
            if traces > MOST_TRACES:
                raise NoProgram(f"{stale[0]} has changed its {stale[1]!r} again after {MOST_TRACES} traces")
            return _Found(model, RowProgram.of(model, shape, time, cond, dtype), traces=traces)
        except NoProgram as reason:
            return _Found(model, None, str(reason))
        except ProgramMismatch as mismatch:
            if self.mode is True or not mismatch.steady:
                raise
            warn(f"the network runs without its row program: {mismatch}, without this warning; please report it")
            return _Found(model, None, str(mismatch))


def _structure(cond: Conditions) -> object:
    """Return what of the conditions a graph depends on; raise NoProgram for objects that it cannot see into."""
    shared = []
    for name, value in sorted(cond.shared.items()):
        if has_shape(value):
            shared.append((name, tuple(value.shape), value.dtype, value.device))
        elif is_plain(value):
            shared.append((name, type(value), exactly(value)))
        else:
            raise NoProgram(f"condition {name!r} is a {type(value).__name__}, neither a tensor nor a number or text")
    own = tuple((k, tuple(v.shape[1:]), v.dtype) for k, v in sorted(cond.per_sample.items()))
    return own, tuple(shared), cond.structure and cond.structure.key

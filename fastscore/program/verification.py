"""Check a row program against its network on random rows, so that neither is ever silently wrong."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.fx.node import map_arg
from torch.utils._pytree import tree_map

from ..ops.instructions import NoProgram
from ..ops.interpreter import run
from ..process.conditions import Conditions
from ..process.network import read_output
from .tracing import layer_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Protocol

    from torch import fx

    from ..ops.instructions import Bound, Instruction
    from .chain import Matched
    from .hoisting import Hoisted
    from .tracing import Traced

    class _Program(Protocol):  # a `RowProgram`, which is made of what is here
        model: nn.Module
        traced: Traced
        matched: Matched
        dtype: torch.dtype
        code: list[Instruction]
        hoisted: Hoisted

        def bind(
            self, time: Tensor, own: dict[str, Tensor] | None = None, shared: dict[str, object] | None = None
        ) -> Bound: ...


SIZES = ((2, 3), (5, 4))  # samples, draws
# Program and network do the same sums in another order: a few roundings a layer, of values that may cancel.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}
ROUNDINGS = 1024  # of x_t, below which an answer may be the remainder of a difference
OWN_ROUNDINGS = 4  # times what the network's own rounding is: that of a program may be as large, another way


class ProgramMismatch(RuntimeError):
    """A network and its row program give different values; `steady` says whether the network gives its own twice."""

    def __init__(self, message: str, steady: bool) -> None:
        super().__init__(message)
        self.steady = steady

    def __reduce__(self) -> tuple:
        return ProgramMismatch, (*self.args, self.steady)


@torch.no_grad()
def check(program: _Program, shape: tuple[int, ...], time: Tensor, cond: Conditions) -> None:
    """Compare a program with its network at two sizes of batch.

    Arguments:
        program: a `RowProgram`.
        shape, time, cond: as in `RowProgram.trace`.

    Raises:
        ProgramMismatch: naming the first layer whose value differs.
        NoProgram: where they differ by roundings of x_t, which is all that the network's answer consists of, or by no
            more than the network in float64 differs from itself; and where a trace tells the names of a layer apart.
    """
    generator = torch.Generator().manual_seed(0)
    for batch, draws in SIZES:
        size = batch, draws, torch.Size(shape).numel()
        x_t = torch.randn(size, generator=generator, dtype=torch.float64, device="cpu")
        x_t = x_t.to(time.device, program.dtype)
        at = time[torch.arange(draws, device=time.device) % len(time)]
        some = cond.select(torch.arange(batch, device=time.device) % _samples(cond.per_sample))
        passed = x_t.reshape(-1, *shape)
        args, kwargs = (passed, at.repeat(batch)), some.copy().repeated(draws)  # the network may write into them
        try:
            expected = read_output(program.model(*args, **kwargs), passed)  # without hooks, which its code may look at
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError, ValueError) as error:  # a trace does not look at all dtypes; a call says so
            raise NoProgram(f"the network itself raises {type(error).__name__}: {error}") from error
        weights, tables = program.bind(at, some.per_sample, some.shared)
        found = run(program.code, weights, tables, x_t)
        if _close(found, expected.reshape(found.shape)):
            continue
        apart = float((found - expected.reshape(found.shape)).abs().max())
        if apart < ROUNDINGS * torch.finfo(x_t.dtype).eps:
            raise NoProgram("its answers are roundings of x_t, by which no program can be checked")
        if apart < OWN_ROUNDINGS * _own_rounding(program.model, args, kwargs, expected):
            raise NoProgram(f"its answers in {x_t.dtype} are no closer to those in float64 than a program's")
        error = apart / float(expected.abs().max())
        layers = _outputs_of_layers(program.model, args, kwargs)
        layer = _first_difference(program, (weights, tables, x_t), args, some.leaves(draws), layers)
        again = read_output(program.model(*args, **kwargs), passed)
        steady = _close(again.reshape(found.shape), expected.reshape(found.shape))
        if steady and (names := _names_of_one(program.model)):
            raise NoProgram(f"{' and '.join(map(repr, names))} are one layer, and its code tells them apart in a trace")
        raise ProgramMismatch(
            f"the network and its row program differ by {error:.3g} of the largest value, first in layer {layer!r}; "
            + ("this is a bug of fastscore" if steady else "the network gives another answer every time")
            + ". program=False evaluates the network itself",
            steady,
        )


def _names_of_one(model: nn.Module) -> list[str]:
    """Return the names of the first layer that has several: torch.export has another object for each of them."""
    found: dict[nn.Module, list[str]] = {}
    for name, layer in model.named_modules(remove_duplicate=False):
        found.setdefault(layer, []).append(name or "forward")
    return next((names for names in found.values() if len(names) > 1), [])


def _samples(own: dict[str, Tensor]) -> int:
    return len(next(iter(own.values()))) if own else 1


def _close(found: Tensor, expected: Tensor) -> bool:
    """Compare to the largest value of each draw, or of all rows for values of other shapes."""
    if found.shape != expected.shape:
        return False
    size = expected.abs().double()
    size = size.amax((0, 2), keepdim=True) if expected.ndim == 3 else size.amax()
    error = (found.double() - expected.double()).abs()
    same = (error <= TOLERANCE[found.dtype] * size + 1e-30) | (found.isnan() & expected.isnan())
    return bool((same | (found == expected)).all())


def _own_rounding(model: nn.Module, args: tuple[Tensor, Tensor], kwargs: dict[str, object], expected: Tensor) -> float:
    """Return how far answers are from the network's in float64; zero where it has none, or others at every call."""

    def double(value: Any) -> Any:
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    try:
        if not torch.equal(read_output(model(*args, **kwargs), args[0]), expected):
            return 0.0
        exact = copy.deepcopy(model).double()(*map(double, args), **tree_map(double, kwargs))
        return float((read_output(exact, double(args[0])) - expected).abs().max())
    except Exception:  # whatever a network raises that knows its own dtype alone
        return 0.0


def _outputs_of_layers(
    model: nn.Module, args: tuple[Tensor, Tensor], kwargs: dict[str, object]
) -> list[tuple[str, Tensor]]:
    """Return the tensors that a network's layers return, in the order of their calls."""
    layers: list[tuple[str, Tensor]] = []

    def keep(name: str) -> Callable[[nn.Module, tuple[Any, ...], object], None]:
        def hook(_: nn.Module, args: tuple[Any, ...], output: object) -> None:
            if isinstance(output, Tensor):
                layers.append((name, output.clone()))

        return hook

    hooks = [layer.register_forward_hook(keep(name)) for name, layer in model.named_modules() if name]
    try:
        model(*args, **kwargs)
        return layers
    finally:
        for handle in hooks:
            handle.remove()


def _first_difference(
    program: _Program,
    bound: tuple[list[Tensor], list[Tensor], Tensor],
    args: tuple[Tensor, Tensor],
    leaves: dict[str, object],
    layers: list[tuple[str, Tensor]],
) -> str:
    """Return the first layer whose value in the exported graph is not the network's, or not the program's."""
    values = _values_of_graph(program, args, leaves)
    by_layer = {}
    for node, value in values.items():
        if isinstance(value, Tensor):
            by_layer[layer_of(node)] = value
    for name, output in layers:
        if name in by_layer and by_layer[name].dtype in TOLERANCE and not _close(by_layer[name], output):
            return name
    weights, tables, x_t = bound
    for done, core in enumerate(program.matched.cores, 1):
        if core is not None and core.node is not None:
            found = run(program.code[:done], weights, tables, x_t)
            if not _close(found, values[core.node].reshape(found.shape)):
                return core.layer
    return "forward"


def _values_of_graph(program: _Program, args: tuple[Tensor, Tensor], leaves: dict[str, object]) -> dict[fx.Node, Any]:
    sources = {"x": lambda _: args[0], "time": lambda _: args[1], "constant": lambda value: value}
    sources |= dict.fromkeys(("sample", "shared"), leaves.__getitem__)
    sources["state"] = lambda name: program.hoisted.state(program.model, name)
    values = {}
    for node in program.traced.graph.nodes:
        if node.op == "placeholder":
            kind, name = program.traced.leaves[node]
            values[node] = sources[kind](name)
        elif node.op == "call_function":
            fetch = values.__getitem__
            values[node] = node.target(*map_arg(node.args, fetch), **map_arg(node.kwargs, fetch))
    return values

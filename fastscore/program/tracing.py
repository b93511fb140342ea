r"""Export a network and split its graph: what depends on x, and what can be computed once per draw or per sample.

`trace` returns the graph of ATen operations in which every node knows its level, the set of inputs that it depends on:

======================  ==========================  ===============
level                   depends on                  evaluated on
======================  ==========================  ===============
``0``                   parameters alone            one row
``TIME``                t                           R rows
``SAMPLE``              conditions of the samples   B rows
``TIME | SAMPLE``       both                        B R rows
``X``, with any of them  x                           by the program
======================  ==========================  ===============

`Hoisted` evaluates everything below `X`, with the module's present parameters and under autograd if that is on.
"""

from __future__ import annotations

import logging
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import is_fake
from torch.fx.node import map_arg
from torch.overrides import TorchFunctionMode

from ..ops.instructions import NoProgram
from ..process.conditions import Conditions
from ..process.network import read_output
from ..support.host import layout_of
from ..support.untouched import forget_tensors, hooks_of_all_modules_kept
from .module_state import attributes_restored, refuse_changes
from .watch import Watch

if TYPE_CHECKING:
    from typing import TextIO

    from torch.fx.node import Argument
    from torch.utils.hooks import RemovableHandle

TIME, SAMPLE, X = 1, 2, 4
_NUMBERS = (torch.SymInt, torch.SymFloat, torch.SymBool)
EXAMPLE_ROWS = 7

# Operations that look at the shape (and dtype) of an argument alone, and which one.
SHAPE_ONLY = {
    **dict.fromkeys(("sym_size", "zeros_like", "ones_like", "full_like", "empty_like"), 0),
    **dict.fromkeys(("new_zeros", "new_ones", "new_full", "new_empty"), 0),
    **dict.fromkeys(("expand_as", "view_as", "type_as"), 1),
}
# What keeps values the same in every row, and at every number of rows, beside pointwise operations. Sums and the like
# do as long as they leave rows and so are not over them, which is seen by the shape.
_ROW_BY_ROW = frozenset({"view", "reshape", "_unsafe_view", "unsqueeze", "squeeze", "expand", "broadcast_to"})
_ROW_BY_ROW |= frozenset({"flatten", "unflatten", "transpose", "permute", "movedim", "swapaxes", "repeat", "tile"})
_ROW_BY_ROW |= frozenset({"slice", "select", "narrow", "split", "split_with_sizes", "chunk", "unbind", "getitem"})
_ROW_BY_ROW |= frozenset({"detach", "clone", "contiguous", "to", "_to_copy", "alias", "cat", "stack", *SHAPE_ONLY})
_ROW_BY_ROW |= frozenset({"linear", "matmul", "mm", "bmm", "addmm", "layer_norm", "rms_norm", "embedding"})
_ROW_BY_ROW |= frozenset({"copy", "slice_scatter", "select_scatter", "flip", "roll"})
_ROW_BY_ROW |= frozenset({"sum", "mean", "var", "std", "prod", "amax", "amin", "linalg_vector_norm"})
# Attributes of tensors that a trace does not have, or of its own: it takes copies, without a history.
_HISTORY = frozenset(
    {"grad", "_grad", "grad_fn", "_version", "is_leaf", "output_nr", "retains_grad", "_backward_hooks"}
)
# Methods that make Python's numbers, or numpy's, of a tensor.
_TO_PYTHON = frozenset({"item", "tolist", "numpy", "__array__", "__bool__", "__float__", "__int__", "__index__"})
_TO_PYTHON |= frozenset({"__complex__", "__contains__", "__format__", "__repr__", "data_ptr", "__dlpack__"})
_TRACERS = ("torch.export", "torch._export", "torch._dynamo", "torch._subclasses")
_TRACERS += ("torch.fx.experimental.symbolic_shapes",)
# Layers that no row program holds: found before the export, which takes long for the networks they are in.
_NEVER = (
    *(nn.modules.conv._ConvNd, nn.GroupNorm, nn.modules.instancenorm._InstanceNorm, nn.RNNBase),
    *(nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer),
)


@dataclass(frozen=True)
class Traced:
    """A graph whose nodes carry `meta["level"]` and `meta["rows"]`, whether their first dimension is that of the rows.

    `leaves` tells where every placeholder's value comes from: ("state", name), ("constant", tensor), ("x", ""),
    ("time", ""), ("sample", name) or ("shared", name).
    """

    graph: fx.Graph
    leaves: dict[fx.Node, tuple[str, object]]
    output: fx.Node

    def add(self, function: Callable[..., object], *args: Argument, **kwargs: Argument) -> fx.Node:
        """Append an operation on nodes that do not depend on x; its level follows from theirs."""
        with self.graph.inserting_before(self.graph.output_node()):
            node = self.graph.call_function(function, args, kwargs)
        inputs = node.all_input_nodes
        node.meta["level"] = reduce(int.__or__, (n.meta["level"] for n in inputs), 0)
        node.meta["rows"] = any(n.meta["rows"] for n in inputs)
        return node


class _Call(nn.Module):
    """The network as a function of tensors alone that returns one tensor of x_t's shape."""

    def __init__(
        self,
        model: nn.Module,
        constants: dict[str, object],
        build: Callable[[dict], dict],
        watch: Watch,
        note: Callable[[object], None],  # called with the mode of the export, first of all
    ) -> None:
        super().__init__()
        self.network, self.constants, self.build, self.watch, self.note = model, constants, build, watch, note

    def forward(self, x_t: Tensor, time: Tensor, own: dict[str, Tensor], shared: dict[str, Tensor]) -> Tensor:
        self.note(torch._guards.detect_fake_mode((x_t, time)))
        with _Numbers(self.watch.unseen):
            output = self.network(x_t, time, **self.build(own | shared | self.constants))
        refuse_changes(self.watch)
        return read_output(output, x_t)


class _Numbers(TorchFunctionMode):
    """Refuses what a trace would keep, and nobody compares: numbers of some tensors, and the history of any."""

    def __init__(self, unseen: dict[int, str]) -> None:
        super().__init__()
        self.unseen = unseen

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        first = args[0] if args else None
        name = getattr(function, "__name__", "")
        if name == "__get__" and (read := getattr(function.__self__, "__name__", "")) in _HISTORY:
            raise NoProgram(f"its code reads .{read} of a tensor, which a trace cannot follow")
        if name in _TO_PYTHON and isinstance(first, Tensor) and not is_fake(first):
            what = self.unseen.get(first.untyped_storage().data_ptr())
            if what is not None:
                raise NoProgram(f"{what}, of which the code takes numbers: too large to compare; make it a buffer")
        return function(*args, **kwargs or {})


def layer_of(node: fx.Node) -> str:
    """Return the name of the innermost layer that a node belongs to, or "forward" for the network itself."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    name = stack[-1][0] if stack else ""
    return name.removeprefix("network").removeprefix(".") or "forward"


def operation_of(node: fx.Node) -> str:
    """Return the bare name of a node's operation, such as "linear"."""
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.name.removeprefix("aten::")
    return getattr(node.target, "__name__", str(node.target))


def refuse(node: fx.Node, why: str) -> NoProgram:
    """Return the error that names a node's layer and operation."""
    return NoProgram(f"layer {layer_of(node)!r}, operation {operation_of(node)}: {why}")


def trace(model: nn.Module, x_t: Tensor, time: Tensor, cond: Conditions, watch: Watch) -> Traced:
    """Return the graph of `model(x_t, time, **cond)` for any number of rows.

    Arguments:
        x_t, time: examples, shapes (1, *shape) and (1,), in the dtypes that the network gets.
        cond: of one sample at least; shared ones that are no tensors become constants of the graph.

        watch: of what the network's code reads.

    Raises:
        NoProgram: if the network cannot be exported, is random, mixes rows, or changes what it reads.
    """
    tensors = {name: value for name, value in cond.shared.items() if isinstance(value, Tensor)}
    modes: list[object] = []
    constants = {name: value for name, value in cond.shared.items() if name not in tensors}
    call = _Call(model, constants, cond.build, watch, modes.append)
    own = {name: _example(value) for name, value in cond.per_sample.items()}
    rows = torch.export.Dim("rows")
    shapes = {
        "x_t": {0: rows},
        "time": {0: rows},
        "own": {name: {0: rows} for name in own},
        "shared": dict.fromkeys(tensors),
    }
    try:
        with _quiet(), hooks_of_all_modules_kept(), attributes_restored(model):
            args = (_example(x_t), _example(time), own, tensors)
            program = torch.export.export(call, args, dynamic_shapes=shapes, strict=False)
            for node in program.graph.nodes:
                _refuse_random(node)
            if any(_mutates(node) for node in program.graph.nodes):
                program = program.run_decompositions({})  # nothing is decomposed, but in-place operations become pure
    except NoProgram:
        raise
    except Exception as error:  # export raises whatever the network's code and the tracer raise
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        if reason.startswith("Constraints violated"):
            reason = "its code fixes the number of rows, as len(x) does; x.shape[0] does not"
        raise NoProgram(f"torch.export cannot trace the network: {reason}") from error
    finally:
        forget_tensors(modes)
    _refuse_kept_weights(program, model, watch)
    return _split(program, ["x", "time", *own, *tensors], len(own))


def _refuse_kept_weights(program: torch.export.ExportedProgram, model: nn.Module, watch: Watch) -> None:
    """Raise NoProgram for a constant of the graph that is a weight.

    The network's own has another place in memory after `weight.data = ...`; no other one would have a gradient.
    """
    weights = [(f"the parameter {name!r}", p) for name, p in model.named_parameters() if layout_of(p) is None]
    learned = {p.untyped_storage().data_ptr(): what for what, p in weights}
    learned |= watch.learned if torch.is_grad_enabled() else {}
    for value in program.constants.values():
        if isinstance(value, Tensor) and value.numel() and value.untyped_storage().data_ptr() in learned:
            what = learned[value.untyped_storage().data_ptr()]
            raise NoProgram(f"its code reads {what} by another way than its layer; register it, and read it from there")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep to itself what the tracer warns of and logs: a network without a program is nothing to worry about."""
    levels = {logger: logger.level for logger in map(logging.getLogger, _TRACERS)}
    stderr = _Muted(sys.stderr)
    try:
        for logger in levels:
            logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings(), redirect_stderr(stderr):  # it prints the graph where it gave up
            warnings.simplefilter("ignore")
            yield
    finally:
        stderr.muted = None  # a progress bar that another thread began meanwhile keeps it
        for logger, level in levels.items():
            logger.setLevel(level)


class _Muted:
    """A text stream that leaves out what the thread that made it writes."""

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.muted = stream, threading.get_ident()

    def write(self, text: str) -> int:
        return len(text) if threading.get_ident() == self.muted else self.stream.write(text)

    def __getattr__(self, name: str) -> object:
        return getattr(self.stream, name)


def refuse_layers(model: nn.Module, x_t: Tensor, time: Tensor, cond: Conditions) -> None:
    """Raise NoProgram for a layer that never fits and depends on x: NaN in x reaches its output."""
    found: list[str] = []

    def hook(name: str, layer: nn.Module) -> RemovableHandle:
        def look(_: nn.Module, args: tuple[Any, ...], output: object) -> None:
            output = output[0] if isinstance(output, tuple) else output
            if isinstance(output, Tensor) and bool(output.isnan().any()) and not found:
                found.append(f"layer {name!r} is a {type(layer).__name__}, which no row program holds")

        return layer.register_forward_hook(look)

    hooks = [hook(name, layer) for name, layer in model.named_modules() if isinstance(layer, _NEVER)]
    if not hooks:
        return
    try:
        with torch.no_grad():
            model(torch.full_like(x_t, torch.nan), time, **cond.select(slice(0, 1)).copy().repeated(1))
    except Exception as error:
        raise NoProgram(f"the network does not take NaN: {type(error).__name__}: {error}") from error
    finally:
        for handle in hooks:
            handle.remove()
    if found:
        raise NoProgram(found[0])


def _example(value: Tensor) -> Tensor:
    return value.detach()[torch.arange(EXAMPLE_ROWS, device=value.device) % len(value)]


def _refuse_random(node: fx.Node) -> None:
    if not isinstance(node.target, torch._ops.OpOverload):
        return
    name = operation_of(node)
    if torch.Tag.nondeterministic_seeded in node.target.tags and not _is_quiet(node, name):
        raise refuse(node, "is random, so every evaluation differs (train mode?)")
    if name == "batch_norm" and node.args[5]:
        raise refuse(node, "takes its statistics from the batch in train mode")


def _mutates(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _split(program: torch.export.ExportedProgram, inputs: list[str], own: int) -> Traced:
    graph, signature = program.graph, program.graph_signature
    for node in list(graph.nodes):
        if operation_of(node) == "_assert_tensor_metadata":
            graph.erase_node(node)
    graph.eliminate_dead_code()
    kinds = torch.export.graph_signature.InputKind
    sources = iter([("x", ""), ("time", ""), *(("sample", k) for k in inputs[2 : 2 + own])])
    sources = [*sources, *(("shared", k) for k in inputs[2 + own :])]
    leaves, given = {}, iter(sources)
    placeholders = {node.name: node for node in graph.find_nodes(op="placeholder")}
    for spec in signature.input_specs:
        node = placeholders[spec.arg.name]
        if spec.kind is kinds.USER_INPUT:
            leaves[node] = next(given)
        elif spec.kind in (kinds.PARAMETER, kinds.BUFFER):
            leaves[node] = ("state", spec.target.removeprefix("network."))
        else:
            leaves[node] = ("constant", program.constants[spec.target])
    output = graph.output_node().args[0][-1]  # after the buffers that change
    symbol = next(n.meta["val"].shape[0] for n, source in leaves.items() if source[0] == "x")
    for node in graph.nodes:
        if node.op == "placeholder":
            node.meta["level"] = {"x": X, "time": TIME, "sample": SAMPLE}.get(leaves[node][0], 0)
            node.meta["rows"] = node.meta["level"] > 0
        elif node.op == "call_function":
            _classify(node, symbol)
    if signature.buffers_to_mutate or signature.user_inputs_to_mutate:
        raise NoProgram(f"the network changes its buffers: {', '.join(signature.buffers_to_mutate.values())}")
    return Traced(graph, leaves, output)


def _classify(node: fx.Node, symbol: torch.SymInt) -> None:
    """Set a node's level and whether it has rows; refuse what has effects or mixes rows."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # of the export, which takes long to import

    value = node.meta.get("val")
    if isinstance(node.target, torch._ops.HigherOrderOperator) or value is None:
        raise refuse(node, "is no plain operation on tensors")
    looked_at = SHAPE_ONLY.get(operation_of(node))
    inputs = [n for i, arg in enumerate(node.args) for n in _nodes_in(arg) if i != looked_at]
    inputs += _nodes_in(list(node.kwargs.values()))
    node.meta["level"] = level = reduce(int.__or__, (n.meta["level"] for n in inputs), 0)
    tensors = [v for v in (value if isinstance(value, list | tuple) else [value]) if isinstance(v, Tensor)]
    counted = tensors and operation_of(node) != "repeat_interleave"  # which takes the number as a size
    if counted and any(isinstance(n.meta.get("val"), _NUMBERS) for n in _nodes_of(node)):
        raise refuse(node, "depends on the number of rows")
    symbolic = [[isinstance(size, torch.SymInt) for size in v.shape] for v in tensors]
    node.meta["rows"] = any(map(any, symbolic)) or isinstance(value, torch.SymInt)
    if tensors and any(n.meta["rows"] and not n.meta["level"] and isinstance(n.meta["val"], Tensor) for n in inputs):
        by_row = torch.Tag.pointwise in getattr(node.target, "tags", ()) or operation_of(node) in _ROW_BY_ROW
        if not by_row or not node.meta["rows"]:
            raise refuse(node, "makes values of the number of rows")
    for v, dims in zip(tensors, symbolic):
        # A size that depends on values, as of the rows that a mask chooses, is known to be no size at all.
        if sum(dims) > 1 or (any(dims) and not statically_known_true(v.shape[dims.index(True)] == symbol)):
            raise refuse(node, "mixes rows")
        if level & X and not (dims and dims[0]):
            raise refuse(node, "mixes rows, or moves them from the first dimension")
        if level and not any(dims):
            raise refuse(node, "mixes rows")


def _nodes_of(node: fx.Node) -> list[fx.Node]:
    """Return the nodes that are arguments themselves, and not in a list as sizes are."""
    return [arg for arg in (*node.args, *node.kwargs.values()) if isinstance(arg, fx.Node)]


def _nodes_in(arg: object) -> list[fx.Node]:
    found: list[fx.Node] = []
    map_arg(arg, lambda n: found.append(n) or n)
    return found


def _is_quiet(node: fx.Node, name: str) -> bool:
    """Return whether an operation that can be random is not: dropout in eval mode or of nothing."""
    if "dropout" in name:
        return not node.args[2] or node.args[1] == 0
    dropout = node.args[4] if len(node.args) > 4 else node.kwargs.get("dropout_p", 0)
    return name == "scaled_dot_product_attention" and dropout == 0

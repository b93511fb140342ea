r"""Match the x-part of a network's graph against the instructions of a row program.

Every node that depends on x becomes a value core * scale + shift: the accumulator after some instruction, and tables
that wait to be composed into one `Affine`. Tables are nodes of the graph too, appended below the x-part, so that they
are evaluated once per draw or sample like everything else that does not depend on x.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, fx

from ..ops.activations import ACTIVATIONS
from ..ops.instructions import Act, Add, Instruction, Linear, NoProgram, Norm
from .chain import Concat, Core, Matched, Split, Table, Value, emit
from .tables import Tables
from .tracing import Traced, X, layer_of, operation_of, refuse

_SAME = {"view", "_unsafe_view", "view_as", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze"}
_SAME |= {"expand", "broadcast_to", "clone", "contiguous", "to", "_to_copy", "alias", "dropout"}


def match(traced: Traced) -> Matched:
    """Return the program of a graph.

    Raises:
        NoProgram: naming the first node that does not match.
    """
    matcher = Matcher(traced)
    for node in list(traced.graph.nodes):
        if node.meta.get("level", 0) & X:
            matcher.visit(node)
    if traced.output not in matcher.values:
        raise NoProgram("the network's output does not depend on x")
    value = matcher.values[traced.output]
    if not isinstance(value, Value):
        raise refuse(traced.output, "the output is a concatenation")
    return emit(value.settled(traced.output))


class Matcher:
    """Makes a value of every node that depends on x, by the method `on_<operation>`."""

    def __init__(self, traced: Traced) -> None:
        self.tables = Tables(traced)
        self.values: dict[fx.Node, Value | Concat | Split] = {}

    def visit(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            width = math.prod(node.meta["val"].shape[1:])
            self.x_dtype, self.values[node] = node.meta["val"].dtype, Value(Core(None, None, width, "x_t", node))
            return
        name, value = operation_of(node), node.meta["val"]
        if isinstance(value, Tensor) and value.dtype != self.x_dtype:
            raise refuse(node, f"computes in {value.dtype}, not in the {self.x_dtype} of x")
        own = getattr(self, "on_same" if name in _SAME else f"on_{name}", None)
        found = own or (self.on_act if name in ACTIVATIONS and len(node.args) == 1 else None)
        if found is None and name in ACTIVATIONS:
            raise refuse(node, f"has arguments beside x, {', '.join(map(str, node.args[1:]))}, and no rule for them")
        if found is None:
            raise refuse(node, "is no instruction of a row program")
        value = found(node)
        users = [user for user in node.users if user.meta.get("level", 0) & X]
        if len(users) > 1 and isinstance(value, Value):
            value = Value(value.settled(node))  # once, before it is saved
        self.values[node] = value

    def next(
        self,
        op: Instruction | type,
        value: Value,
        node: fx.Node,
        width: int | None = None,
        weight: fx.Node | None = None,
        exact: bool = True,
    ) -> Core:
        """Return the core after one more instruction; `exact` says whether it has the node's value.

        A new width comes with it, and the weight of a `Linear`.
        """
        return Core(op, value.settled(), width or value.width, layer_of(node), node if exact else None, weight)

    # One method an operation.

    def on_same(self, node: fx.Node) -> Value | Concat:
        value, shape = self.values[node.args[0]], node.meta["val"].shape
        if math.prod(shape[1:]) != value.width or (isinstance(value, Concat) and shape[-1] != value.width):
            raise refuse(node, "repeats x, or reshapes a concatenation")
        return value

    def on_act(self, node: fx.Node) -> Value | Concat:
        return self._activate(node, Act(operation_of(node)))

    def on_gelu(self, node: fx.Node) -> Value | Concat:
        tanh = "tanh" in (*node.args[1:], *node.kwargs.values())
        return self._activate(node, Act("gelu_tanh" if tanh else "gelu"))

    def on_elu(self, node: fx.Node) -> Value | Concat:
        if any(argument != 1 for argument in node.args[1:]):
            raise refuse(node, "only alpha = 1 is an instruction")
        return self._activate(node, Act("elu"))

    def on_softplus(self, node: fx.Node) -> Value | Concat:
        if tuple(node.args[1:]) not in ((), (1,), (1.0, 20.0)):
            raise refuse(node, "only beta = 1 and threshold = 20 are an instruction")
        return self._activate(node, Act("softplus"))

    def _activate(self, node: fx.Node, act: Act) -> Value | Concat:
        value = self.values[node.args[0]]
        if isinstance(value, Concat):
            parts = [
                Value(self.next(act, part, node, exact=False))
                if isinstance(part, Value)
                else self.tables.like(node, part)
                for part in value.parts
            ]
            return value._replace(parts=tuple(parts))
        return Value(self.next(act, value, node))

    def on_layer_norm(self, node: fx.Node) -> Value | Concat:
        value, shape = self._plain(node, node.args[0]), node.args[1]
        if math.prod(shape) != value.core.width:
            raise refuse(node, f"norms {list(shape)} of {value.core.width} columns")
        weight, bias, eps = (*node.args[2:5], *(None, None, 1e-5)[len(node.args) - 2 :])[:3]
        core = self.next(Norm(eps), value, node, exact=weight is None and bias is None)
        inner = tuple(shape)
        scale = 1.0 if weight is None else self._table(weight, inner)
        return Value(core, scale, 0.0 if bias is None else self._table(bias, inner))

    def on_linear(self, node: fx.Node) -> Value | Concat:
        x, weight, bias = (*node.args, None)[:3]
        return self._multiply(node, x, weight, bias)

    def on_addmm(self, node: fx.Node) -> Value | Concat:
        bias, x, weight = node.args
        if node.kwargs:
            raise refuse(node, "has factors")
        return self._multiply(node, x, self._transposed(node, weight), bias)

    def on_mm(self, node: fx.Node) -> Value | Concat:
        x, weight = node.args
        return self._multiply(node, x, self._transposed(node, weight), None)

    on_matmul = on_mm

    def _transposed(self, node: fx.Node, weight: fx.Node) -> fx.Node:
        if weight.meta["level"] & X or weight.meta["val"].ndim != 2:
            raise refuse(node, "is no product of x with a matrix")
        return self.tables.transposed(weight)

    def _multiply(self, node: fx.Node, x: fx.Node, weight: fx.Node, bias: fx.Node | None) -> Value:
        if weight.meta["level"] or (bias is not None and bias.meta["level"] & X):
            raise refuse(node, "its weights depend on x, t or a condition")
        if x not in self.values:
            raise refuse(node, "multiplies from the left")
        value, out = self.values[x], node.meta["val"].shape[-1]
        if x.meta["val"].shape[-1] != value.width:
            raise refuse(node, f"acts on the last dimension of {_inner(x)} alone")
        shift = 0.0 if bias is None else self._table(bias, (out,))
        if isinstance(value, Value):
            return Value(self.next(Linear, value, node, out, weight, exact=bias is None), 1.0, shift)
        columns = [(part, self.tables.columns(weight, *range_)) for part, range_ in zip(value.parts, value.ranges())]
        x_part, own = next((part, own) for part, own in columns if isinstance(part, Value))
        product = Value(self.next(Linear, x_part, node, out, own, exact=False), 1.0, shift)
        for (part, own), (start, stop) in zip(columns, value.ranges()):
            if part is not x_part:
                product = self.tables.shifted(product, self.tables.linear(part, own, (stop - start) * out))
        return product

    def on_cat(self, node: fx.Node, dim: int = 0) -> Concat:
        nodes, dim = (*node.args, dim)[:2]
        shape = node.meta["val"].shape
        if dim % len(shape) != len(shape) - 1 or any(size != 1 for size in shape[1:-1]):
            raise refuse(node, f"concatenates along dimension {dim}; only features can be")
        parts, starts, width = [], [], 0
        for part in nodes:
            starts.append(width)
            width += part.meta["val"].shape[-1]
            if part in self.values:
                parts.append(self._plain(node, part))
            else:
                parts.append(self._table(part, _inner(part)))
        if sum(isinstance(part, Value) for part in parts) != 1:
            raise refuse(node, "concatenates two values that depend on x")
        return Concat(tuple(parts), tuple(starts), width)

    on_concat = on_concatenate = on_cat

    def on_hstack(self, node: fx.Node) -> Value | Concat:
        return self.on_cat(node, 1)

    def on_add(self, node: fx.Node, sign: int = 1) -> Value | Concat:
        a, b = node.args
        factor = sign * node.kwargs.get("alpha", 1)
        if self._depends(a) and self._depends(b):
            return self._sum(node, self._plain(node, a), self.tables.scaled(self._plain(node, b), factor))
        if self._depends(a):
            return self.tables.shifted(self.values[a], self.tables.times(self._operand(node, a, b), factor))
        return self.tables.shifted(self.tables.scaled(self.values[b], factor), self._operand(node, b, a))

    def on_sub(self, node: fx.Node) -> Value | Concat:
        return self.on_add(node, -1)

    def on_rsub(self, node: fx.Node) -> Value | Concat:
        a, b = node.args  # b - alpha a
        minus_a = self.tables.scaled(self.values[a], -node.kwargs.get("alpha", 1))
        return self.tables.shifted(minus_a, self._operand(node, a, b))

    def on_neg(self, node: fx.Node) -> Value | Concat:
        return self.tables.scaled(self.values[node.args[0]], -1)

    def on_mul(self, node: fx.Node) -> Value | Concat:
        a, b = node.args
        if self._depends(a) and self._depends(b):
            return self._gated(node, self._plain(node, a), self._plain(node, b))
        x, table = (a, b) if self._depends(a) else (b, a)
        return self.tables.scaled(self.values[x], self._operand(node, x, table))

    def on_div(self, node: fx.Node) -> Value | Concat:
        a, b = node.args
        if node.kwargs or self._depends(b):
            raise refuse(node, "divides by a value that depends on x, or rounds")
        return self.tables.scaled(self.values[a], self.tables.inverse(self._operand(node, a, b)))

    def on_slice(self, node: fx.Node) -> Value | Concat:
        x, dim, start, stop, step = (*node.args, *(0, None, None, 1)[len(node.args) - 1 :])[:5]
        size = x.meta["val"].shape[dim]
        if isinstance(size, torch.SymInt):  # [:] of the rows, or the row count would differ
            return self.values[x]
        if step != 1:
            raise refuse(node, "takes every n-th column")
        start, stop, _ = slice(start, stop).indices(size)
        return self._cut(node, self._plain(node, x), *self._flat_range(node, x, dim, start, stop))

    def on_split(self, node: fx.Node) -> Split:
        x, dim = node.args[0], node.args[2] if len(node.args) > 2 else 0
        ranges, start = [], 0
        for piece in node.meta["val"]:
            stop = start + piece.shape[dim]
            ranges.append(self._flat_range(node, x, dim, start, stop))
            start = stop
        return Split(self._plain(node, x), ranges)

    on_chunk = on_split_with_sizes = on_tensor_split = on_split

    def on_getitem(self, node: fx.Node) -> Value | Concat:
        pieces = self.values[node.args[0]]
        return self._cut(node, pieces.value, *pieces.ranges[node.args[1]])

    # Their parts.

    def _depends(self, arg: Table) -> bool:
        return arg in self.values

    def _table(self, table: Table, inner: tuple[int, ...]) -> Table:
        return self.tables.of(table, inner, self.x_dtype)

    def _plain(self, node: fx.Node, x: fx.Node) -> Value:
        if isinstance(self.values[x], Value):
            return self.values[x]
        raise refuse(node, "takes a concatenation; only activations, tables and linear layers do")

    def _operand(self, node: fx.Node, x: fx.Node, table: Table) -> Table:
        if isinstance(table, int | float):
            return table
        if node.meta["val"].shape != x.meta["val"].shape:
            raise refuse(node, "broadcasts x to a larger shape")
        return self._table(table, _inner(x))

    def _sum(self, node: fx.Node, a: Value, b: Value) -> Value:
        shift = self.tables.plus(a.shift, b.shift)
        if a.core is b.core:
            return Value(a.core, self.tables.plus(a.scale, b.scale), shift)
        if b.core not in a.core.chain():
            a, b = b, a
        if b.core not in a.core.chain():
            raise refuse(node, "adds two branches that both have layers; a residual must come straight from the chain")
        parent = Value(a.core, a.scale, shift).settled()
        return Value(Core(Add, parent, parent.width, layer_of(node), node, scale=b.scale, saved=b.core))

    def _gated(self, node: fx.Node, a: Value, b: Value) -> Value:
        for x, gate in ((a, b), (b, a)):
            plain = gate == Value(gate.core) and x == Value(x.core)
            if plain and gate.core.op == Act("sigmoid") and gate.core.parent is x.core:
                return Value(self.next(Act("silu"), x, node))
        raise refuse(node, "multiplies two values that both depend on x")

    def _flat_range(self, node: fx.Node, x: fx.Node, dim: int, start: int, stop: int) -> tuple[int, int]:
        shape = x.meta["val"].shape
        if dim % len(shape) != 1:
            raise refuse(node, f"cuts dimension {dim} of {_inner(x)}")
        size = math.prod(shape[2:])
        return start * size, stop * size

    def _cut(self, node: fx.Node, value: Value, start: int, stop: int) -> Value:
        found = self.tables.cut(value, start, stop)
        if found is None:
            raise refuse(node, "takes some columns of a value that is no linear layer's")
        return found


def _inner(node: fx.Node) -> tuple[int, ...]:
    return tuple(node.meta["val"].shape[1:])

r"""Evaluate the part of a network's graph that does not depend on x, each node on as few rows as its level needs.

Row b R + r belongs to sample b and draw r. A value of one entry a draw enters an operation on B R rows repeated B
times, a value of one entry a sample with each entry R times in a row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from .tracing import SAMPLE, SHAPE_ONLY, TIME, Traced, X, operation_of

if TYPE_CHECKING:
    from torch.fx.node import Argument

BOTH = TIME | SAMPLE


@dataclass(frozen=True)
class Values:
    """Evaluated nodes by level, and how many rows a level has."""

    rows: dict[int, int]
    known: dict[int, dict[fx.Node, object]] = field(default_factory=lambda: {0: {}, TIME: {}, SAMPLE: {}, BOTH: {}})


class Hoisted:
    """The nodes below `X` that some outputs need, in the order of evaluation.

    Arguments:
        traced: the graph.
        outputs: the nodes wanted.
    """

    def __init__(self, traced: Traced, outputs: list[fx.Node]) -> None:
        self.leaves, self.outputs = traced.leaves, outputs
        self._held: dict[str, tuple[nn.Module, dict[str, Tensor], str]] = {}
        needed, waiting = set(), list(outputs)
        while waiting:
            node = waiting.pop()
            if node not in needed:
                needed.add(node)
                waiting += [n for n in node.all_input_nodes if not n.meta["level"] & X]
        self.order = [node for node in traced.graph.nodes if node in needed]
        self.looked_at = {node: SHAPE_ONLY.get(operation_of(node)) for node in self.order}

    @cached_property
    def _arguments(self) -> dict[fx.Node, tuple[tuple, dict, bool]]:
        """Return every node's arguments, and whether they are plain: no list and no keyword of them holds a node."""

        def plain(node: fx.Node) -> bool:
            held = []
            map_arg(([arg for arg in node.args if not isinstance(arg, fx.Node)], node.kwargs), held.append)
            return not held

        return {node: (node.args, node.kwargs, plain(node)) for node in self.order}

    @cached_property
    def _steps(self) -> dict[int, list[tuple[fx.Node, list[fx.Node]]]]:
        """Return for every level its nodes, each with the nodes of that level that nobody needs afterwards."""
        kept = set(self.outputs)
        steps: dict[int, list] = {0: [], TIME: [], SAMPLE: [], BOTH: []}
        for node in self.order:
            if not _floats(node):
                steps[node.meta["level"]].append((node, []))
            # What another level reads stays; so does what a floating node may be asked for again.
            kept |= {n for n in node.all_input_nodes if n.meta["level"] != node.meta["level"] or _floats(node)}
        for level, nodes in steps.items():
            seen = set(kept)
            for node, unneeded in reversed(nodes):
                last = [n for n in (node, *node.all_input_nodes) if n not in seen and n.meta["level"] == level]
                unneeded += [n for n in dict.fromkeys(last) if n.op != "placeholder"]
                seen.update(last)
        return steps

    def at(self, model: nn.Module, time: Tensor, shared: dict[str, Tensor]) -> Values:
        """Return the values that depend on parameters, shared conditions and the times (R,) of the draws."""
        values = Values({0: 1, TIME: len(time)})
        sources = {"time": lambda _: time, "shared": lambda name: shared[name]}
        sources |= {"constant": lambda value: value, "state": lambda name: self.state(model, name)}
        for level in (0, TIME):
            self._evaluate(level, values, sources)
        return values

    def with_samples(self, timed: Values, own: dict[str, Tensor]) -> Values:
        """Return the values of all levels, given the conditions with one entry a sample."""
        batch = len(next(iter(own.values())))
        draws = timed.rows[TIME]
        known = {0: timed.known[0], TIME: timed.known[TIME], SAMPLE: {}, BOTH: {}}
        values = Values(timed.rows | {SAMPLE: batch, BOTH: batch * draws}, known)
        for level in (SAMPLE, BOTH):
            self._evaluate(level, values, {"sample": lambda name: own[name]})
        return values

    def state(self, model: nn.Module, name: str) -> Tensor:
        """Return the parameter or buffer that a network has now under a name; its layers are those of the trace."""
        found = self._held.get(name)
        if found is None or found[0] is not model:
            *layers, last = name.split(".")
            owner = model.get_submodule(".".join(layers))
            found = self._held[name] = model, owner._parameters if last in owner._parameters else owner._buffers, last
        return found[1][found[2]]

    def value(self, values: Values, node: fx.Node) -> Tensor:
        """Return an output, on the rows of its own level."""
        return self._fetch(values, node, node.meta["level"])

    def _evaluate(self, level: int, values: Values, sources: dict[str, Callable[[Any], object]]) -> None:
        known = values.known[level]
        for node, unneeded in self._steps[level]:
            if node.op == "placeholder":
                kind, name = self.leaves[node]
                known[node] = sources[kind](name)
            else:
                try:
                    known[node] = self._compute(values, node, level)
                except IndexError as error:
                    raise ValueError(self._out_of_range(error)) from error
            for n in unneeded:
                del known[n]

    def _out_of_range(self, error: IndexError) -> str:
        """Return the sentence about a label that an embedding lacks; torch names neither."""
        names = [repr(name) for kind, name in self.leaves.values() if kind in ("sample", "shared")]
        about = f"condition {', '.join(names)}" if names else "its times"
        return f"the network does not take {about} of these values: IndexError: {error}; give labels that it knows"

    def _compute(self, values: Values, node: fx.Node, level: int) -> Any:
        looked_at, (args, kwargs, plain) = self.looked_at.get(node), self._arguments[node]
        given = list(args)
        for i, arg in enumerate(args):
            if i == looked_at:
                given[i] = self._stand_in(values, arg, level)
            elif type(arg) is fx.Node:
                given[i] = self._fetch(values, arg, level)
            elif not plain:
                given[i] = _fetch_all(self, values, arg, level)
        return node.target(*given, **(kwargs if plain else _fetch_all(self, values, kwargs, level)))

    def _fetch(self, values: Values, node: fx.Node, level: int) -> Any:
        """Return a node's value on the rows of a level that contains its own."""
        known, own = values.known[level], node.meta["level"]
        if node in known:
            return known[node]
        if own == level and not _floats(node):
            raise KeyError(node)
        if _floats(node):
            value = self._compute(values, node, level)
        elif own == 0 or not node.meta["rows"]:
            return values.known[own][node]
        else:
            value = _spread(values.known[own][node], own, values.rows[TIME], values.rows[SAMPLE])
        known[node] = value
        return value

    def _stand_in(self, values: Values, node: fx.Node, level: int) -> Tensor:
        """Return a tensor of a node's shape and dtype for operations that look at nothing else."""
        like = node.meta["val"]
        shape = [values.rows[level] if isinstance(size, torch.SymInt) else size for size in like.shape]
        return torch.empty(1, dtype=like.dtype, device=like.device).expand(shape)


def _floats(node: fx.Node) -> bool:
    """Return whether a node depends on the number of rows alone, so that each level has its own value."""
    return node.meta["level"] == 0 and node.meta["rows"]


def _fetch_all(hoisted: Hoisted, values: Values, arg: Argument, level: int) -> Any:
    return map_arg(arg, lambda n: hoisted._fetch(values, n, level))


def _spread(value: Tensor, level: int, draws: int, batch: int) -> Tensor:
    if level == TIME:
        return value.expand(batch, *value.shape).flatten(0, 1)
    return value[:, None].expand(batch, draws, *value.shape[1:]).flatten(0, 1)

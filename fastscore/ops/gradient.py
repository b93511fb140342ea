"""The gradient of `density_mlp`: by kernels that evaluate the rows again, or by autograd through its definition.

- `fastscore::density_mlp_dx` gives the gradient with respect to x alone.
- `fastscore::density_mlp_dp` gives that of weights and vector operands, and of x where it wants one.

`by_kernel` says which of them runs, or why none does: one predicate for the backward pass, for what a row costs of
memory, and for `fastscore.explain`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from ..kernels.operand_gradients import Uses, padded_shapes
from ..kernels.weights import weight_groups
from . import torch as torch_backend
from .instructions import decode
from .select import implementation
from .task import Evaluation, Task, WithRespectTo, plain

Gradients = tuple[Tensor | None, list[Tensor | None], list[Tensor | None]]  # of x, the weights and the tables


@torch.library.custom_op("fastscore::density_mlp_dx", mutates_args=())
def density_mlp_dx(
    grad: Tensor,
    x: Tensor,
    keys: Tensor,
    points: Tensor,
    rows: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    code: str,
    weights: list[Tensor],
    tables: list[Tensor],
    reference: list[Tensor],
    backend: str,
) -> Tensor:
    """Return the gradient of `density_mlp` with respect to x alone, shape (B, d), by a kernel; grad is (B, R)."""
    given = Evaluation(x, keys, points, rows, alpha, sigma, code, weights, tables, reference)
    return implementation(backend).density_mlp_dx(grad, given)


@density_mlp_dx.register_fake
def _(grad: Tensor, x: Tensor, *others: Any) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("fastscore::density_mlp_dp", mutates_args=())
def density_mlp_dp(
    grad: Tensor,
    x: Tensor,
    keys: Tensor,
    points: Tensor,
    rows: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    code: str,
    weights: list[Tensor],
    tables: list[Tensor],
    reference: list[Tensor],
    wanted: list[bool],
    backend: str,
) -> list[Tensor]:
    """Return the gradients of `density_mlp` by a kernel, as `fastscore.kernels.density_mlp_dp` lays them out."""
    given = Evaluation(x, keys, points, rows, alpha, sigma, code, weights, tables, reference)
    return implementation(backend).density_mlp_dp(grad, given, WithRespectTo(*wanted))


@density_mlp_dp.register_fake
def _(
    grad: Tensor, x: Tensor, keys: Tensor, points: Tensor, rows: Tensor, alpha: Tensor, sigma: Tensor, code: str,
    weights: list[Tensor], tables: list[Tensor], reference: list[Tensor], wanted: list[bool], backend: str,
) -> list[Tensor]:  # fmt: skip
    batch, count = grad.shape
    of_x, of_weights, of_tables = wanted
    uses, order = Uses.of(plain(decode(code)), weights, tables, batch, count, x.shape[1])
    shapes = {"r": (count, uses.ends["r"]), "b": (batch, uses.ends["b"]), "br": (batch, count, uses.ends["br"])}
    given = {level: of_tables and uses.ends[level] > 0 for level in shapes}
    alike = given["r"] and any(table.shape[:2] == (1, 1) for table in tables)
    kind = tables[0].dtype if len({table.dtype for table in tables}) == 1 else torch.float32
    by_level = [_empty(x, shape, given[level], kind) for level, shape in shapes.items()]
    by_level.insert(1, _empty(x, shapes["r"][1:], alike, kind))
    groups = weight_groups(padded_shapes(weights, order))[0]
    products = [_empty(x, (len(own), out, in_), of_weights, weights[0].dtype) for in_, out, own in groups]
    return [_empty(x, x.shape, of_x, torch.float32), *by_level, *products]


def _empty(like: Tensor, shape: Sequence[int], needed: bool, dtype: torch.dtype) -> Tensor:
    return like.new_empty(tuple(shape) if needed else (0,) * len(shape), dtype=dtype)


def by_kernel(backend: str, task: Task, wanted: WithRespectTo) -> str | None:
    """Return why no kernel of a backend gives the gradients that are wanted, or None."""
    if backend == "torch":
        return "the backend is PyTorch"
    own = implementation(backend)
    return own.why_not_dp(task, wanted.of_x) if wanted.of_parameters else own.why_not_dx(task)


def gradients(grad: Tensor, given: Evaluation, backend: str) -> Gradients:
    """Return the gradients of x, the weights and the tables, of those that want one; grad, that of f, is (B, R)."""
    x, weights, tables, task = given.x, given.weights, given.tables, given.task
    wanted, again = WithRespectTo.of(x, weights, tables), torch.is_grad_enabled()
    if again or by_kernel(backend, task, wanted) is not None:  # no kernel has the gradient of a gradient
        return _by_autograd(grad, given, again)
    if not wanted.of_parameters:
        return density_mlp_dx(grad, *given, backend), [None] * len(weights), [None] * len(tables)
    grad_x, by_row, all_rows, by_sample, by_pair, *products = density_mlp_dp(grad, *given, list(wanted), backend)
    leaves = [table.detach().requires_grad_(table.requires_grad) for table in tables]
    with torch.enable_grad():  # through what scales and shifts of x_t and of the prediction are composed of
        uses, order = Uses.of(task.code, weights, leaves, *grad.shape, x.shape[1])
    by_level = {"r": by_row[None], "b": by_sample[:, None], "br": by_pair}
    of_tables = _of_tables(uses, leaves, by_level, all_rows) if wanted.of_tables else [None] * len(tables)
    of_weights = _of_weights(weights, order, products) if wanted.of_weights else [None] * len(weights)
    return grad_x if wanted.of_x else None, of_weights, of_tables


def _of_weights(weights: list[Tensor], order: list[int], products: list[Tensor]) -> list[Tensor | None]:
    """Return each weight's part of the products; a weight of several linear maps has the sum."""
    found: list[Tensor | None] = [None] * len(weights)
    for (_, _, own), product in zip(weight_groups(padded_shapes(weights, order))[0], products, strict=True):
        for n, k in enumerate(own):
            weight, before = weights[order[k]], found[order[k]]
            part = product[n, : weight.shape[0], : weight.shape[1]]
            found[order[k]] = part if before is None else before + part
    return [part if weight.requires_grad else None for weight, part in zip(weights, found)]


def _of_tables(uses: Uses, leaves: list[Tensor], by_level: dict[str, Tensor], all_rows: Tensor) -> list[Tensor | None]:
    """Return the gradient of every table, from those of the columns where it was used."""
    outputs, grads = [], []
    for table, (level, offset, width) in uses.found:
        if table.requires_grad:
            one = table.shape[:2] == (1, 1)
            columns = (all_rows[None, None] if one else by_level[level])[..., offset : offset + width]
            outputs.append(table)
            grads.append(columns.sum_to_size(table.shape).to(table.dtype))
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    found = iter(torch.autograd.grad(outputs, wanted, grads, allow_unused=True, materialize_grads=True))
    return [next(found) if leaf.requires_grad else None for leaf in leaves]


def _by_autograd(grad: Tensor, given: Evaluation, differentiable: bool) -> Gradients:
    """Evaluate the definition again, under autograd; the gradients have a graph where they are to be differentiated."""
    leaves = [*chain([given.x], given.weights, given.tables)]
    if not differentiable:
        leaves = [v.detach().requires_grad_(v.requires_grad) for v in leaves]
    n = len(given.weights) + 1
    moving = given.reference if given.x.requires_grad else []  # what is subtracted depends on x alone
    with torch.enable_grad():
        again = given._replace(x=leaves[0], weights=leaves[1:n], tables=leaves[n:], reference=moving)
        f = torch_backend.density_mlp(again)
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        found = iter(torch.autograd.grad(f, wanted, grad, create_graph=differentiable, materialize_grads=True))
    grads = [next(found) if leaf.requires_grad else None for leaf in leaves]
    return grads[0], grads[1:n], grads[n:]

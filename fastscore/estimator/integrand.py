r"""The integrand of the density formula, minus its reference, at the draws of a rule.

.. math:: f_{bs} = \|\epsilon - \hat\epsilon(x_\lambda)\|^2 - \|\epsilon - \epsilon_q(x_\lambda)\|^2

with the same noised rows for both terms; a paired draw averages f over eps and -eps. With a mask, both norms are over
the entries that count, and x_t = x elsewhere.

Two conditions are told by three numbers a draw: the difference of the network's residuals under both, which is as
accurate as the two are alike, and f under either, whose course says what lies beyond the range.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ..ops import definitions as ops
from ..ops import noise
from ..ops.choice import Choice, alone, choose
from ..ops.gradient import by_kernel
from ..ops.instructions import encode
from ..ops.select import implementation
from ..ops.task import Task, WithRespectTo
from ..process.conditions import Conditions
from ..process.masks import inside
from ..process.network import predict
from ..process.taken_dtype import model_dtype
from ..program.row_program import RowProgram, Timed
from ..reference.gaussians import Reference
from ..support import memory
from ..support.host import all_finite
from ..support.recompute import recomputed
from ..support.untouched import uncompiled
from .network import PROBE_ROWS, Network
from .rows import Draws, Rows
from .rules import FixedRules, Rule
from .samples import Samples


def row_terms(
    network: Network, samples: Samples, keys: Tensor, rows: Rows, references: tuple[Reference, ...]
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the squared residual of every row, (B, R): under each condition, and of each reference."""
    x, mask, noise_words = samples.x, samples.mask, (keys, rows.points, rows.sign)
    plain = mask is not None or rows.backend == "torch"  # a kernel would make the noise again, everywhere
    by_kernel = tuple(not plain and not torch.is_grad_enabled() and _has_kernel(q, rows, x) for q in references)
    keep_eps = plain or not all(by_kernel)
    # Where nothing but the network reads x_t, it is written in the network's dtype at once.
    dtype = None if keep_eps or any(rows.timed) else model_dtype(network.model, x.dtype)
    perturb, residual = ops.by(rows.backend)
    x_t, eps = perturb(x, *noise_words, rows.rounded[0], rows.rounded[1], keep_eps, dtype)
    entries = None if mask is None else mask[:, None]
    if mask is not None:
        x_t, eps = torch.where(entries, x_t, x[:, None]), inside(eps, entries)
        _, residual = ops.by("torch")
    counted, errors = inside(x, mask), []
    for prediction in predictions(network, samples, x_t, rows):
        answer = inside(prediction, entries)
        errors.append(residual(answer, counted, eps, *noise_words, *rows.coefficients))
    controls = [
        ops.control(x, *noise_words, rows.alpha, rows.sigma, q.tensors(), rows.backend)
        if kernel
        else _of_reference(q, x, x_t, eps, rows, mask)
        for q, kernel in zip(references, by_kernel)
    ]
    return errors, controls


def _of_reference(q: Reference, x: Tensor, x_t: Tensor, eps: Tensor, rows: Rows, mask: Tensor | None) -> Tensor:
    """Return the squared residual of a reference, whose tables are those of the times of one group of samples.

    One Gaussian that is alike in all directions has a number a row in place of tables, so all groups are one pass.
    """
    if not rows.beside or q.alike:
        return q.residual(x, x_t, eps, rows.alpha, rows.sigma, mask)
    found = x_t.new_empty(x_t.shape[:2])
    for here, own in rows.beside:
        part = x[here], x_t[here], eps[here], own.alpha, own.sigma, None if mask is None else mask[here]
        found[here] = q.residual(*part)
    return found


def predictions(network: Network, samples: Samples, x_t: Tensor, rows: Rows) -> Iterator[Tensor]:
    """Yield the prediction of every row, (B, R, d), under each condition of the samples."""
    for cond, timed in zip(samples.conds, rows.timed or (None,) * len(samples.conds)):
        yield _predict(network, samples.shape, x_t, rows, cond, timed)


def _predict(
    network: Network, shape: tuple[int, ...], x_t: Tensor, rows: Rows, cond: Conditions, timed: Timed | None
) -> Tensor:
    """Return the prediction of every row, (B, R, d): by the row program or the network, some samples a call."""
    samples_per_call = memory.even(len(x_t), max(1, rows.per_call // x_t.shape[1])) if rows.per_call else len(x_t)
    predictions, several = [], samples_per_call < len(x_t)
    for start in range(0, len(x_t), samples_per_call):
        part = slice(start, start + samples_per_call)
        some = cond.select(part)
        if timed is not None:
            predictions.append(timed.predict(x_t[part], some.per_sample, compiled=network.compiled is not None))
        else:
            options = network.time_dtype, network.compiled
            time = rows.time[part] if rows.beside else rows.time
            answer = predict(network.model, x_t[part], time, some, shape, *options)
            # A network may write every answer into the same memory.
            predictions.append(answer.clone() if several else answer)
    return predictions[0] if len(predictions) == 1 else torch.cat(predictions)


def _has_kernel(reference: Reference, rows: Rows, x: Tensor) -> bool:
    if reference.turned:
        return False
    reason = implementation(rows.backend).why_not_control(reference.components, reference.full, x.shape[1], x.device)
    return reason is None


def cost_of_row(
    network: Network,
    samples: Samples,
    programs: tuple[RowProgram | None, ...],
    reference: Reference,
    evaluate: Callable[[Network, Samples, Tensor, Rows, Reference], object] | None = None,
) -> memory.RowCost:
    """Return the memory of one row, and of what is there of one draw for all samples: noise, a program's tables.

    Network and autograd are included; both are measured on a few rows of the first sample. So is the backward pass of a
    fused kernel, which keeps nothing of the forward pass.

    Arguments:
        evaluate: what is done with some rows; `draw_values` by default.

    Raises:
        ValueError: if the network cannot be called with such data, with its reason.
    """
    log_snr = torch.linspace(*network.log_snr_range, PROBE_ROWS, dtype=torch.float64, device="cpu")
    time, single = network.schedule.time(log_snr), torch.zeros(PROBE_ROWS, dtype=torch.bool, device="cpu")
    rule = Rule.plain(log_snr, time, torch.ones_like(log_snr), single)
    one = samples.select(slice(0, 1))
    draws = Draws(FixedRules(rule), "independent", 0)
    span = range(PROBE_ROWS)
    (rows,) = Rows.of(network, [rule], draws.points(span, one.x.shape[1], one.x.device), span, one.x)
    keys = draws.keys(one.index.to(one.device), one.x.shape[1])
    timed, backward = rows.with_programs(network, programs, one), 0
    if evaluate is None:
        backends, backward = _gradient_cost(one, timed, reference)
        timed = replace(timed, backends=backends)
    with uncompiled():
        found = memory.footprint(lambda: (evaluate or draw_values)(network, one, keys, timed, reference))
    tables = memory.peak_bytes(lambda: rows.with_programs(network, programs, one)) // PROBE_ROWS
    draw = tables + noise.POINT_BYTES * one.x.shape[1]
    sums = memory.SUM_BYTES * len(samples.conds)  # the difference of two conditions, and then one after the other
    return memory.RowCost(found.peak // PROBE_ROWS + backward, found.each // PROBE_ROWS, draw, sums=sums)


def all_values(
    network: Network, samples: Samples, keys: Tensor, each: Iterable[Rows], reference: Reference, draws: int
) -> Tensor:
    """Return f of all draws, (b, N), or (b, 3, N) as `draw_values` does; `each` has some of them."""
    values = [chunk_values(network, samples, keys, rows, reference) for rows in each]
    return values[0] if len(values) == 1 else torch.cat(values, -1)


def chunk_values(network: Network, samples: Samples, keys: Tensor, rows: Rows, reference: Reference) -> Tensor:
    """Return `draw_values`; under autograd what it stores is recomputed in the backward pass."""
    if not torch.is_grad_enabled() or choice_of(samples, rows, reference).fused:  # the fused op keeps no row
        return draw_values(network, samples, keys, rows, reference)
    return recomputed(network.model, draw_values, network, samples, keys, rows, reference)


def draw_values(network: Network, samples: Samples, keys: Tensor, rows: Rows, reference: Reference) -> Tensor:
    """Return f of shape (b, number of draws): the mean over each draw's rows.

    Under two conditions it is of shape (b, 3, number of draws): f of the first minus that of the second, in which the
    reference cancels, and both.
    """
    choice = choice_of(samples, rows, reference)
    rows = replace(rows, backends=(choice.backend,))
    if choice.fused:
        f = _fused(samples, keys, rows, reference)
    else:
        errors, (control,) = row_terms(network, samples, keys, rows, (reference,))
        own = [error - control for error in errors]
        # The residuals themselves are subtracted: their difference is not rounded like numbers of the control's size.
        f = own[0] if len(own) == 1 else torch.stack([errors[0] - errors[1], *own], 1)
    if len(rows.share) == rows.draws:
        return f
    return f.new_zeros(*f.shape[:-1], rows.draws).index_add(-1, rows.draw, f * rows.share)


def choice_of(samples: Samples, rows: Rows, reference: Reference) -> Choice:
    """Return who evaluates these rows, and whether in one pass."""
    if len(samples.conds) > 1:
        return Choice(rows.backend, False, "two conditions are compared")
    if samples.mask is not None:
        return Choice(rows.backend, False, "a mask is given")
    (timed,) = rows.timed or (None,)
    if timed is None:
        return Choice(rows.backend, False, "the network is no row program")
    if reference.turned:
        return Choice(rows.backend, False, "the reference lies in a basis of images")
    if (only := alone(rows.backends)) is not None:
        return only
    gradient = torch.is_grad_enabled() and _parameters_move(samples, timed)
    return choose(rows.backends, _task(samples, timed, reference), gradient)


def _task(samples: Samples, timed: Timed, reference: Reference) -> Task:
    program, x, q = timed.program, samples.x, reference
    return Task.of(program.code, timed.weights, program.levels, x.shape[1], x.device, q.components, q.full)


def _parameters_move(samples: Samples, timed: Timed) -> bool:
    """Return whether a weight or a table of a program wants a gradient."""
    own = samples.conds[0].per_sample.values()
    known = [*timed.weights, *(table for table in timed.tables if table is not None), *own]
    if any(table is None for table in timed.tables):  # evaluated later, with the samples' conditions
        known += timed.program.reads()
    return any(tensor.requires_grad for tensor in known)


def _gradient_cost(samples: Samples, rows: Rows, reference: Reference) -> tuple[tuple[str, ...], int]:
    """Return which backends stand for an evaluation with its backward pass, and what that takes beside it for one row.

    The fused op keeps no row: its backward pass takes what its kernel stores, or what PyTorch does in its place.
    """
    choice = choice_of(samples, rows, reference)
    (timed,) = rows.timed if choice.fused else (None,)
    if timed is None or not torch.is_grad_enabled():
        return rows.backends, 0
    task = _task(samples, timed, reference)
    wanted = WithRespectTo(samples.x.requires_grad, *[_parameters_move(samples, timed)] * 2)
    if not (wanted.of_x or wanted.of_parameters):
        return rows.backends, 0
    if by_kernel(choice.backend, task, wanted) is not None:
        return ("torch",), 0
    return rows.backends, implementation(choice.backend).bytes_dp(task) if wanted.of_parameters else 0


def _fused(samples: Samples, keys: Tensor, rows: Rows, reference: Reference) -> Tensor:
    """Return f of every row, (b, R), by one kernel."""
    x, (timed,) = samples.x, rows.timed
    weights, tables = timed.bind(samples.conds[0].per_sample)
    row = torch.stack([rows.sign, *rows.rounded[:5]], 1)
    code, q = encode(timed.program.code), reference.tensors()
    return ops.density_mlp(x, keys, rows.points, row, rows.alpha, rows.sigma, code, weights, tables, q, rows.backend)


def check_finite(f: Tensor, samples: Samples, rule: Rule) -> None:
    """Raise ValueError for NaN or inf, naming the first sample and its log-SNR."""
    if all_finite(f):
        return
    finite = torch.isfinite(f)
    if finite.dim() == 3:
        finite = finite.all(1)
    b, s = (int(i) for i in (~finite).nonzero()[0])
    raise ValueError(
        f"the network returned NaN or inf for sample {int(samples.index[b])} at log-SNR {float(rule.log_snr[s]):.4g} "
        f"(t = {float(rule.time[s]):.6g}), {int((~finite).sum())} of {finite.numel()} evaluations in this chunk; check "
        "its weights, use a wider dtype than half, or narrow the schedule's range"
    )

r"""The integrand of the density formula, minus its reference, at the draws of a rule.

.. math:: f_{bs} = \|\epsilon - \hat\epsilon(x_\lambda)\|^2 - \|\epsilon - \epsilon_q(x_\lambda)\|^2

with the same noised rows for both terms; a paired draw averages f over eps and -eps. With a mask, both norms are over
the entries that count, and x_t = x elsewhere. Rows are evaluated in chunks
that fit the memory budget, and what leaves a chunk is one number a draw: nothing of size B x S x d is ever stored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..ops import definitions as ops
from ..ops import noise
from ..ops.choice import Choice, choose
from ..ops.instructions import encode
from ..ops.select import implementation, runnable
from ..ops.task import Task
from ..process.conditions import Conditions
from ..process.masks import inside
from ..process.network import cast_time, model_dtype, predict
from ..process.predictions import coefficients
from ..process.schedules import Schedule
from ..program.row_program import Programs, RowProgram, Timed
from ..reference.gaussians import Reference
from ..support import memory
from ..support.untouched import uncompiled
from .rules import FixedRules, Rule, Rules
from .samples import Samples

PROBE_ROWS = 4
KEY_WORDS = 1 << 14  # words of sample keys to make at once: few, larger calls to Philox


@dataclass(frozen=True)
class Network:
    """A network with all that is needed to read it: what it predicts, on which schedule, and its row programs."""

    model: nn.Module
    schedule: Schedule
    predicts: str
    log_snr_range: tuple[float, float]
    time_dtype: torch.dtype | None = None
    programs: Programs | None = None
    backend: str = "auto"

    def find_programs(self, samples: Samples) -> tuple[RowProgram | None, ...]:
        """Return the row program under each condition of the samples, None where the network itself must run."""
        if self.programs is None:
            return (None,) * len(samples.conds)

        def times() -> Tensor:
            log_snr = torch.linspace(*self.log_snr_range, PROBE_ROWS, dtype=torch.float64, device="cpu")
            return self.schedule.time(log_snr).to(samples.x.device)

        data = self.model, samples.shape, samples.x.dtype
        return tuple(self.programs.find(*data, cond, times, self.time_dtype) for cond in samples.conds)


@dataclass(frozen=True)
class Draws:
    """The draws of one estimate: where (a rule for each group of samples), which noise (kind, seed and round)."""

    rules: Rules | FixedRules
    noise: str
    seed: int
    round: int = 0

    def __len__(self) -> int:
        return self.rules.draws

    def points(self, span: range, d: int, device: torch.device) -> Tensor:
        """Return the noise words of some draws, which samples of all groups share."""
        return noise.points(self.noise, self.seed, span, len(self), d, device, self.round)


class Part(NamedTuple):
    """Evaluated samples: which (indices), f of shape (b, N), and the rule of the group that all of them belong to."""

    samples: Tensor
    f: Tensor
    rule: Rule


@dataclass(frozen=True)
class Rows:
    """Per-row tables of some consecutive draws, on the device of the data; a paired draw owns two rows."""

    draws: int
    draw: Tensor  # index of the row's draw among these, int64, (R,)
    share: Tensor  # 1, or 1/2 for the rows of a pair, (R,)
    points: Tensor  # the row's noise words, int32, (R, d)
    sign: Tensor  # -1 for an antithetic twin, (R,)
    time: Tensor
    alpha: Tensor  # float64, as sigma
    sigma: Tensor
    coefficients: tuple[Tensor, Tensor, Tensor]
    backends: tuple[str, ...]  # that can run, in order
    per_call: int  # how many rows the network gets in one call; all if 0
    timed: tuple[Timed | None, ...] = ()  # row programs with what they need at these times, one a condition

    @property
    def backend(self) -> str:
        """Who makes the noise, and the residual where no kernel does everything."""
        return self.backends[0]

    @classmethod
    def of(cls, network: Network, rule: Rule, points: Tensor, span: range, x: Tensor, per_call: int = 0) -> Rows:
        """Return the rows of some draws of a rule; `points` are the draws' noise words, (len(span), d)."""
        part, device, schedule = slice(span.start, span.stop), x.device, network.schedule
        paired, time = rule.paired[part].long(), rule.time[part]
        alpha, sigma = schedule.alpha_sigma(time)
        draw = torch.arange(len(span), device="cpu").repeat_interleave(1 + paired)
        twin = torch.cat([torch.zeros(1, dtype=torch.bool, device="cpu"), draw[1:] == draw[:-1]])
        return cls(
            draws=len(span),
            draw=draw.to(device),
            share=(1 / (1 + paired))[draw].to(x),
            points=points[draw.to(device)] if bool(paired.any()) else points,
            sign=torch.where(twin, -1.0, 1.0).to(x),
            time=time[draw].to(device),
            alpha=alpha[draw].to(device),
            sigma=sigma[draw].to(device),
            coefficients=tuple(v[draw].to(x) for v in coefficients(network.predicts, schedule, time)),
            backends=runnable(device, x.dtype, network.backend),
            per_call=per_call,
        )

    def with_programs(self, network: Network, programs: tuple[RowProgram | None, ...], samples: Samples) -> Rows:
        """Return the same rows with the programs' tables at their times, differentiable if autograd is on."""
        if not any(programs):
            return self
        time = cast_time(self.time, samples.x.dtype, network.time_dtype)
        pairs = zip(programs, samples.conds)
        return replace(self, timed=tuple(program and program.at(time, cond.shared) for program, cond in pairs))


def row_terms(
    network: Network, samples: Samples, keys: Tensor, rows: Rows, references: tuple[Reference, ...]
) -> tuple[Tensor, Tensor]:
    """Return the squared residual of every row: under each condition (C, B, R) and each reference (Q, B, R)."""
    x, mask, noise_words = samples.x, samples.mask, (keys, rows.points, rows.sign)
    plain = mask is not None or rows.backend == "torch"  # a kernel would make the noise again, everywhere
    by_kernel = tuple(not plain and not torch.is_grad_enabled() and _has_kernel(q, rows, x) for q in references)
    keep_eps = plain or not all(by_kernel)
    # Where nothing but the network reads x_t, it is written in the network's dtype at once.
    dtype = None if keep_eps or any(rows.timed) else model_dtype(network.model, x.dtype)
    x_t, eps = ops.perturb(x, *noise_words, rows.alpha.to(x), rows.sigma.to(x), keep_eps, dtype, rows.backend)
    entries = None if mask is None else mask[:, None]
    if mask is not None:
        x_t, eps = torch.where(entries, x_t, x[:, None]), inside(eps, entries)
    counted, errors = inside(x, mask), []
    for cond, timed in zip(samples.conds, rows.timed or (None,) * len(samples.conds)):
        prediction = inside(_predict(network, samples.shape, x_t, rows, cond, timed), entries)
        backend = "torch" if plain else rows.backend
        errors.append(ops.residual(prediction, counted, eps, *noise_words, *rows.coefficients, backend))
    controls = [
        ops.control(x, *noise_words, rows.alpha, rows.sigma, q.tensors(), rows.backend)
        if kernel
        else q.residual(x, x_t, eps, rows.alpha, rows.sigma, mask)
        for q, kernel in zip(references, by_kernel)
    ]
    return torch.stack(errors), torch.stack(controls) if controls else x.new_zeros(0, *errors[0].shape)


def _predict(
    network: Network, shape: tuple[int, ...], x_t: Tensor, rows: Rows, cond: Conditions, timed: Timed | None
) -> Tensor:
    """Return the prediction of every row, (B, R, d): by the row program or the network, some samples a call."""
    samples_per_call = _even(len(x_t), max(1, rows.per_call // x_t.shape[1])) if rows.per_call else len(x_t)
    predictions = []
    for start in range(0, len(x_t), samples_per_call):
        part = slice(start, start + samples_per_call)
        some = cond.select(part)
        if timed is not None:
            predictions.append(timed.predict(x_t[part], some.per_sample))
        else:
            predictions.append(predict(network.model, x_t[part], rows.time, some, shape, network.time_dtype))
    return predictions[0] if len(predictions) == 1 else torch.cat(predictions)


def _even(count: int, most: int) -> int:
    """Return the length of the parts when `count` is cut into as few, equal ones of at most `most` as possible."""
    return math.ceil(count / math.ceil(count / most))


def _has_kernel(reference: Reference, rows: Rows, x: Tensor) -> bool:
    reason = implementation(rows.backend).why_not_control(reference.components, reference.full, x.shape[1], x.device)
    return reason is None


def evaluate(
    network: Network, samples: Samples, draws: Draws, reference: Reference, chunks: memory.Chunks
) -> Iterator[Part]:
    """Yield every sample's f of all draws, one group of samples after the other, in chunks of `chunks.rows` rows.

    With two conditions, f is the difference of the two networks' residuals and the reference cancels. Under autograd
    each chunk is recomputed in the backward pass, so memory stays that of one chunk. What a row program needs of the
    times alone is evaluated outside of the chunks, once a group.
    """
    programs, made = network.find_programs(samples), {}

    def points(span: range) -> Tensor:
        if span not in made:
            if not chunks.keep_tables:
                made.clear()
            made[span] = draws.points(span, samples.x.shape[1], samples.x.device)
        return made[span]

    for group in samples.group.unique().tolist():
        members = (samples.group == group).nonzero().flatten()
        whole = len(members) == len(samples)
        own = samples if whole else samples.select(members.to(samples.x.device))
        rule = draws.rules.of(group)
        for chosen, f in _evaluate_group(network, own, draws, rule, points, programs, reference, chunks):
            yield Part(members[chosen].to(f.device), f, rule)


def _evaluate_group(
    network: Network,
    samples: Samples,
    draws: Draws,
    rule: Rule,
    points: Callable[[range], Tensor],
    programs: tuple[RowProgram | None, ...],
    reference: Reference,
    chunks: memory.Chunks,
) -> Iterator[tuple[slice, Tensor]]:
    total, evaluations, d = len(draws), max(1, rule.nfe), samples.x.shape[1]
    at_once = _even(len(samples), max(1 if chunks.keep_tables else chunks.samples, chunks.rows // evaluations))
    rows_per_draw = 1 + int(rule.paired.any())
    span = total if chunks.rows >= at_once * evaluations else max(1, chunks.rows // (at_once * rows_per_draw))
    spans = [range(start, min(start + span, total)) for start in range(0, total, span)]

    def table(span: range) -> Rows:
        rows = Rows.of(network, rule, points(span), span, samples.x, chunks.per_call)
        return rows.with_programs(network, programs, samples)

    chunks_of_keys = max(1, KEY_WORDS // (at_once * d))
    kept = [table(span) for span in spans] if chunks.keep_tables else None
    for start in range(0, len(samples), at_once):
        chosen = slice(start, min(start + at_once, len(samples)))
        part = samples.select(chosen)
        if start % (at_once * chunks_of_keys) == 0:
            index = samples.index[start : start + at_once * chunks_of_keys]
            many = noise.sample_keys(draws.noise, draws.seed, index, d, draws.round).split(at_once)
        keys = many[start // at_once % chunks_of_keys]
        f = torch.cat([_chunk(network, part, keys, rows, reference) for rows in kept or map(table, spans)], 1)
        _check_finite(f, part, rule)
        yield chosen, f


def cost_of_row(network: Network, samples: Samples, reference: Reference) -> memory.RowCost:
    """Return the memory of one row, and of what is there of one draw for all samples: noise, a program's tables.

    Network and autograd are included; both are measured on a few rows of the first sample.

    Raises:
        ValueError: if the network cannot be called with such data, with its reason.
    """
    log_snr = torch.linspace(*network.log_snr_range, PROBE_ROWS, dtype=torch.float64, device="cpu")
    time, single = network.schedule.time(log_snr), torch.zeros(PROBE_ROWS, dtype=torch.bool, device="cpu")
    rule = Rule.plain(log_snr, time, torch.ones_like(log_snr), single)
    one = samples.select(slice(0, 1))
    draws = Draws(FixedRules(rule), "independent", 0)
    span = range(PROBE_ROWS)
    rows = Rows.of(network, rule, draws.points(span, one.x.shape[1], one.x.device), span, one.x)
    keys = noise.sample_keys("independent", 0, one.index, one.x.shape[1])
    programs = network.find_programs(samples)
    timed = rows.with_programs(network, programs, one)
    with uncompiled():
        found = memory.footprint(lambda: draw_values(network, one, keys, timed, reference))
    tables = memory.peak_bytes(lambda: rows.with_programs(network, programs, one)) // PROBE_ROWS
    draw = tables + noise.POINT_BYTES * one.x.shape[1]
    return memory.RowCost(found.peak // PROBE_ROWS, found.each // PROBE_ROWS, draw)


def _chunk(network: Network, samples: Samples, keys: Tensor, rows: Rows, reference: Reference) -> Tensor:
    if not torch.is_grad_enabled() or choice_of(samples, rows, reference).fused:  # the fused op keeps no row
        return draw_values(network, samples, keys, rows, reference)
    return checkpoint(draw_values, network, samples, keys, rows, reference, use_reentrant=False)


def draw_values(network: Network, samples: Samples, keys: Tensor, rows: Rows, reference: Reference) -> Tensor:
    """Return f of shape (b, number of draws): the mean over each draw's rows."""
    controls = (reference,) if len(samples.conds) == 1 else ()
    choice = choice_of(samples, rows, reference)
    rows = replace(rows, backends=(choice.backend,))
    if choice.fused:
        f = _fused(samples, keys, rows, reference)
    else:
        errors, control = row_terms(network, samples, keys, rows, controls)
        f = errors[0] - (control[0] if controls else errors[1])
    if len(rows.share) == rows.draws:
        return f
    return f.new_zeros(len(f), rows.draws).index_add(1, rows.draw, f * rows.share)


def choice_of(samples: Samples, rows: Rows, reference: Reference) -> Choice:
    """Return who evaluates these rows, and whether in one pass."""
    if len(samples.conds) > 1:
        return Choice(rows.backend, False, "two conditions are compared")
    if samples.mask is not None:
        return Choice(rows.backend, False, "a mask is given")
    (timed,) = rows.timed or (None,)
    if timed is None:
        return Choice(rows.backend, False, "the network is no row program")
    program, x, q = timed.program, samples.x, reference
    task = Task.of(program.code, timed.weights, program.levels, x.shape[1], x.device, q.components, q.full)
    gradient = torch.is_grad_enabled() and any(v.requires_grad for v in timed.weights)
    return choose(rows.backends, task, gradient)


def _fused(samples: Samples, keys: Tensor, rows: Rows, reference: Reference) -> Tensor:
    """Return f of every row, (b, R), by one kernel."""
    x, (timed,) = samples.x, rows.timed
    weights, tables = timed.bind(samples.conds[0].per_sample)
    row = torch.stack([rows.sign, rows.alpha.to(x), rows.sigma.to(x), *rows.coefficients], 1)
    code, q = encode(timed.program.code), reference.tensors()
    return ops.density_mlp(x, keys, rows.points, row, rows.alpha, rows.sigma, code, weights, tables, q, rows.backend)


def _check_finite(f: Tensor, samples: Samples, rule: Rule) -> None:
    finite = torch.isfinite(f)
    if bool(finite.all()):
        return
    b, s = (int(i) for i in (~finite).nonzero()[0])
    raise ValueError(
        f"the network returned NaN or inf for sample {int(samples.index[b])} at log-SNR {float(rule.log_snr[s]):.4g} "
        f"(t = {float(rule.time[s]):.6g}), {int((~finite).sum())} of {finite.numel()} evaluations in this chunk; check "
        "its weights, use a wider dtype than half, or narrow the schedule's range"
    )

r"""A plan: everything of an estimate that another call with the same options need not make again.

Samples of a group share their nodes, so that a group's rows are tables; samples and draws are cut into chunks that fit
the memory budget, and what leaves a chunk is one number a draw: nothing of size B x S x d is ever stored. What is kept
between two calls depends on

====================  ==================================================================
kept                  depends on
====================  ==================================================================
nodes, rows           schedule, prediction, nodes, evaluations, method, seed and round
points                kind of noise, seed and round
cuts, keys            indices of the samples, seed and round
====================  ==================================================================

and on no parameter of the network: what the network makes of the times is evaluated in every run, so that a step of an
optimizer counts, however it was written. `fastscore.estimator.planner` keeps the plans of a density.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, replace
from itertools import islice

import torch
from torch import Tensor

from ..ops.select import runnable
from ..program.row_program import RowProgram
from ..reference.gaussians import Reference
from ..support.host import all_finite, together
from ..support.memory import RULE_BYTES, Chunks
from .curve import EndTable
from .integrand import all_values, check_finite
from .layout import Cut, Groups, Layout
from .network import Network
from .part import Part
from .rows import Draws, Rows, with_programs
from .rules import GROUPS, Rule
from .samples import Samples

KEY_WORDS = 1 << 14  # words of sample keys to make at once: few, larger calls to Philox


class Plan:
    """The evaluations of one estimate, whatever the samples.

    Arguments:
        network: the network that is evaluated.
        draws: where, and with which noise.
        chunks: how much at once, and how much may be kept between two calls.
        family: what all but the seed comes from.
        like: a plan of the same family, from which is taken what another seed does not change.
        values: what makes f of some samples' draws: `all_values`, or another with its arguments.
    """

    def __init__(
        self,
        network: Network,
        draws: Draws,
        chunks: Chunks,
        family: Hashable = None,
        like: Plan | None = None,
        values: Callable[..., Tensor] = all_values,
    ) -> None:
        self.network, self.draws, self.chunks, self.family, self.values = network, draws, chunks, family, values
        self._rules: dict[int, tuple[Rule, EndTable]] = {}
        self._joint: tuple[Layout, Rule, EndTable] | None = None
        self._rows: dict[tuple[int, range], Rows] = {}
        self._points: dict[range, Tensor] = dict(like._points) if like and draws.noise == "sobol" else {}
        self._groups = like._groups if like else None
        self._layout: Layout | None = None
        self._log_snr: tuple[Layout, Tensor] | None = None

    def run(
        self, samples: Samples, programs: tuple[RowProgram | None, ...], reference: Reference, check: bool = True
    ) -> Iterator[Part]:
        """Yield every sample's f of all draws: one group of samples after the other, or all if they are one chunk.

        Under autograd each chunk is recomputed in the backward pass, so memory stays that of one chunk. What a row
        program needs of the times alone is evaluated outside of the chunks, for as many groups at once as fit.

        Arguments:
            programs: the network's row program under each condition of the samples, None where it has none.
            reference: whose residual is subtracted.
            check: whether to wait for every chunk and look for NaN.

        Raises:
            ValueError: if an evaluation gives NaN or inf, and this is to be checked.
        """
        call, layout = _Call(samples, programs, reference, check), self.layout(samples)
        if layout.stack is None:
            yield from self._parts(layout, call)
        else:
            f = self._side_by_side(layout, call)
            if f is None:
                f = torch.cat([part.f for part in self._parts(layout, call)])
            yield Part(layout.groups.everyone, f, *self._stacked(layout, samples.device), layout.stack)
        if self.nbytes() > self.chunks.kept:
            for kept in (self._rules, self._rows, self._points):
                kept.clear()
            self._groups = self._layout = self._joint = self._log_snr = None
            self.draws.rules.forget()

    def _parts(self, layout: Layout, call: _Call) -> Iterator[Part]:
        together = max(1, self.chunks.groups)
        for start in range(0, len(layout.cuts), together):
            cuts = layout.cuts[start : start + together]
            tables = iter(self._tables(cuts, call) if self.chunks.groups else ())
            for cut in cuts:
                yield from self._group(layout, cut, call, list(islice(tables, len(cut.spans))))

    def _side_by_side(self, layout: Layout, call: _Call) -> Tensor | None:
        """Return f of all groups by one call of the network; None where each has tables of its own in a kernel.

        Only where nothing is differentiated, and by PyTorch's own operations on a CPU, which take a time for every
        sample: on a GPU the places of the samples would have to cross to it in a call that may be captured.
        """
        x = call.samples.x
        by_torch = x.device.type == "cpu" and runnable(x.device, x.dtype, self.network.backend)[0] == "torch"
        alone = self.values is not all_values or layout.keys is None or torch.is_grad_enabled()
        if alone or any(call.programs) or not by_torch:
            return None
        rows = Rows.side_by_side(self._tables(layout.cuts, call), [cut.here for cut in layout.cuts])
        f = all_values(self.network, call.samples, layout.keys, [rows], call.reference, len(self.draws))
        if call.check and not all_finite(f):
            for cut in layout.cuts:  # one of them says which sample it is, and at which of its own times
                check_finite(f[cut.here], call.samples.select(cut.here, cut.members), self.draws.rules.of(cut.group))
        return f[layout.groups.everyone]

    def layout(self, samples: Samples) -> Layout:
        """Return how these samples are cut."""
        layout = self._layout
        if layout is None or not torch.equal(layout.groups.index, samples.index):
            groups = self._groups
            if groups is None or not groups.are_of(samples):
                self._groups = groups = Groups.of(samples)
            cuts = groups.cuts(self.draws.rules.made_of(groups.members), len(self.draws), self.chunks)
            keys, sizes = None, groups.sizes
            if 8 * samples.x.numel() <= self.chunks.kept:
                keys = self.draws.keys(groups.index_here, samples.x.shape[1])
            whole = all(len(cut.spans) == 1 and cut.at_once == len(cut.here) for cut in cuts)
            stacked = len(cuts) > 1 and whole and len(cuts) * max(sizes) * self.draws.rules.nfe <= self.chunks.rows
            self._layout = layout = Layout(groups, cuts, keys, groups.stack if stacked else None)
        return layout

    def log_snr(self, samples: Samples) -> Tensor:
        """Return the log-SNR of every draw, averaged over some samples."""
        layout, found = self.layout(samples), self._log_snr
        if found is None or found[0] is not layout:
            parts = (len(cut.here) * self.draws.rules.of(cut.group).log_snr for cut in layout.cuts)
            found = self._log_snr = layout, sum(parts) / len(samples)
        return found[1]

    def copy(self, samples: Samples) -> Plan:
        """Return the same plan for some samples, with memory of its own that stays where it is."""
        found = Plan(self.network, self.draws, self.chunks._replace(kept=sys.maxsize))
        found._tensors(samples)
        return found

    def copy_(self, other: Plan, samples: Samples) -> None:
        """Take the tables of another seed for the same samples."""
        pairs = list(zip(self._tensors(samples), other._tensors(samples), strict=True))
        for size, word in ((4, torch.int32), (8, torch.int64)):  # whatever the numbers are: few launches
            same = [(own.view(word), given.view(word)) for own, given in pairs if own.itemsize == size]
            torch._foreach_copy_(*zip(*same))
        self.draws, self._log_snr = other.draws, None

    def nbytes(self) -> int:
        """Return the bytes of all that is kept."""
        found = [*self._points.values()]
        layout = self._layout
        if layout is not None:
            found += layout.tensors()
        for rows in self._rows.values():
            found += rows.tensors()
        for rule, ends in (*self._rules.values(), *([self._joint[1:]] if self._joint else [])):
            found += [*rule.tensors(), *ends]
        return self.draws.rules.nbytes() + sum(tensor.nbytes for tensor in found)

    def _tensors(self, samples: Samples) -> list[Tensor]:
        """Return everything that another seed changes, in the order of groups and draws, made where it is missing."""
        layout, device = self.layout(samples), samples.device
        keys = layout.keys
        if keys is None:  # they are more than this plan may keep
            keys = self.draws.keys(layout.groups.index_here, samples.x.shape[1])
        found = [keys]
        for span in dict.fromkeys(span for cut in layout.cuts for span in cut.spans):
            for rows in self._rows_of([cut.group for cut in layout.cuts], span, samples.x).values():
                found += rows.tensors() + [rows.points] * (rows.points is not self._points[span])
            found.append(self._points[span])
        if layout.stack is not None:
            rule, ends = self._stacked(layout, device)
            return [*found, *rule.tensors(), *ends]
        for cut in layout.cuts:
            rule, ends = self._rule_of(cut.group, device)
            found += [*rule.tensors(), *ends]
        return found

    def _stacked(self, layout: Layout, device: torch.device) -> tuple[Rule, EndTable]:
        """Return the rules of all groups as one."""
        joint = self._joint  # another thread may set its own meanwhile
        if joint is None or joint[0] is not layout:
            rules, ends = zip(*(self._on_host(cut.group) for cut in layout.cuts))
            rule, ends = Rule.stacked(rules, [len(cut.here) for cut in layout.cuts]), EndTable.stacked(ends)
            self._joint = joint = layout, *_on(rule, ends, device)
        return joint[1:]

    def _on_host(self, group: int) -> tuple[Rule, EndTable]:
        rule = self.draws.rules.of(group)
        return rule, EndTable.of(rule.log_snr, self.network.log_snr_range)

    def _group(self, layout: Layout, cut: Cut, call: _Call, tables: list[Rows]) -> Iterator[Part]:
        own = call.samples
        stacked = layout.stack is not None  # then the rules of all groups are one, which `_stacked` makes
        rule, ends = (self.draws.rules.of(cut.group), None) if stacked else self._rule_of(cut.group, own.device)
        if cut.members is not None:
            own = own.select(cut.here, cut.members)
            call = replace(call, samples=own)
        keys = self._keys(layout, cut, own)
        for start in range(0, len(own), cut.at_once):
            chosen, key = slice(start, start + cut.at_once), next(keys)
            part = own if cut.at_once >= len(own) else own.select(chosen)
            each = tables or (rows for span in cut.spans for rows in self._tables([cut._replace(spans=(span,))], call))
            f = self.values(self.network, part, key, each, call.reference, len(self.draws))
            if call.check:
                check_finite(f, part, rule)
            yield Part(cut.here[chosen], f, rule, ends)

    def _keys(self, layout: Layout, cut: Cut, own: Samples) -> Iterator[Tensor]:
        """Yield the keys of each chunk of a group's samples, made for several of them at once."""
        if layout.keys is not None:
            keys = layout.keys if cut.members is None else layout.keys[cut.here]
            yield from keys.split(cut.at_once)
            return
        d = own.x.shape[1]
        many = cut.at_once * max(1, KEY_WORDS // (cut.at_once * d))
        for index in own.index.to(own.device).split(many):
            yield from self.draws.keys(index, d).split(cut.at_once)

    def _tables(self, cuts: list[Cut], call: _Call) -> list[Rows]:
        """Return the rows of every span of some groups, with what the programs make of their times."""
        found = {}
        for span in dict.fromkeys(span for cut in cuts for span in cut.spans):
            found |= self._rows_of([cut.group for cut in cuts if span in cut.spans], span, call.samples.x)
        rows = [found[cut.group, span] for cut in cuts for span in cut.spans]
        return with_programs(rows, self.network, call.programs, call.samples)

    def _rows_of(self, groups: list[int], span: range, x: Tensor) -> dict[tuple[int, range], Rows]:
        """Return the rows of some draws by group; those that are missing are made together."""
        kept = {(group, span): self._rows.get((group, span)) for group in groups}
        missing = [group for (group, _), rows in kept.items() if rows is None]
        if missing:
            points = self._points.get(span)
            if points is None:
                if not self.chunks.groups:
                    self._points.clear()
                points = self._points[span] = self.draws.points(span, x.shape[1], x.device)
            rules = [self.draws.rules.of(group) for group in missing]
            made = Rows.of(self.network, rules, points, span, x, self.chunks.per_call)
            kept |= {(group, span): rows for group, rows in zip(missing, made)}
            if self.chunks.groups:
                self._rows |= kept
        return kept

    def _rule_of(self, group: int, device: torch.device) -> tuple[Rule, EndTable]:
        found = self._rules.get(group)
        if found is None:
            rule, ends = self._on_host(group)
            found = _on(rule, ends, device)
            if RULE_BYTES * len(self.draws) * GROUPS <= self.chunks.kept:
                self._rules[group] = found
        return found


def _on(rule: Rule, ends: EndTable, device: torch.device) -> tuple[Rule, EndTable]:
    if device.type == "cpu":
        return rule, ends
    *numbers, mean, spread, at = together([*rule.tensors(), *ends], device)
    return rule.with_tensors(numbers), EndTable(mean, spread, at)


@dataclass(frozen=True)
class _Call:
    """What one run is about."""

    samples: Samples
    programs: tuple[RowProgram | None, ...]
    reference: Reference
    check: bool

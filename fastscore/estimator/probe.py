"""Ask a network once whether its answers are its rows' own: the same for the same row, whatever else is in the batch.

The density formula evaluates every row by itself, at a time of its own. Networks written for samplers may read the
time of the first row alone, choose one expert for all rows, take statistics over the batch, or drop labels at random;
their numbers look like any others. Four calls tell: a batch of eight rows (two samples at four times) in many copies,
as many rows of the second time, many of the noisiest, and three of the cleanest; what one of them reads of its batch,
be it the first, the largest or the mean, is another thing in the others. Where conditions differ, a fifth begins with
the other sample. Some of the second call's rows stand where they stood in the first, which is of the same size: their
answers are the same to the bit, so that a coupling shows there however weak it is. Where something differs, more calls
name it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..process.network import predict
from ..process.schedules import Schedule
from ..support.memory import even
from ..support.untouched import uncompiled, undisturbed
from ..support.warn import warn
from .samples import Samples

# Of the range of log-SNR, from noise to data. Experts are chosen near its ends too: Wan 2.2's boundary, sigma = 0.875
# of a flow, lies at 0.34, a refiner's from 0.5 on. Beyond 0.9 an answer may be the rounded remainder of a difference.
TIMES = 0.35, 0.65, 0.01, 0.9
# Copies of eight rows: a label dropped in 10 % of the rows is seen with probability 1 - 0.9^24 = 92 % in one call and
# 99 % in two, and one call of 24 rows costs less than a tenth of an estimate's 256 evaluations.
COPIES = 3
# Rows of the largest call, which meets limits on a batch (an expert's capacity): fewer where its numbers are more.
MOST_ROWS, MOST_NUMBERS, FEWEST_ROWS = 128, 8192, 3
# Of the norm of an answer. Batches of another size are summed in another order, by other kernels, perhaps in tf32.
# In a batch of the same size and at the same place a row's answer is the same to the bit, whatever stands beside it.
SAME_PLACE = 1e-5
TOLERANCE = {torch.float64: 1e-6, torch.float32: 5e-3, torch.float16: 0.03, torch.bfloat16: 0.1}

LOOKED_AT = 32  # samples, for two whose conditions differ

RANDOM = "it draws random numbers, as dropout and label dropout (class_dropout_prob, cond_drop_prob) do"


class NetworkWarning(UserWarning):
    """A network's answer for a row depends on something else than the row."""


def warn_of_coupling(
    model: nn.Module,
    samples: Samples,
    schedule: Schedule,
    span: tuple[float, float],
    time_dtype: torch.dtype | None,
    most: int = MOST_ROWS,
    times: str = "mixed",
) -> None:
    """Warn if a network answers differently for the same rows, and say what differs and what to do.

    Arguments:
        samples: data; the first is used and one whose conditions are others, the last one where all have the same.
        span: the range of log-SNR; four times within it are used.
        most: rows that fit into memory at once.
        times: "mixed" in a batch, or "alike": then all rows have the first of the four.
    """
    with uncompiled(), undisturbed(model), torch.no_grad():
        found = _Asked(model, samples, schedule, span, time_dtype, most, times == "mixed").what_differs()
    if found is not None:
        warn(f"the network {found}", NetworkWarning)


class _Asked:
    """A network with eight rows, two samples at four times, that are put together into batches.

    Row k is of sample k % 2, at time k // 2. Where memory holds `most` rows at once, a batch that has more goes in
    several calls, as it does in an estimate: what rows that never meet do to each other is no matter.
    """

    def __init__(
        self,
        model: nn.Module,
        samples: Samples,
        schedule: Schedule,
        span: tuple[float, float],
        time_dtype: torch.dtype | None,
        most: int,
        mixed: bool,
    ) -> None:
        self.model, self.time_dtype, self.most, self.mixed = model, time_dtype, max(1, most), mixed
        unlike = unlike_first(samples)
        self.conditions_differ = unlike is not None
        other = len(samples) - 1 if unlike is None else unlike
        self.two = samples.select(torch.tensor([0, other], device=samples.device))
        # As noised as they will be, and apart even where both are the same sample.
        noise = torch.randn(2, samples.x.shape[1], generator=torch.Generator().manual_seed(0), device="cpu")
        self.noise = noise.to(samples.x)
        shares = TIMES if mixed else TIMES[:1] * len(TIMES)
        at = torch.tensor(shares, dtype=torch.float64, device="cpu") * (span[1] - span[0]) + span[0]
        times = schedule.time(at)
        self.alpha, self.sigma = (v.to(samples.x) for v in schedule.alpha_sigma(times))
        self.times = times.to(samples.device)
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), samples.x.dtype)
        self.tolerance = TOLERANCE.get(dtype, TOLERANCE[torch.float32])

    def call(self, kind: Tensor) -> Tensor:
        """Return the answers for a batch of such rows."""
        return torch.cat([self._call(part) for part in kind.split(even(len(kind), self.most))])

    def _call(self, kind: Tensor) -> Tensor:
        """Return them from one call, as of one sample with many rows, each with a time of its own."""
        kind = kind.to(self.noise.device)
        which, when = kind % 2, kind // 2
        rows = self.two.select(which)
        x_t = self.alpha[when, None] * rows.x + self.sigma[when, None] * self.noise[which]
        cond = rows.conds[0].tiled(1)  # conditions go along with the rows
        answer = predict(self.model, x_t[None], self.times[when], cond, rows.shape, self.time_dtype)[0]
        return answer.clone()  # the network may write every answer into the same memory

    def what_differs(self) -> str | None:
        eval_mode = "call model.eval(), or " if any(layer.training for layer in self.model.modules()) else ""
        kind = torch.arange(8, device="cpu").repeat(COPIES)
        batch = self.call(kind)
        if not _same(batch.reshape(COPIES, 8, -1), batch[None, :8], self.tolerance):
            if _same(self.call(kind), batch, SAME_PLACE):
                return (
                    "answers differently for the same row at two places of one batch, and the same when that is "
                    "evaluated again: the answer depends on the row's place, as with noise of a fixed seed or a limit "
                    "on the rows of an expert; make every row independent"
                )
            return f"answers differently for the same row in one batch: {RANDOM}; {eval_mode}turn them off"
        many = max(FEWEST_ROWS, min(self.most, MOST_ROWS, MOST_NUMBERS // self.noise.shape[1]))
        company = torch.arange(8 * COPIES, device="cpu") % 2 + 2  # rows 2 and 3, at the second time
        if not self.mixed:  # one sample alone, since the rows of all times are the same
            company = torch.full_like(company, 2)
        noisiest, cleanest = torch.arange(many, device="cpu") % 2 + 4, torch.tensor([7, 7, 7], device="cpu")
        others = [company, noisiest, cleanest]
        if self.conditions_differ:  # but for the cleanest, where they matter least, all begin with the first sample
            others.append(torch.tensor([3, 2, 2, 1, 0, 0], device="cpu"))
        answers = [self.call(few) for few in others]
        stayed = kind == company
        apart = not all(_same(found, batch[few], self.tolerance) for found, few in zip(answers, others))
        weakly = not _same(answers[0][stayed], batch[stayed], SAME_PLACE)
        if not apart and not weakly:
            return None
        again = [self.call(few) for few in [*others, kind]]
        if not apart and not _same(again[-1], batch, SAME_PLACE):
            return None  # sums in no fixed order, by as little
        if not all(_same(found, before, self.tolerance) for found, before in zip(again, [*answers, batch])):
            return (
                f"answers differently when the same batch is evaluated again: {RANDOM}, or it keeps something from "
                f"call to call, as a cache of features does; {eval_mode}turn them off"
            )
        if self._by_the_first_row(batch, (2, 4, 6)):  # the first sample at other times
            return (
                "answers for the time of the first row alone (t[0]) where a batch mixes times, as densities do; "
                "make it use one time a row, t of shape (rows,)"
            )
        if self.conditions_differ and self._by_the_first_row(batch, (1, 3, 5)):
            return (
                "answers for the condition of the first row alone (such as y[0]) where a batch mixes conditions; make "
                "it use one a row, or call it with samples of one condition at a time"
            )
        return (
            "lets the rows of a batch see each other (statistics over the batch, attention across it, one choice for "
            "all its times, or a limit on its rows), so that the answer for a sample depends on its company; "
            f"{eval_mode}make every row independent"
        )

    def _by_the_first_row(self, batch: Tensor, others: tuple[int, ...]) -> bool:
        """Return whether batches that start as the first did answer as it did, and some that start otherwise do not."""
        starts, turned = [], []
        for other in others:
            starts += [[0, other, other], [0, 0, 0, other]]
            turned += [[other, 0, 0], [other, other, other, 0]]

        def same(kinds: list[int]) -> bool:
            few = torch.tensor(kinds, device="cpu")
            return _same(self.call(few), batch[few], self.tolerance)

        return all(map(same, starts)) and not all(map(same, turned))


def unlike_first(samples: Samples) -> int | None:
    """Return the last of some samples, `LOOKED_AT` at most, whose conditions are not the first's; None without one."""
    at = torch.linspace(0, len(samples) - 1, min(len(samples), LOOKED_AT), device="cpu").round().long()
    apart = torch.zeros(len(at), dtype=torch.bool, device=samples.device)
    for cond in samples.conds:
        for value in cond.per_sample.values():
            some = value.detach()[at.to(value.device)]
            apart |= (some != some[:1]).reshape(len(at), -1).any(1).to(apart.device)
    found = apart.nonzero()
    return int(at[int(found[-1])]) if len(found) else None


def _same(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    gap = (found - expected).double()
    size = expected.double().norm(dim=-1, keepdim=True).clamp(min=1e-30)
    apart = (gap.norm(dim=-1, keepdim=True) > tolerance * size) | (found.isnan() != expected.isnan())
    return not bool(apart.any())

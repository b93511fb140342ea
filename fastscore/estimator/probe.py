"""Ask a network once whether its answers are its rows' own: the same for the same row, whatever else is in the batch.

The density formula evaluates every row by itself, at a time of its own. Networks written for samplers may read the
time of the first row alone, take statistics over the batch, or drop labels at random; their numbers look like any
others. Three calls tell: a batch of four rows (two samples at two times) in many copies, the rows of the first time,
and one row of the second; what one of them reads of its batch, be it the first, the largest or the mean, is another
thing in the others. Half of the second call's rows stand where they stood in the first, which is of the same size:
their answers are the same to the bit, so that a coupling shows there however weak it is. Where something differs, more
calls name it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..process.network import predict
from ..process.schedules import Schedule
from ..support.untouched import uncompiled, undisturbed
from ..support.warn import warn
from .samples import Samples

# Copies of four rows: a label dropped in 10 % of the rows is seen with probability 1 - 0.9^24 = 92 % in one call and
# 99 % in two, and one call of 24 rows costs less than a tenth of an estimate's 256 evaluations.
COPIES = 6
# Of the norm of an answer. Batches of another size are summed in another order, by other kernels, perhaps in tf32.
# In a batch of the same size and at the same place a row's answer is the same to the bit, whatever stands beside it.
SAME_PLACE = 1e-5
TOLERANCE = {torch.float64: 1e-6, torch.float32: 5e-3, torch.float16: 0.03, torch.bfloat16: 0.1}

RANDOM = "it draws random numbers, as dropout and label dropout (class_dropout_prob, cond_drop_prob) do; "


class NetworkWarning(UserWarning):
    """A network's answer for a row depends on something else than the row."""


def warn_of_coupling(
    model: nn.Module, samples: Samples, schedule: Schedule, span: tuple[float, float], time_dtype: torch.dtype | None
) -> None:
    """Warn if a network answers differently for the same rows, and say what differs and what to do.

    Arguments:
        samples: data; the first and the last sample are used, with their conditions.
        span: the range of log-SNR; two times within it are used.
    """
    with uncompiled(), undisturbed(model):
        found = _what_differs(model, samples, schedule, span, time_dtype)
    if found is not None:
        warn(f"the network {found}", NetworkWarning)


@torch.no_grad()
def _what_differs(
    model: nn.Module, samples: Samples, schedule: Schedule, span: tuple[float, float], time_dtype: torch.dtype | None
) -> str | None:
    two = samples.select(torch.tensor([0, len(samples) - 1], device=samples.device))
    # As noised as they will be, and apart even where both are the same sample.
    noise = torch.randn(2, samples.x.shape[1], generator=torch.Generator().manual_seed(0), device="cpu").to(samples.x)
    at = torch.tensor([0.35, 0.65], dtype=torch.float64, device="cpu") * (span[1] - span[0]) + span[0]
    times = schedule.time(at)
    alpha, sigma = (v.to(samples.x) for v in schedule.alpha_sigma(times))
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), samples.x.dtype)
    tolerance = TOLERANCE.get(dtype, TOLERANCE[torch.float32])

    def call(which: Tensor, when: Tensor) -> Tensor:
        which, when = which.to(samples.device), when.to(samples.device)
        rows, t = two.select(which), times.to(samples.device)[when]
        x_t = alpha[when, None] * rows.x + sigma[when, None] * noise[which]
        # As one sample with many rows, since every row has a time of its own; conditions go along with the rows.
        answer = predict(model, x_t[None], t, rows.conds[0].tiled(1), rows.shape, time_dtype)[0]
        return answer.clone()  # the network may write every answer into the same memory

    eval_mode = "call model.eval(), or " if any(layer.training for layer in model.modules()) else ""
    kind = torch.arange(4, device="cpu").repeat(COPIES)
    sample, time = kind % 2, kind // 2
    batch = call(sample, time)
    if not _same(batch.reshape(COPIES, 4, -1), batch[None, :4], tolerance):
        return f"answers differently for the same row in one batch: {RANDOM}{eval_mode}turn them off"
    early = torch.arange(4 * COPIES, device="cpu") % 2  # rows 0 and 1, at the first time
    last = torch.tensor([3, 3, 3], device="cpu")
    company, alone = (call(sample[few], time[few]) for few in (early, last))
    stayed = kind == early
    apart = not (_same(company, batch[early], tolerance) and _same(alone, batch[last], tolerance))
    weakly = not _same(company[stayed], batch[stayed], SAME_PLACE)
    if not apart and not weakly:
        return None
    again = [call(sample[few], time[few]) for few in (early, last, torch.arange(4 * COPIES, device="cpu"))]
    if not apart and not _same(again[2], batch, SAME_PLACE):
        return None  # sums in no fixed order, by as little
    if not all(_same(found, before, tolerance) for found, before in zip(again, (company, alone, batch))):
        return f"answers differently when the same batch is evaluated again: {RANDOM}{eval_mode}turn them off"
    mixed, turned = torch.tensor([[0, 3, 3], [3, 0, 0]], device="cpu")
    same = [_same(call(sample[few], time[few]), batch[few], tolerance) for few in (mixed, turned)]
    if same == [True, False]:  # the batch's own time goes with the first row
        return (
            "answers for the time of the first row alone (t[0]) where a batch mixes times, as densities do; "
            "make it use one time a row, t of shape (rows,)"
        )
    return (
        "lets the rows of a batch see each other (statistics over the batch, or attention across it), so that the "
        "answer for a sample depends on its company; " + eval_mode + "make every row independent"
    )


def _same(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    gap = (found - expected).double()
    size = expected.double().norm(dim=-1, keepdim=True).clamp(min=1e-30)
    apart = (gap.norm(dim=-1, keepdim=True) > tolerance * size) | (found.isnan() != expected.isnan())
    return not bool(apart.any())

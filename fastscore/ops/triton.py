"""The ops through Triton's kernels, for float32 data on a GPU; the same functions as `fastscore/ops/torch.py`.

Under TRITON_INTERPRET=1 they run on CPU tensors too, slowly: that is how tests hold them to the definition.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels import control as control_kernel
from ..kernels import density_mlp as fused
from ..kernels import density_mlp_dp as fused_dp
from ..kernels import density_mlp_dx as fused_dx
from ..kernels import density_mlp_wide as fused_wide
from ..kernels import launch, packing, panels
from ..kernels import loss_difference as loss_difference_kernel
from ..kernels import loss_rows as loss_rows_kernel
from ..kernels import perturb as perturb_kernel
from ..kernels import residual as residual_kernel
from ..kernels import summary as summary_kernel
from ..kernels import words as words_kernel
from ..support.warn import warn
from . import torch as torch_backend
from .instructions import decode
from .interpreting import interpreting
from .task import Evaluation, Task, WithRespectTo, plain

CONTROL_BYTES = 8 << 20  # of a reference's tables, or of x_t, where it is evaluated a part at a time


def words(seed: int, index: Tensor, draw: int, streams: range, d: int) -> Tensor:
    """Return `fastscore.ops.noise.words` of several streams, int32, (n, S, d), bit for bit."""
    return words_kernel.words(seed, index, draw, streams, d)


def keys(seed: int, index: Tensor, draw: int, streams: range, d: int, kept: int) -> Tensor:
    """Return `fastscore.ops.noise.sample_keys` of a shift and a multiplier, int32, (n, 2, d), bit for bit."""
    return words_kernel.words(seed, index, draw, streams, d, 1, kept)


Bars = summary_kernel.Bars


def summary(f: Tensor, *given: Any) -> Tensor:
    """Do what `fastscore.estimator.summary` does by torch; arguments as `kernels.summary.summary` takes them."""
    return summary_kernel.summary(f, *given)


def perturb(
    x: Tensor,
    keys: Tensor,
    points: Tensor,
    sign: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    keep_eps: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    return perturb_kernel.perturb(*_contiguous(x, keys, points, sign, alpha, sigma), keep_eps, dtype)


def residual(
    prediction: Tensor,
    x: Tensor,
    eps: Tensor,
    keys: Tensor,
    points: Tensor,
    sign: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
) -> Tensor:
    return residual_kernel.residual(*_contiguous(prediction, x, keys, points, sign, a, b, c))


def residual_backward(
    grad: Tensor,
    prediction: Tensor,
    x: Tensor,
    eps: Tensor,
    keys: Tensor,
    points: Tensor,
    sign: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
) -> tuple[Tensor, Tensor]:
    return residual_kernel.residual_backward(*_contiguous(grad, prediction, x, keys, points, sign, a, b, c))


def control(
    x: Tensor, keys: Tensor, points: Tensor, sign: Tensor, alpha: Tensor, sigma: Tensor, reference: list[Tensor]
) -> Tensor:
    d, components, full = x.shape[1], len(reference[0]), reference[3].numel() > 0
    kernel = why_not_control(components, full, d, x.device) is None
    if kernel and (d <= packing.MAX_BLOCK_D or (components == 1 and not full)):
        return control_kernel.control(*_contiguous(x, keys, points, sign, alpha, sigma), tuple(reference))
    # A part at a time, as nobody counts what this takes of memory: a kernel reads tables of the rows, made in float64,
    # PyTorch makes x_t of rows and samples.
    most = max(1, CONTROL_BYTES // (8 * components * d if kernel else x.element_size() * d))
    f = x.new_empty(len(x), len(points))
    for r in range(0, len(points), most):
        rows = slice(r, min(r + most, len(points)))
        given = points[rows], sign[rows], alpha[rows], sigma[rows]
        samples = len(x) if kernel else max(1, most // (rows.stop - r))
        for b in range(0, len(x), samples):
            some = slice(b, b + samples)
            if kernel:
                part = control_kernel.control(*_contiguous(x[some], keys[some], *given), tuple(reference))
            else:
                part = torch_backend.control(x[some], keys[some], *given, reference)
            f[some, rows] = part
    return f


def loss_rows(
    x: Tensor, words: Tensor, numbers: Tensor, signs: int, reference: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    found = loss_rows_kernel.loss_rows(*_contiguous(x, words, numbers), signs, *_contiguous(*reference[:3]))
    return found[0], x.new_empty(0), *found[1:]


def loss_difference(
    prediction: Tensor, x: Tensor, words: Tensor, eps: Tensor, control: Tensor, numbers: Tensor
) -> tuple[Tensor, Tensor]:
    return loss_difference_kernel.loss_difference(*_contiguous(prediction, x, words, control, numbers))


def loss_gradient(grad: Tensor, prediction: Tensor, x: Tensor, words: Tensor, eps: Tensor, numbers: Tensor) -> Tensor:
    return loss_difference_kernel.loss_gradient(*_contiguous(grad, prediction, x, words, numbers))


def density_mlp(given: Evaluation) -> Tensor:
    try:
        way = _way(given.task, precision(given.weights[0].dtype))
        run = fused_wide.density_mlp_wide if way.wide else fused.density_mlp
        f = run(*_arguments(given._replace(reference=[]) if way.apart else given))
    except launch.NoRoom as reason:  # only where nobody asked `why_not_fused`, or the device refused every launch
        warn(f"no Triton kernel fits this network, PyTorch evaluates it: {reason}", RuntimeWarning)
        return torch_backend.density_mlp(given)
    if not way.apart:
        return f
    return f - control(given.x, given.keys, given.points, given.rows[:, 0], given.alpha, given.sigma, given.reference)


def density_mlp_dx(grad: Tensor, given: Evaluation, splits: int | None = None) -> Tensor:
    return fused_dx.density_mlp_dx(grad.contiguous(), *_arguments(given), splits)


def density_mlp_dp(grad: Tensor, given: Evaluation, wanted: WithRespectTo, splits: int | None = None) -> list[Tensor]:
    return fused_dp.density_mlp_dp(grad.contiguous(), *_arguments(given), wanted, splits)


def _arguments(given: Evaluation) -> tuple[Any, ...]:
    """Return an evaluation as the kernels take it."""
    tensors, (code, weights, tables, reference) = _contiguous(*given[:6]), given[6:]
    return *tensors, plain(decode(code)), weights, tables, tuple(reference) or None, precision(weights[0].dtype)


def why_not_dx(task: Task) -> str | None:
    """Return why no kernel gives the gradient of `density_mlp` with respect to x alone, or None."""
    reason = fused_dx.why_not(task.code, list(task.shapes), task.d, task.components > 1, task.full)
    return reason or _room(task, precision(task.dtype), fused_dx.check_room)


def why_not_dp(task: Task, of_x: bool) -> str | None:
    """Return why no kernel gives the gradient of `density_mlp` in its parameters, and in x if wanted, or None."""
    if (reason := _dtype(task)) is not None:
        return reason
    reason = _room(task, precision(task.dtype), fused_dp.check_room)
    return reason or fused_dp.why_not(task.d, of_x, task.components > 1, task.full)


def bytes_dp(task: Task) -> int:
    """Return what the kernel of the parameters' gradient takes of memory for one row, at most."""
    itemsize = launch.OPERANDS[precision(task.dtype)].itemsize
    return fused_dp.row_bytes(task.code, list(task.shapes), task.d, itemsize)


def precision(dtype: torch.dtype) -> str:
    """Return the precision of matrix products for weights of a dtype.

    Half ones keep theirs; float32 follows torch's own switch, `torch.set_float32_matmul_precision`.
    """
    if dtype == torch.bfloat16:
        return "emulated bf16" if interpreting() else "bf16"
    if interpreting():
        return "ieee"
    if dtype == torch.float16:
        return "fp16"
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def why_not_fused(task: Task) -> str | None:
    """Return why no fused kernel can run a row program, or None; whatever its reference, which may come apart."""
    if (reason := _dtype(task)) is not None:
        return reason
    try:
        _way(task, precision(task.dtype))
    except launch.NoRoom as error:
        return str(error)
    return None


def why_not_unasked(task: Task) -> str | None:
    """Return why "auto" leaves a program to others that `why_not_fused` has no objection to, or None."""
    if not _way(task, precision(task.dtype)).wide:
        return None
    return "its kernel of wide layers is not measured yet; backend='triton' takes it"


class Way(NamedTuple):
    """Which fused kernel runs a program."""

    wide: bool  # that of wide layers, `kernels/density_mlp_wide.py`
    apart: bool  # whether the reference is evaluated by itself, and subtracted


@lru_cache(maxsize=256)
def _way(task: Task, precision: str) -> Way:
    """Return how a program runs: in one pass with its reference where that fits.

    Raises:
        NoRoom: if no fused kernel runs it.
    """
    reason = packing.why_not(task.code, list(task.shapes), task.d, panels.MAX_WIDTH)
    if reason is not None:
        raise launch.NoRoom(reason)
    device, along_axes = launch.Device.of(task.device), task.components < 2 and not task.full
    ways = [Way(wide=True, apart=not along_axes)]
    if task.width <= launch.MAX_WIDTH[task.dtype.itemsize]:
        ways[:0] = [Way(wide=False, apart=True)] * (not along_axes)
        one_chunk = task.d <= packing.MAX_BLOCK_D
        if along_axes or (one_chunk and why_not_control(task.components, task.full, task.d, task.device) is None):
            ways[:0] = [Way(wide=False, apart=False)]
    for way in ways:
        work = _work(task._replace(components=0, full=False) if way.apart else task, precision)
        try:
            (panels.Panels.choose if way.wide else launch.Config.from_heuristic)(work, device)
        except launch.NoRoom:
            if way.wide:
                raise
        else:
            return way
    raise AssertionError("the last way raises")


def _dtype(task: Task) -> str | None:
    if task.dtype in (torch.float32, torch.bfloat16, torch.float16):
        return None
    return f"weights are {task.dtype}, the kernel takes float32, bfloat16 and float16"


@lru_cache(maxsize=256)
def _room(task: Task, precision: str, choose: Callable[[launch.Work, launch.Device], object]) -> str | None:
    """Return why a gradient's kernel cannot be launched, or None; `choose` raises NoRoom where nothing fits."""
    reason = packing.why_not(task.code, list(task.shapes), task.d, launch.MAX_WIDTH[task.dtype.itemsize])
    reason = reason or why_not_control(task.components, task.full, task.d, task.device)
    if reason is not None:
        return reason
    work, device = _work(task, precision), launch.Device.of(task.device)
    try:
        choose(work, device)
    except launch.NoRoom as error:
        return str(error)
    return None


def _work(task: Task, precision: str) -> launch.Work:
    """Return what a launch would be chosen for, from shapes alone."""
    two = {"r": (1, 2), "b": (2, 1), "br": (2, 2)}
    weights = [torch.zeros((), dtype=task.dtype, device="cpu").expand(shape) for shape in task.shapes]
    tables = [torch.zeros(*two[level], 1, device="cpu") for level in task.levels]
    into, operands = packing.Tables(2, 2), launch.OPERANDS[precision]
    layout, _ = packing.pack_network(task.code, weights, tables, task.d, into, operands)
    kind = control_kernel.kind_of(task.components, task.full)
    return launch.Work(layout, task.d, kind, max(1, task.components), precision)


def why_not_control(components: int, full: bool, d: int, device: torch.device) -> str | None:
    """Return why a kernel cannot evaluate a reference, or None; PyTorch does then, in the same function."""
    return control_kernel.why_not(components, full, d, launch.Device.of(device).shared)


def _contiguous(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.contiguous() for t in tensors)

"""The ops through Triton's kernels, for float32 data on a GPU; the same functions as `backends/torch.py`.

Under TRITON_INTERPRET=1 they run on CPU tensors too, slowly: that is how tests hold them to the definition.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..instructions import Instruction, decode
from ..kernels import control as control_kernel
from ..kernels import density_mlp as fused
from ..kernels import density_mlp_dx as fused_dx
from ..kernels import packing
from ..kernels import perturb as perturb_kernel
from ..kernels import residual as residual_kernel
from . import interpreting


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
    return control_kernel.control(*_contiguous(x, keys, points, sign, alpha, sigma), tuple(reference))


def density_mlp(
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
) -> Tensor:
    return fused.density_mlp(
        *_contiguous(x, keys, points, rows, alpha, sigma),
        plain(decode(code)),
        weights,
        tables,
        tuple(reference) or None,
        precision(weights[0].dtype),
    )


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
    splits: int | None = None,
) -> Tensor:
    return fused_dx.density_mlp_dx(
        *_contiguous(grad, x, keys, points, rows, alpha, sigma),
        plain(decode(code)),
        weights,
        tables,
        tuple(reference) or None,
        precision(weights[0].dtype),
        splits,
    )


def why_not_dx(code: str, weights: list[Tensor], d: int, reference: list[Tensor]) -> str | None:
    """Return why no kernel gives the gradient of `density_mlp` with respect to x, or None."""
    many, full = (len(reference[0]) > 1, reference[3].numel() > 0) if reference else (False, False)
    return fused_dx.why_not(plain(decode(code)), [tuple(w.shape) for w in weights], d, many, full)


def precision(dtype: torch.dtype) -> str:
    """Return the precision of matrix products for weights of a dtype: half ones keep theirs, float32 follows torch's
    own switch, `torch.set_float32_matmul_precision`."""
    if dtype == torch.bfloat16:
        return "emulated bf16" if interpreting() else "bf16"
    if interpreting():
        return "ieee"
    if dtype == torch.float16:
        return "fp16"
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def why_not_fused(code: list[Instruction], weights: list[Tensor], d: int) -> str | None:
    """Return why the fused kernel cannot run a row program, or None."""
    dtype = weights[0].dtype
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"weights are {dtype}, the kernel takes float32, bfloat16 and float16"
    widest = fused.MAX_WIDTH[dtype.itemsize]
    return packing.why_not(plain(code), [tuple(w.shape) for w in weights], d, widest)


def why_not_control(components: int, full: bool, d: int) -> str | None:
    """Return why a kernel cannot evaluate a reference, or None."""
    return control_kernel.why_not(components, full, d)


def plain(code) -> tuple:
    return tuple((type(op).__name__.lower(), *op) for op in code)


def _contiguous(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.contiguous() for t in tensors)

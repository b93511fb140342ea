"""The kernels around a network, compiled without a GPU as `aot.py` compiles the fused ones."""

from __future__ import annotations

from typing import NamedTuple

import triton
from fastscore.kernels import control, loss_difference, loss_rows, perturb, residual, summary, words
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

_EXACT = (
    "numbers weight mean variance log_q base remainder curve even last off off_remainder off_noise means spreads at "
    "value bars jump ends plain rule_error parts"
)
# Arguments by type; other pointers are to float32, other numbers int32.
TYPES = {
    "*bf16": ["x_t_ptr", "prediction_ptr", "grad_prediction_ptr"],
    "*i32": ["keys_ptr", "points_ptr", "words_ptr"],
    "*i64": ["index_ptr", "chosen_ptr", "group_ptr"],
    "*fp64": [f"{name}_ptr" for name in _EXACT.split()],
    "fp32": ["level", "ordinary", "odd_ratio", "lo", "hi", "known", "expected", "eps", "size", "noisy", "clean"],
    "i64": ["seed", "kept"],
}
OWN = {"diagonal_fwd": {"alpha_ptr": "*fp64", "sigma_ptr": "*fp64"}}


class Thin(NamedTuple):
    """A kernel with what is fixed when it is compiled."""

    kernel: triton.JITFunction
    constants: dict[str, object]
    warps: int = 4


_ROW = {"BLOCK_N": 1, "BLOCK_D": residual.TILE}
_SUMMARY = {"BLOCK_B": summary.BLOCK_B, "BLOCK_N": summary.BLOCK_N, "BLOCK_D": summary.BLOCK_D}
_SUMMARY |= {"GROUPED": True, "GAUSSIAN": True}
THIN = {
    "perturb_fwd": Thin(perturb.perturb_fwd_kernel, {"KEEP_EPS": False, "BLOCK_N": 4, "BLOCK_D": 256}),
    "residual_fwd": Thin(residual.residual_fwd_kernel, _ROW),
    "residual_bwd": Thin(residual.residual_bwd_kernel, {"BLOCK_B": 1, "BLOCK_D": residual.TILE}),
    "diagonal_fwd": Thin(
        control.diagonal_fwd_kernel, {"D": 3072, "BLOCK_B": control.BLOCK_B, "BLOCK_D": 128}, control.NUM_WARPS
    ),
    "loss_rows_fwd": Thin(loss_rows.loss_rows_fwd_kernel, _ROW | {"SIGNS": 2, "SHARED": False}),
    "loss_difference_fwd": Thin(loss_difference.loss_difference_fwd_kernel, _ROW | {"SIGNS": 2}),
    "loss_difference_bwd": Thin(loss_difference.loss_difference_bwd_kernel, _ROW | {"SIGNS": 2}),
    **{
        name: Thin(summary.summary_kernel, _SUMMARY | {"MEASURED": measured, "TABLE": table}, summary.NUM_WARPS)
        for name, measured, table in (
            ("summary_fwd", False, False),
            ("summary_fwd, calibrated", True, False),
            ("summary_fwd, of a table", False, True),
        )
    },
    "words_fwd": Thin(words.words_kernel, {"BLOCK": words.MAX_BLOCK}, 1),
}


def compile_thin(name: str, capability: int):
    """Return a compiled kernel, for a network in bfloat16 and 3,072 dimensions."""
    kernel, constants, warps = THIN[name]
    types = {argument: kind for kind, arguments in TYPES.items() for argument in arguments} | OWN.get(name, {})
    signature = {
        n: "constexpr" if n in constants else types.get(n, "*fp32" if n.endswith("_ptr") else "i32")
        for n in kernel.arg_names
    }
    attrs = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(kernel.arg_names) if n.endswith("_ptr") or n == "D"}
    attrs = {place: value for place, value in attrs.items() if kernel.arg_names[place[0]] not in constants}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attrs)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})

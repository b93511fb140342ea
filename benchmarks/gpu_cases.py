"""The row programs that GPU benchmarks evaluate, and every way to evaluate them: by module, by op, by one launch.

Every way evaluates the same f for the same samples and noise, with an isotropic Gaussian as reference: 2^20 rows.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cached_property

import real_networks as nets
import torch
from measuring import DEVICE, REHEARSING
from networks import mlp
from torch import Tensor, nn

import fastscore as fs
from fastscore.ops import cuda, noise, select
from fastscore.ops import definitions as ops
from fastscore.ops import torch as truth
from fastscore.ops import triton as through_triton
from fastscore.ops.instructions import decode, encode
from fastscore.ops.steps import Steps
from fastscore.ops.task import Task, plain
from fastscore.program.row_program import RowProgram

SAMPLES, DRAWS, D = (5, 3, 13) if REHEARSING else (4096, 256, 64)
CHUNK = 64  # samples at once of eager and compiled PyTorch: 16,384 rows
FEW = slice(0, 3)  # samples that are compared with float64
SCHEDULE = fs.VP()


@dataclass(frozen=True)
class Case:
    """A network shape; `flops` counts two for a multiply-add of the layers that depend on x."""

    kind: str
    width: int
    depth: int

    @property
    def name(self) -> str:
        return f"{self.kind} H={self.width} L={self.depth}"

    def network(self) -> nn.Module:
        return (
            head(self.width, self.depth, self.width)
            if self.kind == "adaLN"
            else mlp(D, self.width, self.depth).to(DEVICE)
        )

    @property
    def flops(self) -> int:
        hidden = 2 * self.depth if self.kind == "adaLN" else self.depth - 1
        return 2 * (2 * D * self.width + hidden * self.width**2)

    @property
    def tolerance(self) -> float:
        """The largest relative error of f with bf16 operands through 2 depth + 2 products: each rounds to 2^-9 at
        random; four times the root of their sum."""
        return 4 * (2 * self.depth + 2) ** 0.5 * 2.0**-9


def head(width: int, depth: int, rehearsed: int = 16) -> nn.Module:
    """Return a MAR head, in a rehearsal of another width, with weights as large as trained ones: its users start from
    zeros, which would hide errors and run too fast."""
    torch.manual_seed(0)
    net = nets.MARHead(D, rehearsed if REHEARSING else width, depth)
    for p in net.parameters():
        nn.init.normal_(p, std=0.5 / p.shape[-1] ** 0.5)
    return net.eval().to(DEVICE)


# The first tell most: every width, and both kinds where the kernels differ most.
FIRST = [*(Case("adaLN", width, 3) for width in (64, 128, 256, 512)), Case("plain", 128, 3), Case("plain", 256, 3)]
LATER = [
    Case("adaLN", 1024, 3),
    Case("plain", 64, 3),
    Case("plain", 512, 3),
    *(Case("adaLN", width, 6) for width in (64, 128, 256)),
]
FIRST, LATER = ([Case("adaLN", 16, 2)], [Case("plain", 16, 2)]) if REHEARSING else (FIRST, LATER)
CASES = [*FIRST, *LATER]


class Problem:
    """Samples, noise words and tables of one case, and the ways to evaluate f on them."""

    def __init__(self, case: Case):
        generator = torch.Generator().manual_seed(1)
        self.module, self.x = case.network(), torch.randn(SAMPLES, D, generator=generator).to(DEVICE)
        self.keys = noise.sample_keys("independent", 0, torch.arange(SAMPLES, device=DEVICE), D)
        self.points = noise.points("independent", 0, range(DRAWS), DRAWS, D, torch.device(DEVICE))
        time = SCHEDULE.time(torch.linspace(-8, 8, DRAWS, dtype=torch.float64))
        self.alpha, self.sigma = (v.to(DEVICE) for v in SCHEDULE.alpha_sigma(time))
        self.time = time.float().to(DEVICE)
        ones, zeros = torch.ones(DRAWS, device=DEVICE), torch.zeros(DRAWS, device=DEVICE)
        self.rows = torch.stack([ones, self.alpha.float(), self.sigma.float(), ones, zeros, ones], 1)
        self.reference = fs.Reference.isotropic().to(DEVICE)
        self.gaussian = self.reference.tensors()

    def by_module(self, module: nn.Module, x: Tensor, keys: Tensor) -> Tensor:
        """The plain way: every row through the network, in the network's dtype."""
        sign, alpha, sigma, a, b, c = self.rows.unbind(1)
        x_t, eps = truth.perturb(x, keys, self.points, sign, alpha, sigma)
        dtype = next(module.parameters()).dtype
        flat = x_t.flatten(0, 1).to(dtype)
        prediction = module(flat, self.time.repeat(len(x)))[:, :D].reshape(x_t.shape).to(x.dtype)
        error = torch.linalg.vector_norm(a[:, None] * eps + b[:, None] * x[:, None] - prediction, dim=-1)
        return (c * error).square() - self.reference.residual(x, x_t, eps, self.alpha, self.sigma)

    def in_chunks(self, run) -> Tensor:
        pairs = zip(self.x.split(CHUNK), self.keys.split(CHUNK))
        return torch.cat([run(x, keys) for x, keys in pairs])

    def compiled(self):
        """Return `by_module` of the bf16 network under torch.compile."""
        module = copy.deepcopy(self.module).bfloat16()
        return torch.compile(lambda x, keys: self.by_module(module, x, keys), dynamic=False)

    @cached_property
    def exact(self) -> Tensor:
        """Return f of the first samples in float64."""
        module = copy.deepcopy(self.module).double()
        return self.by_module(module, self.x[FEW].double(), self.keys[FEW])

    def error(self, bound, backend: str) -> float:
        """Return the largest relative error of f by op."""
        return self.error_of(self.by_op(bound, backend))

    def error_of(self, f: Tensor) -> float:
        """Return the largest relative error of f on the first samples of a whole launch; NaN if an f is none."""
        exact = self.exact
        scale = exact.abs() + exact.abs().mean()
        return float("nan") if f.isnan().any() else float(((f[FEW] - exact).abs() / scale).max())

    def bound(self, dtype: torch.dtype):
        """Return the row program's code, weights and tables in a dtype."""
        program = RowProgram.trace(copy.deepcopy(self.module).to(dtype), (D,), self.time[:4], dtype=dtype)
        return encode(program.code), *program.bind(self.time)

    def by_op(self, bound, backend: str = "triton") -> Tensor:
        code, weights, tables = bound
        rest = self.rows, self.alpha, self.sigma, code, weights, tables, self.gaussian, backend
        return ops.density_mlp(self.x, self.keys, self.points, *rest)

    def why_not(self, bound) -> dict[str, str | None]:
        """Return why each backend has no kernel for the network, or None where it has one."""
        task = Task.of_tensors(decode(bound[0]), *bound[1:], D, self.gaussian)
        native = select._cuda_why_not(torch.device(DEVICE), torch.float32)
        return {"cuda": native or cuda.why_not_fused(task), "triton": through_triton.why_not_fused(task)}

    def packed(self, bound, by_instructions: bool = False) -> cuda.Packed | cuda.PackedSteps:
        """Return the problem as a compiled kernel reads it: the chosen one, or the one that runs instructions."""
        if by_instructions:
            return self.packed_as(bound, "asked for")
        return self.packed_as(bound, cuda.steps_of(Task.of_tensors(decode(bound[0]), *bound[1:], D, self.gaussian)))

    def packed_as(self, bound, steps: Steps | str) -> cuda.Packed | cuda.PackedSteps:
        """Return the same as given steps, or by instructions where those are a text."""
        code, weights, tables = bound
        words = self.keys, self.points, self.rows, self.alpha, self.sigma
        return cuda.pack(self.x, *words, plain(decode(code)), weights, tables, self.gaussian, steps)

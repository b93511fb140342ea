"""Rows of `make gpu-bench` about whole calls, as a user makes them: wall time a call, what stands beside it, memory."""

from __future__ import annotations

import sys
from importlib.util import find_spec

import ode_peers
import torch
from gpu_cases import SCHEDULE, D, head
from measuring import DEVICE, REHEARSING, Row, below, once, peak_megabytes, wall
from networks import ConvNet
from steps import report, said
from torch import Tensor

import fastscore as fs
from fastscore.ops.select import BACKENDS

DTYPES = {"bf16": torch.bfloat16, "float32": torch.float32}
NFE, FEW = (8, 8) if REHEARSING else (256, 64)
DEPTH = 3


def data(count: int) -> Tensor:
    """Return samples, a handful in a rehearsal."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(4 if REHEARSING else count, D, generator=generator).to(DEVICE)


def public_calls() -> None:
    """Make calls of the README on this device and on the CPU: the same seeds give the same numbers, to rounding."""
    failed = []
    for name, call in PUBLIC.items():
        try:
            # Float32 sums over at most 64 draws of 64 dimensions, some of their products in tf32x3.
            difference = below(_apart(call(DEVICE), call("cpu")), 1e-3, f"the difference of {DEVICE} and CPU")
            print(f"{name}: apart by {difference:.1e} of their size")
        except Exception as error:
            failed.append(name)
            print(f"{name}: {said(error)}")
            report(failure=name, why=said(error))
    if failed:
        sys.exit(f"{len(failed)} of {len(PUBLIC)} failed: {', '.join(failed)}")


def _apart(found: Tensor, expected: Tensor) -> float:
    return float((found.cpu() - expected).double().norm() / expected.double().norm())


def _density(device: str) -> tuple[fs.ScoreDensity, Tensor]:
    x = torch.randn(64, D, generator=torch.Generator().manual_seed(2)).to(device)
    return fs.ScoreDensity(head(64, DEPTH).to(device), SCHEDULE, "eps", nfe=FEW), x


def _fitted(device: str) -> Tensor:
    density, x = _density(device)
    return density.fit(x, reference="diagonal", evaluations=2000, progress=False).estimate(x).log_prob


def _trained(device: str) -> Tensor:
    density, x = _density(device)
    fs.density_loss(density, x, seed=3).mean().backward()
    return torch.cat([p.grad.flatten() for p in density.parameters() if p.grad is not None])


def _differentiated(device: str) -> Tensor:
    density, x = _density(device)
    x.requires_grad_()
    return torch.autograd.grad(density.log_prob(x).sum(), x)[0]


def _by_name(device: str) -> Tensor:
    """Return the gradient of the weights, on the device by Triton's kernel."""
    density, x = _density(device)
    backend = "triton" if device == DEVICE else "torch"
    density = fs.ScoreDensity(density.model, SCHEDULE, "eps", backend=backend, nfe=FEW)
    density.log_prob(x[:8]).mean().backward()
    return torch.cat([p.grad.flatten() for p in density.parameters() if p.grad is not None])


def _captured(device: str) -> Tensor:
    density, x = _density(device)
    return fs.CapturedDensity(density, x)(x)[0]


def _flow(device: str) -> Tensor:
    density, x = _density(device)
    return fs.probability_flow_log_prob(density, x, method="midpoint", steps=4).log_prob


PUBLIC = {
    "estimate": lambda device: (lambda density, x: density.estimate(x).log_prob)(*_density(device)),
    "fit, estimate": _fitted,
    "log_prob, gradient of x": _differentiated,
    "log_prob, gradient of the weights by triton": _by_name,
    "density_loss, gradient of the weights": _trained,
    "CapturedDensity": _captured,
    "probability_flow_log_prob": _flow,
}


def estimate(width: int, dtype: str) -> Row:
    """`estimate` by every backend, and the automatic choice: 4,096 samples, 256 evaluations."""
    network, x = head(width, DEPTH).to(DTYPES[dtype]), data(4096)
    row, expected = Row("estimates", network=f"adaLN H={width} L={DEPTH}, {dtype}", samples=len(x), nfe=NFE), None
    for backend in ("torch", "auto", "triton", "cuda"):
        if _cannot(backend, x):
            continue
        density = fs.ScoreDensity(network, SCHEDULE, "eps", backend=backend, nfe=NFE)

        def call(density: fs.ScoreDensity = density) -> fs.Estimate:
            return density.estimate(x)

        row.measure(f"{backend}, ms", lambda call=call: wall(call))
        if row[f"{backend}, ms"] is not None:
            row.measure(f"{backend}, peak MB", lambda call=call: peak_megabytes(call))
            expected = expected or call()
            row.measure(f"{backend}, from torch", lambda call=call, expected=expected: _stderrs(call(), expected))
    return row


def _stderrs(found: fs.Estimate, expected: fs.Estimate) -> float:
    """Return how far two estimates with the same draws are apart, in standard errors: rounding alone, far below what
    the draws leave."""
    return below(float(((found.log_prob - expected.log_prob).abs() / expected.stderr).mean()), 0.25, "the difference")


def captured(dtype: str = "bf16") -> Row:
    """A small batch, where launches cost most: `estimate` and `CapturedDensity`, 16 samples, 64 evaluations."""
    density, x = fs.ScoreDensity(head(64, DEPTH).to(DTYPES[dtype]), SCHEDULE, "eps"), data(16)
    row = Row("calls", call=f"CapturedDensity, adaLN H=64, {dtype}, {len(x)} samples, nfe={FEW}")

    def replay() -> float:
        capture = fs.CapturedDensity(density, x, nfe=FEW)
        torch.testing.assert_close(capture(x)[0], density.estimate(x, nfe=FEW).log_prob, rtol=1e-4, atol=1e-2)
        return wall(lambda: capture(x))

    row.measure("ms", replay)
    row.beside("estimate", lambda: wall(lambda: density.estimate(x, nfe=FEW)))
    return row


def training_step() -> Row:
    """One step of AdamW with `density_loss` beside one with the plain eps-loss: 4,096 samples, float32."""
    x = data(4096)
    network = head(64, DEPTH).train()
    optimizer = torch.optim.AdamW(network.parameters())
    density = fs.ScoreDensity(network, fs.Cosine(), predicts="v")
    row = Row("calls", call=f"density_loss step, adaLN H=64, float32, {len(x)} samples")

    def stepping(loss) -> float:
        def step() -> None:
            value = loss()
            optimizer.zero_grad()
            value.backward()
            optimizer.step()

        return wall(step, 20)

    def plain() -> Tensor:
        t, eps = torch.rand(len(x), device=DEVICE), torch.randn_like(x)
        x_t = (1 - t).sqrt()[:, None] * x + t.sqrt()[:, None] * eps
        return (network(x_t, t)[:, :D] - eps).square().sum(1).mean()

    row.measure("ms", lambda: stepping(lambda: fs.density_loss(density, x, seed=1)))
    row.beside("eps-loss step", lambda: stepping(plain))
    return row


def gradient(chosen: str = "auto", dtype: str = "float32") -> Row:
    """`log_prob(x).mean().backward()` by a backend beside the torch one: 1,024 samples, nfe=64.

    The automatic choice leaves the gradient to PyTorch; "triton", asked for by name, has a kernel for it.
    """
    network, x = head(64, DEPTH).to(DTYPES[dtype]), data(1024)
    name = f"log_prob(nfe={FEW}).mean().backward() by {chosen}, adaLN H=64, {dtype}, {len(x)} samples"
    row = Row("calls", call=name)

    def backward(backend: str):
        density = fs.ScoreDensity(network, SCHEDULE, "eps", backend=backend)
        return lambda: density.log_prob(x, nfe=FEW, seed=0).mean().backward()

    def gradients(backend: str) -> Tensor:
        network.zero_grad()
        backward(backend)()
        return torch.cat([p.grad.flatten().float() for p in network.parameters() if p.grad is not None])

    def difference() -> float:
        found, expected = gradients(chosen), gradients("torch")
        # Sums over 65,536 rows in float32; bfloat16 is rounded at other places, to 2^-9 in sixteen products.
        limit = 1e-3 if dtype == "float32" else 0.05
        return below(float((found - expected).norm() / expected.norm()), limit, "the difference")

    row.measure("difference", difference)
    row.measure("ms", lambda: wall(backward(chosen)))
    row.measure("peak MB", lambda: peak_megabytes(backward(chosen)))
    row.beside("torch backend", lambda: wall(backward("torch")))
    return row


def thin_path() -> Row:
    """`estimate` of a convolutional network beside its bare forward passes: 16 images by 64 draws at 3 x 32 x 32."""
    samples, side, width = (2, 8, 4) if REHEARSING else (16, 32, 128)
    model = _convolutional(width)
    dtype, x = next(model.parameters()).dtype, torch.randn(samples, 3, side, side, device=DEVICE)
    rows = torch.randn(samples * FEW, *x.shape[1:], device=DEVICE).to(dtype)
    t = torch.rand(len(rows), device=DEVICE)
    row = Row("calls", call=f"estimate, ConvNet({width}), {samples} images x {FEW} draws")
    density = fs.ScoreDensity(model, SCHEDULE, "eps")
    row.measure("ms", lambda: wall(lambda: density.estimate(x, nfe=FEW)))
    with torch.no_grad():
        row.beside("bare forward passes", lambda: wall(lambda: model(rows, t)))
    return row


def ode() -> Row:
    """The probability-flow ODE, exact trace: the midpoint rule beside torchdiffeq's rk4 for as many evaluations."""
    density, x = fs.ScoreDensity(head(64, DEPTH), SCHEDULE, "eps"), data(256)
    steps = 2 if REHEARSING else 4
    row = Row("calls", call=f"probability_flow_log_prob, midpoint, {2 * steps} evaluations, exact, {len(x)} samples")

    def run(**options):
        return lambda: fs.probability_flow_log_prob(density, x, **options)

    row.measure("ms", lambda: wall(run(method="midpoint", steps=steps), 3))
    if find_spec("torchdiffeq"):
        row.beside("torchdiffeq rk4, as many evaluations", lambda: wall(run(method="rk4", steps=steps // 2), 3))
    return row


def ode_beside_peers(d: int) -> Row:
    """The ODE of a small flow to a given error, by tangents, by backward passes, and in other libraries."""
    row = Row("ODE", network=f"flow of three layers, d = {d}")
    for found in ode_peers.rows(d, DEVICE):
        row.measure(f"{found['method']}, {found['error']:g} nats, ms", lambda found=found: found["ms"])
    return row


def fit() -> Row:
    """`fit` to 1,000 samples: the first time, when kernels are compiled and programs found, and again."""
    x, spent = torch.randn(40 if REHEARSING else 1000, D, device=DEVICE), 2000 if REHEARSING else 400_000
    density = fs.ScoreDensity(head(64, DEPTH), SCHEDULE, "eps")
    row = Row("calls", call=f"fit, adaLN H=64, float32, {len(x)} samples")

    def fitting() -> None:
        density.fit(x, evaluations=spent, progress=False)

    row.measure("ms", lambda: once(fitting))
    row.beside("the same again", lambda: wall(fitting, 1))
    return row


def memory(budget: str) -> Row:
    """The peak of tensors beside the budget, of a convolutional network's `estimate`: 64 images, 256 draws."""
    density = fs.ScoreDensity(_convolutional(4 if REHEARSING else 128), SCHEDULE, "eps")
    x = torch.randn(2 if REHEARSING else 64, 3, *(8, 8) if REHEARSING else (32, 32), device=DEVICE)
    row, allowed = Row("memory", network="ConvNet", budget=budget), 1.05 * float(budget[:-2])  # its MB are 2^20 bytes

    def call() -> None:
        density.estimate(x, nfe=NFE, memory=budget)

    row.measure("peak, MB", lambda: below(peak_megabytes(call), allowed, "it"))
    return row


def _convolutional(width: int) -> ConvNet:
    torch.manual_seed(0)
    return ConvNet(width).eval().to(DEVICE, torch.float32 if REHEARSING else torch.bfloat16)


def _cannot(backend: str, x: Tensor) -> str | None:
    """Return why a backend cannot run here, or None; "auto" always can."""
    return next((b.why_not(x.device, x.dtype) for b in BACKENDS if b.name == backend), None)

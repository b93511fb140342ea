"""The ODE of a small trained flow: seconds and network calls for a given error, beside zuko and flow_matching.

    python benchmarks/ode_peers.py 2 16

Each library solves its own ODE (they differ by the prior at the noisy end, and by where the path ends), so the error
of each is that from its own answer in float64 on a much finer grid: what is left is discretization and rounding. All
call the same network in float32 with the exact trace: three layers of 64, trained with the flow's plain loss on a
mixture of five Gaussians. Seconds are the process's own on a CPU, and wall time with a wait on a GPU: the least of nine
runs, in which the methods take turns.
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
from measuring import REHEARSING
from peers import STEPS, normal_log_prob
from race_targets import five
from torch import Tensor, nn

import fastscore as fs

WIDTH = 64
TRAINED, POINTS, RUNS = (5, 4, 1) if REHEARSING else (2000, 256, 9)
ERRORS = (0.1,) if REHEARSING else (0.1, 0.01, 0.001)  # nats, root mean square
TOLERANCES = tuple(10.0 ** (-k / 2) for k in range(2, 13))
ASKED = (0.9, 0.3, 0.1, 0.03, 0.01, 0.003)  # nats, of "auto"
FINE_STEPS, FINE_TOLERANCE = (32, 1e-3) if REHEARSING else (1024, 1e-8)


class Flow(nn.Module):
    """A velocity of three layers; t = 1 is the data's end."""

    def __init__(self, d: int, width: int = WIDTH):
        super().__init__()
        self.time, self.first = nn.Linear(1, width), nn.Linear(d, width)
        self.middle, self.last = nn.Linear(width, width), nn.Linear(width, d)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = nn.functional.silu(self.first(x) + self.time(t.to(x)[:, None]))
        return self.last(nn.functional.silu(self.middle(h)))


class Counting(nn.Module):
    """A network that counts its calls, and so is no row program."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net, self.calls = net, 0

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        return self.net(x, t)


def trained(d: int) -> tuple[Flow, Tensor]:
    """Return a flow that was trained on samples of a mixture, and other samples of it."""
    torch.manual_seed(0)
    target = five(d)
    net, data = Flow(d), target.sample(20_000, seed=5)
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    for step in range(TRAINED):
        x, eps, t = data[step * 256 % 19_712 :][:256], torch.randn(256, d), torch.rand(256)
        loss = (net((1 - t[:, None]) * eps + t[:, None] * x, t) - (x - eps)).square().sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.eval().requires_grad_(False), target.sample(POINTS, seed=17)


Call = Callable[[Tensor, float], Tensor]


def methods(net: nn.Module) -> Iterator[tuple[str, Call, tuple, float]]:
    """Yield every method's name, call of (x, effort), efforts, and the effort that its truth takes."""
    schedule, span = fs.FlowMatching(data_at=1), fs.FlowMatching(data_at=1).time_range
    low, high = min(span), max(span)

    def at(t: Tensor, x: Tensor) -> Tensor:
        return net(x, t.clamp(low, high).expand(len(x)))

    for name, program in (("fastscore midpoint", "auto"), ("fastscore midpoint, backward passes", False)):
        density = fs.ScoreDensity(net, schedule, "flow", program=program)

        def midpoint(x: Tensor, steps: int, density: fs.ScoreDensity = density) -> Tensor:
            return fs.probability_flow_log_prob(density, x, method="midpoint", steps=steps).log_prob

        yield name, midpoint, STEPS, FINE_STEPS
    own = fs.ScoreDensity(net, schedule, "flow")

    def doubling(x: Tensor, effort: float) -> Tensor:
        options = {"error": effort} if effort < 1 else {"method": "midpoint", "steps": effort}
        return fs.probability_flow_log_prob(own, x, **options).log_prob

    yield "fastscore auto", doubling, ASKED, FINE_STEPS
    try:
        from flow_matching.solver import ODESolver

        solver = ODESolver(velocity_model=lambda x, t: at(t, x))

        def likelihood(x: Tensor, effort: float, method: str) -> Tensor:
            options = {"step_size": 1 / effort} if method == "midpoint" else {"atol": effort, "rtol": effort}
            options = {"step_size": None} | options | {"method": method, "exact_divergence": True}
            return solver.compute_likelihood(x_1=x, log_p0=normal_log_prob, **options)[1]

        yield "flow_matching midpoint", partial(likelihood, method="midpoint"), STEPS, FINE_STEPS
        yield "flow_matching dopri5", partial(likelihood, method="dopri5"), TOLERANCES, FINE_TOLERANCE
    except ImportError:
        print("flow_matching is not installed")
    try:
        from zuko.transforms import FreeFormJacobianTransform

        def transformed(x: Tensor, tolerance: float) -> Tensor:
            ends = (torch.tensor(end, dtype=x.dtype, device=x.device) for end in (1.0, 0.0))
            found = FreeFormJacobianTransform(at, *ends, atol=tolerance, rtol=tolerance, exact=True)
            with torch.no_grad():
                noise, ladj = found.call_and_ladj(x)
            return normal_log_prob(noise) + ladj

        yield "zuko", transformed, TOLERANCES, FINE_TOLERANCE
    except ImportError:
        print("zuko is not installed")


def first_efforts(call: Call, ladder: tuple, x: Tensor, truth: Tensor) -> Iterator[tuple[float, float, float]]:
    """Yield for every error that is reached the least effort, and what it leaves."""
    wanted = list(ERRORS)
    for effort in ladder:
        error = float((call(x, effort).detach().double() - truth).square().mean().sqrt())
        while wanted and error <= wanted[0]:
            yield wanted.pop(0), effort, error
        if not wanted:
            return


def seconds(run: Callable[[], object], device: str) -> float:
    clock = time.perf_counter if device == "cuda" else time.process_time
    start = clock()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def rows(d: int, device: str) -> Iterator[dict[str, object]]:
    """Yield a row for every method and error."""
    net, x = (each.to(device) for each in trained(d))
    counting, found = Counting(net), []
    for one, precise, counted in zip(methods(net), methods(copy.deepcopy(net).double()), methods(counting)):
        name, call, ladder, fine = one
        truth = precise[1](x.double(), fine).detach()
        for wanted, effort, error in first_efforts(call, ladder, x, truth):
            counted[1](x, effort)  # what is asked once of a network is asked here
            counting.calls = 0
            counted[1](x, effort)
            row = {"d": d, "method": name, "error": wanted, "reached": error, "effort": effort}
            found.append((row | {"calls": counting.calls}, partial(call, x, effort)))
    for _ in range(3):  # graphs are captured
        for _, run in found:
            run()
    times = [[seconds(run, device) for _, run in found] for _ in range(RUNS)]
    for (row, _), each in zip(found, zip(*times)):
        yield row | {"ms": 1e3 * min(each)}


def main(dims: list[int]) -> None:
    """Print a line for every number of dimensions, method and error."""
    torch.set_num_threads(1)
    for d in dims:
        for row in rows(d, "cuda" if torch.cuda.is_available() else "cpu"):
            print(", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)


if __name__ == "__main__":
    main([int(d) for d in sys.argv[1:]] or [2, 16])

r"""The other density that people know: that of the probability-flow ODE.

The flow of every schedule, rescaled, is that of the straight path y = (1 - t) x + t eps, t = sigma / (alpha + sigma).
With v its velocity, and q any reference whose v_q and score are known in closed form (`flow_field`),

.. math:: \log p(x) = \log q(x) + \int_{t_0}^{t_1} \big[\nabla\cdot(v - v_q)
    + (v - v_q)\cdot\nabla\log q_t\big](y(t), t)\, dt, \qquad \frac{dy}{dt} = v(y, t)

It is the usual integral of the divergence with its control variate: what q explains is exact, whatever the steps, and
errors of the path and of a probe count only as far as p and q differ. Both log-densities are those at the clean end
of the schedule, data convolved with the noise that is left there; at the noisy end p is taken as q (`flow_ends` says
how much that is). v is bounded and smooth at both ends, so a solver needs about half of the evaluations that it needs
in log-SNR. A fixed grid is equal steps in sqrt(t), shorter where there is little noise.

It agrees with `ScoreDensity.log_prob` where the network is an exact score. For a learned one they are two different
numbers: this one is the density of the deterministic sampler, the formula's is a bound for the stochastic one.

References:
    Score-Based Generative Modeling through SDEs (Song et al., 2021), https://arxiv.org/abs/2011.13456
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..density import ScoreDensity
from ..estimator.protocol import Density, check_density
from ..estimator.samples import Samples
from ..process.conditions import takes_conditions
from ..support.host import positive, whole
from ..support.modes import differentiable, refuse_inference_weights
from ..support.untouched import undisturbed
from .cut_graph import refuse_cut_graph
from .flow_ends import truncation
from .flow_field import Field, learned, rademacher, time_of

ADAPTIVE = ("dopri8", "dopri5", "bosh3", "fehlberg2", "adaptive_heun")  # of torchdiffeq
CHOOSING = (*ADAPTIVE, "scipy_solver")  # their steps follow the answer
OWN = ("auto", "midpoint")
TRACES = ("exact", "hutchinson")
FIRST_STEPS, MAX_STEPS = 4, 2048  # of "auto"
MOST = 1 << 17  # steps, or probes: what is known of every one beforehand takes a gigabyte at most


class FlowLogProb(NamedTuple):
    """What `probability_flow_log_prob` returns, a number a sample.

    Attributes:
        log_prob: nats, shape (B,); differentiable, the others are constants.
        stderr: of the mean over probes, nats; zero for the exact trace, NaN for one probe.
        nfe: network evaluations, int64.
        discretization: estimate of the error that the grid makes, nats; NaN where `method` has none.
        truncation: estimate, no bound, of how far the ends of the schedule keep log_prob from the data's own density,
            nats: the noise that is left at the clean end, and the reference that stands for p at the noisy one.
    """

    log_prob: Tensor
    stderr: Tensor
    nfe: Tensor
    discretization: Tensor
    truncation: Tensor


@takes_conditions
@differentiable
def probability_flow_log_prob(
    density: Density,
    x: Tensor,
    *,
    trace: str = "exact",
    probes: int = 1,
    seed: int = 0,
    method: str = "auto",
    error: float = 0.01,
    steps: int = 1,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    mask: Tensor | None = None,
    cond: dict | None = None,
    **named,
) -> FlowLogProb:
    """Return the log-density of the probability-flow ODE, nats, differentiable in x, conditions and parameters.

    The gradient is that of the returned number on its grid: the backward pass solves again, keeps one state a step and
    evaluates each step's trace anew. Solvers that choose their steps have none, nor are there second derivatives.
    Under torch.func it is a function of x alone; in inference mode it has no gradient.

    Arguments:
        density: network, schedule (continuous) and reference; `density.fit(data)` makes the reference a close one.
        x: data, shape (B, *shape).
        trace: "exact" (d vector-Jacobian products an evaluation) or "hutchinson" (one a probe, Rademacher signs).
        probes: number of Hutchinson probes, averaged; two at least give a standard error.
        seed: key of the probes.
        method: "midpoint" on a grid of `steps`; "auto", the same with twice the steps, sample by sample, until the
            answer moves by less than `error`; or the name of a solver of torchdiffeq.
        error: nats, of "auto", on the safe side: 99 % of samples are nearer in `tests/test_probability_flow.py`.
        steps: of a method with a fixed grid ("midpoint", "rk4", ...); others choose their own.
        rtol, atol: of torchdiffeq's adaptive solvers.
        mask: refused; `ScoreDensity.estimate` takes one.
        cond, named: keyword arguments of the network, as in `ScoreDensity.estimate`.

    Raises:
        TypeError: if the density is none.
        ImportError: for a solver of torchdiffeq without it; install fastscore[ode].
        ValueError: for an unknown trace, a schedule that is a table, steps that no method takes, an `error` that 2,048
            steps do not reach, a network whose answer has no graph or only a part of it, and where the result is NaN
            or inf.
    """
    for name, count in (("probes", probes), ("steps", steps)):
        if whole(name, count) > MOST:
            raise ValueError(f"{name} must be at most {MOST}, got {count}")
    if trace not in TRACES or probes < 1:
        raise ValueError(f"trace must be one of {', '.join(TRACES)} with probes >= 1; got {trace!r}, probes={probes}")
    if steps < 1 or (steps > 1 and method in (*ADAPTIVE, "auto")):
        raise ValueError(f"steps must be >= 1, and method one with a fixed grid; got steps={steps}, method={method!r}")
    if mask is not None:
        raise ValueError(
            "the ODE moves all entries of x and takes no mask; use density.estimate(x, mask=mask), and "
            "cond={'mask': ...} for a keyword of the network that is called mask"
        )
    error = positive("error", error, "nats")
    if check_density(density).schedule.discrete:
        raise ValueError(
            f"the ODE needs a continuous schedule, got {density.schedule!r}; give the one that the table came from, "
            "such as VP() for DDPM.linear, and a module around the network that turns its time in (0, 1) into timesteps"
        )
    odeint = None if method in OWN else _torchdiffeq()
    refuse_inference_weights(density.model)
    z, log_det = density.to_network(x)
    core = density.core
    flow = _Flow(core, core.check(z, None, cond), trace, probes, seed)

    def solve(flow: _Flow) -> _Solved:
        if method == "auto":
            return _doubling(flow, error)
        if method == "midpoint":
            return _once(lambda flow: flow.midpoint(steps), flow)
        return _once(lambda flow: flow.solve(odeint, method, steps, rtol, atol), flow, method not in CHOOSING)

    with undisturbed(core.model):
        refuse_cut_graph(core.network, flow.samples, flow.scale)
        log_prob, *constants = _Solution.apply(flow, solve, flow.samples.x, *learned(core, flow.samples))
    return flow.result(log_prob - log_det.to(log_prob)[:, None], *constants)


class _Course(NamedTuple):
    """A path: log-densities (B, columns), where it ends (B, d), and how often the network was called."""

    log_prob: Tensor
    end: Tensor
    nfe: int


class _Solved(NamedTuple):
    """Log-densities (B, columns), where paths end, evaluations, error of the grid; the first again with its graph."""

    log_prob: Tensor
    end: Tensor
    nfe: Tensor
    discretization: Tensor
    again: Callable[[_Flow], Tensor]


class _Solution(torch.autograd.Function):
    """The integral without a graph; the backward pass solves again, on the grid that was found."""

    @staticmethod
    def forward(ctx, flow: _Flow, solve: Callable[[_Flow], _Solved], x: Tensor, *learned: Tensor) -> tuple[Tensor, ...]:
        found = solve(flow)
        _check_finite(found.log_prob, flow.samples)
        ctx.flow, ctx.again = flow, found.again
        ctx.save_for_backward(x, *learned)
        beyond, calls = flow.truncation(found.end)
        constants = found.nfe + calls, found.discretization, beyond
        ctx.mark_non_differentiable(*constants)
        return found.log_prob, *constants

    @staticmethod
    def backward(ctx, grad: Tensor, *_) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors  # raises where a weight has changed since
        with torch.enable_grad():
            x = inputs[0].detach().requires_grad_()
            flow = ctx.flow.on(x)
            here = x, *learned(flow.density, flow.samples)
            value = (grad * ctx.again(flow)).sum()
            found = torch.autograd.grad(value, here, allow_unused=True, materialize_grads=True)
        return None, None, *_once_differentiable(found, (grad, *inputs))


def _once_differentiable(gradients: tuple[Tensor, ...], sources: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return gradients that raise where they are differentiated in their turn, instead of counting as constants."""
    if not torch.is_grad_enabled():
        return gradients
    tie = 0 * sum(source.sum() for source in sources)  # what they depend on leads to the error
    reason = "the ODE's density has first derivatives alone; use ScoreDensity.log_prob, or differences of gradients"
    refuse = torch._C._functions.DelayedError(reason.encode(), len(gradients))
    refused = refuse(*(gradient.detach() + tie.to(gradient) for gradient in gradients))
    return refused if isinstance(refused, tuple) else (refused,)


class _Flow:
    """The integral for some samples, by one solver or another; log-densities are (B, columns), a column a probe."""

    def __init__(self, density: ScoreDensity, samples: Samples, trace: str, probes: int, seed: int):
        self.density, self.samples, self.trace, self.probes, self.seed = density, samples, trace, probes, seed
        lo, hi = density.log_snr_range
        smallest, largest = density.reference.scales()
        self.scale = math.sqrt(smallest * largest)
        self.ends = time_of(torch.tensor([hi, lo], dtype=torch.float64, device="cpu"), self.scale)
        self.clean = density.reference.diffused(math.exp(-hi))

    def select(self, chosen: Tensor) -> _Flow:
        """Return the flow of some of the samples; probes are keyed by sample, so they stay the same."""
        return _Flow(self.density, self.samples.select(chosen), self.trace, self.probes, self.seed)

    def on(self, x: Tensor) -> _Flow:
        """Return the flow of the same samples with other data."""
        return _Flow(self.density, replace(self.samples, x=x), self.trace, self.probes, self.seed)

    def midpoint(self, steps: int) -> _Course:
        """Integrate by the midpoint rule, which wants the rate in the middle of a step only: half of the traces.

        All that the times decide is evaluated once, before the first step.
        """
        grid, field = self._grid(steps), self._field()
        table = field.table(torch.stack([grid[:-1], (grid[:-1] + grid[1:]) / 2], 1).flatten())
        y, change = self._start()
        for step, at_start, at_middle in zip(grid.diff().tolist(), table[::2], table[1::2]):
            velocity = checkpoint(field.velocity, at_start, y, use_reentrant=False)
            velocity, rate = field.at(at_middle, torch.add(y, velocity, alpha=step / 2))
            y, change = torch.add(y, velocity, alpha=step), torch.add(change, rate, alpha=step)
        return _Course(self._log_prob(change), y, field.nfe)

    def solve(self, odeint, method: str, steps: int, rtol: float, atol: float) -> _Course:
        """Integrate by a solver of torchdiffeq."""
        grid, field = self._grid(steps).to(self.samples.x), self._field()
        # An adaptive solver would step past the end and interpolate, where no network was trained.
        options = {"step_t": grid[1:]} if method in ADAPTIVE else None
        y, change = odeint(field, self._start(), grid, rtol=rtol, atol=atol, method=method, options=options)
        return _Course(self._log_prob(change[-1]), y[-1], field.nfe)

    def truncation(self, end: Tensor) -> tuple[Tensor, int]:
        """Return what lies beyond both ends of paths that end there, (B,), and how often the network was called."""
        field = self._field()
        return truncation(field, self._start()[0], end).to(end.dtype), field.nfe

    def result(self, log_prob: Tensor, *constants: Tensor) -> FlowLogProb:
        """Return the mean over probes with its standard error."""
        mean, log_prob = log_prob.mean(1), log_prob.detach()
        if self.trace == "exact":
            return FlowLogProb(mean, torch.zeros_like(log_prob[:, 0]), *constants)
        spread = log_prob.std(1) if self.probes > 1 else torch.full_like(log_prob[:, 0], math.nan)
        return FlowLogProb(mean, spread / self.probes**0.5, *constants)

    def _field(self) -> Field:
        signs = rademacher(self.samples, self.seed, self.probes) if self.trace == "hutchinson" else None
        return Field(self.density, self.samples, signs, tuple(self.ends.tolist()), self.scale)

    def _grid(self, steps: int) -> Tensor:
        return torch.linspace(*self.ends.sqrt().tolist(), steps + 1, dtype=torch.float64, device="cpu").square()

    def _start(self) -> tuple[Tensor, Tensor]:
        x = self.samples.x
        return x * float((1 - self.ends[0]) / self.scale), x.new_zeros(
            len(x), 1 if self.trace == "exact" else self.probes
        )

    def _log_prob(self, change: Tensor) -> Tensor:
        return (self.clean.log_prob(self.samples.x)[:, None] + change).to(self.samples.x.dtype)


def _check_finite(log_prob: Tensor, samples: Samples) -> None:
    bad = (~torch.isfinite(log_prob)).any(1).nonzero().flatten()
    if len(bad):
        raise ValueError(
            f"the ODE gives NaN or inf for {len(bad)} of {len(log_prob)} samples, sample "
            f"{int(samples.index[bad[0]])} the first: the network returned them, or the path left the range of "
            f"{log_prob.dtype}; check its weights and the scale of the data, use more steps, or float64 data"
        )


def _once(solver: Callable[[_Flow], _Course], flow: _Flow, fixed: bool = True) -> _Solved:
    """Solve once, with an error that nobody knows; `fixed` says that the grid does not depend on the answer."""
    found = solver(flow)
    unknown = torch.full_like(found.log_prob[:, 0], math.nan)

    def again(flow: _Flow) -> Tensor:
        if not fixed:
            raise ValueError(
                "a solver that chooses its own steps has no gradient here, since the steps would have one too; use "
                "method='auto', 'midpoint', or a fixed grid such as method='rk4' with steps"
            )
        return solver(flow).log_prob

    return _Solved(found.log_prob, found.end, torch.full_like(unknown, found.nfe, dtype=torch.int64), unknown, again)


def _doubling(flow: _Flow, error: float) -> _Solved:
    """Double the steps of the samples whose answer still moves by more than `error`.

    The rule is of second order, so a third of the last move is what is left, and is taken off the answer. The whole
    move is the estimate of its error, or a quarter of the move before, if that is larger: two coarse grids may agree
    by chance.
    """
    steps, active = FIRST_STEPS, torch.arange(len(flow.samples), device=flow.samples.x.device)
    coarse, end, calls = flow.midpoint(steps)
    log_prob, spent, finest = coarse.clone(), torch.full_like(active, calls), torch.full_like(active, steps)
    before = torch.full_like(coarse[:, 0], math.inf)
    discretization = before.clone()
    while len(active):
        steps *= 2
        if steps > MAX_STEPS:
            _check_finite(coarse, flow.samples.select(active))
            raise ValueError(
                f"error={error} nats is not reached with {MAX_STEPS} steps by {len(active)} of {len(spent)} samples, "
                f"sample {int(active[0])} the first; fit the density to data, or give a larger error, float64 data, or "
                "method='dopri5'"
            )
        fine, end[active], calls = flow.select(active).midpoint(steps)
        move = (fine - coarse).mean(1).abs()
        log_prob[active], finest[active] = _extrapolated(fine, coarse), steps
        discretization[active] = torch.maximum(move, before / 4)
        spent[active] += calls
        on = ~(discretization[active] <= error)
        coarse, before, active = fine[on], move[on], active[on]
    return _Solved(log_prob, end, spent, discretization, lambda flow: _on_two_grids(flow, finest))


def _on_two_grids(flow: _Flow, steps: Tensor) -> Tensor:
    """Return the answer of `_doubling`, which ended at these steps of each sample, (B,)."""
    order, found = [], []
    for count in steps.unique().tolist():
        chosen = (steps == count).nonzero().flatten()
        part = flow.select(chosen)
        order.append(chosen)
        found.append(_extrapolated(part.midpoint(count).log_prob, part.midpoint(count // 2).log_prob))
    return torch.cat(found)[torch.cat(order).argsort()]


def _extrapolated(fine: Tensor, coarse: Tensor) -> Tensor:
    """Return what steps of length zero would give, of a rule of second order."""
    return fine + (fine - coarse) / 3


def _torchdiffeq():
    try:
        from torchdiffeq import odeint
    except ImportError as problem:
        raise ImportError(
            "a solver other than 'auto' and 'midpoint' needs torchdiffeq: pip install 'fastscore[ode]'"
        ) from problem
    return odeint

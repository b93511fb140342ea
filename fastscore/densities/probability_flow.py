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
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..estimator.estimate import mean_in_words
from ..estimator.network_density import network_of
from ..estimator.protocol import Density, check_density
from ..estimator.samples import deferred
from ..process.conditions import takes_conditions
from ..process.network import warn_if_training
from ..program.row_program import RowProgram
from ..support.host import positive, whole
from ..support.modes import differentiable, refuse_inference_weights
from ..support.untouched import uncompiled, undisturbed
from ..support.warn import warn
from .between_timesteps import between_timesteps
from .cut_graph import refuse_cut_graph
from .flow_field import learned
from .flow_path import ADAPTIVE, Flow
from .flow_program import program_for
from .flow_steps import MAX_STEPS, Solved, doubling, enough, not_finite, once, standard_error

# The options that a method reads. Without steps, those of a solver follow the answer.
READ = {
    "auto": ("error",),
    **dict.fromkeys(("midpoint", "euler", "heun2", "heun3", "rk4", "explicit_adams"), ("steps",)),
    **dict.fromkeys(("implicit_adams", "fixed_adams"), ("steps", "rtol", "atol")),
    **dict.fromkeys((*ADAPTIVE, "scipy_solver"), ("rtol", "atol")),
}
DEFAULTS = {"error": 0.01, "steps": 1, "rtol": 1e-5, "atol": 1e-5}
OWN = ("auto", "midpoint")
TRACES = ("exact", "hutchinson")
OF_PROBES = 0.1  # of their standard error: what a grid may leave that nobody gave an error for
MANY = 256  # products an evaluation, minutes a sample of an image network on a CPU
MOST = 1 << 17  # steps, or probes: what is known of every one beforehand takes a gigabyte at most


class FlowLogProb(NamedTuple):
    """What `probability_flow_log_prob` returns, a number a sample.

    Attributes:
        log_prob: nats, shape (B,); differentiable, the others are constants. NaN where the ODE gives no number.
        stderr: of the mean over probes, nats; zero for the exact trace, NaN for one probe.
        nfe: network evaluations, int64.
        discretization: estimate of the error that the grid makes, nats; of "auto" at most `error` where that was
            reached, and infinite where there is no number. NaN where `method` has none.
        truncation: estimate, no bound, of how far the ends of the schedule keep log_prob from the data's own density,
            nats: the noise that is left at the clean end, and the reference that stands for p at the noisy one.
    """

    log_prob: Tensor
    stderr: Tensor
    nfe: Tensor
    discretization: Tensor
    truncation: Tensor

    def __repr__(self) -> str:
        known = self.log_prob.isfinite()
        none = int((~known).sum())
        parts = [f"{len(known)} samples" + (f", {none} of them NaN" if none else "")]
        parts.append(mean_in_words("log_prob", self.log_prob[known], self.stderr[known]))
        if bool(self.stderr[known].isnan().any()):
            parts.append("no stderr from one probe, probes=2 or more give one")
        parts.append(f"{float(self.nfe.double().mean()):.0f} evaluations per sample")
        for name in ("discretization", "truncation"):
            value = getattr(self, name)[known]
            if bool(value.isfinite().any()):
                parts.append(f"largest {name} about {float(value[value.isfinite()].max()):.2g}")
            elif len(value):  # of a grid that nobody compared with a finer one
                parts.append(f"{name} unknown")
        return f"FlowLogProb({', '.join(parts)})"


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
    error: float | None = None,
    steps: int | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    mask: Tensor | None = None,
    cond: dict[str, Any] | None = None,
    **named: Any,
) -> FlowLogProb:
    """Return the log-density of the probability-flow ODE, nats, differentiable in x, conditions and parameters.

    The gradient is that of the returned number on its grid: the backward pass solves again, keeps one state a step and
    evaluates each step's trace anew. A gradient that a sample without a number (NaN) takes part in is NaN, one that
    leaves it out is not. Solvers that choose their steps have none, nor are there second derivatives.
    Under torch.func it is a function of x alone; in inference mode it has no gradient.

    Arguments:
        density: network, schedule and reference; `density.fit(data)` makes the reference a close one. A table of
            timesteps is taken as the continuous process through it (`ContinuousDDPM`), where the network answers
            between timesteps, which it is asked once.
        x: data, shape (B, *shape).
        trace: "exact" (by tangents in one pass where the network is a row program in up to 64 dimensions, as
            `fastscore.explain` says, and by d vector-Jacobian products an evaluation else, with a warning from 256
            dimensions on) or "hutchinson" (one product a probe, Rademacher signs).
        probes: number of Hutchinson probes, averaged; one has no standard error (NaN), more have, by Student's t. In up
            to 13 dimensions a sample's probes are drawn without repetition; all 2^(d-1) of them give the exact trace.
        seed: key of the probes.
        method: "midpoint" on a grid of `steps`; "auto", the same with twice the steps, sample by sample, until the
            answer moves by less than `error`; or the name of a solver of torchdiffeq.
        error: nats, of "auto", on the safe side: 99 % of samples are nearer in `tests/test_probability_flow.py`. By
            default 0.01, or a tenth of what the probes leave as a standard error where that is more. Samples that do
            not get there in 2,048 steps keep what they reached, with a `discretization` above it and a warning; NaN
            stands where the answer does not settle.
        steps: of a method with a fixed grid ("midpoint", "rk4", ...), which needs them; others choose their own.
        rtol, atol: of torchdiffeq's solvers that are adaptive or implicit, 1e-5 by default.
        mask: which entries count, as in `ScoreDensity.estimate`: the ODE is that of these, the others stand still and
            the network sees them as they are.
        cond, named: keyword arguments of the network, as in `ScoreDensity.estimate`.

    Raises:
        TypeError: if the density is none.
        ImportError: for a solver of torchdiffeq without it; `pip install torchdiffeq`.
        ValueError: for an unknown trace or method, options that these do not read or lack, a table whose network does
            not answer between timesteps, a network whose answer has no graph or only a part of it, and where no sample
            has a number: all are NaN or inf, or do not settle. On a GPU a fixed grid gives NaN without an error or a
            warning, since asking would wait for the device; FASTSCORE_CHECK=now in the environment asks.
    """
    share = OF_PROBES if error is None and trace == "hutchinson" and probes > 1 else 0.0
    options = _options(method, {"error": error, "steps": steps, "rtol": rtol, "atol": atol})
    steps, error = options["steps"], positive("error", options["error"], "nats")
    rtol, atol = (positive(name, options[name], "of torchdiffeq's step control") for name in ("rtol", "atol"))
    for name, count in (("probes", probes), ("steps", steps)):
        if whole(name, count) > MOST:
            raise ValueError(f"{name} must be at most {MOST}, got {count}")
    if trace not in TRACES or probes < 1:
        raise ValueError(f"trace must be one of {', '.join(TRACES)} with probes >= 1; got {trace!r}, probes={probes}")
    if trace == "exact" and probes > 1:
        raise ValueError(f"trace='exact' has no probes, got probes={probes}; trace='hutchinson' averages over them")
    if steps < 1:
        raise ValueError(f"steps must be >= 1, got steps={steps}")
    refuse_inference_weights(check_density(density).model)
    odeint = None if method in OWN else _torchdiffeq()
    z, log_det = density.to_network(x, mask)
    mask, cond = density.network_arguments(x, mask, cond)
    core = density.core
    samples = core.check(z, None, cond, mask=mask)
    warn_if_training(core.model)

    def solve(flow: Flow) -> Solved:
        if method == "auto":
            return doubling(flow, error, share)
        if method == "midpoint":
            return once(lambda flow: flow.midpoint(steps, beyond=True), flow)
        return once(lambda flow: flow.solve(odeint, method, steps, rtol, atol), flow, fixed="steps" in READ[method])

    core.planner.ask_rows(network_of(core), samples, times="alike")
    with undisturbed(core.model):
        core = between_timesteps(core, samples) if core.schedule.discrete else core
        program = program_for(core, samples, trace) if method in OWN else None
        flow = Flow(core, samples, trace, probes, seed, program if isinstance(program, RowProgram) else None)
        refuse_cut_graph(network_of(core), flow.samples, flow.frame.scale)
        if trace == "exact" and flow.course is None and flow.samples.x.shape[1] >= MANY:
            _warn_of_many_products(flow.samples.x.shape[1])
        log_prob, *constants = _Solution.apply(flow, solve, flow.samples.x, *learned(core, flow.samples))
    found = _result(flow, log_prob - log_det.to(log_prob)[:, None], *constants)
    if method == "auto" or not deferred(found.log_prob.device):
        wanted = enough(error, share, found.stderr) if share else error
        _warn_of_what_is_missing(found, wanted if method == "auto" else None)
    return found


def _warn_of_many_products(d: int) -> None:
    warn(
        f"the exact trace takes {d} vector-Jacobian products of the network at every evaluation, in {d} dimensions; "
        'trace="hutchinson", probes=8 takes 8, and has a standard error'
    )


def _options(method: str, given: dict[str, object]) -> dict[str, object]:
    """Return what was given with the defaults of the rest; raise ValueError for what the method does not read or lacks.

    An unknown method raises it too.
    """
    if not isinstance(method, str) or method not in READ:
        raise ValueError(f"method must be one of {', '.join(READ)}; got {method!r}")
    given = {name: value for name, value in given.items() if value is not None}
    for name, value in given.items():
        if name not in READ[method]:
            readers = ", ".join(other for other, read in READ.items() if name in read)
            raise ValueError(
                f"method={method!r} does not read {name}, got {name}={value!r}; leave it out (it reads "
                f"{', '.join(READ[method])}), or take a method that does: {readers}"
            )
    if "steps" in READ[method] and "steps" not in given:
        raise ValueError(
            f"method={method!r} has a fixed grid and needs steps=, such as steps=64, got none; method='auto' finds how "
            "many are enough"
        )
    return DEFAULTS | given


def _result(flow: Flow, log_prob: Tensor, *constants: Tensor) -> FlowLogProb:
    """Return the mean over probes with its standard error, as wide as Student's t wants it for so few."""
    return FlowLogProb(log_prob.mean(1), standard_error(flow, log_prob.detach()), *constants)


def _warn_of_what_is_missing(found: FlowLogProb, error: float | Tensor | None) -> None:
    """Warn of samples without a number and, where an error was asked for, of those that are beyond it."""
    count, none = len(found.log_prob), found.log_prob.isnan()
    missing = none if error is None else ~(found.discretization <= error)
    if not bool(missing.any()):
        return
    of_them = f"{int(missing.sum())} of {count} samples, sample {int(missing.nonzero()[0])} the first"
    if error is None:
        warn(f"the ODE gives NaN or inf for {of_them}, and their log_prob is NaN: {not_finite(found.log_prob)}")
        return
    least = error if isinstance(error, float) else float(error[missing].min())
    reached = found.discretization[missing & ~none]
    said = [f"up to {float(reached.max()):.2g} nats are left by their discretization"] if len(reached) else []
    if int(none.sum()):
        said.append(f"{int(none.sum())} do not settle, and their log_prob is NaN")
    warn(
        f"error={least:.3g} nats is not reached with {MAX_STEPS} steps by {of_them}: {'; '.join(said)}; give a larger "
        "error or float64 data, fit the density to data if it is not, or take method='midpoint' with more steps"
    )


class _Solution(torch.autograd.Function):
    """The integral without a graph; the backward pass solves again, on the grid that was found."""

    @staticmethod
    @uncompiled()  # compiled code does not keep its graph for more than one backward pass
    def forward(
        ctx: Any, flow: Flow, solve: Callable[[Flow], Solved], x: Tensor, *learned: Tensor
    ) -> tuple[Tensor, ...]:
        found = solve(flow)
        ctx.flow, ctx.again, ctx.log_prob = flow, found.again, found.log_prob.detach()
        ctx.save_for_backward(x, *learned)
        beyond, calls = (found.beyond, 0) if found.beyond is not None else flow.truncation(found.end)
        constants = found.nfe + calls, found.discretization, beyond
        ctx.mark_non_differentiable(*constants)
        return found.log_prob, *constants

    @staticmethod
    @uncompiled()
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors  # raises where a weight has changed since
        none = ctx.log_prob.isnan().any(1)
        every = not bool(none.any())
        chosen = slice(None) if every else (~none).nonzero().flatten()
        with torch.enable_grad():
            x = inputs[0].detach().requires_grad_()
            flow = ctx.flow.on(x)
            here = x, *learned(flow.frame.density, flow.samples)
            value = (grad[chosen] * ctx.again(flow.select(chosen), chosen)).sum()
            found = torch.autograd.grad(value, here, allow_unused=True, materialize_grads=True)
        if not every:
            unknown = none & (grad != 0).any(1)
            of_x, *rest = found
            rest = [each.masked_fill(unknown.any(), math.nan) for each in rest]
            found = of_x.masked_fill(unknown[:, None], math.nan), *rest
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


def _torchdiffeq() -> Callable[..., tuple[Tensor, Tensor]]:
    try:
        from torchdiffeq import odeint
    except ImportError as problem:
        raise ImportError(
            "a solver other than 'auto' and 'midpoint' needs torchdiffeq: pip install torchdiffeq"
        ) from problem
    return odeint

r"""The density of a score network, as one integral over log-SNR.

With x_lambda = alpha x + sigma eps, lambda = log(alpha^2 / sigma^2), and any reference q whose log q(x) and best noise
prediction eps_q are known in closed form,

.. math::
    \log p(x) = \log q(x) - \tfrac12 \int E\big[\, \|\epsilon - \hat\epsilon(x_\lambda)\|^2
        - \|\epsilon - \epsilon_q(x_\lambda)\|^2 \,\big]\, d\lambda

This is Li and Yan's formula in log-SNR form with its control variate. For a learned network it is the continuous-time
evidence lower bound: at most the log-density of the network's own sampling process, in expectation over the noise.

References:
    A Score-Based Density Formula (Li and Yan, 2024), https://arxiv.org/abs/2408.16765
    Information-Theoretic Diffusion (Kong et al., 2023), https://arxiv.org/abs/2302.03792
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .estimator.calibration import uncalibrated
from .estimator.comparison import Comparison, Differences
from .estimator.contradictions import refuse_contradictions
from .estimator.degenerate import warn_if_degenerate, warn_if_out_of_range
from .estimator.estimate import Estimate
from .estimator.estimator import Estimator
from .estimator.graphs import Graphs
from .estimator.methods import DENSITY
from .estimator.network_density import NetworkDensity, check_evaluations, check_nfe, check_parts, network_of, prepare
from .estimator.nodes import FittedNodes, NodeDensity
from .estimator.pilot import PILOT_DRAWS, PilotPlan, calibrate_noise, run_pilot, warn_if_worse_than_reference
from .estimator.planner import Planner
from .estimator.replay import Replays
from .estimator.rules import MAX_DRAWS
from .estimator.samples import deferred
from .estimator.schedule_ends import ScheduleEnds, range_of, refuse_upside_down
from .estimator.self_pilot import evaluations_of_own, pilot_of_own
from .estimator.statistics import draw_sum
from .process.conditions import merged, takes_conditions
from .process.network import warn_if_training
from .process.predictions import check_prediction, must_say_what_it_predicts
from .process.schedules import Schedule
from .program.row_program import Programs
from .reference.gaussians import Reference
from .support.host import positive, seed_of, whole
from .support.memory import Chunks
from .support.modes import differentiable, ordinary, refuse_inference_weights
from .support.progress import progress_bar
from .support.untouched import evaluation
from .support.warn import warn


class ScoreDensity(NetworkDensity):
    r"""Log-density of data under a diffusion or score network.

    Arguments:
        model: the network, called as `model(x_t, t, **cond)` with x_t of shape (rows, *shape) and t of shape (rows,)
            in the schedule's own time. Twice the data's channels are allowed, of which learned variances are cut off.
            x_t has the dtype of its parameters; where these have half precision, that of the sums if it takes it.
        schedule: the forward process it was trained on (`fastscore.process.schedules`).
        predicts: what the network returns: "eps", "x0", "denoiser", "v", "score" or "flow", each explained in
            `fastscore.process.predictions`. There is no default, since the wrong one gives wrong numbers.
        reference: a `Reference` to start from; by default N(0, schedule.data_std^2). `fit` replaces it.
        noise: "sobol", "independent", or "auto": sobol once `fit` has calibrated its error bars, for d <= 21,200 and
            without a mask: they were measured on whole samples.
        nfe: network evaluations per sample, where a call does not say.
        backend: "auto" or the name of a backend, see `fastscore info`.
        time_dtype: dtype of t, where the network wants another one than int64 (tables) or that of the sums.
        program: whether the network may run as a row program (`fastscore.explain`), which evaluates what depends on
            time alone once per draw: "auto" where it is one, True (raises the reason where it is none) or False. If a
            program's answers are not the network's, True raises, and "auto" warns and evaluates the network itself.
        compile: whether torch.compile makes the network, or what no fused kernel covers of its row program. The first
            call of a shape waits for the compiler. Where it fails, the network runs as it is, and a warning says why.
            The model itself stays as it is; options go with torch.compile(model, ...) in its place.

    Raises:
        ValueError: for an unknown prediction, noise, backend or program; for a schedule whose ends are the other way
            round, or whose methods contradict each other (log_snr, its inverse time, alpha_sigma, derivatives), a
            time_dtype that does not hold its times, and an nfe below 1.
        TypeError: if the schedule is not a `Schedule`, or `predicts` is missing.

    Example:
        >>> density = ScoreDensity(model, DDPM.linear(1000), predicts="eps").fit(train_data)
        >>> result = density.estimate(test_data, nfe=256)
        >>> result.log_prob, result.stderr
    """

    @must_say_what_it_predicts
    def __init__(
        self,
        model: nn.Module,
        schedule: Schedule,
        predicts: str,
        *,
        reference: Reference | None = None,
        noise: str = "auto",
        nfe: int = 256,
        backend: str = "auto",
        time_dtype: torch.dtype | None = None,
        program: bool | str = "auto",
        compile: bool = False,
    ) -> None:
        super().__init__()
        check_parts(model, schedule, reference, noise, backend, time_dtype, compile)
        self.model, self.schedule, self.predicts = model, schedule, check_prediction(predicts)
        self.noise, self.nfe, self.backend, self.time_dtype = noise, check_nfe(nfe), backend, time_dtype
        self.reference = reference if reference is not None else Reference.isotropic(schedule.data_std)
        scales = self.reference.scales()
        ends = range_of(schedule, scales)
        refuse_upside_down(ends, schedule, scales), refuse_contradictions(schedule, ends, predicts)
        nodes = FittedNodes(NodeDensity.uniform(*ends), uncalibrated(), scales)
        self.planner, self.replays, self.flows = Planner(), Replays(), Graphs()
        self._ends = ScheduleEnds(schedule, nodes)
        self.nodes, self.fitted_shape = nodes, None
        self._programs, self._compiles, self._compiled = Programs(program), compile, None

    @takes_conditions
    @differentiable
    def log_prob(
        self,
        x: Tensor,
        *,
        nfe: int | None = None,
        seed: int = 0,
        sample_index: Tensor | None = None,
        mask: Tensor | None = None,
        memory: int | str | None = None,
        cond: dict[str, Any] | None = None,
        **named: Any,
    ) -> Tensor:
        r"""Return log p(x) in nats, shape (B,), differentiable with respect to x and the network's parameters.

        The value and its gradient use the same noise, so the gradient is exactly that of the returned number; pass a
        fresh `seed` every step to train with it. Memory stays that of one chunk: the backward pass recomputes. Under
        torch.func it is a function of x alone, with first derivatives; in inference mode it has none.

        Arguments:
            x: data, floating point, shape (B, *shape).
            nfe, seed, sample_index, mask, memory, cond, named: as in `estimate`.

        On a GPU NaN of the network is NaN of its sample here, and no error: asking would wait for the device.

        Raises:
            ValueError: as in `estimate`; for second derivatives, and for others than those in x, under torch.func.
        """
        if torch.is_grad_enabled():
            refuse_inference_weights(self.model)
        samples, plan, programs = prepare(self, x, nfe, seed, sample_index, memory, cond, mask)
        run = plan.run(samples, programs, self.reference, check=not deferred(samples.device))
        parts = [(part.samples, part.flat(draw_sum(part.block(part.f), part.rule))) for part in run]
        order = torch.cat([chosen for chosen, _ in parts]).argsort()
        log_prob = self.reference.log_prob(samples.x, samples.mask) + torch.cat([total for _, total in parts])[order]
        return log_prob.to(samples.x.dtype)

    @takes_conditions
    @ordinary
    @evaluation
    def estimate(
        self,
        x: Tensor,
        *,
        nfe: int | None = None,
        seed: int = 0,
        sample_index: Tensor | None = None,
        mask: Tensor | None = None,
        method: str = "density",
        control: str = "auto",
        target_stderr: float | None = None,
        max_nfe: int = 16384,
        memory: int | str | None = None,
        progress: bool | None = None,
        cond: dict[str, Any] | None = None,
        **named: Any,
    ) -> Estimate:
        r"""Return log p(x) with its standard error and an account of the other errors.

        Arguments:
            x: data, floating point, shape (B, *shape).
            nfe: network evaluations per sample; 256 by default.
            seed: key of the noise. The same seed gives the same answer, to rounding, whatever the batch or the chunks.
            sample_index: int64, shape (B,), the other key of the noise; 0 .. B-1 by default, in every batch. In a loop
                over batches give each its place among all samples, `torch.arange(start, start + len(x))`: batches that
                share their noise share its error, and a mean over them is several times less certain than it looks.
            mask: True (or 1) for the entries that count, in any shape that broadcasts to x, or of its first dimensions,
                (B, L) for x (B, L, D); one that fits in both ways is refused. The other entries are given: the density
                is conditional on them, the network sees x_t = x there, and its answers there are not used. A keyword
                of the network that is itself called mask goes as `cond={"mask": ...}`.
            method: "density" (the integral), "discrete" (Li and Yan's sum) or "elbo" (DDPM's bound); all three
                use the same noise, at nodes where their own weights are large.
            control: what is subtracted from the network's squared residuals. "reference" is the density's reference.
                "self" is that plus what each sample's own residual vectors have beside it that is linear in the noise,
                fitted to other draws than those that it serves, so that estimates stay unbiased (`docs/images.md`). It
                needs nfe >= 64, method "density" and no mask, keeps a sample's residuals until its last draw, and
                draws independent noise. "auto" takes it where that goes, for samples (C, H, W) of 192 numbers or more,
                unless `fit` measured that it does not pay; `Estimate.control` says which it was.
            target_stderr: go on, for the samples above it, doubling the evaluations until their standard error (nats)
                is below; at most `max_nfe` a sample. For single samples: where to stop depends on what was seen, so
                that their mean is off by a part of the target (`docs/limits.md`).
            memory: bytes (or "512MB") that tensors may take beside the data and the weights; half of a GPU's free
                memory, 1 GiB on a CPU by default.
            progress: show a progress bar; by default where stderr is a terminal (`fastscore.support.progress`).
            named: keyword arguments of the network, also nested in dicts, lists and dataclasses. A tensor goes with its
                samples if its first size is B, and is shared by them else; `fastscore.per_sample` and
                `fastscore.shared` around it say so instead (see `docs/conditions.md`).
            cond: the same in a dict, for names that are arguments here: `cond={"memory": encoded}`.

        Raises:
            ValueError: if x has NaN or inf, is not floating point or empty; if nfe leaves no error bar; if the network
                returns the wrong shape, NaN or inf (named by sample and log-SNR; on a GPU when a number is read on the
                host, see `Estimate.check`, or at once with FASTSCORE_CHECK=now in the environment); if a mask does not
                fit x, leaves nothing of a sample, or meets a reference that is not diagonal in the entries; if control
                "self" meets what it does not go with, or the memory does not hold one sample's residuals.
        """
        samples = self.check(x, sample_index, cond, mask=mask)
        if target_stderr is not None:
            target_stderr = positive("target_stderr", target_stderr, "nats")
        wanted = self.wanted(nfe, seed, samples, memory, method)
        if target_stderr is not None:
            wanted = wanted._replace(most=whole("max_nfe", max_nfe))
            if not wanted.nfe <= max_nfe <= MAX_DRAWS:
                raise ValueError(
                    f"max_nfe must be between the {wanted.nfe} evaluations to start from and {MAX_DRAWS}, got "
                    f"{max_nfe}; give a smaller nfe, or average over seeds"
                )
        wanted, reference = self._controlled(control, wanted, samples)
        parts = self._parts()
        if target_stderr is None and (last := self.replays.again(parts, samples, wanted)):
            return last(samples)
        network, (plan, programs) = network_of(self), self._plan(samples, wanted, reference=reference)
        if wanted.method is DENSITY:
            self._ask_at_the_ends(network, samples, plan)
        estimator = Estimator(network, reference, self.nodes, programs, wanted.method)
        with progress_bar(progress, total=len(samples), unit="sample", desc=method) as bar:
            replay = self.replays.find(parts, estimator, samples, plan, wanted) if target_stderr is None else None
            found, numbers = replay(samples, plan) if replay else (estimator.evaluate(samples, plan, bar.update), None)
            while target_stderr is not None and len(active := found.above(target_stderr, max_nfe)):
                wanted = wanted._replace(nfe=int(found.nfe[active].min()), round=wanted.round + 1)
                bar.reset(total=len(active))
                more, some = self._plan(samples, wanted, reference=reference)[0], samples.select(active)
                found.average(active, estimator.evaluate(some, more, bar.update))
        if target_stderr is not None and len(left := found.nfe[found.variance[0].sqrt() > target_stderr]):
            spent = int(left.max())
            warn(
                f"{len(left)} of {len(samples)} samples are above target_stderr={target_stderr:g} after {spent} "
                f"evaluations, and twice as many are more than max_nfe={max_nfe}; give a larger max_nfe, or fit the "
                "density first"
            )
        return estimator.report(found, samples, wanted, numbers)

    @ordinary
    @evaluation
    def compare(
        self,
        x: Tensor,
        cond_a: dict[str, Any],
        cond_b: dict[str, Any],
        *,
        nfe: int | None = None,
        seed: int = 0,
        sample_index: Tensor | None = None,
        mask: Tensor | None = None,
        memory: int | str | None = None,
    ) -> Comparison:
        r"""Return log p(x | a) - log p(x | b) with the standard error of the difference.

        Both conditions see the same nodes and the same noise, so what they share cancels: the error is that of the
        difference. It is below that of either density where both networks are alike; after a fit, whose reference takes
        the noise out of each, two estimates may differ by less than this where they are not.

        Arguments:
            x: data, shape (B, *shape).
            cond_a, cond_b: keyword arguments of the network.
            nfe: evaluations per sample under each condition.
            seed, sample_index, mask, memory: as in `estimate`.

        Raises:
            ValueError: as `estimate`.
        """
        samples = self.check(x, sample_index, merged(cond_a, {}), merged(cond_b, {}), mask=mask)
        # Nodes, their known curve and low-discrepancy error bars were measured for densities, not for differences.
        nodes = FittedNodes(self.nodes.density.half_uniform(), uncalibrated())
        wanted = self.wanted(nfe, seed, samples, memory)._replace(noise="independent")
        plan, programs = self._plan(samples, wanted, nodes)
        found = Differences(samples, (self.nodes.slowest_decay,) * 2)
        for part in plan.run(samples, programs, self.reference):
            found.put_conditions(part)
        return found.told()

    @takes_conditions
    @ordinary
    @evaluation
    def fit(
        self,
        data: Tensor,
        *,
        mask: Tensor | None = None,
        reference: str = "auto",
        evaluations: int = 400_000,
        seed: int = 0,
        memory: int | str | None = None,
        progress: bool | None = None,
        cond: dict[str, Any] | None = None,
        **named: Any,
    ) -> ScoreDensity:
        """Fit the reference density and the nodes to data, and calibrate low-discrepancy noise; return self.

        Estimates stay unbiased without and with it; they need fewer evaluations afterwards. What was fitted is part of
        `state_dict()`. Constant and linearly dependent columns are warned of: there the density is infinite;
        and data beyond the schedule's noise, of which the network says nothing.

        Arguments:
            data: training data, shape (N, *shape), N >= 20; a fifth is held out for the choice. At most 6,250 samples,
                or 16 million numbers, are looked at; on another device than the network, they alone go there.
            mask: as in `estimate`, of the data.
            reference: "auto", or a kind: "isotropic", "diagonal", "full", "mixture", and "images" for mixtures that are
                diagonal in cosines, for data of shape (N, C, H, W) or (N, C, L); with a mask the first two alone.
            evaluations: bound of the network evaluations to spend. Below 1,536 only the reference is fitted (with a
                warning, but for 0), below about 90,000, with fewer than 80 samples, or with a mask, the noise is not
                calibrated and stays independent; so it does for images to which `control="self"` pays (from 31,000 on).
            seed: key of the pilot's noise and of the choice of held-out samples.
            memory: as in `estimate`, beside some copies of the samples that are looked at, in float64.
            progress: show a progress bar; by default where stderr is a terminal (`fastscore.support.progress`).
            cond, named: keyword arguments of the network for the data, as in `estimate`.

        Raises:
            ValueError: for fewer than 20 samples, an unknown kind, or one that is not fitted to masked data.
        """
        evaluations, seed = check_evaluations(evaluations), seed_of(seed)
        samples = self._chosen(data, seed, cond, mask)
        everywhere = slice(None) if samples.mask is None else samples.mask.all(0)
        degenerate, network = warn_if_degenerate(samples.x[:, everywhere], self.schedule), network_of(self)
        left = evaluations
        with progress_bar(progress, total=evaluations, unit="evaluation", desc="fit: reference") as bar:

            def step(what: str, count: int) -> None:
                nonlocal left
                left -= count
                bar.set_description(f"fit: {what}")
                bar.update(count)

            def chunks(reference: Reference) -> Chunks:
                wanted = self.wanted(None, seed, samples, memory)
                return self.planner.chunks(network, samples, programs, reference, wanted, PILOT_DRAWS)

            warn_if_training(self.model)
            programs = network.find_programs(samples)
            wanted = self.wanted(None, seed, samples, memory)
            kept = evaluations_of_own(self.noise, samples, wanted, evaluations)
            plan = PilotPlan(evaluations - kept, seed, chunks, step, waits=kept > 0)
            fitted = run_pilot(network, samples, reference, plan)
            for cond in samples.conds:
                cond.remember(self.model, len(samples))
            self.reference = fitted.reference
            scales = fitted.reference.scales()
            home = self.schedule.range_for(*scales)
            nodes = FittedNodes(fitted.nodes, fitted.calibration, scales, fitted.gaussian, home=home)
            self.nodes, self._ends, self.fitted_shape = nodes, ScheduleEnds(self.schedule, nodes), samples.shape
            self.planner.forget_reference()
            pilot_of_own(self, samples, wanted, left, step)
            if plan.waits and not self.nodes.own_pays:  # else noise is independent
                plan = replace(plan, evaluations=left)
                self.nodes.calibration = calibrate_noise(network_of(self), samples, fitted, plan).calibration
            bar.total = bar.n  # not all that was allowed had to be spent
        if not degenerate:
            warn_if_out_of_range(samples.x[:, everywhere], fitted.reference, self.log_snr_range)
            warn_if_worse_than_reference(fitted, samples)
        return self

    def with_reference(self, reference: Reference | None) -> ScoreDensity:
        """Return a density with the same network, another reference, independent noise, and nodes as before `fit`.

        The nodes that `fit` found suit its own reference, and cost another one more than they gain.

        Arguments:
            reference: None for N(0, schedule.data_std^2), which a new density starts from.
        """
        other = ScoreDensity(
            self.model,
            self.schedule,
            self.predicts,
            reference=reference,
            noise="independent",  # calibrated error bars belong to the reference that they were fitted with
            nfe=self.nfe,
            backend=self.backend,
            time_dtype=self.time_dtype,
            program=self._programs.mode,
        )
        other._programs = self._programs
        if reference is self.reference:
            other.fitted_shape = self.fitted_shape
        return other

    def extra_repr(self) -> str:
        return f"{self.schedule!r}, predicts={self.predicts!r}, noise={self.noise!r}, nfe={self.nfe}"

r"""A class-conditional score network as a classifier: p(y | x) by Bayes' rule from its densities.

.. math:: p(y \mid x) = \frac{p(y)\, p(x \mid y)}{\sum_k p(k)\, p(x \mid k)}

All classes of a sample see the same nodes and the same noise, so what they share cancels, the reference density too;
one fitted to each class would not, and makes differences noisier. What remains of ||eps - eps_a||^2 - ||eps - eps_b||^2
is mostly linear in eps: nodes are antithetic pairs, which cancel that. Evaluations come in rounds that double what was
spent. After each, a class drops out whose posterior is below that of the best one at a stated level of error
(Bonferroni over rounds and classes, Student's t from differences of the draws, see `Rounds.drop`).

References:
    Your Diffusion Model is Secretly a Zero-Shot Classifier (Li et al., 2023), https://arxiv.org/abs/2303.16203
    A Score-Based Density Formula (Li and Yan, 2024), https://arxiv.org/abs/2408.16765
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..estimator.calibration import uncalibrated
from ..estimator.network_density import network_of, prepare
from ..estimator.nodes import FittedNodes, NodeDensity
from ..estimator.plan import Plan
from ..estimator.protocol import Density, check_density
from ..estimator.rows import Draws
from ..estimator.rules import FixedRules, Rules, make_rules, uniform_in_time
from ..estimator.samples import Samples, check_batch
from ..process.conditions import Conditions, takes_conditions
from ..process.masks import broadcast_mask
from ..process.network import model_device
from ..reference.gaussians import Reference
from ..support.host import chosen, numbers, share, whole
from ..support.memory import Chunks, budget_bytes
from ..support.modes import ordinary
from ..support.progress import progress_bar
from ..support.structure import flatten
from ..support.untouched import evaluation
from .elimination import Classification, Rounds, round_sizes
from .nodes import PILOT_BINS, PILOT_DRAWS, nodes_over, pilot_rules, range_of

WEIGHTINGS = ("density", "uniform")
BATCH = 256  # samples that go through all rounds together, if memory allows
COPIES = 12  # float32 numbers that live at once for every term: the rounds, and float64 contrasts of the last
PILOT_NFE = 32
# Share of the mean that every bin gets: other classes than the pilot's two differ elsewhere. 0.03 has a third more
# error on the mixtures of the tests.
FLOOR = 0.3
TIME_NODES = 1000  # of the closed-form mean over time


class DiffusionClassifier(nn.Module):
    """Classify data with a class-conditional network.

    Arguments:
        density: the network's density, of any kind; its reference is used, its nodes are not: those here are for
            differences. Their range of log-SNR is that of the density at every call, by its schedule and its reference.
        classes: keyword arguments of the network that name the class, one row a class: `{"y": torch.arange(10)}`, or
            `{"text": embeddings}` of shape (C, tokens, width), also nested as conditions may be; what is the same for
            all classes goes into `fastscore.shared`.
        prior: class probabilities, positive, sum 1, shape (C,); uniform by default.

    Raises:
        TypeError: if the density is none.
        ValueError: for classes or a prior that do not fit.

    Example:
        >>> classifier = DiffusionClassifier(density, {"y": torch.arange(10)}).fit(train_data)
        >>> found = classifier.classify(test_data, nfe=256, error=0.05)
        >>> found.prediction, found.topk(3), found.nfe
    """

    def __init__(self, density: Density, classes: dict[str, object], prior: Tensor | None = None) -> None:
        super().__init__()
        self.density = check_density(density)
        self.classes = _check_classes(classes)
        count = len(next(iter(self.classes.per_sample.values())))
        self.register_buffer("log_prior", _check_prior(prior, count))
        self.nodes = FittedNodes(NodeDensity.pairs(*density.log_snr_range), uncalibrated())

    @takes_conditions
    @ordinary
    @evaluation
    def fit(
        self,
        data: Tensor,
        *,
        mask: Tensor | None = None,
        evaluations: int = 50_000,
        seed: int = 0,
        memory: int | str | None = None,
        progress: bool | None = None,
        cond: dict[str, Any] | None = None,
        **named: Any,
    ) -> DiffusionClassifier:
        """Place the nodes where the two likeliest classes of a sample differ most noisily; return self.

        Arguments:
            data: training data, shape (N, *shape); labels are not needed. They may lie on the CPU while the network is
                on a GPU, as in `ScoreDensity.fit`.
            evaluations: bound of the network evaluations to spend; the first samples that it allows are used.
            mask, seed, memory, cond, named: as in `classify`.
            progress: show a progress bar; by default where stderr is a terminal (`fastscore.support.progress`).

        Raises:
            ValueError: if the evaluations are too few for one sample.
        """
        each = PILOT_NFE * len(self.log_prior) + 6 * PILOT_BINS * PILOT_DRAWS
        if (evaluations := whole("evaluations", evaluations)) < each:
            raise ValueError(f"fit needs {each} evaluations per sample and at least one, got evaluations={evaluations}")
        check_batch(data)
        x = data[: evaluations // each]
        x = x.to(model_device(self.density.model, x.device))
        mask = None if mask is None else broadcast_mask(mask, data)[: len(x)].to(x.device)
        own = Conditions.of(cond, len(data), self.density.model).select(slice(len(x)))
        own = own.to(x.device, data.device).marked()
        options = {"mask": mask, "seed": seed, "memory": memory, "progress": progress, "cond": own}
        _, top = self.classify(x, nfe=PILOT_NFE, error=None, **options).topk(2)
        samples, _, chunks = self._prepare(x, PILOT_NFE, seed, None, memory, own, mask)
        pairs = torch.stack([torch.arange(2 * len(x), device=top.device) // 2, top.flatten()], 1)
        spread, log_snr_range = [], range_of(self.density.core)
        for paired in (False, True):
            draws = Draws(pilot_rules(self.density.core, log_snr_range, paired, seed), "independent", seed)
            f, *_ = self._integrand(samples, pairs, draws, self.density.core.reference, chunks)
            noise = (f[::2] - f[1::2]).reshape(len(x), PILOT_BINS, PILOT_DRAWS).diff(dim=2)
            spread.append((noise.square().mean((0, 2)) / 2).sqrt().cpu())
        edges = torch.linspace(*log_snr_range, PILOT_BINS + 1, dtype=torch.float64, device="cpu")
        nodes = NodeDensity.from_spread(edges, *spread, FLOOR)
        self.nodes = FittedNodes(nodes, self.nodes.calibration)
        return self

    @takes_conditions
    @ordinary
    @evaluation
    def classify(
        self,
        x: Tensor,
        *,
        nfe: int = 256,
        error: float | None = 0.05,
        weighting: str = "density",
        seed: int = 0,
        sample_index: Tensor | None = None,
        mask: Tensor | None = None,
        memory: int | str | None = None,
        progress: bool | None = None,
        cond: dict[str, Any] | None = None,
        **named: Any,
    ) -> Classification:
        """Return p(y | x) of every class with its error.

        Arguments:
            x: data, floating point, shape (B, *shape).
            nfe: network evaluations per class and sample, at most.
            error: for each sample, bound of the probability that any round drops the class whose posterior is highest
                under the network's exact densities; each comparison has error / (rounds (C - 1)). None evaluates all
                classes to the end.
            weighting: "density" for the integral over log-SNR, "uniform" for the mean of ||eps - eps_hat||^2 over the
                schedule's own time, no likelihood but the weighting of Li et al. (2023).
            seed, sample_index, mask, memory: as in `ScoreDensity.estimate`.
            progress: show a progress bar; by default where stderr is a terminal (`fastscore.support.progress`).
            cond, named: further keyword arguments of the network, the same for all classes, as in
                `ScoreDensity.estimate`.

        Raises:
            ValueError: for an error outside (0, 1), an unknown weighting, and as `ScoreDensity.estimate`.
        """
        error = None if error is None else share("error", error, 0.05, "; None evaluates all classes")
        nfe = whole("nfe", nfe)
        if not chosen(weighting, WEIGHTINGS):
            raise ValueError(f"weighting must be one of {', '.join(WEIGHTINGS)}; got {weighting!r}")
        samples, log_det, chunks = self._prepare(x, nfe, seed, sample_index, memory, cond, mask)
        sizes = [nfe] if error is None else round_sizes(nfe)
        rules = self._rules(sizes, weighting, seed)
        plan = _Plan(
            rounds=[Draws(each, "independent", seed, r) for r, each in enumerate(rules)],
            level=None if error is None else error / (len(rules) * (len(self.log_prior) - 1)),
            weighting=weighting,
            chunks=chunks,
        )
        each = 4 * len(self.log_prior) * (COPIES * sum(each.draws for each in rules) + 3 * samples.x.shape[1])
        at_once = max(1, min(BATCH, budget_bytes(memory, x.device) // 2 // each))
        parts = []
        with progress_bar(progress, total=len(samples), unit="sample", desc="classify") as bar:
            for start in range(0, len(samples), at_once):
                part = slice(start, start + at_once)
                parts.append(self._batch(samples.select(part), log_det[part], plan))
                bar.update(len(parts[-1].nfe))
        return Classification.joined(parts)

    def _batch(self, samples: Samples, log_det: Tensor, plan: _Plan) -> Classification:
        """Take some samples through all rounds."""
        reference = self.density.core.reference
        reference = reference if plan.weighting == "density" else reference.gaussian()
        rounds = Rounds(self.log_prior.to(samples.device), len(samples))
        for draws in plan.rounds:
            pairs = rounds.open()
            if not len(pairs):
                break
            f, weight, even, ends = self._integrand(samples, pairs, draws, reference, plan.chunks)
            total, terms = -0.5 * (f * weight).sum(1), (-0.5 * f * even).to(samples.x.dtype)
            rounds.add(pairs, total, terms, ends, draws.rules.nfe)
            if plan.level is not None:
                rounds.drop(plan.level)
        common, placed = self._common(samples, log_det, reference, plan.weighting), len(self.nodes.density.share) > 1
        return rounds.result(common, samples.x.dtype, placed)

    def _integrand(
        self, samples: Samples, pairs: Tensor, draws: Draws, reference: Reference, chunks: Chunks
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return f of every (sample, class) pair, (P, N), with `weight`, `even` and `ends` of its rule for it.

        The class of a pair is a condition.
        """
        which, label = pairs.unbind(1)
        paired = self._paired(samples, which, label)
        f, weight, even, ends = torch.empty(4, len(which), len(draws), dtype=torch.float64, device=samples.x.device)
        network = network_of(self.density.core)
        for part in Plan(network, draws, chunks).run(paired, network.find_programs(paired), reference):
            f[part.samples] = own = part.f.double()
            block = part.block(own)
            for told, of_rule in ((weight, part.rule.weight), (even, part.rule.even), (ends, part.rule.ends)):
                told[part.samples] = part.flat(of_rule.expand_as(block))
        return f, weight, even, ends

    def _paired(self, samples: Samples, which: Tensor, label: Tensor) -> Samples:
        """Return samples with classes. The index of the sample keys the noise: all its classes see the same."""
        given, (x, mask) = samples.conds[0].select(which), samples.entries(which)
        own = {path: rows.to(which.device)[label] for path, rows in self.classes.per_sample.items()}
        conditions = replace(given, per_sample=given.per_sample | own)
        return Samples(x, samples.index[which.cpu()], samples.shape, (conditions,), mask)

    def _prepare(
        self,
        x: Tensor,
        nfe: int,
        seed: int,
        index: Tensor | None,
        memory: int | str | None,
        cond: dict[str, Any],
        mask: Tensor | None,
    ) -> tuple[Samples, Tensor, Chunks]:
        """Check the data, classes in turns; return what the network sees, log|det dx/dz|, and half of the memory."""
        twice = sorted(set(cond) & set(self.classes.structure.arguments))
        if twice:
            raise ValueError(f"{', '.join(twice)} names the class and is set by the classifier; drop it")
        z, log_det = self.density.to_network(x, mask)
        rows = self.classes.to(z.device, next(iter(self.classes.per_sample.values())).device)
        turns = torch.arange(len(z), device=z.device) % len(self.log_prior)
        mask, given = self.density.network_arguments(x, mask, cond | rows.select(turns).marked())
        samples, plan, _ = prepare(self.density.core, z, nfe, seed, index, memory, given, mask)
        if len(samples) == 1:  # no two classes have met in a batch yet
            label = torch.arange(2, device=samples.device)
            both, core = self._paired(samples, torch.zeros_like(label), label), self.density.core
            core.planner.ask_rows(network_of(core), both, plan.chunks.rows)
        return samples, log_det, plan.chunks._replace(rows=max(1, plan.chunks.rows // 2))

    def _rules(self, sizes: list[int], weighting: str, seed: int) -> list[Rules | FixedRules]:
        """Return the rules of all rounds, over the density's present range."""
        schedule = self.density.schedule
        if weighting == "uniform":
            return [uniform_in_time(size, schedule) for size in sizes]
        nodes = nodes_over(self.nodes.density.without_curve(), range_of(self.density.core))
        return [make_rules(nodes, size, schedule, seed=seed, round_=r) for r, size in enumerate(sizes)]

    def _common(self, samples: Samples, log_det: Tensor, reference: Reference, weighting: str) -> Tensor:
        """Return what stands outside the sum and is the same for all classes, nats, float64, shape (B,)."""
        if weighting == "density":
            return reference.log_prob(samples.x, samples.mask) - log_det
        rule = uniform_in_time(2 * TIME_NODES, self.density.schedule).rule
        snr, weight = (v.to(samples.device) for v in (rule.log_snr.exp(), rule.weight))
        return -0.5 * reference.expected_residual(samples.x, snr, weight, samples.mask)


@dataclass(frozen=True)
class _Plan:
    """The rounds to go through at most, the level of each comparison (None drops nothing), and how to cut them."""

    rounds: list[Draws]
    level: float | None
    weighting: str
    chunks: Chunks


def _check_classes(classes: dict[str, object]) -> Conditions:
    """Return the classes as conditions with one entry a class."""
    rows = {}
    if isinstance(classes, dict):
        rows = {k: _in_rows(v) if isinstance(v, list | np.ndarray) else v for k, v in classes.items()}
    leaves, _ = flatten(rows)
    tensors = {k: v.value for k, v in leaves.items() if isinstance(v.value, Tensor) and v.per_sample is not False}
    counts = {len(value) if value.ndim else 0 for value in tensors.values()}
    if len(counts) != 1 or min(counts) < 2:
        got = {name: tuple(value.shape) for name, value in tensors.items()} or repr(classes)
        raise ValueError(
            f"classes must name keyword arguments of the network with one row a class, at least two, such as "
            f"{{'y': torch.arange(10)}}; got {got}"
        )
    return Conditions.of(rows, counts.pop())


def _in_rows(value: list | np.ndarray) -> object:
    """Return a list or an array as a tensor; as it is, such as a list of texts, where it is not one of numbers."""
    try:
        return torch.as_tensor(value, device="cpu")
    except (TypeError, ValueError):
        return value


def _check_prior(prior: Tensor | None, count: int) -> Tensor:
    """Return log p(y), float64, shape (C,)."""
    given = [1 / count] * count if prior is None else prior
    p = numbers("prior", given, f"{count} positive probabilities that sum to 1, or None for uniform ones").detach()
    if p.shape != (count,) or not bool((p > 0).all()) or abs(float(p.sum()) - 1) > 1e-4:
        raise ValueError(
            f"prior must be {count} positive probabilities that sum to 1, got shape {tuple(p.shape)} with the sum "
            f"{float(p.sum()):.6g}; divide by the sum, and leave classes out that cannot occur"
        )
    return (p / p.sum()).log()

"""Who makes the plans of a density: measures what a row of its network costs, and keeps the newest plans."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import nn

from ..ops.noise import POINT_BYTES
from ..process.network import switches_of
from ..program.row_program import ONE_AT_A_TIME, RowProgram
from ..reference.gaussians import Reference
from ..support.host import seed_of
from ..support.memory import Chunks, RowCost, plan_chunks
from ..support.untouched import uncompiled, undisturbed
from . import probe
from .coupling import may_be_coupled, warn_if_coupled
from .integrand import all_values, cost_of_row
from .methods import DENSITY, Method
from .network import Network
from .nodes import FittedNodes
from .plan import Plan
from .rows import Draws
from .rules import common_shift, make_rules
from .samples import Samples, deferred
from .self_fitted import self_fit_cost, self_fitted

PLANS = 8
MOST_ASKED = 256  # questions to a network: an option that is another number at every call is not asked about for ever
OF_THE_REFERENCE = ("resolution", "distance")  # questions whose answers another reference changes


class Wanted(NamedTuple):
    """What a caller wants of an estimate.

    Arguments:
        nfe: evaluations per sample.
        seed, round: of nodes and noise.
        noise: "sobol" or "independent".
        memory: bytes that tensors may take, see `fastscore.support.memory`.
        method: what is summed.
        most: draws that later rounds may have, which the memory has to hold.
        control: "reference", or "self" for one that is fitted to each sample's own draws.
    """

    nfe: int
    seed: int
    noise: str
    memory: int | str | None = None
    method: Method = DENSITY
    round: int = 0
    most: int = 0
    control: str = "reference"


class Planner:
    """Makes plans, and keeps the newest of them, each under all that it depends on.

    A plan is used while the schedule is what it was, and let go with its network. Costs and plans are no state: a copy
    of a density makes its own.
    """

    def __init__(self) -> None:
        self._costs: WeakKeyDictionary[nn.Module, dict[Hashable, RowCost]] = WeakKeyDictionary()
        self._asked: WeakKeyDictionary[nn.Module, set[tuple]] = WeakKeyDictionary()
        self._plans: OrderedDict[Hashable, Plan] = OrderedDict()

    def __reduce__(self) -> tuple:
        return Planner, ()

    def plan(
        self,
        network: Network,
        nodes: FittedNodes,
        reference: Reference,
        samples: Samples,
        programs: tuple[RowProgram | None, ...],
        wanted: Wanted,
    ) -> Plan:
        """Return a plan for such samples.

        Raises:
            ValueError: as `make_rules` and `plan_chunks`; if the network cannot be called with such data.
        """
        options = network.predicts, network.log_snr_range, network.time_dtype, network.backend
        family = (
            *(id(network.schedule), id(network.programs), *options, wanted._replace(seed=0)),
            nodes.values(),
            samples.device,
            self._kind(network, samples, reference, programs),
        )
        key = wanted.seed, family
        plan = self._plans.get(key)
        if plan is not None and plan.draws.rules.hold():
            self._ask(network, samples, reference, plan.chunks.rows)  # what a kept plan's first call did not show
        else:
            itself = wanted.method.control_variate(reference) is reference
            density = nodes.density if itself else nodes.gaussian
            own = wanted.control == "self"
            density = nodes.own if own else density
            like = next((kept for (_, other), kept in self._plans.items() if other == family), None)
            if like is not None and like.draws.rules.hold():
                rules = like.draws.rules.shifted(common_shift(wanted.seed, wanted.round))
            else:
                rules = make_rules(density, wanted.nfe, network.schedule, wanted.method, wanted.seed, wanted.round)
            draws = Draws(rules, wanted.noise, seed_of(wanted.seed), wanted.round)
            most = max(len(draws), wanted.most)
            chunks = self.chunks(network, samples, programs, reference, wanted, most)
            plan = Plan(network, draws, chunks, family, like, self_fitted if own else all_values)
        if not (plan.draws.rules.learned and torch.is_grad_enabled()):
            self._keep(key, plan)
        return plan

    def chunks(
        self,
        network: Network,
        samples: Samples,
        programs: tuple[RowProgram | None, ...],
        reference: Reference,
        wanted: Wanted,
        draws: int,
    ) -> Chunks:
        """Return how much fits into memory at once, by what a row of such samples costs; ask the network's rows too."""
        own = wanted.control == "self"
        kind = own, self._kind(network, samples, reference, programs)
        costs = self._costs.setdefault(network.model, {})
        if kind not in costs:
            costs[kind] = (self_fit_cost if own else cost_of_row)(network, samples, programs, reference)
        points = POINT_BYTES * samples.x.shape[1] if wanted.noise == "sobol" else 0
        chunks = plan_chunks(costs[kind], points, draws, wanted.memory, samples.x.device)
        self._ask(network, samples, reference, chunks.rows)
        return chunks

    def first(self, question: str, network: Network, samples: Samples) -> bool:
        """Return whether something is asked of a network for the first time with such data, conditions and switches."""
        return self._first(question, network.model, _about(network, samples))

    def _first(self, question: str, model: nn.Module, about: tuple) -> bool:
        asked, key = self._asked.setdefault(model, set()), (question, about)
        if key in asked or len(asked) >= MOST_ASKED:
            return False
        asked.add(key)
        return True

    def ask_rows(self, network: Network, samples: Samples, most: int = probe.MOST_ROWS, times: str = "mixed") -> None:
        """Ask the network once, for each shape of data, whether its answers are its rows' own, and warn if not.

        Where all samples had one condition it is asked once more when they do not: on a GPU, where looking for that
        would wait, no later than at the first call.

        Arguments:
            most: rows that fit into memory at once.
            times: "mixed" in a batch, as estimates do, or "alike", as the ODE has them.
        """
        with ONE_AT_A_TIME:  # another thread's trace would show this network's weights without numbers
            about = _about(network, samples)
            if ("mixed", about) in self._asked.get(network.model, ()):
                times = "mixed"  # which tells more, and has been asked
            if self._first_rows(times, network.model, samples, about):
                options = network.schedule, network.log_snr_range, network.time_dtype
                probe.warn_of_coupling(network.model, samples, *options, most, times)

    def _first_rows(self, times: str, model: nn.Module, samples: Samples, about: tuple) -> bool:
        if not any(cond.per_sample for cond in samples.conds):
            return self._first(times, model, about)
        unlike = f"{times}, unlike conditions"
        if (unlike, about) in self._asked.get(model, ()):
            return False
        first = self._first(times, model, about)
        if (first or not deferred(samples.device)) and probe.unlike_first(samples) is not None:
            return self._first(unlike, model, about) or first
        return first

    def forget_reference(self) -> None:
        """Measure rows, and ask about the reference, anew: another one was fitted."""
        self._costs.clear()
        for asked in self._asked.values():
            asked -= {key for key in asked if key[0] in OF_THE_REFERENCE}

    @staticmethod
    def _kind(
        network: Network, samples: Samples, reference: Reference, programs: tuple[RowProgram | None, ...]
    ) -> Hashable:
        return (
            id(network.model),
            samples.shape,
            samples.x.dtype,
            torch.is_grad_enabled() and (samples.x.requires_grad, _moves(network.model)),
            samples.mask is None,
            reference.components,
            reference.full,
            reference.turned,
            tuple(cond.shapes() for cond in samples.conds),
            tuple(program is not None for program in programs),
        )

    def _ask(self, network: Network, samples: Samples, reference: Reference, most: int) -> None:
        """Ask the network once whether its answers are its rows' own, and its noise too."""
        self.ask_rows(network, samples, most)
        if may_be_coupled(network, samples) and self.first("noise", network, samples):
            with ONE_AT_A_TIME, uncompiled(), undisturbed(network.model):
                warn_if_coupled(network, samples, reference, most)

    def _keep(self, key: Hashable, plan: Plan) -> None:
        self._plans.pop(key, None)
        for other in [k for k, kept in self._plans.items() if kept.network.model is not plan.network.model]:
            self._plans.pop(other, None)
        self._plans[key] = plan
        while len(self._plans) > PLANS:
            self._plans.popitem(last=False)


def _moves(model: nn.Module) -> bool:
    """Return whether a parameter wants a gradient."""
    return any(parameter.requires_grad for parameter in model.parameters())


def _about(network: Network, samples: Samples) -> tuple:
    """Return what the answer to a question depends on: data, conditions and switches."""
    options = tuple(cond.options() for cond in samples.conds)
    return samples.shape, samples.x.dtype, options, switches_of(network.model)

"""A density of a network's own data: what it is made of, and how a call is checked and planned before it runs.

`network_of` and `prepare` are functions and no methods: the classifier, the ODE and CUDA graphs need them of a density,
and people who make one should not find them there.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..ops.noise import SOBOL_MAX_DIM
from ..ops.select import check_name, select
from ..process.conditions import Conditions
from ..process.masks import broadcast_mask, mask_rows
from ..process.network import cast_time, model_device, refuse_cut_times, warn_if_training
from ..process.schedules import Schedule
from ..process.taken_dtype import is_open, settle
from ..program.row_program import Programs, RowProgram
from ..reference.gaussians import Reference
from ..reference.picking import Picked
from ..support.buffers import Constants
from ..support.compiled import Compiled
from ..support.host import chosen, kind_of, seed_of, whole
from ..support.memory import parse_bytes
from ..support.untouched import uncompiled, undisturbed
from .coincidence import refuse_coincidences
from .control import control_of
from .degenerate import are_far, warn_of_far
from .graphs import Graphs
from .methods import DENSITY, method_of
from .network import Network
from .nodes import FittedNodes
from .pilot import choose
from .plan import Plan
from .planner import Planner, Wanted
from .plausible import warn_if_implausible
from .protocol import Density
from .replay import Replays
from .resolution import clean_end_is_asked, warn_if_unresolved
from .samples import Samples, check_batch, check_samples, deferred, refuse_not_finite_at
from .schedule_ends import ScheduleEnds

NOISES = ("auto", "sobol", "independent")


class NetworkDensity(Density):
    """What `fastscore.ScoreDensity` is made of, without the calls that people make.

    Attributes:
        model, schedule, predicts, noise, nfe, backend, time_dtype: as `ScoreDensity` takes them.
        reference: where estimates start from.
        fitted_shape: of a sample, as `fit` saw them; None where it is not known.
        planner: keeps the plans of earlier calls.
        replays: keeps their graphs on a GPU.
        flows: keeps those of the ODE.
    """

    model: nn.Module
    schedule: Schedule
    predicts: str
    noise: str
    nfe: int
    backend: str
    time_dtype: torch.dtype | None
    reference: Reference
    fitted_shape: tuple[int, ...] | None
    planner: Planner
    replays: Replays
    flows: Graphs
    _programs: Programs
    _ends: ScheduleEnds
    _compiles: bool
    _compiled: Compiled | None

    @property
    def core(self) -> NetworkDensity:
        """Itself: the network's data are the user's."""
        return self

    def to_network(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return x itself, and a log-determinant of zero, float64, shape (B,)."""
        check_batch(x)
        return x, torch.zeros(len(x), dtype=torch.float64, device=x.device)

    @property
    def nodes(self) -> FittedNodes:
        """Where to evaluate, over the range of the schedule as it is now.

        Raises:
            ValueError: if the schedule's ends have moved and are no range any more.
        """
        placed = self._modules["nodes"]
        assert isinstance(placed, FittedNodes)
        found = self._ends.follow(self.schedule, placed)
        if found is not placed:
            self._modules["nodes"] = found
            self.planner.forget_reference()  # what was asked of it at other ends
        return found

    @nodes.setter
    def nodes(self, nodes: FittedNodes) -> None:
        self._modules["nodes"] = nodes

    @property
    def log_snr_range(self) -> tuple[float, float]:
        """Range (lowest, highest) of the log-SNR that estimates integrate over; outside, the reference stands in."""
        return self.nodes.log_snr_range

    def _parts(self) -> tuple:
        """Return what an estimate is made of: the same objects mean the same network, read in the same way."""
        network = self.model, self.schedule, self.predicts, self.time_dtype, self.backend, self._programs
        return *network, self.reference, self.nodes

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # What is loaded is written into the buffers, and another density, or its maker, may hold this reference too.
        self.reference = copy.deepcopy(self.reference)
        self.planner.forget_reference()
        self.fitted_shape = None
        super()._load_from_state_dict(state_dict, prefix, *args)

    def wanted(
        self, nfe: int | None, seed: int, samples: Samples, memory: int | str | None, method: str = DENSITY.name
    ) -> Wanted:
        """Return what a call wants of an estimate, by the density's own options where it says nothing."""
        nfe, seed = whole("nfe", self.nfe if nfe is None else nfe), seed_of(seed)
        if memory is not None:
            parse_bytes(memory)
        return Wanted(nfe, seed, self._noise_kind(samples), memory, method_of(method))

    def _controlled(self, control: str, wanted: Wanted, samples: Samples) -> tuple[Wanted, Reference]:
        """Return what is wanted with a control variate, and the reference that goes with it.

        Raises:
            ValueError: as `check_control`.
        """
        if control_of(control, self.noise, self.nodes, samples, wanted) == "reference":
            return wanted, self.reference
        found = Picked.of(self.reference, samples.shape)
        if not bool(self.nodes.own_base):
            base = Reference.isotropic(self.schedule.data_std).on(samples.device)
            found = Picked.of(base, samples.shape).told_by(found)
        return wanted._replace(noise="independent", control="self"), found

    def _plan(
        self,
        samples: Samples,
        wanted: Wanted,
        nodes: FittedNodes | None = None,
        reference: Reference | None = None,
    ) -> tuple[Plan, tuple[RowProgram | None, ...]]:
        network = network_of(self)
        warn_if_training(self.model)
        programs = network.find_programs(samples)
        reference = self.reference if reference is None else reference
        plan = self.planner.plan(network, nodes or self.nodes, reference, samples, programs, wanted)
        for cond in samples.conds:  # with which the network has answered, if it never had before
            cond.remember(self.model, len(samples))
        return plan, programs

    def _ask_at_the_ends(self, network: Network, samples: Samples, plan: Plan) -> None:
        """Ask the network once how it answers at the ends of the range, and warn of what no density has there."""
        if not (clean_end_is_asked() and self.planner.first("resolution", network, samples)):
            return
        at_once = plan.chunks.per_call or plan.chunks.rows
        warn_if_unresolved(network, samples, self.reference, at_once)
        if self.fitted_shape is None:  # fit has compared the network with what it saw of the data
            warn_if_implausible(network, samples, self.reference, at_once)

    def _noise_kind(self, samples: Samples) -> str:
        d = samples.x.shape[1]
        if self.noise == "auto":
            known = self.nodes.calibration.numel() and samples.mask is None
            return "sobol" if d <= SOBOL_MAX_DIM and known else "independent"
        if self.noise == "sobol" and d > SOBOL_MAX_DIM:
            raise ValueError(f"noise='sobol' goes to {SOBOL_MAX_DIM} dimensions, got {d}; use noise='independent'")
        return self.noise

    def _some_times(self) -> Tensor:
        """Return times at a quarter, half and three quarters of the range, shape (3,)."""
        lo, hi = self.log_snr_range
        return self.schedule.time(torch.linspace(lo, hi, 5, dtype=torch.float64, device="cpu")[1:-1])

    def check(self, x: Tensor, sample_index: Tensor | None, *conds: dict, mask: Tensor | None = None) -> Samples:
        """Return checked data; the reference goes where they lie, which is where the network is.

        Data far from what `fit` saw are warned of; on a GPU that waits until a number is read.

        Raises:
            ValueError: as `estimate` for bad data.
        """
        samples, seen = self._checked(x, sample_index, *conds, mask=mask), self.fitted_shape
        if seen is not None and samples.shape != seen and sorted(samples.shape) == sorted(seen):
            raise ValueError(
                f"x has shape {tuple(samples.shape)} a sample and fit saw {tuple(seen)}, which has as many entries in "
                "another order; permute x, or fit again"
            )
        far = not deferred(samples.device) and are_far(samples, self.reference)
        if far and self.planner.first("distance", network_of(self), samples):
            warn_of_far(samples, self.reference)
        return samples

    def _checked(self, x: Tensor, sample_index: Tensor | None, *conds: dict, mask: Tensor | None = None) -> Samples:
        samples = check_samples(x, sample_index, conds, self.model, mask)
        self.reference = self.reference.on(samples.device)
        if isinstance(self.model, Constants):
            self.model.follow(samples.device)
        select(samples.x.device, samples.x.dtype, self.backend)
        own = self.reference.mean.shape[1]
        if own not in (1, samples.x.shape[1]):
            raise ValueError(
                f"x has {samples.x.shape[1]} dimensions a sample and the reference {own}; fit again, or give another"
            )
        self._ask_network(samples)
        if samples.mask is not None and not self.reference.along_axes and not bool(samples.mask.all()):
            raise ValueError(
                "a mask needs a reference that is diagonal in the entries, since the marginals of others are not known "
                f"at every noise level, got {self.reference!r}; use fit(data, reference='diagonal'), or "
                "fit(data, mask=...)"
            )
        return samples

    def _ask_network(self, samples: Samples) -> None:
        """Ask the network, once each, what it takes data and conditions for."""
        if samples.conds and is_open(self.model, samples.x.dtype):
            one = samples.select(slice(1))
            time = cast_time(self._some_times()[:2].to(samples.device), samples.x.dtype, self.time_dtype)
            with torch.no_grad(), uncompiled(), undisturbed(self.model):
                given = one.conds[0].copy().repeated(2)  # the network may write into them
                settle(self.model, one.x.view(1, *one.shape).repeat_interleave(2, 0), time, given)
        refuse_coincidences(self.model, samples, self._some_times, self.time_dtype)

    def _chosen(self, data: Tensor, seed: int, cond: dict[str, Any], mask: Tensor | None) -> Samples:
        """Return the samples that `fit` looks at, on the network's device."""
        check_batch(data)
        chosen = choose(len(data), data[0].numel(), seed)
        here = model_device(self.model, data.device)
        x = data[chosen.to(data.device)].to(here)
        refuse_not_finite_at("data", x, chosen)
        given = Conditions.of(cond, len(data), self.model).select(chosen).to(here, data.device)
        samples = replace(self._checked(x, chosen), conds=(given,))
        self._ask_network(samples)
        if mask is None:
            return samples
        counted = broadcast_mask(mask, data)[chosen.to(data.device)].to(here)
        return replace(samples, mask=mask_rows(counted, x))


def check_parts(
    model: nn.Module,
    schedule: Schedule,
    reference: Reference | None,
    noise: str,
    backend: str,
    time_dtype: torch.dtype | None,
    compiles: bool,
) -> None:
    """Raise TypeError or ValueError for what a density cannot be made of, as `ScoreDensity`."""
    if not isinstance(schedule, Schedule):
        raise TypeError(f"schedule must be a fastscore Schedule such as DDPM.linear(1000), got {kind_of(schedule)}")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {kind_of(model)}; wrap a function in a Module")
    for name, weight in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(weight):
            raise ValueError(
                f"model must have all its weights, got {name!r} without a shape, of a lazy layer; call the network "
                "once before"
            )
    if not chosen(noise, NOISES):
        raise ValueError(f"noise must be one of {', '.join(NOISES)}; got {noise!r}")
    if reference is not None and not isinstance(reference, Reference):
        raise TypeError(f"reference must be a fastscore Reference, got {kind_of(reference)}")
    if time_dtype is not None and not isinstance(time_dtype, torch.dtype):
        raise TypeError(f"time_dtype must be a torch.dtype such as torch.float32, got {time_dtype!r}")
    refuse_cut_times(schedule, time_dtype)
    if not isinstance(compiles, bool):
        raise TypeError(
            f"compile must be True or False, got {compiles!r}; options of torch.compile go with a network "
            "that it made, torch.compile(model, ...), in the place of the model"
        )
    check_name(backend)


def check_nfe(nfe: object) -> int:
    """Return evaluations per sample as an integer; raise ValueError for what is none, or below 1."""
    if (nfe := whole("nfe", nfe)) < 1:
        raise ValueError(f"nfe must be the evaluations per sample, 4 or more for an error bar, got {nfe}")
    return nfe


def check_evaluations(evaluations: object) -> int:
    """Return what a fit may spend as an integer; raise ValueError for what is none, or below 0."""
    if (evaluations := whole("evaluations", evaluations)) < 0:
        raise ValueError(f"evaluations must be the most that a fit may spend, 0 or more, got {evaluations}")
    return evaluations


def network_of(density: NetworkDensity) -> Network:
    """Return the network of a density with all that is needed to read it."""
    options = density.time_dtype, density._programs, density.backend, compiled_of(density)
    return Network(density.model, density.schedule, density.predicts, density.log_snr_range, *options)


def compiled_of(density: NetworkDensity) -> Compiled | None:
    """Return the network as it is now, compiled, if the density was made with `compile=True`."""
    if density._compiles and (density._compiled is None or density._compiled.function is not density.model):
        density._compiled = Compiled(density.model)
    return density._compiled


def prepare(
    density: NetworkDensity,
    x: Tensor,
    nfe: int | None,
    seed: int,
    sample_index: Tensor | None,
    memory: int | str | None,
    cond: dict[str, Any],
    mask: Tensor | None = None,
) -> tuple[Samples, Plan, tuple[RowProgram | None, ...]]:
    """Check the data and plan an estimate with method "density"; arguments as in `ScoreDensity.estimate`.

    Returns:
        The data, a plan for them, and the network's row programs.
    """
    samples = density.check(x, sample_index, cond, mask=mask)
    return samples, *density._plan(samples, density.wanted(nfe, seed, samples, memory))

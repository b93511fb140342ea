"""The integration of a grid in one CUDA graph: the launches of all its steps become one.

The data, their conditions and a mask are copied into memory of the graph's own. The network's parameters and the
reference are read where they lie, and what comes of them is evaluated inside the graph, so that a step of an optimizer
counts. What the schedule says of the grid is known on the host, and another grid is another graph.
"""

from __future__ import annotations

import os
from collections.abc import Hashable

import torch
from torch import Tensor

from ..density import ScoreDensity
from ..estimator.graphs import places_of
from ..estimator.samples import Samples
from ..program.row_program import RowProgram
from ..program.settings import of_matrix_products
from .flow_program import Grid

MOST_TIMES = 1024  # in one graph, each with some thirty launches


def why_not(samples: Samples, grid: Grid) -> str | None:
    """Return the reason why the integration of a grid is not replayed as one CUDA graph, None if there is none."""
    if not samples.x.is_cuda:
        return "the data are not on a GPU"
    if os.environ.get("FASTSCORE_GRAPHS") == "0":
        return "FASTSCORE_GRAPHS=0 is set"
    if torch.cuda.is_current_stream_capturing():
        return "the caller captures a graph already"
    if any(isinstance(v, Tensor) and not v.is_cuda for cond in samples.conds for v in cond.shared.values()):
        return "a condition lies on the host"
    if len(grid) > MOST_TIMES:
        return f"its grid has {len(grid)} times, and a graph at most {MOST_TIMES}"
    return None


def depends_on(density: ScoreDensity, samples: Samples, program: RowProgram, grid: Grid, rows: int) -> Hashable:
    """Return what such a graph depends on, beside the numbers that it reads where they lie.

    Arguments:
        rows: how many samples it is made for.
    """
    conditions = tuple(
        (name, value.shape[own:], value.dtype) if isinstance(value, Tensor) else (name, type(value), value)
        for cond in samples.conds
        for own, values in ((1, cond.per_sample), (0, cond.shared))
        for name, value in sorted(values.items())
    )
    return (
        *(rows, samples.shape, samples.x.shape[1], samples.x.dtype, samples.device, samples.mask is None),
        *(conditions, density.time_dtype, grid.key(), id(program)),
        places_of(program.reads()),
        places_of(density.reference.tensors()),
        torch.are_deterministic_algorithms_enabled(),
        of_matrix_products(),
    )

"""A network with all that is needed to read it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..ops.instructions import NoProgram
from ..process.conditions import Conditions
from ..process.network import time_dtype_of
from ..process.schedules import Schedule
from ..program.row_program import Programs, RowProgram
from ..support.compiled import Compiled
from .samples import Samples

PROBE_ROWS = 4


@dataclass(frozen=True)
class Network:
    """A network with all that is needed to read it: what it predicts, on which schedule, and its row programs.

    Attributes:
        compiled: the network as compiled, of a density that asks for it; its row programs are compiled then as well.
    """

    model: nn.Module
    schedule: Schedule
    predicts: str
    log_snr_range: tuple[float, float]
    time_dtype: torch.dtype | None = None
    programs: Programs | None = None
    backend: str = "auto"
    compiled: Compiled | None = None

    def find_programs(self, samples: Samples) -> tuple[RowProgram | None, ...]:
        """Return the row program under each condition of the samples, None where the network itself must run."""
        if self.programs is None:
            return (None,) * len(samples.conds)
        return tuple(self.programs.find(*self._traced_on(samples, cond)) for cond in samples.conds)

    def need_program(self, samples: Samples) -> RowProgram:
        """Return the row program under the one condition of the samples; raise NoProgram with the reason of none."""
        (cond,) = samples.conds
        if self.programs is None:
            raise NoProgram("nobody keeps its programs")
        return self.programs.need(*self._traced_on(samples, cond))

    def _traced_on(self, samples: Samples, cond: Conditions) -> tuple:
        """Return what `Programs.find` looks a program up by, and traces one on."""

        def times() -> Tensor:
            log_snr = torch.linspace(*self.log_snr_range, PROBE_ROWS, dtype=torch.float64, device="cpu")
            return self.schedule.time(log_snr)

        dtype = samples.x.dtype
        time_dtype = time_dtype_of(self.schedule, dtype, self.time_dtype)
        return self.model, samples.shape, dtype, samples.device, cond, times, time_dtype

"""Where the experiments launch their kernels: on the GPU, or in a rehearsal on the emulated one of tests/emulator."""

from __future__ import annotations

import ctypes
from functools import cache
from types import ModuleType

import micro_kernels
import torch
from measuring import DEVICE, REHEARSING

from fastscore.ops import cuda, cuda_steps, select
from fastscore.ops.instructions import decode
from fastscore.ops.steps import Steps
from fastscore.ops.task import Task

KERNELS = ("sm90_steps_*.cu", "sm90_density_mlp*.cu")  # of csrc: those of Hopper


def prepare() -> None:
    """Compile what the experiments launch beside the package's kernels, or in a rehearsal those too."""
    micro()
    module()


@cache
def micro() -> ctypes.CDLL:
    """Return the library of the micro-kernels."""
    if not REHEARSING:
        return micro_kernels.load(micro_kernels.build())
    from emulator import build as builder

    library = builder.build(micro_kernels.SOURCES)
    library.emulator_device(9, 0, 4)
    library.emulator_seed(1, builder.ADVERSARIAL)  # threads take turns as late as they may: a missing barrier shows
    return micro_kernels.load(library)


@cache
def module() -> ModuleType:
    """Return `fastscore._C`, or what stands in for it; raise RuntimeError if there is none."""
    if REHEARSING:
        from emulator import comparison

        names = sorted(path.stem for kernels in KERNELS for path in micro_kernels.CSRC.glob(kernels))
        library = comparison.load(micro_kernels.CSRC, *names)
        library.emulator_device(9, 0, 4)
        return comparison.Module(library, comparison.HOPPER)
    found = select.native()
    if isinstance(found, str):
        raise RuntimeError(f"fastscore._C is {found}")
    return found


def limits() -> tuple[int, int]:
    """Return compute capability, 90 for 9.0, and the shared memory that a block may have."""
    if REHEARSING:
        from emulator.comparison import HOPPER

        return HOPPER
    return cuda._device(torch.device(DEVICE))


def stream() -> int:
    return 0 if REHEARSING else torch.cuda.current_stream().cuda_stream


def steps_of(bound: tuple, d: int, reference: list[torch.Tensor]) -> Steps | str:
    """Return the steps as which a program runs, or why it is run by instructions."""
    task = Task.of_tensors(decode(bound[0]), *bound[1:], d, reference)
    return cuda_steps.fitting(task.code, task.shapes, task.levels, task.d, module(), limits())

"""Look into a network, or call it, and leave it as it was: compiled code, modes, gradients, buffers, random numbers."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules import module

from .generic import Arguments, Result
from .randomness import Randomness


@contextmanager
def uncompiled() -> Iterator[None]:
    """Run what torch.compile made as the plain code that it was made from, without a trace of it afterwards.

    Compiled code does not go together with what looks into a network (hooks, dispatch modes, export), and would be
    given up for good after the first such call; nor with a backward pass that keeps its graph.
    """
    if "torch._dynamo" not in sys.modules:  # nothing has been compiled, and importing it takes a second
        yield
        return
    _STANCE.enter()
    try:
        yield
    finally:
        _STANCE.leave()


class _Stance:
    """The stance of torch.compile, which the whole process has: the first thread changes it, the last puts it back."""

    def __init__(self) -> None:
        self._lock, self._inside, self._changed = threading.Lock(), 0, None

    def enter(self) -> None:
        with self._lock:
            if not self._inside:
                self._changed = torch.compiler.set_stance("force_eager")
                self._changed.__enter__()
            self._inside += 1

    def leave(self) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._changed.__exit__(None, None, None)


_STANCE = _Stance()


def evaluation(call: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Let a method of a density, or a function of one, compute without gradients and leave the network as it was.

    Layers in train mode do not learn from it (`undisturbed`).
    """

    @wraps(call)
    def evaluated(owner: Any, *args: Any, **kwargs: Any) -> Result:
        density = owner
        while hasattr(density, "density"):
            density = density.density
        with torch.no_grad(), undisturbed(density.model):
            return call(owner, *args, **kwargs)

    return evaluated


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Put the buffers of layers in train mode, and the random numbers that the network may draw from, back."""
    layers = layers_of(model)
    drawn = Randomness(model, layers)
    learning = [layer for layer in layers if layer.training]
    kept = contents(buffer for layer in learning for buffer in layer.buffers(recurse=False))
    try:
        yield
    finally:
        put_back(kept)
        drawn.put_back()


def layers_of(model: nn.Module) -> list[nn.Module]:
    """Return every layer of a network once, as `modules()` does, in a third of the time, level by level."""
    found, seen = [model], {model}
    for layer in found:
        for part in layer._modules.values():
            if part is not None and part not in seen:
                seen.add(part)
                found.append(part)
    return found


def contents(tensors: Iterable[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Return tensors with a copy of each, for `put_back`; those of inference mode nobody writes to.

    They are written through `data`, which counts versions of its own: a graph that the caller has kept of an earlier
    forward stays good, since its numbers are what they were.
    """
    writable = (_once(tensor.data) for tensor in tensors if not tensor.is_inference())
    return [(tensor, tensor.clone()) for tensor in writable]


def _once(tensor: Tensor) -> Tensor:
    """Return the numbers of an expanded tensor once, which are written through one place alone."""
    if tensor.layout is torch.strided:
        for dim, (size, stride) in enumerate(zip(tensor.shape, tensor.stride())):
            if size > 1 and stride == 0:
                tensor = tensor.narrow(dim, 0, 1)
    return tensor


@torch.no_grad()
def put_back(kept: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Write copies back into their tensors. Versions do not tell which have changed: batch norm does not raise them."""
    for tensor, copy in kept:
        tensor.copy_(copy)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put every layer of a network into eval mode, and each back into the mode that it was in."""
    training = [layer for layer in layers_of(model) if layer.training]
    model.eval()
    try:
        yield
    finally:
        for layer in training:
            layer.training = True


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Let no gradient reach a network's parameters: what is computed inside depends on its inputs alone."""
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in learned:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learned:
            parameter.requires_grad_(True)


@contextmanager
def hooks_of_all_modules_kept() -> Iterator[None]:
    """Leave the hooks that PyTorch calls for every module as they are.

    An export that fails leaves one behind in torch 2.11, which every later network's code would then be seen to read.
    """
    hooks = {
        name: kept for name, kept in vars(module).items() if name.startswith("_global_") and isinstance(kept, dict)
    }
    before = {name: value.copy() for name, value in hooks.items()}
    try:
        yield
    finally:
        for name, value in hooks.items():
            if value != before[name]:
                value.clear()
                value.update(before[name])


def forget_tensors(modes: Iterable[object]) -> None:
    """Let go of what the modes of an export know of a network's tensors, by weak references, once nothing is traced.

    A graph keeps its mode, and `torch.utils.swap_tensors` refuses a tensor that has a weak reference: so would
    `load_state_dict` and `Module.to`, where they swap. torch.compile lets go of them in the same way.
    """
    for mode in modes:
        if isinstance(mode, FakeTensorMode):
            # Names that torch does not promise: a release that has others keeps its references.
            known = getattr(getattr(mode.fake_tensor_converter, "meta_converter", None), "describer", None)
            for name in ("lookup_tensor", "lookup_storage"):
                if hasattr(known, name):
                    getattr(known, name).clear()

"""What the dispatcher tells of the pretended device (pretended_device.py): places, launches, copies, waits, graphs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

if TYPE_CHECKING:
    from pretended_device import PretendedDevice

CPU = torch.device("cpu")
# An operand of no dimensions may lie on the host, as a number does; but not in these.
NO_NUMBERS = {"aten::cat", "aten::stack", "aten::where"}
# What may mix devices: copies, changes of what a tensor is, and indices that lie on the host.
MIXES = {"aten::copy_", "aten::set_", "aten::set_data", "aten::_has_compatible_shallow_copy_type", "aten::is_same_size"}
INDEXED = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index"}
WAITS = {
    "aten::_local_scalar_dense",
    "aten::equal",
    "aten::nonzero",
    "aten::masked_select",
    "aten::_unique2",
    "aten::unique_dim",
    "aten::unique_consecutive",
    "aten::_linalg_check_errors",
    "aten::repeat_interleave",
}
NO_LAUNCH = {"aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::new_empty_strided"}


class Watch(TorchDispatchMode):
    """What the dispatcher is told on its way to the CPU's kernels."""

    def __init__(self, device: PretendedDevice):
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        device, kwargs = self.device, dict(kwargs or {})
        tensors = list(tensors_of((args, kwargs)))
        target = kwargs.get("device")
        if any(isinstance(t, FakeTensor) or t.is_meta for t in tensors) or (target and target.type == "meta"):
            return func(*args, **kwargs)
        name = func._schema.name
        device.settle(tensors)
        here = [t for t in tensors if device.holds(t)]
        if target is not None:
            kwargs["device"] = CPU
        if "layout" in kwargs and target == CPU:
            target = None  # C++ repeats the options of a tensor that it takes for one of the CPU
        placed = bool(here) if target is None else target.type == "cuda"
        if name == "aten::copy_":
            placed = device.holds(args[0])
        _refuse_generator(placed, tree_leaves((args, kwargs)))
        if name == "aten::_to_copy" and placed != bool(here):
            kwargs.pop("device")
            return func(device.carry(args[0]), *args[1:], **kwargs)
        if name.startswith("fastscore::"):
            return self._op(func, args, kwargs)
        if here:
            self._check(name, tensors, args)
        known = {storage_of(t) for t in tensors}
        found = func(*args, **kwargs)
        if not placed and device.are_open(tensors) if tensors else "layout" in kwargs:
            device.leave_open(found)
        if placed:
            new = [t for t in tensors_of(found) if storage_of(t) not in known]
            device.mark(new)
            if (new or func._schema.is_mutable) and name not in NO_LAUNCH:
                device.counts.launches += 1
            if device.graph is not None:
                device.graph.record(func, args, kwargs, found)
        return found

    def _op(self, func, args, kwargs):
        before, self.device._in_an_op = self.device._in_an_op, True
        try:
            return func(*args, **kwargs)
        finally:
            self.device._in_an_op = before

    def _check(self, name: str, tensors: list[Tensor], args: tuple) -> None:
        """Raise what PyTorch raises, and count what crosses and waits, of an operation with a tensor on the device."""
        device = self.device
        if name == "aten::copy_" and device.holds(args[0]) != device.holds(args[1]):
            device.crossed(to_host=device.holds(args[1]))
        if name in WAITS:
            device.waited()
        if name in INDEXED:
            indices = [i for i in args[1] if i is not None]
            if not device.holds(args[0]):
                raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
            for i in indices:
                if i.dtype == torch.bool:
                    device.waited()
                if not device.holds(i):
                    device.crossed(to_host=False)
            tensors = [t for t in tensors if not any(t is i for i in indices)]
        if name in MIXES:
            return
        least = 0 if name in NO_NUMBERS else 1
        if any(not device.holds(t) and t.ndim >= least for t in tensors):
            where = ", ".join(f"{tuple(t.shape)} on {t.device}" for t in tensors)
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! "
                f"({name}: {where})"
            )


class PretendedGraph:
    """A CUDA graph: what was captured runs again on the same tensors when it is replayed."""

    def __init__(self, device: PretendedDevice):
        self.device, self.steps = device, []

    def __enter__(self) -> None:
        self.device.graph = self

    def __exit__(self, *error) -> None:
        self.device.graph = None

    def record(self, func, args, kwargs, found) -> None:
        with _disable_current_modes():  # aliases, whose shapes no later `squeeze_` changes
            step = tree_map(lambda v: v.detach() if isinstance(v, Tensor) else v, (args, kwargs, found))
        self.steps.append((func, *step))

    def replay(self) -> None:
        self.device.counts.launches += 1
        with _disable_current_modes():
            for func, args, kwargs, found in self.steps:
                for old, new in zip(tensors_of(found), tensors_of(func(*args, **kwargs)), strict=True):
                    if storage_of(old) is not storage_of(new):
                        old.copy_(new)


class Stream:
    def __init__(self, device=None):
        pass

    def wait_stream(self, other) -> None:
        pass


class Crossing(torch.autograd.Function):
    """A copy to the other side whose gradient goes back."""

    @staticmethod
    def forward(ctx, tensor, device):
        ctx.device = device
        return device.carry(tensor)

    @staticmethod
    def backward(ctx, grad):
        return ctx.device.carry(grad), None


def tensors_of(tree: object) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def storage_of(tensor: Tensor):
    """Return a tensor's storage; None for one that has none, as inside of vmap."""
    try:
        return tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):
        return None


def _refuse_generator(placed: bool, leaves: list) -> None:
    for leaf in leaves:
        if placed and isinstance(leaf, torch.Generator) and leaf.device.type == "cpu":
            raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")

"""A second device that is not there: code runs as if some tensors lay on "cuda:0", on a machine without a GPU.

Tensors "on the device" are ordinary CPU tensors whose storage is marked, so that views, parameters and whatever a
backward pass makes go along. Inside `with PretendedDevice() as device:`

- `.to`, `.cuda`, `.cpu` and factories with a CUDA device move and make such tensors, and `.device` says cuda:0 of them;
- an operation that mixes them with tensors of the host, of one or more dimensions, raises what PyTorch raises there,
  and so do `numpy()`, a random factory with a generator of the host, and whatever a CUDA graph refuses to capture;
- `device.counts` has the operations that would launch a kernel (one each: a lower bound), the copies that cross to the
  device and to the host, and the calls that would wait for the device.

It watches the dispatcher, below autograd, so what C++ and backward passes do is seen too. Numbers are the CPU's. Of a
real device it lacks asynchrony, other rounding, and kernels: the backends of Triton and CUDA say that they cannot run.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, fields

import pytest
import torch
from pretended_dispatch import CPU, Crossing, PretendedGraph, Stream, Watch, storage_of, tensors_of
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from fastscore.ops import select
from fastscore.ops import torch as torch_backend
from fastscore.program import row_program as program
from fastscore.program import tracing

CUDA = torch.device("cuda", 0)
CAPABILITY = (7, 5)  # one for which fastscore has no kernels
FREE, TOTAL = 8 << 30, 16 << 30
BODIES = ("perturb", "residual", "residual_backward", "control", "density_mlp", "loss_rows", "loss_difference")
BODIES += ("loss_gradient",)


@dataclass
class Counts:
    """What was done so far: launches, copies to the device and to the host, and waits for the device."""

    launches: int = 0
    to_device: int = 0
    to_host: int = 0
    waits: int = 0

    def since(self, before: Counts) -> Counts:
        return Counts(*(getattr(self, f.name) - getattr(before, f.name) for f in fields(self)))

    def copy(self) -> Counts:
        return self.since(Counts())

    @property
    def crossings(self) -> int:
        return self.to_device + self.to_host


class PretendedDevice:
    """The device, while its `with` block runs; `counts` may be read at any time."""

    def __init__(self):
        self.counts = Counts()
        self._storages: weakref.WeakSet = weakref.WeakSet()
        self._open: weakref.WeakSet = weakref.WeakSet()
        self._watch = Watch(self)
        self._tracing = False
        self._in_an_op = False  # of fastscore, whose body runs without modes unless it is given them again
        self.graph: PretendedGraph | None = None  # that captures
        self._stream = Stream()

    def __enter__(self) -> PretendedDevice:
        if torch.cuda.is_available():
            torch.cuda.init()  # on a machine with a GPU, so that what is patched below cannot come first
        self._patch = pytest.MonkeyPatch()
        for owner, name, value in self._replacements():
            self._patch.setattr(owner, name, value, raising=False)
        self._watch.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self._watch.__exit__(*error)
        self._patch.undo()

    def holds(self, tensor: Tensor) -> bool:
        storage = storage_of(tensor)
        return storage is not None and storage in self._storages

    def mark(self, tree: object) -> object:
        for tensor in tensors_of(tree):
            storage = storage_of(tensor)
            if storage is not None:
                self._storages.add(storage)
        return tree

    def leave_open(self, tree: object) -> None:
        """Let what C++ made, with the options of some tensor, belong to the device that it meets first."""
        self._open.update(map(storage_of, tensors_of(tree)))

    def are_open(self, tensors: list[Tensor]) -> bool:
        return bool(len(self._open)) and all(storage_of(t) in self._open for t in tensors)

    def settle(self, tensors: list[Tensor]) -> None:
        if len(self._open) and any(map(self.holds, tensors)):
            self.mark([t for t in tensors if storage_of(t) in self._open and not self.holds(t)])

    @contextlib.contextmanager
    def counting(self) -> Iterator[Counts]:
        """Give the counts of the block, filled in when it ends."""
        before, found = self.counts.copy(), Counts()
        yield found
        found.__dict__.update(self.counts.since(before).__dict__)

    def carry(self, tensor: Tensor) -> Tensor:
        """Return a copy on the other side, and count it."""
        to_host = self.holds(tensor)
        self.crossed(to_host)
        with _disable_current_modes():
            found = tensor.detach().clone()
        if to_host:
            self._storages.discard(found.untyped_storage())
            return found
        return self.mark(found)

    def as_kernel(self, real, calls: list | None = None):
        """Return a function of which all operations together count as the one launch that a kernel takes on a GPU."""

        def counted(*args):
            before = self.counts.copy()
            found = real(*args)
            self.counts.launches = before.launches + 1
            if calls is not None:
                calls.append(args)
            return found

        return counted

    def crossed(self, to_host: bool) -> None:
        if self.graph is not None:
            raise RuntimeError("Cannot copy between CPU and CUDA tensors during CUDA graph capture")
        self.counts.to_host += to_host
        self.counts.to_device += not to_host
        if to_host:
            self.waited()

    def waited(self) -> None:
        if self.graph is not None:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        self.counts.waits += 1

    def _replacements(self) -> Iterator[tuple[object, str, object]]:
        """Yield (owner, name, replacement) of what Python asks PyTorch without the dispatcher."""
        base = torch._C.TensorBase
        yield torch.Tensor, "device", property(lambda t: CUDA if self._shows(t) else base.device.__get__(t))
        yield torch.Tensor, "is_cuda", property(lambda t: self._shows(t) or base.is_cuda.__get__(t))
        yield torch.Tensor, "get_device", lambda t: 0 if self.holds(t) else base.get_device(t)
        yield torch.Tensor, "to", self._to(torch.Tensor.to)
        yield torch.Tensor, "cuda", lambda t, device=None, **_: t.to(CUDA)
        yield torch.Tensor, "cpu", lambda t, **_: t.to(CPU)
        yield torch.Tensor, "numpy", self._only_on_host(torch.Tensor.numpy)
        yield torch.Tensor, "__array__", self._only_on_host(torch.Tensor.__array__)
        yield torch.Tensor, "tolist", self._to_list(torch.Tensor.tolist)
        yield torch.Tensor, "new_tensor", self._new_tensor(torch.Tensor.new_tensor)
        for name in ("tensor", "as_tensor", "asarray"):
            yield torch, name, self._of_data(getattr(torch, name))
        yield torch.UntypedStorage, "clone", self._clone_storage(torch.UntypedStorage.clone)
        yield torch.cuda, "_lazy_init", lambda: None
        yield torch.cuda, "mem_get_info", lambda device=None: (FREE, TOTAL)
        yield torch.cuda, "get_device_capability", lambda device=None: CAPABILITY
        yield torch.cuda, "current_device", lambda: 0
        yield torch.cuda, "get_rng_state", lambda device=None: torch.get_rng_state()
        yield torch.cuda, "set_rng_state", lambda state, device=None: None
        yield torch.cuda, "device", lambda device: contextlib.nullcontext()
        yield torch.cuda, "stream", lambda stream: contextlib.nullcontext()
        yield torch.cuda, "Stream", Stream
        yield torch.cuda, "current_stream", lambda device=None: self._stream
        yield torch.cuda, "is_current_stream_capturing", lambda: self.graph is not None
        yield torch.cuda, "CUDAGraph", lambda: PretendedGraph(self)
        yield torch.cuda, "graph", lambda graph, **_: graph
        yield program, "trace", self._traced(program.trace)
        # While a trace goes on, tensors show where they really are, and would look as if the network had moved them.
        changes = tracing.refuse_changes
        yield tracing, "refuse_changes", lambda watch: None if self._tracing else changes(watch)
        yield select, "native", lambda: "not for a pretended device"
        for name in BODIES:
            yield torch_backend, name, self._watched_again(getattr(torch_backend, name))

    def _shows(self, tensor: Tensor) -> bool:
        return not self._tracing and self.holds(tensor)

    def _traced(self, real):
        """Trace as on the CPU, since PyTorch without CUDA cannot pretend itself; then say of all that it is here."""

        def trace(model, x_t, *args):
            if not self.holds(x_t):
                return real(model, x_t, *args)
            self._tracing = True
            try:
                with _disable_current_modes():
                    found = real(model, x_t, *args)
            finally:
                self._tracing = False
            constants = [value for kind, value in found.leaves.values() if kind == "constant"]
            self.mark([value for value in constants if value.ndim > 0])  # a number may well lie on the host
            for node in found.graph.nodes:
                node.args, node.kwargs = tree_map(lambda v: CUDA if v == CPU else v, (node.args, node.kwargs))
                for value in tree_leaves(node.meta.get("val")):
                    if isinstance(value, FakeTensor):
                        value.fake_device = CUDA
            return found

        return trace

    def _to(self, real):
        def to(tensor: Tensor, *args, copy: bool = False, **kwargs) -> Tensor:
            if self._tracing:
                return real(tensor, *args, copy=copy, **kwargs)
            other = args[0] if args and isinstance(args[0], Tensor) else kwargs.get("other")
            if other is None:
                device, dtype, _, layout = torch._C._nn._parse_to(*args, **kwargs)
            else:
                device, dtype, layout = other.device, other.dtype, None
            if device is not None and (device.type == "cuda") != self.holds(tensor):
                needs_grad = torch.is_grad_enabled() and tensor.requires_grad
                tensor, copy = Crossing.apply(tensor, self) if needs_grad else self.carry(tensor), False
            options = {} if layout is None else {"memory_format": layout}
            return real(tensor, dtype or tensor.dtype, copy=copy, **options)

        return to

    def _only_on_host(self, real):
        def refusing(tensor: Tensor, *args, **kwargs):
            if self.holds(tensor):
                raise TypeError(
                    "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host "
                    "memory first."
                )
            return real(tensor, *args, **kwargs)

        return refusing

    def _to_list(self, real):
        def tolist(tensor: Tensor):
            if self.holds(tensor):
                self.crossed(to_host=True)
            return real(tensor)

        return tolist

    def _of_data(self, real):
        def of_data(data, *args, device=None, **kwargs) -> Tensor:
            if self._tracing:
                return real(data, *args, device=device, **kwargs)
            if isinstance(data, Tensor):
                device = data.device if device is None and real is not torch.tensor else device
                found = real(data.detach() if self.holds(data) else data, *args, **kwargs)
                return found if device is None else found.to(device)
            found = real(data, *args, device=CPU, **kwargs) if device is not None else real(data, *args, **kwargs)
            requires_grad = found.requires_grad
            on = device is not None and torch.device(device).type == "cuda"
            return self.carry(found).requires_grad_(requires_grad) if on else found

        return of_data

    def _new_tensor(self, real):
        def new_tensor(tensor: Tensor, data, **options) -> Tensor:
            on_device = torch.device(options.pop("device", tensor.device)).type == "cuda"
            found = real(tensor.detach(), data, **options)
            return self.carry(found) if on_device and not self.holds(found) else found

        return new_tensor

    def _clone_storage(self, real):
        def clone(storage):
            found = real(storage)
            if storage in self._storages:
                self._storages.add(found)
            return found

        return clone

    def _watched_again(self, body):
        def watched(*args, **kwargs):
            if not self._in_an_op:
                return body(*args, **kwargs)
            self._in_an_op = False
            try:
                with self._watch:
                    return body(*args, **kwargs)
            finally:
                self._in_an_op = True

        return watched

"""Conditions: what a network gets beside x_t and t, told apart into one entry a sample and shared by the batch.

Every tensor in nested arguments is judged by itself (`Conditions.of`). Where its first size cannot say what it is, the
caller does, with `shared` or `per_sample` around it. Inside, leaves go by their path, as in ``added['mean']``.
"""

from __future__ import annotations

import difflib
import inspect
import weakref
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import wraps

import numpy as np
import torch
from torch import Tensor, nn

from ..support.generic import Arguments, Result
from ..support.host import dense_form, layout_of
from ..support.structure import Leaf, Marked, Structure, flatten, is_plain

_OF_THE_DENSITY = {"schedule", "predicts", "reference", "noise", "backend", "time_dtype", "program"}
_OF_ESTIMATE = {"nfe", "seed", "sample_index", "mask", "method", "control", "target_stderr", "max_nfe", "memory"}
_OF_ESTIMATE |= {"progress"}
# By network and path: whether the first call that could tell took it per sample, its first size, and the samples.
_TAKEN: weakref.WeakKeyDictionary[nn.Module, dict[str, tuple[bool, int, int]]] = weakref.WeakKeyDictionary()

# Paths whose tensors had a first size of one whenever there were more samples: so they are shared by a single one too.
_ALWAYS_ONE: weakref.WeakKeyDictionary[nn.Module, set[str]] = weakref.WeakKeyDictionary()


def shared(value: object) -> Marked:
    """Say that a condition is the same for every sample, whatever its shape: the network gets it as it is.

    Arguments:
        value: anything, also a dict, list or dataclass of conditions, or an object that fastscore cannot look into.

    Example:
        >>> density.estimate(x, edge_index=fs.shared(edge_index))  # (2, E), also where x has two samples
    """
    return Marked(value, False)


def per_sample(value: object) -> Marked:
    """Say that a condition has one entry a sample, shape (B, ...); a call with another first size raises ValueError.

    Arguments:
        value: a tensor, or a dict, list or dataclass of tensors.

    Raises:
        ValueError: for numbers or texts, alone or in a list, which have no samples; give them as a tensor.

    Example:
        >>> density.estimate(x, added={"mean": fs.per_sample(mean), "table": fs.shared(table)})
    """
    entries = value if isinstance(value, list | tuple) else [value]
    if value is not None and all(map(is_plain, entries)):
        raise ValueError(
            f"per_sample takes tensors, got {_described(value)} with numbers or texts alone; give torch.as_tensor(...)"
        )
    return Marked(value, True)


@dataclass(frozen=True)
class Conditions:
    """Keyword arguments of the network by path, told apart once: one entry a sample, or shared by the whole batch.

    Chunks keep that verdict, so a shared tensor that happens to have as many rows as a chunk has samples stays shared.
    Without a structure the paths are the keywords themselves.

    Attributes:
        unsaid: paths that the caller has not marked, neither as per sample nor as shared.
        samples: how many the call has.
        given: what these were made of (`tiled`): errors speak of that, since it is the caller's.
    """

    per_sample: dict[str, Tensor]
    shared: dict[str, object]
    structure: Structure | None = None
    unsaid: tuple[str, ...] = ()
    samples: int = 0
    given: Conditions | None = None

    @classmethod
    def of(cls, given: Mapping[str, object], batch: int, model: nn.Module | None = None) -> Conditions:
        """Tell the conditions of `batch` samples apart.

        What the caller marked is what it is said to be. Any other tensor has one entry a sample if its first size is
        the number of samples, and is shared else, as numbers and texts are. A single sample and a first size of one
        are the same in both ways for a network that broadcasts; what several samples shared in earlier calls is shared
        by a single one too.

        Arguments:
            model: the network, of which is remembered how every condition was taken in calls that it answered
                (`remember`): one that the sizes of two calls tell apart differently is refused.

        Raises:
            ValueError: for a tensor marked per sample of another first size, a list as long as the batch, a condition
                that is taken otherwise than before, an array of numpy, and an object that cannot be looked into.
        """
        leaves, structure = flatten(given)
        verdicts = {path: _is_per_sample(path, leaf, batch) for path, leaf in leaves.items()}
        if model is not None and batch == 1:
            verdicts |= dict.fromkeys(_ALWAYS_ONE.get(model, set()) & verdicts.keys(), False)
        own = {path: leaf.value for path, leaf in leaves.items() if verdicts[path]}
        rest = {path: leaf.value for path, leaf in leaves.items() if not verdicts[path]}
        for path, length in structure.lists.items():
            if length == batch > 1 and not any(name.startswith(f"{path}[") for name in own):
                raise ValueError(
                    f"condition {path!r} is a list or tuple of {length} entries and there are {batch} samples; give "
                    f"one tensor in fs.per_sample(...), or mark it with fs.shared(...)"
                )
        unsaid = [path for path, leaf in leaves.items() if leaf.per_sample is None]
        if model is not None:
            for path in unsaid:
                _compare_with_earlier(model, path, leaves[path].value, verdicts[path], batch)
        return cls(own, rest, structure, tuple(unsaid), batch)

    @property
    def guessed(self) -> tuple[str, ...]:
        """Paths of what was taken to belong to the samples by its size alone."""
        return tuple(path for path in self.unsaid if path in self.per_sample)

    def other_lengths(self) -> list[str]:
        """Return of every tensor that its length alone made shared, in words, the length that it would need else."""
        if self.given is not None:
            return self.given.other_lengths()
        guessed = {path: self.shared[path] for path in self.unsaid if path in self.shared}
        return [
            f"condition {path!r} has {len(value)} entries and counts as shared, with one a sample it has {self.samples}"
            for path, value in guessed.items()
            if has_shape(value) and value.ndim
        ]

    def remember(self, model: nn.Module, batch: int) -> None:
        """Keep how a network's conditions were taken, once it has answered a call with them."""
        for path in self.unsaid:
            own = path in self.per_sample
            value = self.per_sample[path] if own else self.shared[path]
            if not isinstance(value, Tensor) or not value.ndim or batch == 1:
                continue
            ones = _ALWAYS_ONE.setdefault(model, set())
            if len(value) > 1:
                _TAKEN.setdefault(model, {}).setdefault(path, (own, len(value), batch))
                ones.discard(path)
            elif path not in _TAKEN.get(model, {}):
                ones.add(path)

    def shapes(self) -> tuple:
        """Return of every tensor its path, dtype and shape, without the number of samples."""
        own = tuple((path, v.dtype, v.shape[1:]) for path, v in sorted(self.per_sample.items()))
        return own, tuple((k, v.dtype, v.shape) for k, v in sorted(self.shared.items()) if has_shape(v))

    def options(self) -> tuple:
        """Return what else than numbers of tensors a network is called with: paths, and plain values and kinds."""
        return tuple(sorted(self.per_sample)), tuple((path, _option(v)) for path, v in sorted(self.shared.items()))

    def select(self, samples: slice | Tensor) -> Conditions:
        """Return the conditions of some samples."""
        return replace(self, per_sample={k: v[samples] for k, v in self.per_sample.items()})

    def to(self, device: torch.device, source: torch.device) -> Conditions:
        """Return the conditions on a device: those of the samples, and what is shared and lies on `source` with them.

        What is shared and lies elsewhere, the network wants there.
        """
        own = {k: v.to(device) for k, v in self.per_sample.items()}
        rest = {k: v.to(device) if _lies_on(v, source) else v for k, v in self.shared.items()}
        return replace(self, per_sample=own, shared=rest)

    def copy(self) -> Conditions:
        """Return the same conditions in memory of their own."""
        own = {k: v.clone() for k, v in self.per_sample.items()}
        rest = {k: v.clone() if isinstance(v, Tensor) else v for k, v in self.shared.items()}
        return replace(self, per_sample=own, shared=rest)

    def copy_(self, other: Conditions) -> None:
        """Write other conditions of the same shapes into these."""
        for own, given in ((self.per_sample, other.per_sample), (self.shared, other.shared)):
            for name, value in own.items():
                if isinstance(value, Tensor):
                    value.copy_(given[name])

    def joined(self, other: Conditions) -> Conditions:
        """Return the conditions of these samples and of some others, which share the same."""
        return replace(self, per_sample={k: torch.cat([v, other.per_sample[k]]) for k, v in self.per_sample.items()})

    def repeated(self, rows: int) -> dict[str, object]:
        """Return the keyword arguments for `rows` consecutive rows of every sample."""
        return self.build(self.leaves(rows))

    def leaves(self, rows: int) -> dict[str, object]:
        """Return by path what `repeated` passes."""
        return {k: v.repeat_interleave(rows, 0) for k, v in self.per_sample.items()} | self.shared

    def tiled(self, copies: int) -> Conditions:
        """Return the conditions of one sample whose rows are all samples, `copies` times one after the other."""
        own = {k: torch.cat([v] * copies) for k, v in self.per_sample.items()}
        return Conditions({}, own | self.shared, self.structure, given=self)

    def marked(self) -> dict[str, object]:
        """Return the keyword arguments with every leaf marked as what it was found to be."""
        return self.build(
            {k: Marked(v, True) for k, v in self.per_sample.items()}
            | {k: Marked(v, False) for k, v in self.shared.items()}
        )

    def build(self, leaves: dict[str, object]) -> dict[str, object]:
        """Return keyword arguments of the network with these leaves by path."""
        return leaves if self.structure is None else self.structure.build(leaves)

    def __str__(self) -> str:
        if self.given is not None:
            return str(self.given)
        own = [f"{name} {tuple(v.shape[1:])} a sample" for name, v in self.per_sample.items()]
        tensors = {name: v for name, v in self.shared.items() if has_shape(v)}
        own += [f"{name} {tuple(v.shape)} shared by all" for name, v in tensors.items()]
        return ", ".join(
            own + [f"{name} = {v!r}" for name, v in self.shared.items() if isinstance(v, int | float | str)]
        )


def _is_per_sample(path: str, leaf: Leaf, batch: int) -> bool:
    """Return whether a leaf has one entry a sample; raise ValueError where it cannot be used as what it is."""
    value = leaf.value
    if leaf.per_sample is False or is_plain(value):
        return False
    if not isinstance(value, Tensor):
        remedy = "pass its tensors in a dict, each in fs.per_sample(...), or mark it with fs.shared(...)"
        if isinstance(value, np.ndarray):
            remedy = "give torch.as_tensor(...) of it, on the device of x"
        raise ValueError(f"condition {path!r} must be a tensor, a number or text, got {_described(value)}; {remedy}")
    if (kind := layout_of(value)) is not None:
        raise ValueError(
            f"condition {path!r} is a {kind} tensor, which cannot be told apart by samples; "
            f"{dense_form(kind)} for fs.per_sample(...), or mark it with fs.shared(...)"
        )
    own = value.ndim > 0 and value.shape[0] == batch
    if leaf.per_sample and not own:
        raise ValueError(
            f"condition {path!r} is marked per_sample and must have the shape ({batch}, ...) for {batch} samples, got "
            f"{tuple(value.shape)}; give one entry a sample, or mark it with fs.shared(...)"
        )
    return own


def _compare_with_earlier(model: nn.Module, path: str, value: object, own: bool, batch: int) -> None:
    """Refuse a tensor that its size makes another thing than at an earlier call."""
    if not isinstance(value, Tensor) or value.ndim == 0 or len(value) == 1 or batch == 1:
        return  # either way the same
    was, size, samples = _TAKEN.get(model, {}).get(path, (own, len(value), batch))
    if was != own:
        says = {True: "one entry a sample", False: "shared by all samples"}
        remedy = f"give {batch} entries, one a sample, or " if was else ""
        raise ValueError(
            f"condition {path!r} is ambiguous: {tuple(value.shape)} with {batch} samples looks {says[own]}, and size "
            f"{size} with {samples} samples looked {says[was]}; {remedy}mark it with fs.shared(...) or "
            "fs.per_sample(...)"
        )


def _option(value: object) -> Hashable:
    """Return a plain value, or a number in a tensor on the host; of anything else its type."""
    if isinstance(value, Tensor) and value.ndim == 0 and value.device.type == "cpu":
        return value.item()
    return value if is_plain(value) and isinstance(value, Hashable) else type(value)


def merged(cond: Mapping[str, object] | None, named: dict[str, object]) -> dict[str, object]:
    """Return the keyword arguments of the network from a dict and from those given by name.

    Raises:
        ValueError: if cond is no dict, or if a name is in both.
    """
    if cond is None:
        return named
    if not isinstance(cond, Mapping) or not all(isinstance(name, str) for name in cond):
        given = f"the names {list(cond)}" if isinstance(cond, Mapping) else _described(cond)
        raise ValueError(
            f"cond must be a dict of the network's keyword arguments, by names that are texts, got {given}; "
            "an argument of the network that is itself called cond goes as cond={'cond': ...}"
        )
    twice = sorted(cond.keys() & named.keys())
    if twice:
        raise ValueError(f"{', '.join(twice)} is given by name and in cond; give it once")
    return {**cond, **named}


def _refuse_misspelt(call: str, named: Iterable[str], options: set[str], owner: object) -> None:
    """Refuse a name that is or looks like an option, and that the network does not spell out among its own."""
    while hasattr(owner, "density"):
        owner = owner.density
    forward = getattr(getattr(owner, "model", None), "forward", None)
    wanted = inspect.signature(forward).parameters if forward is not None else {}
    for name in set(named) - set(wanted):
        if name in _OF_THE_DENSITY:
            raise ValueError(f"{name} is an argument of ScoreDensity(...), not of {call}")
        if name in _OF_ESTIMATE:
            raise ValueError(
                f"{name} is an option of ScoreDensity.estimate, and this {call} has none of its name; leave it out, or "
                f"give cond={{{name!r}: ...}} if the network takes it"
            )
        near = difflib.get_close_matches(name, options, 1, cutoff=0.75)
        near = near or [option for option in options if sorted(option) == sorted(name)]  # letters in another order
        if near:
            raise ValueError(
                f"{name} is no option of {call}, did you mean {near[0]}? The network gets it by cond={{{name!r}: ...}}"
            )


def takes_conditions(call: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Let a function take the network's keyword arguments by name, in the dict `cond`, or both; it gets the dict.

    What has the name of one of the function's own arguments can only go in `cond`: a tensor in its place is refused.
    """
    kinds, parameters = inspect.Parameter, inspect.signature(call).parameters
    own = {name for name, p in parameters.items() if p.kind is not kinds.VAR_KEYWORD}
    options = {name for name, p in parameters.items() if p.kind is kinds.KEYWORD_ONLY}
    options -= {"cond", "sample_index", "mask"}
    places = [name for name, p in parameters.items() if p.kind is kinds.POSITIONAL_OR_KEYWORD]

    @wraps(call)
    def with_conditions(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        if len(args) > len(places):
            raise TypeError(
                f"{call.__name__} takes {', '.join(places).removeprefix('self, ')} by position, got "
                f"{len(args) - len(places)} more; options and conditions of the network go by name"
            )
        for name in options & kwargs.keys():
            value = kwargs[name]
            if isinstance(value, Marked | Mapping) or (isinstance(value, Tensor | np.ndarray) and value.ndim):
                raise ValueError(
                    f"{name} is an argument of {call.__name__} itself, got {_described(value)}; a condition of the "
                    f"network with this name goes as cond={{{name!r}: ...}}"
                )
        named = {name: kwargs.pop(name) for name in list(kwargs) if name not in own}
        if named:
            _refuse_misspelt(call.__name__, named, own - {"self", "x", "data"}, args[0] if args else None)
        cond = merged(kwargs.get("cond"), named)
        try:
            return call(*args, **kwargs | {"cond": cond})
        except RecursionError:
            flatten(cond or {})  # names the condition that holds itself, if that is the reason
            raise

    return with_conditions


def has_shape(value: object) -> bool:
    """Return whether a value is a tensor of one shape, which a nested one does not have."""
    return isinstance(value, Tensor) and not value.is_nested


def _lies_on(value: object, device: torch.device) -> bool:
    return isinstance(value, Tensor) and value.device == device


def _described(value: object) -> str:
    if isinstance(value, Marked):
        return _described(value.value)
    if isinstance(value, Tensor | np.ndarray):
        kind = "a tensor" if isinstance(value, Tensor) else "an array of numpy"
        return f"{kind} of shape {tuple(value.shape)}"
    return f"a {type(value).__name__}"

"""Call a user's network: rows, time, conditions and dtype in; a checked (B, R, d) prediction out."""

from __future__ import annotations

import dis
import inspect
import weakref
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from ..support.host import layout_of
from ..support.untouched import layers_of
from ..support.warn import warn
from .conditions import Conditions
from .schedules import Schedule
from .taken_dtype import model_dtype
from .written import call_network

_WARNED: weakref.WeakSet[nn.Module] = weakref.WeakSet()
# What code raises that was called with tensors of other shapes than it expects, or without an argument.
_REFUSALS = (RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError, AssertionError)
_SWITCHES = frozenset((bool, str, float))
_OFFLOADED = {"_hf_hook", "_diffusers_hook"}  # of layers that accelerate or diffusers call through hooks of theirs
_NOISY_LAYERS = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._BatchNorm)


def model_device(model: nn.Module, default: torch.device | None = None) -> torch.device | None:
    """Return the device of the network's parameters, or the default if it has none or brings them to its data itself.

    Hooks of accelerate and diffusers that offload layers do that: the parameters wait on the CPU, a disk or "meta".
    """
    found = next((p.device for p in model.parameters()), default)
    if found != default and default is not None and any(_OFFLOADED & vars(layer).keys() for layer in layers_of(model)):
        return default
    return found


def warn_if_training(model: nn.Module) -> None:
    """Warn, once a network, where train mode makes every answer random: dropout or batch norm in train mode."""
    if model in _WARNED:
        return
    noisy = (layer for layer in layers_of(model) if isinstance(layer, _NOISY_LAYERS) and layer.training)
    layer = next((layer for layer in noisy if getattr(layer, "p", 1) > 0), None)
    if layer is not None:
        name = next(name for name, each in model.named_modules() if each is layer)
        _WARNED.add(model)
        warn(
            f"the network is in train mode and its layer {name!r} ({type(layer).__name__}) makes the density random; "
            "call model.eval() first"
        )


def predict(
    model: nn.Module,
    x_t: Tensor,
    time: Tensor,
    cond: Conditions,
    shape: tuple[int, ...],
    time_dtype: torch.dtype | None,
    call: Callable[..., object] | None = None,
) -> Tensor:
    """Return the network's prediction for every row, shape (B, R, d), in the dtype of x_t.

    The network is called once as `model(x_t, t, **cond)` with x_t (B R, *shape) in the dtype that it takes and t
    (B R,): int64 for a discrete table, the dtype of x_t else, or `time_dtype`. Conditions with one entry a sample are
    repeated along the rows. It may return a tensor, a tuple or list whose first entry counts, or an object with
    `.sample`. Where dimension 1 is twice as long as the data's, its second half (a learned variance) is cut off.

    Arguments:
        time: of the rows of every sample, shape (R,), or of each sample's own, (B, R).
        call: what is called in the network's place and answers as it does: the network as compiled.

    Raises:
        ValueError: if the network cannot be called so, with its reason and how every condition was taken, or as an
            adapter raises it; if what comes back does not have the rows and the shape of what was passed, or no graph
            where x_t has one.
    """
    batch, rows, d = x_t.shape
    time = cast_time(time, x_t.dtype, time_dtype)
    passed = x_t.reshape(batch * rows, *shape).to(model_dtype(model, x_t.dtype))
    times = time.repeat(batch) if time.ndim == 1 else time.flatten()
    try:
        output = call_network(model, call or model, passed, times, cond, rows)
    except torch.OutOfMemoryError:
        raise
    except _REFUSALS as error:
        if _is_own_sentence(error):
            raise
        raise ValueError(_refusal(error, model, passed, times, cond)) from error
    prediction = read_output(output, passed)
    if passed.requires_grad and torch.is_grad_enabled() and not prediction.requires_grad:
        _refuse_without_graph(model, passed, times, cond.copy().repeated(rows), prediction)
    return prediction.reshape(batch, rows, d).to(x_t.dtype)


def _is_own_sentence(error: Exception) -> bool:
    """Return whether a statement of fastscore's own raised an error, such as an adapter's: it says what is wrong."""
    innermost = error.__traceback__
    while innermost.tb_next is not None:
        innermost = innermost.tb_next
    frame = innermost.tb_frame
    raised = frame.f_code.co_code[innermost.tb_lasti] == dis.opmap["RAISE_VARARGS"]  # and not by what it calls
    return raised and frame.f_globals.get("__name__", "").partition(".")[0] == "fastscore"


def _refusal(error: Exception, model: nn.Module, passed: Tensor, time: Tensor, cond: Conditions) -> str:
    """Return what a network did not take, its own reason, and what may help."""
    reason = (str(error).strip().splitlines() or ["no message"])[0]
    if isinstance(error, TypeError) and _is_of_its_call(reason, model) and (about := _about_arguments(reason, cond)):
        return about
    remedies = cond.other_lengths()
    if str(cond):
        remedies.append("fs.per_sample or fs.shared says what of the conditions is taken wrongly")
    if time.dtype != passed.dtype and any(word in reason for word in ("dtype", "scalar type", "Input type")):
        remedies.append(f"time_dtype=torch.{str(passed.dtype).removeprefix('torch.')} if it joins time and data")
    if isinstance(error, ValueError | RuntimeError) and any(word in reason for word in ("element", "expand")):
        remedies.append("it has to take one time a row")
    taken = {len(layer.kernel_size) + 2 for layer in layers_of(model) if isinstance(layer, nn.modules.conv._ConvNd)}
    if passed.ndim + 1 in taken or f"expected {passed.ndim + 1}, got {passed.ndim}" in reason:
        remedies.append(
            "if x is a single sample, without a dimension for the batch, give x[None]; if it has none for channels, "
            "x[:, None]"
        )
    given = f" and conditions {cond}" if str(cond) else ""
    called = f"called with x_t {tuple(passed.shape)} {passed.dtype} and t {tuple(time.shape)} {time.dtype}"
    return (
        f"the network does not take data of shape {tuple(passed.shape[1:])} a sample{given}: "
        f"{type(error).__name__}: {reason} ({'; '.join([called, *remedies])})"
    )


def _is_of_its_call(reason: str, model: nn.Module) -> bool:
    """Return whether arguments are the network's own, no inner layer's, or missing where it passes on any it gets."""
    forward = inspect.unwrap(type(model).forward)
    any_name = bool(getattr(forward, "__code__", None) and forward.__code__.co_flags & inspect.CO_VARKEYWORDS)
    return reason.startswith(f"{getattr(forward, '__qualname__', '')}()") or ("missing" in reason and any_name)


def _about_arguments(reason: str, cond: Conditions) -> str | None:
    """Return what to say where a network got other arguments than it takes; None where that is not the reason."""
    called = f"model(x_t, t{''.join(f', {name}=...' for name in cond.build(cond.per_sample | cond.shared))})"
    if "missing" in reason and "required" in reason:
        return (
            f"the network wants more than it was given as {called}: {reason}; conditions go to the call by name, such "
            "as estimate(x, y=labels)"
        )
    if "unexpected keyword argument" in reason:
        return f"the network takes no such condition as it was given as {called}: {reason}; leave it out of the call"
    if "positional argument" in reason:
        return f"the network is called as {called}: {reason}; wrap it in a module whose forward takes these"
    return None


@torch.no_grad()
def _refuse_without_graph(model: nn.Module, passed: Tensor, time: Tensor, given: dict, prediction: Tensor) -> None:
    """Raise ValueError where a prediction depends on x_t and autograd does not know: its derivative would be zero."""
    if not torch.equal(read_output(model(0.5 * passed + 0.1, time, **given), passed), prediction):
        raise ValueError(
            "the network's answer depends on x_t and has no graph, so that its derivatives would count as zero: its "
            "forward runs under no_grad or inference_mode, detaches, or leaves torch; take that out, or use estimate, "
            "which needs no derivative"
        )


def cast_time(time: Tensor, dtype: torch.dtype, time_dtype: torch.dtype | None) -> Tensor:
    """Return times as the network gets them: in `time_dtype`, or int64 for a table and the dtype of x_t else."""
    return time.to(time_dtype or (dtype if time.is_floating_point() else time.dtype))


def refuse_cut_times(schedule: Schedule, time_dtype: torch.dtype | None) -> None:
    """Raise ValueError for a dtype that would cut real times to whole numbers, or a table's to other entries."""
    if time_dtype is None:
        return
    if not schedule.discrete:
        if not time_dtype.is_floating_point:
            raise ValueError(
                f"time_dtype must be floating point for {type(schedule).__name__}, whose times are real numbers, got "
                f"{time_dtype}; a network of whole timesteps goes with their table, such as DDPM.linear(1000)"
            )
        return
    last = int(schedule.time_range[1])
    if time_dtype.is_complex or time_dtype == torch.bool:
        most = 0
    else:
        most = int(2 / torch.finfo(time_dtype).eps) if time_dtype.is_floating_point else torch.iinfo(time_dtype).max
    if last > most:
        raise ValueError(
            f"time_dtype must hold every timestep of the table, 0 to {last}, got {time_dtype}, which counts to {most}; "
            "give torch.int64, torch.float32, or leave it out"
        )


def time_dtype_of(schedule: Schedule | None, dtype: torch.dtype, time_dtype: torch.dtype | None) -> torch.dtype:
    """Return what `cast_time` makes of a schedule's times, without any."""
    return time_dtype or (torch.int64 if schedule is not None and schedule.discrete else dtype)


def read_output(output: object, passed: Tensor) -> Tensor:
    """Return the prediction in what a network returned for x_t = `passed`, in the shape of x_t.

    Raises:
        ValueError: as in `predict`.
    """
    output = _tensor_of(output)
    if (
        not output.is_floating_point()
        or layout_of(output) not in (None, layout_of(passed))
        or output.device != passed.device
    ):
        raise ValueError(
            f"{_called(passed)} and returned {_kind(output)}; it must return floating-point numbers in a dense tensor "
            "on the device of x_t"
        )
    # Twice the channels and no other number: a token kept before the data, say, would shift what is read.
    twice = output.ndim == passed.ndim and output.shape[1] == 2 * passed.shape[1]
    prediction = output[:, : passed.shape[1]] if twice else output
    if prediction.shape != passed.shape:
        raise ValueError(
            f"{_called(passed)} and returned {tuple(output.shape)}; it must return the shape of x_t, or twice the "
            "channels in dimension 1 where it has learned variances; a module around it can cut or turn what else it "
            "returns"
        )
    return prediction


def _called(passed: Tensor) -> str:
    return f"the network was called with x_t {tuple(passed.shape)} and t ({len(passed)},)"


def _kind(output: Tensor) -> str:
    """Return what sort of tensor it is, as far as it is an unusual one."""
    layout = layout_of(output)
    return f"{output.dtype}{f' in layout {layout}' if layout else ''} on {output.device}"


def _tensor_of(output: object) -> Tensor:
    if isinstance(output, Tensor):
        return output
    if isinstance(output, tuple | list) and output and isinstance(output[0], Tensor):
        return output[0]
    if isinstance(getattr(output, "sample", None), Tensor):
        return output.sample
    kind = type(output).__name__
    if isinstance(output, Mapping):
        kind = f"{kind} with the entries {', '.join(map(repr, output))}"
    raise ValueError(
        f"the network must return a tensor, a tuple that starts with one, or an object with .sample; got {kind}; "
        "put a module around it that returns the tensor"
    )


def switches_of(model: nn.Module) -> int:
    """Return a number that changes where a flag, a text or a fraction of any layer does.

    With another `self_condition` or `cond_drop_prob` a network may answer in another way. Whole numbers are left out,
    since some count calls, and so are modes, which `warn_if_training` looks at.
    """
    switches = [
        (name, value)
        for layer in layers_of(model)
        for name, value in vars(layer).items()
        if type(value) in _SWITCHES and name != "training"
    ]
    return hash(tuple(switches))

"""Inference mode and the transforms of torch.func: what a public call makes of them before it computes.

A density is made of autograd: traces of the ODE, checkpoints, custom operators. Inside `torch.inference_mode`, where
the test and predict loops of trainers run, and under `torch.func` these do not work as they stand. A call therefore
leaves inference mode, and hands torch.func an operation of its own, whose derivative comes with its value. The tensors
of `torch.autograd.forward_ad` would lose their tangents on the way, in part and without a word; they are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._C._functorch import TransformType, get_interpreter_stack, is_functorch_wrapped_tensor
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves, tree_map

from .generic import Arguments, Result

if TYPE_CHECKING:
    from torch._functorch.autograd_function import VmapInfo


def ordinary(call: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Let a call compute outside of inference mode: nothing that it keeps is a tensor that autograd refuses.

    Gradients stay off where inference mode had them off; tensors made in inference mode are copied. A `torch.compile`
    around it leaves it as it is: what looks into a network does not run under a trace.

    Raises:
        ValueError: under a transform of torch.func, and for tensors of forward-mode AD, weights included.
    """

    @wraps(call)
    def outside(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        if torch._C._are_functorch_transforms_active():
            raise ValueError(
                f"{call.__name__} does not run under the transforms of torch.func, which take derivatives of log_prob "
                "and probability_flow_log_prob alone; call it outside of them"
            )
        gradients = torch.is_grad_enabled()  # leaving inference mode would turn them on
        with torch.inference_mode(False), torch.set_grad_enabled(gradients):
            _refuse_tangents(call.__name__, (args, kwargs))
            args, kwargs = for_autograd((args, kwargs))
            return call(*args, **kwargs)

    @wraps(call)
    def called(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        if torch.compiler.is_compiling():  # a step around it: its trace stops here, and goes on with the result
            return torch.compiler.disable(outside)(*args, **kwargs)
        return outside(*args, **kwargs)

    return called


def differentiable(call: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Let a call `(density, x, ...)`, one number a row of x, run in inference mode and under torch.func.

    The number of a row depends on that row alone, so one backward pass gives the derivative of them all. It is taken
    together with the value; torch.func.grad, vjp, jvp, jacrev, jacfwd and vmap build on it. The call returns the
    numbers, or a NamedTuple that starts with them and whose other fields are constants.

    Raises:
        ValueError: for second derivatives, and for derivatives in anything else than x.
    """
    plain = ordinary(call)

    @wraps(call)
    def called(density: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Result:
        if not torch._C._are_functorch_transforms_active():
            return plain(density, x, *args, **kwargs)
        orders = [level.key() for level in get_interpreter_stack()]
        order = sum(key in (TransformType.Grad, TransformType.Jvp) for key in orders)
        if order > 1:
            raise ValueError(
                f"{call.__name__} has first derivatives under torch.func, got a derivative of order {order}; take "
                "differences of the first ones"
            )
        others = [*density.parameters(), *density.buffers(), *tree_leaves((args, kwargs))]
        if any(isinstance(value, Tensor) and is_functorch_wrapped_tensor(value) for value in others):
            raise ValueError(
                f"under torch.func {call.__name__} is a function of x alone, got a transformed parameter or condition; "
                "use torch.autograd.grad or .backward() for those"
            )
        kind = None

        def parts(rows: Tensor) -> tuple[Tensor, ...]:
            nonlocal kind
            found = plain(density, rows, *args, **kwargs)
            kind = type(found)
            return (found,) if isinstance(found, Tensor) else tuple(found)

        value, _, *rest = _WithSlope.apply(x, parts, order > 0)
        return kind(value, *rest) if rest else value

    return called


def refuse_vmap(name: str) -> None:
    """Raise ValueError under torch.func.vmap, where no number can be looked at and a mean is one a batch."""
    if any(level.key() == TransformType.Vmap for level in get_interpreter_stack() or ()):
        raise ValueError(
            f"{name} does not run under torch.func.vmap; give all samples as one batch, reduction='none' for a loss of "
            "each, and loop over networks"
        )


class _WithSlope(torch.autograd.Function):
    """A number for each row of x with its gradient, both of which are known after the forward pass."""

    @staticmethod
    def forward(x: Tensor, parts: Callable, slope: bool) -> tuple[Tensor, ...]:
        if not slope:
            value, *rest = parts(x)
            return value, torch.zeros_like(x), *rest
        with torch.inference_mode(False), torch.enable_grad(), _saved_tensor_hooks():
            leaf = x.detach().clone().requires_grad_()
            value, *rest = parts(leaf)
            (gradient,) = torch.autograd.grad(value.sum(), leaf)
        return value.detach(), gradient, *rest

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Callable, bool], output: tuple[Tensor, ...]) -> None:
        _, gradient, *rest = output
        ctx.constants = 1 + len(rest)
        ctx.mark_non_differentiable(gradient, *rest)
        ctx.save_for_backward(gradient)
        ctx.save_for_forward(gradient)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor, *_: Tensor) -> tuple:
        (gradient,) = ctx.saved_tensors
        return cotangent.reshape(-1, *[1] * (gradient.ndim - 1)).to(gradient) * gradient, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> tuple:
        (gradient,) = ctx.saved_tensors
        return (tangent * gradient).flatten(1).sum(1), *[None] * ctx.constants

    @staticmethod
    def vmap(info: VmapInfo, in_dims: tuple[int, None, None], x: Tensor, parts: Callable, slope: bool) -> tuple:
        calls = [_WithSlope.apply(each, parts, slope) for each in x.movedim(in_dims[0], 0)]
        outputs = tuple(torch.stack(each) for each in zip(*calls))
        return outputs, (0,) * len(outputs)


@contextmanager
def _saved_tensor_hooks() -> Iterator[None]:
    """Allow checkpoints, which torch.func forbids as far as its own transforms go, for autograd inside."""
    forbidden = torch._C._autograd._saved_tensors_hooks_get_disabled_error_message()
    torch._C._autograd._saved_tensors_hooks_enable()
    try:
        yield
    finally:
        if forbidden is not None:
            torch._C._autograd._saved_tensors_hooks_disable(forbidden)


def refuse_inference_weights(model: nn.Module) -> None:
    """Raise ValueError if a network was made in inference mode, so that nothing can be differentiated through it."""
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        if value.is_inference():
            raise ValueError(
                f"the network's {name!r} was made in inference mode and takes part in no derivative; build and load "
                "the network outside of torch.inference_mode()"
            )


def transformed() -> bool:
    """Return whether derivatives are taken other than by backward passes: by torch.func, or in forward mode."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _refuse_tangents(name: str, given: object) -> None:
    """Raise ValueError if one of nested values, or of a network's tensors, has a tangent of forward-mode AD."""
    if forward_ad._current_level < 0:
        return
    values = tree_leaves(given)
    layers = [layer for value in values if isinstance(value, nn.Module) for layer in value.modules()]
    # A dual tensor in the place of a parameter is a plain attribute of its layer.
    held = [held for layer in layers for held in (vars(layer), layer._parameters, layer._buffers)]
    values = [*values, *(value for each in held for value in each.values())]
    if any(isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None for value in values):
        raise ValueError(
            f"{name} has no tangents of torch.autograd.forward_ad, and got a dual tensor; use torch.func.jvp around "
            "log_prob or probability_flow_log_prob for those in x, or .backward()"
        )


def for_autograd(values: object) -> object:
    """Return nested values with copies of the tensors made in inference mode, which autograd does not keep."""

    def of_inference(value: object) -> bool:
        return isinstance(value, Tensor) and value.is_inference()

    if torch.is_inference_mode_enabled() or not any(map(of_inference, _leaves(values))):
        return values
    return tree_map(lambda value: value.clone() if of_inference(value) else value, values)


def _leaves(values: object) -> Iterator[object]:
    """Yield what `tree_leaves` returns, in a third of the time where most values are plain, as a call's arguments."""
    kind = type(values)
    if kind is tuple or kind is list:
        for value in values:
            yield from _leaves(value)
    elif kind is dict:
        for value in values.values():
            yield from _leaves(value)
    elif values is None or isinstance(values, Tensor | nn.Module | int | float | str):
        yield values
    else:
        yield from tree_leaves(values)

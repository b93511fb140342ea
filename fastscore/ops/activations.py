"""The activations of row programs: name, function, the same in place, and its derivative. A new one is a line here.

An operation of PyTorch that bears the name and takes no further arguments is matched by it; one with arguments needs a
method of its own in `fastscore.program.matching`. Operations are those of a traced network, where `F.softsign` has
become abs, add and div; `fastscore.explain` names the first that is no instruction. Kernels decline
a program with a name that they do not know. Without its derivative the ODE takes its traces by autograd.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Activation(NamedTuple):
    """A function of every entry, the same in place, and its derivative, a function of what went in and what came out.

    The derivatives are the kernels of PyTorch's own backward passes, given a gradient of one, wherever there is such a
    kernel: one launch each.
    """

    compute: Callable[[Tensor], Tensor]
    in_place: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor, Tensor], Tensor] | None = None


ATEN = torch.ops.aten
SELU = 1.6732632423543772, 1.0507009873554805, 1.0  # alpha, scale and input scale, as `elu_backward` takes them


def _one(h: Tensor) -> Tensor:
    return h.new_ones(())


ACTIVATIONS: dict[str, Activation] = {
    "silu": Activation(F.silu, lambda h: F.silu(h, inplace=True), lambda h, y: ATEN.silu_backward(_one(h), h)),
    "gelu": Activation(  # oneDNN's, on a CPU, takes no number in the place of a tensor
        F.gelu, ATEN.gelu_, lambda h, y: ATEN.gelu_backward(torch.ones_like(h), h)
    ),
    "gelu_tanh": Activation(
        lambda h: F.gelu(h, approximate="tanh"),
        lambda h: ATEN.gelu_(h, approximate="tanh"),
        lambda h, y: ATEN.gelu_backward(_one(h), h, approximate="tanh"),
    ),
    "relu": Activation(torch.relu, torch.relu_, lambda h, y: ATEN.threshold_backward(_one(h), h, 0)),
    "mish": Activation(F.mish, lambda h: F.mish(h, inplace=True), lambda h, y: ATEN.mish_backward(_one(h), h)),
    "elu": Activation(
        F.elu, lambda h: F.elu(h, inplace=True), lambda h, y: ATEN.elu_backward(_one(h), 1, 1, 1, False, h)
    ),
    "selu": Activation(torch.selu, torch.selu_, lambda h, y: ATEN.elu_backward(_one(h), *SELU, False, h)),
    "tanh": Activation(torch.tanh, torch.tanh_, lambda h, y: ATEN.tanh_backward(_one(h), y)),
    "sigmoid": Activation(torch.sigmoid, torch.sigmoid_, lambda h, y: ATEN.sigmoid_backward(_one(h), y)),
    "softplus": Activation(
        F.softplus, lambda h: ATEN.softplus.out(h, out=h), lambda h, y: ATEN.softplus_backward(_one(h), h, 1, 20)
    ),
}

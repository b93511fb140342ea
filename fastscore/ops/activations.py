"""The activations of row programs: name, function, and the same in place. A new one is a line here.

An operation of PyTorch that bears the name and takes no further arguments is matched by it; one with arguments needs a
method of its own in `fastscore.program.matching`. Operations are those of a traced network, where `F.softsign` has
become abs, add and div; `fastscore.explain` names the first that is no instruction. Kernels decline
a program with a name that they do not know.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Activation(NamedTuple):
    """A function of every entry, and the same in place."""

    compute: Callable[[Tensor], Tensor]
    in_place: Callable[[Tensor], Tensor]


ACTIVATIONS: dict[str, Activation] = {
    "silu": Activation(F.silu, lambda h: F.silu(h, inplace=True)),
    "gelu": Activation(F.gelu, lambda h: torch.ops.aten.gelu_(h)),
    "gelu_tanh": Activation(
        lambda h: F.gelu(h, approximate="tanh"), lambda h: torch.ops.aten.gelu_(h, approximate="tanh")
    ),
    "relu": Activation(torch.relu, torch.relu_),
    "mish": Activation(F.mish, lambda h: F.mish(h, inplace=True)),
    "elu": Activation(F.elu, lambda h: F.elu(h, inplace=True)),
    "selu": Activation(torch.selu, torch.selu_),
    "tanh": Activation(torch.tanh, torch.tanh_),
    "sigmoid": Activation(torch.sigmoid, torch.sigmoid_),
    "softplus": Activation(F.softplus, lambda h: torch.ops.aten.softplus.out(h, out=h)),
}

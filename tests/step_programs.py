"""Random programs of steps, for the interpreter of steps and for the kernels that run them."""

import random

import torch
from fastscore.kernels.names import ACTIVATIONS


class Program:
    """A random program of steps with its weights (out, in) and tables, float64, for d dimensions and some rows.

    Its activations are those of the kernels, or others that are named.
    """

    def __init__(
        self, seed: int, d: int, rows: int, widths: tuple[int, ...], most: int = 4, activations=tuple(ACTIVATIONS)
    ):
        self.activations = activations
        self.draw, self.generator = random.Random(seed), torch.Generator().manual_seed(seed)
        self.d, self.rows, self.widths = d, rows, widths
        self.code, self.weights, self.tables = [], [], []
        skips = self.chance()
        self.code += [("save", 0)] * skips
        self.affines(d, 1)
        width = self.linear(d, self.draw.choice(self.widths))
        self.affines(width, 2)
        for _ in range(self.draw.randint(0, most)):
            width = self.residual(width) if self.chance() else self.dense(width)
        if ending := self.draw.randint(0, 2):
            self.activation() if ending == 1 else self.norm(width)
        self.linear(width, d)
        self.affines(d, 1)
        if skips:
            self.code.append(("add", 0, self.table(self.draw.choice((1, d)))))
            self.affines(d, 1)

    def chance(self) -> bool:
        return self.draw.random() < 0.5

    def randn(self, *shape):
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def table(self, width: int) -> int:
        self.tables.append(1 + 0.5 * self.randn(1, self.draw.choice((1, self.rows)), width))
        return len(self.tables) - 1

    def affines(self, width: int, most: int, scales: bool = True):
        for _ in range(self.draw.randint(0, most)):
            one = self.draw.choice((1, width)) if width == self.d else width  # a scale of data may be one number a row
            scale = self.table(one) if scales and self.chance() else -1
            shift = self.table(width) if scale < 0 or self.chance() else -1
            self.code.append(("affine", scale, shift))

    def linear(self, width: int, out: int) -> int:
        self.weights.append(self.randn(out, width) / width**0.5)
        self.code.append(("linear", len(self.weights) - 1))
        return out

    def activation(self):
        self.code.append(("act", self.draw.choice(self.activations)))

    def norm(self, width: int):
        self.code.append(("norm", 1e-5))
        self.affines(width, 2)

    def dense(self, width: int) -> int:
        self.activation()
        width = self.linear(width, self.draw.choice(self.widths))
        self.affines(width, 2)
        return width

    def residual(self, width: int) -> int:
        self.code.append(("save", 1))
        self.norm(width) if self.chance() else self.affines(width, 1)
        inner = self.linear(width, self.draw.choice(self.widths))
        self.affines(inner, 2, scales=False)
        self.activation()
        self.linear(inner, width)
        self.affines(width, 2)
        self.code.append(("add", 1, -1))
        return width

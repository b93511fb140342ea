r"""An orthonormal basis for images without a matrix of d x d numbers: colours, rows and columns, one after the other.

The pixels of a photograph are alike at every place, so cosines along rows and columns are close to the eigenvectors of
their covariance (Ahmed et al., 1974), and the eigenvectors of the colours' own C x C covariance to those across them.
As the three act on different dimensions, a sample is turned by d (C + H + W) multiply-adds.

References:
    Discrete Cosine Transform (Ahmed, Natarajan and Rao, 1974), https://doi.org/10.1109/T-C.1974.223784
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

MOST_CHANNELS = 64
FEWEST = 4  # rows or columns, which cosines tell apart from pixels

Factors = Sequence[Tensor]  # orthonormal: (C, C), (H, H), (W, W), their vectors in columns; an empty one is left out


def turn(x: Tensor, factors: Factors) -> Tensor:
    """Return the coordinates of samples, shape (..., d), in the basis that the factors make together."""
    return _along(x, [factor.mT if factor.numel() else factor for factor in factors])


def turn_back(x: Tensor, factors: Factors) -> Tensor:
    """Return the samples, shape (..., d), whose coordinates these are."""
    return _along(x, factors)


def flops(factors: Factors, d: int) -> int:
    """Return the operations of `turn` for one sample of d numbers, two for a multiply-add."""
    return 2 * d * sum(len(factor) for factor in factors)


def factors_of(data: Tensor, shape: tuple[int, ...]) -> list[Tensor] | None:
    """Return the basis for data, float64, (N, d), of samples of a shape (C, H, W) or (C, L); None for other shapes."""
    if len(shape) not in (2, 3) or min(shape[1:]) < FEWEST:
        return None
    empty = data.new_empty(0)
    own = [cosines(size).to(data.device) for size in shape[1:]]
    return [_of_channels(data, shape[0]) if shape[0] <= MOST_CHANNELS else empty, *own, *[empty] * (2 - len(own))]


@lru_cache(maxsize=16)
def cosines_of(shape: tuple[int, ...], device: torch.device) -> list[Tensor] | None:
    """Return cosines along channels, rows and columns for samples of a shape (C, H, W) or (C, L), float64; else None.

    Along three colours they are close to brightness and two differences of colours.
    """
    if len(shape) not in (2, 3) or min(shape[1:]) < FEWEST:
        return None
    empty = torch.empty(0, dtype=torch.float64, device="cpu")
    own = [cosines(size) if size <= MOST_CHANNELS else empty for size in shape[:1]] + [*map(cosines, shape[1:])]
    return [factor.to(device) for factor in [*own, *[empty] * (3 - len(own))]]


def are_basis(factors: Factors, d: int) -> bool:
    """Return whether the factors are orthonormal matrices that turn samples of d numbers."""
    if not all(isinstance(factor, Tensor) and (not factor.numel() or factor.ndim == 2) for factor in factors):
        return False
    given = [factor.to(torch.float64) for factor in factors if factor.numel()]
    square = all(factor.shape[0] == factor.shape[1] for factor in given)
    turned = math.prod(map(len, given))
    fits = d == turned if factors[0].numel() else d % turned == 0
    whole = (torch.eye(len(factor), device="cpu").to(factor) for factor in given)
    return square and fits and all(torch.allclose(f.mT @ f, one, atol=1e-5) for f, one in zip(given, whole))


def cosines(size: int) -> Tensor:
    r"""Return the orthonormal cosine basis :math:`c_k \cos(\pi (n + 1/2) k / N)` in columns k, float64, (N, N)."""
    n = torch.arange(size, dtype=torch.float64, device="cpu")
    basis = torch.cos(math.pi / size * (n[:, None] + 0.5) * n)
    return basis / basis.square().sum(0).sqrt()


def _of_channels(data: Tensor, channels: int) -> Tensor:
    """Return the eigenvectors of the channels' covariance over all places of all samples."""
    x = data.reshape(len(data), channels, -1)
    y = (x - x.mean((0, 2), keepdim=True)).transpose(0, 1).flatten(1)
    return torch.linalg.eigh(y @ y.mT / y.shape[1]).eigenvectors


def _along(x: Tensor, factors: Factors) -> Tensor:
    """Multiply each dimension of samples by its factor from the left; those that are left out are what remains."""
    sizes = [len(factor) or None for factor in factors]
    shape, before = x.shape, x.shape[:-1]
    channels, rows, columns = (size or 1 for size in sizes)
    if sizes[0] is None:
        channels = x.shape[-1] // (rows * columns)
    x = x.reshape(*before, channels, rows, columns)
    if sizes[2]:
        x = x @ factors[2].to(x.dtype).mT
    if sizes[1]:
        x = factors[1].to(x.dtype) @ x
    if sizes[0]:
        x = (factors[0].to(x.dtype) @ x.flatten(-2)).reshape(x.shape)
    return x.reshape(shape)

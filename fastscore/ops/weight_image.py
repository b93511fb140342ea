r"""The image of a network's weights that the CUDA kernels copy into shared memory as it is.

A weight (out, in) becomes tiles of at most 128 outputs x 64 inputs, in the order in which a product reads them: 64
inputs after 64, and of each all outputs. A tile has a line of 128 bytes an output, and its 16-byte chunk c lies at
:math:`c \oplus (\text{line} \bmod 8)`, the 128-byte swizzle of Hopper's matrix unit, which keeps ldmatrix free of bank
conflicts too.

Within groups of 16, inputs and outputs are reordered alike, so that the four columns that a thread owns in the register
layout of matrix products (2t, 2t + 1, 2t + 8, 2t + 9) are columns 4t .. 4t + 3 of the network.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

# Position in the register layout -> column of the network, within a group of 16.
COLUMN = tuple(4 * (p % 8 // 2) + p % 2 + 2 * (p // 8) for p in range(16))
TILE_OUT, TILE_IN, CHUNK = 128, 64, 8
Cut = Callable[[Tensor, int, int], Tensor]


def image(weights: list[Tensor], shapes: tuple[tuple[int, int], ...], stage: int, by_outputs: bool = False) -> Tensor:
    """Return the tiles of all weights in stages of that many bytes, bfloat16, flat.

    Arguments:
        weights: (out, in) each, in the order of their use.
        shapes: what each is padded to: outputs a multiple of 16, inputs of 16.
        by_outputs: the tiles of the same 128 outputs follow each other, as many in a stage as it holds; otherwise those
            of the same 64 inputs do, one in a stage.
    """
    sizes = tuple(tuple(w.shape) for w in weights)
    index, zero = _gather(sizes, shapes, stage // 2, _by_outputs if by_outputs else _by_inputs, weights[0].device)
    return torch.cat([*(w.reshape(-1).to(torch.bfloat16) for w in weights), zero])[index]


def rings(weights: list[Tensor], shapes: tuple[tuple[int, int], ...], stage: int) -> Tensor:
    """Return the image of two rings of stages of that many bytes, each with half of the outputs of every weight.

    Their stages take turns, one of the first ring and one of the second. Tiles have 32 inputs: lines of 64 bytes, whose
    16-byte chunk c lies at c xor (line / 2 mod 4), the 64-byte swizzle; a stage holds as many as it can.
    """
    return _by(_rings, weights, shapes, stage)


def rings_of_halves(weights: list[Tensor], shapes: tuple[tuple[int, int], ...], stage: int) -> Tensor:
    """Return the images of two blocks, one behind the other, which have half of the outputs of every weight each.

    Both have two rings as `rings` says, with tiles of 16 inputs: lines of 32 bytes, whose 16-byte chunk c lies at c xor
    (line / 4 mod 2), the 32-byte swizzle. Of a hidden layer's inputs those that are a block's own outputs come first.
    """
    return _by(_rings_of_halves, weights, shapes, stage)


def _by(cut: Cut, weights: list[Tensor], shapes: tuple[tuple[int, int], ...], stage: int) -> Tensor:
    sizes = tuple(tuple(w.shape) for w in weights)
    index, zero = _gather(sizes, shapes, stage // 2, cut, weights[0].device)
    return torch.cat([*(w.reshape(-1).to(torch.bfloat16) for w in weights), zero])[index]


@lru_cache(maxsize=16)
def _gather(sizes: tuple, shapes: tuple, stage: int, cut: Cut, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return, for every element of the image, where in the flat weights it lies, and the zero behind them.

    `cut` makes of a matrix of such indices, the elements of a stage and the zero the lines of an image, one for every
    block that has its own.
    """
    zero, start, parts = sum(o * i for o, i in sizes), 0, []
    for (out, in_), (padded_out, padded_in) in zip(sizes, shapes):
        n, k = _columns(padded_out)[:, None], _columns(padded_in)[None, :]
        where = torch.where((n < out) & (k < in_), start + n * in_ + k, zero)
        parts.append(cut(where, stage, zero))
        start += out * in_
    return torch.cat(parts, -1).reshape(-1).to(device), torch.zeros(1, dtype=torch.bfloat16, device=device)


def _columns(count: int) -> Tensor:
    """Return the network's column at every position of the register layout."""
    return (torch.arange(0, count, 16, device="cpu")[:, None] + torch.tensor(COLUMN, device="cpu")).reshape(-1)


def _tiles(where: Tensor, stage: int, by_outputs: bool, zero: int) -> Tensor:
    """Cut a matrix of indices into swizzled tiles, and fill stages of that many elements."""
    out, in_ = where.shape
    where = torch.nn.functional.pad(where, (0, -in_ % TILE_IN), value=zero)
    lines = min(out, TILE_OUT)
    tiles = where.reshape(out // lines, lines, -1, TILE_IN // CHUNK, CHUNK)
    tiles = tiles.permute((0, 2, 1, 3, 4) if by_outputs else (2, 0, 1, 3, 4))
    chunk = torch.arange(TILE_IN // CHUNK, device="cpu")[None, :] ^ (torch.arange(lines, device="cpu")[:, None] % 8)
    tiles = tiles.gather(3, chunk[None, None, :, :, None].expand_as(tiles)).reshape(-1, lines * TILE_IN)
    tiles = tiles.reshape(1, -1) if by_outputs else tiles
    return torch.nn.functional.pad(tiles, (0, -tiles.shape[1] % stage), value=zero).reshape(-1)


def _by_outputs(where: Tensor, stage: int, zero: int) -> Tensor:
    return _tiles(where, stage, True, zero)


def _by_inputs(where: Tensor, stage: int, zero: int) -> Tensor:
    return _tiles(where, stage, False, zero)


def _rings(where: Tensor, stage: int, zero: int) -> Tensor:
    """Cut a matrix of indices into swizzled tiles of 32 inputs, of half of the outputs and then of the others."""
    out, in_ = where.shape
    lines = out // 2
    tiles = where.reshape(2, lines, in_ // 32, 4, CHUNK).permute(0, 2, 1, 3, 4)
    chunk = torch.arange(4, device="cpu")[None, :] ^ (torch.arange(lines, device="cpu")[:, None] // 2 % 4)
    tiles = tiles.gather(3, chunk[None, None, :, :, None].expand_as(tiles))
    return tiles.reshape(2, -1, stage).transpose(0, 1).reshape(-1)


def _rings_of_halves(where: Tensor, stage: int, zero: int) -> Tensor:
    """Cut a matrix of indices into those of two blocks, with swizzled tiles of 16 inputs; a line each."""
    out, in_ = where.shape
    halves, lines = where.reshape(2, out // 2, in_), out // 4
    if in_ >= 1024:  # own inputs first
        halves = torch.stack([halves[0], halves[1].roll(in_ // 2, 1)])
    tiles = halves.reshape(2, 2, lines, in_ // 16, 2, CHUNK).transpose(2, 3)
    chunk = torch.arange(2, device="cpu")[None, :] ^ (torch.arange(lines, device="cpu")[:, None] // 4 % 2)
    tiles = tiles.gather(4, chunk[None, None, None, :, :, None].expand_as(tiles))
    return tiles.reshape(2, 2, -1, stage).transpose(1, 2).reshape(2, -1)

"""A user's autoencoder with a Gaussian encoder, as diffusers' AutoencoderKL is one: called in chunks, and checked.

What a pipeline hands its network are scaled latents, u = (z - shift) * factor, with the numbers of the autoencoder's
config: `scaling_factor` and `shift_factor`, or `latents_mean` and `latents_std` of each channel, with which
u = (z - latents_mean) * scaling_factor / latents_std. What a config does not have is 1 and 0.

References:
    https://github.com/huggingface/diffusers
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..process.taken_dtype import model_dtype
from ..support.host import as_tensor, kind_of
from ..support.memory import chunk_rows, peak_bytes
from ..support.untouched import uncompiled

_DETERMINISTIC = {"VQModel", "AutoencoderTiny", "AutoencoderDC"}


class Scaling(NamedTuple):
    """The map from an autoencoder's latents z to those of the network, u = (z - shift) * factor.

    Attributes:
        shift, factor: float64 on the CPU, each one number, or one a channel, shape (C,).
    """

    shift: Tensor
    factor: Tensor

    @classmethod
    def of(cls, autoencoder: nn.Module) -> Scaling:
        """Return the scaling of an autoencoder's config; none where it has no config.

        Raises:
            ValueError: if the factor is zero or not finite.
        """
        config = getattr(autoencoder, "config", None)
        names = "scaling_factor", "shift_factor", "latents_mean", "latents_std"
        own = [config.get(n) if isinstance(config, Mapping) else getattr(config, n, None) for n in names]
        # Away from whatever device is the default one: as lists and numbers these lie on the host.
        scale, shift, mean, std = (None if v is None else as_tensor(v).detach().cpu().double() for v in own)
        factor = torch.ones((), dtype=torch.float64, device="cpu") if scale is None else scale
        if mean is not None and std is not None:
            shift, factor = mean, factor / std
        shift = torch.zeros((), dtype=torch.float64, device="cpu") if shift is None else shift
        if not bool((torch.isfinite(factor) & (factor != 0)).all() and torch.isfinite(shift).all()):
            raise ValueError(
                "the autoencoder's config must scale latents by finite numbers other than zero, got "
                f"{dict(zip(names, own))}; give the config that the network was trained with"
            )
        return cls(shift, factor)

    def to_network(self, z: Tensor) -> Tensor:
        """Return u for z of shape (B, C, *shape), in its dtype."""
        shift, factor = (v.to(z).reshape(-1, *[1] * (z.ndim - 2)) if v.ndim else v.to(z) for v in self)
        return (z - shift) * factor

    def log_det(self, z: Tensor) -> float:
        """Return log|det du/dz| of one sample, nats."""
        return float(self.factor.abs().log().mean()) * z[0].numel()


def check_autoencoder(autoencoder: object) -> nn.Module:
    """Return an autoencoder whose encoder is, as far as its class tells, a Gaussian.

    Raises:
        TypeError: if it is no module with `encode` and `decode`.
        ValueError: for one of diffusers' others: deterministic, or with pipelines that scale in ways of their own.
    """
    if not isinstance(autoencoder, nn.Module) or not all(hasattr(autoencoder, n) for n in ("encode", "decode")):
        raise TypeError(
            f"autoencoder must be a torch.nn.Module with encode and decode such as diffusers' AutoencoderKL, got "
            f"{kind_of(autoencoder)}; give pipeline.vae"
        )
    inner = getattr(autoencoder, "_orig_mod", autoencoder)  # of torch.compile
    known = [c.__name__ for c in type(inner).__mro__ if c.__module__.startswith("diffusers.models.autoencoders")]
    if known and known[0] in _DETERMINISTIC:
        raise ValueError(_without_a_bound(known[0]))
    if known and "AutoencoderKL" not in known:
        raise ValueError(
            f"autoencoder must be an AutoencoderKL, whose pipelines scale latents by its config alone, got {known[0]}; "
            "put a module around it with encode(x).latent_dist and decode(z).sample of the network's own latents"
        )
    return autoencoder


def _without_a_bound(kind: str) -> str:
    return (
        f"the bound of log p(x) needs an encoder with a density, encode(x).latent_dist with mean and std > 0 as "
        f"AutoencoderKL has, got {kind}, which gives each x one latent, so that log q(z|x) is infinite; "
        "take the density of the latents alone"
    )


def encode(autoencoder: nn.Module, x: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of q(z | x), in float32, or float64 for such x: shape (B, *latent) each.

    Arguments:
        index: number of each sample, for messages.

    Raises:
        ValueError: if the encoder is no Gaussian with a density, or returns NaN or inf.
    """
    output = _called(autoencoder.encode, x.to(model_dtype(autoencoder, x.dtype)))
    found = getattr(output, "latent_dist", None)
    mean, std = getattr(found, "mean", None), getattr(found, "std", getattr(found, "stddev", None))
    if not isinstance(mean, Tensor) or not isinstance(std, Tensor) or mean.ndim < 2 or mean.shape != std.shape:
        raise ValueError(_without_a_bound(f"{type(autoencoder).__name__} with {type(found or output).__name__}"))
    if len(mean) != len(x):
        raise ValueError(f"encode must return one Gaussian for each sample, got {len(mean)} for {len(x)} samples")
    mean, std = mean.to(_sums(x)), std.to(_sums(x))
    _refuse_not_finite("encode", mean + std, index)
    if not bool((std > 0).all()):
        raise ValueError(_without_a_bound("standard deviations of zero"))
    return mean, std


def _called(call: Callable[[Tensor], object], given: Tensor) -> object:
    """Return what an autoencoder makes of a batch; raise ValueError, with its reason, where it does not take it."""
    try:
        return call(given)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, ValueError, IndexError, AssertionError) as error:
        reason = (str(error).strip().splitlines() or ["no message"])[0]
        raise ValueError(
            f"the autoencoder's {getattr(call, '__name__', 'call')} does not take samples of shape "
            f"{tuple(given.shape[1:])} in {given.dtype}: {type(error).__name__}: {reason}; give data (B, C, H, W) with "
            "the channels and sides that it was made for, x[None] for a single one"
        ) from error


def decode(autoencoder: nn.Module, z: Tensor, x: Tensor, index: Tensor) -> Tensor:
    """Return the squared distance of x from what z is decoded to, float64, shape (B,).

    Raises:
        ValueError: if the decoder returns another shape than that of x, or NaN or inf.
    """
    output = _called(autoencoder.decode, z.to(model_dtype(autoencoder, z.dtype)))
    found = output if isinstance(output, Tensor) else getattr(output, "sample", None)
    if not isinstance(found, Tensor) or found.shape != x.shape:
        got = tuple(found.shape) if isinstance(found, Tensor) else type(output).__name__
        raise ValueError(
            f"decode must return an object with .sample of the shape of x, {tuple(x.shape)}, got {got}; give images "
            "whose sides the autoencoder's factor of downsampling divides"
        )
    _refuse_not_finite("decode", found, index)
    return (x.to(torch.float64) - found).square().flatten(1).sum(1)


class Rows:
    """How many samples an autoencoder takes at once, by what one sample's call was seen to take in memory."""

    def __init__(self) -> None:
        self._bytes: dict[tuple, int] = {}

    def at_once(self, name: str, call: Callable[..., object], one: Sequence[Tensor], memory: int | str | None) -> int:
        """Return how many samples fit into the memory at once.

        Arguments:
            name: of the call, which is measured once for each shape of its arguments.
            one: its arguments with a single sample, on the device.

        Raises:
            ValueError: as `fastscore.support.memory.chunk_rows`.
        """
        x = one[0]
        key = name, x.shape, x.dtype, x.device
        if key not in self._bytes:
            with uncompiled():
                self._bytes[key] = peak_bytes(lambda: call(*one))
        return chunk_rows(self._bytes[key], memory, x.device)

    def in_chunks(
        self,
        name: str,
        call: Callable[..., tuple[Tensor, Tensor]],
        given: Sequence[Tensor],
        memory: int | str | None,
        device: torch.device,
    ) -> tuple[Tensor, Tensor]:
        """Return the two results of a call, chunk by chunk, where its first argument is; it computes on the device."""
        size = self.at_once(name, call, [given[0][:1].to(device), *(each[:1] for each in given[1:])], memory)
        parts = [call(x.to(device), *more) for x, *more in zip(*(each.split(size) for each in given))]
        first, second = (torch.cat([each.to(given[0].device) for each in pair]) for pair in zip(*parts))
        return first, second


def _sums(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _refuse_not_finite(call: str, found: Tensor, index: Tensor) -> None:
    bad = (~torch.isfinite(found)).flatten(1).any(1).nonzero()
    if len(bad):
        raise ValueError(
            f"{call} returned NaN or inf for {len(bad)} of {len(found)} samples, first for sample "
            f"{int(index[int(bad[0])])}; run the autoencoder in float32 (autoencoder.float()) where float16 overflows"
        )

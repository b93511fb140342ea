"""What a network answers, in a few numbers: they tell it from another one with the same weights.

A run that goes on where it stopped needs the network of then. Weights say most of it; an attribute, a global or the
code itself may have changed and they may not. So the answers for one sample at three noise levels, projected on four
random directions, stand in the manifest of a run, and are compared as closely as arithmetic allows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..estimator.network_density import network_of
from ..estimator.protocol import Density
from ..process.network import predict
from ..process.taken_dtype import model_dtype
from ..support.untouched import undisturbed

LEVELS, DIRECTIONS = 3, 4
CLOSE, CLOSE_IN_HALF = 1e-3, 0.1  # of the largest number, between machines, numbers of threads and batches


def answers(density: Density, x: Tensor, cond: dict[str, object], mask: Tensor | None) -> dict | None:
    """Return what the network answers for one sample of the user's data; None where it is random.

    Every noise level comes twice in one batch, which shows whether it is.

    Raises:
        ValueError: with its reason, if the network cannot take such data.
    """
    z, _ = density.to_network(x, mask)
    mask, cond = density.network_arguments(x, mask, cond)
    density = density.core
    samples, network = density.check(z, None, cond, mask=mask), network_of(density)
    levels = torch.linspace(*network.log_snr_range, LEVELS, dtype=torch.float64, device="cpu").repeat(2)
    time = network.schedule.time(levels).to(x.device)
    rows = samples.x[:, None].expand(1, len(levels), -1)
    try:
        with torch.no_grad(), undisturbed(network.model):
            found = predict(network.model, rows, time, samples.conds[0], samples.shape, network.time_dtype)[0]
    except ValueError:
        raise  # says so itself
    except Exception as error:
        reason = (str(error).strip().splitlines() or ["no message"])[0]
        raise ValueError(
            f"the network does not take data of shape {samples.shape} a sample: {type(error).__name__}: {reason}"
        ) from error
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(found.shape[1], DIRECTIONS, generator=generator, dtype=torch.float64, device="cpu")
    numbers = (found.double().cpu() @ direction).reshape(2, -1).tolist()
    half = model_dtype(network.model, found.dtype).itemsize < 4
    once, again = ({"numbers": each, "close": CLOSE_IN_HALF if half else CLOSE} for each in numbers)
    return once if alike(once, again) else None


def alike(one: object, other: object) -> bool:
    """Return whether two entries of a manifest say the same; answers need not be equal to the last digit."""
    if not (isinstance(one, dict) and isinstance(other, dict) and {"numbers", "close"} <= one.keys() & other.keys()):
        return one == other
    a, b = (torch.tensor(each["numbers"], dtype=torch.float64, device="cpu") for each in (one, other))
    return a.shape == b.shape and bool((a - b).abs().max() <= one["close"] * torch.maximum(a.abs(), b.abs()).max())


def in_words(entry: object) -> str:
    """Return an entry of a manifest for a message."""
    numbers = entry.get("numbers") if isinstance(entry, dict) else None
    return f"{numbers[0]:.4g} ..." if numbers else str(entry)

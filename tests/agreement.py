"""What a kernel is held to: the torch backend in float64, with the noise that float32's uniforms give."""

from __future__ import annotations

from torch import Tensor

# Sums of d terms in float32, each with a rounding of 6e-8 and errors of eps of 5e-7: 1e-5 of the mean is far above.
TOLERANCE = 1e-5


def close(found: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> bool:
    """Whether every element agrees relative to itself plus the mean size, which is what sums cancel from."""
    expected = expected.double()
    scale = expected.abs() + expected.abs().mean()
    return bool(((found.double() - expected).abs() <= tolerance * scale).all())


def exact_normal(w: Tensor) -> Tensor:
    """Return the noise of words in float64, from float32's uniforms: rounding of the words is no error of a kernel."""
    top = 1 - 2.0**-24
    return (w.float() * 2.0**-31 + 2.0**-32).clamp(-top, top).double().erfinv() * 2**0.5

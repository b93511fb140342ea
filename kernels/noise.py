r"""The noise of `fastscore.ops.noise` inside a kernel: two integer operations and one polynomial an element.

.. math:: w = (P \oplus Q) M \bmod 2^{32}, \qquad u = 2^{-31} w + 2^{-32}, \qquad
    \epsilon = \sqrt2\,\mathrm{erf}^{-1}(u)

The words are those of the torch definition, bit for bit, and so is u: its product is exact and its sum rounds once.
The inverse error function is the polynomial of `inverse_normal.py`.
"""

import triton
import triton.language as tl

from . import inverse_normal

_COEFFICIENTS = tl.constexpr(inverse_normal.COEFFICIENTS)
_DEGREE = tl.constexpr(len(inverse_normal.COEFFICIENTS) - 1)
_OFFSET, _CENTRE = tl.constexpr(inverse_normal.OFFSET), tl.constexpr(inverse_normal.CENTRE)
_LARGEST = tl.constexpr(inverse_normal.LARGEST)
_HARDWARE = tl.constexpr(not triton.knobs.runtime.interpret)  # the interpreter knows no assembly


@triton.jit
def _log2(x):
    """Return log2(x) off by 2^-22, one instruction; tl.log2, exact to a unit in the last place, takes twenty."""
    if _HARDWARE:
        return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    else:
        return tl.log2(x)


@triton.jit
def _sqrt(x):
    if _HARDWARE:
        return tl.inline_asm_elementwise("sqrt.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    else:
        return tl.sqrt(x)


@triton.jit
def _one_minus_square(v):
    if _HARDWARE:
        return tl.fma(-v, v, 1.0)
    else:
        return (1.0 - v) * (1.0 + v)  # the interpreter's fma rounds twice before Triton 3.9


@triton.jit
def normal(w):
    """Map int32 words to standard normals, float32; |eps| <= 5.42."""
    u = tl.fma(w.to(tl.float32), 4.656612873077393e-10, 2.3283064365386963e-10)
    v = tl.minimum(tl.abs(u), _LARGEST)
    s = _sqrt(-_log2(_one_minus_square(v)) + _OFFSET) - _CENTRE
    p = tl.fma(s, _COEFFICIENTS[_DEGREE], _COEFFICIENTS[_DEGREE - 1])
    for k in tl.static_range(2, _DEGREE + 1):
        p = tl.fma(p, s, _COEFFICIENTS[_DEGREE - k])
    return p * u


@triton.jit
def load_normals(keys_ptr, points_ptr, i_b, i_r, i_d, mask, D):
    """Return eps of some samples (or rows) and dimensions, shape of i_b + i_r + i_d; masked elements are no noise.

    keys (B, 2, D) and points (R, D) are int32; i_b and i_r are int64 indices that broadcast against i_d.
    """
    p = tl.load(points_ptr + i_r * D + i_d, mask=mask, other=0)
    q = tl.load(keys_ptr + i_b * (2 * D) + i_d, mask=mask, other=0)
    m = tl.load(keys_ptr + i_b * (2 * D) + D + i_d, mask=mask, other=0)
    return normal((p ^ q) * m)  # modulo 2^32

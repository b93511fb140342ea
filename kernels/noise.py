r"""The noise of `fastscore.ops.noise` inside a kernel: two integer operations and one polynomial an element.

.. math:: w = (P \oplus Q) M \bmod 2^{32}, \qquad u = 2^{-31} w + 2^{-32}, \qquad
    \epsilon = \sqrt2\,\mathrm{erf}^{-1}(u)

The words are those of the torch definition, bit for bit, and so is u: its product is exact and its sum rounds once.
The inverse error function is u times a polynomial in t = -log2(1 - u^2), as Giles does it, with coefficients fitted
here for :math:`\sqrt2\,\mathrm{erf}^{-1}(u) / u`: relative errors 9e-8 up to t = 7.2 (99.7 % of all elements), 3.3e-7
beyond.

References:
    Approximating the erfinv Function (Giles, 2012), https://doi.org/10.1016/B978-0-12-385963-1.00010-1
"""

import triton
import triton.language as tl


@triton.jit
def normal(w):
    """Map int32 words to standard normals, float32; |eps| <= 5.42."""
    u = w.to(tl.float32) * 4.656612873077393e-10 + 2.3283064365386963e-10
    u = tl.minimum(tl.maximum(u, -0.9999999403953552), 0.9999999403953552)
    t = -tl.log2((1.0 - u) * (1.0 + u))
    centre = t < 7.2135
    s = tl.where(centre, t - 3.60675, tl.sqrt(t) - 3.766737914409238)
    p = tl.where(centre, 2.1502259972550064e-09, 0.0)
    p = p * s + tl.where(centre, 3.7368700134265964e-08, 0.0)
    p = p * s + tl.where(centre, -5.53476070308534e-07, 0.0004819671739824116)
    p = p * s + tl.where(centre, -9.949335435521789e-07, -0.0015382996061816812)
    p = p * s + tl.where(centre, 7.136264321161434e-05, 0.002566224429756403)
    p = p * s + tl.where(centre, -0.0005904525751248002, -0.0041214944794774055)
    p = p * s + tl.where(centre, -0.002838620450347662, 0.006720526143908501)
    p = p * s + tl.where(centre, 0.24177150428295135, 1.1819604635238647)
    p = p * s + tl.where(centre, 2.123316526412964, 4.199333667755127)
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

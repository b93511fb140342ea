r"""The inverse distribution function of a standard normal as kernels compute it: one polynomial, no branch, no select.

.. math:: \Phi^{-1}\big(\tfrac{1 + u}{2}\big) = \sqrt2\,\mathrm{erf}^{-1}(u) \approx u \sum_k c_k s^k, \qquad
    s = \sqrt{3 - \log_2(1 - v^2)} - 3.42, \quad v = \min(|u|, 1 - 2^{-24})

The root makes one polynomial do where Giles needs two: with the logarithm under a root the function is nearly straight,
out to the last word at 5.42. Degree 12, fitted to the least largest relative error: 2.4e-7, and 4.8e-7 with float32's
roundings; the second moment of all words is off by 6e-8. Kernels of Triton take these numbers from here;
csrc/common/noise.cuh repeats them, and tests compare.

References:
    Approximating the erfinv Function (Giles, 2012), https://doi.org/10.1016/B978-0-12-385963-1.00010-1
"""

OFFSET, CENTRE = 3.0, 3.42
LARGEST = 0.9999999403953552  # 1 - 2^-24, float32's last number below 1
COEFFICIENTS = (
    3.2413618564605713,
    1.336690902709961,
    -0.015202531591057777,
    -0.022754047065973282,
    0.022167488932609558,
    -0.009487875737249851,
    -0.0002266207739012316,
    0.002649214817211032,
    -0.0009374394430778921,
    -0.00032979456591419876,
    0.0002181880408897996,
    1.7053394913091324e-05,
    -1.8050934158964083e-05,
)

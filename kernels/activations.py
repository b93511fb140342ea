r"""Activations, in float32. FAST takes the hardware's tanh, off by up to 2^-11 (4.9e-4) of itself, a quarter of what
rounding to a bf16 operand loses.

.. math:: \mathrm{silu}(x) = h + h \tanh h, \quad h = x/2, \qquad
    \mathrm{mish}(x) = x\,\frac{n}{n+2}, \quad n = e^x (e^x + 2)
"""

import triton
import triton.language as tl

# Numbers of `names.ACTIVATIONS`, because Triton before 3.7 takes no text inside a constexpr tuple.
SILU, GELU, GELU_TANH, RELU, MISH = (tl.constexpr(i) for i in range(5))
ELU, SELU, TANH, SIGMOID, SOFTPLUS = (tl.constexpr(i) for i in range(5, 10))


@triton.jit
def _tanh(x, FAST: tl.constexpr):
    if FAST:
        return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        return 2.0 / (1.0 + tl.exp(-2.0 * x)) - 1.0


@triton.jit
def activate(x, KIND: tl.constexpr, FAST: tl.constexpr):
    """Apply activation number KIND, float32."""
    if KIND == SILU:
        if FAST:
            h = 0.5 * x
            return h * _tanh(h, FAST) + h
        else:
            return x / (1.0 + tl.exp(-x))
    elif KIND == GELU:
        return 0.5 * x * (1.0 + tl.erf(0.7071067811865476 * x))
    elif KIND == GELU_TANH:
        u = x * (0.7978845608028654 + 0.035677408136300125 * x * x)
        if FAST:
            h = 0.5 * x
            return h * _tanh(u, FAST) + h
        else:
            return x / (1.0 + tl.exp(-2.0 * u))
    elif KIND == RELU:
        return tl.where(x < 0.0, 0.0, x)  # tl.maximum would hide NaN
    elif KIND == MISH:
        e = tl.exp(tl.minimum(x, 20.0))  # beyond, mish(x) = x in float32
        n = e * (e + 2.0)
        return x * (n / (n + 2.0))
    elif KIND == ELU:
        return tl.where(x > 0.0, x, tl.exp(tl.where(x > 0.0, 0.0, x)) - 1.0)
    elif KIND == SELU:
        below = tl.exp(tl.where(x > 0.0, 0.0, x)) - 1.0
        return 1.0507009873554805 * tl.where(x > 0.0, x, 1.6732632423543772 * below)
    elif KIND == TANH:
        return _tanh(x, FAST)
    elif KIND == SIGMOID:
        return 1.0 / (1.0 + tl.exp(-x))
    else:
        tl.static_assert(KIND == SOFTPLUS, "unknown activation")
        return tl.maximum(x, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(x)))


@triton.jit
def derivative(x, KIND: tl.constexpr, FAST: tl.constexpr):
    """Return the derivative of activation number KIND at x, float32."""
    if KIND == SILU:
        s = 1.0 / (1.0 + tl.exp(-x))
        return s * (1.0 + x * (1.0 - s))
    elif KIND == GELU:
        density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        return 0.5 * (1.0 + tl.erf(0.7071067811865476 * x)) + x * density
    elif KIND == GELU_TANH:
        u = x * (0.7978845608028654 + 0.035677408136300125 * x * x)
        s = 1.0 / (1.0 + tl.exp(-2.0 * u))
        return s + 2.0 * x * s * (1.0 - s) * (0.7978845608028654 + 0.10703222440890037 * x * x)
    elif KIND == RELU:
        return tl.where(x > 0.0, 1.0, 0.0)
    elif KIND == MISH:
        e = tl.exp(tl.minimum(x, 20.0))
        n = e * (e + 2.0)
        t = n / (n + 2.0)  # tanh(softplus(x))
        return t + x * (1.0 - t * t) * (e / (1.0 + e))
    elif KIND == ELU:
        return tl.where(x > 0.0, 1.0, tl.exp(tl.minimum(x, 0.0)))
    elif KIND == SELU:
        return 1.0507009873554805 * tl.where(x > 0.0, 1.0, 1.6732632423543772 * tl.exp(tl.minimum(x, 0.0)))
    elif KIND == TANH:
        t = _tanh(x, FAST)
        return 1.0 - t * t
    elif KIND == SIGMOID:
        s = 1.0 / (1.0 + tl.exp(-x))
        return s * (1.0 - s)
    else:
        tl.static_assert(KIND == SOFTPLUS, "unknown activation")
        return 1.0 / (1.0 + tl.exp(-x))

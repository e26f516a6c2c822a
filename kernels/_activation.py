"""The activations that kernels fuse, by number: 0 none, 1 relu, 2 tanh, 3 sigmoid."""

import triton
import triton.language as tl
from triton.language.extra import libdevice


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """act(x); NaN stays NaN."""
    if ACTIVATION == 1:
        x = tl.where(x < 0, 0.0, x)
    elif ACTIVATION == 2:
        x = libdevice.tanh(x)
    elif ACTIVATION == 3:
        x = 1.0 / (1.0 + tl.exp(-x))
    return x


@triton.jit
def activation_gradient(grad, output, ACTIVATION: tl.constexpr):
    """grad * act'(x), from y = act(x)."""
    if ACTIVATION == 1:
        grad = tl.where(output <= 0, 0.0, grad)
    elif ACTIVATION == 2:
        grad = grad * (1.0 - output * output)
    elif ACTIVATION == 3:
        grad = grad * (1.0 - output) * output
    return grad

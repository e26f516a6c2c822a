"""How much work an op is: floating-point operations, and the bytes that must cross the memory bus.

A floor is max(bytes / bandwidth, flops / peak): no implementation of the same arithmetic runs faster. Counted is what
must be done, not what some kernel does: each input read once, each output written once; multiply-adds with padding
are left out; a training step is a forward call and a backward call, so what the backward reads again is counted again.
Algorithms that save multiplications (Winograd, FFT) could pass below.
"""

from __future__ import annotations

from dataclasses import dataclass

from dlkern.bench.shapes import Shape

__all__ = ["GATES", "Work", "count", "covered"]

GATES = {"rnn_tanh": 1, "gru": 3, "lstm": 4}


@dataclass(frozen=True)
class Work:
    """Operations and bytes of one call; `note` says what was assumed."""

    flops: int
    bytes: int
    note: str = ""


def covered(size: int, kernel: int, stride: int, padding: int, dilation: int, out: int) -> int:
    """Pairs (output position, filter tap) along one axis whose input element is inside the image."""
    return sum(sum(0 <= p * stride - padding + r * dilation < size for r in range(kernel)) for p in range(out))


def count(shape: Shape, itemsize: int, direction: str, cache: int = 0) -> Work:
    """Work of one call.

    Args:
        shape: the problem.
        itemsize: bytes an element.
        direction: "forward", or "training" (forward, then the gradients of the parameters and, where
            shape.input_grad says so, of the input).
        cache: bytes of the last cache level. A batch norm whose input stays there reads it from memory once, not
            twice: its floor is 2S or 3S, and the note says which.
    """
    training = direction == "training"
    op = shape.op
    x = shape.input_numel * itemsize
    y = shape.output_numel * itemsize
    if op == "conv2d":
        taps_h = covered(
            shape.height, shape.kernel[0], shape.stride[0], shape.padding[0], shape.dilation[0], shape.out_height
        )
        taps_w = covered(
            shape.width, shape.kernel[1], shape.stride[1], shape.padding[1], shape.dilation[1], shape.out_width
        )
        flops = 2 * shape.batch * shape.out_channels * (shape.channels // shape.groups) * taps_h * taps_w
        return _matrix_product(flops, x, y, shape.weight_numel * itemsize, shape.input_grad, training)
    if op in ("linear", "linear_relu"):
        flops = 2 * shape.batch * shape.channels * shape.out_channels
        return _matrix_product(flops, x, y, shape.weight_numel * itemsize, shape.input_grad, training)
    if op == "max_pool2d":
        offsets = shape.output_numel if training else 0  # one byte an output tells the winner
        return Work(0, x + y + (2 * offsets + y + x if training else 0), "indices as 1 byte" if training else "")
    if op in ("avg_pool2d", "adaptive_avg_pool2d"):
        return Work(0, (x + y) * (2 if training else 1))
    if op == "batch_norm_eval":
        return Work(0, 4 * x if training else 2 * x, "forward 2S")
    if op in ("batch_norm", "batch_norm_relu", "batch_norm_add_relu"):
        on_chip = x <= cache
        residual = x if op == "batch_norm_add_relu" else 0
        forward = (2 if on_chip else 3) * x + residual
        backward = (3 if on_chip else 5) * x + residual
        return Work(0, forward + (backward if training else 0), f"forward {2 if on_chip else 3}S")
    if op == "dropout":
        return Work(0, 4 * x if training else 2 * x)
    if op == "embedding":  # y in rows of the table and out; back, y and a table of gradients
        table = shape.channels * shape.out_channels * itemsize
        return Work(0, 8 * shape.batch + 2 * y + (8 * shape.batch + y + table if training else 0))
    if op == "cross_entropy":
        return Work(0, 3 * x if training else x)
    if op == "layer_norm":
        return Work(0, 5 * x if training else 2 * x)
    if shape.family == "rnn":
        w = GATES[op.removesuffix("_packed")] * shape.out_channels * (shape.channels + shape.out_channels)
        products = _matrix_product(2 * sum(shape.batch_sizes) * w, x, y, w * itemsize, shape.input_grad, training)
        return Work(products.flops, products.bytes, "weights read once")
    if shape.family == "attention":
        return _attention(shape, x, training)
    raise ValueError(f"count: no op {op!r}")


def _attention(shape: Shape, x: int, training: bool) -> Work:
    # Q K^T and P V; back, dP = dO V^T, dV, dQ and dK.
    pairs = shape.steps * (shape.steps + 1) // 2 if shape.op == "attention_causal" else shape.steps**2
    pairs *= shape.batch * shape.heads
    note = "tanh not counted" if shape.op == "attention_additive" else ""
    return Work(2 * pairs * shape.channels * (6 if training else 2), x * (11 if training else 4), note)


def _matrix_product(flops: int, x: int, y: int, w: int, input_grad: bool, training: bool) -> Work:
    if not training:
        return Work(flops, x + w + y)
    # The backward reads dy once, x for dw, w for dx.
    backward = y + x + w + (w + x if input_grad else 0)
    return Work(flops * (3 if input_grad else 2), x + w + y + backward)

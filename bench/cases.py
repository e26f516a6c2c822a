"""One problem in one dtype and layout, ready to run: inputs, dlkern's function, torch's, and what decides parity.

`build` knows every op; both sides are called with the same tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as TF

import dlkern
from dlkern.bench.shapes import Shape
from dlkern.bench.work import GATES

__all__ = ["Case", "build", "missing"]

EPS, MOMENTUM = 1e-5, 0.1


@dataclass
class Case:
    """What one row runs.

    Attributes:
        ours, theirs: dlkern's and torch's function of the inputs.
        inputs: tensors and settings; those that require grad are differentiated in training rows.
        parameters: the tensors changed between timed calls.
        before_relu: where ours ends in a ReLU, torch's function up to it. Rounding decides on which side of zero an
            element falls, so the gradients of all sides are compared under the mask that ours applied.
        check_ours, check_reference: used for parity where ours and theirs cannot be compared element by element
            (dropout draws other elements than torch's).
    """

    ours: Callable[..., torch.Tensor]
    theirs: Callable[..., torch.Tensor]
    inputs: list[Any]
    parameters: list[torch.Tensor]
    before_relu: Callable[..., torch.Tensor] | None = None
    check_ours: Callable[..., torch.Tensor] | None = None
    check_reference: Callable[..., torch.Tensor] | None = None


def missing(op: str) -> str | None:
    """Why an op cannot be measured in this build, or None."""
    name = {
        "batch_norm_eval": "batch_norm",
        "batch_norm_relu": "batch_norm_act",
        "batch_norm_add_relu": "batch_norm_act",
        "linear_relu": "linear",
        "attention": "scaled_dot_product_attention",
        "attention_causal": "scaled_dot_product_attention",
        "attention_masked": "scaled_dot_product_attention",
        "attention_additive": "additive_attention",
    }.get(op, op.removesuffix("_packed"))
    return None if hasattr(dlkern.nn.functional, name) else f"dlkern.nn.functional has no {name}"


def build(shape: Shape, dtype: torch.dtype, layout: str, device: str, training: bool, seed: int = 0) -> Case:
    """The case of a shape.

    Args:
        shape: the problem.
        dtype: of every floating-point tensor.
        layout: "contiguous" or "channels_last".
        device: "cpu" or "cuda".
        training: whether inputs and parameters require grad.
        seed: of the random inputs. Never zeros: those hide unwritten outputs and run faster on some devices.
    """
    generator = torch.Generator(device="cpu" if device == "cpu" else "cuda").manual_seed(seed)
    F = dlkern.nn.functional

    def tensor(
        *size: int, grad: bool = True, scale: float = 1.0, image: bool = False, dtype: torch.dtype = dtype
    ) -> torch.Tensor:
        x = (torch.randn(size, generator=generator, device=device) * scale).to(dtype)
        if image and layout == "channels_last":
            x = x.contiguous(memory_format=torch.channels_last)
        return x.requires_grad_(grad and training)

    def image(grad: bool = shape.input_grad) -> torch.Tensor:
        return tensor(shape.batch, shape.channels, shape.height, shape.width, grad=grad, image=True)

    op = shape.op
    if op == "conv2d":
        fan_in = shape.weight_numel / shape.out_channels
        weight = tensor(
            shape.out_channels, shape.channels // shape.groups, *shape.kernel, scale=fan_in**-0.5, image=True
        )
        args = (shape.stride, shape.padding, shape.dilation, shape.groups)
        return Case(
            lambda x, w: F.conv2d(x, w, None, *args),
            lambda x, w: TF.conv2d(x, w, None, *args),
            [image(), weight],
            [weight],
        )
    if op in ("linear", "linear_relu"):
        x = tensor(shape.batch, shape.channels, grad=shape.input_grad)
        weight = tensor(shape.out_channels, shape.channels, scale=shape.channels**-0.5)
        bias = tensor(shape.out_channels)
        if op == "linear":
            return Case(F.linear, TF.linear, [x, weight, bias], [weight, bias])
        return Case(
            lambda x, w, b: F.linear(x, w, b, activation=dlkern.Activation.RELU),
            lambda x, w, b: TF.relu(TF.linear(x, w, b)),
            [x, weight, bias],
            [weight, bias],
            TF.linear,
        )
    if op == "max_pool2d":
        window = (shape.kernel, shape.stride, shape.padding)
        return Case(lambda x: F.max_pool2d(x, *window), lambda x: TF.max_pool2d(x, *window), [image()], [])
    if op == "avg_pool2d":
        window = (shape.kernel, shape.stride, shape.padding)
        return Case(lambda x: F.avg_pool2d(x, *window), lambda x: TF.avg_pool2d(x, *window), [image()], [])
    if op == "adaptive_avg_pool2d":
        size = shape.kernel
        return Case(lambda x: F.adaptive_avg_pool2d(x, size), lambda x: TF.adaptive_avg_pool2d(x, size), [image()], [])
    if op.startswith("batch_norm"):
        return _batch_norm(shape, image, tensor)
    if op == "dropout":
        return _dropout(tensor(shape.batch, shape.channels))
    if op == "embedding":
        weight = tensor(shape.channels, shape.out_channels)
        index = torch.randint(shape.channels, (shape.batch,), generator=generator, device=device)
        return Case(F.embedding, TF.embedding, [index, weight], [weight])
    if op == "cross_entropy":
        logits = tensor(shape.batch, shape.channels)
        target = torch.randint(shape.channels, (shape.batch,), generator=generator, device=device)
        return Case(F.cross_entropy, TF.cross_entropy, [logits, target], [])
    if op == "layer_norm":
        normalized = (shape.channels,)
        parameters = [tensor(shape.channels), tensor(shape.channels)]
        return Case(
            lambda x, w, b: F.layer_norm(x, normalized, w, b),
            lambda x, w, b: TF.layer_norm(x, normalized, w, b),
            [tensor(shape.batch, shape.channels), *parameters],
            parameters,
        )
    if shape.family == "rnn":
        return _rnn(shape, tensor)
    if shape.family == "attention":
        return _attention(shape, tensor)
    raise ValueError(f"build: no op {op!r}")


def _batch_norm(shape: Shape, image: Callable[..., torch.Tensor], tensor: Callable[..., torch.Tensor]) -> Case:
    F = dlkern.nn.functional
    x = image()
    # Beside 16-bit images the parameters and statistics are float32, as autocast leaves them.
    wide = x.dtype if x.dtype == torch.float64 else torch.float32
    weight, bias = tensor(shape.channels, dtype=wide), tensor(shape.channels, dtype=wide)
    mean = tensor(shape.channels, grad=False, dtype=wide)
    variance = tensor(shape.channels, grad=False, dtype=wide).abs() + 0.5
    inputs = [x, weight, bias, mean, variance]
    if shape.op in ("batch_norm", "batch_norm_eval"):
        train = shape.op == "batch_norm"
        return Case(
            lambda x, w, b, m, v: F.batch_norm(x, m, v, w, b, train, MOMENTUM, EPS),
            lambda x, w, b, m, v: TF.batch_norm(x, m, v, w, b, train, MOMENTUM, EPS),
            inputs,
            [weight, bias],
        )
    if shape.op == "batch_norm_relu":
        return Case(
            lambda x, w, b, m, v: F.batch_norm_act(
                x, m, v, w, b, True, MOMENTUM, EPS, activation=dlkern.Activation.RELU
            ),
            lambda x, w, b, m, v: TF.relu(TF.batch_norm(x, m, v, w, b, True, MOMENTUM, EPS)),
            inputs,
            [weight, bias],
            lambda x, w, b, m, v: TF.batch_norm(x, m, v, w, b, True, MOMENTUM, EPS),
        )
    return Case(
        lambda x, w, b, m, v, r: F.batch_norm_act(
            x, m, v, w, b, True, MOMENTUM, EPS, activation=dlkern.Activation.RELU, residual=r
        ),
        lambda x, w, b, m, v, r: TF.relu(TF.batch_norm(x, m, v, w, b, True, MOMENTUM, EPS) + r),
        [*inputs, image()],
        [weight, bias],
        lambda x, w, b, m, v, r: TF.batch_norm(x, m, v, w, b, True, MOMENTUM, EPS) + r,
    )


def _rnn(shape: Shape, tensor: Callable[..., torch.Tensor]) -> Case:
    """One layer in one direction, from the sequence, padded or packed, to the outputs of all steps."""
    op, hidden = shape.op.removesuffix("_packed"), shape.out_channels
    width = GATES[op] * hidden
    sizes = ((width, shape.channels), (width, hidden), (width,), (width,))
    weights = [tensor(*size, scale=hidden**-0.5) for size in sizes]
    states = [tensor(1, shape.batch, hidden, grad=False) for _ in range(2 if op == "lstm" else 1)]
    packed = op != shape.op
    batch_sizes = torch.tensor(shape.batch_sizes)

    def on(namespace: Any) -> Callable[..., torch.Tensor]:
        function = getattr(namespace, op)

        def call(x: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
            given = list(rest[: len(states)])
            hx, params = given if op == "lstm" else given[0], list(rest[len(states) :])
            # In training: cuDNN has no gradients otherwise.
            if packed:
                return function(x, batch_sizes, hx, params, True, 1, 0.0, True, False)[0]
            return function(x, hx, params, True, 1, 0.0, True, False, False)[0]

        return call

    size = (sum(shape.batch_sizes),) if packed else (shape.steps, shape.batch)
    x = tensor(*size, shape.channels, grad=shape.input_grad)
    return Case(on(dlkern.nn.functional), on(torch), [x, *states, *weights], weights)


def _attention(shape: Shape, tensor: Callable[..., torch.Tensor]) -> Case:
    F, steps = dlkern.nn.functional, shape.steps
    operands = [tensor(shape.batch, shape.heads, steps, shape.channels) for _ in range(3)]
    if shape.op == "attention_additive":
        weight = tensor(shape.channels)

        def expression(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
            return torch.softmax(torch.tanh(q[..., :, None, :] + k[..., None, :, :]) @ w, -1) @ v

        return Case(F.additive_attention, expression, [*operands, weight], [weight])
    causal = shape.op == "attention_causal"
    mask = None
    if shape.op == "attention_masked":  # as of padding: keys that no query of a row of the batch sees
        ends = steps - torch.arange(shape.batch, device=operands[0].device) * steps // (2 * shape.batch)
        mask = (torch.arange(steps, device=ends.device) < ends[:, None])[:, None, None]
    return Case(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal),
        lambda q, k, v: TF.scaled_dot_product_attention(q, k, v, mask, is_causal=causal),
        operands,
        [],
    )


def _dropout(x: torch.Tensor) -> Case:
    seed = torch.tensor(12345, device=x.device)
    return Case(
        lambda x: dlkern.nn.functional.dropout(x, 0.5),
        lambda x: TF.dropout(x, 0.5),
        [x],
        [],
        None,
        lambda x: dlkern.ops.dropout.dropout(x, 0.5, seed),
        lambda x: dlkern.reference.dropout.dropout(x, 0.5, seed),
    )

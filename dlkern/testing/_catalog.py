"""Small cases of every op, with torch's own op beside ours: what `dlkern check`, bench/gpu.sh and the tests run.

A family adds its cases here; the checks that hold for all ops (parity, opcheck, compile, vmap, autocast, …) then
cover them without another line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as tF
from torch.overrides import TorchFunctionMode

import dlkern.nn.functional as F
from dlkern import ops, reference
from dlkern.ops._activation import Activation

__all__ = ["CASES", "Case", "cases"]


@dataclass(frozen=True)
class Case:
    """One call of one op.

    Attributes:
        family, op: row of the grid and name of the public function.
        label: what is special about this case.
        ours, theirs: the call on dlkern and on torch (or on a reference where torch has no such op); of tensors only.
        inputs: draws the tensors, float64 leaves with requires_grad where a gradient exists.
        images: the first input is an image batch, so channels_last is another layout of the case.
        plain: the op in elementary torch expressions: the float64 reference where torch's own kernel sums one number
            after another, which is no measure for float64, and sums float32 in float64, which is none either.
        draws: how many draws an error needs to mean something (small outputs need several).
    """

    family: str
    op: str
    label: str
    ours: Callable[..., Any]
    theirs: Callable[..., Any]
    inputs: Callable[..., list[Any]]
    images: bool = False
    draws: int = 4
    plain: Callable[..., Any] | None = None

    def reference(self, dtype: torch.dtype) -> Callable[..., Any]:
        return self.plain if dtype == torch.float64 and self.plain is not None else self.theirs

    @property
    def name(self) -> str:
        return f"{self.op} {self.label}".strip()


def _randn(*shape: int, grad: bool = True, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(shape, dtype=torch.float64) * scale).requires_grad_(grad)


def _positive(*shape: int) -> torch.Tensor:
    return (torch.rand(shape, dtype=torch.float64) + 0.1).requires_grad_()


def _conv() -> Iterator[Case]:
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...], bool, dict[str, Any]]] = {
        "3x3": ((2, 5, 9, 7), (6, 5, 3, 3), True, dict(padding=1)),
        "3x3 stride 2": ((2, 4, 9, 8), (5, 4, 3, 3), False, dict(stride=2, padding=1)),
        "1x1": ((2, 7, 5, 6), (9, 7, 1, 1), True, {}),
        "1x1 stride 2": ((1, 6, 7, 7), (4, 6, 1, 1), False, dict(stride=2)),
        "7x7 stride 2": ((1, 3, 17, 15), (8, 3, 7, 7), False, dict(stride=2, padding=3)),
        "stride over kernel": ((1, 3, 11, 10), (4, 3, 2, 2), True, dict(stride=3)),
        "dilated": ((1, 4, 11, 12), (3, 4, 3, 3), True, dict(dilation=(2, 3), padding=2)),
        "grouped": ((2, 6, 7, 8), (9, 2, 3, 3), True, dict(groups=3, padding=1)),
        "depthwise": ((2, 8, 9, 7), (8, 1, 3, 3), True, dict(groups=8, padding=1)),
        "even kernel": ((1, 3, 8, 9), (4, 3, 2, 4), True, dict(padding=(1, 2))),
    }
    for label, (x, w, bias, options) in shapes.items():
        yield Case(
            "conv", "conv2d", label,
            lambda *t, o=options: F.conv2d(*t, **o), lambda *t, o=options: tF.conv2d(*t, **o),
            lambda x=x, w=w, b=bias: [_randn(*x), _randn(*w, scale=0.3), *([_randn(w[0])] if b else [])],
            images=True,
        )

    sequences: dict[str, tuple[tuple[int, ...], tuple[int, ...], bool, dict[str, Any]]] = {
        "3": ((3, 5, 21), (6, 5, 3), True, dict(padding=1)),
        "5 stride 2": ((2, 4, 23), (7, 4, 5), False, dict(stride=2, padding=2)),
        "causal": ((2, 6, 19), (9, 2, 3), True, dict(groups=3, dilation=2, padding=4)),
        "depthwise": ((2, 8, 17), (8, 1, 4), True, dict(groups=8, padding=2)),
    }
    for label, (x, w, bias, options) in sequences.items():
        yield Case(
            "conv", "conv1d", label,
            lambda *t, o=options: F.conv1d(*t, **o), lambda *t, o=options: tF.conv1d(*t, **o),
            lambda x=x, w=w, b=bias: [_randn(*x), _randn(*w, scale=0.3), *([_randn(w[0])] if b else [])],
        )


def _conv_act() -> Iterator[Case]:
    relu = Activation.RELU
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
        "relu": ((2, 5, 9, 7), (20, 5, 3, 3), dict(padding=1)), "grouped": ((2, 6, 7, 8), (9, 2, 3, 3), dict(groups=3)),
        "depthwise": ((2, 8, 9, 7), (8, 1, 3, 3), dict(groups=8, stride=2, padding=1)),
    }
    for label, (x, w, options) in shapes.items():
        size = tF.conv2d(torch.empty(x), torch.empty(w), **options).shape
        yield Case(
            "conv", "conv2d_act", label,
            lambda x, w, b, r, o=options: F.conv2d_act(x, w, b, **o, activation=relu, residual=r),
            lambda x, w, b, r, o=options: torch.relu(tF.conv2d(x, w, b, **o) + r),
            lambda x=x, w=w, r=size: [_randn(*x), _randn(*w, scale=0.3), _randn(w[0]), _randn(*r)], images=True, draws=8,
        )  # fmt: skip


def _conv_transpose() -> Iterator[Case]:
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...], bool, dict[str, Any]]] = {
        "4x4 stride 2": ((2, 5, 6, 5), (5, 6, 4, 4), True, dict(stride=2, padding=1)),
        "3x3": ((2, 4, 7, 6), (4, 5, 3, 3), False, dict(padding=1)),
        "stride over kernel": ((3, 7, 5, 4), (7, 8, 2, 2), True, dict(stride=3, output_padding=(1, 2))),
        "dilated": ((3, 8, 6, 7), (8, 7, 3, 2), True, dict(dilation=(3, 2), output_padding=(2, 1), padding=1)),
        "grouped": ((4, 9, 5, 6), (9, 3, 3, 3), True, dict(groups=3, stride=2, output_padding=1)),
        "depthwise": ((3, 8, 6, 5), (8, 1, 3, 3), True, dict(groups=8, stride=2, padding=1)),
    }
    for label, (x, w, bias, options) in shapes.items():
        outputs = w[1] * options.get("groups", 1)
        yield Case(
            "conv", "conv_transpose2d", label,
            lambda *t, o=options: F.conv_transpose2d(*t, **o), lambda *t, o=options: tF.conv_transpose2d(*t, **o),
            lambda x=x, w=w, b=outputs if bias else 0: [_randn(*x), _randn(*w, scale=0.3), *([_randn(b)] if b else [])],
            images=True, draws=8,  # sums of few terms
        )
    yield Case(
        "conv", "conv_transpose1d", "4 stride 2",
        lambda x, w, b: F.conv_transpose1d(x, w, b, 2, 1), lambda x, w, b: tF.conv_transpose1d(x, w, b, 2, 1),
        lambda: [_randn(2, 5, 9), _randn(5, 6, 4, scale=0.3), _randn(6)],
    )


def _pooling() -> Iterator[Case]:
    shape = (2, 5, 9, 11)
    for label, options in {
        "2x2": dict(kernel_size=2), "3x3 stride 2": dict(kernel_size=3, stride=2, padding=1),
        "ceil": dict(kernel_size=3, stride=2, padding=1, ceil_mode=True),
        "dilated": dict(kernel_size=(3, 2), stride=1, dilation=2),
    }.items():
        yield Case("pooling", "max_pool2d", label, lambda x, o=options: F.max_pool2d(x, **o),
                   lambda x, o=options: tF.max_pool2d(x, **o), lambda: [_randn(*shape)], images=True)
    for label, options in {
        "2x2": dict(kernel_size=2), "3x3 padded": dict(kernel_size=3, stride=2, padding=1),
        "ceil, pads not counted": dict(kernel_size=3, stride=2, padding=1, ceil_mode=True, count_include_pad=False),
        "divisor": dict(kernel_size=(2, 3), divisor_override=5),
    }.items():
        yield Case("pooling", "avg_pool2d", label, lambda x, o=options: F.avg_pool2d(x, **o),
                   lambda x, o=options: tF.avg_pool2d(x, **o), lambda: [_randn(*shape)], images=True)
    for size in (1, (4, 5)):
        yield Case("pooling", "adaptive_avg_pool2d", f"to {size}", lambda x, s=size: F.adaptive_avg_pool2d(x, s),
                   lambda x, s=size: tF.adaptive_avg_pool2d(x, s), lambda: [_randn(*shape)], images=True)


    for size in (1, (4, 5)):
        yield Case("pooling", "adaptive_max_pool2d", f"to {size}", lambda x, s=size: F.adaptive_max_pool2d(x, s),
                   lambda x, s=size: tF.adaptive_max_pool2d(x, s), lambda: [_randn(*shape)], images=True)
    for label, options in {
        "2": dict(norm_type=2, kernel_size=2), "1, overlapping": dict(norm_type=1.0, kernel_size=3, stride=2),
        "2, ceil": dict(norm_type=2, kernel_size=(2, 4), stride=(3, 3), ceil_mode=True),
        "3, to positive": dict(norm_type=3, kernel_size=3, stride=2),
        "2.5, to positive": dict(norm_type=2.5, kernel_size=(3, 2), stride=(2, 1)),
    }.items():
        positive = "positive" in label  # sums of odd powers may be negative, and roots of those NaN
        yield Case("pooling", "lp_pool2d", label, lambda x, o=options: F.lp_pool2d(x, **o),
                   lambda x, o=options: tF.lp_pool2d(x, **o), lambda p=positive: [_positive(*shape) if p else _randn(*shape)],
                   images=True)
    yield from _pooling_of_sequences()


def _pooling_of_sequences() -> Iterator[Case]:
    for op, label, options in (
        ("max_pool1d", "3 stride 2", dict(kernel_size=3, stride=2, padding=1)),
        ("max_pool1d", "dilated", dict(kernel_size=2, dilation=3)),
        ("avg_pool1d", "4 stride 3", dict(kernel_size=4, stride=3, padding=2, ceil_mode=True)),
        ("adaptive_avg_pool1d", "to 5", dict(output_size=5)), ("adaptive_max_pool1d", "to 4", dict(output_size=4)),
        ("lp_pool1d", "2", dict(norm_type=2, kernel_size=3, stride=2)),
    ):
        yield Case("pooling", op, label, lambda x, f=op, o=options: getattr(F, f)(x, **o),
                   lambda x, f=op, o=options: getattr(tF, f)(x, **o), lambda: [_randn(3, 5, 23)])


def _batch_norm() -> Iterator[Case]:
    def train(namespace: Any) -> Callable[..., Any]:
        return lambda x, w=None, b=None: namespace.batch_norm(x, None, None, w, b, True, 0.1, 1e-5)

    def frozen(namespace: Any) -> Callable[..., Any]:
        return lambda x, w, b, mean, variance: namespace.batch_norm(x, mean, variance, w, b, False, 0.1, 1e-5)

    def plain(x: torch.Tensor, w: Any = None, b: Any = None, mean: Any = None, variance: Any = None) -> torch.Tensor:
        dims, shape = [d for d in range(x.dim()) if d != 1], (1, -1, *(1,) * (x.dim() - 2))
        mean = x.mean(dims) if mean is None else mean
        variance = (x - mean.reshape(shape)).square().mean(dims) if variance is None else variance
        y = (x - mean.reshape(shape)) * torch.rsqrt(variance.reshape(shape) + 1e-5)
        return y if w is None else y * w.reshape(shape) + b.reshape(shape)

    def running(channels: int) -> list[torch.Tensor]:
        return [_randn(channels, grad=False), torch.rand(channels, dtype=torch.float64) + 0.5]

    def shifted(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, dtype=torch.float64) * 2 + 3).requires_grad_()

    for label, shape in {"4-D": (4, 6, 7, 5), "2-D": (37, 9), "3-D": (3, 5, 17)}.items():
        yield Case("batch_norm", "batch_norm", f"train {label}", train(F), train(tF),
                   lambda s=shape: [shifted(*s), _randn(s[1]), _randn(s[1])], images=len(shape) == 4, plain=plain)
        yield Case("batch_norm", "batch_norm", f"eval {label}", frozen(F), frozen(tF),
                   lambda s=shape: [shifted(*s), _randn(s[1]), _randn(s[1]), *running(s[1])],
                   images=len(shape) == 4, plain=plain)
    yield Case("batch_norm", "batch_norm", "train not affine", train(F), train(tF),
               lambda: [shifted(4, 3, 6, 5)], images=True, plain=plain)


def _linear() -> Iterator[Case]:
    for label, (x, n, bias) in {
        "2-D": ((13, 21), 17, True), "3-D": ((3, 5, 8), 33, True), "1-D": ((24,), 40, True), "no bias": ((7, 64), 32, False)
    }.items():
        yield Case("linear", "linear", label, lambda *t: F.linear(*t), tF.linear,
                   lambda x=x, n=n, b=bias: [_randn(*x), _randn(n, x[-1], scale=0.3), *([_randn(n)] if b else [])],
                   draws=128 if len(x) == 1 else 4)  # one row: its largest error settles only over many


def _layer_norm() -> Iterator[Case]:
    for label, x, dims, affine in (
        ("3-D", (3, 7, 33), 1, "both"), ("two dimensions", (5, 4, 6, 11), 2, "both"), ("no bias", (9, 65), 1, "weight"),
        ("not affine", (13, 40), 1, "none"),
    ):  # fmt: skip
        count = {"both": 2, "weight": 1, "none": 0}[affine]
        yield Case("layer_norm", "layer_norm", label, lambda x, *t, d=dims: F.layer_norm(x, x.shape[-d:], *t),
                   lambda x, *t, d=dims: tF.layer_norm(x, x.shape[-d:], *t),
                   lambda x=x, d=dims, n=count: [_randn(*x), *(_randn(*x[-d:]) for _ in range(n))])


def _positions() -> Iterator[Case]:
    for label, x, angles, interleaved in (
        ("halves", (2, 3, 7, 16), (1, 1, 7, 8), False), ("neighbours", (2, 3, 7, 16), (7, 8), True),
        ("part of the depth", (2, 2, 5, 45), (2, 1, 5, 19), False), ("part, neighbours", (3, 5, 11), (5, 4), True),
    ):  # fmt: skip
        yield Case("positions", "rotary", label, lambda *t, i=interleaved: F.rotary(*t, interleaved=i),
                   lambda x, cos, sin, i=interleaved: reference.positions.rotary(x, cos, sin, i),
                   lambda x=x, a=angles: [_randn(*x), _randn(*a, grad=False), _randn(*a, grad=False)])


def _attention() -> Iterator[Case]:
    def inputs(q: tuple[int, ...], k: tuple[int, ...], depth: int, mask: tuple[int, ...] | None) -> list[torch.Tensor]:
        tensors = [_randn(*q), _randn(*k), _randn(*k[:-1], depth)]
        return tensors if mask is None else [*tensors, _randn(*mask)]

    sdpa = "scaled_dot_product_attention"
    for label, q, k, depth, mask, options in (
        ("4-D", (2, 3, 20, 16), (2, 3, 37, 16), 16, None, {}),
        ("causal", (2, 2, 67, 24), (2, 2, 67, 24), 24, None, dict(is_causal=True)),
        ("added mask", (2, 3, 17, 12), (2, 3, 33, 12), 20, (2, 1, 17, 33), {}),
        ("grouped queries", (1, 6, 9, 8), (1, 2, 21, 8), 8, None, dict(enable_gqa=True, scale=0.5)),
        ("3-D", (3, 14, 10), (3, 11, 10), 10, None, {}),
    ):  # fmt: skip
        yield Case("attention", sdpa, label, lambda *t, o=options: F.scaled_dot_product_attention(*t, **o),
                   lambda *t, o=options: tF.scaled_dot_product_attention(*t, **o),
                   lambda a=(q, k, depth, mask): inputs(*a), draws=16)

    def turned_first(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> torch.Tensor:
        q, k = (reference.positions.rotary(x, cos, sin, False) for x in (q, k))
        return tF.scaled_dot_product_attention(q, k, v, is_causal=True)

    yield Case("attention", sdpa, "rotary positions",
               lambda q, k, v, cos, sin: F.scaled_dot_product_attention(q, k, v, is_causal=True, rotary=(cos, sin)),
               turned_first,
               lambda: [*(_randn(1, 2, 19, 12) for _ in range(3)), *(_randn(19, 5, grad=False) for _ in range(2))], draws=16)
    scores: dict[str, tuple[int, dict[str, Any]]] = {
        "dot_attention": (reference.attention.DOT, {}), "gaussian_attention": (reference.attention.GAUSSIAN, dict(width=2.0)),
        "cosine_attention": (reference.attention.COSINE, dict(scale=3.0)),
        "additive_attention": (reference.attention.ADDITIVE, {}),
    }
    for op, (score, options) in scores.items():
        scale = options.get("scale", options.get("width", 1.0) ** -2)

        def theirs(
            q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, w: Any = None, score: int = score, scale: float = scale
        ) -> torch.Tensor:
            four = (q[:, None], k[:, None], v[:, None])
            return reference.attention.attention(*four, None, None, None, w, None, 0.0, scale, 0.0, -1, -1, score)[:, 0]

        additive = score == reference.attention.ADDITIVE
        yield Case("attention", op, "", lambda *t, op=op, o=options: getattr(F, op)(*t, **o), theirs,
                   lambda a=additive: [_randn(3, 19, 12, scale=0.7), _randn(3, 26, 12, scale=0.7), _randn(3, 26, 10),
                                       *([_randn(12)] if a else [])], draws=128)


def _loss() -> Iterator[Case]:
    def inputs(*shape: int) -> list[torch.Tensor]:
        target = torch.randint(0, shape[1], (shape[0], *shape[2:]))
        target.view(-1)[0] = 1
        return [_randn(*shape), target]

    for label, shape, options in (
        ("mean", (19, 11), {}), ("sum", (8, 7), dict(reduction="sum")), ("none", (9, 5), dict(reduction="none")),
        ("images", (2, 5, 4, 3), {}), ("ignored class", (12, 6), dict(ignore_index=1)),
        ("smoothed", (12, 9), dict(label_smoothing=0.1)),
    ):
        yield Case("loss", "cross_entropy", label, lambda *t, o=options: F.cross_entropy(*t, **o),
                   lambda *t, o=options: tF.cross_entropy(*t, **o), lambda s=shape: inputs(*s), draws=8)

    def probable(*shape: int) -> list[torch.Tensor]:
        return [_randn(*shape), torch.softmax(_randn(*shape), 1).detach().requires_grad_(), torch.rand(shape[1]).double() + 0.1]

    settings: dict[str, Any] = dict(reduction="sum", label_smoothing=0.1)
    for label, sizes, options in (
        ("probabilities", [19, 11], {}), ("probabilities, none", [2, 5, 4, 3], dict(reduction="none")),
        ("probabilities, smoothed", [8, 7, 5], settings),
    ):
        yield Case("loss", "cross_entropy", label, lambda *t, o=options: F.cross_entropy(*t, **o),
                   lambda *t, o=options: tF.cross_entropy(*t, **o), lambda s=sizes: probable(*s), draws=8)


def _embedding() -> Iterator[Case]:
    for label, shape, table, options in (
        ("2-D", (3, 4), (7, 19), {}), ("1-D", (17,), (5, 9), dict(padding_idx=2)),
        ("by frequency", (3, 2, 3), (4, 8), dict(scale_grad_by_freq=True)), ("one index", (), (5, 33), {}),
    ):  # fmt: skip
        yield Case("embedding", "embedding", label, lambda w, i, o=options: F.embedding(i, w, **o),
                   lambda w, i, o=options: tF.embedding(i, w, **o),
                   lambda s=shape, t=table: [_randn(*t), torch.randint(0, t[0], s)])


def _dropout() -> Iterator[Case]:
    for p in (0.2, 0.5):
        yield Case("dropout", "dropout", f"p={p}",
                   lambda x, seed, p=p: ops.dropout.dropout(x, p, seed),
                   lambda x, seed, p=p: reference.dropout.dropout(x, p, seed),
                   lambda: [_randn(3, 5, 8, 9), torch.randint(0, 2**62, ())], images=True)
    yield Case("dropout", "dropout2d", "p=0.3",
               lambda x, seed: ops.dropout.feature_dropout(x, 0.3, seed),
               lambda x, seed: reference.dropout.feature_dropout(x, 0.3, seed),
               lambda: [_randn(3, 19, 4, 5), torch.randint(0, 2**62, ())], images=True)
    for op, shape in (("dropout1d", (5, 17, 7)), ("dropout3d", (2, 9, 3, 2, 4))):
        yield Case("dropout", op, "p=0.4", lambda x, seed, op=op: ops.dropout.feature_dropout(x, 0.4, seed, op),
                   lambda x, seed: reference.dropout.feature_dropout(x, 0.4, seed),
                   lambda s=shape: [_randn(*s), torch.randint(0, 2**62, ())])


def _rnn() -> Iterator[Case]:
    def call(function: Callable[..., Any], lstm: bool, layers: int, directions: int, bias: bool) -> Callable[..., Any]:
        def run(x: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
            states, params = tensors[: 2 if lstm else 1], list(tensors[2 if lstm else 1 :])
            hx = states if lstm else states[0]
            # In training: cuDNN has no gradients otherwise.
            return function(x, hx, params, bias, layers, 0.0, True, directions == 2, False)[0]

        return run

    def inputs(gates: int, size: tuple[int, ...], hidden: int, layers: int, directions: int, bias: bool) -> list[torch.Tensor]:
        scale = hidden**-0.5
        tensors = [_randn(*size)]
        tensors += [_randn(layers * directions, size[1], hidden, scale=0.5) for _ in range(2 if gates == 4 else 1)]
        for layer in range(layers):
            for _ in range(directions):
                features = size[2] if layer == 0 else directions * hidden
                sizes: list[tuple[int, ...]] = [(gates * hidden, features), (gates * hidden, hidden)]
                sizes += [(gates * hidden,)] * 2 if bias else []
                tensors += [_randn(*s, scale=scale) for s in sizes]
        return tensors

    class Nearest(TorchFunctionMode):
        """The smallest number that relu is given."""

        value = torch.inf

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.relu:
                self.value = min(self.value, args[0].abs().min().item())
            return func(*args, **(kwargs or {}))

    def clear(plain: Callable[..., Any], arguments: tuple[Any, ...]) -> list[torch.Tensor]:
        """Inputs that leave no unit of a second layer on the edge: rounding between layers would decide its gradient."""
        while True:
            drawn = inputs(*arguments)
            with torch.no_grad(), Nearest() as nearest:
                plain(*drawn)
            if nearest.value > 2**-8:
                return drawn

    for op, gates in (("lstm", 4), ("gru", 3), ("rnn_tanh", 1), ("rnn_relu", 1)):
        for label, size, hidden, layers, directions, bias in (
            ("one layer", (4, 3, 7), 11, 1, 1, True), ("two layers both ways, no bias", (3, 3, 5), 8, 2, 2, False),
            ("wide", (5, 8, 13), 37, 1, 1, True),
        ):  # fmt: skip
            settings = (gates == 4, layers, directions, bias)
            plain = call(getattr(reference.rnn, op), *settings)
            arguments = (gates, size, hidden, layers, directions, bias)
            yield Case("rnn", op, label, call(getattr(F, op), *settings), call(getattr(torch, op), *settings),
                       lambda a=arguments, p=plain, r=op == "rnn_relu" and layers > 1: clear(p, a) if r else inputs(*a),
                       draws=16, plain=plain)


CASES: tuple[Case, ...] = (
    *_conv(), *_conv_act(), *_conv_transpose(), *_pooling(), *_batch_norm(), *_linear(), *_layer_norm(), *_attention(),
    *_loss(), *_embedding(), *_dropout(), *_rnn(), *_positions(),
)  # fmt: skip

def cases(family: str | None = None, op: str | None = None) -> list[Case]:
    """The cases of a family or an op; all of them by default."""
    return [c for c in CASES if family in (None, c.family) and op in (None, c.op)]

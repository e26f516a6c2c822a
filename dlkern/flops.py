"""Floating-point operations of dlkern's ops, for torch.utils.flop_counter.

A multiply-add counts as two, biases, activations and softmax as none, as in torch's own formulas; what is hidden by
position (causal attention) or by padding is counted too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from math import prod
from typing import Any

import torch

from dlkern.columns import COLUMNS

__all__ = ["register_flop_formulas"]

_Arguments = dict[str, Any]


def _linear(a: _Arguments) -> int:
    return 2 * a["input"].numel() * a["weight"].shape[0]


def _linear_backward_input(a: _Arguments) -> int:
    return 2 * a["grad_output"].numel() * a["weight"].shape[1]


def _linear_backward_weight(a: _Arguments) -> int:
    return 2 * a["grad_output"].numel() * a["input"].shape[-1]


def _conv(a: _Arguments, output: torch.Tensor) -> int:
    return 2 * output.numel() * prod(a["weight"].shape[1:])


def _conv_backward_input(a: _Arguments) -> int:
    return 2 * a["grad_output"].numel() * prod(a["weight"].shape[1:])


def _conv_backward_weight(a: _Arguments) -> int:
    return 2 * a["grad_output"].numel() * prod(a["weight_size"][1:])


def _conv_transpose(a: _Arguments) -> int:
    return 2 * a["input"].numel() * prod(a["weight"].shape[1:])


def _attention(a: _Arguments, products: tuple[int, int] = (1, 1)) -> int:
    q, v = a["query"], a["value"]
    of_scores, of_values = products
    return 2 * prod(q.shape[:-1]) * v.shape[-2] * (of_scores * q.shape[-1] + of_values * v.shape[-1])


def _attention_backward(a: _Arguments) -> int:
    return _attention(a, (3, 2))  # the scores again, gradients of queries and keys; of probabilities and values


def _weights(a: _Arguments, names: tuple[str, ...]) -> int:
    return sum(a[name].numel() for name in names if a.get(name) is not None)


def _rnn(a: _Arguments) -> int:
    rows = prod(a["input"].shape[:-1])
    return 2 * rows * _weights(a, ("weight_ih", "weight_hh", "weight_hr"))


def _rnn_backward(a: _Arguments) -> int:
    rows = prod(a["input"].shape[:-1])
    recurrent = ("weight_hh", "weight_hr")
    count = _weights(a, recurrent)
    if a["of_input"]:
        count += _weights(a, ("weight_ih",))
    if a["of_weight"]:
        count += _weights(a, ("weight_ih", *recurrent))
    return 2 * rows * count


_FORMULAS: dict[str, Callable[..., int]] = {
    "linear_forward": _linear,
    "linear_backward_input": _linear_backward_input,
    "linear_backward_weight": _linear_backward_weight,
    "conv2d_forward": _conv,
    "conv2d_act_forward": _conv,
    "conv2d_forward_packed": _conv,
    "conv2d_backward_input": _conv_backward_input,
    "conv2d_backward_weight": _conv_backward_weight,
    "conv_transpose2d_forward": _conv_transpose,
    "attention_forward": _attention,
    "attention_backward": _attention_backward,
    "attention_rotary_forward": _attention,
    "attention_rotary_backward": _attention_backward,
    "rnn_forward": _rnn,
    "rnn_backward": _rnn_backward,
}


def _formula(names: list[str], count: Callable[..., int]) -> Callable[..., int]:
    def formula(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
        arguments = {**dict(zip(names, args)), **kwargs}
        return count(arguments, out_val) if count is _conv else count(arguments)

    return formula


@functools.cache
def register_flop_formulas() -> None:
    """Lets torch.utils.flop_counter.FlopCounterMode count dlkern's ops: convolutions, linear, attention, recurrent layers.

    Counted as torch counts its own: two a multiply-add, the whole matrix of scores, forward and backward. (torch 2.13 counts
    neither attention nor recurrent layers on a CPU where one kernel does them.) Calling it again does nothing.
    """
    from torch.utils.flop_counter import register_flop_formula  # half a second that only counting needs

    for name, count in _FORMULAS.items():
        for column in COLUMNS:
            op = getattr(torch.ops.dlkern, f"{name}_{column}", None)
            if op is not None:
                names = [argument.name for argument in op.default._schema.arguments]
                register_flop_formula(op, get_raw=True)(_formula(names, count))

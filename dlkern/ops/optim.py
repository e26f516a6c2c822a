"""Optimisers and gradient clipping: schemas and the choice of column. One call serves all tensors of a step.

Hyperparameters come as rows of `settings`, one for each parameter group; groups[i] is the row of parameter i.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dlkern import columns
from dlkern import trace as tracing
from dlkern.ops._registry import define, raw

__all__ = ["choose", "raw_op", "refusal"]


def _fake(*arguments):
    return None


def _fake_norm(grads, max_norm, norm_type, error_if_nonfinite):
    dtype = grads[0].dtype
    for grad in grads:
        dtype = torch.promote_types(dtype, grad.dtype)
    return grads[0].new_empty((), dtype=dtype)


define(
    "sgd",
    # A row: lr, momentum, dampening, weight_decay, nesterov, maximize. momentum_buffers is empty where momentum is 0;
    # fresh[i] says that buffer i holds nothing yet.
    "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, int[] fresh, int[] groups, float[] settings)"
    " -> ()",
    _fake,
    triton="dlkern.kernels.optim:sgd",
)
define(
    "adam",
    # A row: lr, beta1, beta2, eps, weight_decay, decoupled, maximize. max_exp_avg_sqs is empty without amsgrad; steps
    # are float32 or float64 scalars on the host, counted up here; GPU columns also take float32 on the device.
    "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs,"
    " Tensor(d!)[] max_exp_avg_sqs, Tensor(e!)[] steps, int[] groups, float[] settings) -> ()",
    _fake,
    triton="dlkern.kernels.optim:adam",
)
define(
    "lars",
    # A row: lr, momentum, weight_decay, trust_coefficient (negative: none), eps, maximize.
    "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, int[] groups, float[] settings) -> ()",
    _fake,
    triton="dlkern.kernels.optim:lars",
)
define(
    "clip_grad_norm",
    "(Tensor(a!)[] grads, float max_norm, float norm_type, bool error_if_nonfinite) -> Tensor",
    _fake_norm,
    triton="dlkern.kernels.optim:clip_grad_norm",
)
define(
    "clip_grad_value",
    "(Tensor(a!)[] grads, float clip_value) -> ()",
    _fake,
    triton="dlkern.kernels.optim:clip_grad_value",
)
for _op in ("sgd", "adam", "lars", "clip_grad_norm_", "clip_grad_value_"):
    for _column in ("cpu", "triton"):
        columns.declare(_op, _column, (torch.float32, torch.bfloat16, torch.float16, torch.float64))
    columns.declare(_op, "cuda", (torch.float32, torch.bfloat16, torch.float16))

_PLAIN = (torch.Tensor, torch.nn.Parameter)


def refusal(*tensors: torch.Tensor) -> str:
    """Why no kernel can serve a parameter, its gradient and its state; "" where one can, if its column has the dtype."""
    dtype, device = tensors[0].dtype, tensors[0].device
    for x in tensors:
        if type(x) not in _PLAIN:
            return f"{type(x).__name__} is not a plain tensor"
        if x.layout is not torch.strided:
            return f"{str(x.layout).removeprefix('torch.')} tensors"
        if x.dtype is not dtype or x.device != device:
            return "a parameter and its gradient or state differ in dtype or device"
    return ""


def choose(op: str, tensors: Sequence[torch.Tensor], fallback: str = "reference", reason: str = "") -> str:
    """The column of a call with these tensors, which may differ in dtype; recorded for trace(). Where one of them has no
    kernel, or `reason` says why there can be none, it is `fallback`."""
    column = ""
    kinds = list(dict.fromkeys([(x.device, x.dtype) for x in tensors]))
    for device, dtype in kinds:
        if reason:
            break
        choice = columns.choose(op, device.type, dtype, columns.state.forced, columns.state.emulated)
        if choice.column == "reference":
            reason = choice.reason
        elif column and column != choice.column:
            # Columns differ in dtypes: one that takes all of them serves the step.
            both = (column, choice.column)
            column = next((c for c in both if not any(columns.supported(op, c, d.type, t) for d, t in kinds)), "")
            if not column:
                reason = "parameters on several devices"
            break
        column = choice.column
    if reason:
        column = fallback
    if tracing.active:
        tracing.record(op, column, reason, *tensors)
    return column


def raw_op(op: str, column: str):
    return raw[op][column]

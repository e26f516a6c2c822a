"""RNN, LSTM and GRU, one layer in one direction: schemas, fake kernels, autograd, dispatch.

The raw ops take a whole sequence, padded [T, B, I] (with the length of each sequence, or none) or packed [rows, I] with
the number of rows of each step, so that a compiled graph does not unroll time. Saved for backward: input, weights, initial
states, output, and the gates after their activations (and LSTM's cells). The second derivative is the reference's.
A layer with options (layer_norm, recurrent_dropout, zoneout, peephole) has raw ops of its own; its masks are arguments, drawn
by dropout's kernels, so that every column has the same. On GPUs they also run an LSTM with a projection.
"""

from __future__ import annotations

import torch

from dlkern import columns
from dlkern import trace as tracing
from dlkern.ops import _autograd
from dlkern.ops._registry import define, raw
from dlkern.reference import rnn as reference
from dlkern.reference.rnn import GATES, GRU, LSTM, NO_OPTIONS, RELU, TANH, Options

__all__ = ["GATES", "GRU", "LSTM", "NO_OPTIONS", "RELU", "TANH", "Options", "rnn", "run", "sum_dtype"]


def sum_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype that sums over x are carried in, and masks have."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _forward_fake(
    input, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, h0, c0, batch_sizes, lengths, mode, reverse, keep
):
    state = weight_hh.shape[1]
    hidden = state if weight_hr is None else weight_hr.shape[1]
    rows = 0 if not keep else input.shape[0] if batch_sizes is not None else input.shape[0] * input.shape[1]
    batch, lstm = h0.shape[0], mode == LSTM
    slots = 4 if mode == GRU else GATES[mode]
    return (
        input.new_empty((*input.shape[:-1], state)), input.new_empty((batch, state)),
        input.new_empty((batch if lstm else 0, hidden)), input.new_empty((rows, slots * hidden), dtype=sum_dtype(input)),
        input.new_empty((rows if lstm else 0, hidden), dtype=sum_dtype(input)),
    )  # fmt: skip


def _backward_fake(
    grad_output, grad_h_n, grad_c_n, input, weight_ih, weight_hh, weight_hr, h0, c0, output, gates, cells, batch_sizes,
    lengths, mode, reverse, of_input, of_weight, of_bias,
):
    width, state = weight_hh.shape
    hidden = state if weight_hr is None else weight_hr.shape[1]
    return (
        input.new_empty(input.shape if of_input else (0,)), input.new_empty((width if of_weight else 0, input.shape[-1])),
        input.new_empty((width if of_weight else 0, state)), input.new_empty((width if of_bias else 0,)),
        input.new_empty((width if of_bias else 0,)),
        input.new_empty((state if of_weight and weight_hr is not None else 0, hidden)), input.new_empty(h0.shape),
        input.new_empty((h0.shape[0] if mode == LSTM else 0, hidden)),
    )  # fmt: skip


def _options_forward_fake(
    input, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, h0, c0, peephole, norm_ih, norm_hh, norm_c, norm_c_bias, mask,
    fresh_h, fresh_c, batch_sizes, lengths, mode, reverse, zoneout_h, zoneout_c, keep,
):
    found = _forward_fake(
        input, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, h0, c0, batch_sizes, lengths, mode, reverse, keep
    )
    rows, size = (0, 0) if norm_ih is None else (found[3].shape[0], _norm_size(mode, found[4].shape[1]))
    return *found, input.new_empty((rows, size), dtype=sum_dtype(input))


def _norm_size(mode: int, hidden: int) -> int:
    return 2 * GATES[mode] * hidden + (hidden if mode == LSTM else 0) + 3


def _options_backward_fake(
    grad_output, grad_h_n, grad_c_n, input, weight_ih, weight_hh, weight_hr, h0, c0, peephole, norm_ih, norm_hh, norm_c,
    norm_c_bias, mask, fresh_h, fresh_c, output, gates, cells, norms, batch_sizes, lengths, mode, reverse, zoneout_h, zoneout_c,
    of_input, of_weight, of_bias,
):
    found = _backward_fake(
        grad_output, grad_h_n, grad_c_n, input, weight_ih, weight_hh, weight_hr, h0, c0, output, gates, cells, batch_sizes,
        lengths, mode, reverse, of_input, of_weight, of_bias,
    )  # fmt: skip
    weights = (peephole, norm_ih, norm_hh, norm_c, norm_c_bias)
    return *found, *(input.new_empty(w.shape if of_weight and w is not None else (0,)) for w in weights)


define(
    "rnn_forward",
    "(Tensor input, Tensor weight_ih, Tensor weight_hh, Tensor? bias_ih, Tensor? bias_hh, Tensor? weight_hr, "
    "Tensor h0, Tensor? c0, Tensor? batch_sizes, Tensor? lengths, int mode, bool reverse, bool keep) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward_fake,
    triton="dlkern.kernels.rnn:rnn_forward",
)
define(
    "rnn_backward",
    "(Tensor grad_output, Tensor grad_h_n, Tensor? grad_c_n, Tensor input, Tensor weight_ih, Tensor weight_hh, "
    "Tensor? weight_hr, Tensor h0, Tensor? c0, Tensor output, Tensor gates, Tensor cells, Tensor? batch_sizes, "
    "Tensor? lengths, int mode, bool reverse, bool of_input, bool of_weight, bool of_bias) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward_fake,
    triton="dlkern.kernels.rnn:rnn_backward",
)
_OPTIONS = (
    "Tensor? peephole, Tensor? norm_ih, Tensor? norm_hh, Tensor? norm_c, Tensor? norm_c_bias, Tensor? mask, "
    "Tensor? fresh_h, Tensor? fresh_c, "
)
define(
    "rnn_options_forward",
    "(Tensor input, Tensor weight_ih, Tensor weight_hh, Tensor? bias_ih, Tensor? bias_hh, Tensor? weight_hr, "
    f"Tensor h0, Tensor? c0, {_OPTIONS}Tensor? batch_sizes, Tensor? lengths, int mode, bool reverse, float zoneout_h, "
    "float zoneout_c, bool keep) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _options_forward_fake,
    triton="dlkern.kernels._rnn_options:rnn_options_forward",
)
define(
    "rnn_options_backward",
    "(Tensor grad_output, Tensor grad_h_n, Tensor? grad_c_n, Tensor input, Tensor weight_ih, Tensor weight_hh, "
    f"Tensor? weight_hr, Tensor h0, Tensor? c0, {_OPTIONS}Tensor output, Tensor gates, Tensor cells, Tensor norms, "
    "Tensor? batch_sizes, Tensor? lengths, int mode, bool reverse, float zoneout_h, float zoneout_c, bool of_input, "
    "bool of_weight, bool of_bias) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _options_backward_fake,
    triton="dlkern.kernels._rnn_options:rnn_options_backward",
)
# How the cuda column would run a layer of these states: a key of _ROUTES.
define("rnn_route", "(Tensor h0, int mode, int steps, bool backward) -> int", lambda h0, mode, steps, backward: 0)
PUBLIC = ("rnn_tanh", "rnn_relu", "lstm", "gru")  # by mode: the names that trace() and columns know

for _op in PUBLIC:
    columns.declare(_op, "cpu", (torch.float32, torch.bfloat16, torch.float16, torch.float64))
    columns.declare(_op, "triton", (torch.float32, torch.bfloat16, torch.float16, torch.float64))
    columns.declare(_op, "cuda", (torch.float32, torch.bfloat16, torch.float16))

_forward, _backward = raw["rnn_forward"], raw["rnn_backward"]
_options_forward, _options_backward = raw["rnn_options_forward"], raw["rnn_options_backward"]

# One launch runs all steps with the weights in shared memory, or, for these reasons, there is one launch a step.
_ROUTES = {
    0: None, 1: None, 2: "the weights of 16 units do not fit a block's shared memory",
    3: "the blocks of a launch do not all run at once",
}  # fmt: skip

_PHASES = "launches for each step: a layer with options, or with a projection"


def _slower(h0: torch.Tensor, mode: int, steps: int) -> str:
    """Why the cuda column takes a launch a step, for trace(); "" where it does not."""
    for pass_ in ("forward", "backward"):
        reason = _ROUTES[raw["rnn_route"]["cuda"](h0, mode, steps, pass_ == "backward")]
        if reason is not None:
            return f"a launch a step in {pass_}: {reason}"
    return ""


# Tensors of a layer in the order of Rnn's arguments: input, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, h0, c0.
_LAYER = 8
# And of its options, with weights, then masks.
_WEIGHTS, _MASKS = 5, 3


def _numbers(x: torch.Tensor | None) -> list[int] | None:
    return None if x is None else x.tolist()


def _without_biases(layer):
    return *layer[:3], *layer[5:]


def _gradients(mode, grad_output, grad_h_n, grad_c_n, output, layer):
    """The three gradients, zeros where there is none; h0 and c0 of the layer are as large as h_n and c_n."""
    return (
        torch.zeros_like(output) if grad_output is None else grad_output,
        torch.zeros_like(layer[6]) if grad_h_n is None else grad_h_n,
        None if mode != LSTM else torch.zeros_like(layer[7]) if grad_c_n is None else grad_c_n,
    )


class RnnBackward(_autograd.Function):
    """The gradients of rnn's tensors; their own derivatives are the reference's."""

    @staticmethod
    def forward(grad_output, grad_h_n, grad_c_n, *args):
        layer, (output, gates, cells, batch_sizes, lengths, mode, reverse, need, column) = args[:_LAYER], args[_LAYER:]
        return _backward[column](
            grad_output, grad_h_n, grad_c_n, *_without_biases(layer), output, gates, cells, batch_sizes, lengths, mode, reverse,
            *need,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx, inputs, output):
        layer, (_, _, _, batch_sizes, lengths, *ctx.settings, _column) = inputs[3 : 3 + _LAYER], inputs[3 + _LAYER :]
        ctx.save_for_backward(*inputs[:3], *layer, batch_sizes, lengths)

    @staticmethod
    def backward(ctx, *cotangents):
        *tensors, batch_sizes, lengths = ctx.saved_tensors
        mode, reverse, need = ctx.settings
        sizes = _numbers(batch_sizes), _numbers(lengths)
        found = _second(
            lambda grads, layer: reference.rnn_backward(grads, layer, *sizes, mode, reverse), mode, need, tensors, cotangents
        )
        return *found, *([None] * 9)


def _second(backward, mode, need, tensors, cotangents):
    """Gradients of `tensors` (three gradients of results, of which RNN and GRU have two, and a layer's tensors) through
    backward(gradients, layer), which is a reference's, for cotangents of its results."""
    lstm, (of_input, of_weight, of_bias) = mode == LSTM, need
    grads, primals = tensors[: 3 if lstm else 2], tensors[3:]
    asked = (of_input, of_weight, of_weight, of_bias, of_bias, of_weight, True, lstm, *(of_weight,) * (len(primals) - _LAYER))
    wanted = tuple(w and t is not None for w, t in zip(asked, primals))
    present = [i for i, t in enumerate(primals) if t is not None]
    count = len(grads)

    def gradients(*values):
        full = [None] * len(primals)
        for i, value in zip(present, values[count:]):
            full[i] = value
        return tuple(g for g, w in zip(backward(values[:count], tuple(full)), wanted) if w)

    first = _autograd.vjp(gradients, (*grads, *(primals[i] for i in present)), tuple(
        c for c, w in zip(cotangents, wanted) if w
    ))  # fmt: skip
    of_primals = [None] * len(primals)
    for i, gradient in zip(present, first[count:]):
        of_primals[i] = gradient
    return *first[:count], *([None] * (3 - count)), *of_primals


class Rnn(_autograd.Function):
    """(output, h_n, c_n, gates, cells) of one layer in one direction; the last two are for the backward alone, and empty
    where it computes them anew."""

    @staticmethod
    def forward(*args):
        *rest, recompute, column = args
        return _forward[column](*rest, not recompute)

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        *tensors, batch_sizes, lengths, mode, reverse, recompute, column = inputs
        output, _, _, gates, cells = outputs
        ctx.mark_non_differentiable(gates, cells)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, output, gates, cells, batch_sizes, lengths)
        need = ctx.needs_input_grad
        weights, biases = any(need[1:6]), any(need[3:5])
        ctx.constants = mode, reverse, (need[0], weights, biases), need, recompute, column

    @staticmethod
    def backward(ctx, grad_output, grad_h_n, grad_c_n, _, __):
        saved = ctx.saved_tensors  # once: hooks on saved tensors, checkpointing's among them, give each away once
        layer, (output, gates, cells, *sizes) = saved[:_LAYER], saved[_LAYER:]
        mode, reverse, wanted, need, recompute, column = ctx.constants
        if recompute:
            *_, gates, cells = _forward[column](*layer, *sizes, mode, reverse, True)
        grads = _gradients(mode, grad_output, grad_h_n, grad_c_n, output, layer)
        if torch.is_grad_enabled():
            found = _autograd.apply(
                RnnBackward, *grads, *layer, output, gates, cells, *sizes, mode, reverse, wanted, column
            )  # fmt: skip
        else:
            found = _backward[column](*grads, *_without_biases(layer), output, gates, cells, *sizes, mode, reverse, *wanted)
        return *(g if n else None for g, n in zip(found, need)), *([None] * 6)


class RnnOptionsBackward(_autograd.Function):
    """RnnBackward of a layer with options."""

    @staticmethod
    def forward(grad_output, grad_h_n, grad_c_n, *args):
        tensors, (*rest, need, column) = args[: _LAYER + _WEIGHTS + _MASKS], args[_LAYER + _WEIGHTS + _MASKS :]
        return _options_backward[column](grad_output, grad_h_n, grad_c_n, *_without_biases(tensors), *rest, *need)

    @staticmethod
    def setup_context(ctx, inputs, output):
        count = 3 + _LAYER + _WEIGHTS + _MASKS
        tensors, (_, _, _, _, batch_sizes, lengths, *ctx.settings, _column) = inputs[:count], inputs[count:]
        ctx.save_for_backward(*tensors, batch_sizes, lengths)

    @staticmethod
    def backward(ctx, *cotangents):
        *tensors, mask, fresh_h, fresh_c, batch_sizes, lengths = ctx.saved_tensors
        mode, reverse, zoneout_h, zoneout_c, need = ctx.settings
        options = Options(None, None, None, None, None, mask, fresh_h, fresh_c, zoneout_h, zoneout_c)
        sizes = _numbers(batch_sizes), _numbers(lengths)
        found = _second(
            lambda grads, layer: reference.rnn_backward(grads, layer, *sizes, mode, reverse, options), mode, need, tensors,
            cotangents,
        )  # fmt: skip
        return *found, *([None] * (_MASKS + 12))


class RnnOptions(_autograd.Function):
    """Rnn of a layer with options; what its normalisations leave is the last result."""

    @staticmethod
    def forward(*args):
        *rest, recompute, column = args
        return _options_forward[column](*rest, not recompute)

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        *tensors, batch_sizes, lengths, mode, reverse, zoneout_h, zoneout_c, recompute, column = inputs
        output, _, _, *saved = outputs
        ctx.mark_non_differentiable(*saved)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, output, *saved, batch_sizes, lengths)
        need = ctx.needs_input_grad
        weights = any(need[1:6]) or any(need[_LAYER : _LAYER + _WEIGHTS])
        ctx.constants = (mode, reverse, zoneout_h, zoneout_c), (need[0], weights, any(need[3:5])), need, recompute, column

    @staticmethod
    def backward(ctx, grad_output, grad_h_n, grad_c_n, *_):
        *tensors, output, gates, cells, norms, batch_sizes, lengths = ctx.saved_tensors
        settings, wanted, need, recompute, column = ctx.constants
        rest = batch_sizes, lengths, *settings
        if recompute:
            *_, gates, cells, norms = _options_forward[column](*tensors, *rest, True)
        grads = _gradients(settings[0], grad_output, grad_h_n, grad_c_n, output, tensors)
        saved = output, gates, cells, norms
        if torch.is_grad_enabled():
            found = _autograd.apply(RnnOptionsBackward, *grads, *tensors, *saved, *rest, wanted, column)
        else:
            found = _options_backward[column](*grads, *_without_biases(tensors), *saved, *rest, *wanted)
        return *(g if n else None for g, n in zip(found, need)), *([None] * (_MASKS + 8))


def rnn(
    input: torch.Tensor, weight_ih: torch.Tensor, weight_hh: torch.Tensor, bias_ih: torch.Tensor | None,
    bias_hh: torch.Tensor | None, weight_hr: torch.Tensor | None, h0: torch.Tensor, c0: torch.Tensor | None,
    batch_sizes: torch.Tensor | None, lengths: torch.Tensor | None, mode: int, reverse: bool, recompute: bool = False,
    options: Options = NO_OPTIONS,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """output, h_n and c_n (None but for LSTM) of one layer in one direction; arguments are valid.

    Args:
        input: [T, B, I], or with batch_sizes (int64, on the CPU) [rows, I].
        weight_ih, weight_hh: [gates·H, I] and [gates·H, S]; bias_ih, bias_hh: [gates·H] or None.
        weight_hr: [S, H] of an LSTM with a projection, else None, and S is H.
        h0, c0: [B, S] and [B, H].
        lengths: of each sequence of [T, B, I], int64 on the CPU, or None: beyond them, output is zero.
        mode, reverse: as in dlkern.reference.rnn.
        recompute: keep no gates for the backward, which then runs the sequence once more.
        options: what the layer has beyond torch's.
    """
    tensors = (input, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, h0, c0)
    column, phases = "reference", False
    if not _autograd.use_reference():
        choice = columns.choose(
            PUBLIC[mode], input.device.type, input.dtype, columns.state.forced, columns.state.emulated
        )
        column = choice.column
        # The GPU columns project in a phase of its own, as a step with options has them.
        phases = options is not NO_OPTIONS or (weight_hr is not None and column != "cpu")
        if tracing.active:
            reason = choice.reason
            if column == "cuda" and not torch.compiler.is_compiling():
                steps = input.shape[0] if batch_sizes is None else batch_sizes.shape[0]
                reason = reason or (_PHASES if phases else _slower(h0, mode, steps))
            tracing.record(PUBLIC[mode], column, reason, input, weight_ih, weight_hh)
    if column == "reference":
        results = reference.rnn(*tensors, _numbers(batch_sizes), _numbers(lengths), mode, reverse, options)
        return results[0], results[1], results[2] if mode == LSTM else None
    if phases:
        *more, zoneout_h, zoneout_c = options
        with_options = (*tensors, *more, batch_sizes, lengths, mode, reverse, zoneout_h, zoneout_c)
        if _autograd.needs_grad(*tensors, *more[:_WEIGHTS]):
            output, h_n, c_n, *_ = _autograd.apply(RnnOptions, *with_options, recompute, column)
        else:
            output, h_n, c_n, *_ = _options_forward[column](*with_options, False)
        return output, h_n, c_n if mode == LSTM else None
    args = (*tensors, batch_sizes, lengths, mode, reverse)
    if _autograd.needs_grad(*tensors):
        output, h_n, c_n, _, _ = _autograd.apply(Rnn, *args, recompute, column)
    else:
        output, h_n, c_n, _, _ = _forward[column](*args, False)
    return output, h_n, c_n if mode == LSTM else None


def run(
    column, input, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, h0, c0, batch_sizes, lengths, mode, reverse, recompute
):
    """rnn without options on a given column, for a plain call (see _plain.py); c_n is empty but for LSTM."""
    tensors = (input, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, h0, c0)
    wanted = False
    for tensor in tensors:
        wanted = wanted or (tensor is not None and tensor.requires_grad)
    if wanted and _autograd.recording():
        found = Rnn.fast_apply(*tensors, batch_sizes, lengths, mode, reverse, recompute, column)
    else:
        found = _forward[column](*tensors, batch_sizes, lengths, mode, reverse, False)
    return found[:3]

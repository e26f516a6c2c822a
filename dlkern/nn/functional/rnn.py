"""Recurrent networks with the signatures of torch.lstm, torch.gru, torch.rnn_tanh and torch.rnn_relu: stacks of layers
in one or both directions, padded or packed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from dlkern import ops
from dlkern import trace as tracing
from dlkern.nn.functional._autocast import autocasts, lowered
from dlkern.nn.functional.dropout import dropout as drop
from dlkern.ops.rnn import GATES, GRU, LSTM, NO_OPTIONS, RELU, TANH, Options, sum_dtype
from dlkern.reference.rnn import weights_of

__all__ = ["gru", "lstm", "rnn_relu", "rnn_tanh"]

_PADDED = ("input", "hx", "params", "has_biases", "num_layers", "dropout", "train", "bidirectional", "batch_first")
_PACKED = ("data", "batch_sizes", "hx", "params", "has_biases", "num_layers", "dropout", "train", "bidirectional")


class Extras(NamedTuple):
    """The options of a stack that torch's has not."""

    weights: Sequence[Sequence[torch.Tensor | None]]  # of each layer and direction, the first fields of Options
    recurrent_dropout: float
    zoneout: tuple[float, float]  # of state and cell

    def of_layer(self, i: int, x: torch.Tensor, h0: torch.Tensor, c0: torch.Tensor | None, train: bool) -> Options:
        """The options of the i-th layer and direction, masks drawn; x, h0 and c0 as ops.rnn.rnn takes them."""

        def drawn(size: Sequence[int], p: float) -> torch.Tensor | None:
            return drop(x.new_ones(size, dtype=sum_dtype(x)), p, True) if train and p else None

        weights, (of_h, of_c) = self.weights[i], self.zoneout
        if all(w is None for w in weights) and not (of_h or of_c or (train and self.recurrent_dropout)):
            return NO_OPTIONS
        mask = drawn(h0.shape, self.recurrent_dropout)
        fresh_h = drawn((*x.shape[:-1], h0.shape[-1]), of_h)
        fresh_c = None if c0 is None else drawn((*x.shape[:-1], c0.shape[-1]), of_c)
        return Options(*weights, mask, fresh_h, fresh_c, of_h, of_c)  # type: ignore[call-arg, arg-type]


def _is_lowered(x: torch.Tensor) -> bool:
    return autocasts(x) and x.dtype == torch.get_autocast_dtype(x.device.type)


def autocast(
    mode: int, x: torch.Tensor, states: Sequence[torch.Tensor], params: Sequence[torch.Tensor], packed: bool = False
) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    """The operands as torch.autocast has them. GRU, and on a CPU packed LSTM, are no ops of its lists: torch lowers their
    products, and states keep the input's dtype, so that only an input which is lowered already makes it all lowered."""
    kept = mode == GRU or (mode == LSTM and packed and x.device.type == "cpu")
    if _is_lowered(x) if kept else autocasts(x):
        x, *rest = lowered(x, *states, *params)  # type: ignore[assignment]
        return x, rest[: len(states)], rest[len(states) :]  # type: ignore[return-value]
    return x, list(states), list(params)


def unusual(
    mode: int, x: torch.Tensor, batch_sizes: torch.Tensor | None, states: Sequence[torch.Tensor],
    params: Sequence[torch.Tensor], biases: bool, layers: int, directions: int,
) -> str | None:
    """What of a call is outside our kernels (torch takes it, or raises its own error), or None. x is [T, B, I] or packed
    [rows, I], states are [layers · directions, B, S] and, LSTM's, [layers · directions, B, H]."""
    if x.dim() != (3 if batch_sizes is None else 2):
        return "input is not [T, B, I], or packed [rows, I]"
    if not x.is_floating_point() or any(t.dtype != x.dtype or t.device != x.device for t in (*states, *params)):
        return "input, states and weights differ in dtype or device, or are not floating point"
    if len(states) != (2 if mode == LSTM else 1) or any(t.dim() != 3 for t in states):
        return "states are missing, or not [layers · directions, B, H]"
    state, hidden = states[0].shape[-1], states[-1].shape[-1]
    step = 2 + 2 * biases + (state != hidden)
    if len(params) != layers * directions * step:
        return "weights are missing"
    if 0 in x.shape:
        return "a dimension is zero"
    if batch_sizes is None:
        batch = x.shape[1]
    else:
        if batch_sizes.dtype != torch.int64 or batch_sizes.dim() != 1 or batch_sizes.device.type != "cpu":
            return "batch_sizes is not a 1-D int64 tensor on the CPU"
        batch = states[0].shape[1]
    if 0 in (state, hidden) or any(t.shape[:2] != (layers * directions, batch) for t in states):
        return "a state is not [layers · directions, B, H]"
    for i in range(layers * directions):
        inputs = x.shape[-1] if i < directions else directions * state
        width = GATES[mode] * hidden
        sizes: list[tuple[int, ...]] = [(width, inputs), (width, state)]
        sizes += ([(width,)] * 2 if biases else []) + ([(state, hidden)] if state != hidden else [])
        if any(tuple(p.shape) != size for p, size in zip(params[i * step : (i + 1) * step], sizes)):
            return "weights do not fit"
    return None


def stack(
    mode: int, x: torch.Tensor, batch_sizes: torch.Tensor | None, states: Sequence[torch.Tensor],
    params: Sequence[torch.Tensor], biases: bool, layers: int, dropout: float, train: bool, directions: int,
    lengths: torch.Tensor | None = None, recompute: bool = False, extras: Extras | None = None, column: str | None = None,
) -> tuple[torch.Tensor, ...]:
    """output and the last states; arguments as in `unusual`, which found nothing, after `autocast`, and in ops.rnn.rnn. With
    the column of a plain call (see ops/_plain.py) the raw ops find what is unusual."""
    if extras is not None and _is_lowered(x):
        extras = extras._replace(weights=[lowered(x, *weights)[1:] for weights in extras.weights])
    projects = mode == LSTM and states[0].shape[-1] != states[1].shape[-1]
    initial = [state.unbind(0) for state in states]
    ends: list[list[torch.Tensor]] = [[] for _ in states]
    for layer in range(layers):
        outputs = []
        for direction in range(directions):
            i = layer * directions + direction
            weights: Any = weights_of(params, i, biases, projects)
            h0, c0 = initial[0][i], initial[1][i] if mode == LSTM else None
            args: Any = (x, *weights, h0, c0, batch_sizes, lengths, mode, direction == 1, recompute)
            if column is not None:
                output, *last = ops.rnn.run(column, *args)
            else:
                options = NO_OPTIONS if extras is None else extras.of_layer(i, x, h0, c0, train)
                output, *last = ops.rnn.rnn(*args, options)  # type: ignore[call-arg]
            outputs.append(output)
            for end, state in zip(ends, last):
                end.append(state)  # type: ignore[arg-type]
        x = outputs[0] if directions == 1 else torch.cat(outputs, -1)
        if dropout and train and layer + 1 < layers:
            x = drop(x, dropout, True)
    return x, *(end[0].unsqueeze(0) if len(end) == 1 else torch.stack(end) for end in ends)


def _call(mode: int, theirs: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    names = _PADDED
    if "batch_sizes" in options or (
        len(args) > 2 and isinstance(args[1], torch.Tensor) and (mode == LSTM or isinstance(args[2], torch.Tensor))
    ):
        names = _PACKED
    given = dict(zip(names, args), **options)
    reason: str | None = "arguments that torch refuses"
    if len(args) <= len(names) and set(given) == set(names):
        x, hx, batch_sizes = given[names[0]], given["hx"], given.get("batch_sizes")
        states, params = list(hx) if mode == LSTM else [hx], list(given["params"])
        layers, directions = given["num_layers"], 2 if given["bidirectional"] else 1
        first = bool(given.get("batch_first"))
        try:
            x = x.transpose(0, 1) if first else x
            x, states, params = autocast(mode, x, states, params, batch_sizes is not None)
            reason = unusual(mode, x, batch_sizes, states, params, given["has_biases"], layers, directions)
        except (AttributeError, IndexError, RuntimeError, TypeError):
            pass  # torch says what is wrong
    if reason is not None:
        if tracing.active and args and isinstance(args[0], torch.Tensor):
            tracing.record(ops.rnn.PUBLIC[mode], "torch", reason, args[0])
        return theirs(*args, **options)
    output, *last = stack(
        mode, x, batch_sizes, states, params, given["has_biases"], layers, given["dropout"], given["train"], directions
    )
    return output.transpose(0, 1) if first else output, *last


def lstm(*args: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """torch.lstm: (input, hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first), or packed
    (data, batch_sizes, hx, params, has_biases, num_layers, dropout, train, bidirectional).

    Args:
        input: [T, B, I], or [B, T, I] with batch_first; data: [rows, I] as in a PackedSequence, batch_sizes int64 [T].
        hx: (h0, c0), [num_layers · directions, B, S] and [num_layers · directions, B, H].
        params: weight_ih [4·H, I], weight_hh [4·H, S] (gates i, f, g, o), with has_biases bias_ih and bias_hh [4·H], and
            where S is not H weight_hr [S, H], for each layer and direction.
        dropout: probability between layers, where train.

    Returns:
        output [T, B, directions · S] (or packed), h_n and c_n like hx, by
        c_t = σ(f)·c_{t-1} + σ(i)·tanh(g), h_t = σ(o)·tanh(c_t), (i, f, g, o) = W_ih x_t + b_ih + W_hh h_{t-1} + b_hh
        (Hochreiter and Schmidhuber 1997, with the forget gates of Gers et al. 2000); with weight_hr, h_t is multiplied by
        it (Sak et al. 2014).

    Raises:
        RuntimeError, TypeError: torch's own, for wrong arguments.
    """
    return _call(LSTM, torch.lstm, args, options)  # type: ignore[return-value]


def gru(*args: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """torch.gru: as lstm, but hx is h0 alone, gates are (r, z, n), and
    r = σ(W_ir x + b_ir + W_hr h + b_hr), z likewise, n = tanh(W_in x + b_in + r·(W_hn h + b_hn)),
    h_t = (1 - z)·n + z·h_{t-1} (Cho et al. 2014, in cuDNN's form)."""
    return _call(GRU, torch.gru, args, options)  # type: ignore[return-value]


def rnn_tanh(*args: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """torch.rnn_tanh: as gru, with h_t = tanh(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh) (Elman 1990)."""
    return _call(TANH, torch.rnn_tanh, args, options)  # type: ignore[return-value]


def rnn_relu(*args: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """torch.rnn_relu: as rnn_tanh, with max(0, ·) for tanh."""
    return _call(RELU, torch.rnn_relu, args, options)  # type: ignore[return-value]

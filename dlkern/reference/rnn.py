"""RNN, LSTM and GRU in plain torch expressions, one layer in one direction, step by step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.nn.functional import layer_norm, linear

__all__ = [
    "GATES", "GRU", "LSTM", "NO_OPTIONS", "RELU", "TANH", "Options", "gru", "lstm", "rnn", "rnn_backward", "rnn_relu",
    "rnn_tanh", "weights_of",
]

TANH, RELU, LSTM, GRU = range(4)  # csrc/cpu/rnn.h has the same
GATES = (1, 1, 4, 3)

Tensors = tuple[torch.Tensor, ...]


class Options(NamedTuple):
    """What a layer has beyond torch's; None and 0 where an option is off. Shapes as in `rnn`."""

    peephole: torch.Tensor | None = None  # [3, H], of i, f and o
    norm_ih: torch.Tensor | None = None  # [gates·H]
    norm_hh: torch.Tensor | None = None  # [gates·H]
    norm_c: torch.Tensor | None = None  # [H], LSTM's
    norm_c_bias: torch.Tensor | None = None  # [H]
    mask: torch.Tensor | None = None  # [B, S]: factors of the state in the recurrent product
    fresh_h: torch.Tensor | None = None  # like output: 0 where a unit stays what it was
    fresh_c: torch.Tensor | None = None  # likewise of LSTM's cell
    zoneout_h: float = 0.0  # the share of what a unit was, where there is no fresh_h
    zoneout_c: float = 0.0


NO_OPTIONS = Options()


def _normalized(x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None) -> torch.Tensor:
    """x, or where there is a weight its layer normalisation, with the bias then."""
    if weight is None:
        return x if bias is None else x + bias
    return layer_norm(x, x.shape[-1:], weight, bias)


def _zoned_out(new: torch.Tensor, old: torch.Tensor, fresh: torch.Tensor | None, share: float) -> torch.Tensor:
    if fresh is not None:
        return torch.where(fresh != 0, new, old)
    return share * old + (1 - share) * new if share else new


def _cell(
    x: torch.Tensor, h: torch.Tensor, c: torch.Tensor | None, weight_hh: torch.Tensor, bias_hh: torch.Tensor | None,
    weight_hr: torch.Tensor | None, mode: int, options: Options,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The next state (and LSTM's next cell) of a step whose input's part of the gates is x. The options' mask, fresh_h and
    fresh_c are the step's."""
    masked = h if options.mask is None else (h * options.mask).to(h.dtype)
    if options.norm_hh is None:
        recurrent = linear(masked, weight_hh, bias_hh)
    else:
        recurrent = _normalized(linear(masked, weight_hh), options.norm_hh, bias_hh)
    new_c = None
    if mode == LSTM:
        assert c is not None
        i, f, g, o = (x + recurrent).chunk(4, -1)
        if options.peephole is not None:
            i, f = i + options.peephole[0] * c, f + options.peephole[1] * c
        made = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        if options.peephole is not None:
            o = o + options.peephole[2] * made
        new = torch.sigmoid(o) * torch.tanh(_normalized(made, options.norm_c, options.norm_c_bias))
        new = new if weight_hr is None else linear(new, weight_hr)
        new_c = _zoned_out(made, c, options.fresh_c, options.zoneout_c)
    elif mode == GRU:
        (x_r, x_z, x_n), (h_r, h_z, h_n) = x.chunk(3, -1), recurrent.chunk(3, -1)
        z = torch.sigmoid(x_z + h_z)
        n = torch.tanh(x_n + torch.sigmoid(x_r + h_r) * h_n)
        new = n + z * (h - n)
    else:
        new = (torch.tanh if mode == TANH else torch.relu)(x + recurrent)
    return _zoned_out(new, h, options.fresh_h, options.zoneout_h), new_c


def rnn(
    input: torch.Tensor, weight_ih: torch.Tensor, weight_hh: torch.Tensor, bias_ih: torch.Tensor | None,
    bias_hh: torch.Tensor | None, weight_hr: torch.Tensor | None, h0: torch.Tensor, c0: torch.Tensor | None,
    batch_sizes: Sequence[int] | None, lengths: Sequence[int] | None, mode: int, reverse: bool,
    options: Options = NO_OPTIONS,
) -> Tensors:
    """output and h_n, and c_n for LSTM.

    Args:
        input: [T, B, I]; or, with batch_sizes, [sum of batch_sizes, I] in the order of a PackedSequence.
        weight_ih, weight_hh, bias_ih, bias_hh: as torch.nn.LSTM has them; biases may be None.
        weight_hr: [S, H], an LSTM's projection, or None.
        h0, c0: [B, S], where S is H without a projection, and [B, H].
        batch_sizes: rows of each step.
        lengths: of the sequences of [T, B, I], in any order: they are packed, and what is beyond them is zero.
        mode: TANH, RELU, LSTM or GRU.
        reverse: from the last step of each sequence to the first.
        options: what the layer has beyond torch's.
    """
    if lengths is not None:
        order = sorted(range(len(lengths)), key=lambda b: -lengths[b])
        sizes = [sum(length > t for length in lengths) for t in range(max(lengths))]
        rows = torch.tensor([t * len(lengths) + order[b] for t, size in enumerate(sizes) for b in range(size)])
        there, back = torch.tensor(order, device=input.device), torch.tensor(order, device=input.device).argsort()
        rows = rows.to(input.device)
        states = h0[there], None if c0 is None else c0[there]
        packed = input.flatten(0, 1)[rows]
        options = options._replace(
            mask=None if options.mask is None else options.mask[there],
            fresh_h=None if options.fresh_h is None else options.fresh_h.flatten(0, 1)[rows],
            fresh_c=None if options.fresh_c is None else options.fresh_c.flatten(0, 1)[rows],
        )
        output, *ends = rnn(
            packed, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, *states, sizes, None, mode, reverse, options
        )
        padded = output.new_zeros(input.shape[0] * input.shape[1], output.shape[-1]).index_copy(0, rows, output)
        return padded.reshape(*input.shape[:-1], -1), *(end[back] for end in ends)
    sizes = [input.shape[1]] * input.shape[0] if batch_sizes is None else list(batch_sizes)
    inputs = input.flatten(0, -2)
    if options.norm_ih is None:
        inputs = linear(inputs, weight_ih, bias_ih)
    else:
        inputs = _normalized(linear(inputs, weight_ih), options.norm_ih, bias_ih)
    steps = inputs.split(sizes)
    fresh_h, fresh_c = (
        [None] * len(sizes) if fresh is None else fresh.flatten(0, -2).split(sizes)
        for fresh in (options.fresh_h, options.fresh_c)
    )

    def step(t: int, h: torch.Tensor, c: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        mask = None if options.mask is None else options.mask[: sizes[t]]
        of_step = options._replace(mask=mask, fresh_h=fresh_h[t], fresh_c=fresh_c[t])
        return _cell(steps[t], h, c, weight_hh, bias_hh, weight_hr, mode, of_step)

    outputs: list[torch.Tensor] = []
    batch = h0.shape[0]
    if not reverse:
        h, c = h0, c0
        ended_h: list[torch.Tensor] = []  # states of sequences that are over, the last ones first
        ended_c: list[torch.Tensor] = []
        for t, size in enumerate(sizes):
            if size < h.shape[0]:
                ended_h.insert(0, h[size:])
                h = h[:size]
                if c is not None:
                    ended_c.insert(0, c[size:])
                    c = c[:size]
            h, c = step(t, h, c)
            outputs.append(h)
        h = torch.cat([h, *ended_h])
        c = torch.cat([c, *ended_c]) if c is not None else None
    else:
        h, c = h0[:0], None if c0 is None else c0[:0]
        for t, size in reversed(list(enumerate(sizes))):
            if size > h.shape[0]:  # sequences that begin, from their end
                start = h.shape[0]
                h = torch.cat([h, h0[start:size]])
                if c is not None and c0 is not None:
                    c = torch.cat([c, c0[start:size]])
            h, c = step(t, h, c)
            outputs.insert(0, h)
    assert h.shape[0] == batch
    output = torch.cat(outputs).reshape(*input.shape[:-1], h0.shape[-1])
    return (output, h) if c is None else (output, h, c)


def rnn_backward(
    grads: Tensors, tensors: tuple[torch.Tensor | None, ...], batch_sizes: Sequence[int] | None,
    lengths: Sequence[int] | None, mode: int, reverse: bool, options: Options = NO_OPTIONS,
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of rnn's eight tensors, and of any behind them, which are the options' first ones (None for what is None),
    of those of its results."""
    present = [i for i, t in enumerate(tensors) if t is not None]

    def of_present(*values: torch.Tensor) -> Tensors:
        full: list[Any] = list(tensors)
        for i, value in zip(present, values):
            full[i] = value
        return rnn(*full[:8], batch_sizes, lengths, mode, reverse, Options(*full[8:], *options[len(full) - 8 :]))  # type: ignore[call-arg]

    _, pull = torch.func.vjp(of_present, *[tensors[i] for i in present])  # type: ignore[misc]
    found: list[torch.Tensor | None] = [None] * len(tensors)
    for i, gradient in zip(present, pull(tuple(grads))):
        found[i] = gradient
    return tuple(found)


def weights_of(params: Sequence[torch.Tensor], i: int, biases: bool, projects: bool) -> tuple[torch.Tensor | None, ...]:
    """weight_ih, weight_hh, bias_ih, bias_hh and weight_hr of the i-th layer and direction; None for what there is not."""
    count = 2 + 2 * biases + projects
    some = params[count * i : count * (i + 1)]
    return *some[:2], *(some[2:4] if biases else (None, None)), some[-1] if projects else None


def _stack(
    mode: int, x: torch.Tensor, hx: Any, params: Sequence[torch.Tensor], biases: bool, layers: int, directions: int
) -> Tensors:
    states = hx if mode == LSTM else (hx,)
    projects = mode == LSTM and states[0].shape[-1] != states[1].shape[-1]  # type: ignore[misc]
    ends: list[list[torch.Tensor]] = [[] for _ in states]
    for layer in range(layers):
        outputs = []
        for direction in range(directions):
            i = layer * directions + direction
            h0, c0 = [*(state[i] for state in states), None][:2]
            weights: Any = weights_of(params, i, biases, projects)
            output, *last = rnn(x, *weights, h0, c0, None, None, mode, direction == 1)  # type: ignore[call-arg]
            outputs.append(output)
            for end, state in zip(ends, last):
                end.append(state)
        x = torch.cat(outputs, -1)
    return x, *(torch.stack(end) for end in ends)


def _whole(mode: int) -> Any:
    def whole(input, hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first):  # type: ignore[no-untyped-def]
        """torch's function of that name, of a padded input and without dropout."""
        x = input.transpose(0, 1) if batch_first else input
        output, *last = _stack(mode, x, hx, params, has_biases, num_layers, 2 if bidirectional else 1)
        return output.transpose(0, 1) if batch_first else output, *last

    return whole


rnn_tanh, rnn_relu, lstm, gru = (_whole(mode) for mode in (TANH, RELU, LSTM, GRU))

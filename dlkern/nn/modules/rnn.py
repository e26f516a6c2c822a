"""Recurrent modules."""

from __future__ import annotations

import importlib.util
import sys
from importlib.abc import MetaPathFinder
from typing import Any, ClassVar

import torch
from torch.nn.utils.rnn import PackedSequence

from dlkern import ops
from dlkern import trace as tracing
from dlkern.nn.functional import rnn as functional
from dlkern.nn.functional._autocast import autocasts
from dlkern.ops import _plain
from dlkern.ops.rnn import GRU as _GRU
from dlkern.ops.rnn import LSTM as _LSTM
from dlkern.ops.rnn import RELU, TANH

__all__ = ["GRU", "LSTM", "RNN", "GRUCell", "LSTMCell", "RNNCell"]

_MODES = {"RNN_TANH": TANH, "RNN_RELU": RELU, "LSTM": _LSTM, "GRU": _GRU}


class _AllowRnn(MetaPathFinder):
    """Sets Dynamo's allow_rnn when Dynamo is first imported (that takes seconds, so nobody should pay for it sooner)."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if fullname != _DYNAMO_CONFIG:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module: Any) -> None:
                run(module)
                module.allow_rnn = True

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


_DYNAMO_CONFIG = "torch._dynamo.config"


def allow_in_dynamo() -> None:
    """Lets torch.compile into recurrent modules: without its setting allow_rnn it stops at any subclass of torch's."""
    if _DYNAMO_CONFIG in sys.modules:
        sys.modules[_DYNAMO_CONFIG].allow_rnn = True  # type: ignore[attr-defined]
    elif not any(isinstance(finder, _AllowRnn) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AllowRnn())


def _as_states(mode: int, hx: Any) -> list[torch.Tensor]:
    return list(hx) if mode == _LSTM else [hx]


def _as_hidden(mode: int, states: list[torch.Tensor]) -> Any:
    return tuple(states) if mode == _LSTM else states[0]


class _WithOptions(torch.nn.Module):
    """The options that torch's modules do not have; LSTM's docstring says what they are."""

    layer_norm: bool = False
    recurrent_dropout: float = 0.0
    zoneout: float | tuple[float, float] = 0.0
    peephole: bool = False

    _suffixes: list[str]  # what the names of each layer's and direction's parameters end in

    def _set_options(
        self, lstm: bool, layer_norm: bool, recurrent_dropout: float, zoneout: Any, peephole: bool
    ) -> None:
        pair = tuple(zoneout) if isinstance(zoneout, (tuple, list)) else (zoneout, zoneout)
        for name, p in (("recurrent_dropout", recurrent_dropout), *(("zoneout", p) for p in pair)):
            if not isinstance(p, (int, float)) or isinstance(p, bool) or not 0 <= p <= 1:
                raise ValueError(f"{name} should be a number in range [0, 1], got {p!r}")
        if isinstance(zoneout, (tuple, list)) and (not lstm or len(pair) != 2):
            raise ValueError(f"zoneout: expected one number or, for an LSTM, (state, cell), got {zoneout!r}")
        for name, on in (("layer_norm", layer_norm), ("peephole", peephole)):
            if not isinstance(on, bool):
                raise TypeError(f"{name} should be of type bool, got: {type(on).__name__}")
        if peephole and not lstm:
            raise ValueError("peephole: only an LSTM has a cell to look at")
        self.layer_norm, self.recurrent_dropout, self.peephole = layer_norm, recurrent_dropout, peephole
        self.zoneout = pair if pair[0] != pair[-1] else pair[0]
        hidden: Any = self.hidden_size
        for suffix in self._suffixes:
            like: Any = getattr(self, f"weight_hh{suffix}")
            shapes: dict[str, Any] = {"weight_peephole": (3, hidden)} if peephole else {}
            if layer_norm:
                shapes |= {"layer_norm_ih": like.shape[:1], "layer_norm_hh": like.shape[:1]}
                if lstm:
                    shapes |= {"layer_norm_c": (hidden,)} | ({"layer_norm_c_bias": (hidden,)} if self.bias else {})
            for name, shape in shapes.items():
                parameter = torch.nn.Parameter(torch.empty(shape, dtype=like.dtype, device=like.device))
                self.register_parameter(name + suffix, parameter)
        self._reset_options()

    def _reset_options(self) -> None:
        hidden: Any = self.hidden_size
        bound = hidden**-0.5
        with torch.no_grad():
            for name, parameter in self.named_parameters(recurse=False):
                if name.startswith("weight_peephole"):
                    parameter.uniform_(-bound, bound)
                elif name.startswith("layer_norm"):
                    parameter.fill_(0.0 if name.startswith("layer_norm_c_bias") else 1.0)

    def reset_parameters(self) -> None:
        super().reset_parameters()  # type: ignore[misc]
        self._reset_options()

    @property
    def beyond_torch(self) -> bool:
        """Whether an option is on, so that torch's class would compute something else."""
        return bool(
            self.layer_norm or self.recurrent_dropout or self.peephole or (self.zoneout and self._pair != (0, 0))
        )

    @property
    def _pair(self) -> tuple[float, float]:
        return self.zoneout if isinstance(self.zoneout, tuple) else (self.zoneout, self.zoneout)

    def _extras(self, lstm: bool) -> functional.Extras | None:
        if not self.beyond_torch:
            return None
        names = ("weight_peephole", "layer_norm_ih", "layer_norm_hh", "layer_norm_c", "layer_norm_c_bias")
        weights = [[getattr(self, name + suffix, None) for name in names] for suffix in self._suffixes]
        of_h, of_c = self._pair
        return functional.Extras(weights, self.recurrent_dropout, (of_h, of_c if lstm else 0.0))

    def _by_torch(self, reason: str, *args: Any) -> Any:
        """torch's answer to a call that our kernels do not take; without options, or where it is an error or empty."""
        result = super().forward(*args)  # type: ignore[misc]
        output = result[0] if isinstance(result, tuple) else result
        if self.beyond_torch and output.numel():
            raise ValueError(f"{type(self).__name__} with options: {reason}")
        return result

    def extra_repr(self) -> str:
        options = {name: getattr(self, name) for name in ("layer_norm", "recurrent_dropout", "zoneout", "peephole")}
        return ", ".join([super().extra_repr(), *(f"{name}={value}" for name, value in options.items() if value)])


class _Recurrent(_WithOptions, torch.nn.RNNBase):
    """What RNN, LSTM and GRU share. Beside torch's arguments forward takes `lengths`: int64 [B] on the CPU, of a padded
    batch in any order; outputs beyond a sequence's length are zero, last states are those of its last step, what the
    input holds there has no effect, and nothing is packed. The argument and attribute `save` says what a forward pass
    keeps for the backward: "gates", or "recompute", which keeps none (RNN's H numbers a step and sequence, GRU's 4 · H,
    LSTM's 5 · H) and runs each layer once more instead; results have the same bits."""

    save: str = "gates"

    def __init__(
        self, *args: Any, save: str = "gates", layer_norm: bool = False, recurrent_dropout: float = 0.0,
        zoneout: float | tuple[float, float] = 0.0, peephole: bool = False, **options: Any,
    ) -> None:
        if save not in ("gates", "recompute"):
            raise ValueError(f'save: expected "gates" or "recompute", got {save!r}')
        super().__init__(*args, **options)
        self.save = save
        self._set_options(self.mode == "LSTM", layer_norm, recurrent_dropout, zoneout, peephole)
        allow_in_dynamo()

    @property
    def _suffixes(self) -> list[str]:  # type: ignore[override]
        return [names[0].removeprefix("weight_ih") for names in self._all_weights]

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)
        allow_in_dynamo()

    def forward(self, input: Any, hx: Any = None, lengths: torch.Tensor | None = None) -> Any:  # type: ignore[override]
        if lengths is not None:
            self._check_lengths(input, lengths)
        mode = _MODES[self.mode]
        try:
            x = input.data if isinstance(input, PackedSequence) else input
            column = None if self.beyond_torch or self.proj_size else _plain.column(ops.rnn.PUBLIC[mode], x)
            if column is not None:
                return self._run(mode, input, hx, lengths, column)
        except _plain.REFUSALS:
            pass  # the long way says what is wrong
        return self._run(mode, input, hx, lengths, None)

    def _run(self, mode: int, input: Any, hx: Any, lengths: torch.Tensor | None, column: str | None) -> Any:
        """forward; of a plain call (see ops/_plain.py) on its column."""
        found = self._arguments(mode, input, hx, column)
        if isinstance(found, str):
            if tracing.active:
                tracing.record(ops.rnn.PUBLIC[mode], "torch", found, input.data if isinstance(input, PackedSequence) else input)
            if lengths is not None:
                raise ValueError(f"lengths: {found}")
            return self._by_torch(found, input, hx)
        x, batch_sizes, states, params = found
        directions = 2 if self.bidirectional else 1
        output, *last = functional.stack(
            mode, x, batch_sizes, states, params, self.bias, self.num_layers, self.dropout, self.training, directions,
            lengths, self.save == "recompute", self._extras(mode == _LSTM), column,
        )  # fmt: skip
        if isinstance(input, PackedSequence):
            if input.unsorted_indices is not None:
                last = [state.index_select(1, input.unsorted_indices) for state in last]
            packed = PackedSequence(output, input.batch_sizes, input.sorted_indices, input.unsorted_indices)
            return packed, _as_hidden(mode, last)
        if input.dim() == 2:
            return output.squeeze(1), _as_hidden(mode, [state.squeeze(1) for state in last])
        return output.transpose(0, 1) if self.batch_first else output, _as_hidden(mode, last)

    def _arguments(self, mode: int, input: Any, hx: Any, column: str | None) -> Any:
        """x [T, B, I] or packed, batch_sizes, states and weights; or why the call is torch's to answer. With a column, what
        the raw ops check is left to them."""
        packed = isinstance(input, PackedSequence)
        x, batch_sizes = (input.data, input.batch_sizes) if packed else (input, None)
        if not isinstance(x, torch.Tensor) or x.dim() not in ((2,) if packed else (2, 3)):
            return "input is not a sequence or a batch of them"
        if x.shape[-1] != self.input_size:
            return "input has another size than input_size"
        alone = not packed and x.dim() == 2
        if alone:
            x = x.unsqueeze(1)
        elif not packed and self.batch_first:
            x = x.transpose(0, 1)
        params = [getattr(self, name) for name in self._flat_weights_names]
        directions = 2 if self.bidirectional else 1
        if hx is None:
            if not packed:
                batch = x.shape[1]
            elif input.sorted_indices is not None:
                batch = input.sorted_indices.shape[0]
            else:
                batch = int(batch_sizes[0])  # type: ignore[index]
            states = [x.new_zeros(self.num_layers * directions, batch, self.proj_size or self.hidden_size)]
            if mode == _LSTM:
                cells = x.new_zeros(self.num_layers * directions, batch, self.hidden_size) if self.proj_size else states[0]
                states.append(cells)
        else:
            try:
                states = _as_states(mode, hx)
                if alone:
                    states = [state.unsqueeze(1) for state in states]
                elif packed and input.sorted_indices is not None:
                    states = [state.index_select(1, input.sorted_indices) for state in states]
            except (AttributeError, IndexError, RuntimeError, TypeError):
                states = [None]  # type: ignore[list-item]
            if not all(isinstance(state, torch.Tensor) for state in states):
                return "states are not tensors of the right size"
        if column is not None and all(state.shape[0] == self.num_layers * directions for state in states):
            return x, batch_sizes, states, params
        x, states, params = functional.autocast(mode, x, states, params, batch_sizes is not None)
        found = functional.unusual(mode, x, batch_sizes, states, params, bool(self.bias), self.num_layers, directions)
        return found if found is not None else (x, batch_sizes, states, params)

    def _check_lengths(self, input: Any, lengths: Any) -> None:
        """That lengths fit; whether they are in range, the kernel says."""
        batch = input.shape[0 if self.batch_first else 1] if isinstance(input, torch.Tensor) and input.dim() == 3 else None
        if not isinstance(lengths, torch.Tensor) or lengths.dtype != torch.int64 or lengths.shape != (batch,):
            raise ValueError("lengths: expected an int64 tensor with one length for each sequence of a padded batch")


class RNN(_Recurrent, torch.nn.RNN):
    """torch.nn.RNN on dlkern's kernels; the constructor also takes `save` and LSTM's options but `peephole`, forward
    `lengths`."""


class LSTM(_Recurrent, torch.nn.LSTM):
    """torch.nn.LSTM on dlkern's kernels; forward also takes `lengths`, the constructor `save` and, by keyword, options that
    torch does not have, with all of them off nothing differs from torch.

    Args:
        layer_norm: normalise the input part and the hidden part of the gates, each over all gates of a step, and the cell
            where the output gate sees it: gates = LN(W_ih x) · layer_norm_ih + b_ih + LN(W_hh h) · layer_norm_hh + b_hh,
            h = σ(o) · tanh(LN(c) · layer_norm_c + layer_norm_c_bias), LN(a) = (a - mean) / sqrt(variance + 1e-5).
            Parameters layer_norm_ih, layer_norm_hh [gates·H] and, LSTM's, layer_norm_c [H] begin as ones,
            layer_norm_c_bias [H], where the module has biases, as zero. Ba et al. 2016, "Layer normalization", equations
            20 to 22; of a GRU, all three gates are normalised together.
        recurrent_dropout: in training, W_hh meets m · h instead of h, with one mask m for all steps of a sequence, zero with
            this probability, else 1 / (1 - p). Gal and Ghahramani 2016, "A theoretically grounded application of dropout in
            recurrent neural networks". Cells, which see one step, do not have it.
        zoneout: in training, a unit keeps its value of the step before with this probability z, drawn for each unit and step;
            in evaluation it becomes z · h_{t-1} + (1 - z) · h_t. (state, cell), or one number for both; the new state is
            made of the new cell, kept or not. Krueger et al. 2017, "Zoneout: regularizing RNNs by randomly preserving
            hidden activations".
        peephole: the gates see the cell through diagonal weights, weight_peephole [3, H]: i += w_0 · c_{t-1},
            f += w_1 · c_{t-1}, o += w_2 · c_t. Gers and Schmidhuber 2000, "Recurrent nets that time and count".

    Options combine freely, with proj_size, packed input and `lengths` as well. Names of their parameters end as torch's do
    (layer_norm_ih_l0_reverse). Masks come from dropout's kernels and follow torch.manual_seed. On the CPU the options are
    kernels; on a GPU they are the reference's, and trace() says so.

    Raises:
        ValueError: a probability outside [0, 1], or a call with options that torch would take and our kernels do not.
        TypeError: layer_norm or peephole is not a bool.
    """


class GRU(_Recurrent, torch.nn.GRU):
    """torch.nn.GRU on dlkern's kernels; the constructor also takes `save` and LSTM's options but `peephole`, forward
    `lengths`."""


class _Cell(_WithOptions, torch.nn.modules.rnn.RNNCellBase):
    """What the cells share: a sequence of one step."""

    _mode: int
    _suffixes: ClassVar[list[str]] = [""]  # type: ignore[misc]

    def __init__(
        self, *args: Any, layer_norm: bool = False, zoneout: float | tuple[float, float] = 0.0, peephole: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(*args, **options)
        self._set_options(self._mode == _LSTM, layer_norm, 0.0, zoneout, peephole)

    def forward(self, input: torch.Tensor, hx: Any = None) -> Any:
        mode = RELU if self._mode == TANH and self.nonlinearity == "relu" else self._mode
        plain = self._plain(mode, input, hx)
        if plain is not None:
            return plain
        found = self._arguments(mode, input, hx)
        if isinstance(found, str):
            if tracing.active and isinstance(input, torch.Tensor):
                tracing.record(ops.rnn.PUBLIC[mode], "torch", found, input)
            return self._by_torch(found, input, hx)
        x, states, params = found
        extras = self._extras(mode == _LSTM)
        _, *last = functional.stack(mode, x, None, states, params, self.bias, 1, 0.0, self.training, 1, extras=extras)
        last = [state[0] if input.dim() == 2 else state[0, 0] for state in last]
        return _as_hidden(mode, last)

    def _plain(self, mode: int, input: Any, hx: Any) -> Any:
        """The result of a plain call (see ops/_plain.py) of a batch, None for one that has to go the long way."""
        try:
            column = _plain.column(ops.rnn.PUBLIC[mode], input)
            if column is None or input.dim() != 2 or self.beyond_torch or (mode == TANH and self.nonlinearity != "tanh"):
                return None
            lstm = mode == _LSTM
            if hx is None:
                hx = input.new_zeros(input.shape[0], self.hidden_size)
                hx = (hx, hx) if lstm else hx
            h0, c0 = hx if lstm else (hx, None)
            b_ih, b_hh = (self.bias_ih, self.bias_hh) if self.bias else (None, None)
            _, h_n, c_n = ops.rnn.run(
                column, input.unsqueeze(0), self.weight_ih, self.weight_hh, b_ih, b_hh, None, h0, c0, None, None, mode, False,
                False,
            )  # fmt: skip
            return (h_n, c_n) if lstm else h_n
        except _plain.REFUSALS:
            return None  # the long way says what is wrong

    def _arguments(self, mode: int, input: Any, hx: Any) -> Any:
        if mode == TANH and self.nonlinearity != "tanh":
            return f"nonlinearity is {self.nonlinearity}"
        if not isinstance(input, torch.Tensor) or input.dim() not in (1, 2) or input.shape[-1] != self.input_size:
            return "input is not [input_size] or [B, input_size]"
        x = input.reshape(1, -1, self.input_size)
        if hx is None:
            states = [x.new_zeros(1, x.shape[1], self.hidden_size)] * (2 if mode == _LSTM else 1)
        else:
            try:
                given = _as_states(mode, hx)
                if any(state.dim() != input.dim() for state in given):
                    return "states and input differ in dimensions"
                states = [state.reshape(1, -1, state.shape[-1]) for state in given]
            except (AttributeError, IndexError, RuntimeError, TypeError):
                return "states are not tensors of the right size"
        params = [self.weight_ih, self.weight_hh, *((self.bias_ih, self.bias_hh) if self.bias else ())]
        if mode != RELU and mode != TANH and autocasts(x) and not self.beyond_torch:
            return "autocast: torch's cell keeps float32"
        x, states, params = functional.autocast(mode, x, states, params)
        found = functional.unusual(mode, x, None, states, params, bool(self.bias), 1, 1)
        return found if found is not None else (x, states, params)


class RNNCell(_Cell, torch.nn.RNNCell):
    """torch.nn.RNNCell on dlkern's kernels; the constructor also takes LSTM's options `layer_norm` and `zoneout`."""

    _mode = TANH


class LSTMCell(_Cell, torch.nn.LSTMCell):
    """torch.nn.LSTMCell on dlkern's kernels; the constructor also takes LSTM's options `layer_norm`, `zoneout`, `peephole`."""

    _mode = _LSTM


class GRUCell(_Cell, torch.nn.GRUCell):
    """torch.nn.GRUCell on dlkern's kernels; the constructor also takes LSTM's options `layer_norm` and `zoneout`."""

    _mode = _GRU

"""Recurrent modules."""

from __future__ import annotations

import importlib.util
import sys
from importlib.abc import MetaPathFinder
from typing import Any

import torch
from torch.nn.utils.rnn import PackedSequence

from dlkern import ops
from dlkern import trace as tracing
from dlkern.nn.functional import rnn as functional
from dlkern.nn.functional._autocast import autocasts
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


class _Recurrent(torch.nn.RNNBase):
    """What RNN, LSTM and GRU share. Beside torch's arguments forward takes `lengths`: int64 [B] on the CPU, of a padded
    batch in any order; outputs beyond a sequence's length are zero, last states are those of its last step, what the
    input holds there has no effect, and nothing is packed. The attribute and argument `save` says what a forward pass
    keeps for the backward: "gates", or "recompute", which keeps none (RNN's H numbers a step and sequence, GRU's 4 · H,
    LSTM's 5 · H) and runs each layer once more instead; results have the same bits."""

    save: str = "gates"

    def __init__(self, *args: Any, save: str = "gates", **options: Any) -> None:
        if save not in ("gates", "recompute"):
            raise ValueError(f'save: expected "gates" or "recompute", got {save!r}')
        super().__init__(*args, **options)
        self.save = save
        allow_in_dynamo()

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)
        allow_in_dynamo()

    def forward(self, input: Any, hx: Any = None, lengths: torch.Tensor | None = None) -> Any:  # type: ignore[override]
        if lengths is not None:
            self._check_lengths(input, lengths)
        mode = _MODES[self.mode]
        found = self._arguments(mode, input, hx)
        if isinstance(found, str):
            if tracing.active:
                tracing.record(ops.rnn.PUBLIC[mode], "torch", found, input.data if isinstance(input, PackedSequence) else input)
            if lengths is not None:
                raise ValueError(f"lengths: {found}")
            return super().forward(input, hx)  # type: ignore[misc]
        x, batch_sizes, states, params = found
        directions = 2 if self.bidirectional else 1
        output, *last = functional.stack(
            mode, x, batch_sizes, states, params, self.bias, self.num_layers, self.dropout, self.training, directions,
            lengths, self.save == "recompute",
        )  # fmt: skip
        if isinstance(input, PackedSequence):
            if input.unsorted_indices is not None:
                last = [state.index_select(1, input.unsorted_indices) for state in last]
            packed = PackedSequence(output, input.batch_sizes, input.sorted_indices, input.unsorted_indices)
            return packed, _as_hidden(mode, last)
        if input.dim() == 2:
            return output.squeeze(1), _as_hidden(mode, [state.squeeze(1) for state in last])
        return output.transpose(0, 1) if self.batch_first else output, _as_hidden(mode, last)

    def _arguments(self, mode: int, input: Any, hx: Any) -> Any:
        """x [T, B, I] or packed, batch_sizes, states and weights; or why the call is torch's to answer."""
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
                return "states are not tensors of the right size"
        found = functional.unusual(mode, x, batch_sizes, states, params, bool(self.bias), self.num_layers, directions)
        return found if found is not None else (x, batch_sizes, states, params)

    def _check_lengths(self, input: Any, lengths: Any) -> None:
        """That lengths fit; whether they are in range, the kernel says."""
        batch = input.shape[0 if self.batch_first else 1] if isinstance(input, torch.Tensor) and input.dim() == 3 else None
        if not isinstance(lengths, torch.Tensor) or lengths.dtype != torch.int64 or lengths.shape != (batch,):
            raise ValueError("lengths: expected an int64 tensor with one length for each sequence of a padded batch")


class RNN(_Recurrent, torch.nn.RNN):
    """torch.nn.RNN on dlkern's kernels; the constructor also takes `save`, forward `lengths`."""


class LSTM(_Recurrent, torch.nn.LSTM):
    """torch.nn.LSTM on dlkern's kernels; the constructor also takes `save`, forward `lengths`."""


class GRU(_Recurrent, torch.nn.GRU):
    """torch.nn.GRU on dlkern's kernels; the constructor also takes `save`, forward `lengths`."""


class _Cell(torch.nn.modules.rnn.RNNCellBase):
    """What the cells share: a sequence of one step."""

    _mode: int

    def forward(self, input: torch.Tensor, hx: Any = None) -> Any:
        mode = RELU if self._mode == TANH and self.nonlinearity == "relu" else self._mode
        found = self._arguments(mode, input, hx)
        if isinstance(found, str):
            if tracing.active and isinstance(input, torch.Tensor):
                tracing.record(ops.rnn.PUBLIC[mode], "torch", found, input)
            return super().forward(input, hx)  # type: ignore[misc]
        x, states, params = found
        _, *last = functional.stack(mode, x, None, states, params, self.bias, 1, 0.0, False, 1)
        last = [state[0] if input.dim() == 2 else state[0, 0] for state in last]
        return _as_hidden(mode, last)

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
        if mode != RELU and mode != TANH and autocasts(x):
            return "autocast: torch's cell keeps float32"
        found = functional.unusual(mode, x, None, states, params, bool(self.bias), 1, 1)
        return found if found is not None else (x, states, params)


class RNNCell(_Cell, torch.nn.RNNCell):
    """torch.nn.RNNCell on dlkern's kernels."""

    _mode = TANH


class LSTMCell(_Cell, torch.nn.LSTMCell):
    """torch.nn.LSTMCell on dlkern's kernels."""

    _mode = _LSTM


class GRUCell(_Cell, torch.nn.GRUCell):
    """torch.nn.GRUCell on dlkern's kernels."""

    _mode = _GRU

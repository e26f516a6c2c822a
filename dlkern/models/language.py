"""Recurrent language models and the encoder-decoder: RNN, GRU or LSTM layers over one-hot or embedded tokens.

Sequences are time-major: tokens [steps, batch], as torch.nn's recurrent layers take them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import dlkern.nn

__all__ = ["Decoder", "Encoder", "EncoderDecoder", "LanguageModel", "OneHot", "State", "detached", "generate"]

State = torch.Tensor | tuple[torch.Tensor, torch.Tensor]  # h, or an LSTM's (h, c): [layers, batch, hidden] each

_CELLS = {"rnn": "RNN", "gru": "GRU", "lstm": "LSTM"}


def detached(state: State | None) -> State | None:
    """The state without its history: what truncated backpropagation through time carries on to the next part of a
    sequence (Williams and Peng 1990)."""
    if state is None or isinstance(state, torch.Tensor):
        return None if state is None else state.detach()
    return state[0].detach(), state[1].detach()


def _recurrent(cell: str, inputs: int, hidden: int, layers: int, dropout: float, nn: Any, **options: Any) -> Any:
    if cell not in _CELLS:
        raise ValueError(f"expected cell to be one of {tuple(_CELLS)}, got {cell!r}")
    between = dropout if layers > 1 else 0.0  # torch warns where there is no between
    return getattr(nn, _CELLS[cell])(inputs, hidden, layers, dropout=between, **options)


class OneHot(torch.nn.Module):
    """Tokens [*] to vectors [*, vocabulary] of zeros and a one."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary = vocabulary

    def extra_repr(self) -> str:
        return str(self.vocabulary)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.one_hot(tokens, self.vocabulary)


class LanguageModel(torch.nn.Module):
    """Predicts each next token of a sequence: embedding or one-hot vectors, recurrent layers, a linear layer.

    Shapes: tokens int64 [T, B], state as the recurrent layer has it; logits [T, B, vocabulary] and the new state. Mikolov
    et al. 2010, "Recurrent neural network based language model".

    Args:
        vocabulary: how many tokens there are.
        hidden: units of a layer.
        layers: how many layers lie on each other (Graves 2013, "Generating sequences with recurrent neural networks").
        cell: "rnn" (tanh), "gru" or "lstm".
        embedding: length of a token's vector; None for one-hot input.
        dropout: probability between layers, of embedded inputs and of what the linear layer gets (Zaremba et al. 2014).
        tied: the linear layer's weight is the embedding's (Press and Wolf 2017); needs embedding = hidden.
        nn: where layers come from: dlkern.nn, or torch.nn for the torch twin, which has the same state_dict.

    Raises:
        ValueError: another cell, or tied without embedding = hidden.
    """

    def __init__(
        self, vocabulary: int, hidden: int = 256, layers: int = 1, *, cell: str = "gru", embedding: int | None = None,
        dropout: float = 0.0, tied: bool = False, nn: Any = dlkern.nn,
    ) -> None:
        super().__init__()
        if tied and embedding != hidden:
            raise ValueError(f"LanguageModel: tied weights need an embedding of {hidden}, like hidden, got {embedding}")
        self.embedding = OneHot(vocabulary) if embedding is None else nn.Embedding(vocabulary, embedding)
        self.recurrent = _recurrent(cell, embedding or vocabulary, hidden, layers, dropout, nn)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(hidden, vocabulary)
        if tied:
            torch.nn.init.normal_(self.head.weight, std=hidden**-0.5)
            self.embedding.weight = self.head.weight

    def forward(self, tokens: torch.Tensor, state: State | None = None) -> tuple[torch.Tensor, State]:
        x = self.embedding(tokens)  # [T, B, E]
        x = self.dropout(x) if x.is_floating_point() else x.to(self.head.weight.dtype)
        output, state = self.recurrent(x, state)
        return self.head(self.dropout(output)), state


@torch.no_grad()
def generate(
    model: LanguageModel, prompt: torch.Tensor, length: int, *, temperature: float = 1.0,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Goes on with a text, one token after another.

    Args:
        model: a language model; its mode (train or eval) is left as it is.
        prompt: tokens int64 [n], at least one.
        length: how many to add.
        temperature: logits are divided by it before a token is drawn from their softmax; 0 takes the likeliest token.
        generator: what to draw from.

    Returns:
        The new tokens, int64 [length].

    Raises:
        ValueError: prompt is not a row of tokens, length or temperature is negative.
    """
    if prompt.dim() != 1 or len(prompt) == 0:
        raise ValueError(f"generate: expected a prompt [n] of at least one token, got {tuple(prompt.shape)}")
    if length < 0 or temperature < 0:
        raise ValueError(f"generate: expected length and temperature from 0 on, got {length} and {temperature}")
    tokens, state, last = [prompt[:0]], None, prompt[:, None]  # [n, 1]
    for _ in range(length):
        logits, state = model(last, state)
        if temperature == 0:
            token = logits[-1, 0].argmax().reshape(1)
        else:
            token = torch.multinomial(torch.softmax(logits[-1, 0].float() / temperature, 0), 1, generator=generator)
        tokens.append(token)
        last = token[:, None]
    return torch.cat(tokens)


class Encoder(torch.nn.Module):
    """Reads a sequence: embedding and recurrent layers, in one direction or both.

    Shapes: tokens int64 [T, B] and, for padded sequences, lengths int64 [B] on the CPU; outputs [T, B, directions · hidden]
    (zero beyond a length) and a state of [layers, B, hidden] each. Of two directions, the last states are joined to one by
    a linear layer and tanh (as Bahdanau et al. 2015 do for the backward one).

    Args:
        vocabulary, hidden, layers, cell, dropout, nn: as for LanguageModel.
        embedding: length of a token's vector.
        bidirectional: read the sequence from both ends.

    Raises:
        ValueError: another cell.
    """

    def __init__(
        self, vocabulary: int, hidden: int = 256, layers: int = 1, *, embedding: int = 256, cell: str = "gru",
        bidirectional: bool = False, dropout: float = 0.0, nn: Any = dlkern.nn,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, embedding)
        self.recurrent = _recurrent(cell, embedding, hidden, layers, dropout, nn, bidirectional=bidirectional)
        self.dropout = nn.Dropout(dropout)
        self.join = nn.Linear(2 * hidden, hidden) if bidirectional else None

    def forward(self, tokens: torch.Tensor, lengths: torch.Tensor | None = None) -> tuple[torch.Tensor, State]:
        x = self.dropout(self.embedding(tokens))  # [T, B, E]
        if lengths is None:
            output, state = self.recurrent(x)
        elif isinstance(self.recurrent, dlkern.nn.RNN | dlkern.nn.GRU | dlkern.nn.LSTM):
            output, state = self.recurrent(x, lengths=lengths)
        else:
            packed, state = self.recurrent(pack_padded_sequence(x, lengths, enforce_sorted=False))
            output, _ = pad_packed_sequence(packed, total_length=len(tokens))
        if self.join is not None:
            state = self._joined(state) if isinstance(state, torch.Tensor) else tuple(self._joined(s) for s in state)
        return output, state

    def _joined(self, state: torch.Tensor) -> torch.Tensor:
        assert self.join is not None
        both = torch.cat((state[0::2], state[1::2]), -1)  # [layers, B, 2 · hidden]
        return torch.tanh(self.join(both))


class Decoder(torch.nn.Module):
    """Writes a sequence from a state: at each step the layers get the token before and the context, the encoder's last
    state.

    Shapes: tokens int64 [T, B], context [B, hidden], state [layers, B, hidden] each; logits [T, B, vocabulary] and the new
    state.

    Args:
        vocabulary, hidden, layers, embedding, cell, dropout, nn: as for Encoder.

    Raises:
        ValueError: another cell.
    """

    def __init__(
        self, vocabulary: int, hidden: int = 256, layers: int = 1, *, embedding: int = 256, cell: str = "gru",
        dropout: float = 0.0, nn: Any = dlkern.nn,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, embedding)
        self.recurrent = _recurrent(cell, embedding + hidden, hidden, layers, dropout, nn)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(hidden, vocabulary)

    def forward(
        self, tokens: torch.Tensor, context: torch.Tensor, state: State | None = None
    ) -> tuple[torch.Tensor, State]:
        x = self.dropout(self.embedding(tokens))  # [T, B, E]
        x = torch.cat((x, context.expand(len(tokens), -1, -1)), -1)
        output, state = self.recurrent(x, state)
        return self.head(self.dropout(output)), state


class EncoderDecoder(torch.nn.Module):
    """One sequence to another (Cho et al. 2014, "Learning phrase representations using RNN encoder-decoder"; Sutskever et
    al. 2014).

    Shapes: source int64 [S, B], lengths int64 [B] of padded sources or None, target int64 [T, B], which begins with a start
    token (teacher forcing); logits [T, B, target_vocabulary] of the tokens that follow.

    Args:
        source_vocabulary, target_vocabulary: how many tokens there are on either side.
        hidden, layers, embedding, cell, dropout, nn: as for Encoder, of both parts.
        bidirectional: whether the encoder reads from both ends.

    Raises:
        ValueError: another cell.
    """

    def __init__(
        self, source_vocabulary: int, target_vocabulary: int, hidden: int = 256, layers: int = 1, *,
        embedding: int = 256, cell: str = "gru", bidirectional: bool = False, dropout: float = 0.0, nn: Any = dlkern.nn,
    ) -> None:
        super().__init__()
        shared: dict[str, Any] = dict(embedding=embedding, cell=cell, dropout=dropout, nn=nn)
        self.encoder = Encoder(source_vocabulary, hidden, layers, bidirectional=bidirectional, **shared)
        self.decoder = Decoder(target_vocabulary, hidden, layers, **shared)

    def forward(
        self, source: torch.Tensor, target: torch.Tensor, lengths: torch.Tensor | None = None
    ) -> torch.Tensor:
        context, state = self._read(source, lengths)
        return self.decoder(target, context, state)[0]

    def _read(self, source: torch.Tensor, lengths: torch.Tensor | None) -> tuple[torch.Tensor, State]:
        _, state = self.encoder(source, lengths)
        last = state if isinstance(state, torch.Tensor) else state[0]
        return last[-1], state

    @torch.no_grad()
    def greedy(self, source: torch.Tensor, start: int, length: int, lengths: torch.Tensor | None = None) -> torch.Tensor:
        """The likeliest token at each step, after a start token: int64 [length, B] for source [S, B]."""
        context, state = self._read(source, lengths)
        token = torch.full((1, source.shape[1]), start, dtype=torch.int64, device=source.device)
        tokens = [token[:0]]
        for _ in range(length):
            logits, state = self.decoder(token, context, state)
            token = logits.argmax(-1)  # [1, B]
            tokens.append(token)
        return torch.cat(tokens)

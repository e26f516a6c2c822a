"""Translation with recurrent layers: a bidirectional GRU reads, another one writes and attends to what was read.

Bahdanau, Cho and Bengio 2015, "Neural machine translation by jointly learning to align and translate", section 3; a linear
layer takes the place of the maxout before the softmax.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import dlkern.nn

__all__ = ["Seq2Seq", "seq2seq"]


class AdditiveAttention(torch.nn.Module):
    """The torch twin of dlkern.nn.AdditiveAttention, as far as Seq2Seq calls it: with a tensor [B, L, S, num_hiddens]."""

    def __init__(self, query_size: int, key_size: int, num_hiddens: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = dropout
        self.W_q = torch.nn.Linear(query_size, num_hiddens, bias=False)
        self.W_k = torch.nn.Linear(key_size, num_hiddens, bias=False)
        self.w_v = torch.nn.Linear(num_hiddens, 1, bias=False)

    def attend(
        self, query: torch.Tensor, projected: torch.Tensor, value: torch.Tensor, lengths: torch.Tensor
    ) -> torch.Tensor:
        features = torch.tanh(self.W_q(query)[:, :, None] + projected[:, None])  # [B, L, S, num_hiddens]
        scores = self.w_v(features).squeeze(-1)  # [B, L, S]
        hidden = torch.arange(value.shape[1], device=value.device) >= lengths[:, None, None]
        weights = torch.softmax(scores.masked_fill(hidden, -torch.inf), -1)
        return torch.nn.functional.dropout(weights, self.dropout, self.training) @ value

    def extra_repr(self) -> str:
        return f"dropout={self.dropout}"


class Seq2Seq(torch.nn.Module):
    """Encoder and decoder GRU with additive attention.

    Shapes: source int64 [B, S] of which lengths int64 [B] tokens count, target int64 [B, T] (the tokens before the wanted
    ones: teacher forcing); output (logits) [B, T, target_words].

    Args:
        source_words, target_words: sizes of the vocabularies.
        embedding, hidden: widths of embeddings and of states; the encoder has a state of that width each way.
        layers: of each of the GRUs.
        dropout: of embeddings, between layers and of the attention's weights.
    """

    def __init__(
        self, source_words: int, target_words: int, embedding: int = 128, hidden: int = 128, layers: int = 1,
        dropout: float = 0.0, *, nn: Any = dlkern.nn,
    ) -> None:
        super().__init__()
        between = dropout if layers > 1 else 0.0  # torch warns where there is no between
        self.source_embedding = nn.Embedding(source_words, embedding)
        self.target_embedding = nn.Embedding(target_words, embedding)
        self.dropout = nn.Dropout(dropout)
        self.encoder = nn.GRU(embedding, hidden, layers, batch_first=True, dropout=between, bidirectional=True)
        self.bridge = nn.Linear(2 * hidden, hidden)
        self.attention = getattr(nn, "AdditiveAttention", AdditiveAttention)(hidden, 2 * hidden, hidden, dropout)
        self.decoder = nn.GRU(embedding + 2 * hidden, hidden, layers, batch_first=True, dropout=between)
        self.output = nn.Linear(3 * hidden, target_words)

    def start(self, source: torch.Tensor, lengths: torch.Tensor) -> dict[str, torch.Tensor]:
        """Reads the source; the state that step() goes on from: a row of each tensor for each row of source."""
        x = self.dropout(self.source_embedding(source))
        if isinstance(self.encoder, dlkern.nn.GRU):
            memory, last = self.encoder(x, lengths=lengths)
        else:
            packed = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
            packed, last = self.encoder(packed)
            memory, _ = pad_packed_sequence(packed, batch_first=True, total_length=source.shape[1])
        both = torch.cat((last[0::2], last[1::2]), -1)  # [layers, B, 2 · hidden]
        hidden = torch.tanh(self.bridge(both)).transpose(0, 1)  # [B, layers, hidden]
        return {"memory": memory, "keys": self.attention.W_k(memory), "lengths": lengths, "hidden": hidden}

    def _write(
        self, x: torch.Tensor, state: dict[str, torch.Tensor], values: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Logits [B, T, words] for embedded tokens x, the last hidden state, and `values` as attended to at each step."""
        hidden, found, seen = state["hidden"].transpose(0, 1).contiguous(), [], []
        for token in x.split(1, 1):  # [B, 1, embedding]
            query, keys = hidden[-1][:, None], state["keys"]
            context = self.attention.attend(query, keys, state["memory"], state["lengths"])
            if values is not None:
                seen.append(self.attention.attend(query, keys, values, state["lengths"]))
            y, hidden = self.decoder(torch.cat((token, context), -1), hidden)
            found.append(torch.cat((y, context), -1))
        return self.output(torch.cat(found, 1)), hidden.transpose(0, 1), torch.cat(seen, 1) if seen else x[:, :0]

    def forward(self, source: torch.Tensor, lengths: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return self._write(self.dropout(self.target_embedding(target)), self.start(source, lengths))[0]

    def step(
        self, tokens: torch.Tensor, state: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Logits [B, target_words] after the tokens [B], for dlkern.decoding."""
        logits, hidden, _ = self._write(self.dropout(self.target_embedding(tokens[:, None])), state)
        return logits[:, 0], state | {"hidden": hidden}

    @torch.no_grad()
    def attention_map(self, source: torch.Tensor, lengths: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """How much each step of target attends to each source token, [B, T, S]: sums to 1 over the source."""
        state = self.start(source, lengths)
        units = torch.eye(source.shape[1], device=source.device, dtype=state["memory"].dtype)
        return self._write(self.target_embedding(target), state, units.expand(len(source), -1, -1))[2]


def seq2seq(source_words: int, target_words: int, *, nn: Any = dlkern.nn, **settings: Any) -> Seq2Seq:
    """Seq2Seq with layers from `nn`: dlkern.nn, or torch.nn for its torch twin."""
    return Seq2Seq(source_words, target_words, nn=nn, **settings)

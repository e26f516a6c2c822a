"""Translation with the Transformer: an encoder and a decoder of attention and feed-forward layers.

Vaswani et al. 2017, "Attention is all you need", fig. 1, with sinusoidal positions (section 3.5).
"""

from __future__ import annotations

import math
from typing import Any

import torch

import dlkern.nn

__all__ = ["Transformer", "transformer"]


class Transformer(torch.nn.Module):
    """Encoder-decoder Transformer.

    Shapes: source int64 [B, S] of which lengths int64 [B] tokens count, target int64 [B, T] (the tokens before the wanted
    ones: teacher forcing); output (logits) [B, T, target_words].

    Args:
        source_words, target_words: sizes of the vocabularies.
        width: of embeddings and of every layer's output.
        heads: of each attention; divides width.
        layers: of encoder and of decoder.
        feedforward: width inside the feed-forward layers.
        dropout: where the paper has it.
        norm_first: normalise what a layer gets instead of what it gives (Xiong et al. 2020).
        max_len: the longest sequence.
    """

    def __init__(
        self, source_words: int, target_words: int, width: int = 128, heads: int = 4, layers: int = 2,
        feedforward: int = 256, dropout: float = 0.0, norm_first: bool = False, max_len: int = 512, *, nn: Any = dlkern.nn,
    ) -> None:
        super().__init__()
        self.source_embedding = nn.Embedding(source_words, width)
        self.target_embedding = nn.Embedding(target_words, width)
        self.positions = dlkern.nn.SinusoidalPositions(width, max_len)
        self.dropout = nn.Dropout(dropout)
        settings: Any = dict(dropout=dropout, batch_first=True, norm_first=norm_first)
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(width, heads, feedforward, **settings), layers,
            nn.LayerNorm(width) if norm_first else None, enable_nested_tensor=False,
        )  # fmt: skip
        self.decoder = nn.TransformerDecoder(
            nn.TransformerDecoderLayer(width, heads, feedforward, **settings), layers,
            nn.LayerNorm(width) if norm_first else None,
        )  # fmt: skip
        self.output = nn.Linear(width, target_words)
        for p in self.parameters():  # each layer of a stack has its own start
            if p.dim() > 1:
                torch.nn.init.xavier_uniform_(p)
        for embedding in (self.source_embedding, self.target_embedding):  # of size 1 when scaled, as positions are
            torch.nn.init.normal_(embedding.weight, std=width**-0.5)

    def _embedded(self, embedding: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
        x = embedding(tokens)
        return self.dropout(self.positions(x * math.sqrt(x.shape[-1])))

    def _read(self, source: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        padding = torch.arange(source.shape[1], device=source.device) >= lengths[:, None]  # True: is none
        return self.encoder(self._embedded(self.source_embedding, source), src_key_padding_mask=padding), padding

    def _write(self, target: torch.Tensor, memory: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
        length = target.shape[1]
        later = torch.ones(length, length, dtype=torch.bool, device=target.device).triu(1)
        return self.decoder(
            self._embedded(self.target_embedding, target), memory, tgt_mask=later, tgt_is_causal=True,
            memory_key_padding_mask=padding,
        )  # fmt: skip

    def forward(self, source: torch.Tensor, lengths: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return self.output(self._write(target, *self._read(source, lengths)))

    def start(self, source: torch.Tensor, lengths: torch.Tensor) -> dict[str, torch.Tensor]:
        """Reads the source; the state that step() goes on from: a row of each tensor for each row of source."""
        memory, padding = self._read(source, lengths)
        return {"memory": memory, "padding": padding, "written": source[:, :0]}

    def step(
        self, tokens: torch.Tensor, state: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Logits [B, target_words] after the tokens [B], for dlkern.decoding. Computes the whole sequence again."""
        written = torch.cat((state["written"], tokens[:, None]), 1)
        logits = self.output(self._write(written, state["memory"], state["padding"])[:, -1])
        return logits, state | {"written": written}

    @torch.no_grad()
    def attention_map(self, source: torch.Tensor, lengths: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """How much each step of target attends to each source token in the last layer, [B, T, S], the mean over heads."""
        attention, found = self.decoder.layers[-1].multihead_attn, []
        hooks = [
            attention.register_forward_pre_hook(
                lambda module, args, kwargs: (args, kwargs | {"need_weights": True}), with_kwargs=True
            ),
            attention.register_forward_hook(lambda module, args, result: found.append(result[1])),
        ]
        try:
            self(source, lengths, target)
        finally:
            for hook in hooks:
                hook.remove()
        return found[0]


def transformer(source_words: int, target_words: int, *, nn: Any = dlkern.nn, **settings: Any) -> Transformer:
    """Transformer with layers from `nn`: dlkern.nn, or torch.nn for its torch twin."""
    return Transformer(source_words, target_words, nn=nn, **settings)

"""Translation with the Transformer: an encoder and a decoder of attention and feed-forward layers.

Vaswani et al. 2017, "Attention is all you need", fig. 1, with sinusoidal positions (section 3.5).
"""

from __future__ import annotations

import math
from typing import Any

import torch

import dlkern.nn

__all__ = ["Transformer", "transformer"]

Kept = tuple[torch.Tensor, torch.Tensor]  # keys and values of some tokens, [B, tokens, heads, depth] each


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

    def _embedded(self, embedding: torch.nn.Module, tokens: torch.Tensor, offset: int = 0) -> torch.Tensor:
        x = embedding(tokens)
        return self.dropout(self.positions(x * math.sqrt(x.shape[-1]), offset))

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

    def start(self, source: torch.Tensor, lengths: torch.Tensor) -> dict[str, Any]:
        """Reads the source; the state that step() goes on from: a row of each tensor for each row of source."""
        memory, padding = self._read(source, lengths)
        attentions = [(layer.self_attn, layer.multihead_attn) for layer in self.decoder.layers]
        return {
            "written": source[:, :0],
            "own": [tuple(_projected(own, memory[:, :0], (1, 2))) for own, _ in attentions],
            "read": [tuple(_projected(across, memory, (1, 2))) for _, across in attentions],
            "seen": ~padding,
        }

    def step(self, tokens: torch.Tensor, state: dict[str, Any]) -> tuple[torch.Tensor, dict[str, Any]]:
        """Logits [B, target_words] after the tokens [B], for dlkern.decoding. Each layer's keys and values are kept in the
        state: those of the source, and those of what is written, which grow by one."""
        x = self._embedded(self.target_embedding, tokens[:, None], state["written"].shape[1])
        seen, kept = state["seen"][:, None, None], []
        for layer, own, read in zip(self.decoder.layers, state["own"], state["read"]):
            x, own = _next(layer, x, own, read, seen)
            kept.append(own)
        if self.decoder.norm is not None:
            x = self.decoder.norm(x)
        written = torch.cat((state["written"], tokens[:, None]), 1)
        return self.output(x[:, 0]), state | {"written": written, "own": kept}

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


def _functional(attention: torch.nn.MultiheadAttention) -> Any:
    return dlkern.nn.functional if isinstance(attention, dlkern.nn.MultiheadAttention) else torch.nn.functional


def _projected(attention: torch.nn.MultiheadAttention, x: torch.Tensor, parts: tuple[int, ...]) -> list[torch.Tensor]:
    """Of x [B, L, width] the queries (part 0), keys (1) or values (2) of an attention, [B, L, heads, depth] each."""
    assert attention.in_proj_weight is not None and attention.in_proj_bias is not None
    some = slice(parts[0], parts[-1] + 1)
    weight, bias = (t.unflatten(0, (3, -1))[some].flatten(0, 1) for t in (attention.in_proj_weight, attention.in_proj_bias))
    return list(_functional(attention).linear(x, weight, bias).unflatten(-1, (len(parts), attention.num_heads, -1)).unbind(2))


def _attended(
    attention: torch.nn.MultiheadAttention, query: torch.Tensor, kept: Kept, seen: torch.Tensor | None
) -> torch.Tensor:
    """What an attention gives [B, 1, width] for a query [B, 1, heads, depth]."""
    functional = _functional(attention)
    q, k, v = (x.transpose(1, 2) for x in (query, *kept))
    p = attention.dropout if attention.training else 0.0
    y = functional.scaled_dot_product_attention(q, k, v, seen, p).transpose(1, 2).flatten(2)
    return functional.linear(y, attention.out_proj.weight, attention.out_proj.bias)


def _next(layer: Any, x: torch.Tensor, own: Kept, read: Kept, seen: torch.Tensor) -> tuple[torch.Tensor, Kept]:
    """A decoder layer's output [B, 1, width] for the next token x, and the keys and values of all so far."""

    def itself(x: torch.Tensor) -> torch.Tensor:
        nonlocal own
        query, *new = _projected(layer.self_attn, x, (0, 1, 2))
        own = (torch.cat((own[0], new[0]), 1), torch.cat((own[1], new[1]), 1))
        return layer.dropout1(_attended(layer.self_attn, query, own, None))

    def source(x: torch.Tensor) -> torch.Tensor:
        (query,) = _projected(layer.multihead_attn, x, (0,))
        return layer.dropout2(_attended(layer.multihead_attn, query, read, seen))

    if layer.norm_first:
        x = x + itself(layer.norm1(x))
        x = x + source(layer.norm2(x))
        return x + layer._ff_block(layer.norm3(x)), own
    x = layer.norm1(x + itself(x))
    x = layer.norm2(x + source(x))
    return layer.norm3(x + layer._ff_block(x)), own


def transformer(source_words: int, target_words: int, *, nn: Any = dlkern.nn, **settings: Any) -> Transformer:
    """Transformer with layers from `nn`: dlkern.nn, or torch.nn for its torch twin."""
    return Transformer(source_words, target_words, nn=nn, **settings)

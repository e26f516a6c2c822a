"""Attention modules: torch.nn.MultiheadAttention, and one for each other score."""

from __future__ import annotations

from typing import Any

import torch

from dlkern import trace as tracing
from dlkern.nn import functional as F
from dlkern.nn.functional.multi_head_attention import multi_head
from dlkern.nn.modules.linear import Linear

__all__ = [
    "AdditiveAttention", "CosineAttention", "DotAttention", "GaussianAttention", "MultiheadAttention",
    "PrunedMultiheadAttention",
]  # fmt: skip


class MultiheadAttention(torch.nn.MultiheadAttention):
    """torch.nn.MultiheadAttention on dlkern's kernels, in evaluation mode as in training.

    A query that sees no key gets zeros (torch: NaN, where weights are asked for). Vaswani et al. 2017, section 3.2.2.
    """

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, key_padding_mask: torch.Tensor | None = None,
        need_weights: bool = True, attn_mask: torch.Tensor | None = None, average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if query.is_nested or key.is_nested or value.is_nested:  # torch's fast path takes some
            if tracing.active:
                tracing.record("scaled_dot_product_attention", "torch", "a nested tensor", query, key, value)
            arguments = query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            return super().forward(*arguments)
        weights = (self.in_proj_weight,)
        if self.in_proj_weight is None:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        out = self.out_proj
        found = multi_head(
            query, key, value, self.batch_first, self.embed_dim, self.num_heads, self.num_heads * self.head_dim, weights,
            self.in_proj_bias, self.bias_k, self.bias_v, self.add_zero_attn, self.dropout if self.training else 0.0,
            out.weight, out.bias, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal,
        )
        if not isinstance(found, str):
            return found
        turned = self.batch_first and query.dim() == 3
        if turned:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        separate: dict[str, Any] = {}
        if len(weights) == 3:
            separate = dict(zip(("q_proj_weight", "k_proj_weight", "v_proj_weight"), weights))
        output, probabilities = F.multi_head_attention_forward(  # torch's, which says what is wrong
            query, key, value, self.embed_dim, self.num_heads, self.in_proj_weight, self.in_proj_bias, self.bias_k,
            self.bias_v, self.add_zero_attn, self.dropout, out.weight, out.bias, training=self.training,
            key_padding_mask=key_padding_mask, need_weights=need_weights, attn_mask=attn_mask,
            average_attn_weights=average_attn_weights, is_causal=is_causal, width=self.num_heads * self.head_dim,
            use_separate_proj_weight=bool(separate), **separate,
        )
        return output.transpose(0, 1) if turned else output, probabilities


class PrunedMultiheadAttention(MultiheadAttention):
    """What prune_heads() makes of a MultiheadAttention: fewer heads of the same width between the same inputs and outputs.

    torch's class would take embed_dim for the width of all heads, so revert() leaves this one as it is.
    """


class _Scored(torch.nn.Module):
    """What the modules share: dropout of probabilities in training mode."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = dropout

    @property
    def _p(self) -> float:
        return self.dropout if self.training else 0.0

    def extra_repr(self) -> str:
        return f"dropout={self.dropout}"


class DotAttention(_Scored):
    """Attention by dot products, scaled by 1 / sqrt(D) unless scaled=False; no parameters.

    forward(query [B, L, D], key [B, S, D], value [B, S, Dv], lengths, attn_mask) gives [B, L, Dv]; lengths (int64 [B] or
    [B, L]) say how many keys take part.
    """

    def __init__(self, dropout: float = 0.0, scaled: bool = True) -> None:
        super().__init__(dropout)
        self.scaled = scaled

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: torch.Tensor | None = None,
        attn_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        scale = query.shape[-1] ** -0.5 if self.scaled else 1.0
        return F.dot_attention(query, key, value, attn_mask, lengths, self._p, scale=scale)


class CosineAttention(_Scored):
    """Attention by cosine similarity times `scale`; forward as in DotAttention. Graves et al. 2014."""

    def __init__(self, scale: float = 1.0, dropout: float = 0.0) -> None:
        super().__init__(dropout)
        self.scale = scale

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: torch.Tensor | None = None,
        attn_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return F.cosine_attention(query, key, value, attn_mask, lengths, self._p, scale=self.scale)


class GaussianAttention(_Scored):
    """Nadaraya-Watson regression with a Gaussian kernel; forward as in DotAttention.

    width: the kernel's standard deviation; a parameter with learned=True.
    """

    def __init__(self, width: float = 1.0, learned: bool = False, dropout: float = 0.0) -> None:
        super().__init__(dropout)
        self.width = torch.nn.Parameter(torch.tensor(float(width))) if learned else float(width)

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: torch.Tensor | None = None,
        attn_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if isinstance(self.width, float):
            return F.gaussian_attention(query, key, value, attn_mask, lengths, self._p, width=self.width)
        return F.gaussian_attention(query / self.width, key / self.width, value, attn_mask, lengths, self._p)


class AdditiveAttention(_Scored):
    """Additive attention: score(q, k) = w_v · tanh(W_q q + W_k k). Bahdanau et al. 2015, appendix A.1.2.

    Args:
        query_size, key_size: widths of queries and keys.
        num_hiddens: width both are projected to.
        dropout: probability of dropping a probability, in training mode.

    forward as in DotAttention, but query [B, L, query_size] and key [B, S, key_size]. Where the same keys are asked again and
    again, attend() takes them as W_k(key).
    """

    def __init__(self, query_size: int, key_size: int, num_hiddens: int, dropout: float = 0.0, bias: bool = False) -> None:
        super().__init__(dropout)
        self.W_q = Linear(query_size, num_hiddens, bias=bias)
        self.W_k = Linear(key_size, num_hiddens, bias=bias)
        self.w_v = Linear(num_hiddens, 1, bias=False)

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: torch.Tensor | None = None,
        attn_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return self.attend(query, self.W_k(key), value, lengths, attn_mask)

    def attend(
        self, query: torch.Tensor, projected: torch.Tensor, value: torch.Tensor, lengths: torch.Tensor | None = None,
        attn_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """forward() with keys that W_k has projected: [B, S, num_hiddens]."""
        return F.additive_attention(self.W_q(query), projected, value, self.w_v.weight[0], attn_mask, lengths, self._p)

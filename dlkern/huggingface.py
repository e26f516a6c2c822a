"""Hugging Face transformers on dlkern: attn_implementation="dlkern", and the layers they have of their own."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch

from dlkern.nn.functional import linear, scaled_dot_product_attention
from dlkern.overrides import enabled

__all__ = ["NAME", "register_transformers"]

NAME = "dlkern"


def __getattr__(name: str) -> type[torch.nn.Module]:
    """Conv1D, which convert() gives the modules of transformers' class of that name; made once transformers is there."""
    if name != "Conv1D":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from dlkern.convert import TO_DLKERN, TO_TORCH

    theirs: Any = import_module("transformers.pytorch_utils").Conv1D

    class Conv1D(theirs):  # type: ignore[misc]
        """transformers.pytorch_utils.Conv1D, GPT-2's linear layer, on dlkern's kernels: x [..., nx] to x @ weight + bias."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return linear(x, self.weight.t(), self.bias)

    Conv1D.__qualname__ = Conv1D.__name__  # pickle finds it here
    globals()[name] = TO_DLKERN[theirs] = Conv1D
    TO_TORCH[Conv1D] = theirs
    return Conv1D


# Models that, in transformers 4, choose a class of attention from a table instead of asking the interface.
_TABLES = {
    "albert": "ALBERT_ATTENTION_CLASSES", "bert": "BERT_SELF_ATTENTION_CLASSES",
    "camembert": "CAMEMBERT_SELF_ATTENTION_CLASSES", "roberta": "ROBERTA_SELF_ATTENTION_CLASSES",
    "xlm_roberta": "XLM_ROBERTA_SELF_ATTENTION_CLASSES",
}  # fmt: skip


def attention(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    attention_mask: torch.Tensor | None, dropout: float = 0.0, scaling: float | None = None,
    is_causal: bool | None = None, *, softcap: float | None = None, head_mask: torch.Tensor | None = None,
    s_aux: torch.Tensor | None = None, position_bias: torch.Tensor | None = None, **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as transformers' interface asks for it.

    Args:
        module: the calling layer; its is_causal counts where the argument is None.
        query: [B, H, L, D]; key, value: [B, Hk, S, D], Hk a divisor of H: heads of keys are shared, not repeated.
        attention_mask: bool or floating point, broadcasting to [B, H, L, S] or with more keys; or None.
        dropout, scaling, softcap: as scaled_dot_product_attention's dropout_p, scale and softcap.
        head_mask: factors of heads, broadcasting to [B, H, 1, 1].

    Returns:
        [B, L, H, D], and None for the weights, which are never made.

    Raises:
        ValueError: attention sinks (s_aux), a position_bias, or a head_mask that differs by query or key.
    """
    if s_aux is not None or position_bias is not None:
        raise ValueError(f'attn_implementation="{NAME}" has no attention sinks and no position_bias; use "eager"')
    if head_mask is not None and head_mask.shape[-2:] != (1, 1):
        raise ValueError(f'attn_implementation="{NAME}": head_mask {tuple(head_mask.shape)} must end in 1, 1')
    if attention_mask is not None and attention_mask.dim() == 4:
        attention_mask = attention_mask[..., : key.shape[-2]]
    if is_causal is None:
        is_causal = attention_mask is None and getattr(module, "is_causal", True)
    # A single query is the newest: aligned top-left it would see the first key alone.
    is_causal = bool(is_causal) and query.shape[2] > 1
    output = scaled_dot_product_attention(
        query, key, value, attention_mask, dropout, is_causal, scale=scaling, enable_gqa=key.shape[1] != query.shape[1],
        softcap=softcap or 0.0,
    )  # fmt: skip
    if head_mask is not None:
        output = output * head_mask
    return output.transpose(1, 2).contiguous(), None


def _old_class(cls: type[torch.nn.Module]) -> type[torch.nn.Module]:
    """A subclass whose calls of torch's attention run on dlkern."""

    class DlkernSelfAttention(cls):  # type: ignore[valid-type, misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            with enabled():
                return super().forward(*args, **kwargs)

    return DlkernSelfAttention


def register_transformers() -> None:
    """Makes attn_implementation="dlkern" known to Hugging Face transformers; calling it again changes nothing.

    Masks are those transformers makes for "sdpa". As there, no attention weights come back. Covers every model that asks
    transformers' AttentionInterface; in transformers 4 also ALBERT, BERT, CamemBERT, RoBERTa and XLM-RoBERTa, which do not.
    Others of version 4 that look their attention up in a table of their own (DistilBERT, Falcon, ModernBERT ...) raise
    KeyError for the name: run them with "sdpa", inside enabled().

    Raises:
        RuntimeError: transformers is not installed, or older than 4.53.

    Example:
        >>> dlkern.register_transformers()
        >>> model = AutoModel.from_pretrained("gpt2", attn_implementation="dlkern")
    """
    try:
        from transformers import AttentionInterface
        from transformers.masking_utils import AttentionMaskInterface
    except ImportError as error:
        raise RuntimeError(f"register_transformers needs transformers 4.53 or newer: {error}") from error
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, AttentionMaskInterface()["sdpa"])
    for model, name in _TABLES.items():
        table = getattr(import_module(f"transformers.models.{model}.modeling_{model}"), name, None)
        if table is not None and NAME not in table:
            table[NAME] = _old_class(table["sdpa"])

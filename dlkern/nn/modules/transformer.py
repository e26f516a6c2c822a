"""Transformer modules, whose parts are dlkern's, too, and which never take torch's inference shortcut.

In eval mode without grad, torch.nn.TransformerEncoderLayer hands its weights to one aten op and calls none of its
submodules, so converted layers and hooks inside would be passed by; and torch.nn.TransformerEncoder packs padded
batches into nested tensors for that op.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch

__all__ = ["Transformer", "TransformerDecoder", "TransformerDecoderLayer", "TransformerEncoder", "TransformerEncoderLayer"]


class _Whole(torch.nn.Module):
    """Its parts, which torch's constructors make, become dlkern's."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.__signature__ = inspect.signature(cls.__bases__[1])  # type: ignore[attr-defined]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        from dlkern.convert import convert

        super().__init__(*args, **kwargs)
        for part in self.children():
            convert(part)


class TransformerEncoderLayer(_Whole, torch.nn.TransformerEncoderLayer):
    """torch.nn.TransformerEncoderLayer whose submodules are called in eval mode as in training.

    Source: Vaswani et al. 2017, "Attention is all you need", section 3.1; norm_first is Xiong et al. 2020, fig. 1.
    """

    def forward(
        self,
        src: torch.Tensor,
        src_mask: torch.Tensor | None = None,
        src_key_padding_mask: torch.Tensor | None = None,
        is_causal: bool = False,
    ) -> torch.Tensor:
        if src.is_nested:
            return super().forward(src, src_mask, src_key_padding_mask, is_causal)  # torch's fast path
        if self.norm_first:
            x = src + self._sa_block(self.norm1(src), src_mask, src_key_padding_mask, is_causal=is_causal)
            return x + self._ff_block(self.norm2(x))
        x = self.norm1(src + self._sa_block(src, src_mask, src_key_padding_mask, is_causal=is_causal))
        return self.norm2(x + self._ff_block(x))


class TransformerEncoder(torch.nn.TransformerEncoder):
    """torch.nn.TransformerEncoder without nested tensors: padded positions hold in eval mode, too, what the layers
    compute for them in training mode, where torch may return zeros."""

    @property
    def use_nested_tensor(self) -> bool:
        return False

    @use_nested_tensor.setter
    def use_nested_tensor(self, value: bool) -> None:
        # Kept for revert(), which makes this torch's class again.
        self.__dict__["use_nested_tensor"] = value


class TransformerDecoderLayer(_Whole, torch.nn.TransformerDecoderLayer):
    """torch.nn.TransformerDecoderLayer on dlkern's kernels. Vaswani et al. 2017, section 3.1."""


class TransformerDecoder(torch.nn.TransformerDecoder):
    """torch.nn.TransformerDecoder; it runs on what the layers it is given run on."""


class Transformer(_Whole, torch.nn.Transformer):
    """torch.nn.Transformer on dlkern's kernels, a custom encoder and decoder too. Vaswani et al. 2017, fig. 1."""

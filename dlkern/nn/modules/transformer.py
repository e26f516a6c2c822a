"""Transformer encoder modules that never take torch's inference shortcut.

In eval mode without grad, torch.nn.TransformerEncoderLayer hands its weights to one aten op and calls none of its
submodules, so converted layers and hooks inside would be passed by; and torch.nn.TransformerEncoder packs padded
batches into nested tensors for that op.
"""

from __future__ import annotations

import torch

__all__ = ["TransformerEncoder", "TransformerEncoderLayer"]


class TransformerEncoderLayer(torch.nn.TransformerEncoderLayer):
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

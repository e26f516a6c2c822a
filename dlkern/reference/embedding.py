"""Embedding in plain torch expressions."""

from __future__ import annotations

import torch

__all__ = ["embedding", "embedding_backward"]


def embedding(
    weight: torch.Tensor, indices: torch.Tensor, padding_idx: int, scale_grad_by_freq: bool
) -> torch.Tensor:
    """torch's own embedding, with a dense gradient."""
    return torch.embedding(weight, indices, padding_idx, scale_grad_by_freq, False)


def embedding_backward(
    grad_output: torch.Tensor, indices: torch.Tensor, num_embeddings: int, padding_idx: int, scale_grad_by_freq: bool
) -> torch.Tensor:
    """Gradient of the table: row v is the sum of grad_output where indices are v, divided by how many those are with
    scale_grad_by_freq; zero for padding_idx."""
    index = indices.reshape(-1).long()
    factor = (index != padding_idx).to(grad_output.dtype)
    if scale_grad_by_freq:
        counts = torch.zeros(num_embeddings, dtype=grad_output.dtype, device=index.device)
        counts = counts.index_add(0, index, torch.ones_like(factor))
        factor = factor / counts[index]
    rows = grad_output.reshape(index.numel(), grad_output.shape[-1]) * factor[:, None]
    return rows.new_zeros(num_embeddings, rows.shape[1]).index_add(0, index, rows)

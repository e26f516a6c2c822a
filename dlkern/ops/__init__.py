"""A file a family: schemas, fake kernels, autograd and the dispatch function of its ops."""

from dlkern.ops import (
    attention,
    attention_rotary,
    attention_varlen,
    batch_norm,
    batch_norm_sync,
    conv,
    dropout,
    embedding,
    layer_norm,
    linear,
    loss,
    optim,
    pooling,
    positions,
    rnn,
)
from dlkern.ops._activation import Activation

__all__ = [
    "Activation", "attention", "attention_rotary", "attention_varlen", "batch_norm", "batch_norm_sync", "conv", "dropout",
    "embedding", "layer_norm", "linear", "loss", "optim", "pooling", "positions", "rnn",
]  # fmt: skip

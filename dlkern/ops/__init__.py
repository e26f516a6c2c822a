"""A file a family: schemas, fake kernels, autograd and the dispatch function of its ops."""

from dlkern.ops import conv, dropout

__all__ = ["conv", "dropout"]

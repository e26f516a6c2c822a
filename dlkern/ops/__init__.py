"""A file a family: schemas, fake kernels, autograd and the dispatch function of its ops."""

from dlkern.ops import conv, dropout, linear, loss
from dlkern.ops._activation import Activation

__all__ = ["Activation", "conv", "dropout", "linear", "loss"]

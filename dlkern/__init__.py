"""dlkern: fast kernels for the classic deep-learning layers, as drop-in PyTorch ops that train."""

from dlkern import _native, nn, testing
from dlkern.columns import backend
from dlkern.ops._activation import Activation
from dlkern.trace import trace

__version__ = "0.1.0"
__all__ = ["Activation", "backend", "nn", "testing", "trace"]

_native.load()

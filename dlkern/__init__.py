"""dlkern: fast kernels for the classic deep-learning layers, as drop-in PyTorch ops that train."""

from dlkern import _native, nn, optim, testing
from dlkern.columns import backend
from dlkern.convert import conversion_report, convert, revert
from dlkern.flops import register_flop_formulas
from dlkern.freeze import freeze, unfreeze
from dlkern.huggingface import register_transformers
from dlkern.ops._activation import Activation
from dlkern.overrides import enabled
from dlkern.trace import trace

__version__ = "0.1.0"
__all__ = [
    "Activation", "backend", "conversion_report", "convert", "enabled", "freeze", "nn", "optim", "register_flop_formulas",
    "register_transformers", "revert", "testing", "trace", "unfreeze",
]  # fmt: skip

_native.load()

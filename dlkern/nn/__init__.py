"""torch.nn's modules and functions on dlkern's kernels."""

from dlkern.nn import functional, init, utils
from dlkern.nn.heads import head_importance, prune_heads
from dlkern.nn.modules import *  # noqa: F403
from dlkern.nn.modules import __all__ as _modules

__all__ = ["functional", "head_importance", "init", "prune_heads", "utils", *_modules]

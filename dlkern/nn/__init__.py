"""torch.nn's modules and functions on dlkern's kernels."""

from dlkern.nn import functional, init, utils
from dlkern.nn.modules import *  # noqa: F403
from dlkern.nn.modules import __all__ as _modules

__all__ = ["functional", "init", "utils", *_modules]

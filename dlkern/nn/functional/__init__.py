"""torch.nn.functional's names and signatures, on dlkern's kernels. A file a family."""

from dlkern.nn.functional.conv import conv2d
from dlkern.nn.functional.dropout import dropout

__all__ = ["conv2d", "dropout"]

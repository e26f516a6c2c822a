"""torch.nn.functional's names and signatures, on dlkern's kernels. A file a family."""

from dlkern.nn.functional.conv import conv2d
from dlkern.nn.functional.dropout import dropout
from dlkern.nn.functional.linear import linear
from dlkern.nn.functional.loss import cross_entropy

__all__ = ["conv2d", "cross_entropy", "dropout", "linear"]

"""Subclasses of torch.nn's modules, a file a family: constructors, repr, state_dict and isinstance are torch's."""

from dlkern.nn.modules.conv import Conv2d, LazyConv2d
from dlkern.nn.modules.dropout import Dropout
from dlkern.nn.modules.linear import LazyLinear, Linear
from dlkern.nn.modules.loss import CrossEntropyLoss
from dlkern.nn.modules.transformer import TransformerEncoder, TransformerEncoderLayer

__all__ = [
    "Conv2d", "CrossEntropyLoss", "Dropout", "LazyConv2d", "LazyLinear", "Linear", "TransformerEncoder",
    "TransformerEncoderLayer",
]  # fmt: skip

"""Subclasses of torch.nn's modules, a file a family: constructors, repr, state_dict and isinstance are torch's."""

from dlkern.nn.modules.attention import (
    AdditiveAttention,
    CosineAttention,
    DotAttention,
    GaussianAttention,
    MultiheadAttention,
    PrunedMultiheadAttention,
)
from dlkern.nn.modules.batch_norm import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    LazyBatchNorm1d,
    LazyBatchNorm2d,
    LazyBatchNorm3d,
    SyncBatchNorm,
)
from dlkern.nn.modules.conv import (
    Conv1d,
    Conv2d,
    ConvTranspose1d,
    ConvTranspose2d,
    LazyConv1d,
    LazyConv2d,
    LazyConvTranspose1d,
    LazyConvTranspose2d,
)
from dlkern.nn.modules.dropout import Dropout, Dropout1d, Dropout2d, Dropout3d
from dlkern.nn.modules.embedding import Embedding
from dlkern.nn.modules.layer_norm import LayerNorm
from dlkern.nn.modules.linear import LazyLinear, Linear, TensorReduction
from dlkern.nn.modules.loss import CrossEntropyLoss
from dlkern.nn.modules.pooling import (
    AdaptiveAvgPool1d,
    AdaptiveAvgPool2d,
    AdaptiveMaxPool1d,
    AdaptiveMaxPool2d,
    AvgPool1d,
    AvgPool2d,
    LPPool1d,
    LPPool2d,
    MaxPool1d,
    MaxPool2d,
)
from dlkern.nn.modules.positions import LearnedPositions, RelativePositionBias, RotaryPositions, SinusoidalPositions
from dlkern.nn.modules.rnn import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell
from dlkern.nn.modules.transformer import (
    Transformer,
    TransformerDecoder,
    TransformerDecoderLayer,
    TransformerEncoder,
    TransformerEncoderLayer,
)

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "AdaptiveAvgPool1d",
    "AdaptiveAvgPool2d",
    "AdaptiveMaxPool1d",
    "AdaptiveMaxPool2d",
    "AdditiveAttention",
    "AvgPool1d",
    "AvgPool2d",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "Conv1d",
    "Conv2d",
    "ConvTranspose1d",
    "ConvTranspose2d",
    "CosineAttention",
    "CrossEntropyLoss",
    "DotAttention",
    "Dropout",
    "Dropout1d",
    "Dropout2d",
    "Dropout3d",
    "Embedding",
    "GRUCell",
    "GaussianAttention",
    "LPPool1d",
    "LPPool2d",
    "LSTMCell",
    "LayerNorm",
    "LazyBatchNorm1d",
    "LazyBatchNorm2d",
    "LazyBatchNorm3d",
    "LazyConv1d",
    "LazyConv2d",
    "LazyConvTranspose1d",
    "LazyConvTranspose2d",
    "LazyLinear",
    "LearnedPositions",
    "Linear",
    "MaxPool1d",
    "MaxPool2d",
    "MultiheadAttention",
    "PrunedMultiheadAttention",
    "RNNCell",
    "RelativePositionBias",
    "RotaryPositions",
    "SinusoidalPositions",
    "SyncBatchNorm",
    "TensorReduction",
    "Transformer",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
]

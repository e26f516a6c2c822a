"""torch.nn.functional's names and signatures, on dlkern's kernels. A file a family."""

from dlkern.nn.functional.attention import (
    additive_attention,
    cosine_attention,
    dot_attention,
    gaussian_attention,
    scaled_dot_product_attention,
)
from dlkern.nn.functional.batch_norm import batch_norm, batch_norm_act
from dlkern.nn.functional.conv import conv1d, conv2d, conv2d_act, conv_transpose1d, conv_transpose2d
from dlkern.nn.functional.dropout import dropout, dropout1d, dropout2d, dropout3d
from dlkern.nn.functional.embedding import embedding
from dlkern.nn.functional.layer_norm import layer_norm
from dlkern.nn.functional.linear import linear, tensor_reduction
from dlkern.nn.functional.loss import cross_entropy, perplexity
from dlkern.nn.functional.multi_head_attention import multi_head_attention_forward
from dlkern.nn.functional.pooling import (
    adaptive_avg_pool1d,
    adaptive_avg_pool2d,
    adaptive_max_pool1d,
    adaptive_max_pool1d_with_indices,
    adaptive_max_pool2d,
    adaptive_max_pool2d_with_indices,
    avg_pool1d,
    avg_pool2d,
    lp_pool1d,
    lp_pool2d,
    max_pool1d,
    max_pool1d_with_indices,
    max_pool2d,
    max_pool2d_with_indices,
)
from dlkern.nn.functional.positions import (
    alibi_slopes,
    relative_position_buckets,
    rotary,
    rotary_angles,
    sinusoidal_positions,
)
from dlkern.nn.functional.rnn import gru, lstm, rnn_relu, rnn_tanh
from dlkern.nn.functional.varlen import varlen_attn

__all__ = [
    "adaptive_avg_pool1d",
    "adaptive_avg_pool2d",
    "adaptive_max_pool1d",
    "adaptive_max_pool1d_with_indices",
    "adaptive_max_pool2d",
    "adaptive_max_pool2d_with_indices",
    "additive_attention",
    "alibi_slopes",
    "avg_pool1d",
    "avg_pool2d",
    "batch_norm",
    "batch_norm_act",
    "conv1d",
    "conv2d",
    "conv2d_act",
    "conv_transpose1d",
    "conv_transpose2d",
    "cosine_attention",
    "cross_entropy",
    "dot_attention",
    "dropout",
    "dropout1d",
    "dropout2d",
    "dropout3d",
    "embedding",
    "gaussian_attention",
    "gru",
    "layer_norm",
    "linear",
    "lp_pool1d",
    "lp_pool2d",
    "lstm",
    "max_pool1d",
    "max_pool1d_with_indices",
    "max_pool2d",
    "max_pool2d_with_indices",
    "multi_head_attention_forward",
    "perplexity",
    "relative_position_buckets",
    "rnn_relu",
    "rnn_tanh",
    "rotary",
    "rotary_angles",
    "scaled_dot_product_attention",
    "sinusoidal_positions",
    "tensor_reduction",
    "varlen_attn",
]

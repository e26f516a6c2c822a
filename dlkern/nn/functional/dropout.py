"""dropout, of elements and of channels, with torch.nn.functional's signatures."""

from __future__ import annotations

import warnings

import torch
from torch.overrides import handle_torch_function

from dlkern import ops
from dlkern import trace as tracing
from dlkern.ops import _plain

__all__ = ["dropout", "dropout1d", "dropout2d", "dropout3d", "feature_dropout"]


def _seed(input: torch.Tensor) -> torch.Tensor:
    # A tensor on the device: obeys torch.manual_seed, and a CUDA graph draws a new one at each replay.
    return torch.randint(0, 2**62, (), device=input.device)


def _check_probability(p: float) -> None:
    if p < 0.0 or p > 1.0:
        raise ValueError(f"dropout probability has to be between 0 and 1, but got {p}")


def dropout(input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    """torch.nn.functional.dropout, without a stored mask.

    Args:
        input: floating-point tensor of any shape.
        p: probability of an element to be zeroed.
        training: apply dropout; otherwise the input comes back as it is.
        inplace: write the result into `input`.

    Returns:
        A tensor of input's shape, dtype and memory format: each element zero with probability p, else
        input / (1 - p). Srivastava et al. 2014, "Dropout". The mask follows torch.manual_seed; its elements are
        not the ones torch itself would drop.

    Raises:
        ValueError: p is not in [0, 1].
    """
    _check_probability(p)
    if not training or p == 0.0:
        return input
    if _plain.overridden(input):
        return handle_torch_function(dropout, (input,), input, p, training, inplace)
    if not isinstance(input, torch.Tensor):
        return torch.nn.functional.dropout(input, p, training, inplace)
    reason = _plain.laid_out(input)
    if reason is None and not input.is_floating_point():
        reason = "not a floating-point tensor"
    if reason is not None:
        if tracing.active:
            tracing.record("dropout", "torch", reason, input)
        return torch.nn.functional.dropout(input, p, training, inplace)
    seed = _seed(input)
    column = _plain.column("dropout", input)
    if column is not None:
        output = ops.dropout.run(column, input, p, seed)
    else:
        output = ops.dropout.dropout(input, p, seed)
    return input.copy_(output) if inplace else output


def feature_dropout(input: torch.Tensor, p: float, training: bool, op: str = "dropout2d") -> torch.Tensor:
    """torch.feature_dropout: channels of [N, C, ...], whatever the dimensions; `op` is the name for trace()."""
    if not training or p == 0.0:
        return input
    if not input.is_floating_point() or input.dim() < 2:
        if tracing.active:
            tracing.record(op, "torch", "not a floating-point tensor with channels", input)
        return torch.feature_dropout(input, p, training)
    seed = _seed(input)
    column = _plain.column(op, input)
    if column is not None:
        return ops.dropout.run_feature(column, input, p, seed)
    return ops.dropout.feature_dropout(input, p, seed, op)


def _by_channel(
    op: str, input: torch.Tensor, p: float, training: bool, inplace: bool, unbatched: int | None
) -> torch.Tensor:
    """feature_dropout of a batch, or of one image where input has `unbatched` dimensions."""
    if not training or p == 0.0:
        return input
    if input.dim() == unbatched:
        output = feature_dropout(input.unsqueeze(0), p, training, op).squeeze(0)
    else:
        output = feature_dropout(input, p, training, op)
    return input.copy_(output) if inplace else output


def _warn(op: str, input: torch.Tensor, spatial: int) -> None:
    """torch's deprecation of other dimensions."""
    if input.dim() not in (spatial + 1, spatial + 2):
        warnings.warn(
            f"{op}: Received a {input.dim()}-D input to {op}, which is deprecated and will result in an error in a "
            f"future release. {op} drops channels of {spatial + 1}-D or {spatial + 2}-D inputs; dropout drops elements "
            "of any.",
            stacklevel=3,
        )


def dropout1d(input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    """torch.nn.functional.dropout1d: dropout of whole channels of [N, C, L] or [C, L].

    Args:
        input: floating-point [N, C, L] or [C, L].
        p: probability of a channel to be zeroed.
        training, inplace: as in dropout.

    Returns:
        A tensor of input's shape and dtype: each channel of each sequence zero with probability p, else
        input / (1 - p). Tompson et al. 2015, "Efficient object localization using convolutional networks".

    Raises:
        ValueError: p is not in [0, 1].
        RuntimeError: input has other dimensions.
    """
    _check_probability(p)
    if input.dim() not in (2, 3):
        return torch.nn.functional.dropout1d(input, p, training, inplace)  # raises its own exception
    return _by_channel("dropout1d", input, p, training, inplace, 2)


def dropout2d(input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    """torch.nn.functional.dropout2d: dropout1d of [N, C, H, W]. A 3-D input is [N, C, L], as torch still has it, and
    warned about."""
    _check_probability(p)
    _warn("dropout2d", input, 2)
    if input.dim() == 3:
        warnings.warn(
            "dropout2d: Received a 3D input to dropout2d and assuming that channel-wise 1D dropout behavior is desired - "
            "input is interpreted as shape (N, C, L). Use dropout1d to keep that: a future torch will read (C, H, W).",
            stacklevel=2,
        )
    return _by_channel("dropout2d", input, p, training, inplace, None)


def dropout3d(input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    """torch.nn.functional.dropout3d: dropout1d of [N, C, D, H, W] or [C, D, H, W]."""
    _check_probability(p)
    _warn("dropout3d", input, 3)
    unbatched = None if input.dim() == 5 else input.dim()
    return _by_channel("dropout3d", input, p, training, inplace, unbatched)

"""Whether torch's settings allow TF32, for the columns that run on NVIDIA GPUs; asked at each launch, as torch does."""

from __future__ import annotations

import ctypes
from typing import Any

import torch

__all__ = ["allow_tf32_cudnn", "allow_tf32_matmul", "tell"]


def _tf32(module: Any, newer: Any) -> bool:
    try:
        return bool(module.allow_tf32)
    except RuntimeError:  # set through torch's newer names
        return bool(newer.fp32_precision == "tf32")


def allow_tf32_matmul() -> bool:
    """torch.backends.cuda.matmul.allow_tf32."""
    return _tf32(torch.backends.cuda.matmul, torch.backends.cuda.matmul)


def allow_tf32_cudnn() -> bool:
    """torch.backends.cudnn.allow_tf32, which torch's convolutions and recurrent layers go by."""
    cudnn: Any = torch.backends.cudnn  # its types lack `conv`
    return _tf32(cudnn, cudnn.conv)


@ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int)
def _source(products: int) -> int:
    return allow_tf32_matmul() if products else allow_tf32_cudnn()


def tell(library: ctypes.CDLL) -> None:
    """Lets a library with the CUDA column's ops ask (csrc/ops/cuda_precision.cpp); one without them is left alone."""
    if hasattr(library, "dlkern_set_tf32_source"):
        library.dlkern_set_tf32_source(_source)

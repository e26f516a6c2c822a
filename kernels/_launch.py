"""What every launcher shares: accumulator types, checks, and launching on the tensors' device."""

import contextlib

import torch
import triton.language as tl

from dlkern._precision import allow_tf32_cudnn, allow_tf32_matmul  # noqa: F401  (launchers import them from here)
from dlkern.ops._layout import suggests_channels_last  # noqa: F401

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def accumulator(dtype):
    """The type a kernel computes in: float64 for float64, else float32."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def triton_type(dtype):
    """A torch dtype as Triton's."""
    return getattr(tl, {torch.float32: "float32", torch.float64: "float64", torch.float16: "float16"}.get(dtype, "bfloat16"))


def accumulator_dtype(dtype):
    """The same as a torch dtype, for tensors between kernels."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def dot_precision(dtype, allow_tf32):
    """tl.dot's input_precision: TF32 only for float32, and only where torch's own setting allows it."""
    return "tf32" if dtype == torch.float32 and allow_tf32 else "ieee"


def check(ok, message):
    """Raises RuntimeError unless ok: a direct call of a raw op may pass anything."""
    if not ok:
        raise RuntimeError(message)


def check_tensors(op, first, *others, dtypes=DTYPES):
    """Same device and dtype, and a dtype the column has. None among the others is skipped."""
    check(first.dtype in dtypes, f"{op}: the triton column has no {first.dtype}")
    for other in others:
        if other is not None:
            check(other.device == first.device, f"{op}: tensors on {first.device} and {other.device}")
            check(other.dtype == first.dtype, f"{op}: tensors of {first.dtype} and {other.dtype}")


def launch(kernel, grid, *args, **options):
    """kernel[grid](*args, **options) on the device of the first tensor among args."""
    device = next(a.device for a in args if isinstance(a, torch.Tensor))
    on_device = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if on_device else contextlib.nullcontext():
        kernel[grid](*args, **options)


def is_channels_last(x):
    """Whether x is dense with channels innermost, and not contiguous as well."""
    return x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def dense(x):
    """x itself where it is contiguous or channels_last, else a contiguous copy."""
    return x if x.is_contiguous() or is_channels_last(x) else x.contiguous()


def empty(size, like, channels_last, dtype=None):
    """An uninitialised tensor on like's device."""
    memory_format = torch.channels_last if channels_last and len(size) == 4 else torch.contiguous_format
    return torch.empty(size, dtype=dtype or like.dtype, device=like.device, memory_format=memory_format)


def is_large(*tensors):
    """Whether element offsets need 64 bits."""
    last = (sum((n - 1) * s for n, s in zip(t.shape, t.stride())) for t in tensors if t is not None)
    return any(offset >= 2**31 - 2**20 for offset in last)



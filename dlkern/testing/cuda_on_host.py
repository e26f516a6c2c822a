"""The CUDA column's kernels on the host (csrc/cuda_on_host): which library serves, thread orders, what it found.

dlkern.testing.emulated() loads the library on the first call of the cuda column. The environment variable
DLKERN_CUDA_ON_HOST chooses: "plain" (default), "checked" (races, uninitialised reads, accesses out of bounds) or
"asan"; one process uses one. Build them with `make cuda-on-host`.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator
from pathlib import Path

import torch

from dlkern import _precision

__all__ = [
    "ORDERS", "clear", "errors", "hopper", "last_kernel", "library_path", "load", "loaded", "messages", "most_numbers",
    "multiprocessors", "precision_settings", "raise_if_errors", "shared_bytes", "thread_order", "unchecked_indices",
]  # fmt: skip

ORDERS = ("forward", "reverse", "random")

_VARIANTS = {"plain": "cuda_on_host", "checked": "cuda_on_host_checked", "asan": "cuda_on_host_asan"}
_library: ctypes.CDLL | None = None


def library_path() -> Path:
    """Where the library that DLKERN_CUDA_ON_HOST names is, built or not."""
    variant = os.environ.get("DLKERN_CUDA_ON_HOST", "plain")
    if variant not in _VARIANTS:
        raise RuntimeError(f"DLKERN_CUDA_ON_HOST: expected one of {tuple(_VARIANTS)}, got {variant!r}")
    root = Path(__file__).resolve().parent.parent.parent
    return root / "build" / _VARIANTS[variant] / "libdlkern_cuda_on_host.so"


def open_library(path: Path) -> ctypes.CDLL:
    """A library over csrc/cuda_on_host, with the types of its functions told to ctypes."""
    library = ctypes.CDLL(str(path))
    library.cuda_on_host_errors.restype = ctypes.c_int64
    library.cuda_on_host_messages.restype = ctypes.c_char_p
    library.cuda_on_host_last_kernel.restype = ctypes.c_char_p
    library.cuda_on_host_set_most_numbers.argtypes = [ctypes.c_int64]
    library.cuda_on_host_set_shared_bytes.argtypes = [ctypes.c_int64]
    library.cuda_on_host_set_order.argtypes = [ctypes.c_int, ctypes.c_uint]
    return library


def loaded() -> bool:
    return _library is not None


def load() -> ctypes.CDLL:
    """Registers the cuda column's ops for CPU tensors, once.

    Raises:
        RuntimeError: the library is not built, or does not load.
    """
    global _library
    if _library is None:
        path = library_path()
        if not path.exists():
            raise RuntimeError(f"the CUDA column on the host is not built ({path}): run `make cuda-on-host`")
        try:
            torch.ops.load_library(str(path))
            _library = open_library(path)
        except OSError as error:
            raise RuntimeError(f"the CUDA column on the host does not load: {error}") from error
    return _library


def errors() -> int:
    """How many findings there were since clear()."""
    return int(load().cuda_on_host_errors())


def messages() -> str:
    """The first of the findings, a line each: kernel, what, block and thread."""
    return load().cuda_on_host_messages().decode()


def last_kernel() -> str:
    """Name of the kernel that ran last."""
    return load().cuda_on_host_last_kernel().decode()


def clear() -> None:
    load().cuda_on_host_clear()


def raise_if_errors() -> None:
    """Raises RuntimeError with the findings, where there are any, and forgets them."""
    if _library is not None and errors():
        count, text = errors(), messages()
        clear()
        raise RuntimeError(f"CUDA on the host found {count} errors:\n{text}")


@contextlib.contextmanager
def multiprocessors(count: int) -> Iterator[None]:
    """Launches inside believe that the device has so many multiprocessors (132 by default): whether blocks fit at once."""
    load().cuda_on_host_set_multiprocessors(count)
    try:
        yield
    finally:
        load().cuda_on_host_set_multiprocessors(132)


@contextlib.contextmanager
def shared_bytes(count: int) -> Iterator[None]:
    """Blocks inside may have so many bytes of shared memory (227 KB by default; 99 KB is the least that a GPU has)."""
    load().cuda_on_host_set_shared_bytes(count)
    try:
        yield
    finally:
        load().cuda_on_host_set_shared_bytes(227 * 1024)


@contextlib.contextmanager
def most_numbers(count: int) -> Iterator[None]:
    """Kernels inside number so many items a launch at most (2^31 - 1 on a GPU): small tensors are cut as large ones are."""
    load().cuda_on_host_set_most_numbers(count)
    try:
        yield
    finally:
        load().cuda_on_host_set_most_numbers(2**31 - 1)


@contextlib.contextmanager
def precision_settings() -> Iterator[None]:
    """Inside, products of float32 go by torch's settings for TF32, as on a GPU; outside they are exact, as on a CPU."""
    _precision.tell(load())
    try:
        yield
    finally:
        load().dlkern_set_tf32_source(None)


@contextlib.contextmanager
def hopper() -> Iterator[None]:
    """Launches inside believe that the device is a Hopper, and choose the kernels written for it where they fit."""
    load().cuda_on_host_set_hopper(1)
    try:
        yield
    finally:
        load().cuda_on_host_set_hopper(0)


@contextlib.contextmanager
def thread_order(order: str, seed: int = 1) -> Iterator[None]:
    """Inside, blocks and threads run in this order: "forward", "reverse" or "random" (by `seed`)."""
    load().cuda_on_host_set_order(ORDERS.index(order), seed)
    try:
        yield
    finally:
        load().cuda_on_host_set_order(0, 1)


@contextlib.contextmanager
def unchecked_indices() -> Iterator[None]:
    """Ops inside do not look at indices, as on a GPU: their kernels meet those that are out of range."""
    load().cuda_on_host_set_looks_at_indices(0)
    try:
        yield
    finally:
        load().cuda_on_host_set_looks_at_indices(1)

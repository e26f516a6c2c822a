"""Loads the native library and tells, in words, what could not be loaded."""

from __future__ import annotations

import ctypes
import json
import os
from pathlib import Path
from typing import Any

import torch

from dlkern import _precision

__all__ = ["LIBRARY_ERROR", "cuda_unavailable", "facts", "library_loaded", "load"]

LIBRARY_ERROR: str | None = None
"""Why libdlkern.so is not in use; None when it is loaded."""

_loaded = False


def library_path() -> Path:
    """libdlkern.so beside this file, or the one DLKERN_LIBRARY names (a sanitizer build, say)."""
    return Path(os.environ.get("DLKERN_LIBRARY") or Path(__file__).parent / "libdlkern.so")


def load() -> bool:
    """Loads libdlkern.so once; False (with LIBRARY_ERROR set) where there is none or it does not load."""
    global LIBRARY_ERROR, _loaded
    if _loaded:
        return True
    path = library_path()
    if not path.exists():
        LIBRARY_ERROR = f"no native library at {path.name}: install with a C++ compiler, or run `make native`"
        return False
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        LIBRARY_ERROR = f"{path.name} does not load: {error}"
        return False
    library = ctypes.CDLL(str(path))
    library.dlkern_cpu_unavailable.restype = ctypes.c_char_p
    if reason := library.dlkern_cpu_unavailable().decode():
        LIBRARY_ERROR = f"{path.name} was {reason}"
        return False
    _precision.tell(library)
    _loaded = True
    return True


def library_loaded() -> bool:
    return _loaded


def cuda_unavailable() -> str | None:
    """Why the cuda column cannot run on this machine, or None."""
    if not load():
        return LIBRARY_ERROR
    try:
        function = ctypes.CDLL(str(library_path())).dlkern_cuda_unavailable
    except AttributeError:
        return "no CUDA kernels in this build (it was made without nvcc, or with DLKERN_CUDA=0)"
    function.restype = ctypes.c_char_p
    return function().decode() or None


def facts() -> dict[str, Any]:
    """What dlkern._C tells about build and CPU; {'error': ...} where that module is missing."""
    try:
        from dlkern import _C  # type: ignore[attr-defined]
    except ImportError as error:
        return {"error": f"dlkern._C is not there ({error})"}
    return {
        "build": _C.build_info(),
        "cpu_features": _C.cpu_features(),
        "cpu_isa": _C.cpu_isa(),
        "cpu_tiles": _C.cpu_tiles(),
        "cpu_float_tiles": _C.cpu_float_tiles(),
        "cuda_kernels": json.loads(_C.cuda_kernels_json()),
    }

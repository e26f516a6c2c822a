"""Declares ops: one schema, a fake kernel, and an op per column with the column in its name.

`define("dropout", "(Tensor input, float p, Tensor seed) -> Tensor", fake)` makes dlkern::dropout_cpu,
dlkern::dropout_triton and dlkern::dropout_cuda, opaque to torch.compile. csrc/ops implements the first (and the
last, where CUDA kernels were built), kernels/<family>.py the second.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["define", "raw"]

_library = torch.library.Library("dlkern", "FRAGMENT")

NATIVE_COLUMNS = ("cpu", "triton", "cuda")

# op -> column -> the op that runs it. Read on every call.
raw: dict[str, dict[str, Any]] = {}


def define(op: str, schema: str, fake: Callable[..., Any], *, triton: str | None = None) -> None:
    """Declares dlkern::<op>_<column> for every column.

    Args:
        op: name without the column.
        schema: arguments and results, as in torch.library.define.
        fake: the op on fake tensors: result shapes, dtypes and strides.
        triton: "module:function" that launches the Triton kernels, imported on the first call.
    """
    raw[op] = {}
    for column in NATIVE_COLUMNS:
        name = f"{op}_{column}"
        _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))
        torch.library.register_fake(f"dlkern::{name}", fake, lib=_library)
        raw[op][column] = getattr(torch.ops.dlkern, name).default
    if triton is not None:
        launcher = _lazy(triton)
        # On CUDA tensors, and on CPU tensors for the interpreter; columns.py keeps other callers away.
        for key in ("CUDA", "CPU"):
            _library.impl(f"{op}_triton", launcher, key)


def _lazy(target: str) -> Callable[..., Any]:
    module, function = target.split(":")
    loaded: list[Callable[..., Any]] = []

    def launch(*args: Any) -> Any:
        if not loaded:
            loaded.append(getattr(importlib.import_module(module), function))
        return loaded[0](*args)

    return launch

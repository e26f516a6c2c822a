"""dlkern.trace(): which column served each call, and why not another."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch

__all__ = ["Record", "trace"]


@dataclass(frozen=True)
class Record:
    """One call of a dlkern op.

    Attributes:
        op: name of the public op ("conv2d").
        backend: the column that served it; "torch" where the call was handed on to torch's own op.
        shapes: sizes of the tensor arguments.
        dtype: dtype of the first of them.
        reason: why it was not the column "auto" prefers; "" where it was.
    """

    op: str
    backend: str
    shapes: tuple[tuple[int, ...], ...]
    dtype: torch.dtype
    reason: str = ""


# The lists of the trace() blocks that are open. Recording costs one truth test a call where there are none.
active: list[list[Record]] = []


def record(op: str, backend: str, reason: str, *tensors: torch.Tensor | None) -> None:
    """Adds a record to every open trace."""
    present = [tensor for tensor in tensors if tensor is not None]
    # Of nested tensors only the jagged ones have a shape.
    shapes = tuple(() if t.is_nested and t.layout == torch.strided else tuple(t.shape) for t in present)
    entry = Record(op, backend, shapes, present[0].dtype, reason)
    for calls in active:
        calls.append(entry)


@contextlib.contextmanager
def trace() -> Iterator[list[Record]]:
    """Lists the dlkern calls made inside, in order.

    A call inside a torch.compile'd function is recorded while it is compiled, not each time it runs.

    Example:
        >>> with dlkern.trace() as calls:
        ...     model(x)
        >>> [(call.op, call.backend, call.reason) for call in calls]
    """
    calls: list[Record] = []
    active.append(calls)
    try:
        yield calls
    finally:
        # By identity: two empty lists are equal.
        active[:] = [other for other in active if other is not calls]

"""Which column serves a call: the only place that chooses.

A column ("cpu", "triton", "cuda", "reference") is an implementation of the ops. Each family declares with
`declare` what a column supports; `choose` picks the first supporting column in the order measured on this GPU
(dlkern/tuning), else in that of `_ORDER`, or the one `dlkern.backend` forces, and says why where it had to pass one
over. The choice depends on device, dtype and constant facts of the call, never on a tensor's sizes, so that a compiled
graph serves every batch size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass

import torch
from torch.autograd import forward_ad

from dlkern import _native, tuning

__all__ = ["COLUMNS", "Choice", "backend", "choose", "declare", "state", "supported", "usual"]

COLUMNS = ("cpu", "triton", "cuda", "reference")

# What "auto" tries, by device. "reference" comes last of all: a gap, and recorded as one.
_ORDER = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}


@dataclass(frozen=True)
class Choice:
    """A column and, where it is not the first that was wanted, the reason."""

    column: str
    reason: str = ""


class State:
    """Process-wide settings the choice depends on; compiled graphs are guarded on them."""

    forced: str = "auto"
    emulated: bool = False  # inside dlkern.testing.emulated(): Triton interpreted, CUDA on the host


state = State()

# (op, column) -> a function of (dtype, facts) that returns None or why the column cannot serve the call.
_support: dict[tuple[str, str], Callable[[torch.dtype, tuple[Hashable, ...]], str | None]] = {}
_dtypes: dict[tuple[str, str], tuple[torch.dtype, ...]] = {}
_cache: dict[tuple, Choice] = {}
_unavailable: dict[str, str | None] = {}
_tuned: dict[str, list[str]] | None = None  # this GPU's table, once it was looked for


class _Usual(dict[tuple[str, torch.device, torch.dtype, tuple[Hashable, ...]], str | None]):
    """The column "auto" picks for (op, device, dtype, facts), looked up once; None for the reference, whose reason is told."""

    def __missing__(self, key: tuple[str, torch.device, torch.dtype, tuple[Hashable, ...]]) -> str | None:
        op, device, dtype, facts = key
        if not isinstance(device, torch.device) or not isinstance(dtype, torch.dtype):  # of something like a tensor
            return None
        choice = _decide(op, device.type, dtype, "auto", facts)
        self[key] = None if choice.column == "reference" else choice.column
        return self[key]


usual = _Usual()


def declare(
    op: str,
    column: str,
    dtypes: tuple[torch.dtype, ...],
    refuses: Callable[[tuple[Hashable, ...]], str | None] | None = None,
) -> None:
    """Says that `column` implements `op` for `dtypes`, except where refuses(facts) gives a reason."""

    def check(dtype: torch.dtype, facts: tuple[Hashable, ...]) -> str | None:
        if dtype not in dtypes:
            return f"{column} column has no {str(dtype).removeprefix('torch.')} {op}"
        return refuses(facts) if refuses is not None else None

    _support[op, column] = check
    _dtypes[op, column] = dtypes
    _cache.clear()
    usual.clear()


def declared() -> dict[tuple[str, str], tuple[torch.dtype, ...]]:
    """The dtypes of each (op, column) that was declared."""
    return dict(_dtypes)


def unavailable(column: str) -> str | None:
    """Why a column cannot run in this process at all, or None."""
    if column not in _unavailable:
        _unavailable[column] = _probe(column)
    return _unavailable[column]


def _probe(column: str) -> str | None:
    if column == "cpu":
        return None if _native.load() else _native.LIBRARY_ERROR
    if column == "triton":
        try:
            import triton  # noqa: F401
        except ImportError:
            return "triton is not installed"
        return None
    if column == "cuda":
        return _native.cuda_unavailable()
    return None


def supported(op: str, column: str, device: str, dtype: torch.dtype, facts: tuple[Hashable, ...] = ()) -> str | None:
    """None where `column` can serve the call on this device, else the reason it cannot."""
    if column == "reference":
        return None
    check = _support.get((op, column))
    if check is None:
        return f"{column} column has no {op}"
    if column == "cpu" and device != "cpu":
        return f"cpu column serves CPU tensors, not {device}"
    if column in ("triton", "cuda") and device != "cuda" and not state.emulated:
        return f"{column} column serves CUDA tensors, not {device}"
    if column == "cuda" and device == "cpu":
        reason = check(dtype, facts)
        if reason is None:
            _load_cuda_on_host()
        return reason
    return unavailable(column) or check(dtype, facts)


def order(op: str, device: str, dtype: torch.dtype, facts: tuple[Hashable, ...] = ()) -> tuple[str, ...]:
    """The columns "auto" tries on this device, best first: as measured where it was, and the others behind."""
    global _tuned
    columns = _ORDER.get(device, ())
    if len(columns) < 2:
        return columns
    if _tuned is None:
        _tuned = tuning.load(torch.cuda.get_device_name())
    name = str(dtype).removeprefix("torch.")
    measured = _tuned.get(tuning.key(op, name, *facts)) or _tuned.get(tuning.key(op, name)) or []
    first = tuple(column for column in measured if column in columns)
    return first + tuple(column for column in columns if column not in first)


def _load_cuda_on_host() -> None:
    """Makes CPU tensors run on the cuda column's kernels; raises RuntimeError where that library is not built."""
    from dlkern.testing import cuda_on_host

    cuda_on_host.load()


_FORWARD_MODE = Choice("reference", "forward-mode differentiation")


def choose(
    op: str, device: str, dtype: torch.dtype, forced: str, emulated: bool, facts: tuple[Hashable, ...] = ()
) -> Choice:
    """The column for one call.

    Args:
        op: name of the op, as declared.
        device: torch device type of the inputs ("cpu", "cuda", ...).
        dtype: the dtype computed in.
        forced, emulated: `state.forced` and `state.emulated`, passed in so that compiled code is guarded on them.
        facts: hashable constants the op's declaration looks at.

    Raises:
        RuntimeError: a forced column cannot serve the call.
    """
    if torch.compiler.is_compiling():
        return Choice(*_constant_choice(op, device, dtype, forced, facts))
    if forward_ad._current_level >= 0:
        return _FORWARD_MODE
    key = (op, device, dtype, forced, emulated, facts)
    choice = _cache.get(key)
    if choice is None:
        choice = _cache[key] = _decide(op, device, dtype, forced, facts)
    return choice


def _constant_choice(
    op: str, device: str, dtype: torch.dtype, forced: str, facts: tuple[Hashable, ...]
) -> tuple[str, str]:
    choice = _decide(op, device, dtype, forced, facts)
    return choice.column, choice.reason


# What torch.compiler.assume_constant_result sets: the function runs while Dynamo traces, and leaves no guard on the
# tables it reads. Set by hand because the decorator imports torch._dynamo, which would double the time to import.
_constant_choice._dynamo_marked_constant = True  # type: ignore[attr-defined]

def _decide(op: str, device: str, dtype: torch.dtype, forced: str, facts: tuple[Hashable, ...]) -> Choice:
    if forced != "auto":
        reason = supported(op, forced, device, dtype, facts)
        if reason is None:
            return Choice(forced, "forced by dlkern.backend" if forced == "reference" else "")
        check = _support.get((op, forced))
        if device == "cpu" and forced in ("triton", "cuda") and not state.emulated:
            raise RuntimeError(
                f'dlkern.backend("{forced}"): {op} got CPU tensors, which only dlkern.testing.emulated() runs there'
            )
        if check is not None and unavailable(forced) is None and device == "cuda" and forced == "cpu":
            raise RuntimeError(f'dlkern.backend("cpu"): {op} got {device} tensors')
        return Choice("reference", reason)
    reasons = []
    for column in order(op, device, dtype, facts):
        reason = supported(op, column, device, dtype, facts)
        if reason is None:
            return Choice(column)
        reasons.append(reason)
    return Choice("reference", "; ".join(reasons) or f"no column serves {device} tensors")


@contextlib.contextmanager
def backend(column: str) -> Iterator[None]:
    """Forces a column for the calls inside; "auto" is the default.

    Args:
        column: "auto", "cpu", "triton", "cuda" or "reference".

    Raises:
        ValueError: any other name.
        RuntimeError: from a call inside whose tensors the column cannot take (CPU tensors for "triton" or "cuda"
            outside dlkern.testing.emulated()). What the column does not support runs on "reference" and
            dlkern.trace() says why.
    """
    if column not in (*COLUMNS, "auto"):
        raise ValueError(f"backend: expected one of {('auto', *COLUMNS)}, got {column!r}")
    before = state.forced
    state.forced = column
    try:
        yield
    finally:
        state.forced = before

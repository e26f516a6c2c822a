"""Triton kernels run on CPU tensors, in a process that also compiles them.

Triton's own interpreter (NumPy, one program after another) does the work. Three things are different here:
TRITON_INTERPRET stays unset, because it would turn every kernel of the process into an uncompilable one; what the
interpreter does wrongly is put right (bfloat16 in tl.dot and in rounding, libdevice, the last bits of tl.dot, exp and
log, which depend on the CPU, float scalars, which a GPU gets in float32 unless the kernel says float64); and every load
and store is checked:

* an address outside all tensor arguments (a lost mask) raises MemoryError;
* an element written by two programs of a launch, or written by one and read by another, raises RaceError, whatever
  the order of the programs.

All of Triton's state is restored after each launch. Tried with Triton 3.6 and 3.8.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import inspect
import itertools
import textwrap
import threading
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter as backend
from triton.runtime.jit import JITFunction

__all__ = ["RaceError", "interpreted", "launch"]

_MISSING = object()
_lock = threading.RLock()


class RaceError(RuntimeError):
    """Two programs of one launch touch the same element, and at least one of them writes it."""


# --- memory ---------------------------------------------------------------------------------------------------------


class Memory:
    """The tensors of one launch, element by element: who wrote, who read."""

    _NOBODY, _SEVERAL = -1, -2

    def __init__(self, tensors: dict[str, torch.Tensor]):
        regions: dict[tuple[int, int, int], str] = {}
        for name, tensor in tensors.items():
            if tensor.numel():
                last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
                begin, itemsize = tensor.data_ptr(), tensor.element_size()
                regions[begin, begin + (last + 1) * itemsize, itemsize] = name
        keys = sorted(regions)
        self.names = [regions[key] for key in keys]
        self.begin = np.array([key[0] for key in keys], np.uint64)
        self.end = np.array([key[1] for key in keys], np.uint64)
        self.itemsize = np.array([key[2] for key in keys], np.uint64)
        lengths = [(key[1] - key[0]) // key[2] for key in keys]
        self.first = np.array([0, *itertools.accumulate(lengths)][: len(keys)], np.int64)
        self.writer = np.full(sum(lengths), self._NOBODY, np.int32)
        self.reader = np.full(sum(lengths), self._NOBODY, np.int32)
        self.program = 0

    def _elements(self, addresses: np.ndarray, what: str) -> np.ndarray:
        region = np.searchsorted(self.begin, addresses, side="right") - 1
        bad = region < 0
        bad |= addresses >= self.end[region] if len(self.end) else True
        if bad.any():
            raise MemoryError(f"program {self.program} {what} {int(bad.sum())} elements outside every tensor argument")
        return self.first[region] + ((addresses - self.begin[region]) // self.itemsize[region]).astype(np.int64)

    def _name(self, element: int) -> str:
        return self.names[int(np.searchsorted(self.first, element, side="right")) - 1]

    def read(self, addresses: np.ndarray) -> None:
        element = self._elements(addresses, "reads")
        writer = self.writer[element]
        raced = (writer != self._NOBODY) & (writer != self.program)
        if raced.any():
            raise RaceError(f"program {self.program} reads {self._name(element[raced][0])} where another program writes")
        reader = self.reader[element]
        self.reader[element] = np.where((reader == self._NOBODY) | (reader == self.program), self.program, self._SEVERAL)

    def write(self, addresses: np.ndarray) -> None:
        element = self._elements(addresses, "writes")
        writer, reader = self.writer[element], self.reader[element]
        raced = (writer != self._NOBODY) & (writer != self.program)
        raced |= (reader != self._NOBODY) & (reader != self.program)
        if raced.any():
            raise RaceError(f"program {self.program} writes {self._name(element[raced][0])}, which another one uses")
        self.writer[element] = self.program


# --- what the interpreter does wrongly --------------------------------------------------------------------------------


def _widen(handle: Any) -> Any:
    """A bfloat16 operand of tl.dot, whose bits the interpreter would multiply as integers, in float32."""
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return backend.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _round_to_bfloat16(data: np.ndarray) -> np.ndarray:
    """To nearest even, NaN kept; the interpreter truncates."""
    bits = np.ascontiguousarray(data.astype(np.float32)).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(data), np.uint16(0x7FC0), rounded).reshape(data.shape)


def _nearest(function: Callable[..., Any], data: np.ndarray) -> np.ndarray:
    """Correctly rounded: NumPy's float32 exp, log and tanh are 0.5 to 3.4 units off in the last place, by the CPU."""
    return np.asarray(function(data.astype(np.float64))).astype(data.dtype)


def _builder_methods(memory: Memory) -> dict[str, Callable[..., Any]]:
    builder = backend.InterpreterBuilder
    this = backend.interpreter_builder

    def create_dot(a: Any, b: Any, d: Any, *rest: Any) -> Any:
        a, b = _widen(a), _widen(b)
        if d.data.dtype.kind != "f":
            return builder.create_dot(this, a, b, d, *rest)
        # Rounded once: how the BLAS that NumPy or torch finds rounds a float32 product depends on the CPU. By torch, whose
        # float64 products of small matrices are the faster ones.
        left, right = (torch.from_numpy(np.ascontiguousarray(x.data, dtype=np.float64)) for x in (a, b))
        return backend.TensorHandle(((left @ right).numpy() + d.data).astype(d.data.dtype), d.dtype.scalar)

    def cast_impl(src: Any, dst_type: Any) -> Any:
        if src.dtype.scalar in (tl.float32, tl.float64) and dst_type.scalar == tl.bfloat16:
            return backend.TensorHandle(_round_to_bfloat16(src.data), tl.bfloat16)
        return builder.cast_impl(this, src, dst_type)

    def create_exp(x: Any) -> Any:
        return backend.TensorHandle(_nearest(np.exp, x.data), x.dtype.scalar)

    def create_log(x: Any) -> Any:
        return backend.TensorHandle(_nearest(np.log, x.data), x.dtype.scalar)

    def chosen(mask: Any, ptrs: Any) -> np.ndarray:
        return np.broadcast_to(mask.data.astype(bool), ptrs.data.shape)

    def create_masked_load(ptrs: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        memory.read(ptrs.data[chosen(mask, ptrs)])
        return builder.create_masked_load(this, ptrs, mask, *rest, **named)

    def create_masked_store(ptrs: Any, value: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        memory.write(ptrs.data[chosen(mask, ptrs)])
        return builder.create_masked_store(this, ptrs, value, mask, *rest, **named)

    methods = (create_dot, cast_impl, create_exp, create_log, create_masked_load, create_masked_store)
    return {f.__name__: f for f in methods}


def _tree_sum(self: Any, input: Any) -> Any:
    """tl.sum by halves, as a GPU adds: NumPy would add the rows of a matrix one after another, and round more."""
    data = input.handle.data
    axes = range(data.ndim) if self.axis is None else [self.axis]
    for axis in axes:
        while data.shape[axis] > 1:
            low, high = np.split(data, 2, axis)
            data = low + high
    if not self.keep_dims:
        data = data.reshape(()) if self.axis is None else data.squeeze(self.axis)
    return self.to_tensor(data if data.ndim else data.item(), input.dtype)


class _Libdevice:
    """triton.language.extra.libdevice, as far as our kernels use it."""

    @staticmethod
    def tanh(x: Any) -> Any:
        return tl.tensor(backend.TensorHandle(_nearest(np.tanh, x.handle.data), x.handle.dtype), x.type)


# --- Triton's functions as Python functions ---------------------------------------------------------------------------

_rewritten: dict[Callable[..., Any], Callable[..., Any]] = {}


def _python(kernel: JITFunction) -> Callable[..., Any]:
    """The function under @triton.jit, with assignments turned into tensors as the compiler does.

    It gets its own globals: the interpreter's way of adding names to the kernel's module would reach later compiles.
    """
    function = kernel.fn
    if function not in _rewritten:
        lines, first = inspect.getsourcelines(function)
        tree = ast.parse(textwrap.dedent("".join(lines)))
        tree.body[0].decorator_list = []  # type: ignore[attr-defined]
        tree = ast.fix_missing_locations(backend.ASTTransformer().visit(tree))
        ast.increment_lineno(tree, first - 1)
        names = dict(function.__globals__, interpreter_semantic=backend.interpreter_semantic)
        if "libdevice" in names:
            names["libdevice"] = _Libdevice
        exec(compile(tree, function.__code__.co_filename, "exec"), names)
        _rewritten[function] = names[function.__name__]
    return _rewritten[function]


def _visible() -> None: ...


# A function whose globals hold both modules that have to be patched; our kernels' own hold only the first.
_visible = FunctionType(_visible.__code__, {"tl": tl, "core": tl.core})
_patches: list[tuple[Any, str, Any]] = []


_original_numpy_dtype = backend._get_np_dtype
_numpy_dtypes: dict[str, Any] = {}


def _numpy_dtype(dtype: Any) -> Any:
    """The interpreter's own, which builds a table at each call, remembered."""
    name = dtype.scalar.name
    if name not in _numpy_dtypes:
        _numpy_dtypes[name] = _original_numpy_dtype(dtype)
    return _numpy_dtypes[name]


def _index(self: Any) -> int:
    """A tensor as a range's bound; Triton 3.6 hands int() an array of one element, which NumPy 2.4 refuses."""
    return int(self.handle.data.item())


def _language_patches() -> list[tuple[Any, str, Any]]:
    """What the interpreter puts in the place of triton.language's functions: found once, set at each launch."""
    if not _patches:
        scope = backend._patch_lang(_visible)
        targets = {(id(obj), name): (obj, name) for obj, name, _ in scope._changes}
        _patches.extend(
            (obj, name, _index if name == "__index__" else vars(obj)[name]) for obj, name in targets.values()
        )
        scope.restore()
        options = dataclasses.replace(backend.interpreter_builder.options, sanitize_overflow=False)  # two thirds of the time
        _patches.append((backend.interpreter_builder, "options", options))
        _patches.append((backend, "_get_np_dtype", _numpy_dtype))
        _patches.append((backend.ReduceOps, "sum", _tree_sum))
        _patches.append((JITFunction, "__call__", lambda self, *args, **named: _python(self)(*args, **named)))
    return _patches


@contextlib.contextmanager
def _patched(changes: list[tuple[Any, str, Any]]) -> Iterator[None]:
    undo = [(obj, name, vars(obj).get(name, _MISSING)) for obj, name, _ in changes]
    try:
        for obj, name, value in changes:
            setattr(obj, name, value)
        yield
    finally:
        for obj, name, value in reversed(undo):
            if value is _MISSING:
                delattr(obj, name)
            else:
                setattr(obj, name, value)


# --- launching --------------------------------------------------------------------------------------------------------


def _scalar(value: Any, numpy_type: type, triton_type: Any) -> Any:
    return tl.tensor(backend.TensorHandle(np.array([value], numpy_type), triton_type), triton_type)


def _argument(value: Any, annotation: str) -> Any:
    """A kernel argument as the interpreter's tensor: pointers, integers, and floats in the type a GPU would get."""
    if type(value) is int and value == 1:
        return value  # the compiler makes it a constant, which has no methods
    if isinstance(value, float):
        return _scalar(value, np.float64, tl.float64) if annotation == "fp64" else _scalar(value, np.float32, tl.float32)
    return backend._implicit_cvt(value)


def launch(kernel: JITFunction, grid: tuple[int, ...], *args: Any, **named: Any) -> None:
    """Runs every program of `kernel[grid](*args, **named)` on CPU tensors, one after another."""
    names = kernel.arg_names
    bound = {p.name: p.default for p in kernel.params if p.has_default}
    bound.update(zip(names, args))
    bound.update((name, value) for name, value in named.items() if name in names)  # the others are launch options
    missing = [name for name in names if name not in bound]
    if missing:
        raise TypeError(f"{kernel.__name__}: missing arguments {missing}")
    tensors = {name: value for name, value in bound.items() if isinstance(value, torch.Tensor)}
    for name, value in list(tensors.items()):  # a table of addresses says whose they are
        tensors.update((f"{name}[{i}]", x) for i, x in enumerate(getattr(value, "reached", ())))
    memory = Memory(tensors)
    builder = backend.interpreter_builder
    changes = _language_patches() + [(builder, name, f) for name, f in _builder_methods(memory).items()]
    if callable(grid):
        grid = grid(bound)
    full_grid = (*grid, 1, 1, 1)[:3]
    with _lock, _patched(changes), np.errstate(all="ignore"):
        function = _python(kernel)
        values = {
            p.name: bound[p.name] if p.is_constexpr else _argument(bound[p.name], p.annotation) for p in kernel.params
        }
        builder.set_grid_dim(*full_grid)
        for memory.program, index in enumerate(itertools.product(*map(range, full_grid))):
            builder.set_grid_idx(*index)
            function(**values)


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Inside, `kernel[grid](...)` with CPU tensors is interpreted; CUDA tensors and warmup() compile as ever."""
    if triton.knobs.runtime.interpret:
        raise RuntimeError("dlkern.testing: unset TRITON_INTERPRET; emulated() interprets by itself")
    run = JITFunction.run

    def run_or_interpret(self: JITFunction, *args: Any, grid: Any, warmup: bool, **named: Any) -> Any:
        values = (*args, *named.values())
        if warmup or not any(isinstance(v, torch.Tensor) and v.device.type == "cpu" for v in values):
            return run(self, *args, grid=grid, warmup=warmup, **named)
        return launch(self, grid, *args, **named)

    with _patched([(JITFunction, "run", run_or_interpret)]):
        yield

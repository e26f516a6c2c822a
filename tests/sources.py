"""Which files a kernel is made of, and one digest of them: what was measured on the same text need not be measured again.

Compiling every CUDA C++ and Triton kernel for every GPU takes half an hour. Budgets carry the digest of the sources they
were measured on; the tests compile what differs, a few families always, and everything with DLKERN_AOT=all.
"""

import hashlib
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
COMPILE_ALL = os.environ.get("DLKERN_AOT") == "all"


def _closure(first: Iterable[Path], next_of: Callable[[Path], Iterable[Path]]) -> list[Path]:
    found, pending = set(), list(first)
    while pending:
        path = pending.pop()
        if path not in found:
            found.add(path)
            pending += next_of(path)
    return sorted(found)


def _included(path: Path) -> list[Path]:
    names = re.findall(r'^\s*#\s*include "([^"]+)"', path.read_text(), re.MULTILINE)
    return [target for name in names if (target := (path.parent / name).resolve()).exists()]


def _imported(path: Path) -> list[Path]:
    """Modules of dlkern that a module names: `from dlkern.a import b` is a's file, and b's where b is a module."""
    found = []
    for module, names in re.findall(r"^\s*from (dlkern[\w.]*) import (\([^)]*\)|[^\n]*)", path.read_text(), re.MULTILINE):
        for name in [module, *(f"{module}.{n}" for n in re.findall(r"\w+", names))]:
            found += module_file(name)
    return found


def module_file(name: str) -> list[Path]:
    """The file of a module of dlkern, if it has one: dlkern.kernels.conv is kernels/conv.py."""
    parts = name.split(".")
    path = ROOT.joinpath(*(parts[1:] if parts[1:2] == ["kernels"] else parts))
    return [p for p in (path.with_suffix(".py"), path / "__init__.py") if p.exists()]


def skip_if_unchanged(recorded: str, now: str, always: bool) -> None:
    """Skips a test of machine code that was measured, and checked, on the very same sources."""
    if recorded == now and not always and not COMPILE_ALL:
        pytest.skip("measured on these very sources when the budgets were written; DLKERN_AOT=all compiles it again")


def digest(files: Iterable[Path], *words: str) -> str:
    """Of the files, of all they include or import, and of the words."""
    result = hashlib.sha256("\n".join(words).encode())
    for path in _closure((p.resolve() for p in files), lambda p: _imported(p) if p.suffix == ".py" else _included(p)):
        result.update(f"\n{path.name}\n".encode() + path.read_bytes())
    return result.hexdigest()[:16]

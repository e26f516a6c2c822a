"""Installed, editable, without a native library, without triton or matplotlib: dlkern imports and works."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
USE = """
import torch, dlkern, dlkern.nn.functional as F, dlkern.kernels, dlkern.bench
with dlkern.trace() as calls:
    y = F.dropout(torch.ones(8, requires_grad=True), 0.25)
    y.sum().backward()
print(dlkern.__file__, [(c.backend, c.reason) for c in calls])
"""


def run(code: str, cwd: Path, path: str = "", **environment: str) -> str:
    env = {**os.environ, "PYTHONPATH": path, **environment}
    result = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def copy_of_the_sources(tmp_path: Path) -> Path:
    """What git tracks, in a folder of its own; builds leave the working tree alone."""
    source = tmp_path / "source"
    shutil.copytree(
        ROOT, source, symlinks=True,
        ignore=shutil.ignore_patterns(".git", ".venv", "build", "*.so", "*.egg-info", "report", "__pycache__", "results"),
    )
    return source


def wheel(source: Path, tmp_path: Path, **environment: str) -> Path:
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", str(tmp_path), str(source)],
        check=True, env={**os.environ, "DLKERN_CUDA": "0", **environment},
    )
    return next(tmp_path.glob("dlkern-*.whl"))


def install(package: Path, target: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(target), str(package)], check=True
    )


def test_from_the_repository_root_and_from_elsewhere(tmp_path):
    assert "('cpu', '')" in run(USE, ROOT, str(ROOT))
    assert "('cpu', '')" in run(USE, tmp_path, str(ROOT))


def test_a_wheel_works_where_it_is_installed(tmp_path):
    # One instruction set, not optimised: the packaging is tested here, and the build is short.
    package = wheel(copy_of_the_sources(tmp_path), tmp_path, DLKERN_ISAS="portable", DLKERN_VARIANT="debug")
    install(package, tmp_path / "site")
    output = run(USE, tmp_path, str(tmp_path / "site"))
    assert str(tmp_path / "site") in output and "('cpu', '')" in output
    names = {p.relative_to(tmp_path / "site").as_posix() for p in (tmp_path / "site").rglob("*")}
    assert {"dlkern/py.typed", "dlkern/kernels/__init__.py", "dlkern/libdlkern.so"} <= names
    assert not any(name.startswith(("tests", "kernels", "bench")) for name in names)


def test_without_a_native_library_the_reference_serves(tmp_path):
    package = wheel(copy_of_the_sources(tmp_path), tmp_path, DLKERN_NATIVE="0")
    install(package, tmp_path / "site")
    output = run(USE, tmp_path, str(tmp_path / "site"))
    assert "'reference'" in output and "no native library" in output


@pytest.mark.parametrize("missing", ["triton", "matplotlib", "dlkern._C"])
def test_optional_modules_may_be_missing(missing, tmp_path):
    assert "('cpu', '')" in run(f"import sys; sys.modules[{missing!r}] = None\n{USE}", tmp_path, str(ROOT))


def test_import_is_quick_and_pulls_in_no_compiler(tmp_path):
    run(
        "import torch, sys; before = set(sys.modules); import dlkern\n"
        "heavy = {'triton', 'matplotlib', 'torch._dynamo', 'torch._inductor', 'rich', 'click'}\n"
        "assert not heavy & (set(sys.modules) - before), heavy & (set(sys.modules) - before)",
        tmp_path, str(ROOT),
    )

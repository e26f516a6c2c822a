"""CMake builds what setup.py builds, and the C++ tests of csrc's building blocks pass."""

import importlib.util
import json
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import dlkern

ROOT = Path(__file__).resolve().parent.parent


def program(name: str) -> str | None:
    """In this environment (pip's cmake), or on the path."""
    beside = Path(sys.executable).parent / name
    return str(beside) if beside.exists() else shutil.which(name)


pytestmark = [pytest.mark.slow, pytest.mark.skipif(program("cmake") is None, reason="no cmake here")]


def run(*command: object) -> str:
    result = subprocess.run([str(part) for part in command], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-6000:]
    return result.stdout


@pytest.fixture(scope="module")
def configured() -> Path:
    """As a user configures it: what is compiled, and how."""
    return configure(ROOT / "build" / "cmake")


@pytest.fixture(scope="module")
def debug() -> Path:
    """The library for this machine's instruction set, the tests for all, not optimised, since what setup.py builds is tested
    everywhere else: kept, so that the next run compiles only what changed."""
    return configure(ROOT / "build" / "cmake_debug", "-DCMAKE_BUILD_TYPE=Debug")


def configure(build: Path, *settings: str) -> Path:
    x86 = platform.machine() in ("x86_64", "AMD64")
    generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={program('ninja')}"] if program("ninja") else []
    run(
        program("cmake"), "-S", ROOT, "-B", build, *generator, f"-DPython_EXECUTABLE={sys.executable}", "-DDLKERN_CUDA=OFF",
        f"-DDLKERN_ISAS={dlkern._native.facts().get('cpu_isa', 'portable')}",
        f"-DDLKERN_TEST_ISAS={'portable;avx2;avx512' if x86 else 'portable'}", *settings,
    )
    return build


def setup_script():
    spec = importlib.util.spec_from_file_location("dlkern_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_sources_and_flags_are_those_of_setup(configured):
    script = setup_script()
    release = set(script.VARIANT_FLAGS["release"].split())
    kernels, plain = set(), set()
    for entry in json.loads((configured / "compile_commands.json").read_text()):
        source, flags = Path(entry["file"]).relative_to(ROOT / "csrc"), entry["command"].split()
        if source.parts[0] == "tests" or "test_support" in entry["command"]:
            continue
        assert release <= set(flags) and "-std=c++20" in flags and "-fvisibility=hidden" in flags, entry["command"]
        isa = next((flag.removeprefix("-DDLKERN_ISA=") for flag in flags if flag.startswith("-DDLKERN_ISA=")), None)
        if isa is None:
            plain.add(str(source))
            assert f"-DTORCH_TARGET_VERSION={script.TORCH_TARGET}" in flags
            assert any(flag.startswith("-DDLKERN_BUILT_") or flag == "-DDLKERN_NO_SIMD" for flag in flags)
        else:
            kernels.add(str(source))
            assert [flag for flag in flags if flag.startswith("-m")] == script.ISA_FLAGS[isa].split()
    cpu, ops = ({f"{folder}/{path.name}" for path in (ROOT / "csrc" / folder).glob("*.cpp")} for folder in ("cpu", "ops"))
    once = {f"cpu/{name}" for name in script.PLAIN_CPU_SOURCES}
    assert kernels == cpu - once
    assert plain == {name for name in ops if not name.startswith("ops/cuda_")} | once


def test_library_and_cpp_tests(debug):
    run(program("cmake"), "--build", debug)
    assert (debug / "libdlkern.so").exists()
    report = run(program("ctest"), "--test-dir", debug, "--output-on-failure")
    assert "100% tests passed" in report, report
    code = (
        "import torch, dlkern\n"
        "with dlkern.trace() as calls: y = dlkern.nn.functional.linear(torch.ones(3, 4), torch.ones(5, 4))\n"
        "assert [call.backend for call in calls] == ['cpu'] and (y == 4).all(), calls"
    )
    run("env", f"DLKERN_LIBRARY={debug / 'libdlkern.so'}", sys.executable, "-c", code)

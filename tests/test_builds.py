"""The CPU column on every instruction set this machine has, and under AddressSanitizer and UBSan."""

import ctypes
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import sanitizers

import dlkern

ROOT = Path(__file__).resolve().parent.parent


def run_tests(file: str, selection: str, **environment: str) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "pytest", f"tests/{file}", "-q", "-s", "-x", "-k", selection, "-p", "no:cacheprovider"],
        cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True,
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-12000:]


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["portable", "avx2"])
def test_contract_on_other_instruction_sets(isa):
    run_tests("test_contract.py", "test_parity and (contiguous-float32 or contiguous-float16)", DLKERN_CPU_ISA=isa)


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["portable", "avx2"])
def test_optimisers_on_other_instruction_sets(isa):
    run_tests("test_optim.py", "test_parity or test_clipping_by_norm", DLKERN_CPU_ISA=isa)


def library(variant: str, isas: str) -> str:
    """Builds a library of its own under build/<variant>; a second time only what changed."""
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build_native", "--variant", variant], cwd=ROOT, check=True,
        env={**os.environ, "DLKERN_CUDA": "0", "DLKERN_ISAS": isas}, stdout=subprocess.DEVNULL,
    )
    return str(ROOT / "build" / variant / "libdlkern.so")


x86 = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="an x86 build")


@x86
@pytest.mark.slow
def test_contract_with_avx512_vectors_on_any_machine():
    """AVX-512's code with its vectors lowered to AVX2."""
    run_tests("test_contract.py", "test_parity and contiguous and not float64", DLKERN_LIBRARY=library("wide", "avx512"))


ARM_COMPILER = next(filter(None, map(shutil.which, ["aarch64-linux-gnu-g++", "aarch64-linux-gnu-g++-12"])), None)


@pytest.mark.slow
@pytest.mark.skipif(ARM_COMPILER is None, reason="no g++ for aarch64 here")
def test_the_portable_code_compiles_for_arm():
    """Every source of the CPU column, up to the instructions: nothing in it is x86's alone."""
    spec = importlib.util.spec_from_file_location("dlkern_setup", ROOT / "setup.py")
    setup = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(setup)
    sources = [path for path in sorted((ROOT / "csrc" / "ops").glob("*.cpp")) if not path.name.startswith("cuda_")]
    sources += sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))
    flags = ["-std=c++20", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror", "-Wno-psabi"]
    defines = ["-DDLKERN_ISA=portable", "-DDLKERN_BUILT_PORTABLE", "-DDLKERN_NO_SIMD"]
    defines += [f"-DTORCH_TARGET_VERSION={setup.TORCH_TARGET}"]
    includes = [f"-I{ROOT / 'csrc'}", *(part for path in setup.torch_paths()[1] for part in ("-isystem", str(path)))]
    for source in sources:
        result = subprocess.run(
            [ARM_COMPILER, "-fsyntax-only", *flags, *defines, *includes, str(source)], capture_output=True, text=True
        )
        assert result.returncode == 0, result.stderr[-6000:]


_UNAVAILABLE = """
import torch, dlkern
with dlkern.trace() as calls:
    dlkern.nn.functional.conv2d(torch.randn(1, 2, 4, 4), torch.randn(3, 2, 3, 3))
print(dlkern._native.LIBRARY_ERROR, [call.backend for call in calls])
"""


@x86
def test_a_library_for_other_cpus_is_not_used(tmp_path):
    """Instead of an illegal instruction: the reason, and the reference column."""
    features = dlkern._native.facts()["cpu_features"]
    has = {"PORTABLE": True, "AVX2": features["avx2"] and features["fma"], "AVX512": features["avx512vl"]}
    for isas in (["PORTABLE"], ["AVX2"], ["AVX2", "AVX512"], ["AVX512"]):
        path = tmp_path / f"{'-'.join(isas)}.so"
        built = [f"-DDLKERN_BUILT_{isa}" for isa in isas]
        subprocess.run(["g++", "-std=c++20", "-shared", "-fPIC", *built, "csrc/cpu/isa.cpp", "-o", path], cwd=ROOT, check=True)
        reason = ctypes.CDLL(str(path)).dlkern_cpu_unavailable
        reason.restype = ctypes.c_char_p
        assert (reason() == b"") == has[isas[0]]
    source = tmp_path / "other.c"
    source.write_text('const char* dlkern_cpu_unavailable(void) { return "built for another CPU"; }')
    path = tmp_path / "libdlkern.so"
    subprocess.run(["gcc", "-shared", "-fPIC", source, "-o", path], check=True)
    found = subprocess.run(
        [sys.executable, "-c", _UNAVAILABLE], env={**os.environ, "DLKERN_LIBRARY": str(path)}, cwd=ROOT, capture_output=True,
        text=True, check=True,
    ).stdout  # fmt: skip
    assert found.strip() == "libdlkern.so was built for another CPU ['reference']"


TILES = [
    ("test_tiles.py", "test"), ("test_tiles_conv.py", "test"), ("test_tiles_rnn.py", "test"), ("test_attention.py", "tiles"),
]


@x86
@pytest.mark.slow
@pytest.mark.parametrize("file, selection", TILES, ids=[file for file, _ in TILES])
def test_tiles_on_any_machine(file, selection):
    """AMX's tiles in memory."""
    run_tests(file, selection, DLKERN_LIBRARY=library("wide", "avx512"), DLKERN_AMX_FLOAT32="1")


@pytest.mark.slow
@pytest.mark.skipif(not dlkern._native.facts().get("cpu_tiles"), reason="the CPU has no AMX")
@pytest.mark.parametrize(
    "dtype, environment",
    [("float16", {"DLKERN_CPU_ISA": "avx512"}), ("float32", {"DLKERN_AMX_FLOAT32": "1"})],  # bfloat16 is a float16 here
    ids=["16 bits by vectors", "float32 by tiles"],
)
def test_what_goes_the_other_way_by_default(dtype, environment):
    run_tests("test_contract.py", f"test_parity and {dtype}", **environment)
    for file, selection in TILES:
        run_tests(file, selection, **environment)


def sanitized(isas: str) -> dict[str, str]:
    """Environment of a process that runs on the sanitizers' library."""
    return {"DLKERN_LIBRARY": library("asan", isas), **sanitizers.environment()}


def best_isa() -> str:
    return dlkern._native.facts().get("cpu_isa", "portable")


@pytest.mark.slow
@pytest.mark.parametrize(
    "file, selection",
    [("test_contract.py", "test_raw_ops or test_no_aten or test_layout or (test_parity and float32)"), ("test_raw_ops.py", ""),
     ("test_rnn.py", "options_of_any_sizes or raw_ops_of_options"), ("test_conv_winograd.py", "integers and dilated")],
    ids=["contract", "random_arguments", "recurrent_options", "dilated"],
)
def test_under_address_and_undefined_behaviour_sanitizers(file, selection):
    """The instruction set this machine runs; `make sanitize` does the others, and more of everything."""
    run_tests(file, selection, DLKERN_RAW_EXAMPLES="100", **sanitized(best_isa()))


@x86
@pytest.mark.companion
@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
@pytest.mark.parametrize(
    "file, selection",
    [
        ("test_contract.py", "not compile and not (test_parity and float64)"),
        ("test_raw_ops.py", ""), ("test_conv.py", "not compile"), ("test_linear.py", "not compile"),
        ("test_optim.py", "not compile and not benchmark"),
    ],
    ids=["contract", "random_arguments", "conv", "linear", "optim"],
)
def test_more_under_sanitizers(isa, file, selection):
    run_tests(file, selection, DLKERN_RAW_EXAMPLES="2000", DLKERN_CPU_ISA=isa, **sanitized("portable;avx2;avx512"))

"""The CPU column on every instruction set this machine has, and under AddressSanitizer and UBSan."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SELECTION = "test_parity or test_raw_ops"


def contract_tests(selection: str, **environment: str) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "tests/test_contract.py", "-q", "-x", "-k", selection, "-p", "no:cacheprovider"],
        cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True,
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-6000:]


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["portable", "avx2"])
def test_contract_on_other_instruction_sets(isa):
    contract_tests("test_parity and contiguous and float32", DLKERN_CPU_ISA=isa)


def library(variant: str) -> str:
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build_native", "--variant", variant], cwd=ROOT, check=True,
        env={**os.environ, "DLKERN_CUDA": "0"}, stdout=subprocess.DEVNULL,
    )
    return str(ROOT / "build" / variant / "libdlkern.so")


@pytest.mark.companion
def test_contract_with_avx512_vectors_on_any_machine():
    contract_tests("test_parity and contiguous and not float64", DLKERN_LIBRARY=library("wide"))


def runtime_library(name: str) -> str:
    compiler = os.environ.get("CXX", "g++").split()[-1]
    return subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.companion
def test_contract_under_address_and_undefined_behaviour_sanitizers():
    contract_tests(
        f"({SELECTION}) and not bfloat16 and not float64",
        LD_PRELOAD=f"{runtime_library('libasan.so')} {runtime_library('libubsan.so')}",
        DLKERN_LIBRARY=library("asan"),
        ASAN_OPTIONS="detect_leaks=0:allocator_may_return_null=1", UBSAN_OPTIONS="print_stacktrace=1:halt_on_error=1",
        OMP_NUM_THREADS="1",
    )

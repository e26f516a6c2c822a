"""tests/test_cuda*.py of the families again, in a process of their own: on the checked build, which reports races,
uninitialised reads and accesses out of bounds, and under AddressSanitizer and UBSan."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import sanitizers

ROOT = Path(__file__).resolve().parent.parent


def cuda_tests(variant: str, selection: str, **environment: str) -> None:
    # Built here, without the environment (a sanitizer's LD_PRELOAD, say) that the tests run in.
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build_native", "--variant", f"cuda_on_host_{variant}"], cwd=ROOT, check=True,
        stdout=subprocess.DEVNULL,
    )
    families = ("", "_attention", "_conv", "_embedding", "_large", "_layer_norm", "_loss", "_optim", "_rnn")
    files = [f"tests/test_cuda{family}.py" for family in families]
    command = [sys.executable, "-m", "pytest", *files, "-q", "-x", "-s", "-k", selection]
    result = subprocess.run(
        [*command, "-p", "no:cacheprovider"], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "DLKERN_CUDA_ON_HOST": variant, "DLKERN_BUILT": "1", **environment},
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-6000:]


@pytest.mark.slow
def test_on_the_checked_build():
    cuda_tests("checked", "not large_tiles and not no_bias and not reverse and not training and not lstm-all")


@pytest.mark.slow
def test_under_address_and_undefined_behaviour_sanitizers():
    cuda_tests(
        "asan", "thread_order or views or out_of_range or wrong_arguments or nothing_to_do or 31_bits",
        OMP_NUM_THREADS="1", **sanitizers.environment(),
    )

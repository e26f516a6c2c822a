"""What a process needs to load a library built with AddressSanitizer and UBSan."""

import os
import subprocess


def _runtime(name: str) -> str:
    compiler = os.environ.get("CXX", "g++").split()[-1]
    return subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()


def environment() -> dict[str, str]:
    return {
        "LD_PRELOAD": f"{_runtime('libasan.so')} {_runtime('libubsan.so')}",
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
    }

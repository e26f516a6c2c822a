"""The machine under a measurement: what it is, how its memory allocator was set, and the floors it imposes.

Floors come from the machine itself, not from a datasheet: the best bandwidth of a copy, of a change in place and of a
sum (on a CPU by size of what is moved, because caches are faster than memory), and the best floating-point rate seen, of
a loop of multiply-adds (csrc/cpu/peak.cpp) or of torch.mm, whichever is higher.
"""

from __future__ import annotations

import bisect
import functools
import math
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import dlkern
from dlkern import _native, tuning

__all__ = [
    "CONTROLLED",
    "Floors",
    "commit",
    "describe",
    "device_slug",
    "environment_for",
    "page_faults_controlled",
    "settings",
]

# glibc: never give memory back and never map it anew, so that a large result does not cost page faults on every call.
# Must be in the environment when Python starts.
CONTROLLED = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "4294967296",
    "MALLOC_TOP_PAD_": "268435456",
}


def page_faults_controlled() -> bool:
    """Whether this process was started with the settings of CONTROLLED."""
    try:
        started = Path("/proc/self/environ").read_bytes().split(b"\0")
    except OSError:
        return False
    return all(f"{key}={value}".encode() in started for key, value in CONTROLLED.items())


def environment_for(threads: int | None) -> dict[str, str]:
    """The environment of a process that measures: allocator settled, threads counted and bound to cores."""
    root = str(Path(dlkern.__file__).resolve().parent.parent)
    environment = dict(os.environ, **CONTROLLED)
    environment.setdefault("OMP_PROC_BIND", "true")
    environment["PYTHONPATH"] = os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH")) if p)
    if threads:
        environment["OMP_NUM_THREADS"] = str(threads)
    return environment


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


@functools.cache
def _cpu() -> tuple[str, str, str]:
    """The CPU's name, family and model, "" where the system does not tell."""

    def field(name: str) -> str:
        match = re.search(rf"^{name}\s*: (.*)$", _read("/proc/cpuinfo"), re.MULTILINE)
        return match.group(1).strip() if match else ""

    return field("model name") or platform.processor() or platform.machine(), field("cpu family"), field("model")


def _cpu_name() -> str:
    name, family, model = _cpu()
    return f"{name} (family {family} model {model})" if family and model else name


def isa() -> str:
    """The instruction set the CPU column runs."""
    return str(_native.facts().get("cpu_isa") or torch.backends.cpu.get_cpu_capability().lower())


def device_slug(device: str) -> str:
    """The folder of bench/results a machine's results go to: "cpu-amd-25-17-avx512" (vendor, family, model), "h200"."""
    if device == "cpu":
        name, family, model = _cpu()
        vendor = re.sub(r"[^a-z0-9]+.*", "", name.lower())
        return "-".join(filter(None, ("cpu", vendor, family, model, isa())))
    return tuning.slug(torch.cuda.get_device_name())


@functools.cache
def commit() -> str:
    """The commit of the sources, with "+" where files differ from it; "" outside a repository."""
    root = Path(__file__).resolve().parent.parent
    try:
        head = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, timeout=20
        )
        changed = subprocess.run(
            ["git", "-C", str(root), "status", "--porcelain", "--untracked-files=no"],
            capture_output=True,
            text=True,
            timeout=20,
        )
    except (OSError, subprocess.SubprocessError):
        return os.environ.get("DLKERN_COMMIT", "")
    if head.returncode:
        return os.environ.get("DLKERN_COMMIT", "")
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def _nvidia_smi(*fields: str) -> dict[str, str]:
    try:
        out = subprocess.run(
            ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(fields, (cell.strip() for cell in out.splitlines()[0].split(","))))


def describe(device: str) -> dict[str, Any]:
    """What the results are stamped with."""
    facts: dict[str, Any] = {
        "device": device,
        "cpu": _cpu_name(),
        "cpu_isa": isa(),
        "cpu_tiles": bool(_native.facts().get("cpu_tiles")),
        "cpu_float_tiles": bool(_native.facts().get("cpu_float_tiles")),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "dlkern": dlkern.__version__,
        "commit": commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "native_library": _native.LIBRARY_ERROR or "loaded",
        "build": _native.facts().get("build", {}),
    }
    try:
        import triton

        facts["triton"] = triton.__version__
    except ImportError:
        facts["triton"] = ""
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        facts |= {
            "gpu": properties.name,
            "sm_count": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "clocks": _nvidia_smi("clocks.sm", "clocks.mem", "clocks.max.sm", "driver_version", "power.limit"),
        }
    return facts


def settings(device: str) -> dict[str, Any]:
    """What both sides of every row ran under."""
    if device == "cuda":
        return {
            "timing": "CUDA events, L2 overwritten between runs, host queued ahead",
            "tf32_matmul": torch.backends.cuda.matmul.allow_tf32,
            "tf32_cudnn": torch.backends.cudnn.allow_tf32,
            "cudnn_benchmark": torch.backends.cudnn.benchmark,
            "clocks_now": _nvidia_smi("clocks.sm", "clocks.mem", "temperature.gpu", "power.draw"),
        }
    pages = re.search(r"\[(\w+)\]", _read("/sys/kernel/mm/transparent_hugepage/enabled"))
    return {
        "timing": "wall clock, A B A B in one process",
        "threads": torch.get_num_threads(),
        "threads_bound": os.environ.get("OMP_PROC_BIND", "no"),
        "huge_pages": pages.group(1) if pages else "unknown",
        "page_faults": "controlled (glibc keeps its memory)" if page_faults_controlled() else "NOT controlled",
        "malloc": {key: os.environ.get(key, "") for key in CONTROLLED},
    }


def last_cache(device: str) -> int:
    """Bytes of the last cache level."""
    if device == "cuda":
        return int(torch.cuda.get_device_properties(0).L2_cache_size)
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        match = re.match(r"(\d+)([KM])", path.read_text())
        if match:
            sizes.append(int(match.group(1)) << (10 if match.group(2) == "K" else 20))
    return max(sizes, default=32 << 20)


class Floors:
    """The machine's ceilings, measured when first asked for.

    Args:
        device: "cpu" or "cuda".
        quick: spend a second instead of several.
    """

    def __init__(self, device: str, quick: bool = False) -> None:
        self.device = device
        self.quick = quick
        self._peaks: dict[torch.dtype, tuple[float, str]] = {}
        self._bandwidths: list[tuple[int, float]] | None = None

    def floor_ms(self, flops: int, bytes: int, dtype: torch.dtype) -> tuple[float, str]:
        """The least time a call can take, and whether "memory" or "compute" says so."""
        memory = bytes / self.bandwidth(bytes) * 1e3
        compute = flops / self.peak(dtype)[0] * 1e3 if flops else 0.0
        return (compute, "compute") if compute > memory else (memory, "memory")

    def bandwidth(self, bytes: int) -> float:
        """Bytes a second (read plus written) where this many are moved."""
        table = self.bandwidths()
        position = bisect.bisect_left([size for size, _ in table], bytes)
        if position == 0 or position == len(table):
            return table[min(position, len(table) - 1)][1]
        (low, a), (high, b) = table[position - 1], table[position]
        share = (math.log(bytes) - math.log(low)) / (math.log(high) - math.log(low))
        return a + (b - a) * share

    def bandwidths(self) -> list[tuple[int, float]]:
        """(bytes moved, bytes a second), by rising size. On a GPU one size, beyond its caches."""
        if self._bandwidths is None:
            sizes = (
                [1 << 30] if self.device == "cuda" else [1 << 16, 1 << 18, 1 << 20, 1 << 22, 1 << 24, 1 << 26, 1 << 28]
            )
            rates = [self._moved(size) for size in sizes]
            # Fewer bytes are never slower for the memory system, only for the overhead of the call.
            for i in range(len(rates) - 2, -1, -1):
                rates[i] = max(rates[i], rates[i + 1])
            self._bandwidths = list(zip(sizes, rates))
        return self._bandwidths

    def _moved(self, bytes: int) -> float:
        """The best of a copy, which may fetch what it overwrites, of a change in place, and of reading alone."""
        source = torch.randn(bytes // 4, device=self.device)
        half, target = source[: bytes // 8], torch.empty(bytes // 8, device=self.device)
        return bytes / min(
            self._best(lambda: target.copy_(half)),
            self._best(lambda: target.mul_(1.0)),
            self._best(lambda: source.sum()),
        )

    def peak(self, dtype: torch.dtype) -> tuple[float, str]:
        """Operations a second in this dtype, and what reached them."""
        if dtype not in self._peaks:
            candidates = [(self._mm(dtype), "torch.mm")]
            if self.device == "cpu" and _native.library_loaded():
                wide = dtype if dtype == torch.float64 else torch.float32
                candidates.append((self._fma(wide), "multiply-add loop"))
                if dtype == torch.float32 and _native.facts().get("cpu_float_tiles"):
                    # csrc/cpu/tiles.h: a product of floats is six of bfloat16.
                    candidates.append((self._mm(torch.bfloat16) / 6, "torch.mm in bfloat16, six products"))
            self._peaks[dtype] = max(candidates)
        return self._peaks[dtype]

    def _mm(self, dtype: torch.dtype) -> float:
        n = (512 if self.quick else 2048) if self.device == "cpu" else 8192
        if dtype == torch.float64:
            n //= 2
        a, b = (torch.randn(n, n, device=self.device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        return 2 * n**3 / self._best(lambda: torch.mm(a, b, out=out))

    def _fma(self, dtype: torch.dtype) -> float:
        like = torch.empty(0, dtype=dtype)
        done = 0.0

        def run() -> None:
            nonlocal done
            done = float(torch.ops.dlkern.peak_fma_cpu(like, 500_000)[0])

        seconds = self._best(run)
        return done / seconds

    def _best(self, function: Callable[[], object]) -> float:
        """Seconds of the fastest of many calls: a ceiling is what was reached once."""
        for _ in range(3):
            function()
        best = math.inf
        start = time.perf_counter()
        while time.perf_counter() - start < (0.05 if self.quick else 0.4):
            if self.device == "cuda":
                begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                begin.record()
                function()
                end.record()
                end.synchronize()
                best = min(best, begin.elapsed_time(end) / 1e3)
            else:
                t = time.perf_counter()
                function()
                best = min(best, time.perf_counter() - t)
        return best

    def as_dict(self) -> dict[str, Any]:
        """What was measured, for the results file."""
        return {
            "bandwidth_gb_per_s": {str(size): round(rate / 1e9, 1) for size, rate in self.bandwidths()},
            "peak_gflops": {
                str(dtype).removeprefix("torch."): {"value": round(rate / 1e9, 1), "by": by}
                for dtype, (rate, by) in self._peaks.items()
            },
        }

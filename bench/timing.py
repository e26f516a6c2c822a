"""Measuring: two or more functions in one process, interleaved, compared pair by pair.

Drift of clocks, caches and neighbours hits both sides of a pair alike, so the median of the pairwise ratios repeats
to a percent or two where the medians of separate runs do not. One run is one call; between calls, outside the timed
part, `between` changes the parameters, so that nothing derived from them can be reused. On a GPU the time is the
device's own (events around the call, the L2 overwritten before it, and a short wait queued ahead so that launches
are not what is measured: host time has rows of its own).
"""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

try:
    import resource
except ImportError:  # not on every system
    resource = None  # type: ignore[assignment]

__all__ = ["Ratio", "Samples", "interleave", "per_call", "percentile", "ratio"]


_SLOW_MS = 1500.0


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of the sorted values lie, interpolated linearly.

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("percentile: no values")
    ordered = sorted(values)
    position = share * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


@dataclass
class Samples:
    """Times of one function, in milliseconds, in the order they were taken."""

    ms: list[float] = field(default_factory=list)
    faults: int = 0  # pages the kernel had to map inside timed calls; 0 in a steady state

    @property
    def median(self) -> float:
        return statistics.median(self.ms)

    @property
    def p20(self) -> float:
        return percentile(self.ms, 0.2)

    @property
    def p80(self) -> float:
        return percentile(self.ms, 0.8)


@dataclass(frozen=True)
class Ratio:
    """How many times faster `ours` is than `theirs`: the median of the pairs, with its 20th and 80th percentile."""

    median: float
    p20: float
    p80: float


def ratio(theirs: Samples, ours: Samples) -> Ratio:
    """theirs / ours, run by run.

    Raises:
        ValueError: different numbers of runs, or none.
    """
    if len(theirs.ms) != len(ours.ms) or not ours.ms:
        raise ValueError("ratio: the two sides were not interleaved")
    pairs = [a / b for a, b in zip(theirs.ms, ours.ms)]
    return Ratio(statistics.median(pairs), percentile(pairs, 0.2), percentile(pairs, 0.8))


def interleave(
    functions: Mapping[str, Callable[[], object]],
    *,
    device: str = "cpu",
    seconds: float = 1.0,
    minimum: int = 7,
    maximum: int = 200,
    between: Callable[[], None] | None = None,
) -> dict[str, Samples]:
    """Times the functions in turn, A B C A B C, after a warm-up.

    Args:
        functions: name -> function of no arguments.
        device: "cpu" (wall clock) or "cuda" (device time).
        seconds: about how long the timed runs may take together.
        minimum, maximum: runs of each function.
        between: called before each run, not timed.
    """
    between = between or (lambda: None)
    clock = _cuda_clock() if device == "cuda" else _cpu_clock()
    with clock as run, _no_garbage_collection():
        round_ms = 0.0
        for function in functions.values():  # warm-up: compilation, thread pools, pages, cuDNN's choice
            last = Samples()
            between()
            run(function, last)
            if run.settle(last) < _SLOW_MS:
                between()
                run(function, Samples())
            last = Samples()
            between()
            run(function, last)
            round_ms += run.settle(last)
        if round_ms > _SLOW_MS:  # something is badly slow: three runs say so, without holding up the others
            minimum = min(minimum, 3)
        runs = max(minimum, min(maximum, int(seconds * 1e3 / max(round_ms, 1e-3))))
        samples = {name: Samples() for name in functions}
        for i in range(runs):
            for name, function in functions.items():
                between()
                run(function, samples[name])
            if i % 8 == 7:
                run.flush(samples.values())
        run.flush(samples.values())
    return samples


def per_call(functions: Mapping[str, Callable[[], object]], calls: int = 200, rounds: int = 15) -> dict[str, Samples]:
    """Host time of one call in microseconds (as Samples): interleaved blocks of `calls` calls."""
    samples = {name: Samples() for name in functions}
    for function in functions.values():
        for _ in range(20):
            function()
    with _no_garbage_collection():
        for _ in range(rounds):
            for name, function in functions.items():
                start = time.perf_counter_ns()
                for _ in range(calls):
                    function()
                samples[name].ms.append((time.perf_counter_ns() - start) / calls / 1e3)
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
    return samples


class _CpuRun:
    """Runs a function once and adds its wall time; the result is freed after the clock stops."""

    def __call__(self, function: Callable[[], object], samples: Samples) -> None:
        faults = _page_faults()
        start = time.perf_counter_ns()
        result = function()
        elapsed = time.perf_counter_ns() - start
        samples.faults += _page_faults() - faults
        samples.ms.append(elapsed / 1e6)
        del result

    def settle(self, samples: Samples) -> float:
        return samples.ms[-1]

    def flush(self, samples: object) -> None:
        pass


class _CudaRun:
    """Runs a function once between two events; the times are read when the queue is drained."""

    def __init__(self) -> None:
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        self._scratch = torch.empty(max(2 * properties.L2_cache_size, 1 << 27), dtype=torch.int8, device="cuda")
        self._pending: list[tuple[Samples, torch.cuda.Event, torch.cuda.Event]] = []

    def __call__(self, function: Callable[[], object], samples: Samples) -> None:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._scratch.zero_()
        torch.cuda._sleep(600_000)  # 0.3 ms in which the host queues the call ahead of the device
        start.record()
        function()
        end.record()
        self._pending.append((samples, start, end))

    def settle(self, samples: Samples) -> float:
        self.flush(())
        return samples.ms[-1] + 0.5

    def flush(self, samples: object) -> None:
        torch.cuda.synchronize()
        for owner, start, end in self._pending:
            owner.ms.append(start.elapsed_time(end))
        self._pending.clear()


@contextlib.contextmanager
def _cpu_clock() -> Iterator[_CpuRun]:
    yield _CpuRun()


@contextlib.contextmanager
def _cuda_clock() -> Iterator[_CudaRun]:
    torch.cuda.synchronize()
    yield _CudaRun()


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _page_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt if resource is not None else 0

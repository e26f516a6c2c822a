"""The benchmark: how fast dlkern is beside torch, and how far both are from what the machine allows.

    dlkern bench            (or python -m dlkern.bench)
    dlkern.bench.run([...]) the same from Python
    dlkern.bench.compare({"mine": f, "torch": g}, inputs)   the same measurement for your own functions

bench/README.md says how it measures.
"""

from dlkern.bench.harness import Comparison, Row, compare
from dlkern.bench.report import compare_results
from dlkern.bench.runner import Result, main, run

__all__ = ["Comparison", "Result", "Row", "compare", "compare_results", "main", "run"]

"""Parity by one rule, and the columns that need a GPU run without one.

The rule (no tolerance is ever picked by hand): against a float64 reference, our error is at most twice the error of
torch's own op in the same dtype, or one unit roundoff of that dtype, whichever is larger; in the 2-norm and in the
largest element, each relative to the reference's; over the whole tensor and over each border of it; outputs and
gradients alike.
"""

from typing import TYPE_CHECKING, Any

from dlkern.testing._emulation import emulated
from dlkern.testing._parity import Certificate, Row, check, compare, unit_roundoff

if TYPE_CHECKING:
    from dlkern.testing._catalog import CASES, Case, cases

__all__ = ["CASES", "Case", "Certificate", "Row", "cases", "check", "compare", "emulated", "unit_roundoff"]


def __getattr__(name: str) -> Any:
    # The catalogue calls every family, so it is imported when it is asked for, not with dlkern.
    if name in ("CASES", "Case", "cases"):
        from dlkern.testing import _catalog

        return getattr(_catalog, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

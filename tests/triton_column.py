"""What the tests of the Triton column share: the interpreter, the column forced, results that start as NaN."""

import pytest
import torch

import dlkern


@pytest.fixture(autouse=True)
def emulated():
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch.empty then fills with NaN
    try:
        with dlkern.testing.emulated(), dlkern.backend("triton"):
            yield
    finally:
        torch.use_deterministic_algorithms(deterministic)

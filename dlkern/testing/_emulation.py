"""dlkern.testing.emulated(): the triton and cuda columns on CPU tensors, for tests on machines without a GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from dlkern import columns
from dlkern.testing import cuda_on_host

__all__ = ["emulated"]


@contextlib.contextmanager
def emulated() -> Iterator[None]:
    """Inside, dlkern.backend("triton") interprets and dlkern.backend("cuda") runs kernels compiled for the host.

    Raises:
        RuntimeError: on the first call of a column whose emulation is not there (no triton; the library of CUDA
            kernels for the host not built: `make cuda-on-host`); at the end, where a CUDA kernel did what it must not
            (see dlkern.testing.cuda_on_host).
    """
    before = columns.state.emulated
    with contextlib.ExitStack() as stack:
        if columns.unavailable("triton") is None:
            from dlkern.testing.triton_interpreter import interpreted

            stack.enter_context(interpreted())
        columns.state.emulated = True
        try:
            yield
        finally:
            columns.state.emulated = before
    cuda_on_host.raise_if_errors()

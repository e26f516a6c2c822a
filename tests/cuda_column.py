"""What the tests of the CUDA column on the host share: the library, the column forced, leaves."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dlkern
from dlkern.testing import check, cuda_on_host

ROOT = Path(__file__).resolve().parent.parent
LAYOUTS = [torch.contiguous_format, torch.channels_last]
dtype_name = lambda value: str(value).removeprefix("torch.")  # noqa: E731
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
short_dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_name)
all_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=dtype_name)
layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=dtype_name)


@pytest.fixture(scope="module", autouse=True)
def library():
    if "DLKERN_BUILT" not in os.environ:  # test_cuda_builds.py has built what it wants
        variant = cuda_on_host.library_path().parent.name
        subprocess.run(
            [sys.executable, "setup.py", "-q", "build_native", "--variant", variant], cwd=ROOT, check=True,
            stdout=subprocess.DEVNULL,
        )
    cuda_on_host.load()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # torch's side of these tiny tensors: two threads would mostly wait for each other
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def no_findings():
    yield
    cuda_on_host.raise_if_errors()


@contextlib.contextmanager
def on_cuda():
    """Calls inside run on the cuda column, and all of them do."""
    with dlkern.testing.emulated(), dlkern.backend("cuda"), dlkern.trace() as calls:
        yield
    assert {call.backend for call in calls} <= {"cuda"}, calls


# There values are the plain build's to prove; its own reports count.
ON_CHECKED_BUILD = os.environ.get("DLKERN_CUDA_ON_HOST") == "checked"


def certify(ours, theirs, inputs, dtype, draws=1):
    if ON_CHECKED_BUILD:
        with on_cuda():
            certificate = check(ours, theirs, inputs, dtype=dtype)
        assert not certificate.notes, certificate.notes
        return
    for count in (draws, 8 * draws):  # over few, chance decides the largest of few errors: more draws tell
        with on_cuda():
            certificate = check(ours, theirs, inputs, dtype=dtype, draws=count)
        if certificate.ok:
            return
    certificate.raise_if_failed()


def leaf(*shape, memory_format=torch.contiguous_format):
    x = torch.randn(shape, dtype=torch.float64)
    return (x.contiguous(memory_format=memory_format) if x.dim() == 4 else x).requires_grad_()

"""Tensors of over 2^31 elements in the CUDA column, made small: kernels that number their items in 31 bits are told that
they may number a few (dlkern.testing.cuda_on_host.most_numbers), and the host looks whether they keep to it. Then windows
and grids beyond 31 bits, which need no memory. tests/test_cuda_builds.py runs this file again on the checked build."""

import pytest
import torch
import torch.nn.functional as tF
from cuda_column import all_dtypes, certify, layouts, leaf, library, no_findings, on_cuda  # noqa: F401

import dlkern.nn
import dlkern.nn.functional as F
from dlkern.ops._registry import raw
from dlkern.testing import compare, cuda_on_host

POOLS = {
    "max": lambda x: F.max_pool2d(x, 3, 2, 1),
    "max, int64 indices": lambda x: F.max_pool2d(x, (17, 16), (2, 3), 8),
    "average": lambda x: F.avg_pool2d(x, (3, 2), 2, 1),
    "adaptive average": lambda x: F.adaptive_avg_pool2d(x, (5, 13)),
    "adaptive max": lambda x: F.adaptive_max_pool2d(x, (13, 4)),
    "power average": lambda x: F.lp_pool2d(x, 2, 3, 2),
    "power average in double": lambda x: F.lp_pool2d(x, 3, 2, 2),
}


def passes(function, x, seed=0):
    """Results and the gradient, of a call on the cuda column."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    with on_cuda():
        y = function(x)
        y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(seed)).to(y.dtype))
    return y.detach(), x.grad


@pytest.mark.parametrize("channels", [8, 5])
@pytest.mark.parametrize("pool", POOLS)
@layouts
def test_pooling_in_slices(pool, layout, channels):
    """The same bits in one launch and in one for every few images, or planes."""
    x = (torch.rand(7, channels, 11, 10) + 0.1).contiguous(memory_format=layout)  # odd powers have roots
    whole = passes(POOLS[pool], x)
    # As many as two inputs' pixels and some: slices of two images, or of more where results are smaller.
    of_an_image = 13 * 13 * (channels if layout == torch.channels_last else 1)
    for most in (of_an_image, 2 * of_an_image + 9, 3 * of_an_image):
        with cuda_on_host.most_numbers(most):
            sliced = passes(POOLS[pool], x)
        assert all(torch.equal(a, b) for a, b in zip(whole, sliced))
    with cuda_on_host.most_numbers(7), pytest.raises(RuntimeError, match="more than 2"):
        passes(POOLS[pool], x)


def test_rotary_in_slices():
    x, (cos, sin) = torch.randn(5, 3, 6, 16), torch.randn(2, 5, 1, 6, 8)
    call = raw["rotary"]["cuda"]
    for view in (x, x.transpose(1, 2).contiguous().transpose(1, 2), x.bfloat16()):
        angles = [t.to(view.dtype) for t in (cos, sin)]
        whole = call(view, *angles, True, False)
        for most in (3 * 6 * 8, 2 * 3 * 6 * 8 + 5):
            with cuda_on_host.most_numbers(most):
                assert torch.equal(call(view, *angles, True, False), whole)
        with cuda_on_host.most_numbers(5), pytest.raises(RuntimeError, match="more than 2"):
            call(view, *angles, True, False)


@pytest.mark.parametrize("shape", [(130, 2, 7, 9), (40, 8, 8, 16), (2100, 3, 1, 1)], ids=lambda s: "x".join(map(str, s)))
@layouts
@all_dtypes
def test_batch_norm_in_short_chunks(shape, layout, dtype):
    """Chunks that begin within an image, whose items are numbered from that image on."""
    def inputs():
        return [leaf(*shape, memory_format=layout), leaf(shape[1]), leaf(shape[1])]

    with cuda_on_host.most_numbers(1024 + 128):
        certify(lambda x, w, b: F.batch_norm(x, None, None, w, b, True),
                lambda x, w, b: tF.batch_norm(x, None, None, w, b, True), inputs, dtype)
    with cuda_on_host.most_numbers(200), pytest.raises(RuntimeError, match="more than 2"):
        raw["batch_norm_train_forward"]["cuda"](torch.zeros(shape), None, None, None, None, None, 0.1, 1e-5, 0)


def test_batch_norm_chunks_are_cut():
    """Of so many channels that a chunk would have more items than may be numbered."""
    x = torch.randn(23, 512, 10, 10) + 3
    with cuda_on_host.most_numbers(1024 + 100):
        _, mean, invstd, *_ = raw["batch_norm_train_forward"]["cuda"](x, None, None, None, None, None, 0.1, 1e-5, 0)
    exact = [x.double().mean((0, 2, 3)), (x.double().var((0, 2, 3), correction=0) + 1e-5) ** -0.5]
    theirs = torch.ops.aten.native_batch_norm(x, None, None, None, None, True, 0.1, 1e-5)[1:]
    for values in zip(("mean", "invstd"), (mean, invstd), theirs, exact):
        rows = compare(values[0], *([v] for v in values[1:]), torch.float32)
        assert all(row.ok for row in rows), rows


def test_more_sequences_than_a_grids_second_dimension_has():
    """With options a block takes a sequence."""
    module = dlkern.nn.RNN(1, 1, zoneout=0.25).eval()
    x = torch.randn(1, 65_600, 1)
    with torch.no_grad(), on_cuda():
        output, state = module(x)
        last, _ = module(x[:, -70:])
    assert output.isfinite().all() and torch.equal(output[:, -70:], last) and torch.equal(output, state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@layouts
def test_a_window_over_more_than_31_bits(layout, dtype):
    """Nearly all of it padding: places in the window have no number, but those of pixels have."""
    size, at = 2**16, 2**15
    x = torch.randn(2, 8, 3, 4).to(dtype).contiguous(memory_format=layout)
    pool = [size, size, 1, 1, at, at, 1, 1]
    for pixels in (torch.full_like(x, -torch.inf), x):
        y, indices = raw["max_pool2d_forward"]["cuda"](pixels, pool, False, 2)
        theirs, places = tF.max_pool2d(pixels, size, 1, at, return_indices=True)
        assert torch.equal(y, theirs) and torch.equal(indices, places)
        assert torch.equal(raw["max_pool2d_forward"]["cuda"](pixels, pool, False, 0)[0], theirs)
    grad = torch.randn(y.shape).to(dtype)
    ours = raw["max_pool2d_backward"]["cuda"](grad, places, [2, 8, 3, 4], pool, layout == torch.channels_last)
    theirs = torch.ops.aten.max_pool2d_with_indices_backward(grad, x, [size] * 2, [1, 1], [at] * 2, [1, 1], False, places)
    exact = torch.zeros(2, 8, 12, dtype=torch.float64).scatter_add(2, places.flatten(2), grad.double().flatten(2))
    rows = compare("dx", [ours], [theirs], [exact.view(2, 8, 3, 4)], dtype)
    assert all(row.ok for row in rows), rows

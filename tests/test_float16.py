"""float16 in the CPU column where its range is short: sums beyond 65504 that come back, results that do not, subnormals."""

import pytest
import torch
import torch.nn.functional as tF

import dlkern
import dlkern.nn.functional as F
from dlkern.testing import compare

HALF = torch.float16


def far(*shape):
    """Near the largest number, 65504: squares and sums of these are beyond it."""
    return (torch.rand(shape, dtype=torch.float64) * 40000 + 20000) * torch.where(torch.rand(shape) < 0.5, -1, 1)


# name -> function of (namespace, *tensors), its tensors in float64.
IN_RANGE = {
    "average": (lambda f, x: f.avg_pool2d(x, 3), lambda: [far(2, 9, 8, 7)]),
    "adaptive average": (lambda f, x: f.adaptive_avg_pool2d(x, 1), lambda: [far(2, 9, 30, 7)]),
    "batch norm": (lambda f, x: f.batch_norm(x, None, None, training=True), lambda: [far(6, 9, 8, 7)]),
    "batch norm of rows": (lambda f, x: f.batch_norm(x, None, None, training=True), lambda: [far(60, 33)]),
    "layer norm": (lambda f, x: f.layer_norm(x, x.shape[1:]), lambda: [far(20, 70)]),
    "p-norms": (lambda f, x: f.lp_pool2d(x, 2.0, 2) / 2, lambda: [far(2, 5, 8, 8) / 2]),
    "linear": (lambda f, x, w: f.linear(x, w), lambda: [far(20, 70), torch.randn(33, 70, dtype=torch.float64) / 70]),
    "convolution": (lambda f, x, w: f.conv2d(x, w),
                    lambda: [far(2, 8, 7, 9), torch.randn(17, 8, 3, 3, dtype=torch.float64) / 70]),
    "cross-entropy": (lambda f, x: f.cross_entropy(x, torch.arange(50) % 40), lambda: [far(50, 40) / 3]),
    "scores": (lambda f, q, k, v: f.scaled_dot_product_attention(q, k, v, scale=1e-5),
               lambda: [far(2, 3, 20, 16) / 100, far(2, 3, 25, 16) / 100, far(2, 3, 25, 16)]),
}  # fmt: skip


@pytest.mark.parametrize("name", IN_RANGE)
def test_what_overflows_on_the_way_only(name):
    """As near as rounding the exact result to float16: no torch run, which may overflow, is asked."""
    torch.manual_seed(0)
    function, make = IN_RANGE[name]
    tensors = [t.to(HALF) for t in make()]
    with dlkern.trace() as calls:
        ours = function(F, *tensors)
    exact = function(tF, *(t.double() for t in tensors))
    assert {call.backend for call in calls} == {"cpu"} and ours.dtype == HALF and ours.isfinite().all()
    assert all(row.ok for row in compare(name, [ours], [exact.to(HALF)], [exact], HALF))


def test_results_beyond_the_range_are_infinite():
    x, w = torch.full((3, 70), 100.0, dtype=HALF), torch.full((5, 70), 20.0, dtype=HALF)
    x[1] = -x[1]
    y = F.linear(x, w)
    assert torch.equal(y, tF.linear(x, w)) and y.isinf().all() and (y[1] < 0).all()
    for shape in ((1, 20, 5, 5), (2, 20, 4, 9)):
        image, kernel = torch.full(shape, 90.0, dtype=HALF), torch.full((17, 20, 3, 3), 5.0, dtype=HALF)
        assert torch.equal(F.conv2d(image, kernel), tF.conv2d(image, kernel)) and F.conv2d(image, kernel).isinf().all()


def test_gradients_beyond_the_range_are_infinite():
    x = torch.randn(4, 6, dtype=HALF, requires_grad=True)
    (g,) = torch.autograd.grad(F.linear(x, torch.full((5, 6), 300.0, dtype=HALF)), x, torch.full((4, 5), 300.0, dtype=HALF))
    assert (g == torch.inf).all()


@pytest.mark.parametrize("scale", [2.0**-15, 2.0**-23, 2.0**-24, 2.0**-25, 3 * 2.0**-26])
def test_subnormal_results(scale):
    """Powers of two times the scale are exact before they are rounded: every bit is known, the tie at 2^-25 is even."""
    x = torch.tensor([[1.0], [-1.0], [2.0], [4.0], [0.5]]).expand(5, 19).to(HALF)
    w = torch.full((7, 19), 0.0)
    w[:, 3] = 2.0**-10
    y = F.linear(x * (scale * 2**10), w.to(HALF))
    exact = (x * (scale * 2**10)).double() @ w.double().t()
    assert torch.equal(y, exact.to(HALF))


def test_special_values_survive():
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, 65504.0, -65504.0, 2.0**-24, -(2.0**-24), 0.0, -0.0, 1.0])
    x = special.repeat(7).reshape(1, 5, 2, 7).to(HALF)
    for size in (1, (1, 2)):
        ours, theirs = F.max_pool2d(x, size), tF.max_pool2d(x, size)
        assert torch.equal(ours.view(torch.int16)[~theirs.isnan()], theirs.view(torch.int16)[~theirs.isnan()])
        assert torch.equal(ours.isnan(), theirs.isnan())

"""3 x 3 and 5 x 5 convolutions in float on the CPU, by Winograd's transforms (csrc/cpu/winograd.h): each way work is cut,
each layout, rounding, numbers that a tile spreads.
"""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as TF
from threads import on_threads

import dlkern
import dlkern.nn.functional as F

# input, weight, padding, dilation, groups
SIZES = {
    "blocks": ((3, 48, 30, 33), (70, 48, 3, 3), 1, 1, 1),
    "panels": ((2, 100, 9, 12), (200, 100, 3, 3), 1, 1, 1),
    "panels in parts": ((3, 300, 7, 8), (96, 300, 3, 3), 1, 1, 1),
    "odd": ((5, 51, 13, 11), (67, 51, 3, 3), 1, 1, 1),
    "no padding": ((2, 64, 21, 20), (40, 64, 3, 3), 0, 1, 1),
    "more padding": ((2, 64, 12, 17), (64, 64, 3, 3), (2, 0), 1, 1),
    "dilated": ((2, 64, 23, 22), (48, 64, 3, 3), 2, 2, 1),
    "dilated unevenly": ((1, 50, 29, 41), (64, 50, 3, 3), (3, 1), (3, 1), 1),
    "dilated, a phase shorter by a tile": ((4, 64, 25, 25), (64, 64, 3, 3), 2, 2, 1),
    "dilated, phases shorter by a tile": ((2, 64, 49, 33), (48, 64, 3, 3), (4, 2), (4, 2), 1),
    "groups": ((2, 144, 14, 15), (96, 48, 3, 3), 1, 1, 3),
    "wide": ((1, 48, 6, 301), (33, 48, 3, 3), 1, 1, 1),
    "many images": ((70, 64, 5, 6), (64, 64, 3, 3), 1, 1, 1),
    "many channels": ((2, 530, 8, 8), (150, 530, 3, 3), 1, 1, 1),
    "few tiles for the weight": ((1, 128, 10, 10), (96, 128, 3, 3), 1, 1, 1),
    "5x5": ((2, 64, 15, 18), (70, 64, 5, 5), 2, 1, 1),
    "5x5 panels": ((1, 80, 7, 8), (200, 80, 5, 5), 2, 1, 1),
    "5x5 dilated": ((1, 48, 23, 22), (64, 48, 5, 5), (3, 4), (1, 2), 1),
    "5x5 groups": ((3, 96, 13, 14), (80, 48, 5, 5), 0, 1, 2),
    "large weight": ((2, 160, 16, 18), (170, 160, 3, 3), 1, 1, 1),
}
LAYOUTS = [torch.contiguous_format, torch.channels_last]
EACH = pytest.mark.parametrize("name", SIZES)


def draw(name, layout, fill=torch.randn):
    x, w = SIZES[name][:2]
    return [t.contiguous(memory_format=layout if t.dim() == 4 else torch.contiguous_format) for t in map(fill, (x, w, w[:1]))]


def run(f, name):
    padding, dilation, groups = SIZES[name][2:]
    return lambda x, w, b=None: f(x, w, b, 1, padding, dilation, groups)


def integers(shape):
    return torch.randint(-4, 5, shape).float()


def gradients(f, tensors, grad):
    inputs = [t.detach().requires_grad_() for t in tensors]
    y = f(*inputs)
    return [y.detach(), *torch.autograd.grad(y, inputs, grad.to(y))]


@EACH
def test_integers_are_exact(name):
    """Quarters of integers are, too: every bit must be torch's, in every layout of input, weight and gradient."""
    for layout in LAYOUTS:
        for other in LAYOUTS:
            tensors = draw(name, layout, integers)
            tensors[1] = tensors[1].contiguous(memory_format=other)
            wide = [t.double() for t in tensors]
            grad = integers(run(TF.conv2d, name)(*wide).shape).contiguous(memory_format=other)
            ours, exact = (gradients(run(f, name), t, grad) for f, t in ((F.conv2d, tensors), (TF.conv2d, wide)))
            for actual, expected in zip(ours, exact):
                assert torch.equal(actual, expected.float()), (layout, other)


@pytest.mark.parametrize("relu", [False, True])
@EACH
def test_parity(name, relu):
    """Also of what a ReLU leaves, whose mean is not zero, in both layouts."""
    for layout in LAYOUTS:

        def inputs(layout=layout):
            x, w, b = (t.double() for t in draw(name, layout))
            return [t.requires_grad_() for t in (x.relu() if relu else x, w / w[0].numel() ** 0.5, b)]

        for draws in (3, 32):  # where three draws do not keep the rule, many tell chance from a fault
            check = dlkern.testing.check(
                run(F.conv2d, name), run(TF.conv2d, name), inputs, draws=draws, name=f"{name} {layout}"
            )
            if check.ok:
                break
        check.raise_if_failed()


@pytest.mark.parametrize("name", ["blocks", "panels", "dilated", "groups", "large weight", "5x5"])
def test_infinity_and_nan(name):
    """They reach the windows that see them, not all of a tile; and so do numbers that overflow when transformed."""
    for layout in LAYOUTS:
        x, w, b = draw(name, layout, integers)
        x[0, 3, 2, 2], x[0, 5, 5, 4], x[-1, 7, 0, 3] = torch.inf, torch.nan, 2.0**127
        x[-1, 7, 0, 4] = 2.0**127
        w[:, 7] = 0
        grad = integers(run(TF.conv2d, name)(x, w, b).shape) / 16  # so that no sum overflows
        results = [gradients(run(f, name), (x, w, b), grad) for f in (F.conv2d, TF.conv2d)]
        for ours, theirs in zip(*results):
            assert torch.equal(ours.isnan(), theirs.isnan())
            assert torch.equal(ours.isinf(), theirs.isinf())
        for _, _, weight, _ in results:
            weight[:, 7] = 0  # small numbers are lost beside 2^127, in any order
        for ours, theirs in zip(*results):
            assert torch.equal(ours[theirs.isfinite()], theirs[theirs.isfinite()])


@pytest.mark.parametrize("name", ["blocks", "panels", "panels in parts", "dilated", "dilated unevenly", "groups", "odd", "5x5"])
def test_residual_and_activation(name):
    for layout in LAYOUTS:
        x, w, b = draw(name, layout, integers)
        expected = run(TF.conv2d, name)(x, w, b)
        residual = torch.empty_like(expected).copy_(integers(expected.shape))
        padding, dilation, groups = SIZES[name][2:]
        with torch.no_grad():
            actual = F.conv2d_act(x, w, b, 1, padding, dilation, groups, residual=residual, activation="relu")
        assert torch.equal(actual, (expected + residual).relu())


@pytest.mark.parametrize("name", ["blocks", "panels", "dilated", "groups", "few tiles for the weight", "large weight", "5x5"])
def test_threads(name):
    """Bits do not depend on them, but for the sums of a small weight's gradient, which each thread makes for itself."""
    for fill in (torch.randn, integers):
        tensors = draw(name, LAYOUTS[0], fill)
        grad = fill(run(TF.conv2d, name)(*tensors).shape)
        results = on_threads((1, 2, 3, 5), lambda t=tensors, g=grad: gradients(run(F.conv2d, name), t, g))
        for other in results[1:]:
            for i, (one, another) in enumerate(zip(results[0], other)):
                assert torch.equal(one, another) or (i == 2 and fill is torch.randn)


@pytest.mark.parametrize("name, size", [("blocks", 3), ("panels", 3), ("5x5", 5)])
def test_masked_filters_keep_inputs_apart(name, size):
    """Taps of zero weight let nothing through, not even roundings: what autoregressive models stand on."""
    mask = torch.zeros(size, size)
    mask[: size // 2] = 1
    mask[size // 2, : size // 2] = 1
    x, w, _ = draw(name, LAYOUTS[0])
    changed = x.clone()
    changed[:, :, 3, 4] += 100
    f = run(F.conv2d, name)
    y, other = f(x, w * mask), f(changed, w * mask)
    assert torch.equal(y[:, :, 0, 0], torch.zeros_like(y[:, :, 0, 0]))
    assert torch.equal(y[:, :, :3], other[:, :, :3]) and torch.equal(y[:, :, 3, :5], other[:, :, 3, :5])
    assert not torch.equal(y, other)
    corner = torch.ones(size, size)
    corner[0, 0] = 0
    h, v = 3 + size // 2, 4 + size // 2  # sees the changed pixel by that tap alone
    assert torch.equal(f(x, w * corner)[:, :, h, v], f(changed, w * corner)[:, :, h, v])


def assert_errors(name, tensors, grads, parts_alone):
    """Errors of all draws together, of the whole and of each border, are at most twice torch's: of the same part, or of
    the larger of part and whole."""
    squares = {}
    for drawn, grad in zip(tensors, grads, strict=True):
        exact = gradients(run(TF.conv2d, name), [t.double() for t in drawn], grad)
        for side, f in (("ours", F.conv2d), ("torch", TF.conv2d)):
            for i, (result, e) in enumerate(zip(gradients(run(f, name), drawn, grad), exact, strict=True)):
                error = (result.double() - e).square()
                parts = {"whole": error, "row": error[..., 0, :], "column": error[..., -1], "corner": error[..., 0, 0]}
                for where, part in parts.items():
                    squares[i, where, side] = squares.get((i, where, side), 0) + part.mean().item()
    for i in range(len(exact)):
        for where in ("whole", "row", "column", "corner"):
            limit = 4 * max(0 if parts_alone else squares[i, "whole", "torch"], squares[i, where, "torch"])
            assert squares[i, where, "ours"] <= limit, (i, where, squares)


@pytest.mark.parametrize("name", ["many images", "large weight", "5x5"])
@pytest.mark.parametrize("tap", ["first", "centre"])
def test_outputs_that_do_not_see_the_largest_tap(name, tap):
    tensors, grads = [], []
    for _ in range(4):
        x, w, _ = draw(name, LAYOUTS[0])
        at = 0 if tap == "first" else w.shape[-1] // 2
        scale = torch.full(w.shape[2:], 1 / 256)
        scale[at, at] = 1
        tensors.append([x, w * scale])
        grads.append(torch.randn(run(TF.conv2d, name)(x, w).shape))
    assert_errors(name, tensors, grads, parts_alone=True)


@pytest.mark.parametrize("name", ["many images", "large weight", "panels", "5x5"])
@pytest.mark.parametrize("share", [1 / 500, 1 / 12, 1 / 4])
def test_sparse_gradients_and_inputs(name, share):
    """As behind a maximum: few numbers are rounded few times by torch."""
    tensors, grads = [], []
    for i in range(4):
        x, w, _ = draw(name, LAYOUTS[0])
        grad = torch.randn(run(TF.conv2d, name)(x, w).shape)
        sparse = torch.rand(x.shape) < share if i % 2 else torch.rand(grad.shape) < share
        tensors.append([x * sparse if i % 2 else x.relu(), w])
        grads.append(grad if i % 2 else grad * sparse)
    assert_errors(name, tensors, grads, parts_alone=False)


BITS = """
import sys, torch, dlkern
import dlkern.nn.functional as F
torch.manual_seed(1)
x, w, g = torch.randn(2, 64, 20, 20), torch.randn(64, 64, 3, 3), torch.randn(2, 64, 20, 20)
x.requires_grad_(), w.requires_grad_()
y = F.conv2d(x, w, padding=1)
torch.save([y.detach(), *torch.autograd.grad(y, (x, w), g)], sys.argv[1])
x, w, g = (torch.randint(-4, 5, t.shape).float().requires_grad_() for t in (x, w, g))
y = F.conv2d(x, w, padding=1)
torch.save([y.detach(), *torch.autograd.grad(y, (x, w), g.detach())], sys.argv[1] + "integers")
"""


def test_the_switch(tmp_path):
    """DLKERN_WINOGRAD=0 goes without: other bits, but where all are exact."""
    results, integer_results = [], []
    for value in ("0", "1"):
        path = str(tmp_path / value)
        subprocess.run([sys.executable, "-c", BITS, path], check=True, env={**os.environ, "DLKERN_WINOGRAD": value})
        results.append(torch.load(path))
        integer_results.append(torch.load(path + "integers"))
    for direct, transformed in zip(*results):
        assert not torch.equal(direct, transformed)
    assert all(map(torch.equal, *integer_results))

"""Convolutions that go by AMX's tiles where the CPU has them (csrc/cpu/conv_tiles.h): numbers the tiles can't hold, blocks of
all kinds, threads. Elsewhere they go by vectors.
"""

import pytest
import torch
import torch.nn.functional as TF
from threads import on_threads

import dlkern
import dlkern.nn.functional as F

# input, weight, stride, padding, dilation, groups: small sizes that are worth tiles in 16-bit types, or in float too.
SIZES = {
    "3x3": ((3, 40, 9, 11), (37, 40, 3, 3), 1, 1, 1, 1),
    "3x3 float": ((5, 66, 11, 9), (50, 66, 3, 3), 1, 1, 1, 1),
    "1x1": ((4, 70, 7, 13), (90, 70, 1, 1), 1, 0, 1, 1),
    "stride": ((2, 33, 15, 14), (48, 33, 3, 3), 2, 1, 1, 1),
    "1x1 stride": ((3, 64, 14, 13), (70, 64, 1, 1), (2, 3), 0, 1, 1),
    "one image's rows": ((1, 100, 70, 50), (24, 100, 3, 3), 1, 1, 1, 1),
    "columns": ((1, 16, 4, 1700), (20, 16, 2, 3), 1, (0, 1), 1, 1),
    "stem": ((2, 3, 45, 40), (35, 3, 7, 7), 2, 3, 1, 1),
    "wide stem": ((1, 5, 40, 45), (18, 5, 3, 9), (1, 2), (1, 4), 1, 1),
    "few outputs": ((2, 64, 17, 16), (5, 64, 3, 3), 1, 1, 1, 1),
    "groups": ((2, 96, 10, 12), (64, 48, 3, 3), 1, 1, 1, 2),
    "groups of 16": ((3, 48, 13, 14), (48, 16, 3, 3), 1, 1, 1, 3),
    "dilated": ((2, 32, 15, 17), (40, 32, 3, 2), 1, (3, 2), (2, 3), 1),
    "more padding than taps": ((2, 24, 9, 8), (32, 24, 3, 2), 2, (4, 5), 1, 1),
    "long sums": ((2, 900, 9, 9), (34, 900, 3, 3), 1, 1, 1, 1),
}
LAYOUTS = [torch.contiguous_format, torch.channels_last]
EACH = pytest.mark.parametrize("name", SIZES)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype)[6:])


def draw(name, dtype, layout, fill=torch.randn):
    x, w = SIZES[name][:2]
    tensors = [fill(x), fill(w), fill((w[0],))]
    return [t.to(dtype).contiguous(memory_format=layout if t.dim() == 4 else torch.contiguous_format) for t in tensors]


def integers(shape):
    return torch.randint(-2, 3, shape).float()


def gradients(f, tensors, settings, grad):
    inputs = [t.detach().requires_grad_() for t in tensors]
    y = f(*inputs, *settings)
    return [y.detach(), *torch.autograd.grad(y, inputs, grad.to(y.dtype))]


@EACH
@DTYPES
def test_integers_are_exact(name, dtype):
    """Whatever is cut, padded or summed in which order, in each layout of input and of weight."""
    for layout, weight_layout in ((LAYOUTS[0], LAYOUTS[0]), (LAYOUTS[1], LAYOUTS[1]), (LAYOUTS[0], LAYOUTS[1])):
        tensors, settings = draw(name, dtype, layout, integers), SIZES[name][2:]
        tensors[1] = tensors[1].contiguous(memory_format=weight_layout)
        wide = [t.double() for t in tensors]
        grad = integers(TF.conv2d(*wide, *settings).shape).to(dtype)
        for ours, exact in zip(gradients(F.conv2d, tensors, settings, grad), gradients(TF.conv2d, wide, settings, grad)):
            assert torch.equal(ours, exact.to(dtype)), layout


@pytest.mark.parametrize("name", ["3x3 float", "stride", "stem", "long sums"])
@DTYPES
def test_parity(name, dtype):
    def inputs():
        x, w, b = draw(name, torch.float64, LAYOUTS[1])
        return [t.requires_grad_() for t in (x, w / w[0].numel() ** 0.5, b)]

    def run(f):
        return lambda *tensors: f(*tensors, *SIZES[name][2:])

    dlkern.testing.check(run(F.conv2d), run(TF.conv2d), inputs, dtype=dtype, draws=4, name=name).raise_if_failed()


@pytest.mark.parametrize("name", ["3x3 float", "stem", "groups"])
@DTYPES
def test_infinity_and_nan(name, dtype):
    for layout in LAYOUTS:
        x, w, b = draw(name, dtype, layout)
        x[1, 1, 3, 2], x[0, 2, 5, 5], w[3, 0, 0, 1] = torch.inf, torch.nan, -torch.inf
        ours, theirs = F.conv2d(x, w, b, *SIZES[name][2:]), TF.conv2d(*(t.float() for t in (x, w, b)), *SIZES[name][2:])
        theirs = theirs.to(dtype)
        assert torch.equal(ours.isnan(), theirs.isnan())
        assert torch.equal(ours == torch.inf, theirs == torch.inf) and torch.equal(ours == -torch.inf, theirs == -torch.inf)
        grad = torch.randn(ours.shape).to(dtype)
        grad[0, 1, 2, 3], grad[0, 2, 4, 4] = torch.inf, torch.nan
        w = w.nan_to_num(neginf=1)
        ours = gradients(F.conv2d, (x, w, b), SIZES[name][2:], grad)
        theirs = gradients(TF.conv2d, (x.double(), w.double(), b.double()), SIZES[name][2:], grad)
        for a, e in zip(ours[1:], theirs[1:]):
            assert torch.equal(a.isfinite(), e.to(dtype).isfinite())


@pytest.mark.parametrize("scale", [1e-25, 1e-18, 1e18])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_numbers_far_from_one(dtype, scale):
    """Products down to 1e-50, below the smallest float."""

    def inputs():
        x, w, b = draw("3x3 float", torch.float64, LAYOUTS[0])
        return [(t * f).requires_grad_() for t, f in ((x, scale), (w, scale), (b, scale * scale))]

    def run(f):
        return lambda *tensors: f(*tensors, 1, 1)

    dlkern.testing.check(run(F.conv2d), run(TF.conv2d), inputs, dtype=dtype, draws=2).raise_if_failed()


@DTYPES
def test_zeros(dtype):
    for layout in LAYOUTS:
        x, w, b = draw("3x3 float", dtype, layout)
        x[:, :, :5] = 0
        grad = torch.zeros(5, 50, 11, 9)
        y, dx, dw, db = gradients(F.conv2d, (x, w, b), (1, 1), grad)
        assert torch.equal(y[:, :, :4], b.view(1, -1, 1, 1).expand(5, 50, 4, 9))
        assert not any(g.any() for g in (dx, dw, db))


@pytest.mark.parametrize("name", ["3x3 float", "one image's rows", "stem"])
@DTYPES
def test_bits_do_not_depend_on_the_threads(name, dtype):
    x, w, b = draw(name, dtype, LAYOUTS[1])
    x[0, 2, 3, 4] = torch.inf  # its block is computed again, by vectors
    grad = torch.randn(TF.conv2d(x.float(), w.float(), None, *SIZES[name][2:]).shape).to(dtype)
    results = on_threads((1, 2, 3), lambda: [t.nan_to_num() for t in gradients(F.conv2d, (x, w, b), SIZES[name][2:], grad)[:2]])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))

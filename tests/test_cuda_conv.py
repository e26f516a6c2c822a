"""conv2d and conv_transpose2d of the CUDA column, run on the host: every case of the catalogue, then what only some
kernels and sizes have. tests/test_cuda_builds.py runs this file again on the checked build."""

import contextlib

import pytest
import torch
import torch.nn.functional as tF
from cuda_column import LAYOUTS, all_dtypes, certify, layouts, leaf, library, no_findings, on_cuda, short_dtypes  # noqa: F401

import dlkern
import dlkern.nn.functional as F
from dlkern import models
from dlkern._precision import allow_tf32_cudnn, allow_tf32_matmul
from dlkern.ops._registry import raw
from dlkern.testing import CASES, compare, cuda_on_host
from dlkern.testing._training import check_training

CONV = [case for case in CASES if case.family == "conv"]


@pytest.mark.parametrize("case", CONV, ids=lambda case: case.name.replace(" ", "_"))
@all_dtypes
def test_catalogue(case, dtype):
    layout = LAYOUTS[(CONV.index(case) + (dtype == torch.bfloat16)) % 2] if case.images else LAYOUTS[0]

    def inputs():
        drawn = case.inputs()
        if case.images:
            drawn[0] = drawn[0].detach().contiguous(memory_format=layout).requires_grad_()
        return drawn

    certify(case.ours, case.theirs, inputs, dtype, draws=16 if dtype == torch.float32 else case.draws)


# label -> input, weight, options. Channels in multiples of 8 are loaded 8 at a time in 16-bit types.
PRODUCTS = {
    "tails": ((2, 24, 7, 9), (40, 24, 3, 3), dict(padding=1)),
    "groups": ((2, 16, 9, 8), (48, 8, 3, 2), dict(groups=2, stride=(2, 1), padding=(1, 0), dilation=(1, 2))),
    "more classes than a launch": ((1, 8, 11, 13), (8, 8, 7, 6), dict(stride=(5, 4), padding=3)),
    "stride and dilation share a factor": ((1, 8, 13, 11), (16, 8, 3, 4), dict(stride=(4, 2), dilation=(2, 1), padding=2)),
    "1x1": ((1, 72, 9, 8), (88, 72, 1, 1), {}),
    "parts of the pixels": ((2, 3, 35, 31), (8, 3, 3, 3), dict(padding=1)),
    "parts, in vectors": ((2, 8, 35, 31), (8, 8, 2, 3), dict(stride=(1, 1), padding=1)),
    "large stride": ((2, 3, 6, 5), (4, 3, 2, 2), dict(stride=(2**31 - 1, 7))),
}


def convolution(function, x, w, options, layout):
    return (lambda *t: function(*t, **options),
            lambda: [leaf(*x, memory_format=layout), (leaf(*w, memory_format=layout).detach() * 0.3).requires_grad_(),
                     leaf(w[0])])


@pytest.mark.parametrize("label", PRODUCTS)
@layouts
@all_dtypes
def test_products(label, layout, dtype):
    ours, inputs = convolution(F.conv2d, *PRODUCTS[label], layout)
    theirs, _ = convolution(tF.conv2d, *PRODUCTS[label], layout)
    certify(ours, theirs, inputs, dtype, draws=8 if dtype == torch.float32 and "parts" not in label else 2)


# label -> input, weight, options, multiprocessors: as few make few tiles enough for the kernels of sm_90a.
HOPPER = {
    "slim tiles": ((2, 24, 7, 9), (40, 24, 3, 3), dict(padding=1), 2),
    "narrow tiles": ((1, 72, 8, 9), (136, 72, 3, 2), dict(stride=(2, 1), padding=(1, 0), dilation=(1, 2)), 4),
    "wide tiles": ((1, 8, 9, 16), (264, 8, 1, 1), {}, 1),
    "wide tiles of channels": ((1, 136, 5, 4), (8, 136, 1, 2), {}, 1),
    "dilation": ((2, 16, 9, 8), (24, 16, 3, 2), dict(padding=(2, 1), dilation=(2, 1)), 1),
    "parts": ((2, 16, 25, 26), (8, 16, 1, 3), dict(stride=1, padding=(0, 2)), 7),
}


@pytest.mark.parametrize("label", HOPPER)
@short_dtypes
def test_on_hopper(label, dtype):
    *sizes, multiprocessors = HOPPER[label]
    layout = LAYOUTS[list(HOPPER).index(label) % 2]  # others are copied into channels_last
    ours, inputs = convolution(F.conv2d, *sizes, layout)
    theirs, _ = convolution(tF.conv2d, *sizes, layout)
    with cuda_on_host.hopper(), cuda_on_host.multiprocessors(multiprocessors):
        certify(ours, theirs, inputs, dtype, draws=2)


@short_dtypes
def test_activation_and_residual_on_hopper(dtype):
    options, kind = dict(padding=1), dlkern.Activation.SIGMOID
    with cuda_on_host.hopper(), cuda_on_host.multiprocessors(1):
        certify(lambda x, w, b, r: F.conv2d_act(x, w, b, **options, activation=kind, residual=r),
                lambda x, w, b, r: torch.sigmoid(tF.conv2d(x, w, b, **options) + r),
                lambda: [leaf(2, 8, 5, 6), leaf(16, 8, 3, 3), leaf(16), leaf(2, 16, 5, 6)], dtype, draws=4)


@pytest.mark.parametrize("shape,settings,kernels", [
    ((16, 8, 3, 3), ([1, 1], [1, 1], [1, 1], 1), ["sm90", "sm90", "sm90"]),
    ((16, 8, 3, 3), ([2, 2], [1, 1], [1, 1], 1), ["sm90", "product", "sm90"]),
    ((16, 8, 3, 3), ([9, 1], [1, 1], [1, 1], 1), ["product", "product", "product"]),  # beyond a tensor map's step
    ((16, 8, 3, 3), ([1, 1], [140, 1], [1, 1], 1), ["product", "product", "sum_parts"]),  # its corners
    ((16, 8, 3, 3), ([1, 1], [127, 1], [128, 1], 1), ["product", "product", "product"]),  # its offsets
    ((16, 4, 3, 3), ([1, 1], [1, 1], [1, 1], 2), ["product", "product", "product"]),
    ((12, 8, 3, 3), ([1, 1], [1, 1], [1, 1], 1), ["product", "product", "product"]),
])
def test_which_kernel_on_hopper(shape, settings, kernels):
    x, w = torch.randn(1, 8, 9, 7).bfloat16(), torch.randn(shape).bfloat16()
    found = []
    with cuda_on_host.hopper(), cuda_on_host.multiprocessors(1):
        y = raw["conv2d_forward"]["cuda"](x, w, None, *settings)
        found.append(cuda_on_host.last_kernel())
        raw["conv2d_backward_input"]["cuda"](y, w, x.shape, *settings, True)
        found.append(cuda_on_host.last_kernel())
        raw["conv2d_backward_weight"]["cuda"](y, x, w.shape, *settings, False, True)
        found.append(cuda_on_host.last_kernel())
    assert [name.removeprefix("conv2d_").split("_kernel")[0] for name in found] == kernels


@contextlib.contextmanager
def tf32(*, convolutions, matrices):
    """torch's settings, and the column goes by them."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = matmul.allow_tf32
    try:
        matmul.allow_tf32 = matrices
        # (cuDNN's can be set by flags() alone once torch's own test modules were imported.)
        with cudnn.flags(enabled=cudnn.enabled, allow_tf32=convolutions), cuda_on_host.precision_settings():
            yield
    finally:
        matmul.allow_tf32 = before


def in_tf32(x):
    """Rounded to 10 bits of fraction, ties away from zero: what the tensor cores multiply."""
    return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32).double()


def assert_tf32(names, ours, theirs, exact, exact_products):
    """The rule, its other side being float64's products of operands rounded to TF32; and not float32's bits."""
    for name, found, *sides, before in zip(names, ours, theirs, exact, exact_products):
        rows = compare(name, [found], *([side] for side in sides), torch.float32)
        assert all(row.ok for row in rows), [row for row in rows if not row.ok]
        assert not torch.equal(found, before)


@pytest.mark.parametrize("label", PRODUCTS)
@layouts
def test_tf32(label, layout):
    """All three passes where torch's setting for convolutions allows TF32, and not where the one for matrices does."""
    x, w, options = PRODUCTS[label]
    pair = lambda key, default: [n, n] if isinstance(n := options.get(key, default), int) else list(n)  # noqa: E731
    settings = pair("stride", 1), pair("padding", 0), pair("dilation", 1), options.get("groups", 1)
    x, w = (torch.randn(shape).contiguous(memory_format=layout) for shape in (x, w))
    dy = torch.randn(tF.conv2d(x, w, None, *settings).shape).contiguous(memory_format=layout)
    last = layout == LAYOUTS[1]  # else elements are loaded one by one

    def run():
        found = [raw["conv2d_forward"]["cuda"](x, w, None, *settings)]
        found.append(raw["conv2d_backward_input"]["cuda"](dy, w, x.shape, *settings, last))
        return [*found, raw["conv2d_backward_weight"]["cuda"](dy, x, w.shape, *settings, False, last)[0]]

    def expressions(x, w, dy):
        return [tF.conv2d(x, w, None, *settings), torch.nn.grad.conv2d_input(x.shape, w, dy, *settings),
                torch.nn.grad.conv2d_weight(x, w.shape, dy, *settings)]

    exact_products = run()
    with tf32(convolutions=False, matrices=True):
        assert all(torch.equal(a, b) for a, b in zip(exact_products, run()))
    with tf32(convolutions=True, matrices=False):
        ours = run()
    theirs, exact = expressions(*map(in_tf32, (x, w, dy))), expressions(x.double(), w.double(), dy.double())
    assert_tf32(("y", "dx", "dw"), ours, theirs, exact, exact_products)


def test_tf32_by_the_newer_names():
    conv, matmul = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = conv.fp32_precision, matmul.fp32_precision
    try:
        for wanted in ("ieee", "tf32"):
            conv.fp32_precision = matmul.fp32_precision = wanted
            assert allow_tf32_cudnn() == allow_tf32_matmul() == (wanted == "tf32")
    finally:
        conv.fp32_precision, matmul.fp32_precision = before


def linear_passes(x, w, dy):
    return [raw["linear_forward"]["cuda"](x, w, None, 0), raw["linear_backward_input"]["cuda"](dy, w),
            raw["linear_backward_weight"]["cuda"](dy, x, False)[0]]


@pytest.mark.parametrize("rows,inputs,outputs", [(70, 40, 24), (5, 7, 3)])
def test_linear_in_tf32(rows, inputs, outputs):
    """By the setting for matrix products, which is not the one for convolutions."""
    tensors = [torch.randn(shape) for shape in ((rows, inputs), (outputs, inputs), (rows, outputs))]
    expressions = lambda x, w, dy: [x @ w.T, dy @ w, dy.T @ x]  # noqa: E731
    exact_products = linear_passes(*tensors)
    with tf32(convolutions=True, matrices=False):
        assert all(torch.equal(a, b) for a, b in zip(exact_products, linear_passes(*tensors)))
    with tf32(convolutions=False, matrices=True):
        ours = linear_passes(*tensors)
    theirs, exact = expressions(*map(in_tf32, tensors)), expressions(*(t.double() for t in tensors))
    assert_tf32(("y", "dx", "dw"), ours, theirs, exact, exact_products)


@pytest.mark.parametrize("which,rows,inputs,outputs", [
    (0, 1030, 9, 1040), (0, 1030, 12, 1040), (1, 1030, 1040, 12), (2, 12, 1032, 1040),
], ids=["one by one", "forward", "input", "weight"])
def test_tf32_large_tiles(which, rows, inputs, outputs):
    x, w, dy = (torch.randn(shape) for shape in ((rows, inputs), (outputs, inputs), (rows, outputs)))
    expression = [lambda x, w, dy: x @ w.T, lambda x, w, dy: dy @ w, lambda x, w, dy: dy.T @ x][which]
    call = [lambda: raw["linear_forward"]["cuda"](x, w, None, 0), lambda: raw["linear_backward_input"]["cuda"](dy, w),
            lambda: raw["linear_backward_weight"]["cuda"](dy, x, False)[0]][which]
    before = call()
    with tf32(convolutions=False, matrices=True):
        ours = call()
    theirs, exact = expression(*map(in_tf32, (x, w, dy))), expression(x.double(), w.double(), dy.double())
    assert_tf32(["y"], [ours], [theirs], [exact], [before])


def test_tf32_views():
    """Data that begins between 16-byte boundaries, and layouts that differ: the same products."""
    x, w, dy = torch.randn(2, 8, 6, 5), torch.randn(12, 8, 3, 3), torch.randn(2, 12, 4, 3)
    settings = [1, 1], [0, 0], [1, 1], 1
    layouts = [
        lambda t: t.contiguous(memory_format=LAYOUTS[1]), lambda t: t.contiguous(),
        lambda t: torch.cat([t.new_zeros(1), t.permute(0, 2, 3, 1).flatten()])[1:].view(
            t.shape[0], t.shape[2], t.shape[3], t.shape[1]).permute(0, 3, 1, 2),
        lambda t: torch.cat([t, t], 3).contiguous(memory_format=LAYOUTS[1])[..., : t.shape[3]],
    ]
    found = []
    with tf32(convolutions=True, matrices=False):
        for a in layouts:
            for b in layouts:
                found.append([
                    raw["conv2d_forward"]["cuda"](a(x), b(w), None, *settings),
                    raw["conv2d_backward_input"]["cuda"](a(dy), b(w), x.shape, *settings, True),
                    raw["conv2d_backward_weight"]["cuda"](a(dy), b(x), w.shape, *settings, False, True)[0]])
    assert all(torch.equal(a, b) for tensors in found for a, b in zip(found[0], tensors))


DEPTHWISE = {
    "packs": ((2, 16, 9, 11), (16, 1, 3, 3), dict(padding=1)),
    "strides": ((2, 8, 12, 13), (8, 1, 5, 4), dict(padding=(2, 1), stride=(2, 3))),
    "multiplier": ((2, 6, 7, 8), (12, 1, 3, 2), dict(stride=(2, 1), padding=(1, 0), dilation=(1, 2))),
    "parts": ((2, 8, 27, 26), (8, 1, 3, 3), dict(padding=1, dilation=(2, 1))),
}


@pytest.mark.parametrize("label", DEPTHWISE)
@layouts
@all_dtypes
def test_depthwise(label, layout, dtype):
    x, w, options = DEPTHWISE[label]
    options = dict(options, groups=x[1])
    ours, inputs = convolution(F.conv2d, x, w, options, layout)
    theirs, _ = convolution(tF.conv2d, x, w, options, layout)
    certify(ours, theirs, inputs, dtype, draws=8)


@layouts
@all_dtypes
def test_transposed(layout, dtype):
    options = dict(stride=(2, 3), padding=(1, 0), output_padding=(1, 2), groups=2, dilation=(1, 2))
    draw = lambda: [leaf(2, 16, 4, 5, memory_format=layout), leaf(16, 8, 3, 2), leaf(16)]  # noqa: E731
    certify(lambda *t: F.conv_transpose2d(*t, **options), lambda *t: tF.conv_transpose2d(*t, **options), draw, dtype, draws=8)


@layouts
@all_dtypes
@pytest.mark.parametrize("groups", [1, 8], ids=["dense", "depthwise"])
@pytest.mark.parametrize("activation", ["tanh", "sigmoid"])
def test_activation_and_residual(layout, dtype, groups, activation):
    options, kind = dict(padding=1, groups=groups), dlkern.Activation[activation.upper()]
    certify(
        lambda x, w, b, r: F.conv2d_act(x, w, b, **options, activation=kind, residual=r),
        lambda x, w, b, r: getattr(torch, activation)(tF.conv2d(x, w, b, **options) + r),
        lambda: [leaf(2, 8, 5, 6, memory_format=layout), leaf(8, 8 // groups, 3, 3), leaf(8),
                 leaf(2, 8, 5, 6, memory_format=layout)],
        dtype, draws=8)


SETTINGS = [1, 1], [0, 0], [1, 1], 1


LARGE = {  # channels, filters, images, height, width
    "conv2d_forward": (8, 904, 8, 8, 15), "conv2d_backward_input": (904, 8, 8, 8, 15),
    "conv2d_backward_weight": (904, 904, 1, 5, 7),
}


@pytest.mark.parametrize("op", LARGE)
@all_dtypes
def test_large_tiles(op, dtype):
    """Sizes from which the large tiles serve, with tails on every side: 8 x 8 of them in each pass."""
    channels, filters, n, h, w = LARGE[op]
    x, weight, dy = (
        torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last)
        for shape in ((n, channels, h, w), (filters, channels, 1, 1), (n, filters, h, w))
    )

    def expression(x, weight, dy):
        return {
            "conv2d_forward": lambda: tF.conv2d(x, weight),
            "conv2d_backward_input": lambda: torch.nn.grad.conv2d_input(x.shape, weight, dy),
            "conv2d_backward_weight": lambda: torch.nn.grad.conv2d_weight(x, weight.shape, dy),
        }[op]()

    found = {
        "conv2d_forward": lambda: raw[op]["cuda"](x, weight, None, *SETTINGS),
        "conv2d_backward_input": lambda: raw[op]["cuda"](dy, weight, x.shape, *SETTINGS, True),
        "conv2d_backward_weight": lambda: raw[op]["cuda"](dy, x, weight.shape, *SETTINGS, False, True)[0],
    }[op]()
    exact = expression(x.double(), weight.double(), dy.double())
    rows = compare(op, [found], [expression(x, weight, dy)], [exact], dtype)
    assert all(row.ok for row in rows), [row for row in rows if not row.ok]


@all_dtypes
def test_formats_and_views(dtype):
    """The result's format is torch's; operands between 16-byte boundaries and strided ones serve as their copies do."""
    x, weight = torch.randn(2, 8, 6, 5).to(dtype), torch.randn(16, 8, 3, 3).to(dtype)
    for input_layout in LAYOUTS:
        for weight_layout in LAYOUTS:
            a, b = x.contiguous(memory_format=input_layout), weight.contiguous(memory_format=weight_layout)
            with on_cuda():
                ours, wide = F.conv2d(a, b), F.conv2d(a[:1], b)
            theirs = tF.conv2d(a, b)
            assert ours.stride() == theirs.stride() and torch.equal(ours[:1], wide)
    base = torch.randn(2 * 8 * 6 * 6 + 1).to(dtype)
    shifted = base[1:].view(2, 6, 6, 8).permute(0, 3, 1, 2)
    for view in (shifted, x.transpose(2, 3), x[:, :, ::2], torch.randn(2, 16, 6, 5).to(dtype)[:, ::2]):
        expected = raw["conv2d_forward"]["cuda"](view.clone(memory_format=torch.contiguous_format), weight, None, *SETTINGS)
        assert torch.equal(raw["conv2d_forward"]["cuda"](view, weight, None, *SETTINGS), expected)


@layouts
@all_dtypes
def test_empty_batch(layout, dtype):
    x, w, b = (t.to(dtype).requires_grad_() for t in (torch.randn(0, 8, 6, 5), torch.randn(8, 8, 3, 3), torch.randn(8)))
    with on_cuda():
        y = F.conv2d(x.contiguous(memory_format=layout), w, b)
        y.sum().backward()
    assert y.shape == (0, 8, 4, 3) and x.grad.shape == x.shape
    assert not w.grad.any() and not b.grad.any()
    assert torch.equal(raw["conv2d_backward_bias"]["cuda"](y), torch.zeros(8, dtype=dtype))


@layouts
@all_dtypes
def test_nan_and_infinity(layout, dtype):
    x, weight = torch.randn(2, 8, 6, 5).to(dtype).contiguous(memory_format=layout), torch.randn(8, 8, 3, 3).to(dtype)
    x[0, 1, 2, 3], x[1, 2, 0, 0] = float("nan"), float("inf")
    for w, groups in ((weight, 1), (weight[:, :1], 8)):
        for activation, function in [(0, lambda y: y), (1, torch.relu), (3, torch.sigmoid)]:
            ours = raw["conv2d_act_forward"]["cuda"](x, w, None, None, [1, 1], [1, 1], [1, 1], groups, activation)
            theirs = function(tF.conv2d(x, w, padding=1, groups=groups))
            assert torch.equal(ours.isnan(), theirs.isnan()) and torch.equal(ours.isinf(), theirs.isinf())


def test_wrong_arguments():
    x, w, b, dy = torch.randn(1, 4, 5, 5), torch.randn(6, 4, 3, 3), torch.randn(6), torch.randn(1, 6, 3, 3)
    forward, act, transposed, by_input, by_weight, by_bias = (
        raw[op]["cuda"] for op in ("conv2d_forward", "conv2d_act_forward", "conv_transpose2d_forward",
                                   "conv2d_backward_input", "conv2d_backward_weight", "conv2d_backward_bias"))
    for call in (
        lambda: forward(x.double(), w.double(), None, *SETTINGS),
        lambda: forward(x, w.bfloat16(), None, *SETTINGS),
        lambda: forward(x[0], w, None, *SETTINGS),
        lambda: forward(x, w[:, :3], None, *SETTINGS),
        lambda: forward(x, w, b[:5], *SETTINGS),
        lambda: forward(x, w, b.bfloat16(), *SETTINGS),
        lambda: forward(x, w, None, [0, 1], [0, 0], [1, 1], 1),
        lambda: forward(x, w, None, [1, 1], [-1, 0], [1, 1], 1),
        lambda: forward(x, w, None, [1, 1], [0, 0], [3, 1], 1),
        lambda: forward(x, w, None, [1, 1], [0, 0], [1, 1], 0),
        lambda: forward(x, w, None, [1], [0, 0], [1, 1], 1),
        lambda: forward(x, w, None, [1, 1], [0, 0], [1, 1], 2),
        lambda: forward(x, w, None, [1, 1], [2**29, 0], [1, 1], 1),
        lambda: forward(x[:, :, :0], w, None, *SETTINGS),
        lambda: act(x, w, b, dy[:, :5], *SETTINGS, 1),
        lambda: act(x, w, b, dy.bfloat16(), *SETTINGS, 1),
        lambda: act(x, w, b, dy.transpose(2, 3), *SETTINGS, 1),
        lambda: act(x, w, b, None, *SETTINGS, 4),
        lambda: transposed(dy, w, b, [1, 1], [0, 0], [1, 0], 1, [1, 1]),
        lambda: transposed(dy, w, b, [1, 1], [0, 0], [0, 0], 1, [1, 1]),
        lambda: by_input(dy, w, [1, 4, 6, 5], *SETTINGS, False),
        lambda: by_input(dy, w, [4, 5, 5], *SETTINGS, False),
        lambda: by_weight(dy, x, [6, 4, 2, 3], *SETTINGS, True, False),
        lambda: by_weight(dy.double(), x, w.shape, *SETTINGS, True, False),
        lambda: by_bias(dy[0]),
        lambda: by_bias(dy.double()),
    ):
        with pytest.raises((RuntimeError, ValueError, IndexError)):
            call()


def sample(bfloat16_only=False):
    """Some results of every kernel."""
    torch.manual_seed(3)
    found = []
    for dtype, layout in ((torch.float32, LAYOUTS[0]), (torch.bfloat16, LAYOUTS[1]), (torch.bfloat16, LAYOUTS[0])):
        if bfloat16_only and dtype == torch.float32:
            continue
        channels = 3 if layout == LAYOUTS[0] else 8
        for groups in (1, 8):
            shape = (2, channels if groups == 1 else 8, 33, 17)
            x = torch.randn(shape).to(dtype).contiguous(memory_format=layout)
            w = torch.randn(8, channels if groups == 1 else 1, 3, 3).to(dtype).contiguous(memory_format=layout)
            settings = [2, 1], [1, 1], [1, 1], groups
            y = raw["conv2d_forward"]["cuda"](x, w, None, *settings)
            found += [y, raw["conv2d_backward_input"]["cuda"](y, w, x.shape, *settings, layout == LAYOUTS[1]),
                      *raw["conv2d_backward_weight"]["cuda"](y, x, w.shape, *settings, True, layout == LAYOUTS[1])]
    return found


@pytest.mark.parametrize("order,seed", [("reverse", 1), ("random", 1)])
@pytest.mark.parametrize("hopper", [False, True], ids=["", "hopper"])
def test_same_bits_in_every_thread_order(order, seed, hopper):
    with cuda_on_host.hopper() if hopper else contextlib.nullcontext(), cuda_on_host.multiprocessors(1 if hopper else 132):
        forward = sample(bfloat16_only=hopper)
        with cuda_on_host.thread_order(order, seed):
            other = sample(bfloat16_only=hopper)
    assert all(torch.equal(a, b) for a, b in zip(forward, other))


# ---- Networks ----


class TinyResNet(torch.nn.Module):
    """A first layer, an identity block, a strided block with a projection, and a classifier."""

    def __init__(self, nn):
        super().__init__()
        torch.manual_seed(0)
        self.first = torch.nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8), torch.nn.ReLU())
        self.blocks = torch.nn.Sequential(
            models.resnet.BasicBlock(8, 8, 1, False, nn=nn), models.resnet.BasicBlock(8, 16, 2, False, nn=nn))
        self.last = torch.nn.Sequential(nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), nn.Linear(16, 10))

    def forward(self, x):
        return self.last(self.blocks(self.first(x)))


def lenet(nn):
    torch.manual_seed(0)
    return models.lenet(nn=nn)


@pytest.mark.parametrize("make,channels,size", [(lenet, 1, 32), (TinyResNet, 3, 11)], ids=["lenet", "resnet"])
def test_training(make, channels, size):
    """Output, every gradient, the loss curve and the parameters after three steps."""
    batches = [(torch.randn(8, channels, size, size), torch.randint(0, 10, (8,))) for _ in range(3)]
    loss = lambda nn, output, target: tF.cross_entropy(output, target)  # noqa: E731
    with on_cuda():
        check_training(make, batches, loss=loss, draws=3).raise_if_failed()

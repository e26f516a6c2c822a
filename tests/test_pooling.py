"""Pooling on the CPU: torch's values, indices, gradients and errors; an independent NumPy reference; parity.

Exact comparisons use integers that every divisor at hand divides, so that any order of sums gives the same bits.
"""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as TF

import dlkern
import dlkern.nn.functional as F
from dlkern.ops._registry import raw

LAYOUTS = [torch.contiguous_format, torch.channels_last]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
NAN, INF = float("nan"), float("inf")

MAX_WINDOWS = {
    "2x2": dict(kernel_size=2),
    "2x2 ceil": dict(kernel_size=2, ceil_mode=True),
    "2x2 overlapping rows": dict(kernel_size=2, stride=(1, 2)),
    "2x2 padded": dict(kernel_size=2, padding=1),
    "3 rows of pairs": dict(kernel_size=(3, 2), stride=(3, 2)),
    "dilated rows of pairs": dict(kernel_size=2, stride=2, dilation=(2, 1)),
    "3x3 stride 2": dict(kernel_size=3, stride=2, padding=1),
    "3x3 stride 2 ceil": dict(kernel_size=3, stride=2, padding=1, ceil_mode=True),
    "3x3 stride 1": dict(kernel_size=3, stride=1, padding=1),
    "3x5 stride 1": dict(kernel_size=(3, 5), stride=1, padding=(1, 2)),
    "3x3 stride 3": dict(kernel_size=3, stride=3),
    "2x3 stride over kernel": dict(kernel_size=(2, 3), stride=(5, 4), padding=(1, 0), ceil_mode=True),
    "5x4 mixed": dict(kernel_size=(5, 4), stride=(2, 3), padding=(2, 1)),
    "1x1": dict(kernel_size=1, stride=1),
    "1x1 stride 2": dict(kernel_size=1, stride=2),
    "dilated": dict(kernel_size=3, stride=1, padding=1, dilation=2),
    "dilated stride": dict(kernel_size=(2, 3), stride=(2, 3), padding=(0, 1), dilation=(3, 2), ceil_mode=True),
    "9x9": dict(kernel_size=9, stride=1, padding=4),
    "17x17, int64 indices": dict(kernel_size=17, stride=2, padding=8),
}
AVG_WINDOWS = {name: w for name, w in MAX_WINDOWS.items() if "dilation" not in w}
AVG_WINDOWS |= {
    "pads not counted": dict(kernel_size=3, stride=2, padding=1, count_include_pad=False, ceil_mode=True),
    "pads not counted, stride 1": dict(kernel_size=(3, 5), stride=1, padding=(1, 2), count_include_pad=False),
    "divisor": dict(kernel_size=(2, 3), divisor_override=5),
    "divisor of pairs": dict(kernel_size=2, divisor_override=3),
    "negative divisor": dict(kernel_size=3, stride=2, padding=1, divisor_override=-2),
}
SIZES = [(2, 3, 20, 24), (1, 5, 23, 19), (2, 16, 17, 33), (1, 67, 18, 17), (3, 1, 9, 65)]


def image(size, layout, dtype=torch.float32, low=-3, high=4, scale=1):
    x = torch.randint(low, high, size).double() * scale
    return x.to(dtype).contiguous(memory_format=layout)


def run(function, x, **options):
    """Outputs and the gradient of x against integers."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    output = function(x, **options)
    outputs = output if isinstance(output, tuple) else (output,)
    torch.manual_seed(11)
    cotangent = torch.randint(-4, 5, outputs[0].shape).to(outputs[0])
    (gradient,) = torch.autograd.grad(outputs[0], x, cotangent)
    return [*(o.detach() for o in outputs), gradient]


def same(ours, theirs):
    assert len(ours) == len(theirs)
    for a, e in zip(ours, theirs):
        assert a.dtype == e.dtype and a.shape == e.shape
        assert torch.equal(torch.nan_to_num(a, nan=12345.0), torch.nan_to_num(e, nan=12345.0))


def on_cpu(function, *args, **options):
    """The result, from the CPU column alone."""
    with dlkern.trace() as calls:
        result = function(*args, **options)
    assert calls and {call.backend for call in calls} == {"cpu"}
    return result


# ---- against torch ----


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MAX_WINDOWS)
def test_max_is_torchs(name, dtype):
    """Values, indices and gradients; few integers, so that ties are everywhere."""
    options = MAX_WINDOWS[name]
    for size in SIZES:
        for layout in LAYOUTS:
            x = image(size, layout, dtype)
            ours, theirs = on_cpu(run, F.max_pool2d, x, **options), run(TF.max_pool2d, x, **options)
            same(ours, theirs)  # the backward reads window offsets
            assert ours[0].stride() == theirs[0].stride()
            options_with = dict(options, return_indices=True)
            same(run(F.max_pool2d, x, **options_with), run(TF.max_pool2d, x, **options_with))  # and here int64 indices
            with torch.no_grad():
                assert torch.equal(F.max_pool2d(x, **options), theirs[0])


def multiple(options):
    """What the divisor of every window divides."""
    if options.get("divisor_override"):
        return abs(options["divisor_override"])
    kernel = options["kernel_size"]
    kh, kw = kernel if isinstance(kernel, tuple) else (kernel, kernel)
    return math.lcm(*range(1, kh + 1)) * math.lcm(*range(1, kw + 1))


@pytest.mark.parametrize("name", AVG_WINDOWS)
def test_avg_is_torchs(name):
    options = AVG_WINDOWS[name]
    scale = multiple(options)
    for size in SIZES:
        for layout in LAYOUTS:
            x = image(size, layout, torch.float64, scale=scale).requires_grad_()
            outputs = [on_cpu(F.avg_pool2d, x, **options), TF.avg_pool2d(x, **options)]
            assert torch.equal(*outputs) and outputs[0].stride() == outputs[1].stride()
            cotangent = image(outputs[0].shape, torch.contiguous_format, torch.float64, scale=scale)
            assert torch.equal(*(torch.autograd.grad(y, x, cotangent)[0] for y in outputs))


# kernel, stride, padding, ceil_mode
NARROW = [(2, 2, 0, False), (2, 2, 0, True), (3, 2, 1, False), (3, 1, 1, False), (4, 3, 2, False), (5, 4, 2, True)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("window", NARROW, ids=str)
def test_every_width(window, layout):
    """Widths (and, channels_last, channels) around the multiples of every vector."""
    kernel, _, padding, _ = window
    planes = layout == torch.contiguous_format
    for width in range(max(1, kernel - 2 * padding) if planes else 1, 41):
        size = (2, 3, 6, width) if planes else (2, width, 5, 6)
        for dtype in (torch.float32, torch.bfloat16):
            x = image(size, layout, dtype)
            options = dict(zip(("kernel_size", "stride", "padding", "ceil_mode"), window))
            same(run(F.max_pool2d, x, **options), run(TF.max_pool2d, x, **options))
        x = image(size, layout, torch.float32, scale=3600).requires_grad_()
        outputs = [f(x, *window) for f in (F.avg_pool2d, TF.avg_pool2d)]
        assert torch.equal(*outputs)
        cotangent = image(outputs[0].shape, torch.contiguous_format, scale=3600)
        assert torch.equal(*(torch.autograd.grad(y, x, cotangent)[0] for y in outputs))


ADAPTIVE = [1, 2, (1, 3), (4, 1), (None, 5), (3, None), (7, 6), (13, 15), (25, 40), (5, 64)]


@pytest.mark.parametrize("size", ADAPTIVE, ids=str)
def test_adaptive_is_torchs(size):
    """Windows that divide the input and that overlap, more windows than elements, whole planes."""
    for shape in [(2, 3, 7, 7), (1, 2, 12, 15), (2, 19, 9, 40), (1, 37, 14, 12), (2, 5, 1, 1), (3, 600, 4, 5)]:
        for layout in LAYOUTS:
            x = image(shape, layout, torch.float64, scale=5040).requires_grad_()
            outputs = [on_cpu(F.adaptive_avg_pool2d, x, size), TF.adaptive_avg_pool2d(x, size)]
            assert outputs[0].shape == outputs[1].shape and outputs[0].stride() == outputs[1].stride()
            torch.testing.assert_close(*outputs, rtol=1e-14, atol=1e-10)
            cotangent = image(outputs[0].shape, torch.contiguous_format, torch.float64, scale=5040)
            a, e = (torch.autograd.grad(y, x, cotangent)[0] for y in outputs)
            torch.testing.assert_close(a, e, rtol=1e-13, atol=1e-10)


# ---- the numerics rule ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("name", ["2x2", "3x3 stride 2 ceil", "3x3 stride 1", "5x4 mixed", "pads not counted", "divisor"])
def test_avg_parity(name, layout, dtype):
    options = AVG_WINDOWS[name]
    for size in [(2, 6, 13, 37), (1, 35, 12, 14)]:
        dlkern.testing.check(
            lambda x: F.avg_pool2d(x, **options), lambda x: TF.avg_pool2d(x, **options),
            lambda size=size: [torch.randn(size).contiguous(memory_format=layout).requires_grad_()],
            dtype=dtype, draws=2, name=f"{name} {layout} {size}",
        ).raise_if_failed()  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("size", [1, (1, 4), (5, 1), (3, 5), (20, 9)], ids=str)
def test_adaptive_parity(size, layout, dtype):
    for shape in [(3, 21, 7, 7), (2, 40, 11, 26), (1, 9, 50, 61)]:
        dlkern.testing.check(
            lambda x: F.adaptive_avg_pool2d(x, size), lambda x: TF.adaptive_avg_pool2d(x, size),
            lambda shape=shape: [torch.randn(shape).contiguous(memory_format=layout).requires_grad_()],
            dtype=dtype, draws=4, name=f"{size} {layout} {shape}",
        ).raise_if_failed()  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_adaptive_float64_carries_rounding_errors(layout):
    x = torch.tensor([1e16, 1.0, -1e16, 1.0], dtype=torch.float64).expand(2, 9, 4, 4).contiguous(memory_format=layout)
    for turned in (x, x.transpose(2, 3).contiguous(memory_format=layout)):
        assert F.adaptive_avg_pool2d(turned, 1).unique().tolist() == [0.5]
    assert F.adaptive_avg_pool2d(x, (2, 1)).unique().tolist() == [0.5]
    assert F.adaptive_avg_pool2d(x.transpose(2, 3).contiguous(memory_format=layout), (1, 2)).unique().tolist() == [0.5]


# ---- an independent reference ----


def windows(size, kernel, stride, pad, dilation, ceil_mode):
    """Start of each window along one dimension, written from the definition."""
    room = size + 2 * pad - dilation * (kernel - 1) - 1
    count = (math.ceil(room / stride) if ceil_mode else room // stride) + 1
    return [i * stride - pad for i in range(count) if i * stride < size + pad or not ceil_mode]


def numpy_max(x, k, s, p, d, ceil_mode):
    rows, columns = (windows(x.shape[i + 1], k[i], s[i], p[i], d[i], ceil_mode) for i in (0, 1))
    values, indices = np.empty((len(x), len(rows), len(columns))), np.empty((len(x), len(rows), len(columns)), np.int64)
    for c, i, j in np.ndindex(values.shape):
        inside = [
            (y, z)
            for y in range(rows[i], rows[i] + k[0] * d[0], d[0])
            for z in range(columns[j], columns[j] + k[1] * d[1], d[1])
            if 0 <= y < x.shape[1] and 0 <= z < x.shape[2]
        ]  # fmt: skip
        nans = [at for at in inside if np.isnan(x[(c, *at)])]
        best = nans[-1] if nans else max(inside, key=lambda at: x[(c, *at)])  # max keeps the first of equals
        values[c, i, j], indices[c, i, j] = x[(c, *best)], best[0] * x.shape[2] + best[1]
    return values, indices


def numpy_avg(x, k, s, p, ceil_mode, include, divisor):
    rows, columns = (windows(x.shape[i + 1], k[i], s[i], p[i], 1, ceil_mode) for i in (0, 1))
    h, w = x.shape[1:]
    values = np.empty((len(x), len(rows), len(columns)))
    for c, i, j in np.ndindex(values.shape):
        y0, x0 = rows[i], columns[j]
        part = x[c, max(y0, 0) : max(y0 + k[0], 0), max(x0, 0) : max(x0 + k[1], 0)]
        padded = (min(y0 + k[0], h + p[0]) - y0) * (min(x0 + k[1], w + p[1]) - x0)
        values[c, i, j] = part.sum() / (divisor or (padded if include else part.size))
    return values


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_against_numpy(layout):
    generator = np.random.default_rng(5)
    for _ in range(60):
        k, s = tuple(generator.integers(1, 5, 2).tolist()), tuple(generator.integers(1, 4, 2).tolist())
        p, d = tuple(int(generator.integers(0, n // 2 + 1)) for n in k), tuple(generator.integers(1, 3, 2).tolist())
        ceil_mode, include = bool(generator.integers(2)), bool(generator.integers(2))
        divisor = [None, 7][generator.integers(2)]
        x = generator.integers(-5, 5, (3, 9, int(generator.integers(8, 22)))).astype(np.float64)
        tensor = torch.from_numpy(x)[None].float().contiguous(memory_format=layout)
        average = F.avg_pool2d(tensor, k, s, p, ceil_mode, include, divisor)[0].double().numpy()
        np.testing.assert_allclose(average, numpy_avg(x, k, s, p, ceil_mode, include, divisor), rtol=3e-7, atol=1e-6)
        x[generator.random(x.shape) < 0.1] = np.nan
        x[generator.random(x.shape) < 0.1] = -np.inf
        tensor = torch.from_numpy(x)[None].float().contiguous(memory_format=layout)
        values, indices = F.max_pool2d(tensor, k, s, p, d, ceil_mode, return_indices=True)
        expected = numpy_max(x, k, s, p, d, ceil_mode)
        np.testing.assert_array_equal(values[0].double().numpy(), expected[0])
        np.testing.assert_array_equal(indices[0].numpy(), expected[1])


# ---- special values ----


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("name", ["2x2", "2x2 padded", "3x3 stride 2 ceil", "3x3 stride 1", "dilated", "5x4 mixed", "9x9"])
def test_special_values(name, layout, dtype):
    """NaN propagates and the last of a window wins; ties take the first; windows of minus infinity their first element."""
    options = MAX_WINDOWS[name]
    x = image((2, 35, 13, 34), layout, dtype)
    chance = torch.rand(x.shape)
    special = x.clone(memory_format=torch.preserve_format)
    special[chance < 0.1] = NAN
    special[(chance > 0.1) & (chance < 0.3)] = -INF
    special[(chance > 0.3) & (chance < 0.33)] = INF
    for tensor in (special, torch.full_like(x, -INF), torch.full_like(x, NAN), torch.full_like(x, 2), torch.zeros_like(x) * -1):
        same(run(F.max_pool2d, tensor, **options), run(TF.max_pool2d, tensor, **options))
        both = dict(options, return_indices=True)
        same(run(F.max_pool2d, tensor, **both), run(TF.max_pool2d, tensor, **both))


def test_semantics_by_hand():
    x = torch.tensor([[1.0, NAN, 3.0], [NAN, 5.0, 2.0], [7.0, 7.0, -INF]])[None, None]
    value, index = F.max_pool2d(x, 2, stride=1, return_indices=True)
    assert index.dtype == torch.int64 and index.flatten().tolist() == [3, 1, 3, 6 + 1]
    assert value.isnan().flatten().tolist() == [True, True, True, False]
    value, index = F.max_pool2d(torch.full((1, 1, 4, 4), -INF), 3, 2, 1, return_indices=True)
    assert index.flatten().tolist() == [0, 1, 4, 5] and (value == -INF).all()
    ones = torch.ones(1, 1, 4, 4)
    average = F.avg_pool2d(ones, 3, 2, 1, ceil_mode=True)[0, 0]
    torch.testing.assert_close(average[[0, 2], [0, 2]], torch.tensor([4 / 9, 1 / 4]))
    assert F.avg_pool2d(ones, 3, 2, 1, ceil_mode=True, count_include_pad=False).unique().tolist() == [1.0]
    assert F.avg_pool2d(ones, 2, divisor_override=8).unique().tolist() == [0.5]
    # A window that would start in the right padding is dropped.
    assert F.max_pool2d(torch.ones(1, 1, 3, 3), 2, 2, 1, ceil_mode=True).shape == (1, 1, 2, 2)
    # Ties give their gradient to the first; overlapping windows add up.
    x = torch.ones(1, 1, 4, 4, requires_grad=True)
    F.max_pool2d(x, 3, 1).sum().backward()
    assert x.grad[0, 0].tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    x = torch.zeros(1, 1, 3, 3).index_put((*[torch.tensor(0)] * 2, torch.tensor(1), torch.tensor(1)), torch.tensor(1.0))
    x.requires_grad_()
    F.max_pool2d(x, 2, 1).sum().backward()
    assert x.grad[0, 0, 1, 1] == 4 and x.grad.sum() == 4


def test_averages_of_infinities():
    x = torch.randn(1, 3, 9, 20)
    x[..., 4, 7] = INF
    x[..., 2, 3] = NAN
    for layout in LAYOUTS:
        z = x.contiguous(memory_format=layout)
        for ours, theirs in (
            (F.avg_pool2d(z, 3, 2, 1), TF.avg_pool2d(z, 3, 2, 1)),
            (F.adaptive_avg_pool2d(z, (3, 5)), TF.adaptive_avg_pool2d(z, (3, 5))),
            (F.adaptive_avg_pool2d(z.double(), 1), TF.adaptive_avg_pool2d(z.double(), 1)),
        ):
            torch.testing.assert_close(ours, theirs, equal_nan=True)


# ---- shapes and layouts ----


@pytest.mark.parametrize("function", ["max", "avg", "adaptive"])
def test_unbatched_empty_and_views(function):
    ours, theirs = {
        "max": (lambda x: F.max_pool2d(x, 3, 2, 1), lambda x: TF.max_pool2d(x, 3, 2, 1)),
        "avg": (lambda x: F.avg_pool2d(x, 3, 2, 1), lambda x: TF.avg_pool2d(x, 3, 2, 1)),
        "adaptive": (lambda x: F.adaptive_avg_pool2d(x, (2, 3)), lambda x: TF.adaptive_avg_pool2d(x, (2, 3))),
    }[function]
    base = torch.randn(4, 6, 18, 22)
    for x in (
        base[0], base[:0], base[:0].contiguous(memory_format=torch.channels_last), base[..., ::2], base[:, ::3],
        base.transpose(2, 3), base[:1].expand(4, -1, -1, -1), base[:, :1], base[..., :1, :1],
        base.contiguous(memory_format=torch.channels_last)[:, 1:5],
    ):  # fmt: skip
        before = x.clone()
        a, e = run(ours, x), run(theirs, x)
        assert [t.stride() for t in a[:1]] == [t.stride() for t in e[:1]] or x.numel() == 0 or a[0].numel() <= 1
        for actual, expected in zip(a, e):
            torch.testing.assert_close(actual, expected)
        assert torch.equal(x, before)
    indices = F.max_pool2d(base[0], 2, return_indices=True)[1]
    assert torch.equal(indices, TF.max_pool2d(base[0], 2, return_indices=True)[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_windows_far_beyond_the_input(dtype):
    """Plain-code paths: windows too large for scratch rows, places too large for a 32-bit tag, many channels."""
    huge = dict(kernel_size=(1, 2**22), stride=1, padding=(0, 2**21))
    for layout in LAYOUTS:
        x = image((2, 3, 5, 2), layout, dtype)
        for value in (0.0, math.nan):
            x[1, 2, 3, 1] = value
            same(run(F.max_pool2d, x, **huge), run(TF.max_pool2d, x, **huge))
        x[1, 2, 3, 1] = 0.0
        for include in (False, True):
            for actual, expected in zip(*(run(f, x, **huge, count_include_pad=include) for f in (F.avg_pool2d, TF.avg_pool2d))):
                torch.testing.assert_close(actual, expected)
        far = dict(kernel_size=1, stride=1, dilation=2**20, return_indices=True)
        same(run(F.max_pool2d, x, **far), run(TF.max_pool2d, x, **far))
        for stride in (5000, 2**30):
            apart = dict(kernel_size=2, stride=stride)
            for ours, theirs in ((F.max_pool2d, TF.max_pool2d), (F.avg_pool2d, TF.avg_pool2d)):
                same(run(ours, x, **apart), run(theirs, x, **apart))
    x = torch.randn(1, 2, 3, 7, dtype=dtype)
    missed = dict(kernel_size=3, stride=4, padding=1, dilation=3, ceil_mode=True)
    same([F.max_pool2d(x, **missed)], [TF.max_pool2d(x, **missed)])  # a window whose taps step over the rows


# ---- determinism, derivatives, errors ----


def test_thread_counts_agree():
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 2, 3):
            torch.set_num_threads(count)
            torch.manual_seed(3)
            results = []
            for layout in LAYOUTS:
                x = torch.randn(3, 37, 31, 45).contiguous(memory_format=layout)
                for name in ("2x2", "3x3 stride 2", "3x3 stride 1", "5x4 mixed", "9x9"):
                    results += run(F.max_pool2d, x, **MAX_WINDOWS[name]) + run(F.avg_pool2d, x, **AVG_WINDOWS[name])
                tiled = torch.randn(2, 33, 32, 46).contiguous(memory_format=layout)
                results += run(F.max_pool2d, tiled, kernel_size=2) + run(F.avg_pool2d, tiled, kernel_size=2)
                for size in (1, (4, 1), (5, 7)):
                    results += run(lambda z, size=size: F.adaptive_avg_pool2d(z, size), x)
            found.append(results)
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        same(other, found[0])


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_derivatives(layout):
    x = torch.randperm(2 * 3 * 6 * 7).reshape(2, 3, 6, 7).double().contiguous(memory_format=layout).requires_grad_()
    for function in (
        lambda x: F.max_pool2d(x, 3, 2, 1), lambda x: F.max_pool2d(x, 2, return_indices=True)[0],
        lambda x: F.avg_pool2d(x, 3, 2, 1, True, False), lambda x: F.avg_pool2d(x, 2),
        lambda x: F.adaptive_avg_pool2d(x, (4, 3)), lambda x: F.adaptive_avg_pool2d(x, 1),
    ):  # fmt: skip
        assert torch.autograd.gradcheck(function, x)
        assert torch.autograd.gradgradcheck(function, x)


BAD_CALLS = {
    "kernel 0": lambda f, x: f.max_pool2d(x, 0),
    "stride 0": lambda f, x: f.max_pool2d(x, 2, 0),
    "negative padding": lambda f, x: f.avg_pool2d(x, 2, 2, -1),
    "padding over half": lambda f, x: f.max_pool2d(x, 3, 1, 2),
    "avg padding over half": lambda f, x: f.avg_pool2d(x, (2, 3), 1, (1, 2)),
    "dilation 0": lambda f, x: f.max_pool2d(x, 2, dilation=0),
    "window too large": lambda f, x: f.max_pool2d(x, 9),
    "avg window too large": lambda f, x: f.avg_pool2d(x, (2, 9)),
    "divisor 0": lambda f, x: f.avg_pool2d(x, 2, divisor_override=0),
    "two dimensions": lambda f, x: f.max_pool2d(x[0, 0], 2),
    "five dimensions": lambda f, x: f.avg_pool2d(x[None], 2),
    "no channels": lambda f, x: f.max_pool2d(x[:, :0], 2),
    "no rows": lambda f, x: f.adaptive_avg_pool2d(x[:, :, :0], 2),
    "integers": lambda f, x: f.adaptive_avg_pool2d(x.long(), 2),
    "three sizes": lambda f, x: f.max_pool2d(x, (2, 2, 2)),
    "a string": lambda f, x: f.max_pool2d(x, "2"),
    "adaptive, negative": lambda f, x: f.adaptive_avg_pool2d(x, -1),
    "adaptive, three sizes": lambda f, x: f.adaptive_avg_pool2d(x, (1, 2, 3)),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_errors_are_torchs(name):
    x = torch.randn(2, 3, 5, 5)
    found = []
    for functions in (TF, F):
        with pytest.raises(Exception) as raised:
            BAD_CALLS[name](functions, x)
        found.append(raised.value)
    assert type(found[0]) is type(found[1]) and str(found[0]) == str(found[1])


def test_raw_ops_refuse():
    """A direct call checks everything; where torch has the same check, in torch's words."""
    x = torch.randn(1, 2, 4, 4)

    def window(kernel=(2, 2), stride=(2, 2), padding=(0, 0), dilation=(1, 1)):
        return [*kernel, *stride, *padding, *dilation]

    forward, backward = raw["max_pool2d_forward"]["cpu"], raw["max_pool2d_backward"]["cpu"]
    output, indices = forward(x, window(), False, 1)
    average, average_backward = raw["avg_pool2d_forward"]["cpu"], raw["avg_pool2d_backward"]["cpu"]
    adaptive, adaptive_backward = raw["adaptive_avg_pool2d_forward"]["cpu"], raw["adaptive_avg_pool2d_backward"]["cpu"]
    for call, message in [
        (lambda: forward(x, window(kernel=(0, 2)), False, 1), "kernel size should be greater than zero"),
        (lambda: forward(x, window(stride=(0, 1)), False, 1), "stride should be greater than zero"),
        (lambda: forward(x, window(dilation=(0, 1)), False, 1), "dilation should be greater than zero"),
        (lambda: forward(x, window(padding=(2, 2)), False, 1), "pad should be at most half of effective kernel size"),
        (lambda: forward(x, window(padding=(-1, 0)), False, 1), "pad must be non-negative"),
        (lambda: forward(x, window(kernel=(9, 9)), False, 1), "Output size is too small"),
        (lambda: average(x, window()[:6], False, True, 0), "divisor must be not zero"),
        (lambda: forward(x[0], window(), False, 1), "expected a 4-D tensor"),
        (lambda: forward(x.long(), window(), False, 1), "expected float32, float64, bfloat16 or float16"),
        (lambda: forward(x, window()[:7], False, 1), "a window takes 8 ints, got 7"),
        (lambda: forward(x, window(), False, 3), "indices must be 0, 1 or 2"),
        (lambda: forward(torch.randn(1, 1, 40, 40), window(kernel=(17, 17)), False, 1), "needs int64 indices"),
        (lambda: forward(x, window(dilation=(2**40, 1)), False, 1), "too large for a window"),
        (lambda: forward(x[:, :0], window(), False, 1), "at least one channel"),
        (lambda: backward(output, indices.int(), [1, 2, 4, 4], window(), False), "indices must be uint8 or int64"),
        (lambda: backward(output, indices[..., :1], [1, 2, 4, 4], window(), False), "wrong sizes"),
        (lambda: backward(output, indices, [1, 2, 8, 8], window(), False), "wrong sizes"),
        (lambda: backward(output, indices, [1, 2], window(), False), "expected a 4-D tensor"),
        (lambda: average_backward(output, [1, 2, 9, 4], window()[:6], False, True, None, False), "wrong sizes"),
        (lambda: adaptive(x, [2]), "output_size must be 2"),
        (lambda: adaptive(x, [-1, 2]), "greater than or equal to 0"),
        (lambda: adaptive_backward(x, [1, 3, 8, 8], False), "wrong sizes"),
    ]:
        with pytest.raises((RuntimeError, ValueError), match=message):
            call()


@pytest.mark.parametrize("channels_last", [False, True])
def test_foreign_indices_write_nothing_outside(channels_last):
    """Indices that no forward made name no element, or one inside the plane."""
    layout = LAYOUTS[channels_last]
    for kernel in ([2, 2], [3, 3], [9, 9]):
        window = [*kernel, 2, 2, *(k // 2 for k in kernel), 1, 1]
        x = torch.randn(2, 3, 10, 12).contiguous(memory_format=layout)
        output, indices = raw["max_pool2d_forward"]["cpu"](x, window, False, 2)
        for foreign in (torch.full_like(indices, -1), torch.full_like(indices, 10**12), torch.full_like(indices, 255).byte()):
            gradient = raw["max_pool2d_backward"]["cpu"](torch.ones_like(output), foreign, x.shape, window, channels_last)
            assert gradient.count_nonzero() == 0 and gradient.shape == x.shape


def test_a_pool_of_nothing():
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    output = F.adaptive_avg_pool2d(x, (0, 2))
    assert output.shape == (2, 3, 0, 2)
    output.sum().backward()
    assert x.grad.count_nonzero() == 0


@pytest.mark.parametrize("return_indices", [False, True])
@pytest.mark.parametrize("size", [(3, 1, 1), (2, 3, 1, 1), (2, 4, 3, 1)], ids=str)
def test_windows_that_see_nothing(size, return_indices):
    """Dilated taps may all miss the image, and ceil_mode alone may make the only window. torch's index then lies outside
    the window, and its backward writes there; here such a window has no gradient."""
    x = torch.randn(size, requires_grad=True)
    options = dict(kernel_size=3, stride=3, padding=1, dilation=2, ceil_mode=True)
    with dlkern.trace() as calls:
        outputs = F.max_pool2d(x, return_indices=return_indices, **options)
    assert {call.backend for call in calls} == {"cpu"}
    y, expected = outputs[0] if return_indices else outputs, TF.max_pool2d(x.detach(), **options)
    assert torch.equal(y, expected)
    (gradient,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert gradient.sum() == torch.isfinite(expected).sum()

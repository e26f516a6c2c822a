"""The CUDA column's kernels, run on the host (csrc/cuda_on_host): parity by the rule, thread orders, odd sizes, wrong
arguments. tests/test_cuda_builds.py runs this file again on the checked build, and part of it under sanitizers."""

import contextlib

import pytest
import test_positions
import torch
import torch.nn.functional as tF
from cuda_column import (  # noqa: F401
    LAYOUTS,
    all_dtypes,
    certify,
    layouts,
    leaf,
    library,
    no_findings,
    on_cuda,
    short_dtypes,
)
from test_float16 import IN_RANGE

import dlkern
import dlkern.nn.functional as F
from dlkern.ops._registry import raw
from dlkern.reference import dropout as reference
from dlkern.reference.positions import rotary as reference_rotary
from dlkern.testing import compare, cuda_on_host

# ---- linear ----

LINEAR = [  # rows..., in_features, out_features
    ((5,), 7, 3), ((64,), 64, 64), ((70,), 40, 24), ((130,), 33, 65), ((3, 11), 24, 17), ((1,), 8, 8), ((67,), 200, 72),
    ((9,), 1, 5),
]


@pytest.mark.parametrize("dtype,bias", [
    (torch.bfloat16, True), (torch.bfloat16, False), (torch.float16, True), (torch.float32, True),
], ids=["bfloat16", "no_bias", "float16", "float32"])
@pytest.mark.parametrize("rows,inputs,outputs", LINEAR)
def test_linear(rows, inputs, outputs, dtype, bias):
    draw = lambda: [leaf(*rows, inputs), leaf(outputs, inputs), *([leaf(outputs)] if bias else [])]  # noqa: E731
    certify(F.linear, tF.linear, draw, dtype, draws=16 if dtype == torch.float32 else 4)


@short_dtypes
@pytest.mark.parametrize("activation", ["relu", "tanh", "sigmoid"])
def test_linear_with_activation(activation, dtype):
    # The fused op rounds once where torch rounds twice, so torch's is the float64 expression's error in 16 bits.
    theirs = lambda *t: getattr(torch, activation)(tF.linear(*t))  # noqa: E731
    certify(lambda *t: F.linear(*t, activation=dlkern.Activation[activation.upper()]), theirs,
            lambda: [leaf(37, 16), leaf(27, 16), leaf(27)], dtype, draws=4)


def bf16(*shape):
    return torch.randn(shape).bfloat16()


@short_dtypes
def test_linear_large_tiles(dtype):
    """Sizes from which the 128 x 128 tiles serve, with tails on every side."""
    for op, (rows, inputs, outputs) in {
        "linear_forward": (1030, 72, 1040), "linear_backward_input": (1030, 1040, 72),
        "linear_backward_weight": (72, 1032, 1048),
    }.items():
        shapes = (rows, inputs), (outputs, inputs), (outputs,), (rows, outputs)
        x, weight, bias, grad = (torch.randn(shape).to(dtype) for shape in shapes)
        if op == "linear_forward":
            found = [raw[op]["cuda"](x, weight, bias, 1)]
            expression = lambda x, w, b, g: [tF.linear(x, w, b).relu()]  # noqa: E731
        elif op == "linear_backward_input":
            found = [raw[op]["cuda"](grad, weight)]
            expression = lambda x, w, b, g: [g @ w]  # noqa: E731
        else:
            found = raw[op]["cuda"](grad, x, True)
            expression = lambda x, w, b, g: [g.T @ x, g.sum(0)]  # noqa: E731
        exact = expression(*(t.double() for t in (x, weight, bias, grad)))
        for i, (ours, theirs, wanted) in enumerate(zip(found, expression(x, weight, bias, grad), exact)):
            bad = [row for row in compare(f"{op} {i}", [ours], [theirs], [wanted], dtype) if not row.ok]
            assert not bad, bad


@pytest.mark.parametrize("multiprocessors", [1, 2], ids=["wide", "narrow"])  # as few make few tiles enough
@pytest.mark.parametrize("rows,inputs,outputs", [((3, 43), 72, 136), ((5,), 8, 8), ((257,), 328, 264)])
@short_dtypes
def test_linear_on_hopper(rows, inputs, outputs, multiprocessors, dtype):
    with cuda_on_host.hopper(), cuda_on_host.multiprocessors(multiprocessors):
        certify(F.linear, tF.linear, lambda: [leaf(*rows, inputs), leaf(outputs, inputs), leaf(outputs)], dtype, draws=2)


@pytest.mark.parametrize("order", cuda_on_host.ORDERS)
def test_linear_on_hopper_does_not_depend_on_thread_order(order):
    x, weight, bias, grad = bf16(70, 200), bf16(24, 200), bf16(24), bf16(70, 24)

    def run():
        found = []
        for op, arguments in (("linear_forward", (x, weight, bias, 2)), ("linear_backward_input", (grad, weight)),
                              ("linear_backward_weight", (grad, x, True))):
            result = raw[op]["cuda"](*arguments)
            found += result if isinstance(result, tuple) else [result]
            assert cuda_on_host.last_kernel() == "linear_sm90_kernel"
        return found

    with cuda_on_host.hopper(), cuda_on_host.multiprocessors(2):
        expected = run()
        with cuda_on_host.thread_order(order):
            assert all(torch.equal(a, b) for a, b in zip(run(), expected))


def test_linear_on_hopper_where_it_does_not_fit():
    """Rows that are no multiple of 16 bytes, operands between 16-byte boundaries, and nothing to sum over."""
    draw = lambda inputs: [leaf(9, inputs), leaf(5, inputs), leaf(5)]  # noqa: E731
    with cuda_on_host.hopper(), cuda_on_host.multiprocessors(1):
        certify(F.linear, tF.linear, lambda: draw(7), torch.bfloat16, draws=4)
        assert cuda_on_host.last_kernel() == "linear_backward_weight_kernel"
        x, weight = bf16(20 * 16 + 1)[1:].view(20, 16), bf16(24, 16)
        ours = raw["linear_forward"]["cuda"](x, weight, None, 0)
        assert torch.equal(ours, raw["linear_forward"]["cuda"](x.clone(), weight, None, 0))
        bias = bf16(8)
        assert torch.equal(raw["linear_forward"]["cuda"](bf16(4, 0), bf16(8, 0), bias, 0), bias.expand(4, 8))


@pytest.mark.parametrize("offset", [0, 1])
def test_linear_views(offset):
    """Operands that begin between 16-byte boundaries, and transposed ones."""
    x, weight = bf16(20 * 16 + 1)[offset : offset + 320].view(20, 16), bf16(16, 24).t()
    ours = raw["linear_forward"]["cuda"](x, weight, None, 0)
    assert torch.equal(ours, raw["linear_forward"]["cuda"](x.clone(), weight.contiguous(), None, 0))
    g = bf16(20 * 24 + 1)[offset : offset + 480].view(20, 24)
    gradient = raw["activation_backward"]["cuda"](g, ours, 2)
    assert torch.equal(gradient, raw["activation_backward"]["cuda"](g.clone(), ours, 2))


@all_dtypes
def test_linear_nothing_to_do(dtype):
    for rows, inputs, outputs in [(0, 8, 8), (4, 0, 8), (4, 8, 0)]:
        x, weight, bias, grad = (bf16(*n).to(dtype) for n in ((rows, inputs), (outputs, inputs), (outputs,), (rows, outputs)))
        assert torch.equal(raw["linear_forward"]["cuda"](x, weight, bias, 0), tF.linear(x, weight, bias))
        assert torch.equal(raw["linear_backward_input"]["cuda"](grad, weight), grad @ weight)
        weight_grad, bias_grad = raw["linear_backward_weight"]["cuda"](grad, x, True)
        assert torch.equal(weight_grad, grad.T @ x)
        assert bias_grad.shape == (outputs,)
        assert torch.allclose(bias_grad, grad.sum(0), rtol=2**-7)


@short_dtypes
def test_linear_nan_and_infinity(dtype):
    x, weight = torch.randn(9, 16).to(dtype), torch.randn(8, 16).to(dtype)
    x[2, 3], x[5, 1] = float("nan"), float("inf")
    for activation, function in [(0, lambda y: y), (1, torch.relu), (3, torch.sigmoid)]:
        ours = raw["linear_forward"]["cuda"](x, weight, None, activation)
        theirs = function(tF.linear(x, weight))
        assert torch.equal(ours.isnan(), theirs.isnan())
        assert torch.equal(ours.isinf(), theirs.isinf())


@pytest.mark.parametrize("arguments", [
    (torch.ones(3, 4).double(), torch.ones(5, 4).double(), None, 0),
    (torch.ones(3, 4), torch.ones(5, 4, dtype=torch.bfloat16), None, 0),
    (torch.ones(3, 4, dtype=torch.bfloat16), torch.ones(5, 3, dtype=torch.bfloat16), None, 0),
    (torch.ones(3, 4, dtype=torch.bfloat16), torch.ones(4, dtype=torch.bfloat16), None, 0),
    (torch.ones(3, 4, dtype=torch.bfloat16), torch.ones(5, 4, dtype=torch.bfloat16), torch.ones(5), 0),
    (torch.ones(3, 4, dtype=torch.bfloat16), torch.ones(5, 4, dtype=torch.bfloat16), None, 9),
    (torch.ones((), dtype=torch.bfloat16), torch.ones(5, 4, dtype=torch.bfloat16), None, 0),
])
def test_linear_wrong_arguments(arguments):
    with pytest.raises((RuntimeError, ValueError)):
        raw["linear_forward"]["cuda"](*arguments)


# ---- pooling ----

MAX_POOLS = {
    "2x2": dict(kernel_size=2),
    "3x3 stride 2": dict(kernel_size=3, stride=2, padding=1),
    "overlapping": dict(kernel_size=(3, 2), stride=1, padding=(1, 0)),
    "ceil": dict(kernel_size=3, stride=2, padding=1, ceil_mode=True),
    "dilated": dict(kernel_size=(2, 3), stride=(2, 1), padding=1, dilation=(2, 3)),
    "gaps": dict(kernel_size=1, stride=3),
}
AVERAGE_POOLS = {
    "2x2": dict(kernel_size=2),
    "3x3 padded": dict(kernel_size=3, stride=2, padding=1),
    "pads not counted": dict(kernel_size=(3, 2), stride=1, padding=1, count_include_pad=False),
    "ceil": dict(kernel_size=3, stride=2, padding=1, ceil_mode=True),
    "divisor": dict(kernel_size=(2, 3), divisor_override=5),
}
# One channel count that fills 16-byte packs in both dtypes, and one that does not.
IMAGES = [(2, 8, 9, 11), (1, 5, 7, 8)]
images = pytest.mark.parametrize("shape", IMAGES, ids=lambda s: "x".join(map(str, s)))


@pytest.mark.parametrize("pool", MAX_POOLS)
@images
@layouts
@all_dtypes
def test_max_pool2d(pool, shape, layout, dtype):
    options = MAX_POOLS[pool]
    certify(lambda x: F.max_pool2d(x, **options), lambda x: tF.max_pool2d(x, **options),
            lambda: [leaf(*shape, memory_format=layout)], dtype)
    x = leaf(*shape, memory_format=layout).detach().to(dtype)
    with on_cuda():
        ours = F.max_pool2d(x, return_indices=True, **options)
    theirs = tF.max_pool2d(x, return_indices=True, **options)
    assert all(torch.equal(a, b) and a.stride() == b.stride() for a, b in zip(ours, theirs))


@pytest.mark.parametrize("pool", AVERAGE_POOLS)
@images
@layouts
@all_dtypes
def test_avg_pool2d(pool, shape, layout, dtype):
    options = AVERAGE_POOLS[pool]
    certify(lambda x: F.avg_pool2d(x, **options), lambda x: tF.avg_pool2d(x, **options),
            lambda: [leaf(*shape, memory_format=layout)], dtype)


@pytest.mark.parametrize("size", [1, (4, 5), (9, 3)], ids=str)
@images
@layouts
@all_dtypes
def test_adaptive_avg_pool2d(size, shape, layout, dtype):
    certify(lambda x: F.adaptive_avg_pool2d(x, size), lambda x: tF.adaptive_avg_pool2d(x, size),
            lambda: [leaf(*shape, memory_format=layout)], dtype)


# A whole plane, windows that overlap, fewer than the input has pixels and more, one that is not there.
@pytest.mark.parametrize("size", [1, (4, 5), (9, 3), (13, 12), (None, 2)], ids=str)
@images
@layouts
@all_dtypes
def test_adaptive_max_pool2d(size, shape, layout, dtype):
    x = leaf(*shape, memory_format=layout).detach().to(dtype)
    with on_cuda():
        ours = F.adaptive_max_pool2d(x, size, return_indices=True)
    theirs = tF.adaptive_max_pool2d(x, size, return_indices=True)
    assert all(torch.equal(a, b) and a.stride() == b.stride() for a, b in zip(ours, theirs))
    certify(lambda x: F.adaptive_max_pool2d(x, size), lambda x: tF.adaptive_max_pool2d(x, size),
            lambda: [leaf(*shape, memory_format=layout)], dtype)


POWER_WINDOWS = {
    "2x2": dict(kernel_size=2),
    "overlapping": dict(kernel_size=3, stride=2),
    "ceil": dict(kernel_size=(3, 4), stride=(2, 3), ceil_mode=True),
    "gaps": dict(kernel_size=(2, 1), stride=(3, 4)),
}


@pytest.mark.parametrize(("pool", "norm"), [(name, 2) for name in POWER_WINDOWS] + [
    ("ceil", norm) for norm in (1, 3, 4.0, 0.5, 1.5, -1, -2.0, 12)])
@images
@layouts
@all_dtypes
def test_lp_pool2d(pool, norm, shape, layout, dtype):
    options = dict(POWER_WINDOWS[pool], norm_type=norm)
    certify(lambda x: F.lp_pool2d(x, **options), lambda x: tF.lp_pool2d(x, **options),
            lambda: [(torch.rand(shape, dtype=torch.float64) + 0.2).contiguous(memory_format=layout).requires_grad_()],
            dtype, draws=4)


@pytest.mark.parametrize("norm", [1, 2, 4])
@layouts
@all_dtypes
def test_lp_pool2d_of_both_signs(norm, layout, dtype):
    certify(lambda x: F.lp_pool2d(x, norm, 3, 2), lambda x: tF.lp_pool2d(x, norm, 3, 2),
            lambda: [leaf(*IMAGES[0], memory_format=layout)], dtype, draws=16)


@pytest.mark.parametrize("norm", [1, 2, 3, 0.5, 2.5, -1, -3, 12, float("inf"), float("-inf")])
@layouts
def test_lp_pool2d_special_values(norm, layout):
    """Zeros (no gradient where the sum is zero), signs under odd and fractional powers, infinities and NaN, as torch."""
    if abs(norm) == float("inf") and tF.lp_pool1d(torch.tensor([[1.0, 2.0]]), norm, 2).item() != (2 if norm > 0 else 1):
        pytest.skip("torch before 2.13 takes powers")
    pick = torch.tensor([0.0, 0.0, 0.0, -0.0, 1.0, -1.0, 2.0, float("inf"), float("-inf"), float("nan")])
    for kinds in (7, 7 if abs(norm) == float("inf") else 10):
        drawn = pick[torch.randint(0, kinds, IMAGES[0])].contiguous(memory_format=layout)
        for x in (drawn, torch.zeros_like(drawn), torch.full_like(drawn, -2.0)):
            for options in (dict(kernel_size=2), dict(kernel_size=3, stride=2, ceil_mode=True)):
                results = []
                for function, column in ((F.lp_pool2d, on_cuda()), (tF.lp_pool2d, contextlib.nullcontext())):
                    tensor = x.clone().requires_grad_()
                    with column:
                        y = function(tensor, norm, **options)
                        y.backward(torch.full_like(y, 2.0))
                    results.append((y.detach(), tensor.grad))
                for a, e in zip(*results, strict=True):
                    torch.testing.assert_close(a, e, equal_nan=True)


def test_lp_pool2d_of_what_float32_powers_would_lose():
    for value in (1e15, 1e-15):
        with on_cuda():
            y = F.lp_pool2d(torch.full((1, 1, 2, 2), value), 12, 2)
        assert y.item() == pytest.approx(value * 4 ** (1 / 12), rel=1e-6)


def test_pooling_in_one_dimension():
    x = lambda: [leaf(2, 3, 19)]  # noqa: E731
    certify(lambda x: F.adaptive_max_pool1d(x, 5), lambda x: tF.adaptive_max_pool1d(x, 5), x, torch.float32)
    certify(lambda x: F.lp_pool1d(x, 2, 3, 2), lambda x: tF.lp_pool1d(x, 2, 3, 2), x, torch.float32, draws=4)


@layouts
@all_dtypes
def test_adaptive_max_pool2d_special_values(layout, dtype):
    """Ties, NaN, planes of -inf, no windows at all."""
    x = torch.randint(-2, 2, (2, 8, 6, 7)).to(dtype).contiguous(memory_format=layout)
    x[0, 0, 1, 1] = x[0, 0, 1, 2] = x[1, 1, 3, 3] = float("nan")
    x[0, 1], x[1, 7, 2:] = float("-inf"), float("-inf")
    for size in ((4, 3), 1):
        values, places = tF.adaptive_max_pool2d(x, size, return_indices=True)
        ours, indices = raw["adaptive_max_pool2d_forward"]["cuda"](x, [size, size] if size == 1 else size)
        assert torch.equal(ours.nan_to_num(7.0), values.nan_to_num(7.0)) and torch.equal(indices, places)
        grad = torch.randint(-3, 4, values.shape).to(dtype)  # sums of these are exact
        gradient = raw["adaptive_max_pool2d_backward"]["cuda"](grad, indices, x.shape, layout == LAYOUTS[1])
        assert torch.equal(gradient, torch.ops.aten.adaptive_max_pool2d_backward(grad, x, places))
    with on_cuda():
        nothing = x.clone().requires_grad_()
        F.adaptive_max_pool2d(nothing, (0, 2)).sum().backward()
    assert not nothing.grad.any()


@layouts
@all_dtypes
def test_max_pool2d_special_values(layout, dtype):
    x = torch.randn(2, 8, 6, 7).to(dtype).contiguous(memory_format=layout)
    x[0, 1, 2, 3], x[1, 7] = float("nan"), float("-inf")
    x[0, 3] = 1.5  # ties: the first wins
    for options in (dict(kernel_size=2), dict(kernel_size=3, stride=2, padding=1)):
        with on_cuda():
            ours = F.max_pool2d(x, return_indices=True, **options)
        theirs = tF.max_pool2d(x, return_indices=True, **options)
        assert torch.equal(ours[0].nan_to_num(7.0), theirs[0].nan_to_num(7.0))
        assert torch.equal(ours[1], theirs[1])
        grads = []
        for function, tensor in ((F.max_pool2d, x.clone()), (tF.max_pool2d, x.clone())):
            tensor.requires_grad_()
            with on_cuda() if function is F.max_pool2d else contextlib.nullcontext():
                function(tensor, **options).float().nan_to_num().sum().backward()
            grads.append(tensor.grad)
        assert torch.equal(*grads)


@all_dtypes
def test_pooling_empty_batch_and_views(dtype):
    with on_cuda():
        empty = torch.zeros(0, 3, 4, 4, dtype=dtype, requires_grad=True)
        F.max_pool2d(empty, 2).sum().backward()
        F.adaptive_max_pool2d(empty, 2).sum().backward()
        F.lp_pool2d(empty, 2, 2).sum().backward()
        assert F.max_pool2d(empty, 2).shape == (0, 3, 2, 2) and empty.grad.shape == empty.shape
        base = torch.randn(2 * 4 * 6 * 6 + 1).to(dtype)
        for layout in LAYOUTS:  # data that begins between 16-byte boundaries
            x = base[1:].view(2, 4, 6, 6) if layout == LAYOUTS[0] else base[1:].view(2, 6, 6, 4).permute(0, 3, 1, 2)
            assert torch.equal(F.max_pool2d(x, 2), tF.max_pool2d(x, 2))
            assert torch.equal(F.adaptive_max_pool2d(x, 4), tF.adaptive_max_pool2d(x, 4))
            assert all(torch.equal(F.lp_pool2d(x, norm, 2), F.lp_pool2d(x.clone(), norm, 2)) for norm in (2, 4))
        x = torch.randn(2, 6, 6, 4).to(dtype).transpose(2, 3)[:, ::2]
        assert torch.equal(F.max_pool2d(x, 2), tF.max_pool2d(x, 2))
        assert torch.equal(F.adaptive_max_pool2d(x, 4), tF.adaptive_max_pool2d(x, 4))


def test_pooling_wrong_arguments():
    x, pool = torch.randn(1, 2, 4, 4), [2, 2, 2, 2, 0, 0, 1, 1]
    forward, backward = raw["max_pool2d_forward"]["cuda"], raw["max_pool2d_backward"]["cuda"]
    output, indices = forward(x, pool, False, 1)
    powers, powers_backward = raw["lp_pool2d_forward"]["cuda"], raw["lp_pool2d_backward"]["cuda"]
    adaptive, places = raw["adaptive_max_pool2d_backward"]["cuda"], indices.long()
    for call in (
        lambda: forward(x[0], pool, False, 1), lambda: forward(x.double(), pool, False, 1),
        lambda: forward(x, [0, *pool[1:]], False, 1), lambda: forward(x, pool[1:], False, 1),
        lambda: forward(x, [2, 2, 0, 1, 0, 0, 1, 1], False, 1), lambda: forward(x, [2, 2, 2, 2, 2, 2, 1, 1], False, 1),
        lambda: forward(x, [9, 9, *pool[2:]], False, 1), lambda: forward(x, pool, False, 3),
        lambda: forward(torch.randn(1, 1, 40, 40), [17, 17, *pool[2:]], False, 1),
        lambda: forward(x, [*pool[:6], 2**40, 1], False, 1), lambda: forward(x[:, :0], pool, False, 1),
        lambda: backward(output, indices.int(), [1, 2, 4, 4], pool, False),
        lambda: backward(output, indices[..., :1], [1, 2, 4, 4], pool, False),
        lambda: backward(output, indices, [1, 2, 8, 8], pool, False),
        lambda: backward(output, indices, [1, 2], pool, False),
        lambda: raw["avg_pool2d_forward"]["cuda"](x, pool[:6], False, True, 0),
        lambda: raw["adaptive_avg_pool2d_forward"]["cuda"](x, [2]),
        lambda: raw["adaptive_avg_pool2d_forward"]["cuda"](x, [-1, 2]),
        lambda: raw["adaptive_avg_pool2d_backward"]["cuda"](x, [1, 3, 8, 8], False),
        lambda: raw["adaptive_max_pool2d_forward"]["cuda"](x, [2]),
        lambda: raw["adaptive_max_pool2d_forward"]["cuda"](x, [-1, 2]),
        lambda: raw["adaptive_max_pool2d_forward"]["cuda"](x[0], [2, 2]),
        lambda: raw["adaptive_max_pool2d_forward"]["cuda"](x.double(), [2, 2]),
        lambda: powers(x.double(), 2.0, [2] * 4, False), lambda: powers(x, 0.0, [2] * 4, False),
        lambda: powers(x, float("inf"), [2] * 4, False), lambda: powers(x, float("nan"), [2] * 4, False),
        lambda: powers(x, 2.0, [2] * 3, False), lambda: powers(x, 2.0, [0, 2, 2, 2], False),
        lambda: powers(x[0], 2.0, [2] * 4, False),
        lambda: powers_backward(output.bfloat16(), x, 2.0, [2] * 4, False),
        lambda: powers_backward(output[..., :1], x, 2.0, [2] * 4, False),
        lambda: powers_backward(output, x[0], 2.0, [2] * 4, False),
        lambda: adaptive(output, places.int(), [1, 2, 4, 4], False),
        lambda: adaptive(output, places[..., :1], [1, 2, 4, 4], False),
        lambda: adaptive(output, places, [1, 3, 4, 4], False), lambda: adaptive(output, places, [1, 2], False),
        lambda: adaptive(output[0], places[0], [1, 2, 4, 4], False),
    ):
        with pytest.raises((RuntimeError, ValueError, IndexError)):
            call()


def test_indices_out_of_range_are_harmless():
    """Indices that no window has: no gradient, and no access outside the tensors."""
    pool = [2, 2, 2, 2, 0, 0, 1, 1]
    for indices in (torch.full((1, 2, 2, 2), 200, dtype=torch.uint8), torch.full((1, 2, 2, 2), 2**40)):
        grad = raw["max_pool2d_backward"]["cuda"](torch.ones(1, 2, 2, 2), indices, [1, 2, 4, 4], pool, False)
        assert torch.equal(grad, torch.zeros(1, 2, 4, 4))
        grad = raw["adaptive_max_pool2d_backward"]["cuda"](torch.ones(1, 2, 2, 2), indices.long(), [1, 2, 4, 4], False)
        assert torch.equal(grad, torch.zeros(1, 2, 4, 4))


# ---- batch norm ----

# Several chunks (tails in both layouts), packs of 16 bytes and none, [N, C], one pixel, 5-D.
NORMS = [(3, 8, 19, 20), (2, 5, 7, 9), (70, 12), (4, 40, 1, 1), (2, 3, 300), (2, 8, 2, 3, 2)]
norms = pytest.mark.parametrize("shape", NORMS, ids=lambda s: "x".join(map(str, s)))


def norm_inputs(shape, layout, *, residual=False):
    def draw():
        x = [leaf(*shape, memory_format=layout) for _ in range(2 if residual else 1)]
        x[0] = (x[0].detach() * 2 + 5).requires_grad_()  # the mean is some deviations from zero
        return [*x, leaf(shape[1]), leaf(shape[1])]

    return draw


def buffers(x):
    return torch.linspace(-1, 1, x.shape[1]).to(x.dtype), torch.linspace(0.5, 2, x.shape[1]).to(x.dtype)


@norms
@layouts
@all_dtypes
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_batch_norm(shape, layout, dtype, training):
    if layout == torch.channels_last and len(shape) != 4:
        layout = torch.contiguous_format

    def normalised(batch_norm):
        def f(x, weight, bias):
            mean, var = buffers(x)
            y = batch_norm(x, mean, var, weight, bias, training, 0.3)
            return (y, mean, var) if training else y
        return f

    certify(normalised(F.batch_norm), normalised(tF.batch_norm), norm_inputs(shape, layout), dtype, draws=16)


@layouts
@all_dtypes
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("activation", ["relu", "tanh", "sigmoid"])
def test_batch_norm_with_activation_and_residual(layout, dtype, training, activation):
    def ours(x, residual, weight, bias):
        return F.batch_norm_act(x, *buffers(x), weight, bias, training, residual=residual,
                                activation=dlkern.Activation[activation.upper()])

    def theirs(x, residual, weight, bias):
        return getattr(torch, activation)(tF.batch_norm(x, *buffers(x), weight, bias, training) + residual)

    certify(ours, theirs, norm_inputs((2, 8, 7, 5), layout, residual=True), dtype, draws=16)


@layouts
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_batch_norm_float32_parameters_of_16_bit_input(layout, dtype):
    x = torch.randn(3, 8, 6, 5).to(dtype).contiguous(memory_format=layout)
    weight, bias, mean, var = torch.randn(8), torch.randn(8), torch.randn(8), torch.rand(8) + 0.5
    y, *statistics = raw["batch_norm_train_forward"]["cuda"](x, None, weight, bias, mean, var, 0.1, 1e-5, 1)
    wide = raw["batch_norm_train_forward"]["cuda"](x.float(), None, weight, bias, mean, var, 0.1, 1e-5, 1)
    assert torch.equal(y, wide[0].to(dtype)) and y.stride() == x.stride()
    assert [s.dtype for s in statistics] == [torch.float32] * 4
    exact = [*(f(x.double()) for f in (lambda t: t.mean((0, 2, 3)), lambda t: (t.var((0, 2, 3), correction=0) + 1e-5) ** -0.5))]
    theirs = torch.ops.aten.native_batch_norm(x, weight, bias, mean.clone(), var.clone(), True, 0.1, 1e-5)[1:]
    bad = [row for row in compare("statistics", statistics[:2], list(theirs), exact, torch.float32) if not row.ok]
    assert not bad, bad


def test_batch_norm_statistics_do_not_cancel():
    """A mean of a thousand deviations, a constant channel, and one value far off among the first."""
    x = torch.randn(2, 4, 30, 31)
    x[:, 0] += 1000
    x[:, 1] = 1234.5
    x[0, 2, 0, 0] = 1e6
    for layout in LAYOUTS:
        _, mean, invstd, *_ = raw["batch_norm_train_forward"]["cuda"](
            x.contiguous(memory_format=layout), None, None, None, None, None, 0.1, 1e-5, 0)
        exact = x.double()
        exact = [exact.mean((0, 2, 3)), (exact.var((0, 2, 3), correction=0) + 1e-5) ** -0.5]
        theirs = torch.ops.aten.native_batch_norm(x, None, None, None, None, True, 0.1, 1e-5)[1:]
        for name, values in {"mean": (mean, theirs[0], exact[0]), "invstd": (invstd, theirs[1], exact[1])}.items():
            for channel, triple in enumerate(zip(*(v.split(1) for v in values))):  # each for itself: their sizes differ
                rows = compare(f"{name} {channel}", *([v] for v in triple), torch.float32)
                assert all(row.ok for row in rows), rows


def test_batch_norm_long_chunks():
    """So many channels that a thread takes more than one turn, far from zero."""
    x = torch.randn(2, 1024, 23, 31) + 1000
    _, mean, invstd, *_ = raw["batch_norm_train_forward"]["cuda"](x, None, None, None, None, None, 0.1, 1e-5, 0)
    exact = [x.double().mean((0, 2, 3)), (x.double().var((0, 2, 3), correction=0) + 1e-5) ** -0.5]
    theirs = torch.ops.aten.native_batch_norm(x, None, None, None, None, True, 0.1, 1e-5)[1:]
    for values in zip(("mean", "invstd"), (mean, invstd), theirs, exact):
        rows = compare(values[0], *([v] for v in values[1:]), torch.float32)
        assert all(row.ok for row in rows), rows


@layouts
def test_batch_norm_nan_and_infinity(layout):
    x, grad = (torch.randn(2, 4, 5, 6).contiguous(memory_format=layout) for _ in range(2))
    x[0, 1, 2, 3], x[1, 2, 0, 0], grad[0, 0, 1, 1] = float("nan"), float("inf"), float("inf")
    y, mean, invstd, *_ = raw["batch_norm_train_forward"]["cuda"](x, None, None, None, None, None, 0.1, 1e-5, 0)
    ours = [y, *raw["batch_norm_backward"]["cuda"](grad, x, None, None, mean, invstd, True, 0, False)[:3]]
    leaves = x.clone().requires_grad_(), torch.ones(4, requires_grad=True), torch.zeros(4, requires_grad=True)
    theirs = tF.batch_norm(leaves[0], None, None, *leaves[1:], True)
    theirs.backward(grad)
    for a, b in zip(ours, [theirs, *(t.grad for t in leaves)]):
        assert torch.equal(a.isnan(), b.isnan()) and torch.equal(a.isinf(), b.isinf())


def test_batch_norm_nothing_to_do():
    train, backward = raw["batch_norm_train_forward"]["cuda"], raw["batch_norm_backward"]["cuda"]
    for shape in [(0, 3, 4, 4), (2, 3, 0, 4), (2, 0, 4, 4)]:
        x, old = torch.zeros(shape), torch.rand(shape[1])
        y, mean, invstd, new_mean, new_var = train(x, None, None, None, old, old, 0.5, 1e-5, 0)
        assert y.shape == x.shape and torch.equal(mean, torch.zeros(shape[1])) and torch.equal(invstd, torch.ones(shape[1]))
        assert torch.equal(new_mean, old) and torch.equal(new_var, old)
        grad_input, grad_weight, grad_bias, _ = backward(x, x, None, None, mean, invstd, True, 0, False)
        assert grad_input.shape == x.shape
        assert not grad_weight.any() and not grad_bias.any()


def test_batch_norm_wrong_arguments():
    x, c = torch.randn(2, 3, 4, 4), torch.randn(3)
    train, evaluate, backward = (
        raw[f"batch_norm_{op}"]["cuda"] for op in ("train_forward", "eval_forward", "backward")
    )
    train(x, x, c, c, c, c, 0.1, 1e-5, 1)
    for call in (
        lambda: train(x.double(), None, None, None, None, None, 0.1, 1e-5, 0),
        lambda: train(c, None, None, None, None, None, 0.1, 1e-5, 0),
        lambda: train(x[:1, :, :1, :1], None, None, None, None, None, 0.1, 1e-5, 0),
        lambda: train(x, x[:1], None, None, None, None, 0.1, 1e-5, 0),
        lambda: train(x, x.bfloat16(), None, None, None, None, 0.1, 1e-5, 0),
        lambda: train(x, None, c[:2], None, None, None, 0.1, 1e-5, 0),
        lambda: train(x, None, c.double(), None, None, None, 0.1, 1e-5, 0),
        lambda: train(x.bfloat16(), None, c, c.bfloat16(), None, None, 0.1, 1e-5, 0),
        lambda: train(x, None, None, None, c, None, 0.1, 1e-5, 0),
        lambda: train(x, None, None, None, None, None, 0.1, 0.0, 0),
        lambda: train(x, None, None, None, None, None, 0.1, 1e-5, 4),
        lambda: evaluate(x, None, None, None, c, c[:2], 1e-5, 0),
        lambda: evaluate(x, None, None, None, c, c, -1.0, 0),
        lambda: backward(x[:1], x, None, None, c, c, True, 0, False),
        lambda: backward(x, x, None, None, c, c, True, 1, False),
        lambda: backward(x, x, None, None, c.int(), c, True, 0, False),
        lambda: backward(x, x, None, None, c[:2], c, True, 0, False),
    ):
        with pytest.raises((RuntimeError, ValueError, IndexError)):
            call()


# ---- dropout ----


@layouts
@all_dtypes
@pytest.mark.parametrize("shape", [(2, 7, 24, 31), (1, 16, 8, 8), (3, 5, 1, 1), (4099,)], ids=lambda s: "x".join(map(str, s)))
def test_dropout_drops_what_the_reference_drops(shape, layout, dtype):
    x = (leaf(*shape, memory_format=layout).detach() + 10).to(dtype)  # + 10: no zeros but the dropped
    for p in (0.0, 0.3, 1.0):
        for seed in (0, 77, -(2**61) - 3):
            arguments = x, p, torch.tensor([seed])
            for op in ("dropout", "feature_dropout") if x.dim() > 1 else ("dropout",):
                ours, expected = raw[op]["cuda"](*arguments), getattr(reference, op)(*arguments)
                assert torch.equal(ours, expected) and ours.stride() == expected.stride()


def test_dropout_of_many_channels():
    """More than a group of 4,096 features."""
    x, seed = torch.ones(3, 1500, 2), torch.tensor([5])
    assert torch.equal(raw["feature_dropout"]["cuda"](x, 0.5, seed), reference.feature_dropout(x, 0.5, seed))


@all_dtypes
def test_dropout_gradient_is_the_mask(dtype):
    for dropout in (F.dropout, F.dropout2d):
        x = torch.rand(2, 6, 5, 4).to(dtype).requires_grad_()
        with on_cuda():
            y = dropout(x, 0.4)
            y.sum().backward()
        assert torch.equal(x.grad != 0, y != 0) and 0 < (y == 0).sum() < y.numel()
        assert torch.equal(x.grad[x.grad != 0].unique(), torch.tensor([1 / 0.6]).to(dtype))


def test_dropout_empty_views_and_wrong_arguments():
    seed, x = torch.tensor([3]), torch.randn(6, 5)
    for op in ("dropout", "feature_dropout"):
        call = raw[op]["cuda"]
        assert call(x[:0], 0.5, seed).shape == (0, 5)
        base = torch.randn(31)
        for view in (x.t(), x[:, ::2], base[1:].view(6, 5)):
            assert torch.equal(call(view, 0.5, seed), getattr(reference, op)(view, 0.5, seed))
        for wrong in ((x.double(), 0.5, seed), (x, 1.5, seed), (x, float("nan"), seed), (x, 0.5, seed.int()),
                      (x, 0.5, torch.tensor([1, 2]))):
            with pytest.raises((RuntimeError, ValueError)):
                call(*wrong)
    with pytest.raises(RuntimeError):
        raw["feature_dropout"]["cuda"](x[0], 0.5, seed)


# ---- rotary positions ----


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("layout", test_positions.LAYOUTS)
def test_rotary_layouts(layout, interleaved):
    with on_cuda():
        test_positions.check_layout(layout, interleaved, "cuda")


@all_dtypes
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("depth,half", [(48, 16), (32, 16), (31, 13)])
def test_rotary(depth, half, interleaved, dtype):
    """Packs of 16 bytes and single pairs, angles in the operand's dtype and in float32."""
    for wide in (torch.float32, dtype):
        cos, sin = torch.randn(2, 2, 1, 5, half).to(wide)
        certify(
            lambda x: F.rotary(x, cos, sin, interleaved=interleaved),  # noqa: B023
            lambda x: reference_rotary(x, cos, sin, interleaved),  # noqa: B023
            lambda: [leaf(2, 3, 5, depth)], dtype, draws=2,
        )  # fmt: skip


def test_rotary_odd_addresses_and_wrong_arguments():
    cos, sin = torch.randn(2, 1, 1, 4, 8)
    call = raw["rotary"]["cuda"]
    for x, c in ((torch.randn(97)[1:].view(2, 3, 1, 16), cos[:, :, :1]), (torch.randn(2, 3, 4, 20)[..., 4:], cos),
                 (torch.randn(2, 3, 4, 17)[..., :16], cos), (torch.randn(2, 4, 3, 16).transpose(1, 2), cos)):  # fmt: skip
        s = sin[:, :, : c.shape[2]]
        torch.testing.assert_close(call(x, c, s, True, True), reference_rotary(x, c, s, True, True))
    x = torch.randn(2, 3, 4, 16)
    for wrong in ((x.double(), cos, sin), (x[0], cos, sin), (x, cos, sin[..., :7]), (x, cos.bfloat16(), sin.bfloat16()),
                  (x[..., :15], cos, sin), (x[:, :, :3], cos, sin)):
        with pytest.raises(RuntimeError, match="rotary"):
            call(*wrong, False, False)


# ---- float16 ----


@pytest.mark.parametrize("name", [
    "average", "adaptive average", "batch norm", "batch norm of rows", "layer norm", "p-norms", "linear", "convolution",
    "scores",
])
def test_float16_of_what_overflows_on_the_way_only(name):
    function, make = IN_RANGE[name]
    tensors = [t.half() for t in make()]
    with on_cuda():
        ours = function(F, *tensors)
    exact = function(tF, *(t.double() for t in tensors))
    assert ours.dtype == torch.float16 and ours.isfinite().all()
    assert all(row.ok for row in compare(name, [ours], [exact.half()], [exact], torch.float16))


def test_float16_beyond_its_range_is_infinite():
    """The gradient of a loss that was scaled too far: infinite where torch's is, so that the step is skipped."""
    x, w = torch.randn(4, 6).half(), torch.full((5, 6), 300.0).half()
    g = torch.full((4, 5), 300.0).half()
    assert (raw["linear_backward_input"]["cuda"](g, w) == torch.inf).all()
    image, kernel = torch.full((2, 8, 3, 4), 300.0).half(), torch.full((8, 8, 1, 1), 30.0).half()
    assert (raw["conv2d_forward"]["cuda"](image, kernel, None, [1, 1], [0, 0], [1, 1], 1) == torch.inf).all()
    assert (raw["linear_backward_weight"]["cuda"](g, x * 0 + 65504, True)[0] == torch.inf).all()


def test_float16_scaled_gradients():
    """A scaled loss: gradients near 65504, whose sums and products leave the range and come back."""
    grad, w = (IN_RANGE["linear"][1]()[0].half(), torch.randn(70, 24).half() / 70)
    x = torch.randn(20, 24).half() / 30
    found = [raw["linear_backward_input"]["cuda"](grad, w), raw["linear_backward_weight"]["cuda"](grad, x, False)[0]]
    exact = [grad.double() @ w.double(), grad.double().T @ x.double()]
    for ours, wanted in zip(found, exact):
        assert all(row.ok for row in compare("scaled", [ours], [wanted.half()], [wanted], torch.float16))


# ---- orders, the column as a whole ----


def sample():
    """Some results of every kernel."""
    torch.manual_seed(3)
    x, weight, grad = bf16(70, 40), bf16(65, 40), bf16(70, 65)
    found = [raw["linear_forward"]["cuda"](x, weight, None, 2), raw["linear_backward_input"]["cuda"](grad, weight),
             *raw["linear_backward_weight"]["cuda"](grad, x, True), raw["activation_backward"]["cuda"](grad, grad, 3)]
    image = torch.randn(2, 8, 9, 11).contiguous(memory_format=torch.channels_last)
    window = [3, 3, 2, 2, 1, 1]
    output, indices = raw["max_pool2d_forward"]["cuda"](image, [*window, 1, 1], False, 1)
    found += [output, indices, raw["max_pool2d_backward"]["cuda"](output, indices, image.shape, [*window, 1, 1], True)]
    average = raw["avg_pool2d_forward"]["cuda"](image, window, False, True, None)
    found += [average, raw["avg_pool2d_backward"]["cuda"](average, image.shape, window, False, True, None, True)]
    output, indices = raw["adaptive_max_pool2d_forward"]["cuda"](image, [4, 5])
    found += [output, indices, raw["adaptive_max_pool2d_backward"]["cuda"](output, indices, image.shape, True)]
    for norm in (2.0, 4.0):
        powers = raw["lp_pool2d_forward"]["cuda"](image, norm, window[:4], True)
        found += [powers, raw["lp_pool2d_backward"]["cuda"](powers, image, norm, window[:4], True)]
    for x in (image, image.contiguous()):
        norm = raw["batch_norm_train_forward"]["cuda"](x, None, None, None, None, None, 0.1, 1e-5, 1)
        found += norm[:3]
        found += raw["batch_norm_backward"]["cuda"](x, x, norm[0], None, *norm[1:3], True, 1, False)[:3]
    return found


@pytest.mark.parametrize("order,seed", [("reverse", 1), ("random", 1), ("random", 2)])
def test_same_bits_in_every_thread_order(order, seed):
    forward = sample()
    with cuda_on_host.thread_order(order, seed):
        other = sample()
    assert all(torch.equal(a, b) for a, b in zip(forward, other))


def test_emulated_raises_what_was_found(monkeypatch):
    monkeypatch.setattr(cuda_on_host, "errors", lambda: 2)
    monkeypatch.setattr(cuda_on_host, "messages", lambda: "some_kernel: race")
    with pytest.raises(RuntimeError, match="found 2 errors:\nsome_kernel: race"):
        with dlkern.testing.emulated():
            pass
    monkeypatch.undo()


def test_float64_linear_is_recorded_as_a_gap():
    with dlkern.testing.emulated(), dlkern.backend("cuda"), dlkern.trace() as calls:
        F.linear(torch.randn(3, 4).double(), torch.randn(5, 4).double())
    assert [(call.backend, call.reason) for call in calls] == [("reference", "cuda column has no float64 linear")]

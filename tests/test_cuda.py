"""The CUDA column's kernels, run on the host (csrc/cuda_on_host): parity by the rule, thread orders, odd sizes, wrong
arguments. tests/test_cuda_builds.py runs this file again on the checked build, and part of it under sanitizers."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as tF

import dlkern
import dlkern.nn.functional as F
from dlkern.ops._registry import raw
from dlkern.testing import check, compare, cuda_on_host

ROOT = Path(__file__).resolve().parent.parent
DTYPES = [torch.float32, torch.bfloat16]
LAYOUTS = [torch.contiguous_format, torch.channels_last]
dtype_name = lambda value: str(value).removeprefix("torch.")  # noqa: E731


@pytest.fixture(scope="module", autouse=True)
def library():
    if "DLKERN_BUILT" not in os.environ:  # test_cuda_builds.py has built what it wants
        variant = cuda_on_host.library_path().parent.name
        subprocess.run(
            [sys.executable, "setup.py", "-q", "build_native", "--variant", variant], cwd=ROOT, check=True,
            stdout=subprocess.DEVNULL,
        )
    cuda_on_host.load()


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


def certify(ours, theirs, inputs, dtype, draws=1):
    with on_cuda():
        check(ours, theirs, inputs, dtype=dtype, draws=draws).raise_if_failed()


def leaf(*shape, memory_format=torch.contiguous_format):
    x = torch.randn(shape, dtype=torch.float64)
    return (x.contiguous(memory_format=memory_format) if x.dim() == 4 else x).requires_grad_()


# ---- linear ----

LINEAR = [  # rows..., in_features, out_features
    ((5,), 7, 3), ((64,), 64, 64), ((70,), 40, 24), ((130,), 33, 65), ((3, 11), 24, 17), ((1,), 8, 8), ((67,), 200, 72),
    ((9,), 1, 5),
]


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("rows,inputs,outputs", LINEAR)
def test_linear(rows, inputs, outputs, bias):
    draw = lambda: [leaf(*rows, inputs), leaf(outputs, inputs), *([leaf(outputs)] if bias else [])]  # noqa: E731
    certify(F.linear, tF.linear, draw, torch.bfloat16, draws=4)


@pytest.mark.parametrize("activation", ["relu", "tanh", "sigmoid"])
def test_linear_with_activation(activation):
    # The fused op rounds once where torch rounds twice, so torch's is the float64 expression's error in bfloat16.
    theirs = lambda *t: getattr(torch, activation)(tF.linear(*t))  # noqa: E731
    certify(lambda *t: F.linear(*t, activation=dlkern.Activation[activation.upper()]), theirs,
            lambda: [leaf(37, 16), leaf(27, 16), leaf(27)], torch.bfloat16, draws=4)


def bf16(*shape):
    return torch.randn(shape).bfloat16()


def rows_of(name, ours, theirs, exact):
    return compare(name, [ours], [theirs], [exact], torch.bfloat16)


def test_linear_large_tiles():
    """Sizes from which the 128 x 128 tiles serve, with tails on every side."""
    for op, (rows, inputs, outputs) in {
        "linear_forward": (1030, 72, 1040), "linear_backward_input": (1030, 1040, 72),
        "linear_backward_weight": (72, 1032, 1048),
    }.items():
        x, weight, bias, grad = bf16(rows, inputs), bf16(outputs, inputs), bf16(outputs), bf16(rows, outputs)
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
        for i, (ours, theirs, reference) in enumerate(zip(found, expression(x, weight, bias, grad), exact)):
            bad = [row for row in rows_of(f"{op} {i}", ours, theirs, reference) if not row.ok]
            assert not bad, bad


@pytest.mark.parametrize("offset", [0, 1])
def test_linear_views(offset):
    """Operands that begin between 16-byte boundaries, and transposed ones."""
    x, weight = bf16(20 * 16 + 1)[offset : offset + 320].view(20, 16), bf16(16, 24).t()
    ours = raw["linear_forward"]["cuda"](x, weight, None, 0)
    assert torch.equal(ours, raw["linear_forward"]["cuda"](x.clone(), weight.contiguous(), None, 0))
    g = bf16(20 * 24 + 1)[offset : offset + 480].view(20, 24)
    gradient = raw["activation_backward"]["cuda"](g, ours, 2)
    assert torch.equal(gradient, raw["activation_backward"]["cuda"](g.clone(), ours, 2))


def test_linear_nothing_to_do():
    for rows, inputs, outputs in [(0, 8, 8), (4, 0, 8), (4, 8, 0)]:
        x, weight, bias, grad = bf16(rows, inputs), bf16(outputs, inputs), bf16(outputs), bf16(rows, outputs)
        assert torch.equal(raw["linear_forward"]["cuda"](x, weight, bias, 0), tF.linear(x, weight, bias))
        assert torch.equal(raw["linear_backward_input"]["cuda"](grad, weight), grad @ weight)
        weight_grad, bias_grad = raw["linear_backward_weight"]["cuda"](grad, x, True)
        assert torch.equal(weight_grad, grad.T @ x)
        assert bias_grad.shape == (outputs,)
        assert torch.allclose(bias_grad, grad.sum(0), rtol=2**-7)


def test_linear_nan_and_infinity():
    x, weight = bf16(9, 16), bf16(8, 16)
    x[2, 3], x[5, 1] = float("nan"), float("inf")
    for activation, function in [(0, lambda y: y), (1, torch.relu), (3, torch.sigmoid)]:
        ours = raw["linear_forward"]["cuda"](x, weight, None, activation)
        theirs = function(tF.linear(x, weight))
        assert torch.equal(ours.isnan(), theirs.isnan())
        assert torch.equal(ours.isinf(), theirs.isinf())


@pytest.mark.parametrize("arguments", [
    (torch.ones(3, 4), torch.ones(5, 4), None, 0),
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
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=dtype_name)


@pytest.mark.parametrize("pool", MAX_POOLS)
@images
@layouts
@dtypes
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
@dtypes
def test_avg_pool2d(pool, shape, layout, dtype):
    options = AVERAGE_POOLS[pool]
    certify(lambda x: F.avg_pool2d(x, **options), lambda x: tF.avg_pool2d(x, **options),
            lambda: [leaf(*shape, memory_format=layout)], dtype)


@pytest.mark.parametrize("size", [1, (4, 5), (9, 3)], ids=str)
@images
@layouts
@dtypes
def test_adaptive_avg_pool2d(size, shape, layout, dtype):
    certify(lambda x: F.adaptive_avg_pool2d(x, size), lambda x: tF.adaptive_avg_pool2d(x, size),
            lambda: [leaf(*shape, memory_format=layout)], dtype)


@layouts
@dtypes
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


@dtypes
def test_pooling_empty_batch_and_views(dtype):
    with on_cuda():
        empty = torch.zeros(0, 3, 4, 4, dtype=dtype, requires_grad=True)
        F.max_pool2d(empty, 2).sum().backward()
        assert F.max_pool2d(empty, 2).shape == (0, 3, 2, 2) and empty.grad.shape == empty.shape
        base = torch.randn(2 * 4 * 6 * 6 + 1).to(dtype)
        for layout in LAYOUTS:  # data that begins between 16-byte boundaries
            x = base[1:].view(2, 4, 6, 6) if layout == LAYOUTS[0] else base[1:].view(2, 6, 6, 4).permute(0, 3, 1, 2)
            assert torch.equal(F.max_pool2d(x, 2), tF.max_pool2d(x, 2))
        x = torch.randn(2, 6, 6, 4).to(dtype).transpose(2, 3)[:, ::2]
        assert torch.equal(F.max_pool2d(x, 2), tF.max_pool2d(x, 2))


def test_pooling_wrong_arguments():
    x, pool = torch.randn(1, 2, 4, 4), [2, 2, 2, 2, 0, 0, 1, 1]
    forward, backward = raw["max_pool2d_forward"]["cuda"], raw["max_pool2d_backward"]["cuda"]
    output, indices = forward(x, pool, False, 1)
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
    ):
        with pytest.raises((RuntimeError, ValueError, IndexError)):
            call()


def test_indices_out_of_range_are_harmless():
    """Indices that no window has: no gradient, and no access outside the tensors."""
    pool = [2, 2, 2, 2, 0, 0, 1, 1]
    for indices in (torch.full((1, 2, 2, 2), 200, dtype=torch.uint8), torch.full((1, 2, 2, 2), 2**40)):
        grad = raw["max_pool2d_backward"]["cuda"](torch.ones(1, 2, 2, 2), indices, [1, 2, 4, 4], pool, False)
        assert torch.equal(grad, torch.zeros(1, 2, 4, 4))


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


def test_float32_linear_is_recorded_as_a_gap():
    with dlkern.testing.emulated(), dlkern.backend("cuda"), dlkern.trace() as calls:
        F.linear(torch.randn(3, 4), torch.randn(5, 4))
    assert [(call.backend, call.reason) for call in calls] == [("reference", "cuda column has no float32 linear")]

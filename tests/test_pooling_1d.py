"""Pooling of sequences: torch's values, indices, gradients, strides and errors, from the 2-D kernels."""

import pytest
import torch
import torch.nn.functional as TF
from test_pooling import DTYPES, image, on_cpu, run, same

import dlkern
import dlkern.nn.functional as F

# op -> what it is called with; integers, so that every order of sums gives the same bits
CALLS = {
    "max_pool1d": [
        dict(kernel_size=2), dict(kernel_size=3, stride=2, padding=1), dict(kernel_size=(3,), stride=(1,), dilation=(2,)),
        dict(kernel_size=4, stride=3, padding=2, ceil_mode=True, return_indices=True), dict(kernel_size=2, stride=[]),
        dict(kernel_size=2, return_indices=True),
    ],
    "avg_pool1d": [
        dict(kernel_size=2), dict(kernel_size=4, stride=3, padding=2, ceil_mode=True), dict(kernel_size=(2,), stride=()),
        dict(kernel_size=4, stride=2, padding=1, count_include_pad=False), dict(kernel_size=1, stride=3),
    ],
    "adaptive_avg_pool1d": [dict(output_size=n) for n in (1, 4, (5,), 9, 40)],
    "adaptive_max_pool1d": [dict(output_size=n, return_indices=i) for n in (1, 4, (5,), 9, 40) for i in (False, True)],
    "lp_pool1d": [dict(norm_type=1, kernel_size=2), dict(norm_type=1, kernel_size=4, stride=(2,), ceil_mode=True)],
}  # fmt: skip
EACH = [(op, i) for op, calls in CALLS.items() for i in range(len(calls))]


def sequences(dtype):
    base = image((3, 5, 23), torch.contiguous_format, dtype, 1, 6, scale=5040 if dtype == torch.float64 else 12)
    return [
        base, base[0], base.transpose(1, 2).contiguous().transpose(1, 2), base[..., ::2], base[:1].expand(3, -1, -1),
        base[:, :1], base[:, ::2], base[0].t().contiguous().t(), base[:1], base[:0], base.transpose(0, 1),
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("op", "number"), EACH)
def test_is_torchs(op, number, dtype):
    options = CALLS[op][number]
    ours, theirs = getattr(F, op), getattr(TF, op)
    for x in sequences(dtype):
        expected = run(theirs, x, **options)
        found = on_cpu(run, ours, x, **options)
        if op.startswith(("max", "adaptive_max")):
            same(found, expected)
        else:
            exact = expected if dtype == torch.float64 else run(theirs, x.double(), **options)
            for a, e, r in zip(found, expected, exact, strict=True):
                rows = dlkern.testing.compare(op, [a], [e], [r], dtype)
                assert all(row.ok for row in rows) if dtype != torch.float64 else torch.allclose(a, e, rtol=1e-14)
        assert [t.stride() for t in found[:-1]] == [t.stride() for t in expected[:-1]] or found[0].numel() <= 1
        with torch.no_grad():
            a, e = ours(x, **options), theirs(x, **options)
            for left, right in zip(a, e) if isinstance(a, tuple) else [(a, e)]:
                assert left.stride() == right.stride() or left.numel() <= 1
            assert torch.equal((a[0] if isinstance(a, tuple) else a), found[0])


def test_with_indices():
    x = torch.randn(2, 3, 17)
    for ours, theirs in (
        (F.max_pool1d_with_indices(x, 3, 2), TF.max_pool1d_with_indices(x, 3, 2)),
        (F.adaptive_max_pool1d_with_indices(x, 4), TF.adaptive_max_pool1d_with_indices(x, 4)),
    ):
        same(ours, theirs)


@pytest.mark.parametrize("op", CALLS)
def test_derivatives(op):
    x = torch.randperm(2 * 3 * 11).reshape(2, 3, 11).double().add(1).requires_grad_()
    options = {k: v for k, v in CALLS[op][1].items() if k != "return_indices"}
    assert torch.autograd.gradcheck(lambda x: getattr(F, op)(x, **options), x)
    assert torch.autograd.gradgradcheck(lambda x: getattr(F, op)(x, **options), x, fast_mode=True)


MODULES = [
    ("MaxPool1d", (3,), dict(stride=2, padding=1)), ("MaxPool1d", (2,), dict(return_indices=True)),
    ("AvgPool1d", (4,), dict(stride=2, padding=1, ceil_mode=True, count_include_pad=False)), ("AdaptiveAvgPool1d", (5,), {}),
    ("AdaptiveMaxPool1d", (5,), {}), ("AdaptiveMaxPool1d", (1,), dict(return_indices=True)),
    ("LPPool1d", (2, 3), dict(stride=2)),
]  # fmt: skip
IMAGE_MODULES = [
    ("AdaptiveMaxPool2d", ((3, None),), dict(return_indices=True)), ("LPPool2d", (2, (3, 2)), dict(stride=2, ceil_mode=True)),
    ("LPPool2d", (1.5, 2), {}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "args", "options"), MODULES + IMAGE_MODULES)
def test_modules(name, args, options):
    ours, theirs = getattr(dlkern.nn, name)(*args, **options), getattr(torch.nn, name)(*args, **options)
    assert isinstance(ours, type(theirs)) and repr(ours) == repr(theirs)
    x = torch.rand(2, 3, 9, 11) if name.endswith("2d") else torch.rand(2, 3, 19)
    with dlkern.trace() as calls:
        a, e = ours(x), theirs(x)
    assert [call.backend for call in calls] == ["cpu"]
    for left, right in zip(a, e) if isinstance(a, tuple) else [(a, e)]:
        torch.testing.assert_close(left, right)
    converted = dlkern.convert(theirs)
    assert type(converted) is type(ours)


BAD_CALLS = {
    "max, two ints": lambda f, x: f.max_pool1d(x, (3, 3)),
    "max, padding over half": lambda f, x: f.max_pool1d(x, 3, 1, 2),
    "max, too large": lambda f, x: f.max_pool1d(x, 30),
    "max, four dimensions": lambda f, x: f.max_pool1d(x[None], 2),
    "max, one dimension": lambda f, x: f.max_pool1d(x[0, 0], 2),
    "max, no channels": lambda f, x: f.max_pool1d(x[:, :0], 2),
    "max, integers": lambda f, x: f.max_pool1d(x.long(), 2),
    "max with indices, kernel 0": lambda f, x: f.max_pool1d(x, 0, return_indices=True),
    "avg, stride 0": lambda f, x: f.avg_pool1d(x, 2, 0),
    "avg, four dimensions": lambda f, x: f.avg_pool1d(x[None], 2),
    "avg, two ints": lambda f, x: f.avg_pool1d(x, (2, 2)),
    "avg, empty": lambda f, x: f.avg_pool1d(x[..., :0], 2),
    "adaptive avg, None": lambda f, x: f.adaptive_avg_pool1d(x, None),
    "adaptive avg, negative": lambda f, x: f.adaptive_avg_pool1d(x, -1),
    "adaptive max, two ints": lambda f, x: f.adaptive_max_pool1d(x, (2, 2)),
    "adaptive max, empty": lambda f, x: f.adaptive_max_pool1d(x[..., :0], 2),
    "adaptive max, four dimensions": lambda f, x: f.adaptive_max_pool1d(x[None], 2),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_errors_are_torchs(name):
    x, found = torch.randn(2, 3, 8), []
    for functions in (TF, F):
        with pytest.raises(Exception) as raised:
            BAD_CALLS[name](functions, x)
        found.append(raised.value)
    assert type(found[0]) is type(found[1]) and str(found[0]) == str(found[1])

"""lp_pool2d: the numerics rule for whole, fractional and negative norms, torch's special values, NumPy, errors."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as TF
from test_pooling import DTYPES, INF, LAYOUTS, NAN, on_cpu, run, same

import dlkern
import dlkern.nn.functional as F
from dlkern.ops._registry import raw

WINDOWS = {
    "2x2": dict(kernel_size=2),
    "3x3 overlapping": dict(kernel_size=3, stride=2),
    "3x3 stride 1": dict(kernel_size=3, stride=1),
    "3x4 ceil": dict(kernel_size=(3, 4), stride=(2, 3), ceil_mode=True),
    "stride over kernel": dict(kernel_size=(2, 1), stride=(3, 4)),
    "one element": dict(kernel_size=1),
}
NORMS = [1, 2, 3, 4.0, 0.5, 1.5, -1, -2.0, 7, 12]
EACH = [(name, 2) for name in WINDOWS] + [("3x4 ceil", norm) for norm in NORMS]


def positive(size, layout):
    return (torch.rand(size, dtype=torch.float64) + 0.2).contiguous(memory_format=layout).requires_grad_()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "norm"), EACH)
def test_parity(name, norm, dtype):
    options = dict(WINDOWS[name], norm_type=norm)
    for size, layout in [((2, 3, 9, 19), LAYOUTS[0]), ((1, 19, 7, 8), LAYOUTS[1])]:
        dlkern.testing.check(
            lambda x: on_cpu(F.lp_pool2d, x, **options), lambda x: TF.lp_pool2d(x, **options),
            lambda size=size, layout=layout: [positive(size, layout)], dtype=dtype,
            draws=16 if dtype == torch.float64 else 4, name=f"{name} {norm} {size}",
        ).raise_if_failed()  # fmt: skip


@pytest.mark.parametrize("norm", [1, 2, 4], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_parity_of_both_signs(layout, norm):
    dlkern.testing.check(
        lambda x: F.lp_pool2d(x, norm, 3, 2), lambda x: TF.lp_pool2d(x, norm, 3, 2),
        lambda: [torch.randn(2, 18, 7, 9, dtype=torch.float64).contiguous(memory_format=layout).requires_grad_()],
        draws=16 if norm == 1 else 4,
    ).raise_if_failed()  # fmt: skip


@pytest.mark.skipif(TF.lp_pool1d(torch.tensor([[1.0, 2.0]]), INF, 2).item() != 2, reason="torch before 2.13 takes powers")
@pytest.mark.parametrize("norm", [INF, -INF], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_infinite_norms_take_the_extreme_magnitude(norm, dtype):
    for layout in LAYOUTS:
        x = torch.randint(-4, 5, (2, 5, 9, 11)).to(dtype).contiguous(memory_format=layout)
        for options in (dict(kernel_size=3, stride=2, ceil_mode=True), dict(kernel_size=2)):
            same(run(F.lp_pool2d, x, norm_type=norm, **options), run(TF.lp_pool2d, x, norm_type=norm, **options))
    same(run(F.lp_pool1d, x[0], norm_type=norm, kernel_size=2), run(TF.lp_pool1d, x[0], norm_type=norm, kernel_size=2))


@pytest.mark.parametrize("norm", [1, 2, 3, 0.5, 2.5, -1, -3, 12], ids=str)
def test_special_values(norm):
    """Zeros (no gradient where the sum is zero), signs under odd and fractional powers, infinities and NaN, as torch."""
    generator = torch.Generator().manual_seed(5)
    pick = torch.tensor([0.0, 0.0, 0.0, -0.0, 1.0, -1.0, 2.0, INF, -INF, NAN], dtype=torch.float64)
    for layout in LAYOUTS:
        sparse = pick[torch.randint(0, 7, (2, 19, 8, 9), generator=generator)].contiguous(memory_format=layout)
        wild = pick[torch.randint(0, 10, (2, 19, 8, 9), generator=generator)].contiguous(memory_format=layout)
        for x in (sparse, wild, torch.zeros_like(sparse), torch.full_like(sparse, -2.0)):
            for options in (dict(kernel_size=2), dict(kernel_size=3, stride=2, ceil_mode=True)):
                ours, theirs = (run(f.lp_pool2d, x, norm_type=norm, **options) for f in (F, TF))
                for a, e in zip(ours, theirs, strict=True):
                    torch.testing.assert_close(a, e, equal_nan=True)


def test_against_numpy():
    generator = np.random.default_rng(3)
    for _ in range(40):
        kernel, stride = generator.integers(1, 5, 2).tolist(), generator.integers(1, 4, 2).tolist()
        norm = [1.0, 2.0, 3.0, 2.5][generator.integers(4)]
        x = generator.random((3, 8, int(generator.integers(6, 20)))) + 0.1
        for layout in LAYOUTS:
            tensor = torch.from_numpy(x)[None].contiguous(memory_format=layout)
            y = F.lp_pool2d(tensor, norm, tuple(kernel), tuple(stride))[0].numpy()
            for c, i, j in np.ndindex(y.shape):
                top, left = i * stride[0], j * stride[1]
                window = x[c, top : top + kernel[0], left : left + kernel[1]]
                assert window.size == kernel[0] * kernel[1]
                np.testing.assert_allclose(y[c, i, j], (window**norm).sum() ** (1 / norm), rtol=1e-14)


def test_a_window_cut_off_counts_its_mean():
    x = torch.full((1, 1, 3, 3), 2.0)
    assert F.lp_pool2d(x, 2, 2, 2, ceil_mode=True).unique().tolist() == [4.0]


def test_what_float32_powers_would_lose():
    """x^12 of float32 overflows or vanishes, its root does not."""
    for value in (1e15, 1e-15):
        x = torch.full((1, 1, 2, 2), value)
        assert F.lp_pool2d(x, 12, 2).item() == pytest.approx(value * 4 ** (1 / 12), rel=1e-6)


def test_views_unbatched_and_empty():
    base = torch.rand(4, 6, 18, 22) + 0.1
    for x in (
        base[0], base[:0], base[..., ::2], base[:, ::3], base.transpose(2, 3), base[:1].expand(4, -1, -1, -1), base[:, :1],
        base.contiguous(memory_format=torch.channels_last)[:, 1:5],
    ):  # fmt: skip
        ours, theirs = (run(f.lp_pool2d, x, norm_type=3, kernel_size=(3, 2)) for f in (F, TF))
        assert ours[0].stride() == theirs[0].stride() or ours[0].numel() <= 1
        for a, e in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, e)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("norm", [1, 2, 3, 2.5, -1], ids=str)
def test_derivatives(norm, layout):
    x = positive((1, 2, 4, 5), layout)
    for options in (dict(kernel_size=2), dict(kernel_size=3, stride=2, ceil_mode=True)):
        assert torch.autograd.gradcheck(lambda x, o=options: F.lp_pool2d(x, norm, **o), x)
        assert torch.autograd.gradgradcheck(lambda x, o=options: F.lp_pool2d(x, norm, **o), x, fast_mode=True)


def test_thread_counts_agree():
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            torch.manual_seed(3)
            results = []
            for layout in LAYOUTS:
                x = torch.rand(3, 37, 31, 45).contiguous(memory_format=layout)
                results += run(F.lp_pool2d, x, norm_type=2, kernel_size=3, stride=2)
            found.append(results)
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        same(other, found[0])


BAD_CALLS = {
    "norm 0": lambda f, x: f.lp_pool2d(x, 0, 2),
    "kernel 0": lambda f, x: f.lp_pool2d(x, 2, 0),
    "kernel of one in a tuple": lambda f, x: f.lp_pool2d(x, 2, (2,)),
    "kernel of three": lambda f, x: f.lp_pool2d(x, 2, (2, 2, 2)),
    "window too large": lambda f, x: f.lp_pool2d(x, 2, 9),
    "window too large for infinity": lambda f, x: f.lp_pool2d(x, INF, 9),
    "stride 0": lambda f, x: f.lp_pool2d(x, 2, 2, 0),
    "two dimensions": lambda f, x: f.lp_pool2d(x[0, 0], 2, 2),
    "no channels": lambda f, x: f.lp_pool2d(x[:, :0], 2, 2),
    "a string": lambda f, x: f.lp_pool2d(x, "2", 2),
    "1-D, kernel in a tuple": lambda f, x: f.lp_pool1d(x[0], 2, (2,)),
    "1-D, four dimensions": lambda f, x: f.lp_pool1d(x, 2, 2),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_errors_are_torchs(name):
    x, found = torch.rand(2, 3, 5, 5), []
    for functions in (TF, F):
        with pytest.raises(Exception) as raised:
            BAD_CALLS[name](functions, x)
        found.append(raised.value)
    assert type(found[0]) is type(found[1]) and str(found[0]) == str(found[1])


def test_integers_are_torchs():
    x = torch.randint(1, 5, (2, 3, 6, 6))
    torch.testing.assert_close(F.lp_pool2d(x, 2, 2), TF.lp_pool2d(x, 2, 2))
    torch.testing.assert_close(F.lp_pool2d(x.float(), math.pi, 2), TF.lp_pool2d(x.float(), math.pi, 2))


def test_raw_ops_refuse():
    x = torch.rand(1, 2, 4, 4)
    forward, backward = raw["lp_pool2d_forward"]["cpu"], raw["lp_pool2d_backward"]["cpu"]
    y = forward(x, 2.0, [2, 2, 2, 2], False)
    for call, message in [
        (lambda: forward(x, 0.0, [2, 2, 2, 2], False), "norm must be finite and not 0"),
        (lambda: forward(x, NAN, [2, 2, 2, 2], False), "norm must be finite and not 0"),
        (lambda: forward(x, INF, [2, 2, 2, 2], False), "norm must be finite and not 0"),
        (lambda: forward(x, 2.0, [2, 2, 2], False), "a window takes 4 ints, got 3"),
        (lambda: forward(x, 2.0, [0, 2, 2, 2], False), "kernel size should be greater than zero"),
        (lambda: forward(x[0], 2.0, [2, 2, 2, 2], False), "expected a 4-D tensor"),
        (lambda: forward(x.long(), 2.0, [2, 2, 2, 2], False), "expected float32, float64, bfloat16 or float16"),
        (lambda: backward(y.double(), x, 2.0, [2, 2, 2, 2], False), "differ in dtype"),
        (lambda: backward(y[..., :1], x, 2.0, [2, 2, 2, 2], False), "wrong sizes"),
        (lambda: backward(y, x[0], 2.0, [2, 2, 2, 2], False), "expected a 4-D tensor"),
    ]:
        with pytest.raises((RuntimeError, ValueError), match=message):
            call()

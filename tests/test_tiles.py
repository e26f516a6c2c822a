"""Products that go by AMX's tiles where the CPU has them (csrc/cpu/tiles.h), through linear: each way operands lie, each type,
numbers the tiles can't hold. Elsewhere they go by vectors; test_builds.py runs these tests with the tiles in memory.
"""

import pytest
import torch
import torch.nn.functional as tF
from threads import on_threads

import dlkern
import dlkern.nn.functional as F

# M, K, N: odd sizes; one, some, many steps of k and blocks of it; more lines than a block on both sides; few rows, few columns.
SIZES = {
    torch.float32: [(170, 150, 175), (130, 600, 210), (530, 33, 550), (100, 800, 470)],
    torch.bfloat16: [(5, 100, 80), (33, 70, 50), (17, 16, 130), (40, 1100, 50), (530, 40, 515), (300, 17, 9)],
    torch.float16: [(6, 140, 90), (33, 70, 50), (40, 900, 50), (300, 40, 9)],
}
CASES = [pytest.param(dtype, size, id=f"{str(dtype)[6:]}-{size}") for dtype, sizes in SIZES.items() for size in sizes]
DTYPES = pytest.mark.parametrize("dtype", SIZES, ids=lambda dtype: str(dtype)[6:])


def draw(m, k, n, dtype=torch.float64):
    return [torch.randn(s, dtype=dtype).requires_grad_() for s in ((m, k), (n, k), (n,))]


def exact(x, w):
    return x.double() @ w.double().t()


@pytest.mark.parametrize("dtype, size", CASES)
def test_parity(dtype, size):
    dlkern.testing.check(F.linear, tF.linear, lambda: draw(*size), dtype=dtype, draws=2, name=str(size)).raise_if_failed()


@pytest.mark.parametrize("dtype, size", CASES)
def test_integers_are_exact(dtype, size):
    """Whatever is cut, padded or summed in which order."""
    m, k, n = size
    x, w, g = (torch.randint(-3, 4, s).to(dtype).requires_grad_() for s in ((m, k), (n, k), (m, n)))
    y = F.linear(x, w)
    assert torch.equal(y.float(), exact(x, w).to(dtype).float())
    assert torch.equal(F.linear(x.t().contiguous().t(), w.t().contiguous().t()), y)
    dx, dw = torch.autograd.grad(y, (x, w), g)
    assert torch.equal(dx.float(), (g.double() @ w.double()).to(dtype).float())
    assert torch.equal(dw.float(), (g.double().t() @ x.double()).to(dtype).float())


@pytest.mark.parametrize("k", [700, 9000])
def test_long_sums(k):
    dlkern.testing.check(F.linear, tF.linear, lambda: draw(90, k, 800), dtype=torch.float32).raise_if_failed()


@DTYPES
def test_bits_do_not_depend_on_the_threads(dtype):
    x, w, b = (t.detach() for t in draw(*SIZES[dtype][-1], dtype))
    x[70 % len(x), 3] = torch.inf  # its tile is multiplied again, by vectors
    results = on_threads((1, 2, 3), lambda: F.linear(x, w, b))
    assert all(torch.equal(results[0].nan_to_num(), r.nan_to_num()) for r in results[1:])


@DTYPES
def test_infinity_and_nan(dtype):
    x, w, b = (t.detach() for t in draw(*SIZES[dtype][0], dtype))
    x[1, 3], x[2, 5], w[3, 7], w[4, 2] = torch.inf, torch.nan, -torch.inf, torch.finfo(dtype).max
    ours, theirs = F.linear(x, w, b), tF.linear(x, w, b)
    assert torch.equal(ours.isnan(), theirs.isnan())
    assert torch.equal(ours.isinf(), theirs.isinf()) and torch.equal(ours == torch.inf, theirs == torch.inf)


@pytest.mark.parametrize("scale", [1e-25, 1e-18, 1e-10, 1e10, 1e18])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_numbers_far_from_one(dtype, scale):
    """Products down to 1e-50, below the smallest float, and up to 1e36."""
    def scaled():
        x, w, b = draw(*SIZES[dtype][0])
        return [(t.detach() * f).requires_grad_() for t, f in ((x, scale), (w, scale), (b, scale * scale))]

    dlkern.testing.check(F.linear, tF.linear, scaled, dtype=dtype).raise_if_failed()


@DTYPES
def test_zeros(dtype):
    m, k, n = SIZES[dtype][0]
    y = F.linear(torch.zeros(m, k, dtype=dtype), torch.randn(n, k).to(dtype), torch.ones(n, dtype=dtype))
    assert torch.equal(y, torch.ones(m, n, dtype=dtype))

"""embedding of the CUDA column, run on the host: words of every width, rows of the table that begin, end or go on between
the tiles of sorted positions. tests/test_cuda_builds.py runs this file again on the checked build, and part of it under
sanitizers."""

import pytest
import test_embedding as cases
import torch
import torch.nn.functional as tF
from cuda_column import all_dtypes, certify, library, no_findings, on_cuda  # noqa: F401

import dlkern.nn.functional as F
from dlkern.ops._registry import raw
from dlkern.testing import CASES, cuda_on_host

CATALOG = {case.name: case for case in CASES if case.family == "embedding"}
forward, backward = (raw[f"embedding_{pass_}ward"]["cuda"] for pass_ in ("for", "back"))


@all_dtypes
@pytest.mark.parametrize(
    ("rows", "width", "count", "options"),
    [(1, 1, 3, {}), (5, 3, 130, dict(padding_idx=-2)), (300, 65, 140, {}), (7, 256, 90, dict(scale_grad_by_freq=True)),
     (40, 136, 70, dict(padding_idx=1, scale_grad_by_freq=True))], ids=str,
)  # fmt: skip
def test_embedding(rows, width, count, options, dtype):
    certify(
        lambda w, i: F.embedding(i, w, **options), lambda w, i: tF.embedding(i, w, **options),
        lambda: [torch.randn(rows, width, dtype=torch.float64).requires_grad_(), cases.frequent(rows, count)],
        dtype, draws=16 if width < 100 else 4,
    )


@all_dtypes
@pytest.mark.parametrize("case", CATALOG.values(), ids=CATALOG)
def test_embedding_cases_of_the_catalog(case, dtype):
    certify(case.ours, case.reference(dtype), case.inputs, dtype, draws=case.draws)


def test_embedding_schemas_and_fake_kernels():
    index, checks = torch.tensor([[1, 0, 3], [1, 1, 2]]), ["test_schema", "test_faketensor", "test_aot_dispatch_dynamic"]
    for dtype in (torch.float32, torch.bfloat16):
        torch.library.opcheck(forward, (torch.randn(4, 5).to(dtype), index), test_utils=checks)
        torch.library.opcheck(backward, (torch.randn(2, 3, 5).to(dtype), index, 4, 0, True), test_utils=checks)


def exact_gradient(grad, index, rows):
    return torch.zeros(rows, grad.shape[1], dtype=torch.float64).index_add(0, index.long(), grad.double()).to(grad.dtype)


# Positions of rows 0, 1, ...: inside tiles of 32, up to their borders, over one, over several and more than a block has warps.
RUNS = [(1,), (32,), (32, 32), (31, 2, 31), (1, 31, 1, 95, 4), (5, 64, 27), (20, 330, 1), (3, 700)]


@all_dtypes
@pytest.mark.parametrize("runs", RUNS, ids=str)
@pytest.mark.parametrize("width", [8, 5])
def test_embedding_rows_between_tiles(runs, width, dtype):
    """Whole numbers, whose sums are exact in any order, from positions in a random order."""
    torch.manual_seed(0)
    index = torch.repeat_interleave(torch.arange(len(runs)), torch.tensor(runs))
    index = index[torch.randperm(len(index))]
    grad = torch.randint(0, 3 if dtype == torch.float32 else 2, (len(index), width)).to(dtype)
    if dtype == torch.bfloat16:
        grad *= (torch.arange(len(index)) % 4 == 0)[:, None]  # sums below 256
    found = backward(grad, index, len(runs) + 2, -1, False)
    assert torch.equal(found, exact_gradient(grad, index, len(runs) + 2))
    by_count = backward(torch.ones_like(grad), index, len(runs), -1, True)
    assert torch.equal(by_count, torch.ones_like(by_count))
    for row in range(len(runs)):
        expected = exact_gradient(grad, index, len(runs))
        expected[row] = 0
        assert torch.equal(backward(grad, index.int(), len(runs), row, False), expected)


@all_dtypes
def test_embedding_words_of_every_width(dtype):
    index = torch.tensor([4, 0, 2, 4, 1])
    for width in (1, 2, 3, 4, 6, 8, 12, 16, 600, 1030, 5000):
        for offset in (0, 1, 2, 4):
            weight = torch.randn(5 * width + offset).to(dtype)[offset:].view(5, width)
            for table in (weight, weight[:, : max(1, width - 4)], weight.t().contiguous().t()):
                assert torch.equal(forward(table, index), table[index])
                assert torch.equal(forward(table, index.int().view(1, 5)), table[index][None])


def test_embedding_layouts():
    base, index = torch.randn(12, 20), torch.randint(0, 6, (9, 8))
    for weight in (base[::2, :7], base[:6, ::3], base.t()[:6], base[:1].expand(6, 20)):
        for i in (index.t(), index[::2, 1::3], index.int()):
            assert torch.equal(forward(weight, i), tF.embedding(i, weight))
    g = torch.randn(20, 8, 9).permute(2, 1, 0)
    found = backward(g, index, 6, -1, False)
    torch.testing.assert_close(found, exact_gradient(g.reshape(-1, 20), index.reshape(-1), 6))
    assert torch.equal(backward(g, index.t().contiguous().t().int(), 6, -1, False), found)


@pytest.mark.parametrize("shape", [(0,), (2, 0, 3), (), (1,)], ids=str)
@pytest.mark.parametrize("table", [(4, 3), (4, 0)], ids=str)
def test_embedding_few_elements_and_nothing_to_do(shape, table):
    with on_cuda():
        cases.test_few_elements(shape, table)
        if len(shape) == 1:
            cases.test_nothing_of_no_rows()


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_embedding_indices_out_of_range(dtype):
    """Raised on the host; the kernels themselves give NaN and no gradient."""
    far = 2**62 if dtype == torch.int64 else 2**31 - 1
    weight, index = torch.randn(4, 6), torch.tensor([3, 4, -1, far, 2, -far], dtype=dtype)
    g = torch.randn(6, 6)
    for kind in (torch.float32, torch.bfloat16, torch.float16):
        w = weight.to(kind)
        for call in (lambda: forward(w, index), lambda: backward(g.to(kind), index, 4, -1, False)):  # noqa: B023
            with pytest.raises(IndexError, match="index out of range in self"):
                call()
        with cuda_on_host.unchecked_indices():
            for table in (w, w[:, :1], w[:, 1:5]):
                output = forward(table, index)
                assert output.isnan().all(1).tolist() == [False, True, True, True, False, True]
                assert torch.equal(output[::4], table[[3, 2]])
            grad = backward(g.to(kind), index, 4, -1, False)
        assert torch.equal(grad[2:], g.to(kind)[[4, 0]]) and (grad[:2] == 0).all()


def test_embedding_wrong_arguments():
    weight, index = torch.randn(5, 3), torch.tensor([1, 4])
    for wrong in ((weight[0], index), (weight, index.float()), (weight, index.to(torch.int16)), (weight.double(), index),
                  (weight.int(), index), (weight, torch.tensor([5]))):
        with pytest.raises((RuntimeError, ValueError, IndexError)) as ours:
            forward(*wrong)
        if wrong[0].dtype != torch.float64:  # which this column does not have
            with pytest.raises(type(ours.value)):
                raw["embedding_forward"]["cpu"](*wrong)
    g = torch.randn(2, 3)
    for wrong in ((g, index, -1), (g, index, 2**48), (g, index, 2**31), (g[:1], index, 5), (g[0], index, 5),
                  (g, index.bool(), 5), (g.double(), index, 5), (g, index, 4), (torch.randn(2, 2**20), index, 2**30)):
        with pytest.raises((RuntimeError, ValueError, IndexError)):
            backward(*wrong, -1, False)


@pytest.mark.parametrize("order", ["reverse", "random"])
def test_embedding_same_bits_in_every_thread_order(order):
    def sample():
        torch.manual_seed(3)
        index = cases.frequent(30, 700)
        return [backward(torch.randn(700, width), index, 30, -1, True) for width in (24, 37)]

    usual = sample()
    with cuda_on_host.thread_order(order, 1):
        other = sample()
    assert all(torch.equal(a, b) for a, b in zip(usual, other))


@pytest.mark.parametrize("options", [{}, dict(padding_idx=1), dict(scale_grad_by_freq=True)], ids=str)
def test_embedding_gradients_of_gradients(options):
    weight, index = torch.randn(5, 3, requires_grad=True), torch.tensor([[1, 4, 1], [0, 0, 2]])
    v = torch.randn_like(weight)

    def second(w):
        (grad,) = torch.autograd.grad(F.embedding(index, w, **options).square().sum(), w, create_graph=True)
        return [grad, *torch.autograd.grad(grad, w, v)]

    with on_cuda():
        ours = second(weight)
    for a, b in zip(ours, second(weight), strict=True):
        torch.testing.assert_close(a, b)

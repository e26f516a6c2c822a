"""embedding of the CUDA column, run on the host: rows that lie in a chunk, begin, end or go on over several, with and
without packs. tests/test_cuda_builds.py runs this file again on the checked build, and part of it under sanitizers."""

import pytest
import torch
import torch.nn.functional as tF
from cuda_column import all_dtypes, certify, leaf, library, no_findings, on_cuda  # noqa: F401

import dlkern.nn.functional as F
from dlkern.ops._registry import raw
from dlkern.testing import compare, cuda_on_host

# Rows, width, indices. Chunks have 16 positions.
CASES = [(7, 5, (3, 4)), (1, 1, (1,)), (4, 8, (50,)), (1, 16, (100,)), (30, 40, (2, 33)), (3, 1040, (40,)), (2, 301, (33,)),
         (9, 2056, (5,)), (40, 8, ())]


@all_dtypes
@pytest.mark.parametrize("options", [{}, dict(scale_grad_by_freq=True, padding_idx=0)], ids=["plain", "scaled"])
@pytest.mark.parametrize(("rows", "width", "places"), CASES, ids=str)
def test_embedding(rows, width, places, options, dtype):
    def draw():
        indices = torch.randint(0, rows, places)
        if rows > 20 and places:
            indices[..., ::2] = 3  # half of them one row
        return [leaf(rows, width), indices]

    call = lambda namespace: lambda w, i: namespace.embedding(i, w, **options)  # noqa: E731
    certify(call(F), call(tF), draw, dtype, draws=4)


@all_dtypes
def test_embedding_of_many_positions(dtype):
    """More than there may be chunks of 16, so that chunks are longer."""
    torch.manual_seed(0)
    indices, grad = torch.randint(0, 3, (70_000,)), torch.randn(70_000, 1).to(dtype)
    found = {}
    for wide in (torch.float64, dtype):
        w = torch.zeros(3, 1, dtype=wide, requires_grad=True)
        (found[wide],) = torch.autograd.grad(tF.embedding(indices, w), w, grad.to(wide))
    ours = raw["embedding_backward"]["cuda"](grad, indices, 3, -1, False)
    assert not [row for row in compare("gradient", [ours], [found[dtype]], [found[torch.float64]], dtype) if not row.ok]


def test_embedding_views_and_nothing_to_do():
    forward, backward = raw["embedding_forward"]["cuda"], raw["embedding_backward"]["cuda"]
    base, indices = torch.randn(6, 24), torch.tensor([[5, 0, 2], [2, 2, 1]], dtype=torch.int32)
    for table in (base[:, 4:20], base[:, 1:17], base[::2].expand(2, 3, 24)[0], base.t().contiguous().t()):
        rows = indices.clamp(max=table.shape[0] - 1)
        assert torch.equal(forward(table, rows), table[rows.long()])
        assert torch.equal(forward(table, rows.t()), table[rows.t().long()])
    g = torch.randn(3, 2, 16).transpose(0, 1)
    torch.testing.assert_close(backward(g, indices, 6, -1, False), backward(g.contiguous(), indices.long(), 6, -1, False))
    for rows, width, places in ((4, 0, (3,)), (4, 3, (0,)), (0, 3, (0,)), (4, 3, (2, 0))):
        i = torch.zeros(places, dtype=torch.long)
        assert forward(torch.randn(rows, width), i).shape == (*places, width)
        assert torch.equal(backward(torch.randn(*places, width), i, rows, -1, True), torch.zeros(rows, width))


def test_embedding_wrong_arguments():
    forward, backward = raw["embedding_forward"]["cuda"], raw["embedding_backward"]["cuda"]
    w, i, g = torch.randn(4, 3), torch.tensor([0, 3]), torch.randn(2, 3)
    for wrong in (torch.tensor([0, 4]), torch.tensor([-1, 0])):
        with pytest.raises(IndexError, match="index out of range in self"):
            forward(w, wrong)
        with pytest.raises(IndexError, match="index out of range in self"):
            backward(g, wrong, 4, -1, False)
    for wrong in ((w.double(), i), (w[0], i), (w, i.float()), (w, i.short())):
        with pytest.raises((RuntimeError, ValueError)):
            forward(*wrong)
    for wrong in ((g[:1], i, 4), (g[0], i, 4), (g.double(), i, 4), (g, i, -1), (g, i, 1 << 60), (g, i.bool(), 4)):
        with pytest.raises((RuntimeError, ValueError)):
            backward(*wrong, -1, False)


@pytest.mark.parametrize("order,seed", [("reverse", 1), ("random", 1)])
def test_embedding_same_bits_in_every_thread_order(order, seed):
    def sample():
        torch.manual_seed(3)
        return [raw["embedding_backward"]["cuda"](torch.randn(90, width), torch.randint(0, 4, (90,)), 5, 2, True)
                for width in (7, 40)]

    forward = sample()
    with cuda_on_host.thread_order(order, seed):
        other = sample()
    assert all(torch.equal(a, b) for a, b in zip(forward, other))

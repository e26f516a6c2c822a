"""embedding: torch's semantics and errors, gradients of every order, the same bits; parity is in test_contract.py too."""

import pytest
import torch
import torch.nn.functional as tF

import dlkern
import dlkern.nn.functional as F
from dlkern.ops._registry import raw
from dlkern.testing import check

each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)


def frequent(rows, count):
    """Indices of which half are row 1, as words are: the sum of a row is long."""
    index = torch.randint(0, rows, (count,))
    index[::2] = min(1, rows - 1)
    return index


@each_dtype
@pytest.mark.parametrize(
    ("rows", "width", "count", "options"),
    [(1, 1, 3, {}), (5, 3, 40, dict(padding_idx=-2)), (300, 93, 700, dict(padding_idx=1)),
     (7, 256, 90, dict(scale_grad_by_freq=True)), (40, 130, 5, dict(padding_idx=1, scale_grad_by_freq=True))], ids=str,
)  # fmt: skip
def test_parity(rows, width, count, options, dtype):
    certificate = check(
        lambda w, i: F.embedding(i, w, **options), lambda w, i: tF.embedding(i, w, **options),
        lambda: [torch.randn(rows, width, dtype=torch.float64).requires_grad_(), frequent(rows, count)],
        dtype=dtype, draws=16 if width < 100 else 4,
    )
    certificate.raise_if_failed()


@pytest.mark.parametrize("shape", [(0,), (2, 0, 3), (), (1,)], ids=str)
@pytest.mark.parametrize("table", [(4, 3), (4, 0)], ids=str)
def test_few_elements(shape, table):
    index, results = torch.zeros(shape, dtype=torch.int32), []
    for namespace in (F, tF):
        weight = torch.arange(float(table[0] * table[1])).reshape(table).requires_grad_()
        y = namespace.embedding(index, weight)
        results.append([y, *torch.autograd.grad(y.sum(), weight)])
    for ours, theirs in zip(*results):
        assert ours.shape == theirs.shape and torch.equal(ours, theirs)


def test_nothing_of_no_rows():
    weight = torch.empty(0, 5, requires_grad=True)
    y = F.embedding(torch.empty(2, 0, dtype=torch.int64), weight)
    assert y.shape == (2, 0, 5) and torch.autograd.grad(y.sum(), weight)[0].shape == (0, 5)
    with pytest.raises(IndexError):
        F.embedding(torch.tensor([0]), weight)


def test_layouts_of_the_table_and_of_indices():
    base = torch.randn(12, 20)
    index = torch.randint(0, 6, (9, 8))
    for weight in (base[::2, :7], base[:6, ::3], base.t()[:6], base[:6]):
        for i in (index.t(), index[::2, 1::3], index.int()):
            assert torch.equal(F.embedding(i, weight), tF.embedding(i, weight))
    weight = base[:6].clone().requires_grad_()
    g = torch.randn(20, 8, 9).permute(2, 1, 0)
    with dlkern.trace() as calls:
        (ours,) = torch.autograd.grad(F.embedding(index, weight), weight, g)
    assert calls[0].backend == "cpu"
    exact = torch.zeros(6, 20, dtype=torch.float64).index_add(0, index.reshape(-1), g.double().reshape(-1, 20))
    torch.testing.assert_close(ours, exact.float(), rtol=0, atol=0)  # sums are made in double


@pytest.mark.parametrize("rows", [50, 1000])  # few enough to be summed in memory, and sorted
def test_bits_do_not_depend_on_threads(rows):
    weight, index = torch.randn(rows, 33, requires_grad=True), frequent(rows, 20000)
    g, found, before = torch.randn(20000, 33), [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            y = F.embedding(index, weight)
            found.append([y, *torch.autograd.grad(y, weight, g)])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other))


@pytest.mark.parametrize("options", [{}, dict(padding_idx=1), dict(scale_grad_by_freq=True)], ids=str)
def test_gradients_of_gradients(options):
    """Of a squared output, so that the second derivative is not zero."""
    weight, index = torch.randn(5, 3, dtype=torch.float64, requires_grad=True), torch.tensor([[1, 4, 1], [0, 0, 2]])

    def ours(w):
        return F.embedding(index, w, **options).square().sum()

    def plain(w):
        return tF.embedding(index, w, **options).square().sum()

    with torch.enable_grad():
        grads = [torch.autograd.grad(f(weight), weight, create_graph=True)[0] for f in (ours, plain)]
    torch.testing.assert_close(*grads)
    if not options:  # a row that gets no gradient is not what differences of the loss see
        assert torch.autograd.gradcheck(ours, weight) and torch.autograd.gradgradcheck(ours, weight)
    v = torch.randn_like(weight)
    (second,) = torch.autograd.grad(grads[0], weight, v)
    count = torch.bincount(index.reshape(-1), minlength=5).double()
    # By frequency, each of the two passes through the table divides. (torch's second pass leaves one of them out.)
    factor = torch.where(count > 0, 1 / count, 0.0) if "scale_grad_by_freq" in options else count
    if "padding_idx" in options:
        factor[1] = 0
    torch.testing.assert_close(second, 2 * factor[:, None] * v)


TABLE = torch.randn(5, 3)


@pytest.mark.parametrize(
    "call",
    [
        lambda f: f(torch.tensor([5]), TABLE), lambda f: f(torch.tensor([-1]), TABLE), lambda f: f(torch.tensor([1.0]), TABLE),
        lambda f: f(torch.tensor([1], dtype=torch.int16), TABLE), lambda f: f(torch.tensor([1]), TABLE[0]),
        lambda f: f(torch.tensor([1]), TABLE, 5), lambda f: f(torch.tensor([1]), TABLE, -6), lambda f: f([1], TABLE),
        lambda f: f(torch.tensor([True]), TABLE), lambda f: f(torch.tensor([1]), [1.0]),
        lambda f: f(torch.tensor([2**40]), TABLE),
    ],
    ids=range(11),
)  # fmt: skip
def test_torchs_errors(call):
    raised = []
    for function in (tF.embedding, F.embedding):
        with pytest.raises((IndexError, RuntimeError, AssertionError, TypeError, AttributeError)) as caught:
            call(function)
        raised.append((type(caught.value), str(caught.value).split("\n")[0]))
    assert raised[0] == raised[1]


@pytest.mark.parametrize("op", ["embedding_forward", "embedding_backward"])
def test_raw_ops_refuse_indices_outside(op):
    for wrong in (-1, 5, 2**62):
        index = torch.tensor([0, wrong])
        with pytest.raises(IndexError):
            raw[op]["cpu"](*((TABLE, index) if op == "embedding_forward" else (torch.randn(2, 3), index, 5, -1, False)))


def test_max_norm_and_sparse_are_torchs_and_say_so():
    index = torch.tensor([0, 2, 2])
    for options, word in ((dict(max_norm=0.5), "max_norm"), (dict(sparse=True), "sparse")):
        results = []
        for namespace in (F, tF):
            weight = TABLE.clone().requires_grad_()
            with dlkern.trace() as calls:
                y = namespace.embedding(index, weight, **options)
            results.append([y, weight.detach(), torch.autograd.grad(y.sum(), weight)[0].to_dense()])
            if namespace is F:
                assert calls[0].backend == "torch" and word in calls[0].reason
        assert all(torch.equal(a, b) for a, b in zip(*results))


def test_module_convert_and_enabled():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(9, 4, padding_idx=3), torch.nn.Linear(4, 2))
    index = torch.randint(0, 9, (3, 5))
    expected = model(index)
    with dlkern.enabled(), dlkern.trace() as calls:
        torch.testing.assert_close(model(index), expected)
        torch.embedding(model[0].weight, index, 3)
    assert [call.op for call in calls if call.backend == "cpu"] == ["embedding", "linear", "embedding"]
    dlkern.convert(model)
    assert type(model[0]) is dlkern.nn.Embedding and repr(model[0]) == "Embedding(9, 4, padding_idx=3)"
    torch.testing.assert_close(model(index), expected)
    assert type(dlkern.nn.Embedding.from_pretrained(TABLE)) is dlkern.nn.Embedding
    assert type(dlkern.revert(model)[0]) is torch.nn.Embedding


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("column", ["triton", "cuda"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_on_a_gpu(column, dtype):
    """As on the CPU, with the same bits each time; an index outside gives NaN and no gradient, where the CPU raises."""
    torch.manual_seed(0)
    for width in (64, 37):
        weight, index, g = torch.randn(50, width).to(dtype), frequent(50, 3000), torch.randn(3000, width).to(dtype)
        for options in ({}, dict(padding_idx=1), dict(scale_grad_by_freq=True)):
            found = []
            for device in ("cpu", "cuda", "cuda"):
                w = weight.to(device).requires_grad_()
                with dlkern.backend("auto" if device == "cpu" else column), dlkern.trace() as calls:
                    y = F.embedding(index.to(device), w, **options)
                assert calls[0].backend == (device if device == "cpu" else column)
                found.append([x.detach().cpu() for x in (y, *torch.autograd.grad(y, w, g.to(device)))])
            assert torch.equal(found[0][0], found[1][0])
            assert all(torch.equal(a, b) for a, b in zip(*found[1:]))
            torch.testing.assert_close(found[0][1], found[1][1])
        outside = torch.tensor([3, 50, -1, 2**40, 2], device="cuda")
        output = raw["embedding_forward"][column](weight.cuda(), outside)
        assert output.isnan().all(1).tolist() == [False, True, True, True, False]
        grad = raw["embedding_backward"][column](output.nan_to_num(), outside, 50, -1, False)
        assert grad.count_nonzero(1).gt(0).nonzero().flatten().tolist() == [2, 3]

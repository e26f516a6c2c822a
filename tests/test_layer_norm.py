"""layer_norm: torch's semantics by the numerics rule, torch's errors, gradients of every order, the same bits."""

import pytest
import torch
import torch.nn.functional as tF

import dlkern
import dlkern.nn.functional as F
from dlkern.testing import check

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@each_dtype
@pytest.mark.parametrize(
    ("shape", "dims"),
    [((1, 1), 1), ((17, 1), 1), ((6, 15), 1), ((40, 16), 1), ((3, 129), 1), ((700, 70), 1), ((2, 3, 4, 5), 3), ((5, 768), 1),
     ((2, 2049), 1)], ids=str,
)  # fmt: skip
def test_parity(shape, dims, dtype):
    def inputs():
        x = torch.randn(shape, dtype=torch.float64) * 2 + 3
        parameters = [torch.randn(shape[-dims:], dtype=torch.float64) for _ in range(2)]
        return [t.requires_grad_() for t in (x, *parameters)]

    def call(namespace):
        return lambda x, w, b: namespace.layer_norm(x, shape[-dims:], w, b, 1e-3)

    draws = 64 if shape[0] < 10 else 16  # borders of weight gradients are one element a draw
    check(call(F), call(tF), inputs, dtype=dtype, draws=draws).raise_if_failed()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_parameters_beside_16_bits(dtype):
    torch.manual_seed(0)
    x, w, b, g = torch.randn(9, 33).to(dtype), torch.randn(33), torch.randn(33), torch.randn(9, 33).to(dtype)
    results = []
    for namespace in (F, tF):
        leaves = [t.clone().requires_grad_() for t in (x, w, b)]
        y = namespace.layer_norm(leaves[0], (33,), *leaves[1:])
        results.append([y, *torch.autograd.grad(y, leaves, g)])
    for ours, theirs in zip(*results):
        assert ours.dtype == theirs.dtype
        assert (ours.double() - theirs.double()).norm() <= torch.finfo(dtype).eps * theirs.double().norm()


def test_large_mean_small_deviation():
    """Deviations are squared about the mean, not subtracted from a mean of squares."""
    x = 1000 + torch.randn(8, 256) * 1e-2
    exact = tF.layer_norm(x.double(), (256,))
    assert (F.layer_norm(x, (256,)) - exact).abs().max() <= 2 * (tF.layer_norm(x, (256,)) - exact).abs().max() + 1e-6


def test_bits_do_not_depend_on_threads_or_layout():
    x, w, b = (t.requires_grad_() for t in (torch.randn(301, 70), torch.randn(70), torch.randn(70)))
    g = torch.randn(301, 70)
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        y = F.layer_norm(x, (70,), w, b)
        found.append([y, *torch.autograd.grad(y, (x, w, b), g)])
    torch.set_num_threads(2)
    assert all(torch.equal(a, c) for a, c in zip(*found))
    turned = x.detach().t().contiguous().t()
    assert torch.equal(F.layer_norm(turned, (70,), w, b), found[0][0])


@pytest.mark.parametrize("wanted", range(1, 8))
def test_only_wanted_gradients(wanted):
    tensors = [torch.randn(5, 9, dtype=torch.float64), torch.randn(9, dtype=torch.float64), torch.randn(9, dtype=torch.float64)]
    leaves = [t.requires_grad_(bool(wanted >> i & 1)) for i, t in enumerate(tensors)]
    assert torch.autograd.gradcheck(lambda *t: F.layer_norm(t[0], (9,), *t[1:]), leaves)
    assert torch.autograd.gradgradcheck(lambda *t: F.layer_norm(t[0], (9,), *t[1:]), leaves)


def test_bias_alone_and_no_elements():
    x, b = torch.randn(3, 4, requires_grad=True), torch.randn(4, requires_grad=True)
    y = F.layer_norm(x, (4,), bias=b)
    torch.testing.assert_close(y, tF.layer_norm(x, (4,), bias=b))
    assert torch.equal(torch.autograd.grad(y.sum(), b)[0], torch.full((4,), 3.0))
    empty = torch.randn(0, 4, requires_grad=True)
    y = F.layer_norm(empty, (4,), torch.ones(4), b)
    assert y.shape == (0, 4) and torch.equal(torch.autograd.grad(y.sum(), b)[0], torch.zeros(4))
    assert F.layer_norm(torch.randn(3, 0), (0,)).shape == (3, 0)


@pytest.mark.parametrize(
    "args",
    [((7,), torch.randn(6)), ((6,),), ((),), (7,), ((7,), torch.randn(7).double()), ((7,), torch.randn(7).bfloat16()),
     ((7,), None, torch.randn(5, 7)), ((3, 5, 7, 1),)],
    ids=range(8),
)  # fmt: skip
def test_torchs_errors(args):
    raised = []
    for namespace in (tF, F):
        with pytest.raises((RuntimeError, TypeError)) as caught:
            namespace.layer_norm(torch.randn(3, 5, 7), *args)
        raised.append((type(caught.value), str(caught.value)))
    assert raised[0] == raised[1]
    with pytest.raises(NotImplementedError, match="not implemented for 'Int'"):
        F.layer_norm(torch.zeros(3, 7, dtype=torch.int32), (7,))


def test_module_convert_and_enabled():
    torch.manual_seed(0)
    norm = torch.nn.LayerNorm
    model = torch.nn.Sequential(norm((4, 6)), norm(6, elementwise_affine=False), norm(6, bias=False))
    x = torch.randn(3, 4, 6)
    expected = model(x)
    with dlkern.enabled(), dlkern.trace() as calls:
        model(x)
    assert [call.backend for call in calls] == ["cpu"] * 3
    dlkern.convert(model)
    assert all(type(m) is dlkern.nn.LayerNorm for m in model)
    torch.testing.assert_close(model(x), expected)

"""layer_norm of the CUDA column, run on the host: rows of a warp, of a block and longer ones, with and without packs.
tests/test_cuda_builds.py runs this file again on the checked build, and part of it under sanitizers."""

import pytest
import torch
import torch.nn.functional as tF
from cuda_column import all_dtypes, certify, leaf, library, no_findings, on_cuda  # noqa: F401

import dlkern.nn.functional as F
from dlkern.ops._registry import raw
from dlkern.testing import compare, cuda_on_host

# A warp's rows: 1 to 512 columns; a block's: up to 4,096; longer ones are streamed.
SHAPES = [((1, 1), 1), ((6, 15), 1), ((19, 40), 1), ((2, 3, 4, 6), 3), ((5, 512), 1), ((3, 1029), 1), ((2, 1600), 1),
          ((2, 4101), 1), ((3, 4104), 1)]


def inputs_of(shape, dims):
    def draw():
        x = torch.randn(shape, dtype=torch.float64) * 2 + 3
        return [x.requires_grad_(), leaf(*shape[-dims:]), leaf(*shape[-dims:])]

    return draw


@all_dtypes
@pytest.mark.parametrize(("shape", "dims"), SHAPES, ids=str)
def test_layer_norm(shape, dims, dtype):
    call = lambda namespace: lambda x, w, b: namespace.layer_norm(x, shape[-dims:], w, b, 1e-3)  # noqa: E731
    certify(call(F), call(tF), inputs_of(shape, dims), dtype, draws=2 if shape[-1] > 4000 else 16 if shape[-1] > 500 else 64)


@all_dtypes
def test_layer_norm_sums_over_many_chunks(dtype):
    """More rows than there are parts, so that a block takes several."""
    shape = (1100, 1029)
    found = {}
    torch.manual_seed(0)
    g, x = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    for wide in (torch.float64, dtype):
        w, b = (torch.zeros(shape[1], dtype=wide, requires_grad=True) for _ in range(2))
        found[wide] = torch.autograd.grad(tF.layer_norm(x.to(wide), shape[1:], w, b), (w, b), g.to(wide))
    mean, rstd = raw["layer_norm_forward"]["cuda"](x, 1, None, None, 1e-5)[1:]
    ours = raw["layer_norm_backward"]["cuda"](g, x, 1, None, mean, rstd, False, True, True)[1:]
    for one, theirs, exact in zip(ours, found[dtype], found[torch.float64], strict=True):
        assert not [row for row in compare("gradient", [one], [theirs], [exact], dtype) if not row.ok]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_layer_norm_float32_parameters_beside_16_bits(dtype):
    torch.manual_seed(0)
    for columns in (33, 40, 1032):
        x, w, b, g = torch.randn(9, columns).to(dtype), torch.randn(columns), torch.randn(columns), torch.randn(9, columns)
        results = []
        for namespace in (F, tF):
            leaves = [t.clone().requires_grad_() for t in (x, w, b)]
            with on_cuda():
                y = namespace.layer_norm(leaves[0], (columns,), *leaves[1:])
                results.append([y, *torch.autograd.grad(y, leaves, g.to(dtype))])
        for ours, theirs in zip(*results):
            assert ours.dtype == theirs.dtype
            assert (ours.double() - theirs.double()).norm() <= 2**-7 * theirs.double().norm()


@pytest.mark.parametrize("wanted", range(8))
def test_layer_norm_only_wanted_gradients(wanted):
    x, w, g = torch.randn(5, 9), torch.randn(9), torch.randn(5, 9)
    mean, rstd = raw["layer_norm_forward"]["cuda"](x, 1, w, None, 1e-5)[1:]
    all_of_them = raw["layer_norm_backward"]["cuda"](g, x, 1, w, mean, rstd, True, True, True)
    flags = [bool(wanted >> i & 1) for i in range(3)]
    found = raw["layer_norm_backward"]["cuda"](g, x, 1, w, mean, rstd, *flags)
    for one, full, flag in zip(found, all_of_them, flags):
        assert torch.equal(one, full) if flag else one.numel() == 0


def test_layer_norm_views_and_nothing_to_do():
    x, w = torch.randn(6 * 16 + 1)[1:].view(6, 16), torch.randn(17)[1:]
    for view in (x, x.clone().t().contiguous().t()):
        torch.testing.assert_close(raw["layer_norm_forward"]["cuda"](view, 1, w, None, 1e-5)[0],
                                   raw["layer_norm_forward"]["cuda"](x.clone(), 1, w.clone(), None, 1e-5)[0])
    for shape in ((0, 4), (3, 0)):
        x, w = torch.randn(shape), torch.randn(shape[1:])
        output, mean, rstd = raw["layer_norm_forward"]["cuda"](x, 1, w, w, 1e-5)
        found = raw["layer_norm_backward"]["cuda"](x, x, 1, w, mean, rstd, True, True, True)
        assert output.shape == found[0].shape == shape and torch.equal(found[1], torch.zeros(shape[1:]))


def test_layer_norm_wrong_arguments():
    x, w = torch.randn(3, 5), torch.randn(5)
    call = raw["layer_norm_forward"]["cuda"]
    for wrong in ((x.double(), 1, None, None, 1e-5), (x, 0, None, None, 1e-5), (x, 3, None, None, 1e-5),
                  (x, 1, w[:4], None, 1e-5), (x, 1, None, w.bfloat16(), 1e-5)):
        with pytest.raises((RuntimeError, ValueError)):
            call(*wrong)
    _, mean, rstd = call(x, 1, w, None, 1e-5)
    for wrong in ((x[:2], x, 1, w, mean, rstd), (x, x, 1, w, mean[:2], rstd), (x, x, 1, w, mean, rstd.double())):
        with pytest.raises((RuntimeError, ValueError)):
            raw["layer_norm_backward"]["cuda"](*wrong, True, True, True)


@pytest.mark.parametrize("order,seed", [("reverse", 1), ("random", 1)])
def test_layer_norm_same_bits_in_every_thread_order(order, seed):
    def sample():
        torch.manual_seed(3)
        found = []
        for columns in (24, 1032):
            x, w, g = torch.randn(19, columns), torch.randn(columns), torch.randn(19, columns)
            found += raw["layer_norm_forward"]["cuda"](x, 1, w, w, 1e-5)
            found += raw["layer_norm_backward"]["cuda"](g, x, 1, w, *found[-2:], True, True, True)
        return found

    forward = sample()
    with cuda_on_host.thread_order(order, seed):
        other = sample()
    assert all(torch.equal(a, b) for a, b in zip(forward, other))

"""cross_entropy of the CUDA column, run on the host: rows of a warp and of a block, places of a thread, with and without
packs. tests/test_cuda_builds.py runs this file again on the checked build, and part of it under sanitizers."""

import pytest
import torch
import torch.nn.functional as tF
from cuda_column import all_dtypes, certify, library, no_findings, on_cuda  # noqa: F401
from test_loss import both, case, probable, weighted_places

import dlkern.nn.functional as F
from dlkern.ops._registry import raw
from dlkern.testing import cuda_on_host

# A warp's rows: up to 2,048 classes; longer ones a block's; places of images a thread's.
SHAPES = [(1, 1), (5, 3), (19, 40), (3, 1001), (2, 2053), (3, 2056), (3, 5, 7), (2, 3, 2, 3, 4), (1, 4, 300)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
OPTIONS = [dict(), dict(reduction="sum", label_smoothing=0.2), dict(reduction="none", weight=True),
           dict(reduction="mean", weight=True, label_smoothing=0.2)]
options = pytest.mark.parametrize("options", OPTIONS, ids=["mean", "sum-smooth", "none-weight", "mean-weight-smooth"])


def draws_of(shape):
    return 3 if shape[1] > 1000 else 12


@all_dtypes
@options
@shapes
def test_cross_entropy(shape, options, dtype):
    weight, settings = options.get("weight", False), {k: v for k, v in options.items() if k != "weight"}
    certify(*both(**settings), lambda: case(shape, weight), dtype, draws=draws_of(shape))


@all_dtypes
@options
@shapes
def test_cross_entropy_of_probabilities(shape, options, dtype):
    weight, settings = options.get("weight", False), {k: v for k, v in options.items() if k != "weight"}
    if shape[1] > 1:
        certify(*both(**settings), lambda: probable(shape, weight), dtype, draws=draws_of(shape))


@pytest.mark.parametrize("offset", [300.0, -3000.0])
def test_cross_entropy_of_large_logits(offset):
    ours, theirs = both(label_smoothing=0.1)
    certify(ours, theirs, lambda: case((40, 50), offset=offset), torch.float32, draws=8)
    certify(ours, theirs, lambda: probable((40, 50), offset=offset), torch.float32, draws=8)


@pytest.mark.parametrize("view", [
    lambda x: x.contiguous(memory_format=torch.channels_last), lambda x: x.transpose(2, 3).contiguous().transpose(2, 3)
])  # fmt: skip
def test_cross_entropy_in_other_layouts(view):
    ours, theirs = both(reduction="sum", label_smoothing=0.1)
    change = lambda f: lambda x, t: f(view(x), t)  # noqa: E731
    certify(change(ours), change(theirs), lambda: case((2, 8, 5, 3)), torch.float32, draws=8)
    certify(change(ours), change(theirs), lambda: probable((2, 8, 5, 3)), torch.float32, draws=8)


@pytest.mark.parametrize("shape", [(5, 7), (2, 3, 4)], ids=str)
@all_dtypes
def test_cross_entropy_with_weights_of_places(shape, dtype):
    certify(*weighted_places(shape, label_smoothing=0.1), dtype, draws=12)
    x, target, _ = case(shape, True)
    own = torch.randint(0, 3, target.shape)
    ours = raw["cross_entropy_forward"]["cuda"](x.detach().to(dtype), target, None, own.to(dtype), 1, -100, 0.1)
    assert ours[2] == (own * (target != -100)).sum()


@pytest.mark.parametrize("shape", [(5, 1), (3, 1, 40)], ids=str)
@all_dtypes
def test_cross_entropy_of_one_class_has_no_gradient(shape, dtype):
    for smoothing in (0.0, 0.1, 1.0):
        for weight in (None, torch.rand(1).to(dtype) + 0.1):
            x = torch.randn(shape).to(dtype).requires_grad_()
            for target in (torch.zeros(shape[:1] + shape[2:], dtype=torch.long), torch.rand(shape).to(dtype)):
                with on_cuda():
                    loss = F.cross_entropy(x, target, weight, reduction="none", label_smoothing=smoothing)
                    assert (torch.autograd.grad(loss, x, torch.randn_like(loss))[0] == 0).all()


@pytest.mark.parametrize("shape", [(6, 40), (6, 2100), (6, 40, 3)], ids=str)
def test_cross_entropy_special_values(shape):
    inf = float("inf")
    x, target = torch.randn(shape), torch.zeros((shape[0], *shape[2:]), dtype=torch.long)
    x[0, 1], x[1, 1], x[2, 1], x[3, 0], x[4] = float("nan"), inf, -inf, -inf, -inf
    target[5] = -100
    for t in (target, torch.softmax(torch.randn(shape), 1)):
        with on_cuda():
            ours = F.cross_entropy(x, t, reduction="none")
        theirs = tF.cross_entropy(x, t, reduction="none")
        assert torch.equal(torch.isnan(ours), torch.isnan(theirs)) and torch.equal(torch.isinf(ours), torch.isinf(theirs))
    # An ignored place has no gradient, whatever its logits.
    x[0] = 0.0
    logits, target[0] = x[:1].clone().fill_(float("nan")).requires_grad_(), -100
    with on_cuda():
        loss = F.cross_entropy(logits, target[:1], reduction="sum")
        assert loss == 0 and (torch.autograd.grad(loss, logits)[0] == 0).all()


def test_cross_entropy_views_and_nothing_to_do():
    x, target = torch.randn(6 * 16 + 1)[1:].view(6, 16), torch.arange(6)
    for view in (x, x.clone().t().contiguous().t()):
        found = raw["cross_entropy_forward"]["cuda"](view, target, None, None, 1, -100, 0.0)[0]
        torch.testing.assert_close(found, tF.cross_entropy(x, target))
    for shape in ((2, 3), (0, 3), (0, 0), (2, 3, 0), (2, 0)):
        for reduction in ("mean", "sum", "none"):
            x, t = torch.randn(shape, requires_grad=True), torch.full((shape[0], *shape[2:]), -100)
            with on_cuda():
                ours = F.cross_entropy(x, t, reduction=reduction)
                assert torch.equal(torch.autograd.grad(ours.sum(), x)[0], torch.zeros(shape))
            theirs = tF.cross_entropy(x, t, reduction=reduction)
            assert torch.equal(torch.nan_to_num(ours, nan=7.0), torch.nan_to_num(theirs, nan=7.0))


@pytest.mark.parametrize("wanted", range(4))
def test_cross_entropy_of_probabilities_only_wanted_gradients(wanted):
    x, t = torch.randn(5, 9), torch.rand(5, 9)
    loss, kept = raw["cross_entropy_probabilities_forward"]["cuda"](x, t, None, 1, 0.1)
    backward = raw["cross_entropy_probabilities_backward"]["cuda"]
    flags = [bool(wanted >> i & 1) for i in range(2)]
    for one, full, flag in zip(backward(loss, x, t, None, kept, 1, 0.1, *flags),
                               backward(loss, x, t, None, kept, 1, 0.1, True, True), flags):
        assert torch.equal(one, full) if flag else one.shape == (0,)


def test_cross_entropy_wrong_arguments():
    forward, backward = (raw[f"cross_entropy_{d}"]["cuda"] for d in ("forward", "backward"))
    x, t = torch.randn(2, 3), torch.tensor([0, 1])
    with pytest.raises(IndexError, match=r"Target 3 is out of bounds"):
        forward(x, torch.tensor([0, 3]), None, None, 1, -100, 0.0)
    for wrong in (
        (x.double(), t, None, None, 1, -100, 0.0), (x, t, None, None, 5, -100, 0.0), (x, t.int(), None, None, 1, -100, 0.0),
        (x, t, torch.rand(2), None, 1, -100, 0.0), (x, t, None, None, 1, -100, float("nan")),
        (x, t[:1], None, None, 1, -100, 0.0), (x[0], t[0], None, None, 1, -100, 0.0), (x, t, None, torch.rand(3), 1, -100, 0.0),
        (x, t, torch.rand(3).bfloat16(), None, 1, -100, 0.0), (x, t, None, torch.rand(2).double(), 1, -100, 0.0),
    ):
        with pytest.raises((RuntimeError, ValueError)):
            forward(*wrong)
    loss, lse, total = forward(x, t, None, None, 1, -100, 0.0)
    for wrong in ((loss, x, t, None, None, lse[0], total), (torch.rand(2), x, t, None, None, lse, total),
                  (loss, x, t, None, None, lse, total.double())):
        with pytest.raises(RuntimeError):
            backward(*wrong, 1, -100, 0.0)
    forward, backward = (raw[f"cross_entropy_probabilities_{d}"]["cuda"] for d in ("forward", "backward"))
    t = torch.rand(2, 3)
    for wrong in ((x, t.double(), None, 1, 0.0), (x, t[:1], None, 1, 0.0), (x, t, None, 1, 1.5), (x[:0], t[:0], None, 1, 0.0)):
        with pytest.raises((RuntimeError, ValueError)):
            forward(*wrong)
    loss, kept = forward(x, t, None, 1, 0.0)
    with pytest.raises(RuntimeError):
        backward(loss, x, t, None, kept[:2], 1, 0.0, True, True)


@pytest.mark.parametrize("order,seed", [("reverse", 1), ("random", 1)])
def test_cross_entropy_same_bits_in_every_thread_order(order, seed):
    def sample():
        torch.manual_seed(3)
        found = []
        for shape in ((19, 24), (2, 2056), (2, 5, 150)):
            x, w, target = torch.randn(shape), torch.rand(shape[1]), torch.randint(0, shape[1], (shape[0], *shape[2:]))
            loss, *kept = raw["cross_entropy_forward"]["cuda"](x, target, w, None, 1, -100, 0.1)
            found += [loss, raw["cross_entropy_backward"]["cuda"](loss, x, target, w, None, *kept, 1, -100, 0.1)]
            t = torch.rand(shape)
            loss, kept = raw["cross_entropy_probabilities_forward"]["cuda"](x, t, w, 1, 0.1)
            found += [loss, *raw["cross_entropy_probabilities_backward"]["cuda"](loss, x, t, w, kept, 1, 0.1, True, True)]
        return found

    forward = sample()
    with cuda_on_host.thread_order(order, seed):
        other = sample()
    assert all(torch.equal(a, b) for a, b in zip(forward, other))

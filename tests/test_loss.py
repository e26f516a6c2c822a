"""cross_entropy: shapes, reductions, weights, smoothing, ignored and wrong targets; the rest is in test_contract.py."""

import warnings

import pytest
import torch
import torch.nn.functional as tF

import dlkern
import dlkern.nn.functional as F

SHAPES = [(1, 1), (5, 3), (3, 1000), (6, 2500), (300, 7), (3, 5, 7), (2, 5, 3, 11), (2, 3, 2, 3, 4)]


def case(shape, weight=False, offset=0.0):
    target = torch.randint(0, shape[1], (shape[0], *shape[2:]))
    if target.numel() > 2:
        target.view(-1)[::3] = -100
    x = (torch.randn(shape, dtype=torch.float64) * 3 + offset).requires_grad_()
    return [x, target, *([torch.rand(shape[1], dtype=torch.float64) + 0.1] if weight else [])]


def both(**options):
    return (
        lambda x, t, w=None: F.cross_entropy(x, t, w, **options),
        lambda x, t, w=None: tF.cross_entropy(x, t, w, **options),
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parity(shape, reduction, smoothing):
    ours, theirs = both(reduction=reduction, label_smoothing=smoothing)
    for dtype, weight in ((torch.float32, smoothing == 0.0), (torch.bfloat16, True)):
        dlkern.testing.check(
            ours, theirs, lambda w=weight: case(shape, w), dtype=dtype, draws=12 if len(shape) == 2 else 4,
            name=f"{shape} weight={weight}",
        ).raise_if_failed()


@pytest.mark.parametrize("offset", [0.0, 300.0, -3000.0])
def test_large_logits(offset):
    ours, theirs = both()
    dlkern.testing.check(ours, theirs, lambda: case((40, 50), offset=offset), draws=10, name="offset").raise_if_failed()


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_channels_last(smoothing):
    ours, theirs = both(label_smoothing=smoothing, reduction="sum")
    to = lambda f: lambda x, t: f(x.contiguous(memory_format=torch.channels_last), t)  # noqa: E731
    dlkern.testing.check(to(ours), to(theirs), lambda: case((2, 9, 5, 3)), draws=10).raise_if_failed()
    x, target = case((2, 9, 5, 3))
    x = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    assert torch.autograd.grad(F.cross_entropy(x, target), x)[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("view", [lambda x: x.t().contiguous().t(), lambda x: torch.stack([x, x], -1)[..., 0]])
def test_not_contiguous(view):
    ours, theirs = both()
    dlkern.testing.check(
        lambda x, t: ours(view(x), t), lambda x, t: theirs(view(x), t), lambda: case((31, 23)), draws=8
    ).raise_if_failed()


@pytest.mark.parametrize("options", [
    {}, dict(reduction="sum", label_smoothing=0.3), dict(reduction="none"), dict(ignore_index=1, label_smoothing=0.1)
])
@pytest.mark.parametrize("shape", [(4, 3), (2, 3, 2)])
def test_gradients_of_gradients(shape, options):
    x, target, weight = case(shape, True)
    target = target.clamp(min=0)
    for w in (None, weight):
        assert torch.autograd.gradcheck(lambda x: F.cross_entropy(x, target, w, **options), x)  # noqa: B023
        assert torch.autograd.gradgradcheck(lambda x: F.cross_entropy(x, target, w, **options), x)  # noqa: B023


def test_unbatched():
    x = torch.randn(7, requires_grad=True)
    for reduction in ("mean", "none", "sum"):
        ours, theirs = (f.cross_entropy(x, torch.tensor(3), reduction=reduction) for f in (F, tF))
        assert ours.shape == theirs.shape
        assert (ours - theirs).abs() <= 2**-20
        assert torch.autograd.grad(ours, x)[0].shape == (7,)


@pytest.mark.parametrize("shape", [(2, 3), (0, 3), (0, 0), (2, 3, 0), (2, 0)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_nothing_counts(shape, reduction, smoothing):
    if smoothing and shape[1] == 0:
        pytest.skip("torch multiplies 0 by e / 0 there; we give 0")
    x = torch.randn(shape, requires_grad=True)
    target = torch.full((shape[0], *shape[2:]), -100)
    ours, theirs = (f.cross_entropy(x, target, reduction=reduction, label_smoothing=smoothing) for f in (F, tF))
    assert torch.equal(torch.nan_to_num(ours, nan=7.0), torch.nan_to_num(theirs, nan=7.0))
    assert torch.equal(torch.autograd.grad(ours.sum(), x)[0], torch.zeros(shape))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("shape", [(1,), (5, 1), (3, 1, 40)], ids=str)
def test_one_class_has_no_gradient(shape, smoothing, dtype):
    """Its probability is 1 whatever the logit: along and spread must cancel to the last bit."""
    for weight in (None, torch.rand(1).to(dtype) + 0.1):
        x = torch.randn(shape).to(dtype).requires_grad_()
        target = torch.zeros(shape[:1] + shape[2:] if len(shape) > 1 else (), dtype=torch.long)
        loss = F.cross_entropy(x, target, weight, reduction="none", label_smoothing=smoothing)
        assert (torch.autograd.grad(loss, x, torch.randn_like(loss))[0] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(1,), (5, 1), (3, 1, 40)], ids=str)
def test_one_class_has_no_gradient_of_probabilities(shape, dtype):
    for smoothing in (0.0, 0.1):
        x, t, w = torch.randn(shape).to(dtype).requires_grad_(), torch.rand(shape).to(dtype), torch.rand(1).to(dtype) + 0.1
        loss = F.cross_entropy(x, t, w, reduction="none", label_smoothing=smoothing)
        (gradient,) = torch.autograd.grad(loss, x, torch.randn_like(loss))
        # p sum(v) and v differ by less than double's roundoff, in every dtype.
        assert (gradient.abs() <= 2**-53).all() and (loss == 0).all()


def test_ignored_places_get_no_gradient_whatever_their_logits():
    for shape in ((4, 5), (2, 5, 3)):
        x, target = torch.randn(shape), torch.zeros((shape[0], *shape[2:]), dtype=torch.long)
        target[0] = -100
        x[0] = float("nan")
        x.requires_grad_()
        loss = F.cross_entropy(x, target)
        assert loss.isfinite()
        (g,) = torch.autograd.grad(loss, x)
        assert (g[0] == 0).all() and (g[1:] != 0).all()


@pytest.mark.parametrize("shape", [(6, 40), (6, 2100), (6, 40, 3)], ids=str)
def test_not_finite(shape):
    x, target = torch.randn(shape), torch.zeros((shape[0], *shape[2:]), dtype=torch.long)
    inf = float("inf")
    x[0, 1], x[1, 1], x[2, 1], x[3, 0] = float("nan"), inf, -inf, -inf
    x[4] = -inf
    ours, theirs = F.cross_entropy(x, target, reduction="none"), tF.cross_entropy(x, target, reduction="none")
    assert torch.equal(torch.isnan(ours), torch.isnan(theirs)) and torch.equal(torch.isinf(ours), torch.isinf(theirs))
    x[0] = x[1] = x[4] = 0.5
    x[5, 2:] = -inf
    ours, theirs = F.cross_entropy(x, target, reduction="none"), tF.cross_entropy(x, target, reduction="none")
    assert torch.equal(torch.isinf(ours), torch.isinf(theirs)) and torch.isinf(ours[3]).all()
    assert ours[5].isfinite().all()


def test_same_bits_whatever_the_threads():
    x, target = torch.randn(3000, 11), torch.randint(0, 11, (3000,))
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(F.cross_entropy(x, target))
    finally:
        torch.set_num_threads(before)
    assert results[0] == results[1] == results[2]


def test_deprecated_arguments():
    x, target = torch.randn(4, 5), torch.tensor([1, 2, 0, 4])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for options in (dict(size_average=False), dict(reduce=False), dict(size_average=True, reduce=True)):
            ours, theirs = F.cross_entropy(x, target, **options), tF.cross_entropy(x, target, **options)
            assert ours.shape == theirs.shape and torch.allclose(ours, theirs)
    with pytest.warns(UserWarning, match="size_average and reduce args will be deprecated"):
        F.cross_entropy(x, target, size_average=False)


def wrong_calls():
    x, t = torch.randn(2, 3), torch.tensor([0, 1])
    return {
        "too large": ((x, torch.tensor([0, 3])), {}), "negative": ((x, torch.tensor([0, -1])), {}),
        "too large, images": ((torch.randn(2, 3, 4), torch.full((2, 4), 3)), {}),
        "too large, unbatched": ((torch.randn(3), torch.tensor(3)), {}),
        "no classes": ((torch.randn(2, 0), torch.tensor([0, 0])), {}),
        "int32": ((x, t.int()), {}), "batch": ((x, torch.tensor([0, 1, 2])), {}),
        "places": ((torch.randn(2, 3, 4), torch.zeros(2, 5, dtype=torch.long)), {}),
        "scalar": ((torch.randn(()), torch.tensor(0)), {}), "weight": ((x, t, torch.rand(4)), {}),
        "weight dtype": ((x, t, torch.rand(3).double()), {}), "smoothing": ((x, t), dict(label_smoothing=1.5)),
        "reduction": ((x, t), dict(reduction="average")), "probabilities": ((x, torch.rand(2, 3)), dict(ignore_index=1)),
        "weight grad": ((x, t, torch.rand(3).requires_grad_()), {}),
        "integer probabilities": ((x, torch.ones_like(x).long()), {}),
        "weight of probabilities": ((x, torch.rand(2, 3), torch.rand(2)), {}),
        "smoothing of probabilities": ((x, torch.rand(2, 3)), dict(label_smoothing=1.5)),
    }


@pytest.mark.parametrize("name", wrong_calls())
def test_wrong_calls_raise_as_torch(name):
    arguments, options = wrong_calls()[name]
    with pytest.raises((RuntimeError, ValueError, IndexError)) as theirs:
        tF.cross_entropy(*arguments, **options)
    with pytest.raises(type(theirs.value)) as ours:
        F.cross_entropy(*arguments, **options)
    assert str(ours.value) == str(theirs.value)


def test_wrong_raw_calls():
    op, x, t = torch.ops.dlkern.cross_entropy_forward_cpu, torch.randn(2, 3), torch.tensor([0, 1])
    with pytest.raises(IndexError, match=r"Target 3 is out of bounds"):
        op(x, torch.tensor([0, 3]), None, None, 1, -100, 0.0)
    for arguments in (
        (x, t, None, None, 5, -100, 0.0), (x, t, torch.rand(2), None, 1, -100, 0.0), (x, t.int(), None, None, 1, -100, 0.0),
        (x, t, None, None, 1, -100, float("nan")), (x, t[:1], None, None, 1, -100, 0.0), (x[0], t[0], None, None, 1, -100, 0.0),
        (x.to(torch.complex64), t, None, None, 1, -100, 0.0), (x, t, None, torch.rand(3), 1, -100, 0.0),
        (x, t, None, torch.rand(2).double(), 1, -100, 0.0),
    ):
        with pytest.raises((RuntimeError, ValueError)):
            op(*arguments)
    loss, lse, total = op(x, t, None, None, 1, -100, 0.0)
    with pytest.raises(RuntimeError):
        torch.ops.dlkern.cross_entropy_backward_cpu(loss, x, t, None, None, lse[0], total, 1, -100, 0.0)
    with pytest.raises(IndexError):
        torch.ops.dlkern.cross_entropy_backward_cpu(loss, x, t + 2, None, None, lse, total, 1, -100, 0.0)


def probable(shape, weight=False, offset=0.0):
    """Logits, probabilities and, with weight, weights of classes; gradients for the first two."""
    x = (torch.randn(shape, dtype=torch.float64) * 3 + offset).requires_grad_()
    target = torch.softmax(torch.randn(shape, dtype=torch.float64) * 2, 1).requires_grad_()
    return [x, target, *([torch.rand(shape[1], dtype=torch.float64) + 0.1] if weight else [])]


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_probabilities(shape, reduction, smoothing):
    ours, theirs = both(reduction=reduction, label_smoothing=smoothing)
    for dtype, weight in ((torch.float32, smoothing == 0.0), (torch.bfloat16, True)):
        dlkern.testing.check(
            ours, theirs, lambda w=weight: probable(shape, w), dtype=dtype, draws=12 if len(shape) == 2 else 4,
            name=f"{shape} weight={weight}",
        ).raise_if_failed()


@pytest.mark.parametrize("offset", [300.0, -3000.0])
def test_probabilities_with_large_logits(offset):
    ours, theirs = both(label_smoothing=0.1)
    dlkern.testing.check(ours, theirs, lambda: probable((40, 50), offset=offset), draws=10).raise_if_failed()


@pytest.mark.parametrize("view", [
    lambda x: x.contiguous(memory_format=torch.channels_last), lambda x: x.transpose(2, 3).contiguous().transpose(2, 3)
])  # fmt: skip
def test_probabilities_in_other_layouts(view):
    """Logits and targets each in a layout of its own."""
    ours, theirs = both(reduction="sum")
    for change in (lambda f: lambda x, t: f(view(x), t), lambda f: lambda x, t: f(x, view(t))):
        dlkern.testing.check(change(ours), change(theirs), lambda: probable((2, 9, 5, 3)), draws=10).raise_if_failed()
    x, t = (z.detach().float().contiguous(memory_format=torch.channels_last).requires_grad_() for z in probable((2, 9, 5, 3)))
    for gradient in torch.autograd.grad(F.cross_entropy(x, t), (x, t)):
        assert gradient.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("options", [{}, dict(reduction="sum", label_smoothing=0.3), dict(reduction="none")])
@pytest.mark.parametrize("shape", [(4, 3), (2, 3, 2)])
def test_gradients_of_gradients_of_probabilities(shape, options):
    x, t, weight = probable(shape, True)
    for w in (None, weight):
        for fixed in ((), (0,), (1,)):  # both gradients, or one alone
            leaves = [z.detach() if i in fixed else z for i, z in enumerate((x, t))]
            assert torch.autograd.gradcheck(lambda x, t: F.cross_entropy(x, t, w, **options), leaves)  # noqa: B023
            assert torch.autograd.gradgradcheck(lambda x, t: F.cross_entropy(x, t, w, **options), leaves)  # noqa: B023


def test_probabilities_run_on_the_column_and_the_rest_on_torch():
    x, t = torch.randn(4, 5, requires_grad=True), torch.rand(4, 5)
    with dlkern.trace() as calls:
        traced = F.cross_entropy(x, t)
        F.cross_entropy(x, t.double())
        F.cross_entropy(x, t, torch.rand(5).requires_grad_())
    assert [call.backend for call in calls] == ["cpu", "torch", "torch"]
    assert torch.equal(traced, F.cross_entropy(x, t))
    alone = F.cross_entropy(x[0], t[0], reduction="none")
    assert alone.shape == () and torch.equal(alone, F.cross_entropy(x[:1], t[:1], reduction="none")[0])
    torch.testing.assert_close(F.cross_entropy(x, t, label_smoothing=-1.0), tF.cross_entropy(x, t, label_smoothing=-1.0))
    for shape in ((0, 3), (2, 0), (2, 3, 0)):
        for reduction in ("mean", "sum", "none"):
            ours, theirs = (f.cross_entropy(torch.randn(shape), torch.rand(shape), reduction=reduction) for f in (F, tF))
            assert torch.equal(torch.nan_to_num(ours, nan=7.0), torch.nan_to_num(theirs, nan=7.0))
    with torch.autocast("cpu", torch.bfloat16):
        assert F.cross_entropy(x.bfloat16(), t.bfloat16()).dtype == torch.float32
    torch._dynamo.reset()
    compiled = torch.compile(F.cross_entropy, fullgraph=True, backend="aot_eager")(x, t)
    assert torch.equal(compiled, traced)
    assert torch.equal(torch.autograd.grad(compiled, x)[0], torch.autograd.grad(traced, x)[0])


def test_not_finite_logits_of_probabilities():
    inf = float("inf")
    for shape in ((6, 40), (6, 40, 3)):
        x, t = torch.randn(shape), torch.softmax(torch.randn(shape), 1)
        x[0, 1], x[1, 1], x[2, 1], x[3] = float("nan"), inf, -inf, -inf
        t[4, 1], x[4, 1] = 0.0, -inf
        ours, theirs = (f.cross_entropy(x, t, reduction="none") for f in (F, tF))
        assert torch.equal(torch.isnan(ours), torch.isnan(theirs)) and torch.equal(torch.isinf(ours), torch.isinf(theirs))


def test_wrong_raw_calls_with_probabilities():
    forward, backward = (getattr(torch.ops.dlkern, f"cross_entropy_probabilities_{d}_cpu") for d in ("forward", "backward"))
    x, t = torch.randn(2, 3), torch.rand(2, 3)
    for arguments in (
        (x, t, None, 5, 0.0), (x, t, torch.rand(2), 1, 0.0), (x, t.double(), None, 1, 0.0), (x, t[:1], None, 1, 0.0),
        (x[0], t[0], None, 1, 0.0), (x, t, None, 1, 1.5), (x[:0], t[:0], None, 1, 0.0), (x.int(), t.int(), None, 1, 0.0),
    ):
        with pytest.raises((RuntimeError, ValueError)):
            forward(*arguments)
    loss, kept = forward(x, t, None, 1, 0.0)
    assert [g.shape for g in backward(loss, x, t, None, kept, 1, 0.0, False, True)] == [(0,), (2, 3)]
    for arguments in ((loss, x, t, None, kept[:2], 1, 0.0), (torch.rand(2), x, t, None, kept, 1, 0.0)):
        with pytest.raises(RuntimeError):
            backward(*arguments, True, True)


def test_autocast_widens():
    x, t = torch.randn(4, 5).bfloat16(), torch.tensor([1, 2, 0, 4])
    with torch.autocast("cpu", torch.bfloat16):
        assert F.cross_entropy(x, t).dtype == torch.float32


def test_module_is_torchs():
    module = dlkern.nn.CrossEntropyLoss(torch.rand(5), ignore_index=2, reduction="sum", label_smoothing=0.1)
    assert isinstance(module, torch.nn.CrossEntropyLoss)
    x, t = torch.randn(8, 5), torch.randint(0, 5, (8,))
    theirs = tF.cross_entropy(x, t, module.weight, ignore_index=2, reduction="sum", label_smoothing=0.1)
    assert torch.allclose(module(x, t), theirs)


def weighted_places(shape, **options):
    """Importance weights: each place's loss times its own, and torch's op for each place; what draws their inputs."""

    def ours(x, t, w, s):
        return F.cross_entropy(x, t, w, sample_weight=s, **options)

    def theirs(x, t, w, s):
        each = tF.cross_entropy(x, t, w, reduction="none", label_smoothing=options.get("label_smoothing", 0.0)) * s
        reduction = options.get("reduction", "mean")
        if reduction == "none":
            return each
        return each.sum() if reduction == "sum" else each.sum() / (w[t.clamp(min=0)] * (t >= 0) * s).sum()

    def inputs():
        drawn = case(shape, True)
        return [*drawn, torch.rand(drawn[1].shape, dtype=torch.float64) * 3]

    return ours, theirs, inputs


@pytest.mark.parametrize("options", [{}, dict(reduction="sum"), dict(reduction="none", label_smoothing=0.2)], ids=str)
@pytest.mark.parametrize("shape", [(40, 9), (3, 5, 2, 7)], ids=str)
def test_sample_weight(shape, options):
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        dlkern.testing.check(*weighted_places(shape, **options), dtype=dtype, draws=12).raise_if_failed()


def test_sample_weight_of_one_of_two_and_of_none():
    x, t = torch.randn(6, 4, requires_grad=True), torch.randint(0, 4, (6,))
    with dlkern.trace() as calls:
        one = F.cross_entropy(x, t, sample_weight=torch.tensor([1.0, 0, 1, 0, 1, 0]))
    assert [call.backend for call in calls] == ["cpu"]
    torch.testing.assert_close(one, F.cross_entropy(x[::2], t[::2]))
    (g,) = torch.autograd.grad(one, x)
    assert (g[1::2] == 0).all() and (g[::2] != 0).all()
    same = [F.cross_entropy(x, t), F.cross_entropy(x, t, sample_weight=torch.ones(6))]
    assert torch.equal(*same)


def test_gradients_of_sample_weights():
    x, t, w = case((5, 3), True)
    t = t.clamp(min=0)
    s = torch.rand(5, dtype=torch.float64) + 0.2
    assert torch.autograd.gradgradcheck(lambda x: F.cross_entropy(x, t, w, sample_weight=s), x)
    with dlkern.trace() as calls:
        assert torch.autograd.gradcheck(lambda x, s: F.cross_entropy(x, t, w, sample_weight=s), (x, s.requires_grad_()))
    assert {call.backend for call in calls} == {"reference"} and "sample_weight" in calls[0].reason
    alone = F.cross_entropy(x[0], t[0], sample_weight=s[0], reduction="none")
    torch.testing.assert_close(alone, tF.cross_entropy(x[0], t[0]) * s[0])


@pytest.mark.parametrize("wrong", [torch.ones(3), torch.ones(4, 1), torch.ones(4).double(), [1.0] * 4], ids=range(4))
def test_wrong_sample_weights_raise(wrong):
    with pytest.raises(ValueError, match="sample_weight"):
        F.cross_entropy(torch.randn(4, 5), torch.tensor([0, 1, 2, 3]), sample_weight=wrong)
    with pytest.raises(ValueError, match="sample_weight"):
        F.cross_entropy(torch.randn(4, 5), torch.rand(4, 5), sample_weight=torch.ones(4))


def test_perplexity():
    x, t = torch.randn(7, 5, 3, requires_grad=True), torch.randint(0, 5, (7, 3))
    t[2] = -100
    logs = torch.log_softmax(x.double(), 1).gather(1, t.clamp(min=0)[:, None])[:, 0]
    exact = torch.exp(-logs[t >= 0].mean())
    assert abs(F.perplexity(x, t).item() / exact.item() - 1) < 2**-20
    torch.testing.assert_close(F.perplexity(torch.zeros(4, 9), torch.zeros(4, dtype=torch.long)).item(), 9.0)
    assert F.perplexity(x, torch.full((7, 3), 2), ignore_index=2).isnan()
    (g,) = torch.autograd.grad(F.perplexity(x, t), x)
    assert (g[2] == 0).all() and (g[0] != 0).all()

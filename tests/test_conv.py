"""conv2d: parity of output and gradients over shapes, layouts and dtypes; derivatives; torch's errors."""

import pytest
import torch
import torch.nn.functional as TF

import dlkern
import dlkern.nn.functional as F
from dlkern import columns
from dlkern.ops._registry import raw

LAYOUTS = [torch.contiguous_format, torch.channels_last]

# name -> input, weight, stride, padding, dilation, groups, bias
CASES = {
    "1x1": ((2, 19, 7, 9), (13, 19, 1, 1), 1, 0, 1, 1, True),
    "1x1 wide": ((2, 64, 14, 14), (96, 64, 1, 1), 1, 0, 1, 1, False),
    "1x1 stride": ((2, 16, 9, 8), (24, 16, 1, 1), 2, 0, 1, 1, False),
    "1x1 padded": ((2, 5, 4, 4), (6, 5, 1, 1), (2, 1), (1, 2), 1, 1, True),
    "3x3": ((2, 16, 13, 11), (24, 16, 3, 3), 1, 1, 1, 1, True),
    "3x3 odd channels": ((3, 7, 9, 17), (33, 7, 3, 3), 1, 1, 1, 1, True),
    "3x3 many channels": ((1, 130, 8, 8), (70, 130, 3, 3), 1, 1, 1, 1, False),
    "3x3 stride": ((2, 12, 15, 14), (20, 12, 3, 3), 2, 1, 1, 1, True),
    "3x3 wide image": ((1, 8, 5, 131), (16, 8, 3, 3), 1, 1, 1, 1, True),
    "no padding": ((2, 6, 9, 10), (10, 6, 3, 3), 1, 0, 1, 1, True),
    "more padding than kernel": ((1, 4, 5, 6), (5, 4, 2, 3), 1, (3, 4), 1, 1, True),
    "even kernel": ((2, 5, 9, 8), (9, 5, 4, 2), (2, 3), (1, 0), 1, 1, True),
    "5x5": ((2, 6, 14, 14), (16, 6, 5, 5), 1, 0, 1, 1, True),
    "5x5 padded": ((1, 16, 12, 12), (20, 16, 5, 5), 1, 2, 1, 1, True),
    "7x7 stem": ((2, 3, 31, 29), (17, 3, 7, 7), 2, 3, 1, 1, True),
    "11x11 stem": ((1, 3, 47, 45), (18, 3, 11, 11), 4, 2, 1, 1, True),
    "one channel": ((3, 1, 28, 28), (6, 1, 5, 5), 1, 2, 1, 1, True),
    "stride over kernel": ((2, 8, 13, 14), (9, 8, 2, 2), (3, 4), 0, 1, 1, True),
    "stride over an image one wide": ((2, 6, 6, 1), (12, 2, 2, 2), (1, 3), (1, 3), (1, 3), 3, True),
    "stride over an image one high": ((2, 20, 1, 9), (7, 20, 3, 3), (2, 1), 1, 1, 1, False),
    "dilated": ((2, 8, 15, 14), (12, 8, 3, 3), 1, 2, 2, 1, True),
    "dilated stride": ((2, 6, 17, 19), (7, 6, 3, 2), (2, 3), (2, 1), (2, 3), 1, True),
    "1x7": ((2, 16, 9, 9), (24, 16, 1, 7), 1, (0, 3), 1, 1, True),
    "7x1 stride": ((2, 16, 12, 9), (8, 16, 7, 1), (2, 1), (3, 0), 1, 1, False),
    "grouped": ((2, 16, 9, 8), (24, 4, 3, 3), 1, 1, 1, 4, True),
    "grouped stride": ((2, 12, 11, 10), (6, 4, 3, 3), 2, 1, 1, 3, True),
    "grouped wide": ((1, 64, 7, 7), (64, 32, 3, 3), 1, 1, 1, 2, False),
    "grouped 1x1": ((2, 12, 6, 5), (20, 6, 1, 1), 1, 0, 1, 2, True),
    "depthwise": ((2, 19, 12, 13), (19, 1, 3, 3), 1, 1, 1, 19, True),
    "depthwise stride": ((2, 16, 13, 12), (16, 1, 5, 5), 2, 2, 1, 16, True),
    "depthwise dilated": ((1, 8, 15, 14), (8, 1, 3, 3), 1, 2, 2, 8, False),
    "depthwise multiplied": ((2, 6, 9, 9), (18, 1, 3, 3), 1, 1, 1, 6, True),
    "depthwise multiplied stride": ((2, 3, 11, 10), (6, 1, 5, 5), 2, 2, 1, 3, True),
    "depthwise multiplied tall": ((1, 2, 90, 70), (4, 1, 3, 3), 1, 1, 1, 2, True),
    "depthwise wide": ((1, 5, 40, 131), (5, 1, 3, 3), 1, 1, 1, 5, True),
    "depthwise wide stride": ((1, 37, 41, 67), (37, 1, 3, 3), 2, 1, 1, 37, True),
    "depthwise 3x3 stride": ((2, 33, 15, 14), (33, 1, 3, 3), 2, 1, 1, 33, False),
    "depthwise many channels": ((1, 70, 9, 10), (70, 1, 3, 3), 1, 1, 1, 70, True),
    "depthwise 5x5": ((2, 17, 9, 16), (17, 1, 5, 5), 1, 2, 1, 17, True),
    "depthwise 7x7": ((1, 20, 15, 15), (20, 1, 7, 7), 1, 3, 1, 20, True),
    "depthwise 7x7 stride": ((1, 18, 16, 17), (18, 1, 7, 7), 2, 3, 1, 18, True),
    "depthwise small image": ((2, 24, 3, 2), (24, 1, 3, 3), 1, 1, 1, 24, True),
    "depthwise pixel": ((2, 16, 1, 1), (16, 1, 3, 3), 1, 1, 1, 16, True),
    "depthwise more padding than image": ((1, 19, 2, 3), (19, 1, 3, 3), 1, (5, 6), 1, 19, True),
    "depthwise few channels": ((2, 3, 17, 16), (3, 1, 3, 3), 1, 1, 1, 3, True),
    "depthwise other strides": ((2, 18, 13, 19), (18, 1, 3, 3), (1, 3), 1, 1, 18, True),
    "depthwise stride over kernel": ((1, 17, 10, 11), (17, 1, 2, 2), 3, 0, 1, 17, True),
    "depthwise dilated stride": ((1, 17, 17, 16), (17, 1, 3, 3), 2, 2, 2, 17, True),
    "depthwise 1x5": ((2, 16, 8, 15), (16, 1, 1, 5), 1, (0, 2), 1, 16, True),
    "depthwise even kernel": ((2, 16, 9, 16), (16, 1, 4, 2), 2, 1, 1, 16, True),
    "groups of 2": ((2, 40, 15, 16), (40, 2, 3, 3), 1, 1, 1, 20, True),
    "groups of 4": ((1, 36, 17, 31), (36, 4, 3, 3), 1, 1, 1, 9, True),
    "groups of 8": ((2, 24, 8, 9), (24, 8, 3, 3), 1, 1, 1, 3, False),
    "groups of 16": ((1, 48, 14, 14), (48, 16, 3, 3), 1, 1, 1, 3, True),
    "groups of 4 stride": ((2, 32, 15, 29), (32, 4, 3, 3), 2, 1, 1, 8, True),
    "groups of 4 dilated": ((1, 20, 16, 15), (20, 4, 3, 3), 1, 2, 2, 5, True),
    "groups of 4 5x5": ((1, 16, 9, 17), (16, 4, 5, 5), 1, 2, 1, 4, True),
    "groups of 4 1x1 stride": ((2, 16, 9, 16), (16, 4, 1, 1), 2, 0, 1, 4, False),
    "groups of 2 stride over kernel": ((1, 16, 10, 11), (16, 2, 2, 3), (3, 4), 1, 1, 8, True),
    "groups of 4 more padding than image": ((1, 16, 2, 3), (16, 4, 3, 3), 1, (4, 5), 1, 4, True),
    "groups of 4 rows one by one": ((1, 16, 5, 390), (16, 4, 3, 3), 1, 1, 1, 4, True),
    "groups of 6": ((1, 18, 8, 9), (18, 6, 3, 3), 1, 1, 1, 3, True),
    "output of one": ((3, 10, 4, 5), (11, 10, 4, 5), 1, 0, 1, 1, True),
    "one pixel": ((4, 20, 1, 1), (30, 20, 1, 1), 1, 0, 1, 1, True),
    "one pixel padded": ((2, 9, 1, 1), (10, 9, 3, 3), 1, 1, 1, 1, True),
}


def draw(case, layout=torch.contiguous_format, dtype=torch.float64):
    size, weight_size, *_, bias = case
    x = torch.randn(size, dtype=dtype).to(memory_format=layout).requires_grad_()
    w = (torch.randn(weight_size, dtype=dtype) / weight_size[1:].numel() ** 0.5).requires_grad_()
    b = torch.randn(weight_size[0], dtype=dtype).requires_grad_() if bias else None
    return [x, w] + ([b] if bias else [])


CASES = {name: (torch.Size(x), torch.Size(w), *rest) for name, (x, w, *rest) in CASES.items()}


def both(case):
    *_, stride, padding, dilation, groups, _bias = case

    def ours(x, w, b=None):
        return F.conv2d(x, w, b, stride, padding, dilation, groups)

    def theirs(x, w, b=None):
        return TF.conv2d(x, w, b, stride, padding, dilation, groups)

    return ours, theirs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_parity(name, dtype):
    case = CASES[name]
    ours, theirs = both(case)
    for layout in LAYOUTS:
        with dlkern.trace() as calls:
            for draws in (3, 64):  # where three draws do not keep the rule, many tell chance from a fault
                certificate = dlkern.testing.check(
                    ours, theirs, lambda layout=layout: draw(case, layout), dtype=dtype, draws=draws,
                    name=f"{name} {layout}",
                )
                if certificate.ok:
                    break
        certificate.raise_if_failed()
        assert {call.backend for call in calls} == {"cpu"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_exact_on_integers(name, dtype):
    """Sums of small integers are exact in any order: every bit must be torch's."""
    case = CASES[name]
    ours, theirs = both(case)
    for layout in LAYOUTS:
        inputs = [torch.randint(-4, 5, t.shape).to(t).to(memory_format=layout if t.dim() == 4 else torch.contiguous_format)
                  .to(dtype).requires_grad_() for t in draw(case)]  # fmt: skip
        outputs = [f(*inputs) for f in (ours, theirs)]
        assert torch.equal(*outputs)
        # in the layout of the output, as the layer above gives it: it decides which kernel takes the gradients
        cotangent = torch.empty_like(outputs[0]).copy_(torch.randint(-4, 5, outputs[0].shape))
        for actual, expected in zip(*(torch.autograd.grad(y, inputs, cotangent) for y in outputs)):
            assert torch.equal(actual, expected)


@pytest.mark.parametrize("groups", [1, 2])
def test_a_handful_of_products_is_rounded_once(groups):
    """The weight gradient of a tiny convolution is summed in double; all mixtures of layouts."""
    for layout in LAYOUTS:
        for gradient_layout in LAYOUTS:
            x = torch.randn(2, 4, 3, 4).to(memory_format=layout)
            w = torch.randn(2, 4 // groups, 2, 2, requires_grad=True)
            cotangent = torch.randn(2, 2, 4, 3).to(memory_format=gradient_layout)
            settings = dict(stride=(1, 2), padding=1, groups=groups)
            (actual,) = torch.autograd.grad(F.conv2d(x, w, **settings), w, cotangent)
            exact = TF.conv2d(x.double(), w.double(), **settings)
            (expected,) = torch.autograd.grad(exact, w, cotangent.double())
            assert torch.equal(actual, expected.float())


@pytest.mark.parametrize("name", CASES)
def test_formats_are_torchs(name):
    case = CASES[name]
    ours, theirs = both(case)
    for layout in LAYOUTS:
        for weight_layout in LAYOUTS:
            x, w, *b = draw(case, layout, torch.float32)
            w = w.detach().to(memory_format=weight_layout).requires_grad_()
            outputs = [f(x, w, *b) for f in (ours, theirs)]
            assert outputs[0].stride() == outputs[1].stride()
            torch.testing.assert_close(outputs[0], outputs[1])
            cotangent = torch.randn_like(outputs[0])
            a, e = (torch.autograd.grad(y, (x, w), cotangent) for y in outputs)
            for actual, expected in zip(a, e):
                torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
                plain = not (x.is_contiguous(memory_format=torch.channels_last) and x.is_contiguous())
                if plain and min(expected.shape) > 1:
                    assert actual.stride() == expected.stride()


@pytest.mark.parametrize("groups,stride,padding,dilation", [(1, 1, 1, 1), (2, 2, 0, 1), (4, (1, 2), (2, 1), 2)])
def test_derivatives(groups, stride, padding, dilation):
    x = torch.randn(2, 4, 5, 6, dtype=torch.float64, requires_grad=True)
    w = torch.randn(4, 4 // groups, 3, 2, dtype=torch.float64, requires_grad=True)
    b = torch.randn(4, dtype=torch.float64, requires_grad=True)
    f = lambda *args: F.conv2d(*args, stride, padding, dilation, groups)  # noqa: E731
    assert torch.autograd.gradcheck(f, (x, w, b))
    assert torch.autograd.gradgradcheck(f, (x, w, b))


def test_third_order_and_functional_transforms():
    x, w = torch.randn(2, 3, 5, 5, dtype=torch.float64), torch.randn(4, 3, 3, 3, dtype=torch.float64)

    def second(conv):
        inner = lambda w: torch.func.grad(lambda x: conv(x, w, None, 1, 1).pow(3).sum())(x).pow(2).sum()  # noqa: E731
        return torch.func.grad(inner)(w)

    torch.testing.assert_close(second(F.conv2d), second(TF.conv2d))
    per_sample = lambda conv: torch.func.vmap(  # noqa: E731
        torch.func.grad(lambda w, x: conv(x, w, None, 1, 1).pow(2).sum()), (None, 0)
    )(w, x[:, None])
    torch.testing.assert_close(per_sample(F.conv2d), per_sample(TF.conv2d))

    def third(conv):
        a, c = x.clone().requires_grad_(), w.clone().requires_grad_()
        (g,) = torch.autograd.grad(conv(a, c, None, 1, 1).pow(3).sum(), a, create_graph=True)
        (g,) = torch.autograd.grad(g.pow(2).sum(), c, create_graph=True)
        return torch.autograd.grad(g.pow(2).sum(), a)[0]

    torch.testing.assert_close(third(F.conv2d), third(TF.conv2d))


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 2)])
def test_only_the_gradients_asked_for(wanted):
    case = CASES["3x3"]
    ours, theirs = both(case)
    drawn = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(draw(case, dtype=torch.float64))]
    for actual, expected in zip(*(
        torch.autograd.grad(f(*drawn).sin().sum(), [drawn[i] for i in wanted]) for f in (ours, theirs)
    )):
        torch.testing.assert_close(actual, expected)


def test_any_strides():
    ours, theirs = both((None, None, 1, 1, 1, 1, True))
    base = torch.randn(4, 6, 11, 20)
    w, b = torch.randn(8, 10, 3, 3)[:, ::2, :, ::1], torch.randn(16)[::2]
    w = w[:, :3]
    for x in (base[:, ::2, ::3, 1::2], base[:, 3:], base.transpose(2, 3)[:, :3], base[:1, :3].expand(5, 3, 11, 20)):
        torch.testing.assert_close(ours(x, w, b), theirs(x, w, b), rtol=1e-4, atol=1e-5)
        assert ours(x, w, b).stride() == theirs(x, w, b).stride()
    x = base[:, :3].clone().requires_grad_()
    w = w.clone().requires_grad_()
    for cotangent in (torch.ones(()).expand(4, 8, 11, 20), torch.randn(4, 8, 20, 11).transpose(2, 3)):
        a, e = (torch.autograd.grad(f(x, w, b), (x, w), cotangent) for f in (ours, theirs))
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("kernel,dilation", [((3, 3), 1), ((2, 4), 1), ((3, 2), (2, 3)), ((1, 1), 1)])
def test_padding_in_words(padding, kernel, dilation):
    for layout in LAYOUTS:
        x = torch.randn(2, 4, 9, 10).to(memory_format=layout).requires_grad_()
        w = torch.randn(6, 4, *kernel, requires_grad=True)
        with dlkern.trace() as calls:
            y = F.conv2d(x, w, padding=padding, dilation=dilation)
        assert [call.backend for call in calls] == ["cpu"]
        e = TF.conv2d(x, w, padding=padding, dilation=dilation)
        assert y.stride() == e.stride()
        torch.testing.assert_close(y, e, rtol=1e-4, atol=1e-5)
        c = torch.randn_like(y)
        torch.testing.assert_close(
            torch.autograd.grad(y, (x, w), c), torch.autograd.grad(e, (x, w), c), rtol=1e-4, atol=1e-4
        )


def test_unbatched_and_empty_batch():
    x, w, b = torch.randn(3, 8, 9), torch.randn(4, 3, 3, 3, requires_grad=True), torch.randn(4, requires_grad=True)
    torch.testing.assert_close(F.conv2d(x, w, b, (2,), 1), TF.conv2d(x, w, b, (2,), 1))
    empty = torch.randn(0, 3, 8, 9, requires_grad=True)
    y = F.conv2d(empty, w, b)
    assert y.shape == TF.conv2d(empty, w, b).shape
    gradients = torch.autograd.grad(y.sum(), (empty, w, b))
    assert [g.shape for g in gradients] == [empty.shape, w.shape, b.shape]
    assert not gradients[1].any() and not gradients[2].any()


def test_special_values():
    x = torch.randn(1, 3, 6, 7)
    x[0, 0, 2, 2], x[0, 1, 4, 5], x[0, 2, 0, 0] = float("nan"), float("inf"), 1e38
    w = torch.randn(5, 3, 3, 3)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        ours = F.conv2d(x.to(dtype), w.to(dtype), None, 1, 1)
        # In float32: with AMX, torch's bfloat16 has NaN where a window does not see it.
        theirs = TF.conv2d(x.to(dtype).float(), w.to(dtype).float(), None, 1, 1)
        assert torch.equal(ours.isnan(), theirs.isnan())
        assert torch.equal(ours.isinf(), theirs.isinf())


def test_weights_may_change_between_calls():
    x, w = torch.randn(1, 8, 6, 6), torch.nn.Parameter(torch.randn(8, 8, 3, 3))
    F.conv2d(x, w)
    w.data.mul_(-2)
    torch.testing.assert_close(F.conv2d(x, w), TF.conv2d(x, w), rtol=1e-4, atol=1e-5)


def test_autocast_gives_torchs_dtypes():
    x, w, b = torch.randn(1, 3, 6, 6), torch.randn(4, 3, 3, 3, requires_grad=True), torch.randn(4)
    with torch.autocast("cpu", torch.bfloat16):
        for args in ((x, w, b), (x.bfloat16(), w, b), (x.double(), w.double(), b.double())):
            assert F.conv2d(*args).dtype == TF.conv2d(*args).dtype
        y = F.conv2d(x, w, b)
    y.float().sum().backward()
    assert w.grad.dtype == torch.float32


WRONG = {
    "2-D input": lambda x, w, b: dict(input=x[0, 0], weight=w),
    "5-D input": lambda x, w, b: dict(input=x[None], weight=w),
    "3-D weight": lambda x, w, b: dict(input=x, weight=w[0]),
    "channels": lambda x, w, b: dict(input=x, weight=w[:, :3]),
    "channels unbatched": lambda x, w, b: dict(input=x[0], weight=w[:, :3]),
    "no groups": lambda x, w, b: dict(input=x, weight=w, groups=0),
    "groups": lambda x, w, b: dict(input=x, weight=w, groups=3),
    "output groups": lambda x, w, b: dict(input=x, weight=w[:7, :2], groups=2),
    "bias size": lambda x, w, b: dict(input=x, weight=w, bias=b[:7]),
    "bias 2-D": lambda x, w, b: dict(input=x, weight=w, bias=b[:, None]),
    "stride 0": lambda x, w, b: dict(input=x, weight=w, stride=0),
    "stride -1": lambda x, w, b: dict(input=x, weight=w, stride=(1, -1)),
    "three strides": lambda x, w, b: dict(input=x, weight=w, stride=(1, 1, 1)),
    "padding -1": lambda x, w, b: dict(input=x, weight=w, padding=-1),
    "padding 1.0": lambda x, w, b: dict(input=x, weight=w, padding=1.0),
    "padding word": lambda x, w, b: dict(input=x, weight=w, padding="foo"),
    "same with stride": lambda x, w, b: dict(input=x, weight=w, padding="same", stride=2),
    "dilation 0": lambda x, w, b: dict(input=x, weight=w, dilation=0),
    "dilation 0 same": lambda x, w, b: dict(input=x, weight=w, dilation=0, padding="same"),
    "kernel larger than input": lambda x, w, b: dict(input=x, weight=w, dilation=(3, 1)),
    "weight dtype": lambda x, w, b: dict(input=x, weight=w.double()),
    "bias dtype": lambda x, w, b: dict(input=x, weight=w, bias=b.double()),
    "empty image": lambda x, w, b: dict(input=x[:, :, :0], weight=w, padding=2),
    "no filters": lambda x, w, b: dict(input=x, weight=w[:0]),
    "no tensor": lambda x, w, b: dict(input=None, weight=w),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name):
    x, w, b = torch.randn(2, 4, 6, 6), torch.randn(8, 4, 3, 3), torch.randn(8)
    arguments = WRONG[name](x, w, b)
    with pytest.raises(Exception) as theirs:
        TF.conv2d(**arguments)
    with pytest.raises(type(theirs.value)) as ours:
        F.conv2d(**arguments)
    if not isinstance(theirs.value, TypeError):  # torch's argument parser spells out how it was called
        assert str(ours.value) == str(theirs.value)


X, W, B, GY = torch.randn(2, 4, 6, 6), torch.randn(8, 4, 3, 3), torch.randn(8), torch.randn(2, 8, 4, 4)
PLAIN = ((1, 1), (0, 0), (1, 1), 1)
NONSENSE = {
    "3-D input": ("forward", X[0], W, None, *PLAIN),
    "3-D weight": ("forward", X, W[0], None, *PLAIN),
    "channels": ("forward", X, W[:, :3], None, *PLAIN),
    "no channels": ("forward", X[:, :0], W[:, :0], None, *PLAIN),
    "empty image": ("forward", X[:, :, :0], W, None, (1, 1), (3, 3), (1, 1), 1),
    "empty kernel": ("forward", X, W[:, :, :0], None, *PLAIN),
    "bias": ("forward", X, W, B[:3], *PLAIN),
    "2-D bias": ("forward", X, W, B[None], *PLAIN),
    "weight dtype": ("forward", X, W.double(), None, *PLAIN),
    "complex": ("forward", X.cfloat(), W.cfloat(), None, *PLAIN),
    "ints": ("forward", X.long(), W.long(), None, *PLAIN),
    "one stride": ("forward", X, W, None, (1,), (0, 0), (1, 1), 1),
    "no padding": ("forward", X, W, None, (1, 1), (), (1, 1), 1),
    "three dilations": ("forward", X, W, None, (1, 1), (0, 0), (1, 1, 1), 1),
    "stride 0": ("forward", X, W, None, (0, 1), (0, 0), (1, 1), 1),
    "padding -1": ("forward", X, W, None, (1, 1), (0, -1), (1, 1), 1),
    "padding huge": ("forward", X, W, None, (1, 1), (2**62, 2**62), (1, 1), 1),
    "padding large": ("forward", X, W, None, (1, 1), (2**31 - 1, 2**31 - 1), (1, 1), 1),
    "dilation huge": ("forward", X, W, None, (1, 1), (0, 0), (2**62, 2**62), 1),
    "groups 0": ("forward", X, W, None, (1, 1), (0, 0), (1, 1), 0),
    "groups 3": ("forward", X, W, None, (1, 1), (0, 0), (1, 1), 3),
    "kernel larger": ("forward", X[..., :2], W, None, *PLAIN),
    "input size of 3": ("backward_input", GY, W, (2, 4, 6), *PLAIN, False),
    "input size other": ("backward_input", GY, W, (2, 4, 7, 6), *PLAIN, False),
    "input size negative": ("backward_input", GY, W, (2, 4, -6, 6), *PLAIN, False),
    "input size huge": ("backward_input", GY, W, (2**40, 4, 6, 6), *PLAIN, True),
    "grad_output 3-D": ("backward_input", GY[0], W, (2, 4, 6, 6), *PLAIN, False),
    "grad_output dtype": ("backward_input", GY.double(), W, (2, 4, 6, 6), *PLAIN, False),
    "grad_output channels": ("backward_input", GY[:, :7], W, (2, 4, 6, 6), *PLAIN, False),
    "weight size": ("backward_weight", GY, X, (8, 4, 3), *PLAIN, True, False),
    "weight size other": ("backward_weight", GY, X, (8, 4, 3, 2), *PLAIN, True, False),
    "weight size zero": ("backward_weight", GY, X, (8, 4, 0, 3), *PLAIN, True, False),
    "weight size huge": ("backward_weight", GY, X, (8, 2**62, 3, 3), *PLAIN, True, False),
    "weight groups": ("backward_weight", GY, X, (8, 4, 3, 3), (1, 1), (0, 0), (1, 1), -1, True, False),
    "weight batch": ("backward_weight", GY[:1], X, (8, 4, 3, 3), *PLAIN, True, False),
    "weight input dtype": ("backward_weight", GY, X.double(), (8, 4, 3, 3), *PLAIN, True, False),
}


@pytest.mark.parametrize("name", NONSENSE)
def test_nonsense_raises(name):
    op, *arguments = NONSENSE[name]
    with pytest.raises((ValueError, IndexError, RuntimeError)):
        raw[f"conv2d_{op}"]["cpu"](*arguments)


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_module(mode):
    settings = dict(kernel_size=3, padding=(1, 2), bias=False, padding_mode=mode)
    theirs = torch.nn.Conv2d(4, 6, **settings)
    ours = dlkern.nn.Conv2d(4, 6, **settings)
    ours.load_state_dict(theirs.state_dict())
    assert isinstance(ours, torch.nn.Conv2d) and repr(ours) == repr(theirs)
    x = torch.randn(2, 4, 7, 8)
    with dlkern.trace() as calls:
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)
    assert [(call.op, call.backend) for call in calls] == [("conv2d", "cpu")]
    torch.testing.assert_close(ours(x[0]), theirs(x[0]), rtol=1e-4, atol=1e-5)


def test_lazy_module_becomes_ours():
    module = dlkern.nn.LazyConv2d(6, 3, padding="same")
    y = module(torch.randn(2, 5, 7, 7))
    assert type(module) is dlkern.nn.Conv2d and y.shape == (2, 6, 7, 7) and module.in_channels == 5


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_opcheck(layout):
    x, w, gy = X.to(memory_format=layout), W.to(memory_format=layout), GY.to(memory_format=layout)
    last = layout == torch.channels_last
    torch.library.opcheck(raw["conv2d_forward"]["cpu"], (x, w, B, *PLAIN))
    torch.library.opcheck(raw["conv2d_backward_input"]["cpu"], (gy, w, (2, 4, 6, 6), *PLAIN, last))
    torch.library.opcheck(raw["conv2d_backward_weight"]["cpu"], (gy, x, (8, 4, 3, 3), *PLAIN, True, last))


def test_complex_numbers_are_left_to_torch():
    x, w = X.cfloat(), W.cfloat()
    with dlkern.trace() as calls:
        torch.testing.assert_close(F.conv2d(x, w), TF.conv2d(x, w))
    assert calls[0].backend == "torch" and calls[0].reason


def test_forced_columns():
    with dlkern.backend("triton"), pytest.raises(RuntimeError, match="emulated"):
        F.conv2d(X, W)
    with dlkern.backend("reference"), dlkern.trace() as calls:
        assert torch.equal(F.conv2d(X, W), TF.conv2d(X, W))
    assert calls[0].backend == "reference"
    assert columns.state.forced == "auto"


def test_compiled_equals_eager():
    w, b = W.clone().requires_grad_(), B.clone().requires_grad_()
    f = lambda x: F.conv2d(x, w, b, 1, "same").sin()  # noqa: E731
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (3, 5):
        for layout in LAYOUTS:
            x = torch.randn(n, 4, 6, 6).to(memory_format=layout)
            assert torch.equal(compiled(x), f(x))
            a, e = (torch.autograd.grad(g(x).sum(), (w, b)) for g in (compiled, f))
            assert torch.equal(a[0], e[0]) and torch.equal(a[1], e[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize(
    "x, w, stride, padding, dilation, groups",
    [
        ((16, 64, 1, 1), (40, 64, 3, 3), 1, 1, 1, 1), ((7, 70, 2, 2), (33, 70, 3, 3), 1, 1, 1, 1),
        ((4, 48, 3, 2), (64, 48, 5, 5), 1, 2, 1, 1), ((5, 64, 4, 5), (26, 32, 3, 3), 2, 1, 1, 2),
        ((3, 36, 5, 6), (50, 36, 3, 3), 1, 4, 4, 1), ((2, 40, 9, 8), (30, 40, 3, 3), 1, 0, 1, 1),
        ((6, 33, 4, 4), (20, 33, 1, 1), 2, 0, 1, 1), ((4, 20, 3, 3), (40, 20, 3, 3), 1, 1, 1, 1),
        ((1, 32, 2, 2), (34, 32, 3, 3), 3, 3, 1, 1),
    ],
    ids=["1x1", "2x2", "5x5", "stride, groups", "dilation", "no padding", "one tap", "merged taps", "taps in padding alone"],
)  # fmt: skip
def test_weight_gradient_of_few_pixels(x, w, stride, padding, dilation, groups, dtype):
    """One band of pixels; taps that see few of them, or none. Exact, on small integers."""
    for layout in (torch.contiguous_format, torch.channels_last):
        x_, w_ = (torch.randint(-1, 2, s).to(dtype).to(memory_format=layout) for s in (x, w))
        w_.requires_grad_()
        for threads in (1, 2):
            before = torch.get_num_threads()
            torch.set_num_threads(threads)
            try:
                y = F.conv2d(x_, w_, None, stride, padding, dilation, groups)
                grad = torch.randint(-1, 2, y.shape).to(dtype).to(memory_format=layout)
                (found,) = torch.autograd.grad(y, w_, grad)
            finally:
                torch.set_num_threads(before)
            exact = torch.nn.grad.conv2d_weight(x_.double(), w, grad.double(), stride, padding, dilation, groups)
            assert torch.equal(found.double(), exact)

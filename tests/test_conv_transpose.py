"""conv_transpose2d, and the 1-D forms of both: exactness over test_conv's shapes, derivatives, modules, torch's errors."""

import itertools

import pytest
import test_conv
import torch
import torch.nn.functional as TF

import dlkern
import dlkern.nn.functional as F
from dlkern.ops._registry import raw

LAYOUTS = [torch.contiguous_format, torch.channels_last]


def transposed(name):
    """A convolution of test_conv the other way: its result's size in, as near to its input's size out as strides allow."""
    size, weight_size, stride, padding, dilation, groups, bias = test_conv.CASES[name]
    two = [v if isinstance(v, tuple) else (v, v) for v in (stride, padding, dilation)]
    out, more = [], []
    for n, k, s, p, d in zip(size[2:], weight_size[2:], *two):
        out.append((n + 2 * p - d * (k - 1) - 1) // s + 1)
        more.append((n + 2 * p - d * (k - 1) - 1) % s)
    shape = (size[0], weight_size[0], *out)
    return shape, weight_size, size[1] if bias else None, (*two[:2], tuple(more), groups, two[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", test_conv.CASES)
def test_exact_on_integers(name, dtype):
    """Sums of small integers are exact in any order: every bit must be torch's."""
    shape, weight_size, outputs, settings = transposed(name)
    for layout in LAYOUTS:
        sizes = [shape, weight_size, *([(outputs,)] if outputs else [])]
        inputs = [torch.randint(-4, 5, size).to(dtype) for size in sizes]
        inputs[0] = inputs[0].to(memory_format=layout)
        inputs = [t.requires_grad_() for t in inputs]
        b = inputs[2] if outputs else None
        with dlkern.trace() as calls:
            ours = F.conv_transpose2d(*inputs[:2], b, *settings)
        assert [(c.op, c.backend) for c in calls] == [("conv_transpose2d", "cpu")]
        theirs = TF.conv_transpose2d(*inputs[:2], b, *settings)
        assert torch.equal(ours, theirs) and ours.shape[2:] == test_conv.CASES[name][0][2:]
        cotangent = torch.randint(-4, 5, ours.shape).to(ours)
        for actual, expected in zip(*(torch.autograd.grad(y, inputs, cotangent) for y in (ours, theirs))):
            assert torch.equal(actual, expected)


@pytest.mark.parametrize("name", ["1x1", "3x3", "3x3 stride", "7x7 stem", "stride over kernel", "grouped", "depthwise stride"])
def test_formats_are_torchs(name):
    shape, weight_size, _, settings = transposed(name)
    for layout in LAYOUTS:
        for weight_layout in LAYOUTS:
            x = torch.randn(shape).to(memory_format=layout).requires_grad_()
            w = torch.randn(weight_size).to(memory_format=weight_layout).requires_grad_()
            outputs = [f(x, w, None, *settings) for f in (F.conv_transpose2d, TF.conv_transpose2d)]
            assert outputs[0].stride() == outputs[1].stride()


@pytest.mark.parametrize("dims,groups,stride,padding,more,dilation", [
    (2, 1, 1, 1, 0, 1), (2, 2, 2, 0, 1, 1), (2, 2, (1, 2), (2, 1), (2, 1), (3, 2)), (1, 1, 2, 1, 1, 1), (1, 4, 1, 0, 1, 2),
])
def test_derivatives(dims, groups, stride, padding, more, dilation):
    x = torch.randn(2, 4, *(4, 3)[:dims], dtype=torch.float64, requires_grad=True)
    w = torch.randn(4, 4 // groups, *(3, 2)[:dims], dtype=torch.float64, requires_grad=True)
    b = torch.randn(4, dtype=torch.float64, requires_grad=True)
    function = F.conv_transpose2d if dims == 2 else F.conv_transpose1d
    f = lambda *args: function(*args, stride, padding, more, groups, dilation)  # noqa: E731
    assert torch.autograd.gradcheck(f, (x, w, b))
    assert torch.autograd.gradgradcheck(f, (x, w, b))
    assert torch.equal(f(x, w, b), f(x[:], w.clone(), b)) and torch.allclose(f(x[0], w, b), f(x, w, b)[0])


def test_only_the_gradients_asked_for():
    inputs = [torch.randn(2, 3, 4, 4), torch.randn(3, 5, 3, 3), torch.randn(5)]
    full = [t.clone().requires_grad_() for t in inputs]
    expected = torch.autograd.grad(F.conv_transpose2d(*full).square().sum(), full)
    for i in range(3):
        some = [t.clone().requires_grad_(i == j) for j, t in enumerate(inputs)]
        (gradient,) = torch.autograd.grad(F.conv_transpose2d(*some).square().sum(), some[i])
        assert torch.equal(gradient, expected[i])


@pytest.mark.parametrize("size,kernel", [(7, 3), (6, 4)])
@pytest.mark.parametrize("padding", ["same", "valid", 2])
def test_sequences(size, kernel, padding):
    """conv1d takes every layout, and gives torch's: contiguous, whatever the input's, but where the weight's is not."""
    weight = torch.randint(-3, 4, (5, 3, kernel)).float()
    batch = torch.randint(-3, 4, (2, size, 3)).float().transpose(1, 2)
    for w in (weight, weight.transpose(1, 2).contiguous().transpose(1, 2)):
        for x in (batch, batch.contiguous(), batch[0]):
            ours, theirs = (f(x, w, torch.arange(5.0), padding=padding) for f in (F.conv1d, TF.conv1d))
            assert torch.equal(ours, theirs) and ours.stride() == theirs.stride()


WRONG = {
    "2-D input": lambda x, w: dict(input=x[0, 0], weight=w),
    "3-D weight": lambda x, w: dict(input=x, weight=w[0]),
    "channels": lambda x, w: dict(input=x, weight=w[:3]),
    "groups": lambda x, w: dict(input=x, weight=w, groups=3),
    "no groups": lambda x, w: dict(input=x, weight=w, groups=0),
    "bias size": lambda x, w: dict(input=x, weight=w, bias=torch.zeros(4)),
    "bias dtype": lambda x, w: dict(input=x, weight=w, bias=torch.zeros(8).double()),
    "stride 0": lambda x, w: dict(input=x, weight=w, stride=0),
    "three strides": lambda x, w: dict(input=x, weight=w, stride=(1, 1, 1)),
    "padding -1": lambda x, w: dict(input=x, weight=w, padding=-1),
    "padding word": lambda x, w: dict(input=x, weight=w, padding="same"),
    "padding over the output": lambda x, w: dict(input=x, weight=w, padding=5),
    "output_padding -1": lambda x, w: dict(input=x, weight=w, output_padding=-1),
    "output_padding": lambda x, w: dict(input=x, weight=w, stride=2, output_padding=2),
    "dilation 0": lambda x, w: dict(input=x, weight=w, dilation=0),
    "weight dtype": lambda x, w: dict(input=x, weight=w.double()),
    "empty image": lambda x, w: dict(input=x[:, :, :0], weight=w),
    "no tensor": lambda x, w: dict(input=None, weight=w),
}


@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name, dims):
    shape = (4, 4)[:dims]
    arguments = WRONG[name](torch.randn(2, 4, *shape), torch.randn(4, 8, *shape))
    with pytest.raises(Exception) as theirs:
        getattr(TF, f"conv_transpose{dims}d")(**arguments)
    with pytest.raises(type(theirs.value)) as ours:
        getattr(F, f"conv_transpose{dims}d")(**arguments)
    if not isinstance(theirs.value, TypeError):  # torch's argument parser spells out how it was called
        assert str(ours.value) == str(theirs.value)


X, W, B = torch.randn(2, 4, 6, 6), torch.randn(4, 8, 3, 3), torch.randn(8)
PLAIN = ((1, 1), (0, 0), (0, 0), 1, (1, 1))
NONSENSE = {
    "3-D input": (X[0], W, None, *PLAIN),
    "3-D weight": (X, W[0], None, *PLAIN),
    "channels": (X, W[:3], None, *PLAIN),
    "empty image": (X[:, :, :0], W, None, *PLAIN),
    "empty kernel": (X, W[:, :, :0], None, *PLAIN),
    "bias": (X, W, B[:3], *PLAIN),
    "weight dtype": (X, W.double(), None, *PLAIN),
    "complex": (X.cfloat(), W.cfloat(), None, *PLAIN),
    "one stride": (X, W, None, (1,), (0, 0), (0, 0), 1, (1, 1)),
    "no output_padding": (X, W, None, (1, 1), (0, 0), (), 1, (1, 1)),
    "output_padding of a stride": (X, W, None, (2, 2), (0, 0), (0, 2), 1, (1, 1)),
    "output_padding -1": (X, W, None, (2, 2), (0, 0), (0, -1), 1, (1, 1)),
    "stride 0": (X, W, None, (0, 1), (0, 0), (0, 0), 1, (1, 1)),
    "stride huge": (X, W, None, (2**62, 1), (0, 0), (0, 0), 1, (1, 1)),
    "stride large": (X, W, None, (2**31 - 1, 2**31 - 1), (0, 0), (0, 0), 1, (1, 1)),
    "padding over the output": (X, W, None, (1, 1), (4, 4), (0, 0), 1, (1, 1)),
    "padding huge": (X, W, None, (1, 1), (2**62, 0), (0, 0), 1, (1, 1)),
    "dilation huge": (X, W, None, (1, 1), (0, 0), (0, 0), 1, (2**62, 1)),
    "groups 0": (X, W, None, (1, 1), (0, 0), (0, 0), 0, (1, 1)),
    "groups huge": (X, W, None, (1, 1), (0, 0), (0, 0), 2**62, (1, 1)),
}


@pytest.mark.parametrize("name", NONSENSE)
def test_nonsense_raises(name):
    with pytest.raises((ValueError, IndexError, RuntimeError)):
        raw["conv_transpose2d_forward"]["cpu"](*NONSENSE[name])


@pytest.mark.parametrize("x", [X[0], X.cfloat(), X.long()], ids=["3-D", "complex", "ints"])
def test_nonsense_for_the_bias_gradient_raises(x):
    with pytest.raises((ValueError, IndexError, RuntimeError)):
        raw["conv2d_backward_bias"]["cpu"](x)


def modules(dims):
    settings = dict(kernel_size=4, stride=2, padding=1, groups=2)
    name = f"ConvTranspose{dims}d"
    theirs = getattr(torch.nn, name)(4, 6, **settings)
    ours = getattr(dlkern.nn, name)(4, 6, **settings)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs, torch.randn(2, 4, *(5, 7)[:dims])


@pytest.mark.parametrize("dims", [1, 2])
def test_module(dims):
    ours, theirs, x = modules(dims)
    assert isinstance(ours, type(theirs)) and repr(ours) == repr(theirs)
    for size in (None, [11, 14][:dims]):
        with dlkern.trace() as calls:
            actual = ours(x, size)
        assert [(c.op, c.backend) for c in calls] == [(f"conv_transpose{dims}d", "cpu")]
        expected = theirs(x, size)
        assert actual.shape == expected.shape
        dlkern.testing.check(
            lambda x, s=size: ours.to(x.dtype)(x, s), lambda x, s=size: theirs.to(x.dtype)(x, s),
            lambda: [torch.randn(2, 4, *(5, 7)[:dims], requires_grad=True)], draws=8, name="module",
        ).raise_if_failed()
    with pytest.raises(ValueError, match="requested an output size") as error:
        ours(x, [30, 30][:dims])
    with pytest.raises(ValueError) as expected:
        theirs(x, [30, 30][:dims])
    assert str(error.value) == str(expected.value)


def test_modes_of_padding():
    for cls in ("ConvTranspose1d", "ConvTranspose2d"):
        with pytest.raises(ValueError, match='Only "zeros" padding mode is supported'):
            getattr(dlkern.nn, cls)(4, 6, 3, padding_mode="reflect")
    theirs = torch.nn.Conv1d(4, 6, 3, padding=2, padding_mode="circular")
    ours = dlkern.nn.Conv1d(4, 6, 3, padding=2, padding_mode="circular")
    ours.load_state_dict(theirs.state_dict())
    dlkern.testing.check(
        lambda x: ours.to(x.dtype)(x), lambda x: theirs.to(x.dtype)(x), lambda: [torch.randn(2, 4, 9, requires_grad=True)],
        draws=8, name="circular",
    ).raise_if_failed()


@pytest.mark.parametrize("name,size", [("Conv1d", (7,)), ("ConvTranspose1d", (7,)), ("ConvTranspose2d", (7, 6))])
def test_lazy_modules_become_ours(name, size):
    module = getattr(dlkern.nn, f"Lazy{name}")(6, 3)
    y = module(torch.randn(2, 5, *size))
    assert type(module) is getattr(dlkern.nn, name) and y.shape[1] == 6 and module.in_channels == 5


def test_a_generator_converts():
    """DCGAN's generator: transposed convolutions, batch norm, activations."""
    torch.manual_seed(0)
    layers, channels = [], (16, 12, 8, 3)
    for c, k in itertools.pairwise(channels):
        layers += [torch.nn.ConvTranspose2d(c, k, 4, 2, 1, bias=False), torch.nn.BatchNorm2d(k), torch.nn.ReLU()]
    model = torch.nn.Sequential(torch.nn.ConvTranspose2d(10, 16, 4, 1, 0, bias=False), *layers[:-2], torch.nn.Tanh())
    z = torch.randn(3, 10, 1, 1)
    expected = model(z)
    dlkern.convert(model)
    with dlkern.trace() as calls:
        actual = model(z)
    assert actual.shape == (3, 3, 32, 32) and {c.backend for c in calls} == {"cpu"}
    assert sum(c.op == "conv_transpose2d" for c in calls) == 4
    torch.testing.assert_close(actual, expected)

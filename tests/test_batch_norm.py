"""batch_norm against NumPy in float64, torch's semantics call by call, hard inputs, fused forms; what every op promises is
in test_contract.py."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as tF

import dlkern
import dlkern.nn.functional as F
from dlkern.testing import compare

Activation = dlkern.Activation
ACTIVATIONS = {
    None: lambda x: x, Activation.RELU: torch.relu, Activation.TANH: torch.tanh, Activation.SIGMOID: torch.sigmoid,
}
EPS = 1e-5


def numpy_batch_norm(x, weight=None, bias=None, eps=EPS):
    """Output, mean and biased variance, written apart from everything else."""
    x = x.detach().double().numpy()
    axes = tuple(d for d in range(x.ndim) if d != 1)
    keep = [1, -1] + [1] * (x.ndim - 2)
    mean, var = x.mean(axes), x.var(axes)
    y = (x - mean.reshape(keep)) / np.sqrt(var.reshape(keep) + eps)
    if weight is not None:
        y = y * weight.detach().double().numpy().reshape(keep) + bias.detach().double().numpy().reshape(keep)
    return torch.from_numpy(y), torch.from_numpy(mean), torch.from_numpy(var)


def numpy_backward(x, grad, weight, eps=EPS):
    """Gradients of input, weight and bias by the formula of Ioffe and Szegedy 2015."""
    x, g, w = (t.detach().double().numpy() for t in (x, grad, weight))
    axes = tuple(d for d in range(x.ndim) if d != 1)
    keep = [1, -1] + [1] * (x.ndim - 2)
    mean, invstd = x.mean(axes).reshape(keep), 1 / np.sqrt(x.var(axes) + eps).reshape(keep)
    n = x.size // x.shape[1]
    normal = (x - mean) * invstd
    grad_bias, grad_weight = g.sum(axes), (g * normal).sum(axes)
    grad_input = w.reshape(keep) * invstd * (g - grad_bias.reshape(keep) / n - normal * grad_weight.reshape(keep) / n)
    return [torch.from_numpy(t) for t in (grad_input, grad_weight, grad_bias)]


def to_layout(x, channels_last):
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.contiguous(memory_format=formats[x.dim()]) if channels_last and x.dim() in formats else x


def run(namespace, x, weight, bias, grad, dtype, channels_last):
    leaves = [to_layout(x.to(dtype), channels_last).requires_grad_(), *(t.to(dtype).requires_grad_() for t in (weight, bias))]
    y = namespace.batch_norm(leaves[0], None, None, leaves[1], leaves[2], True, 0.1, EPS)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad.to(dtype))]


def against_numpy(shape, dtype=torch.float32, channels_last=False, draws=4, make=torch.randn):
    """The rule of dlkern.testing, with NumPy as the reference."""
    columns = []
    for seed in range(draws):
        torch.manual_seed(seed)
        x = make(shape).to(dtype).double()
        weight, bias, grad = (torch.randn(s).to(dtype).double() for s in (shape[1], shape[1], shape))
        exact = [numpy_batch_norm(x, weight, bias)[0], *numpy_backward(x, grad, weight)]
        ours, torchs = (run(f, x, weight, bias, grad, dtype, channels_last) for f in (F, tF))
        columns.append((ours, torchs, exact))
    for i, name in enumerate(("output", "grad input", "grad weight", "grad bias")):
        rows = compare(name, *([c[k][i] for c in columns] for k in range(3)), dtype)
        assert all(row.ok for row in rows), [row for row in rows if not row.ok]


SHAPES = [(8, 16), (5, 3), (300, 70), (4, 5, 7), (2, 33, 130), (3, 4, 9, 11), (16, 3, 20, 21), (2, 3, 3, 4, 5), (2, 64, 3, 3),
          (3, 100, 6, 5), (2, 1100, 3, 3)]


@pytest.mark.parametrize(
    ("shape", "channels_last"), [(shape, last) for shape in SHAPES for last in (False, True) if len(shape) >= 4 or not last]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_against_numpy(shape, dtype, channels_last):
    against_numpy(shape, dtype, channels_last)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 40])
def test_sizes_around_vectors(size):
    """As many channels, and as many elements a plane, as a vector has lanes, and one more or less."""
    for channels_last in (False, True):
        against_numpy((7, size, 1, 3), channels_last=channels_last, draws=12 + 120 // size)
    against_numpy((5, 4, size), draws=24)


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_large_enough_for_threads_and_streaming_stores(channels_last):
    against_numpy((4, 3, 80, 90), channels_last=channels_last, draws=1)
    against_numpy((2, 65, 190, 171), channels_last=channels_last, draws=1)


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("offset", [3.0, 100.0, 1e4])
def test_mean_much_larger_than_deviation(offset, channels_last):
    against_numpy((6, 10, 9, 8), channels_last=channels_last, make=lambda s: torch.randn(s) + offset)
    against_numpy((6, 10, 9, 8), channels_last=channels_last, make=lambda s: (torch.rand(s) < 0.3) * 0.7 + offset)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_constant_channels(channels_last, dtype):
    """Exactly the bias, and gradients of nothing but the bias."""
    for value in (0.0, 0.1, -7.3, 1e30, 1e-30):
        x = to_layout(torch.full((3, 5, 7, 11), value, dtype=dtype), channels_last).requires_grad_()
        weight, bias = (torch.randn(5, dtype=dtype).requires_grad_() for _ in range(2))
        y = F.batch_norm(x, None, None, weight, bias, True)
        assert torch.equal(y, bias.reshape(1, 5, 1, 1).expand_as(y))
        assert (torch.autograd.grad(y, weight, torch.randn_like(y))[0] == 0).all()


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("scale", [1e30, 1e18, 1e-12, 1e-25])
def test_huge_and_tiny_inputs(scale, channels_last):
    """Squares overflow or vanish in float32; one ordinary channel beside them keeps its bits."""
    eps = EPS if scale > 1 else 1e-37
    found = []
    for seed in range(6):
        torch.manual_seed(seed)
        x = torch.randn(4, 6, 15, 14)
        wild = x.clone()
        wild[:, 1:] *= scale
        x, wild = to_layout(x, channels_last), to_layout(wild, channels_last)
        exact, mean, var = numpy_batch_norm(wild, eps=eps)
        running_mean, running_var = torch.zeros(6), torch.zeros(6)
        ours = F.batch_norm(wild, running_mean, running_var, None, None, True, 1.0, eps)
        found.append((ours, tF.batch_norm(wild, None, None, None, None, True, 0.1, eps), exact))
        assert torch.equal(ours[:, 0], F.batch_norm(x, None, None, None, None, True, 0.1, eps)[:, 0])
        assert ((running_mean - mean).abs() <= 2**-24 * (mean.abs() + var.sqrt())).all()
        unbiased = var * (840 / 839)
        kept = (unbiased < 2.0**127) & (unbiased > 2.0**-126)
        torchs_var = torch.ones(6)
        tF.batch_norm(wild, torch.zeros(6), torchs_var, None, None, True, 1.0, eps)
        ratios = [v[kept].double() / unbiased[kept] for v in (running_var, torchs_var, unbiased)]  # each channel by itself
        assert all(row.ok for row in compare("running_var", *([r] for r in ratios), torch.float32))
    for row in compare("output", *zip(*found), torch.float32):
        assert row.ok, row


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_huge_bfloat16_inputs(channels_last):
    """Squares overflow the floats that bfloat16's sums begin in."""
    torch.manual_seed(0)
    x = torch.randn(4, 6, 15, 14)
    x[:, 1:] *= 1e30
    x = to_layout(x.bfloat16(), channels_last)
    exact = numpy_batch_norm(x)[0]
    y = F.batch_norm(x, None, None, None, None, True, 0.1, EPS)
    assert (y.double() - exact).norm() <= 2**-8 * exact.norm()


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_outliers_among_the_elements_that_are_looked_at_first(channels_last):
    def make(shape):
        x = torch.randn(shape)
        x[0, :, 0, 0] = 1e6
        return x

    against_numpy((8, 5, 20, 20), channels_last=channels_last, make=make)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("channels", [3, 20, 64])
def test_not_finite_stays_in_its_channel(channels, channels_last, bad):
    torch.manual_seed(0)
    x, grad = torch.randn(4, channels, 5, 7), torch.randn(4, channels, 5, 7)
    spoilt = x.clone()
    spoilt[1, 1, 2, 3] = bad
    results = []
    for values in (x, spoilt):
        leaf = to_layout(values, channels_last).requires_grad_()
        weight, bias = torch.ones(channels).requires_grad_(), torch.zeros(channels).requires_grad_()
        y = F.batch_norm(leaf, None, None, weight, bias, True)
        results.append([y.detach(), *torch.autograd.grad(y, (leaf, weight, bias), grad)])
    others = [c for c in range(channels) if c != 1]
    for clean, dirty in zip(*results):
        axis = 1 if clean.dim() > 1 else 0
        pick = torch.tensor(others)
        assert torch.equal(clean.index_select(axis, pick), dirty.index_select(axis, pick))
    theirs = tF.batch_norm(spoilt, None, None, None, None, True)
    assert torch.equal(torch.isnan(results[1][0][:, 1]), torch.isnan(theirs[:, 1]))


@pytest.mark.parametrize("shape", [(6, 4), (5, 4, 7), (3, 4, 5, 6), (2, 4, 3, 2, 5)], ids=str)
@pytest.mark.parametrize("options", [
    {}, dict(momentum=None), dict(affine=False), dict(track_running_stats=False), dict(momentum=0.37, eps=0.1),
], ids=str)
def test_modules_follow_torchs(shape, options):
    """Two training steps and an evaluation: outputs, statistics, counters."""
    dims = {2: "1d", 3: "1d", 4: "2d", 5: "3d"}[len(shape)]
    torch.manual_seed(0)
    ours, theirs = (getattr(n, f"BatchNorm{dims}")(4, **options) for n in (dlkern.nn, torch.nn))
    exact = getattr(torch.nn, f"BatchNorm{dims}")(4, **options).double()
    if theirs.affine:
        with torch.no_grad():
            theirs.weight.normal_()
            theirs.bias.normal_()
    for module in (ours, exact):
        module.load_state_dict(theirs.state_dict())
    for step in range(4):
        for module in (ours, theirs, exact):
            module.train(step < 3)
        x = torch.randn(shape) * 2 + 1
        a, b, r = ours(x), theirs(x), exact(x.double())
        pairs = [(a, b, r), *zip(ours.buffers(), theirs.buffers(), exact.buffers())]
        for mine, torchs, double in pairs:
            assert mine.dtype == torchs.dtype and mine.shape == torchs.shape
            if not mine.is_floating_point():
                assert torch.equal(mine, torchs)
                continue
            assert all(row.ok for row in compare("x", [mine], [torchs], [double], torch.float32))


def test_statistics_of_one_image_are_unbiased():
    x = torch.randn(2, 3, 1, 1)
    found = []
    for namespace, value in ((F, x), (tF, x), (tF, x.double())):
        mean, var = value.new_zeros(3), value.new_zeros(3)
        namespace.batch_norm(value, mean, var, None, None, True, 1.0)
        found.append((mean, var))
    assert torch.allclose(found[2][1], x.double().var((0, 2, 3)))  # the yardstick is the unbiased one
    for name, *values in zip(("mean", "var"), *found):
        assert all(row.ok for row in compare(name, *([value] for value in values), torch.float32))


def test_evaluation_leaves_statistics_alone_and_zero_momentum_too():
    x, mean, var = torch.randn(4, 3, 5), torch.randn(3), torch.rand(3) + 0.5
    kept = mean.clone(), var.clone()
    F.batch_norm(x, mean, var)
    F.batch_norm(x, mean, var, training=True, momentum=0.0)
    assert torch.equal(mean, kept[0]) and torch.equal(var, kept[1])


@pytest.mark.parametrize("shape", [(40, 6), (3, 6, 50), (4, 6, 9, 8), (2, 3, 50, 60)], ids=str)
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_frozen_backward(shape, affine, channels_last):
    torch.manual_seed(0)
    c = shape[1]
    statistics = torch.randn(c).double(), torch.rand(c).double() + 0.5

    def on(namespace):
        def f(x, *affine):
            mean, var = (s.to(x.dtype) for s in statistics)
            return namespace.batch_norm(to_layout(x, channels_last), mean, var, *affine)

        return f

    def inputs():
        parameters = [torch.randn(c, dtype=torch.float64, requires_grad=True) for _ in range(2 * affine)]
        return [torch.randn(shape, dtype=torch.float64, requires_grad=True), *parameters]

    for dtype in (torch.float32, torch.bfloat16):
        dlkern.testing.check(on(F), on(tF), inputs, dtype=dtype, draws=4 if len(shape) < 4 else 1).raise_if_failed()


@pytest.mark.parametrize("training", [True, False])
def test_layouts_are_kept(training):
    for size, format in (((3, 4, 5, 6), torch.channels_last), ((2, 4, 3, 5, 6), torch.channels_last_3d)):
        x = torch.randn(size).contiguous(memory_format=format).requires_grad_()
        y = F.batch_norm(x, torch.zeros(4), torch.ones(4), training=training)
        assert y.is_contiguous(memory_format=format)
        assert torch.autograd.grad(y, x, torch.randn_like(y))[0].is_contiguous(memory_format=format)


VIEWS = {
    "transposed": lambda x: x.transpose(-1, -2), "sliced": lambda x: x[:, ::2], "strided": lambda x: x[..., ::2],
    "expanded": lambda x: x[:1].expand(4, *x.shape[1:]), "permuted": lambda x: x.permute(1, 0, 2, 3),
}


@pytest.mark.parametrize("view", VIEWS)
def test_not_contiguous(view):
    change = VIEWS[view]
    dlkern.testing.check(
        lambda x: F.batch_norm(change(x), None, None, training=True),
        lambda x: tF.batch_norm(change(x), None, None, training=True),
        lambda: [torch.randn(4, 6, 7, 8, dtype=torch.float64, requires_grad=True)], draws=3,
    ).raise_if_failed()


def test_gradient_not_contiguous():
    x = torch.randn(3, 4, 5, 6).requires_grad_()
    y = F.batch_norm(x, None, None, training=True)
    grad = torch.randn(6, 5, 4, 3).permute(3, 2, 1, 0)
    expected = torch.autograd.grad(y, x, grad.contiguous(), retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(y, x, grad)[0], expected)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bits_beside_float32_parameters(training, channels_last, dtype):
    torch.manual_seed(0)
    x = to_layout(torch.randn(5, 6, 7, 9).to(dtype), channels_last)
    weight, bias, grad = torch.randn(6), torch.randn(6), torch.randn(5, 6, 7, 9).to(dtype)
    found = []
    for namespace, widen in ((F, False), (tF, False), (tF, True)):
        cast = (lambda t: t.double()) if widen else (lambda t: t)
        leaves = [cast(x).detach().requires_grad_(), *(cast(t).clone().requires_grad_() for t in (weight, bias))]
        mean, var = cast(torch.full((6,), 0.3)), cast(torch.full((6,), 0.8))
        y = namespace.batch_norm(leaves[0], mean, var, leaves[1], leaves[2], training)
        found.append([y.detach(), *torch.autograd.grad(y, leaves, cast(grad)), mean, var])
    for i, (a, b, r) in enumerate(zip(*found)):
        assert a.dtype == b.dtype
        assert all(row.ok for row in compare(str(i), [a], [b], [r], dtype))


DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.float16]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("parameter", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mixed_dtypes_as_torch_has_them(dtype, parameter, training):
    x = torch.randn(4, 3, 5).to(dtype)

    def call(namespace, *types):
        weight, bias, mean, var = (torch.full((3,), v).to(parameter).to(*types) for v in (1.5, 0.5, 0.1, 0.9))
        return namespace.batch_norm(x.to(*types), mean, var, weight, bias, training), mean, var

    try:
        theirs = call(tF, x.device)
    except RuntimeError:
        with pytest.raises(RuntimeError):
            call(F, x.device)
        return
    narrow = call(tF, torch.float32)  # float64 has nothing wider to judge by: nearer than torch's float32
    for a, b, single, exact in zip(call(F, x.device), theirs, narrow, call(tF, torch.float64)):
        assert a.dtype == b.dtype
        double = a.dtype == torch.float64
        rows = compare("value", [a], [single if double else b], [exact], torch.float32 if double else a.dtype)
        assert all(row.ok for row in rows)


# Every combination on one shape; the other loops (rows, few channels, several threads) with what differs in them.
FUSED = [
    *itertools.product([(3, 6, 7, 5)], [False, True], [True, False], ["none", "other", "input"], ACTIVATIONS),
    *itertools.product([(6, 50), (4, 3, 17)], [False], [True, False], ["other"], ACTIVATIONS),
    *itertools.product([(2, 48, 14, 15)], [False, True], [True, False], ["other"], [None, Activation.RELU]),
]


@pytest.mark.parametrize(("shape", "channels_last", "training", "residual", "activation"), FUSED)
def test_fused_is_the_composition(shape, channels_last, training, residual, activation):
    c = shape[1]
    torch.manual_seed(0)
    statistics = torch.randn(c).double(), torch.rand(c).double() + 0.5

    def added(x, rest):
        return {"none": None, "other": rest[0] if rest else None, "input": x}[residual]

    def ours(x, weight, bias, *rest):
        x = to_layout(x, channels_last)
        mean, var = (s.to(x.dtype) for s in statistics)
        y = F.batch_norm_act(x, mean, var, weight, bias, training, activation=activation, residual=added(x, rest))
        return y

    def theirs(x, weight, bias, *rest):
        x = to_layout(x, channels_last)
        mean, var = (s.to(x.dtype) for s in statistics)
        y = tF.batch_norm(x, mean, var, weight, bias, training)
        if residual != "none":
            y = y + added(x, rest)
        return ACTIVATIONS[activation](y)

    def inputs():
        sizes = [shape, (c,), (c,), *([shape] if residual == "other" else [])]
        drawn = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in sizes]
        if activation is Activation.RELU:  # away from the kink, where rounding decides which side an element is on
            with torch.no_grad():
                rounded = [t.float() for t in drawn]
                mean, var = (s.float() for s in statistics)
                z = tF.batch_norm(rounded[0], mean, var, rounded[1], rounded[2], training)
                if residual != "none":
                    z = z + added(rounded[0], rounded[3:])
                if (z.abs() < 2**-18).any():
                    return inputs()
        return drawn

    # tanh's slope of small numbers decides its largest error; over 3 draws of a few hundred elements chance does.
    draws = 1 if shape[1] == 48 else 24 if activation is Activation.TANH else 3
    dlkern.testing.check(ours, theirs, inputs, draws=draws, name="fused").raise_if_failed()


def test_relu_of_a_nan_is_nan_and_its_gradient_passes_at_positive_only():
    x = torch.tensor([[1.0], [2.0], [4.0], [-3.0]]).requires_grad_()
    y = F.batch_norm_act(x, torch.zeros(1), torch.ones(1), None, None, False, eps=0.0, activation=Activation.RELU)
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.tensor([[1.0], [1.0], [1.0], [0.0]]))
    x = torch.tensor([[float("nan")], [2.0]])
    y = F.batch_norm_act(x, torch.zeros(1), torch.ones(1), None, None, False, activation=Activation.RELU)
    assert torch.isnan(y[0]).all() and y[1] > 0


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (0, 3), (2, 3, 0), (0, 3, 2, 2, 2)], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_nothing_to_normalise(shape, training):
    found = []
    for namespace in (F, tF):
        x = torch.randn(shape).requires_grad_()
        weight, bias, mean, var = torch.ones(3).requires_grad_(), torch.zeros(3).requires_grad_(), torch.zeros(3), torch.ones(3)
        y = namespace.batch_norm(x, mean, var, weight, bias, training)
        found.append([y.detach(), *torch.autograd.grad(y.sum(), (x, weight, bias)), mean, var])
    for a, b in zip(*found):
        assert a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize("shape", [(1, 3), (1, 3, 1), (1, 3, 1, 1), (1, 3, 1, 1, 1)], ids=str)
def test_one_value_a_channel(shape):
    x = torch.randn(shape)
    for namespace in (F, tF):
        with pytest.raises(ValueError) as raised:
            namespace.batch_norm(x, None, None, training=True)
        assert str(raised.value) == f"Expected more than 1 value per channel when training, got input size {x.size()}"
    assert F.batch_norm(x, torch.zeros(3), torch.ones(3)).shape == x.shape


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", [None, Activation.TANH])
def test_gradients_of_gradients(training, activation):
    x, residual = (torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight, bias = (torch.randn(2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    mean, var = torch.randn(2).double(), torch.rand(2).double() + 0.5

    def f(x, weight, bias, residual):
        return F.batch_norm_act(
            x, mean.clone(), var.clone(), weight, bias, training, activation=activation, residual=residual
        )

    assert torch.autograd.gradcheck(f, (x, weight, bias, residual))
    assert torch.autograd.gradgradcheck(f, (x, weight, bias, residual))


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(4, 64, 40, 30), (4, 3, 90, 80), (8, 20, 30, 17)], ids=str)
def test_same_bits_twice_and_the_rule_at_any_number_of_threads(shape, channels_last):
    torch.manual_seed(0)
    x, grad = torch.randn(shape).double(), torch.randn(shape).double()
    weight, bias = torch.randn(shape[1]).double(), torch.randn(shape[1]).double()
    exact = [numpy_batch_norm(x, weight, bias)[0], *numpy_backward(x, grad, weight)]
    theirs = run(tF, x, weight, bias, grad, torch.float32, channels_last)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            first, second = (run(F, x, weight, bias, grad, torch.float32, channels_last) for _ in range(2))
            for i, (a, b) in enumerate(zip(first, second)):
                assert torch.equal(a, b)
                assert all(row.ok for row in compare(str(i), [a], [theirs[i]], [exact[i]], torch.float32)), threads
    finally:
        torch.set_num_threads(before)


def wrong_calls():
    x, m, v = torch.randn(4, 3, 5), torch.zeros(3), torch.ones(3)
    return {
        "no statistics": ((x, None, None), {}), "one statistic": ((x, m, None), dict(training=True)),
        "one statistic, eval": ((x, None, v), {}), "mean size": ((x, torch.zeros(4), v), {}),
        "weight size": ((x, m, v, torch.ones(2)), {}), "bias size": ((x, m, v, None, torch.ones(2)), dict(training=True)),
        "1-D": ((torch.randn(5), m, v), {}), "integers": ((torch.ones(4, 3, dtype=torch.long), m, v), {}),
        "eps zero": ((x, m, v), dict(training=True, eps=0.0)), "eps negative": ((x, m, v), dict(eps=-1.0)),
        "double weight": ((x, m, v, torch.ones(3).double()), {}), "not a tensor": (([1.0], m, v), {}),
    }


@pytest.mark.parametrize("name", wrong_calls())
def test_wrong_calls_raise_as_torch(name):
    arguments, options = wrong_calls()[name]
    with pytest.raises((RuntimeError, ValueError, TypeError, IndexError)) as theirs:
        tF.batch_norm(*arguments, **options)
    with pytest.raises(type(theirs.value)):
        F.batch_norm(*arguments, **options)


def test_wrong_fused_calls():
    x, m, v = torch.randn(4, 3, 5), torch.zeros(3), torch.ones(3)
    for options in (dict(residual=torch.randn(4, 3, 6)), dict(residual=x.double()), dict(activation=9)):
        with pytest.raises(ValueError):
            F.batch_norm_act(x, m, v, **options)


def test_wrong_raw_calls():
    forward, backward = torch.ops.dlkern.batch_norm_train_forward_cpu, torch.ops.dlkern.batch_norm_backward_cpu
    x, w = torch.randn(4, 3, 5), torch.ones(3)
    for arguments in (
        (x, x[:2], w, w, w, w, 0.1, EPS, 0), (x, None, w[:2], w, w, w, 0.1, EPS, 0), (x, None, w, w, w, None, 0.1, EPS, 0),
        (x, None, w, w, w, w, 0.1, 0.0, 0), (x, None, w, w, w, w, 0.1, EPS, 4), (x.long(), None, w, w, w, w, 0.1, EPS, 0),
        (x[:1, :, :1], None, w, w, w, w, 0.1, EPS, 0), (x, None, w.double(), w, w, w, 0.1, EPS, 0),
    ):
        with pytest.raises((RuntimeError, ValueError)):
            forward(*arguments)
    with pytest.raises(ValueError):
        backward(x, x, None, w, w, w, True, 1, False)
    with pytest.raises((RuntimeError, ValueError)):
        backward(x[:2], x, None, w, w, w, True, 0, False)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_infinities_stay_infinite(dtype, channels_last):
    """On frozen statistics an infinite input or gradient is infinite after, of the sign torch gives it."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(4, 6, 5, 7, dtype=dtype).contiguous(memory_format=layout)
    mean, weight, bias, grad = (torch.randn(s, dtype=dtype) for s in (6, 6, 6, x.shape))
    variance = torch.rand(6, dtype=dtype) + 0.1
    for tensor in (x, grad):
        for c in range(6):
            tensor[1, c, 3, 4], tensor[0, c, 1, 1] = float("inf"), -float("inf")
    for infinite in (x, grad):
        found = []
        for f in (F, tF):
            value = (x if infinite is x else torch.zeros_like(x)).clone().requires_grad_()
            output = f.batch_norm(value, mean, variance, weight, bias, False)
            gradient = torch.autograd.grad(output, value, grad if infinite is grad else torch.ones_like(grad))[0]
            found.append(output.detach() if infinite is x else gradient)
        assert torch.equal(found[0].isinf(), found[1].isinf()) and torch.equal(found[0].isnan(), found[1].isnan())
        assert torch.equal(found[0].sign(), found[1].sign())

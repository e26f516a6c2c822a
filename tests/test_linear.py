"""linear: sizes, layouts, activations, gradients, wrong calls; what holds for every op is in test_contract.py."""

import pytest
import torch
import torch.nn.functional as tF

import dlkern
import dlkern.nn.functional as F
from dlkern import Activation

ACTIVATIONS = {None: lambda x: x, Activation.RELU: torch.relu, Activation.TANH: torch.tanh, Activation.SIGMOID: torch.sigmoid}
# M, K, N: ones, odd sizes either side of the tiles' (6 x 16 or 64), of gemm.h's kOnceM, kMC, kKC, kNC and kSummedNC (those
# of many rows where two threads share them, too), and of the ways a product is made (dot products up to 24 rows, or 96 of
# few columns; B in place up to 24; turned up to 128; packed).
SIZES = [
    (1, 1, 1), (1, 33, 5), (2, 7, 3), (5, 130, 17), (7, 64, 33), (23, 129, 65), (25, 31, 47), (97, 40, 70), (96, 300, 18),
    (130, 270, 50), (300, 20, 400), (300, 530, 20), (13, 20, 800), (30, 20, 1100),
    (600, 20, 2100), (600, 300, 800),
    (95, 64, 11), (97, 70, 12), (24, 90, 130), (128, 33, 150), (129, 33, 150),
]


def draw(m, k, n, dtype=torch.float64):
    return [torch.randn(s, dtype=dtype).requires_grad_() for s in ((m, k), (n, k), (n,))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_parity(size, dtype):
    draws = 1 + 4000 // (size[0] * size[2])
    dlkern.testing.check(
        F.linear, tF.linear, lambda: draw(*size), dtype=dtype, draws=min(draws, 50), name=str(size)
    ).raise_if_failed()


@pytest.mark.parametrize("needs", ["weight", "bias", "both", "neither"])
def test_the_gradient_of_a_transposed_weight_lies_as_it_does(needs):
    x, (weight, bias) = torch.randn(3, 5, 7).requires_grad_(), (torch.randn(7, 6), torch.randn(6))
    weight.requires_grad_(needs in ("weight", "both"))
    bias.requires_grad_(needs in ("bias", "both"))
    leaves = [t for t in (x, weight, bias) if t.requires_grad]
    sides = []
    for function in (F.linear, tF.linear):
        y = function(x, weight.t(), bias)
        for graph in (False, True):
            grads = torch.autograd.grad(y, leaves, torch.ones_like(y), create_graph=graph, retain_graph=True)
            sides.append(grads)
            if function is F.linear and not graph and weight.requires_grad:
                assert grads[1].stride() == weight.stride()
    for grads in sides[1:]:
        for a, b in zip(sides[0], grads, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("columns", [2800, 2801])
def test_a_weight_gradient_larger_than_the_caches(columns):
    dlkern.testing.check(F.linear, tF.linear, lambda: draw(4, columns, 2800), dtype=torch.float32).raise_if_failed()


@pytest.mark.parametrize("activation", [a for a in ACTIVATIONS if a], ids=lambda a: a.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("size", [(7, 9, 5), (40, 35, 60)], ids=str)
def test_activation(size, dtype, activation):
    dlkern.testing.check(
        lambda *t: F.linear(*t, activation=activation),
        lambda *t: ACTIVATIONS[activation](tF.linear(*t)),
        lambda: draw(*size), dtype=dtype, draws=20, name=activation.name,
    ).raise_if_failed()


def test_double_against_extended_precision():
    numpy = pytest.importorskip("numpy")
    for m, k, n in [(3, 50, 4), (30, 200, 20), (120, 260, 40)]:
        x, w, b = (t.detach() for t in draw(m, k, n))
        exact = x.numpy().astype(numpy.longdouble) @ w.numpy().astype(numpy.longdouble).T + b.numpy()
        error = lambda y: float(numpy.linalg.norm((y.numpy() - exact).astype(numpy.float64)))  # noqa: E731, B023
        assert error(F.linear(x, w, b)) <= max(2 * error(tF.linear(x, w, b)), 2**-53 * float(numpy.abs(exact).max()))


@pytest.mark.parametrize("activation", list(ACTIVATIONS), ids=str)
def test_gradients_of_gradients(activation):
    inputs = draw(3, 4, 5)
    f = lambda *t: F.linear(*t, activation=activation)  # noqa: E731
    assert torch.autograd.gradcheck(f, inputs)
    assert torch.autograd.gradgradcheck(f, inputs)


@pytest.mark.parametrize("needs", [(a, b, c) for a in (0, 1) for b in (0, 1) for c in (0, 1) if a + b + c])
def test_only_wanted_gradients(needs):
    ours, theirs = draw(6, 7, 8, torch.float32), None
    ours = [t.detach().requires_grad_(bool(n)) for t, n in zip(ours, needs)]
    wanted = [t for t in ours if t.requires_grad]
    g = torch.randn(6, 8)
    theirs = torch.autograd.grad(tF.linear(*[t.double() for t in ours]), wanted, g.double())
    for a, b in zip(torch.autograd.grad(F.linear(*ours), wanted, g), theirs):
        assert all(row.ok for row in dlkern.testing.compare("gradient", [a], [b], [b.double()], torch.bfloat16))


@pytest.mark.parametrize("size", [(0, 3, 4), (3, 0, 4), (3, 4, 0), (0, 0, 0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_empty(size, dtype):
    x, w, b = (t.detach().to(dtype).requires_grad_() for t in draw(*size))
    ours, theirs = F.linear(x, w, b), tF.linear(x, w, b)
    assert torch.equal(ours, theirs)
    for a, c in zip(torch.autograd.grad(ours.sum(), (x, w, b)), torch.autograd.grad(theirs.sum(), (x, w, b))):
        assert torch.equal(a, c)


LAYOUTS = {
    "transposed weight": lambda x, w: (x, w.t().contiguous().t()),
    "transposed input": lambda x, w: (x.t().contiguous().t(), w),
    "expanded input": lambda x, w: (x[:1].expand(x.shape[0], -1), w),
    "strided": lambda x, w: (torch.stack([x, x], -1)[..., 0], torch.stack([w, w], -1)[..., 1]),
    "slices": lambda x, w: (torch.cat([x, x], 1)[:, : x.shape[1]], torch.cat([w, w])[::2]),
    "batches swapped": lambda x, w: (x.reshape(2, -1, x.shape[1]).transpose(0, 1), w),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("size", [(10, 35, 21), (110, 35, 21)], ids=str)
def test_layouts(size, dtype, layout):
    f = lambda x, w, b: F.linear(*LAYOUTS[layout](x, w), b)  # noqa: E731
    r = lambda x, w, b: tF.linear(*LAYOUTS[layout](x, w), b)  # noqa: E731
    dlkern.testing.check(f, r, lambda: draw(*size), dtype=dtype, draws=4, name=layout).raise_if_failed()
    x, w, b = draw(*size, torch.float32)
    assert F.linear(*LAYOUTS[layout](x, w), b).stride() == r(x, w, b).stride()


def test_an_expanded_gradient():
    x, w, b = draw(9, 11, 13, torch.float32)
    ours = torch.autograd.grad(F.linear(x, w, b).sum(), (x, w, b))
    full = torch.autograd.grad(F.linear(x, w, b), (x, w, b), torch.ones(9, 13))
    assert all(torch.equal(a, c) for a, c in zip(ours, full))


def test_not_finite():
    x, w, b = (t.detach() for t in draw(9, 20, 33, torch.float32))
    x[0, 3], x[4, 19], w[7, 2] = float("nan"), float("inf"), float("-inf")
    for activation, f in ACTIVATIONS.items():
        ours, theirs = F.linear(x, w, b, activation=activation), f(tF.linear(x, w, b))
        assert torch.equal(torch.isnan(ours), torch.isnan(theirs))
        assert torch.equal(torch.isinf(ours), torch.isinf(theirs))


def test_same_bits_whatever_the_threads():
    x, w, b = (t.detach() for t in draw(150, 400, 333, torch.float32))
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            g = torch.ones(150, 333)
            results.append([
                F.linear(x, w, b), F.linear(x[:20], w, b), torch.ops.dlkern.linear_backward_input_cpu(g, w),
                *torch.ops.dlkern.linear_backward_weight_cpu(x, x, True),
            ])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, c) for a, c in zip(results[0], other))


def test_weights_are_read_anew():
    layer = dlkern.nn.Linear(30, 40)
    x = torch.randn(5, 30)
    with torch.no_grad():
        layer(x)
        layer.weight.data[:] -= 0.1 * torch.randn(40, 30)
        layer.bias.data[:] += 1
        assert torch.equal(layer(x), F.linear(x, layer.weight.clone(), layer.bias.clone()))


WRONG = {
    "features": lambda: (torch.randn(2, 3), torch.randn(4, 5)),
    "features of a batch": lambda: (torch.randn(2, 2, 3), torch.randn(4, 5)),
    "scalar input": lambda: (torch.randn(()), torch.randn(4, 3)),
    "3-D weight": lambda: (torch.randn(2, 3), torch.randn(2, 4, 3)),
    "bias": lambda: (torch.randn(2, 3), torch.randn(4, 3), torch.randn(5)),
    "dtypes": lambda: (torch.randn(2, 3), torch.randn(4, 3).double()),
    "a list": lambda: ([1.0, 2.0, 3.0], torch.randn(4, 3)),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_calls_raise_as_torch(case):
    arguments = WRONG[case]()
    with pytest.raises((RuntimeError, TypeError)) as theirs:
        tF.linear(*arguments)
    with pytest.raises(type(theirs.value)) as ours:
        F.linear(*arguments)
    assert str(ours.value) == str(theirs.value)


@pytest.mark.parametrize(
    "arguments",
    [
        (torch.randn(2, 3), torch.randn(4, 5), None, 0), (torch.randn(()), torch.randn(4, 3), None, 0),
        (torch.randn(2, 3), torch.randn(4, 3), torch.randn(3), 0), (torch.randn(2, 3), torch.randn(4, 3), None, 9),
        (torch.randn(2, 3), torch.randn(4, 3).double(), None, 0), (torch.randn(2, 3), torch.randn(12), None, 0),
        (torch.ones(2, 3, dtype=torch.long), torch.ones(4, 3, dtype=torch.long), None, 0),
    ],
)
def test_wrong_raw_calls(arguments):
    with pytest.raises(RuntimeError):
        torch.ops.dlkern.linear_forward_cpu(*arguments)


def test_unusual_calls_go_to_torch_and_say_so():
    cases = [
        (torch.randn(2, 3), torch.randn(3)), (torch.randn(2, 3), torch.randn(4, 3), torch.randn(1)),
        (torch.ones(2, 3, dtype=torch.long), torch.ones(4, 3, dtype=torch.long)),
    ]
    for case in cases:
        with dlkern.trace() as calls:
            assert torch.equal(F.linear(*case), tF.linear(*case))
        assert [call.backend for call in calls] == ["torch"] and calls[0].reason


def test_autocast():
    x, w, b = draw(4, 5, 6, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert F.linear(x, w, b).dtype == torch.bfloat16
        assert F.linear(x.double(), w.double(), b.double()).dtype == torch.float64
    (g,) = torch.autograd.grad(F.linear(x, w, b).sum(), w)
    assert g.dtype == torch.float32


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_in_a_network(dynamic):
    torch._dynamo.reset()
    network = torch.nn.Sequential(dlkern.nn.Linear(12, 20), torch.nn.ReLU(), dlkern.nn.Linear(20, 7))
    loss = dlkern.nn.CrossEntropyLoss(label_smoothing=0.1)
    compiled = torch.compile(lambda x, t: loss(network(x), t), fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for batch in (5, 9):
        x, t = torch.randn(batch, 12), torch.randint(0, 7, (batch,))
        expected = torch.autograd.grad(loss(network(x), t), network.parameters())
        got = torch.autograd.grad(compiled(x, t), network.parameters())
        assert all(torch.equal(a, c) for a, c in zip(expected, got))


def test_modules_are_torchs():
    layer = dlkern.nn.Linear(3, 4)
    assert isinstance(layer, torch.nn.Linear) and repr(layer) == repr(torch.nn.Linear(3, 4))
    lazy = dlkern.nn.LazyLinear(4)
    lazy(torch.randn(2, 5))
    assert type(lazy) is dlkern.nn.Linear and lazy.weight.shape == (4, 5)


REDUCTIONS = {
    "two of three": ((5, 3, 4), (6, 3, 4), None, "bij,kij->bk"),
    "not the last": ((3, 5, 4, 2), (6, 3, 4), (0, 2), "ibjc,kij->bck"),
    "in another order": ((3, 5, 4), (6, 4, 3), (-1, 0), "jbi,kij->bk"),
    "all": ((3, 4), (6, 3, 4), None, "ij,kij->k"),
    "one": ((2, 5, 3), (6, 3), (2,), "abi,ki->abk"),
    "three": ((5, 3, 2, 4), (7, 3, 2, 4), None, "bijl,kijl->bk"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", REDUCTIONS)
def test_tensor_reduction(name, dtype):
    x, weight, dims, equation = REDUCTIONS[name]
    with dlkern.trace() as calls:
        dlkern.testing.check(
            lambda x, w, b: dlkern.nn.functional.tensor_reduction(x, w, b, dims),
            lambda x, w, b: torch.einsum(equation, x, w) + b,
            lambda: [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in (x, weight, weight[:1])],
            dtype=dtype, draws=64, name=name,  # sums of a few products: of a handful chance decides
        ).raise_if_failed()
    assert {(call.op, call.backend) for call in calls} == {("linear", "cpu")}


def test_tensor_reduction_module():
    layer = dlkern.nn.TensorReduction((3, 4), 6, dims=(1, 3))
    x = torch.randn(2, 3, 5, 4)
    torch.testing.assert_close(layer(x), torch.einsum("bicj,kij->bck", x, layer.weight) + layer.bias)
    assert layer.weight.abs().max() <= 12**-0.5 and "dims=(1, 3)" in repr(layer)
    assert [r.status for r in dlkern.conversion_report(layer)] == ["dlkern"]
    assert dlkern.nn.TensorReduction((3,), 2, bias=False).bias is None
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), layer(x))
    with pytest.raises(RuntimeError, match="reduced dimensions"):
        layer(torch.randn(2, 3, 5, 7))
    with pytest.raises(IndexError):
        layer(torch.randn(3, 4))
    with pytest.raises(ValueError):
        dlkern.nn.TensorReduction((3, 4), 2, dims=(1,))

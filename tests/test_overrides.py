"""enabled(): torch's own functions on dlkern's kernels."""

import contextlib
import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.functional import avg_pool2d as alias
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

import dlkern
from dlkern.testing._training import distances, move

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
W = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(2))
LOGITS, TARGET = X.reshape(6, 64)[:, :10], torch.tensor([0, 3, 9, 2, 2, 7])
SEQUENCE, CHANNELS = X.flatten(2), X.reshape(12, 16, 2, 1)
MEAN, VAR = torch.zeros(3), torch.ones(3)

# op -> the forms torch has of it
FORMS = {
    "conv2d": [
        lambda: F.conv2d(X, W, None, 2, 1), lambda: torch.conv2d(X, W, None, 2, 1),
        lambda: torch.conv2d(X, W, padding="same"), lambda: nn.Conv2d(3, 4, 3)(X),
        lambda: F.conv2d(input=X, weight=W, stride=(1, 2)),
    ],
    "linear": [
        lambda: F.linear(X, W[0, 0, :, :1].expand(3, 8)), lambda: torch._C._nn.linear(X, W[0, 0, :, :1].expand(3, 8)),
        lambda: nn.Linear(8, 5)(X), lambda: torch.addmm(MEAN[:2], LOGITS, X.flatten()[:20].view(10, 2)),
        lambda: MEAN[:2].addmm(LOGITS, X.flatten()[:20].view(10, 2)),
    ],
    "max_pool2d": [
        lambda: F.max_pool2d(X, 2), lambda: torch.max_pool2d(X, 2), lambda: torch.max_pool2d(X, 3, 2, 1),
        lambda: F.max_pool2d(X, 3, stride=1, return_indices=True), lambda: F.max_pool2d_with_indices(X, 2),
        lambda: torch._C._nn.max_pool2d_with_indices(X, [2, 2]), lambda: nn.MaxPool2d(2)(X),
    ],
    "avg_pool2d": [lambda: F.avg_pool2d(X, 3, 2, 1), lambda: alias(X, 2, ceil_mode=True), lambda: nn.AvgPool2d(2)(X)],
    "adaptive_avg_pool2d": [
        lambda: F.adaptive_avg_pool2d(X, (None, 2)), lambda: torch._C._nn.adaptive_avg_pool2d(X, [2, 3]),
        lambda: nn.AdaptiveAvgPool2d(1)(X),
    ],
    "max_pool1d": [
        lambda: F.max_pool1d(SEQUENCE, 2), lambda: torch.max_pool1d(SEQUENCE, 3, 2, 1), lambda: nn.MaxPool1d(2)(SEQUENCE),
        lambda: F.max_pool1d(SEQUENCE, 2, return_indices=True), lambda: F.max_pool1d_with_indices(SEQUENCE, 2),
        lambda: torch.max_pool1d_with_indices(SEQUENCE, 2, 1),
    ],
    "avg_pool1d": [
        lambda: F.avg_pool1d(SEQUENCE, 3, 2, 1), lambda: torch.avg_pool1d(SEQUENCE, 2), lambda: nn.AvgPool1d(2)(SEQUENCE),
    ],
    "adaptive_avg_pool1d": [lambda: F.adaptive_avg_pool1d(SEQUENCE, 3), lambda: nn.AdaptiveAvgPool1d(1)(SEQUENCE)],
    "adaptive_max_pool1d": [
        lambda: F.adaptive_max_pool1d(SEQUENCE, 3), lambda: F.adaptive_max_pool1d(SEQUENCE, 3, True),
        lambda: torch.adaptive_max_pool1d(SEQUENCE, 3), lambda: nn.AdaptiveMaxPool1d(1)(SEQUENCE),
    ],
    "adaptive_max_pool2d": [
        lambda: F.adaptive_max_pool2d(X, (None, 2)), lambda: F.adaptive_max_pool2d_with_indices(X, 3),
        lambda: torch._C._nn.adaptive_max_pool2d(X, [2, 3]), lambda: nn.AdaptiveMaxPool2d(1)(X),
    ],
    "lp_pool1d": [lambda: F.lp_pool1d(SEQUENCE, 2, 3, 2), lambda: nn.LPPool1d(2, 3)(SEQUENCE)],
    "lp_pool2d": [lambda: F.lp_pool2d(X, 2, 3, 2, True), lambda: nn.LPPool2d(2, 3)(X)],
    "batch_norm": [
        lambda: F.batch_norm(X, None, None, training=True), lambda: F.batch_norm(X, MEAN, VAR),
        lambda: torch.batch_norm(X, None, None, MEAN, VAR, False, 0.1, 1e-5, False),
        lambda: torch.batch_norm(X, VAR * 2, MEAN + 1, None, None, True, 0.1, 1e-3, True), lambda: nn.BatchNorm2d(3)(X),
    ],
    "cross_entropy": [
        lambda: F.cross_entropy(LOGITS, TARGET), lambda: F.cross_entropy(LOGITS, TARGET, reduction="sum"),
        lambda: torch._C._nn.cross_entropy_loss(LOGITS, TARGET, None, 0, 2, 0.1),
        lambda: nn.CrossEntropyLoss(label_smoothing=0.1)(LOGITS, TARGET),
    ],
    "dropout": [
        lambda: F.dropout(X, 0.3), lambda: torch.dropout(X, 0.3, True), lambda: torch.dropout_(X.clone(), 0.3, True),
        lambda: nn.Dropout(0.3)(X),
    ],
    "dropout1d": [lambda: F.dropout1d(CHANNELS[0], 0.3), lambda: nn.Dropout1d(0.3)(CHANNELS[0])],
    "dropout2d": [
        lambda: F.dropout2d(CHANNELS, 0.3), lambda: torch.feature_dropout(CHANNELS, 0.3, True),
        lambda: torch.feature_dropout_(CHANNELS.clone(), 0.3, True), lambda: nn.Dropout2d(0.3)(CHANNELS),
    ],
    "dropout3d": [lambda: F.dropout3d(CHANNELS[None], 0.3), lambda: nn.Dropout3d(0.3)(CHANNELS[None])],
}  # fmt: skip


@pytest.mark.parametrize(("op", "form"), [(op, i) for op, forms in FORMS.items() for i in range(len(forms))])
def test_every_form_runs_on_dlkern(op, form):
    call = FORMS[op][form]
    torch.manual_seed(0)
    expected = call()
    torch.manual_seed(0)
    with dlkern.enabled(), dlkern.trace() as calls:
        ours = call()
    assert [(c.op, c.backend) for c in calls] == [(op, "cpu")]
    for a, b in zip(ours, expected) if isinstance(expected, tuple) else [(ours, expected)]:
        assert a.dtype == b.dtype and a.shape == b.shape and a.stride() == b.stride()
        if op.startswith("dropout"):
            assert 0 < (a == 0).sum() < a.numel()
        else:
            torch.testing.assert_close(a, b)


def test_backward_of_a_complex_number_is_an_error():
    z = torch.ones((), dtype=torch.complex64, requires_grad=True)
    with dlkern.enabled(), pytest.raises(RuntimeError, match="only for real scalar outputs"):
        (z * 2).backward()


def test_outside_and_nested():
    with dlkern.trace() as calls:
        with dlkern.enabled():
            with dlkern.enabled():
                F.conv2d(X, W)
            F.conv2d(X, W)
        F.conv2d(X, W)
    assert len(calls) == 2


def test_one_mode_entered_again():
    mode = dlkern.enabled()
    with dlkern.trace() as calls:
        with mode, mode:
            F.conv2d(X, W)
        with mode:
            F.conv2d(X, W)
    assert len(calls) == 2


def test_dlkern_functions_inside_are_not_intercepted_again():
    with dlkern.enabled(), dlkern.trace() as calls:
        dlkern.nn.functional.conv2d(X, W)
        dlkern.nn.functional.conv2d(X.double(), W.double(), padding="same")
    assert len(calls) == 2


def test_left_after_an_exception():
    with pytest.raises(ZeroDivisionError), dlkern.enabled():
        raise ZeroDivisionError
    with dlkern.trace() as calls:
        F.conv2d(X, W)
    assert not calls


def test_holds_for_its_thread():
    seen = []

    def work():
        with dlkern.trace() as calls:
            F.conv2d(X, W)
        seen.append(len(calls))

    with dlkern.enabled():
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert seen == [0]


def test_wrong_calls_raise_what_torch_raises():
    for call in (lambda: F.conv2d(X, W[:, :2]), lambda: F.linear(X, W), lambda: F.dropout(X, 2.0)):
        with pytest.raises(Exception) as theirs:
            call()
        with dlkern.enabled(), pytest.raises(type(theirs.value)):
            call()


def test_what_of_addmm_is_no_linear_layer_stays_torchs():
    a, b, c = torch.randn(4, 3), torch.randn(3, 5), torch.randn(5)
    calls = [
        lambda: torch.addmm(c, a, b, beta=2), lambda: torch.addmm(c, a, b, alpha=0), lambda: torch.addmm(a[:, :1], a, b),
        lambda: torch.addmm(c, a, b.to_sparse()), lambda: torch.addmm(c, a, b, out=torch.empty(4, 5)),
        lambda: torch.addmm(c.long(), a.long(), b.long()), lambda: torch.addmm(input=c, mat1=a, mat2=b),
        lambda: torch.addmm(c[:4], a, b), lambda: torch.addmm(c, a, c), lambda: torch.addmm(1, a, b), lambda: torch.addmm(c),
    ]
    for call in calls:
        found = []
        for mode in (contextlib.nullcontext(), dlkern.enabled()):
            with mode, dlkern.trace() as traced:
                try:
                    found.append(call())
                except Exception as error:
                    found.append((type(error), str(error).splitlines()[0]))
            assert not traced
        assert torch.equal(*found) if isinstance(found[0], torch.Tensor) else found[0] == found[1]


def test_tensor_subclasses_and_proxies_are_left_to_themselves():
    class Tagged(torch.Tensor):
        pass

    with dlkern.enabled(), dlkern.trace() as calls:
        y = F.conv2d(X.as_subclass(Tagged), W)
        graph = torch.fx.symbolic_trace(lambda x: F.linear(x, x))
    assert isinstance(y, Tagged)
    assert any(n.target is F.linear for n in graph.graph.nodes)
    assert not calls


class Functional(nn.Module):
    """A network written with functions, as many are."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 10)

    def forward(self, x, target):
        x = F.dropout(F.relu(self.conv(x)), 0.5, self.training)
        x = F.linear(F.relu(x.mean((2, 3))), self.fc.weight, self.fc.bias)
        return F.cross_entropy(x, target)


def test_network_parity_and_backward_outside():
    torch.manual_seed(0)
    model, target = Functional().eval(), torch.tensor([1, 7])

    def results(model, x, mode=None):
        model.zero_grad()
        if mode is None:
            loss = model(x, target)
        else:
            with mode:
                loss = model(x, target)
        loss.backward()
        return {"loss": loss.detach()} | {n: p.grad.clone() for n, p in model.named_parameters()}

    generator = torch.Generator().manual_seed(3)
    theirs = [results(model, move(X, generator)) for _ in range(5)]
    with dlkern.trace() as calls:
        ours = results(model, X, dlkern.enabled())
    exact = results(model.double(), X.double())
    for row in distances(ours, theirs, exact, torch.float32):
        assert row.ok, row
    assert [c.op for c in calls] == ["conv2d", "linear", "cross_entropy"]


@pytest.mark.parametrize("call", ["method", "function", "with gradient"])
def test_checkpoint_inside(call):
    x, expected = X.clone().requires_grad_(), X.clone().requires_grad_()
    with dlkern.enabled(), dlkern.trace() as calls:
        y = checkpoint(lambda x: F.conv2d(x, W), x, use_reentrant=False)
        if call == "method":
            y.sum().backward()
        elif call == "function":
            torch.autograd.backward([y.sum(), y.sum()])
        else:
            y.backward(torch.ones_like(y))
    assert [c.op for c in calls] == ["conv2d"] * 2  # forward, and forward again for the backward
    F.conv2d(expected, W).sum().backward()
    torch.testing.assert_close(x.grad, expected.grad * (2 if call == "function" else 1))


def test_backward_inside_raises_what_torch_raises():
    x = X.clone().requires_grad_()
    for call, message in (
        (lambda: (x * 2).backward(), "only for scalar outputs"),
        (lambda: X.sum().backward(), "does not require grad"),
        (lambda: (x * 2).backward(torch.ones(3)), "Mismatch in shape"),
    ):
        with dlkern.enabled(), pytest.raises(RuntimeError, match=message):
            call()
    with dlkern.enabled():
        (x * 2).sum().backward(inputs=[x])
    assert torch.equal(x.grad, torch.full_like(x, 2))


@pytest.mark.parametrize("where", ["around", "inside"])
def test_compile(where):
    torch._dynamo.reset()

    def network(x):
        return F.linear(F.relu(F.conv2d(x, W)).flatten(2), WIDE)

    def inside(x):
        with dlkern.enabled():
            return network(x)

    compiled = torch.compile(network if where == "around" else inside, fullgraph=True, backend="aot_eager")
    with dlkern.enabled(), dlkern.trace() as calls:
        expected = network(X)
        eager_calls = len(calls)
        if where == "around":
            assert torch.equal(compiled(X), expected)
            assert len(calls) == 2 * eager_calls  # recorded while compiling
    if where == "inside":
        assert torch.equal(compiled(X), expected)
    else:  # the same compiled function without the mode is torch's again
        with dlkern.trace() as calls:
            assert torch.equal(compiled(X), network(X))
        assert not calls


WIDE = torch.randn(5, 36, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize(("module", "shape", "name"), [
    (nn.Linear(4, 3), (2, 4), "linear"), (nn.Conv2d(2, 3, 1), (1, 2, 4, 4), "conv2d"),
    (nn.Conv1d(2, 3, 1), (1, 2, 4), "conv1d"), (nn.LayerNorm(4), (2, 4), "layer_norm"),
    (nn.MaxPool2d(2), (1, 2, 4, 4), "max_pool2d"), (nn.AvgPool2d(2), (1, 2, 4, 4), "avg_pool2d"),
    (nn.AdaptiveAvgPool2d(1), (1, 2, 4, 4), "adaptive_avg_pool2d"), (nn.Dropout(), (2, 4), "dropout"),
])  # fmt: skip
def test_modes_are_asked_once_a_call(module, shape, name):
    """Under enabled() each attribute of a tensor that a converted module's function looked at would cost a microsecond."""
    seen = []

    class Notes(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func.__name__)
            return func(*args, **(kwargs or {}))

    converted, x = dlkern.convert(copy.deepcopy(module)), torch.randn(shape)
    with Notes(), dlkern.enabled():
        converted(x)
    assert seen == [name]


def test_functions_are_leaves_of_a_trace():
    class Model(nn.Module):
        def forward(self, x, weight):
            return dlkern.nn.functional.linear(dlkern.nn.functional.conv1d(x, weight), weight[0])

    graph = torch.fx.symbolic_trace(Model()).graph
    assert [n.target for n in graph.nodes if n.op == "call_function"][::2] == [
        dlkern.nn.functional.conv1d, dlkern.nn.functional.linear
    ]  # fmt: skip

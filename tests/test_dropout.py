"""dropout: the random contract, parity of the kept elements, gradients to any order."""

import warnings

import pytest
import torch

import dlkern
import dlkern.nn.functional as F
from dlkern import ops, reference

SEED = torch.tensor(2**61 + 123456789)
SHAPES = [(1,), (5000,), (3, 7, 11, 5), (2, 8, 4, 4), (0, 3), (4096 * 3 + 1025,)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_same_elements_as_the_reference(shape, dtype):
    x = torch.randn(shape).to(dtype) + 0.5
    formats = [torch.contiguous_format, torch.channels_last] if x.dim() == 4 else [torch.contiguous_format]
    for memory_format in formats:
        z = x.to(memory_format=memory_format)
        ours = ops.dropout.dropout(z, 0.3, SEED)
        theirs = reference.dropout.dropout(z, 0.3, SEED)
        assert torch.equal(ours == 0, theirs == 0)
        assert ours.stride() == z.stride()
        exact = reference.dropout.dropout(z.double(), 0.3, SEED)
        rows = dlkern.testing.compare("output", [ours], [theirs], [exact], dtype)
        assert all(row.ok for row in rows), rows


def test_a_known_word():
    # Philox-4x32-10 of counter 0 and key 0, from the Random123 distribution's known-answer file.
    words = reference.dropout.philox_words(4096, torch.tensor(0))
    assert [int(words[1024 * i]) for i in range(4)] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


def test_share_of_dropped_elements():
    x = torch.ones(1 << 20)
    dropped = (F.dropout(x, 0.25) == 0).double().mean().item()
    assert abs(dropped - 0.25) < 5 * (0.25 * 0.75 / x.numel()) ** 0.5


def test_manual_seed_decides():
    x = torch.randn(1000)
    torch.manual_seed(3)
    first = F.dropout(x)
    second = F.dropout(x)
    torch.manual_seed(3)
    assert torch.equal(F.dropout(x), first)
    assert not torch.equal(first, second)


def test_gradients():
    x = torch.randn(50, dtype=torch.float64, requires_grad=True)
    f = lambda x: ops.dropout.dropout(x, 0.3, SEED)  # noqa: E731
    assert torch.autograd.gradcheck(f, x)
    assert torch.autograd.gradgradcheck(f, x)


def test_checkpoint_drops_the_same():
    x = torch.randn(200, requires_grad=True)
    y = torch.utils.checkpoint.checkpoint(lambda x: F.dropout(x * 2), x, use_reentrant=False)
    (g,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(g != 0, y != 0)


@pytest.mark.parametrize("p", [-0.1, 1.1])
def test_wrong_probability(p):
    with pytest.raises(ValueError, match="dropout probability has to be between 0 and 1"):
        F.dropout(torch.ones(3), p)
    with pytest.raises(ValueError, match="dropout probability"):
        torch.ops.dlkern.dropout_cpu(torch.ones(3), p, SEED)


def test_module_is_torchs():
    module = dlkern.nn.Dropout(0.4)
    assert isinstance(module, torch.nn.Dropout)
    assert repr(module) == repr(torch.nn.Dropout(0.4))
    x = torch.randn(10)
    assert module.eval()(x) is x


# ---- whole channels ----

FEATURE_SHAPES = [(3, 5), (2, 7, 11), (3, 37, 4, 5), (2, 3, 2, 3, 4), (0, 3, 4), (5, 1030, 3), (1, 1, 1, 1)]


def formats(x):
    yield x
    if x.dim() in (4, 5):
        yield x.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", FEATURE_SHAPES)
def test_same_channels_as_the_reference(shape, dtype):
    """And as dropout of a tensor of channels."""
    for x in formats(torch.randn(shape).to(dtype) + 0.5):
        ours, theirs = (f.feature_dropout(x, 0.3, SEED) for f in (ops.dropout, reference.dropout))
        assert torch.equal(ours == 0, theirs == 0) and ours.stride() == x.stride()
        kept = ops.dropout.dropout(torch.ones(shape[:2], dtype=torch.float64), 0.3, SEED) != 0
        assert torch.equal((ours != 0).flatten(2).any(2) if x.dim() > 2 else ours != 0, kept & (x.numel() > 0))
        exact = reference.dropout.feature_dropout(x.double(), 0.3, SEED)
        rows = dlkern.testing.compare("output", [ours], [theirs], [exact], dtype)
        assert all(row.ok for row in rows), rows


def test_features_of_special_values():
    """Dropped channels are zero whatever they held; kept ones keep NaN."""
    x = torch.full((4, 16, 37), float("nan"))
    dropped = (F.dropout1d(torch.ones(4, 16, 5), 0.5) == 0).float().mean()
    assert 0 < dropped < 1
    y = ops.dropout.feature_dropout(x, 0.5, SEED)
    assert set(y.isnan().float().mean(2).unique().tolist()) == {0.0, 1.0} and (y.nan_to_num(0) == 0).all()


def test_feature_gradients():
    x = torch.randn(3, 5, 4, dtype=torch.float64, requires_grad=True)
    f = lambda x: ops.dropout.feature_dropout(x, 0.3, SEED)  # noqa: E731
    assert torch.autograd.gradcheck(f, x)
    assert torch.autograd.gradgradcheck(f, x)
    for z in formats(torch.randn(2, 6, 3, 4)):
        z = z.detach().requires_grad_()
        y = ops.dropout.feature_dropout(z, 0.4, SEED)
        (gradient,) = torch.autograd.grad(y, z, torch.ones_like(y))
        assert torch.equal(gradient != 0, y != 0) and gradient.stride() == z.stride()


CALLS = {
    "dropout1d": [(4, 6, 9), (6, 9)], "dropout2d": [(4, 6, 3, 3), (4, 6, 9), (4, 6), (4, 6, 2, 2, 2)],
    "dropout3d": [(4, 6, 2, 2, 2), (6, 2, 2, 2), (6, 2, 2)],
}  # fmt: skip


@pytest.mark.parametrize(("op", "shape"), [(op, shape) for op, shapes in CALLS.items() for shape in shapes])
def test_functions_and_modules_are_torchs(op, shape):
    """Which dimensions are dropped together, warnings, in place, evaluation, p = 0 and 1."""
    x = torch.ones(shape)
    module = getattr(torch.nn, op.capitalize())
    functions = {
        "ours": getattr(F, op), "theirs": getattr(torch.nn.functional, op),
        "module": lambda x, p: getattr(dlkern.nn, op.capitalize())(p)(x),
    }
    found = {}
    for name, function in functions.items():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.manual_seed(0)
            y = torch.stack([function(x, 0.5) for _ in range(40)])
        together = [d for d in range(x.dim()) if torch.equal(y.amax(d + 1), y.amin(d + 1))]
        kinds = {str(w.message)[:45] for w in caught if issubclass(w.category, UserWarning) and op in str(w.message)}
        found[name] = (together, kinds, set(y.unique().tolist()))
    assert found["ours"] == found["theirs"] == found["module"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert functions["ours"](x, 1.0).count_nonzero() == 0
        assert torch.equal(functions["ours"](x, 0.0), x) and functions["ours"](x, 0.5, False) is x
        z = x.clone()
        y = functions["ours"](z, 0.5, True, True)
        assert y is z and 0 < (z == 0).sum()
        with dlkern.trace() as calls:
            functions["ours"](x, 0.5)
    assert [(call.op, call.backend) for call in calls] == [(op, "cpu")]
    assert repr(dlkern.convert(module(0.3))) == repr(module(0.3))


@pytest.mark.parametrize("op", CALLS)
@pytest.mark.filterwarnings("ignore")
def test_feature_errors_are_torchs(op):
    x = torch.ones(2, 3, 4)
    for call in (lambda f: f(x, 1.5), lambda f: f(x[0, 0], 0.5), lambda f: f(x.long(), 0.5)):
        raised = []
        for functions in (torch.nn.functional, F):
            try:
                call(getattr(functions, op))
                raised.append(None)
            except Exception as error:
                raised.append((type(error), str(error)))
        assert raised[0] == raised[1]


def test_raw_feature_dropout_refuses():
    for call, message in (
        (lambda: torch.ops.dlkern.feature_dropout_cpu(torch.ones(2, 3), 1.5, SEED), "dropout probability"),
        (lambda: torch.ops.dlkern.feature_dropout_cpu(torch.ones(2), 0.5, SEED), "at least 2 dimensions"),
        (lambda: torch.ops.dlkern.feature_dropout_cpu(torch.ones(2, 3), 0.5, SEED.int()), "one int64"),
        (lambda: torch.ops.dlkern.feature_dropout_cpu(torch.ones(2, 3).long(), 0.5, SEED), "float32, float64, bfloat16"),
    ):
        with pytest.raises((RuntimeError, ValueError), match=message):
            call()

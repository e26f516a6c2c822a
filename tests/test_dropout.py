"""dropout: the random contract, parity of the kept elements, gradients to any order."""

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

"""The short way of a call (ops/_plain.py) and the long one, which an open trace() takes, are the same in results,
gradients and exceptions."""

import copy

import pytest
import torch
from torch import nn

import dlkern

MODULES = {
    "LSTM": (nn.LSTM, (4, 3, 5), dict(num_layers=2, bidirectional=True)), "GRU": (nn.GRU, (4, 3, 5), dict(batch_first=True)),
    "RNN": (nn.RNN, (4, 5), dict(nonlinearity="relu")), "LSTMCell": (nn.LSTMCell, (3, 5), {}),
    "GRUCell": (nn.GRUCell, (3, 5), dict(bias=False)), "RNNCell": (nn.RNNCell, (3, 5), dict(nonlinearity="relu")),
    "LayerNorm": (nn.LayerNorm, (4, 5), None), "MultiheadAttention": (nn.MultiheadAttention, (4, 3, 6), None),
}  # fmt: skip


def make(name):
    cls, shape, options = MODULES[name]
    arguments = {"LayerNorm": (5,), "MultiheadAttention": (6, 2)}.get(name, (5, 7))
    return cls(*arguments, **(options or {})), torch.randn(shape, requires_grad=True)


def call(module, x, *more):
    found = module(x, x, x, need_weights=False)[0] if isinstance(module, nn.MultiheadAttention) else module(x, *more)
    tensors = []
    for part in found if isinstance(found, tuple) else (found,):
        tensors += part if isinstance(part, tuple) else (part,)
    return tensors


@pytest.mark.parametrize("name", MODULES)
def test_the_same_bits(name):
    module, x = make(name)
    module = dlkern.convert(module)
    for last in (False, True):  # of all results, or of the last alone, so that others have no gradient

        def run(last=last):
            tensors = call(module, x)[-1 if last else 0 :]
            leaves = [x, *module.parameters()]
            return [*tensors, *torch.autograd.grad(sum(t.sin().sum() for t in tensors), leaves, allow_unused=True)]

        short = run()
        with dlkern.trace() as calls:
            long = run()
        assert {c.backend for c in calls} == {"cpu"}
        with torch.no_grad():
            alone = call(module, x)[-1 if last else 0 :]
        for a, b in zip(short, long, strict=True):
            assert (a is None) == (b is None) and (a is None or torch.equal(a, b))
        assert all(torch.equal(a, b) for a, b in zip(alone, short))


@pytest.mark.parametrize("name", [name for name in MODULES if name not in ("LayerNorm", "MultiheadAttention")])
def test_the_same_exceptions_as_torch(name):
    theirs, x = make(name)
    ours, size = dlkern.convert(copy.deepcopy(theirs)), (3, 7)
    state = torch.randn(size)
    wrong = [
        (x[..., :4],), (x.double(),), (x[None, None],), (x, torch.randn(2, 2, 2, 2)), (x, state.double()), (x, state[:, :3]),
        (x, (state,)), (x, (state, state, state)), (x, (state.int(), state.int())), (x, (state, state[:1])), (x.int(),),
        (x, 3.0), (None,),
    ]  # fmt: skip
    for arguments in wrong:
        raised = []
        for module in (theirs, ours):
            try:
                call(module, *arguments)
                raised.append(None)
            except Exception as error:
                raised.append((type(error), str(error)))
        assert raised[0] == raised[1], arguments

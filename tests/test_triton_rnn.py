"""Projections and options of recurrent layers in the Triton column, interpreted: the CPU column's cases (test_rnn.py),
beside a loop over steps in torch's ops."""

import pytest
import torch
from test_rnn import OPTIONS, STACKS, Seeded, assert_by_the_rule, each_kind, each_option, looped, make, ours, results, states
from torch.nn.utils.rnn import pack_padded_sequence
from triton_column import emulated  # noqa: F401

import dlkern
import dlkern.nn as nn
from dlkern.ops._registry import raw

pytest.importorskip("triton")

from dlkern.kernels import rnn as kernels


def assert_ours_by_the_rule(draw, dtype=torch.float32, draws=2, pair=looped):
    assert_by_the_rule(draw, dtype, draws, pair, "triton")


@each_option
def test_options(kind, options):
    assert_ours_by_the_rule(lambda: (ours(kind, 3, 9, **options), torch.randn(3, 2, 3), states(kind, 1, 2, 9)))


@pytest.mark.parametrize(("kind", "dtype", "draws"), [("lstm", torch.float32, 16), ("gru", torch.bfloat16, 4)], ids=str)
def test_many_products_in_their_own_type(kind, dtype, draws, monkeypatch):
    """Rather than in the next wider one, as few are."""
    monkeypatch.setattr(kernels, "_FEW_PRODUCTS", 0)
    options = {**OPTIONS["all"], "peephole": kind == "lstm"}
    assert_ours_by_the_rule(lambda: (ours(kind, 3, 20, **options), torch.randn(2, 2, 3), None), dtype, draws)


def test_options_of_stacks_and_projections():
    options = {**STACKS["all"], **OPTIONS["all"], "proj_size": 4, "zoneout": (0.3, 0.1)}
    assert_ours_by_the_rule(lambda: (ours("lstm", 3, 9, **options), torch.randn(2, 2, 3), None), draws=1)
    assert_ours_by_the_rule(lambda: (ours("lstm", 3, 9, **options).eval(), torch.randn(2, 2, 3), None), torch.bfloat16, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_projections(dtype):
    """Of more units than a tile has, too; without gradients nothing is kept, and the numbers are the same."""
    for inputs, hidden, projected in ((3, 9, 4), (3, 40, 35)):
        draw = lambda: (make("lstm", inputs, hidden, proj_size=projected), torch.randn(3, 2, inputs), None)  # noqa: B023, E731
        assert_by_the_rule(draw, dtype, 2, column="triton")
    module, x = dlkern.convert(make("lstm", 3, 9, proj_size=4)), torch.randn(3, 2, 3)
    with torch.no_grad():
        found = module(x)[0]
    assert torch.equal(found, module(x)[0])


@pytest.mark.parametrize("train", [False, True], ids=["evaluation", "training"])
@each_kind
def test_lengths(kind, train):
    """Packed and padded, NaN in the padding, beside the reference with the same masks, in float64."""
    lengths = torch.tensor([2, 3, 1])
    options = {name: value for name, value in OPTIONS["all"].items() if name != "peephole" or kind == "lstm"}
    options |= {"proj_size": 5} if kind == "lstm" and not train else {}
    torch.manual_seed(0)
    module = ours(kind, 4, 9, bidirectional=True, **options).double().train(train)
    x = torch.randn(3, 3, 4, dtype=torch.float64)
    for b, length in enumerate(lengths):
        x[length:, b] = float("nan")
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    found = {}
    for column in ("triton", "reference"):
        with dlkern.backend(column):
            found[column] = [
                *results(Seeded(module), packed, None, torch.float64),
                *results(Seeded(module, lengths=lengths), x, None, torch.float64),
            ]
    for a, b in zip(found["triton"], found["reference"], strict=True):
        torch.testing.assert_close(a, b)


@each_kind
def test_gates_may_be_computed_again(kind):
    module = ours(kind, 3, 5, layer_norm=True, zoneout=0.2, recurrent_dropout=0.3)
    found = []
    for module.save in ("gates", "recompute"):
        x = torch.randn(2, 2, 3, generator=torch.Generator().manual_seed(1))
        found.append(results(Seeded(module), x, None, torch.float32))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_cells_and_second_derivatives():
    cell = nn.LSTMCell(3, 5, layer_norm=True, zoneout=(0.3, 0.6), peephole=True).double().eval()
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    found = []
    for column in ("triton", "reference"):
        with dlkern.backend(column):
            (gradient,) = torch.autograd.grad(cell(x)[0].square().sum(), x, create_graph=True)
            found.append(torch.autograd.grad(gradient.square().sum(), cell.weight_hh)[0])
    torch.testing.assert_close(*found)


def test_wrong_arguments_of_options(monkeypatch):
    """Each tensor of another size, of another type, or of other units."""
    calls = []
    for name in ("rnn_options_forward", "rnn_options_backward"):
        monkeypatch.setitem(raw[name], "triton", lambda *args, op=raw[name]["triton"]: calls.append((op, args)) or op(*args))
    results(ours("lstm", 3, 5, proj_size=4, **OPTIONS["all"]), torch.randn(2, 2, 3), None, torch.float32)
    assert len(calls) == 2
    for op, args in calls:
        args = [a.detach() if isinstance(a, torch.Tensor) else a for a in args]
        torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))
        for i, a in enumerate(args):
            if isinstance(a, torch.Tensor) and a.numel():
                for wrong in (a.new_zeros((*a.shape[:-1], a.shape[-1] + 1)), a.to(torch.int32)):
                    with pytest.raises((RuntimeError, ValueError)):
                        op(*args[:i], wrong, *args[i + 1 :])
        with pytest.raises(ValueError, match="between 0 and 1"):
            op(*[2.0 if isinstance(a, float) else a for a in args])

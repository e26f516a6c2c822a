"""RNN, LSTM and GRU of the CUDA column, run on the host: one launch for all steps and one a step, odd and aligned sizes,
few and many sequences, packed and padded ones. tests/test_cuda_builds.py runs this file again on the checked build."""

import contextlib
import copy

import pytest
import torch
from cuda_column import ON_CHECKED_BUILD, all_dtypes, library, no_findings, on_cuda  # noqa: F401
from test_rnn import KINDS, OPTIONS, STACKS, Seeded, each_kind, each_option, leaves, looped, make, moved, ours, results, states
from test_rnn import assert_by_the_rule as assert_options_by_the_rule
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import dlkern
from dlkern.ops import rnn as ops
from dlkern.ops._registry import raw
from dlkern.testing import compare, cuda_on_host


def on_our_column(module, *args):
    with on_cuda():
        return results(dlkern.convert(copy.deepcopy(module)), *args)


def assert_by_the_rule(draw, dtype, draws, scale=1.0):
    """draw() gives a torch module, an input and a state; its converted copy keeps the rule. scale: of results' gradients."""
    if ON_CHECKED_BUILD:
        torch.manual_seed(0)
        module, input, hx = draw()
        on_our_column(module.to(dtype), input, hx, dtype, scale)
        return
    for count in (draws, 8 * draws):
        found = []
        for seed in range(count):
            torch.manual_seed(seed)
            module, input, hx = draw()
            module = module.to(dtype)
            exact = results(module, moved(input, dtype), moved(hx, dtype), torch.float64, scale)
            theirs = results(module, input, hx, dtype, scale)
            for i, triple in enumerate(zip(on_our_column(module, input, hx, dtype, scale), theirs, exact, strict=True)):
                found.append([]) if i == len(found) else None
                found[i].append(triple)
        rows = [row for i, triples in enumerate(found) for row in compare(f"result {i}", *zip(*triples), dtype)]
        failed = [row for row in rows if row.region == "whole" and not row.ok]
        if not failed:
            return  # else chance, or a fault: more draws tell
    raise AssertionError(failed)


# inputs, hidden, batch, steps: units that fill no pack and no block, several blocks of packs, blocks of 64 sequences.
SIZES = {"odd": (5, 9, 3, 4), "packs": (8, 40, 2, 3), "wide": (6, 24, 19, 3)}


@all_dtypes
@pytest.mark.parametrize("size", SIZES)
@each_kind
def test_rnn(kind, size, dtype):
    inputs, hidden, batch, steps = SIZES[size]
    draw = lambda: (make(kind, inputs, hidden), torch.randn(steps, batch, inputs), states(kind, 1, batch, hidden))  # noqa: E731
    assert_by_the_rule(draw, dtype, draws=16 if kind == "rnn_relu" else 8)  # relu's derivative jumps


@all_dtypes
@each_kind
def test_rnn_in_the_least_shared_memory_that_a_gpu_has(kind, dtype):
    """99 KB: too little for the ring of few sequences in float32, with three or four gates. One launch and one a step."""
    for steps in (3, 1):
        draw = lambda: (make(kind, 5, 40), torch.randn(steps, 3, 5), states(kind, 1, 3, 40))  # noqa: B023, E731
        with cuda_on_host.shared_bytes(99 * 1024):
            assert_by_the_rule(draw, dtype, draws=16 if kind == "rnn_relu" else 8)


@pytest.mark.parametrize("batch", [2, 17])
@each_kind
def test_rnn_long_sums(kind, batch):
    """More of the sum than the ring holds: forward of many sequences, backward of few."""
    draw = lambda: (make(kind, 3, 104, bias=False), torch.randn(2, batch, 3), None)  # noqa: E731
    assert_by_the_rule(draw, torch.float32, draws=2)


@pytest.mark.parametrize("scale", [2.0**-12, 2.0**9], ids=["small", "large"])
@pytest.mark.parametrize("kind", ["rnn_tanh", "lstm", "gru"])  # relu's derivative jumps
def test_rnn_float16_gradients_near_the_ends_of_its_range(kind, scale):
    """Those of a mean, subnormal in part, and those of a scaled loss."""
    draw = lambda: (make(kind, 6, 20), torch.randn(12, 3, 6), None)  # noqa: E731
    assert_by_the_rule(draw, torch.float16, draws=8, scale=scale)


@each_kind
def test_rnn_stacks(kind):
    draw = lambda: (make(kind, 3, 9, num_layers=2, bidirectional=True, batch_first=True), torch.randn(2, 3, 3), None)  # noqa: E731
    assert_by_the_rule(draw, torch.float32, draws=8)


LENGTHS = {"sorted": [5, 4, 2, 2], "unsorted": [2, 5, 1, 4], "one": [4]}


@all_dtypes
@pytest.mark.parametrize("lengths", LENGTHS)
@each_kind
def test_rnn_packed(kind, lengths, dtype):
    lengths = torch.tensor(LENGTHS[lengths])

    def draw():
        padded = torch.randn(5, len(lengths), 6)
        packed = pack_padded_sequence(padded, lengths, enforce_sorted=False)
        return make(kind, 6, 16, bidirectional=True), packed, states(kind, 2, len(lengths), 16)

    assert_by_the_rule(draw, dtype, draws=4)


@pytest.mark.parametrize("batch", [4, 22])
@all_dtypes
@each_kind
def test_rnn_lengths_are_packing(kind, dtype, batch):
    """And what padding holds, NaN even, has no effect."""
    lengths = (torch.tensor([2, 5, 1, 4]).repeat(6))[:batch]
    module = dlkern.convert(make(kind, 6, 9, bidirectional=True)).to(dtype)
    padded = torch.randn(6, batch, 6, dtype=dtype)
    for b, length in enumerate(lengths):
        padded[length:, b] = float("nan")
    found = []
    for packed in (False, True):
        x = padded.clone().requires_grad_()
        with on_cuda():
            if packed:
                output, hidden = module(pack_padded_sequence(x, lengths, enforce_sorted=False))
                output, _ = pad_packed_sequence(output, total_length=6)
            else:
                output, hidden = module(x, lengths=lengths)
            weighted = (output * torch.arange(output.numel(), dtype=dtype).reshape(output.shape).sin()).sum()
            gradients = torch.autograd.grad(weighted + sum(leaf.sum() for leaf in leaves(hidden)), [x, *module.parameters()])
        found.append([output.detach(), *(leaf.detach() for leaf in leaves(hidden)), *gradients])
    assert found[0][-len(gradients)].isfinite().all()
    for padded, packed in zip(*found, strict=True):
        torch.testing.assert_close(padded, packed)


def sample(kind, dtype, batch=3, hidden=40, lengths=None):
    """Results of both raw ops."""
    torch.manual_seed(1)
    mode, gates = list(KINDS).index(kind), ops.GATES[list(KINDS).index(kind)]
    x, w_ih, w_hh, b, h = (torch.randn(*n).to(dtype) / 4 for n in (
        (4, batch, 8), (gates * hidden, 8), (gates * hidden, hidden), (gates * hidden,), (batch, hidden)))
    lstm = mode == ops.LSTM
    c = h * 2 if lstm else None
    sizes = None if lengths is None else torch.tensor(lengths)
    found = []
    for reverse in (False, True):
        forward = raw["rnn_forward"]["cuda"](x, w_ih, w_hh, b, b, None, h, c, None, sizes, mode, reverse, True)
        assert all(torch.equal(one, other) for one, other in zip(
            forward[:3], raw["rnn_forward"]["cuda"](x, w_ih, w_hh, b, b, None, h, c, None, sizes, mode, reverse, False)[:3]))
        found += forward if lengths is None else forward[:3]  # of what is saved, padding has no value
        found += raw["rnn_backward"]["cuda"](
            forward[0], forward[1], forward[2] if lstm else None, x, w_ih, w_hh, None, h, c, forward[0], *forward[3:], None,
            sizes, mode, reverse, True, True, True)
    return found


@pytest.mark.parametrize(("batch", "lengths"), [(3, None), (3, [2, 4, 3]), (70, None)], ids=["few", "lengths", "many"])
@all_dtypes
@each_kind
def test_rnn_one_launch_and_one_a_step_give_the_same_bits(kind, dtype, batch, lengths):
    resident = sample(kind, dtype, batch, 24, lengths)
    with cuda_on_host.multiprocessors(0):
        stepwise = sample(kind, dtype, batch, 24, lengths)
    assert all(torch.equal(one, other) for one, other in zip(resident, stepwise))


@pytest.mark.parametrize("order,seed", [("reverse", 1), ("random", 1)])
@each_kind
def test_rnn_same_bits_in_every_thread_order(kind, order, seed):
    forward = sample(kind, torch.bfloat16)
    with cuda_on_host.thread_order(order, seed):
        other = sample(kind, torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(forward, other))


def test_rnn_wrong_arguments():
    x, w_ih, w_hh, h = torch.randn(4, 3, 5), torch.randn(9, 5), torch.randn(9, 9), torch.randn(3, 9)
    call = raw["rnn_forward"]["cuda"]
    assert call(x, w_ih, w_hh, None, None, None, h, None, None, None, 0, False, False)[0].shape == (4, 3, 9)
    for i, wrong in ((0, x[0]), (0, x.double()), (1, w_ih[:8]), (2, w_hh[:, :8]), (3, w_ih), (5, w_hh), (6, h[:2]),
                     (6, h.bfloat16()), (7, h), (8, torch.tensor([3])), (9, torch.tensor([5, 4, 4])), (10, 4)):
        arguments = [x, w_ih, w_hh, None, None, None, h, None, None, None, 0, False, False]
        arguments[i] = wrong
        with pytest.raises((RuntimeError, ValueError)):
            call(*arguments)
    with pytest.raises(RuntimeError, match="float16"):
        raw["rnn_route"]["cuda"](h.double(), 0, 4, False)


PROJECTIONS = {"odd": (3, 9, 4, 3), "packs": (8, 40, 16, 2), "wide": (3, 24, 5, 18)}


@all_dtypes
@pytest.mark.parametrize("size", PROJECTIONS)
def test_rnn_projections(size, dtype):
    inputs, hidden, projected, batch = PROJECTIONS[size]
    draw = lambda: (make("lstm", inputs, hidden, proj_size=projected), torch.randn(3, batch, inputs), None)  # noqa: E731
    assert_by_the_rule(draw, dtype, draws=4)


def options_by_the_rule(draw, dtype, draws):
    with dlkern.testing.emulated():
        assert_options_by_the_rule(draw, dtype, draws, looped, "cuda")


@all_dtypes
@each_option
def test_rnn_options(kind, options, dtype):
    draw = lambda: (ours(kind, 5, 37, **options), torch.randn(3, 3, 5), states(kind, 1, 3, 37))  # noqa: E731
    options_by_the_rule(draw, dtype, draws=6)


@each_kind
def test_rnn_options_of_many_units(kind):
    """More than threads, and blocks of 64 sequences."""
    options = {name: value for name, value in OPTIONS["all"].items() if name != "peephole" or kind == "lstm"}
    options_by_the_rule(lambda: (ours(kind, 3, 132, **options), torch.randn(2, 18, 3), None), torch.float32, draws=1)
    unnormed = {**options, "layer_norm": False}
    options_by_the_rule(lambda: (ours(kind, 3, 132, **unnormed), torch.randn(2, 2, 3), None), torch.float32, draws=1)


@each_kind
def test_rnn_options_evaluation(kind):
    options = {"zoneout": (0.3, 0.6)} if kind == "lstm" else {"zoneout": 0.3}
    draw = lambda: (ours(kind, 5, 37, bias=False, layer_norm=True, **options).eval(), torch.randn(3, 2, 5), None)  # noqa: E731
    options_by_the_rule(draw, torch.float32, draws=4)


def test_rnn_options_of_stacks_and_projections():
    options = {**STACKS["all"], **OPTIONS["all"], "proj_size": 4, "zoneout": (0.3, 0.1)}
    options_by_the_rule(lambda: (ours("lstm", 5, 37, **options), torch.randn(2, 3, 5), None), torch.float32, draws=2)


@pytest.mark.parametrize("train", [False, True], ids=["evaluation", "train"])
@each_kind
def test_rnn_options_lengths(kind, train):
    """Packed and padded, NaN in the padding, beside the CPU column with the same masks."""
    lengths = torch.tensor([2, 3, 1])
    options = {name: value for name, value in OPTIONS["all"].items() if name != "peephole" or kind == "lstm"}
    options |= {"proj_size": 5} if kind == "lstm" and not train else {}
    torch.manual_seed(0)
    module = ours(kind, 4, 9, bidirectional=True, **options).train(train)
    x = torch.randn(3, 3, 4)
    for b, length in enumerate(lengths):
        x[length:, b] = float("nan")
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    found = []
    for column in (on_cuda, contextlib.nullcontext):
        with column():
            found.append([
                *results(Seeded(module), packed, None, torch.float32),
                *results(Seeded(module, lengths=lengths), x, None, torch.float32),
            ])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("order,seed", [("reverse", 1), ("random", 1)])
def test_rnn_options_same_bits_in_every_thread_order(order, seed):
    module = ours("lstm", 3, 9, **OPTIONS["all"], proj_size=4)
    found = []
    for chosen in (contextlib.nullcontext(), cuda_on_host.thread_order(order, seed)):
        x = torch.randn(2, 3, 3, generator=torch.Generator().manual_seed(1))
        with chosen, on_cuda():
            found.append(results(Seeded(module), x, None, torch.float32))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_rnn_options_wrong_arguments(monkeypatch):
    calls = []
    for name in ("rnn_options_forward", "rnn_options_backward"):
        monkeypatch.setitem(raw[name], "cuda", lambda *args, op=raw[name]["cuda"]: calls.append((op, args)) or op(*args))
    with on_cuda():
        results(ours("lstm", 3, 5, proj_size=4, **OPTIONS["all"]), torch.randn(2, 2, 3), None, torch.float32)
    assert len(calls) == 2
    for op, args in calls:
        args = [a.detach() if isinstance(a, torch.Tensor) else a for a in args]
        torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))
        for i, a in enumerate(args):  # each tensor of another size, or another dtype
            if isinstance(a, torch.Tensor) and a.numel():
                for wrong in (a.new_zeros((*a.shape[:-1], a.shape[-1] + 1)), a.to(torch.int32)):
                    with pytest.raises((RuntimeError, ValueError)):
                        op(*args[:i], wrong, *args[i + 1 :])


def test_rnn_why_a_launch_a_step_is_recorded():
    def reason(count, hidden=40, steps=3):
        module = dlkern.convert(torch.nn.RNN(3, hidden))
        with cuda_on_host.multiprocessors(count), on_cuda(), dlkern.trace() as calls, torch.no_grad():
            module(torch.randn(steps, 2, 3))
        return [call.reason for call in calls]

    assert reason(132) == [""]
    with on_cuda(), dlkern.trace() as calls:
        dlkern.convert(torch.nn.LSTM(3, 4, proj_size=2))(torch.randn(2, 2, 3))
    assert [call.reason for call in calls] == ["launches for each step: a layer with options, or with a projection"]
    assert reason(1) == [""] and reason(0) == ["a launch a step in forward: the blocks of a launch do not all run at once"]
    assert reason(0, steps=1) == [""]
    route = lambda hidden, mode: [  # noqa: E731
        raw["rnn_route"]["cuda"](torch.zeros(2, hidden), mode, 5, backward) for backward in (False, True)]
    assert route(40, 0) == [0, 0] and route(4000, 2) == [2, 2]


@each_kind
def test_rnn_cells_and_second_derivatives(kind):
    module = dlkern.convert(make(kind, 4, 7))
    x = torch.randn(2, 3, 4, requires_grad=True)
    found = []
    for column in (on_cuda, lambda: dlkern.backend("reference")):
        with column():
            (gradient,) = torch.autograd.grad(module(x)[0].square().sum(), x, create_graph=True)
            found.append(torch.autograd.grad(gradient.square().sum(), module.weight_hh_l0)[0])
    torch.testing.assert_close(*found)
    cell = dlkern.convert({"gru": torch.nn.GRUCell, "lstm": torch.nn.LSTMCell}.get(kind, torch.nn.RNNCell)(4, 7))
    y = torch.randn(3, 4)
    with on_cuda():
        here = cell(y)
    torch.testing.assert_close(here, cell(y))

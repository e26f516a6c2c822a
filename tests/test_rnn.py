"""RNN, LSTM, GRU and their cells: stacks, directions, packed and unbatched input, states, beside torch by the rule;
options that torch does not have, beside a loop in torch's ops."""

import contextlib
import copy
import pickle
from functools import partial

import pytest
import torch
import torch.nn.functional as TF
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from threads import on_threads
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

import dlkern
import dlkern.nn as nn
import dlkern.nn.functional as F
from dlkern.ops._registry import raw
from dlkern.testing import compare

KINDS = {
    "rnn_tanh": (torch.nn.RNN, {}), "rnn_relu": (torch.nn.RNN, {"nonlinearity": "relu"}), "lstm": (torch.nn.LSTM, {}),
    "gru": (torch.nn.GRU, {}),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


def make(kind, *sizes, **options):
    cls, more = KINDS[kind]
    return cls(*sizes, **more, **options)


def leaves(value):
    """The tensors of an output or a state, packed ones by their data."""
    if isinstance(value, PackedSequence):
        return [value.data]
    return [value] if isinstance(value, torch.Tensor) else [t for v in value for t in leaves(v)]


def moved(value, dtype):
    if isinstance(value, PackedSequence):
        return value._replace(data=value.data.detach().to(dtype).requires_grad_())
    if isinstance(value, tuple):
        return tuple(moved(v, dtype) for v in value)
    return None if value is None else value.detach().to(dtype).requires_grad_()


def results(module, input, hx, dtype, scale=1.0):
    """Outputs and the gradients of input, states and parameters; scale: of outputs' gradients."""
    module, input, hx = copy.deepcopy(module).to(dtype), moved(input, dtype), moved(hx, dtype)
    outputs = leaves(module(input, hx))
    wanted = [*leaves(input), *([] if hx is None else leaves(hx)), *module.parameters()]
    generator = torch.Generator().manual_seed(5)
    cotangents = [(scale * torch.randn(o.shape, generator=generator)).to(dtype) for o in outputs]
    return [*(o.detach() for o in outputs), *torch.autograd.grad(outputs, wanted, cotangents)]


def converted(module):
    """Ours and torch's."""
    ours = dlkern.convert(copy.deepcopy(module))
    assert type(ours).__module__.startswith("dlkern")
    return ours, module


def assert_by_the_rule(draw, dtype=torch.float32, draws=16, pair=converted, column="cpu"):
    """draw() gives a module, an input and a state; ours of pair(module) keeps the rule beside the other, on that column."""
    for first, count in ((0, draws), (draws, 4 * draws), (5 * draws, 16 * draws)):
        failed = [row for row in rows_of(draw, dtype, range(first, first + count), pair, column) if not row.ok]
        if not failed:
            return  # else chance, or a fault: more draws tell, and others, since a single one can have the largest error
    raise AssertionError(failed)


def rows_of(draw, dtype, seeds, pair, column):
    found = []
    for seed in seeds:
        torch.manual_seed(seed)
        module, input, hx = draw()
        ours, theirs = pair(module.to(dtype))
        forced = contextlib.nullcontext() if column == "cpu" else dlkern.backend(column)
        with forced, dlkern.trace() as calls:
            mine = results(ours, input, hx, dtype)
        assert calls and {call.backend for call in calls} == {column}, calls
        exact = results(theirs, moved(input, dtype), moved(hx, dtype), torch.float64)
        for i, triple in enumerate(zip(mine, results(theirs, input, hx, dtype), exact, strict=True)):
            found.append([]) if i == len(found) else None
            found[i].append(triple)
    rows = [row for i, triples in enumerate(found) for row in compare(f"result {i}", *zip(*triples), dtype)]
    return [row for row in rows if row.region == "whole"]


STACKS = {
    "plain": {}, "two layers": {"num_layers": 2}, "both ways": {"bidirectional": True}, "no bias": {"bias": False},
    "batch first": {"batch_first": True}, "all": {"num_layers": 2, "bidirectional": True, "batch_first": True, "bias": False},
}


@pytest.mark.parametrize("stack", STACKS)
@each_kind
def test_modules_keep_the_rule(kind, stack):
    assert_by_the_rule(lambda: (make(kind, 5, 9, **STACKS[stack]), torch.randn(4, 3, 5), None))


@each_kind
def test_more_units_than_a_panel_and_more_rows_than_a_block(kind):
    assert_by_the_rule(lambda: (make(kind, 7, 70), torch.randn(3, 50, 7), None), draws=2)
    assert_by_the_rule(lambda: (make(kind, 3, 300), torch.randn(3, 2, 3), None), draws=2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@each_kind
def test_16_bits(kind, dtype):
    assert_by_the_rule(lambda: (make(kind, 6, 20), torch.randn(5, 4, 6), None), dtype, draws=8)


def states(kind, layers, batch, hidden):
    h = torch.randn(layers, batch, hidden)
    return (h, torch.randn(layers, batch, hidden)) if kind == "lstm" else h


@each_kind
def test_initial_states(kind):
    assert_by_the_rule(lambda: (make(kind, 5, 9, bidirectional=True), torch.randn(4, 3, 5), states(kind, 2, 3, 9)))


@each_kind
def test_unbatched(kind):
    def state():
        found = states(kind, 2, 1, 9)
        return tuple(s[:, 0] for s in found) if kind == "lstm" else found[:, 0]

    for options in ({}, {"batch_first": True}):
        assert_by_the_rule(lambda o=options: (make(kind, 5, 9, num_layers=2, **o), torch.randn(4, 5), state()))


PROJECTIONS = {"plain": {}, "all": {"num_layers": 2, "bidirectional": True, "batch_first": True, "bias": False}}


@pytest.mark.parametrize("stack", PROJECTIONS)
def test_projections(stack):
    def draw(inputs, hidden, projected):
        return make("lstm", inputs, hidden, proj_size=projected, **PROJECTIONS[stack]), torch.randn(4, 3, inputs), None

    assert_by_the_rule(lambda: draw(5, 9, 4))
    assert_by_the_rule(lambda: draw(7, 70, 40), draws=2)
    assert_by_the_rule(lambda: draw(6, 20, 9), torch.bfloat16, draws=8)


LENGTHS = {"sorted": [5, 4, 2, 2], "unsorted": [2, 5, 1, 4], "equal": [3, 3, 3], "one": [4]}


@pytest.mark.parametrize("lengths", LENGTHS)
@each_kind
def test_packed(kind, lengths):
    lengths = torch.tensor(LENGTHS[lengths])

    def draw():
        padded = torch.randn(len(lengths), 5, 6)
        packed = pack_padded_sequence(padded, lengths, batch_first=True, enforce_sorted=False)
        return make(kind, 6, 9, bidirectional=True), packed, states(kind, 2, len(lengths), 9)

    assert_by_the_rule(draw)


@each_kind
def test_packed_results_are_torchs_in_order_and_kind(kind):
    module = make(kind, 6, 9, num_layers=2, bidirectional=True)
    packed = pack_padded_sequence(torch.randn(5, 4, 6), [2, 5, 1, 4], enforce_sorted=False)
    theirs, ours = module(packed), dlkern.convert(copy.deepcopy(module))(packed)
    for field in ("batch_sizes", "sorted_indices", "unsorted_indices"):
        assert torch.equal(getattr(ours[0], field), getattr(theirs[0], field))
    for a, b in zip(leaves(ours), leaves(theirs), strict=True):
        assert a.shape == b.shape and a.stride() == b.stride()
        torch.testing.assert_close(a, b)


@each_kind
def test_lengths_are_packing(kind):
    lengths = torch.tensor([2, 5, 1, 4])
    for first in (False, True):
        module = dlkern.convert(make(kind, 6, 9, bidirectional=True, batch_first=first))
        x = torch.randn(4, 6, 6) if first else torch.randn(6, 4, 6)
        output, hidden = module(x, lengths=lengths)
        packed, expected = module(pack_padded_sequence(x, lengths, first, enforce_sorted=False))
        assert torch.equal(output, pad_packed_sequence(packed, first, total_length=6)[0])
        assert all(torch.equal(a, b) for a, b in zip(leaves(hidden), leaves(expected)))
        beyond = output.transpose(0, 1) if first else output
        assert all(beyond[length:, b].eq(0).all() for b, length in enumerate(lengths))


@pytest.mark.parametrize("kind", [*KINDS, "projected"])
def test_gradients_with_lengths_are_those_of_packing(kind):
    """And what padding holds, NaN even, has no effect."""
    lengths = torch.tensor([2, 5, 1, 4, 4])
    options = {"proj_size": 5} if kind == "projected" else {}
    for sizes, dtype in (((6, 9), torch.float32), ((20, 70), torch.float32), ((6, 9), torch.bfloat16)):
        module = dlkern.convert(make("lstm" if options else kind, *sizes, bidirectional=True, **options)).to(dtype)
        padded = torch.randn(6, 5, sizes[0], dtype=dtype)
        for b, length in enumerate(lengths):
            padded[length:, b] = float("nan")
        grads = []
        for packed in (False, True):
            x = padded.clone().requires_grad_()
            if packed:
                output, _ = module(pack_padded_sequence(x, lengths, enforce_sorted=False))
                output, _ = pad_packed_sequence(output, total_length=6)
            else:
                output, _ = module(x, lengths=lengths)
            module.zero_grad()
            (output * torch.arange(output.numel(), dtype=dtype).reshape(output.shape).sin()).sum().backward()
            grads.append([output.detach(), x.grad, *(p.grad.clone() for p in module.parameters())])
        assert grads[0][1].isfinite().all()
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b)


CELLS = {
    "RNNCell": {}, "RNNCell relu": {"nonlinearity": "relu"}, "LSTMCell": {}, "GRUCell": {}, "GRUCell no bias": {"bias": False},
}


@pytest.mark.parametrize("name", CELLS)
def test_cells(name):
    def draw(batch):
        cell = getattr(torch.nn, name.split()[0])(5, 9, **CELLS[name])
        h = torch.randn(*batch, 9)
        return cell, torch.randn(*batch, 5), (h, torch.randn(*batch, 9)) if "LSTM" in name else h

    assert_by_the_rule(lambda: draw((3,)))
    assert_by_the_rule(lambda: draw(()))
    assert_by_the_rule(lambda: (*draw((4,))[:2], None))


@each_kind
def test_dropout_between_layers(kind):
    """All dropped: the second layer sees zeros, as torch's. In evaluation nothing is."""
    module = make(kind, 5, 9, num_layers=2, dropout=1.0)
    ours, x = dlkern.convert(copy.deepcopy(module)), torch.randn(4, 3, 5)
    torch.testing.assert_close(ours(x)[0], module(x)[0])
    torch.testing.assert_close(ours.eval()(x)[0], module.eval()(x)[0])
    half = dlkern.convert(make(kind, 5, 64, num_layers=2, dropout=0.5))
    torch.manual_seed(1)
    first = half(x)[0]
    torch.manual_seed(1)
    assert torch.equal(half(x)[0], first) and not torch.equal(half(x)[0], first)


def assert_threads_change_no_bit(module, dtype=torch.float32):
    for batch in (2, 33):  # hidden units are shared out, and rows of the batch
        found = on_threads((1, 2), partial(results, module, torch.randn(6, batch, 40), None, dtype))
        assert all(torch.equal(a, b) for a, b in zip(*found))


@each_kind
def test_one_thread_gives_the_same_bits(kind):
    assert_threads_change_no_bit(dlkern.convert(make(kind, 40, 80)))


@each_kind
def test_against_a_loop_of_cells(kind):
    """A second reference: torch's cell, step by step, in float64."""
    cls = {"lstm": torch.nn.LSTMCell, "gru": torch.nn.GRUCell}.get(kind, torch.nn.RNNCell)
    module = dlkern.convert(make(kind, 5, 9).double())
    cell = cls(5, 9, **KINDS[kind][1]).double()
    cell.load_state_dict({name.removesuffix("_l0"): value for name, value in module.state_dict().items()})
    x, hx, outputs = torch.randn(7, 3, 5, dtype=torch.float64), None, []
    for step in x:
        hx = cell(step, hx)
        outputs.append(leaves(hx)[0])
    output, hidden = module(x)
    torch.testing.assert_close(output, torch.stack(outputs))
    for a, b in zip(leaves(hidden), leaves(hx), strict=True):
        torch.testing.assert_close(a[0], b)


# ---- as drop-ins ----


class LanguageModel(torch.nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.rnn = make(kind, 12, 16, num_layers=2)
        self.out = torch.nn.Linear(16, 5)

    def forward(self, x, hx=None):
        y, hx = self.rnn(x, hx)
        return self.out(y), hx


@each_kind
def test_gates_may_be_computed_again(kind):
    torch.manual_seed(0)
    module = dlkern.convert(make(kind, 5, 7, num_layers=2, bidirectional=True))
    x, lengths = torch.randn(6, 3, 5, requires_grad=True), torch.tensor([2, 6, 4])
    found, kept = [], []
    for module.save in ("gates", "recompute"):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.append(t.numel()) or t, lambda t: t):
            y = module(x, lengths=lengths)[0]
        found.append([y, *torch.autograd.grad(y.sin().sum(), (x, *module.parameters()))])
        kept.append(sum(sizes))
    assert all(torch.equal(a, b) for a, b in zip(*found))
    gates = {"rnn_tanh": 1, "rnn_relu": 1, "gru": 4, "lstm": 5}[kind] * 7
    assert kept[0] - kept[1] == 4 * (6 * 3) * gates  # layers and directions, steps and sequences
    again = copy.deepcopy(module)
    assert again.save == "recompute"
    with pytest.raises(ValueError, match="save"):
        nn.LSTM(3, 4, save="nothing")
    assert nn.GRU(3, 4, save="recompute").save == "recompute"


@each_kind
def test_convert_and_revert(kind):
    model = LanguageModel(kind)
    names, x = list(model.state_dict()), torch.randn(6, 3, 12)
    expected = model(x)[0]
    dlkern.convert(model)
    assert type(model.rnn) is getattr(nn, type(model.rnn).__name__) and isinstance(model.rnn, KINDS[kind][0])
    assert list(model.state_dict()) == names
    torch.testing.assert_close(model(x)[0], expected)
    model.rnn.flatten_parameters()
    copy.deepcopy(model).load_state_dict(model.state_dict())
    dlkern.revert(model)
    assert type(model.rnn) is KINDS[kind][0]
    torch.testing.assert_close(model(x)[0], expected)


@each_kind
def test_truncated_backpropagation_trains_like_torch(kind):
    torch.manual_seed(0)
    model = LanguageModel(kind)
    ours, x = dlkern.convert(copy.deepcopy(model)), torch.randn(12, 4, 12)
    target = torch.randint(0, 5, (12, 4))
    for net in (model, ours):
        optimizer, hx = torch.optim.SGD(net.parameters(), 0.1), None
        for start, end in ((0, 5), (5, 7), (7, 12)):
            y, hx = net(x[start:end], hx)
            hx = tuple(h.detach() for h in hx) if isinstance(hx, tuple) else hx.detach()
            optimizer.zero_grad()
            TF.cross_entropy(y.flatten(0, 1), target[start:end].flatten()).backward()
            optimizer.step()
    for a, b in zip(ours.parameters(), model.parameters()):
        torch.testing.assert_close(a, b)


@each_kind
def test_enabled_reaches_torchs_modules(kind):
    module, x = make(kind, 5, 9, bidirectional=True), torch.randn(4, 3, 5)
    packed = pack_padded_sequence(x, [4, 2, 1])
    for input in (x, packed):
        expected = module(input)
        with dlkern.enabled(), dlkern.trace() as calls:
            actual = module(input)
        assert {(call.op, call.backend) for call in calls} == {(kind, "cpu")}
        for a, b in zip(leaves(actual), leaves(expected)):
            torch.testing.assert_close(a, b)


@each_kind
def test_compiles_without_unrolling_time(kind):
    module = dlkern.convert(make(kind, 5, 9, num_layers=2, bidirectional=True))
    sizes = []

    def backend(graph, inputs):
        sizes.append(len(graph.graph.nodes))
        return graph

    for steps in (3, 50):
        torch._dynamo.reset()
        x = torch.randn(steps, 2, 5)
        assert torch.equal(torch.compile(module, backend=backend, fullgraph=True)(x)[0], module(x)[0])
    assert sizes[0] == sizes[1]
    torch._dynamo.reset()
    packed = pack_padded_sequence(torch.randn(6, 4, 5), [2, 6, 1, 4], enforce_sorted=False)
    run = torch.compile(lambda p: module(p), backend="aot_eager", fullgraph=True)
    for a, b in zip(leaves(run(packed)), leaves(module(packed))):
        torch.testing.assert_close(a, b)


def test_autocast_dtypes_are_torchs():
    for kind in KINDS:
        module, x = make(kind, 5, 9), torch.randn(4, 3, 5)
        if kind == "lstm" and torch.backends.cpu.get_cpu_capability() != "AVX512":
            continue  # torch's own raises: its oneDNN has none in bfloat16
        converted, packed = dlkern.convert(copy.deepcopy(module)), pack_padded_sequence(x, [4, 2, 1])
        for some in (x, packed):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                theirs, ours = module(some), converted(some)
                with dlkern.enabled():
                    inside = module(some)
            for found in (ours, inside):
                assert [t.dtype for t in leaves(found)] == [t.dtype for t in leaves(theirs)]


def test_autocast_takes_input_that_is_lowered_already():
    for kind in KINDS:
        module, x = dlkern.convert(make(kind, 5, 9)), torch.randn(4, 3, 5).bfloat16()
        with torch.autocast("cpu", dtype=torch.bfloat16), dlkern.trace() as calls:
            y = module(x)[0]
        assert y.dtype == torch.bfloat16 and {call.backend for call in calls} == {"cpu"}


@pytest.mark.parametrize("recompute", [False, True])
def test_checkpoints_that_do_not_reenter(recompute):
    """What is saved may be asked for once only."""
    for kind in KINDS:
        module, x = dlkern.convert(make(kind, 5, 9)), torch.randn(4, 3, 5, requires_grad=True)
        if recompute:
            module.save = "recompute"
        (expected,) = torch.autograd.grad(module(x)[0].sum(), x)
        (found,) = torch.autograd.grad(checkpoint(lambda x, m=module: m(x)[0], x, use_reentrant=False).sum(), x)
        assert torch.equal(found, expected)


# ---- wrong calls ----

WRONG = {
    "another size": (torch.randn(4, 3, 6), None), "four dimensions": (torch.randn(4, 3, 5, 1), None),
    "float64": (torch.randn(4, 3, 5, dtype=torch.float64), None), "integers": (torch.ones(4, 3, 5, dtype=torch.long), None),
    "no steps": (torch.randn(0, 3, 5), None), "batch of the state": (torch.randn(4, 3, 5), torch.zeros(1, 2, 9)),
    "dimensions of the state": (torch.randn(4, 3, 5), torch.zeros(1, 9)),
    "units of the state": (torch.randn(4, 3, 5), torch.zeros(1, 3, 8)),
}


@pytest.mark.parametrize("name", WRONG)
@each_kind
def test_errors_are_torchs(kind, name):
    x, h = WRONG[name]
    hx = h if h is None or kind != "lstm" else (h, h)
    module = make(kind, 5, 9)
    with pytest.raises(Exception) as theirs:
        module(x, hx)
    with pytest.raises(type(theirs.value)) as ours:
        dlkern.convert(module)(x, hx)
    assert str(ours.value) == str(theirs.value)


def test_wrong_lengths():
    module = dlkern.convert(torch.nn.GRU(5, 9))
    with pytest.raises(RuntimeError) as theirs:
        pack_padded_sequence(torch.randn(4, 3, 5), [4, 0, 1], enforce_sorted=False)
    with pytest.raises(RuntimeError) as ours:
        module(torch.randn(4, 3, 5), lengths=torch.tensor([4, 0, 1]))
    assert str(ours.value).splitlines()[0] in str(theirs.value)
    with pytest.raises(RuntimeError, match="a length of 5, but input has 4 time steps"):
        module(torch.randn(4, 3, 5), lengths=torch.tensor([4, 5, 1]))
    for wrong in (torch.tensor([4, 1]), torch.tensor([4.0, 1, 2]), [4, 1, 2]):
        with pytest.raises(ValueError, match="one length for each sequence"):
            module(torch.randn(4, 3, 5), lengths=wrong)
    with pytest.raises(ValueError, match="one length for each sequence"):
        module(torch.randn(4, 5), lengths=torch.tensor([4]))
    with pytest.raises(RuntimeError, match="sorted in decreasing order"):
        module(pack_padded_sequence(torch.randn(4, 3, 5), [1, 4, 2]))


def test_what_is_torchs():
    """Batches of nothing: handed on, with the reason."""
    empty = torch.nn.GRU(5, 9)
    with dlkern.trace() as calls:
        assert dlkern.convert(empty)(torch.randn(4, 0, 5))[0].shape == (4, 0, 9)
    assert calls[0].backend == "torch"


def test_nan_and_infinity_are_torchs():
    for kind in KINDS:
        module = make(kind, 5, 9)
        for value in (float("nan"), float("inf")):
            x = torch.randn(4, 3, 5)
            x[1, 1, 2] = value
            theirs, ours = module(x)[0], dlkern.convert(copy.deepcopy(module))(x)[0]
            torch.testing.assert_close(ours, theirs, equal_nan=True)


def test_functions_take_keywords():
    module, x = torch.nn.GRU(5, 9), torch.randn(4, 3, 5)
    h, params = torch.zeros(1, 3, 9), list(module.parameters())
    settings = dict(has_biases=True, num_layers=1, dropout=0.0, train=False, bidirectional=False, batch_first=False)
    torch.testing.assert_close(F.gru(x, h, params=params, **settings)[0], torch.gru(x, h, params, *settings.values())[0])
    with pytest.raises(TypeError):
        F.gru(x, h)


# ---- options that torch does not have ----

NORM_EPS = 1e-5


class Loop(torch.nn.Module):
    """A module of ours as a loop over layers, directions and steps in torch's ops, its masks drawn in the same order."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x, hx=None):
        m = self.module
        x = x.transpose(0, 1) if m.batch_first else x
        directions, lstm = 1 + m.bidirectional, m.mode == "LSTM"
        if hx is None:
            h = x.new_zeros(m.num_layers * directions, x.shape[1], m.proj_size or m.hidden_size)
            c = x.new_zeros(m.num_layers * directions, x.shape[1], m.hidden_size)
        else:
            h, c = hx if lstm else (hx, hx)
        ends = []
        for layer in range(m.num_layers):
            outputs = []
            for direction in range(directions):
                i = layer * directions + direction
                output, *end = self.layer(x, h[i], c[i], f"_l{layer}" + "_reverse" * direction, direction == 1)
                outputs.append(output)
                ends.append(end)
            x = torch.cat(outputs, -1)
        last = tuple(torch.stack([end[i] for end in ends]) for i in range(1 + lstm))
        return x.transpose(0, 1) if m.batch_first else x, last if lstm else last[0]

    def layer(self, x, h, c, suffix, reverse):
        m = self.module

        def own(name):
            return getattr(m, name + suffix, None)

        def norm(value, weight, bias):
            if weight is None:
                return value if bias is None else value + bias
            centred = value - value.mean(-1, keepdim=True)
            value = centred / (centred.square().mean(-1, keepdim=True) + NORM_EPS).sqrt() * weight
            return value if bias is None else value + bias

        def mask(size, p):
            wide = torch.float64 if x.dtype == torch.float64 else torch.float32
            return F.dropout(torch.ones(size, dtype=wide), p) if m.training and p else None

        def zoned(new, old, fresh, t, p):
            if fresh is not None:
                return torch.where(fresh[t] == 0, old, new)
            return p * old + (1 - p) * new if p else new

        lstm = m.mode == "LSTM"
        p_h, p_c = m.zoneout if isinstance(m.zoneout, tuple) else (m.zoneout, m.zoneout)
        m_h = mask(h.shape, m.recurrent_dropout)
        fresh_h = mask((*x.shape[:-1], h.shape[-1]), p_h)
        fresh_c = mask((*x.shape[:-1], c.shape[-1]), p_c) if lstm else None
        outputs = [None] * x.shape[0]
        for t in reversed(range(x.shape[0])) if reverse else range(x.shape[0]):
            old = h
            met = h if m_h is None else h * m_h.to(h.dtype)
            given = norm(x[t] @ own("weight_ih").T, own("layer_norm_ih"), own("bias_ih"))
            found = norm(met @ own("weight_hh").T, own("layer_norm_hh"), own("bias_hh"))
            if lstm:
                i, f, g, o = (given + found).chunk(4, -1)
                see = own("weight_peephole")
                if see is not None:
                    i, f = i + see[0] * c, f + see[1] * c
                made = f.sigmoid() * c + i.sigmoid() * g.tanh()
                o = o if see is None else o + see[2] * made
                h = o.sigmoid() * norm(made, own("layer_norm_c"), own("layer_norm_c_bias")).tanh()
                h = h @ own("weight_hr").T if m.proj_size else h
                c = zoned(made, c, fresh_c, t, p_c)
            elif m.mode == "GRU":
                (a_r, a_z, a_n), (b_r, b_z, b_n) = given.chunk(3, -1), found.chunk(3, -1)
                z = (a_z + b_z).sigmoid()
                h = (1 - z) * (a_n + (a_r + b_r).sigmoid() * b_n).tanh() + z * h
            else:
                h = (given + found).tanh() if m.mode == "RNN_TANH" else (given + found).relu()
            h = zoned(h, old, fresh_h, t, p_h)
            outputs[t] = h
        return torch.stack(outputs), h, c


class Seeded(torch.nn.Module):
    def __init__(self, module, **arguments):
        super().__init__()
        self.module, self.arguments = module, arguments

    def forward(self, *args):
        torch.manual_seed(11)
        return self.module(*args, **self.arguments)


def ours(kind, *sizes, **options):
    """A module of ours whose normalisations are not ones."""
    cls, more = KINDS[kind]
    module = getattr(nn, cls.__name__)(*sizes, **more, **options)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "layer_norm" in name:
                parameter.add_(torch.randn_like(parameter) / 3)
    return module


def looped(module):
    """Ours, and the loop over its parameters; both draw the same masks."""
    return Seeded(module), Seeded(Loop(module))


OPTIONS = {
    "peephole": {"peephole": True}, "zoneout": {"zoneout": 0.3}, "recurrent dropout": {"recurrent_dropout": 0.4},
    "layer norm": {"layer_norm": True},
    "all": {"layer_norm": True, "zoneout": 0.2, "recurrent_dropout": 0.3, "peephole": True},
}
each_option = pytest.mark.parametrize(
    "kind, options", [
        pytest.param(kind, allowed, id=f"{kind}-{name}") for kind in KINDS for name, options in OPTIONS.items()
        if (allowed := {o: value for o, value in options.items() if o != "peephole" or kind == "lstm"})
    ],
)  # fmt: skip


@each_option
def test_options_keep_the_rule(kind, options):
    assert_by_the_rule(lambda: (ours(kind, 5, 9, **options), torch.randn(4, 3, 5), states(kind, 1, 3, 9)), draws=8, pair=looped)
    assert_by_the_rule(lambda: (ours(kind, 7, 70, **options), torch.randn(5, 30, 7), None), draws=2, pair=looped)
    assert_by_the_rule(lambda: (ours(kind, 6, 20, **options), torch.randn(4, 3, 6), None), torch.bfloat16, 4, looped)


@each_kind
def test_zoneout_in_evaluation_is_the_expectation(kind):
    def draw():
        options = {"zoneout": (0.3, 0.6)} if kind == "lstm" else {"zoneout": 0.3}
        return ours(kind, 5, 9, **options).eval(), torch.randn(4, 3, 5), states(kind, 1, 3, 9)

    assert_by_the_rule(draw, draws=8, pair=looped)


def test_options_of_stacks_and_projections():
    options = {**STACKS["all"], **OPTIONS["all"]}
    for kind, more in (("lstm", {"proj_size": 4, "zoneout": (0.3, 0.1)}), ("gru", {"peephole": False})):
        assert_by_the_rule(
            lambda k=kind, m=more: (ours(k, 5, 9, **{**options, **m}), torch.randn(3, 4, 5), None), draws=4, pair=looped
        )
    wide = {**OPTIONS["all"], "proj_size": 33}
    assert_by_the_rule(lambda: (ours("lstm", 7, 70, **wide), torch.randn(4, 3, 7), None), draws=2, pair=looped)


@pytest.mark.parametrize("train", [False, True], ids=["evaluation", "training"])
@each_kind
def test_options_with_lengths_are_packing(kind, train):
    """Beside the reference with the same masks, results and gradients; padding, NaN even, has no effect."""
    lengths = torch.tensor([2, 5, 1, 4, 4])
    options = {name: value for name, value in OPTIONS["all"].items() if name != "peephole" or kind == "lstm"}
    for sizes in ((6, 9), (20, 70)):
        torch.manual_seed(0)
        module = ours(kind, *sizes, bidirectional=True, **options).double().train(train)
        x = torch.randn(6, 5, sizes[0], dtype=torch.float64)
        for b, length in enumerate(lengths):
            x[length:, b] = float("nan")
        packed = pack_padded_sequence(x, lengths, enforce_sorted=False)

        found = {}
        for column in ("cpu", "reference"):
            with dlkern.backend(column):
                found[column] = [
                    results(Seeded(module), packed, None, torch.float64),
                    results(Seeded(module, lengths=lengths), x, None, torch.float64),
                ]
        for a, b in zip(found["cpu"], found["reference"]):
            torch.testing.assert_close(a, b)
        if not train:
            a, b = found["cpu"]
            torch.testing.assert_close(b[0], pad_packed_sequence(packed._replace(data=a[0]), total_length=6)[0])


@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_options_of_any_sizes(data):
    """Beside the reference, in float64."""
    kind = data.draw(st.sampled_from(list(KINDS)))
    inputs, hidden, batch, steps = (data.draw(st.integers(1, n)) for n in (9, 40, 12, 5))
    share = st.sampled_from([0.0, 0.0, 0.3, 1.0])
    options = {name: data.draw(st.booleans()) for name in ("layer_norm", "bidirectional", "bias")}
    options |= {"recurrent_dropout": data.draw(share), "zoneout": data.draw(share)}
    if kind == "lstm":
        options |= {"zoneout": (data.draw(share), data.draw(share)), "peephole": data.draw(st.booleans())}
        options |= {"proj_size": data.draw(st.integers(0, hidden - 1))}
    torch.manual_seed(data.draw(st.integers(0, 99)))
    module = ours(kind, inputs, hidden, **options).double().train(data.draw(st.booleans()))
    x, more = torch.randn(steps, batch, inputs, dtype=torch.float64), {}
    if data.draw(st.booleans()):
        more["lengths"] = torch.randint(1, steps + 1, (batch,))
    found = []
    for column in ("cpu", "reference"):
        with dlkern.backend(column):
            found.append(results(Seeded(module, **more), x, None, torch.float64))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_packed_states_are_kept_when_sequences_end_and_begin():
    """A sequence alone gives what it gives in a packed batch."""
    module = ours("lstm", 5, 9, bidirectional=True, **OPTIONS["all"]).double().eval()
    lengths, x, hx = [3, 1, 4], torch.randn(4, 3, 5, dtype=torch.float64), states("lstm", 2, 3, 9)
    hx = tuple(h.double() for h in hx)
    output, last = module(x, hx, lengths=torch.tensor(lengths))
    for b, length in enumerate(lengths):
        alone, end = module(x[:length, b : b + 1], tuple(h[:, b : b + 1].contiguous() for h in hx))
        torch.testing.assert_close(output[:length, b : b + 1], alone)
        for a, e in zip(last, end):
            torch.testing.assert_close(a[:, b : b + 1], e)


OPTION_CELLS = {
    "RNNCell": {"layer_norm": True, "zoneout": 0.3}, "GRUCell": {"layer_norm": True, "zoneout": 0.3},
    "LSTMCell": {"layer_norm": True, "zoneout": (0.3, 0.6), "peephole": True},
}


@pytest.mark.parametrize("name", OPTION_CELLS)
def test_cells_with_options_are_layers_of_a_step(name):
    kind = {"RNNCell": "rnn_tanh", "GRUCell": "gru", "LSTMCell": "lstm"}[name]
    layer = ours(kind, 5, 9, **OPTION_CELLS[name]).double()
    cell = getattr(nn, name)(5, 9, **OPTION_CELLS[name]).double()
    cell.load_state_dict({key.removesuffix("_l0"): value for key, value in layer.state_dict().items()})
    for train in (True, False):
        layer.train(train), cell.train(train)
        x, hx = torch.randn(1, 3, 5, dtype=torch.float64), tuple(h.double() for h in leaves(states(kind, 1, 3, 9)))
        torch.manual_seed(2)
        _, expected = layer(x, hx if kind == "lstm" else hx[0])
        torch.manual_seed(2)
        found = cell(x[0], tuple(h[0] for h in hx) if kind == "lstm" else hx[0][0])
        for a, b in zip(leaves(found), leaves(expected), strict=True):
            assert torch.equal(a, b[0])
    with pytest.raises(TypeError, match="recurrent_dropout"):
        getattr(nn, name)(5, 9, recurrent_dropout=0.1)


@each_option
def test_derivatives_of_options(kind, options):
    torch.manual_seed(0)
    module = ours(kind, 2, 3, **({"proj_size": 2} if kind == "lstm" else {}), **options).double()
    parameters, x = dict(module.named_parameters()), torch.randn(2, 2, 2, dtype=torch.float64, requires_grad=True)

    def call(x, *values):
        torch.manual_seed(11)
        output, last = torch.func.functional_call(module, dict(zip(parameters, values)), (x,))
        return output, *leaves(last)

    arguments = (x, *parameters.values())
    assert torch.autograd.gradcheck(call, arguments, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, arguments, fast_mode=True)


def test_masks_are_one_a_sequence_or_one_a_step():
    steps, units = 40, 64
    module = ours("rnn_relu", 1, units, bias=False, recurrent_dropout=0.5)
    with torch.no_grad():  # h_t = x + m h_{t-1}: a unit grows at each step, or never
        module.weight_ih_l0.fill_(1)
        module.weight_hh_l0.copy_(torch.eye(units))
    output = module(torch.ones(3, 4, 1))[0]
    assert torch.equal(output[2].unique(), torch.tensor([1.0, 7.0]))  # 1, or 1 + 2 (1 + 2)
    assert 0.3 < output[2].eq(1).float().mean() < 0.7
    module = ours("rnn_relu", 1, units, bias=False, zoneout=0.25)
    with torch.no_grad():
        module.weight_ih_l0.fill_(1)
        module.weight_hh_l0.copy_(torch.eye(units))
    output = module(torch.ones(steps, 4, 1))[0]
    moves = output.diff(dim=0)
    assert torch.equal(moves.unique(), torch.tensor([0.0, 1.0])) and 0.72 < moves.mean() < 0.78
    assert torch.equal(module.eval()(torch.ones(1, 4, 1))[0].unique(), torch.tensor([0.75]))


def test_options_at_their_ends():
    """Probability 1: nothing of the state is seen, or it never changes. 0: torch's results, and its names."""
    x, hx = torch.randn(4, 3, 5), states("lstm", 1, 3, 9)
    kept, last = ours("lstm", 5, 9, zoneout=1.0)(x, hx)
    assert torch.equal(kept, hx[0].expand(4, 3, 9)) and torch.equal(last[1], hx[1])
    deaf = ours("gru", 5, 9, recurrent_dropout=1.0)
    with torch.no_grad():
        output = deaf(x)[0]
        deaf.weight_hh_l0.zero_()
    torch.testing.assert_close(output, deaf(x)[0])
    torch.manual_seed(3)
    off = nn.LSTM(5, 9, layer_norm=False, recurrent_dropout=0.0, zoneout=(0.0, 0.0), peephole=False)
    torch.manual_seed(3)
    torchs = torch.nn.LSTM(5, 9)
    assert list(off.state_dict()) == list(torchs.state_dict()) and repr(off) == repr(torchs) and not off.beyond_torch
    torch.testing.assert_close(off(x)[0], torchs(x)[0])
    on = nn.LSTM(5, 9, num_layers=2, bidirectional=True, layer_norm=True, peephole=True)
    names = set(on.state_dict()) - set(torch.nn.LSTM(5, 9, num_layers=2, bidirectional=True).state_dict())
    kinds = ("weight_peephole", "layer_norm_ih", "layer_norm_hh", "layer_norm_c", "layer_norm_c_bias")
    assert names == {kind + end for kind in kinds for end in ("_l0", "_l0_reverse", "_l1", "_l1_reverse")}
    assert on.layer_norm_ih_l0.eq(1).all() and on.layer_norm_c_bias_l1.eq(0).all()
    assert on.weight_peephole_l0.abs().max() <= 9**-0.5 and on.weight_peephole_l0.std() > 0
    assert "layer_norm=True" in repr(on) and "peephole=True" in repr(on)
    assert not hasattr(nn.LSTM(5, 9, bias=False, layer_norm=True), "layer_norm_c_bias_l0")
    before = on.weight_peephole_l0.clone()
    nn.init.xavier_uniform_(on)  # of matrices, which this is not
    assert torch.equal(on.weight_peephole_l0, before)


def test_options_are_kept_by_copies_and_not_lost_by_revert():
    module = ours("lstm", 5, 9, **OPTIONS["all"])
    copied = pickle.loads(pickle.dumps(copy.deepcopy(module)))
    x = torch.randn(4, 3, 5)
    assert torch.equal(Seeded(copied)(x)[0], Seeded(module)(x)[0])
    model = torch.nn.Sequential(copied, dlkern.convert(torch.nn.GRU(9, 9)))
    dlkern.revert(model)
    assert type(model[0]) is nn.LSTM and type(model[1]) is torch.nn.GRU
    assert torch.equal(Seeded(model[0])(x)[0], Seeded(module)(x)[0])


@each_kind
def test_options_may_be_computed_again(kind):
    module = ours(kind, 5, 7, num_layers=2, layer_norm=True, zoneout=0.2, recurrent_dropout=0.3)
    found = []
    for module.save in ("gates", "recompute"):
        x = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(1))
        found.append(results(Seeded(module), x, None, torch.float32))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@each_kind
def test_one_thread_gives_the_same_bits_with_options(kind):
    options = {"layer_norm": True, "zoneout": 0.2, "recurrent_dropout": 0.3}
    options |= {"proj_size": 20, "peephole": True} if kind == "lstm" else {}
    assert_threads_change_no_bit(Seeded(ours(kind, 40, 80, **options)))


def test_options_compile_without_unrolling_time():
    module, sizes = ours("lstm", 5, 9, num_layers=2, bidirectional=True, **OPTIONS["all"]), []

    def backend(graph, inputs):
        sizes.append(len(graph.graph.nodes))
        return graph

    for steps in (3, 50):
        torch._dynamo.reset()
        x = torch.randn(steps, 2, 5)
        assert torch.equal(Seeded(torch.compile(module, backend=backend, fullgraph=True))(x)[0], Seeded(module)(x)[0])
    assert sizes[0] == sizes[1]
    torch._dynamo.reset()
    module.eval()
    run = torch.compile(module, backend="aot_eager", fullgraph=True)
    for a, b in zip(results(run, x, None, torch.float32), results(module, x, None, torch.float32), strict=True):
        torch.testing.assert_close(a, b)


def test_raw_ops_of_options(monkeypatch):
    calls = []
    for name in ("rnn_options_forward", "rnn_options_backward"):
        monkeypatch.setitem(raw[name], "cpu", lambda *args, op=raw[name]["cpu"]: calls.append((op, args)) or op(*args))
    few = {"layer_norm": True, "zoneout": 0.1}
    for kind, options in (("lstm", OPTIONS["all"]), ("gru", few), ("lstm", {"peephole": True})):
        results(ours(kind, 3, 5, **options), torch.randn(4, 2, 3), None, torch.float32)
    assert len(calls) == 6
    for op, args in calls:
        args = [a.detach() if isinstance(a, torch.Tensor) else a for a in args]
        torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"))
        for i, a in enumerate(args):  # each tensor of another size, another dtype, or left out
            if isinstance(a, torch.Tensor) and a.numel():
                for wrong in (a.new_zeros((*a.shape[:-1], a.shape[-1] + 1)), a.to(torch.int32)):
                    with pytest.raises((RuntimeError, ValueError)):
                        op(*args[:i], wrong, *args[i + 1 :])


@each_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_options_under_autocast_are_in_the_dtype_of_their_layer(kind, dtype):
    module, x = ours(kind, 5, 9, layer_norm=True), torch.randn(4, 3, 5, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16), dlkern.trace() as calls:
        y = module(x)[0]
    assert y.dtype == (torch.float32 if kind == "gru" and dtype == torch.float32 else torch.bfloat16)
    assert {call.backend for call in calls} == {"cpu"}


def test_options_under_autocast():
    module, x = ours("lstm", 5, 9, layer_norm=True, peephole=True), torch.randn(4, 3, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert {t.dtype for t in leaves(module(x))} == {torch.bfloat16}
        assert {t.dtype for t in leaves(module(x.bfloat16()))} == {torch.bfloat16}  # as from a layer before


def test_wrong_options():
    for wrong in ({"zoneout": -0.1}, {"zoneout": (0.1, 1.5)}, {"zoneout": (0.1,)}, {"recurrent_dropout": 2},
                  {"recurrent_dropout": "0.1"}, {"zoneout": True}, {"zoneout": (0.1, 0.2, 0.3)}):  # fmt: skip
        with pytest.raises(ValueError, match=next(iter(wrong))):
            nn.LSTM(5, 9, **wrong)
    for cls in (nn.GRU, nn.RNN, nn.GRUCell, nn.RNNCell):
        with pytest.raises(ValueError, match="peephole"):
            cls(5, 9, peephole=True)
        with pytest.raises(ValueError, match="zoneout"):
            cls(5, 9, zoneout=(0.1, 0.2))
    with pytest.raises(TypeError, match="layer_norm"):
        nn.GRU(5, 9, layer_norm=1)


@pytest.mark.parametrize("name", WRONG)
@each_kind
def test_errors_with_options_are_torchs(kind, name):
    x, h = WRONG[name]
    hx = h if h is None or kind != "lstm" else (h, h)
    with pytest.raises(Exception) as theirs:
        make(kind, 5, 9)(x, hx)
    with pytest.raises(type(theirs.value)) as found:
        ours(kind, 5, 9, layer_norm=True)(x, hx)
    assert str(found.value) == str(theirs.value)

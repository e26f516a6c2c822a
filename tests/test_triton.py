"""The Triton column, interpreted on the CPU: parity of every op by the rule, gradients, and the interpreter itself.

Every launch here also runs under the memory and race checks of dlkern.testing.triton_interpreter, and results start
as NaN. A tl operation costs 0.1 ms, so shapes are tiny: a new case should stay under half a second.
"""

import math

import pytest
import test_positions
import torch
from triton_column import emulated  # noqa: F401

import dlkern
import dlkern.nn.functional as F
from dlkern.ops._registry import raw
from dlkern.testing import CASES as ALL_CASES
from dlkern.testing import check, unit_roundoff

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from dlkern.kernels import configs, embedding  # noqa: E402
from dlkern.testing.triton_interpreter import RaceError  # noqa: E402

# What other columns declare and this one does not; README's table has it too.
LACKING = {op for op, _ in dlkern.columns.declared()} - {op for op, c in dlkern.columns.declared() if c == "triton"}
CASES = [c for c in ALL_CASES if hasattr(F, c.op) and c.op not in LACKING]
IDS = [f"{case.family}-{case.name}".replace(" ", "_") for case in CASES]
FIRST = {case.op: case for case in reversed(CASES)}  # one case an op
# Of slow ops; test_triton_attention.py has larger shapes.
MOST_DRAWS = {"scaled_dot_product_attention": 8, "additive_attention": 16, "cosine_attention": 16, "gaussian_attention": 16}
LAYOUTS = [torch.contiguous_format, torch.channels_last]


def certify(case, dtype, layout=torch.contiguous_format, draws=None):
    if case.family == "rnn":
        draws = 2  # borders of a few numbers, whose errors chance decides, are then passed over
    draws = draws or min(case.draws, MOST_DRAWS.get(case.op, case.draws))

    def inputs():
        drawn = case.inputs()
        if case.images:
            drawn[0] = drawn[0].detach().contiguous(memory_format=layout).requires_grad_()
        return drawn

    with dlkern.trace() as calls:
        # torch's CUDA batch norm sums float32 in float32, its CPU one in float64: the plain expression stands for the first.
        plain = case.plain if dtype == torch.float32 else None
        certificate = check(case.ours, case.theirs, inputs, dtype=dtype, baseline=plain, draws=draws, name=case.name)
    certificate.raise_if_failed()
    assert {call.backend for call in calls} == {"triton"}, calls


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_float32(case):
    certify(case, torch.float32, LAYOUTS[CASES.index(case) % 2])


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_bfloat16(case):
    certify(case, torch.bfloat16, LAYOUTS[(CASES.index(case) + 1) % 2], draws=1 if case.images else 2)


@pytest.mark.parametrize("case", FIRST.values(), ids=FIRST.keys())
def test_float16(case):
    if case.family == "dropout":
        pytest.skip("its reference is torch expressions in float16; test_dropout_drops_the_same_elements has it")
    certify(case, torch.float16)


@pytest.mark.parametrize("case", FIRST.values(), ids=FIRST.keys())
def test_float64(case):
    """Values far nearer to torch's than a float32 anywhere on the way would leave them, and gradcheck."""
    inputs = case.inputs()
    ours, theirs = case.ours(*inputs), case.theirs(*inputs)
    between = math.sqrt(unit_roundoff(torch.float32) * unit_roundoff(torch.float64))
    assert ((ours - theirs).norm() <= between * theirs.norm()).item()
    leaves = [x for x in inputs if isinstance(x, torch.Tensor) and x.requires_grad]

    def of_leaves(*values):
        values = iter(values)
        return case.ours(*(next(values) if any(x is leaf for leaf in leaves) else x for x in inputs))

    assert torch.autograd.gradcheck(of_leaves, leaves, fast_mode=True)


# --- what the catalogue does not hold ---------------------------------------------------------------------------------


def test_dropout_drops_the_same_elements():
    seed = torch.tensor(2**61 + 123456789)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        x = torch.randn(2, 5, 31, 17).to(dtype)
        for layout in LAYOUTS:
            z = x.contiguous(memory_format=layout)
            for op in ("dropout", "feature_dropout"):
                assert torch.equal(raw[op]["triton"](z, 0.3, seed), raw[op]["cpu"](z, 0.3, seed))


@pytest.mark.parametrize("activation", [0, 1, 2, 3])
def test_linear_activations(activation):
    function = [lambda y: y, torch.relu, torch.tanh, torch.sigmoid][activation]
    certificate = check(
        lambda x, w, b: dlkern.ops.linear.linear(x, w, b, activation),
        lambda x, w, b: function(torch.nn.functional.linear(x, w, b)),
        lambda: [torch.randn(40, 35).requires_grad_(), torch.randn(34, 35).requires_grad_(), torch.randn(34).requires_grad_()],
    )
    certificate.raise_if_failed()


@pytest.mark.parametrize("layout", LAYOUTS, ids=["contiguous", "channels_last"])
def test_conv_deeper_than_a_tile(layout):
    """More channels than a tile is deep, in groups: the other loop of the kernels, with a tail."""
    options = dict(stride=(1, 2), padding=1, groups=2)
    certificate = check(
        lambda *t: F.conv2d(*t, **options), lambda *t: torch.nn.functional.conv2d(*t, **options),
        lambda: [torch.randn(1, 38, 5, 6).contiguous(memory_format=layout).requires_grad_(),
                 torch.randn(36, 19, 2, 3).requires_grad_(), torch.randn(36).requires_grad_()],
    )
    certificate.raise_if_failed()


@pytest.mark.parametrize("layout", LAYOUTS, ids=["contiguous", "channels_last"])
def test_depthwise_with_a_multiplier(layout):
    options = dict(stride=(2, 1), padding=(1, 0), dilation=(1, 2), groups=6)
    certificate = check(
        lambda *t: F.conv2d(*t, **options), lambda *t: torch.nn.functional.conv2d(*t, **options),
        lambda: [torch.randn(2, 6, 7, 8).contiguous(memory_format=layout).requires_grad_(),
                 torch.randn(12, 1, 3, 2).requires_grad_(), torch.randn(12).requires_grad_()],
        draws=2,
    )
    certificate.raise_if_failed()


@pytest.mark.parametrize("layout", LAYOUTS, ids=["contiguous", "channels_last"])
def test_max_pooling_is_torchs(layout):
    """Ties, NaN and -inf: the same values and the same places."""
    x = torch.randint(0, 3, (2, 3, 6, 7)).float()
    x[0, 0, 1, 1] = x[0, 0, 1, 2] = x[1, 1, 3, 3] = math.nan
    x[0, 1, 2:, 2:] = -math.inf
    x = x.contiguous(memory_format=layout)
    window = [3, 2], [2, 2], [1, 1], [1, 1]
    values, places = torch.nn.functional.max_pool2d(x, *window, return_indices=True)
    grad = torch.randn(values.shape)
    expected = torch.ops.aten.max_pool2d_with_indices_backward(grad, x, *window, False, places)
    for kind in (0, 1, 2):
        ours, indices = raw["max_pool2d_forward"]["triton"](x, [i for pair in window for i in pair], False, kind)
        assert torch.equal(ours.nan_to_num(9.5), values.nan_to_num(9.5)) and ours.stride() == values.stride()
        if kind == 2:
            assert torch.equal(indices, places)
        if kind:
            got = raw["max_pool2d_backward"]["triton"](
                grad, indices, x.shape, [i for pair in window for i in pair], layout == torch.channels_last
            )
            torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("layout", LAYOUTS, ids=["contiguous", "channels_last"])
def test_adaptive_max_and_lp_pooling_of_special_values(layout):
    """Ties, NaN and -inf; powers of zeros and of both signs."""
    x = torch.randint(-2, 1, (2, 3, 6, 7)).float()
    x[0, 0, 1, 1] = x[0, 0, 1, 2] = x[1, 1, 3, 3] = math.nan
    x[0, 1, 2:, 2:] = -math.inf
    x = x.contiguous(memory_format=layout)
    values, places = torch.nn.functional.adaptive_max_pool2d(x, (4, 3), return_indices=True)
    ours, indices = raw["adaptive_max_pool2d_forward"]["triton"](x, [4, 3])
    assert torch.equal(ours.nan_to_num(9.5), values.nan_to_num(9.5)) and ours.stride() == values.stride()
    assert torch.equal(indices, places)
    grad = torch.randn(values.shape)
    got = raw["adaptive_max_pool2d_backward"]["triton"](grad, indices, x.shape, layout == torch.channels_last)
    torch.testing.assert_close(got, torch.ops.aten.adaptive_max_pool2d_backward(grad, x, places))
    for norm in (1.0, 2.0, 3.0, 2.5, -1.0):
        z = x.clone(memory_format=torch.preserve_format)
        z[1, 2] = 0.0
        results = []
        for function in (F.lp_pool2d, torch.nn.functional.lp_pool2d):
            leaf = z.detach().double().requires_grad_()
            y = function(leaf, norm, 2, 2, True)
            results.append((y.detach(), *torch.autograd.grad(y, leaf, torch.ones_like(y) * 2)))
        for a, e in zip(*results, strict=True):
            torch.testing.assert_close(a, e, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_layer_norm_of_long_rows(dtype):
    """Several blocks a row, a mean far from zero, parameters wider than the input."""
    wide = torch.float32
    certificate = check(
        lambda x, w, b: F.layer_norm(x, (150,), w.to(wide), b.to(wide)),
        lambda x, w, b: torch.nn.functional.layer_norm(x, (150,), w, b),
        lambda: [(torch.randn(2, 9, 150) + 10).requires_grad_(), torch.randn(150).requires_grad_(),
                 torch.randn(150).requires_grad_()], dtype=dtype, draws=2,
    )
    certificate.raise_if_failed()


@pytest.mark.parametrize("columns", [33, 150])
def test_gradients_of_layer_norms_parameters_alone(columns):
    x = torch.randn(25, columns)
    certificate = check(
        lambda w, b: F.layer_norm(x, (columns,), w, b),
        lambda w, b: torch.nn.functional.layer_norm(x.to(w.dtype), (columns,), w, b),
        lambda: [torch.randn(columns).requires_grad_(), torch.randn(columns).requires_grad_()], draws=2,
    )
    certificate.raise_if_failed()
    nothing = F.layer_norm(torch.randn(0, 5), (5,), w := torch.randn(5, requires_grad=True))
    assert nothing.shape == (0, 5) and (torch.autograd.grad(nothing.sum(), w)[0] == 0).all()


LENGTHS = [2, 1, 3]
MODES = {"rnn_tanh": torch.nn.RNN, "rnn_relu": torch.nn.RNN, "lstm": torch.nn.LSTM, "gru": torch.nn.GRU}


@pytest.mark.parametrize("hidden", [9, 20, 33], ids=["all steps in one program", "waiting for others", "a launch a step"])
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("mode", range(4), ids=MODES)
def test_rnn_of_mixed_lengths(mode, reverse, hidden):
    """Packed rows and padded ones in any order: outputs, last states and every gradient, of every way through time."""
    gates, T, B, inputs = dlkern.ops.rnn.GATES[mode], 3, 3, 5
    lengths = torch.tensor(LENGTHS)
    sizes = (lengths > torch.arange(T)[:, None]).sum(1)

    def drawn(packed):
        shapes = [(lengths.sum(), inputs) if packed else (T, B, inputs), (gates * hidden, inputs), (gates * hidden, hidden),
                  (gates * hidden,), (gates * hidden,), (B, hidden)]
        tensors = [(torch.randn(*shape) * 0.5).requires_grad_() for shape in shapes + shapes[5:] * (mode == 2)]
        if not packed:
            with torch.no_grad():
                tensors[0][torch.arange(T)[:, None] >= lengths] = torch.inf  # padding may be anything
        return tensors

    for packed in (False, True):
        settings = (sizes, None) if packed else (None, lengths)

        def ours(x, w_ih, w_hh, b_ih, b_hh, h0, c0=None, settings=settings):
            results = dlkern.ops.rnn.rnn(x, w_ih, w_hh, b_ih, b_hh, None, h0, c0, *settings, mode, reverse)
            return tuple(r for r in results if r is not None)

        def theirs(x, w_ih, w_hh, b_ih, b_hh, h0, c0=None, settings=settings):
            numbers = [s if s is None else s.tolist() for s in settings]
            return dlkern.reference.rnn.rnn(x, w_ih, w_hh, b_ih, b_hh, None, h0, c0, *numbers, mode, reverse)

        with dlkern.trace() as calls:
            certificate = check(ours, theirs, lambda packed=packed: drawn(packed), draws=2)
        certificate.raise_if_failed()
        assert {call.backend for call in calls} == {"triton"}


def test_rnn_without_gradients():
    """Gates are not kept: the same numbers."""
    torch.manual_seed(1)
    for name, module in MODES.items():
        options = {"nonlinearity": name[4:]} if name.startswith("rnn") else {}
        ours = dlkern.convert(module(5, 9, bidirectional=True, bias=name != "gru", **options))
        x = torch.randn(4, 3, 5)
        with_gradients = ours(x)[0]
        with torch.no_grad():
            assert torch.equal(ours(x)[0], with_gradients)


def test_wrong_recurrent_arguments_raise():
    forward = raw["rnn_forward"]["triton"]
    x, w_ih, w_hh, h0, c0 = (torch.randn(s) for s in ((4, 3, 5), (8, 5), (8, 2), (3, 2), (3, 2)))
    good = [x, w_ih, w_hh, None, None, None, h0, c0, None, None, 2, False, False]
    forward(*good)
    for place, value, message in (
        (0, x[0], "dimensions"), (1, w_ih.t(), "weight_ih"), (2, torch.randn(8, 3), "weight_"), (3, torch.randn(8), "biases"),
        (5, torch.randn(2, 2), "projection"), (6, h0[:2], "h0"), (7, None, "LSTM wants one"), (6, h0.double(), "tensors of"),
        (9, torch.tensor([4, 3]), "expected 3 lengths"), (9, torch.tensor([4, 0, 1]), "greater than 0"),
        (9, torch.tensor([5, 1, 1]), "time steps"), (10, 4, "no mode"), (0, x[:0], "no time steps"),
    ):  # fmt: skip
        arguments = [value if i == place else argument for i, argument in enumerate(good)]
        with pytest.raises(RuntimeError, match=message):
            forward(*arguments)
    packed = [x.flatten(0, 1), *good[1:]]
    for sizes in ([3, 3, 4, 2], [3, 3, 3, 2], [3, 3, 3, 3, 0], []):
        packed[8] = torch.tensor(sizes, dtype=torch.int64)
        with pytest.raises(RuntimeError, match=r"batch[_ ]sizes|no time steps"):
            forward(*packed)


def test_cross_entropy_over_several_tiles():
    """More classes than a tile holds: the running maximum and sum."""
    target = torch.randint(0, 37, (21,))
    certificate = check(
        lambda x: F.cross_entropy(x, target), lambda x: torch.nn.functional.cross_entropy(x, target),
        lambda: [(torch.randn(21, 37) * 3).requires_grad_()], draws=8,
    )
    certificate.raise_if_failed()


def test_cross_entropy_of_probabilities_over_several_tiles():
    weight = torch.rand(37) + 0.1

    def on(namespace):
        return lambda x, t: namespace.cross_entropy(x, t, weight.to(x.dtype), label_smoothing=0.2)

    def drawn():
        return [(torch.randn(21, 37) * 3).requires_grad_(), torch.softmax(torch.randn(21, 37), 1).requires_grad_()]

    check(on(F), on(torch.nn.functional), drawn, draws=8).raise_if_failed()


def test_cross_entropy_with_weights_of_positions():
    target = torch.randint(0, 5, (3, 7))
    target[0, 2] = -100

    def theirs(x, s, w):
        each = torch.nn.functional.cross_entropy(x, target, w, reduction="none", label_smoothing=0.1) * s
        return each.sum() / (s * w[target.clamp(min=0)] * (target >= 0)).sum()

    certificate = check(
        lambda x, s, w: F.cross_entropy(x, target, w, label_smoothing=0.1, sample_weight=s), theirs,
        lambda: [torch.randn(3, 5, 7).requires_grad_(), torch.rand(3, 7), torch.rand(5) + 0.1], draws=8,
    )
    certificate.raise_if_failed()


def test_embedding_of_strided_tables_and_many_positions_of_a_row():
    index = torch.randint(0, 3, (5, 8), dtype=torch.int32)
    certificate = check(
        lambda w: F.embedding(index, w.t()[1:], 1), lambda w: torch.nn.functional.embedding(index, w.t()[1:], 1),
        lambda: [torch.randn(19, 5).requires_grad_()], draws=4,
    )
    certificate.raise_if_failed()


def test_embedding_of_indices_outside():
    """Raised where the indices are on the host; the kernels themselves give NaN and no gradient."""
    weight, index = torch.randn(4, 5), torch.tensor([3, 4, -1, 2])
    for call in (lambda: F.embedding(index, weight), lambda: raw["embedding_backward"]["triton"](weight, index, 4, -1, False)):
        with pytest.raises(IndexError):
            call()
    output = torch.empty(4, 5)
    embedding.embedding_forward_kernel[(1, 1)](weight, index, output, 4, 4, 5, 5, 1, LARGE=False, BLOCK_M=4, BLOCK_D=8)
    assert output.isnan().any(1).tolist() == [False, True, True, False]
    assert torch.equal(output[::3], weight[[3, 2]])
    grad, (ordered, order) = torch.zeros(4, 5), torch.sort(index, stable=True)
    embedding.embedding_backward_kernel[(4, 1)](
        weight, ordered, order, grad, 4, 4, 5, -1, SCALE=False, ACC=tl.float32, BLOCK_P=2, BLOCK_D=8
    )
    assert torch.equal(grad[2:], weight[[3, 0]]) and (grad[:2] == 0).all()


def test_average_over_padding_in_ceil_mode():
    """Windows end PADDING after the last row, whatever ceil_mode adds: the last corner is divided by 4, not 9."""
    options = dict(kernel_size=3, stride=2, padding=1, ceil_mode=True)
    certificate = check(
        lambda x: F.avg_pool2d(x, **options), lambda x: torch.nn.functional.avg_pool2d(x, **options),
        lambda: [torch.randn(2, 5, 4, 4).requires_grad_()], draws=2,
    )
    certificate.raise_if_failed()


def test_running_statistics():
    x, mean, var = torch.randn(3, 7, 4, 5) * 2 + 3, torch.randn(7), torch.rand(7) + 0.5
    tracked = [(mean.clone(), var.clone()), (mean.clone(), var.clone()), (mean.double(), var.double())]
    F.batch_norm(x, *tracked[0], training=True, momentum=0.3)
    torch.nn.functional.batch_norm(x, *tracked[1], training=True, momentum=0.3)
    torch.nn.functional.batch_norm(x.double(), *tracked[2], training=True, momentum=0.3)
    for name, ours, theirs, exact in zip(("mean", "variance"), *tracked):
        rows = dlkern.testing.compare(name, [ours], [theirs], [exact], torch.float32)
        assert all(row.ok for row in rows), rows


def test_constant_and_huge_inputs_to_batch_norm():
    """Statistics that E[x^2] - E[x]^2 would ruin."""
    constant = F.batch_norm(torch.full((4, 3, 5, 5), 1e4), None, None, training=True)
    assert (constant == 0).all()
    huge = F.batch_norm(torch.full((4, 3, 5, 5), 1e30), None, None, training=True)
    assert torch.isfinite(huge).all()


def test_lenet_trains_a_step():
    """LeNet at 12 x 12: forward, loss, gradients and one step of SGD; every op on our kernels, as near as torch's."""

    def network(namespace):
        torch.manual_seed(3)
        return torch.nn.Sequential(
            namespace.Conv2d(1, 4, 5, padding=2), torch.nn.Sigmoid(), namespace.AvgPool2d(2, 2),
            namespace.Conv2d(4, 6, 3), namespace.BatchNorm2d(6), torch.nn.ReLU(), namespace.MaxPool2d(2, 2),
            torch.nn.Flatten(), namespace.Linear(24, 16), torch.nn.Sigmoid(), namespace.Dropout(0.0), namespace.Linear(16, 10),
        )

    x, target = torch.randn(4, 1, 12, 12), torch.randint(0, 10, (4,))

    def step(model, cross_entropy, dtype):
        model = model.to(dtype)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        loss = cross_entropy(model(x.to(dtype)), target)
        loss.backward()
        optimizer.step()
        buffers = [b for b in model.buffers() if b.is_floating_point()]
        return [loss.detach(), *(p.detach() for p in model.parameters()), *buffers]

    with dlkern.trace() as calls:
        ours = step(network(dlkern.nn), F.cross_entropy, torch.float32)
    theirs = step(network(torch.nn), torch.nn.functional.cross_entropy, torch.float32)
    exact = step(network(torch.nn), torch.nn.functional.cross_entropy, torch.float64)
    assert {call.backend for call in calls} == {"triton"} and len(calls) == 8, calls
    assert all(torch.isfinite(t).all() for t in ours)
    together = [torch.cat([t.double().flatten() for t in tensors]) for tensors in (ours, theirs, exact)]
    rows = dlkern.testing.compare("parameters", *([t] for t in together), torch.float32)
    assert all(row.ok for row in rows), rows


def test_results_have_torchs_layout():
    x = torch.randn(2, 4, 6, 5)
    for layout in LAYOUTS:
        z = x.contiguous(memory_format=layout).requires_grad_()
        for ours, theirs in ((F.conv2d, torch.nn.functional.conv2d),):
            w = torch.randn(3, 4, 3, 3)
            a, b = ours(z, w), theirs(z, w)
            assert a.stride() == b.stride()
            (g,) = torch.autograd.grad(a.sum(), z)
            (h,) = torch.autograd.grad(b.sum(), z)
            assert g.stride() == h.stride()


def test_empty_batch():
    x = torch.randn(0, 3, 6, 5, requires_grad=True)
    w = torch.randn(4, 3, 3, 3, requires_grad=True)
    y = F.conv2d(x, w)
    assert y.shape == (0, 4, 4, 3)
    assert (torch.autograd.grad(y.sum(), w)[0] == 0).all()
    assert F.linear(torch.randn(0, 7), torch.randn(5, 7)).shape == (0, 5)


def test_wrong_arguments_raise():
    linear, conv = raw["linear_forward"]["triton"], raw["conv2d_forward"]["triton"]
    x, w = torch.randn(2, 4), torch.randn(3, 5)
    with pytest.raises(RuntimeError, match="linear: input"):
        linear(x, w, None, 0)
    with pytest.raises(RuntimeError, match="tensors of"):
        linear(x, torch.randn(3, 4).double(), None, 0)
    with pytest.raises(RuntimeError, match="no activation"):
        linear(x, torch.randn(3, 4), None, 9)
    image = torch.randn(1, 4, 5, 5)
    for arguments in (
        (image, torch.randn(2, 3, 3, 3), None, [1, 1], [0, 0], [1, 1], 1),
        (image, torch.randn(2, 4, 9, 3), None, [1, 1], [0, 0], [1, 1], 1),
        (image, torch.randn(2, 4, 3, 3), torch.randn(3), [1, 1], [0, 0], [1, 1], 1),
        (image, torch.randn(2, 4, 3, 3), None, [0, 1], [0, 0], [1, 1], 1),
        (image, torch.randn(2, 4, 3, 3), None, [1, 1], [-1, 0], [1, 1], 1),
        (image, torch.randn(3, 2, 3, 3), None, [1, 1], [0, 0], [1, 1], 2),
    ):
        with pytest.raises(RuntimeError, match="conv2d"):
            conv(*arguments)


# --- the interpreter --------------------------------------------------------------------------------------------------


@triton.jit
def _copy_kernel(x_ptr, y_ptr, count, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if MASKED:
        tl.store(y_ptr + i, tl.load(x_ptr + i, mask=i < count), mask=i < count)
    else:
        tl.store(y_ptr + i, tl.load(x_ptr + i))


@triton.jit
def _race_kernel(x_ptr, y_ptr, READ: tl.constexpr):
    if READ:  # the last program reads what the first one wrote
        tl.store(y_ptr + tl.program_id(0), tl.load(y_ptr + 0))
    else:
        tl.store(y_ptr, tl.program_id(0).to(tl.float32))


@triton.jit
def _scalar_kernel(y_ptr, single, double: tl.float64):
    tl.store(y_ptr, single.to(tl.float64))
    tl.store(y_ptr + 1, double)


def test_a_lost_mask_is_seen():
    x, y = torch.randn(10), torch.empty(10)
    _copy_kernel[(2,)](x, y, 10, MASKED=True, BLOCK=8)
    assert torch.equal(x, y)
    with pytest.raises(MemoryError, match="reads 6 elements outside"):
        _copy_kernel[(2,)](x, y, 10, MASKED=False, BLOCK=8)
    with pytest.raises(MemoryError, match="writes"):
        _copy_kernel[(2,)](torch.randn(16), y, 10, MASKED=False, BLOCK=8)


@pytest.mark.parametrize("read", [False, True])
def test_a_race_is_seen(read):
    with pytest.raises(RaceError):
        _race_kernel[(3,)](torch.zeros(3), torch.zeros(3), READ=read)


def test_float_arguments_are_rounded_as_on_a_gpu():
    y = torch.empty(2, dtype=torch.float64)
    _scalar_kernel[(1,)](y, 0.1, 0.1)
    assert y[0] == torch.tensor(0.1, dtype=torch.float32).double() and y[1] == 0.1


def test_nothing_leaks():
    """After a launch, Triton is as it was: nothing is patched, and kernels do not run outside emulated()."""
    before = {name: getattr(tl, name) for name in ("load", "sum", "range", "dot")}
    x = torch.randn(8)
    _copy_kernel[(1,)](x, torch.empty(8), 8, MASKED=True, BLOCK=8)
    assert before == {name: getattr(tl, name) for name in before}
    with pytest.raises(RuntimeError, match="Cannot call"):
        tl.sum(x)
    assert "interpreter_semantic" not in globals() and not hasattr(configs, "interpreter_semantic")


def test_cpu_tensors_are_refused_outside_emulated(monkeypatch):
    monkeypatch.setattr(dlkern.columns.state, "emulated", False)
    with pytest.raises(RuntimeError, match="emulated"):
        F.linear(torch.randn(2, 3), torch.randn(4, 3))


def test_a_target_out_of_range_raises_where_targets_are_on_the_host():
    x, target = torch.randn(3, 4), torch.tensor([0, 4, 1])
    with pytest.raises(IndexError, match="Target 4 is out of bounds"):
        F.cross_entropy(x, target)
    with pytest.raises(IndexError, match="Target -1 is out of bounds"):
        F.cross_entropy(x, target - 1)
    assert F.cross_entropy(x, target, ignore_index=4).isfinite()


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("layout", test_positions.LAYOUTS)
def test_rotary_layouts(layout, interleaved):
    test_positions.check_layout(layout, interleaved, "triton")


def test_rotary_cuts_rows_and_depth(monkeypatch):
    """Tiles with tails on both sides, of pairs and of what is behind them."""
    monkeypatch.setattr(configs, "rotary", lambda x, columns: {"BLOCK": 4, "BLOCK_D": 8})
    x, angles = torch.randn(2, 3, 5, 61), torch.randn(2, 2, 1, 5, 19)
    for interleaved in (True, False):
        y = F.rotary(x, *angles, interleaved=interleaved)
        expected = dlkern.reference.positions.rotary(x.double(), *angles.double(), interleaved)
        torch.testing.assert_close(y, expected.float())

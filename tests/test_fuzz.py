"""Random arguments: dlkern agrees with torch by the rule, or raises where torch raises.

100 examples an op here; `make fuzz` runs 2,000. DLKERN_FUZZ_COLUMN=cuda (or triton): that column, emulated.
"""

import contextlib
import functools
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as tF
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st

import dlkern
import dlkern.nn.functional as F
from dlkern.reference.positions import rotary as turn
from dlkern.testing import compare

EXAMPLES = int(os.environ.get("DLKERN_FUZZ_EXAMPLES", "100"))
fuzz = settings(
    max_examples=EXAMPLES, deadline=None, derandomize=EXAMPLES == 100,
    phases=[Phase.explicit, Phase.generate],  # a failure is small already, and shrinking would take minutes
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)

COLUMN = os.environ.get("DLKERN_FUZZ_COLUMN", "cpu")
dtypes = st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16, *[torch.float64] * (COLUMN != "cuda")])
# Mostly sensible, sometimes not: both sides must refuse the same calls.
small = st.integers(-1, 4)
pairs = st.one_of(small, st.tuples(small, small))


def tensor(draw, shape, dtype):
    """Random values in one of several layouts, some of them not dense."""
    layout = draw(st.sampled_from(["contiguous", "channels_last", "transposed", "sliced", "expanded"]))
    if layout == "sliced":
        return torch.randn(*shape[:-1], shape[-1] * 2 + 1, dtype=torch.float64).to(dtype)[..., : shape[-1] * 2 : 2]
    x = torch.randn(shape, dtype=torch.float64).to(dtype)
    if layout == "channels_last" and x.dim() == 4:
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "transposed" and x.dim() >= 2:
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "expanded" and shape[0] > 0:
        return x[:1].expand(shape)
    return x


@contextlib.contextmanager
def column():
    """Calls inside are ours, on the column under test."""
    if COLUMN == "cpu":
        yield
    else:
        with dlkern.testing.emulated(), dlkern.backend(COLUMN):
            yield


def run(function, inputs, dtype, cotangent_dtype=None, seed=5):
    """Outputs and gradients, or the exception. Every dtype a draw is run in gets the same cotangents: those rounded to
    cotangent_dtype."""
    leaves = [
        x.detach().to(dtype).requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in inputs
    ]
    try:
        output = function(*leaves)
        outputs = list(output) if isinstance(output, tuple) else [output]
        differentiable = [o for o in outputs if o.is_floating_point()]
        torch.manual_seed(seed)
        drawn = [torch.randn(o.shape, dtype=torch.float64).to(cotangent_dtype or dtype) for o in differentiable]
        cotangents = [cotangent.to(o.dtype) for cotangent, o in zip(drawn, differentiable)]
        wanted = [x for x in leaves if isinstance(x, torch.Tensor) and x.requires_grad]
        return [*outputs, *torch.autograd.grad(differentiable, wanted, cotangents)]
    except Exception as error:
        return error


def redrawn(x):
    """New random values at the same place in memory's order: same sizes, strides and offset."""
    if not isinstance(x, torch.Tensor) or not x.is_floating_point():
        return x
    elements = x.untyped_storage().nbytes() // x.element_size()
    return torch.randn(elements, dtype=torch.float64).to(x.dtype).as_strided(x.shape, x.stride(), x.storage_offset())


def rows_over_draws(ours_function, theirs_function, inputs, dtype, draws):
    """The rule over several draws of the inputs: of a handful of elements in one draw, chance decides.

    float64, which has no wider reference, must be closer to torch's than torch's float32 is; how close in units of
    roundoff, tests/test_contract.py says.
    """
    columns = {}
    for seed in range(draws):
        torch.manual_seed(1000 + seed)
        drawn = [redrawn(x) for x in inputs]
        with column():
            ours = run(ours_function, drawn, dtype, dtype, seed)
        exact = run(theirs_function, drawn, torch.float64, dtype, seed)
        narrow = [x.float() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in drawn]
        double = dtype == torch.float64
        theirs = run(theirs_function, narrow if double else drawn, torch.float32 if double else dtype, dtype, seed)
        for i, (a, b, r) in enumerate(zip(ours, theirs, exact, strict=True)):
            assert a.shape == b.shape
            if not a.is_floating_point():
                assert torch.equal(a, b)
                continue
            assert a.dtype == r.dtype if double else a.dtype == b.dtype
            columns.setdefault(i, []).append((a, b, r))
    rows = []
    for i, triples in columns.items():
        found = compare(f"result {i}", *zip(*triples), torch.float32 if dtype == torch.float64 else dtype)
        rows += [row for row in found if row.region == "whole"]
    return rows


def steps(x):
    """The strides that an address can depend on: those of dimensions of more than one element."""
    return [stride for size, stride in zip(x.shape, x.stride()) if size > 1]


def agree(ours_function, theirs_function, inputs, dtype, same_strides=True):
    torch.manual_seed(7)
    with column():
        ours = run(ours_function, inputs, dtype)
    theirs = run(theirs_function, inputs, dtype)
    if isinstance(theirs, Exception):
        assert isinstance(ours, Exception), f"torch raised {theirs!r}, dlkern returned"
        assert isinstance(ours, type(theirs)) or isinstance(theirs, type(ours)), f"torch: {theirs!r}; dlkern: {ours!r}"
        return
    assert not isinstance(ours, Exception), f"torch returned, dlkern raised {ours!r}"
    assert not same_strides or steps(ours[0]) == steps(theirs[0]) or ours[0].numel() <= 1
    if isinstance(run(theirs_function, inputs, torch.float64), Exception):
        # A result in one of torch's dtypes, an error in another: there is nothing to measure by.
        assert [a.shape for a in ours] == [b.shape for b in theirs]
        return
    for draws in (4, 64, 512):
        rows = rows_over_draws(ours_function, theirs_function, inputs, dtype, draws)
        if all(row.ok for row in rows):
            break  # else chance, or a fault: more draws tell
    assert all(row.ok for row in rows), [row for row in rows if not row.ok]


@st.composite
def conv_calls(draw, dims=2, transposed=False):
    dtype = draw(dtypes)
    settings = pairs if dims == 2 else st.one_of(small, st.tuples(small))
    groups = draw(st.sampled_from([1, 1, 1, 2, 3]))
    c, k = groups * draw(st.integers(1, 5)), groups * draw(st.integers(1, 5))
    group_channels = (c, k // groups) if transposed else (k, c // groups)
    if draw(st.integers(0, 9)) == 0:
        c += 1
    size = (draw(st.integers(0, 2)), c, *(draw(st.integers(1, 9)) for _ in range(dims)))
    weight = tensor(draw, (*group_channels, *(draw(st.integers(1, 4)) for _ in range(dims))), dtype)
    x = tensor(draw, size[1:] if draw(st.booleans()) and size[0] else size, dtype)
    bias = [torch.randn(k + (draw(st.integers(0, 9)) == 0), dtype=dtype)] if draw(st.booleans()) else [None]
    options = dict(stride=draw(settings), dilation=draw(settings), groups=groups, padding=draw(settings))
    if transposed:
        # Not 0, on which torch's dtypes disagree: float32 takes it for a kernel of one element, float64 raises.
        options["dilation"] = draw(settings.filter(lambda d: 0 not in (d if isinstance(d, tuple) else (d,))))
        options["output_padding"] = draw(st.one_of(st.just(0), settings))
    elif draw(st.booleans()):
        options["padding"] = draw(st.sampled_from(["same", "valid", "SAME"]))
    return [x, weight, *bias], options, dtype


def torchs(op, *inputs, stride, dilation, **options):
    """torch's own; strided and dilated in bfloat16, where its oneDNN stops the process on channels_last (torch 2.13),
    its float32 convolution rounded once, which leaves ours less."""
    options |= dict(stride=stride, dilation=dilation)
    if inputs[0].dtype == torch.bfloat16 and np.max(stride) > 1 and np.max(dilation) > 1:
        return getattr(tF, op)(*(x.float() for x in inputs), **options).bfloat16()
    return getattr(tF, op)(*inputs, **options)


def agree_on(op, call):
    inputs, options, dtype = call
    present = [x for x in inputs if x is not None]
    agree(lambda *t: getattr(F, op)(*t, **options), lambda *t: torchs(op, *t, **options), present, dtype)


@fuzz
@given(conv_calls())
def test_conv2d(call):
    agree_on("conv2d", call)


@fuzz
@given(conv_calls(dims=1))
def test_conv1d(call):
    agree_on("conv1d", call)


@fuzz
@given(conv_calls(transposed=True))
def test_conv_transpose2d(call):
    agree_on("conv_transpose2d", call)


@fuzz
@given(conv_calls(dims=1, transposed=True))
def test_conv_transpose1d(call):
    agree_on("conv_transpose1d", call)


@st.composite
def pool_calls(draw, average):
    dtype = draw(dtypes)
    size = (draw(st.integers(0, 2)), draw(st.integers(1, 5)), draw(st.integers(1, 9)), draw(st.integers(1, 9)))
    x = tensor(draw, size[1:] if draw(st.booleans()) else size, dtype)
    options = dict(kernel_size=draw(pairs), stride=draw(st.one_of(st.none(), pairs)), ceil_mode=draw(st.booleans()))
    options["padding"] = draw(st.sampled_from([0, 0, 1, (1, 0), 2, -1]))
    if average:
        options |= dict(count_include_pad=draw(st.booleans()), divisor_override=draw(st.sampled_from([None, 3, 0])))
    else:
        options |= dict(dilation=draw(st.sampled_from([1, 1, 2, (2, 1), 0])), return_indices=draw(st.booleans()))
    return [x], options, dtype


def torchs_max_pool(op, x, return_indices, **options):
    """torch's own, but where a dilated window sees no element of these finite inputs: torch's index for it lies outside
    the window or the image, and its backward writes there, past its memory too (torch 2.13). The same by gather, where
    such a window has no gradient."""
    pool, dims = getattr(tF, op), int(op[-2])
    if options["dilation"] != 1:
        y, indices = pool(x.detach(), return_indices=True, **options)
        seen = y != -torch.inf
        if not seen.all():
            found = x.flatten(-dims).gather(-1, torch.where(seen, indices, 0).flatten(-dims)).reshape(y.shape)
            y = torch.empty_like(y).copy_(torch.where(seen, found, -torch.inf))
            return (y, indices) if return_indices else y
    return pool(x, return_indices=return_indices, **options)


@fuzz
@given(pool_calls(False))
def test_max_pool2d(call):
    inputs, options, dtype = call
    agree(lambda x: F.max_pool2d(x, **options), lambda x: torchs_max_pool("max_pool2d", x, **options), inputs, dtype)


@fuzz
@given(pool_calls(True))
def test_avg_pool2d(call):
    inputs, options, dtype = call
    agree(lambda x: F.avg_pool2d(x, **options), lambda x: tF.avg_pool2d(x, **options), inputs, dtype)


@st.composite
def adaptive_calls(draw):
    dtype = draw(dtypes)
    size = (draw(st.integers(1, 2)), draw(st.integers(1, 5)), draw(st.integers(1, 9)), draw(st.integers(1, 9)))
    target = st.one_of(st.integers(1, 9), st.none())
    return [tensor(draw, size, dtype)], draw(st.one_of(st.integers(1, 5), st.tuples(target, target))), dtype


@fuzz
@given(adaptive_calls())
def test_adaptive_avg_pool2d(call):
    inputs, size, dtype = call
    agree(lambda x: F.adaptive_avg_pool2d(x, size), lambda x: tF.adaptive_avg_pool2d(x, size), inputs, dtype)


@fuzz
@given(adaptive_calls(), st.booleans())
def test_adaptive_max_pool2d(call, indices):
    inputs, size, dtype = call
    agree(lambda x: F.adaptive_max_pool2d(x, size, indices), lambda x: tF.adaptive_max_pool2d(x, size, indices), inputs, dtype)


@st.composite
def lp_calls(draw):
    dtype = draw(dtypes)
    size = (draw(st.integers(0, 2)), draw(st.integers(1, 5)), draw(st.integers(1, 9)), draw(st.integers(1, 9)))
    norm = draw(st.sampled_from([1, 2, 2.0, 3, 2.5, -1, 0, float("inf")]))
    x = tensor(draw, size[1:] if draw(st.booleans()) else size, dtype)
    options = dict(kernel_size=draw(pairs), stride=draw(st.one_of(st.none(), pairs)), ceil_mode=draw(st.booleans()))
    return [x], dict(options, norm_type=norm), dtype


@fuzz
@given(lp_calls())
def test_lp_pool2d(call):
    inputs, options, dtype = call
    # Of magnitudes: a root of a sum that cancels has no error to speak of.
    agree(lambda x: F.lp_pool2d(x.abs() + 0.1, **options), lambda x: tF.lp_pool2d(x.abs() + 0.1, **options), inputs, dtype)


@st.composite
def sequence_calls(draw):
    dtype = draw(dtypes)
    size = (draw(st.integers(0, 2)), draw(st.integers(1, 5)), draw(st.integers(1, 17)))
    x = tensor(draw, size[1:] if draw(st.booleans()) else size, dtype)
    window = dict(kernel_size=draw(small), stride=draw(st.one_of(st.none(), small)), ceil_mode=draw(st.booleans()))
    padding = draw(st.sampled_from([0, 0, 1, 2, -1]))
    sizes = st.sampled_from([-1, *range(1, 10)])  # of no output at all, torch has no gradient
    options = {
        "max_pool1d": dict(
            window, padding=padding, dilation=draw(st.sampled_from([1, 1, 2, 0])), return_indices=draw(st.booleans())
        ),
        "avg_pool1d": dict(window, padding=padding, count_include_pad=draw(st.booleans())),
        "adaptive_avg_pool1d": dict(output_size=draw(sizes)),
        "adaptive_max_pool1d": dict(output_size=draw(sizes), return_indices=draw(st.booleans())),
    }
    op = draw(st.sampled_from(sorted(options)))
    return op, [x], options[op], dtype


@fuzz
@given(sequence_calls())
def test_pooling_of_sequences(call):
    op, inputs, options, dtype = call
    theirs = functools.partial(torchs_max_pool, op) if op == "max_pool1d" else getattr(tF, op)
    agree(lambda x: getattr(F, op)(x, **options), lambda x: theirs(x, **options), inputs, dtype)


@st.composite
def batch_norm_calls(draw):
    dtype = draw(dtypes)
    c = draw(st.integers(1, 6))
    shape = draw(st.sampled_from([(5, c), (3, c, 4), (2, c, 3, 5), (2, c, 2, 3, 2), (1, c), (1, c, 1, 1), (0, c, 2, 2)]))
    x = tensor(draw, shape, dtype)
    affine = [torch.randn(c, dtype=dtype), torch.randn(c, dtype=dtype)] if draw(st.booleans()) else []
    return [x, *affine], draw(st.booleans()), draw(st.sampled_from([1e-5, 0.1])), dtype


@fuzz
@given(batch_norm_calls())
def test_batch_norm(call):
    inputs, training, eps, dtype = call
    c = inputs[0].shape[1]

    def on(namespace):
        def f(x, weight=None, bias=None):
            mean, var = torch.zeros(c, dtype=x.dtype), torch.full((c,), 0.7, dtype=x.dtype)
            return namespace.batch_norm(x, mean, var, weight, bias, training, 0.3, eps)

        return f

    agree(on(F), on(tF), inputs, dtype)


@st.composite
def linear_calls(draw):
    dtype = draw(dtypes)
    k, n = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    lead = draw(st.sampled_from([(), (1,), (7,), (2, 3), (0,), (13,)]))
    x = tensor(draw, (*lead, k), dtype)
    w = tensor(draw, (n, k + (draw(st.integers(0, 9)) == 0)), dtype)
    return [x, w, *([torch.randn(n, dtype=dtype)] if draw(st.booleans()) else [])], dtype


@fuzz
@given(linear_calls())
def test_linear(call):
    inputs, dtype = call
    agree(F.linear, tF.linear, inputs, dtype)


@st.composite
def loss_calls(draw):
    dtype = draw(dtypes)
    classes = draw(st.integers(1, 9))
    shape = draw(st.sampled_from([(5, classes), (classes,), (2, classes, 3), (2, classes, 2, 3), (0, classes), (1, classes)]))
    x = tensor(draw, shape, dtype)
    lead = shape[:1] + shape[2:] if len(shape) > 1 else ()
    target = torch.randint(0, classes, lead)
    options = dict(
        reduction=draw(st.sampled_from(["mean", "sum", "none", "nonsense"])),
        ignore_index=draw(st.sampled_from([-100, 0, 1])), label_smoothing=draw(st.sampled_from([0.0, 0.1, 1.0, 1.5])),
    )
    if draw(st.booleans()):
        options["weight"] = torch.rand(classes) + 0.1
    if draw(st.integers(0, 3)) == 0:  # probabilities, as they come in other dtypes
        target = torch.rand(shape).bfloat16()
    return x, target, options, dtype


@fuzz
@given(loss_calls())
def test_cross_entropy(call):
    x, target, options, dtype = call

    def on(namespace):
        def f(x):
            weight = options.get("weight")
            t = target.to(x.dtype) if target.is_floating_point() else target
            return namespace.cross_entropy(x, t, **{**options, "weight": None if weight is None else weight.to(x.dtype)})

        return f

    agree(on(F), on(tF), [x], dtype)


@st.composite
def embedding_calls(draw):
    dtype, rows, width = draw(dtypes), draw(st.integers(1, 5)), draw(st.integers(1, 20))
    weight = tensor(draw, (rows, width), dtype)
    shape = draw(st.sampled_from([(), (0,), (7,), (2, 3), (3, 0, 2), (40,)]))
    index = torch.randint(draw(st.sampled_from([0, 0, 0, -1])), rows + draw(st.sampled_from([0, 0, 0, 1])), shape)
    index = index.to(draw(st.sampled_from([torch.int64, torch.int32, torch.int16])))
    padding = draw(st.one_of(st.none(), st.integers(-rows - 1, rows)))
    return weight, index, padding, draw(st.booleans()), dtype


@fuzz
@given(embedding_calls())
def test_embedding(call):
    weight, index, padding, by_frequency, dtype = call

    def on(namespace):
        return lambda w: namespace.embedding(index, w, padding, scale_grad_by_freq=by_frequency)

    agree(on(F), on(tF), [weight], dtype)


@st.composite
def layer_norm_calls(draw):
    dtype = draw(dtypes)
    shape = tuple(draw(st.lists(st.integers(0, 9), min_size=1, max_size=4)))
    if draw(st.booleans()):
        shape = (*shape[:-1], draw(st.integers(10, 70)))
    normalized = shape[draw(st.integers(0, len(shape))) :]
    if draw(st.integers(0, 9)) == 0:
        normalized = (*normalized, 3)
    sizes = draw(st.sampled_from([(), (normalized,), (normalized, normalized), (normalized, (*normalized[:-1], 2))]))
    eps = draw(st.sampled_from([1e-5, 1e-5, 1e-3, 0.1]))
    parameters = [torch.randn(size, dtype=torch.float64).to(dtype) for size in sizes]
    return [tensor(draw, shape, dtype), *parameters], normalized, eps, dtype


@fuzz
@given(layer_norm_calls())
def test_layer_norm(call):
    inputs, normalized, eps, dtype = call
    # Of a row of equal numbers torch's float64 is not the exact result, which is 0, and ours is.
    assume(dtype != torch.float64 or inputs[0].dim() == 0 or inputs[0].stride(0) != 0)

    def on(namespace):
        return lambda x, *parameters: namespace.layer_norm(x, normalized, *parameters, *(None,) * (2 - len(parameters)), eps)

    agree(on(F), on(tF), inputs, dtype)


@st.composite
def attention_calls(draw):
    dtype, lead = draw(dtypes), draw(st.sampled_from([(2, 2), (1, 3), (2, 4), (2,), (), (0, 2), (2, 1, 2)]))
    queries, keys, depth, value_depth = (draw(st.integers(1, 20)) for _ in range(4))
    if draw(st.integers(0, 4)) == 0:
        # (More keys than 128 are compared on a CPU alone: on a GPU torch rounds elsewhere.)
        queries, keys = draw(st.integers(40, 140)), draw(st.integers(100, 300 if COLUMN == "cpu" else 128))
        depth, value_depth = (draw(st.integers(1, 80)) for _ in range(2))  # from 20 or so on, tiles of AMX
    groups, gqa = lead, False
    if len(lead) == 2 and draw(st.integers(0, 3)) == 0:
        groups, gqa = (lead[0], draw(st.sampled_from([1, 2, 3]))), True
    odd = draw(st.integers(0, 14)) == 0  # a size that does not fit
    inputs = [
        tensor(draw, (*lead, queries, depth), dtype), tensor(draw, (*groups, keys, depth + odd), dtype),
        tensor(draw, (*groups, keys, value_depth), dtype),
    ]  # fmt: skip
    more = draw(st.sampled_from([{}, {"is_causal": True}, {"scale": 0.3}, {"scale": 2.0}, {"scale": 20.0}]))
    options = {"enable_gqa": gqa} | more
    mask = None
    if "is_causal" not in options:
        full = (*lead, queries, keys)
        size = tuple(n if draw(st.booleans()) else 1 for n in full)[draw(st.integers(0, len(lead))) :]
        # (Without sequences torch's graph leaves out an added mask, and its gradient raises.)
        kind = draw(st.sampled_from(["none", "bool"] if 0 in lead else ["none", "bool", "added"]))
        if kind == "bool":
            mask = torch.rand(size) < draw(st.sampled_from([0.2, 0.9]))
        elif kind == "added":
            mask = torch.randn(size, dtype=torch.float64).to(dtype)
    rotary = None
    if depth > 1 and not odd and draw(st.integers(0, 3)) == 0:
        rotary = *torch.randn(2, max(queries, keys), draw(st.integers(1, depth // 2))), draw(st.booleans())
    return inputs, mask, rotary, options, dtype


@fuzz
@given(attention_calls())
def test_scaled_dot_product_attention(call):
    """Rotary positions, which torch has not, the reference gives to its queries and keys."""
    inputs, mask, rotary, options, dtype = call

    def on(namespace):
        def f(q, k, v, *mask):
            more = {}
            if rotary is not None and namespace is F:
                more = dict(rotary=rotary[:2], rotary_interleaved=rotary[2])
            elif rotary is not None:
                q, k = (turn(x, *(angles[: x.shape[-2]] for angles in rotary[:2]), rotary[2]) for x in (q, k))
            return namespace.scaled_dot_product_attention(q, k, v, *mask, **options, **more)

        return f

    agree(on(F), on(tF), inputs if mask is None else [*inputs, mask], dtype, same_strides=False)


def other_score(score, mask, lengths, factor, query, key, value, *weight):
    """In plain expressions; a query that sees no key gets zeros."""
    if score == "additive":
        scores = torch.tanh(query.unsqueeze(-2) + key.unsqueeze(-3)) @ weight[0]
    elif score == "gaussian":
        scores = -0.5 * ((query.unsqueeze(-2) - key.unsqueeze(-3)) / factor).square().sum(-1)
    else:
        if score == "cosine":
            query, key = (tF.normalize(x, dim=-1, eps=1e-8) for x in (query, key))
        scores = query @ key.transpose(-2, -1) * factor
    seen = torch.ones_like(scores, dtype=torch.bool)
    if lengths is not None:
        rows = lengths.reshape(-1, *[1] * (scores.dim() - 1)) if lengths.dim() == 1 else lengths.reshape(
            lengths.shape[0], *[1] * (scores.dim() - 3), -1, 1
        )
        seen = seen & (torch.arange(scores.shape[-1]) < rows)
    if mask is not None and mask.dtype == torch.bool:
        seen = seen & mask
    elif mask is not None:
        scores = scores + mask.to(scores.dtype)
    some = seen.any(-1, keepdim=True)
    return torch.softmax(scores.masked_fill(~seen & some, -torch.inf), -1) * some @ value


@st.composite
def other_score_calls(draw):
    score, dtype = draw(st.sampled_from(["dot", "additive", "cosine", "gaussian"])), draw(dtypes)
    lead = draw(st.sampled_from([(2, 2), (1, 3), (3,), (2, 1)]))
    queries, keys, depth, value_depth = (draw(st.integers(1, 20)) for _ in range(4))
    if draw(st.integers(0, 9)) == 0:
        queries, keys = draw(st.integers(40, 70)), draw(st.integers(100, 150))
    if score == "cosine":  # gradients are divided by lengths: of one element they are nothing but rounding, of few the
        depth = max(depth, 4)  # shortest vector's decide
    odd = depth > 1 and draw(st.integers(0, 14)) == 0  # a size that does not fit; one element would broadcast
    inputs = [
        tensor(draw, (*lead, queries, depth), dtype), tensor(draw, (*lead, keys, depth + odd), dtype),
        tensor(draw, (*lead, keys, value_depth), dtype),
    ]  # fmt: skip
    if score == "additive":
        inputs.append(tensor(draw, (depth,), dtype))
    mask = lengths = None
    kind = draw(st.sampled_from(["none", "bool", "added", "lengths", "lengths of queries"]))
    size = tuple(n if draw(st.booleans()) else 1 for n in (*lead, queries, keys))
    if kind == "bool":
        mask = torch.rand(size) < draw(st.sampled_from([0.2, 0.9]))
    elif kind == "added":
        mask = torch.randn(size, dtype=torch.float64).to(dtype)
    elif kind != "none":
        lengths = torch.randint(0, keys + 1, (lead[0],) if kind == "lengths" else (lead[0], queries))
    return score, inputs, mask, lengths, draw(st.sampled_from([0.3, 1.0, 3.0])), dtype


@fuzz
@given(other_score_calls())
def test_other_scores_of_attention(call):
    score, inputs, mask, lengths, factor, dtype = call

    def ours(*tensors):
        named = {"gaussian": {"width": factor}, "additive": {}}.get(score, {"scale": factor})
        return getattr(F, f"{score}_attention")(*tensors, attn_mask=mask, lengths=lengths, **named)

    def theirs(*tensors):
        return other_score(score, mask, lengths, factor, *tensors)

    agree(ours, theirs, inputs, dtype, same_strides=False)


@st.composite
def recurrent_calls(draw):
    kind, dtype = draw(st.sampled_from(["rnn_tanh", "rnn_relu", "gru", "lstm"])), draw(dtypes)
    steps, batch, inputs, hidden = draw(st.integers(0, 5)), draw(st.integers(1, 9)), *(draw(st.integers(1, 20)) for _ in "ih")
    layers, directions = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    bias, first = draw(st.booleans()), draw(st.booleans())
    gates = {"rnn_tanh": 1, "rnn_relu": 1, "gru": 3, "lstm": 4}[kind]
    states = [(layers * directions, batch, hidden)] * (2 if kind == "lstm" else 1)
    odd = draw(st.integers(0, 14))
    if odd == 0 and batch > 1:  # of one sequence, torch's LSTM takes states of any number, or reads past them
        states = [(layers * directions, batch + 1, hidden)] * len(states)
    sizes = []
    for layer in range(layers):
        for _ in range(directions):
            width = gates * hidden
            sizes += [(width, inputs if layer == 0 else directions * hidden), (width, hidden)] + [(width,)] * (2 * bias)
    if odd == 1:
        sizes[0] = (sizes[0][0], sizes[0][1] + 1)
    x = tensor(draw, (batch, steps, inputs) if first else (steps, batch, inputs), dtype)
    rest = [torch.randn(size, dtype=torch.float64).to(dtype) for size in [*states, *sizes]]
    return kind, [x, *rest], len(states), (bias, layers, 0.0, True, directions == 2, first), dtype


@fuzz
@given(recurrent_calls())
def test_recurrent(call):
    kind, inputs, states, settings, dtype = call

    def on(namespace):
        def f(x, *rest):
            rest = [value * 0.5 for value in rest]  # states that grow from step to step overflow
            hx = rest[:states] if kind == "lstm" else rest[0]
            return getattr(namespace, kind)(x, hx, list(rest[states:]), *settings)

        return f

    agree(on(F), on(torch), inputs, dtype)


@fuzz
@given(st.lists(st.integers(0, 9), min_size=0, max_size=4), st.floats(-0.5, 1.5), dtypes)
def test_dropout(shape, p, dtype):
    x = torch.randn(shape, dtype=torch.float64).to(dtype)
    try:
        tF.dropout(x, p)
    except ValueError:
        with column(), pytest.raises(ValueError):
            F.dropout(x, p)
        return
    with column():
        y = F.dropout(x, p)
    kept = y != 0
    scaled = (x.double() / (1 - p) if p < 1 else torch.zeros_like(x, dtype=torch.float64)).to(dtype)
    assert torch.equal(y[kept], scaled[kept]) or compare(
        "kept", [y[kept]], [(x[kept] * (1 / (1 - p)))], [x[kept].double() / (1 - p)], dtype
    )[0].ok

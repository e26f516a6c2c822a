"""Attention: every score, mask and option against the reference by the numerics rule; torch's semantics and errors;
dropout's contract; multi-head attention and Transformers."""

import copy
import functools
import inspect
import itertools

import pytest
import torch
import torch.nn.functional as tF
from attention_cases import ADDITIVE_RANGES, assert_by_the_rule, check_additive_range, kept_scores
from torch import nn

import dlkern
import dlkern.nn.functional as F
from dlkern import ops
from dlkern.ops.attention import ADDITIVE, COSINE, GAUSSIAN, Settings
from dlkern.reference import attention as reference
from dlkern.testing import check, compare

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
SDPA = F.scaled_dot_product_attention


def test_learned_slopes():
    """On the reference, since no kernel has their gradient."""
    q, slopes = torch.randn(1, 4, 5, 8), torch.rand(4, requires_grad=True)
    distance = (torch.arange(5)[:, None] - torch.arange(5)).abs()
    loss = lambda s: SDPA(q, q, q, alibi_slopes=s).square().sum()  # noqa: E731
    (expected,) = torch.autograd.grad(SDPA(q, q, q, -slopes[:, None, None] * distance).square().sum(), slopes)
    with dlkern.trace() as calls:
        (found,) = torch.autograd.grad(loss(slopes), slopes)
    assert [(call.backend, call.reason) for call in calls] == [("reference", "the slopes require a gradient")]
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.func.grad(loss)(slopes.detach()), expected)
    angles = F.rotary_angles(torch.arange(5), 8)
    turned = lambda s: SDPA(q, q, q, alibi_slopes=s, rotary=angles).square().sum()  # noqa: E731
    (found,) = torch.autograd.grad(turned(slopes), slopes)
    torch.testing.assert_close(torch.func.grad(turned)(slopes.detach()), found)
    assert found.abs().min() > 0


def leaves(*shapes, dtype=torch.float64):
    return [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


OPTIONS = {
    "plain": (Settings(scale=0.2), {}), "causal": (Settings(scale=0.2, right=0), {}),
    "window": (Settings(scale=0.2, left=20, right=5), {}), "gaussian": (Settings(scale=0.3, score=GAUSSIAN), {}),
    "cosine": (Settings(scale=2.0, score=COSINE), {}), "additive": (Settings(score=ADDITIVE), {}),
    "softcap": (Settings(scale=0.5, softcap=2.0), {}), "negative scale": (Settings(scale=-0.3), {}),
    "alibi": (Settings(scale=0.2), dict(slopes=lambda: torch.rand(2, dtype=torch.float64))),
    "bool mask": (Settings(scale=0.2), dict(mask=lambda: torch.rand(2, 1, 50, 150) > 0.3)),
    "bool mask of keys": (Settings(scale=0.2), dict(mask=lambda: torch.rand(2, 1, 1, 150) > 0.3)),
    "added mask": (Settings(scale=0.2), dict(mask=lambda: torch.randn(2, 2, 50, 150, dtype=torch.float64))),
    "added mask, shared": (Settings(scale=0.2, softcap=3.0), dict(mask=lambda: torch.randn(1, 2, 1, 150, dtype=torch.float64))),
    "lengths": (Settings(scale=0.2), dict(lengths=lambda: torch.tensor([[3], [150]]))),
    "lengths of queries": (Settings(scale=0.2), dict(lengths=lambda: torch.randint(0, 151, (2, 50)))),
    "dropout": (Settings(scale=0.2, p=0.3), dict(seed=lambda: torch.randint(0, 2**62, ()))),
}


# Depths of keys and values: with the second, which only products of matrices have, there is enough to do for tiles.
DEPTHS = {(12, 20): OPTIONS, (40, 36): [name for name in OPTIONS if name not in ("gaussian", "additive")]}


@each_dtype
@pytest.mark.parametrize(("depths", "name"), [(depths, name) for depths, names in DEPTHS.items() for name in names], ids=str)
def test_parity(name, dtype, depths):
    """Two heads of queries share one of keys; sizes are no multiples of a tile."""
    settings, more = OPTIONS[name]
    more = {key: make() for key, make in more.items()}
    if dtype.itemsize == 2 and "mask" in more and more["mask"].is_floating_point():
        more["mask"] = more["mask"].to(dtype).double()
    tensors = [more.get(key) for key in ("mask", "lengths", "slopes")]
    seed = more.get("seed")

    def on(function):
        def call(q, k, v, *rest):
            rest = list(rest)
            mask = rest.pop(0) if tensors[0] is not None and tensors[0].is_floating_point() else tensors[0]
            slopes = None if tensors[2] is None else tensors[2].to(q.dtype)
            return function(q, k, v, mask, tensors[1], slopes, rest[0] if rest else None, seed, settings)

        return call

    def inputs():
        drawn = leaves((2, 2, 50, depths[0]), (2, 1, 150, depths[0]), (2, 1, 150, depths[1]))
        if tensors[0] is not None and tensors[0].is_floating_point():
            drawn.append(torch.randn(tensors[0].shape, dtype=torch.float64).requires_grad_())
        return drawn + (leaves((12,)) if settings.score == ADDITIVE else [])

    ours = on(lambda *a: ops.attention.attention("dot_attention", *a))
    theirs = on(lambda *a: reference.attention(*a[:-1], *a[-1]))
    draws = 32 if name == "additive" else 8 if dtype == torch.float64 else 4
    assert_by_the_rule(ours, theirs, inputs, dtype, draws, name)


@pytest.mark.parametrize("length", [1, 47, 48, 49, 127, 128, 129, 200])
@pytest.mark.parametrize("causal", [False, True])
def test_tile_borders(length, causal):
    torch.manual_seed(0)
    q, k, v = leaves((1, 2, length, 16), (1, 2, length, 16), (1, 2, length, 16))
    ours, theirs = SDPA(q, k, v, is_causal=causal), tF.scaled_dot_product_attention(q, k, v, is_causal=causal)
    torch.testing.assert_close(ours, theirs)
    g = torch.randn_like(ours)
    for a, b in zip(torch.autograd.grad(ours, (q, k, v), g), torch.autograd.grad(theirs, (q, k, v), g)):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("depth", [1, 3, 64, 80, 129, 512])
def test_depths(depth):
    torch.manual_seed(0)
    q, k, v = leaves((2, 3, 9, depth), (2, 3, 11, depth), (2, 3, 11, 7))
    ours, theirs = SDPA(q, k, v), tF.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(torch.autograd.grad(ours.sum(), (q, k, v)), torch.autograd.grad(theirs.sum(), (q, k, v))):
        torch.testing.assert_close(a, b)


def test_shapes_torch_takes():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 5, 8, dtype=torch.float64)
    y = torch.randn(2, 3, 6, 8, dtype=torch.float64)
    for q, k in ((x[0, 0], y[0, 0]), (x[0], y[0]), (x, y[0]), (x, y[:, :1]), (x, y[:1]), (x[0], y), (x[None], y[None]),
                 (x[:, :, :0], y), (x, y[:, :, :0]), (x[..., :0], y[..., :0]), (x[:0], y[:0])):  # fmt: skip
        for shape in (None, (5, 6), (1, 6), (5, 1), (1, 1)):
            mask = None if shape is None or 0 in q.shape or 0 in k.shape else torch.randn(shape, dtype=torch.float64)
            ours, theirs = SDPA(q, k, k, mask), tF.scaled_dot_product_attention(q, k, k, mask)
            assert ours.shape == theirs.shape
            torch.testing.assert_close(ours, theirs)
    mask = torch.rand(1, 2, 1, 5, 6) > 0.5
    arguments = (x[None], y[None], y[None], mask)
    torch.testing.assert_close(SDPA(*arguments), tF.scaled_dot_product_attention(*arguments))


def test_operands_are_read_where_they_lie():
    """[B, S, H, D] seen as [B, H, S, D]: the same bits, and a result in that order."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 70, 3, 24).transpose(1, 2) for _ in range(3))
    turned, dense = SDPA(q, k, v), SDPA(q.contiguous(), k.contiguous(), v.contiguous())
    assert torch.equal(turned, dense) and turned.transpose(1, 2).is_contiguous() and dense.is_contiguous()
    strided = torch.randn(2, 3, 70, 48)[..., ::2]
    assert torch.equal(SDPA(strided, strided, strided), SDPA(*[strided.contiguous()] * 3))


KEPT = [((150, 24), (200, 24)), ((3, 150, 24), (3, 200, 24)), ((2, 1, 2, 150, 24), (2, 1, 2, 200, 24))]
KEPT = [(*shapes, dtype) for shapes in KEPT for dtype in (torch.bfloat16, torch.float16, torch.float32)]
# README, limits: in 16 bits gradients are summed over what was broadcast after they were rounded.
KEPT.append(((2, 2, 150, 24), (1, 2, 200, 24), torch.float32))


@pytest.mark.parametrize(("of_query", "of_key", "dtype"), KEPT, ids=str)
def test_gradients_where_torch_keeps_the_scores(of_query, of_key, dtype):
    for scale, equal in itertools.product((0.2, 2.0), (False, True)):
        assert_by_the_rule(*kept_scores(of_query, of_key, scale, equal), dtype, 8, f"scale {scale}, equal {equal}")


def test_a_query_that_sees_nothing():
    q, k, v = leaves((1, 2, 60, 8), (1, 2, 200, 8), (1, 2, 200, 8), dtype=torch.float32)
    mask = torch.ones(60, 200, dtype=torch.bool)
    mask[3], mask[59] = False, False
    added = torch.zeros(60, 200).masked_fill(~mask, -torch.inf)
    for options in (dict(attn_mask=mask), dict(attn_mask=added), dict(lengths=torch.where(mask[:, :1], 200, 0).t())):
        y = SDPA(q, k, v, **options)
        assert y[0, :, 3].abs().max() == 0 and y[0, :, 59].abs().max() == 0 and y[0, :, 4].abs().max() > 0
        found = torch.autograd.grad(y.sum(), (q, k, v))
        assert all(g.isfinite().all() for g in found) and found[0][0, :, 3].abs().max() == 0


@pytest.mark.parametrize("length", [64, 192, 320])
def test_masked_tail_with_scores_far_below_zero(length):
    """S % 128 == 64, a mask, and a log-sum-exp below -88.7, where one library's query gradients were NaN."""
    torch.manual_seed(0)
    mask = (torch.full((length, length), -120.0) + torch.randn(length, length)).requires_grad_()
    inputs = (*leaves((1, 2, length, 64), (1, 2, length, 64), (1, 2, length, 64)), mask)
    check(SDPA, tF.scaled_dot_product_attention, inputs, name=f"length {length}").raise_if_failed()


def test_infinite_and_nan_scores():
    q = torch.randn(1, 1, 4, 8)
    k = torch.randn(1, 1, 6, 8)
    q[0, 0, 1, 0] = torch.nan
    y = SDPA(q, k, k)
    assert y[0, 0, 1].isnan().all() and y[0, 0, [0, 2, 3]].isfinite().all()


BY_TILES = (1, 2, 280, 36)  # shapes of operands that AMX's tiles multiply, where there are any
by_tiles = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@by_tiles
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_infinity_and_nan_by_tiles(value, dtype):
    """One such number in an operand: NaN where float64, which has no tiles, has it."""
    torch.manual_seed(0)
    for place in range(4):
        tensors = [torch.randn(BY_TILES).to(dtype) for _ in range(4)]
        tensors[place][0, 1, 270, 3] = value
        found = []
        for wide in (dtype, torch.float64):
            q, k, v, g = (x.to(wide).requires_grad_() for x in tensors)
            y = SDPA(q, k, v)
            found.append([y, *torch.autograd.grad(y, (q, k, v), g)])
        for name, a, b in zip(("output", "grad q", "grad k", "grad v"), *found):
            assert torch.equal(a.isnan(), b.isnan()), (place, name)
            assert torch.equal(a.isinf(), b.isinf()), (place, name)


@by_tiles
@pytest.mark.parametrize(
    "sizes",
    [(1, 1, 1e-30), (1, 1e-30, 1), (1e-20, 1e-20, 1e-6), (1e-3, 1e-36, 1e-3), (1e10, 1e-20, 1e-4), (0, 1, 1), (1, 0, 1)],
)
def test_sizes_far_from_one_by_tiles(sizes, dtype):
    """Tiles flush what float32 hardly holds: queries, values and the output's gradient of these sizes."""
    of_scores, of_values, of_gradient = sizes

    def on(function):
        def call(q, k, v):
            return function(q * of_scores, k, v * of_values, scale=0.2 / max(of_scores, 1.0)) * of_gradient

        return call

    check(on(SDPA), on(tF.scaled_dot_product_attention), lambda: leaves(*[BY_TILES] * 3), dtype=dtype).raise_if_failed()


def test_bits_do_not_depend_on_threads():
    torch.manual_seed(0)
    q, k, v = leaves((1, 3, 300, 24), (1, 3, 300, 24), (1, 3, 300, 24), dtype=torch.float32)
    mask = torch.randn(1, 3, 1, 300, requires_grad=True)
    w = torch.randn(24, requires_grad=True)
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        y = SDPA(q, k, v, mask)
        z = F.additive_attention(q, k, v, w)
        g = torch.ones_like(y)
        found.append([y, z, *torch.autograd.grad(y, (q, k, v, mask), g), *torch.autograd.grad(z, (q, k, v, w), g)])
    torch.set_num_threads(2)
    assert all(torch.equal(a, b) for a, b in zip(*found))


def test_dropout():
    q, k = torch.randn(2, 3, 50, 8), torch.randn(2, 3, 130, 8)
    unit = torch.eye(130)
    torch.manual_seed(3)
    first = SDPA(q, k, unit, dropout_p=0.25)  # the probabilities themselves
    torch.manual_seed(3)
    assert torch.equal(first, SDPA(q, k, unit, dropout_p=0.25))
    assert not torch.equal(first, SDPA(q, k, unit, dropout_p=0.25))
    kept = first != 0
    assert abs(kept.float().mean() - 0.75) < 0.01
    torch.testing.assert_close(first[kept], (SDPA(q, k, unit) / 0.75)[kept])
    assert SDPA(q, k, unit, dropout_p=1.0).abs().max() == 0
    seed = torch.tensor(987654321)
    settings = Settings(p=0.25, scale=0.01)
    y = ops.attention.attention("dot_attention", q, k, unit.expand(2, 3, 130, 130), None, None, None, None, seed, settings)
    assert torch.equal(reference.kept((2, 3, 50, 130), 0.25, seed), y != 0)


@pytest.mark.parametrize("name", ["added mask, shared", "alibi", "window", "gaussian", "cosine", "dropout"])
def test_gradcheck(name):
    settings, more = OPTIONS[name]
    torch.manual_seed(0)
    q, k, v = leaves((1, 2, 5, 3), (1, 1, 7, 3), (1, 1, 7, 2))
    mask = torch.randn(1, 2, 1, 7, dtype=torch.float64, requires_grad=True) if "mask" in more else None
    slopes, seed = (more[key]() if key in more else None for key in ("slopes", "seed"))

    def call(q, k, v, *mask):
        return ops.attention.attention("dot_attention", q, k, v, mask[0] if mask else None, None, slopes, None, seed, settings)

    inputs = (q, k, v) if mask is None else (q, k, v, mask)
    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


def test_gradcheck_additive_both_ways():
    torch.manual_seed(0)
    q, k, v, w = leaves((2, 3, 4), (2, 5, 4), (2, 5, 3), (4,))
    assert torch.autograd.gradcheck(F.additive_attention, (q, k, v, w))
    assert torch.autograd.gradgradcheck(F.additive_attention, (q, k, v, w))


@pytest.mark.parametrize("name", ADDITIVE_RANGES)
def test_additive_ranges(name):
    check_additive_range(name, draws=64)


def test_additive_far_from_zero():
    """By tanh itself, since exponentials would leave their range."""
    far = torch.tensor([64.0, -64.0, 64.0, -64.0])

    def shifted(function):
        return lambda q, k, v, w: function(q + far, k - far, v, w)

    def expression(q, k, v, w):
        return torch.softmax(torch.tanh(q[:, :, None] + k[:, None]) @ w, -1) @ v

    inputs = functools.partial(leaves, (2, 3, 4), (2, 5, 4), (2, 5, 3), (4,))
    torch.manual_seed(0)
    check(shifted(F.additive_attention), shifted(expression), inputs, draws=64).raise_if_failed()


@pytest.mark.parametrize(
    "change",
    [dict(attn_mask=torch.ones(4, 4, dtype=torch.int32)), dict(attn_mask=torch.ones(4, 4, dtype=torch.float64)),
     dict(attn_mask=torch.ones(3, 4, dtype=torch.bool)), dict(attn_mask=torch.zeros(5, 2, 3, 4, 4)),
     dict(query=torch.randn(8)), dict(key=torch.randn(2, 3, 4, 8).double()), dict(key=torch.randn(2, 3, 4, 4)),
     dict(key=torch.randn(2, 2, 4, 8)), dict(dropout_p=1.5),
     dict(key=torch.randn(2, 2, 4, 8), enable_gqa=True), dict(query=torch.randn(2, 3, 4, 8, device="meta"))],
    ids=range(11),
)  # fmt: skip
def test_torchs_errors(change):
    arguments = {name: torch.randn(2, 3, 4, 8) for name in ("query", "key", "value")} | change
    with pytest.raises(Exception) as theirs:
        tF.scaled_dot_product_attention(**arguments)
    with pytest.raises(type(theirs.value)):
        SDPA(**arguments)


def test_keys_and_values_of_different_lengths_raise():
    q = torch.randn(2, 3, 4, 8)
    with pytest.raises(RuntimeError, match="4 keys, 5 values"):  # torch reads past the end
        SDPA(q, q, torch.randn(2, 3, 5, 8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_mask_beside_16_bits(dtype):
    q, mask = torch.randn(1, 2, 9, 8).to(dtype), torch.randn(9, 9, requires_grad=True)
    y = SDPA(q, q, q, mask)
    exact = tF.scaled_dot_product_attention(*[q.double()] * 3, mask.double())
    assert y.dtype == dtype
    theirs = tF.scaled_dot_product_attention(*[q] * 3, mask.to(dtype))
    assert all(row.ok for row in compare("output", [y], [theirs], [exact], dtype))
    assert torch.autograd.grad(y.sum(), mask)[0].dtype == torch.float32


@pytest.mark.filterwarnings("ignore:.*mismatched key_padding_mask.*")
@pytest.mark.parametrize(("batch_first", "width", "bias_kv"), list(itertools.product((False, True), (None, 20), (False, True))))
def test_multihead_attention(batch_first, width, bias_kv):
    torch.manual_seed(0)
    options = dict(batch_first=batch_first, kdim=width, vdim=width, add_bias_kv=bias_kv, add_zero_attn=bias_kv)
    theirs = nn.MultiheadAttention(16, 4, **options).double()
    ours = dlkern.convert(nn.MultiheadAttention(16, 4, **options).double())
    assert type(ours) is dlkern.nn.MultiheadAttention
    ours.load_state_dict(theirs.state_dict())
    q, k = torch.randn(3, 5, 16, dtype=torch.float64), torch.randn(3, 7, width or 16, dtype=torch.float64)
    q, k = (q, k) if batch_first else (q.transpose(0, 1), k.transpose(0, 1))
    q.requires_grad_()
    left_out = torch.rand(5, 7) > 0.7
    left_out[:, 0] = False
    padding = torch.zeros(3, 7, dtype=torch.bool)
    padding[1, 3:] = True
    for mask, pad, weights, average in (
        (None, None, True, True), (left_out, padding, True, False), (torch.randn(5, 7).double(), None, False, True),
        (torch.randn(12, 5, 7).double(), padding, False, True), (left_out, None, False, True), (None, padding, False, True),
    ):  # fmt: skip
        results = []
        for module in (theirs, ours):
            y, w = module(q, k, k, key_padding_mask=pad, need_weights=weights, attn_mask=mask, average_attn_weights=average)
            assert w is None or w.is_contiguous()
            total = y.sin().sum() + (0 if w is None else w.sin().sum())
            results.append([y, *([] if w is None else [w]), *torch.autograd.grad(total, [q, *module.parameters()])])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)


def test_transformers_run_on_dlkern():
    torch.manual_seed(0)
    theirs = nn.Transformer(32, 4, 2, 2, 64, batch_first=True)
    ours = dlkern.convert(nn.Transformer(32, 4, 2, 2, 64, batch_first=True))
    ours.load_state_dict(theirs.state_dict())
    source, target = torch.randn(2, 9, 32), torch.randn(2, 6, 32)
    mask = nn.Transformer.generate_square_subsequent_mask(6)
    exact = copy.deepcopy(theirs.eval()).double()
    with torch.no_grad():
        expected = exact(source.double(), target.double(), tgt_mask=mask.double(), tgt_is_causal=True)
        for model in (theirs, ours.eval()):
            with dlkern.trace() as calls:
                y = model(source, target, tgt_mask=mask, tgt_is_causal=True)
            assert {call.backend for call in calls} == ({"cpu"} if model is ours else set())
            z = theirs(source, target, tgt_mask=mask, tgt_is_causal=True)
            assert all(row.ok for row in compare("output", [y], [z], [expected], torch.float32))
        with dlkern.enabled(), dlkern.trace() as calls:
            theirs(source, target, tgt_mask=mask)
    assert {call.op for call in calls} == {"linear", "layer_norm", "scaled_dot_product_attention"}
    assert {call.backend for call in calls} == {"cpu"}


@pytest.mark.parametrize("name", ["TransformerEncoderLayer", "TransformerDecoderLayer", "Transformer"])
def test_transformer_modules_are_dlkerns_throughout(name):
    theirs, ours = getattr(nn, name), getattr(dlkern.nn, name)
    assert inspect.signature(ours) == inspect.signature(theirs)
    model, settings = ours(8, 2, batch_first=True), dict(batch_first=True, dropout=0.0)
    kinds = {r.kind for r in dlkern.conversion_report(model) if r.status != "dlkern"}
    assert kinds == {"NonDynamicallyQuantizableLinear"} and isinstance(model, theirs)
    layer, twin = (cls(8, 2, dim_feedforward=12, **settings) for cls in (ours, theirs))
    layer.load_state_dict(twin.state_dict())
    x = torch.randn(2, 2, 5, 8)
    arguments = x[:1] if name == "TransformerEncoderLayer" else x
    with dlkern.trace() as calls:
        torch.testing.assert_close(layer(*arguments), twin(*arguments), rtol=1e-4, atol=1e-5)
    assert {call.backend for call in calls} == {"cpu"}


def test_modules_of_other_scores():
    torch.manual_seed(0)
    q, k, v, lengths = torch.randn(2, 3, 5), torch.randn(2, 4, 5), torch.randn(2, 4, 6), torch.tensor([1, 4])
    additive = dlkern.nn.AdditiveAttention(5, 5, 11)
    gaussian = dlkern.nn.GaussianAttention(2.0, learned=True)
    for module in (additive, gaussian, dlkern.nn.CosineAttention(3.0), dlkern.nn.DotAttention()):
        y = module(q, k, v, lengths)
        torch.testing.assert_close(y[0], v[0, :1].expand(3, 6))  # one key alone has all the weight
        assert y.shape == (2, 3, 6)
    scores = torch.tanh(additive.W_q(q)[:, :, None] + additive.W_k(k)[:, None]) @ additive.w_v.weight[0]
    torch.testing.assert_close(additive(q, k, v), torch.softmax(scores, -1) @ v)
    width = torch.tensor(2.0, requires_grad=True)
    expected = torch.softmax(-((q[:, :, None] - k[:, None]) / width).square().sum(-1) / 2, -1) @ v
    y = gaussian(q, k, v)
    torch.testing.assert_close(y, expected)
    y.sin().sum().backward()
    torch.testing.assert_close(gaussian.width.grad, torch.autograd.grad(expected.sin().sum(), width)[0])


def test_additive_attention_under_autocast_lowers_its_weight():
    q, k, v = (torch.randn(2, 3, 8).bfloat16() for _ in range(3))  # as a layer before leaves them
    w = torch.randn(8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = F.additive_attention(q, k, v, w)
    assert torch.equal(ours, F.additive_attention(q, k, v, w.bfloat16()))
    with pytest.raises(RuntimeError, match="dtype"):
        F.additive_attention(q, k, v, w)


def test_plain_calls_of_other_scores_are_checked():
    """The short way leaves to the raw op what the long way checks."""
    q, k, v, w = torch.randn(2, 3, 8), torch.randn(2, 4, 8), torch.randn(2, 4, 5), torch.randn(8)
    lengths = torch.tensor([2, 4])
    short = F.additive_attention(q, k, v, w, lengths=lengths)
    with dlkern.trace():  # the long way
        assert torch.equal(F.additive_attention(q, k, v, w, lengths=lengths), short)
        assert torch.equal(F.dot_attention(q[:1], k, v), F.dot_attention(q[:1].expand(2, 3, 8), k, v))
    assert torch.equal(F.dot_attention(q[:1], k, v), F.dot_attention(q[:1].expand(2, 3, 8), k, v))
    for wrong in (torch.tensor([2]), torch.tensor([2, 5, 1]), torch.tensor([2.0, 1.0])):
        with pytest.raises(RuntimeError):
            F.additive_attention(q, k, v, w, lengths=wrong)
    with pytest.raises(RuntimeError):
        F.dot_attention(q, k[..., :7], v)

"""Attention of the CUDA column, run on the host: every score, mask and option by the numerics rule, over several tiles
(64 queries; 64 keys in 16-bit types, 32 in float32) and blocks of the depth (64 or 128). tests/test_cuda_builds.py runs this
file again on the checked build."""

import contextlib

import pytest
import test_varlen
import torch
import torch.nn.functional as tF
from attention_cases import (
    ADDITIVE_RANGES,
    KEYS,
    OPTIONS,
    QUERIES,
    ROTARY,
    check_additive_range,
    kept_scores,
    leaves,
    randn,
    sides,
)
from cuda_column import all_dtypes, certify, library, no_findings, on_cuda, short_dtypes  # noqa: F401

import dlkern
import dlkern.nn.functional as F
from dlkern import ops
from dlkern.ops.attention import ADDITIVE, COSINE, DOT, GAUSSIAN, Settings
from dlkern.reference import attention as reference
from dlkern.reference.positions import rotary as turn
from dlkern.testing import compare, cuda_on_host

SDPA = F.scaled_dot_product_attention
FORWARD, BACKWARD = (ops.attention.raw[f"attention_{way}"] for way in ("forward", "backward"))
ROTARY_FORWARD, ROTARY_BACKWARD = (
    ops.attention.raw[f"attention_rotary_{way}"]["cuda"] for way in ("forward", "backward"))


@all_dtypes
@pytest.mark.parametrize("name", [*OPTIONS, *ROTARY])
def test_attention(name, dtype):
    """Two heads of queries share one of keys; two tiles of queries and of keys, the second ones nearly empty."""
    settings, more = (OPTIONS | ROTARY)[name]
    batch = 1 if not more or set(more) <= {"slopes", "seed"} else 2
    depth = 5 if settings.score in (ADDITIVE, GAUSSIAN) else 12
    shapes = (batch, 2, QUERIES, depth), (batch, 1, KEYS, depth), (batch, 1, KEYS, 36)
    certify(*sides(settings, more, shapes), dtype, 8 if name in ROTARY else 2)


@all_dtypes
@pytest.mark.parametrize("score", [ADDITIVE, GAUSSIAN])
def test_attention_mask_gradient_of_pairwise_scores(score, dtype):
    """The kernel with the most shared memory below what a launch must ask for."""
    settings, shapes = Settings(scale=0.3, score=score), ((1, 2, QUERIES, 5), (1, 1, KEYS, 5), (1, 1, KEYS, 8))
    certify(*sides(settings, dict(mask=lambda: torch.randn(1, 2, QUERIES, KEYS).double()), shapes), dtype, 2)


# Loads of 16 bytes and of single elements; one block of 128, several of one or both depths.
DEPTHS = [(DOT, depths) for depths in ((24, 40), (40, 72), (100, 8), (8, 129), (136, 16), (130, 140))]
DEPTHS += [(score, depths) for score in (COSINE, ADDITIVE) for depths in ((40, 72), (130, 140))]


@all_dtypes
@pytest.mark.parametrize(("score", "depths"), DEPTHS, ids=str)
def test_attention_depths(score, depths, dtype):
    depth, value_depth = depths
    settings = Settings(scale=depth**-0.5 if score == DOT else 1.0, score=score)
    certify(*sides(settings, {}, ((1, 1, 5, depth), (1, 1, 9, depth), (1, 1, 9, value_depth))), dtype, 4)


@all_dtypes
@pytest.mark.parametrize("score", [DOT, ADDITIVE])
def test_attention_in_the_least_shared_memory_that_a_gpu_has(score, dtype):
    """99 KB: float32 then has no blocks of 128 columns, and no rotary kernel of such a depth."""
    settings = Settings(scale=0.1 if score == DOT else 1.0, score=score)
    with cuda_on_host.shared_bytes(99 * 1024):
        certify(*sides(settings, {}, ((1, 1, 5, 100), (1, 1, 9, 100), (1, 1, 9, 72))), dtype, 4)
        if score != DOT:
            return
        x, angles = torch.randn(4, 1, 1, 9, 100, dtype=dtype), torch.randn(2, 1, 1, 9, 40)
        none, rest = (None,) * 4, (0.0, 0.1, 0.0, -1, -1, False)
        y, numbers = ROTARY_FORWARD(*x[:3], *none, *angles, *rest)
        assert ("rotary" in cuda_on_host.last_kernel()) == (dtype != torch.float32)
        ROTARY_BACKWARD(x[3], *x[:3], *none, *angles, y, numbers, *rest, False)


@all_dtypes
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("queries", [1, 65])
def test_attention_tile_borders(queries, causal, dtype):
    """Tiles of queries that see no tile of keys, one, all of it and part of it; fewer and more keys than queries."""
    for keys in (63, 64, 129):
        inputs = lambda: leaves((1, 1, queries, 16), (1, 1, keys, 16), (1, 1, keys, 16))  # noqa: B023, E731
        certify(
            lambda *a: SDPA(*a, is_causal=causal), lambda *a: tF.scaled_dot_product_attention(*a, is_causal=causal), inputs,
            dtype, 2,
        )  # fmt: skip


@all_dtypes
def test_attention_delta_from_the_output(dtype):
    """More keys than are gone through twice: delta is sum(g output)."""
    shapes = (1, 2, 33, 12), (1, 2, 150, 12), (1, 2, 150, 12)
    certify(SDPA, tF.scaled_dot_product_attention, lambda: leaves(*shapes), dtype, 2)


@all_dtypes
@pytest.mark.parametrize("equal", [False, True])
def test_attention_gradients_where_torch_keeps_the_scores(dtype, equal):
    certify(*kept_scores((2, 33, 12), (2, 150, 12), 0.5, equal), dtype, 4)


def test_attention_operands_are_read_where_they_lie():
    """[B, S, H, D] seen as [B, H, S, D]: the same bits, and a result in that order; so with gaps."""
    q, k, v = (torch.randn(2, 9, 3, 24).transpose(1, 2).requires_grad_() for _ in range(3))
    strided = torch.randn(2, 3, 9, 48)[..., ::2].requires_grad_()
    found = []
    with on_cuda():
        for turned in ((q, k, v), (strided, strided, strided)):
            dense = [x.detach().contiguous().requires_grad_() for x in turned]
            ours, theirs = SDPA(*turned), SDPA(*dense)
            g = torch.randn(2, 9, 3, 24).transpose(1, 2)
            gradients = torch.autograd.grad(theirs, dense, g)
            if turned[0] is turned[1]:
                gradients = [sum(gradients)]
            found.append((ours, theirs, torch.autograd.grad(ours, list(dict.fromkeys(turned)), g), gradients))
    for ours, theirs, one, other in found:
        assert torch.equal(ours, theirs)
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(a, b)
    assert found[0][0].transpose(1, 2).is_contiguous() and found[0][1].is_contiguous()


@all_dtypes
def test_attention_of_a_query_that_sees_nothing(dtype):
    q, k, v = leaves((1, 2, 6, 8), (1, 2, 70, 8), (1, 2, 70, 8), dtype=dtype)
    mask = torch.ones(6, 70, dtype=torch.bool)
    mask[3], mask[5] = False, False
    added = torch.zeros(6, 70, dtype=dtype).masked_fill(~mask, -torch.inf)
    for options in (dict(attn_mask=mask), dict(attn_mask=added), dict(lengths=torch.where(mask[:, :1], 70, 0).t())):
        with on_cuda():
            y = SDPA(q, k, v, **options)
            found = torch.autograd.grad(y.sum(), (q, k, v))
        assert y[0, :, 3].abs().max() == 0 and y[0, :, 5].abs().max() == 0 and y[0, :, 4].abs().max() > 0
        assert all(g.isfinite().all() for g in found) and found[0][0, :, 3].abs().max() == 0


@pytest.mark.parametrize("length", [64, 192])
def test_attention_masked_tail_with_scores_far_below_zero(length):
    """S % 128 == 64, a mask, and a log-sum-exp below -88.7, where one library's query gradients were NaN."""
    far = torch.full((length, length), -120.0, dtype=torch.float64)

    def inputs():
        return [*leaves(*[(1, 1, length, 16)] * 3), (far + randn(length, length)).requires_grad_()]

    certify(SDPA, tF.scaled_dot_product_attention, inputs, torch.float32, 1)


# Factors of query, key, value and the output's gradient. Up: the gradients of scores are beyond float16's 65504; down:
# below its smallest number. What they become is well in range both times.
beyond_float16 = pytest.mark.parametrize(
    "factors", [(2**-6, 2**-10, 2**8, 2**10), (2**-6, 2**6, 2**-6, 2**-12)], ids=["up", "down"])


def check_gradients_beyond_float16(factors, queries, keys, depth):
    """The error is torch's where all is near 1, times the factor that the gradient has."""
    q, k, v, g = (torch.randn(1, 2, n, depth) for n in (queries, keys, keys, queries))
    near = [(x * f).half() for x, f in zip((q, k), factors)] + [v.half(), g.half()]
    far = [near[0], near[1], (v * factors[2]).half(), (g * factors[3]).half()]
    scale = depth**-0.5

    def gradients(function, q, k, v, g):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        return torch.autograd.grad(function(*leaves, scale=scale), leaves, g)

    exact = gradients(tF.scaled_dot_product_attention, *(x.double() for x in far))
    times = [factors[2] * factors[3]] * 2 + [factors[3]]
    theirs = [(x.double() * f).half() for x, f in zip(gradients(tF.scaled_dot_product_attention, *near), times)]
    with on_cuda():
        ours = gradients(SDPA, *far)
    assert all(x.isfinite().all() for x in ours)
    for name, *one in zip("qkv", ours, theirs, exact):
        rows = compare(name, *([x] for x in one), torch.float16)
        assert all(row.ok for row in rows), rows


@beyond_float16
@pytest.mark.parametrize("keys", [20, 150])
def test_attention_of_gradients_beyond_float16(keys, factors):
    check_gradients_beyond_float16(factors, 33, keys, 16)


def test_attention_of_nan():
    q, k = torch.randn(1, 1, 4, 8), torch.randn(1, 1, 6, 8)
    q[0, 0, 1, 0] = torch.nan
    with on_cuda():
        y = SDPA(q, k, k)
    assert y[0, 0, 1].isnan().all() and y[0, 0, [0, 2, 3]].isfinite().all()


@all_dtypes
def test_attention_dropout_drops_the_same_elements(dtype):
    """As the reference, which is the CPU column's contract, over two groups of 64 keys and a tail; p = 1 drops all."""
    q, k, seed = torch.randn(2, 2, 5, 8, dtype=dtype), torch.randn(2, 2, 150, 8, dtype=dtype), torch.tensor(2**61 + 987654321)
    unit = torch.eye(150, dtype=dtype).expand(2, 2, 150, 150)  # the output is the probabilities themselves
    with on_cuda():
        y = ops.attention.attention("dot_attention", q, k, unit, None, None, None, None, seed, Settings(p=0.25, scale=0.01))
        assert torch.equal(reference.kept((2, 2, 5, 150), 0.25, seed), y != 0)
        q.requires_grad_()
        y = SDPA(q, k, k, dropout_p=1.0)
        assert y.abs().max() == 0 and torch.autograd.grad(y.sum(), q)[0].abs().max() == 0


def test_attention_with_nothing_to_do():
    q, k = torch.randn(2, 3, 5, 8, requires_grad=True), torch.randn(2, 3, 6, 8, requires_grad=True)
    for a, b in ((q[:, :, :0], k), (q, k[:, :, :0]), (q[..., :0], k[..., :0]), (q[:0], k[:0])):
        theirs = tF.scaled_dot_product_attention(a, b, b)
        with on_cuda():
            ours = SDPA(a, b, b)
            found = torch.autograd.grad(ours.sum(), (q, k))
        torch.testing.assert_close(ours, theirs)
        for x, y in zip(found, torch.autograd.grad(theirs.sum(), (q, k))):
            torch.testing.assert_close(x, y)


@pytest.mark.parametrize("name", ADDITIVE_RANGES)
def test_additive_ranges(name):
    check_additive_range(name)


@pytest.mark.parametrize("order", ["reverse", "random"])
@pytest.mark.parametrize("name", ["causal", "added mask, shared", "additive"])
def test_attention_same_bits_in_every_thread_order(name, order):
    settings, more = OPTIONS[name]
    mask = more["mask"]().bfloat16() if more else None
    q, k, v, g = (torch.randn(1, 2, n, 12).bfloat16() for n in (QUERIES, KEYS, KEYS, QUERIES))
    weight = torch.randn(12) if settings.score == ADDITIVE else None

    def sample():
        operands = (q, k, v, mask, None, None, weight, None)
        output, statistics = FORWARD["cuda"](*operands, *settings)
        return [output, statistics, *BACKWARD["cuda"](g, *operands, output, statistics, *settings, mask is not None)]

    forward = sample()
    with cuda_on_host.thread_order(order, 1):
        other = sample()
    assert all(torch.equal(a, b) for a, b in zip(forward, other, strict=True))


# ---- Rotary positions ----


def rotary(depths, half, neighbours, queries, keys, batch=1, heads=2, wide=True, **options):
    """Our call, torch's after the reference has turned queries and keys, and their inputs. Heads share keys."""
    depth, value_depth = depths
    angles = torch.stack(F.rotary_angles(torch.randint(0, 100, (batch, 1, max(queries, keys))), 2 * half))
    angles = angles if wide else angles.bfloat16()  # so that every dtype has the same

    def theirs(q, k, v):
        turned = (turn(x, *angles[..., : x.shape[2], :], neighbours) for x in (q, k))
        return tF.scaled_dot_product_attention(next(turned), next(turned), v, enable_gqa=True, **options)

    def ours(q, k, v):
        cos, sin = angles if wide else angles.to(q.dtype)
        return SDPA(q, k, v, enable_gqa=True, rotary=(cos, sin), rotary_interleaved=neighbours, **options)

    return ours, theirs, lambda: leaves((batch, heads, queries, depth), (batch, 1, keys, depth), (batch, 1, keys, value_depth))


# All of a head, parts of 16 bytes and of none, one pair; heads and values of one block and of two; angles like the operands.
@all_dtypes
@pytest.mark.parametrize("neighbours", [False, True])
@pytest.mark.parametrize(("depths", "half", "wide"), [
    ((64, 64), 32, True), ((64, 8), 16, False), ((24, 40), 10, True), ((7, 9), 3, True), ((16, 140), 1, False),
    ((128, 128), 64, False), ((96, 128), 24, True), ((70, 30), 35, True),
], ids=str)  # fmt: skip
def test_attention_rotary_sizes(depths, half, wide, neighbours, dtype):
    certify(*rotary(depths, half, neighbours, 19, 37, wide=wide), dtype, 2)


@all_dtypes
@pytest.mark.parametrize("neighbours", [False, True])
@pytest.mark.parametrize(("queries", "keys"), [(1, 130), (65, 64), (130, 33)])
def test_attention_rotary_tile_borders(queries, keys, neighbours, dtype):
    """Causal, fewer and more keys than queries; keys that are gone through once in backward."""
    certify(*rotary((32, 16), 16, neighbours, queries, keys, batch=2, is_causal=True), dtype, 2)


def test_attention_rotary_is_one_call():
    """No other op or kernel turns queries and keys, forward or backward."""
    q, k, v = leaves((1, 2, 70, 128), (1, 2, 70, 128), (1, 2, 70, 8), dtype=torch.float32)
    angles = F.rotary_angles(torch.arange(70), 128)
    with on_cuda(), dlkern.trace() as calls:
        y = SDPA(q, k, v, rotary=angles)
        assert cuda_on_host.last_kernel().startswith("(attention_rotary_forward_kernel")
        torch.autograd.grad(y.sum(), (q, k, v))
        assert cuda_on_host.last_kernel().startswith("(attention_rotary_backward_key_kernel")
    assert [call.op for call in calls] == ["scaled_dot_product_attention"]


@all_dtypes
@pytest.mark.parametrize("neighbours", [False, True])
def test_attention_rotary_of_a_deep_head(neighbours, dtype):
    certify(*rotary((150, 16), 70, neighbours, 9, 20), dtype, 4)


@all_dtypes
def test_attention_rotary_operands_are_read_where_they_lie(dtype):
    """[B, S, H, D] seen as [B, H, S, D], with gaps, between 16-byte boundaries, angles so too: the bits of dense ones."""
    lying = [torch.randn(2, 37, 3, 32).to(dtype).transpose(1, 2) for _ in range(4)]
    gaps = [torch.randn(2, 3, 37, 64).to(dtype)[..., ::2] for _ in range(4)]
    shifted = [torch.randn(2, 3, 37, 33).to(dtype)[..., 1:] for _ in range(4)]
    angles = torch.randn(2, 1, 1, 37, 17)[..., 1:], torch.randn(2 * 37 * 16 + 1)[1:].view(2, 1, 1, 37, 16)
    for operands in (lying, gaps, shifted):
        for cos, sin in angles:
            found = []
            for dense in (False, True):
                q, k, v, g = (x.contiguous() if dense else x for x in operands)
                c, s = (x.clone(memory_format=torch.contiguous_format) if dense else x for x in (cos, sin))
                rest = (None,) * 4, (0.0, 0.3, 0.0, -1, 0, False)
                y, numbers = ROTARY_FORWARD(q, k, v, *rest[0], c, s, *rest[1])
                found.append([y, numbers, *ROTARY_BACKWARD(g, q, k, v, *rest[0], c, s, y, numbers, *rest[1], False)])
            assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("order", ["reverse", "random"])
@pytest.mark.parametrize("neighbours", [False, True])
def test_attention_rotary_same_bits_in_every_thread_order(neighbours, order):
    q, k, v, g = (torch.randn(1, heads, n, 40).bfloat16() for heads, n in ((2, 70), (1, 140), (1, 140), (2, 70)))
    rest = None, None, None, None, *torch.randn(2, 1, 1, 140, 16)
    settings = 0.0, 0.3, 0.0, 30, 20, neighbours

    def sample():
        y, numbers = ROTARY_FORWARD(q, k, v, *rest, *settings)
        return [y, numbers, *ROTARY_BACKWARD(g, q, k, v, *rest, y, numbers, *settings, False)]

    forward = sample()
    with cuda_on_host.thread_order(order, 1):
        other = sample()
    assert all(torch.equal(a, b) for a, b in zip(forward, other, strict=True))


def check_bits_of_turning_first(neighbours):
    """Of a causal call: output, statistics and the value's gradient."""
    q, k, v, g = (torch.randn(2, 2, n, 64).bfloat16() for n in (70, 140, 140, 70))
    angles, none = torch.randn(2, 2, 1, 140, 24), (None,) * 5
    turned = [ops.attention.raw["rotary"]["cuda"](x, *angles[..., : x.shape[2], :], neighbours, False) for x in (q, k)]
    ours = ROTARY_FORWARD(q, k, v, *none[:4], *angles, 0.0, 0.3, 0.0, -1, 0, neighbours)
    theirs = FORWARD["cuda"](*turned, v, *none, *Settings(scale=0.3, right=0))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    rest = *ours, 0.0, 0.3, 0.0, -1, 0
    ours = ROTARY_BACKWARD(g, q, k, v, *none[:4], *angles, *rest, neighbours, False)
    theirs = BACKWARD["cuda"](g, *turned, v, *none, *rest, 0, False)
    assert torch.equal(ours[2], theirs[2])


@pytest.mark.parametrize("neighbours", [False, True])
def test_attention_rotary_has_the_bits_of_turning_first(neighbours):
    """So a forward of one way and a backward of the other fit together."""
    check_bits_of_turning_first(neighbours)


def test_attention_rotary_with_nothing_to_do():
    q, k = torch.randn(2, 3, 5, 8, requires_grad=True), torch.randn(2, 3, 6, 8, requires_grad=True)
    for a, b in ((q[:, :, :0], k), (q, k[:, :, :0]), (q[:0], k[:0])):
        angles = torch.randn(2, max(a.shape[2], b.shape[2]), 4)
        with on_cuda():
            y = SDPA(a, b, b, rotary=tuple(angles))
            found = torch.autograd.grad(y.sum(), (q, k))
        assert y.shape == (*a.shape[:3], 8) and not y.any() and not any(x.any() for x in found)
    with on_cuda():
        y = SDPA(q, k, k, rotary=tuple(torch.randn(2, 6, 4)), dropout_p=1.0)
        assert not y.any() and not any(x.any() for x in torch.autograd.grad(y.sum(), (q, k)))


def test_attention_rotary_wrong_arguments():
    x, cos = torch.randn(2, 4, 5, 8), torch.randn(1, 1, 5, 4)
    none, settings = (None,) * 4, (0.0, 0.3, 0.0, -1, -1, False)
    y, numbers = ROTARY_FORWARD(x, x, x, *none, cos, cos, *settings)
    for c, s in ((cos[..., :4, :], cos[..., :4, :]), (cos, cos[..., :3]), (torch.randn(1, 1, 5, 5),) * 2, (cos[0], cos[0]),
                 (torch.randn(3, 1, 5, 4),) * 2, (torch.randn(1, 4, 5, 4),) * 2, (cos.half(), cos.half()),
                 (cos, cos.double())):  # fmt: skip
        with pytest.raises(RuntimeError, match="attention_rotary"):
            ROTARY_FORWARD(x, x, x, *none, c, s, *settings)
        with pytest.raises(RuntimeError, match="attention_rotary_backward"):
            ROTARY_BACKWARD(x, x, x, x, *none, c, s, y, numbers, *settings, False)


# ---- Sequences one after another ----

VARLEN_FORWARD, VARLEN_BACKWARD = (
    ops.attention_varlen.raw[f"attention_varlen_{way}"]["cuda"] for way in ("forward", "backward"))


@all_dtypes
@pytest.mark.parametrize("name", test_varlen.CASES)
def test_varlen_parity(name, dtype):
    with on_cuda():
        test_varlen.check_parity(name, dtype, "cuda")


@pytest.mark.parametrize("window", [*test_varlen.WINDOWS, (0, 70), (100, 1)], ids=str)
def test_varlen_windows(window):
    """Borders of tiles; sequences of more queries than keys, whose first ones may see none, and of fewer."""
    of_queries, of_keys = test_varlen.starts([70, 3, 130, 1]), test_varlen.starts([66, 140, 64, 2])
    certify(
        lambda *x: F.varlen_attn(*x, of_queries, of_keys, window_size=window),
        lambda *x: test_varlen.by_torch(*x, of_queries, of_keys, window),
        lambda: leaves((204, 1, 8), (272, 1, 8), (272, 1, 8)), torch.float32, 2,
    )  # fmt: skip


def test_varlen_options_and_wrong_arguments():
    with on_cuda():
        test_varlen.check_options("cuda", torch.float32)
        test_varlen.check_wrong_raw_calls("cuda")
    x, a = torch.randn(4, 2, 8, dtype=torch.float64), torch.tensor([0, 4])
    with pytest.raises(RuntimeError, match="expected float32"):
        VARLEN_FORWARD(x, x, x, a, a, None, 0.0, 1.0, 0.0, -1, -1)


def _varlen_sample(dtype, options=(0.3, 0.3, 2.0, -1, -1), depth=12):
    """Several tiles of queries and keys; sequences that go through their keys once and twice, and empty ones."""
    of_queries, of_keys = test_varlen.starts([70, 3, 0, 129, 1]), test_varlen.starts([150, 0, 5, 66, 1])
    tokens = (203, 4), (222, 2), (222, 2), (203, 4)
    q, k, v, g = (torch.randn(*n, depth).to(dtype) for n in tokens)
    rest = of_queries, of_keys, torch.tensor(2**40 + 7)
    output, statistics = VARLEN_FORWARD(q, k, v, *rest, *options)
    return (q, k, v, g), rest, [output, statistics, *VARLEN_BACKWARD(g, q, k, v, *rest, output, statistics, *options)]


@all_dtypes
@pytest.mark.parametrize("depth", [12, 72])
def test_varlen_has_the_bits_of_calls_of_their_own(depth, dtype):
    """Of each sequence alone, with seed + b."""
    (q, k, v, g), (of_queries, of_keys, seed), found = _varlen_sample(dtype, depth=depth)
    output, statistics, *gradients = found
    settings = Settings(p=0.3, scale=0.3, softcap=2.0)
    for b in range(5):
        rows, keys = (slice(*x[b : b + 2].tolist()) for x in (of_queries, of_keys))
        one = [x.transpose(0, 1)[None] for x in (q[rows], k[keys], v[keys], g[rows])]
        rest = (None,) * 4 + (seed + b,)
        y, numbers = FORWARD["cuda"](*one[:3], *rest, *settings)
        theirs = [y, *BACKWARD["cuda"](one[3], *one[:3], *rest, y, numbers, *settings, False)[:3]]
        ours = output[rows], gradients[0][rows], gradients[1][keys], gradients[2][keys]
        assert all(torch.equal(a.transpose(0, 1)[None], b) for a, b in zip(ours, theirs, strict=True))
        heads = slice(4 * rows.start, 4 * rows.stop)
        assert torch.equal(statistics[:, heads], numbers.view(2, -1))


@pytest.mark.parametrize("order", ["reverse", "random"])
def test_varlen_same_bits_in_every_thread_order(order):
    torch.manual_seed(5)
    *_, forward = _varlen_sample(torch.bfloat16)
    torch.manual_seed(5)
    with cuda_on_host.thread_order(order, 1):
        *_, other = _varlen_sample(torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(forward, other, strict=True))


def test_varlen_operands_are_read_where_they_lie():
    of_queries, of_keys = test_varlen.starts([5, 66]), test_varlen.starts([9, 3])
    settings = 0.0, 0.5, 0.0, -1, 0
    lying = [torch.randn(2, n, 16).transpose(0, 1) for n in (71, 12, 12, 71)]
    gaps = [torch.randn(n, 2, 32)[..., ::2] for n in (71, 12, 12, 71)]
    for operands in (lying, gaps):
        found = []
        for q, k, v, g in (operands, [x.contiguous() for x in operands]):
            rest = of_queries, of_keys, None
            y, numbers = VARLEN_FORWARD(q, k, v, *rest, *settings)
            found.append([y, numbers, *VARLEN_BACKWARD(g, q, k, v, *rest, y, numbers, *settings)])
        assert all(x.is_contiguous() for x in found[0])
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_varlen_with_nothing_to_do():
    """No sequences, no tokens on one side or either, no heads, no depth; and dropout of all."""
    for lengths, keys, heads, depth, p in (
        ([], [], 2, 8, 0.0), ([0, 0], [3, 4], 2, 8, 0.0), ([3, 4], [0, 0], 2, 8, 0.0), ([0], [0], 2, 8, 0.0),
        ([3], [4], 0, 8, 0.0), ([3], [4], 2, 0, 0.0), ([3], [4], 2, 8, 1.0),
    ):  # fmt: skip
        q, k = (torch.randn(sum(n), heads, depth, requires_grad=True) for n in (lengths, keys))
        rest = test_varlen.starts(lengths), test_varlen.starts(keys), torch.tensor(3), p, 0.3, 0.0, -1, -1
        with on_cuda():
            ours = ops.attention_varlen.attention_varlen(q, k, k, *rest)
            found = torch.autograd.grad(ours.sum(), (q, k), allow_unused=True)
        theirs = reference.attention_varlen(q, k, k, *rest)
        torch.testing.assert_close(ours, theirs)
        for x, leaf in zip(found, (q, k)):
            assert x.shape == leaf.shape and x.isfinite().all() and (p < 1 or not x.any())


def test_varlen_of_nested_tensors():
    pieces = [torch.randn(n, 2, 8, requires_grad=True) for n in (3, 70, 1)]
    x = torch.nested.as_nested_tensor(pieces, layout=torch.jagged).transpose(1, 2)
    with on_cuda():
        y = SDPA(x, x, x, is_causal=True)
        y.values().square().sum().backward()
        for found, piece in zip(y.transpose(1, 2).unbind(), pieces):
            alone = piece.detach().transpose(0, 1)[None].requires_grad_()
            theirs = SDPA(alone, alone, alone, is_causal=True)
            assert torch.equal(found.transpose(0, 1)[None], theirs)
            theirs.square().sum().backward()
            torch.testing.assert_close(piece.grad.transpose(0, 1)[None], alone.grad)


# ---- sm_90a ----

FORWARD_HOPPER, KEY_HOPPER = "attention_forward_sm90_kernel", "attention_backward_key_sm90_kernel"
HOPPER_QUERIES, HOPPER_KEYS = 150, 265  # tiles of 128, the last ones part full
HOPPER = {
    "plain": (Settings(scale=0.1), None), "causal": (Settings(scale=0.1, right=0), None),
    "window": (Settings(scale=0.1, left=40, right=70), None),
    "lengths": (Settings(scale=0.1), lambda: torch.tensor([[3], [HOPPER_KEYS - 1]])),
    "lengths of queries": (Settings(scale=0.1), lambda: torch.randint(1, HOPPER_KEYS + 1, (2, HOPPER_QUERIES))),
}  # fmt: skip


@contextlib.contextmanager
def on_hopper():
    with cuda_on_host.hopper(), cuda_on_host.multiprocessors(1):  # as few make few tiles enough
        yield


@short_dtypes
@pytest.mark.parametrize("depth", [64, 128])
@pytest.mark.parametrize("name", HOPPER)
def test_attention_on_hopper(name, depth, dtype):
    """Two heads of queries share one of keys."""
    settings, lengths = HOPPER[name]
    lengths = lengths and lengths()
    batch = 1 if lengths is None else 2
    i, j = torch.arange(HOPPER_QUERIES)[:, None], torch.arange(HOPPER_KEYS)
    mask = ((j <= i + settings.right) | (settings.right < 0)) & ((j >= i - settings.left) | (settings.left < 0))
    if lengths is not None:
        mask = mask & (j < lengths[:, None, :, None])
    operands = (None, lengths, None, None, None, settings)
    with on_hopper():
        certify(
            lambda *qkv: ops.attention.attention("dot_attention", *qkv, *operands),
            lambda *qkv: tF.scaled_dot_product_attention(*qkv, attn_mask=mask, scale=settings.scale, enable_gqa=True),
            lambda: leaves((batch, 2, HOPPER_QUERIES, depth), *[(batch, 1, HOPPER_KEYS, depth)] * 2), dtype,
        )
        assert cuda_on_host.last_kernel() == KEY_HOPPER


@short_dtypes
@pytest.mark.parametrize("causal", [False, True])
def test_attention_tile_borders_on_hopper(causal, dtype):
    """One query and a row more than a tile; keys that end with a tile, and one behind it."""
    for queries, keys in ((1, 129), (129, 256), (64, 257), (300, 130)):
        certify_on = lambda: leaves((1, 1, queries, 64), (1, 1, keys, 64), (1, 1, keys, 64))  # noqa: B023, E731
        with on_hopper():
            certify(lambda *a: SDPA(*a, is_causal=causal), lambda *a: tF.scaled_dot_product_attention(*a, is_causal=causal),
                    certify_on, dtype)
            assert cuda_on_host.last_kernel() == KEY_HOPPER


@beyond_float16
@pytest.mark.parametrize("depth", [64, 128])
def test_attention_of_gradients_beyond_float16_on_hopper(depth, factors):
    with on_hopper():
        check_gradients_beyond_float16(factors, 33, 150, depth)
        assert cuda_on_host.last_kernel() == KEY_HOPPER


def test_attention_operands_are_read_where_they_lie_on_hopper():
    """[B, S, H, D] seen as [B, H, S, D], and rows with gaps: the same bits."""
    lying = [torch.randn(2, 140, 2, 64).bfloat16().transpose(1, 2) for _ in range(4)]
    gaps = [torch.randn(2, 2, 140, 72).half()[..., :64] for _ in range(4)]
    none = [None] * 5
    with on_hopper():
        for q, k, v, g in (lying, gaps):
            found = []
            for operands in ((q, k, v, g), [x.contiguous() for x in (q, k, v, g)]):
                output, statistics = FORWARD["cuda"](*operands[:3], *none, *Settings(scale=0.1, right=0))
                assert cuda_on_host.last_kernel() == FORWARD_HOPPER
                gradients = BACKWARD["cuda"](
                    operands[3], *operands[:3], *none, output, statistics, *Settings(scale=0.1, right=0), False)
                assert cuda_on_host.last_kernel() == KEY_HOPPER
                found.append((output, statistics, *gradients))
            assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@short_dtypes
@pytest.mark.parametrize("order", ["reverse", "random"])
@pytest.mark.parametrize("depth", [64, 128])
def test_attention_on_hopper_same_bits_in_every_thread_order(depth, order, dtype):
    settings = Settings(scale=0.1, left=200, right=20)
    q, k, v, g = (torch.randn(1, heads, n, depth).to(dtype) for heads, n in ((2, 140), (1, 300), (1, 300), (2, 140)))

    def sample():
        output, statistics = FORWARD["cuda"](q, k, v, *[None] * 5, *settings)
        return [output, statistics, *BACKWARD["cuda"](g, q, k, v, *[None] * 5, output, statistics, *settings, False)]

    with on_hopper():
        forward = sample()
        with cuda_on_host.thread_order(order, 1):
            other = sample()
        assert cuda_on_host.last_kernel() == KEY_HOPPER
    assert all(torch.equal(a, b) for a, b in zip(forward, other, strict=True))


@short_dtypes
def test_attention_on_hopper_of_nan_and_of_queries_that_see_nothing(dtype):
    q, k, v = (torch.randn(1, 2, n, 64).to(dtype).requires_grad_() for n in (70, 140, 140))
    nan = q.detach().clone()
    nan[0, 0, 1, 0] = torch.nan
    lengths = torch.full((1, 70), 140)
    lengths[0, [3, 69]] = 0
    with on_hopper(), on_cuda():
        y = SDPA(nan, k, v)
        assert cuda_on_host.last_kernel() == FORWARD_HOPPER
        assert y[0, 0, 1].isnan().all() and y[0, 0, 2:].isfinite().all() and y[0, 1].isfinite().all()
        y = SDPA(q, k, v, lengths=lengths)
        found = torch.autograd.grad(y, (q, k, v), torch.randn_like(y))
        assert cuda_on_host.last_kernel() == KEY_HOPPER
    assert y[0, :, [3, 69]].abs().max() == 0 and y[0, :, 4].abs().max() > 0
    assert all(x.isfinite().all() for x in found) and found[0][0, :, [3, 69]].abs().max() == 0


@pytest.mark.parametrize(("settings", "more", "depths"), [
    (Settings(scale=0.2), {}, (72, 72)), (Settings(scale=0.2), {}, (64, 128)), (Settings(scale=-0.2), {}, (64, 64)),
    (Settings(scale=0.2, softcap=2.0), {}, (64, 64)), (Settings(scale=0.2, score=COSINE), {}, (64, 64)),
    (Settings(scale=0.2), dict(slopes=lambda: torch.ones(2)), (64, 64)),
    (Settings(scale=0.2), dict(mask=lambda: torch.ones(1, 1, 140, 140, dtype=torch.bool)), (64, 64)),
    (Settings(scale=0.2, p=0.5), dict(seed=lambda: torch.tensor(7)), (64, 64)),
])  # fmt: skip
def test_attention_that_does_not_fit_hopper(settings, more, depths):
    more = {key: make() for key, make in more.items()}
    q, k, v = (torch.randn(1, 2, 140, depth).bfloat16() for depth in (depths[0], *depths))
    rest = [more.get(name) for name in ("mask", "lengths", "slopes", "weight", "seed")]
    with on_hopper():
        output, statistics = FORWARD["cuda"](q, k, v, *rest, *settings)
        assert cuda_on_host.last_kernel().startswith("(attention_forward_kernel")
        BACKWARD["cuda"](v, q, k, v, *rest, output, statistics, *settings, False)
        assert cuda_on_host.last_kernel() != KEY_HOPPER


@pytest.mark.parametrize("neighbours", [False, True])
def test_attention_rotary_on_hopper(neighbours):
    """Turned first, for Hopper's kernels, by the rule and with their bits; not where those decline."""
    with on_hopper():
        for dtype in (torch.bfloat16, torch.float16):
            certify(*rotary((64, 64), 24, neighbours, 70, 140), dtype, 2)
            assert cuda_on_host.last_kernel().startswith("(rotary_kernel")
        check_bits_of_turning_first(neighbours)
        certify(*rotary((72, 64), 24, neighbours, 70, 140), torch.float16, 2)
        assert cuda_on_host.last_kernel().startswith("(attention_rotary_backward_key_kernel")


def test_attention_that_hopper_leaves_to_others():
    """Elements between 16-byte boundaries, expanded operands and gradients, few keys or kept scores (backward), few
    tiles, float32."""
    q, k, g = (torch.randn(1, 2, 140, 64).bfloat16() for _ in range(3))
    shifted, expanded = torch.randn(1, 2, 140, 65).bfloat16()[..., 1:], k[:, :1].expand(1, 2, 140, 64)
    none, settings = [None] * 5, Settings(scale=0.1)

    def kernels(q, k, g, from_scores=False):
        output, statistics = FORWARD["cuda"](q, k, k, *none, *settings)
        forward = cuda_on_host.last_kernel()
        BACKWARD["cuda"](g, q, k, k, *none, output, statistics, *settings, False, from_scores)
        return [name.rpartition("_sm90")[1] for name in (forward, cuda_on_host.last_kernel())]

    with on_hopper():
        assert kernels(q, k, g) == ["_sm90", "_sm90"]
        assert kernels(q, k[:, :, :128], g) == ["_sm90", ""]
        assert kernels(q, k, g, from_scores=True) == ["_sm90", ""]
        assert kernels(q, k, g[:, :, :1].expand(g.shape)) == ["_sm90", ""]
        for operands in ((shifted, k, g), (q, shifted, g), (q, expanded, g), (q.float(), k.float(), g.float())):
            assert kernels(*operands) == ["", ""]
        with cuda_on_host.multiprocessors(132):
            assert kernels(q, k, g) == ["", ""]


# Of packed sequences: tiles that end with their sequence and before, more queries than keys, fewer keys than the
# backward's kernels take, none, no queries.
VARLEN_HOPPER = [f"attention_varlen_{way}_sm90_kernel" for way in ("forward", "backward_key")]
PACKED_QUERIES, PACKED_KEYS = [150, 3, 70, 0, 64, 200, 40], [265, 129, 40, 130, 256, 145, 0]


def packed(dtype, depth=64, heads=2):
    """Queries, keys, values and gradients of the output; where sequences begin."""
    sizes = (sum(PACKED_QUERIES), heads), *[(sum(PACKED_KEYS), 1)] * 2, (sum(PACKED_QUERIES), heads)
    starts = test_varlen.starts(PACKED_QUERIES), test_varlen.starts(PACKED_KEYS)
    return [torch.randn(*size, depth).to(dtype) for size in sizes], starts


def packed_results(operands, starts, window=(-1, -1), p=0.0, softcap=0.0):
    """Output, statistics and gradients; the names of the last kernels of the forward and the backward."""
    q, k, v, g = operands
    rest = *starts, torch.tensor(7) if p else None
    settings = p, 0.1, softcap, *window
    output, statistics = VARLEN_FORWARD(q, k, v, *rest, *settings)
    kernels = [cuda_on_host.last_kernel()]
    gradients = VARLEN_BACKWARD(g, q, k, v, *rest, output, statistics, *settings)
    return [output, statistics, *gradients], [*kernels, cuda_on_host.last_kernel()]


@short_dtypes
@pytest.mark.parametrize(("window", "depth"), [
    ((-1, -1), 64), ((-1, 0), 64), ((-1, 0), 128), ((40, 70), 64), ((100, 1), 128)], ids=str)  # fmt: skip
def test_varlen_on_hopper(window, depth, dtype):
    """Two heads of queries share one of keys."""
    operands, starts = packed(torch.float64, depth)
    with on_hopper():
        certify(
            lambda *x: F.varlen_attn(*x, *starts, window_size=window, enable_gqa=True, scale=0.1),
            lambda *x: test_varlen.by_torch(x[0] * (0.1 * depth**0.5), *x[1:], *starts, window),
            lambda: [torch.randn_like(x).requires_grad_() for x in operands[:3]], dtype,
        )
        assert cuda_on_host.last_kernel() == VARLEN_HOPPER[1]


@short_dtypes
@pytest.mark.parametrize("depth", [64, 128])
def test_varlen_on_hopper_has_the_bits_of_calls_of_their_own(depth, dtype):
    """Also where all neighbours are NaN, which must not pass from one sequence to the next."""
    operands, starts = packed(dtype, depth)
    with on_hopper():
        found, kernels = packed_results(operands, starts, (90, 60))
        assert kernels == VARLEN_HOPPER
        for b, (queries, keys) in enumerate(zip(PACKED_QUERIES, PACKED_KEYS)):
            rows, columns = (slice(*x[b : b + 2].tolist()) for x in starts)
            places = rows, columns, columns, rows
            alone = [torch.full_like(x, torch.nan) for x in operands]
            for x, y, place in zip(alone, operands, places):
                x[place] = y[place]
            among_nan, _ = packed_results(alone, starts, (90, 60))
            heads = slice(2 * rows.start, 2 * rows.stop)
            parts = [(x[0][rows], x[1][:, heads], x[2][rows], x[3][columns], x[4][columns]) for x in (found, among_nan)]
            assert all(torch.equal(a, b) for a, b in zip(*parts, strict=True))
            if 0 in (queries, keys):
                assert not any(x.any() for x in (parts[0][0], *parts[0][2:]))
                continue
            one = [x[place].transpose(0, 1)[None] for x, place in zip(operands, places)]
            shift = keys - queries  # of windows, which are aligned at the end
            if shift > 90 or shift < -60:
                continue  # a call's own window begins at its query or before
            rest = (None,) * 5
            settings = Settings(scale=0.1, left=90 - shift, right=60 + shift)
            y, numbers = FORWARD["cuda"](*one[:3], *rest, *settings)
            theirs = [y, *BACKWARD["cuda"](one[3], *one[:3], *rest, y, numbers, *settings, False)[:3]]
            ours = parts[0][0], *parts[0][2:]
            assert all(torch.equal(a.transpose(0, 1)[None], b) for a, b in zip(ours, theirs, strict=True))
            assert torch.equal(parts[0][1], numbers.view(2, -1))


@short_dtypes
@pytest.mark.parametrize("order", ["reverse", "random"])
def test_varlen_on_hopper_same_bits_in_every_thread_order(order, dtype):
    operands, starts = packed(dtype)
    with on_hopper():
        forward, kernels = packed_results(operands, starts, (-1, 0))
        assert kernels == VARLEN_HOPPER
        with cuda_on_host.thread_order(order, 1):
            other, _ = packed_results(operands, starts, (-1, 0))
    assert all(torch.equal(a, b) for a, b in zip(forward, other, strict=True))


def test_varlen_operands_are_read_where_they_lie_on_hopper():
    operands, starts = packed(torch.bfloat16)
    lying = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in operands]
    gaps = [tF.pad(x, (0, 8))[..., :64] for x in operands]
    with on_hopper():
        dense, _ = packed_results(operands, starts)
        for other in (lying, gaps):
            found, kernels = packed_results(other, starts)
            assert kernels == VARLEN_HOPPER and all(torch.equal(a, b) for a, b in zip(dense, found, strict=True))


def test_varlen_that_hopper_leaves_to_others():
    """Dropout, caps, other depths and types, elements between 16-byte boundaries, gradients that are expanded, few tiles;
    in backward, sequences of few keys."""
    operands, starts = packed(torch.float16)
    shifted = torch.randn(sum(PACKED_KEYS), 1, 65).half()[..., 1:]
    expanded = operands[3][:1].expand(operands[3].shape)

    def kernels(*operands, starts=starts, **options):
        return ["_sm90" in kernel for kernel in packed_results(operands, starts, **options)[1]]

    with on_hopper():
        assert kernels(*operands) == [True, True]
        assert kernels(*operands[:3], expanded) == [True, False]
        short = [x[: 2 * 40] for x in operands]
        assert kernels(*short, starts=[test_varlen.starts([40, 40])] * 2) == [True, False]
        for others in (packed(torch.float16, 72)[0], packed(torch.float32)[0], [operands[0], shifted, *operands[2:]]):
            assert kernels(*others) == [False, False]
        for options in (dict(p=0.5), dict(softcap=2.0)):
            assert kernels(*operands, **options) == [False, False]
        with cuda_on_host.multiprocessors(132):
            assert kernels(*operands) == [False, False]


def test_attention_wrong_arguments():
    x = torch.randn(2, 4, 5, 8)
    valid = dict(
        query=x, key=x, value=x, mask=None, lengths=None, slopes=None, weight=None, seed=None, p=0.0, scale=1.0, softcap=0.0,
        left=-1, right=-1, score=0,
    )
    forward, backward = FORWARD["cuda"], BACKWARD["cuda"]
    output, statistics = forward(*valid.values())
    changes = (
        dict(key=x.double()), dict(key=x[0]), dict(key=x[:1]), dict(key=x[..., :4]), dict(value=x[:, :, :3]),
        dict(key=x[:, :3], value=x[:, :3]), dict(p=0.5), dict(mask=torch.zeros(2, 4, 5, 4)),
        dict(mask=torch.zeros(5, 5)), dict(mask=torch.zeros(1, 1, 5, 5, dtype=torch.int32)),
        dict(lengths=torch.ones(2, 3, dtype=torch.int64)), dict(slopes=torch.ones(3)), dict(score=ADDITIVE),
        dict(weight=torch.ones(8)), dict(weight=torch.ones(7), score=ADDITIVE),
        dict(query=x.double(), key=x.double(), value=x.double()),
    )  # fmt: skip
    for change in changes:
        with pytest.raises(RuntimeError, match="attention"):
            forward(*(valid | change).values())
        with pytest.raises(RuntimeError, match="attention"):
            backward(x, *list((valid | change).values())[:8], output, statistics, *list((valid | change).values())[8:], False)
    for change in (dict(p=1.5), dict(score=4), dict(softcap=-1.0), dict(left=-2)):
        with pytest.raises(ValueError):
            forward(*(valid | change).values())
    operands, settings = list(valid.values())[:8], list(valid.values())[8:]
    for grad, out, numbers, of_mask in ((x[..., :4], output, statistics, False), (x, output[:1], statistics, False),
                                        (x, output, statistics[:1], False), (x, output, statistics, True)):  # fmt: skip
        with pytest.raises(RuntimeError, match="attention_backward"):
            backward(grad, *operands, out, numbers, *settings, of_mask)

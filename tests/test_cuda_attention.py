"""Attention of the CUDA column, run on the host: every score, mask and option by the numerics rule, over several tiles
(64 queries; 64 keys in 16-bit types, 32 in float32) and blocks of the depth (64 or 128). tests/test_cuda_builds.py runs this
file again on the checked build."""

import pytest
import torch
import torch.nn.functional as tF
from attention_cases import KEYS, OPTIONS, QUERIES, leaves, randn, sides
from cuda_column import all_dtypes, certify, library, no_findings, on_cuda  # noqa: F401

import dlkern.nn.functional as F
from dlkern import ops
from dlkern.ops.attention import ADDITIVE, COSINE, DOT, GAUSSIAN, Settings
from dlkern.reference import attention as reference
from dlkern.testing import compare, cuda_on_host

SDPA = F.scaled_dot_product_attention
FORWARD, BACKWARD = (ops.attention.raw[f"attention_{way}"] for way in ("forward", "backward"))


@all_dtypes
@pytest.mark.parametrize("name", OPTIONS)
def test_attention(name, dtype):
    """Two heads of queries share one of keys; two tiles of queries and of keys, the second ones nearly empty."""
    settings, more = OPTIONS[name]
    batch = 1 if not more or set(more) <= {"slopes", "seed"} else 2
    depth = 5 if settings.score in (ADDITIVE, GAUSSIAN) else 12
    shapes = (batch, 2, QUERIES, depth), (batch, 1, KEYS, depth), (batch, 1, KEYS, 36)
    certify(*sides(settings, more, shapes), dtype, 2)


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
@pytest.mark.parametrize("factors", [(2**-6, 2**-10, 2**8, 2**10), (2**-6, 2**6, 2**-6, 2**-12)], ids=["up", "down"])
@pytest.mark.parametrize("keys", [20, 150])
def test_attention_of_gradients_beyond_float16(keys, factors):
    """The error is torch's where all is near 1, times the factor that the gradient has."""
    q, k, v, g = (torch.randn(1, 2, n, 16) for n in (33, keys, keys, 33))
    near = [(x * f).half() for x, f in zip((q, k), factors)] + [v.half(), g.half()]
    far = [near[0], near[1], (v * factors[2]).half(), (g * factors[3]).half()]
    scale = 0.25

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

"""Attention in the Triton column, interpreted: every score, mask and option by the numerics rule, over several tiles
(64 x 64 there, and depths are cut at 32); what test_triton.py's catalogue does not hold."""

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
    assert_by_the_rule,
    check_additive_range,
    kept_scores,
    leaves,
    sides,
)
from triton_column import emulated  # noqa: F401

import dlkern.nn.functional as F
from dlkern import ops
from dlkern.ops.attention import ADDITIVE, COSINE, GAUSSIAN, Settings
from dlkern.reference import attention as reference
from dlkern.testing import check

pytest.importorskip("triton")

SDPA = F.scaled_dot_product_attention


OPTIONS = OPTIONS | ROTARY
SINGLE = [(name, torch.float32) for name in OPTIONS]
_HALF = ("plain", "window", "bool mask", "added mask, shared", "dropout", "cosine", "rotary", "rotary of a part, neighbours")
HALF = [(name, torch.bfloat16) for name in _HALF]


@pytest.mark.parametrize(("name", "dtype"), SINGLE + HALF, ids=str)
def test_parity(name, dtype):
    """Two heads of queries share one of keys; two tiles of queries, of keys, and two blocks of the value's depth."""
    settings, more = OPTIONS[name]
    batch = 1 if not {"mask", "lengths"} & set(more) else 2
    depth = 5 if settings.score in (ADDITIVE, GAUSSIAN) else 12
    ours, theirs, inputs = sides(settings, more, ((batch, 2, QUERIES, depth), (batch, 1, KEYS, depth), (batch, 1, KEYS, 36)))
    draws = 2 if batch == 1 and dtype == torch.float32 else 1
    assert_by_the_rule(ours, theirs, inputs, dtype, draws, name)


@pytest.mark.parametrize("score", [0, COSINE, ADDITIVE])
def test_depths_beyond_a_block(score):
    """Three blocks of the depth, two of the value's, and the other way round; float64, by torch's own values."""
    for depth, value_depth in ((70, 40), (12, 40), (40, 12))[: 3 if score == 0 else 1]:
        q, k, v = leaves((1, 1, 5, depth), (1, 1, 7, depth), (1, 1, 7, value_depth))
        w = leaves((depth,))[0] if score == ADDITIVE else None
        settings = Settings(scale=0.2, score=score)
        inputs = [q, k, v] if w is None else [q, k, v, w]
        ours = ops.attention.attention("dot_attention", q, k, v, None, None, None, w, None, settings)
        theirs = reference.attention(q, k, v, None, None, None, w, None, *settings)
        torch.testing.assert_close(ours, theirs)
        g = torch.randn_like(ours)
        for a, b in zip(torch.autograd.grad(ours, inputs, g), torch.autograd.grad(theirs, inputs, g)):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_of_a_deep_head(interleaved):
    """Three blocks of the depth, which pairs cross."""
    shapes = (1, 2, 5, 70), (1, 1, 7, 70), (1, 1, 7, 40)
    q, k, v = leaves(*shapes)
    angles = F.rotary_angles(torch.arange(7), 60)
    ours = SDPA(q, k, v, enable_gqa=True, rotary=angles, rotary_interleaved=interleaved)
    turned = (F.rotary(x, *(t[: x.shape[2]] for t in angles), interleaved=interleaved) for x in (q, k))
    theirs = tF.scaled_dot_product_attention(next(turned), next(turned), v, enable_gqa=True)
    torch.testing.assert_close(ours, theirs)
    g = torch.randn_like(ours)
    for a, b in zip(torch.autograd.grad(ours, (q, k, v), g), torch.autograd.grad(theirs, (q, k, v), g)):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("queries", [1, 64, 65, 130])
def test_tile_borders(queries, causal):
    """Query tiles that see no key tile, one, all of it and part of it; fewer and more keys than queries."""
    for keys in (63, 64, 129):
        q, k, v = leaves((1, 1, queries, 16), (1, 1, keys, 16), (1, 1, keys, 16))
        ours, theirs = SDPA(q, k, v, is_causal=causal), tF.scaled_dot_product_attention(q, k, v, is_causal=causal)
        torch.testing.assert_close(ours, theirs)
        g = torch.randn_like(ours)
        for a, b in zip(torch.autograd.grad(ours, (q, k, v), g), torch.autograd.grad(theirs, (q, k, v), g)):
            torch.testing.assert_close(a, b)


def test_delta_from_the_output():
    """More keys than are gone through twice: delta is sum(g output)."""
    shapes = (1, 2, 33, 12), (1, 2, 150, 12), (1, 2, 150, 12)
    check(SDPA, tF.scaled_dot_product_attention, lambda: leaves(*shapes), draws=4).raise_if_failed()
    q, k, v = leaves(*shapes)
    ours, theirs = SDPA(q, k, v), tF.scaled_dot_product_attention(q, k, v)
    for a, b in zip(torch.autograd.grad(ours.sum(), (q, k, v)), torch.autograd.grad(theirs.sum(), (q, k, v))):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("equal", [False, True])
def test_gradients_where_torch_keeps_the_scores(dtype, equal):
    assert_by_the_rule(*kept_scores((1, 33, 12), (1, 150, 12), 0.5, equal), dtype, 4)


def test_operands_are_read_where_they_lie():
    """[B, S, H, D] seen as [B, H, S, D]: the same bits, and a result in that order."""
    q, k, v = (torch.randn(2, 9, 3, 24).transpose(1, 2) for _ in range(3))
    turned, dense = SDPA(q, k, v), SDPA(q.contiguous(), k.contiguous(), v.contiguous())
    assert torch.equal(turned, dense) and turned.transpose(1, 2).is_contiguous() and dense.is_contiguous()
    strided = torch.randn(2, 3, 9, 48)[..., ::2]
    assert torch.equal(SDPA(strided, strided, strided), SDPA(*[strided.contiguous()] * 3))


def test_a_query_that_sees_nothing():
    q, k, v = leaves((1, 2, 6, 8), (1, 2, 70, 8), (1, 2, 70, 8), dtype=torch.float32)
    mask = torch.ones(6, 70, dtype=torch.bool)
    mask[3], mask[5] = False, False
    added = torch.zeros(6, 70).masked_fill(~mask, -torch.inf)
    for options in (dict(attn_mask=mask), dict(attn_mask=added), dict(lengths=torch.where(mask[:, :1], 70, 0).t())):
        y = SDPA(q, k, v, **options)
        assert y[0, :, 3].abs().max() == 0 and y[0, :, 5].abs().max() == 0 and y[0, :, 4].abs().max() > 0
        found = torch.autograd.grad(y.sum(), (q, k, v))
        assert all(g.isfinite().all() for g in found) and found[0][0, :, 3].abs().max() == 0


@pytest.mark.parametrize("length", [64, 192])
def test_masked_tail_with_scores_far_below_zero(length):
    """S % 128 == 64, a mask, and a log-sum-exp below -88.7, where one library's query gradients were NaN."""
    q, k, v = leaves((1, 1, length, 16), (1, 1, length, 16), (1, 1, length, 16), dtype=torch.float32)
    mask = (torch.full((length, length), -120.0) + torch.randn(length, length)).requires_grad_()
    inputs = (q, k, v, mask)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    ours, theirs = SDPA(*inputs), tF.scaled_dot_product_attention(*exact)
    for a, b in zip((ours, *torch.autograd.grad(ours.sum(), inputs)), (theirs, *torch.autograd.grad(theirs.sum(), exact))):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


def test_infinite_and_nan_scores():
    q, k = torch.randn(1, 1, 4, 8), torch.randn(1, 1, 6, 8)
    q[0, 0, 1, 0] = torch.nan
    y = SDPA(q, k, k)
    assert y[0, 0, 1].isnan().all() and y[0, 0, [0, 2, 3]].isfinite().all()


def test_dropout_drops_the_same_elements():
    """As the reference, which is the CPU column's contract, over two groups of 64 keys and a tail; p = 1 drops all."""
    q, k, seed = torch.randn(2, 2, 5, 8), torch.randn(2, 2, 150, 8), torch.tensor(2**61 + 987654321)
    unit = torch.eye(150).expand(2, 2, 150, 150)  # the output is the probabilities themselves
    y = ops.attention.attention("dot_attention", q, k, unit, None, None, None, None, seed, Settings(p=0.25, scale=0.01))
    assert torch.equal(reference.kept((2, 2, 5, 150), 0.25, seed), y != 0)
    q.requires_grad_()
    y = SDPA(q, k, k, dropout_p=1.0)
    assert y.abs().max() == 0 and torch.autograd.grad(y.sum(), q)[0].abs().max() == 0


def test_empty():
    q, k = torch.randn(2, 3, 5, 8, requires_grad=True), torch.randn(2, 3, 6, 8, requires_grad=True)
    for a, b in ((q[:, :, :0], k), (q, k[:, :, :0]), (q[..., :0], k[..., :0]), (q[:0], k[:0])):
        ours, theirs = SDPA(a, b, b), tF.scaled_dot_product_attention(a, b, b)
        torch.testing.assert_close(ours, theirs)
        for x, y in zip(torch.autograd.grad(ours.sum(), (q, k)), torch.autograd.grad(theirs.sum(), (q, k))):
            torch.testing.assert_close(x, y)


def test_wrong_arguments_of_the_raw_ops_raise():
    x = torch.randn(2, 4, 5, 8)
    valid = dict(
        query=x, key=x, value=x, mask=None, lengths=None, slopes=None, weight=None, seed=None, p=0.0, scale=1.0, softcap=0.0,
        left=-1, right=-1, score=0,
    )
    forward, backward = (ops.attention.raw[f"attention_{way}"]["triton"] for way in ("forward", "backward"))
    output, statistics = forward(*valid.values())
    changes = (
        dict(key=x.double()), dict(key=x[0]), dict(key=x[:1]), dict(key=x[..., :4]), dict(value=x[:, :, :3]),
        dict(key=x[:, :3], value=x[:, :3]), dict(p=0.5), dict(mask=torch.zeros(2, 4, 5, 4)),
        dict(mask=torch.zeros(5, 5)), dict(mask=torch.zeros(1, 1, 5, 5, dtype=torch.int32)),
        dict(lengths=torch.ones(2, 3, dtype=torch.int64)), dict(slopes=torch.ones(3)), dict(score=ADDITIVE),
        dict(weight=torch.ones(8)), dict(weight=torch.ones(7), score=ADDITIVE), dict(query=x.int(), key=x.int(), value=x.int()),
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


def test_sharp_scores_over_several_blocks_of_depth():
    """Probabilities near 1: the gradient is what is left when they are subtracted, and a backward whose scores add their
    blocks of depth in another order than the forward's has nothing but that difference."""
    check(
        lambda *x: SDPA(*x, scale=0.6), lambda *x: tF.scaled_dot_product_attention(*x, scale=0.6),
        lambda: leaves((1, 1, 20, 200), (1, 1, 23, 200), (1, 1, 23, 200)), draws=4,
    ).raise_if_failed()


# --- sequences one after another --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dtype"), [(name, torch.float32) for name in test_varlen.CASES] + [("shared heads", torch.bfloat16)], ids=str
)
def test_varlen_parity(name, dtype):
    test_varlen.check_parity(name, dtype, "triton")


@pytest.mark.parametrize("window", test_varlen.WINDOWS, ids=str)
def test_varlen_windows(window):
    for name in ("several", "empty ones"):
        test_varlen.check_windows(name, window, "triton")


def test_varlen_options_and_wrong_calls():
    test_varlen.check_options("triton")
    test_varlen.check_wrong_raw_calls("triton")


@pytest.mark.parametrize("name", ADDITIVE_RANGES)
def test_additive_ranges(name):
    check_additive_range(name)

"""Positions against transformers' own and against what defines them."""

import importlib
import math

import attention_cases
import pytest
import torch
from torchvision_stub import transformers

import dlkern
from dlkern.nn import functional as F
from dlkern.ops._registry import raw
from dlkern.reference import positions as reference
from dlkern.testing import check


def test_sinusoidal_positions():
    table = F.sinusoidal_positions(7, 5)
    for p in range(7):
        for i in range(5):
            angle = p / 10000 ** ((i - i % 2) / 5)
            assert abs(table[p, i].item() - (math.cos(angle) if i % 2 else math.sin(angle))) < 6e-8
    module = dlkern.nn.SinusoidalPositions(6, max_len=9)
    x = torch.randn(2, 3, 6)
    assert not module.state_dict() and torch.equal(module(x, offset=4), x + F.sinusoidal_positions(9, 6)[4:7])
    assert module.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16
    with pytest.raises(IndexError, match="7 to 9 are outside 0 to 8"):
        module(x, offset=7)
    with pytest.raises(RuntimeError, match="do not fit"):
        module(x[..., :5])


def test_learned_positions():
    torch.manual_seed(0)
    module, x = dlkern.nn.LearnedPositions(5, 4), torch.randn(2, 3, 4)
    y = module(x, offset=2)
    assert torch.equal(y, x + module.weight[2:])
    y.sum().backward()
    assert module.weight.grad.tolist() == [[0.0] * 4] * 2 + [[2.0] * 4] * 3


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("buckets", "distance"), [(32, 128), (16, 50), (9, 20)])
def test_buckets_are_t5s(bidirectional, buckets, distance):
    transformers()
    from transformers.models.t5.modeling_t5 import T5Attention

    ours = F.relative_position_buckets(300, 290, buckets, distance, bidirectional, offset=3)
    relative = torch.arange(290) - torch.arange(3, 303)[:, None]
    assert torch.equal(ours, T5Attention._relative_position_bucket(relative, bidirectional, buckets, distance))
    assert set(ours.unique().tolist()) <= set(range(buckets))


def test_relative_position_bias_is_t5s():
    transformers()
    from transformers import T5Config
    from transformers.models.t5.modeling_t5 import T5Attention

    torch.manual_seed(0)
    config = T5Config(d_model=12, num_heads=3, d_kv=4, is_decoder=False, dropout_rate=0.0)
    theirs = T5Attention(config, has_relative_attention_bias=True, layer_idx=0)
    ours = dlkern.nn.RelativePositionBias(3)
    ours.load_state_dict({"weight": theirs.relative_attention_bias.weight})
    x = torch.randn(2, 21, 12)
    expected = theirs(x, cache_position=torch.arange(21))[0]
    q, k, v = ((x @ p.weight.T).unflatten(-1, (3, 4)).transpose(1, 2) for p in (theirs.q, theirs.k, theirs.v))
    with dlkern.trace() as calls:
        y = F.scaled_dot_product_attention(q, k, v, ours(21, 21), scale=1.0)
    assert calls[0].backend == "cpu" and calls[0].shapes[3] == (1, 3, 21, 21)
    actual = y.transpose(1, 2).flatten(2) @ theirs.o.weight.T
    torch.testing.assert_close(actual, expected)
    actual.sin().sum().backward()
    expected.sin().sum().backward()
    torch.testing.assert_close(ours.weight.grad, theirs.relative_attention_bias.weight.grad)


@pytest.mark.parametrize("heads", [1, 2, 3, 8, 12, 20])
def test_slopes_are_blooms(heads):
    transformers()
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    theirs = build_alibi_tensor(torch.ones(1, 2), heads, torch.float32)[:, 0, 1]
    torch.testing.assert_close(F.alibi_slopes(heads), theirs, rtol=1e-6, atol=0)


def test_slopes_in_attention():
    q, k, v = torch.randn(3, 1, 3, 5, 4).unbind(0)
    distance = (torch.arange(5)[:, None] - torch.arange(5)).abs()
    bias = -F.alibi_slopes(3)[:, None, None] * distance
    torch.testing.assert_close(
        F.scaled_dot_product_attention(q, k, v, alibi_slopes=F.alibi_slopes(3)),
        torch.nn.functional.scaled_dot_product_attention(q, k, v, bias),
    )


def test_rotary_is_llamas():
    transformers()
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    q, k = torch.randn(2, 4, 11, 6, requires_grad=True), torch.randn(2, 2, 11, 6, requires_grad=True)
    positions = torch.stack([torch.arange(11), torch.arange(5, 16)])
    turn = LlamaRotaryEmbedding(LlamaConfig(hidden_size=24, num_attention_heads=4))
    theirs = apply_rotary_pos_emb(q, k, *turn(q, positions))
    ours = dlkern.nn.RotaryPositions(6)(q, k, positions[:, None])
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
    cotangents = torch.randn(2, 4, 11, 6), torch.randn(2, 2, 11, 6)
    for a, b in zip(*(torch.autograd.grad(y, (q, k), cotangents) for y in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("interleaved", [True, False])
def test_rotary_keeps_distances(interleaved):
    """Scores depend on the distance alone, and the elements beyond dim stay."""
    module = dlkern.nn.RotaryPositions(6, interleaved=interleaved)
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)
    q, k = q.expand(1, 1, 9, 8), k.expand(1, 1, 9, 8)
    a, b = module(q, k)
    assert torch.equal(a[..., 6:], q[..., 6:])
    scores = (a @ b.transpose(-2, -1))[0, 0]
    for distance in range(-8, 9):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-6, atol=1e-6)
    assert (scores[0] - scores[0, 0]).abs().max() > 0.01
    pairs = (a[..., :6].unflatten(-1, (3, 2)) if interleaved else a[..., :6].unflatten(-1, (2, 3)).mT).norm(dim=-1)
    before = (q[..., :6].unflatten(-1, (3, 2)) if interleaved else q[..., :6].unflatten(-1, (2, 3)).mT).norm(dim=-1)
    torch.testing.assert_close(pairs, before, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rotary_parity(dtype):
    """The gradient too, which is a turn the other way."""
    cos, sin = F.rotary_angles(torch.arange(5), 6)

    def complex_product(x):
        turned = torch.view_as_complex(x[..., :6].unflatten(-1, (3, 2)).double().contiguous())
        y = torch.view_as_real(turned * torch.complex(cos.double(), sin.double())).flatten(-2)
        return torch.cat([y.to(x.dtype), x[..., 6:]], -1)

    def llamas(x):  # its expression, on pairs of neighbours
        c, s = (t.to(x.dtype).repeat_interleave(2, -1) for t in (cos, sin))
        crossed = torch.stack([-x[..., 1:6:2], x[..., 0:6:2]], -1).flatten(-2)
        return torch.cat([x[..., :6] * c + crossed * s, x[..., 6:]], -1)

    certificate = check(
        lambda x: F.rotary(x, cos, sin, interleaved=True), complex_product,
        lambda: [torch.randn(2, 3, 5, 7, requires_grad=True)], dtype=dtype, draws=3, baseline=llamas,
    )  # fmt: skip
    certificate.raise_if_failed()


LAYOUTS = {
    "heads inside positions": (lambda: torch.randn(2, 5, 3, 14).transpose(1, 2), (5, 7)),
    "every second element": (lambda: torch.randn(2, 3, 5, 30)[..., ::2], (5, 6)),
    "slices": (lambda: torch.randn(4, 6, 9, 20)[1:3, ::2, 2:7, 3:18], (2, 1, 5, 6)),
    "by head": (lambda: torch.randn(2, 3, 5, 15), (3, 5, 7)),
    "five dimensions": (lambda: torch.randn(2, 3, 4, 5, 15), (2, 1, 1, 5, 6)),
    "expanded": (lambda: torch.randn(1, 1, 5, 36).expand(2, 3, 5, 36), (5, 17)),
    "one row": (lambda: torch.randn(1, 15), (1, 2)),
    "nothing": (lambda: torch.randn(2, 0, 5, 4), (5, 2)),
}


def check_layout(layout, interleaved, column):
    """Whatever the strides, forward and backward; queries keep theirs, as attention reads them."""
    draw, angles = LAYOUTS[layout]
    x, cos, sin = draw(), torch.randn(angles), torch.randn(angles)
    leaf = x.detach().requires_grad_()
    with dlkern.trace() as calls:
        y = F.rotary(leaf, cos, sin, interleaved=interleaved)
    assert [call.backend for call in calls] == [column]
    expected = reference.rotary(x.double(), cos.double(), sin.double(), interleaved)
    torch.testing.assert_close(y, expected.float())
    if layout == "heads inside positions":
        assert y.stride() == x.stride()
    cotangent = torch.randn_like(y)
    turned_back = reference.rotary(cotangent.double(), cos.double(), sin.double(), interleaved, inverse=True)
    torch.testing.assert_close(torch.autograd.grad(y, leaf, cotangent)[0], turned_back.float())


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rotary_layouts(layout, interleaved):
    check_layout(layout, interleaved, "cpu")


@pytest.mark.parametrize("interleaved", [True, False])
def test_rotary_gradients(interleaved):
    """To second order, and of angles, which have no kernel."""
    x, cos, sin = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 3, 7), (3, 2), (3, 2)))
    call = lambda x: F.rotary(x, cos.detach(), sin.detach(), interleaved=interleaved)  # noqa: E731
    assert torch.autograd.gradcheck(call, x) and torch.autograd.gradgradcheck(call, x)
    with dlkern.trace() as calls:
        assert torch.autograd.gradcheck(lambda *t: F.rotary(*t, interleaved=interleaved), (x, cos, sin))
    assert {(call.backend, call.reason) for call in calls} == {("reference", "the angles require a gradient")}


def test_rotary_compiles_whole():
    torch._dynamo.reset()
    module = dlkern.nn.RotaryPositions(6)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    q, k = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8)
    for a, b in zip(compiled(q, k), module(q, k), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("x", "cos", "sin"),
    [
        ((2, 3, 4), (1, 1, 3, 2), (1, 1, 3, 2)), ((2, 2, 3, 4), (1, 1, 3, 2), (1, 1, 3, 1)),
        ((2, 2, 3, 4), (3, 1, 3, 2), (3, 1, 3, 2)), ((2, 2, 3, 4), (1, 1, 4, 2), (1, 1, 4, 2)),
        ((2, 2, 3, 4), (1, 1, 3, 3), (1, 1, 3, 3)), ((2, 2, 3, 4), (3, 2), (3, 2)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("column", ["cpu", "triton"])
def test_raw_op_refuses(x, cos, sin, column):
    if column == "triton":
        pytest.importorskip("triton")
    with pytest.raises(RuntimeError, match="rotary"):
        raw["rotary"][column](torch.randn(x), torch.randn(cos), torch.randn(sin), False, False)


@pytest.mark.parametrize("column", ["cpu", "triton"])
def test_raw_op_refuses_dtypes(column):
    if column == "triton":
        pytest.importorskip("triton")
    x, angles = torch.randn(1, 1, 3, 4), torch.randn(1, 1, 3, 2)
    for t in ((x, angles.double(), angles.double()), (x, angles, angles.double()), (x.int(), angles, angles)):
        with pytest.raises(RuntimeError, match="rotary"):
            raw["rotary"][column](*t, False, False)


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda: F.sinusoidal_positions(0, 4), ValueError),
        (lambda: F.rotary_angles(torch.arange(3), 5), ValueError),
        (lambda: dlkern.nn.RotaryPositions(3), ValueError),
        (lambda: F.rotary(torch.randn(3, 4), torch.randn(3, 3), torch.randn(3, 3)), RuntimeError),
        (lambda: F.rotary(torch.randn(2, 4), torch.randn(3, 2), torch.randn(3, 2)), RuntimeError),
        (lambda: F.rotary(torch.randn(2, 3, 4), torch.randn(3, 3, 2), torch.randn(3, 3, 2)), RuntimeError),
        (lambda: F.rotary(torch.randn(3, 4), torch.randn(1, 3, 2), torch.randn(1, 3, 2)), RuntimeError),
        (lambda: F.rotary(torch.randn(3, 4), torch.randn(3, 2), torch.randn(3, 2).double()), RuntimeError),
        (lambda: F.rotary(torch.ones(3, 4, dtype=torch.int64), torch.randn(3, 2), torch.randn(3, 2)), RuntimeError),
        (lambda: F.relative_position_buckets(3, 3, 2, 128), ValueError),
        (lambda: F.relative_position_buckets(3, 3, 32, 8), ValueError),
        (lambda: F.alibi_slopes(0), ValueError),
    ],
)
def test_wrong_calls(call, error):
    with pytest.raises(error):
        call()


def test_self_attention_without_positions_is_equivariant():
    """A permutation of the tokens permutes the outputs; with any kind of position it does not."""
    torch.manual_seed(0)
    attention = dlkern.nn.MultiheadAttention(8, 2, batch_first=True)
    x, order = torch.randn(2, 9, 8), torch.randperm(9)
    attend = lambda x: attention(x, x, x, need_weights=False)[0]  # noqa: E731
    torch.testing.assert_close(attend(x[:, order]), attend(x)[:, order])
    for positions in (dlkern.nn.SinusoidalPositions(8), dlkern.nn.LearnedPositions(9, 8)):
        moved, still = attend(positions(x[:, order])), attend(positions(x))[:, order]
        assert (moved - still).abs().max() > 1e-4


# --- turned as attention loads them -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", attention_cases.ROTARY)
def test_rotary_in_attention_parity(name, dtype):
    """Two heads of queries share one of keys; sizes are no multiples of a tile."""
    shapes = (2, 2, attention_cases.QUERIES, 12), (2, 1, attention_cases.KEYS, 12), (2, 1, attention_cases.KEYS, 20)
    ours, theirs, inputs = attention_cases.sides(*attention_cases.ROTARY[name], shapes)
    for draws in (4, 32):
        with dlkern.trace() as calls:
            certificate = check(ours, theirs, inputs, dtype=dtype, draws=draws, name=name)
        assert {(call.op, call.backend) for call in calls} == {("scaled_dot_product_attention", "cpu")}
        if certificate.ok:
            return
    certificate.raise_if_failed()


@pytest.mark.parametrize("interleaved", [True, False])
def test_rotary_in_attention_is_rotary_before_it(interleaved):
    """More keys than a tile has; tables of float32 for any operand, or of its dtype; any number of dimensions."""
    cos, sin = F.rotary_angles(torch.arange(300), 10)
    q, k, v = (torch.randn(2, 3, n, 16) for n in (200, 300, 300))

    def both(q, k, v, **options):
        state = torch.get_rng_state()
        fused = F.scaled_dot_product_attention(q, k, v, rotary=(cos, sin), rotary_interleaved=interleaved, **options)
        a, b = (F.rotary(x, cos[: x.shape[-2]], sin[: x.shape[-2]], interleaved=interleaved) for x in (q, k))
        torch.set_rng_state(state)
        torch.testing.assert_close(fused, F.scaled_dot_product_attention(a, b, v, **options))

    both(q, k, v, is_causal=True)
    both(q[0], k[0], v[0])
    both(q[:, 0], k[:, 0], v[:, 0], window=(30, 4))
    both(q.transpose(1, 2).contiguous().transpose(1, 2), k[..., :16], v, attn_mask=torch.rand(200, 300) > 0.3)
    both(q, k[:, :1], v[:, :1], enable_gqa=True, dropout_p=0.3)
    both(q.double(), k.double(), v.double())
    y = F.scaled_dot_product_attention(
        q.bfloat16(), k.bfloat16(), v.bfloat16(), rotary=(cos.bfloat16(), sin.bfloat16()), rotary_interleaved=interleaved
    )
    assert y.dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert F.scaled_dot_product_attention(q, k, v, rotary=(cos, sin)).dtype == torch.bfloat16


def test_rotary_in_attention_gradients():
    """To second order; and of the angles, which are turned before attention then."""
    shapes = (1, 2, 3, 6), (1, 1, 4, 6), (1, 1, 4, 3), (3, 4)
    q, k, v, mask = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes)
    angles = [t.double().requires_grad_() for t in F.rotary_angles(torch.arange(4), 4)]

    def call(q, k, v, mask, *angles):
        return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True, rotary=angles)

    fixed = [t.detach() for t in angles]
    assert torch.autograd.gradcheck(lambda *t: call(*t, *fixed), (q, k, v, mask))
    assert torch.autograd.gradgradcheck(lambda *t: call(*t, *fixed), (q, k, v, mask))
    with dlkern.trace() as calls:
        assert torch.autograd.gradcheck(call, (q, k, v, mask, *angles))
    reason = "the angles require a gradient"
    assert {(c.op, c.backend, c.reason) for c in calls} == {
        ("rotary", "reference", reason), ("scaled_dot_product_attention", "cpu", reason)
    }  # fmt: skip


def test_rotary_in_attention_compiles_whole():
    torch._dynamo.reset()
    angles = F.rotary_angles(torch.arange(9), 6)
    call = lambda *t: F.scaled_dot_product_attention(*t, is_causal=True, rotary=angles)  # noqa: E731
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    q, k, v = torch.randn(3, 2, 4, 9, 8).unbind()
    q.requires_grad_()
    y, expected = compiled(q, k, v), call(q, k, v)
    assert torch.equal(y, expected)
    assert torch.equal(torch.autograd.grad(y.sum(), q)[0], torch.autograd.grad(expected.sum(), q)[0])
    tensors = (q.detach(), k, k, None, None, None, None, *(t[None, None] for t in angles))
    torch.library.opcheck(
        raw["attention_rotary_forward"]["cpu"], (*tensors, 0.0, 0.3, 0.0, -1, 0, False),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip


@pytest.mark.parametrize(
    "angles",
    [
        (torch.ones(9, 2), torch.ones(9, 3)), (torch.ones(8, 2), torch.ones(8, 2)), (torch.ones(9, 5), torch.ones(9, 5)),
        (torch.ones(9, 0), torch.ones(9, 0)), (torch.ones(3, 1, 9, 2), torch.ones(3, 1, 9, 2)), (torch.ones(9), torch.ones(9)),
        (torch.ones(1, 2, 9, 2), torch.ones(1, 2, 9, 2)), (torch.ones(9, 2), torch.ones(9, 2).double()),
        (torch.ones(9, 2).long(), torch.ones(9, 2).long()),
    ],
)  # fmt: skip
def test_rotary_in_attention_refuses(angles):
    q, k = torch.randn(2, 2, 5, 8), torch.randn(2, 2, 9, 8)
    with pytest.raises(RuntimeError, match="rotary"):
        F.scaled_dot_product_attention(q, k, k, rotary=angles)
    with pytest.raises(RuntimeError, match="torch's arguments alone"):
        F.scaled_dot_product_attention(q.int(), k.int(), k.int(), dropout_p=0.5, rotary=angles)
    fours = [t if t.dim() == 4 else t[None, None] for t in angles]
    for column in ("cpu", "triton"):
        if column == "cpu" or importlib.util.find_spec("triton"):
            tensors = q, k, k, None, None, None, None, *(t if t.shape[-1] else torch.ones(2) for t in fours)
            with pytest.raises(RuntimeError, match="cos"):
                raw["attention_rotary_forward"][column](*tensors, 0.0, 0.3, 0.0, -1, -1, False)

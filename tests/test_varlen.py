"""Attention of sequences of different lengths without padding: varlen_attn and nested tensors."""

import itertools

import pytest
import torch
import torch.nn.functional as tF

import dlkern
import dlkern.nn.functional as F
from dlkern import ops
from dlkern.ops._registry import raw
from dlkern.reference import attention as reference
from dlkern.testing import check

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# heads, heads of keys, depth, depth of values, queries and keys of each sequence
CASES = {
    "one": (2, 2, 8, 8, [5], [7]),
    "several": (3, 3, 17, 5, [1, 50, 9], [3, 131, 9]),
    "shared heads": (4, 2, 16, 16, [7, 33, 4], [40, 2, 4]),
    "many short": (2, 1, 8, 8, [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5], [2, 7, 1, 8, 2, 8, 1, 8, 2, 8, 4]),
    "empty ones": (2, 2, 8, 4, [0, 3, 4, 0, 2], [5, 0, 6, 0, 2]),
}
WINDOWS = [(-1, -1), (-1, 0), (2, 0), (3, 5)]


def starts(counts):
    return torch.tensor([0, *itertools.accumulate(counts)])


def operands(name, dtype=torch.float64):
    heads, groups, depth, value_depth, queries, keys = CASES[name]
    shapes = (sum(queries), heads, depth), (sum(keys), groups, depth), (sum(keys), groups, value_depth)
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes], starts(queries), starts(keys)


def by_torch(q, k, v, of_queries, of_keys, window=(-1, -1)):
    """Sequence by sequence."""
    outputs = []
    for (a, b), (c, d) in zip(itertools.pairwise(of_queries.tolist()), itertools.pairwise(of_keys.tolist())):
        i, j = torch.arange(b - a)[:, None] + (d - c) - (b - a), torch.arange(d - c)
        seen = torch.ones(b - a, d - c, dtype=torch.bool)
        seen = seen & (j >= i - window[0]) if window[0] >= 0 else seen
        seen = seen & (j <= i + window[1]) if window[1] >= 0 else seen
        one = [x.transpose(0, 1)[None] for x in (q[a:b], k[c:d], v[c:d])]
        y = tF.scaled_dot_product_attention(*one, seen, enable_gqa=q.shape[1] != k.shape[1])
        outputs.append(torch.where(seen.any(1)[:, None, None], y[0].transpose(0, 1), 0.0))
    return torch.cat(outputs)


def check_parity(name, dtype, column):
    inputs, of_queries, of_keys = operands(name)
    window = WINDOWS[list(CASES).index(name) % len(WINDOWS)]

    def ours(q, k, v):
        return F.varlen_attn(q, k, v, of_queries, of_keys, window_size=window, enable_gqa=True)

    def theirs(q, k, v):
        return by_torch(q, k, v, of_queries, of_keys, window)

    for draws in (4, 32):
        with dlkern.trace() as calls:
            certificate = check(ours, theirs, inputs, dtype=dtype, draws=draws)
        assert {call.backend for call in calls} == {column}
        if certificate.ok:
            return
    certificate.raise_if_failed()


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda t: str(t).removeprefix("torch."))
@pytest.mark.parametrize("name", CASES)
def test_parity(name, dtype):
    check_parity(name, dtype, "cpu")


def check_windows(name, window, column):
    """Forward and backward against torch and the reference."""
    inputs, of_queries, of_keys = operands(name)
    with dlkern.trace() as calls:
        y = F.varlen_attn(*inputs, of_queries, of_keys, window_size=window, enable_gqa=True)
    assert {call.backend for call in calls} == {column}
    theirs = by_torch(*inputs, of_queries, of_keys, window)
    torch.testing.assert_close(y, theirs)
    g = torch.randn_like(y)
    for a, b in zip(torch.autograd.grad(y, inputs, g), torch.autograd.grad(theirs, inputs, g)):
        torch.testing.assert_close(a, b)


def check_options(column, dtype=torch.float64):
    """Dropout, each sequence's that of a call of its own with seed + b, and soft-capped scores."""
    inputs, of_queries, of_keys = operands("several", dtype)
    seed = torch.tensor([2**40 + 7])
    settings = 0.3, 0.5, 2.0, -1, 4
    arguments = of_queries, of_keys, seed, *settings
    y, expected = (f(*inputs, *arguments) for f in (ops.attention_varlen.attention_varlen, reference.attention_varlen))
    torch.testing.assert_close(y, expected)
    g = torch.randn_like(y)
    for a, b in zip(torch.autograd.grad(y, inputs, g), torch.autograd.grad(expected, inputs, g)):
        torch.testing.assert_close(a, b)
    tensors = *(x.detach() for x in inputs), of_queries, of_keys, seed
    forward, backward = (raw[f"attention_varlen_{way}"][column] for way in ("forward", "backward"))
    for op, call in (
        (forward, (*tensors, *settings)), (backward, (g, *tensors, *forward(*tensors, *settings), *settings))
    ):  # fmt: skip
        torch.library.opcheck(op, call, test_utils=("test_schema", "test_faketensor"))
    a, b = of_queries[1:3]
    c, d = of_keys[1:3]
    q, k, v = (x.transpose(0, 1)[None] for x in (inputs[0][a:b], inputs[1][c:d], inputs[2][c:d]))
    alone = ops.attention.attention(
        "dot_attention", q, k, v, None, None, None, None, seed + 1,
        ops.attention.Settings(0.3, 0.5, 2.0, -1, 4 + int(d - c - b + a)),
    )  # fmt: skip
    torch.testing.assert_close(y[a:b], alone[0].transpose(0, 1))


def test_options():
    check_options("cpu")


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_windows_and_the_reference(name, window):
    check_windows(name, window, "cpu")
    with dlkern.backend("reference"):
        check_windows(name, window, "reference")


def test_derivatives():
    inputs, of_queries, of_keys = operands("empty ones")

    def run(*x):
        return F.varlen_attn(*x, of_queries, of_keys, window_size=(-1, 0))

    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


def test_what_it_promises():
    inputs, of_queries, of_keys = operands("several", torch.float32)
    once = F.varlen_attn(*inputs, of_queries, of_keys)
    assert torch.equal(once, F.varlen_attn(*inputs, of_queries.int(), of_keys.int(), 50, 131))  # int32, torch's arguments
    turned = [x.detach().transpose(0, 1).contiguous().transpose(0, 1) for x in inputs]
    assert torch.equal(once, F.varlen_attn(*turned, of_queries, of_keys))  # any strides
    same = F.varlen_attn(inputs[0], inputs[0], inputs[0], of_queries)
    assert torch.equal(same, F.varlen_attn(inputs[0], inputs[0], inputs[0], of_queries, of_queries))
    compiled = torch.compile(lambda *x: F.varlen_attn(*x, of_queries, of_keys), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*inputs), once)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert F.varlen_attn(*inputs, of_queries, of_keys).dtype == torch.bfloat16
    threads = torch.get_num_threads()
    gradients = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            y = F.varlen_attn(*inputs, of_queries, of_keys)
            gradients.append((y, *torch.autograd.grad(y.square().sum(), inputs)))
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, *gradients))


def test_wrong_arguments():
    (q, k, v), of_queries, of_keys = operands("several", torch.float32)
    wrong = {
        "rise": (q, k, v, torch.tensor([0, 9, 1, 60]), of_keys), "rise from 0": (q, k, v, of_queries, of_keys[1:]),
        "different sequences": (q, k, v, torch.tensor([0, 60]), of_keys),
        "int32 or int64": (q, k, v, of_queries.float(), of_keys),
        "dtype": (q, k.double(), v, of_queries, of_keys), "sizes": (q, k[..., :3], v, of_queries, of_keys),
        "heads, depth": (q[None], k, v, of_queries, of_keys), "heads of queries": (q[:, :2], k, v, of_queries, of_keys),
        "not floating": (q.int(), k.int(), v.int(), of_queries, of_keys),
    }  # fmt: skip
    for message, arguments in wrong.items():
        with pytest.raises(RuntimeError, match=message):
            F.varlen_attn(*arguments)
    check_wrong_raw_calls("cpu")


def check_wrong_raw_calls(column):
    (q, k, v), a, b = operands("several", torch.float32)
    forward, backward = (raw[f"attention_varlen_{way}"][column] for way in ("forward", "backward"))
    settings = 0.0, 1.0, 0.0, -1, -1
    y, kept = forward(q, k, v, a, b, None, *settings)
    for arguments in (
        (y[1:], q, k, v, a, b, None, y, kept), (y, q, k, v, a, b, None, y, kept[:, 1:]),
        (y, q, k, v, a[:-1], b, None, y, kept), (y.double(), q, k, v, a, b, None, y, kept),
    ):  # fmt: skip
        with pytest.raises(RuntimeError):
            backward(*arguments, *settings)
    with pytest.raises(RuntimeError, match="seed"):
        forward(q, k, v, a, b, None, 0.5, *settings[1:])
    for wrong in ((0.0, 1.0, 0.0, -2, -1), (1.5, 1.0, 0.0, -1, -1), (0.0, 1.0, -1.0, -1, -1)):
        with pytest.raises(ValueError):
            backward(y, q, k, v, a, b, torch.tensor([1]), y, kept, *wrong)


@pytest.mark.parametrize("causal", [False, True])
def test_nested_tensors(causal):
    pieces = [torch.randn(n, 2, 8, dtype=torch.float64) for n in (3, 70, 1)]
    nested = torch.nested.nested_tensor(pieces, layout=torch.jagged).requires_grad_()
    x = nested.transpose(1, 2)
    with dlkern.trace() as calls:
        y = F.scaled_dot_product_attention(x, x * 2, x + 1, is_causal=causal)
    assert [call.backend for call in calls] == ["cpu"] and y.is_nested and y.shape == x.shape
    y.values().square().sum().backward()
    leaves = [piece.clone().requires_grad_() for piece in pieces]
    for found, leaf in zip(y.transpose(1, 2).unbind(), leaves):
        one = leaf.transpose(0, 1)[None]
        theirs = tF.scaled_dot_product_attention(one, one * 2, one + 1, is_causal=causal)[0].transpose(0, 1)
        torch.testing.assert_close(found, theirs)
        theirs.square().sum().backward()
    for found, leaf in zip(nested.grad.unbind(), leaves):
        torch.testing.assert_close(found, leaf.grad)


def test_nested_tensors_with_options():
    """Dropout under torch's seed, windows and soft caps; what torch has none of is refused where we have none either."""
    pieces = [torch.randn(n, 2, 8) for n in (3, 70, 1)]
    x = torch.nested.nested_tensor(pieces, layout=torch.jagged).transpose(1, 2)

    def run(**options):
        with dlkern.trace() as calls:
            y = F.scaled_dot_product_attention(x, x, x, **options)
        assert [call.backend for call in calls] == ["cpu"]
        return y.transpose(1, 2).values()  # [tokens, heads, depth]

    torch.manual_seed(3)
    once, other = run(dropout_p=0.5), run(dropout_p=0.5)
    torch.manual_seed(3)
    assert torch.equal(once, run(dropout_p=0.5)) and not torch.equal(once, other)
    assert run(dropout_p=1.0).abs().max() == 0
    many = torch.stack([run(dropout_p=0.3) for _ in range(400)])
    deviation = (many.mean(0) - run()) / (many.std(0) / 20 + 1e-6)  # means of 400, in standard errors
    assert deviation.abs().max() < 6
    for options in (dict(window=(2, 0)), dict(softcap=0.7), dict(window=(5, 1), softcap=2.0, is_causal=True)):
        y = run(**options)
        alone = [F.scaled_dot_product_attention(*[p.transpose(0, 1)[None]] * 3, **options)[0] for p in pieces]
        torch.testing.assert_close(y, torch.cat(alone, 1).transpose(0, 1))
    for options in (dict(alibi_slopes=torch.ones(2)), dict(lengths=torch.tensor([1, 2, 1]))):
        with pytest.raises(RuntimeError, match="torch's arguments alone"):
            F.scaled_dot_product_attention(x, x, x, **options)
    with pytest.raises(RuntimeError, match="between 0 and 1"):
        F.scaled_dot_product_attention(x, x, x, dropout_p=1.5)

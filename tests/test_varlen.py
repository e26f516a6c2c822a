"""Attention of sequences of different lengths without padding: varlen_attn and nested tensors."""

import itertools

import pytest
import torch
import torch.nn.functional as tF

import dlkern
import dlkern.nn.functional as F
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


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda t: str(t).removeprefix("torch."))
@pytest.mark.parametrize("name", CASES)
def test_parity(name, dtype):
    inputs, of_queries, of_keys = operands(name)
    window = WINDOWS[list(CASES).index(name) % len(WINDOWS)]

    def ours(q, k, v):
        return F.varlen_attn(q, k, v, of_queries, of_keys, window_size=window, enable_gqa=True)

    def theirs(q, k, v):
        return by_torch(q, k, v, of_queries, of_keys, window)

    for draws in (4, 32):
        with dlkern.trace() as calls:
            certificate = check(ours, theirs, inputs, dtype=dtype, draws=draws)
        assert {call.backend for call in calls} == {"cpu"}
        if certificate.ok:
            return
    certificate.raise_if_failed()


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_windows_and_the_reference(name, window):
    inputs, of_queries, of_keys = operands(name)

    def run():
        return F.varlen_attn(*inputs, of_queries, of_keys, window_size=window, enable_gqa=True)

    y = run()
    with dlkern.backend("reference"):
        torch.testing.assert_close(y, run())
    torch.testing.assert_close(y, by_torch(*inputs, of_queries, of_keys, window))


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
    torch.library.opcheck(
        torch.ops.dlkern.attention_varlen_forward_cpu.default, (*inputs, of_queries, of_keys, 0.5, -1, 0),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip
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
    raw = torch.ops.dlkern.attention_varlen_backward_cpu
    y, statistics = torch.ops.dlkern.attention_varlen_forward_cpu(q, k, v, of_queries, of_keys, 1.0, -1, -1)
    for arguments in (
        (y[1:], q, k, v, of_queries, of_keys, y, statistics), (y, q, k, v, of_queries, of_keys, y, statistics[:, 1:]),
        (y, q, k, v, of_queries[:-1], of_keys, y, statistics), (y.double(), q, k, v, of_queries, of_keys, y, statistics),
    ):  # fmt: skip
        with pytest.raises(RuntimeError):
            raw(*arguments, 1.0, -1, -1)
    with pytest.raises(ValueError, match="window"):
        raw(y, q, k, v, of_queries, of_keys, y, statistics, 1.0, -2, -1)


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

"""Recurrent layers in sizes that AMX's tiles take (the rule is test_rnn.py's), and values that tiles can't be trusted with,
beside the same library without them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_rnn import KINDS, assert_by_the_rule, assert_threads_change_no_bit, each_kind, make, results
from torch.nn.utils.rnn import pack_padded_sequence

import dlkern

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@each_dtype
@each_kind
def test_rule(kind, dtype):
    assert_by_the_rule(lambda: (make(kind, 20, 75), torch.randn(4, 69, 20), None), dtype, draws=2)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@each_kind
def test_rule_both_ways_packed(kind, dtype):
    lengths = [*range(9, 0, -1), *[1] * 11]  # rows go from 20 to 1

    def draw():
        packed = pack_padded_sequence(torch.randn(9, 20, 30), lengths)
        return make(kind, 30, 96, bidirectional=True), packed, None

    assert_by_the_rule(draw, dtype, draws=2)


@each_dtype
def test_rule_of_projections(dtype):
    assert_by_the_rule(lambda: (make("lstm", 20, 100, proj_size=40), torch.randn(4, 35, 20), None), dtype, draws=2)


@each_dtype
@each_kind
def test_one_thread_gives_the_same_bits(kind, dtype):
    assert_threads_change_no_bit(dlkern.convert(make(kind, 40, 80)), dtype)
    threads, found = torch.get_num_threads(), []
    x = torch.randn(3, 70, 40)
    x[:, ::7] *= 1e-30  # rows whose states stay tiny
    module = dlkern.convert(make(kind, 40, 80, bias=False))
    for count in (1, 3):
        torch.set_num_threads(count)
        try:
            found.append(results(module, x, None, dtype))
        finally:
            torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def special(kind, dtype):
    """Results of a layer some of whose sequences are zero, tiny, huge, infinite or not a number."""
    torch.manual_seed(3)
    module = dlkern.convert(make(kind, 8, 70, bias=False))
    x, h = torch.randn(3, 40, 8), torch.randn(1, 40, 70)
    for value, row in ((0.0, 1), (1e-36, 2), (1e30 if dtype != torch.float16 else 6e4, 33)):
        x[:, row] *= value
        h[:, row] *= value
    h[0, 3, 5], h[0, 34, 6], x[1, 4, 2] = float("inf"), float("nan"), float("inf")
    return results(module, x, (h, torch.randn(1, 40, 70)) if kind == "lstm" else h, dtype)


if __name__ == "__main__":
    torch.save({(kind, dtype): special(kind, dtype) for kind in KINDS for dtype in DTYPES}, sys.argv[1])
    sys.exit()


def test_special_values(tmp_path):
    path = tmp_path / "without"
    environment = os.environ | {"DLKERN_CPU_ISA": "avx512", "PYTHONPATH": str(Path(__file__).parents[1])}
    subprocess.run([sys.executable, __file__, path], check=True, env=environment)
    for (kind, dtype), without in torch.load(path).items():
        u, ours = torch.finfo(dtype).eps, special(kind, dtype)
        some = 2 if kind == "rnn_relu" else None  # a rounding near zero changes the derivative
        for mine, theirs in zip(ours[:some], without[:some], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=16 * u, atol=16 * u, equal_nan=True)
        tiny = without[0][:, 2]  # parts of it are too small for tiles
        assert dtype == torch.float16 or kind == "lstm" or 0 < tiny.abs().max() < 1e-35
        torch.testing.assert_close(ours[0][:, 2], tiny, rtol=0, atol=16 * u * tiny.abs().max().item())

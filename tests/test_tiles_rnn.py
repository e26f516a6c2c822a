"""Recurrent layers in sizes that AMX's tiles take (the rule is test_rnn.py's), and values that tiles can't be trusted with,
beside the same library without them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_rnn import (
    KINDS,
    OPTIONS,
    Seeded,
    assert_by_the_rule,
    assert_threads_change_no_bit,
    each_kind,
    each_option,
    looped,
    make,
    moved,
    ours,
    results,
)
from threads import on_threads
from torch.nn.utils.rnn import pack_padded_sequence

import dlkern
from dlkern.testing import compare

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
@each_option
def test_rule_of_options(kind, options, dtype):
    assert_by_the_rule(lambda: (ours(kind, 20, 75, **options), torch.randn(4, 69, 20), None), dtype, 2, looped)


@each_dtype
def test_rule_of_options_with_projections(dtype):
    options = {**OPTIONS["all"], "proj_size": 40, "bidirectional": True}
    assert_by_the_rule(lambda: (ours("lstm", 20, 100, **options), torch.randn(4, 35, 20), None), dtype, 2, looped)


@each_dtype
@each_kind
def test_one_thread_gives_the_same_bits_with_options(kind, dtype):
    options = {"layer_norm": True, "zoneout": 0.2, "recurrent_dropout": 0.3}
    assert_threads_change_no_bit(Seeded(ours(kind, 40, 80, **options)), dtype)


@each_dtype
@each_kind
def test_one_thread_gives_the_same_bits(kind, dtype):
    assert_threads_change_no_bit(dlkern.convert(make(kind, 40, 80)), dtype)
    x = torch.randn(3, 70, 40)
    x[:, ::7] *= 1e-30  # rows whose states stay tiny
    module = dlkern.convert(make(kind, 40, 80, bias=False))
    found = on_threads((1, 3), lambda: results(module, x, None, dtype))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


ZERO, TINY, HUGE = 1, 2, 33
BAD = [3, 4, HUGE, 34]  # sequences with values that are infinite, not a number or huge


def special(kind, dtype):
    """A layer, and an input and a state some of whose sequences are zero, tiny, huge, infinite or not a number."""
    torch.manual_seed(3)
    module = make(kind, 8, 70, bias=False)
    x, h = torch.randn(3, 40, 8), torch.randn(1, 40, 70)
    for value, row in ((0.0, ZERO), (1e-36, TINY), (1e30 if dtype != torch.float16 else 6e4, HUGE)):
        x[:, row] *= value
        h[:, row] *= value
    h[0, 3, 5], h[0, 34, 6], x[1, 4, 2] = float("inf"), float("nan"), float("inf")
    return module, x, (h, torch.randn(1, 40, 70)) if kind == "lstm" else h


def special_results(kind, dtype):
    module, x, hx = special(kind, dtype)
    return results(dlkern.convert(module), x, hx, dtype)


if __name__ == "__main__":
    torch.save({(kind, dtype): special_results(kind, dtype) for kind in KINDS for dtype in DTYPES}, sys.argv[1])
    sys.exit()


def test_special_values(tmp_path):
    path = tmp_path / "without"
    environment = os.environ | {"DLKERN_CPU_ISA": "avx512", "PYTHONPATH": str(Path(__file__).parents[1])}
    subprocess.run([sys.executable, __file__, path], check=True, env=environment)
    ordinary = [row for row in range(40) if row not in BAD]
    for (kind, dtype), without in torch.load(path).items():
        ours = special_results(kind, dtype)
        some = 2 if kind == "rnn_relu" else None  # a rounding near zero changes the derivative
        for mine, other in zip(ours[:some], without[:some], strict=True):
            not_numbers = [t.where(~t.isfinite(), torch.zeros_like(t)) for t in (mine, other)]
            torch.testing.assert_close(*not_numbers, rtol=0, atol=0, equal_nan=True)
        tiny = ours[0][:, TINY]  # parts of it are too small for tiles
        assert dtype == torch.float16 or kind == "lstm" or 0 < tiny.abs().max() < 1e-35
        module, x, hx = special(kind, dtype)
        theirs = results(module.to(dtype), x, hx, dtype)
        exact = results(module, moved(x, dtype), moved(hx, dtype), torch.float64)
        of_sequences = [i for i, tensor in enumerate(ours) if tensor.dim() == 3]  # the rest sums over all of them
        for rows in (ordinary, [TINY], [HUGE]):
            for i in of_sequences[: 2 if rows == [HUGE] else some]:  # gradients behind saturated gates are below 1e-37
                mine, vectors, other, correct = (t[:, rows] for t in (ours[i], without[i], theirs[i], exact[i]))
                other = other.where(other.isfinite(), vectors)  # torch's bfloat16 gives NaN in tiny rows
                found = compare(f"{kind} {dtype} result {i}", [mine], [other], [correct], dtype)
                assert (found or rows == [HUGE]) and all(row.ok for row in found), found  # huge ones may all overflow

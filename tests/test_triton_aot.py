"""Triton kernels compiled ahead of time for five GPUs that are not here, held to committed budgets (triton_aot.py)."""

import functools
import json

import pytest

triton = pytest.importorskip("triton")

import triton_aot as aot  # noqa: E402
from sources import skip_if_unchanged  # noqa: E402

ALWAYS = ("dropout", "positions")  # quick to compile

EACH = [(family, target) for family in aot.CALLS for target in aot.TARGETS]
PRODUCTS = ("matmul_kernel", "conv2d_", "attention_")
RECURRENT = ("rnn_forward", "rnn_backward", "rnn_product", "rnn_project", "rnn_state_backward")
# Launches whose operands cannot be copied asynchronously: the stem's three channels are no aligned 4 bytes.
# Additive scores are read one column at a time. On sm_100 keys shared by heads leave no registers to copies ahead; on sm_80
# operands with rotary positions leave no shared memory.
SYNCHRONOUS = {
    "conv2d_forward_kernel 1", "attention_forward_kernel 4", "sm_100 attention_backward_key_kernel 1",
    "sm_80 attention_forward_kernel 5", "sm_80 attention_backward_query_kernel 3", "sm_80 attention_backward_key_kernel 3",
}
# Launches in float32, where torch's default allows no TF32: no tensor cores on NVIDIA. (It does for convolutions.)
SINGLE = {"matmul_kernel 3", "attention_forward_kernel 3", "attention_forward_kernel 4"}


@functools.cache
def measured(family, target):
    return aot.measure(family, target)


@pytest.fixture(scope="module")
def budgets():
    if not aot.BUDGETS.exists():
        pytest.skip(f"no budgets for Triton {triton.__version__}: python tests/triton_aot.py writes them")
    return {family: json.loads((aot.BUDGETS / f"{family}.json").read_text()) for family in aot.CALLS}


@pytest.mark.slow
@pytest.mark.parametrize(("family", "target"), EACH, ids=[f"{f}-{t}" for f, t in EACH])
def test_within_budget(family, target, budgets):
    recorded, now = budgets[family]["sources"], aot.sources(family)
    skip_if_unchanged(recorded, now, family in ALWAYS)
    rows, allowed = measured(family, target), budgets[family][target]
    assert recorded != now or rows == allowed, "the same sources, and other machine code than was written down"
    assert rows.keys() == allowed.keys()
    over = [
        f"{name}: {what} {row[what]} over {allowed[name][what]}"
        for name, row in rows.items() for what in ("registers", "shared", "stack", "local", "spills")
        if row[what] > allowed[name][what]
    ]
    lost = [
        f"{name}: {row['instructions'].get(instruction, 0)} {instruction}, was {count}"
        for name, row in rows.items() for instruction, count in allowed[name]["instructions"].items()
        if row["instructions"].get(instruction, 0) < count
    ]
    assert not over + lost, "\n".join(over + lost)


@pytest.mark.parametrize(("family", "target"), EACH, ids=[f"{f}-{t}" for f, t in EACH])
def test_budgets_hold_no_spill_and_keep_the_tensor_cores(family, target, budgets):
    """The budgets themselves: writing them again must not make a spill or a lost instruction the norm."""
    for name, row in budgets[family][target].items():
        assert row["stack"] == row["local"] == row["spills"] == 0, (name, row)
        assert row["registers"] <= (512 if target == "gfx942" else 255)
        if name.startswith(RECURRENT) and target != "sm_75":  # few rows: the instruction for the smallest tile will do
            assert row["instructions"].keys() & set(aot.MATRIX.values()), (name, row)
        if not name.startswith(PRODUCTS):
            continue
        instruction = aot.MATRIX[target]
        if instruction and (name not in SINGLE or target == "gfx942"):
            assert row["instructions"].get(instruction, 0) > 0, (name, row)
        copy = aot.PIPELINED.get(target)
        if copy and not {name, f"{target} {name}"} & SYNCHRONOUS:
            assert row["instructions"].get(copy, 0) > 0, (name, row)


def test_a_spill_and_a_lost_instruction_are_seen(monkeypatch, budgets):
    """The measurement can fail: a tile far too large spills, and float64 has no 16-bit tensor-core instruction."""
    huge = {"BLOCK_M": 256, "BLOCK_N": 256, "BLOCK_K": 32, "GROUP_M": 8, "num_warps": 4, "num_stages": 2}
    monkeypatch.setattr(aot.configs, "matmul", lambda *arguments: huge)
    with aot.compiling(aot.TARGETS["sm_80"]) as compiled:
        x = aot._empty(1024, 1024, dtype=aot.torch.bfloat16)
        aot.linear.linear_backward_input(x, x)
    row = aot.usage(compiled[0][1])
    assert row["spills"] > 0 and row["stack"] > 0
    monkeypatch.undo()
    with aot.compiling(aot.TARGETS["sm_80"]) as compiled:
        x = aot._empty(1024, 1024, dtype=aot.torch.float64)
        aot.linear.linear_backward_input(x, x)
    assert "HMMA" not in aot.usage(compiled[0][1])["instructions"]

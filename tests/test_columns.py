"""What columns declare is what the README says, and measured orders are followed."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch

import dlkern
from dlkern import columns, tuning

ROOT = Path(__file__).resolve().parent.parent
SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float64": "fp64"}


def readme_rows() -> dict[str, dict[str, str]]:
    """Op -> column -> dtypes, from the README's table."""
    table = (ROOT / "README.md").read_text().split("## What is there")[1].split("\n\n")[1].strip().splitlines()
    _, _, *names = [cell.strip() for cell in table[0].strip("|").split("|")]
    found = {}
    for line in table[2:]:
        _, what, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        for op in re.findall(r"`(\w+)`", what):
            found[op] = dict(zip(names, cells, strict=True))
    return found


def test_readme_table_is_what_is_declared():
    declared, rows = columns.declared(), readme_rows()
    for op in sorted({op for op, _ in declared}):
        assert op in rows, f"README's table lacks {op}"
        for column in ("cpu", "triton", "cuda"):
            names = [str(dtype).removeprefix("torch.") for dtype in declared.get((op, column), ())]
            wanted = {SHORT[name] for name in names}
            said = {part for part in re.split(r",\s*", rows[op][column]) if part != "–"}
            assert said == wanted, f"{op}, {column}: README says {sorted(said)}, declared is {sorted(wanted)}"
    functions = {op for op in rows if op in dir(dlkern.nn.functional)}
    assert functions <= {op for op, _ in declared}, functions


@pytest.fixture
def on_a_gpu(monkeypatch, tmp_path):
    """columns as on a GPU called "NVIDIA Test200 SXM", with the table that is written to the path."""
    load, path = tuning.load, tmp_path / "test200.json"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA Test200 SXM")
    monkeypatch.setattr(tuning, "load", lambda name: load(name, tmp_path))
    monkeypatch.setattr(columns, "_tuned", None)
    return path


def test_measured_order_is_followed(on_a_gpu):
    orders = {"conv2d|bfloat16": ["triton"], "conv2d|bfloat16|grouped": ["cuda", "triton"], "linear|float32": ["rocket"]}
    on_a_gpu.write_text(json.dumps({"orders": orders}))
    bf16 = torch.bfloat16
    assert columns.order("conv2d", "cuda", bf16) == ("triton", "cuda")
    assert columns.order("conv2d", "cuda", bf16, ("grouped",)) == ("cuda", "triton")
    assert columns.order("conv2d", "cuda", torch.float32) == ("cuda", "triton")  # not measured
    assert columns.order("linear", "cuda", torch.float32) == ("cuda", "triton")  # a column there is not
    assert columns.order("max_pool2d", "cuda", bf16, ("grouped",)) == ("cuda", "triton")
    assert columns.order("conv2d", "cpu", bf16) == ("cpu",)


def test_no_table_means_the_default_order(on_a_gpu):
    assert columns.order("linear", "cuda", torch.bfloat16) == ("cuda", "triton")


def test_a_table_that_holds_no_orders_raises(on_a_gpu):
    on_a_gpu.write_text("{}")
    with pytest.raises(ValueError, match="test200"):
        columns.order("linear", "cuda", torch.bfloat16)


def test_shipped_tables_name_what_exists():
    for path in (ROOT / "dlkern" / "tuning").glob("*.json"):
        ops = {op for op, _ in columns.declared()}
        for key, order in json.loads(path.read_text())["orders"].items():
            assert key.split("|")[0] in ops and hasattr(torch, key.split("|")[1]), (path, key)
            assert set(order) <= set(columns.COLUMNS), (path, key)


def test_tune_orders_columns_by_their_times():
    spec = importlib.util.spec_from_file_location("gpu_script", ROOT / "bench" / "gpu.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    measured = {
        "linear|8x512->512|bfloat16|contiguous|forward": {"ms": {"cuda": 1.0, "triton": 3.0}},
        "linear|64x512->512|bfloat16|contiguous|forward": {"ms": {"cuda": 2.0, "triton": 1.0}},
        "conv2d|1x8x9x9->8 g8|bfloat16|contiguous|forward": {"ms": {"cuda": 2.0, "triton": 1.0}},
        "batch_norm_add_relu|1x8x9x9|float32|contiguous|forward": {"ms": {"triton": 1.0}},
    }
    assert script.orders_of(measured) == {
        "linear|bfloat16": ["cuda", "triton"], "conv2d|bfloat16|grouped": ["triton", "cuda"],
    }

"""The benchmark harness: its arithmetic, that it shows no speed-up for a wrong answer, its tables and files."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dlkern
from dlkern.bench import cases, harness, machine, report, runner, shapes, targets, timing, work
from dlkern.bench.shapes import Shape

ROOT = Path(__file__).resolve().parent.parent
CONV = Shape(
    "conv2d",
    batch=2,
    channels=4,
    height=7,
    width=9,
    out_channels=6,
    kernel=(3, 2),
    stride=(2, 1),
    padding=(1, 1),
    dilation=(1, 2),
    groups=2,
)


def plan(**settings) -> harness.Plan:
    floors = machine.Floors("cpu", quick=True)
    floors._bandwidths, floors._peaks = [(1, 1e10)], {torch.float32: (1e11, "given")}
    return harness.Plan(**({"seconds": 0.01, "minimum": 3, "maximum": 5, "floors": floors} | settings))


# --- work and floors


@pytest.mark.parametrize(
    "shape", [CONV, Shape("conv2d", channels=3, height=5, width=5, out_channels=2, kernel=(5, 5), padding=(2, 2))]
)
def test_flops_are_the_multiply_adds_that_touch_the_image(shape):
    ones = torch.ones(shape.batch, shape.channels, shape.height, shape.width)
    weight = torch.ones(shape.out_channels, shape.channels // shape.groups, *shape.kernel)
    output = torch.nn.functional.conv2d(ones, weight, None, shape.stride, shape.padding, shape.dilation, shape.groups)
    assert output.shape[2:] == (shape.out_height, shape.out_width)
    assert output.numel() == shape.output_numel
    assert work.count(shape, 4, "forward").flops == 2 * int(output.sum())


def test_bytes_and_training():
    x, w, y = CONV.input_numel, CONV.weight_numel, CONV.output_numel
    forward, training = work.count(CONV, 2, "forward"), work.count(CONV, 2, "training")
    assert forward.bytes == 2 * (x + w + y)
    assert training.flops == 3 * forward.flops
    assert training.bytes == 2 * ((x + w + y) + (y + 2 * x + 2 * w))
    first = Shape(**{**CONV.__dict__, "input_grad": False})
    assert work.count(first, 2, "training").flops == 2 * forward.flops

    bn = Shape("batch_norm", batch=2, channels=8, height=4, width=4)
    size = 4 * bn.input_numel
    assert work.count(bn, 4, "forward") == work.Work(0, 3 * size, "forward 3S")
    assert work.count(bn, 4, "forward", cache=size).note == "forward 2S"
    assert work.count(bn, 4, "training").bytes == 8 * size
    pool = Shape("max_pool2d", channels=4, height=8, width=8, kernel=(2, 2), stride=(2, 2))
    assert work.count(pool, 4, "training").bytes == 2 * 4 * (256 + 64) + 2 * 64
    assert work.count(Shape("linear", batch=3, channels=5, out_channels=7), 4, "forward").flops == 2 * 3 * 5 * 7
    gru = Shape("gru", batch=3, channels=5, out_channels=7, steps=11)
    assert work.count(gru, 4, "forward").flops == 11 * 2 * 3 * 3 * 7 * (5 + 7)
    attention = Shape("attention_causal", batch=3, heads=2, steps=5, channels=7)
    assert work.count(attention, 4, "forward").flops == 3 * 2 * 15 * 2 * (2 * 7)


def test_floor_is_the_larger_of_the_two():
    floors = machine.Floors("cpu")
    floors._bandwidths, floors._peaks = [(1 << 10, 4e9), (1 << 20, 2e9)], {torch.float32: (1e9, "given")}
    assert floors.floor_ms(0, 2_000_000, torch.float32) == (1.0, "memory")
    assert floors.floor_ms(5_000_000, 2_000_000, torch.float32) == (5.0, "compute")
    assert floors.bandwidth(1) == 4e9
    assert floors.bandwidth(1 << 15) == pytest.approx(3e9)
    assert floors.bandwidth(1 << 30) == 2e9


@pytest.mark.skipif(not dlkern._native.library_loaded(), reason="no native library")
def test_peak_op():
    for dtype in (torch.float32, torch.float64):
        like = torch.empty(0, dtype=dtype)
        flops, sums = torch.ops.dlkern.peak_fma_cpu(like, 1000)
        twice, _ = torch.ops.dlkern.peak_fma_cpu(like, 2000)
        assert flops.item() > 0 and twice.item() == 2 * flops.item()
        assert torch.isfinite(sums).all() and (sums != 0).sum() == torch.get_num_threads()
    for wrong in ((torch.empty(0), 0), (torch.empty(0), -5), (torch.empty(0, dtype=torch.int64), 10)):
        with pytest.raises((RuntimeError, ValueError), match="peak_fma"):
            torch.ops.dlkern.peak_fma_cpu(*wrong)


# --- statistics


def test_percentiles_and_ratio():
    assert timing.percentile([4.0, 1.0, 2.0, 3.0, 5.0], 0.5) == 3.0
    assert timing.percentile([1.0, 2.0], 0.2) == pytest.approx(1.2)
    with pytest.raises(ValueError):
        timing.percentile([], 0.5)
    # A slow stretch of the machine hits both sides of a pair: the ratio does not move.
    theirs, ours = timing.Samples([2.0, 2.0, 20.0, 2.0]), timing.Samples([1.0, 1.0, 10.0, 1.0])
    assert timing.ratio(theirs, ours) == timing.Ratio(2.0, 2.0, 2.0)
    with pytest.raises(ValueError, match="interleaved"):
        timing.ratio(theirs, timing.Samples([1.0]))


def test_interleaving():
    order = []
    found = timing.interleave(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")},
        seconds=0.0,
        minimum=4,
        maximum=9,
        between=lambda: order.append("-"),
    )
    assert "".join(order[-16:]) == "-a-b" * 4
    assert len(found["a"].ms) == len(found["b"].ms) == 4


def test_geometric_mean_and_targets():
    assert targets.geometric_mean([1.0, 4.0]) == pytest.approx(2.0)
    with pytest.raises(ValueError):
        targets.geometric_mean([])
    assert targets.target("cpu", "conv 1x1", "training", "channels_last") == 1.25
    assert targets.target("cpu", "conv dense", "forward", "contiguous") == 1.0
    assert targets.target("cpu", "loss", "forward", "") is None
    rows = [
        harness.Row("conv2d", "s", "float32", "contiguous", "forward", "cpu", group="conv dense", ratio=r)
        for r in (1.0, 4.0, None)
    ]
    (summary,) = targets.summarize(rows, "cpu")
    assert (summary.rows, summary.left_out, summary.worst, summary.target) == (2, 1, 1.0, 1.0)
    assert summary.ratio == pytest.approx(2.0)


# --- gating


def test_a_wrong_function_gets_no_speedup():
    x, w = torch.randn(64, 32), torch.randn(16, 32)
    found = dlkern.bench.compare(
        {
            "right": torch.nn.functional.linear,
            "wrong": lambda x, w: torch.nn.functional.linear(x, w) + 1e-3,
            "unfinished": lambda x, w: torch.nn.functional.linear(x, w).index_fill(0, torch.tensor([63]), 0.0),
        },
        [x, w],
        parameters=[1],
        seconds=0.02,
        quick=True,
    )
    assert found["right"].ratio == 1.0 and found["right"].parity == "ok"
    for name in ("wrong", "unfinished"):
        assert found[name].parity == "FAILED" and found[name].ratio is None and found[name].ms > 0
    line = next(line for line in str(found).splitlines() if line.startswith("wrong"))
    assert "FAILED" in line and line.split()[5] == "–"


def test_a_wrong_gradient_gets_no_speedup():
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, grad_output):
            return grad_output * 2.01

    found = dlkern.bench.compare(
        {"right": lambda x: x * 2, "wrong": Wrong.apply},
        [torch.randn(100, requires_grad=True)],
        backward=True,
        seconds=0.02,
        bytes=800,
        flops=100,
        quick=True,
    )
    assert found["right"].parity == "ok" and found["right"].floor_ms > 0
    assert found["wrong"].parity == "FAILED" and found["wrong"].ratio is None


def test_a_wrong_kernel_prints_no_speedup(monkeypatch):
    shape = Shape("dropout", batch=16, channels=64)
    row = harness.measure(shape, torch.float32, "", "training", "auto", plan())
    assert row.parity == "ok" and row.ratio is not None and row.floor_ms and row.torch_ms
    right = cases._dropout

    def wrong(x):
        case = right(x)
        checked = case.check_ours
        case.check_ours = lambda x: checked(x) * 1.001
        return case

    monkeypatch.setattr(cases, "_dropout", wrong)
    row = harness.measure(shape, torch.float32, "", "training", "auto", plan())
    assert row.parity == "FAILED" and row.ratio is None and row.ms is not None
    assert "  – FAILED" in report.progress_line(row)


def test_the_reference_column_is_no_speedup():
    row = harness.measure(Shape("dropout", batch=4, channels=8), torch.float32, "", "forward", "reference", plan())
    assert row.column == "reference" and row.ratio is None


def test_an_error_becomes_a_note():
    row = harness.measure(Shape("dropout", batch=4, channels=8), torch.float32, "", "forward", "triton", plan())
    assert row.parity == "not run" and row.ratio is None and "emulated" in row.note


def test_parameters_change_between_calls():
    weight = torch.randn(3, requires_grad=True)
    before = weight.detach().clone()
    harness._change([weight])()
    assert torch.equal(weight, -before) and weight._version == 0


@pytest.mark.parametrize("op", sorted(shapes.FAMILIES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_op_of_the_tables_keeps_parity(op, dtype):
    if cases.missing(op) is not None:
        pytest.skip(cases.missing(op))
    # Large enough that the largest error of a border is no chance.
    shape = {
        "conv2d": Shape(op, batch=8, channels=8, height=7, width=7, out_channels=16, kernel=(3, 3), padding=(1, 1)),
        "linear": Shape(op, batch=16, channels=64, out_channels=48),
        "linear_relu": Shape(op, batch=16, channels=64, out_channels=48),
        "adaptive_avg_pool2d": Shape(op, batch=8, channels=16, height=7, width=7),
        "dropout": Shape(op, batch=8, channels=64),
        "cross_entropy": Shape(op, batch=64, channels=10),
        "embedding": Shape(op, batch=64, channels=10, out_channels=24),
        "layer_norm": Shape(op, batch=64, channels=48),
        **{n: Shape(op, batch=8, channels=32, out_channels=24, steps=5) for n, f in shapes.FAMILIES.items() if f == "rnn"},
        **{name: Shape(op, batch=4, heads=2, steps=40, channels=16) for name, f in shapes.FAMILIES.items() if f == "attention"},
    }.get(op, Shape(op, batch=32, channels=16, height=8, width=8, kernel=(2, 2), stride=(2, 2)))
    for layout in ("contiguous", "channels_last") if shape.spatial else ("contiguous",):
        built = []

        def build(seed, layout=layout, built=built):
            built.append(cases.build(shape, dtype, layout, "cpu", training=True, seed=seed))
            return built[-1]

        ok, detail = harness.parity_of_draws(build, 16, dtype, training=True)
        assert ok, detail
        assert all(p.grad is None for case in built for p in case.parameters)


# --- tables


@pytest.mark.parametrize("table", shapes.TABLES)
def test_tables(table):
    found = shapes.load(table)
    assert found and len({str(s) for s in found}) > 3
    assert all(work.count(shape, 4, direction).bytes > 0 for shape in found for direction in ("forward", "training"))


def test_tables_cover_what_they_should():
    assert {
        "alexnet",
        "cpu",
        "deepbench_conv",
        "deepbench_rnn",
        "densenet121",
        "googlenet",
        "gpu",
        "lenet",
        "quick",
        "resnet50",
        "sequences",
        "vgg16",
    } <= set(shapes.TABLES)
    conv = [shape for shape in shapes.load("resnet50") if shape.op == "conv2d"]
    assert sum(shape.repeat for shape in conv) == 53
    assert sum(shape.repeat for shape in shapes.load("densenet121") if shape.op == "conv2d") == 120
    assert sum(shape.repeat for shape in shapes.load("vgg16") if shape.op == "conv2d") == 13
    # 4.09 GMAC an image is ResNet-50's own figure (He et al. 2015 count 3.8 for the version with stride in the 1x1).
    macs = sum(s.repeat * work.count(s, 4, "forward").flops / 2 for s in (x.with_batch(1) for x in conv))
    assert 3.8e9 < macs < 4.1e9
    classes = {shape.group for shape in shapes.load("cpu")}
    assert set(targets.CPU) <= classes
    assert sum(2 for _ in shapes.load("gpu")) == 76
    assert len(shapes.load("deepbench_conv")) > 100
    assert {shape.op for shape in shapes.load("deepbench_rnn")} == set(work.GATES)


def test_a_bad_table_says_where(tmp_path):
    path = tmp_path / "bad.csv"
    path.write_text("op,batch,channels,height,width,kernel\nmax_pool2d,1,1,2,2,3\n")
    with pytest.raises(ValueError, match=r"bad\.csv:2"):
        shapes.load(str(path))
    with pytest.raises(ValueError, match="no table"):
        shapes.load("nothing")


# --- the run and its files


@pytest.mark.parametrize("arguments", [("--output", "/dev/null/x"), ("--compare", "nowhere.json")])
def test_files_are_looked_for_before_anything_is_measured(arguments, capsys):
    assert runner.main(["dropout", "--quick", *arguments]) == 2
    captured = capsys.readouterr()
    assert arguments[1] in captured.err and not captured.out


def test_run_writes_everything(tmp_path):
    path = tmp_path / "tiny.csv"
    path.write_text("op,name,batch,channels\ndropout,tiny,8,64\n")
    lines: list[str] = []
    result = dlkern.bench.run(
        tables=[str(path)],
        device="cpu",
        quick=True,
        seconds=0.01,
        output=tmp_path / "out",
        overhead=False,
        echo=lines.append,
    )
    assert result.ok and [row.direction for row in result.rows] == ["forward", "training"]
    assert result.settings["page_faults"].startswith("controlled")
    assert result.machine["commit"] == machine.commit()
    stored = json.loads((tmp_path / "out" / "results.json").read_text())
    assert stored["rows"][0]["torch_ms"] > 0 and stored["floors"]["bandwidth_gb_per_s"]
    assert (tmp_path / "out" / "results.csv").read_text().count("\n") == 3
    assert "dropout" in (tmp_path / "out" / "index.html").read_text()
    assert any("ratio" in line for line in lines)


def test_comparison_of_two_results(tmp_path):
    def result(ratio, low, high):
        row = harness.Row(
            "conv2d", "s", "float32", "contiguous", "forward", "cpu", ms=1.0, ratio=ratio, ratio_p20=low, ratio_p80=high
        )
        return {"rows": [row.as_dict()]}

    old = tmp_path / "results.json"
    old.write_text(json.dumps(result(1.0, 0.98, 1.02)))
    verdicts = {
        (1.5, 1.4, 1.6): "faster",
        (0.5, 0.4, 0.6): "slower",
        (1.01, 1.0, 1.02): "same",
        (1.2, 0.9, 1.5): "same",
        (None, None, None): "lost",
    }
    for new, verdict in verdicts.items():
        (change,) = dlkern.bench.compare_results(old, result(*new))
        assert change["verdict"] == verdict, new
    (change,) = dlkern.bench.compare_results(tmp_path, result(1.5, 1.4, 1.6))
    assert change["change"] == pytest.approx(1.5)
    assert "faster" in "\n".join(report.changes_table([change]))
    with pytest.raises(ValueError):
        old.write_text("[]")
        dlkern.bench.compare_results(old, result(1.0, 1.0, 1.0))


def test_wrong_requests():
    for wrong in (
        {"families": ["convolution"]},
        {"dtype": "int8"},
        {"layout": "nhwc"},
        {"tables": ["none"]},
        {"device": "tpu"},
    ):
        with pytest.raises(ValueError):
            dlkern.bench.run(**wrong)
    assert runner.main(["nonsense"]) == 2


def test_gpu_script_rehearses(tmp_path):
    script = ROOT / "bench" / "gpu.sh"
    if not script.exists():
        pytest.skip("not a checkout")
    done = subprocess.run(
        ["bash", str(script), "--dry-run", "--work", str(tmp_path)],
        env=dict(os.environ, PYTHON=sys.executable),
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for stage in ("build", "parity", "sanitize", "bench", "tune", "profile", "facts"):
        assert f"== {stage}" in done.stdout, done.stdout


def test_whole_networks(tmp_path):
    """Measures every side, in processes of their own, and writes what it found."""
    from dlkern.bench import networks

    assert networks.main(["mlp", "--seconds", "0.05", "--batch", "2", "--output", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "networks.json").read_text())
    (row,) = record["rows"]
    assert row["network"] == "mlp" and row["training"].keys() == {"dlkern", "fused"}
    assert row["inference"].keys() == {"dlkern", "fused", "frozen"} and min(row["inference"].values()) > 0
    assert row["training ms"] > 0 and row["peak MiB"].keys() == {"torch", "dlkern"}
    assert record["geometric means"]["training, fused"] == pytest.approx(row["training"]["fused"], rel=1e-3)
    with pytest.raises(SystemExit):
        networks.main(["nothing"])

"""Rows: for one problem, parity first, then times of both sides and the floor; and compare() for your own functions.

A row whose parity fails, or that a column other than dlkern's served, prints no speed-up.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

import dlkern
from dlkern.bench import cases, machine, timing, work
from dlkern.bench.shapes import Shape
from dlkern.testing import compare as parity_rows

__all__ = ["Comparison", "Plan", "Row", "compare", "measure", "overhead", "parity"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


@dataclass
class Row:
    """One line of the results. Times in milliseconds (microseconds in overhead rows), None where not measured."""

    op: str
    shape: str
    dtype: str
    layout: str
    direction: str
    column: str
    family: str = ""
    group: str = ""
    name: str = ""
    table: str = ""
    repeat: int = 1
    ms: float | None = None
    ms_p20: float | None = None
    ms_p80: float | None = None
    floor_ms: float | None = None
    bound: str = ""
    floor_percent: float | None = None
    floor_note: str = ""
    torch_ms: float | None = None
    torch_p20: float | None = None
    torch_p80: float | None = None
    compile_ms: float | None = None
    ratio: float | None = None
    ratio_p20: float | None = None
    ratio_p80: float | None = None
    ratio_compile: float | None = None
    runs: int = 0
    flops: int = 0
    bytes: int = 0
    faults: float = 0.0
    parity: str = ""
    note: str = ""

    @property
    def key(self) -> str:
        """What makes two results the same row."""
        return "|".join((self.op, self.shape, self.dtype, self.layout, self.direction, self.column))

    def as_dict(self) -> dict[str, Any]:
        return {k: round(v, 6) if isinstance(v, float) else v for k, v in asdict(self).items()}


@dataclass
class Plan:
    """How to measure: where, in what, for how long."""

    device: str = "cpu"
    seconds: float = 1.0
    minimum: int = 7
    maximum: int = 200
    with_compile: bool = False
    parity_flops: float = 4e9
    parity_elements: int = 1 << 24
    floors: machine.Floors = field(default_factory=lambda: machine.Floors("cpu"))


def _run(function: Callable[..., Any], inputs: Sequence[Any], cotangent: torch.Tensor | None) -> list[torch.Tensor]:
    """The output, then the gradients of the inputs that require one."""
    output = function(*inputs)
    leaves = [x for x in inputs if isinstance(x, torch.Tensor) and x.requires_grad]
    if cotangent is None or not leaves:
        return [output.detach()]
    gradients = torch.autograd.grad(output, leaves, cotangent.to(output.dtype))
    return [output.detach(), *gradients]


def _leaves(inputs: Sequence[Any], dtype: torch.dtype | None) -> list[Any]:
    copies = []
    for x in inputs:
        if isinstance(x, torch.Tensor):
            y = x.detach().clone(memory_format=torch.preserve_format)
            y = y.to(dtype) if dtype is not None and x.is_floating_point() else y
            copies.append(y.requires_grad_(x.requires_grad))
        else:
            copies.append(x)
    return copies


def parity(
    drawn: Sequence[cases.Case], dtype: torch.dtype, training: bool, ours: Callable[..., Any] | None = None
) -> tuple[bool, str]:
    """Whether a problem keeps dlkern.testing's rule, and the row nearest to its limit.

    Args:
        drawn: the problem with one draw of its inputs or several; the inputs are left as they are.
        dtype: computed in.
        training: compare the gradients too.
        ours: checked instead of the case's own.
    """
    tensors: list[tuple[list[torch.Tensor], ...]] = []
    for case in drawn:
        sides = _sides(case, training, ours or case.check_ours or case.ours)
        for i, (a, b, r) in enumerate(zip(*sides)):
            if a.shape != r.shape or a.dtype != b.dtype:
                return False, f"shape {tuple(a.shape)} {a.dtype}, torch has {tuple(b.shape)} {b.dtype}"
            if len(tensors) <= i:
                tensors.append(([], [], []))
            for kept, tensor in zip(tensors[i], (a, b, r)):
                kept.append(tensor)
    rows = []
    for i, (mine, theirs, exact) in enumerate(tensors):
        rows += parity_rows(f"gradient {i - 1}" if i else "output", mine, theirs, exact, dtype)
    if not rows:
        return False, "nothing was compared"
    worst = max(rows, key=lambda row: float("inf") if row.error != row.error else row.error / (row.limit or 1e-300))
    detail = f"{worst.tensor} [{worst.region}] {worst.measure} {worst.error:.2g}, limit {worst.limit:.2g}"
    return all(row.ok for row in rows), detail


def parity_of_draws(
    build: Callable[[int], cases.Case], draws: int, dtype: torch.dtype, training: bool
) -> tuple[bool, str]:
    """parity of build(0), build(1), …; where `draws` of them fail, 8 times as many tell chance from a fault."""
    ok, detail = False, ""
    for count in (draws, 8 * draws):
        ok, detail = parity([build(i) for i in range(count)], dtype, training)
        if ok:
            break
    return ok, detail


def _sides(
    case: cases.Case, training: bool, ours: Callable[..., Any]
) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    """Output and gradients: ours, torch's in the same dtype, torch's in float64."""
    reference = case.check_reference or case.theirs
    cotangent = None
    if training:
        with torch.no_grad():
            output = ours(*_leaves(case.inputs, None))
        cotangent = torch.randn(output.shape, device=output.device).to(output.dtype)
        if output.dim() == 4 and output.is_contiguous(memory_format=torch.channels_last):
            cotangent = cotangent.contiguous(memory_format=torch.channels_last)
    mine = _run(ours, _leaves(case.inputs, None), cotangent)
    theirs = _run(reference, _leaves(case.inputs, None), cotangent)
    exact = _run(reference, _leaves(case.inputs, torch.float64), cotangent)
    if case.before_relu is not None and training:
        # The same mask for all: see Case.before_relu. Outputs were compared under each side's own.
        assert cotangent is not None
        masked = cotangent * (mine[0] > 0)
        theirs[1:] = _run(case.before_relu, _leaves(case.inputs, None), masked)[1:]
        exact[1:] = _run(case.before_relu, _leaves(case.inputs, torch.float64), masked)[1:]
    return mine, theirs, exact


def _step(function: Callable[..., Any], case: cases.Case, cotangent: torch.Tensor | None) -> Callable[[], Any]:
    """A call, or a training step: forward and gradients of everything that requires one."""
    inputs = case.inputs
    if cotangent is None:

        def forward() -> Any:
            with torch.no_grad():
                return function(*inputs)

        return forward
    leaves = [x for x in inputs if isinstance(x, torch.Tensor) and x.requires_grad]

    def training() -> Any:
        return torch.autograd.grad(function(*inputs), leaves, cotangent)

    return training


def _change(parameters: Sequence[torch.Tensor]) -> Callable[[], None]:
    """Changes parameters in place as training scripts do (through .data, which moves no version counter)."""
    data = [p.data for p in parameters]

    def change() -> None:
        for d in data:
            d.neg_()

    return change


def _parity_shape(shape: Shape, plan: Plan, training: bool) -> Shape:
    """The shape, or with as many images as float64 arithmetic gets through in reasonable time."""
    counted = work.count(shape, 4, "forward")
    share = min(
        1.0,
        plan.parity_flops / max(1, counted.flops),
        plan.parity_elements / max(shape.input_numel, shape.output_numel),
    )
    return shape.with_batch(max(1, int(shape.batch * share))) if share < 1.0 else shape


def measure(shape: Shape, dtype: torch.dtype, layout: str, direction: str, column: str, plan: Plan) -> Row:
    """One row. Errors in the call become the row's note: a benchmark run goes on."""
    training = direction == "training"
    row = Row(
        shape.op,
        str(shape),
        str(dtype).removeprefix("torch."),
        layout,
        direction,
        column,
        family=shape.family,
        group=shape.group,
        name=shape.name,
        table=shape.table,
        repeat=shape.repeat,
    )
    reason = cases.missing(shape.op)
    if reason is not None:
        row.note, row.parity = reason, "not run"
        return row
    try:
        with dlkern.backend(column) if column != "auto" else contextlib.nullcontext():
            _measure(row, shape, dtype, layout, training, plan)
    except Exception as error:  # a row that cannot run must not end the run, and must not look like a result
        row.parity = row.parity or "not run"
        row.note = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]
        row.ratio = row.ratio_p20 = row.ratio_p80 = None
    if plan.device == "cuda":
        torch.cuda.empty_cache()
    return row


def _measure(row: Row, shape: Shape, dtype: torch.dtype, layout: str, training: bool, plan: Plan) -> None:
    small = _parity_shape(shape, plan, training)
    # Cases draw their own inputs: the parity check and the timing never see the same tensors.
    # The largest error of few elements is chance; small problems are drawn several times.
    draws = 1 if small.output_numel > 1 << 16 else 8 if small.output_numel == 1 else 4
    with dlkern.trace() as calls:
        ok, detail = parity_of_draws(
            lambda i: cases.build(small, dtype, layout, plan.device, training, seed=100 + i), draws, dtype, training
        )
    served = {call.backend for call in calls}
    reasons = sorted({call.reason for call in calls if call.reason})
    row.column = "+".join(sorted(served)) or "torch"
    row.parity = "ok" if ok else "FAILED"
    row.note = "; ".join(reasons)
    if small != shape:
        row.parity += f" (batch {small.batch})"
    if not ok:
        row.note = detail
    case = cases.build(shape, dtype, layout, plan.device, training, seed=2)
    cotangent = None
    if training:
        with torch.no_grad():
            cotangent = torch.randn_like(case.theirs(*case.inputs))
    functions = {"ours": _step(case.ours, case, cotangent), "torch": _step(case.theirs, case, cotangent)}
    if plan.with_compile:
        compiled = torch.compile(case.theirs, dynamic=False)
        try:
            with torch.set_grad_enabled(training):
                compiled(*case.inputs)
            functions["compile"] = _step(compiled, case, cotangent)
        except Exception as error:
            row.note = "; ".join(filter(None, (row.note, f"torch.compile: {type(error).__name__}")))
    samples = timing.interleave(
        functions,
        device=plan.device,
        seconds=plan.seconds,
        minimum=plan.minimum,
        maximum=plan.maximum,
        between=_change(case.parameters),
    )
    own, theirs = samples["ours"], samples["torch"]
    row.ms, row.ms_p20, row.ms_p80 = own.median, own.p20, own.p80
    row.torch_ms, row.torch_p20, row.torch_p80 = theirs.median, theirs.p20, theirs.p80
    row.runs = len(own.ms)
    row.faults = own.faults / max(1, row.runs)
    counted = work.count(shape, dtype.itemsize, row.direction, machine.last_cache(plan.device))
    row.flops, row.bytes, row.floor_note = counted.flops, counted.bytes, counted.note
    row.floor_ms, row.bound = plan.floors.floor_ms(counted.flops, counted.bytes, dtype)
    row.floor_percent = 100 * row.floor_ms / row.ms
    if "compile" in samples:
        row.compile_ms = samples["compile"].median
    if ok and not served & {"torch", "reference"}:
        found = timing.ratio(theirs, own)
        row.ratio, row.ratio_p20, row.ratio_p80 = found.median, found.p20, found.p80
        if "compile" in samples:
            row.ratio_compile = timing.ratio(samples["compile"], own).median
    if plan.with_compile:
        torch._dynamo.reset()


# Host overhead: the smallest problem of each op, so that the call is all there is.
TINY = (
    Shape("conv2d", batch=1, channels=4, height=4, width=4, out_channels=4),
    Shape("max_pool2d", batch=1, channels=1, height=2, width=2, kernel=(2, 2), stride=(2, 2)),
    Shape("batch_norm", batch=2, channels=4, height=2, width=2),
    Shape("linear", batch=1, channels=4, out_channels=4),
    Shape("dropout", batch=1, channels=4),
    Shape("embedding", batch=1, channels=4, out_channels=4),
    Shape("cross_entropy", batch=1, channels=4),
)


def overhead(op: str, device: str, quick: bool = False) -> list[Row]:
    """Host time of one call on a tiny tensor, in microseconds, beside torch's: forward without grad, and a step."""
    rows = []
    for shape in (s for s in TINY if s.op == op and cases.missing(op) is None):
        for direction in ("forward", "training"):
            training = direction == "training"
            case = cases.build(shape, torch.float32, "contiguous", device, training)
            row = Row(
                op,
                str(shape),
                "float32",
                "contiguous",
                direction,
                "auto",
                family=shape.family,
                group="overhead",
                name="host time of a call, µs",
                table="overhead",
                parity="not needed",
            )
            try:
                with dlkern.trace() as calls:
                    output = case.ours(*case.inputs)
                row.column = "+".join(sorted({c.backend for c in calls})) or "torch"
                cotangent = torch.randn_like(output) if training else None
                samples = timing.per_call(
                    {"ours": _step(case.ours, case, cotangent), "torch": _step(case.theirs, case, cotangent)},
                    calls=50 if quick else 200,
                    rounds=7 if quick else 15,
                )
            except Exception as error:
                row.note = f"{type(error).__name__}: {error}"[:200]
                rows.append(row)
                continue
            row.ms, row.ms_p20, row.ms_p80 = samples["ours"].median, samples["ours"].p20, samples["ours"].p80
            row.torch_ms = samples["torch"].median
            row.torch_p20, row.torch_p80 = samples["torch"].p20, samples["torch"].p80
            row.runs = len(samples["ours"].ms)
            if not {c.backend for c in calls} & {"torch", "reference"}:
                found = timing.ratio(samples["torch"], samples["ours"])
                row.ratio, row.ratio_p20, row.ratio_p80 = found.median, found.p20, found.p80
            rows.append(row)
    return rows


@dataclass
class Comparison:
    """What compare() found: a Row a function, the baseline first. str() is a table."""

    rows: list[Row]
    baseline: str
    conditions: str

    def __getitem__(self, name: str) -> Row:
        return next(row for row in self.rows if row.name == name)

    def __str__(self) -> str:
        from dlkern.bench import report

        lines = [self.conditions]
        header = ("function", "ms", "20–80 %", "floor", "% of floor", f"× {self.baseline}", "parity")
        body = []
        for row in self.rows:
            body.append(
                (
                    row.name,
                    report.number(row.ms),
                    f"{report.number(row.ms_p20)}–{report.number(row.ms_p80)}",
                    report.number(row.floor_ms),
                    report.number(row.floor_percent, 0),
                    report.number(row.ratio) if row.ratio is not None else "–",
                    f"{row.parity} {row.note}".strip(),
                )
            )
        return "\n".join(lines + report.table(header, body))


def compare(
    functions: Mapping[str, Callable[..., Any]],
    inputs: Sequence[Any] | Callable[[], Sequence[Any]],
    *,
    reference: Callable[..., Any] | None = None,
    backward: bool = False,
    parameters: Sequence[int] = (),
    flops: int = 0,
    bytes: int = 0,
    seconds: float = 1.0,
    quick: bool = False,
) -> Comparison:
    """Compares your own functions: correctness-gated, interleaved, with a floor where you say how much work there is.

    Args:
        functions: name -> function of the inputs that returns a floating-point tensor. The first is the baseline.
        inputs: the positional arguments, or a function that draws them, which makes parity of small tensors surer.
            Random, never zeros.
        reference: decides what is right: it is run on the inputs widened to float64, and its own error in the
            inputs' dtype is the measure (dlkern.testing's rule). The first function where None.
        backward: time a training step (forward, and gradients of the inputs that require one) instead of a call.
        parameters: positions of inputs to change between timed calls, so that nothing computed from them is reused.
        flops, bytes: work of one call, for the floor.
        seconds: how long the timed runs take together.
        quick: measure the floors less carefully.

    Returns:
        A Comparison: `print` it; `result["name"].ratio` is the baseline's time over the function's, None where
        parity failed.

    Raises:
        ValueError: no functions, no floating-point tensor among the inputs, or with `backward` none requires grad.
    """
    drawn = [list(inputs()) for _ in range(4)] if callable(inputs) else [list(inputs)]
    arguments = drawn[0]
    floating = [x for x in arguments if isinstance(x, torch.Tensor) and x.is_floating_point()]
    if not functions or not floating:
        raise ValueError("compare: expected at least one function and one floating-point tensor")
    dtype, device = floating[0].dtype, floating[0].device.type
    names = list(functions)
    oracle = reference or functions[names[0]]
    if not backward:
        drawn = [[x.detach() if isinstance(x, torch.Tensor) else x for x in values] for values in drawn]
    elif not any(x.requires_grad for x in floating):
        raise ValueError("compare: backward=True, but no input requires grad")
    problems = [cases.Case(oracle, oracle, values, [values[i] for i in parameters]) for values in drawn]
    case, arguments = problems[0], drawn[0]
    floors = machine.Floors(device, quick=quick)
    cotangent = None
    if backward:
        with torch.no_grad():
            cotangent = torch.randn_like(oracle(*arguments))
    rows = []
    for name in names:
        row = Row(
            name, "", str(dtype).removeprefix("torch."), "", "training" if backward else "forward", name, name=name
        )
        ok, detail = parity(problems, dtype, backward, ours=functions[name])
        row.parity = "ok" if ok else "FAILED"
        row.note = "" if ok else detail
        rows.append(row)
    samples = timing.interleave(
        {name: _step(functions[name], case, cotangent) for name in names},
        device=device,
        seconds=seconds,
        between=_change(case.parameters),
    )
    for row in rows:
        own = samples[row.name]
        row.ms, row.ms_p20, row.ms_p80, row.runs = own.median, own.p20, own.p80, len(own.ms)
        row.faults = own.faults / max(1, row.runs)
        row.flops, row.bytes = flops, bytes
        if flops or bytes:
            row.floor_ms, row.bound = floors.floor_ms(flops, bytes, dtype)
            row.floor_percent = 100 * row.floor_ms / row.ms
        if row.parity == "ok":
            found = timing.ratio(samples[names[0]], own)
            row.ratio, row.ratio_p20, row.ratio_p80 = found.median, found.p20, found.p80
    conditions = ", ".join(f"{key} {value}" for key, value in machine.settings(device).items() if key != "malloc")
    return Comparison(rows, names[0], conditions)


class Deadline:
    """Seconds left of a stage."""

    def __init__(self, seconds: float | None) -> None:
        self._end = None if seconds is None else time.monotonic() + seconds

    @property
    def passed(self) -> bool:
        return self._end is not None and time.monotonic() > self._end

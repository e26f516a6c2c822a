"""The `dlkern` command: info, check, compare, train, bench, demo."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console

import dlkern
from dlkern import _native, columns, models
from dlkern import report as reports
from dlkern._cli_shared import device_here, errors_as_messages, gpu_name, new_console, progress_bar, stamp
from dlkern._cli_train import lenet_on_digits, train
from dlkern.report import Section, Table
from dlkern.testing._parity import Certificate, Row
from dlkern.testing._training import check_training

__all__ = ["main"]

_DTYPES = {str(t).removeprefix("torch."): t for t in (torch.float32, torch.bfloat16, torch.float16, torch.float64)}


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(dlkern.__version__, prog_name="dlkern")
def main() -> None:
    """dlkern: fast kernels for the classic deep-learning layers, as drop-in PyTorch ops that train."""


# info ----------------------------------------------------------------------------------------------------------------


def _versions() -> Table:
    facts = _native.facts()
    build: dict[str, str] = facts.get("build", {})
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "not installed"
    made_with = f"{build['compiler']}, torch {build['torch']}" if build else facts.get("error", "")
    tiles = ", 16-bit matrix products by AMX" if facts.get("cpu_tiles") else ""
    if facts.get("cpu_float_tiles"):
        tiles = ", matrix products by AMX"
    rows = [
        ("dlkern", dlkern.__version__),
        ("native library", "loaded" if _native.load() else str(_native.LIBRARY_ERROR)),
        ("built with", made_with),
        ("CUDA kernels built for", build.get("cuda_architectures") or "none: built without nvcc, or left out"),
        ("torch", torch.__version__),
        ("triton", triton_version),
        ("python", platform.python_version()),
        ("CPU", f"{facts.get('cpu_isa', 'unknown')} code{tiles}, {torch.get_num_threads()} threads"),
        ("CPU features", ", ".join(k for k, v in facts.get("cpu_features", {}).items() if v) or "none looked at"),
        ("GPU", gpu_name()),
    ]
    return Table(("what", "here"), rows)


def _why_not(column: str) -> str | None:
    """Why a column cannot serve any call on this machine, or None."""
    reason = columns.unavailable(column)
    if reason is None and column in ("triton", "cuda") and not torch.cuda.is_available():
        reason = "serves CUDA tensors, and torch sees no GPU"
    return reason


def _columns() -> Table:
    rows = []
    for column in columns.COLUMNS:
        reason = _why_not(column)
        rows.append((column, "no" if reason else "yes", reason or ""))
    return Table(("column", "available", "why not"), rows)


@main.command()
def info() -> None:
    """What this machine and this build have, and which columns can run."""
    console = new_console()
    console.print(_versions().rich("dlkern on this machine"))
    console.print(_columns().rich("columns"))
    kernels = _native.facts().get("cuda_kernels", [])
    if kernels:
        names = list(dict.fromkeys(key for kernel in kernels for key in kernel))
        rows = [[kernel.get(name, "") for name in names] for kernel in kernels]
        console.print(Table(names, rows).rich("CUDA kernels"))


# check ---------------------------------------------------------------------------------------------------------------


def _with_layout(inputs: list[Any], channels_last: bool) -> list[Any]:
    if channels_last:
        inputs[0] = inputs[0].detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    return inputs


def _certify(case: Any, column: str, dtype: torch.dtype, device: torch.device) -> tuple[list[Certificate], str]:
    """Certificates of a case in its layouts, and why the column did not serve it ("" where it did)."""
    certificates = []
    for channels_last in (False, True) if case.images else (False,):

        def inputs(channels_last: bool = channels_last) -> list[Any]:
            drawn = [
                x.detach().to(device).requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x
                for x in case.inputs()
            ]
            return _with_layout(drawn, channels_last)

        with columns.backend(column), dlkern.trace() as calls:
            label = f"{case.name}{', channels_last' if channels_last else ''}"
            certificate = dlkern.testing.check(
                case.ours, case.theirs, inputs, dtype=dtype, draws=case.draws, name=label
            )
        handed_on = {call.reason for call in calls if call.backend != column}
        if handed_on:
            return [], "; ".join(sorted(handed_on))
        certificates.append(certificate)
    return certificates, ""


@main.command()
@click.argument("op", required=False)
@click.option("--column", "only_column", type=click.Choice(columns.COLUMNS), help="One column instead of all.")
@click.option("--dtype", "only_dtype", type=click.Choice(list(_DTYPES)), help="One dtype instead of all.")
@click.option("-v", "--verbose", is_flag=True, help="List every case.")
def check(op: str | None, only_column: str | None, only_dtype: str | None, verbose: bool) -> None:
    """Parity certificates: every op, or OP, in every column and dtype, against float64.

    The rule: an error of at most twice torch's own in the same dtype, or one unit roundoff; outputs, gradients and
    their borders. The exit code is 1 where it is broken.
    """
    from dlkern.testing import CASES

    ops = list(dict.fromkeys(case.op for case in CASES))
    if op is not None and op not in ops:
        raise click.BadParameter(f"no op {op!r}; there are {', '.join(ops)}", param_hint="OP")
    if only_column and (reason := _why_not(only_column)):
        raise click.ClickException(f"the {only_column} column is not available: {reason}")
    chosen = [only_column] if only_column else [c for c in columns.COLUMNS if not _why_not(c)]
    dtypes = [only_dtype] if only_dtype else list(_DTYPES)
    console, failures, rows = new_console(), [], []
    with progress_bar(console) as progress:
        total = len(chosen) * len(dtypes) * sum(op in (None, case.op) for case in CASES)
        task = progress.add_task("checking", note="", total=total)
        for name in ops if op is None else [op]:
            for column in chosen:
                device = torch.device("cuda") if column in ("triton", "cuda") else torch.device("cpu")
                for dtype in dtypes:
                    certificates: list[Certificate] = []
                    left_out: set[str] = set()
                    for case in (c for c in CASES if c.op == name):
                        torch.manual_seed(0)
                        found, why = _certify(case, column, _DTYPES[dtype], device)
                        certificates += found
                        left_out |= {why} if why else set()
                        progress.advance(task)
                    failures += [c for c in certificates if not c.ok]
                    rows.append(_check_row(name, column, dtype, certificates, left_out))
                    if verbose:
                        rows += [_check_row(f"  {c.name}", column, dtype, [c], set()) for c in certificates]
    heads = ("op", "column", "dtype", "cases", "error / limit, worst", "where", "result")
    console.print(Table(heads, rows).rich("parity against float64"))
    for certificate in failures:
        console.print(str(certificate), markup=False)
    console.print(f"{len(failures)} failed" if failures else "all keep the rule")
    if failures:
        sys.exit(1)


def _ratio(row: Row) -> float:
    return float("inf") if row.error != row.error else row.error / (row.limit or 1e-300)


def _check_row(op: str, column: str, dtype: str, certificates: list[Certificate], left_out: set[str]) -> list[str]:
    if not certificates:
        return [op, column, dtype, "0", "-", "", "; ".join(sorted(left_out))]
    measured = [c.worst() for c in certificates if c.rows]
    worst = max(measured, key=_ratio) if measured else None
    failed = sum(not c.ok for c in certificates)
    result = f"{failed} FAILED" if failed else "ok"
    if left_out:
        result += f" (not here: {'; '.join(sorted(left_out))})"
    return [
        op, column, dtype, str(len(certificates)), f"{_ratio(worst):.2f}" if worst else "-",
        f"{worst.tensor}, {worst.region}" if worst else "", result,
    ]  # fmt: skip


# compare -------------------------------------------------------------------------------------------------------------


@main.command()
@click.argument("model")
@click.option(
    "--input", "inputs", multiple=True, required=True, metavar="SIZES[:DTYPE[:BELOW]]",
    help="A random input of these sizes, 8,3,224,224; 8,128:int64:1000 for integers below 1000. Repeat for several.",
)  # fmt: skip
@click.option("--forward-only", is_flag=True, help="No gradients.")
@click.option("--seconds", default=2.0, show_default=True, help="How long to time the whole model.")
@click.option("--layer-seconds", default=0.1, show_default=True, help="How long to time each different layer.")
def compare(model: str, inputs: Sequence[str], forward_only: bool, seconds: float, layer_seconds: float) -> None:
    """What dlkern would do for MODEL (package.module:factory): what it swaps, parity, speed, a table by layer."""
    from dlkern.comparison import compare_models, load_model, parse_input

    console, device = new_console(), device_here()
    generator = torch.Generator().manual_seed(0)
    with errors_as_messages():
        loaded = load_model(model).to(device)
        tensors = [parse_input(text, generator).to(device) for text in inputs]
        try:
            found = compare_models(
                loaded, tensors, backward=not forward_only, seconds=seconds, layer_seconds=layer_seconds
            )
        except Exception as error:
            raise ValueError(f"{model} on inputs {', '.join(inputs)}: {type(error).__name__}: {error}") from error
    from dlkern.convert import report_table

    console.print(report_table(found.modules).rich("whose kernels each module runs on"))
    if found.functional:
        ops = ", ".join(f"{op} ×{n}" for op, n in _count(call.op for call in found.functional))
        console.print(f"called as functions, which `with dlkern.enabled():` would take as well: {ops}")
    elsewhere = [call for call in found.calls if call.backend in ("torch", "reference")]
    for op, reason in dict.fromkeys((call.op, call.reason) for call in elsewhere):
        console.print(f"handed on: {op}, because {reason}")
    if found.layers:
        console.print(_layers(found.layers).rich("by layer"))
    console.print(_whole_model(found.forward, found.training).rich("the whole model"))
    console.print(_parity_line(found.rows))
    if not found.ok:
        sys.exit(1)


def _count(names: Iterator[str]) -> list[tuple[str, int]]:
    counts: dict[str, int] = {}
    for name in names:
        counts[name] = counts.get(name, 0) + 1
    return list(counts.items())


def _layers(layers: Sequence[Any]) -> Table:
    heads = ["layer", "class", "input", "column", "forward ms, torch", "dlkern", "ratio"]
    rows = [
        [x.name, x.kind, "×".join(map(str, x.shape)), x.backends, *_timing(x.forward)] for x in layers
    ]  # fmt: skip
    if any(x.training for x in layers):
        heads += ["with backward, torch", "dlkern", "ratio"]
        rows = [row + list(_timing(x.training) if x.training else "---") for row, x in zip(rows, layers)]
    return Table(heads, rows)


def _timing(timing: Any) -> tuple[str, str, str]:
    return f"{timing.torch_ms:.3g}", f"{timing.dlkern_ms:.3g}", f"{timing.ratio:.2f}×"


def _whole_model(forward: Any, training: Any) -> Table:
    rows = [["forward, no grad", *_timing(forward)]]
    if training is not None:
        rows.append(["forward + backward", *_timing(training)])
    return Table(("", "torch ms", "dlkern ms", "torch / dlkern"), rows)


def _parity_line(rows: Sequence[Row]) -> str:
    failed = [row for row in rows if not row.ok]
    worst = max(rows, key=_ratio)
    lines = [f"parity: {'FAILED' if failed else 'ok'}, {len({r.tensor for r in rows})} tensors against float64"]
    for row in failed or [worst]:
        lines.append(f"  {row.tensor} ({row.measure}): error {row.error:.3g}, limit {row.limit:.3g}")
    return "\n".join(lines)


main.add_command(train)


# bench ---------------------------------------------------------------------------------------------------------------


@main.command(context_settings={"ignore_unknown_options": True, "help_option_names": []})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def bench(arguments: Sequence[str]) -> None:
    """Benchmarks with floors; `dlkern bench --help` lists what it takes."""
    from dlkern import bench as benchmark

    sys.exit(benchmark.main(list(arguments)))


# demo ----------------------------------------------------------------------------------------------------------------


@main.command()
@click.option("--steps", default=400, show_default=True, type=click.IntRange(min=1), help="Of LeNet's training.")
@click.option("--report", "folder", default="report", show_default=True, type=click.Path(file_okay=False))
@click.option("--bench/--no-bench", "with_bench", default=True, help="End with the quick benchmark.")
def demo(steps: int, folder: str, with_bench: bool) -> None:
    """Everything at a glance: train LeNet, a ResNet-18 step, a quick benchmark, and a report."""
    console = new_console()
    with errors_as_messages():
        reports.make_folder(folder)
    versions, available = _versions(), _columns()
    console.print(versions.rich("dlkern on this machine"))
    console.print(available.rich("columns"))
    with errors_as_messages():
        lenet, accuracy = lenet_on_digits(console, steps, 64, 0, "auto")
    sections = [lenet]
    ok = True
    for section, good in (_lenet_parity(console), _resnet_step(console)):
        sections.append(section)
        ok &= good
    if with_bench:
        sections.append(_quick_bench(console, Path(folder) / "bench"))
    sections.append(Section("This machine", tables=[versions, available]))
    path = reports.write(folder, "dlkern demo", stamp(), sections)
    console.print(f"accuracy on held-out digits: {100 * accuracy:.2f}%; parity: {'ok' if ok else 'FAILED'}")
    console.print(f"report: {path}")
    if not ok:
        sys.exit(1)


def _certificate_section(console: Console, title: str, note: str, certificate: Any) -> Section:
    console.print(f"{title}, {_parity_line(certificate.rows)}", markup=False)
    worst = sorted(certificate.rows, key=_ratio, reverse=True)[:5]
    rows = [[r.tensor, r.measure, f"{r.error:.2e}", f"{r.limit:.2e}", "ok" if r.ok else "FAILED"] for r in worst]
    return Section(title, note, [Table(("nearest to its limit", "measure", "error", "limit", "result"), rows)])


_RULE = (
    "The rule: our distance to torch's float64 run is at most twice the largest of five torch float32 runs whose "
    "inputs were moved by one unit in the last place."
)


def _lenet_parity(console: Console) -> tuple[Section, bool]:
    from dlkern.training import batches, digits

    device = device_here()
    stream = batches(digits(), 32, 1)
    drawn = [(x.to(device), y.to(device)) for x, y in (next(stream) for _ in range(20))]
    torch.manual_seed(0)
    certificate = check_training(lambda nn: models.lenet(nn=nn).to(device), drawn, name="LeNet, 20 steps")
    note = f"Output, gradients, loss curve and final weights. {_RULE}"
    return _certificate_section(console, "LeNet, 20 training steps", note, certificate), certificate.ok


def _resnet_step(console: Console, batch: int = 8) -> tuple[Section, bool]:
    from dlkern.comparison import interleave

    device = device_here()
    torch.manual_seed(0)
    images, labels = torch.randn(batch, 3, 64, 64).to(device), torch.randint(0, 10, (batch,)).to(device)
    make = lambda nn: models.resnet18(10, nn=nn).to(device)  # noqa: E731
    certificate = check_training(make, [(images, labels)], name="ResNet-18, one step")
    note = f"{batch} images of 3×64×64: output, every gradient, weights and running statistics after. {_RULE}"
    section = _certificate_section(console, "ResNet-18, one training step", note, certificate)

    def stepper(nn: Any) -> Any:
        model = make(nn)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

        def step() -> None:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()

        return step

    timing = interleave(stepper(torch.nn), stepper(dlkern.nn), device, seconds=3.0)
    times = Table(("", "torch ms", "dlkern ms", "torch / dlkern"), [["ResNet-18 training step", *_timing(timing)]])
    console.print(times.rich())
    section.tables.insert(0, times)
    return section, certificate.ok


def _quick_bench(console: Console, folder: Path) -> Section:
    from dlkern import bench as benchmark

    def echo(line: str) -> None:
        console.print(line, markup=False, soft_wrap=True)

    result = benchmark.run(quick=True, output=folder, overhead=False, echo=echo)
    rows = [
        [row.op, row.shape, row.layout, row.direction, row.column, _number(row.ms), _number(row.torch_ms),
         _number(row.ratio, "×"), _number(row.floor_percent, "%"), row.parity]
        for row in result.rows
    ]  # fmt: skip
    heads = ("op", "shape", "layout", "direction", "column", "ms", "torch ms", "ratio", "of the floor", "parity")
    note = "Small problems, a few runs each: a first impression, not the measurement `dlkern bench` makes."
    return Section("Quick benchmark", note, [Table(heads, rows)], link="bench/index.html")


def _number(value: float | None, unit: str = "") -> str:
    return "-" if value is None else f"{value:.3g}{unit}"

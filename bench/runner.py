"""The run: which rows, in which process, resumed from where, written where.

On a CPU the rows are measured in a process of their own, started with the allocator settled (machine.CONTROLLED):
set after Python's start those variables have no effect.
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from dlkern.bench import harness, machine, report, shapes, targets
from dlkern.bench.harness import DTYPES, Row
from dlkern.report import make_folder

__all__ = ["Result", "main", "run"]

LAYOUTS = ("contiguous", "channels_last")
RESULTS = Path(__file__).resolve().parent / "results"


@dataclass
class Result:
    """What a run found: its Rows, the classes beside their targets, and where it was written."""

    machine: dict[str, Any]
    settings: dict[str, Any]
    floors: dict[str, Any]
    rows: list[Row]
    summary: list[targets.Summary] = field(default_factory=list)
    directory: Path | None = None
    left: int = 0  # rows a deadline left for another run

    @property
    def ok(self) -> bool:
        """Whether every row that ran kept parity."""
        return not any(row.parity.startswith("FAILED") for row in self.rows)

    def as_dict(self) -> dict[str, Any]:
        return {
            "schema": 1,
            "machine": self.machine,
            "settings": self.settings,
            "floors": self.floors,
            "summary": [s.as_dict() for s in self.summary],
            "rows": [row.as_dict() for row in self.rows],
        }

    def __getitem__(self, name: str) -> Any:
        return self.as_dict()[name]


def run(
    families: Sequence[str] | None = None,
    *,
    device: str | None = None,
    quick: bool = False,
    dtype: str | Sequence[str] | None = None,
    layout: str | Sequence[str] | None = None,
    output: str | Path | None = None,
    compile: bool = False,
    threads: int | None = None,
    tables: Sequence[str] | None = None,
    batch: int | None = None,
    directions: Sequence[str] = ("forward", "training"),
    columns: Sequence[str] = ("auto",),
    seconds: float | None = None,
    limit: float | None = None,
    overhead: bool = True,
    write: bool = True,
    echo: Callable[[str], None] | None = print,
) -> Result:
    """Measures dlkern beside torch.

    Args:
        families: "conv", "pooling", …, or single ops ("max_pool2d"); all where None.
        device: "cpu" or "cuda"; the GPU where torch sees one.
        quick: a short list of small problems, under a minute; its numbers are rough.
        dtype: "float32", "bfloat16", … or several. float32 on a CPU, bfloat16 on a GPU where None.
        layout: "contiguous", "channels_last" or both; both on a CPU, channels_last on a GPU where None.
        output: folder for results.json, results.csv, index.html and plots; bench/results/<device>/ of the sources
            where None.
        compile: measure torch.compile's version too (slow: it compiles each row).
        threads: of both sides; torch's own choice where None.
        tables: names of bench/shapes; "quick", "cpu" or "gpu" where None.
        batch: replaces the tables' batch sizes.
        directions: "forward" and "training".
        columns: columns to force, "auto" for dlkern's own choice.
        seconds: timed part of a row.
        limit: stop starting rows after so many seconds; Result.left says how many remain.
        overhead: add the rows of host time a call.
        write: write the files.
        echo: gets every line of progress; None is silent.

    Returns:
        A Result. Rows that a results.json in `output` already holds are not resumed here; bench/gpu.sh does that.

    Raises:
        ValueError: an unknown family, table, dtype, layout or device; no results can be written to `output`.
        RuntimeError: the measuring process failed.
    """
    request = _Request(
        families=_as_list(families),
        device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
        quick=quick,
        dtype=_as_list(dtype),
        layout=_as_list(layout),
        compile=compile,
        threads=threads,
        tables=_as_list(tables),
        batch=batch,
        directions=list(directions),
        columns=list(columns),
        seconds=seconds,
        limit=limit,
        overhead=overhead,
    )
    request.resolve()
    if write:
        folder = make_folder(output if output is not None else RESULTS / machine.device_slug(request.device))
    if request.device == "cpu" and not _settled(request):
        result = _elsewhere(request, echo)
    else:
        result = here(request, echo)
    if write:
        result.directory = folder
        written = report.write(result.as_dict(), folder)
        if echo is not None:
            echo(f"\nwritten: {', '.join(str(path) for path in written)}")
    return result


@dataclass
class _Request:
    families: list[str]
    device: str
    quick: bool
    dtype: list[str]
    layout: list[str]
    compile: bool
    threads: int | None
    tables: list[str]
    batch: int | None
    directions: list[str]
    columns: list[str]
    seconds: float | None
    limit: float | None
    overhead: bool

    def resolve(self) -> None:
        """Fills in what was left open, and refuses what is not there."""
        cpu = self.device == "cpu"
        if not cpu and not (self.device == "cuda" and torch.cuda.is_available()):
            raise ValueError(f"bench: no device {self.device!r} here")
        self.dtype = self.dtype or ["float32" if cpu else "bfloat16"]
        self.layout = self.layout or (list(LAYOUTS) if cpu else ["channels_last"])
        self.tables = self.tables or ["quick" if self.quick else "cpu" if cpu else "gpu"]
        self.seconds = self.seconds or (0.15 if self.quick else 0.7 if cpu else 0.5)
        known = {*shapes.FAMILIES, *shapes.FAMILIES.values()}
        for what, given, allowed in (
            ("family", self.families, known),
            ("dtype", self.dtype, set(DTYPES)),
            ("layout", self.layout, set(LAYOUTS)),
            ("direction", self.directions, {"forward", "training"}),
        ):
            for name in given:
                if name not in allowed:
                    raise ValueError(f"bench: no {what} {name!r}; there are {', '.join(sorted(allowed))}")
        for name in self.tables:
            shapes.load(name)

    def jobs(self) -> list[tuple[shapes.Shape, torch.dtype, str, str, str]]:
        """(shape, dtype, layout, direction, column) of every row, in the tables' order."""
        found = []
        for table in self.tables:
            for shape in shapes.load(table, self.batch):
                if self.families and not {shape.op, shape.family} & set(self.families):
                    continue
                for dtype in self.dtype:
                    for layout in self.layout if shape.spatial else self.layout[:1]:
                        for direction in self.directions:
                            for column in self.columns:
                                # A matrix has one layout; say so.
                                found.append((shape, DTYPES[dtype], layout if shape.spatial else "", direction, column))
        return found


def _as_list(value: str | Iterable[str] | None) -> list[str]:
    return [] if value is None else [value] if isinstance(value, str) else list(value)


def _settled(request: _Request) -> bool:
    """Whether this very process may measure: started with the settings, with the threads asked for."""
    return machine.page_faults_controlled() and request.threads in (None, torch.get_num_threads())


def here(
    request: _Request,
    echo: Callable[[str], None] | None,
    have: dict[str, Row] | None = None,
    keep: Callable[[str, Row], None] | None = None,
    begin: Callable[[str], bool] | None = None,
) -> Result:
    """Measures in this process.

    Args:
        request: what to measure.
        echo: gets the lines of progress.
        have: rows measured before, by _job_key; they are taken over.
        keep: called with each new row and its job's key, to save it at once.
        begin: called with the key before its row is measured; the row is left out where it says so by False.
    """
    say = echo or (lambda line: None)
    device = request.device
    if device == "cuda":
        torch.backends.cudnn.benchmark = True  # torch's best, not its first guess
    floors = machine.Floors(device, quick=request.quick)
    plan = harness.Plan(
        device=device,
        seconds=request.seconds or 1.0,
        minimum=5 if request.quick else 9,
        with_compile=request.compile,
        parity_flops=1e9 if request.quick else 4e9 if device == "cpu" else 2e11,
        floors=floors,
        parity_elements=1 << 24 if device == "cpu" else 1 << 23,
    )
    deadline = harness.Deadline(request.limit)
    stamp, conditions = machine.describe(device), machine.settings(device)
    say(f"{stamp.get('gpu') or stamp['cpu']}, {', '.join(f'{k} {v}' for k, v in conditions.items() if k != 'malloc')}")
    bandwidths = floors.bandwidths()
    say("memory " + ", ".join(f"{rate / 1e9:.0f} GB/s @ {_size(size)}" for size, rate in bandwidths))
    for name in request.dtype:
        rate, by = floors.peak(DTYPES[name])
        say(f"{name} {rate / 1e9:.0f} GFLOP/s ({by})")
    say("\n" + report.progress_header())
    rows, left = [], 0
    for job in request.jobs():
        key = job_key(job)
        if have and key in have:
            rows.append(have[key])
            continue
        if deadline.passed:
            left += 1
            continue
        if begin is not None and not begin(key):
            continue
        shape, dtype, layout, direction, column = job
        row = harness.measure(shape, dtype, layout, direction, column, plan)
        rows.append(row)
        say(report.progress_line(row))
        if keep is not None:
            keep(key, row)
    if request.overhead and not deadline.passed:
        rows += _overhead_rows(request, device, say)
    summary = targets.summarize([row for row in rows if row.group != "overhead"], device)
    say("")
    for line in report.summary_table(summary):
        say(line)
    if (
        device == "cpu"
        and any(s.target for s in summary)
        and (machine.isa() != "avx512" or torch.get_num_threads() != 2)
    ):
        say("the targets are for two cores with AVX-512; this machine has others")
    failed = [row for row in rows if row.parity.startswith("FAILED")]
    if failed:
        say(f"\n{len(failed)} rows FAILED parity and show no speed-up")
    if left:
        say(f"\n{left} rows left: run again to measure them")
    if device == "cuda":
        conditions |= {"clocks_after": machine.settings(device)["clocks_now"]}
    return Result(stamp, conditions, floors.as_dict(), rows, summary, left=left)


def job_key(job: tuple[shapes.Shape, torch.dtype, str, str, str]) -> str:
    """Names a job; Row.key names what came of it (the column that served, not the one asked for)."""
    shape, dtype, layout, direction, column = job
    return "|".join((shape.op, str(shape), str(shape.input_grad), str(dtype), layout, direction, column))


def _overhead_rows(request: _Request, device: str, say: Callable[[str], None]) -> list[Row]:
    wanted = [
        shape.op for shape in harness.TINY if not request.families or {shape.op, shape.family} & set(request.families)
    ]
    rows = [row for op in wanted for row in harness.overhead(op, device, request.quick)]
    if rows:
        say("\nhost time of a call on a tiny tensor, µs")
        body = [
            (row.op, row.direction, row.column, number_us(row.ms), number_us(row.torch_ms), row.note) for row in rows
        ]
        for line in report.table(("op", "direction", "column", "dlkern", "torch", ""), body):
            say(line)
    return rows


def number_us(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def _size(size: int) -> str:
    return f"{size >> 20} MB" if size >= 1 << 20 else f"{size >> 10} KB"


def _elsewhere(request: _Request, echo: Callable[[str], None] | None) -> Result:
    """Measures in a process that was started with the allocator settled."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "result.json"
        command = [
            sys.executable,
            "-m",
            "dlkern.bench",
            "--worker",
            json.dumps(asdict(request)),
            "--worker-output",
            str(path),
        ]
        process = subprocess.Popen(
            command, env=machine.environment_for(request.threads), stdout=subprocess.PIPE, text=True, bufsize=1
        )
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if echo is not None:
                    echo(line.rstrip("\n"))
        except BaseException:  # interrupted: leave nothing running
            process.kill()
            raise
        if process.wait() or not path.exists():
            raise RuntimeError(f"bench: the measuring process ended with status {process.returncode}")
        return _from_dict(json.loads(path.read_text()))


def row_from_dict(values: dict[str, Any]) -> Row:
    names = {f.name for f in fields(Row)}
    return Row(**{key: value for key, value in values.items() if key in names})


def _from_dict(content: dict[str, Any]) -> Result:
    rows = [row_from_dict(row) for row in content["rows"]]
    summary = [targets.Summary(**s) for s in content["summary"]]
    return Result(
        content["machine"], content["settings"], content["floors"], rows, summary, left=content.get("left", 0)
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """python -m dlkern.bench; the exit status is 1 where parity failed. `networks` and `optim` as the first word are
    benchmarks with options of their own."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] in (["networks"], ["optim"]):
        return importlib.import_module(f"dlkern.bench.{words[0]}").main(words[1:])
    parser = argparse.ArgumentParser(
        prog="dlkern bench", description="dlkern beside torch, and beside the machine's floor",
        epilog="dlkern bench networks: whole networks; dlkern bench optim: optimisers (--help for each)",
    )
    known = ", ".join(dict.fromkeys(shapes.FAMILIES.values()))
    parser.add_argument("families", nargs="*", help=f"{known}, or single ops")
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument("--quick", action="store_true", help="small problems, under a minute")
    parser.add_argument("--dtype", action="append", choices=sorted(DTYPES))
    parser.add_argument("--layout", action="append", choices=LAYOUTS)
    parser.add_argument("--direction", action="append", choices=("forward", "training"))
    parser.add_argument("--column", action="append", choices=("auto", "cpu", "triton", "cuda", "reference"))
    parser.add_argument("--table", action="append", metavar="TABLE", help=f"{', '.join(shapes.TABLES)}, or a CSV file")
    parser.add_argument("--batch", type=int, help="instead of the tables' batch sizes")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--seconds", type=float, help="timed part of a row")
    parser.add_argument("--limit", type=float, help="start no row after so many seconds")
    parser.add_argument("--compile", action="store_true", help="measure torch.compile too")
    parser.add_argument("--no-overhead", action="store_true", help="leave out the rows of host time a call")
    parser.add_argument("--output", help="folder for the results; bench/results/<device> by default")
    parser.add_argument("--compare", metavar="OLD.json", help="show what changed since these results")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--worker-output", help=argparse.SUPPRESS)
    given = parser.parse_args(words)
    if given.worker:
        request = _Request(**json.loads(given.worker))
        if request.threads:
            torch.set_num_threads(request.threads)
        result = here(request, lambda line: print(line, flush=True))
        Path(given.worker_output).write_text(json.dumps(result.as_dict() | {"left": result.left}))
        return 0
    try:
        old = report.load(given.compare) if given.compare else None  # read before a run that may overwrite it
        result = run(
            given.families or None,
            device=given.device,
            quick=given.quick,
            dtype=given.dtype,
            layout=given.layout,
            output=given.output,
            compile=given.compile,
            threads=given.threads,
            tables=given.table,
            batch=given.batch,
            directions=given.direction or ("forward", "training"),
            columns=given.column or ("auto",),
            seconds=given.seconds,
            limit=given.limit,
            overhead=not given.no_overhead,
            echo=lambda line: print(line, flush=True),
        )
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    if old is not None:
        print()
        for line in report.changes_table(report.compare_results(old, result.as_dict())):
            print(line)
    return 0 if result.ok else 1

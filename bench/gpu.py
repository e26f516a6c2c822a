"""The stages of bench/gpu.sh. Run as a file, not as a module: building must not have the library loaded.

Every stage keeps a file of finished items in the work folder, stamped with the sources and the library they were made
with, and skips them when it is run again; it starts nothing new once its time is up. A CUDA error poisons a process:
the item is written down as failed, and the stage goes on in a fresh process. An item is written down when it starts,
too: one that hangs ends its process when the stage's time is up, counts as failed, and is skipped from then on.
Where $OUT names a folder, the lists of finished items and an archive of the results lie there. --dry-run goes through
all of it on the CPU with tiny problems and prints the commands that need a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import hashlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # dlkern from the checkout; the folder of this file holds no top-level modules

STAGES = ("build", "parity", "sanitize", "bench", "tune", "profile", "facts")
FAMILIES = ("conv", "pooling", "batch_norm", "linear", "dropout", "loss", "rnn", "attention", "layer_norm", "embedding")
NETWORKS = ("gpu", "resnet50", "vgg16", "googlenet", "densenet121", "alexnet")
COLUMNS = ("triton", "cuda")
BARE = (("build", 260.0), ("parity", 110.0), ("headline", 150.0))  # shares of the time: a quick build leaves its own
ARCHIVE = "gpu-results.tar.gz"
# A process is started in a group of its own, so that ninja and its compilers end with setup.py.
OWN_GROUP: dict[str, Any] = {"process_group": 0} if sys.version_info >= (3, 11) else {"preexec_fn": os.setpgrp}
# Parts of messages that say that the process's context is gone.
POISON = (
    "CUDA error",
    "illegal memory access",
    "illegal instruction",
    "misaligned address",
    "address space",
    "invalid program counter",
    "hardware stack",
    "device-side assert",
    "launch timed out",
    "unspecified launch failure",
    "uncorrectable",
)


# Files ------------------------------------------------------------------------------------------------------------


def library() -> Path:
    return Path(os.environ.get("DLKERN_LIBRARY") or ROOT / "dlkern" / "libdlkern.so")


def sources_digest() -> str:
    """What the results belong to, also where the checkout came without git."""
    digest = hashlib.sha256()
    for folder in ("csrc", "dlkern", "kernels", "bench"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".cpp", ".h", ".cu", ".cuh", ".csv") and path.is_file():
                digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def stamp() -> str:
    made = library()
    built = hashlib.sha256(made.read_bytes()).hexdigest()[:12] if made.exists() else "none"
    return f"{sources_digest()} {built}"


class Ledger:
    """Items of a stage, finished or begun: one JSON object a line, those of other sources or another library ignored.

    An item that was begun and never finished hung, or took its process along: it counts as failed.
    """

    def __init__(self, folder: Path, stage: str, dry: bool) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        name = f"{'dry-' if dry else ''}{stage}.jsonl"
        self.paths = [folder / name]
        self.stamp = stamp()
        self.items: dict[str, dict[str, Any]] = {}
        if self.paths[0].exists():
            for line in self.paths[0].read_text().splitlines():
                with contextlib.suppress(json.JSONDecodeError):  # a line cut off by the end of a lease
                    entry = json.loads(line)
                    if entry["stamp"] == self.stamp:
                        self.items[entry["item"]] = entry
        if not dry and (out := os.environ.get("OUT")) and Path(out).resolve() != folder:
            self.paths.append(Path(out) / name)  # what comes back even where the process is killed
            if self.items:
                shutil.copyfile(self.paths[0], self.paths[1])

    def begin(self, item: str) -> None:
        self._write(item, {"ok": False, "begun": True, "detail": "begun and never finished"})

    def add(self, item: str, **values: Any) -> None:
        self._write(item, values)

    def _write(self, item: str, values: dict[str, Any]) -> None:
        entry = {"item": item, "stamp": self.stamp, **values}
        self.items[item] = entry
        for path in self.paths:
            with path.open("a") as file:
                file.write(json.dumps(entry) + "\n")

    def __contains__(self, item: str) -> bool:
        return item in self.items

    @property
    def unfinished(self) -> list[str]:
        return [item for item, entry in self.items.items() if entry.get("begun")]


class Stage:
    """What every stage needs: options, time left, the ledger, where results go."""

    def __init__(self, name: str, options: argparse.Namespace, limit: float) -> None:
        self.name, self.options, self.dry = name, options, options.dry_run
        # A stage that started anew after a CUDA error keeps its first start.
        self.started = float(os.environ.get("DLKERN_STAGE_STARTED", time.time()))
        self.limit = limit
        self.ledger = Ledger(options.work, name, self.dry)

    @property
    def left(self) -> float:
        return self.limit - (time.time() - self.started)

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "cuda"

    def output(self, name: str) -> Path:
        folder = self.options.output
        if folder is None:
            if self.dry or os.environ.get("OUT"):
                folder = self.options.work / "results"
            else:
                from dlkern.bench import machine

                folder = ROOT / "bench" / "results" / machine.device_slug("cuda")
        folder.mkdir(parents=True, exist_ok=True)
        return folder / name

    def write(self, name: str, content: Any) -> None:
        path = self.output(name)
        path.write_text(json.dumps(content, indent=1) + "\n")
        say(f"written: {path}")

    def start_anew(self) -> None:
        """This process's CUDA context is gone: go on in another."""
        say("a CUDA error ended this process's context; going on in a fresh one")
        sys.stdout.flush()
        os.environ["DLKERN_STAGE_STARTED"] = str(self.started)
        arguments = [self.name, "--work", str(self.options.work), "--seconds", str(self.limit)]
        if self.options.output is not None:
            arguments += ["--output", str(self.options.output)]
        if self.options.family:
            arguments.insert(1, self.options.family)
        if self.options.sample:
            arguments.append("--sample")
        os.execv(sys.executable, [sys.executable, str(Path(__file__).resolve()), *arguments])


def say(*parts: object) -> None:
    print(*parts, flush=True)


def run(command: list[str], limit: float, *, shown: bool = False, **settings: Any) -> tuple[int, str]:
    """Exit status (124 where time ran out) and the output, or "" where it is shown. Nothing that it started outlives it."""
    pipe = None if shown else subprocess.PIPE
    try:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=pipe,
            stderr=None if shown else subprocess.STDOUT,
            text=True,
            errors="replace",
            **OWN_GROUP,
            **settings,
        )
    except OSError as error:
        return 127, str(error)
    status = None
    try:
        output, _ = process.communicate(timeout=max(1.0, limit))
        status = process.returncode
    except subprocess.TimeoutExpired:
        pass
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    if status is None:
        output, _ = process.communicate()
        status = 124
    return status, output or ""


def environment(**changes: str) -> dict[str, str]:
    path = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH")) if p)
    return {**os.environ, "PYTHONPATH": path, **changes}


def pack(work: Path) -> None:
    """One archive of results and finished items in $OUT, from which few files come back."""
    if not os.environ.get("OUT"):
        return
    path = Path(os.environ["OUT"]) / ARCHIVE
    with tarfile.open(path, "w:gz") as archive:
        for item in sorted([*work.glob("*.jsonl"), work / "results"]):
            if item.exists():
                archive.add(item, item.name)
    say(f"packed: {path}")


def missing_tool(stage: Stage, tool: str) -> bool:
    """Says so where a tool is not on this machine."""
    if shutil.which(tool):
        return False
    say(f"{tool}: not on this machine; nothing was checked with it")
    stage.ledger.add(tool, ok=None, detail="not on this machine")
    return True


# Build ------------------------------------------------------------------------------------------------------------

PROBE = """
import json, torch, dlkern
from dlkern import _native
from dlkern.ops._registry import raw
has = torch._C._dispatch_has_kernel_for_dispatch_key
print("PROBE" + json.dumps({
    "error": _native.LIBRARY_ERROR,
    "cpu": sorted(op for op in raw if has(f"dlkern::{op}_cpu", "CPU")),
    "cuda": sorted(op for op in raw if has(f"dlkern::{op}_cuda", "CUDA")),
    "torch": torch.__version__, "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    "capability": torch.cuda.get_device_capability() if torch.cuda.is_available() else None,
}))
"""


def probe() -> dict[str, Any]:
    """What the library that is there can do, asked in another process."""
    status, output = run([sys.executable, "-c", PROBE], 120, env=environment())
    for line in output.splitlines():
        if line.startswith("PROBE"):
            return json.loads(line.removeprefix("PROBE"))
    return {"error": f"import dlkern failed ({status}): {output[-2000:]}", "cpu": [], "cuda": [], "gpu": None}


def architecture(capability: list[int] | None) -> str:
    """What to compile for: the GPU's own architecture; sm_80's code serves all of 8.x, and its PTX what is newer."""
    return "90a" if capability == [9, 0] else "80"


def build(stage: Stage) -> bool:
    """Takes the library that is there where it serves, else builds it with nvcc for this GPU alone."""
    found = probe()
    say(f"torch {found.get('torch')}, GPU {found['gpu']}, library {library().name}: {found['error'] or 'loads'}")
    say(f"ops with a CUDA kernel: {', '.join(found['cuda']) or 'none'}")
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    if found["error"] is None and found["cuda"] and not stage.options.rebuild:
        say("taken as it is (--rebuild builds it here)")
        return True
    names = os.environ.get("DLKERN_CUDA_ARCHITECTURES") or architecture(found.get("capability"))
    shown = f"DLKERN_CUDA=1 DLKERN_CUDA_ARCHITECTURES={names} {' '.join(command)}"
    if stage.dry:
        say(f"would run: {shown}")
        return found["error"] is None
    say(f"building: {shown}")
    start = time.time()
    status, output = run(command, stage.left, env=environment(DLKERN_CUDA="1", DLKERN_CUDA_ARCHITECTURES=names))
    say(f"ended with {status} after {time.time() - start:.0f} s")
    if status == 124:
        say("time is up; ninja keeps what was compiled: run `bench/gpu.sh build` again")
        return False
    if status:
        say(output[-4000:])
        say("building without CUDA kernels instead: the Triton column is measured, the CUDA column is not")
        status, output = run(command, stage.left, env=environment(DLKERN_CUDA="0"))
        if status:
            say(output[-4000:])
    found = probe()
    say(f"library: {found['error'] or 'loads'}; CUDA kernels: {', '.join(found['cuda']) or 'none'}")
    stage.write("build.json", found | {"stamp": stamp()})
    return True  # Triton needs no library: go on


# Parity -----------------------------------------------------------------------------------------------------------


def parity_items(stage: Stage) -> Iterator[tuple[str, Any, Any, str, str]]:
    """(item, case, dtype, layout, column), CUDA C++ first: Triton compiles as it goes. In a sample, the first case of each
    op in bfloat16 and float32."""
    import torch

    import dlkern
    from dlkern import testing

    sample = stage.options.sample or stage.dry
    dtypes: tuple[torch.dtype, ...] = (
        (torch.bfloat16, torch.float32) if sample else (torch.bfloat16, torch.float16, torch.float32)
    )
    layouts: tuple[str, ...] = ("contiguous", "channels_last")
    if stage.dry:
        dtypes, layouts = dtypes[1:], layouts[1:]
    for column in ("cpu",) if stage.dry else ("cuda", "triton"):
        seen = set()
        for case in testing.cases():
            if (sample and case.op in seen) or not hasattr(dlkern.nn.functional, case.op):
                continue
            seen.add(case.op)
            for dtype in dtypes:
                for layout in layouts if case.images else ("contiguous",):
                    name = f"{case.name} {str(dtype).removeprefix('torch.')} {layout} {column}"
                    yield name, case, dtype, layout, column


def certificate_of(case: Any, draw: Callable[[], list[Any]], dtype: Any, name: str, draws: int) -> Any:
    """The case's certificate; where `draws` fail, that of 8 times as many, which tell chance from a fault."""
    from dlkern import testing

    for count in (draws, 8 * draws):
        certificate = testing.check(case.ours, case.theirs, draw, dtype=dtype, draws=count, name=name)
        if certificate.ok:
            break
    return certificate


def gpu_tests() -> list[str]:
    """Files that hold tests marked gpu: others may import what is not on this machine."""
    files = sorted((ROOT / "tests").glob("test_*.py"))
    return [str(path.relative_to(ROOT)) for path in files if "pytest.mark.gpu" in path.read_text()]


@contextlib.contextmanager
def float32_products() -> Iterator[None]:
    """float32 multiplied as float32 on both sides, not as TF32; torch's settings come back as they were."""
    import torch

    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = matmul.allow_tf32
    try:
        matmul.allow_tf32 = False
        with cudnn.flags(enabled=cudnn.enabled, allow_tf32=False):
            yield
    finally:
        matmul.allow_tf32 = before


@float32_products()
def parity(stage: Stage) -> bool:
    """The catalogue's cases on both GPU columns by the rule; the same bits 20 times; the tests marked gpu."""
    import torch

    import dlkern

    def inputs(case: Any, layout: str) -> Callable[[], list[Any]]:
        def draw() -> list[Any]:
            drawn = []
            for i, x in enumerate(case.inputs()):
                if isinstance(x, torch.Tensor):
                    grad = x.requires_grad
                    x = x.detach().to(stage.device)
                    if layout == "channels_last" and x.dim() == 4 and i == 0:
                        x = x.contiguous(memory_format=torch.channels_last)
                    x.requires_grad_(grad)
                drawn.append(x)
            return drawn

        return draw

    left = 0
    for name, case, dtype, layout, column in parity_items(stage):
        if name in stage.ledger:
            continue
        if stage.left < 15:
            left += 1
            continue
        torch.manual_seed(0)
        stage.ledger.begin(name)
        try:
            with dlkern.backend(column), dlkern.trace() as calls:
                draw = inputs(case, layout)
                draws = min(case.draws, 64) if stage.dry else case.draws
                certificate = certificate_of(case, draw, dtype, name, draws)
                served = "+".join(sorted({call.backend for call in calls}))
                fixed = [
                    x.detach().to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in draw()
                ]
                first = case.ours(*fixed)
                same = all(torch.equal(case.ours(*fixed), first) for _ in range(2 if stage.dry else 20))
            ok: bool | None = bool(certificate.ok and same)
            detail = "" if ok else str(certificate) + ("" if same else "\n  20 runs gave different bits")
        except Exception as error:
            ok, served, detail = False, "", f"{type(error).__name__}: {error}"[:2000]
        if served and served != column:
            ok, detail = None, f"served by {served}: {'; '.join(sorted({c.reason for c in calls if c.reason}))}"
        stage.ledger.add(name, ok=ok, served=served, detail=detail)
        if ok is not True:
            say(f"{'FAILED' if ok is False else 'not served'} {name}: {detail}")
        if not stage.dry and any(word in detail for word in POISON):
            stage.start_anew()
    items = stage.ledger.items
    if not stage.dry and not stage.options.sample and "pytest" not in items and stage.left > 60:
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-x", "-q", *gpu_tests()]
        status, output = run(command, stage.left - 20, env=environment())
        stage.ledger.add("pytest", ok={0: True, 5: None, 124: None}.get(status, False), detail=output[-3000:])
        say(f"tests marked gpu: {output.strip().splitlines()[-1] if output.strip() else status}")
    good = sum(e["ok"] is True for e in items.values())
    bad = [name for name, e in items.items() if e["ok"] is False]
    unserved = sum(e["ok"] is None for e in items.values())
    say(f"parity: {good} ok, {len(bad)} FAILED, {unserved} not served by the column asked for, {left} left")
    stage.write(
        "parity.json",
        {"stamp": stage.ledger.stamp, "ok": good, "failed": bad, "left": left, "items": list(items.values())},
    )
    return not bad


# Sanitizers -------------------------------------------------------------------------------------------------------


def sanitize(stage: Stage) -> bool:
    """compute-sanitizer's memcheck and racecheck over one case of each op and column, forward and backward."""
    from dlkern import testing

    ops = list(dict.fromkeys(case.op for case in testing.cases()))
    if not stage.dry and missing_tool(stage, "compute-sanitizer"):
        return True
    bad, left = [], 0
    for op in ops[:1] if stage.dry else ops:
        for column in COLUMNS:
            for tool in ("memcheck", "racecheck"):
                item = f"{tool} {op} {column}"
                if item in stage.ledger:
                    continue
                command = [
                    "compute-sanitizer",
                    "--tool",
                    tool,
                    "--error-exitcode",
                    "86",
                    sys.executable,
                    str(Path(__file__).resolve()),
                    "case",
                    op,
                    "--column",
                    column,
                ]
                if stage.dry:
                    say("would run:", " ".join(command))
                    continue
                if stage.left < 45:
                    left += 1
                    continue
                # Without torch's caching allocator every tensor is an allocation of its own, with red zones.
                status, output = run(
                    command, min(180.0, stage.left), env=environment(PYTORCH_NO_CUDA_MEMORY_CACHING="1")
                )
                unusable = status != 86 and "not supported" in output
                ok = None if unusable or status in (3, 124) else status == 0
                stage.ledger.add(item, ok=ok, status=status, detail=output[-3000:] if ok is not True else "")
                say(f"{item}: {'ok' if ok else 'no answer' if ok is None else 'FAILED'}")
                if ok is False:
                    bad.append(item)
                    say(output[-2000:])
                if unusable:
                    say("compute-sanitizer does not work on this machine; nothing was checked with it")
                    return True
    if stage.dry:
        one_case(stage, ops[0], "cpu")
    say(f"sanitize: {sum(e['ok'] is True for e in stage.ledger.items.values())} ok, {len(bad)} FAILED, {left} left")
    stage.write("sanitize.json", list(stage.ledger.items.values()))
    return not bad


def one_case(stage: Stage, op: str, column: str) -> bool:
    """The first case of an op, forward and backward, in bfloat16 (float32 on the CPU); run under a sanitizer."""
    import torch

    import dlkern
    from dlkern import testing

    case = testing.cases(op=op)[0]
    dtype = torch.float32 if stage.dry else torch.bfloat16
    inputs = [
        x.detach().to(stage.device, dtype if x.is_floating_point() else x.dtype).requires_grad_(x.requires_grad)
        for x in case.inputs()
    ]
    with dlkern.backend(column), dlkern.trace() as calls:
        output = case.ours(*inputs)
        if output.requires_grad:
            output.backward(torch.randn_like(output))
    if not stage.dry:
        torch.cuda.synchronize()
    if {call.backend for call in calls} != {column}:
        say(f"{op}: served by {sorted({call.backend for call in calls})}")
        raise SystemExit(3)
    return True


# Benchmarks -------------------------------------------------------------------------------------------------------


def rows(stage: Stage, request: Any, folder: str) -> tuple[Any, bool]:
    """Measures a request, row by row into the ledger, and writes the results; and whether all is well."""
    from dlkern.bench import report, runner

    def begin(key: str) -> bool:
        if key in stage.ledger:
            say(f"FAILED {key}: begun and never finished; left out")
            return False
        stage.ledger.begin(key)
        return True

    def keep(key: str, row: Any) -> None:
        stage.ledger.add(key, row=row.as_dict())
        if not stage.dry and any(word in row.note for word in POISON):
            stage.start_anew()

    have = {key: runner.row_from_dict(e["row"]) for key, e in stage.ledger.items.items() if "row" in e}
    if have:
        say(f"{len(have)} rows are there from an earlier run")
    request.limit = max(1.0, stage.left - 20)
    result = runner.here(request, say, have, keep, begin)
    content = result.as_dict()
    content["machine"]["sources"] = stage.ledger.stamp
    written = report.write(
        content, stage.output("x").parent / folder if folder else stage.output("x").parent, plots=not stage.dry
    )
    say("written:", ", ".join(str(path) for path in written))
    return result, result.ok and not stage.ledger.unfinished


def request_for(stage: Stage, families: list[str], tables: list[str], columns: list[str], **changes: Any) -> Any:
    from dlkern.bench import runner

    settings: dict[str, Any] = dict(
        families=families,
        device=stage.device,
        quick=stage.dry,
        dtype=[],
        layout=[],
        compile=False,
        threads=None,
        tables=["quick"] if stage.dry else tables,
        batch=None,
        directions=["forward", "training"],
        columns=["auto"] if stage.dry else columns,
        seconds=0.01 if stage.dry else None,
        limit=None,
        overhead=not stage.dry,
    )
    request = runner._Request(**(settings | changes))
    request.resolve()
    return request


def bench(stage: Stage) -> bool:
    """One family over all its tables; without a family, each in turn as far as the time goes. Optimisers by name only: their
    rows are steps over a network's parameters."""
    if stage.options.family == "optim":
        from dlkern.bench import optim

        quick = ["sgd", "clip_grad_norm_", "--network", "lenet", "--seconds", "0.1"] if stage.dry else []
        return optim.main([*quick, "--device", stage.device, "--output", str(stage.output("optim.json").parent)]) == 0
    families = [stage.options.family] if stage.options.family else ["dropout"] if stage.dry else list(FAMILIES)
    tables = [*NETWORKS, "sequences", *(f"deepbench_{family}" for family in ("conv", "rnn") if family in families)]
    request = request_for(stage, families, tables, ["auto"], compile=stage.options.compile)
    return rows(stage, request, stage.options.family or "")[1]


def headline(stage: Stage) -> bool:
    """The rows of shapes/gpu.csv."""
    return rows(stage, request_for(stage, [], ["gpu"], ["auto"], seconds=0.4), "")[1]


def orders_of(measured: dict[str, Any]) -> dict[str, list[str]]:
    """Columns of each op, dtype and class (see dlkern.tuning), the fastest first: by the geometric mean over the
    problems that every column of the class ran."""
    from dlkern import tuning

    times: dict[str, list[dict[str, float]]] = {}
    for name, entry in measured.items():
        op, shape, dtype, *_ = name.split("|")
        facts = ("grouped",) if re.search(r" g\d", shape) else ()
        times.setdefault(tuning.key(op.removesuffix("_relu").removesuffix("_add"), dtype, *facts), []).append(entry["ms"])
    orders = {}
    for key, problems in times.items():
        everywhere = set.intersection(*map(set, problems))
        if len(everywhere) > 1:
            orders[key] = sorted(everywhere, key=lambda column: math.prod(ms[column] for ms in problems))
    return orders


def tune(stage: Stage) -> bool:
    """Measures each headline problem on both columns: tuning.json, to be copied to dlkern/tuning/<gpu>.json."""
    columns = ["auto"] if stage.dry else list(COLUMNS)
    families = [stage.options.family] if stage.options.family else ["dropout"] if stage.dry else []
    result, good = rows(
        stage,
        request_for(stage, families, ["gpu"], columns, overhead=False, seconds=0.01 if stage.dry else 0.25),
        "tune",
    )
    best: dict[str, Any] = {}
    for row in result.rows:
        if row.ms is None or not row.parity.startswith("ok"):
            continue
        key = "|".join((row.op, row.shape, row.dtype, row.layout, row.direction))
        entry = best.setdefault(key, {"group": row.group, "torch_ms": row.torch_ms, "ms": {}})
        entry["ms"][row.column] = row.ms
    orders = orders_of(best)
    stage.write(
        "tuning.json", {"machine": result.machine, "sources": stage.ledger.stamp, "orders": orders, "choices": best}
    )
    return good


# Profile ----------------------------------------------------------------------------------------------------------

SECTIONS = ("SpeedOfLight", "MemoryWorkloadAnalysis", "Occupancy", "LaunchStats", "WarpStateStats")


def profile(stage: Stage) -> bool:
    """ncu over one training step of each headline problem; torch's profiler where ncu is not there or not allowed."""
    from dlkern.bench import shapes

    found = [s for s in shapes.load("quick" if stage.dry else "gpu") if stage.options.family in (None, s.family, s.op)]
    tool = shutil.which("ncu")
    if not tool:
        say("ncu: not on this machine; kernel times come from torch's profiler, without hardware counters")
    left = 0
    for shape in found[:1] if stage.dry else found:
        item = f"{shape.op} {shape}"
        if item in stage.ledger:
            continue
        if stage.left < 40:
            left += 1
            continue
        step = [sys.executable, str(Path(__file__).resolve()), "step", f"{shape.op}|{shape}"]
        command = [
            tool or "ncu",
            "--clock-control",
            "none",
            "--profile-from-start",
            "off",
            *(word for section in SECTIONS for word in ("--section", section)),
            *step,
        ]
        if stage.dry:
            say("would run:", " ".join(command))
            one_step(stage, f"{shape.op}|{shape}")
            continue
        stage.ledger.begin(item)
        status, output = run(command, min(150.0, stage.left), env=environment()) if tool else (127, "")
        if status or "==PROF== Profiling" not in output:
            if tool:
                say(f"ncu gave nothing ({status}): {output.strip().splitlines()[-1] if output.strip() else ''}")
                tool = None
            status, output = run([*step, "--torch-profiler"], min(100.0, stage.left), env=environment())
        stage.ledger.add(item, ok=status == 0, detail=output[-200_000:])
        say(f"{item}: {'ok' if status == 0 else f'failed ({status})'}")
    text = "\n\n".join(f"### {item}\n{e.get('detail', '')}" for item, e in stage.ledger.items.items())
    path = stage.output(f"profile-{stage.options.family or 'headline'}.txt")
    path.write_text(text)
    say(f"profile: {len(stage.ledger.items)} problems, {left} left; written: {path}")
    return True


def one_step(stage: Stage, name: str) -> bool:
    """One training step of a headline problem, with only that inside the profiler's range."""
    import torch

    from dlkern.bench import cases, harness, shapes

    table = "quick" if stage.dry else "gpu"
    shape = next(s for s in shapes.load(table) if f"{s.op}|{s}" == name)
    dtype = torch.float32 if stage.dry else torch.bfloat16
    case = cases.build(shape, dtype, "channels_last", stage.device, training=True)
    with torch.no_grad():
        cotangent = torch.randn_like(case.theirs(*case.inputs))
    step = harness._step(case.ours, case, cotangent)
    step()
    if stage.dry:
        return True
    torch.cuda.synchronize()
    if stage.options.torch_profiler:
        activity = torch.profiler.ProfilerActivity
        with torch.profiler.profile(activities=[activity.CPU, activity.CUDA]) as found:
            step()
            torch.cuda.synchronize()
        say(found.key_averages().table(sort_by="cuda_time_total", row_limit=25, max_name_column_width=80))
        return True
    torch.cuda.profiler.start()
    step()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()
    return True


# Facts ------------------------------------------------------------------------------------------------------------


def facts(stage: Stage) -> bool:
    """First measurements that decide designs: barriers, cuDNN's RNN steps and convolutions, SDPA, launch overhead."""
    for name, measure in (
        ("barriers", barrier_facts),
        ("rnn", rnn_facts),
        ("sdpa", sdpa_facts),
        ("conv", conv_facts),
        ("overhead", overhead_facts),
    ):
        if name in stage.ledger:
            continue
        if stage.left < 60 and not stage.dry:
            say(f"{name}: no time left, run again")
            continue
        stage.ledger.begin(name)
        try:
            found = measure(stage)
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {error}"[:1000]}
        stage.ledger.add(name, found=found)
        say(f"-- {name}")
        for key, value in found.items():
            say(f"  {key}: {value}")
    stage.write("facts.json", {name: e.get("found", e.get("detail")) for name, e in stage.ledger.items.items()})
    return True


def device_ms(stage: Stage, function: Callable[[], object]) -> float:
    from dlkern.bench import timing

    found = timing.interleave(
        {"it": function}, device=stage.device, seconds=0.01 if stage.dry else 0.3, minimum=2 if stage.dry else 7
    )
    return found["it"].median


def barrier_facts(stage: Stage) -> dict[str, Any]:
    program = stage.options.work / "barriers"
    command = [
        "nvcc",
        "-O3",
        "-std=c++17",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-o",
        str(program),
        str(ROOT / "bench" / "facts" / "barriers.cu"),
    ]
    if stage.dry:
        return {"would run": " ".join(command)}
    status, output = run(command, 120)
    if status == 0:
        status, output = run([str(program)], 60)
    return json.loads(output) if status == 0 else {"error": output[-800:]}


def rnn_facts(stage: Stage) -> dict[str, Any]:
    """cuDNN's LSTM and GRU, µs a time step: one layer, one direction."""
    import torch

    found = {}
    sizes = (
        [(4, 2, 3)] if stage.dry else [(256, 64, 128), (512, 64, 128), (1024, 64, 128), (2048, 64, 64), (1024, 8, 128)]
    )
    dtypes = [torch.float32] if stage.dry else [torch.bfloat16, torch.float16, torch.float32]
    for hidden, batch, steps in sizes:
        for kind in ("LSTM", "GRU"):
            for dtype in dtypes:
                model = getattr(torch.nn, kind)(hidden, hidden).to(stage.device, dtype)
                x = torch.randn(steps, batch, hidden, device=stage.device).to(dtype).requires_grad_()

                def forward(model: Any = model, x: Any = x) -> None:
                    with torch.no_grad():
                        model(x)

                def training(model: Any = model, x: Any = x) -> None:
                    model(x)[0].sum().backward()

                key = f"{kind} {str(dtype).removeprefix('torch.')} hidden {hidden} batch {batch} steps {steps}"
                found[key] = (
                    f"{1e3 * device_ms(stage, forward) / steps:.2f} µs a step forward, "
                    f"{1e3 * device_ms(stage, training) / steps:.2f} with backward"
                )
    return found


def sdpa_facts(stage: Stage) -> dict[str, Any]:
    """torch's scaled_dot_product_attention: TFLOP/s forward and with backward, plain, causal, masked; bf16 and fp32."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention as attend

    found = {}
    sizes = [(1, 1, 16, 8)] if stage.dry else [(4, 16, 2048, 64), (2, 16, 4096, 128), (1, 16, 16384, 128)]
    for batch, heads, length, dim in sizes:
        for dtype in (torch.bfloat16, torch.float32):
            for kind in ("plain", "causal", "masked"):
                if length > 4096 and (dtype == torch.float32 or kind == "masked"):
                    continue
                query, key, value = (
                    torch.randn(batch, heads, length, dim, device=stage.device).to(dtype).requires_grad_()
                    for _ in range(3)
                )
                mask = torch.rand(batch, 1, length, length, device=stage.device) > 0.1 if kind == "masked" else None
                causal = kind == "causal"

                def forward(q: Any = query, k: Any = key, v: Any = value, m: Any = mask, c: bool = causal) -> None:
                    with torch.no_grad():
                        attend(q, k, v, attn_mask=m, is_causal=c)

                def training(q: Any = query, k: Any = key, v: Any = value, m: Any = mask, c: bool = causal) -> None:
                    attend(q, k, v, attn_mask=m, is_causal=c).sum().backward()

                flops = 4 * batch * heads * length * length * dim * (0.5 if causal else 1)
                a, b = device_ms(stage, forward), device_ms(stage, training)
                key_ = f"{str(dtype).removeprefix('torch.')} {kind} B{batch} H{heads} S{length} D{dim}"
                found[key_] = (
                    f"forward {a:.3f} ms {flops / a / 1e9:.0f} TFLOP/s, forward and backward {b:.3f} ms "
                    f"{3.5 * flops / b / 1e9:.0f} TFLOP/s"
                )
    return found


def conv_facts(stage: Stage) -> dict[str, Any]:
    """cuDNN's convolutions a layer, bf16 channels_last: forward, input gradient, weight gradient apart."""
    import torch

    from dlkern.bench import machine, shapes, work

    torch.backends.cudnn.benchmark = True
    floors = machine.Floors(stage.device, quick=True)
    dtype = torch.float32 if stage.dry else torch.bfloat16
    tables = ["quick"] if stage.dry else ["resnet50", "vgg16"]
    found: dict[str, Any] = {}
    for table in tables:
        layers = [s for s in shapes.load(table) if s.op == "conv2d"]
        for shape in layers[:1] if stage.dry else layers:
            if stage.left < 20 and not stage.dry:
                found["note"] = "time ran out"
                return found
            x = torch.randn(shape.batch, shape.channels, shape.height, shape.width, device=stage.device).to(dtype)
            w = torch.randn(shape.out_channels, shape.channels // shape.groups, *shape.kernel, device=stage.device).to(
                dtype
            )
            x, w = (t.contiguous(memory_format=torch.channels_last) for t in (x, w))
            args = (None, list(shape.stride), list(shape.padding), list(shape.dilation), False, [0, 0], shape.groups)
            dy = torch.randn_like(torch.ops.aten.convolution(x, w, *args))
            flops = work.count(shape, 2, "forward").flops
            floor, bound = floors.floor_ms(flops, work.count(shape, dtype.itemsize, "forward").bytes, dtype)
            parts = [f"floor {floor:.3f} ms ({bound})"]
            for name, function in (
                ("forward", lambda: torch.ops.aten.convolution(x, w, *args)),  # noqa: B023
                ("dx", lambda: torch.ops.aten.convolution_backward(dy, x, w, *args, [True, False, False])),  # noqa: B023
                ("dw", lambda: torch.ops.aten.convolution_backward(dy, x, w, *args, [False, True, False])),  # noqa: B023
            ):
                ms = device_ms(stage, function)
                parts.append(f"{name} {ms:.3f} ms {flops / ms / 1e9:.0f} TFLOP/s")
            found[f"{table} {shape.name} {shape}"] = ", ".join(parts)
    return found


def overhead_facts(stage: Stage) -> dict[str, Any]:
    """Host µs of a call on a tiny tensor, each column beside torch."""
    import dlkern
    from dlkern.bench import harness

    found = {}
    for column in ("cpu",) if stage.dry else COLUMNS:
        for op in ("dropout",) if stage.dry else [shape.op for shape in harness.TINY]:
            with dlkern.backend(column):
                for row in harness.overhead(op, stage.device, quick=True):
                    ours = f"{row.ms:.1f}" if row.ms is not None else row.note
                    torch_us = f"{row.torch_ms:.1f}" if row.torch_ms is not None else "–"
                    found[f"{op} {row.direction} {row.column}"] = f"{ours} µs, torch {torch_us}"
    return found


# Entry ------------------------------------------------------------------------------------------------------------

RUN: dict[str, Callable[[Stage], bool]] = {
    "build": build,
    "parity": parity,
    "sanitize": sanitize,
    "bench": bench,
    "tune": tune,
    "profile": profile,
    "facts": facts,
    "headline": headline,
}


def bare(options: argparse.Namespace) -> int:
    """build, a sample of parity, the headline rows: each in its own process; a short summary last."""
    start, lines, status = time.time(), [], 0
    for number, (name, share) in enumerate(BARE):
        seconds = (520 - (time.time() - start)) * share / sum(share for _, share in BARE[number:])
        say(f"\n== {name} ({seconds:.0f} s at most)")
        command = [sys.executable, str(Path(__file__).resolve()), name, "--sample", "--seconds", f"{seconds:.0f}"]
        command += ["--work", str(options.work)] + (["--output", str(options.output)] if options.output else [])
        began = time.time()
        ended, _ = run(command, seconds + 30, shown=True)
        status = status or ended
        lines.append(f"{name}: {'ok' if ended == 0 else f'status {ended}'}, {time.time() - began:.0f} s")
    say("\n== summary")
    items = Ledger(options.work, "parity", False).items
    if items:
        bad = [item for item, e in items.items() if e["ok"] is False]
        lines.append(f"parity: {len(items) - len(bad)} items, {len(bad)} failed{': ' + '; '.join(bad[:5]) if bad else ''}")
    pack(options.work)
    for line in [*lines, f"sources and library {stamp()}, {time.time() - start:.0f} s in all"]:
        say(line)
    return status


def rehearse(options: argparse.Namespace) -> int:
    """Every stage on the CPU with tiny problems."""
    failed = []
    for name in STAGES:
        say(f"\n== {name} (rehearsal)")
        began = time.time()
        try:
            if not RUN[name](Stage(name, options, 60.0)):
                failed.append(name)
        except Exception as error:
            say(f"{name}: {type(error).__name__}: {error}")
            failed.append(name)
        say(f"{name}: {time.time() - began:.1f} s")
    say(
        "\nrehearsed "
        + (f"with failures: {', '.join(failed)}" if failed else "without a failure; nothing ran on a GPU")
    )
    return 1 if failed else 0


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="bench/gpu.sh", description="Verify and measure dlkern on this machine's GPU."
    )
    parser.add_argument("stage", nargs="?", help=f"{', '.join(STAGES)}; none: build, parity sample, headline rows")
    parser.add_argument("family", nargs="?", help="for bench, tune and profile")
    parser.add_argument("--dry-run", action="store_true", help="rehearse without a GPU")
    parser.add_argument(
        "--work", type=Path, default=ROOT / "build" / "gpu", help="folder of finished items, to resume from"
    )
    parser.add_argument("--output", type=Path, help="folder of results; packed into $OUT, or bench/results/<gpu>")
    parser.add_argument("--seconds", type=float, default=480.0, help="start nothing new after so many")
    parser.add_argument("--sample", action="store_true", help="parity: a case of each op")
    parser.add_argument("--rebuild", action="store_true", help="build: also where a library is there")
    parser.add_argument("--compile", action="store_true", help="bench: torch.compile too")
    parser.add_argument("--column", default="cuda", help=argparse.SUPPRESS)
    parser.add_argument("--torch-profiler", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.work = options.work.resolve()
    options.work.mkdir(parents=True, exist_ok=True)
    if options.dry_run:
        if options.stage is None:
            return rehearse(options)
        return 0 if RUN[options.stage](Stage(options.stage, options, options.seconds)) else 1
    if options.stage in ("case", "step"):  # a single call under a tool
        stage = Stage(options.stage, options, options.seconds)
        return (
            0
            if (
                one_case(stage, options.family, options.column)
                if options.stage == "case"
                else one_step(stage, options.family)
            )
            else 1
        )
    if options.stage is not None and options.stage not in RUN:
        parser.error(f"no stage {options.stage!r}; there are {', '.join(STAGES)}")
    import torch

    if not torch.cuda.is_available():
        say("torch sees no GPU here; `bench/gpu.sh --dry-run` rehearses the stages")
        return 2
    if options.stage is None:
        return bare(options)
    stage = Stage(options.stage, options, options.seconds)
    faulthandler.dump_traceback_later(max(1.0, stage.left + 20), exit=True)  # what hangs ends here, and says where
    good = RUN[options.stage](stage)
    pack(options.work)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())

"""bench/gpu.py, the script of the proof on a GPU, as far as it can be run without one (its rehearsal: test_bench.py)."""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tarfile
import textwrap
import time
from pathlib import Path

import pytest
import torch
from torch.overrides import TorchFunctionMode

from dlkern import testing
from dlkern._precision import allow_tf32_cudnn, allow_tf32_matmul
from dlkern.bench import cases, shapes
from dlkern.bench.shapes import Shape

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def script(monkeypatch):
    monkeypatch.delenv("OUT", raising=False)
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec = importlib.util.spec_from_file_location("gpu_script", ROOT / "bench" / "gpu.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def stage(script, name, work, **changes):
    off = dict.fromkeys(("dry_run", "sample", "compile", "rebuild", "torch_profiler"), False)
    settings = dict(work=work, output=None, family=None, **off)
    return script.Stage(name, argparse.Namespace(**(settings | changes)), 300.0)


# --- finished items


def test_an_item_that_never_finished_is_failed_and_skipped(script, tmp_path):
    first = script.Ledger(tmp_path, "parity", False)
    first.begin("a")
    first.add("a", ok=True)
    first.begin("b")
    again = script.Ledger(tmp_path, "parity", False)
    assert "a" in again and "b" in again and again.unfinished == ["b"]
    assert again.items["a"]["ok"] is True and again.items["b"]["ok"] is False


def test_finished_items_come_back_though_the_process_is_killed(script, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    script.Ledger(tmp_path / "work", "parity", False).add("before", ok=True)
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    script.Ledger(tmp_path / "work", "parity", False).begin("now")
    text = (tmp_path / "out" / "parity.jsonl").read_text()
    assert text == (tmp_path / "work" / "parity.jsonl").read_text()
    assert [json.loads(line)["item"] for line in text.splitlines()] == ["before", "now"]


def test_a_row_that_hung_is_left_out_and_fails_the_stage(script, tmp_path, monkeypatch):
    from dlkern.bench import runner

    monkeypatch.setattr(runner.harness, "overhead", lambda *_: [])
    changes = dict(dry_run=True, family="dropout")
    first = stage(script, "bench", tmp_path, **changes)
    assert script.bench(first) and not first.ledger.unfinished and first.ledger.items
    (key, *_) = first.ledger.items
    with first.ledger.paths[0].open("a") as file:
        file.write(json.dumps({"item": key, "stamp": first.ledger.stamp, "ok": False, "begun": True}) + "\n")
    second = stage(script, "bench", tmp_path, **changes)
    assert not script.bench(second) and second.ledger.unfinished == [key]


def test_parity_writes_an_item_down_before_it_runs(script, tmp_path, monkeypatch):
    from torch.testing._internal import common_utils  # noqa: F401  (cuDNN's settings may not be assigned after it)

    found, seen, certificate_of = stage(script, "parity", tmp_path, dry_run=True), [], script.certificate_of
    items = list(script.parity_items(found))[:1]
    monkeypatch.setattr(script, "parity_items", lambda _: items)

    def certificate(*arguments):
        seen.append(found.ledger.paths[0].read_text())
        tf32.append((allow_tf32_cudnn(), allow_tf32_matmul()))
        return certificate_of(*arguments)

    tf32 = [(allow_tf32_cudnn(), allow_tf32_matmul())]
    monkeypatch.setattr(script, "certificate_of", certificate)
    assert script.parity(found)
    assert items[0][0] in seen[0] and '"begun": true' in seen[0]
    assert tf32 == [(True, False), (False, False)] and (allow_tf32_cudnn(), allow_tf32_matmul()) == tf32[0]


# --- processes


def test_what_runs_too_long_ends_with_all_that_it_started(script, tmp_path):
    child = tmp_path / "child"
    code = f"""
    import subprocess, sys, time
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    open({str(child)!r}, "w").write(str(child.pid))
    print("started", flush=True)
    time.sleep(60)
    """
    start = time.time()
    status, output = script.run([sys.executable, "-c", textwrap.dedent(code)], 5)
    assert (status, output) == (124, "started\n") and time.time() - start < 30
    assert wait_until_gone(int(child.read_text()))


def wait_until_gone(pid):
    for _ in range(50):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.1)
    return False


def test_output_is_not_cut(script):
    status, output = script.run([sys.executable, "-c", "print('first'); print('x' * 100_000)"], 60)
    assert status == 0 and output.startswith("first\n") and len(output) > 100_000
    assert script.run(["/no/such/program"], 5)[0] == 127


def test_each_stage_has_its_time_and_is_ended_behind_it(script, tmp_path, monkeypatch):
    limits, spent = [], {"build": 20.0, "parity": 330.0, "headline": 100.0}
    now = [1000.0]
    monkeypatch.setattr(script.time, "time", lambda: now[0])

    def run(command, limit, shown):
        limits.append((command[2], float(command[command.index("--seconds") + 1]), limit))
        now[0] += spent[command[2]]
        return 124 if command[2] == "parity" else 0, ""

    monkeypatch.setattr(script, "run", run)
    options = argparse.Namespace(work=tmp_path, output=None)
    assert script.bare(options) == 124
    (_, build, _), (_, parity, _), (_, headline, _) = limits
    assert build == 260 and parity == round(500 * 110 / 260) and headline == 520 - 350
    assert all(abs(limit - seconds - 30) <= 0.5 for _, seconds, limit in limits)


def test_a_stage_that_hangs_ends_itself(tmp_path):
    code = f"""
    import sys, time
    sys.argv = ["gpu.py", "facts", "--seconds", "-19", "--work", {str(tmp_path)!r}]
    sys.path.insert(0, {str(ROOT / "bench")!r})
    import gpu, torch
    torch.cuda.is_available = lambda: True
    gpu.RUN["facts"] = lambda stage: time.sleep(120)
    gpu.main()
    """
    start = time.time()
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode != 0 and "Timeout" in done.stderr and time.time() - start < 100


# --- results


def test_results_are_one_archive(script, tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    monkeypatch.setenv("OUT", str(out))
    found = stage(script, "parity", tmp_path / "work")
    found.ledger.add("item", ok=True)
    for number in range(12):
        found.write(f"{number}.json", number)
    script.pack(tmp_path / "work")
    assert sorted(path.name for path in out.iterdir()) == [script.ARCHIVE, "parity.jsonl"]
    with tarfile.open(out / script.ARCHIVE) as archive:
        names = archive.getnames()
    assert "parity.jsonl" in names and {f"results/{number}.json" for number in range(12)} <= set(names)
    assert len(script.STAGES) + 2 <= 9  # the archive and a list each, build has none, and headline: at most 8 come back


# --- stages


def test_a_build_is_for_the_gpu_that_is_there(script, tmp_path, monkeypatch):
    monkeypatch.delenv("DLKERN_CUDA_ARCHITECTURES", raising=False)
    assert [script.architecture(c) for c in ([9, 0], [8, 6], [10, 0], None)] == ["90a", "80", "80", "80"]
    nothing = {"error": "none", "cpu": [], "cuda": [], "gpu": "a GPU", "capability": [9, 0]}
    monkeypatch.setattr(script, "probe", lambda: nothing)
    calls = []
    monkeypatch.setattr(script, "run", lambda command, limit, env: calls.append(env) or (124, ""))
    assert not script.build(stage(script, "build", tmp_path))
    assert calls[0]["DLKERN_CUDA"] == "1" and calls[0]["DLKERN_CUDA_ARCHITECTURES"] == "90a"


def test_the_cuda_column_comes_first(script, tmp_path):
    columns = [item[4] for item in script.parity_items(stage(script, "parity", tmp_path, sample=True))]
    assert columns == sorted(columns) and set(columns) == {"cuda", "triton"}
    assert columns.count("cuda") == columns.count("triton")


class Certificate:
    def __init__(self, ok):
        self.ok = ok


@pytest.mark.parametrize("answers,wanted", [([True], [4]), ([False, True], [4, 32]), ([False, False], [4, 32])])
def test_what_fails_is_drawn_again_more_often(script, monkeypatch, answers, wanted):
    draws, left = [], list(answers)

    def check(ours, theirs, draw, *, dtype, draws: int, name, seen=draws):
        seen.append(draws)
        return Certificate(left.pop(0))

    monkeypatch.setattr(testing, "check", check)
    case = argparse.Namespace(ours=None, theirs=None)
    assert script.certificate_of(case, list, torch.float32, "a case", 4).ok is answers[-1]
    assert draws == wanted


# cudaGetErrorString of the errors that CUDA calls sticky, and of some that are not.
STICKY = [
    "an illegal memory access was encountered", "an illegal instruction was encountered", "misaligned address",
    "operation not supported on global/shared address space", "invalid program counter", "hardware stack error",
    "device-side assert triggered", "the launch timed out and was terminated", "unspecified launch failure",
    "uncorrectable ECC error encountered",
]


def test_errors_that_end_a_context(script):
    for text in STICKY:
        assert any(word in f"RuntimeError: dlkern: some_kernel: {text}" for word in script.POISON), text
    for text in ("invalid argument", "out of memory", "too many resources requested for launch"):
        assert not any(word in f"RuntimeError: dlkern: some_kernel: {text}" for word in script.POISON), text


def test_profile_reads_what_ncu_prints_first(script, tmp_path, monkeypatch):
    ncu = tmp_path / "bin" / "ncu"
    ncu.parent.mkdir()
    ncu.write_text(f"#!{sys.executable}\nprint('==PROF== Profiling \"kernel\"')\nprint('Duration' * 5000)\nprint('last')\n")
    ncu.chmod(0o755)
    monkeypatch.setenv("PATH", f"{ncu.parent}{os.pathsep}{os.environ['PATH']}")
    found = stage(script, "profile", tmp_path, family="dropout", output=tmp_path / "results")
    assert script.profile(found)
    (entry,) = found.ledger.items.values()
    assert entry["ok"] is True and entry["detail"].startswith("==PROF==") and entry["detail"].endswith("last\n")


# Not among the packages of a machine that was set up for torch alone.
ABSENT = ("expecttest", "django", "polib", "rouge_score", "sacrebleu", "sklearn", "safetensors", "transformers")


def test_tests_marked_gpu_are_collected_on_a_machine_with_few_packages(script):
    code = f"""
    import sys
    for name in {ABSENT!r}:
        sys.modules[name] = None
    import pytest
    sys.exit(pytest.main(["--collect-only", "-q", "-m", "gpu", "-p", "no:cacheprovider", *sys.argv[1:]]))
    """
    command = [sys.executable, "-c", textwrap.dedent(code), *script.gpu_tests()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    collected = {line.split(":")[0] for line in done.stdout.splitlines() if line.startswith("tests")}
    assert collected == set(script.gpu_tests()) and collected


# --- cases


class Training(TorchFunctionMode):
    """`train` of each recurrent call: cuDNN has no gradients without."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in ("lstm", "gru", "rnn_tanh", "rnn_relu"):
            packed = isinstance(args[3], list | tuple)
            self.found.append(args[7 if packed else 6])
        return func(*args, **(kwargs or {}))


def test_recurrent_cases_are_in_training(monkeypatch):
    with Training() as calls:
        for case in testing.cases("rnn"):
            case.theirs(*[x.float() for x in case.inputs()])
        for op in (op for op, family in shapes.FAMILIES.items() if family == "rnn"):
            shape = Shape(op, batch=4, channels=8, out_channels=8, steps=3)
            case = cases.build(shape, torch.float32, "", "cpu", training=True)
            case.theirs(*case.inputs)
    assert len(calls.found) == len(testing.cases("rnn")) + 5 and all(found is True for found in calls.found)


def test_headline_problems_meet_every_family_of_kernels(script):
    assert {shape.family for shape in shapes.load("gpu")} == set(script.FAMILIES)

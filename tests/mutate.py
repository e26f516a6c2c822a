"""`make mutate`: applies each mutant to a copy of the sources, rebuilds what it touches, and runs the tests it names.

A mutant that survives fails the run. Results go to tests/mutants/results.json, a row a mutant, as soon as it is known:
an interrupted run loses nothing and runs of parts add up. DLKERN_ISAS=avx512 makes a rebuild short.
    python tests/mutate.py [--only SUBSTRING] [--missing] [--results FILE]
"""

from __future__ import annotations

import argparse
import filecmp
import importlib
import json
import os
import pkgutil
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COPY = ROOT / "build" / "mutants"
IGNORED = shutil.ignore_patterns(
    ".git", ".venv", "build", "report", "__pycache__", "*.egg-info", ".hypothesis", "results", "*.so"
)


def mutants(only: str) -> list[dict]:
    sys.path.insert(0, str(ROOT / "tests"))
    import mutants as package

    found = []
    for module in pkgutil.iter_modules(package.__path__):
        for number, mutant in enumerate(importlib.import_module(f"mutants.{module.name}").MUTANTS):
            found.append({"name": f"{module.name}-{number}", **mutant})
    return [m for m in found if only in m["name"] or only in m["file"]]


def key(mutant: dict) -> tuple:
    return mutant["file"], mutant["old"], mutant["new"]


def recorded(path: Path) -> dict[tuple, dict]:
    return {key(row): row for row in json.loads(path.read_text())} if path.exists() else {}


def record(path: Path, row: dict) -> None:
    """Puts the row into the results, in the mutants' order; rows of mutants that are no more go."""
    rows = recorded(path)
    rows[key(row)] = row
    everything = mutants("")
    known = [{**rows[key(m)], "name": m["name"]} for m in everything if key(m) in rows]
    path.write_text(json.dumps(known, indent=1) + "\n")


def copy_changed(source: str, target: str) -> None:
    """Copies what differs, dated now: what an interrupted run left mutated is compiled again, and nothing else."""
    if not os.path.exists(target) or not filecmp.cmp(source, target, shallow=False):
        shutil.copy(source, target)


def build(kind: str) -> bool:
    if not kind:
        return True
    arguments = ["build_ext", "--inplace"] if kind == "native" else ["build_native", "--variant", kind]
    environment = {**os.environ, "DLKERN_CUDA": "0"}
    result = subprocess.run([sys.executable, "setup.py", "-q", *arguments], cwd=COPY, env=environment, capture_output=True)
    return result.returncode == 0


def run_tests(arguments: list[str]) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(COPY), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, cwd=COPY, env=environment, capture_output=True, text=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="")
    parser.add_argument("--missing", action="store_true", help="those the results do not have")
    parser.add_argument("--results", type=Path, default=ROOT / "tests" / "mutants" / "results.json")
    options = parser.parse_args()
    known = recorded(options.results) if options.missing else {}
    chosen = [m for m in mutants(options.only) if key(m) not in known]
    COPY.mkdir(parents=True, exist_ok=True)
    for old in COPY.rglob("*"):  # what is gone from the sources; links, which are made anew; not what was built here
        inside = old.relative_to(COPY)
        built = inside.parts[0] == "build" or old.suffix == ".so"
        if not built and (old.is_symlink() or (old.is_file() and not (ROOT / inside).exists())):
            old.unlink()
    shutil.copytree(ROOT, COPY, symlinks=True, dirs_exist_ok=True, ignore=IGNORED, copy_function=copy_changed)
    for kind in sorted({m["build"] for m in chosen}):
        if not build(kind):
            sys.exit(f"the unchanged sources do not build ({kind})")
    rows = []
    for selection in {tuple(m["tests"]) for m in chosen}:
        result = run_tests(list(selection))
        if result.returncode != 0:
            sys.exit(f"the unchanged sources fail {' '.join(selection)}:\n{result.stdout[-2000:]}")
    for mutant in chosen:
        started = time.time()
        path = COPY / mutant["file"]
        source = path.read_text()
        if source.count(mutant["old"]) != 1:
            outcome = f"stale: its text occurs {source.count(mutant['old'])} times"
        else:
            path.write_text(source.replace(mutant["old"], mutant["new"]))
            try:
                if not build(mutant["build"]):
                    outcome = "stale: does not compile"
                else:
                    result = run_tests(mutant["tests"])
                    # 1: tests failed. Anything else (no test ran, a crash of pytest) proves nothing, but a crash of
                    # the process by a signal is as loud as a failure.
                    outcome = "killed" if result.returncode == 1 or result.returncode < 0 else "SURVIVED"
            finally:
                path.write_text(source)
        rows.append({k: mutant[k] for k in ("name", "file", "old", "new")} | {"outcome": outcome})
        record(options.results, rows[-1])
        print(f"{mutant['name']:24s} {outcome:10s} {time.time() - started:5.1f} s  {mutant['file']}", flush=True)
    for kind in sorted({m["build"] for m in chosen}):
        build(kind)
    alive = [row for row in rows if row["outcome"] != "killed"]
    print(f"{len(rows) - len(alive)} of {len(rows)} mutants killed")
    return 1 if alive or not rows else 0


if __name__ == "__main__":
    sys.exit(main())

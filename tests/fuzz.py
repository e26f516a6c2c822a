"""tests/test_fuzz.py with many examples, one op after another; what came out is tests/fuzz_results.json.

    python tests/fuzz.py [OP ...] [--examples 2000]
    python tests/fuzz.py --column cuda [OP ...]       200 on the CUDA column's kernels, built for the host with
                                                      AddressSanitizer and UBSan

An op's record is replaced when it is run again, and says which commit it was run on.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import sanitizers

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "tests" / "fuzz_results.json"


def commit() -> str:
    """The commit, with "+" where tracked files differ from it."""
    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", "csrc", "dlkern", "kernels", "setup.py")
    return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")


def cuda_column() -> dict[str, str]:
    """Builds the CUDA column for the host under the sanitizers; what a process needs to run it."""
    command = [sys.executable, "setup.py", "-q", "build_native", "--variant", "cuda_on_host_asan"]
    subprocess.run(command, cwd=ROOT, check=True)
    return {"DLKERN_FUZZ_COLUMN": "cuda", "DLKERN_CUDA_ON_HOST": "asan", **sanitizers.environment()}


def run(op: str, examples: int, settings: dict[str, str]) -> dict[str, object]:
    began = time.monotonic()
    # One thread: such small problems use no more, and some of torch's ops wake the others all the same.
    environment = {"OMP_NUM_THREADS": "1", **os.environ, **settings, "DLKERN_FUZZ_EXAMPLES": str(examples)}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "tests/test_fuzz.py", "-q", "-k", f"test_{op}", "-p", "no:cacheprovider"],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )
    record: dict[str, object] = {
        "examples": examples, "outcome": "passed" if done.returncode == 0 else "failed", "commit": commit(),
        "seconds": round(time.monotonic() - began),
    }
    if done.returncode:
        # What pytest says of the exception, a bare assert's too; below it stand the arguments, pages of them.
        errors = [line[:400] for line in done.stdout.splitlines() if re.match(r"^(E  |    \| +(\w*Error|assert|Row))", line)]
        killed = [f"stopped by signal {-done.returncode}"] if done.returncode < 0 else []
        record["failure"] = killed + (errors[:12] or (done.stdout + done.stderr).splitlines()[-12:])
    return record


def main() -> int:
    ops = re.findall(r"^def test_(\w+)\(", (ROOT / "tests" / "test_fuzz.py").read_text(), re.MULTILINE)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ops", nargs="*", metavar="OP", help=", ".join(ops))
    parser.add_argument("--column", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--examples", type=int, help="2,000; 200 on the CUDA column")
    arguments = parser.parse_args()
    on_cuda = arguments.column == "cuda"
    examples = arguments.examples or (200 if on_cuda else 2000)
    settings = cuda_column() if on_cuda else {}
    unknown = set(arguments.ops) - set(ops)
    if unknown:
        parser.error(f"no test of {', '.join(sorted(unknown))}")
    failed = 0
    for op in arguments.ops or ops:
        record = run(op, examples, settings)
        failed += record["outcome"] != "passed"
        print(f"{op}: {record['outcome']} ({examples} examples, {record['seconds']} s)", flush=True)
        results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        results[f"{op}, cuda" if on_cuda else op] = record
        RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

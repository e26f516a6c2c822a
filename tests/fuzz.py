"""tests/test_fuzz.py with many examples, one op after another; what came out is tests/fuzz_results.json.

    python tests/fuzz.py [OP ...] [--examples 2000]

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

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "tests" / "fuzz_results.json"


def commit() -> str:
    """The commit, with "+" where tracked files differ from it."""
    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", "csrc", "dlkern", "kernels", "setup.py")
    return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")


def run(op: str, examples: int) -> dict[str, object]:
    began = time.monotonic()
    # One thread: such small problems use no more, and some of torch's ops wake the others all the same.
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "DLKERN_FUZZ_EXAMPLES": str(examples)}
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
    parser.add_argument("--examples", type=int, default=2000)
    arguments = parser.parse_args()
    unknown = set(arguments.ops) - set(ops)
    if unknown:
        parser.error(f"no test of {', '.join(sorted(unknown))}")
    failed = 0
    for op in arguments.ops or ops:
        record = run(op, arguments.examples)
        failed += record["outcome"] != "passed"
        print(f"{op}: {record['outcome']} ({arguments.examples} examples, {record['seconds']} s)", flush=True)
        results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        RESULTS.write_text(json.dumps({**results, op: record}, indent=1, sort_keys=True) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env bash
# The proof on a real GPU: bench/gpu.sh [STAGE …] on a machine with python3, torch and a GPU; nothing is downloaded.
# No stage: build, a sample of parity, the headline rows and a short summary, in under nine minutes.
# Stages: build, parity, sanitize, bench FAMILY, tune, profile, facts; `bench/gpu.sh --help` lists the options.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [[ -z "${PYTHON:-}" ]]; then
  PYTHON=python3
  [[ -x .venv/bin/python ]] && PYTHON=.venv/bin/python
fi
export PYTHONUNBUFFERED=1
exec "$PYTHON" bench/gpu.py "$@"

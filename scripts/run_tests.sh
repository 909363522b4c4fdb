#!/usr/bin/env bash
# All checks, the quick ones first: formatting, lint, types, then the tests. On the CPU alone.
# Arguments go to pytest, e.g. bash scripts/run_tests.sh tests/test_search.py -k threshold
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

source scripts/setup_env.sh test
export JAX_PLATFORMS=cpu
export PYRIGHT_PYTHON_IGNORE_WARNINGS=1 # do not ask the network for a newer version

"$PYTHON" -m ruff format --check .
"$PYTHON" -m ruff check .
"$PYTHON" -m pyright --pythonpath "$PYTHON"
exec "$PYTHON" -m pytest "$@"

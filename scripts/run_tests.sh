#!/usr/bin/env bash
# Checks the project on the CPU.
#   bash scripts/run_tests.sh                      formatting, lint, types, then all tests but the slow ones, in two processes
#   bash scripts/run_tests.sh --extras             the slow tests too (other hosts, meshes and hardware, kills), and those of
#                                                  optional packages, which it installs; what CI runs
#   bash scripts/run_tests.sh --quick              formatting, lint, and the tests that compile little; two minutes
#   bash scripts/run_tests.sh tests/search -k fix  only these tests; all arguments go to pytest
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

for flag in "$@"; do
    if [[ "$flag" == --help || "$flag" == -h ]]; then # ours, not pytest's
        sed -n '2,/^set /s/^# //p' scripts/run_tests.sh
        exit
    fi
done
source scripts/setup_env.sh test
export JAX_PLATFORMS=cpu
export PYRIGHT_PYTHON_IGNORE_WARNINGS=1 # do not ask the network for a newer version

install_extras() {
    "$PYTHON" -c 'import datasets, decord, duckdb, gradio, ipykernel, nbclient, nbformat, playwright, polars, ray' 2>/dev/null && return
    echo "elastic: installing requirements-extras.txt ..." >&2
    "$PYTHON" -m pip install --quiet --disable-pip-version-check -r requirements-extras.txt ||
        echo "elastic: they could not be installed; the tests that need them say so and are left out." >&2
}

processes=(-n 2 --dist=worksteal) # much of the tests' time is compiling, which uses one core
quick=(
    tests/test_*.py tests/checkpoints tests/cli tests/io tests/media tests/report tests/search tests/tokens
    tests/data/test_dataset.py tests/data/test_packing.py tests/distributed/test_cpu_devices.py
    tests/distributed/test_mesh.py tests/distributed/test_ring_topology.py tests/metrics/test_image.py
    tests/model/test_bottleneck.py tests/model/test_token_masks.py
)

apart=(tests/cli/test_demo.py tests/acceptance/test_notebook.py tests/pipeline/test_ray.py)

if [[ $# -gt 0 && "$1" != --quick && "$1" != --extras ]]; then
    exec "$PYTHON" -m pytest "$@"
fi
"$PYTHON" -m ruff format --check .
"$PYTHON" -m ruff check .
if [[ "${1:-}" == --quick ]]; then
    exec "$PYTHON" -m pytest "${processes[@]}" -m "not slow" "${quick[@]}" "${@:2}"
fi
check_types=("$PYTHON" -m pyright --pythonpath "$PYTHON")
if [[ "${1:-}" != --extras ]]; then
    "${check_types[@]}"
    exec "$PYTHON" -m pytest "${processes[@]}" -m "not slow"
fi
# Types are checked while packages are installed.
said="$(mktemp)" failed=0
"${check_types[@]}" >"$said" 2>&1 &
types=$!
install_extras
wait "$types" || failed=1
cat "$said"
rm "$said"
"$PYTHON" -m pytest "${processes[@]}" "${apart[@]/#/--ignore=}" "${@:2}" || failed=1
# Browser, notebook and Ray have a process of their own: their libraries leave sockets open, which here is an error.
"$PYTHON" -m pytest -W default "${apart[@]}" || failed=1
exit "$failed"

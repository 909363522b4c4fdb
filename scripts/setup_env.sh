# Sourced by the wrappers, from the project's folder: `source scripts/setup_env.sh run` (or `test`)
# sets PYTHON to an interpreter that has what is needed, making .venv where none has.
# ELASTIC_PYTHON names the interpreter to start from; else python3 and its likes on the PATH are
# tried, an active environment first. It is used as it is when it has everything.
# shellcheck shell=bash

find_python() {
    local purpose="$1" candidate status rejected="" candidates=()
    if [[ -n "${ELASTIC_PYTHON:-}" ]]; then
        candidates=("$ELASTIC_PYTHON")
    else
        candidates=(python3 python python3.14 python3.13 python3.12 python3.11 .venv/bin/python)
    fi
    for candidate in "${candidates[@]}"; do
        if ! command -v "$candidate" >/dev/null; then
            [[ -z "${ELASTIC_PYTHON:-}" ]] || rejected="$rejected $candidate (not found)"
            continue
        fi
        # A name on the PATH may be an old Python, or a shim with none behind it.
        if ! "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            rejected="$rejected $candidate (too old, or does not start)"
            continue
        fi
        status=0
        PYTHON="$("$candidate" -P scripts/prepare_env.py "$purpose")" || status=$?
        [[ $status -eq 11 ]] && continue # this one cannot make environments, another may
        return "$status"
    done
    {
        echo "elastic: no usable Python found (3.11 or newer, with the modules venv and ensurepip)."
        [[ -z "$rejected" ]] || echo "elastic: tried:$rejected"
        echo "elastic: install one (Debian, Ubuntu: apt install python3 python3-venv), activate an" \
            "environment that has it, or name it: ELASTIC_PYTHON=/path/to/python3.12 bash $0"
    } >&2
    return 1
}

find_python "${1:?source scripts/setup_env.sh run|test}" || exit
# Our own environment is for the CPU: the TPU compiler that the tests install in it must not make JAX look for a TPU.
[[ "$PYTHON" != "$PWD/.venv/bin/python" ]] || export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

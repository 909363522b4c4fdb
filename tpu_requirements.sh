#!/bin/sh
# Prepares a TPU VM: sh tpu_requirements.sh
# Installs into the active environment (make one first: python3 -m venv .venv && . .venv/bin/activate).
# On a pod, run it on every host. PYTHON names another interpreter than python3.
set -eu
cd "$(dirname "$0")"
python="${PYTHON:-python3}"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "tpu_requirements.sh: $python is older than Python 3.11; set PYTHON to a newer one." >&2
    exit 1
}
"$python" -m pip install -r requirements.txt "jax[tpu]==0.10.2"
"$python" -c 'import jax; print("JAX", jax.__version__, "sees", jax.devices())'

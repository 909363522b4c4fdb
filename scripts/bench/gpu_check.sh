#!/usr/bin/env bash
# Checks and measures one GPU in under five minutes: every attention kernel beside the reference, tokenizing, a training step, and
# attention beside that of other libraries. Writes gpu_check.json and gpu_check.md into output_folder.
#
#   bash scripts/bench/gpu_check.sh
#   bash scripts/bench/gpu_check.sh --toy      # the same at toy sizes on the CPU, with interpreted kernels: a minute
#
# Further flags go to scripts/bench/gpu_check.py (--help lists them). Paths are relative to the project's folder.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

# --- Fill in here, or set in the environment -----------------------------------------------------
# Where the results go; made if need be.
output_folder="${output_folder:-outputs/gpu_check}"
# -------------------------------------------------------------------------------------------------

source scripts/setup_env.sh run

exec "$PYTHON" -u scripts/bench/gpu_check.py --output_folder="$output_folder" "$@"

#!/usr/bin/env bash
# Turns a token file back into video, without the original.
#
#   bash scripts/run_decode.sh
#   input_path=out/tokens.npz output_path=out/again.mp4 bash scripts/run_decode.sh
#
# Further flags go to scripts/decode.py (--help lists them); a released model needs those of its
# settings, --load_elastic_config and --update_elastic_config. Paths are relative to
# where one stands.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_paths.sh"

if [[ -n "${tokens_path:-}" && -z "${input_path:-}" ]]; then
    echo "run_decode.sh: the variable tokens_path is called input_path now; both are understood." >&2
    input_path="$tokens_path"
fi
read_paths input_path checkpoint_path
written_paths output_path

# --- Fill in here, or set in the environment -----------------------------------------------------
# The token file, as scripts/run_inference_fsq.sh writes it.
input_path="${input_path:-outputs/fsq/tokens.npz}"
# The video, or the picture, to write; empty: decoded.mp4 or decoded.png beside the token file.
output_path="${output_path:-}"
# The model that made the tokens, another one is refused; empty: the one that the token file names.
checkpoint_path="${checkpoint_path:-}"
# -------------------------------------------------------------------------------------------------

check_variables run_decode.sh input_path tokens_path output_path checkpoint_path
flags_from_here "$@"
source scripts/setup_env.sh run

exec "$PYTHON" -u scripts/decode.py \
    --input_path="$input_path" \
    ${output_path:+--output_path="$output_path"} \
    ${checkpoint_path:+--load_checkpoint="$checkpoint_path"} \
    "${flags[@]+"${flags[@]}"}"

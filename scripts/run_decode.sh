#!/usr/bin/env bash
# Turns a token file back into video, without the original.
#
#   bash scripts/run_decode.sh
#   tokens_path=out/tokens.npz output_path=out/again.mp4 bash scripts/run_decode.sh
#
# Further flags go to scripts/decode.py (--help lists them); a released model needs those of its
# settings, --load_elastic_config and --update_elastic_config. Paths are relative to the project's
# folder.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# --- Fill in here, or set in the environment -----------------------------------------------------
# The token file, as scripts/run_inference_fsq.sh writes it.
tokens_path="${tokens_path:-outputs/fsq/tokens.npz}"
# The video to write.
output_path="${output_path:-outputs/fsq/decoded.mp4}"
# The model that made the tokens; another one is refused.
checkpoint_path="${checkpoint_path:-example/fsq}"
# -------------------------------------------------------------------------------------------------

source scripts/setup_env.sh run

exec "$PYTHON" -u scripts/decode.py \
    --input_path="$tokens_path" \
    --output_path="$output_path" \
    --load_checkpoint="$checkpoint_path" \
    "$@"

#!/usr/bin/env bash
# Tokenizes an image or a video into the same number of tokens in every block, with either model:
# what the elastic count is compared against.
#
#   bash scripts/run_inference_fixed.sh
#   bottleneck=vae n_codes=128 bash scripts/run_inference_fixed.sh
#
# Further flags go to scripts/inference.py, as in the wrapper of that model, which does the rest.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_paths.sh"

read_paths checkpoint_path input_path
written_paths output_folder
# --- Fill in here, or set in the environment -----------------------------------------------------
# The model: fsq or vae.
bottleneck="${bottleneck:-fsq}"
# Its checkpoint, as in scripts/run_inference_fsq.sh; empty: the small model.
export checkpoint_path="${checkpoint_path:-}"
# How many tokens every block keeps.
n_codes="${n_codes:-256}"
# The image or video to tokenize, and where the results go.
export input_path="${input_path:-example/video.mp4}"
export output_folder="${output_folder:-outputs/${bottleneck}_fixed}"
# -------------------------------------------------------------------------------------------------
case "$bottleneck" in
    fsq | vae) ;;
    *)
        echo "run_inference_fixed.sh: bottleneck='$bottleneck' must be fsq or vae." >&2
        exit 1
        ;;
esac

exec bash scripts/run_inference.sh "$bottleneck" --search_alg=fixed --n_codes="$n_codes" "$@"

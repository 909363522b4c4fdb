#!/usr/bin/env bash
# Tokenizes a folder of images and videos into shards: Parquet, one row a clip. Stopped or killed, the same command goes
# on from there.
#
#   input_path=clips output_folder=shards bash scripts/run_tokenize_dataset.sh
#   num_processes=8 process_id=3 ... bash scripts/run_tokenize_dataset.sh   # one of eight, on any hosts that share the folders
#
# Further flags go to scripts/tokenize_dataset.py (--help lists them); a flag given twice counts as given last. Paths are
# relative to where one stands.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_paths.sh"

read_paths checkpoint_path input_path
written_paths output_folder
# --- Fill in here, or set in the environment -----------------------------------------------------
# The model, in any form of --load_checkpoint of inference; one without a config.json beside it also needs the flags
# --load_elastic_config and --update_elastic_config.
checkpoint_path="${checkpoint_path:-example/fsq}"
# A folder of images and videos, or a list of them (.txt).
input_path="${input_path:-example}"
# Where the shards go; made if need be.
output_folder="${output_folder:-outputs/dataset}"
# Largest error of a block: mean square, pixels in [-1, 1]; empty: the one that the model recommends. Another target among
# the flags, such as --n_codes=256, takes its place.
threshold="${threshold:-}"
# How many processes share the files, and which one this is.
num_processes="${num_processes:-1}"
process_id="${process_id:-0}"
# -------------------------------------------------------------------------------------------------

for flag in "$@"; do
    case "$flag" in
        --psnr* | --n_codes* | --avg_tokens* | --bitrate*) threshold="" ;; # the target that is asked for
    esac
done
check_variables run_tokenize_dataset.sh checkpoint_path input_path output_folder threshold num_processes process_id
flags_from_here "$@"
source scripts/setup_env.sh run

exec "$PYTHON" -u scripts/tokenize_dataset.py \
    --input_path="$input_path" \
    --output_folder="$output_folder" \
    --load_checkpoint="$checkpoint_path" \
    ${threshold:+--threshold="$threshold"} \
    --jax_distributed.num_processes="$num_processes" \
    --jax_distributed.process_id="$process_id" \
    "${flags[@]+"${flags[@]}"}"

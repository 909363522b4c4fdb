#!/usr/bin/env bash
# Measures models on a folder of clips, side by side, and writes into output_folder: summary.csv, blocks.csv,
# curves.csv, evaluation.json, and the plot of blocks that meet a threshold, and of quality, against tokens.
#
#   bash scripts/run_evaluate.sh
#   models="elastic=OUT/a/pretrained,half=OUT/b/pretrained" input_path=clips bash scripts/run_evaluate.sh --searches=binary,linear
#
# Further flags go to scripts/evaluate.py (--help lists them); a flag given twice counts as given
# last. Paths are relative to where one stands.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_paths.sh"

read_paths input_path
written_paths output_folder
# --- Fill in here, or set in the environment -----------------------------------------------------
# The models: NAME=MODEL, separated by commas; a MODEL accepts every form of --load_checkpoint. One that was
# trained with mask_type='fixed_0.5' is measured at its own count.
models="${models:-example/fsq}"
# The images and videos to measure on: a folder, or one file. They should not have been trained on.
input_path="${input_path:-example/video.mp4}"
# Where the results go; made if need be.
output_folder="${output_folder:-outputs/evaluation}"
# Largest errors of a block: mean squares, pixels in [-1, 1], such as 0.02,0.01; usual: those that the first model recommends.
thresholds="${thresholds:-usual}"
# Frames taken of each clip, its first ones; 0: all.
max_frames="${max_frames:-48}"
# -------------------------------------------------------------------------------------------------

check_variables run_evaluate.sh models input_path output_folder thresholds max_frames
flags_from_here "$@"
source scripts/setup_env.sh run

exec "$PYTHON" -u scripts/evaluate.py \
    --models="$models" \
    --input_path="$input_path" \
    --output_folder="$output_folder" \
    --thresholds="$thresholds" \
    --max_frames="$max_frames" \
    --mesh_dim='!1,1,-1,1' \
    --dtype='fp32' \
    "${flags[@]+"${flags[@]}"}"

#!/usr/bin/env bash
# Tokenizes an image or a video with the discrete (FSQ) model and writes, into output_folder: the
# token file, report.json, the reconstruction beside the original, and a plot.
#
#   bash scripts/run_inference_fsq.sh
#   input_path=clip.mp4 output_folder=out bash scripts/run_inference_fsq.sh --threshold=0.006
#   checkpoint_path=OUT/pretrained bash scripts/run_inference_fsq.sh    # a model trained here
#
# Further flags go to scripts/inference.py (--help lists them); a flag given twice counts as given
# last. Paths are relative to the project's folder.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# --- Fill in here, or set in the environment -----------------------------------------------------
# The model:
# - the file `params` downloaded from https://huggingface.co/LargeWorldModel/ElasticTok-FSQ, with or
#   without "params::" before it, or LargeWorldModel/ElasticTok-FSQ, which downloads it;
# - a folder with a config.json, such as example/fsq or the folder pretrained/ of a training run:
#   it says how its model is built, all others are built as the released one;
# - whatever else --load_checkpoint takes, such as "trainstate_params::OUT/streaming_train_state".
checkpoint_path="${checkpoint_path:-example/fsq}"
# The image or video to tokenize.
input_path="${input_path:-example/video.mp4}"
# Where the results go; made if need be.
output_folder="${output_folder:-example/outputs_fsq}"
# -------------------------------------------------------------------------------------------------

source scripts/setup_env.sh run

threshold=0.003
# The small model's error at full length is higher.
[[ "${checkpoint_path%/}" != example/fsq ]] || threshold=0.02
settings=()
if [[ ! -f "$checkpoint_path/config.json" ]]; then
    settings=(
        --max_blocks_per_chunk=4
        --load_elastic_config='200m'
        --update_elastic_config="dict(mask_type='elastic',min_toks=256,max_toks=4096,frames_per_block=4,patch_size=(1,8,8),bottleneck_type='fsq',fsq_quant_levels=(8,8,8,5,5,5),theta=50000000,max_sequence_length=16384,use_flash_attention=True,scan_attention=True,scan_query_chunk_size=512,scan_key_chunk_size=512,remat_attention='',scan_mlp=True,scan_mlp_chunk_size=8192,remat_mlp='nothing_saveable',remat_block='',scan_layers=True)"
    )
fi
# Only what is a file: a prefix would keep anything else from being found, and a typo from being named.
[[ ! -f "$checkpoint_path" ]] || checkpoint_path="params::$checkpoint_path"

exec "$PYTHON" -u scripts/inference.py \
    --input_path="$input_path" \
    --output_folder="$output_folder" \
    --mesh_dim='!1,1,-1,1' \
    --dtype='fp32' \
    --threshold="$threshold" \
    ${settings[@]+"${settings[@]}"} \
    --load_checkpoint="$checkpoint_path" \
    "$@"

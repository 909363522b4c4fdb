#!/usr/bin/env bash
# Tokenizes an image or a video with the discrete (FSQ) model and writes, into output_folder: the
# token file, report.json, the reconstruction beside the original, and a plot.
#
#   bash scripts/run_inference_fsq.sh
#   input_path=clip.mp4 output_folder=out bash scripts/run_inference_fsq.sh --threshold=0.006
#
# Further flags go to scripts/inference.py (--help lists them); a flag given twice counts as given
# last. Paths are relative to the project's folder.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# --- Fill in here, or set in the environment -----------------------------------------------------
# The file `params` downloaded from https://huggingface.co/LargeWorldModel/ElasticTok-FSQ, with or
# without "params::" before it. A model trained here with the same settings is
# "trainstate_params::FOLDER/streaming_train_state". Empty: the small model in example/fsq.
checkpoint_path="${checkpoint_path:-}"
# The image or video to tokenize.
input_path="${input_path:-example/video.mp4}"
# Where the results go; made if need be.
output_folder="${output_folder:-example/outputs_fsq}"
# -------------------------------------------------------------------------------------------------

source scripts/setup_env.sh run

if [[ -z "$checkpoint_path" ]]; then
    # The small model's folder says how it is built; its error at full length is higher.
    model=(
        --threshold=0.02
        --load_checkpoint=example/fsq
    )
else
    [[ "$checkpoint_path" == *::* ]] || checkpoint_path="params::$checkpoint_path"
    model=(
        --threshold=0.003
        --max_blocks_per_chunk=4
        --load_elastic_config='200m'
        --update_elastic_config="dict(mask_mode='elastic',min_toks=256,max_toks=4096,frames_per_block=4,patch_size=(1,8,8),bottleneck_type='fsq',fsq_quant_levels=(8,8,8,5,5,5),theta=50000000,max_sequence_length=16384,use_flash_attention=True,scan_attention=True,scan_query_chunk_size=512,scan_key_chunk_size=512,remat_attention='',scan_mlp=True,scan_mlp_chunk_size=8192,remat_mlp='nothing_saveable',remat_block='',scan_layers=True)"
        --load_checkpoint="$checkpoint_path"
    )
fi

exec "$PYTHON" -u scripts/inference.py \
    --input_path="$input_path" \
    --output_folder="$output_folder" \
    --mesh_dim='!1,1,-1,1' \
    --dtype='fp32' \
    "${model[@]}" \
    "$@"

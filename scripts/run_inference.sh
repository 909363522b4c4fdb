#!/usr/bin/env bash
# Tokenizes an image or a video and writes, into output_folder: the token file, report.json, the reconstruction beside
# the original, and a plot.
#
#   bash scripts/run_inference.sh MODEL    # MODEL: fsq (discrete) or vae (continuous)
#   input_path=clip.mp4 output_folder=out bash scripts/run_inference.sh vae --threshold=0.006
#
# scripts/run_inference_fsq.sh and scripts/run_inference_vae.sh call this script and explain its variables at their top.
# Further flags go to scripts/inference.py (--help lists them); a flag given twice counts as given last. Paths are
# relative to where one stands.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_paths.sh"

case "${1:-}" in
    fsq)
        release="dict(mask_type='elastic',min_toks=256,max_toks=4096,frames_per_block=4,patch_size=(1,8,8),bottleneck_type='fsq',fsq_quant_levels=(8,8,8,5,5,5),theta=50000000,max_sequence_length=16384,use_flash_attention=True,scan_attention=True,scan_query_chunk_size=512,scan_key_chunk_size=512,remat_attention='',scan_mlp=True,scan_mlp_chunk_size=8192,remat_mlp='nothing_saveable',remat_block='',scan_layers=True)"
        ;;
    vae)
        release="dict(mask_type='elastic',min_toks=128,max_toks=2048,frames_per_block=4,patch_size=(2,8,8),bottleneck_type='vae',vae_bottleneck_dim=8,theta=5000000,max_sequence_length=8192,use_flash_attention=True,scan_attention=True,scan_query_chunk_size=512,scan_key_chunk_size=512,remat_attention='',scan_mlp=True,scan_mlp_chunk_size=8192,remat_mlp='nothing_saveable',remat_block='',scan_layers=True)"
        ;;
    -h | --help)
        sed -n '2,/^set /s/^# \{0,1\}//p' scripts/run_inference.sh
        printf '\n%s\n' "Its flags: bash scripts/run_inference.sh fsq --help"
        exit
        ;;
    *)
        echo "run_inference.sh: the model '${1:-}' must be fsq or vae, as the first argument:" \
            "bash scripts/run_inference.sh fsq" >&2
        exit 1
        ;;
esac
model="$1"
shift

read_paths checkpoint_path input_path
written_paths output_folder
# --- Fill in here, or set in the environment -----------------------------------------------------
# The model's checkpoint, written as in scripts/run_inference_fsq.sh.
checkpoint_path="${checkpoint_path:-example/$model}"
# The image or video to tokenize.
input_path="${input_path:-example/video.mp4}"
# Where the results go; made if need be.
output_folder="${output_folder:-outputs/$model}"
# Largest error of a block: mean square, pixels in [-1, 1]; empty: the one that the model recommends. Another target among the flags,
# such as --psnr=25, takes its place.
threshold="${threshold:-}"
# -------------------------------------------------------------------------------------------------

check_variables run_inference.sh checkpoint_path input_path output_folder threshold bottleneck n_codes
flags_from_here "$@"
source scripts/setup_env.sh run

for flag in "$@"; do
    case "$flag" in
        --psnr* | --n_codes* | --avg_tokens* | --bitrate*) threshold="" ;; # the target that is asked for
    esac
done
settings=()
weights="${checkpoint_path##*::}" # without a prefix such as params::
folder="$weights"
[[ ! -f "$weights" ]] || folder="$(dirname "$weights")"
if [[ ! -f "$folder/config.json" && "$weights" != small-* ]]; then # else config.json describes the model
    settings=(--max_blocks_per_chunk=4 --load_elastic_config='200m' --update_elastic_config="$release")
fi
# "params::" only before a file of that name: other files are recognised by their content, and before a folder or a name
# that is not there it would keep a typo from being reported.
[[ ! -f "$checkpoint_path" || "${checkpoint_path##*/}" != params ]] || checkpoint_path="params::$checkpoint_path"

exec "$PYTHON" -u scripts/inference.py \
    --input_path="$input_path" \
    --output_folder="$output_folder" \
    --mesh_dim='!1,1,-1,1' \
    --dtype='fp32' \
    ${threshold:+--threshold="$threshold"} \
    ${settings[@]+"${settings[@]}"} \
    --load_checkpoint="$checkpoint_path" \
    "${flags[@]+"${flags[@]}"}"

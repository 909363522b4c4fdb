#!/usr/bin/env bash
# Trains a model like those in example/, from the data to the numbers of its card: a linear codec, small pieces, whole
# frames, then the order of tokens, the search's first guesses, and the measurements on files that nothing was trained on.
#
#   dataset_path=train report_path=held_out bash scripts/tools/train_shipped.sh
#   model=vae steps="20000 5000" batch_size=64 dtype=bf16 dataset_path=train report_path=held_out bash scripts/tools/train_shipped.sh
#
# Stopped or killed, the same command goes on from there. Nothing in example/ changes: the model is in output_dir/ordered,
# its measurements are in output_dir/evaluation. Paths are relative to where one stands.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../setup_paths.sh"

read_paths dataset_path report_path curve_path start
written_paths output_dir
# --- Fill in here, or set in the environment -----------------------------------------------------
# fsq (discrete) or vae (continuous).
model="${model:-fsq}"
# Images and videos to train on, and others to measure on.
dataset_path="${dataset_path:-}"
report_path="${report_path:-}"
# Of the former some hundred to fit the order and the search's first guesses on, because a block of each is measured at many counts;
# empty: all.
curve_path="${curve_path:-}"
# Where everything goes.
output_dir="${output_dir:-outputs/shipped-$model}"
# The weights to begin with; empty: a linear transform codec of the data.
start="${start:-}"
# Steps on pieces of 64 x 64 pixels, which cost little, and on whole frames of 128 x 128.
steps="${steps:-300 10}"
# Sequences of two blocks in a step of pieces; the highest and the last rate, and the highest of the layers' matrices; what the
# model computes in.
batch_size="${batch_size:-2}"
lr="${lr:-1e-6}"
end_lr="${end_lr:-1e-8}"
matrix_lr="${matrix_lr:-5e-4}"
dtype="${dtype:-fp32}"
# Devices along dp, fsdp, tp, sp; processes that decode; the type that the weights are stored in.
mesh_dim="${mesh_dim:-!1,1,-1,1}"
workers="${workers:-2}"
float_dtype="${float_dtype:-bf16}"
# -------------------------------------------------------------------------------------------------

case "$model" in
    fsq)
        pieces="max_toks=1024,min_toks=64,max_sequence_length=2048"
        whole="max_toks=4096,min_toks=256,max_sequence_length=8192"
        blocks_per_clip=1
        ;;
    vae)
        pieces="max_toks=128,min_toks=8,max_sequence_length=256"
        whole="max_toks=512,min_toks=32,max_sequence_length=1024"
        blocks_per_clip=2
        ;;
    *)
        echo "train_shipped.sh: model='$model' must be fsq or vae." >&2
        exit 1
        ;;
esac
for name in dataset_path report_path; do
    if [[ -z "${!name}" ]]; then
        echo "train_shipped.sh: $name is empty; set it to a folder of images and videos, in the environment." >&2
        exit 1
    fi
done
read -r steps_of_pieces steps_of_frames <<<"$steps"
check_variables train_shipped.sh model dataset_path report_path curve_path output_dir start steps batch_size lr end_lr matrix_lr dtype mesh_dim workers float_dtype

source scripts/setup_env.sh run
if [[ -z "$start" ]]; then
    start="$output_dir/start"
    [[ -f "$start/model.safetensors" ]] ||
        "$PYTHON" scripts/tools/linear_start.py --input_path="$dataset_path" --load_elastic_config="small-$model" --output_folder="$start"
fi

train() { # FOLDER START STEPS BATCH OPTIONS RATE RATE_OF_MATRICES FLOAT_DTYPE FLAGS...
    local flags=("${@:9}")
    echo "train_shipped.sh: $3 steps, $5" >&2
    dataset_path="$dataset_path" output_dir="$output_dir/$1" preset="small-$model" total_steps="$3" lr="$6" end_lr="$end_lr" \
        update_elastic_config="dict($5)" batch_size="$4" dtype="$dtype" \
        mesh_dim="$mesh_dim" workers="$workers" save_model_freq=100 save_milestone_freq=1000000 \
        bash scripts/run_train.sh --load_checkpoint="$2" --optimizer.type=muon --optimizer.matrix_lr="$7" \
        --mask_log_uniform=True --mask_full_fraction=0.2 --log_error=True \
        --train_dataset.vision_dataset.random_crop=True --train_dataset.vision_dataset.image_blocks=2 \
        --checkpointer.float_dtype="$8" ${flags[@]+"${flags[@]}"}
}

# Pieces of frames as they are tokenized, half of them at that size, the others at any scale.
tiles=(--train_dataset.vision_dataset.fit=tile --train_dataset.vision_dataset.short_side=128)
train pieces "$start" "$steps_of_pieces" "$batch_size" "$pieces" "$lr" "$matrix_lr" fp32 "${tiles[@]}"
# The rates of the whole frames begin at a quarter: what the pieces have learned is to stay.
quarter() { awk -v rate="$1" 'BEGIN { printf "%.3g", rate / 4 }'; }
train whole "$output_dir/pieces/pretrained" "$steps_of_frames" 1 "$whole" "$(quarter "$lr")" "$(quarter "$matrix_lr")" "$float_dtype"

trained="$output_dir/ordered"
[[ -f "$trained/model.safetensors" ]] || "$PYTHON" scripts/fit_order.py --load_checkpoint="$output_dir/whole/pretrained" \
    --input_path="${curve_path:-$dataset_path}" --blocks_per_clip="$blocks_per_clip" --output_folder="$trained"
[[ -f "$trained/curves.json" ]] || "$PYTHON" scripts/fit_curves.py --load_checkpoint="$trained" --input_path="${curve_path:-$dataset_path}" \
    --blocks_per_clip="$blocks_per_clip" --num_counts=8
env -u output_dir models="$model=$trained,before=example/$model" input_path="$report_path" output_folder="$output_dir/evaluation" max_frames=24 \
    bash scripts/run_evaluate.sh --codec=x264,jpeg
echo "train_shipped.sh: the model is in $trained, its measurements are in $output_dir/evaluation." >&2

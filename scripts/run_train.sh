#!/usr/bin/env bash
# Trains a tokenizer on a folder of images or videos.
#
#   dataset_path=/path/to/videos bash scripts/run_train.sh
#   SMOKE=1 bash scripts/run_train.sh      # a few steps of a small model on the example, to try it out
#
# Further flags go to scripts/train.py (--help lists them); a flag given twice counts as given last.
# On several hosts, start it on each, with --jax_distributed.initialize_jax_distributed=True.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# --- Fill in here, or set in the environment -----------------------------------------------------
# The folder that holds the images and videos; folders inside it count too.
dataset_path="${dataset_path:-}"
# Where checkpoints and logs go. Starting again with the same folder goes on where it stopped.
output_dir="${output_dir:-outputs/train}"
# The model: 200m is the released size; small-fsq and small-vae are the ones in example/.
preset="${preset:-200m}"
# What differs from the preset. The perceptual loss is not built yet, so its share is 0. 200m is ElasticTok-FSQ; for
# ElasticTok-VAE add: bottleneck_type='vae',patch_size=(2,8,8),max_toks=2048,min_toks=128,theta=5000000,max_sequence_length=8192
# Where memory is short add: remat_block='nothing_saveable',scan_mlp=True (recomputes instead of keeping).
update_elastic_config="${update_elastic_config:-dict(lpips_loss_ratio=0.0)}"
# Sequences in a step, over all devices, and the tokens of one: whole blocks, so a multiple of
# max_toks; 0 is the model's max_sequence_length. The model also says how large the frames are.
batch_size="${batch_size:-8}"
seq_length="${seq_length:-0}"
# Frames per second that are taken from a video.
fps="${fps:-24}"
# Devices along dp, fsdp, tp, sp; one -1 takes the rest. Long sequences want sp.
mesh_dim="${mesh_dim:-1,-1,1,1}"
# How long, and how fast: the rate rises to lr in lr_warmup_steps, then falls to end_lr along a
# cosine; the released models kept theirs at 1e-4.
total_steps="${total_steps:-200000}"
lr="${lr:-1e-4}"
end_lr="${end_lr:-$lr}"
lr_warmup_steps="${lr_warmup_steps:-2000}"
# fp32 or bf16: what the model computes in. Parameters and moments are fp32 in any case.
dtype="${dtype:-bf16}"
# 1: a handful of steps of the smallest preset on the clip in example/, overriding the above.
SMOKE="${SMOKE:-}"
# -------------------------------------------------------------------------------------------------

log_freq=50 save_model_freq=1000 autoresume=True
if [[ -n "$SMOKE" ]]; then
    dataset_path=example output_dir=outputs/smoke autoresume=False
    preset=small-fsq update_elastic_config='' mesh_dim='!1,1,-1,1' dtype=fp32
    batch_size=1 seq_length=1024 total_steps=4 lr_warmup_steps=1
    log_freq=1 save_model_freq=4
fi
if [[ -z "$dataset_path" ]]; then
    echo "run_train.sh: dataset_path is empty; set it to the folder that holds the training files," \
        "here or in the environment. SMOKE=1 trains a few steps on the example instead." >&2
    exit 1
fi

source scripts/setup_env.sh run

exec "$PYTHON" -u scripts/train.py \
    --mesh_dim="$mesh_dim" \
    --dtype="$dtype" \
    --total_steps="$total_steps" \
    --log_freq="$log_freq" \
    --save_model_freq="$save_model_freq" \
    --load_elastic_config="$preset" \
    --update_elastic_config="$update_elastic_config" \
    --autoresume="$autoresume" \
    --optimizer.adamw_optimizer.lr="$lr" \
    --optimizer.adamw_optimizer.end_lr="$end_lr" \
    --optimizer.adamw_optimizer.lr_warmup_steps="$lr_warmup_steps" \
    --optimizer.adamw_optimizer.lr_decay_steps="$total_steps" \
    --train_dataset.vision_dataset.path="$dataset_path" \
    --train_dataset.vision_dataset.batch_size="$batch_size" \
    --train_dataset.vision_dataset.seq_length="$seq_length" \
    --train_dataset.vision_dataset.fps="$fps" \
    --logger.output_dir="$output_dir" \
    "$@"

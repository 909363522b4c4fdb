#!/usr/bin/env bash
# Trains a tokenizer on a folder of images and videos.
#
#   dataset_path=/path/to/videos bash scripts/run_train.sh
#   SMOKE=1 bash scripts/run_train.sh      # a few steps of a small model on the example, to try it out
#
# Start it again and it goes on where it stopped, whatever stopped it. Ctrl-C and SIGTERM save first and leave with
# exit code 130 and 143. Further flags go to scripts/train.py (--help lists them); a flag given twice counts as given last.
# On several hosts, start it on each: scripts/run_train_pod.sh does so on a TPU pod slice. Paths are relative to where one
# stands.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_paths.sh"

read_paths dataset_path eval_path
written_paths output_dir
# --- Fill in here, or set in the environment -----------------------------------------------------
# The folder that holds the images and videos; folders inside it count too. A bucket (gs://...) works where the fsspec
# package for it is installed (pip install gcsfs).
dataset_path="${dataset_path:-}"
# Where checkpoints and logs go; several hosts must share it. Starting again with the same folder goes on where it stopped.
output_dir="${output_dir:-outputs/train}"
# The model: 200m is the released size; small-fsq and small-vae are the ones in example/.
preset="${preset:-200m}"
# What differs from the preset, e.g. "dict(lpips_loss_ratio=0.0)". 200m is ElasticTok-FSQ; for ElasticTok-VAE:
# dict(bottleneck_type='vae',patch_size=(2,8,8),max_toks=2048,min_toks=128,theta=5000000,max_sequence_length=8192)
# Where memory is short add: remat_block='nothing_saveable',scan_mlp=True (recomputes instead of keeping).
update_elastic_config="${update_elastic_config:-}"
# Sequences in a step, over all devices of all hosts, and the tokens of one: whole blocks, so a multiple of
# max_toks; 0 is the model's max_sequence_length. The model also says how large the frames are.
batch_size="${batch_size:-8}"
seq_length="${seq_length:-0}"
# Frames per second that are taken from a video, and the processes of each host that decode.
fps="${fps:-24}"
workers="${workers:-2}"
# Devices along dp, fsdp, tp, sp; one -1 takes the rest. Long sequences want sp.
mesh_dim="${mesh_dim:-1,-1,1,1}"
# How long, and how fast: the rate rises to lr in lr_warmup_steps (2000, or a twentieth of a short run), then falls to
# end_lr along a cosine; the released models kept theirs at 1e-4.
total_steps="${total_steps:-200000}"
lr="${lr:-1e-4}"
end_lr="${end_lr:-$lr}"
lr_warmup_steps="${lr_warmup_steps:-}"
# fp32 or bf16: what the model computes in. Parameters and moments are fp32 in any case.
dtype="${dtype:-bf16}"
# Steps between two lines of the log, two checkpoints (the newest two are kept), and two milestones, which are kept for
# good and also written as the released files params and streaming_train_state.
log_freq="${log_freq:-50}"
save_model_freq="${save_model_freq:-1000}"
save_milestone_freq="${save_milestone_freq:-20000}"
# A folder of files that are not trained on: every eval_freq steps their tokens and quality are measured. Empty: never.
eval_path="${eval_path:-}"
eval_freq="${eval_freq:-5000}"
# True: also report to Weights & Biases (pip install wandb; wandb login), as this project.
online="${online:-False}"
project_id="${project_id:-elastictok}"
# Several hosts: 1 or True joins them. On a Cloud TPU, under SLURM or in Kubernetes nothing else is needed; elsewhere give the
# first host's HOST:PORT, the number of hosts, and the number of this one.
distributed="${distributed:-False}"
coordinator_address="${coordinator_address:-}"
num_processes="${num_processes:-1}"
process_id="${process_id:-0}"
# 1 or True: a handful of steps of a small preset on the clip in example/, overriding the above.
SMOKE="${SMOKE:-}"
# -------------------------------------------------------------------------------------------------

for flag in "$@"; do
    if [[ "$flag" == --help || "$flag" == -h ]]; then # before anything is asked for, or removed
        source scripts/setup_env.sh run
        exec "$PYTHON" scripts/train.py --help
    fi
done
for name in SMOKE distributed; do
    case "${!name}" in
        1 | true | True) printf -v "$name" True ;;
        '' | 0 | false | False) printf -v "$name" '' ;;
        *)
            echo "run_train.sh: $name='${!name}' must be 1 or True for yes, and 0, False or empty for no." >&2
            exit 1
            ;;
    esac
done
if [[ -n "$SMOKE" ]]; then
    dataset_path=example output_dir=outputs/smoke preset=small-fsq update_elastic_config='dict(max_toks=256,min_toks=16,max_sequence_length=512)'
    mesh_dim='!1,1,-1,1' dtype=fp32 batch_size=1 seq_length=512 workers=1 total_steps=4 lr_warmup_steps=1
    log_freq=1 save_model_freq=2 save_milestone_freq=4 eval_path='' online=False
    distributed='' coordinator_address='' num_processes=1 process_id=0
    rm -rf outputs/smoke # a try of an earlier day is of no use
fi
if [[ -z "$dataset_path" ]]; then
    echo "run_train.sh: dataset_path is empty; set it to the folder that holds the training files," \
        "here or in the environment. SMOKE=1 trains a few steps on the example instead." >&2
    exit 1
fi

if [[ ! "$total_steps" =~ ^[1-9][0-9]{0,17}$ ]]; then # what shells reckon with; 08 is no number to them
    echo "run_train.sh: total_steps='$total_steps' must be a whole number above 0, in digits, such as 100000." >&2
    exit 1
fi
lr_warmup_steps="${lr_warmup_steps:-$((total_steps / 20 < 2000 ? total_steps / 20 : 2000))}"
if [[ -z "$distributed" && "$coordinator_address,$num_processes,$process_id" != ",1,0" ]]; then
    echo "run_train.sh: coordinator_address='$coordinator_address' num_processes='$num_processes'" \
        "process_id='$process_id' need distributed=True; add it to join the other hosts, or leave them out." >&2
    exit 1
fi
if [[ -z "$coordinator_address" && "$num_processes,$process_id" != 1,0 ]]; then
    echo "run_train.sh: num_processes='$num_processes' process_id='$process_id' need coordinator_address=HOST:PORT, the" \
        "first host's; leave them out where the environment says who takes part." >&2
    exit 1
fi

check_variables run_train.sh dataset_path output_dir preset update_elastic_config batch_size seq_length workers mesh_dim total_steps \
    end_lr lr_warmup_steps dtype log_freq save_model_freq save_milestone_freq eval_path eval_freq online project_id distributed \
    coordinator_address num_processes process_id SMOKE
flags_from_here "$@"
source scripts/setup_env.sh run

options=()
if [[ -n "$eval_path" ]]; then
    options+=(--eval_freq="$eval_freq" --eval_dataset.path="$eval_path")
fi
if [[ -n "$distributed" ]]; then
    options+=(--jax_distributed.initialize_jax_distributed=True)
    if [[ -n "$coordinator_address" ]]; then
        options+=(
            --jax_distributed.coordinator_address="$coordinator_address"
            --jax_distributed.num_processes="$num_processes"
            --jax_distributed.process_id="$process_id"
        )
    fi
fi

exec "$PYTHON" -u scripts/train.py \
    --mesh_dim="$mesh_dim" \
    --dtype="$dtype" \
    --total_steps="$total_steps" \
    --log_freq="$log_freq" \
    --save_model_freq="$save_model_freq" \
    --save_milestone_freq="$save_milestone_freq" \
    --load_elastic_config="$preset" \
    --update_elastic_config="$update_elastic_config" \
    --optimizer.adamw_optimizer.lr="$lr" \
    --optimizer.adamw_optimizer.end_lr="$end_lr" \
    --optimizer.adamw_optimizer.lr_warmup_steps="$lr_warmup_steps" \
    --optimizer.adamw_optimizer.lr_decay_steps="$total_steps" \
    --train_dataset.vision_dataset.path="$dataset_path" \
    --train_dataset.vision_dataset.batch_size="$batch_size" \
    --train_dataset.vision_dataset.seq_length="$seq_length" \
    --train_dataset.vision_dataset.fps="$fps" \
    --train_dataset.vision_dataset.workers="$workers" \
    --logger.output_dir="$output_dir" \
    --logger.online="$online" \
    --logger.project_id="$project_id" \
    ${options[@]+"${options[@]}"} \
    "${flags[@]+"${flags[@]}"}"

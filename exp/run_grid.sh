#!/usr/bin/env bash
# The papers' grid: one run of tools/test_quant.py per detector, size of SAM, recipe and bit width, and their table.
#
#   bash exp/run_grid.sh [--detectors LIST] [--sams LIST] [--recipes LIST] [--bits LIST] [--variant NAME]
#                        [--work-dir DIR] [--dry-run | --print] [-- OPTIONS OF tools/test_quant.py]
#
#   --detectors LIST   default "faster-rcnn_r50 yolox-l hdetr_r50 dino_focalnet-l"
#   --sams LIST        default "sam-vit-b sam-vit-l sam-vit-h"
#   --recipes LIST     folders in exp/, default "brecq qdrop ptq4sam ahcq_sam"
#   --bits LIST        files in them, default "w4a4 w5a5 w6a6"
#   --variant NAME     best-in-multi or cascade, default neither
#   --work-dir DIR     results go here, default work_dirs/grid; other options of the tool ask for another one
#   --configs DIR, --exp DIR   pipelines and recipes of your own, default configs and exp of this project
#   --dry-run          print the commands
#   --print            print the table of what is there
#
# The same by environment: DETECTORS, SAMS, RECIPES, BITS, VARIANT, WORK_DIR, CONFIGS, EXP; and
#   NPROC=4            so many processes, one GPU each, work on a cell together (docs/processes.md says at what)
#   LAUNCH="srun -n 4" what stands before the command, here for `-- --launcher slurm`, without NPROC
#   PYTHON=python3     default python of .venv, else of PATH
#
# Start it again after an interruption: finished cells stay, an unfinished one goes on. Several of these scripts may
# share a work dir (one per GPU, by CUDA_VISIBLE_DEVICES): one of them works on a cell. A cell that fails stops no
# other; error.txt in its folder says why, console.txt all that it said. What the machine lacks is better asked
# before: tools/check_setup.py.
# Exit code: 0 done, 1 cells failed, 2 bad usage, 130 interrupted.
set -uo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
DETECTORS=${DETECTORS:-faster-rcnn_r50 yolox-l hdetr_r50 dino_focalnet-l}
SAMS=${SAMS:-sam-vit-b sam-vit-l sam-vit-h}
RECIPES=${RECIPES:-brecq qdrop ptq4sam ahcq_sam}
BITS=${BITS:-w4a4 w5a5 w6a6}
VARIANT=${VARIANT:-}
WORK_DIR=${WORK_DIR:-work_dirs/grid}
CONFIGS=${CONFIGS:-$root/configs}
EXP=${EXP:-$root/exp}
NPROC=${NPROC:-1}
action=run
extra=()  # options for the tool
cells=()  # config, recipe and name, with tabs between; the name is the folder of the results in the work dir
failures=()
busy=0
interrupted=0

die() {
    echo "error: $1" >&2
    exit 2
}

parse() {
    local name
    while (($#)); do
        case $1 in
            --detectors | --sams | --recipes | --bits | --variant | --work-dir | --configs | --exp)
                (($# > 1)) || die "$1 needs a value"
                name=${1#--} && name=${name//-/_}
                printf -v "${name^^}" '%s' "$2"
                shift 2
                ;;
            --dry-run) action=dry_run && shift ;;
            --print) action=table && shift ;;
            -h | --help) sed -n '2,/^[^#]/ { /^#/ s/^# \{0,1\}//p }' "${BASH_SOURCE[0]}" && exit 0 ;;
            --) shift && extra=("$@") && break ;;
            *) die "unknown option '$1'; --help shows all, options of tools/test_quant.py come after --" ;;
        esac
    done
    for name in "${extra[@]}"; do
        [[ $name != --work-dir* && $name != --resume && $name != --dry-run ]] || die "$name after --: this script sets it"
        [[ $name != --launcher* || $NPROC == 1 ]] || die "NPROC=$NPROC starts torchrun; leave it out, or $name after --"
    done
    [[ $NPROC =~ ^[1-9][0-9]*$ ]] || die "NPROC='$NPROC' must be a number of processes"
    command -v flock > /dev/null || die 'flock is missing; install util-linux'
    local default=python
    [[ ! -x $root/.venv/bin/python ]] || default=$root/.venv/bin/python
    python=${PYTHON:-$default}
    read -ra launch <<< "${LAUNCH:-}"
}

# as a reader types it: relative to where he is
short() { printf '%s' "${1#"$PWD"/}"; }

# words as a shell wants them, quoted where they have to be
quoted() { echo "${@@Q}" | sed -E "s/'([A-Za-z0-9_.,:=\/+-]+)'/\1/g"; }

# names of the files of a glob, without ending
names() { compgen -G "$1" | xargs -rd '\n' basename -a -s ".${1##*.}"; }

# which detectors, SAMs or variants (1, 2, 3) are in the names of pipelines
parts() { names "$1" | sed -nE "s/^(.+)_((mobile-)?sam[^_]*)(_(.+))?$/\\${2/3/5}/p" | sed '/^$/d'; }

# Ends, unless the name is one of the lines of the input; the first one that is nearly it, or has it in it, is meant
demand() { # what it is, its name and its place
    local there other plain meant=''
    mapfile -t there < <(sort -u)
    plain=$(tr -dc '[:alnum:]' <<< "${2,,}")
    for other in "${there[@]}"; do
        [[ $other != "$2" ]] || return 0
        [[ -z $plain || $(tr -dc '[:alnum:]' <<< "${other,,}") != *"$plain"* ]] || meant=${meant:-$other}
    done
    die "no $1 '$2' in $(short "$3")${meant:+ (did you mean '$meant'?)}; there: ${there[*]:-none}"
}

find_config() { # of a detector and a SAM, in $found
    local name=$1_$2${VARIANT:+_$VARIANT}
    found=("$CONFIGS"/*/"$name".py)
    ((${#found[@]} < 2)) || die "$name is ambiguous: ${found[*]}"
    [[ ! -f ${found[0]} ]] || return 0
    demand detector "$1" "$CONFIGS" < <(parts "$CONFIGS/*/*.py" 1)
    demand "SAM for $1" "$2" "$CONFIGS" < <(parts "$CONFIGS/*/$1_*.py" 2)
    demand "variant of $1_$2" "${VARIANT:-none}" "$CONFIGS" < <(parts "$CONFIGS/*/$1_$2*.py" 3)
}

find_recipe() { # of an algorithm and bits
    [[ ! -f $EXP/$1/$2.yaml ]] || return 0
    [[ -d $EXP/$1 ]] ||
        demand 'folder of recipes' "$1" "$EXP" < <(compgen -G "$EXP/*/w*a*.yaml" | sed -E 's|.*/(.*)/.*|\1|')
    demand recipe "$2" "$EXP/$1" < <(names "$EXP/$1/*.yaml")
}

list_cells() {
    local detector sam recipe bits found
    for detector in $DETECTORS; do
        for sam in $SAMS; do
            find_config "$detector" "$sam"
            for recipe in $RECIPES; do
                for bits in $BITS; do
                    find_recipe "$recipe" "$bits"
                    cells+=("${found[0]#"$PWD"/}"$'\t'"${EXP#"$PWD"/}/$recipe/$bits.yaml"$'\t')
                    cells[-1]+=${detector}_$sam${VARIANT:+_$VARIANT}/${recipe}_$bits
                done
            done
        done
    done
    ((${#cells[@]})) || die 'a list is empty, so there is nothing to do'
}

set_command() { # of a config, a recipe and a cell
    command=("${launch[@]}" "$python")
    ((NPROC == 1)) || command+=(-m torch.distributed.run --standalone "--nproc_per_node=$NPROC")
    command+=("$(short "$root/tools/test_quant.py")" "$1" "$2" --work-dir "$WORK_DIR/$3" --eval-fp --resume)
    ((NPROC == 1)) || command+=(--launcher pytorch)
    command+=("${extra[@]}")
}

dry_run() {
    local config recipe cell
    for line in "${cells[@]}"; do
        IFS=$'\t' read -r config recipe cell <<< "$line"
        set_command "$config" "$recipe" "$cell"
        [[ ! -f $WORK_DIR/$cell/result.json ]] || printf '# done: '
        quoted "${command[@]}"
    done
}

table() { "$python" -m ptqsam.report.grid "$WORK_DIR"; }

# What went wrong in one line: the tool's own, or else the last one. Before it may stand the unfinished bar of another
# process, after it torchrun's report.
reason() {
    local status=$1 log=$2 line
    line=$(tr '\r' '\n' < "$log" | grep -aoE '(^|[^[:alpha:][:space:]] ?)error: .*' | tail -n 1)
    if [[ -n $line ]]; then
        echo "error: ${line#*error: }"
        return
    fi
    line=$(tr '\r' '\n' < "$log" | sed '/torch\/distributed\/elastic\/multiprocessing\/api\.py/,$d' |
        grep -av '^[[:space:]]*$' | tail -n 1)
    echo "exit code $status${line:+: $line}"
}

# The float model is the same in all cells of a pipeline, so its metrics are; the tool checks that they fit
share_float() {
    local folder=$WORK_DIR/$1 other
    [[ ! -f $folder/fp.json ]] || return 0
    for other in "$(dirname "$folder")"/*/fp.json; do
        [[ -f $other ]] || continue
        cp "$other" "$folder/.fp.json" && mv "$folder/.fp.json" "$folder/fp.json"
        return 0
    done
}

run_cell() {
    local config=$1 recipe=$2 cell=$3 folder=$WORK_DIR/$3 options status line
    options=$(quoted "${extra[@]}")
    if [[ -f $folder/result.json ]]; then
        echo 'done already'
        line=$(cat "$folder/options.txt" 2> /dev/null)
        [[ $line == "$options" ]] && return
        line="error: made with other options ($line); choose another --work-dir"
        echo "$line"
        failures+=("$cell: $line")
        return
    fi
    echo "$options" > "$folder/options.txt"
    rm -f "$folder/error.txt"
    share_float "$cell"
    set_command "$config" "$recipe" "$cell"
    PYTHONUNBUFFERED=1 "${command[@]}" 2>&1 | tee -i "$folder/console.txt"
    status=${PIPESTATUS[0]}
    if ((status == 130 || interrupted)); then
        interrupted=1
        return
    fi
    [[ $status == 0 && -f $folder/result.json ]] && return
    line=$(reason "$status" "$folder/console.txt")
    echo "$line" > "$folder/error.txt"
    failures+=("$cell: $line")  # the tool itself has just said it
}

run() {
    local config recipe cell lock number=0
    trap 'interrupted=1' INT
    for line in "${cells[@]}"; do
        IFS=$'\t' read -r config recipe cell <<< "$line"
        number=$((number + 1))
        echo "== $number/${#cells[@]} $cell"
        mkdir -p "$WORK_DIR/$cell" || die "$WORK_DIR/$cell cannot be made; choose another --work-dir"
        # the lock is inherited by the tool: it holds as long as either of the two lives
        exec {lock}> "$WORK_DIR/$cell/.lock" || die "$WORK_DIR/$cell cannot be written; choose another --work-dir"
        if flock -n "$lock"; then
            run_cell "$config" "$recipe" "$cell"
        else
            busy=$((busy + 1))
            echo 'another run works on it'
        fi
        exec {lock}>&-
        if ((interrupted)); then
            echo 'interrupted; start the same command again to go on' >&2
            exit 130
        fi
    done
    echo && table | grep -v '^- Failed: '  # they come below
    ((busy == 0)) || echo "cells left to another run: $busy"
    ((${#failures[@]} == 0)) && return
    printf '%s\n' "cells that failed: ${#failures[@]}" "${failures[@]}" >&2
    return 1
}

parse "$@"
case $action in
    run) list_cells && run ;;
    dry_run) list_cells && dry_run ;;
    table) table ;;
esac

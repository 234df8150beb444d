#!/usr/bin/env bash
# Run the ablation under Slurm, one array task per row: pre-training, then its probe. The last task writes the complete table.
#
#   slurm/ablate.sh --config opt-base --store /data/store --output /data/ablation        # submits the array; on a login node
#   SBATCH_OPTIONS="--nodes=2 --partition=gpu" slurm/ablate.sh …
#
# Arguments are those of opt-ds ablate. A task requeues itself like a job of slurm/pretrain.sh. Run the same command to resume.
# Settings by environment: common.sh, and SBATCH_OPTIONS, which overrides the lines below. Manual: docs/cluster.md.

#SBATCH --job-name=opt_ds-ablate
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=4
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.log
#SBATCH --signal=TERM@120

set -uo pipefail

if [[ -z ${SLURM_JOB_ID:-} ]]; then # not in a job: submit this script, one task per row
  command -v sbatch >/dev/null || { echo "error: sbatch not found: run this script on a login node of a Slurm cluster" >&2; exit 2; }
  export OPT_DS_HOME=${OPT_DS_HOME:-$(dirname "$(dirname "$(realpath "$0")")")}
  source "$OPT_DS_HOME/slurm/common.sh"
  rows=$("${PYTHON[@]}" -m opt_ds ablate "$@" --list) || exit
  [[ " $*" != *" --num-ranks"* && " $*" != *" --task"* ]] ||
    { echo "error: --num-ranks and --task follow from the job: omit them (SBATCH_OPTIONS sets nodes and tasks)" >&2; exit 2; }
  words=$(xargs -r printf '%s\n' <<<"${SBATCH_OPTIONS:-}") || exit 2 # quotes keep spaces together, as in a shell
  options=()
  [[ -z $words ]] || mapfile -t options <<<"$words"
  job=$(sbatch --parsable "${options[@]}" --array="0-$(($(wc -l <<<"$rows") - 1))" "$0" "$@") || exit
  echo "ablation: job $job, $(wc -l <<<"$rows") rows:" $rows
  exit
fi

# Slurm runs a copy of this script: the checkout is the one that holds the submitted script. Command= is its path and the arguments without
# quotes. All of them may contain spaces, so the path is the shortest prefix that names a script of a checkout.
if [[ -z ${OPT_DS_HOME:-} ]]; then
  IFS= read -r command < <(scontrol show job -o "$SLURM_JOB_ID") || true
  command=${command#* Command=} submitted=${command%% *}
  until [[ -f $submitted && -f ${submitted%/*/*}/opt_ds/pretrain.py || $submitted == "$command" ]]; do
    rest=${command#"$submitted "} submitted+=" ${rest%% *}"
  done
  [[ -f $submitted ]] || submitted=${command%% *}
  export OPT_DS_HOME=${submitted%/*/*}
fi
[[ -f $OPT_DS_HOME/slurm/common.sh ]] || { echo "error: no opt_ds in $OPT_DS_HOME: set OPT_DS_HOME to the checkout" >&2; exit 2; }
source "$OPT_DS_HOME/slurm/common.sh"
source "$OPT_DS_HOME/slurm/ranks.sh"

row=$("${PYTHON[@]}" -m opt_ds ablate "$@" --task "$SLURM_ARRAY_TASK_ID" --list) || exit
say "job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, start number $((${SLURM_RESTART_COUNT:-0} + 1)): row $row of ablate $*"

if [[ $row != untrained ]]; then
  arguments=$("${PYTHON[@]}" -m opt_ds ablate "$@" --task "$SLURM_ARRAY_TASK_ID" --arguments) || exit
  mapfile -t arguments <<<"$arguments"
  pretrain "${arguments[@]}" || exit
fi
# The run is finished. This command detects that, fits the probe, and writes the table of all rows that exist.
srun --nodes=1 --ntasks=1 --ntasks-per-node=1 "${PYTHON[@]}" -m opt_ds ablate "$@" --task "$SLURM_ARRAY_TASK_ID" --num-ranks 1

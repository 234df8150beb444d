#!/usr/bin/env bash
# Extract features under Slurm: one array task per partition of the store, then one task that merges them:
#
#   slurm/prepare.sh --manifest my/manifest.jsonl --output /data/store …        # submits both; on a login node
#   PARTITIONS=64 SBATCH_PARTITION=gpu slurm/prepare.sh --manifest …
#
# Arguments are those of opt-ds prepare. Run the same command again to resume partitions that failed.
# Settings by environment: common.sh, PARTITIONS (number of partitions, default 16), and sbatch's own SBATCH_… variables. Manual: docs/cluster.md.

#SBATCH --job-name=opt_ds-prepare
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --gpus-per-node=1
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.log

set -euo pipefail

if [[ -z ${SLURM_JOB_ID:-} ]]; then # not in a job: submit this script
  command -v sbatch >/dev/null || { echo "error: sbatch not found: run this script on a login node of a Slurm cluster" >&2; exit 2; }
  output=""
  for ((i = 1; i <= $#; i++)); do
    [[ ${!i} == --output=* ]] && output=${!i#--output=}
    [[ ${!i} == --output ]] && next=$((i + 1)) && output=${!next:-}
  done
  [[ -n $output ]] || { echo "error: --output missing: slurm/prepare.sh --manifest FILE --output STORE" >&2; exit 2; }
  if [[ -n ${SHARES:-} && -z ${PARTITIONS:-} ]]; then # the former name, until the next release
    echo "warning: SHARES is now called PARTITIONS; the former name works until the next release" >&2
    PARTITIONS=$SHARES
  fi
  partitions=$(sbatch --parsable --array="0-$((${PARTITIONS:-16} - 1))" "$0" "$@")
  merge=$(sbatch --parsable --dependency="afterok:$partitions" --kill-on-invalid-dep=yes --array=0 --gpus-per-node=0 \
    --job-name=opt_ds-merge "$0" merge "$output")
  echo "partitions: job $partitions (${PARTITIONS:-16} tasks); then merge: job $merge"
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

if [[ ${1:-} == merge ]]; then
  srun "${PYTHON[@]}" -m opt_ds merge "${@:2}"
else
  say "partition $SLURM_ARRAY_TASK_ID of $SLURM_ARRAY_TASK_COUNT: prepare $*"
  own=(--partition "$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT")
  [[ " $*" == *" --workers"* ]] || own+=(--workers "$SRUN_CPUS_PER_TASK") # an option may occur only once
  srun "${PYTHON[@]}" -m opt_ds prepare "${own[@]}" "$@"
fi

#!/usr/bin/env bash
# Pre-train under Slurm: sbatch [--nodes=N] slurm/pretrain.sh [arguments of opt_ds/pretrain.py]
#
#   sbatch slurm/pretrain.sh --config opt-base --store /data/store --output /data/runs/base
#   sbatch --nodes=4 --partition=gpu --time=12:00:00 slurm/pretrain.sh --config opt-large …
#
# The job requeues itself after a time limit, a pre-emption, a node failure, `scontrol requeue` and
# `scancel --signal=TERM JOB`, and resumes from its last checkpoint in --output. `scancel JOB` ends it.
# Settings by environment: common.sh, and OPT_DS_DOCTOR=0 to start without the environment report. Manual: docs/cluster.md.

#SBATCH --job-name=opt_ds
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=4
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
#SBATCH --signal=TERM@120
# --signal reaches the ranks, not this script: they save and exit with 75. Usually they have done so earlier, because they know
# the time limit (SLURM_JOB_END_TIME).

set -uo pipefail

[[ -n ${SLURM_JOB_ID:-} ]] || { echo "error: not in a Slurm job: submit it with sbatch slurm/pretrain.sh $*" >&2; exit 2; }

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

say "job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, start number $((${SLURM_RESTART_COUNT:-0} + 1)): pretrain.py $*"

if [[ ${OPT_DS_DOCTOR:-1} != 0 ]]; then
  srun --label --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 \
    "${PYTHON[@]}" -m opt_ds doctor "$@"
  code=$?
  if ((code == 1 || code == BAD_INPUT)); then
    say "error: the environment report above has a FAIL: fix it, or start with OPT_DS_DOCTOR=0" >&2
    exit "$code"
  fi
fi

pretrain "$@"

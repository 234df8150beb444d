#!/usr/bin/env bash
# Evaluate under Slurm: sbatch slurm/evaluate.sh [arguments of opt-ds evaluate]
#
#   sbatch slurm/evaluate.sh summary --checkpoint runs/base --store /data/store --output runs/base/result.json
#
# Settings by environment: common.sh. Manual: docs/cluster.md.

#SBATCH --job-name=opt_ds-evaluate
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=4
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

set -euo pipefail

[[ -n ${SLURM_JOB_ID:-} ]] || { echo "error: not in a Slurm job: submit it with sbatch slurm/evaluate.sh $*" >&2; exit 2; }

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

say "job $SLURM_JOB_ID on $SLURM_JOB_NODELIST: evaluate $*"
srun "${PYTHON[@]}" -m opt_ds evaluate "$@"

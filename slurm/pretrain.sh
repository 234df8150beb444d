#!/usr/bin/env bash
# Pre-training under Slurm: sbatch [--nodes=N] slurm/pretrain.sh [what opt_ds/pretrain.py takes]
#
#   sbatch slurm/pretrain.sh --config opt-base --store /data/store --output /data/runs/base
#   sbatch --nodes=4 --partition=gpu --time=12:00:00 slurm/pretrain.sh --config opt-large …
#
# The job comes back by itself after a time limit, a pre-emption, a node failure, `scontrol requeue` and
# `scancel --signal=TERM JOB`, and goes on from its last checkpoint in --output. `scancel JOB` ends it.
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
# --signal reaches the ranks, not this script: they save and exit with 75. Usually they have done so before, since they know
# the time limit (SLURM_JOB_END_TIME).

set -uo pipefail

# Slurm runs a copy of this script: the checkout is where the submitted one lies.
submitted=$(scontrol show job -o "$SLURM_JOB_ID" | sed -n 's/.* Command=\([^ ]*\).*/\1/p' | head -n 1)
export OPT_DS_HOME=${OPT_DS_HOME:-$(dirname "$(dirname "$submitted")")}
source "$OPT_DS_HOME/slurm/common.sh"

readonly DONE=0 BAD_INPUT=2 REQUEUE=75 ENDED_BY_TERM=143 ENDED_BY_USR1=138

requeue() {
  say "requeue: $1"
  scontrol requeue "$SLURM_JOB_ID" && sleep 60 # Slurm ends this script meanwhile
  say "error: Slurm did not requeue the job: submit it again with the same --output" >&2
  exit 1
}

# Whether Slurm still reaches every node of the job: a command on each of them.
nodes_answer() {
  timeout 60 srun --overlap --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --ntasks="$SLURM_JOB_NUM_NODES" \
    --cpus-per-task=1 --gres=none true 2>/dev/null
}

say "job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, start number $((${SLURM_RESTART_COUNT:-0} + 1)): pretrain.py $*"

if [[ -z ${SLURM_JOB_END_TIME:-} ]]; then
  end=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%e)
  SLURM_JOB_END_TIME=$(date --date="$end" +%s 2>/dev/null) && export SLURM_JOB_END_TIME || unset SLURM_JOB_END_TIME
fi

# The first node's address, asked of Slurm here because a container has no scontrol.
first_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address=$(scontrol show node -o "$first_node" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')
export MASTER_ADDR=${MASTER_ADDR:-${address:-$first_node}}

if [[ ${OPT_DS_DOCTOR:-1} != 0 ]]; then
  srun --label --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 \
    "${PYTHON[@]}" -m opt_ds doctor "$@"
  code=$?
  if ((code == 1 || code == BAD_INPUT)); then
    say "error: the environment report above says FAIL: mend it, or start with OPT_DS_DOCTOR=0" >&2
    exit "$code"
  fi
fi

# One task a GPU. Of a task that dies, Slurm ends the others a minute later, if they have not noticed themselves. (At once would
# also kill ranks that are just about to exit with 75 as the first one did.)
srun --kill-on-bad-exit=0 --wait=60 "${PYTHON[@]}" "$OPT_DS_HOME/opt_ds/pretrain.py" "$@"
code=$?
case $code in
  "$DONE") say "finished" ;;
  "$REQUEUE") requeue "saved and stopped" ;;
  "$ENDED_BY_TERM" | "$ENDED_BY_USR1") requeue "stopped before it could save" ;; # by a signal while it was starting
  "$BAD_INPUT") say "error: bad input, see above; not requeued" >&2 ;;
  *)
    # The ranks of the other nodes fail as soon as one node dies, long before Slurm knows of it.
    nodes_answer || requeue "a node of $SLURM_JOB_NODELIST does not answer (exit code $code)"
    say "error: exit code $code, see above; submit again with the same --output to go on" >&2
    ;;
esac
exit "$code"

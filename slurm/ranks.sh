# Sourced, after common.sh, by the job scripts that pre-train: pretrain.sh and ablate.sh.

[[ ${BASH_SOURCE[0]} != "$0" ]] || { echo "error: ranks.sh is part of the job scripts in this folder: submit one of those with sbatch" >&2; exit 2; }

readonly DONE=0 BAD_INPUT=2 REQUEUE=75 ENDED_BY_TERM=143 ENDED_BY_USR1=138

requeue() {
  say "requeue: $1"
  scontrol requeue "$SLURM_JOB_ID" && sleep 60 # Slurm ends this script meanwhile
  say "error: Slurm did not requeue the job: submit it again with the same --output" >&2
  exit 1
}

# Succeeds if Slurm still reaches every node of the job, by running a command on each of them.
nodes_answer() {
  timeout 60 srun --overlap --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --ntasks="$SLURM_JOB_NUM_NODES" \
    --cpus-per-task=1 --gres=none true 2>/dev/null
}

# pretrain ARGUMENTS…: run opt_ds/pretrain.py on the job's tasks. Logs what its exit code means and returns the code. If a requeue
# resumes the run, it requeues the job instead and does not return.
pretrain() {
  local code end first_node address
  if [[ -z ${SLURM_JOB_END_TIME:-} ]]; then
    end=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%e)
    SLURM_JOB_END_TIME=$(date --date="$end" +%s 2>/dev/null) && export SLURM_JOB_END_TIME || unset SLURM_JOB_END_TIME
  fi

  # Ask Slurm for the first node's address here, because a container has no scontrol.
  first_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  address=$(scontrol show node -o "$first_node" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')
  export MASTER_ADDR=${MASTER_ADDR:-${address:-$first_node}}

  # One task per GPU. If a task dies, Slurm ends the others a minute later, unless they detected it themselves. (Ending them at
  # once would also kill ranks that are about to exit with 75 as the first one did.)
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
      say "error: exit code $code, see above; submit it again with the same --output to resume" >&2
      ;;
  esac
  return "$code"
}

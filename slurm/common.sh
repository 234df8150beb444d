# Sourced by the job scripts of this folder: finds the checkout and Python, and sets the environment of the compute nodes.
#
#   OPT_DS_HOME        the checkout (default: the one that holds the submitted script)
#   OPT_DS_PYTHON      the interpreter (default: $OPT_DS_HOME/.venv/bin/python)
#   OPT_DS_CONTAINER   an Apptainer image to run in instead (see opt_ds.def); OPT_DS_BIND: further folders that the container sees

[[ ${BASH_SOURCE[0]} != "$0" ]] || { echo "error: common.sh is part of the job scripts in this folder: submit one of those with sbatch" >&2; exit 2; }

say() { echo "[$(date +%FT%T)] $*"; }

if [[ ! -f $OPT_DS_HOME/opt_ds/pretrain.py ]]; then
  say "error: no opt_ds in $OPT_DS_HOME: set OPT_DS_HOME to the checkout" >&2
  exit 2
fi
if [[ -n ${OPT_DS_CONTAINER:-} ]]; then
  PYTHON=(apptainer exec --nv --bind "$OPT_DS_HOME${OPT_DS_BIND:+,$OPT_DS_BIND}" --pwd "$PWD" "$OPT_DS_CONTAINER" python)
else
  PYTHON=("${OPT_DS_PYTHON:-$OPT_DS_HOME/.venv/bin/python}")
fi
if ! command -v "${PYTHON[0]}" >/dev/null; then
  say "error: ${PYTHON[0]} not found: run make install in $OPT_DS_HOME, or set OPT_DS_PYTHON or OPT_DS_CONTAINER" >&2
  exit 2
fi
export PYTHONPATH=$OPT_DS_HOME${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1

# Compute nodes often have no internet, so nothing may wait for a download.
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 HF_DATASETS_OFFLINE=1 PIP_NO_INDEX=1 TOKENIZERS_PARALLELISM=false

# Since Slurm 22.05 srun no longer takes --cpus-per-task from the job.
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$SRUN_CPUS_PER_TASK}

#!/bin/bash
# pretrain_1p5b on cluster slurm_sliced: 4 nodes x 8 processes.
# Written by hymba_train 0.1.0: hymba launch slurm experiment=pretrain_1p5b cluster=slurm_sliced
# The configuration is resolved.yaml in the run directory; submit again with hymba launch slurm.

#SBATCH --job-name=pretrain_1p5b
#SBATCH --nodes=4
# one torchrun, which starts the ranks of its node
#SBATCH --ntasks-per-node=1
#SBATCH --gres=gpu:8
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=04:00:00
#SBATCH --partition=spot
# relative paths of the configuration start here
#SBATCH --chdir=/shared/me
#SBATCH --output=/shared/me/runs/pretrain_1p5b/slurm/0001/job-%j.log
# a requeued job goes on in the same file
#SBATCH --open-mode=append
#SBATCH --no-requeue
# to this script alone: see ask_to_stop
#SBATCH --signal=B:USR1@600

set -u -o pipefail

# ---- This job -------------------------------------------------------------------------------------------------------
RUN_DIR=/shared/me/runs/pretrain_1p5b
LAUNCH_DIR="$RUN_DIR/slurm/0001"
NODES=4
PROCESSES_PER_NODE=8
SIGNAL_SECONDS=600 # before the time limit
MAX_REQUEUES=0 # times this job may put itself back into the queue
MAX_RESTARTS=3 # new starts within one allocation after a failure; then requeue
NO_PROGRESS_LIMIT=3 # starts in a row from one checkpoint, then give up
KILL_GRACE_SECONDS=120 # other nodes may go on after the first has ended
HEALTH_CHECK=yes
HEALTH_CHECK_SECONDS=300 # a node that has not answered by then is bad
MAX_CLOCK_SKEW=10 # seconds
HEAD_ADDRESS_COMMAND=''
NODE_CHECK=(--gpus 8 --min-free-disk-gib 20 --min-free-memory-gib 8 --timeout 240)

# ---- Its environment ------------------------------------------------------------------------------------------------
source /shared/me/venv/bin/activate
PYTHON=python
# log lines appear when they are written
export PYTHONUNBUFFERED=1
# a crash in native code leaves a traceback
export PYTHONFAULTHANDLER=1
# a restarted rank must not find the addresses of dead ones
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# threads of a rank; left alone, torchrun says 1
export OMP_NUM_THREADS=1
# Megatron-Core overlaps tensor-parallel communication only so
export CUDA_DEVICE_MAX_CONNECTIONS=1
# NCCL says why it fails
export NCCL_DEBUG=WARN
SRUN_OPTIONS=()
IN_ENVIRONMENT=()


#!/bin/bash
# pretrain_1p5b on cluster slurm_venv: 16 nodes x 8 processes.
# Written by hymba_train 0.1.0: hymba launch slurm experiment=pretrain_1p5b cluster=slurm_venv
# The configuration is resolved.yaml in the run directory; submit again with hymba launch slurm.

#SBATCH --job-name=pretrain_1p5b
# 16 nodes to train on, and 1 to replace bad ones
#SBATCH --nodes=17
# one torchrun, which starts the ranks of its node
#SBATCH --ntasks-per-node=1
# 12 a rank
#SBATCH --cpus-per-task=96
#SBATCH --gres=gpu:8
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=1-00:00:00
#SBATCH --partition=h100
#SBATCH --account=lab
# relative paths of the configuration start here
#SBATCH --chdir=/shared/me
#SBATCH --output=/shared/me/runs/pretrain_1p5b/slurm/0001/job-%j.log
# a requeued job goes on in the same file
#SBATCH --open-mode=append
#SBATCH --requeue
# to this script alone: see ask_to_stop
#SBATCH --signal=B:USR1@300
# a node that dies is replaced by a spare
#SBATCH --no-kill

set -u -o pipefail

# ---- This job -------------------------------------------------------------------------------------------------------
RUN_DIR=/shared/me/runs/pretrain_1p5b
LAUNCH_DIR="$RUN_DIR/slurm/0001"
NODES=16
PROCESSES_PER_NODE=8
SIGNAL_SECONDS=300 # before the time limit
MAX_REQUEUES=20 # times this job may put itself back into the queue
MAX_RESTARTS=3 # new starts within one allocation after a failure; then requeue
NO_PROGRESS_LIMIT=3 # starts in a row from one checkpoint, then give up
KILL_GRACE_SECONDS=120 # other nodes may go on after the first has ended
HEALTH_CHECK=yes
HEALTH_CHECK_SECONDS=300 # a node that has not answered by then is bad
MAX_CLOCK_SKEW=10 # seconds
HEAD_ADDRESS_COMMAND=''
NODE_CHECK=(--gpus 8 --min-free-disk-gib 20 --min-free-memory-gib 8 --timeout 240 --command 'python -m hymba_train doctor --quick')

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
export OMP_NUM_THREADS=12
# Megatron-Core overlaps tensor-parallel communication only so
export CUDA_DEVICE_MAX_CONNECTIONS=1
# NCCL says why it fails
export NCCL_DEBUG=WARN
# kernels are compiled once a node; a cache in a shared home is slow and ranks race for it
export TRITON_CACHE_DIR=/tmp/hymba_triton_cache
SRUN_OPTIONS=(--cpus-per-task=96)
IN_ENVIRONMENT=()


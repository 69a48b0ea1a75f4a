#!/usr/bin/env bash
# Two machines by Slurm: sbatch examples/launching/slurm.sh [key=value ...]
#SBATCH --job-name=pcpo
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
# One task per machine, which starts its eight processes. A job that is preempted is queued again, and the same command
# resumes the run from its newest checkpoint.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?"start this with sbatch"}"

CONFIG=${CONFIG:-configs/flux_dev_pcpo.yaml}
DEEPSPEED=${DEEPSPEED:-ds_configs/zero3_hpz.json}
OUTPUT=${OUTPUT:-runs/flux_two_machines}   # a disk that all machines see
CACHE=${CACHE:-/tmp/pcpo_embeddings}       # each machine's own
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=110  # torchrun kills what has not left by then (PyTorch before 2.12: after 30 s)
HOSTS=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
FIRST=${HOSTS%%$'\n'*}
PORT=$((20000 + SLURM_JOB_ID % 20000))     # two jobs on one machine must not meet each other

exec srun --kill-on-bad-exit=1 bash -c 'exec torchrun --nnodes "$SLURM_NNODES" --node_rank "$SLURM_NODEID" \
  --nproc_per_node "${SLURM_GPUS_ON_NODE:-8}" --master_addr "$0" --master_port "$1" -m pcpo_fast train "${@:2}"' \
  "$FIRST" "$PORT" --config "$CONFIG" \
  "deepspeed=$DEEPSPEED" "output_dir=$OUTPUT" "model.embedding_cache=$CACHE" checkpoint.grace=100 "$@"

#!/usr/bin/env bash
# Two machines by torchrun, started on each with its number: bash examples/launching/torchrun.sh 0 [key=value ...]
set -euo pipefail

NUMBER=${1:?"which machine this is: 0 or 1"}
shift
FIRST=${FIRST:-node1}                      # where machine 0 can be reached from the others
MACHINES=${MACHINES:-2}
GPUS=${GPUS:-8}
PORT=${PORT:-29500}
CONFIG=${CONFIG:-configs/flux_dev_pcpo.yaml}
DEEPSPEED=${DEEPSPEED:-ds_configs/zero3_hpz.json}
OUTPUT=${OUTPUT:-runs/flux_two_machines}   # a disk that all machines see
CACHE=${CACHE:-/tmp/pcpo_embeddings}       # each machine's own

exec torchrun --nnodes "$MACHINES" --node_rank "$NUMBER" --nproc_per_node "$GPUS" \
  --master_addr "$FIRST" --master_port "$PORT" -m pcpo_fast train --config "$CONFIG" \
  "deepspeed=$DEEPSPEED" "output_dir=$OUTPUT" "model.embedding_cache=$CACHE" "$@"

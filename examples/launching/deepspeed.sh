#!/usr/bin/env bash
# Two machines by DeepSpeed's launcher, started on the first: bash examples/launching/deepspeed.sh [key=value ...]
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)

CONFIG=${CONFIG:-configs/flux_dev_pcpo.yaml}
DEEPSPEED=${DEEPSPEED:-ds_configs/zero3_hpz.json}
OUTPUT=${OUTPUT:-runs/flux_two_machines}   # a disk that both machines see
CACHE=${CACHE:-/tmp/pcpo_embeddings}       # each machine's own
PORT=${PORT:-29500}

exec deepspeed --hostfile "$here/hostfile" --master_port "$PORT" --module pcpo_fast train --config "$CONFIG" \
  "deepspeed=$DEEPSPEED" "output_dir=$OUTPUT" "model.embedding_cache=$CACHE" "$@"

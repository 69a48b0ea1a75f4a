#!/usr/bin/env bash
# PCPO on FLUX.1-dev, all weights, on eight GPUs of 80 GB.
#
#   bash examples/8x80gb_flux_full/run.sh prompts.train=PROMPTS.txt prompts.heldout=OTHERS.txt
#
# Checks everything first (pcpo-fast preflight), trains only if nothing failed, and goes on where an interrupted run
# stopped. Further settings are passed on as they are.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
config=examples/8x80gb_flux_full/config.yaml
python -m pcpo_fast preflight --config "$config" --gpus 8 --gpu-memory 80 "$@"
exec deepspeed --num_gpus 8 train.py --config "$config" "$@"

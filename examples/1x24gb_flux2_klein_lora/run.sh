#!/usr/bin/env bash
# PCPO on FLUX.2-klein-base-4B with LoRA, on one GPU of 24 GB.
#
#   bash examples/1x24gb_flux2_klein_lora/run.sh prompts.train=PROMPTS.txt prompts.heldout=OTHERS.txt
#
# Checks everything first (pcpo-fast preflight), trains only if nothing failed, and goes on where an interrupted run
# stopped. Further settings are passed on as they are.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
config=examples/1x24gb_flux2_klein_lora/config.yaml
python -m pcpo_fast preflight --config "$config" --gpus 1 --gpu-memory 24 "$@"
exec python train.py --config "$config" "$@"

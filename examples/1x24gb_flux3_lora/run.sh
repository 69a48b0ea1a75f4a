#!/usr/bin/env bash
# PCPO on FLUX.3 klein base with LoRA, on one GPU of 24 GB.
#
#   bash examples/1x24gb_flux3_lora/run.sh prompts.train=PROMPTS.txt prompts.heldout=OTHERS.txt
#
# Checks everything first (pcpo-fast preflight), trains only if nothing failed, and continues where an interrupted run
# stopped. Further settings are passed on as they are. Paths start from where you stand, the run directory too.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/../find_python.sh"
"$python" -m pcpo_fast preflight --config "$here/config.yaml" --gpus 1 --gpu-memory 24 "$@"
exec "$python" -m pcpo_fast train --config "$here/config.yaml" "$@"

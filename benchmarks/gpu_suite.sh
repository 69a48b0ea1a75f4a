#!/usr/bin/env bash
# Kernel tests on this machine's GPU, then, only if they pass, the measurements: about 18 minutes.
#
#   benchmarks/gpu_suite.sh                  results in benchmarks/results/<device>/
#   OUT=folder PYTHON=python3 benchmarks/gpu_suite.sh
#
# Needs PyTorch with Triton, pytest, hypothesis and numpy; nothing has to be installed from this repository. The training
# step is measured where diffusers, peft and DeepSpeed are installed, too; SIZE=small for a GPU of 24 GB.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [[ -z "${PYTHON:-}" ]]; then
  PYTHON=python3
  [[ -x .venv/bin/python ]] && PYTHON=.venv/bin/python
fi
export PYTHONPATH="kernels:.${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1
unset TRITON_INTERPRET PCPO_KERNELS

name=$("$PYTHON" -c 'import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else "")')
if [[ -z "$name" ]]; then
  echo "error: PyTorch sees no GPU on this machine" >&2
  exit 2
fi
OUT="${OUT:-benchmarks/results/$(tr '[:upper:]' '[:lower:]' <<<"$name" | tr -cs 'a-z0-9\n' '_')}"
mkdir -p "$OUT"
echo "$name -> $OUT"

# A test that hangs must not eat the time of the measurements.
if ! timeout "${TEST_SECONDS:-240}" "$PYTHON" -m pytest tests/kernels/device -q -x -p no:cacheprovider --durations=10 \
  >"$OUT/kernel_tests.log" 2>&1; then
  tail -n 60 "$OUT/kernel_tests.log"
  echo "error: the kernel tests fail on this GPU, so nothing was measured (whole log: $OUT/kernel_tests.log)" >&2
  exit 1
fi
tail -n 15 "$OUT/kernel_tests.log"

# Attention backends that are installed here, against PyTorch's own, and waits for the GPU within a phase; the
# measurements below need neither.
trainer=0
timeout "${TEST_SECONDS:-240}" "$PYTHON" -m pytest tests/policies/test_attention_gpu.py tests/training/test_waiting.py -m gpu -q \
  -p no:cacheprovider >"$OUT/trainer_tests.log" 2>&1 || trainer=$?
tail -n 40 "$OUT/trainer_tests.log"
if [[ $trainer != 0 && $trainer != 5 ]]; then # 5: no test was collected, since diffusers is not installed
  echo "error: an attention backend fails, or a phase waits for this GPU (whole log: $OUT/trainer_tests.log)" >&2
fi

"$PYTHON" benchmarks/kernel_times.py --out "$OUT" --budget "${BENCH_SECONDS:-210}"
"$PYTHON" benchmarks/block_ops.py --out "$OUT" --budget "${BLOCK_SECONDS:-150}"
if "$PYTHON" -c 'import deepspeed, diffusers, peft' 2>/dev/null; then
  # A failure here must not cost what was measured before.
  "$PYTHON" benchmarks/flux_step.py --size "${SIZE:-full}" --json "$OUT/flux_step.json" --repeats 3 \
    --budget-seconds "${STEP_SECONDS:-420}" && "$PYTHON" benchmarks/plot_step.py "$OUT/flux_step.json" \
    --out "$OUT/flux_step.png" || echo "the training step was not measured in full"
else
  echo "no measurement of a training step: diffusers, peft and DeepSpeed are not all installed"
fi
"$PYTHON" benchmarks/plot_kernels.py "$OUT/kernels.json" --out "$OUT" || echo "no plots: matplotlib is not installed"
[[ $trainer == 0 || $trainer == 5 ]]

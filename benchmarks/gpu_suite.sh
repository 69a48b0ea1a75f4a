#!/usr/bin/env bash
# Everything worth knowing of this machine's GPU in the minutes there are, the most valuable first.
#
#   benchmarks/gpu_suite.sh --minutes 9      results in benchmarks/results/<device>/
#   benchmarks/gpu_suite.sh --dry-run        the same on a CPU: tiny sizes, Triton's interpreter, no number of value
#   OUT=folder PYTHON=python3 benchmarks/gpu_suite.sh
#
# Needs PyTorch with Triton, pytest, pytest-xdist, hypothesis and numpy; nothing has to be installed from this
# repository. The training step is measured where diffusers, peft, pydantic and DeepSpeed are installed, too.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [[ -z "${PYTHON:-}" ]]; then
  PYTHON=python3
  [[ -x .venv/bin/python ]] && PYTHON=.venv/bin/python
fi
export PYTHONPATH="kernels:.${PYTHONPATH:+:$PYTHONPATH}"
exec "$PYTHON" benchmarks/gpu_suite.py "$@"

#!/usr/bin/env bash
# Collect what a GPU machine without access to a registry lacks for the training step's benchmark: 11 MB of wheels.
#
#   benchmarks/wheels.sh FOLDER [PYTHON_VERSION]       for Python 3.12 on x86-64 Linux
#
# There: python3 -m pip install --no-index --no-deps --target /tmp/site FOLDER/*.whl
#        PYTHONPATH=/tmp/site benchmarks/gpu_suite.sh
#
# pydantic_core is compiled for one version of Python: what is collected for 3.12 is of no use to another.
set -euo pipefail
folder=$(realpath -m "${1:?usage: benchmarks/wheels.sh FOLDER [PYTHON_VERSION]}")
version="${2:-3.12}"
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [[ -z "${PYTHON:-}" ]]; then
  PYTHON=python3
  [[ -x .venv/bin/python ]] && PYTHON=.venv/bin/python
fi
pip=("$PYTHON" -m pip --disable-pip-version-check --quiet)
mkdir -p "$folder"
rm -f "$folder"/*.whl # two versions of one package cannot be installed together

mapfile -t names < <(grep -v -e '^#' -e '^deepspeed$' benchmarks/wheels.txt)
"${pip[@]}" download --no-deps --only-binary=:all: --implementation cp --python-version "$version" \
  --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
  --constraint constraints.txt --dest "$folder" "${names[@]}"
deepspeed=$(grep '^deepspeed==' constraints.txt)
DS_BUILD_OPS=0 "${pip[@]}" wheel --no-deps --wheel-dir "$folder" "$deepspeed"

for name in "${names[@]}" deepspeed; do
  compgen -G "$folder/${name//-/_}-*.whl" >/dev/null || { echo "error: no wheel of $name in $folder" >&2; exit 1; }
done
du -ch "$folder"/*.whl

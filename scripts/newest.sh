#!/usr/bin/env bash
# The quick tests on the newest versions that pyproject.toml allows, which has lower bounds only:
# scripts/newest.sh [pytest arguments]. The pair of scripts/oldest.sh. On Linux the plain wheel of torch is the CUDA build,
# several gigabytes: TORCH_INDEX=ADDRESS names another index, TORCH=torch==2.13.0 another torch. VENV is where it goes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=${VENV:-.venv-newest}
[ -x "$venv/bin/python" ] || "${PYTHON:-python3.11}" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check --no-input install --quiet --upgrade "$@"; }

pip ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} "${TORCH:-torch}"
pip --editable '.[serve,quant,dev]'
"$venv/bin/python" -m pip list --format=freeze | grep -E '^(torch|transformers|peft|trl|accelerate|safetensors)=='
OMP_NUM_THREADS=1 "$venv/bin/python" -m pytest -m "not slow and not gpu" "$@"

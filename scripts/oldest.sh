#!/usr/bin/env bash
# The quick tests on the oldest torch that pyproject.toml promises: scripts/oldest.sh [pytest arguments]
# WITH=all takes the oldest transformers, accelerate, trl, datasets, peft, bitsandbytes and safetensors too. On Linux the
# plain wheel of torch is the CUDA build, several gigabytes; TORCH_INDEX=ADDRESS names another index. VENV is where all
# of it goes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=${VENV:-.venv-oldest}
oldest() { sed -n "s/.*\"$1\(\[[a-z]*\]\)\{0,1\}>=\([0-9.]*\)\".*/$1==\2/p" pyproject.toml; }

[ -x "$venv/bin/python" ] || "${PYTHON:-python3.11}" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check --no-input install --quiet "$@"; }

bounds=("$(oldest torch)")
if [ "${WITH:-torch}" = all ]; then
    for name in transformers accelerate trl datasets peft bitsandbytes safetensors; do bounds+=("$(oldest $name)"); done
    pip ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} "${bounds[@]}" --editable '.[serve,quant,dev]'
else
    pins=$(mktemp)
    trap 'rm -f "$pins"' EXIT
    grep -vE '^(torch|sympy)==' constraints.txt >"$pins" # torch pins sympy itself
    pip ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} --constraint "$pins" "${bounds[@]}" --editable '.[serve,quant,dev]'
fi
echo "${bounds[@]}"
OMP_NUM_THREADS=1 "$venv/bin/python" -m pytest -m "not slow and not gpu" "$@"

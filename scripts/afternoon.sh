#!/usr/bin/env bash
# A whole afternoon with the commands: rows in Alpaca's form are looked at, trained on, watched, evaluated, talked to,
# merged, exported, converted, compared. Every command is printed before it runs; the first that fails ends the script.
#
#   scripts/afternoon.sh [FOLDER]          # in a terminal, piped, or without one
#   STEPS=20 ROWS=200 scripts/afternoon.sh FOLDER   # shorter
set -euo pipefail

place=${1:-$(mktemp -d)}
steps=${STEPS:-200}
rows=${ROWS:-1500}
python=${PYTHON:-python}
mkdir -p "$place"
cd "$place"

run() {
printf '\n$ lora-lite %s\n' "$*"
    "$python" -m lora_lite.cli "$@"
}

"$python" - "$rows" >rows.jsonl <<'EOF'
import json
import sys

from lora_lite.demo.data import wordmath_rows

for row in wordmath_rows("train", int(sys.argv[1])):
    print(json.dumps({"instruction": row["prompt"], "input": "", "output": row["completion"]}))
EOF
head -n 20 rows.jsonl >asked.jsonl

printf '\n%s\n' "== look"
run data rows.jsonl --rows 2
run plan --method lora --r 8 --gpu 8GB
run train --data rows.jsonl --dry-run --steps "$steps"

printf '\n%s\n' "== train two"
run train --data rows.jsonl --steps "$steps" --eval-every 50 --score 20 --out runs/a
run train --config runs/a/run.yaml --method dora --r 4 --out runs/b

printf '\n%s\n' "== watch"
tail -n 2 runs/a/log.jsonl
ls runs/a

printf '\n%s\n' "== evaluate and talk"
run eval --adapter runs/a --data asked.jsonl
run generate --adapter runs/a --data asked.jsonl --rows 3 --max-new-tokens 32
printf 'Tom has 3 apples and buys 4 more. How many has he?\n/adapter none\nTom has 3 apples and buys 4 more. How many has he?\n/help\n/quit\n' |
    run chat runs/a runs/b

printf '\n%s\n' "== what is in them"
run info runs/a
run diff runs/a runs/b || [ $? = 1 ] # 1: they differ
run check runs/a

printf '\n%s\n' "== ship"
run merge runs/a --out merged
run eval --model merged --data asked.jsonl
run convert runs/a --to peft --out exported
run check exported --model demo
run convert exported --to lora_lite --out back.safetensors
run diff runs/a back.safetensors || [ $? = 1 ]
run scale runs/a --by 0.5 --out weaker.safetensors
run combine runs/a weaker.safetensors --out both.safetensors
run cite dora
echo
echo "all of it lies in $PWD"

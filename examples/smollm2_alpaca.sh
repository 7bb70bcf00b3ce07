#!/usr/bin/env bash
# Fine-tunes SmolLM2 on an Alpaca file; further arguments are overrides of the config.
#   MODEL=smollm2_hf DATA=alpaca.json bash examples/smollm2_alpaca.sh train.steps=5
# NPROC: processes, 1 by default; MODEL and DATA are relative to the working directory.
set -euo pipefail
: "${MODEL:?directory of the model, see examples/README.md}"
: "${DATA:?Alpaca file, .json or .jsonl}"
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

exec torchrun --standalone --nproc-per-node "${NPROC:-1}" "$root/sft_fast/train.py" \
  --config "$root/examples/smollm2_alpaca.yaml" \
  "model.path=$MODEL" "data.train=$DATA" "data.eval=$DATA" "$@"

#!/usr/bin/env bash
# datasets.map casts what a function returns back to the column's old type where it can.
# Guess: the column has the type of what the function returns.
# Seen with datasets 5.2.0: texts made of numbers are numbers again, "007" is 7, and a number cut
# to an integer is a float again; a text that is no number makes the column texts.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet datasets==5.2.0
cat > probe.py <<'PYTHON'
import sys

import datasets
from datasets import Dataset

numbers = Dataset.from_dict({"x": [7, 12]})
padded = numbers.map(lambda row: {"x": f"{row['x']:03d}"})
named = numbers.map(lambda row: {"x": f"no. {row['x']}"})
whole = Dataset.from_dict({"x": [7.9]}).map(lambda row: {"x": int(row["x"])})
print("datasets", datasets.__version__)
print("padded:", padded["x"][:], padded.features)
print("named:", named["x"][:], "whole:", whole["x"][:], whole.features)
is_as_seen = (
    padded["x"][:] == [7, 12]
    and named["x"][:] == ["no. 7", "no. 12"]
    and whole.features["x"].dtype == "float64"
)
sys.exit(0 if is_as_seen else 1)
PYTHON
HF_HOME="$folder/cache" HF_HUB_OFFLINE=1 venv/bin/python probe.py

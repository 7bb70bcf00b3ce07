#!/usr/bin/env bash
# datasets parses texts as JSON in a column that holds a number or a list somewhere.
# Guess: where a JSON column has several types, each value keeps its own.
# Seen with datasets 5.2.0: the column becomes Json, and a text that is JSON by itself is parsed:
# "007" is 7, "true" is True, "[1]" is a list. One row with a bare number changes all the others.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet datasets==5.2.0
cat > probe.py <<'PYTHON'
import json
import sys

import datasets

written = ["007", "true", "[1]", "no"]


def read(name, values):
    with open(name, "w") as file:
        file.writelines(json.dumps({"answer": value}) + "\n" for value in values)
    return datasets.load_dataset("json", data_files=name, split="train")["answer"][:]


texts, mixed = read("texts.jsonl", written), read("mixed.jsonl", [*written, 7])
print("datasets", datasets.__version__)
print("texts alone:", texts)
print("with a number in the last row:", mixed)
sys.exit(0 if texts == written and mixed == [7, True, [1], "no", 7] else 1)
PYTHON
HF_HOME="$folder/cache" HF_HUB_OFFLINE=1 venv/bin/python probe.py

#!/usr/bin/env bash
# datasets reads answers that all look like a date as points in time, in chats too.
# Guess: a JSON text is a text; types are guessed in CSV only.
# Seen with datasets 5.2.0 and pyarrow 26.0.1: "2024-01-02" becomes datetime(2024, 1, 2, 0, 0), at
# any depth, so that a chat template prints "2024-01-02 00:00:00". One other text in the column
# brings the texts back.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet datasets==5.2.0 pyarrow==26.0.1
cat > probe.py <<'PYTHON'
import datetime
import json
import sys

import datasets
import pyarrow

rows = [{"messages": [{"role": "user", "content": f"2024-01-0{day}"}]} for day in (2, 3)]


def first_content(name, rows):
    with open(name, "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    table = datasets.load_dataset("json", data_files=name, split="train")
    return table[0]["messages"][0]["content"]


dates = first_content("dates.jsonl", rows)
mixed = first_content("mixed.jsonl", [*rows, {"messages": [{"role": "user", "content": "x"}]}])
print("datasets", datasets.__version__, "pyarrow", pyarrow.__version__)
print("dates alone:", repr(dates), "with another text:", repr(mixed))
sys.exit(0 if dates == datetime.datetime(2024, 1, 2) and mixed == "2024-01-02" else 1)
PYTHON
HF_HOME="$folder/cache" HF_HUB_OFFLINE=1 venv/bin/python probe.py

#!/usr/bin/env bash
# datasets.map answers from its cache after a helper that the function imports was edited.
# Guess: the fingerprint of a mapped function covers the code that it calls.
# Seen with datasets 5.2.0: it covers an imported function's name, not its body. A second process
# with another body gives the first one's rows.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet datasets==5.2.0
cat > probe.py <<'PYTHON'
import subprocess
import sys
from pathlib import Path

import datasets

Path("rows.jsonl").write_text('{"text": "a"}\n')
Path("prepare.py").write_text(
    "from datasets import load_dataset\n"
    "from helper import clean\n"
    "table = load_dataset('json', data_files='rows.jsonl', split='train')\n"
    "print(table.map(lambda row: {'text': clean(row['text'])})[0]['text'])\n"
)
seen = []
for body in ("text.upper()", "text + ' edited'"):
    Path("helper.py").write_text(f"def clean(text):\n    return {body}\n")
    command = [sys.executable, "-B", "prepare.py"]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    seen.append(result.stdout.split()[-1])
print("datasets", datasets.__version__)
print("first:", seen[0], "after the edit:", seen[1])
sys.exit(0 if seen == ["A", "A"] else 1)
PYTHON
HF_HOME="$folder/cache" HF_HUB_OFFLINE=1 venv/bin/python probe.py

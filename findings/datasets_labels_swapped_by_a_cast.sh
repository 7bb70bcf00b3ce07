#!/usr/bin/env bash
# datasets swaps labels where a column of ClassLabel is cast to the same names in another order.
# Guess: the names decide, or the cast is refused.
# Seen with datasets 5.2.0: the numbers stay, so every "neg" is now "pos".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet datasets==5.2.0
cat > probe.py <<'PYTHON'
import sys

import datasets
from datasets import ClassLabel, Dataset

table = Dataset.from_dict({"label": ["neg", "pos", "neg"]})
table = table.cast_column("label", ClassLabel(names=["neg", "pos"]))
other = table.cast_column("label", ClassLabel(names=["pos", "neg"]))
names = [[t.features["label"].int2str(number) for number in t["label"]] for t in (table, other)]
print("datasets", datasets.__version__)
print("before:", names[0], "after:", names[1])
sys.exit(0 if names == [["neg", "pos", "neg"], ["pos", "neg", "pos"]] else 1)
PYTHON
HF_HOME="$folder/cache" HF_HUB_OFFLINE=1 venv/bin/python probe.py

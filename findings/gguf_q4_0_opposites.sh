#!/usr/bin/env bash
# GGUF's Q4_0 and Q5_0 keep the sign of the largest value and cut its opposite down.
# Guess: a symmetric format gives w and -w back as opposite numbers.
# Seen with gguf 0.19.0: the scale has the sign of a block's first largest value, which alone gets
# the code -8 (-16). Of 1 and -1 the later comes back as 0.875 of itself (Q5_0: 0.9375).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet gguf==0.19.0 numpy==2.4.6
cat > probe.py <<'PYTHON'
import importlib.metadata
import sys

import numpy as np
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize, quantize


def pair(kind, first, second):
    block = np.zeros((1, 32), np.float32)
    block[0, :2] = first, second
    return dequantize(quantize(block, kind), kind)[0, :2].tolist()


seen = [pair(kind, *ends) for kind in (Kind.Q4_0, Kind.Q5_0) for ends in ((1, -1), (-1, 1))]
print("gguf", importlib.metadata.version("gguf"), "numpy", np.__version__)
print("Q4_0:", seen[:2], "Q5_0:", seen[2:])
sys.exit(0 if seen == [[1, -0.875], [-1, 0.875], [1, -0.9375], [-1, 0.9375]] else 1)
PYTHON
venv/bin/python probe.py

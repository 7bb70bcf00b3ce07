#!/usr/bin/env bash
# GGUF's MXFP4 block has its first 16 values in the low halves of the bytes, not in the first bytes.
# Guess: two neighbours share a byte, low half first, as in the files of gpt-oss.
# Seen with gguf 0.19.0: byte i holds the values i and i + 16. Bytes that are copied with their
# scales from one format to the other give a matrix of the right values at wrong places.
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
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

SCALE_OF_ONE, FIRST_BYTE = 127, 0x72  # the codes 2 (1.0) and 7 (6.0)
block = np.zeros((1, 17), np.uint8)
block[0, :2] = SCALE_OF_ONE, FIRST_BYTE
(values,) = dequantize(block, GGMLQuantizationType.MXFP4)
places = {int(i): float(values[i]) for i in values.nonzero()[0]}
print("gguf", importlib.metadata.version("gguf"), "numpy", np.__version__)
print("one byte 0x72:", places)
sys.exit(0 if places == {0: 1.0, 16: 6.0} else 1)
PYTHON
venv/bin/python probe.py

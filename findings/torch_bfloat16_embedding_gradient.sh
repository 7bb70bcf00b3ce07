#!/usr/bin/env bash
# A bfloat16 embedding's gradient stops growing at 256 occurrences of a token, on a CPU.
# Guess: as every product and sum of torch, it is summed in fp32 and rounded once.
# Seen with torch 2.13.0: a token that occurs 1000 times, with a gradient of 1 each, gets 256: each
# row is added to a bfloat16 sum. The same as a product with one-hot rows gives 1000.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet torch==2.13.0 numpy==2.3.5
cat > probe.py <<'PYTHON'
import sys

import torch
from torch.nn import functional

tokens = torch.zeros(1000, dtype=torch.long)
table = torch.zeros(4, 1, dtype=torch.bfloat16, requires_grad=True)
one_hot = functional.one_hot(tokens, 4).bfloat16()
outputs = {"embedding": functional.embedding(tokens, table), "product": one_hot @ table}
seen = {
    name: torch.autograd.grad(output.sum(), table)[0][0].item() for name, output in outputs.items()
}
print("torch", torch.__version__)
print("gradient of the row:", seen)
sys.exit(0 if seen == {"embedding": 256.0, "product": 1000.0} else 1)
PYTHON
venv/bin/python probe.py

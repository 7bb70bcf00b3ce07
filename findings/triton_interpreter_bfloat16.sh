#!/usr/bin/env bash
# Triton's interpreter cuts fp32 off when it stores bfloat16, where PyTorch and GPUs round to nearest.
# Guess: TRITON_INTERPRET=1 gives a kernel's own numbers, so a bf16 kernel can be tested on a CPU.
# Seen with triton 3.9.0 and torch 2.13.0: 1 + 3/512, which lies nearer to 1.0078125, becomes 1.0.
# A kernel's bf16 error in the interpreter is up to twice that on a GPU, and always towards zero.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet torch==2.13.0 triton==3.9.0 numpy==2.3.5
cat > cast.py <<'PYTHON'
import sys

import torch
import triton
import triton.language as tl


@triton.jit
def cast(out, x, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, tl.load(x + i).to(tl.bfloat16))


x = torch.tensor([1 + 3 / 512, -(1 + 3 / 512)])
out = torch.empty(2, dtype=torch.bfloat16)
cast[(1,)](out, x, 2)
print("triton", triton.__version__, "torch", torch.__version__)
print("interpreter:", out.tolist())
print("PyTorch:    ", x.bfloat16().tolist())
sys.exit(0 if out.tolist() == [1.0, -1.0] and x.bfloat16().tolist() == [1.0078125, -1.0078125] else 1)
PYTHON
TRITON_INTERPRET=1 venv/bin/python cast.py

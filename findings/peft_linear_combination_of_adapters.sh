#!/usr/bin/env bash
# PEFT's linear combination of an adapter with itself, half and half, is twice the adapter.
# Guess: add_weighted_adapter(..., "linear") makes the weighted sum of what the adapters add.
# Seen with peft 0.21.2: the weights' square roots go to A and B each, and A and B are summed apart,
# so every A is multiplied with every B. Only an adapter alone comes out as it should.
# "cat" and "svd" give the sum.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet torch==2.13.0 peft==0.21.2 transformers==5.24.0
cat > probe.py <<'PYTHON'
import sys

import peft
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

torch.manual_seed(0)
config = LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), config, adapter_name="one")
model.add_adapter("same", config)
layer = model.base_model.model[0]
for part in (layer.lora_A, layer.lora_B):
    part["same"].load_state_dict(part["one"].state_dict())
factors = {}
for kind in ("linear", "cat", "svd"):
    model.add_weighted_adapter(["one", "same"], [0.5, 0.5], kind, combination_type=kind)
    ratio = layer.get_delta_weight(kind) / layer.get_delta_weight("one")
    factors[kind] = round(float(ratio.median()), 3)
print("peft", peft.__version__, "torch", torch.__version__)
print("half of an adapter and half of the same, as a multiple of it:", factors)
sys.exit(0 if factors == {"linear": 2.0, "cat": 1.0, "svd": 1.0} else 1)
PYTHON
venv/bin/python probe.py

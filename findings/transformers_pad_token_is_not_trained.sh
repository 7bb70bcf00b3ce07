#!/usr/bin/env bash
# pad_token_id in a config.json of transformers keeps one row of the embedding from being trained.
# Guess: it is what the tokenizer pads with; masks keep padding out of the loss.
# Seen with transformers 5.24.0 and torch 2.13.0: it is the embedding's padding_idx. Where it is the
# end of a turn, as is usual for want of a padding token, that token's row begins as zeros and gets
# no gradient in any text.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet torch==2.13.0 transformers==5.24.0
cat > probe.py <<'PYTHON'
import sys

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

END = 2
rows = {}
for pad in (None, END):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
        pad_token_id=pad,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    tokens = torch.tensor([[1, 5, END, 7, 3]])
    model(tokens, labels=tokens).loss.backward()
    weight = model.model.embed_tokens.weight
    rows[pad] = weight[END].any().item(), weight.grad[END].any().item()
print("transformers", transformers.__version__, "torch", torch.__version__)
print("pad_token_id: (is the row of token 2 random, has it a gradient)", rows)
sys.exit(0 if rows == {None: (True, True), END: (False, False)} else 1)
PYTHON
venv/bin/python probe.py

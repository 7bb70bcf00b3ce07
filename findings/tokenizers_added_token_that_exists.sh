#!/usr/bin/env bash
# tokenizers counts a token that the model has as added, and it then splits longer words.
# Guess: adding a token of the vocabulary changes nothing and returns 0.
# Seen with tokenizers 0.23.3: it returns 1, the vocabulary keeps its size, and the text of the
# token is cut out before the merges run: " other", one token before, becomes " ", "o", "the", "r".
# An embedding that grows by the number returned has a row too many; every text is longer.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet tokenizers==0.23.3
cat > probe.py <<'PYTHON'
import sys

import tokenizers
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

tokenizer = Tokenizer(models.BPE())
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
trainer = trainers.BpeTrainer(
    vocab_size=330, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
)
tokenizer.train_from_iterator(["the other mother the brother other"] * 9, trainer)
size, before = tokenizer.get_vocab_size(), tokenizer.encode("the other").tokens
number = tokenizer.token_to_id("the")
added = tokenizer.add_tokens(["the"])
after = tokenizer.encode("the other").tokens
print("tokenizers", tokenizers.__version__)
print("added:", added, "growth:", tokenizer.get_vocab_size() - size)
print("before:", before, "after:", after)
is_as_seen = (
    added == 1
    and tokenizer.get_vocab_size() == size
    and tokenizer.token_to_id("the") == number
    and before == ["the", "\u0120other"]
    and after == ["the", "\u0120", "o", "the", "r"]
)
sys.exit(0 if is_as_seen else 1)
PYTHON
venv/bin/python probe.py

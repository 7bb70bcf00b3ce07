#!/usr/bin/env bash
# tokenizers gives added tokens behind a gap other ids than tokenizer.json says.
# Guess: an added token's "id" in tokenizer.json is its id; where one is taken out, a gap stays.
# Seen with tokenizers 0.23.3: the ids close up without a word. The file says 5, the tokenizer 4.
# A token that nobody uses, taken out of the file, moves all behind it to other embeddings.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet tokenizers==0.23.3
cat > probe.py <<'PYTHON'
import json
import sys

import tokenizers
from tokenizers import Tokenizer, models, pre_tokenizers

tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, "[UNK]": 2}, unk_token="[UNK]"))
tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer.add_special_tokens(["<user>", "<unused>", "<end>"])
content = json.loads(tokenizer.to_str())
content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] != "<unused>"]
in_file = {t["content"]: t["id"] for t in content["added_tokens"]}
loaded = Tokenizer.from_str(json.dumps(content))
in_use = {name: loaded.token_to_id(name) for name in in_file}
print("tokenizers", tokenizers.__version__)
print("in the file:", in_file, "in use:", in_use, "a <end>:", loaded.encode("a <end>").ids)
is_as_seen = (
    in_file == {"<user>": 3, "<end>": 5}
    and in_use == {"<user>": 3, "<end>": 4}
    and loaded.encode("a <end>").ids == [0, 4]
)
sys.exit(0 if is_as_seen else 1)
PYTHON
venv/bin/python probe.py

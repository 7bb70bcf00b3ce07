#!/usr/bin/env bash
# huggingface_hub's allow_patterns and ignore_patterns do not stop at a slash, nor at a folder.
# Guess: as in a shell, "*.safetensors" is the top folder's files, and ignoring "onnx" leaves the
# folder of that name out.
# Seen with huggingface_hub 2.4.0: the first takes those of every folder below too, so a model whose
# weights lie there a second time is downloaded twice; the second leaves out nothing.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet huggingface_hub==2.4.0
cat > probe.py <<'PYTHON'
import sys

import huggingface_hub
from huggingface_hub.utils import filter_repo_objects

files = ["model.safetensors", "original/model.safetensors", "onnx/model.onnx"]
allowed = list(filter_repo_objects(files, allow_patterns="*.safetensors"))
kept = list(filter_repo_objects(files, ignore_patterns="onnx"))
print("huggingface_hub", huggingface_hub.__version__)
print("allow *.safetensors:", allowed)
print("ignore onnx:", kept)
sys.exit(0 if allowed == files[:2] and kept == files else 1)
PYTHON
venv/bin/python probe.py

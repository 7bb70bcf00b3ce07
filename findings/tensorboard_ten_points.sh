#!/usr/bin/env bash
# TensorBoard's EventAccumulator keeps 10 of the points that TensorBoard's own writer logged.
# Guess: a curve is read whole, or at least up to the 10,000 scalars that its limit names.
# Seen with tensorboard 2.21.0: tensorboard.summary.Writer logs scalars as tensors, whose limit is
# 10. Of 1000 points 10 are left, drawn at random but for the last; nothing says so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet tensorboard==2.21.0
cat > probe.py <<'PYTHON'
import sys

import tensorboard.version
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary import Writer

writer = Writer("run")
for step in range(1000):
    writer.add_scalar("loss", float(step), step)
writer.close()
events = EventAccumulator("run")
events.Reload()
points = [event.step for event in events.Tensors("loss")]
print("tensorboard", tensorboard.version.VERSION)
print("scalars:", events.Tags()["scalars"], "tensors:", len(points), "points", points)
sys.exit(0 if events.Tags()["scalars"] == [] and len(points) == 10 and points[-1] == 999 else 1)
PYTHON
venv/bin/python probe.py

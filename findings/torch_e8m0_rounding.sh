#!/usr/bin/env bash
# torch rounds a scale in float8_e8m0fnu to the nearest power of two, and drops its sign.
# Guess: the cast takes the exponent, rounding down as the MX formats do, or up, so that a block
# divided by its scale fits the element type.
# Seen with torch 2.13.0: 1.4 becomes 1 and 1.5 becomes 2, so a block of maximum 1.4 * 448 is divided
# by 1 and its largest values are cut off, one of 1.5 * 448 is not. -2 becomes 2, 0 becomes 2**-127.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet torch==2.13.0 numpy==2.3.5
cat > probe.py <<'PYTHON'
import sys

import torch

MAXIMUM = torch.finfo(torch.float8_e4m3fn).max


def scale_of(number):
    return torch.tensor(number).to(torch.float8_e8m0fnu).float().item()


def round_trip(largest):
    scale = scale_of(largest / MAXIMUM)
    return (torch.tensor(largest) / scale).to(torch.float8_e4m3fn).float().item() * scale


seen = [scale_of(number) for number in (1.4, 1.5, -2.0, 0.0)]
maxima = {factor: round_trip(factor * MAXIMUM) / MAXIMUM for factor in (1.4, 1.5)}
print("torch", torch.__version__)
print("1.4, 1.5, -2, 0:", seen, "maxima, in units of 448:", maxima)
is_as_seen = seen == [1.0, 2.0, 2.0, 2.0**-127] and maxima[1.4] == 1.0 and maxima[1.5] >= 1.42
sys.exit(0 if is_as_seen else 1)
PYTHON
venv/bin/python probe.py

"""Numbers that more than one module must agree on."""

IGNORE_INDEX = -100

"""Oracles: the plainest correct form of what the rest of the package does fast."""

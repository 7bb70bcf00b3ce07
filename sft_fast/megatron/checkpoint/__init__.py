"""Whole checkpoints: what is saved, by whom, and how it is read back."""

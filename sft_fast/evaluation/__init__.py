"""Answers of the exported model, and when to stop early."""

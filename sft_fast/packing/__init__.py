"""Samples to packs to steps to micro-batches."""

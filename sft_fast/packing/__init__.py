"""Samples to packed rows to steps to micro-batches."""

"""Attention over packed samples: the backends, their choice, context parallelism."""

"""What a model is, how it is laid out over ranks, what it costs; no torch."""

"""Choices of the config section `evaluation`; imports nothing, because config imports it."""

BUILT_IN_METRICS = {"loss": False, "perplexity": False, "accuracy": True}
"""Value of `evaluation.best_by` beside registered metrics -> whether a greater value is better."""

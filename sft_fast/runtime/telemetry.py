"""Turns third-party telemetry off, by environment variables; imports none of the libraries."""

import os

# The last one asks every program for it: https://consoledonottrack.com
VARIABLES = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "GRADIO_ANALYTICS_ENABLED": "False",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "1",
}


def switch_off() -> None:
    """Sets their variables, where the user has not; to be called before they are imported."""
    for name, value in VARIABLES.items():
        os.environ.setdefault(name, value)

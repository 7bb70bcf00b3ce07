"""Telemetry of third-party libraries, turned off by environment variables; imports none of them."""

import os

# The last one asks every program for it: https://consoledonottrack.com
VARIABLES = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "GRADIO_ANALYTICS_ENABLED": "False",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "1",
}


def switch_off() -> None:
    """Sets the variables that the user has not set; called before the libraries are imported."""
    for name, value in VARIABLES.items():
        os.environ.setdefault(name, value)

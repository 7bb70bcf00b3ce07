"""A server that has imported what ranks need: a process that is forked from it starts at once."""

import multiprocessing
import multiprocessing.forkserver
import os
from pathlib import Path
from typing import Any
from unittest import mock

TESTS = Path(__file__).parent
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["faults.hooks"])


def ensure_running() -> None:
    """Starts the server of this process, if it is not there."""
    # It looks for what it imports ahead of time in its environment only.
    paths = [str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")]
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(paths)):
        multiprocessing.forkserver.ensure_running()


def context() -> Any:
    """What starts processes: the server; with a GPU nothing imported, since a forked process cannot
    use what its server has seen of a GPU."""
    import torch

    if torch.cuda.device_count():
        return multiprocessing.get_context("spawn")
    ensure_running()
    return CONTEXT

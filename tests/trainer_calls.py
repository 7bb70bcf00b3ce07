"""The trainer's command line, inside a rank of a pool."""

import contextlib
import io


def call_main(arguments: list[str]) -> tuple[int, str, str]:
    """Runs the trainer; returns (exit code, stdout, stderr).

    Its plugins are forgotten: the next run in this process finds what a process of its own would.
    """
    from sft_fast.registry import Registry, forget
    from sft_fast.train import main

    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(arguments)
    finally:
        for file in {file for registry in Registry.every for file in registry.files.values()}:
            forget(file)
    return code, out.getvalue(), err.getvalue()

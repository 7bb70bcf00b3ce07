"""How the commands and ranks end; the table in docs/reliability.md says the same."""

FAILED = 1
"""A rank failed; of `check` and `preview`: there are problems."""
USER_ERROR = 2
"""A user error that can be fixed; a message says how."""
DAMAGED = 4
"""Files are not what they were when they were written."""
HANG = 75
"""Nothing moved, or an answer or a save took too long; rerun the same command to resume."""
INTERRUPTED = 130
BROKEN_PIPE = 141

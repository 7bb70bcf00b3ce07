"""The subcommands of `sft_fast`, one module per group.

A module's `add` describes its commands to argparse and names the function that runs each; what a
command needs beyond the standard library it imports when it runs.
"""

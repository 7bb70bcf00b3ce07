"""`python -m sft_fast` is the command `sft_fast`."""

from sft_fast.cli import main

if __name__ == "__main__":
    raise SystemExit(main())

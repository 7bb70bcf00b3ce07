"""Trains a model: `torchrun --nproc-per-node N sft_fast/train.py --config X.yaml a.b=c`.

Without arguments it runs the embedded demo. The config names a (backend, stage) pair; the trainer
registered for that pair does the work, for the default pair sft_fast/megatron/training.py.
"""

import argparse
import contextlib
import os
import signal
import sys
import traceback
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
if sys.path and sys.path[0] == str(FOLDER):
    # A script's own folder comes first on the path; our modules there are not top-level modules.
    sys.path[0] = str(FOLDER.parent)

from sft_fast.config.schema import load_config  # noqa: E402
from sft_fast.errors import exit_code  # noqa: E402
from sft_fast.exit_codes import FAILED  # noqa: E402
from sft_fast.redact import redact  # noqa: E402
from sft_fast.registry import (  # noqa: E402
    SFT,
    LateTrainer,
    Trainer,
    distrust,
    get_trainer,
    load_plugins,
    register_trainer,
    stages,
)
from sft_fast.runtime.kernel_cache import use_private_cache  # noqa: E402
from sft_fast.runtime.manifest import explain  # noqa: E402
from sft_fast.runtime.processes import die_with_parent, raise_file_limit  # noqa: E402
from sft_fast.runtime.run_directory import check_inputs  # noqa: E402
from sft_fast.runtime.telemetry import switch_off  # noqa: E402
from sft_fast.runtime.terminal import as_seen, flush_streams, open_streams  # noqa: E402
from sft_fast.runtime.warm_restart import keep_rank  # noqa: E402
from sft_fast.runtime.watchdog import watching  # noqa: E402

DEMO = Path("demo")
# Before plugins, so that none can take these names.
register_trainer(backend="megatron", stage=SFT)(LateTrainer("sft_fast.megatron.training:train"))
EXPORT = LateTrainer("sft_fast.megatron.export.run:export")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line of train.py."""
    parser = argparse.ArgumentParser(prog="train.py", description="Trains a model.")
    parser.add_argument("--config", type=Path, help="YAML file; without it the embedded demo runs")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument(
        "--allow-change",
        metavar="FIELD,...",
        help="resume from a checkpoint although these differ: checkpoint.allow_change",
    )
    # What `sft_fast export` runs in place of the trainer.
    parser.add_argument("--export", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--distrust", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="config keys to replace")
    # Overrides may stand before and behind options.
    return parser.parse_intermixed_args(argv)


def find_trainer(backend: str, stage: str, is_export: bool) -> Trainer:
    """What runs a stage, or the export of its checkpoint.

    Raises:
        ValueError: there is no such backend or stage; the message lists those that are there.
    """
    if is_export:
        return EXPORT
    # The stages of register_stage share the trainer of supervised fine-tuning.
    return get_trainer(backend, SFT if stage in stages.entries else stage)


def changes(arguments: argparse.Namespace) -> list[str]:
    """The override that `--allow-change` stands for."""
    if arguments.allow_change is None:
        return []
    return [f"checkpoint.allow_change=[{arguments.allow_change}]"]


def main(argv: list[str] | None = None) -> int:
    """Loads the config and runs its trainer.

    Returns: 0, or after a message for a user error a code of sft_fast.exit_codes.
    """
    arguments = parse_arguments(argv)
    switch_off()
    raise_file_limit()
    try:
        distrust((arguments.config or DEMO) if arguments.distrust else None)
        config = load_config(arguments.config, arguments.overrides + changes(arguments))
        load_plugins(config.plugins)
        use_private_cache()
        inputs = {"model.path": config.model.path, "tokenizer.path": config.tokenizer.path}
        check_inputs(Path(config.output_dir), inputs)
        trainer = find_trainer(config.backend, config.stage, arguments.export)
        if config.parallel.warm_restarts > 0 and not arguments.export:
            code = keep_rank(config.parallel.warm_restarts, lambda: preload(trainer))
            if code is not None:
                return code
        with watching(Path(config.output_dir), config.parallel.hang_timeout_s) as phases:
            return trainer(config, phases)
    except (ValueError, OSError) as error:
        if arguments.debug:
            print_traceback()
        elif is_first_to_fail():
            found = explain(error) if isinstance(error, OSError) and error.errno else str(error)
            text = f"error: {redact(found)}\n(--debug shows where)"
            with contextlib.suppress(OSError):
                print(as_seen(text, sys.stderr), file=sys.stderr, flush=True)
        return exit_code(error)


def preload(trainer: Trainer) -> None:
    """Imports what a trainer needs; one of a plugin is there already."""
    if isinstance(trainer, LateTrainer):
        trainer.load()


def print_traceback() -> None:
    """The exception that is being handled, without the secrets that libraries put into theirs."""
    with contextlib.suppress(OSError):
        print(redact(traceback.format_exc()), file=sys.stderr, flush=True)


def is_first_to_fail() -> bool:
    """True on one rank, so that an error all ranks meet is printed once."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_initialized():
        rank = os.environ.get("RANK", "0")
        return rank == "0" or not rank.isdecimal()
    store = distributed.distributed_c10d._get_default_store()
    return store.add("sft_fast/num_failed_ranks", 1) == 1


if __name__ == "__main__":
    open_streams()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        # A killed torchrun must not leave its ranks behind; they save if they can.
        die_with_parent(signal.SIGTERM)
    try:
        code = main()
    except Exception:  # recorded by the watchdog; connections and threads of a broken job may hang
        print_traceback()
        flush_streams()
        os._exit(FAILED)
    flush_streams()
    sys.exit(code)

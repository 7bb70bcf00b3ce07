"""Arguments that several commands share."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sft_fast.config.schema import Config
    from sft_fast.config.sections import ModelConfig, TokenizerConfig

Commands = argparse._SubParsersAction


def add_config(parser: argparse.ArgumentParser) -> None:
    """Adds a configuration file and overrides."""
    parser.add_argument(
        "config", type=Path, help="configuration file, or the name of a recipe (sft_fast ls)"
    )
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="keys to change")


def add_run(parser: argparse.ArgumentParser) -> None:
    """Adds a run directory."""
    parser.add_argument("run_dir", type=Path, metavar="OUT", help="output_dir of a run")


def add_trust(parser: argparse.ArgumentParser) -> None:
    """Adds the consent to run code that came with a run."""
    parser.add_argument(
        "--trust",
        action="store_true",
        help="run the Python files that the configuration of a run directory names",
    )


def heed_trust(parsed: argparse.Namespace, config: Path) -> None:
    """Keeps the code that a run's configuration names from being run, unless `--trust` says so."""
    from sft_fast.registry import distrust
    from sft_fast.runtime.run_directory import RUN_MARKER

    is_of_run = (config.parent / RUN_MARKER).exists()
    distrust(config if is_of_run and not parsed.trust else None)


def positive(text: str) -> int:
    """A whole number above 0, for argparse."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r}; expected a whole number above 0")
    return int(text)


def not_negative(text: str) -> int:
    """A whole number from 0, for argparse."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}; expected a whole number, 0 or more")
    return int(text)


def config_path(parsed: argparse.Namespace) -> Path:
    """The file that the user means: a path, or a recipe's name."""
    from sft_fast.recipes import find_recipe

    path: Path = parsed.config
    is_name = not path.suffix and path.parent == Path(".")
    # A folder may have a recipe's name, and no folder is a configuration.
    return find_recipe(str(path)) if is_name and not path.is_file() else path


def read_config(parsed: argparse.Namespace) -> Config:
    """Loads what `add_config` parsed.

    Raises:
        ValueError: the configuration is wrong, or there is no such recipe.
    """
    from sft_fast.config.schema import load_config

    path = config_path(parsed)
    heed_trust(parsed, path)
    return load_config(path, parsed.overrides)


def config_tokenizer(model: ModelConfig, tokenizer: TokenizerConfig) -> Any:
    """The tokenizer that a run would use.

    Raises:
        ValueError: it is neither here nor on the hub.
    """
    from sft_fast.data.tokenizer import load_tokenizer
    from sft_fast.models.locate import model_folder, tokenizer_source

    # The model's config.json is wanted too: it decides what is trained of the data.
    source = tokenizer_source(tokenizer, model_folder(model))
    return load_tokenizer(source, tokenizer.chat_template, add_tokens=tokenizer.add_tokens)

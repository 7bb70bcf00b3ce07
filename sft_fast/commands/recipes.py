"""`sft_fast init`, `ls` and `cp`: a configuration to start from."""

from __future__ import annotations

import argparse
import os
import shutil
import textwrap
from pathlib import Path
from typing import Any

from sft_fast.commands.arguments import Commands
from sft_fast.recipes import RECIPES, find_recipe, recipe_name

LONGEST_ROW = 8192
FILE_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".gz", ".zst")
SMALL_BYTES = 2_000_000
TEMPLATE = """\
# Written by `sft_fast init`. `sft_fast schema` lists every key.
output_dir: {output_dir}

model:
  path: {model}{model_note}
  # dtype: fp32               # on a CPU
  # recompute: full           # less memory for one more forward pass

data:
  train: {data}{data_note}
{evaluation}
  # format: messages          # default: told by the columns of the first row
  # fields: {{instruction: question}}   # our field: the name of your column
  over_length: error          # or drop, truncate_right, split_turns, ...

packing:
  capacity: {capacity:<17} # tokens per pack; samples of a pack stay apart

train:
  epochs: 2
  global_batch_size: 16       # rows per optimizer step, over all ranks
  micro_batch_size: 1         # rows per forward pass

parallel:
  tensor: 1                   # ranks that share a layer; see `sft_fast plan`
  # sequence: true            # with tensor > 1
  # overlap_grad_reduce: true

optim:
  lr: 1e-5                    # about 2e-4 with lora
  warmup_steps: {warmup:<13} # about a tenth of the steps

# lora: {{rank: 16, alpha: 32}}   # adapters in place of all weights
{router}
evaluation:
  every_steps: 50

checkpoint:
  every_steps: 200

# metrics: {{samples: 3}}         # answers before and after, in report.html
"""


def add(commands: Commands) -> None:
    """Describes `init`, `ls` and `cp` to argparse."""
    init = commands.add_parser("init", help="write a commented configuration for model and data")
    init.add_argument("model", help="directory or hub id of the weights to start from")
    init.add_argument("data", help="file, directory, glob or hub id of the training data")
    init.add_argument("-o", "--output", type=Path, default=Path("sft.yaml"), metavar="FILE")
    init.add_argument("--eval", help="evaluation data; default: 2 %% of the training data")
    init.set_defaults(run=run_init)
    listing = commands.add_parser("ls", help="list the recipes")
    listing.set_defaults(run=run_list)
    copy = commands.add_parser("cp", help="copy a recipe, to change it")
    copy.add_argument("recipe", help="its name, as `sft_fast ls` shows it")
    copy.add_argument("target", type=Path, nargs="?", help="default: ./NAME.yaml")
    copy.set_defaults(run=run_copy)


def run_init(parsed: argparse.Namespace) -> None:
    """Writes a commented configuration for a model and its data."""
    name = Path(parsed.model.rstrip("/")).name.lower()
    hf_config = model_config(Path(parsed.model))
    limit = model_limit(hf_config)
    holding_out = "  eval_fraction: 0.02         # held out of train; equal rows stay together"
    text = TEMPLATE.format(
        output_dir=f"outputs/{name}",
        model=parsed.model,
        model_note="" if os.path.isdir(parsed.model) else "   # a hub id; a directory works too",
        data=parsed.data,
        data_note=data_note(parsed.data),
        evaluation=f"  eval: {parsed.eval}" if parsed.eval else holding_out,
        capacity=min(limit or LONGEST_ROW, LONGEST_ROW),
        warmup=0 if is_small(parsed.data) else 10,
        router=router_lines(hf_config),
    )
    write_new(parsed.output, text)
    for name_given in (parsed.model, parsed.data):
        if is_missing(name_given):
            print(f"note: {name_given} does not exist yet")
    print(f"{parsed.output} is written. Next:")
    for command, meaning in (
        (f"check {parsed.output}", "finds what is wrong, at once"),
        (f"preview {parsed.output}", "shows what is trained"),
        (f"plan {parsed.output}", "says what fits and how long it takes"),
        (f"train {parsed.output}", "trains, evaluates, exports"),
        (f"chat outputs/{name}", "talks to the result"),
    ):
        print(f"  sft_fast {command:<26} # {meaning}")


def is_missing(path: str) -> bool:
    """True for what can only be a path, and is not there."""
    is_path = path.startswith(("/", "./", "../", "~")) or Path(path).suffix in FILE_SUFFIXES
    return is_path and "*" not in path and not os.path.exists(os.path.expanduser(path))


def is_small(source: str) -> bool:
    """True for a file whose training takes few steps, so that a warm-up would fill them."""
    return os.path.isfile(source) and os.path.getsize(source) < SMALL_BYTES


def model_config(folder: Path) -> dict[str, Any]:
    """The config.json of a model that lies in a directory; {} without one."""
    import json

    path = folder / "config.json"
    if not path.is_file():
        return {}
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def model_limit(hf_config: dict[str, Any]) -> int | None:
    """Positions of a model."""
    found = hf_config.get("max_position_embeddings")
    return found if isinstance(found, int) else None


def router_lines(hf_config: dict[str, Any]) -> str:
    """The load-balancing loss of a mixture of experts, on where transformers would add it."""
    from sft_fast.models.router import aux_loss_coef

    value = aux_loss_coef(hf_config)
    if not value:
        return ""
    mark = "" if hf_config.get("output_router_logits") else "# "
    setting = f"{mark}router: {{aux_loss_coef: {value}}}"
    return f"\n{setting:<29} # the load-balancing loss of config.json\n"


def data_note(source: str) -> str:
    """A comment with the columns of a local JSON Lines file."""
    if not source.endswith((".jsonl", ".json")) or not os.path.isfile(source):
        return ""
    from sft_fast.data.source import load_records

    row = next(iter(load_records(source)))
    return f"   # columns: {', '.join(row.values)}"


def run_list(parsed: argparse.Namespace) -> None:
    """Prints the recipes with their first line."""
    paths = sorted(RECIPES.rglob("*.yaml"))
    names = [recipe_name(path) for path in paths]
    width = max(map(len, names))
    room = max(shutil.get_terminal_size().columns - width - 2, 40)
    for name, path in zip(names, paths, strict=True):
        lines = textwrap.wrap(first_comment(path), room) or [""]
        print(f"{name:<{width}}  " + f"\n{'':<{width}}  ".join(lines))


def first_comment(path: Path) -> str:
    """The comment in the first line of a file; "" without one."""
    line = path.read_text(encoding="utf-8").split("\n", 1)[0]
    return line.removeprefix("#").strip() if line.startswith("#") else ""


def run_copy(parsed: argparse.Namespace) -> None:
    """Copies a recipe to a new file."""
    source = find_recipe(parsed.recipe)
    target = parsed.target or Path(source.name)
    if target.is_dir():
        target /= source.name
    write_new(target, source.read_text(encoding="utf-8"))
    print(target)


def write_new(path: Path, text: str) -> None:
    """Writes a file that must not exist yet."""
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise ValueError(f"{path} exists; name another file, or remove it first") from None

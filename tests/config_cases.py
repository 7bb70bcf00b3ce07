"""What the tests of configuration files share."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sft_fast.config.schema import Config, load_config
from sft_fast.errors import ConfigError, Problem

SMALLEST_SHAPE = {
    "hidden_size": 8,
    "num_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "ffn_hidden_size": 8,
}
BASE = """\
output_dir: out
model:
  path: some/model
data:
  train: train.jsonl
train:
  steps: 100
"""


def load_text(folder: Path, text: str, *overrides: str) -> Config:
    """Returns the config of a file `run.yaml` in `folder` that holds `text`."""
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(path, list(overrides))


def problems_of(call: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Problem, ...]:
    """Returns the problems of the ConfigError that the call must raise."""
    with pytest.raises(ConfigError) as caught:
        call(*args, **kwargs)
    return caught.value.problems


def only_problem(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Problem:
    """Returns the one problem of the ConfigError that the call must raise."""
    problems = problems_of(call, *args, **kwargs)
    assert len(problems) == 1, [str(problem) for problem in problems]
    return problems[0]


def line_of(problem: Problem) -> int:
    """Returns the line that the problem points at."""
    return int(problem.where.rpartition(":")[2])

"""Where a run stands is read as it was written, or refused with one clear message."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from sft_fast.megatron.checkpoint.train_state import (
    FORMAT_VERSION,
    STATE_FILE,
    TrainState,
    read_train_state,
    state_text,
)

STATE = TrainState(
    7, {"seed": "1"}, 3, {"spikes": [0.5]}, {"best": 0.25}, "there", {"end_ids": [2]}
)


def write(folder: Path, **changes: object) -> None:
    fields = json.loads(state_text(STATE)) | changes
    text = json.dumps({name: value for name, value in fields.items() if value is not None})
    (folder / STATE_FILE).write_text(text)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    (tmp_path / STATE_FILE).write_text(state_text(STATE))
    assert read_train_state(tmp_path) == STATE
    write(tmp_path, version=None)
    assert read_train_state(tmp_path) == STATE, "the first version did not write its number"


@pytest.mark.parametrize("version", [FORMAT_VERSION + 1, 0, "1", [1]])
def test_another_version_is_refused_with_both_numbers(tmp_path: Path, version: object) -> None:
    write(tmp_path, version=version, a_field_of_that_version=1)
    with pytest.raises(ValueError) as error:
        read_train_state(tmp_path)
    text = str(error.value)
    assert f"{tmp_path} has format version {version}, this sft_fast reads {FORMAT_VERSION}" in text
    assert "model.path" in text and "\n" not in text


@pytest.mark.parametrize("text", ["", "[]", "7", "{}", '{"step": 1, "fields": {}, "x": 2}', "{"])
def test_what_is_no_state_is_refused(tmp_path: Path, text: str) -> None:
    for content in (None, text):
        if content is not None:
            (tmp_path / STATE_FILE).write_text(content)
        with pytest.raises(ValueError, match=f"{tmp_path} is not a checkpoint"):
            read_train_state(tmp_path)


def test_reading_it_imports_no_torch() -> None:
    code = "import sys, sft_fast.megatron.checkpoint.train_state; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"

"""What would wait for ever, or for others that do not come."""

import os
from pathlib import Path

import pytest

from sft_fast.commands.export import lone_environment
from sft_fast.config.yaml_source import read_yaml
from sft_fast.data import template_limits
from sft_fast.data.source import load_records
from sft_fast.data.tokenizer import load_tokenizer
from sft_fast.errors import ConfigError
from sft_fast.evaluation.chat import Chat


@pytest.mark.fault("F38")
def test_a_pipe_is_no_data_and_no_configuration(tmp_path: Path) -> None:
    for name in ("rows.jsonl", "train/rows.csv", "run.yaml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        os.mkfifo(tmp_path / name)
    for source in (tmp_path / "rows.jsonl", tmp_path / "train"):
        with pytest.raises(ValueError, match="is a pipe or a device, and records are read more"):
            load_records(str(source))
    with pytest.raises(ConfigError, match="a pipe or a device"):
        read_yaml(tmp_path / "run.yaml")


@pytest.mark.fault("F38")
def test_an_export_in_the_pod_of_an_operator_waits_for_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    of_ranks = (
        *("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "PET_NNODES"),
        *("TORCHELASTIC_RUN_ID", "GROUP_RANK", "ROLE_WORLD_SIZE", "LOCAL_WORLD_SIZE"),
    )
    for name in of_ranks:
        monkeypatch.setenv(name, "7")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert not set(of_ranks) & lone_environment().keys()
    assert lone_environment()["CUDA_VISIBLE_DEVICES"] == "1"


@pytest.mark.fault("F38")
def test_a_template_without_end_does_not_hold_up_a_chat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_limits, "SECONDS", 0.3)
    chat = Chat.__new__(Chat)
    chat._tokenizer, chat._system = load_tokenizer("demo"), []
    loop = "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}"
    chat._tokenizer.chat_template = loop
    chat.forget()
    with pytest.raises(ValueError, match="the chat template takes more than"):
        chat.answer("hello")

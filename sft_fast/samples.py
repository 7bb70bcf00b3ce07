"""Answers to held-out questions, by the model that a run started from and by what it made of it."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

from sft_fast.config import Config, load_config
from sft_fast.report import SAMPLES_FILE
from sft_fast.run_files import model_folder


def write_samples(run_dir: Path, count: int, max_new_tokens: int) -> None:
    """Writes samples.json, which report.html shows.

    Raises:
        ValueError: the run has no export yet.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder = model_folder(run_dir)
    config = load_config(run_dir / "config.yaml", [])
    conversations = held_out(config, count)
    prompts = [turns[:-1] for turns in conversations]
    after = answers(AutoModelForCausalLM.from_pretrained(folder), folder, prompts, max_new_tokens)
    if config.model.path is None or config.model.random_init:
        name = "random weights"
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    else:
        name = config.model.path
        model = AutoModelForCausalLM.from_pretrained(name, revision=config.model.revision)
    before = answers(model, folder, prompts, max_new_tokens)
    samples = [
        {
            "question": turns[-2]["content"],
            "expected": turns[-1]["content"],
            "before": b,
            "after": a,
        }
        for turns, b, a in zip(conversations, before, after, strict=True)
    ]
    text = json.dumps({"before": name, "samples": samples}, ensure_ascii=False, indent=1)
    (run_dir / SAMPLES_FILE).write_text(text + "\n", encoding="utf-8")


def held_out(config: Config, count: int) -> list[list[dict[str, Any]]]:
    """Turns of the first evaluation rows (training rows where there are none), answer last."""
    from sft_fast.data.configured import find_sources
    from sft_fast.data.formats import read_conversations

    sources = find_sources(config, "eval") or find_sources(config, "train")
    assert sources is not None, "data.train is required"
    chats = read_conversations(sources, config.data.format, config.data.fields)
    conversations = []
    for _, chat in islice(chats, count):
        turns = [turn.as_dict() for turn in chat.messages]
        while len(turns) > 1 and turns[-1]["role"] != "assistant":
            turns.pop()
        if len(turns) > 1:
            conversations.append(turns)
    return conversations


def answers(model: Any, folder: Path, prompts: list[Any], max_new_tokens: int) -> list[str]:
    import torch
    from transformers import AutoTokenizer

    from sft_fast.evaluate import generate

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    return generate(model.eval().to(device), tokenizer, prompts, max_new_tokens, device)

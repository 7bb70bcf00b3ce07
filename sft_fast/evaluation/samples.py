"""Answers to held-out questions, by the model that a run started from and by what it made of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft_fast.config.schema import load_config
from sft_fast.config.sections import DataConfig
from sft_fast.files import write_json
from sft_fast.metrics.report import SAMPLES_FILE
from sft_fast.runtime.run_files import model_folder

if TYPE_CHECKING:
    from sft_fast.data.questions import Question


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
    questions = held_out(config.data, count)
    after = answers(AutoModelForCausalLM.from_pretrained(folder), folder, questions, max_new_tokens)
    if config.model.path is None or config.model.random_init:
        name = "random weights"
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    else:
        name = config.model.path
        model = AutoModelForCausalLM.from_pretrained(name, revision=config.model.revision)
    before = answers(model, folder, questions, max_new_tokens)
    samples = [
        {
            "question": question.turns[-1]["content"],
            "expected": question.answer,
            "before": b,
            "after": a,
        }
        for question, b, a in zip(questions, before, after, strict=True)
    ]
    write_json(run_dir / SAMPLES_FILE, {"before": name, "samples": samples})


def held_out(data: DataConfig, count: int) -> list[Question]:
    """The first questions of the evaluation data, or of the training data where there is none."""
    from sft_fast.data.from_config import find_sources
    from sft_fast.data.questions import read_questions

    sources = find_sources(data, "eval") or find_sources(data, "train")
    assert sources is not None, "data.train is required"
    return read_questions(sources, count)


def answers(model: Any, folder: Path, questions: list[Question], max_new_tokens: int) -> list[str]:
    """What a model answers to each question, greedily."""
    import torch
    from transformers import AutoTokenizer

    from sft_fast.evaluation.exact_match import generate

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    prompts, tools = [item.turns for item in questions], [item.tools for item in questions]
    return generate(model.eval().to(device), tokenizer, prompts, max_new_tokens, device, tools)

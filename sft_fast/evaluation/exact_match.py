"""Asks an exported model held-out questions, through transformers alone."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sft_fast.data.demo import TASKS
from sft_fast.data.formats import ConversationReader
from sft_fast.data.json_records import SourceRecord
from sft_fast.data.questions import Question

if TYPE_CHECKING:
    pass

BATCH_SIZE = 32


def exact_match(folder: Path, questions: list[Question], max_new_tokens: int) -> list[bool]:
    """Answers questions greedily.

    Args:
        folder: a directory that transformers loads, such as the export of a run.
        questions: with the expected answers.
        max_new_tokens: longest answer, tokens.

    Returns: for each question, whether the answer is the expected text, outer spaces aside.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    matches = []
    for start in range(0, len(questions), BATCH_SIZE):
        batch = questions[start : start + BATCH_SIZE]
        prompts, tools = [item.turns for item in batch], [item.tools for item in batch]
        answers = generate(model, tokenizer, prompts, max_new_tokens, device, tools)
        matches += [
            answer == item.answer.strip() for answer, item in zip(answers, batch, strict=True)
        ]
    return matches


@torch.no_grad()
def generate(
    model: Any,
    tokenizer: Any,
    prompts: list[list[dict[str, Any]]],
    max_new_tokens: int,
    device: torch.device,
    tools: list[list[dict[str, Any]]] | None = None,
) -> list[str]:
    """The greedy answers to a batch of prompts, special tokens removed.

    Args:
        model: a causal model of transformers, on `device`.
        tokenizer: the model's, padding on the left.
        prompts: turns, for each prompt.
        max_new_tokens: the longest answer, in tokens.
        device: where the model is.
        tools: those on offer with each prompt; None = none.
    """
    texts = [
        tokenizer.apply_chat_template(
            prompt, tools=offered or None, tokenize=False, add_generation_prompt=True
        )
        for prompt, offered in zip(prompts, tools or [[]] * len(prompts), strict=True)
    ]
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    inputs = tokenizer(texts, padding=True, add_special_tokens=False, return_tensors="pt")
    inputs = {key: inputs[key].to(device) for key in ("input_ids", "attention_mask")}
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    new_tokens = output[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in tokenizer.batch_decode(new_tokens, skip_special_tokens=True)]


def chance_accuracy(records: Iterable[SourceRecord]) -> float:
    """Exact match on demo records of a guesser that knows each task but sees no operand.

    Args:
        records: of the demo, in any of its formats; the last question of each counts.

    Raises:
        ValueError: a question is not of the demo, or there are no records.
    """
    reader = ConversationReader("auto")
    chances = []
    for record in records:
        questions = [turn.content for turn in reader(record).messages if turn.role == "user"]
        task = next((task for task in TASKS if questions[-1].startswith(task.question)), None)
        if task is None:
            raise ValueError(f"{record.origin}: {questions[-1]!r} is no question of the demo")
        chances.append(task.chance)
    if not chances:
        raise ValueError("no records, so there is no chance accuracy")
    return sum(chances) / len(chances)

"""Asks an exported model held-out questions, through transformers alone."""

from pathlib import Path
from typing import Any

import torch

BATCH_SIZE = 32


def exact_match(
    folder: Path, conversations: list[list[dict[str, Any]]], max_new_tokens: int
) -> list[bool]:
    """Answers the last assistant turn of each conversation greedily.

    Args:
        folder: a directory that transformers loads, such as the export of a run.
        conversations: messages that end with the expected assistant answer.
        max_new_tokens: longest answer, tokens.

    Returns: for each conversation, whether the answer is the expected text, outer spaces aside.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    matches = []
    for start in range(0, len(conversations), BATCH_SIZE):
        batch = conversations[start : start + BATCH_SIZE]
        answers = generate(model, tokenizer, [chat[:-1] for chat in batch], max_new_tokens, device)
        expected = [chat[-1]["content"].strip() for chat in batch]
        matches += [answer == text for answer, text in zip(answers, expected, strict=True)]
    return matches


@torch.no_grad()
def generate(
    model: Any,
    tokenizer: Any,
    prompts: list[list[dict[str, Any]]],
    max_new_tokens: int,
    device: torch.device,
) -> list[str]:
    """The greedy answers to a batch of prompts, special tokens removed."""
    texts = [
        tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        for prompt in prompts
    ]
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    inputs = tokenizer(texts, padding=True, add_special_tokens=False, return_tensors="pt")
    inputs = {key: inputs[key].to(device) for key in ("input_ids", "attention_mask")}
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    new_tokens = output[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in tokenizer.batch_decode(new_tokens, skip_special_tokens=True)]

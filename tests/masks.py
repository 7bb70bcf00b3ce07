"""Tokens and masks as readable text, for tests of the data stage."""

from typing import Any

from sft_fast.data.conversation import Conversation, Message
from sft_fast.data.render import ChatRenderer, MaskOptions
from sft_fast.data.tokens import Sample


def chat(*contents: str, system: str | None = None) -> Conversation:
    """User and assistant in turn."""
    messages = [
        Message("assistant" if number % 2 else "user", content)
        for number, content in enumerate(contents)
    ]
    return Conversation((*([Message("system", system)] if system else []), *messages))


def samples_of(tokenizer: Any, conversation: Conversation, **options: Any) -> list[Sample]:
    renderer = ChatRenderer(tokenizer, MaskOptions(**options))
    return renderer.tokenize(renderer.render_samples(conversation))


def sample_of(tokenizer: Any, conversation: Conversation, **options: Any) -> Sample:
    (sample,) = samples_of(tokenizer, conversation, **options)
    return sample


def marked(tokenizer: Any, sample: Sample) -> str:
    """The tokens as text, with the supervised runs in double brackets."""
    pieces: list[tuple[bool, list[int]]] = []
    for token, supervised in zip(sample.input_ids.tolist(), sample.supervised, strict=True):
        if not pieces or pieces[-1][0] != supervised:
            pieces.append((bool(supervised), []))
        pieces[-1][1].append(token)
    texts = [(supervised, tokenizer.decode(tokens)) for supervised, tokens in pieces]
    return "".join(f"[[{text}]]" if supervised else text for supervised, text in texts)

"""The embedded demo: a chat data set and a tokenizer that the project makes itself.

Every question has one answer that a program can check, and held-out questions use words (or pairs
of digits) that no training question uses: the exact match on them tells learning from memorising.
The same seed gives the same bytes everywhere.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from sft_fast.data.templates import CHATML_TEMPLATE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEMO_SEED = 1234
CONVERSATIONS_PER_FILE = 2000
HELD_OUT_QUESTIONS = 500
MAX_TURNS = 3
HELD_OUT_SHARE = 0.1
"""Share of the words, and of the digit pairs, that only held-out questions use."""

CONSONANTS = "bcdfghjklmnpqrstvwxyz"
VOWELS = "aeiou"
NUM_WORDS = len(CONSONANTS) ** 2 * len(VOWELS)
KEYWORDS = (
    *("user", "assistant", "system"),
    *("repeat", "reverse", "upper", "first", "last", "larger", "letter", "of"),
)
"""Words of the questions, one token each; every other character is one token per byte."""


@dataclass(frozen=True)
class Task:
    """A kind of question.

    Attributes:
        question: the words in front of the operand.
        operands: "word" (consonant, vowel, consonant) or "pair" (two different digits).
        solve: operand -> answer.
        chance: share of right answers of the best guess that does not look at the operand.
    """

    question: str
    operands: str
    solve: Callable[[str], str]
    chance: float


TASKS = (
    Task("repeat", "word", lambda word: word, 1 / NUM_WORDS),
    Task("reverse", "word", lambda word: word[::-1], 1 / NUM_WORDS),
    Task("upper", "word", lambda word: word.upper(), 1 / NUM_WORDS),
    Task("first letter of", "word", lambda word: word[0], 1 / len(CONSONANTS)),
    Task("last letter of", "word", lambda word: word[-1], 1 / len(CONSONANTS)),
    # Of the 90 pairs of different digits, 18 have the 9 as the larger one.
    Task("larger of", "pair", lambda pair: max(pair.split()), 18 / 90),
)


@dataclass(frozen=True)
class _Turn:
    task: Task
    operand: str

    @property
    def question(self) -> str:
        return f"{self.task.question} {self.operand}"

    @property
    def answer(self) -> str:
        return self.task.solve(self.operand)


@cache
def demo_files() -> dict[str, bytes]:
    """The demo data: file name -> content; JSON lines in three formats, and the held-out questions.

    `train-alpaca.jsonl` has one question a record, the other training files up to `MAX_TURNS`;
    `eval.jsonl` has single questions in the messages format, none of them twice.
    """
    rng = random.Random(DEMO_SEED)
    train, held_out = _operands(rng)
    writers = {"alpaca": _alpaca_record, "messages": _messages_record, "chatml": _chatml_record}
    files = {}
    for name, write in writers.items():
        longest = 1 if name == "alpaca" else MAX_TURNS
        records = [
            write([_draw(rng, train) for _ in range(rng.randint(1, longest))])
            for _ in range(CONVERSATIONS_PER_FILE)
        ]
        files[f"train-{name}.jsonl"] = _json_lines(records)
    questions = [_Turn(task, operand) for task in TASKS for operand in held_out[task.operands]]
    rng.shuffle(questions)
    records = [_messages_record([turn]) for turn in questions[:HELD_OUT_QUESTIONS]]
    files["eval.jsonl"] = _json_lines(records)
    return files


def demo_tokenizer() -> PreTrainedTokenizerBase:
    """A ChatML tokenizer of 270 tokens: 3 special ones, the keywords, and one per byte.

    Any text can be tokenised. The end of a turn is EOS; `save_pretrained` writes what
    `AutoTokenizer` loads.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*special, *KEYWORDS, *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in special])
    backend.add_tokens([AddedToken(word, single_word=True) for word in KEYWORDS])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHATML_TEMPLATE
    return tokenizer


def _operands(rng: random.Random) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Operands to train on, and operands held out."""
    pools = {
        "word": [a + b + c for a in CONSONANTS for b in VOWELS for c in CONSONANTS],
        "pair": [f"{a} {b}" for a in range(10) for b in range(10) if a != b],
    }
    train, held_out = {}, {}
    for kind, pool in pools.items():
        rng.shuffle(pool)
        count = int(len(pool) * HELD_OUT_SHARE)
        held_out[kind], train[kind] = pool[:count], pool[count:]
    return train, held_out


def _draw(rng: random.Random, operands: Mapping[str, Sequence[str]]) -> _Turn:
    task = rng.choice(TASKS)
    return _Turn(task, rng.choice(operands[task.operands]))


def _alpaca_record(turns: Sequence[_Turn]) -> dict[str, object]:
    return {"instruction": turns[0].question, "input": "", "output": turns[0].answer}


def _messages_record(turns: Sequence[_Turn]) -> dict[str, object]:
    messages = []
    for turn in turns:
        messages.append({"role": "user", "content": turn.question})
        messages.append({"role": "assistant", "content": turn.answer})
    return {"messages": messages}


def _chatml_record(turns: Sequence[_Turn]) -> dict[str, object]:
    return {
        "text": "".join(
            f"<|im_start|>user\n{turn.question}<|im_end|>\n"
            f"<|im_start|>assistant\n{turn.answer}<|im_end|>\n"
            for turn in turns
        )
    }


def _json_lines(records: Sequence[Mapping[str, object]]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()

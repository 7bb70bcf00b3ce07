import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from sft_fast.data import demo
from sft_fast.data.build import BuildOptions, build_store
from sft_fast.data.demo import TASKS, demo_tokenizer
from sft_fast.data.formats import read_conversations
from sft_fast.data.json_records import SourceRecord
from sft_fast.data.source import Source, load_records
from sft_fast.evaluation.exact_match import chance_accuracy

ANSWERS = {
    "repeat": lambda words: words[-1],
    "reverse": lambda words: "".join(reversed(words[-1])),
    "upper": lambda words: words[-1].upper(),
    "first": lambda words: words[-1][:1],
    "last": lambda words: words[-1][2:],
    "larger": lambda words: str(max(int(words[-1]), int(words[-2]))),
}


def questions(split: str) -> list[tuple[str, str]]:
    pairs = []
    for _, conversation in read_conversations(load_records("demo", split)):
        turns = [message.content for message in conversation.messages]
        pairs += list(zip(turns[::2], turns[1::2], strict=True))
    return pairs


def test_every_answer_is_right() -> None:
    for split in ("train", "eval"):
        for question, answer in questions(split):
            words = question.split()
            assert answer == ANSWERS[words[0]](words), question


def test_held_out_operands_are_never_trained_on() -> None:
    trained = {question for question, _ in questions("train")}
    held_out = [question for question, _ in questions("eval")]
    assert not trained & set(held_out)
    assert len(set(held_out)) == len(held_out) == 500
    words = {question.split()[-1] for question in trained if not question.startswith("larger")}
    assert not words & {q.split()[-1] for q in held_out if not q.startswith("larger")}
    assert len(words) > 1900
    assert {question.split()[0] for question in held_out} == set(ANSWERS)


def test_data_is_the_same_every_time(tmp_path: Path) -> None:
    first = demo.demo_files()
    demo.demo_files.cache_clear()
    assert demo.demo_files() == first
    assert load_records("demo").digest == "e33536fcac59191515fb9eeada9ded41"
    assert load_records("demo", "eval").digest == "76dc2e8520731b5c8faff7ac46fd2e1e"


def test_files_are_a_source_with_two_splits(tmp_path: Path) -> None:
    for name, content in demo.demo_files().items():
        (tmp_path / name).write_bytes(content)
    folder = str(tmp_path)
    assert (
        load_records(folder, evaluation=True).digest == load_records("demo", evaluation=True).digest
    )
    train = {json.dumps(row.values) for row in load_records(folder)}
    assert train == {json.dumps(row.values) for row in load_records("demo")}


def test_chance_is_the_share_of_the_most_frequent_answer() -> None:
    words = [a + b + c for a in demo.CONSONANTS for b in demo.VOWELS for c in demo.CONSONANTS]
    pairs = [f"{a} {b}" for a in range(10) for b in range(10) if a != b]
    for task in TASKS:
        operands = words if task.operands == "word" else pairs
        counts = Counter(task.solve(operand) for operand in operands)
        assert task.chance == pytest.approx(max(counts.values()) / len(operands))


def test_chance_of_rows_is_the_mean_over_their_questions() -> None:
    rows = list(load_records("demo", "eval"))
    shares = Counter(row.values["messages"][0]["content"].split()[0] for row in rows)
    letters = (shares["first"] + shares["last"]) / 21
    others = (shares["repeat"] + shares["reverse"] + shares["upper"]) / 2205
    expected = (letters + others + shares["larger"] * 0.2) / len(rows)
    assert chance_accuracy(rows) == pytest.approx(expected)
    foreign = SourceRecord({"question": "why", "answer": "so"}, "a.jsonl", 3)
    with pytest.raises(ValueError, match="a.jsonl:3: 'why' is no question of the demo"):
        chance_accuracy([foreign])
    with pytest.raises(ValueError, match="no records"):
        chance_accuracy([])


def test_tokenizer_is_what_auto_tokenizer_loads(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer: Any = demo_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "<|im_start|>user\nrepeat user9 🎉 last, letter\n<|im_end|>"
    assert loaded(text).input_ids == tokenizer(text).input_ids
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert loaded.chat_template == tokenizer.chat_template
    assert (loaded.eos_token, loaded.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert len(loaded) == len(tokenizer) == 270


def test_samples_are_short_and_end_with_a_supervised_end_of_turn(tmp_path: Path) -> None:
    tokenizer: Any = demo_tokenizer()
    options = BuildOptions(64)
    store = build_store(Source(load_records("demo")), tokenizer, options, tmp_path / "store")
    assert store.num_samples == store.report.rows == 6000
    assert store.report.boundary_tokens == 0
    for number in range(0, store.num_samples, 500):
        tokens, supervised = store.sample(number)
        assert tokens[-1] == tokenizer.eos_token_id and supervised[-1]
    tokens, supervised = store.sample(0)
    question, answer = questions("train")[0]
    assert tokenizer.decode(tokens.tolist()) == (
        f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>"
    )
    assert tokenizer.decode(tokens[supervised].tolist()) == f"{answer}<|im_end|>"

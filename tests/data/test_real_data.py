from collections.abc import Callable
from pathlib import Path

import pytest

from sft_fast.data.build import BuildOptions, build_store
from sft_fast.data.demo import demo_tokenizer
from sft_fast.data.formats import read_conversations
from sft_fast.data.source import Source, load_records


@pytest.mark.parametrize(
    ("name", "split", "format_name", "num_rows"),
    [
        ("alpaca_en_demo.json", "train", "alpaca", 999),
        ("glaive_toolcall_en_demo.json", "train", "sharegpt", 300),
        ("gsm8k_test.jsonl", "train[:200]", "question_answer", 200),
    ],
)
def test_public_file_becomes_a_store(
    real_data: Callable[[str], str],
    tmp_path: Path,
    name: str,
    split: str,
    format_name: str,
    num_rows: int,
) -> None:
    path = real_data(name)
    rows = load_records(path, split)
    tokenizer = demo_tokenizer()
    store = build_store(Source(rows), tokenizer, BuildOptions(1 << 20), tmp_path / "store")
    assert store.report.formats[path].startswith(f"{format_name} (columns ")
    assert store.num_samples == store.report.rows == num_rows
    assert store.num_supervised.min() > 0
    for number, (row, conversation) in enumerate(read_conversations(rows)):
        if number % 50:
            continue
        tokens, supervised = store.sample(number)
        assert store.origin(number) == row.origin
        answers = [m.content for m in conversation.messages if m.supervised and not m.tool_calls]
        assert answers
        learnt = tokenizer.decode(tokens[supervised].tolist())
        assert all(f"{answer}<|im_end|>" in learnt for answer in answers)
        assert conversation.messages[0].content not in learnt


def test_tool_calls_are_learnt_and_tool_results_are_not(
    real_data: Callable[[str], str], tmp_path: Path
) -> None:
    rows = load_records(real_data("glaive_toolcall_en_demo.json"))
    tokenizer = demo_tokenizer()
    store = build_store(Source(rows), tokenizer, BuildOptions(1 << 20), tmp_path / "store")
    calls = results = 0
    for number, (_, conversation) in enumerate(read_conversations(rows)):
        tokens, supervised = store.sample(number)
        learnt = tokenizer.decode(tokens[supervised].tolist())
        read = tokenizer.decode(tokens[~supervised].tolist())
        last = max(i for i, turn in enumerate(conversation.messages) if turn.supervised)
        turns = conversation.messages[: last + 1]
        asked = [call["function"]["name"] for turn in turns for call in turn.tool_calls]
        assert learnt.count("<tool_call>") == len(asked)
        assert all(f'"name": "{name}"' in learnt for name in asked)
        assert "<tool_call>" not in read
        answered = [turn.content for turn in turns if turn.role == "tool"]
        assert all(f"tool\n{content}<|im_end|>" in read for content in answered)
        assert learnt.count("<|im_end|>") == sum(turn.supervised for turn in turns)
        calls, results = calls + len(asked), results + len(answered)
    assert calls > 100 and results > 100

from collections.abc import Callable
from pathlib import Path

import pytest

from sft_fast.data.build import BuildOptions, build_store
from sft_fast.data.demo import demo_tokenizer
from sft_fast.data.formats import read_conversations
from sft_fast.data.source import Source, load_rows


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
    rows = load_rows(path, split)
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

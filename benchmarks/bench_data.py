"""Speed of the data stage on one process: rows of text to a token store.

Run: `pytest benchmarks/bench_data.py`. `extra_info` has rows, tokens and bytes per second, and for
the whole build the share of the time that the tokenizer alone needs for the same texts, which is
the limit of this design.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sft_fast.data.build import BuildOptions, build_store, prepare_store
from sft_fast.data.demo import demo_tokenizer
from sft_fast.data.formats import read_conversations
from sft_fast.data.render import ChatRenderer
from sft_fast.data.source import Rows, load_rows
from sft_fast.data.store import TokenStore

OPTIONS = BuildOptions(capacity=1 << 20)
# conversations, turns of each
SHAPES = {"single_turn": (2000, 2), "ten_turns": (400, 10), "hundred_turns": (20, 100)}


@pytest.fixture(scope="module", params=SHAPES)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of generated conversations, about 60 words a turn."""
    count, turns = SHAPES[request.param]
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(2, 9))) for _ in range(5000)]
    path = tmp_path_factory.mktemp("data") / f"{request.param}.jsonl"
    with path.open("w") as file:
        for _ in range(count):
            messages = [
                {
                    "role": "assistant" if turn % 2 else "user",
                    "content": " ".join(rng.choices(words, k=rng.randint(20, 100))),
                }
                for turn in range(turns)
            ]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """A byte-level BPE of 8000 tokens, a realistic cost per character."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    rng = random.Random(1)
    texts = [" ".join("".join(rng.choices("abcdefghijklmnop", k=5)) for _ in range(2000))] * 2
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=8000,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
    fast.chat_template = demo_tokenizer().chat_template
    return fast


@pytest.fixture
def fresh_paths(tmp_path: Path) -> Iterator[Path]:
    return (tmp_path / str(number) for number in range(1_000_000))


def texts_of(rows: Rows, tokenizer: Any) -> list[str]:
    renderer = ChatRenderer(tokenizer)
    return [renderer.render(chat).text for _, chat in read_conversations(rows)]


def check(store: TokenStore, texts: list[str], tokenizer: Any) -> None:
    """The store holds these texts, each tokenised whole."""
    assert store.num_samples == len(texts)
    for number in range(0, len(texts), max(1, len(texts) // 10)):
        expected = tokenizer(texts[number], add_special_tokens=False)["input_ids"]
        assert store.sample(number)[0].tolist() == expected


def test_bench_build_store(
    benchmark: Any, source: Path, tokenizer: Any, fresh_paths: Iterator[Path]
) -> None:
    rows = load_rows(str(source))
    texts = texts_of(rows, tokenizer)
    check(build_store(rows, "auto", tokenizer, OPTIONS, next(fresh_paths)), texts, tokenizer)
    start = time.perf_counter()
    tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
    tokenizer_seconds = time.perf_counter() - start
    store = benchmark.pedantic(
        lambda: build_store(rows, "auto", tokenizer, OPTIONS, next(fresh_paths)),
        rounds=3,
        warmup_rounds=1,
    )
    seconds = benchmark.stats.stats.median
    benchmark.extra_info.update(
        rows_per_second=round(store.num_samples / seconds),
        tokens_per_second=round(len(store.tokens) / seconds),
        bytes_per_second=round(source.stat().st_size / seconds),
        tokenizer_share=round(tokenizer_seconds / seconds, 2),
    )


def test_bench_read_rows(benchmark: Any, source: Path) -> None:
    rows = load_rows(str(source))
    expected = [json.loads(line) for line in source.read_text().splitlines()]
    assert [row.values for row in rows] == expected
    benchmark.pedantic(lambda: sum(1 for _ in rows), rounds=3, warmup_rounds=1)
    size = source.stat().st_size
    benchmark.extra_info["bytes_per_second"] = round(size / benchmark.stats.stats.median)


def test_bench_reuse_store(benchmark: Any, source: Path, tokenizer: Any, tmp_path: Path) -> None:
    rows = load_rows(str(source))
    built = prepare_store(rows, "auto", tokenizer, OPTIONS, tmp_path)

    def reopen() -> TokenStore:
        return prepare_store(load_rows(str(source)), "auto", tokenizer, OPTIONS, tmp_path)

    store = benchmark.pedantic(reopen, rounds=3, warmup_rounds=1)
    assert store.fingerprint == built.fingerprint

"""Speed of the data stage: rows of text to a token store, beside TRL's own preparation.

Run: `pytest benchmarks/bench_data.py`. `extra_info` has rows, tokens and bytes per second, the time
that the tokenizer alone needs for the same texts as a share of ours, and, where TRL is installed,
its rows per second on the same rows and tokenizer in the same run. SFT_FAST_BENCH_ROWS names
.jsonl files of messages, with colons between, to use beside the generated ones, whose words come
again more often than those of a language.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sft_fast.constants import IGNORE_INDEX
from sft_fast.data.build import BuildOptions, build_store, prepare_store
from sft_fast.data.formats import read_conversations
from sft_fast.data.render import ChatRenderer
from sft_fast.data.source import Records, Source, load_records
from sft_fast.data.store import TokenStore, open_store

OPTIONS = BuildOptions(capacity=1 << 20)
# conversations, turns of each
SHAPES = {"single_turn": (5000, 2), "ten_turns": (1500, 10), "160_turns": (50, 160)}
OWN_ROWS = [name for name in os.environ.get("SFT_FAST_BENCH_ROWS", "").split(os.pathsep) if name]
# TRL finds the answers with these marks, we without them.
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ message.content + '<|im_end|>' + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
UNMARKED = TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")


def vocabulary() -> list[str]:
    """5000 words of 2 to 9 letters."""
    rng = random.Random(0)
    return ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(2, 9))) for _ in range(5000)]


def write_chats(path: Path, count: int, turns: int) -> Path:
    """Generated conversations, about 60 words a turn."""
    rng = random.Random(0)
    words = vocabulary()
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


@pytest.fixture(scope="module", params=[*SHAPES, *OWN_ROWS])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param in OWN_ROWS:
        return Path(request.param)
    path = tmp_path_factory.mktemp("data") / f"{request.param}.jsonl"
    return write_chats(path, *SHAPES[request.param])


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """A byte-level BPE of 8000 tokens for this language, and 24000 more for that of own rows.

    SFT_FAST_BENCH_TOKENIZER names another one, with the tokens of ChatML.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if "SFT_FAST_BENCH_TOKENIZER" in os.environ:
        own = AutoTokenizer.from_pretrained(os.environ["SFT_FAST_BENCH_TOKENIZER"])
        own.eos_token, own.chat_template = "<|im_end|>", UNMARKED
        return own
    rng = random.Random(1)
    texts = [" ".join(rng.choices(vocabulary(), k=20_000))]
    for name in OWN_ROWS:
        lines = Path(name).read_text(encoding="utf-8").splitlines()
        rows = (json.loads(line)["messages"] for line in lines)
        texts += [turn["content"] for turns in rows for turn in turns]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=32_000 if OWN_ROWS else 8000,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
    fast.chat_template = UNMARKED
    return fast


@pytest.fixture
def fresh_paths(tmp_path: Path) -> Iterator[Path]:
    return (tmp_path / str(number) for number in range(1_000_000))


def texts_of(rows: Records, tokenizer: Any) -> list[str]:
    renderer = ChatRenderer(tokenizer)
    return [renderer.render(chat).text for _, chat in read_conversations(rows)]


def check(store: TokenStore, texts: list[str], tokenizer: Any) -> None:
    """The store holds these texts, each tokenised whole."""
    assert store.num_samples == len(texts)
    for number in range(0, len(texts), max(1, len(texts) // 10)):
        expected = tokenizer(texts[number], add_special_tokens=False)["input_ids"]
        assert store.sample(number)[0].tolist() == expected


def prepare_with_trl(source: Path, tokenizer: Any, folder: Path) -> Callable[[], Any]:
    """TRL's preparation of a data set with a loss on the answers only, in one process."""
    trl = pytest.importorskip("trl")
    import datasets
    from transformers import LlamaConfig, LlamaForCausalLM

    marked = tokenizer.from_pretrained(_saved(tokenizer, folder))
    marked.chat_template = TEMPLATE
    rows = datasets.load_dataset("json", data_files=str(source), split="train")
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "vocab_size": len(tokenizer)}
    model = LlamaForCausalLM(LlamaConfig(**shape, **heads))
    config = trl.SFTConfig(
        output_dir=str(folder),
        assistant_only_loss=True,
        max_length=None,
        report_to=[],
        use_cpu=True,
        bf16=False,
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
    )
    trainer = trl.SFTTrainer(model, config, train_dataset=rows.select([0]), processing_class=marked)

    def prepare() -> Any:
        datasets.disable_caching()
        return trainer._prepare_dataset(rows, marked, config, False, None, "train")

    return prepare


def _saved(tokenizer: Any, folder: Path) -> Path:
    tokenizer.save_pretrained(folder / "tokenizer")
    return folder / "tokenizer"


def test_bench_build_store(
    benchmark: Any, source: Path, tokenizer: Any, fresh_paths: Iterator[Path]
) -> None:
    rows = load_records(str(source))
    texts = texts_of(rows, tokenizer)
    check(build_store(Source(rows), tokenizer, OPTIONS, next(fresh_paths)), texts, tokenizer)
    start = time.perf_counter()
    tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
    tokenizer_seconds = time.perf_counter() - start
    store = benchmark.pedantic(
        lambda: build_store(Source(rows), tokenizer, OPTIONS, next(fresh_paths), processes=1),
        rounds=3,
        warmup_rounds=1,
    )
    seconds = benchmark.stats.stats.min
    benchmark.extra_info.update(
        rows_per_second=round(store.num_samples / seconds),
        tokens_per_second=round(len(store.tokens) / seconds),
        bytes_per_second=round(source.stat().st_size / seconds),
        tokenizer_share=round(tokenizer_seconds / seconds, 2),
    )


def test_bench_build_store_beside_trl(
    benchmark: Any, source: Path, tokenizer: Any, fresh_paths: Iterator[Path]
) -> None:
    """Both in turns, the fastest round of each; our time includes reading the file."""
    prepare = prepare_with_trl(source, tokenizer, next(fresh_paths))
    rows = load_records(str(source))

    def ours() -> TokenStore:
        return build_store(Source(rows), tokenizer, OPTIONS, next(fresh_paths), processes=1)

    store, prepared = ours(), prepare()
    for number in range(0, store.num_samples, max(1, store.num_samples // 10)):
        tokens, supervised = store.sample(number)
        row = prepared[number]
        # TRL keeps the line break behind the last end-of-turn token.
        assert row["input_ids"][: len(tokens)] == tokens.tolist()
        labels = row["labels"][: len(tokens)]
        assert [label != IGNORE_INDEX for label in labels] == supervised.tolist()
    trl_seconds, trl_cpu_seconds = fastest(prepare)
    _, cpu_seconds = fastest(ours)
    benchmark.pedantic(ours, rounds=3)
    seconds = benchmark.stats.stats.min
    benchmark.extra_info.update(
        rows_per_second=round(store.num_samples / seconds),
        trl_rows_per_second=round(store.num_samples / trl_seconds),
        times_trl=round(trl_seconds / seconds, 2),
        # Of all threads; what other programs do at the same time hardly counts.
        times_trl_in_cpu_time=round(trl_cpu_seconds / cpu_seconds, 2),
    )


def fastest(work: Callable[[], Any], rounds: int = 4) -> tuple[float, float]:
    """Seconds by the clock and of CPU time, each of the best round."""
    found = []
    for _ in range(rounds):
        start, cpu_start = time.perf_counter(), time.process_time()
        work()
        found.append((time.perf_counter() - start, time.process_time() - cpu_start))
    wall, cpu = zip(*found, strict=True)
    return min(wall), min(cpu)


@pytest.mark.parametrize("turns", [20, 40, 80, 160, 320])
def test_bench_cost_of_a_turn(
    benchmark: Any, turns: int, tokenizer: Any, tmp_path: Path, fresh_paths: Iterator[Path]
) -> None:
    """The same number of turns in longer and longer conversations: the cost should stay."""
    path = write_chats(tmp_path / "rows.jsonl", 6400 // turns, turns)
    rows = load_records(str(path))
    texts = texts_of(rows, tokenizer)
    check(build_store(Source(rows), tokenizer, OPTIONS, next(fresh_paths)), texts, tokenizer)
    benchmark.pedantic(
        lambda: build_store(Source(rows), tokenizer, OPTIONS, next(fresh_paths), processes=1),
        rounds=3,
    )
    benchmark.extra_info["microseconds_a_turn"] = round(benchmark.stats.stats.min / 6400 * 1e6, 1)


MEASURE_MEMORY = """\
import resource, sys, tempfile
from sft_fast.data.build import BuildOptions, build_store
from sft_fast.data.demo import demo_tokenizer
from sft_fast.data.source import Source, load_records
with tempfile.TemporaryDirectory() as folder:
    store = build_store(
        Source(load_records(sys.argv[1])), demo_tokenizer(), BuildOptions(256), folder + "/store",
        processes=1,
    )
    print(store.num_samples, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def test_bench_memory_of_short_rows(benchmark: Any, tmp_path: Path) -> None:
    """Peak memory of a process that prepares few and many short rows: the slope is what counts."""
    peaks = {}
    for count in (20_000, 120_000):
        path = tmp_path / f"{count}.jsonl"
        with path.open("w") as file:
            for number in range(count):
                # Few words: the cache of pieces has a limit of its own.
                first, second = number % 700, number // 700
                row = {"question": f"{first} + {second}?", "answer": f"{first + second}"}
                file.write(json.dumps(row) + "\n")
        command = [sys.executable, "-c", MEASURE_MEMORY, str(path)]
        samples, peak = subprocess.check_output(command, text=True).split()
        assert int(samples) == count
        peaks[count] = int(peak)
    (few, low), (many, high) = peaks.items()
    benchmark.pedantic(lambda: None)
    benchmark.extra_info.update(
        peak_mib_of_20000=low >> 20,
        bytes_a_row=round((high - low) / (many - few), 1),
        mib_of_5_million_rows=round((low + (high - low) / (many - few) * 5e6) / 2**20),
    )


def test_bench_read_rows(benchmark: Any, source: Path) -> None:
    rows = load_records(str(source))
    expected = [json.loads(line) for line in source.read_text().splitlines()]
    assert [row.values for row in rows] == expected
    benchmark.pedantic(lambda: sum(1 for _ in rows), rounds=3, warmup_rounds=1)
    size = source.stat().st_size
    benchmark.extra_info["megabytes_per_second"] = round(size / benchmark.stats.stats.min / 1e6)


def test_bench_open_store(benchmark: Any, source: Path, tokenizer: Any, tmp_path: Path) -> None:
    built = build_store(Source(load_records(str(source))), tokenizer, OPTIONS, tmp_path / "store")
    store = benchmark(lambda: open_store(built.path))
    assert store.fingerprint == built.fingerprint


def test_bench_reuse_store(benchmark: Any, source: Path, tokenizer: Any, tmp_path: Path) -> None:
    built = prepare_store(Source(load_records(str(source))), tokenizer, OPTIONS, tmp_path)

    def reopen() -> TokenStore:
        rows = load_records(str(source))
        return prepare_store(Source(rows), tokenizer, OPTIONS, tmp_path)

    store = benchmark.pedantic(reopen, rounds=3, warmup_rounds=1)
    assert store.fingerprint == built.fingerprint

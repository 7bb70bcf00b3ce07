import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sft_fast.config.schema import load_config
from sft_fast.data.build import BuildOptions
from sft_fast.data.demo import demo_tokenizer
from sft_fast.data.from_config import build_options, find_sources, open_data_store
from sft_fast.data.mixture import prepare_mixture, sample_counts
from sft_fast.data.source import Source, load_records
from sft_fast.data.store import TokenStore
from sft_fast.errors import ConfigError
from sft_fast.models.architecture import (
    architecture_from_hf,
    architecture_from_shape,
    architecture_to_hf,
)

OPTIONS = BuildOptions(64)


def sources(write_rows: Callable[..., str], shares: list[tuple[int, float | None, int]]) -> Any:
    """One source for each (rows, weight, repeat)."""
    found = []
    for number, (count, weight, repeat) in enumerate(shares):
        rows = [{"question": f"{number} {i}", "answer": "a"} for i in range(count)]
        path = write_rows(rows, f"rows{number}.jsonl")
        found.append(Source(load_records(path), weight=weight, repeat=repeat))
    return found


def files(store: TokenStore) -> Counter[str]:
    return Counter(Path(store.file(number)).name for number in range(store.num_samples))


@pytest.mark.parametrize(
    ("num_samples", "shares", "expected"),
    [
        ([10, 5], [(None, 1), (None, 1)], [10, 5]),
        ([10, 5], [(None, 1), (None, 3)], [10, 15]),
        # The small source sets the size of the mixture, up to its repeats.
        ([100, 5], [(1.0, 1), (1.0, 1)], [5, 5]),
        ([100, 5], [(3.0, 1), (1.0, 4)], [60, 20]),
        ([100, 1000], [(0.9, 2), (0.1, 1)], [200, 22]),
    ],
)
def test_counts_follow_weights_and_repeats(
    num_samples: list[int], shares: list[Any], expected: list[int]
) -> None:
    assert sample_counts(num_samples, shares) == expected


def test_weights_for_some_sources_or_without_effect_are_refused() -> None:
    with pytest.raises(ValueError, match="1 of 2 sources have a weight; give one to all"):
        sample_counts([1, 1], [(1.0, 1), (None, 1)])
    with pytest.raises(ValueError, match="source 2 would give no sample"):
        sample_counts([3, 100], [(1.0, 1), (0.01, 1)])


def test_mixture_holds_whole_samples_of_known_origin(
    write_rows: Callable[..., str], tmp_path: Path
) -> None:
    tokenizer = demo_tokenizer()
    mixed = prepare_mixture(
        sources(write_rows, [(20, 1.0, 1), (4, 1.0, 2)]), tokenizer, OPTIONS, tmp_path / "cache"
    )
    assert files(mixed) == {"rows0.jsonl": 8, "rows1.jsonl": 8}
    origins = Counter(mixed.origin(number) for number in range(mixed.num_samples))
    assert sorted(origins.values()) == [1] * 8 + [2] * 4
    for number in range(mixed.num_samples):
        source, line = mixed.file(number)[-7], mixed.line(number)
        text = tokenizer.decode(mixed.sample(number)[0].tolist())
        assert f"user\n{source} {line - 1}<|im_end|>" in text
    assert mixed.num_supervised.tolist() == [2] * 16
    assert (mixed.report.samples, mixed.report.rows) == (16, 24)


def test_other_weights_reuse_the_tokens_and_the_same_ones_the_mixture(
    write_rows: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, cache = demo_tokenizer(), tmp_path / "cache"
    first = prepare_mixture(
        sources(write_rows, [(20, 1.0, 1), (4, 1.0, 2)]), tokenizer, OPTIONS, cache
    )
    monkeypatch.setattr("sft_fast.data.build.build_store", None)
    shares: list[tuple[int, float | None, int]] = [(20, 1.0, 1), (4, 1.0, 2)]
    again = prepare_mixture(sources(write_rows, shares), tokenizer, OPTIONS, cache)
    assert again.path == first.path
    shares = [(20, 2.0, 1), (4, 1.0, 2)]
    other = prepare_mixture(sources(write_rows, shares), tokenizer, OPTIONS, cache)
    assert files(other) == {"rows0.jsonl": 16, "rows1.jsonl": 8}
    assert other.fingerprint != first.fingerprint


CONFIG = """
output_dir: {folder}/run
model: {{path: none}}
tokenizer: {{path: demo}}
train: {{steps: 20}}
data:
  eval_fraction: 0.25
  train:
    - {folder}/plain.jsonl
    - path: {folder}/named.jsonl
      format: alpaca
      fields: {{instruction: frage, response: antwort}}
      split: "train[:50%]"
      repeat: 2
"""


def load(tmp_path: Path, text: str) -> Any:
    path = tmp_path / "config.yaml"
    path.write_text(text.replace("{path: demo}", "{path: x}"))
    return load_config(path, [])


def test_list_of_sources_in_the_config(write_rows: Callable[..., str], tmp_path: Path) -> None:
    plain = [{"question": f"p{i}", "answer": "a"} for i in range(40)]
    named = [{"frage": f"n{i}", "antwort": "a"} for i in range(40)]
    write_rows(plain, "plain.jsonl")
    write_rows(named, "named.jsonl")
    config = load(tmp_path, CONFIG.format(folder=tmp_path))
    train, evaluation = find_sources(config.data, "train"), find_sources(config.data, "eval")
    assert train is not None and evaluation is not None
    tokenizer = demo_tokenizer()
    store = open_data_store(
        train,
        tokenizer,
        build_options(config.model, config.data, config.packing),
        config.data,
        config.output_dir,
    )
    eval_store = open_data_store(
        evaluation,
        tokenizer,
        build_options(config.model, config.data, config.packing),
        config.data,
        config.output_dir,
    )
    trained, held_out = files(store), files(eval_store)
    assert trained["plain.jsonl"] + held_out["plain.jsonl"] == 40
    assert trained["named.jsonl"] + 2 * held_out["named.jsonl"] == 40
    assert min(held_out.values()) > 0


@pytest.mark.parametrize(
    ("chosen", "num_experts", "trims"),
    [("null", 0, True), ("null", 8, False), ("true", 8, True), ("false", 0, False)],
)
def test_the_tail_is_kept_where_experts_are_balanced(
    tmp_path: Path, chosen: str, num_experts: int, trims: bool
) -> None:
    config = load(tmp_path, CONFIG.format(folder=tmp_path) + f"  trim_tail: {chosen}\n")
    architecture: Any = SimpleNamespace(num_experts=num_experts)
    assert (
        build_options(config.model, config.data, config.packing, architecture).mask.trim_tail
        is trims
    )


@pytest.mark.parametrize(("num_experts", "trims"), [(0, True), (4, False)])
def test_experts_are_known_from_the_config_of_the_model(
    tmp_path: Path, num_experts: int, trims: bool
) -> None:
    shape = load_config(None, []).model.shape
    assert shape is not None
    dense = architecture_from_shape(shape, 100)
    experts = {
        "architectures": ["MixtralForCausalLM"],
        "num_local_experts": num_experts,
        "num_experts_per_tok": 2,
        "sliding_window": None,
    }
    folder = tmp_path / "model"
    folder.mkdir()
    config_json = architecture_to_hf(dense) | (experts if num_experts else {})
    (folder / "config.json").write_text(json.dumps(config_json))
    assert architecture_from_hf(config_json).num_experts == num_experts
    text = f"model: {{path: {folder}}}\ndata: {{train: a.jsonl}}\ntrain: {{steps: 1}}\n"
    config = load(tmp_path, text)
    options = build_options(config.model, config.data, config.packing)
    assert options.mask.trim_tail is trims


@pytest.mark.parametrize(
    ("old", "new", "key"),
    [
        ("repeat: 2", "repeat: 0", "data.train[1].repeat"),
        ("repeat: 2", "wieght: 2", "data.train[1].wieght"),
        ("format: alpaca", "format: 3", "data.train[1].format"),
        ("eval_fraction: 0.25", "eval_fraction: 1.5", "data.eval_fraction"),
        ("eval_fraction: 0.25", "eval_fraction: 0.25\n  eval: x", "data.eval, data.eval_fraction"),
        ("    - {folder}/plain.jsonl", "    - 3", "data.train"),
    ],
)
def test_wrong_source_is_named(tmp_path: Path, old: str, new: str, key: str) -> None:
    assert old in CONFIG
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, CONFIG.replace(old, new).format(folder=tmp_path))
    assert key in str(caught.value)


def test_missing_source_of_a_list_is_named_with_its_number(tmp_path: Path) -> None:
    (tmp_path / "plain.jsonl").write_text('{"question": "q", "answer": "a"}\n')
    config = load(tmp_path, CONFIG.format(folder=tmp_path))
    with pytest.raises(ValueError, match=r"data\.train\[1\]: .*named\.jsonl does not exist"):
        find_sources(config.data, "train")

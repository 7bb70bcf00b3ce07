"""Near duplicates against a comparison of every pair, and the stores without them."""

import json
import random
from pathlib import Path

import numpy as np
import pytest

from sft_fast.cli import main
from sft_fast.data.near_duplicates import (
    near_duplicates,
    with_choice,
    without_near_duplicates,
)
from sft_fast.data.store import NEAR_DUPLICATE, DataReport, StoreWriter, TokenStore

SYSTEM = list(range(5000, 5200))


def store_of(
    path: Path, samples: list[list[int]], lines: list[int] | None = None, prompt: int = 1
) -> TokenStore:
    with StoreWriter(path) as writer:
        for number, tokens in enumerate(samples):
            line = number + 1 if lines is None else lines[number]
            supervised = np.arange(len(tokens)) >= min(prompt, len(tokens) - 1)
            weights = np.full(len(tokens), 1 + number / 4, np.float16)
            writer.add(np.array(tokens, np.uint32), supervised, "rows.jsonl", line, weights)
        report = DataReport(source="rows", rows=len(samples), rejected={"too long": 1})
        return writer.commit(f"{path.name:0>32}", {}, report)


def changed(tokens: list[int], count: int, rng: random.Random) -> list[int]:
    """The same tokens but for `count` of them."""
    copy = list(tokens)
    for place in rng.sample(range(len(copy)), count):
        copy[place] = 10_000 + rng.randrange(1000)
    return copy


def brute_force(samples: list[list[int]], similarity: float) -> list[tuple[int, int]]:
    """Pairs by sets of tuples, as near_duplicates has them."""
    sets = [{tuple(tokens[i : i + 5]) for i in range(len(tokens) - 4)} for tokens in samples]
    pairs, kept = [], []
    for number, shingles in enumerate(sets):
        like = [k for k in kept if len(shingles & sets[k]) / len(shingles | sets[k]) >= similarity]
        if like:
            pairs.append((number, like[0]))
        else:
            kept.append(number)
    return pairs


def test_pairs_are_those_of_every_pair_compared(tmp_path: Path) -> None:
    rng = random.Random(0)
    originals = [[rng.randrange(4000) for _ in range(200)] for _ in range(30)]
    # Far from the limit on both sides, where MinHash misses nothing.
    near = [changed(tokens, 2, rng) for tokens in originals[:10]]
    far = [changed(tokens, 40, rng) for tokens in originals[10:20]]
    samples = originals + near + far + originals[20:22]
    rng.shuffle(samples)
    pairs = near_duplicates(store_of(tmp_path / "a", samples))
    assert pairs == brute_force(samples, 0.8) and len(pairs) == 12


def test_what_all_samples_begin_with_does_not_count(tmp_path: Path) -> None:
    rng = random.Random(1)
    samples = [SYSTEM + [rng.randrange(4000) for _ in range(30)] for _ in range(20)]
    assert near_duplicates(store_of(tmp_path / "a", samples, prompt=210)) == []
    samples.append(SYSTEM + samples[3][-30:-1] + [7])
    assert near_duplicates(store_of(tmp_path / "b", samples, prompt=210)) == [(20, 3)]
    held_out = store_of(tmp_path / "c", samples[:2], [101, 102], prompt=210)
    assert near_duplicates(held_out, store_of(tmp_path / "d", samples[1:], prompt=210)) == [(1, 0)]


@pytest.mark.parametrize("samples", [[[1, 2]], [[1], [1]], [[1, 2], [1, 2], [1, 3]]])
def test_short_samples(tmp_path: Path, samples: list[list[int]]) -> None:
    expected = [(1, 0)] if len(samples) > 1 else []
    assert near_duplicates(store_of(tmp_path / "a", samples)) == expected


def test_samples_of_one_record_are_not_compared(tmp_path: Path) -> None:
    samples = [[1, *range(100, 200)], [1, *range(100, 200)], [1, *range(100, 199), 5]]
    assert near_duplicates(store_of(tmp_path / "a", samples, [1, 1, 2])) == [(2, 0)]
    assert near_duplicates(store_of(tmp_path / "b", samples, [1, 1, 1])) == []


def test_stores_without_near_duplicates(tmp_path: Path) -> None:
    rng = random.Random(2)
    samples = [[rng.randrange(4000) for _ in range(100)] for _ in range(5)]
    store = store_of(tmp_path / "a", [*samples, changed(samples[1], 1, rng)])
    kept = without_near_duplicates(store, tmp_path / "cache")
    assert [kept.sample(n)[0].tolist() for n in range(kept.num_samples)] == samples
    assert [kept.line(n) for n in range(5)] == [1, 2, 3, 4, 5]
    assert kept.weights is not None and kept.weights[::100].tolist() == [1, 1.25, 1.5, 1.75, 2]
    assert kept.report.rejected == {"too long": 1, NEAR_DUPLICATE: 1}
    assert (kept.report.samples, kept.report.tokens) == (5, 500)
    assert kept.report.supervised_tokens == 495
    assert "rows.jsonl:6: nearly rows.jsonl:2" in kept.rejected_path.read_text()
    again = without_near_duplicates(store, tmp_path / "cache")
    assert (again.path, again.fingerprint) == (kept.path, kept.fingerprint)
    assert without_near_duplicates(kept, tmp_path / "cache") is kept

    held_out = [changed(samples[0], 1, rng), [rng.randrange(4000) for _ in range(100)]]
    evaluation = store_of(tmp_path / "e", held_out, [11, 12])
    assert near_duplicates(evaluation, kept) == [(0, 0)]
    apart = without_near_duplicates(evaluation, tmp_path / "cache", kept)
    assert apart.sample(0)[0].tolist() == held_out[1] and apart.num_samples == 1
    alone = store_of(tmp_path / "f", held_out[:1], [11])
    with pytest.raises(ValueError, match="every sample of rows is nearly a training sample"):
        without_near_duplicates(alone, tmp_path / "cache", kept)


def test_samples_that_stay_together_are_not_taken_apart(tmp_path: Path) -> None:
    store = store_of(tmp_path / "a", [[1, 2, 3], [1, 2, 4]], [1, 1])
    assert with_choice(store, "keep", group_size=2) is store
    with pytest.raises(ValueError, match="2 of a record stay together"):
        with_choice(store, "drop", group_size=2)


def test_a_stream_has_no_near_duplicates_to_leave_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["data.streaming=true", "data.near_duplicates=drop", "train.epochs=null"]
    assert main(["check", "demo", *options, "train.steps=50"]) == 1
    assert "drop for a stream, whose samples are not known before" in capsys.readouterr().err


def test_the_report_counts_them_and_the_option_leaves_them_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"
    answers = [f"{words} fifteen", f"{words} sixteen", words.upper(), "no"]
    rows = [json.dumps({"question": f"Count to {n}?", "answer": a}) for n, a in enumerate(answers)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    (tmp_path / "eval.jsonl").write_text(
        "\n".join(json.dumps({"question": "Count to 9?", "answer": a}) for a in (answers[0], "yes"))
    )
    sizes = ("hidden_size", "num_layers", "num_attention_heads", "num_key_value_heads")
    config = {
        "output_dir": str(tmp_path / "out"),
        "model": {"shape": {**dict.fromkeys(sizes, 2), "hidden_size": 8, "ffn_hidden_size": 4}},
        "tokenizer": {"path": "demo"},
        "data": {"train": str(tmp_path / "rows.jsonl"), "eval": str(tmp_path / "eval.jsonl")},
        "packing": {"capacity": 512},
        "train": {"steps": 1},
    }
    (tmp_path / "run.yaml").write_text(json.dumps(config))
    command = ["data-report", str(tmp_path / "run.yaml"), "--near-duplicates"]
    assert main(command) == 0
    found = capsys.readouterr().out
    assert f"! 1 samples are nearly an earlier sample, first {tmp_path}/rows.jsonl:2 (" in found
    assert f"! 1 samples are nearly a training sample, first {tmp_path}/eval.jsonl:1 (" in found
    assert main([*command, "data.near_duplicates=drop"]) == 0
    found = capsys.readouterr().out
    assert found.count("not used: 1 records, near duplicate") == 2
    assert "0 samples are nearly an earlier sample" in found

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sft_fast.data.columns import BLOCK
from sft_fast.data.store import (
    FLUSH_SAMPLES,
    META_FILE,
    DataReport,
    StoreWriter,
    TokenStore,
    open_store,
)

ROOT = Path(__file__).parents[2]
Samples = list[tuple[list[int], list[bool]]]


def random_samples(count: int, seed: int) -> Samples:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, 50, count)
    return [
        (rng.integers(0, 2**32, n, dtype=np.uint32).tolist(), (rng.random(n) < 0.5).tolist())
        for n in lengths
    ]


def write(path: Path, samples: Samples, fingerprint: str = "f") -> TokenStore:
    with StoreWriter(path) as writer:
        for number, (tokens, mask) in enumerate(samples):
            file = "a.jsonl" if number % 3 else "b.jsonl"
            writer.add(np.array(tokens, np.uint32), np.array(mask, bool), file, number + 1)
        return writer.commit(fingerprint, {"source": "s"}, DataReport(source="s", rows=1))


@pytest.mark.parametrize("flush_tokens", [8, 64, 1 << 20])
def test_roundtrip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flush_tokens: int) -> None:
    monkeypatch.setattr("sft_fast.data.store.FLUSH_TOKENS", flush_tokens)
    samples = random_samples(101, seed=flush_tokens)
    store = write(tmp_path / "store", samples)
    assert store.num_samples == 101
    for number, (tokens, mask) in list(enumerate(samples))[::-7] + list(enumerate(samples)):
        found_tokens, found_mask = store.sample(number)
        assert found_tokens.tolist() == tokens
        assert found_mask.tolist() == mask
    assert store.lengths.tolist() == [len(tokens) for tokens, _ in samples]
    assert store.num_supervised.tolist() == [sum(mask[1:]) for _, mask in samples]
    assert [store.origin(number) for number in range(4)] == [
        "b.jsonl:1",
        "a.jsonl:2",
        "a.jsonl:3",
        "b.jsonl:4",
    ]
    assert (store.fingerprint, store.parts) == ("f", {"source": "s"})
    assert store.report == DataReport(source="s", rows=1)


def test_what_a_writer_keeps_does_not_grow_with_the_samples(tmp_path: Path) -> None:
    """By structure: the numbers that wait, of tokens, of samples and of their columns."""
    ids, mask = np.ones(2, np.uint32), np.ones(2, bool)
    most = 0
    with StoreWriter(tmp_path / "store") as writer:
        for number in range(3 * FLUSH_SAMPLES + 5):
            writer.add(ids, mask, "a", 2 * number + 1)
            columns = sum(encoder.num_pending for encoder in writer._columns.values())
            most = max(most, columns + len(writer._pending_tokens) + len(writer._pending_bits))
        store = writer.commit("f", {}, DataReport())
    assert FLUSH_SAMPLES < most <= 4 * FLUSH_SAMPLES + 4 * BLOCK
    assert (store.lengths == 2).all() and store.num_samples == 3 * FLUSH_SAMPLES + 5
    places = [0, FLUSH_SAMPLES - 1, FLUSH_SAMPLES, 3 * FLUSH_SAMPLES + 4]
    assert [store.line(number) for number in places] == [2 * number + 1 for number in places]


def test_arrays_are_the_documented_memory_maps(tmp_path: Path) -> None:
    store = write(tmp_path / "store", [([5, 6, 7], [False, True, True]), ([8], [True])])
    for name, dtype in (
        ("tokens", np.uint32),
        ("supervised_bits", np.uint8),
    ):
        array = getattr(store, name)
        assert isinstance(array, np.memmap)
        assert array.dtype == dtype
        assert not array.flags.writeable
    assert store.tokens.tolist() == [5, 6, 7, 8]
    assert store.offsets.tolist() == [0, 3, 4]
    assert store.offsets.dtype == np.int64
    assert store.lengths.dtype == store.num_supervised.dtype == np.int32
    assert store.supervised_bits.tolist() == [0b1110]
    assert store.num_supervised.tolist() == [2, 0]


def test_nothing_is_left_behind_when_writing_fails(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), StoreWriter(tmp_path / "store") as writer:
        writer.add(np.array([1], np.uint32), np.array([True]), "a", 1)
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_existing_store_is_not_written_over(tmp_path: Path) -> None:
    samples: Samples = [([1, 2], [False, True])]
    write(tmp_path / "store", samples)
    with pytest.raises(ValueError, match="store exists"):
        write(tmp_path / "store", samples)


def test_of_two_writers_one_wins_and_both_get_a_store(tmp_path: Path) -> None:
    samples: Samples = [([1, 2], [False, True])]
    barrier = threading.Barrier(2)
    stores: list[TokenStore] = []

    def build() -> None:
        with StoreWriter(tmp_path / "store") as writer:
            writer.add(np.array([1, 2], np.uint32), np.array([False, True]), "a", 1)
            barrier.wait()
            stores.append(writer.commit("f", {}, DataReport()))

    threads = [threading.Thread(target=build) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [store.tokens.tolist() for store in stores] == [samples[0][0]] * 2
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def damage_file(name: str, change: Callable[[bytes], bytes | None]) -> Callable[[Path], None]:
    def damage(store: Path) -> None:
        content = change((store / name).read_bytes())
        (store / name).unlink()
        if content is not None:
            (store / name).write_bytes(content)

    return damage


def set_version(store: Path) -> None:
    meta = json.loads((store / META_FILE).read_text())
    (store / META_FILE).write_text(json.dumps({**meta, "version": 99}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_file("tokens.bin", lambda content: content[:-4]), r"tokens\.bin has 4 bytes.*8"),
        (damage_file("lines.data.bin", lambda content: None), r"lines\.data\.bin has no bytes"),
        (damage_file(META_FILE, lambda content: content[:-9]), r"meta\.json is damaged"),
        (damage_file(META_FILE, lambda content: None), "is no token store"),
        (set_version, "has version 99, expected 4"),
    ],
)
def test_damaged_store_names_the_file(
    tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    write(tmp_path / "store", [([1, 2], [False, True])])
    damage(tmp_path / "store")
    with pytest.raises(ValueError, match=message):
        open_store(tmp_path / "store")


def test_store_fills_micro_batches(tmp_path: Path) -> None:
    batch: Any = pytest.importorskip("sft_fast.packing.micro_batch")
    samples: Samples = [([5, 6, 7], [False, False, True]), ([8, 9], [False, True])]
    store = write(tmp_path / "store", samples)
    filled = batch.fill_micro_batch(store, np.array([1, 0]), 8)
    assert filled.tokens[0].tolist() == [8, 9, 5, 6, 7, 0, 0, 0]
    assert filled.labels[0].tolist() == [9, -100, -100, 7, -100, -100, -100, -100]


def test_weights_are_kept_only_where_one_is_not_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sft_fast.data.store.FLUSH_TOKENS", 8)
    weights = [None, None, np.array([0, 0.5], np.float16), None]
    with StoreWriter(tmp_path / "store") as writer:
        for number, some in enumerate(weights):
            count = 2 if some is not None else 5
            mask = np.ones(count, bool)
            writer.add(np.full(count, number, np.uint32), mask, "a", number + 1, some)
        store = writer.commit("f", {}, DataReport())
    assert store.weights is not None
    assert store.weights.tolist() == [1] * 10 + [0, 0.5] + [1] * 5
    assert store.loss_weights is not None and store.loss_weights.dtype == np.float64
    assert store.loss_weights.tolist() == [4, 4, 0.5, 4]
    plain = write(tmp_path / "plain", [([1, 2], [False, True])])
    assert plain.weights is None and plain.loss_weights is None


@pytest.mark.parametrize(
    ("lengths", "share_left_out"),
    [
        # Two lines of chat, of the least that a template makes of them.
        (lambda rng: rng.integers(8, 17, 3000), 0.05),
        (lambda rng: rng.integers(5, 7, 3000), 0.0),
        # A long sample in every block of short ones.
        (lambda rng: np.where(np.arange(3000) % 100 == 0, 2000, rng.integers(8, 17, 3000)), 0.5),
        (lambda rng: rng.lognormal(3.5, 1, 3000).astype(int) + 6, 0.3),
    ],
    ids=["short", "very-short", "some-long", "lognormal"],
)
def test_store_is_at_most_a_tenth_larger_than_its_ids(
    tmp_path: Path, lengths: Callable[[np.random.Generator], Any], share_left_out: float
) -> None:
    rng = np.random.default_rng(0)
    line = 0
    with StoreWriter(tmp_path / "store") as writer:
        for n in lengths(rng):
            line += 1 + int(rng.random() < share_left_out)
            writer.add(np.ones(n, np.uint32), np.ones(n, bool), "a", line)
        store = writer.commit("f", {}, DataReport())
    arrays = sum(path.stat().st_size for path in store.path.glob("*.bin"))
    assert arrays <= 1.1 * store.tokens.nbytes
    assert store.line(2999) == line


def test_a_sample_is_found_without_reading_the_others(tmp_path: Path) -> None:
    samples = random_samples(1000, seed=2)
    store = write(tmp_path / "store", samples)
    assert store.sample(777)[0].tolist() == samples[777][0]
    assert store.origin(777) == "b.jsonl:778"
    assert not {"lengths", "offsets", "_targets"} & set(vars(store)), "nothing over all samples"


def test_opening_reads_no_array(tmp_path: Path) -> None:
    store = write(tmp_path / "store", random_samples(10, seed=1))
    for path in store.path.glob("*.bin"):
        size = path.stat().st_size
        path.unlink()
        with path.open("wb") as file:
            # A hole of the right size: only a reader would notice.
            file.truncate(size)
    opened = open_store(store.path)
    assert opened.num_samples == 10
    assert opened.tokens.tolist() == [0] * len(store.tokens)


def test_what_a_killed_build_left_behind_is_removed(tmp_path: Path) -> None:
    code = (
        "import sys, os, signal; from sft_fast.data.store import StoreWriter;"
        "StoreWriter(sys.argv[1]); os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "store")], cwd=ROOT, check=False)
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".building-")
    elsewhere = tmp_path / ".building-otherhost-1-abc"
    elsewhere.mkdir()
    with StoreWriter(tmp_path / "other") as mine:
        assert not left.exists()
        assert elsewhere.exists(), "it may still be at work"
        os.utime(elsewhere, (0, 0))
        with StoreWriter(tmp_path / "third"):
            assert not elsewhere.exists()
        assert mine._folder.exists(), "the build of a living process stays"

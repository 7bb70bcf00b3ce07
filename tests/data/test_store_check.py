"""Token stores that a disk, a copy or another process spoiled."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sft_fast.data import build, store_check
from sft_fast.data.build import BuildOptions, prepare_store
from sft_fast.data.source import Source, load_records
from sft_fast.data.store import META_FILE, DataReport, StoreWriter, TokenStore, open_store
from sft_fast.data.store_check import check_hashes, open_whole
from sft_fast.errors import DamageError

GOOD = {"question": "hello", "answer": "world"}


@pytest.fixture(autouse=True)
def own_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))


def write(path: Path) -> TokenStore:
    with StoreWriter(path) as writer:
        for number in range(40):
            weights = None if number < 20 else np.full(9, 0.5, np.float16)
            writer.add(np.arange(9, dtype=np.uint32), np.ones(9, bool), "a", number + 1, weights)
        return writer.commit("f", {"source": "s"}, DataReport(samples=40))


def flip(path: Path, place: int = -1) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


@pytest.mark.fault("F34")
@pytest.mark.parametrize(
    "name", ["tokens", "supervised", "weights", "lengths.blocks", "lines.blocks"]
)
def test_a_flipped_bit_of_an_array_is_found_and_the_store_set_aside(
    tmp_path: Path, name: str
) -> None:
    store = write(tmp_path / "store")
    assert open_whole(store.path) is not None
    before = store.tokens[:].tolist()
    flip(store.path / f"{name}.bin")
    with pytest.raises(DamageError, match=rf"{name}\.bin is damaged: expected xxh3_128"):
        check_hashes(store.path)
    said: list[str] = []
    assert open_whole(store.path, said.append) is None
    assert not list(tmp_path.glob("*store*")) and "it is built anew" in said[0]
    if name != "tokens":
        assert store.tokens[:].tolist() == before, "a run that reads it goes on"


@pytest.mark.fault("F34")
def test_every_bit_of_the_meta_file_counts(tmp_path: Path) -> None:
    store = write(tmp_path / "store")
    text = (store.path / META_FILE).read_bytes()
    # White space between values says nothing.
    places = [place for place in range(0, len(text), 3) if not text[place : place + 1].isspace()]
    for place in places:
        flip(store.path / META_FILE, place)
        with pytest.raises(ValueError, match=r"store|meta\.json"):
            open_store(store.path)
        (store.path / META_FILE).write_bytes(text)
    assert open_store(store.path).num_samples == 40


@pytest.mark.fault("F34")
def test_a_store_is_hashed_once_on_a_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = write(tmp_path / "store")
    hashed: list[str] = []
    original = store_check.hash_file

    def hash_file(path: Path, name: str) -> Any:
        hashed.append(name)
        return original(path, name)

    monkeypatch.setattr(store_check, "hash_file", hash_file)
    for _ in range(2):
        check_hashes(store.path)
    assert len(hashed) == len(set(hashed)) == 7
    os.utime(store.path / "tokens.bin")
    check_hashes(store.path)
    assert len(hashed) == 14


@pytest.mark.fault("F34")
def test_a_disk_that_does_not_answer_costs_no_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = write(tmp_path / "store")

    def read_bytes(path: Path) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", read_bytes)
        with pytest.raises(OSError, match="Input/output error"):
            open_whole(store.path)
    assert open_whole(store.path) is not None


@pytest.mark.fault("F34")
def test_rows_that_come_while_a_store_is_built_are_an_error(
    write_rows: Callable[..., str],
    make_tokenizer: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name = write_rows([GOOD] * 3)
    run = build._Builder.run

    def grow(builder: Any, processes: int | None) -> DataReport:
        report = run(builder, processes)
        with open(name, "ab") as file:
            file.write(Path(name).read_bytes())
        return report

    def prepare() -> TokenStore:
        source = Source(load_records(name))
        return prepare_store(source, make_tokenizer(), BuildOptions(64), tmp_path / "cache")

    monkeypatch.setattr(build._Builder, "run", grow)
    with pytest.raises(ValueError, match="changed while it was read"):
        prepare()
    assert not list((tmp_path / "cache").iterdir())
    monkeypatch.setattr(build._Builder, "run", run)
    assert prepare().num_samples == 6


@pytest.mark.fault("F34")
def test_a_store_of_another_version_stays(
    write_rows: Callable[..., str], make_tokenizer: Callable[..., Any], tmp_path: Path
) -> None:
    source, cache = Source(load_records(write_rows([GOOD]))), tmp_path / "cache"
    store = prepare_store(source, make_tokenizer(), BuildOptions(64), cache)
    older = cache / f"{store.fingerprint}-3"
    os.rename(store.path, older)
    assert prepare_store(source, make_tokenizer(), BuildOptions(64), cache).num_samples == 1
    assert older.is_dir()

"""Samples of sources that are never stored: order, shares, counts, and a state that goes on."""

import gzip
import json
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sft_fast.data.build import BuildOptions, build_store
from sft_fast.data.json_records import START, SourceRecord
from sft_fast.data.memory_store import MemoryStore, StreamSample
from sft_fast.data.source import Position, Source, load_records
from sft_fast.data.store import RejectedList
from sft_fast.data.stream import IN_EVAL, SampleStream, StreamState
from sft_fast.data.targets import sample_hash

MakeStream = Callable[..., SampleStream]
WriteRows = Callable[..., str]


def chat(number: int) -> dict[str, str]:
    return {"question": f"hello {number}", "answer": f"world {number}"}


class EndlessHub:
    """A data set without end that cannot be stored, read twice or read past a bound."""

    def __init__(self, bound: int) -> None:
        self.bound = bound
        self.read: list[int] = []
        self.hash, self.config = "revision", SimpleNamespace(name="default")

    def load_dataset_builder(self, *arguments: Any, **options: Any) -> Any:
        return self

    def as_streaming_dataset(self, split: str) -> Any:
        from datasets import IterableDataset

        return IterableDataset.from_generator(self.rows)

    def rows(self) -> Iterator[dict[str, str]]:
        for number in range(self.bound):
            self.read.append(number)
            yield chat(number)
        raise AssertionError(f"more than {self.bound} rows were read")


@pytest.fixture
def make_stream(make_tokenizer: Callable[..., Any]) -> MakeStream:
    """A stream of sources, or of the paths of some."""

    def make(*sources: Source | str, state: StreamState | None = None, **options: Any) -> Any:
        chosen = {"buffer_size": 1, "seed": 3} | options
        build = {
            key: chosen.pop(key)
            for key in ("over_length", "on_bad_row", "max_rejected")
            if key in chosen
        }
        found = [
            source if isinstance(source, Source) else Source(load_records(source, streaming=True))
            for source in sources
        ]
        tokenizer = make_tokenizer()
        stream = SampleStream(found, tokenizer, BuildOptions(64, **build), **chosen)
        if state is not None:
            stream.restore(state)
        return stream

    return make


def take(stream: SampleStream, number: int) -> list[tuple[str, list[int]]]:
    return [(sample.origin, sample.tokens.tolist()) for sample in islice(stream, number)]


def saved(state: StreamState) -> StreamState:
    """The state after it was written and read."""
    store = MemoryStore.of((*state.buffer, *state.waiting))
    return StreamState.of(state.as_json(), store.samples())


def test_samples_are_those_of_the_store(
    make_stream: MakeStream,
    make_tokenizer: Callable[..., Any],
    write_rows: WriteRows,
    tmp_path: Path,
) -> None:
    path = write_rows([chat(number) for number in range(20)])
    options = BuildOptions(64)
    store = build_store(Source(load_records(path)), make_tokenizer(), options, tmp_path / "store")
    samples = list(islice(make_stream(path), 20))
    for number, sample in enumerate(samples):
        tokens, supervised = store.sample(number)
        np.testing.assert_array_equal(sample.tokens, tokens)
        np.testing.assert_array_equal(sample.supervised, supervised)
        assert sample.origin == store.origin(number)
        # A view would keep the tokens of its whole batch, for as long as it waits in the buffer.
        assert sample.tokens.base is None and sample.supervised.base is None


def test_the_end_is_followed_by_the_beginning(
    make_stream: MakeStream, write_rows: WriteRows, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_rows([chat(number) for number in range(5)])
    with caplog.at_level("INFO"):
        taken = take(make_stream(path), 13)
    assert [origin for origin, _ in taken] == [f"{path}:{n % 5 + 1}" for n in range(13)]
    assert f"{path}: read 2 times to its end, begins anew" in caplog.text


def test_the_buffer_shuffles_and_loses_nothing(
    make_stream: MakeStream, write_rows: WriteRows
) -> None:
    path = write_rows([chat(number) for number in range(50)])
    stream = make_stream(path, buffer_size=20)
    taken = take(stream, 100)
    origins = [origin for origin, _ in taken]
    assert origins[:30] != sorted(origins[:30], key=lambda origin: int(origin.split(":")[1]))
    counts = Counter(origins) + Counter(sample.origin for sample in stream.state().buffer)
    # 100 taken, 20 held and the 1 that is read ahead are two passes and a part of a third.
    assert sum(counts.values()) == 120
    assert {*counts.values()} == {2, 3}
    assert take(make_stream(path, buffer_size=20), 100) == taken
    assert take(make_stream(path, buffer_size=20, seed=4), 100) != taken


@pytest.mark.parametrize("taken", [0, 1, 31, 60, 150])
@pytest.mark.parametrize("suffix", ["jsonl", "json", "jsonl.gz", "csv", "parquet"])
def test_a_state_goes_on_exactly(
    make_stream: MakeStream, tmp_path: Path, suffix: str, taken: int
) -> None:
    rows = [chat(number) for number in range(70)]
    path = tmp_path / f"rows.{suffix}"
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    match suffix:
        case "jsonl":
            path.write_text(lines)
        case "jsonl.gz":
            path.write_bytes(gzip.compress(lines.encode()))
        case "json":
            path.write_text(json.dumps(rows))
        case "csv":
            body = "".join(f"{row['question']},{row['answer']}\n" for row in rows)
            path.write_text("question,answer\n" + body)
        case _:
            pa = pytest.importorskip("pyarrow")
            pytest.importorskip("pyarrow.parquet").write_table(
                pa.Table.from_pylist(rows), path, row_group_size=7
            )
    options = {"buffer_size": 10}
    stream = make_stream(str(path), **options)
    take(stream, taken)
    resumed = make_stream(str(path), state=saved(stream.state()), **options)
    assert take(resumed, 100) == take(stream, 100)
    assert resumed.report == stream.report


def test_what_was_trained_is_not_read_again(
    make_stream: MakeStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    hub = EndlessHub(bound=1500)
    monkeypatch.setattr(datasets, "load_dataset_builder", hub.load_dataset_builder)
    stream = make_stream("owner/name", buffer_size=10)
    take(stream, 1000)
    state = saved(stream.state())
    expected = take(stream, 50)
    assert hub.read == list(range(len(hub.read)))
    before = len(hub.read)
    resumed = make_stream("owner/name", buffer_size=10, state=state)
    assert take(resumed, 50) == expected
    # A generator has no way in but the beginning; what it gives is not tokenised again.
    assert resumed.report == stream.report
    assert len(hub.read) - before <= 1100


def test_lines_before_the_position_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps(chat(number)) for number in range(50)]
    path.write_text("".join(line + "\n" for line in lines))
    records = load_records(str(path), streaming=True)
    position = list(islice(records.follow(), 20))[-1][0]
    # What lies before it may have been overwritten.
    text = path.read_bytes()
    offset = position.place.hint
    path.write_bytes(b"x" * offset + text[offset:])
    followed = [record for _, record in islice(records.follow(position), 30)]
    assert all(isinstance(record, SourceRecord) for record in followed)
    assert [record.line for record in followed] == list(range(21, 51))


def test_positions_survive_json() -> None:
    position = Position(2, 3, 4, START._replace(number=5, hint=[{"a": 1}, 256]))
    assert Position.of(json.loads(json.dumps(position))) == position


@pytest.mark.parametrize(("split", "lines"), [("train[:3]", [1, 2, 3]), ("train[2:4]", [3, 4])])
def test_slices_are_record_numbers(write_rows: WriteRows, split: str, lines: list[int]) -> None:
    path = write_rows([chat(number) for number in range(6)])
    records = load_records(path, split, streaming=True)
    found = [record.line for _, record in islice(records.follow(), 2 * len(lines))]
    assert found == lines * 2


def test_slices_that_need_the_end_are_refused(write_rows: WriteRows) -> None:
    records = load_records(write_rows([chat(0)]), "train[:50%]", streaming=True)
    with pytest.raises(ValueError, match=r"cannot stream the slice '\[:50%\]'"):
        next(records.follow())
    records = load_records(write_rows([chat(0)]), "train[5:]", streaming=True)
    with pytest.raises(ValueError, match="there are no records"):
        next(records.follow())


def test_sources_take_turns_by_their_weights(
    make_stream: MakeStream, write_rows: WriteRows
) -> None:
    paths = [write_rows([chat(n) for n in range(10)], f"{name}.jsonl") for name in "ab"]
    sources = [
        Source(load_records(path, streaming=True), weight=weight)
        for path, weight in zip(paths, (3.0, 1.0), strict=True)
    ]
    stream = make_stream(*sources)
    taken = [origin.rpartition(":")[0] for origin, _ in take(stream, 400)]
    for number in range(1, 400):
        assert abs(taken[:number].count(paths[0]) - 0.75 * number) <= 1
    resumed = make_stream(*sources, state=saved(stream.state()))
    assert take(resumed, 50) == take(stream, 50)


def test_sources_without_a_share_are_refused(
    make_stream: MakeStream, write_rows: WriteRows
) -> None:
    path = write_rows([chat(0)])
    with pytest.raises(ValueError, match="each needs a weight"):
        make_stream(path, path)
    with pytest.raises(ValueError, match="repeat does not go with data.streaming"):
        make_stream(Source(load_records(path, streaming=True), repeat=2))


BAD_ROWS = [
    chat(0),
    '{"question": "q"',
    {"question": "q", "answer": ""},
    {"question": "long", "answer": "hello " * 100},
    chat(1),
]


def test_what_cannot_be_used_is_counted_as_in_the_store(
    make_stream: MakeStream,
    make_tokenizer: Callable[..., Any],
    write_rows: WriteRows,
    tmp_path: Path,
) -> None:
    path = write_rows(BAD_ROWS)
    how: dict[str, Any] = {"on_bad_row": "skip", "max_rejected": 0.5}
    for policy in ("drop", "truncate_right"):
        source = Source(load_records(path))
        options = BuildOptions(64, over_length=policy, **how)
        store = build_store(source, make_tokenizer(), options, tmp_path / policy)
        listed = [
            tuple(json.loads(line).values())
            for line in store.rejected_path.read_text().splitlines()
        ]
        rejected: list[tuple[str, int, str, str]] = []
        stream = make_stream(
            path,
            over_length=policy,
            reject=lambda *entry, kept=rejected: kept.append(entry),
            **how,
        )
        assert len(take(stream, store.num_samples)) == store.num_samples
        # The next sample has been read already, of the next pass.
        assert rejected == listed
        counted = stream.report
        for name in ("truncated", "cut_tokens", "split", "rejected", "longest", "template"):
            assert getattr(counted, name) == getattr(store.report, name)
        assert counted.samples == store.num_samples + 1


def test_a_bad_record_stops_the_stream(make_stream: MakeStream, write_rows: WriteRows) -> None:
    path = write_rows(BAD_ROWS)
    with pytest.raises(ValueError, match=rf"{path}:2:17: not valid JSON.*data.on_bad_row: skip"):
        take(make_stream(path), 2)
    with pytest.raises(ValueError, match=rf"{path}:4: \d+ tokens, more than packing.capacity = 64"):
        take(make_stream(path, on_bad_row="skip"), 2)


def test_too_many_bad_records_stop_the_stream(
    make_stream: MakeStream, write_rows: WriteRows
) -> None:
    path = write_rows([*(chat(n) for n in range(9)), {"question": "q", "answer": ""}])
    stream = make_stream(path, on_bad_row="skip", max_rejected=0.01)
    # The tenth of the records that is bad is above the limit once there are enough of them.
    with pytest.raises(ValueError, match="11 of 110 records .* data.max_rejected = 0.01"):
        take(stream, 2000)


def test_a_source_without_a_sample_is_refused(
    make_stream: MakeStream, write_rows: WriteRows
) -> None:
    path = write_rows([{"question": "q", "answer": ""}])
    stream = make_stream(path, on_bad_row="skip", max_rejected=1.0)
    with pytest.raises(ValueError, match=f"no sample of {path} can be used"):
        take(stream, 1)


def test_samples_of_the_evaluation_do_not_train(
    make_stream: MakeStream, write_rows: WriteRows
) -> None:
    path = write_rows([chat(number) for number in range(4)])
    samples = list(islice(make_stream(path), 4))
    stream = make_stream(path, held_out={sample_hash(samples[2].tokens)})
    lines = [origin.rpartition(":")[2] for origin, _ in take(stream, 6)]
    assert lines == ["1", "2", "4"] * 2
    assert stream.report.rejected[IN_EVAL] == 2


def test_the_parts_tell_sources_and_options_apart(
    make_stream: MakeStream, write_rows: WriteRows
) -> None:
    path = write_rows([chat(number) for number in range(4)])
    parts = make_stream(path).parts
    assert make_stream(path).fingerprint == make_stream(path).fingerprint
    assert {"tokenizer", "template"} < {*parts}
    assert make_stream(path, over_length="drop").parts["stream"] != parts["stream"]
    other = write_rows([chat(number) for number in range(5)], "other.jsonl")
    assert make_stream(other).parts["stream"] != parts["stream"]


def test_formats_are_those_of_the_first_record_of_a_file(
    make_stream: MakeStream, write_rows: WriteRows
) -> None:
    # In the middle of the file, its format could not be told.
    rows = [chat(0), *({"question": f"q {n}", "answer": "a", "text": "t"} for n in range(5))]
    path = write_rows(rows)
    stream = make_stream(path)
    take(stream, 3)
    resumed = make_stream(path, state=saved(stream.state()))
    assert take(resumed, 3) == take(stream, 3)
    assert resumed.report.formats == {path: "question_answer (columns question, answer)"}


def test_processes_do_not_change_the_stream(make_stream: MakeStream, write_rows: WriteRows) -> None:
    path = write_rows([chat(number) for number in range(100)])
    alone = take(make_stream(path, buffer_size=5), 150)
    assert take(make_stream(path, buffer_size=5, processes=2), 150) == alone


def test_a_sample_must_have_the_right_types() -> None:
    with pytest.raises(AssertionError, match="a.jsonl:3"):
        StreamSample(np.zeros(3, np.int64), np.zeros(3, np.bool_), None, "a.jsonl:3")


def test_a_state_does_not_change_with_the_stream(
    make_stream: MakeStream, write_rows: WriteRows
) -> None:
    path = write_rows([chat(number) | {"id": number} for number in range(20)])
    stream = make_stream(path)
    take(stream, 3)
    state = stream.state()
    kept = state.as_json()
    assert state.report.unread == {"id": 4}
    take(stream, 3)
    assert state.as_json() == kept


def test_files_without_a_split_are_named(make_stream: MakeStream, tmp_path: Path) -> None:
    for name in ("train.jsonl", "notes.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(chat(n)) + "\n" for n in range(9)))
    stream = make_stream(str(tmp_path))
    assert stream.report.left_out == [str(tmp_path / "notes.jsonl")]
    take(stream, 3)
    resumed = make_stream(str(tmp_path), state=saved(stream.state()))
    assert resumed.report == stream.report


def test_a_record_that_is_not_used_is_listed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sft_fast.data.store.MOST_REJECTED", 3)
    path = tmp_path / "rejected.jsonl"
    for _ in range(2):  # a run and its resume
        rejected = RejectedList(path)
        for line in (1, 2, 1, 3, 4):
            rejected.add("a.jsonl", line, "too long", f"a.jsonl:{line}: 9 tokens\u2028")
    entries = [json.loads(line) for line in path.read_text("utf-8").split("\n")[:-1]]
    assert [entry["line"] for entry in entries] == [1, 2, 3]


def test_a_list_that_cannot_be_written_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rejected = RejectedList(tmp_path / "nowhere" / "rejected.jsonl")
    for line in (1, 2):
        rejected.add("a.jsonl", line, "too long", "a message")
    assert caplog.text.count("rejected.jsonl is not written") == 1

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sft_fast.data import format_registry
from sft_fast.data.build import BuildOptions, build_store, prepare_store, store_fingerprint
from sft_fast.data.conversation import Conversation, Message
from sft_fast.data.formats import register_format
from sft_fast.data.source import load_rows
from sft_fast.data.store import REJECTED_FILE, TokenStore

WriteRows = Callable[..., str]
MakeTokenizer = Callable[..., Any]
GOOD = {"question": "hello", "answer": "world"}


def long_row(words: int) -> dict[str, str]:
    return {"question": "hello", "answer": " world" * words}


@pytest.fixture
def build(make_tokenizer: MakeTokenizer, tmp_path: Path) -> Callable[..., TokenStore]:
    def run(source: str, capacity: int = 64, **options: Any) -> TokenStore:
        rows = load_rows(source)
        path = tmp_path / "store"
        return build_store(rows, "auto", make_tokenizer(), BuildOptions(capacity, **options), path)

    return run


def rejected(store: TokenStore) -> list[dict[str, Any]]:
    lines = (store.path / REJECTED_FILE).read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_rows_become_samples_that_know_their_origin(
    build: Callable[..., TokenStore], write_rows: WriteRows, make_tokenizer: MakeTokenizer
) -> None:
    path = write_rows([GOOD, "", {"question": "how", "answer": "you"}])
    store = build(path)
    assert [store.origin(number) for number in range(2)] == [f"{path}:1", f"{path}:3"]
    tokens, supervised = store.sample(1)
    tokenizer = make_tokenizer()
    assert tokenizer.decode(tokens[supervised].tolist()) == "you<|im_end|>"
    report = store.report
    assert (report.rows, report.samples, report.rejected) == (2, 2, {})
    assert report.tokens == len(store.tokens)
    assert report.supervised_tokens == store.num_supervised.sum()
    assert report.formats == {path: "question_answer"}
    assert rejected(store) == []
    assert f"{path}: 2 samples of 2 rows, read as question_answer" in report.summary()


def test_one_error_lists_the_bad_rows(
    build: Callable[..., TokenStore], write_rows: WriteRows, tmp_path: Path
) -> None:
    path = write_rows(
        [
            GOOD,
            '{"question": "q"',
            {"question": "q", "answer": ""},
            {"question": "q", "answer": 4},
            {"question": "q</s>", "answer": "a"},
            GOOD,
        ]
    )
    with pytest.raises(ValueError) as caught:
        build(path)
    lines = str(caught.value).split("\n")
    assert lines[0] == f"4 of 6 rows of {path} cannot be used; mend or remove them:"
    assert lines[1].startswith(f"  {path}:2:17: not valid JSON")
    assert lines[2].startswith(f"  {path}:3: 'answer' is empty")
    assert lines[3].startswith(f"  {path}:4: 'answer' is a number (4)")
    assert lines[4].startswith(f"  {path}:5: turn 1 (user) contains the control token '</s>'")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl"]


def test_error_shows_the_first_five_bad_rows(
    build: Callable[..., TokenStore], write_rows: WriteRows
) -> None:
    with pytest.raises(ValueError, match=r"7 of 8 rows(.*\n)+.*:6: (.*\n)  and 2 more$"):
        build(write_rows([GOOD, *[{"question": "q", "answer": ""}] * 7]))


def test_bad_rows_can_be_skipped_counted_and_listed(
    build: Callable[..., TokenStore], write_rows: WriteRows
) -> None:
    path = write_rows([GOOD, "nonsense", {"question": "q", "answer": ""}, GOOD])
    store = build(path, on_bad_row="skip")
    assert store.num_samples == 2
    assert store.origin(1) == f"{path}:4"
    assert store.report.rejected == {"unreadable": 1, "not in the format": 1}
    assert [(entry["line"], entry["reason"]) for entry in rejected(store)] == [
        (2, "unreadable"),
        (3, "not in the format"),
    ]
    assert "not used: 1 rows, unreadable" in store.report.summary()


def test_no_usable_row_is_an_error(build: Callable[..., TokenStore], write_rows: WriteRows) -> None:
    with pytest.raises(ValueError, match="no sample of .* can be used: 2 unreadable"):
        build(write_rows(["nonsense", "nonsense"]), on_bad_row="skip")


def test_too_long_samples_stop_the_build_with_a_choice(
    build: Callable[..., TokenStore], write_rows: WriteRows
) -> None:
    path = write_rows([GOOD, long_row(100), GOOD, long_row(200)])
    with pytest.raises(ValueError) as caught:
        build(path)
    message = str(caught.value)
    assert message.startswith(f"2 of 4 samples of {path} are longer than packing.capacity = 64")
    longest = int(message.split("the longest has ")[1].split(".")[0])
    assert longest > 200
    assert f"Set packing.capacity to {longest} or more, or data.over_length to drop" in message
    assert f"{path}:2: " in message and f"{path}:4: {longest} tokens" in message


def test_too_long_samples_can_be_dropped(
    build: Callable[..., TokenStore], write_rows: WriteRows
) -> None:
    path = write_rows([GOOD, long_row(100), GOOD])
    store = build(path, over_length="drop")
    assert [store.origin(number) for number in range(2)] == [f"{path}:1", f"{path}:3"]
    assert store.report.rejected == {"too long": 1}
    assert store.report.longest > 100
    assert [entry["line"] for entry in rejected(store)] == [2]


def test_truncation_keeps_the_start_and_never_a_sample_without_target(
    build: Callable[..., TokenStore], write_rows: WriteRows
) -> None:
    long_prompt = {"question": "world " * 100, "answer": "hello"}
    store = build(write_rows([long_row(100), long_prompt, GOOD]), over_length="truncate_right")
    assert store.lengths[0] == 64
    assert store.num_supervised.min() > 0
    assert store.num_samples == 2
    assert store.report.truncated == 1
    assert store.report.rejected == {"nothing to learn": 1}
    assert [(entry["line"], entry["reason"]) for entry in rejected(store)] == [
        (1, "truncated"),
        (2, "nothing to learn"),
    ]


def test_sample_of_exactly_the_capacity_is_kept_whole(
    build: Callable[..., TokenStore], write_rows: WriteRows, make_tokenizer: MakeTokenizer
) -> None:
    path = write_rows([GOOD])
    tokenizer = make_tokenizer()
    options = BuildOptions(1000)
    length = build_store(load_rows(path), "auto", tokenizer, options, Path(path + ".store")).lengths
    assert build(path, capacity=int(length[0])).report.truncated == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"over_length": "cut"}, "over_length is 'cut'; expected one of error, drop, truncate"),
        ({"on_bad_row": "ignore"}, "on_bad_row is 'ignore'; expected one of error, skip"),
        ({"capacity": 1}, "capacity is 1; expected 2 tokens at least"),
    ],
)
def test_unknown_option(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BuildOptions(**({"capacity": 64} | options))


def test_prepare_builds_once_and_mends_damage(
    write_rows: WriteRows, make_tokenizer: MakeTokenizer, tmp_path: Path
) -> None:
    rows = load_rows(write_rows([GOOD]))
    tokenizer, options, cache = make_tokenizer(), BuildOptions(64), tmp_path / "cache"
    first = prepare_store(rows, "auto", tokenizer, options, cache)
    built = (first.path / "tokens.bin").stat().st_mtime_ns
    second = prepare_store(rows, "auto", tokenizer, options, cache)
    assert second.path == first.path
    assert (second.path / "tokens.bin").stat().st_mtime_ns == built
    (first.path / "tokens.bin").write_bytes(b"")
    third = prepare_store(rows, "auto", tokenizer, options, cache)
    assert third.tokens.tolist() == third.sample(0)[0].tolist()
    assert list(cache.iterdir()) == [third.path]


def test_fingerprint_changes_with_whatever_decides_the_content(
    write_rows: WriteRows, make_tokenizer: MakeTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, tokenizer, options = load_rows(write_rows([GOOD])), make_tokenizer(), BuildOptions(64)

    def fingerprint(**changes: Any) -> str:
        inputs: dict[str, Any] = {"rows": rows, "format_name": "auto", "tokenizer": tokenizer}
        return store_fingerprint(**(inputs | {"options": options} | changes))[0]

    other_rows = load_rows(write_rows([GOOD, GOOD], "other.jsonl"))
    bigger = make_tokenizer()
    bigger.add_tokens(["hello"])
    changed = [
        fingerprint(rows=other_rows),
        fingerprint(format_name="question_answer"),
        fingerprint(tokenizer=make_tokenizer("{{ messages }}")),
        fingerprint(tokenizer=make_tokenizer(bos_token="<|im_start|>")),
        fingerprint(tokenizer=bigger),
        fingerprint(options=BuildOptions(65)),
        fingerprint(options=BuildOptions(64, over_length="drop")),
        fingerprint(options=BuildOptions(64, fields={"question": "question"})),
    ]
    monkeypatch.setattr("sft_fast.data.build.CODE_VERSION", -1)
    changed.append(fingerprint())
    monkeypatch.undo()
    assert len({fingerprint(), *changed}) == len(changed) + 1


def test_fingerprint_ignores_where_things_are_and_what_calls_left_behind(
    write_rows: WriteRows, make_tokenizer: MakeTokenizer, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    tokenizer, options = make_tokenizer(), BuildOptions(64)
    first = store_fingerprint(load_rows(write_rows([GOOD])), "auto", tokenizer, options)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    tokenizer.pad_token = "</s>"
    tokenizer(["a", "b c"], padding="max_length", truncation=True, max_length=8)
    tokenizer.pad_token = None
    rows = load_rows(write_rows([GOOD], "moved.jsonl"))
    assert store_fingerprint(rows, "auto", tokenizer, options) == first
    loaded = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert store_fingerprint(rows, "auto", loaded, options) == first


def test_fingerprint_covers_the_code_of_own_formats(
    write_rows: WriteRows, make_tokenizer: MakeTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, tokenizer, options = load_rows(write_rows([GOOD])), make_tokenizer(), BuildOptions(64)
    fingerprints = []
    for shout in (False, True):
        monkeypatch.setattr(format_registry, "_FORMATS", {})
        if shout:

            @register_format("own")
            def loud(record: Any) -> Conversation:
                return Conversation((Message("assistant", record["answer"].upper()),))
        else:

            @register_format("own")
            def quiet(record: Any) -> Conversation:
                return Conversation((Message("assistant", record["answer"]),))

        fingerprints.append(store_fingerprint(rows, "own", tokenizer, options)[0])
    assert fingerprints[0] != fingerprints[1]

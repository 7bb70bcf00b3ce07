import gc
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers.pre_tokenizers import ByteLevel

from sft_fast.data.build import (
    BadRecords,
    BuildOptions,
    build_store,
    prepare_store,
    store_fingerprint,
)
from sft_fast.data.conversation import Conversation, Message
from sft_fast.data.format_registry import formats
from sft_fast.data.formats import register_format
from sft_fast.data.render import MaskOptions
from sft_fast.data.sample_maker import long_lived_objects
from sft_fast.data.source import Records, Source, load_records
from sft_fast.data.store import REJECTED_FILE, TokenStore
from sft_fast.data.templates import CHATML_TEMPLATE
from sft_fast.data.token_cache import can_be_cut

WriteRows = Callable[..., str]
MakeTokenizer = Callable[..., Any]
GOOD = {"question": "hello", "answer": "world"}


def long_row(words: int) -> dict[str, str]:
    return {"question": "hello", "answer": " world" * words}


@pytest.fixture
def build(make_tokenizer: MakeTokenizer, tmp_path: Path) -> Callable[..., TokenStore]:
    def run(source: str, capacity: int = 64, **options: Any) -> TokenStore:
        path = tmp_path / "store"
        rows = Source(load_records(source))
        return build_store(rows, make_tokenizer(), BuildOptions(capacity, **options), path)

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
    assert report.formats == {path: "question_answer (columns question, answer)"}
    assert rejected(store) == []
    assert f"{path}: 2 samples of 2 records, read as question_answer" in report.summary()


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
    assert lines[0] == f"4 of 6 records of {path} cannot be used; mend or remove them:"
    assert lines[1].startswith(f"  {path}:2:17: not valid JSON")
    assert lines[2].startswith(f"  {path}:3: 'answer' is empty")
    assert lines[3].startswith(f"  {path}:4: 'answer' is a number (4)")
    assert lines[4].startswith(f"  {path}:5: turn 1 (user) contains the control token '</s>'")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl"]


def test_error_shows_the_first_five_bad_rows(
    build: Callable[..., TokenStore], write_rows: WriteRows, tmp_path: Path
) -> None:
    with pytest.raises(
        ValueError, match=r"7 of 8 records(.*\n)+.*:6: (.*\n)  and 2 more"
    ) as caught:
        build(write_rows([GOOD, *[{"question": "q", "answer": ""}] * 7]))
    listed = tmp_path / "store.rejected.jsonl"
    assert str(caught.value).endswith(f", all listed in {listed}")
    entries = [json.loads(line) for line in listed.read_text().splitlines()]
    assert [entry["line"] for entry in entries] == list(range(2, 9))
    # It goes when the rows are good.
    build(write_rows([GOOD] * 8))
    assert not listed.exists()


def test_bad_rows_can_be_skipped_counted_and_listed(
    build: Callable[..., TokenStore], write_rows: WriteRows
) -> None:
    path = write_rows([GOOD, "nonsense", {"question": "q", "answer": ""}, GOOD])
    store = build(path, on_bad_row="skip", max_rejected=0.5)
    assert store.num_samples == 2
    assert store.origin(1) == f"{path}:4"
    assert store.report.rejected == {"unreadable": 1, "not in the format": 1}
    assert store.summary().endswith(f"\nlisted in {store.path}/rejected.jsonl")
    assert [(entry["line"], entry["reason"]) for entry in rejected(store)] == [
        (2, "unreadable"),
        (3, "not in the format"),
    ]
    assert "not used: 1 records, unreadable" in store.report.summary()


def test_bad_records_are_counted_and_the_first_few_of_each_kind_kept() -> None:
    bad = BadRecords()
    for number in range(100):
        bad.add("too long", "wanted")
        bad.add("nothing to learn" if number < 50 else "unreadable", f"row {number}")
    assert (bad.count, bad.num_unusable) == (100, 50)
    assert bad.first == [f"row {number}" for number in range(5)]
    assert bad.first_unusable == [f"row {number}" for number in range(50, 55)]


def test_objects_are_collected_after_a_build_as_before(
    build: Callable[..., TokenStore], write_rows: WriteRows
) -> None:
    gc.unfreeze()  # what other tests of this process have frozen
    build(write_rows([GOOD]))
    assert gc.get_freeze_count() == 0
    gc.freeze()
    try:
        with long_lived_objects():
            pass
        assert gc.get_freeze_count() > 0, "who froze them keeps them so"
    finally:
        gc.unfreeze()


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
    path = write_rows([long_row(100), long_prompt, GOOD])
    store = build(path, over_length="truncate_right", max_rejected=0.5)
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
    rows = Source(load_records(path))
    length = build_store(rows, tokenizer, options, Path(path + ".store")).lengths
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
    rows = Source(load_records(write_rows([GOOD])))
    tokenizer, options, cache = make_tokenizer(), BuildOptions(64), tmp_path / "cache"
    first = prepare_store(rows, tokenizer, options, cache)
    built = (first.path / "tokens.bin").stat().st_mtime_ns
    second = prepare_store(rows, tokenizer, options, cache)
    assert second.path == first.path
    assert (second.path / "tokens.bin").stat().st_mtime_ns == built
    (first.path / "tokens.bin").write_bytes(b"")
    third = prepare_store(rows, tokenizer, options, cache)
    assert third.tokens.tolist() == third.sample(0)[0].tolist()
    assert list(cache.iterdir()) == [third.path]


def test_fingerprint_changes_with_whatever_decides_the_content(
    write_rows: WriteRows, make_tokenizer: MakeTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = load_records(write_rows([GOOD]))

    def fingerprint(
        rows: Records = rows,
        format_name: str = "auto",
        fields: dict[str, str] | None = None,
        tokenizer: Any = None,
        options: BuildOptions | None = None,
    ) -> str:
        source = Source(rows, format_name, fields or {})
        options = options or BuildOptions(64)
        return store_fingerprint(source, tokenizer or make_tokenizer(), options)[0]

    bigger = make_tokenizer()
    bigger.add_tokens(["hello"])
    changed = [
        fingerprint(rows=load_records(write_rows([GOOD, GOOD], "other.jsonl"))),
        fingerprint(rows=rows.hold_out(0.5)[0]),
        fingerprint(format_name="question_answer"),
        fingerprint(fields={"question": "question"}),
        fingerprint(tokenizer=make_tokenizer("{{ messages }}")),
        fingerprint(tokenizer=make_tokenizer(bos_token="<|im_start|>")),
        fingerprint(tokenizer=bigger),
        fingerprint(options=BuildOptions(64, over_length="drop")),
        fingerprint(options=BuildOptions(65, over_length="drop")),
        fingerprint(options=BuildOptions(64, mask=MaskOptions(trim_tail=False))),
    ]
    monkeypatch.setattr("sft_fast.data.build.CODE_VERSION", -1)
    changed.append(fingerprint())
    monkeypatch.undo()
    assert len({fingerprint(), *changed}) == len(changed) + 1
    for same in (BuildOptions(65), BuildOptions(64, on_bad_row="skip", max_rejected=1)):
        assert fingerprint(options=same) == fingerprint()


def test_store_is_checked_against_the_options_that_its_fingerprint_leaves_out(
    write_rows: WriteRows, make_tokenizer: MakeTokenizer, tmp_path: Path
) -> None:
    source = Source(load_records(write_rows([GOOD, long_row(100), "nonsense"])))

    def prepare(capacity: int, **options: Any) -> TokenStore:
        return prepare_store(source, make_tokenizer(), BuildOptions(capacity, **options), tmp_path)

    store = prepare(1000, on_bad_row="skip", max_rejected=0.5)
    assert prepare(900, on_bad_row="skip", max_rejected=0.5).path == store.path
    with pytest.raises(ValueError, match=r"1 of 2 samples .*\n  .*rows\.jsonl:2: \d+ tokens"):
        prepare(64, on_bad_row="skip", max_rejected=0.5)
    with pytest.raises(
        ValueError, match=r"1 of 3 records .* cannot be used; (.*\n)  .*jsonl:3:1: "
    ):
        prepare(1000)
    with pytest.raises(ValueError, match=r"\(33\.3%: 1 unreadable\), more than data\.max_reject"):
        prepare(1000, on_bad_row="skip")


def test_fingerprint_ignores_where_things_are_and_what_calls_left_behind(
    write_rows: WriteRows, make_tokenizer: MakeTokenizer, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    tokenizer, options = make_tokenizer(), BuildOptions(64)
    first = store_fingerprint(Source(load_records(write_rows([GOOD]))), tokenizer, options)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    tokenizer.pad_token = "</s>"
    tokenizer(["a", "b c"], padding="max_length", truncation=True, max_length=8)
    tokenizer.pad_token = None
    source = Source(load_records(write_rows([GOOD], "moved.jsonl")))
    assert store_fingerprint(source, tokenizer, options) == first
    loaded = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert store_fingerprint(source, loaded, options) == first


def test_fingerprint_covers_the_code_of_own_formats(
    write_rows: WriteRows, make_tokenizer: MakeTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Source(load_records(write_rows([GOOD])), "own")
    fingerprints = []
    for shout in (False, True):
        monkeypatch.setattr(formats, "entries", {})
        if shout:

            @register_format("own")
            def loud(record: Any) -> Conversation:
                return Conversation((Message("assistant", record["answer"].upper()),))
        else:

            @register_format("own")
            def quiet(record: Any) -> Conversation:
                return Conversation((Message("assistant", record["answer"]),))

        fingerprints.append(store_fingerprint(source, make_tokenizer(), BuildOptions(64))[0])
    assert fingerprints[0] != fingerprints[1]


def test_rejected_share_has_a_limit(
    build: Callable[..., TokenStore], write_rows: WriteRows
) -> None:
    path = write_rows([GOOD] * 198 + [{"question": "q", "answer": ""}] * 2)
    store = build(path, on_bad_row="skip")
    assert store.num_samples == 198
    shutil.rmtree(store.path)
    path = write_rows([GOOD] * 197 + [{"question": "q", "answer": ""}] * 3, "more.jsonl")
    with pytest.raises(ValueError, match=r"3 of 200 records .*\(1\.5%: 3 not in the format\)"):
        build(path, on_bad_row="skip")


@pytest.mark.parametrize("policy", ["truncate_left", "truncate_right"])
def test_truncation_on_either_side(
    build: Callable[..., TokenStore],
    write_rows: WriteRows,
    make_tokenizer: MakeTokenizer,
    policy: str,
) -> None:
    path = write_rows([{"question": " hello" * 100, "answer": "world" * 10}])
    if policy == "truncate_right":
        with pytest.raises(ValueError, match="1 nothing to learn"):
            build(path, over_length=policy, on_bad_row="skip", max_rejected=1)
        return
    store = build(path, over_length=policy)
    tokens, supervised = store.sample(0)
    text = make_tokenizer().decode(tokens[supervised].tolist())
    assert (len(tokens), text) == (64, "world" * 10 + "<|im_end|>")
    assert store.report.truncated == 1
    assert store.report.cut_tokens == store.report.longest - 64 > 0


def test_long_conversation_is_split_at_its_turns(
    build: Callable[..., TokenStore], write_rows: WriteRows, make_tokenizer: MakeTokenizer
) -> None:
    turns = [{"role": "system", "content": "brief"}]
    for number in range(12):
        turns.append({"role": "user", "content": f"how {number}"})
        turns.append({"role": "assistant", "content": f"world {number}"})
    path = write_rows([{"messages": turns}, {"messages": turns[:3]}])
    store = build(path, capacity=80, over_length="split_turns")
    assert store.num_samples > 2 and store.lengths.max() <= 80
    assert (store.report.rows, store.report.split, store.report.rejected) == (2, 1, {})
    decode = make_tokenizer().decode
    learnt = ""
    for number in range(store.num_samples):
        tokens, supervised = store.sample(number)
        assert decode(tokens.tolist()).startswith(
            "<|im_start|>system\nbrief<|im_end|>\n<|im_start|>u"
        )
        learnt += decode(tokens[supervised].tolist())
    answers = [f"world {number}<|im_end|>" for number in [*range(12), 0]]
    assert learnt == "".join(answers)
    assert [entry["reason"] for entry in rejected(store)] == ["split"]


def exchange(number: int, **keys: Any) -> list[dict[str, Any]]:
    """A turn of the user and its answer, to which `keys` are added."""
    answer = {"role": "assistant", "content": f"world {number}", **keys}
    return [{"role": "user", "content": f"hello hello hello {number}"}, answer]


CALL = {"tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}]}
FUSSY = "{%- if 'hello 0' not in messages | string %}{{ raise_exception('no 0') }}{% endif %}"


@pytest.mark.parametrize("mask", [MaskOptions("last_turn"), MaskOptions(train_tool_calls=False)])
def test_options_are_those_of_the_whole_conversation(
    build: Callable[..., TokenStore],
    write_rows: WriteRows,
    make_tokenizer: MakeTokenizer,
    mask: MaskOptions,
) -> None:
    """The parts in which nothing is trained are no samples, and do not end the build."""
    turns = sum((exchange(number, **CALL) for number in range(8)), [])
    path = write_rows([{"messages": turns + exchange(8)}])
    store = build(path, capacity=70, over_length="split_turns", mask=mask)
    assert (store.num_samples, store.report.rejected) == (1, {})
    tokens, supervised = store.sample(0)
    assert make_tokenizer().decode(tokens[supervised].tolist()) == "world 8<|im_end|>"


def test_every_part_has_the_opening_turns_and_the_options_of_its_template(
    write_rows: WriteRows, make_tokenizer: MakeTokenizer, tmp_path: Path
) -> None:
    opening = [{"role": "system", "content": "a"}, {"role": "developer", "content": "b"}]
    turns = sum((exchange(number) for number in range(8)), opening)
    path = write_rows([{"messages": turns, "chat_template_kwargs": {"mood": "glad"}}])
    tokenizer = make_tokenizer("{{- mood or '' }}" + CHATML_TEMPLATE)
    options = BuildOptions(90, over_length="split_turns")
    store = build_store(Source(load_records(path)), tokenizer, options, tmp_path / "store")
    assert store.num_samples > 1
    start = "glad<|im_start|>system\na<|im_end|>\n<|im_start|>developer\nb<|im_end|>\n"
    for number in range(store.num_samples):
        assert tokenizer.decode(store.sample(number)[0].tolist()).startswith(start)


def test_answers_of_their_own_are_split_each_for_itself(
    write_rows: WriteRows, make_tokenizer: MakeTokenizer, tmp_path: Path
) -> None:
    changing = CHATML_TEMPLATE.replace(
        "message.content }}",
        "(message.content if loop.last or message.role == 'user' else message.content | upper) }}",
    )
    path = write_rows([{"messages": sum((exchange(number) for number in range(6)), [])}])
    mask = MaskOptions(changing_history="expand")
    options = BuildOptions(70, over_length="split_turns", mask=mask)
    tokenizer = make_tokenizer(changing)
    store = build_store(Source(load_records(path)), tokenizer, options, tmp_path / "store")
    learnt = [
        tokenizer.decode(t[s].tolist()) for t, s in map(store.sample, range(store.num_samples))
    ]
    assert learnt == [f"world {number}<|im_end|>" for number in range(6)]


def test_a_part_that_the_template_refuses_is_named_with_its_line(
    write_rows: WriteRows, make_tokenizer: MakeTokenizer, tmp_path: Path
) -> None:
    turns = sum((exchange(number) for number in range(8)), [])
    path = write_rows([{"messages": exchange(0)}, {"messages": turns}])
    tokenizer = make_tokenizer(FUSSY + CHATML_TEMPLATE)
    options = BuildOptions(70, over_length="split_turns")
    with pytest.raises(ValueError, match=rf"{path}:2, a part of it: .*no 0"):
        build_store(Source(load_records(path)), tokenizer, options, tmp_path / "store")


def test_long_turn_cannot_be_split(build: Callable[..., TokenStore], write_rows: WriteRows) -> None:
    path = write_rows([GOOD, long_row(100)])
    store = build(path, over_length="split_turns")
    assert store.report.rejected == {"too long": 1}
    assert "no turn at which to split it" in rejected(store)[0]["message"]


def test_stores_of_one_and_of_four_processes_are_the_same_files(
    write_rows: WriteRows,
    make_tokenizer: MakeTokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sft_fast.data.build.BATCH_RECORDS", 16)
    tokenizer = make_tokenizer()
    # Each process keeps the pieces that it has seen.
    tokenizer.backend_tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    assert can_be_cut(tokenizer)
    rows: list[Any] = []
    for number in range(150):
        rows.append({"question": f"how {number} 🎉", "answer": "world " * (number % 40)})
        rows.append("nonsense" if number % 10 == 0 else {"question": "q", "answer": [1]})
    source = Source(load_records(write_rows(rows)))
    options = BuildOptions(48, "truncate_right", "skip", max_rejected=1)
    lines: list[str] = []
    stores = [
        build_store(
            source,
            tokenizer,
            options,
            tmp_path / str(processes),
            processes=processes,
            progress=lines.append,
        )
        for processes in (1, 4)
    ]
    first, second = (
        {path.name: path.read_bytes() for path in store.path.iterdir()} for store in stores
    )
    assert first == second
    assert stores[0].report.rejected == {"not in the format": 139, "unreadable": 15}


def test_progress_is_told_about_once_a_second(
    write_rows: WriteRows,
    make_tokenizer: MakeTokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sft_fast.data.build.BATCH_RECORDS", 10)
    monkeypatch.setattr("sft_fast.data.build.PROGRESS_SECONDS", 0.0)
    path = write_rows([GOOD] * 25)
    lines: list[str] = []
    source = Source(load_records(path))
    build_store(source, make_tokenizer(), BuildOptions(64), tmp_path / "s", progress=lines.append)
    assert len(lines) == 3
    assert lines[-1].startswith(f"{path}: 25 of about 25 records, ")
    assert lines[-1].endswith(" tokens")

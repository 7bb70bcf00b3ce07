"""A token that the model does not have stops a run, with its line, only where it occurs."""

import json
from pathlib import Path

import pytest

from sft_fast.config.schema import load_config
from sft_fast.data.build import BuildOptions
from sft_fast.data.from_config import find_sources, open_data_store, open_stream
from sft_fast.data.known_ids import check_store
from sft_fast.data.tokenizer import load_tokenizer, new_token_ids

NUM_ROWS, BAD_ROW = 7, 5


@pytest.mark.parametrize("streaming", [False, True])
def test_the_line_of_an_unknown_token_is_named(
    tmp_path: Path, streaming: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sft_fast.data.known_ids.IDS_AT_A_TIME", 10)
    rows = [
        {"prompt": "a b", "completion": "c <new>" if row == BAD_ROW else "c d"}
        for row in range(1, NUM_ROWS + 1)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = load_tokenizer("demo", add_tokens=["<new>", "<|im_end|>"])
    new = new_token_ids(tokenizer)
    assert list(new) == [tokenizer.convert_tokens_to_ids("<new>")]
    config = load_config(None, [f"data.train={path}", f"output_dir={tmp_path}"])
    sources = find_sources(config.data, "train")
    assert sources is not None

    def read(num_known: int) -> None:
        options = BuildOptions(capacity=256)
        if streaming:
            open_stream(
                sources, tokenizer, options, config.data, seed=0, num_known=num_known
            ).head()
        else:
            store = open_data_store(sources, tokenizer, options, config.data, str(tmp_path))
            check_store(store, num_known)

    read(new.stop)
    with pytest.raises(ValueError, match=rf"rows.jsonl:{BAD_ROW}: token {new.start} occurs"):
        read(new.start)


def test_a_token_of_the_vocabulary_is_no_new_one() -> None:
    """`tokenizers` counts it as added; the last row would be taken for new and overwritten."""
    plain = load_tokenizer("demo")
    known = next(t for t in plain.get_vocab() if t.isalpha() and len(t) > 2)
    tokenizer = load_tokenizer("demo", add_tokens=[known, "<new>", "<new>"])
    assert list(new_token_ids(tokenizer)) == [tokenizer.convert_tokens_to_ids("<new>")]
    assert not new_token_ids(load_tokenizer("demo", add_tokens=[known]))


def test_ids_that_the_file_does_not_say_are_refused(tmp_path: Path) -> None:
    """`tokenizers` closes a gap between the ids of added tokens and says nothing."""
    plain = load_tokenizer("demo")
    plain.add_tokens(["<unused>", "<last>"], special_tokens=True)
    plain.save_pretrained(tmp_path)
    number = load_tokenizer(str(tmp_path)).convert_tokens_to_ids("<last>")
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config.pop("added_tokens_decoder", None)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] != "<unused>"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    expected = rf"gives '<last>' the id {number}, but it is loaded as {number - 1}; put back"
    with pytest.raises(ValueError, match=expected):
        load_tokenizer(str(tmp_path))

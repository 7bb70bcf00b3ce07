import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from config_cases import SMALLEST_SHAPE
from sft_fast.cli import main
from sft_fast.config.schema import Config
from sft_fast.data.demo import demo_tokenizer
from sft_fast.data.from_config import build_options, find_sources, open_data_store
from sft_fast.preflight.preview import make_preview, special_ids, text_runs


def config_of(tmp_path: Path, **data: Any) -> Config:
    return Config.model_validate(
        {
            "output_dir": str(tmp_path / "out"),
            "model": {"shape": SMALLEST_SHAPE},
            "tokenizer": {"path": "demo"},
            "data": {"train": "demo", **data},
            "packing": {"capacity": 256},
            "train": {"steps": 1},
        }
    )


def write_chats(tmp_path: Path, *turns: tuple[str, str]) -> Path:
    path = tmp_path / "chats.jsonl"
    rows = [
        {"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]}
        for a, b in turns
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_preview_shows_the_tokens_and_the_mask_of_the_store(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    tokenizer = demo_tokenizer()
    sources = find_sources(config.data, "train")
    assert sources is not None
    store = open_data_store(
        sources,
        tokenizer,
        build_options(config.model, config.data, config.packing),
        config.data,
        config.output_dir,
    )
    preview = make_preview(config, tokenizer, 40)
    for number, sample in enumerate(preview.samples):
        ids, supervised = store.sample(number)
        shown = [(i, p.kind.startswith("trained")) for p in sample.runs for i in p.ids]
        assert shown == list(zip(ids.tolist(), supervised.tolist(), strict=True))
        assert sample.num_supervised == store.num_supervised[number]
        assert sample.origin == store.origin(number)
        assert "".join(piece.text for piece in sample.runs) == tokenizer.decode(ids)


def test_characters_of_several_tokens_stay_whole_and_special_tokens_are_marked() -> None:
    tokenizer = demo_tokenizer()
    text = "<|im_start|>user\n🎉é<|im_end|>"
    ids = tokenizer(text)["input_ids"]
    supervised = np.array([number >= len(ids) - 1 for number in range(len(ids))])
    found = list(text_runs(ids, supervised, tokenizer, special_ids(tokenizer), {}))
    assert "".join(piece.text for piece in found) == text
    assert [piece.text for piece in found][-3:] == ["🎉", "é", "<|im_end|>"]
    assert found[0].kind == "masked special" and found[-1].kind == "trained special"
    assert len(found[-3].ids) == 4


def test_every_sample_is_in_one_packed_row(tmp_path: Path) -> None:
    preview = make_preview(config_of(tmp_path), demo_tokenizer(), 60)
    assert preview.bins is not None
    bins = [preview.bins.bin(number) for number in range(preview.bins.num_bins)]
    assert sorted(np.concatenate(bins)) == list(range(len(preview.samples)))
    for members in bins:
        assert sum(preview.samples[index].num_tokens for index in members) <= 256


def test_rows_that_cannot_be_used_are_listed_with_their_lines(tmp_path: Path) -> None:
    path = write_chats(tmp_path, ("a", "b"), ("a", "x" * 300), ("a", ""))
    path.write_text(path.read_text() + '{"messages": [\n{"other": 1}\n')
    preview = make_preview(config_of(tmp_path, train=str(path)), demo_tokenizer(), 10)
    assert len(preview.samples) == 1
    messages = "\n".join(preview.rejected)
    assert f"{path}:2:" in messages and "packing.capacity 256" in messages
    for line in (3, 4, 5):
        assert f"{path}:{line}" in messages


def test_nothing_usable_still_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text("[1]\n")
    assert main(["preview", "demo", f"data.train={path}", f"output_dir={tmp_path}"]) == 1
    assert f"not used as it is: {path}:1" in capsys.readouterr().out


def test_without_colours_trained_text_stands_between_marks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_chats(tmp_path, ("hi \x1b[31m \u202e", "ho 👩\u200d👧"))
    assert main(["preview", "demo", f"data.train={path}"]) == 0
    text = capsys.readouterr().out
    assert "<|im_start|>assistant\n⟦ho 👩\u200d👧<|im_end|>⟧" in text
    assert "\x1b" not in text and "\u202e" not in text
    assert "1 samples, " in text and "of 256 tokens" in text


def test_the_html_file_stands_alone_and_escapes_the_data(tmp_path: Path) -> None:
    path = write_chats(tmp_path, ("<script>alert(1)</script>", "a & <b>"))
    output = tmp_path / "preview.html"
    assert main(["preview", "demo", f"data.train={path}", "--html", str(output)]) == 0
    text = output.read_text(encoding="utf-8")
    for outside in ("<script", "http://", "https://", "src=", "@import"):
        assert outside not in text
    assert 'class="trained special"' in text and 'class="bin"' in text


def test_a_preview_of_evaluation_data_needs_some(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_chats(tmp_path, ("a", "b"))
    overrides = [f"data.train={path}", "data.eval=null", "evaluation.exact_match_samples=0"]
    assert main(["preview", "demo", *overrides, "--part", "eval"]) == 2
    assert "no data.eval" in capsys.readouterr().err


def test_unended_answers_and_wholly_trained_samples_are_warned_of(tmp_path: Path) -> None:
    from sft_fast.data.tokens import Sample
    from sft_fast.preflight.preview import show

    tokenizer = demo_tokenizer()
    ids = np.array(tokenizer("ab")["input_ids"], dtype=np.uint32)
    sample = Sample(ids, np.ones(len(ids), dtype=np.bool_), 0)
    shown = show(sample, "x:1", tokenizer, special_ids(tokenizer), {})
    assert len(shown.warnings) == 2
    assert shown.num_supervised == len(ids) - 1

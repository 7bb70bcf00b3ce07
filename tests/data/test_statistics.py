from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sft_fast.data.statistics import StoreStatistics, store_statistics
from sft_fast.data.store import DataReport, StoreWriter

MakeTokenizer = Callable[..., Any]
ONCE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
EVERY_TURN = ONCE.replace("{{ m.role", "{{ bos_token + m.role").replace(
    "{% if add_generation_prompt %}", "{% if add_generation_prompt %}<s>"
)


def statistics(tokenizer: Any, folder: Path, *samples: str, capacity: int = 100) -> StoreStatistics:
    """Of samples whose last two tokens are trained."""
    with StoreWriter(folder / "store") as writer:
        # The last one is repeated, as a source in a mixture may be.
        for line, text in [*enumerate(samples, start=1), (len(samples), samples[-1])]:
            ids = np.array(tokenizer(text, add_special_tokens=False)["input_ids"], np.uint32)
            supervised = np.arange(len(ids)) >= len(ids) - 2
            writer.add(ids, supervised, "rows.jsonl", line)
        store = writer.commit("0", {}, DataReport())
    return store_statistics(store, tokenizer, capacity)


@pytest.mark.parametrize(("template", "odd"), [(ONCE, 1), (EVERY_TURN, 0)])
def test_bos_inside_is_odd_unless_the_template_begins_turns_with_it(
    make_tokenizer: MakeTokenizer, tmp_path: Path, template: str, odd: int
) -> None:
    tokenizer = make_tokenizer(template)
    texts = ["<s>how<s>are you</s>", "<s><s>hi</s>", "<s>how</s>"]
    found = statistics(tokenizer, tmp_path, *texts)
    assert (found.inner_bos, found.double_bos, found.unended) == (odd, 1, 0)
    assert found.examples.get("inner_bos", []) == ["rows.jsonl:1"][:odd]
    assert found.examples["double_bos"] == ["rows.jsonl:2"]


def test_figures(make_tokenizer: MakeTokenizer, tmp_path: Path) -> None:
    texts = ["a b c</s>", "a b c</s>", "a b c d e f g", "h</s>"]
    found = statistics(make_tokenizer(), tmp_path, *texts, capacity=8)
    assert (found.duplicates, found.unended, found.too_long) == (1, 1, 1)
    assert found.examples["too_long"] == found.examples["unended"] == ["rows.jsonl:3"]
    assert found.examples["duplicates"] == ["rows.jsonl:2"]
    assert found.answers == {1: 5}
    # The first token of a sample is never a target.
    assert (found.samples, found.supervised_tokens) == (5, 8)
    assert found.lengths["min"] == 2 and found.lengths["max"] > 8


def test_many_kinds_of_answers_are_told_by_percentiles() -> None:
    none: dict[str, float] = {}
    counts = {runs: 2 for runs in range(1, 12)}
    found = StoreStatistics(22, 1, 1, none, none, counts, 0, 0, 0, 0, 0, {})
    assert "answers a sample: min 1, mean 6, p50 6, p90 10" in found.summary()

"""Micro-batches against the oracle, and that check() names what is wrong."""

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from sft_fast.batch import MicroBatch, fill_micro_batch
from sft_fast.constants import IGNORE_INDEX
from sft_fast.reference.packing import fill_row

VOCAB_SIZE = 2**32


@dataclass
class ArrayStore:
    """A token store in memory."""

    tokens: NDArray[np.uint32]
    supervised_bits: NDArray[np.uint8]
    offsets: NDArray[np.int64]


def make_store(lengths: list[int], supervised: list[bool], seed: int = 0) -> ArrayStore:
    """A store of random ids over the full uint32 range."""
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    tokens = np.random.default_rng(seed).integers(0, VOCAB_SIZE, offsets[-1], dtype=np.uint32)
    bits = np.packbits(np.array(supervised, dtype=bool), bitorder="little")
    return ArrayStore(tokens, bits, offsets)


def chat_store() -> ArrayStore:
    """Four samples of 3, 9, 1 and 12 tokens; prompts are not supervised, answers are."""
    runs = [(1, 2), (5, 4), (1, 0), (2, 3), (4, 3)]
    supervised = [value for prompt, answer in runs for value in [False] * prompt + [True] * answer]
    return make_store([3, 9, 1, 12], supervised)


@st.composite
def stores(draw: st.DrawFn) -> ArrayStore:
    lengths = draw(st.lists(st.integers(1, 40), min_size=1, max_size=8))
    # Runs, as chats have them, and noise, which they do not.
    runs = draw(st.lists(st.tuples(st.booleans(), st.integers(1, 30)), min_size=1, max_size=40))
    pattern = [value for value, count in runs for _ in range(count)]
    return make_store(lengths, [pattern[t % len(pattern)] for t in range(sum(lengths))])


@given(stores(), st.data())
def test_filling_equals_the_oracle(store: ArrayStore, data: st.DataObject) -> None:
    lengths = np.diff(store.offsets)
    sample_ids = data.draw(st.lists(st.integers(0, len(lengths) - 1), max_size=10))
    num_tokens = int(lengths[sample_ids].sum())
    num_rows = max(1, num_tokens + data.draw(st.integers(0, 20)))
    batch = fill_micro_batch(store, sample_ids, num_rows)
    expected = fill_row(store.tokens, store.supervised_bits, store.offsets, sample_ids, num_rows)
    for name, array in expected._asdict().items():
        tensor = getattr(batch, name)
        shape = array.shape if name in ("cu_seqlens", "active_rows") else (1, num_rows)
        assert tuple(tensor.shape) == shape
        assert tensor.numpy().dtype == array.dtype
        np.testing.assert_array_equal(tensor.numpy().reshape(-1), array)
    assert (batch.num_tokens, batch.num_samples) == (num_tokens, len(sample_ids))
    assert batch.num_supervised == len(expected.active_rows)
    assert batch.seqlens == tuple(lengths[sample_ids])
    assert batch.max_seqlen == max(batch.seqlens, default=0)
    batch.check(VOCAB_SIZE)


def test_a_label_never_crosses_into_the_next_sample() -> None:
    store = make_store([4, 4], [True] * 8)
    batch = fill_micro_batch(store, [0, 1], 8)
    assert batch.labels[0, [3, 7]].tolist() == [IGNORE_INDEX] * 2
    assert batch.num_supervised == 6


@pytest.mark.parametrize("num_rows", [1, 5])
def test_a_row_without_samples(num_rows: int) -> None:
    batch = fill_micro_batch(chat_store(), [], num_rows)
    assert batch.labels.tolist() == [[IGNORE_INDEX] * num_rows]
    assert (batch.cu_seqlens.tolist(), batch.seqlens) == ([0], ())
    assert (batch.num_samples, batch.num_tokens, batch.num_supervised) == (0, 0, 0)
    assert (batch.max_seqlen, batch.active_rows.shape) == (0, (0,))
    batch.check(VOCAB_SIZE)


def test_loss_mask_marks_the_labels() -> None:
    batch = fill_micro_batch(chat_store(), [0, 2], 6)
    assert batch.loss_mask.dtype == torch.float32
    assert batch.loss_mask.tolist() == [[1.0, 1.0, 0.0, 0.0, 0.0, 0.0]]


def test_reads_memory_maps(tmp_path: Path) -> None:
    store = chat_store()
    mapped = {}
    for field in fields(store):
        array = getattr(store, field.name)
        path = tmp_path / field.name
        array.tofile(path)
        mapped[field.name] = np.memmap(path, dtype=array.dtype, mode="r")
    batch = fill_micro_batch(ArrayStore(**mapped), [3, 0], 16)
    expected = fill_micro_batch(store, [3, 0], 16)
    assert torch.equal(batch.tokens, expected.tokens)
    assert torch.equal(batch.labels, expected.labels)


def test_to_leaves_on_the_host_what_the_host_reads() -> None:
    batch = fill_micro_batch(chat_store(), [0, 1], 16)
    moved = batch.to("meta")
    for name in ("tokens", "labels", "position_ids", "cu_seqlens"):
        assert getattr(moved, name).device.type == "meta"
        assert getattr(moved, name).shape == getattr(batch, name).shape
    assert torch.equal(moved.active_rows, batch.active_rows)
    assert (moved.seqlens, moved.num_supervised) == ((3, 9), batch.num_supervised)


@pytest.mark.parametrize(
    ("sample_ids", "num_rows", "problem"),
    [
        ([0, 1], 11, "sample 1 ends at row 12 of 11"),
        ([4], 16, "sample 4 was asked for, but the token store holds 4 samples"),
        ([-1], 16, "sample -1 was asked for"),
        ([], 0, "num_rows is 0; expected at least 1"),
        ([0], -5, "num_rows is -5"),
    ],
)
def test_filling_says_what_is_wrong(sample_ids: list[int], num_rows: int, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        fill_micro_batch(chat_store(), sample_ids, num_rows)


def changed(tensor: torch.Tensor, index: tuple[int, ...], value: int) -> torch.Tensor:
    tensor = tensor.clone()
    tensor[index] = value
    return tensor


# Rows of the valid batch: sample 0 is 0-2, sample 1 is 3-11 with labels at 7-10, padding 12-15.
@pytest.mark.parametrize(
    ("name", "index", "value", "problem"),
    [
        ("tokens", (0, 2), -1, "tokens: ids outside"),
        ("tokens", (0, 15), VOCAB_SIZE, "tokens: ids outside"),
        ("tokens", (0, 8), 7, "labels: a label is not the next token"),
        ("labels", (0, 8), 7, "labels: a label is not the next token"),
        ("labels", (0, 2), 7, "labels: a sample's last row has a label"),
        ("labels", (0, 12), 0, "labels: a padding row has a label"),
        ("labels", (0, 15), 0, "labels: a padding row has a label"),
        ("labels", (0, 8), IGNORE_INDEX, "active_rows: not the rows with a label"),
        ("position_ids", (0, 3), 3, "position_ids: not 0, 1"),
        ("position_ids", (0, 12), 1, "position_ids: not 0, 1"),
        ("cu_seqlens", (0,), 1, "cu_seqlens: not strictly ascending from 0"),
        ("cu_seqlens", (1,), 0, "cu_seqlens: not strictly ascending from 0"),
        ("cu_seqlens", (1,), 12, "cu_seqlens: not strictly ascending from 0"),
        ("cu_seqlens", (1,), 4, "seqlens: not the steps of cu_seqlens"),
        ("cu_seqlens", (2,), 13, "cu_seqlens: ends at 13"),
        ("active_rows", (0,), 3, "active_rows: not the rows with a label"),
    ],
)
def test_check_names_the_wrong_element(
    name: str, index: tuple[int, ...], value: int, problem: str
) -> None:
    batch = fill_micro_batch(chat_store(), [0, 1], 16)
    batch.check(VOCAB_SIZE)
    change: dict[str, Any] = {name: changed(getattr(batch, name), index, value)}
    wrong = replace(batch, **change)
    with pytest.raises(ValueError, match=f"MicroBatch.{problem}"):
        wrong.check(VOCAB_SIZE)


@pytest.mark.parametrize("name", ["tokens", "labels", "position_ids", "cu_seqlens", "active_rows"])
def test_check_names_wrong_dtypes_and_shapes(name: str) -> None:
    batch = fill_micro_batch(chat_store(), [0, 1], 16)
    tensor = getattr(batch, name)
    for wrong in (tensor.short(), tensor[..., :-1], tensor[None]):
        # A shorter row of tokens shows as every other tensor being too long.
        with pytest.raises(ValueError, match="MicroBatch.labels|MicroBatch." + name):
            replace(batch, **{name: wrong}).check(VOCAB_SIZE)


def test_check_knows_the_vocabulary() -> None:
    batch = fill_micro_batch(chat_store(), [0, 1], 16)
    largest = int(batch.tokens.max())
    batch.check(largest + 1)
    with pytest.raises(ValueError, match=rf"MicroBatch.tokens: ids outside \[0, {largest}\)"):
        batch.check(largest)


def test_check_refuses_counts_that_disagree() -> None:
    batch = fill_micro_batch(chat_store(), [0, 1], 16)
    wrong: list[tuple[MicroBatch, str]] = [
        (replace(batch, num_samples=3), "cu_seqlens"),
        (replace(batch, num_tokens=11), "cu_seqlens"),
        (replace(batch, num_supervised=1), "active_rows"),
        (replace(batch, seqlens=(9, 3)), "seqlens"),
        (replace(batch, max_seqlen=8), "max_seqlen"),
    ]
    for one, name in wrong:
        with pytest.raises(ValueError, match=f"MicroBatch.{name}: "):
            one.check(VOCAB_SIZE)

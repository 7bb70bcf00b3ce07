"""Micro-batches against the oracle, and that check() names what is wrong."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sft_fast.constants import IGNORE_INDEX
from sft_fast.data.targets import count_targets
from sft_fast.packing.micro_batch import (
    MicroBatch,
    SequenceBuffers,
    SequenceLayout,
    fill_micro_batch,
)
from sft_fast.reference.packing import fill_sequence
from token_stores import VOCAB_SIZE, ArrayStore, make_store


def chat_store() -> ArrayStore:
    """Four samples of 3, 9, 1 and 12 tokens; prompts are not supervised, answers are."""
    runs = [(1, 2), (5, 4), (1, 0), (2, 3), (4, 3)]
    supervised = [value for prompt, answer in runs for value in [False] * prompt + [True] * answer]
    return make_store([3, 9, 1, 12], supervised)


def weighted(store: ArrayStore) -> ArrayStore:
    """The store with weights 0.5, 1, 1.5, ... of its tokens."""
    return replace(store, weights=np.arange(1, len(store.tokens) + 1).astype(np.float16) / 2)


@st.composite
def stores(draw: st.DrawFn, has_weights: bool = False) -> ArrayStore:
    lengths = draw(st.lists(st.integers(1, 40), min_size=1, max_size=8))
    # Runs, as chats have them, and noise, which they do not.
    runs = draw(st.lists(st.tuples(st.booleans(), st.integers(1, 30)), min_size=1, max_size=40))
    pattern = [value for value, count in runs for _ in range(count)]
    supervised = [pattern[t % len(pattern)] for t in range(sum(lengths))]
    return make_store(lengths, supervised, has_weights=has_weights)


@st.composite
def layouts(draw: st.DrawFn) -> SequenceLayout:
    cp_size = draw(st.integers(1, 4))
    factor = draw(st.integers(1, 5)) * (2 * cp_size if cp_size > 1 else 1)
    return SequenceLayout(factor, cp_size, draw(st.integers(0, cp_size - 1)))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@settings(deadline=None)
@given(
    store=st.booleans().flatmap(lambda has_weights: stores(has_weights)),
    layout=layouts(),
    data=st.data(),
)
def test_filling_equals_the_oracle(
    store: ArrayStore, layout: SequenceLayout, data: st.DataObject, dtype: torch.dtype
) -> None:
    if dtype == torch.int32:
        store = replace(store, tokens=store.tokens >> np.uint32(1))
    lengths = np.diff(store.offsets)
    sample_ids = data.draw(st.lists(st.integers(0, len(lengths) - 1), max_size=10))
    slots = -(-lengths[sample_ids] // layout.alignment) * layout.alignment
    num_local = max(1, int(slots.sum()) // layout.cp_size + data.draw(st.integers(0, 20)))
    seq_length = num_local * layout.cp_size
    batch = fill_micro_batch(store, sample_ids, seq_length, layout=layout, dtype=dtype)
    expected = fill_sequence(
        store.tokens,
        store.supervised_bits,
        store.offsets,
        sample_ids,
        seq_length,
        alignment=layout.alignment,
        cp_size=layout.cp_size,
        cp_rank=layout.cp_rank,
        token_weights=store.weights,
    )._asdict()
    if store.weights is None:
        assert expected.pop("weights").sum() == batch.num_supervised
        assert batch.weights is None
    ids = {torch.int64: np.int64, torch.int32: np.int32}[dtype]
    for name, array in expected.items():
        tensor = getattr(batch, name)
        shape = array.shape if name in ("cu_seqlens", "active_tokens") else (1, num_local)
        assert tuple(tensor.shape) == shape
        narrow = ids if name in ("tokens", "labels", "position_ids") else array.dtype
        assert tensor.numpy().dtype == narrow
        np.testing.assert_array_equal(tensor.numpy().reshape(-1), array)
    assert batch.num_samples == len(sample_ids)
    assert batch.num_supervised == len(expected["active_tokens"])
    assert batch.seqlens == tuple(slots)
    assert batch.max_seqlen == max(batch.seqlens, default=0)
    batch.check(VOCAB_SIZE)


@settings(deadline=None)
@given(store=stores(), cp_size=st.integers(1, 4), data=st.data())
def test_context_parallel_ranks_share_the_sequence(
    store: ArrayStore, cp_size: int, data: st.DataObject
) -> None:
    sample_ids = data.draw(st.lists(st.integers(0, len(store.offsets) - 2), max_size=6))
    alignment = 2 * cp_size
    seq_length = alignment * (1 + sum(-(-int(n) // alignment) for n in np.diff(store.offsets)) * 6)
    whole = fill_micro_batch(store, sample_ids, seq_length, layout=SequenceLayout(alignment))
    shares = [
        fill_micro_batch(
            store, sample_ids, seq_length, layout=SequenceLayout(alignment, cp_size, rank)
        )
        for rank in range(cp_size)
    ]
    for name in ("tokens", "labels", "position_ids"):
        together = torch.cat([getattr(share, name)[0] for share in shares])
        assert torch.equal(together.sort().values, getattr(whole, name)[0].sort().values)
    assert sum(share.num_supervised for share in shares) == whole.num_supervised
    assert sum(share.num_tokens for share in shares) == whole.num_tokens
    assert all(share.seqlens == whole.seqlens for share in shares)


def test_weights_are_those_of_the_labels() -> None:
    batch = fill_micro_batch(
        weighted(make_store([3, 2], [False, True, True, False, True])), [1, 0], 6
    )
    assert batch.weights is not None
    # Token 1 is the label of token 0 of its sample, and so on.
    assert batch.weights.tolist() == [[2.5, 0, 1.0, 1.5, 0, 0]]


@pytest.mark.parametrize("weight", [0.0, -1.0, np.inf, np.nan])
def test_a_target_needs_a_positive_weight(weight: float) -> None:
    store = weighted(make_store([3], [False, True, False]))
    assert store.weights is not None
    # Where nothing is supervised it does not matter.
    store.weights[2] = weight
    assert fill_micro_batch(store, [0], 3).num_supervised == 1
    store.weights[1] = weight
    problem = "damaged: token 1 is supervised with the weight .*; expected a positive number"
    with pytest.raises(ValueError, match=problem):
        fill_micro_batch(store, [0], 3)
    with pytest.raises(ValueError, match=problem):
        count_targets(store)


@settings(deadline=None)
@given(st.booleans().flatmap(lambda has_weights: stores(has_weights)))
def test_targets_are_counted_as_they_are_filled(store: ArrayStore) -> None:
    counts, sums = count_targets(store)
    assert counts.dtype == np.int32 and (sums is None or sums.dtype == np.float64)
    for sample in range(len(counts)):
        batch = fill_micro_batch(store, [sample], 40)
        assert counts[sample] == batch.num_supervised
        if sums is not None:
            assert batch.weights is not None
            assert sums[sample] == batch.weights.double().sum()


def test_int32_cannot_hold_every_id() -> None:
    store = make_store([3], [True] * 3)
    store.tokens[:] = [1, 2**31, 2]
    with pytest.raises(ValueError, match="an id of 2.31 or more; int32 cannot hold it"):
        fill_micro_batch(store, [0], 3, dtype=torch.int32)
    assert fill_micro_batch(store, [0], 3).labels.tolist() == [[2**31, 2, IGNORE_INDEX]]


def test_buffers_are_reused() -> None:
    store = weighted(chat_store())
    buffers = SequenceBuffers(40, 4, has_weights=True)
    full = fill_micro_batch(store, [3, 1, 0, 2], 40, buffers=buffers)
    kept = full.to("cpu", copy=True)
    again = fill_micro_batch(store, [1], 12, buffers=buffers)
    again.check(VOCAB_SIZE)
    assert again.tokens.data_ptr() == full.tokens.data_ptr() == buffers.tokens.data_ptr()
    # What was copied did not change, the view did.
    expected = fill_micro_batch(store, [3, 1, 0, 2], 40)
    for field in fields(MicroBatch):
        value = getattr(kept, field.name)
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, getattr(expected, field.name))
    assert not torch.equal(full.tokens, kept.tokens)


def test_buffers_that_do_not_fit() -> None:
    store = chat_store()
    for buffers in (SequenceBuffers(11, 9), SequenceBuffers(99, 1)):
        with pytest.raises(ValueError, match="expected at least 12 and 2"):
            fill_micro_batch(store, [0, 1], 12, buffers=buffers)
    with pytest.raises(ValueError, match="buffers have no weights and the store has some"):
        fill_micro_batch(weighted(store), [0, 1], 12, buffers=SequenceBuffers(12, 2))
    spare = SequenceBuffers(12, 2, has_weights=True)
    assert fill_micro_batch(store, [0, 1], 12, buffers=spare).weights is None
    with pytest.raises(ValueError, match="dtype is torch.int16"):
        SequenceBuffers(12, 2, dtype=torch.int16)
    with pytest.raises(ValueError, match="seq_length is 0"):
        SequenceBuffers(0, 2)


@pytest.mark.parametrize(
    ("layout", "problem"),
    [
        (SequenceLayout(0), "packing.alignment is 0; expected a multiple of 1"),
        (SequenceLayout(-4), "packing.alignment is -4"),
        (SequenceLayout(2, 2), "packing.alignment is 2; expected a multiple of 4"),
        (SequenceLayout(4, 2, 2), r"context-parallel rank 2 of 2"),
        (SequenceLayout(4, 2, -1), r"context-parallel rank -1 of 2"),
        (SequenceLayout(1, 0), "size .0."),
        (SequenceLayout(10, 5), "seq_length is 16; .* multiple of the context-parallel size .5."),
        (SequenceLayout(16), "sample 1 ends at token 32 of 16"),
    ],
    ids=str,
)
def test_layouts_that_cannot_be(layout: SequenceLayout, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        fill_micro_batch(chat_store(), [0, 1], 16, layout=layout)


def test_a_label_never_crosses_into_the_next_sample() -> None:
    store = make_store([4, 4], [True] * 8)
    batch = fill_micro_batch(store, [0, 1], 8)
    assert batch.labels[0, [3, 7]].tolist() == [IGNORE_INDEX] * 2
    assert batch.num_supervised == 6


@pytest.mark.parametrize("seq_length", [1, 5])
def test_a_sequence_without_samples(seq_length: int) -> None:
    batch = fill_micro_batch(chat_store(), [], seq_length)
    assert batch.labels.tolist() == [[IGNORE_INDEX] * seq_length]
    assert (batch.cu_seqlens.tolist(), batch.seqlens) == ([0], ())
    assert (batch.num_samples, batch.num_tokens, batch.num_supervised) == (0, 0, 0)
    assert (batch.max_seqlen, batch.active_tokens.shape) == (0, (0,))
    batch.check(VOCAB_SIZE)


def test_reads_memory_maps(tmp_path: Path) -> None:
    store = weighted(chat_store())
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


def test_a_copy_on_the_host_is_there_when_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only copies to a device may go on behind the host's back."""
    store, seen = chat_store(), {}
    batch = fill_micro_batch(store, [0, 1], 16)

    def to(tensor: torch.Tensor, device: Any, non_blocking: bool, copy: bool) -> torch.Tensor:
        seen[str(device)] = non_blocking
        return tensor

    monkeypatch.setattr(torch.Tensor, "to", to)
    for device in ("cpu", torch.device("cpu"), "cuda:1"):
        batch.to(device)
        assert seen.pop(str(device)) is (str(device) != "cpu")


def test_to_leaves_on_the_host_what_the_host_reads() -> None:
    batch = fill_micro_batch(chat_store(), [0, 1], 16)
    moved = batch.to("meta")
    for name in ("tokens", "labels", "position_ids", "cu_seqlens"):
        assert getattr(moved, name).device.type == "meta"
        assert getattr(moved, name).shape == getattr(batch, name).shape
    assert torch.equal(moved.active_tokens, batch.active_tokens)
    assert (moved.seqlens, moved.num_supervised) == ((3, 9), batch.num_supervised)


@pytest.mark.parametrize(
    ("sample_ids", "seq_length", "problem"),
    [
        ([0, 1], 11, "sample 1 ends at token 12 of 11"),
        ([4], 16, "sample 4 was asked for, but the token store holds 4 samples"),
        ([-1], 16, "sample -1 was asked for"),
        ([], 0, "seq_length is 0; expected at least 1"),
        ([0], -5, "seq_length is -5"),
    ],
)
def test_filling_says_what_is_wrong(sample_ids: list[int], seq_length: int, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        fill_micro_batch(chat_store(), sample_ids, seq_length)


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
        ("labels", (0, 2), 7, "labels: a sample's last token has a label"),
        ("labels", (0, 12), 0, "labels: padding has a label"),
        ("labels", (0, 15), 0, "labels: padding has a label"),
        ("labels", (0, 8), IGNORE_INDEX, "active_tokens: not the tokens with a label"),
        ("position_ids", (0, 3), 3, "position_ids: not 0, 1"),
        ("position_ids", (0, 12), 1, "position_ids: not 0, 1"),
        ("cu_seqlens", (0,), 1, "cu_seqlens: not strictly ascending from 0"),
        ("cu_seqlens", (1,), 0, "cu_seqlens: not strictly ascending from 0"),
        ("cu_seqlens", (1,), 12, "cu_seqlens: not strictly ascending from 0"),
        ("cu_seqlens", (1,), 4, "seqlens: not the steps of cu_seqlens"),
        ("cu_seqlens", (2,), 13, "cu_seqlens: ends at 13"),
        ("active_tokens", (0,), 3, "active_tokens: not the tokens with a label"),
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


@pytest.mark.parametrize(
    "name", ["tokens", "labels", "position_ids", "cu_seqlens", "active_tokens"]
)
def test_check_names_wrong_dtypes_and_shapes(name: str) -> None:
    batch = fill_micro_batch(chat_store(), [0, 1], 16)
    tensor = getattr(batch, name)
    for wrong in (tensor.short(), tensor[..., :-1], tensor[None]):
        # A shorter sequence of tokens shows as every other tensor being too long.
        with pytest.raises(ValueError, match="MicroBatch.labels|MicroBatch." + name):
            replace(batch, **{name: wrong}).check(VOCAB_SIZE)


def test_check_knows_layouts_and_weights() -> None:
    layout = SequenceLayout(4, 2, 1)
    batch = fill_micro_batch(weighted(chat_store()), [0, 1], 24, layout=layout)
    batch.check(VOCAB_SIZE)
    assert batch.weights is not None
    padding_weighed = changed(batch.weights, (0, 11), 1)
    wrong = [
        (replace(batch, layout=SequenceLayout(4, 2, 0)), "position_ids"),
        (replace(batch, layout=SequenceLayout(8, 2, 1)), "cu_seqlens"),
        (replace(batch, layout=SequenceLayout(4)), "cu_seqlens"),
        (replace(batch, weights=batch.weights.double()), "weights"),
        (replace(batch, weights=padding_weighed), "weights"),
        (replace(batch, weights=-batch.weights), "weights"),
    ]
    for one, name in wrong:
        with pytest.raises(ValueError, match=f"MicroBatch.{name}: "):
            one.check(VOCAB_SIZE)


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
        (replace(batch, num_supervised=1), "active_tokens"),
        (replace(batch, seqlens=(9, 3)), "seqlens"),
        (replace(batch, max_seqlen=8), "max_seqlen"),
    ]
    for one, name in wrong:
        with pytest.raises(ValueError, match=f"MicroBatch.{name}: "):
            one.check(VOCAB_SIZE)

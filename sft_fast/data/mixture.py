"""Several sources as one store: each is built and kept by itself, then copied in its share."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import xxhash

from sft_fast.data.build import BuildOptions, Progress, prepare_store
from sft_fast.data.source import Source
from sft_fast.data.store import DataReport, StoreWriter, TokenStore
from sft_fast.data.store_check import open_whole, store_path
from sft_fast.data.targets import members, sample_hash

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHOWN_OVERLAPS = 3
_SUMS = ("rows", "truncated", "cut_tokens", "split", "trimmed_turns", "boundary_tokens")


def prepare_mixture(
    sources: Sequence[Source],
    tokenizer: PreTrainedTokenizerBase,
    options: BuildOptions,
    cache_dir: str | Path,
    *,
    processes: int | None = None,
    progress: Progress | None = None,
) -> TokenStore:
    """Opens the store of one or more sources in `cache_dir`, and builds what is missing.

    Without weights the store has every sample of every source, `repeat` times. With weights it has
    the samples in the proportion of the weights, as many as there can be while no sample of a
    source is used more than `repeat` times; a source that has more is thinned out.

    Raises:
        ValueError: some of the sources have a weight and some not; or as `build_store`.
    """
    stores = [
        prepare_store(source, tokenizer, options, cache_dir, processes=processes, progress=progress)
        for source in sources
    ]
    if len(sources) == 1 and sources[0].repeat == 1:
        return stores[0]
    shares = [(source.weight, source.repeat) for source in sources]
    parts = {
        "mixture": [
            [store.fingerprint, *share] for store, share in zip(stores, shares, strict=True)
        ]
    }
    fingerprint = xxhash.xxh3_128_hexdigest(json.dumps(parts).encode())
    path = store_path(cache_dir, fingerprint)
    if (mixture := open_whole(path, progress)) is not None:
        return mixture
    size = options.group_size
    counts = sample_counts([store.num_samples // size for store in stores], shares)
    with StoreWriter(path) as writer:
        report = DataReport(template=stores[0].report.template)
        for store, count in zip(stores, counts, strict=True):
            _copy(store, count, size, writer, report)
        return writer.commit(fingerprint, parts, report)


def sample_counts(
    num_samples: Sequence[int], shares: Sequence[tuple[float | None, int]]
) -> list[int]:
    """How many samples each source gives.

    Args:
        num_samples: samples of each source.
        shares: weight (None: all) and repeat of each.

    Raises:
        ValueError: some have a weight and some not, or one would give no sample.
    """
    weights = [weight for weight, _ in shares if weight is not None]
    most = [samples * repeat for samples, (_, repeat) in zip(num_samples, shares, strict=True)]
    if not weights:
        return most
    if len(weights) < len(shares):
        raise ValueError(
            f"data.train: {len(weights)} of {len(shares)} sources have a weight; "
            "give one to all of them or to none"
        )
    unit = min(available / weight for available, weight in zip(most, weights, strict=True))
    counts = [
        min(available, round(unit * weight))
        for available, weight in zip(most, weights, strict=True)
    ]
    if 0 in counts:
        raise ValueError(
            f"data.train: with these weights source {counts.index(0) + 1} would give no sample; "
            "raise its weight, or the repeat of the smallest source"
        )
    return counts


def check_eval_is_not_train(store: TokenStore, eval_store: TokenStore) -> None:
    """Compares whole samples, token by token.

    Raises:
        ValueError: samples of the evaluation data are training samples as well.
    """
    held_out: dict[int, int] = {}
    for number in range(eval_store.num_samples):
        held_out.setdefault(_hash(eval_store, number), number)
    pairs = []
    for number in range(store.num_samples):
        found = held_out.pop(_hash(store, number), None) if held_out else None
        if found is not None:
            pairs.append(f"  {eval_store.origin(found)} is {store.origin(number)}")
    if pairs:
        shown = "\n".join(pairs[:SHOWN_OVERLAPS])
        more = f"\n  and {len(pairs) - SHOWN_OVERLAPS} more" if len(pairs) > SHOWN_OVERLAPS else ""
        raise ValueError(
            f"data.eval: {len(pairs)} different samples of {eval_store.num_samples} are training "
            "samples too, so the evaluation would measure memory. Remove them, hold records out "
            "with data.eval_fraction, or accept it with data.eval_overlap: allow:\n" + shown + more
        )


def sample_hashes(store: TokenStore) -> frozenset[int]:
    """`sample_hash` of every sample."""
    return frozenset(_hash(store, number) for number in range(store.num_samples))


def _hash(store: TokenStore, number: int) -> int:
    start, stop = store.offsets[number], store.offsets[number + 1]
    return sample_hash(store.tokens[start:stop])


def _copy(
    store: TokenStore, count: int, group_size: int, writer: StoreWriter, report: DataReport
) -> None:
    """Adds `count` groups of samples of a store: all as often as possible, then a part."""
    num_groups = store.num_samples // group_size
    whole, rest = divmod(count, num_groups)
    # Drawn by the store's own fingerprint: the same on every machine.
    seed = int(store.fingerprint, 16)
    thinned: npt.NDArray[np.int64] = np.random.default_rng(seed).permutation(num_groups)
    starts = store.offsets
    for groups in (*[np.arange(num_groups)] * whole, np.sort(thinned[:rest])):
        for number in members(groups, group_size).tolist():
            tokens, supervised = store.sample(number)
            weights = store.weights
            chosen = None if weights is None else weights[starts[number] : starts[number + 1]]
            writer.add(tokens, supervised, store.file(number), store.line(number), chosen)
            report.samples += 1
            report.tokens += len(tokens)
            report.supervised_tokens += int(np.count_nonzero(supervised[1:]))
    part, num_samples = store.report, count * group_size
    report.source += f"{' + ' if report.source else ''}{part.source} ({num_samples} samples)"
    report.formats |= part.formats
    report.longest = max(report.longest, part.longest)
    for entry in fields(DataReport):
        if entry.name in _SUMS:
            total = getattr(report, entry.name) + getattr(part, entry.name)
            setattr(report, entry.name, total)
    for counts, of_part in (
        (report.rejected, part.rejected),
        (report.unread, part.unread),
        (report.odd, part.odd),
    ):
        for name, number in of_part.items():
            counts[name] = counts.get(name, 0) + number
    report.left_out += part.left_out
    for rejected in store.rejected():
        writer.reject(**rejected)

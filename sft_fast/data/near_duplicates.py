"""Samples that are nearly the same as another: found by MinHash, counted, and left out by option.

A sample is the set of its runs of SHINGLE_TOKENS tokens, without what every sample begins with (a
system turn). How alike two are is their Jaccard index: what they share of what either has. MinHash
finds the pairs that may be alike, and their sets are compared.

Source: Broder, "On the resemblance and containment of documents" (1997).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import xxhash

from sft_fast.data.choices import NearDuplicates
from sft_fast.data.store import NEAR_DUPLICATE, StoreWriter, TokenStore
from sft_fast.data.store_check import open_whole, store_path

if TYPE_CHECKING:
    from datasketch import MinHash

SHINGLE_TOKENS = 5
NUM_PERMUTATIONS = 128
SIMILARITY = 0.8
"""Jaccard index from which two samples are nearly the same."""
CODE_VERSION = 1
"""Raised whenever the same stores give other pairs than before."""
_FACTOR = np.uint64(0x9E3779B97F4A7C15)


def near_duplicates(
    store: TokenStore, others: TokenStore | None = None, similarity: float = SIMILARITY
) -> list[tuple[int, int]]:
    """Samples that are nearly those of others, or, without others, nearly an earlier sample.

    Copies count. Samples of one record are not compared: a record may be repeated on purpose, or
    give several samples.

    Args:
        store: whose samples are looked at.
        others: what they are compared with.
        similarity: Jaccard index from which two are nearly the same, above 0, at most 1.

    Returns: number of each such sample, ascending, and of the first that it is like.

    Raises:
        ValueError: datasketch is not installed.
    """
    index = _index(similarity)
    start = _common_prefix([store] if others is None else [store, others])
    if others is not None:
        for number in range(others.num_samples):
            index.insert(number, _signature(_shingles(others, number, start)))
    pairs = []
    for number in range(store.num_samples):
        shingles = _shingles(store, number, start)
        signature = _signature(shingles)
        found = next(
            (
                other
                for other in sorted(index.query(signature))
                if (others or store).origin(other) != store.origin(number)
                and _jaccard(shingles, _shingles(others or store, other, start)) >= similarity
            ),
            None,
        )
        if found is not None:
            pairs.append((number, found))
        elif others is None:
            index.insert(number, signature)
    return pairs


def with_choice(
    store: TokenStore,
    choice: NearDuplicates,
    others: TokenStore | None = None,
    group_size: int = 1,
) -> TokenStore:
    """A store as `data.near_duplicates` has it; the one without them is put beside it.

    Args:
        store: of the training samples, or of the evaluation's.
        choice: of the configuration.
        others: the training samples, for the evaluation's.
        group_size: samples of a record that stay together.

    Raises:
        ValueError: samples stay together; or as `without_near_duplicates`.
    """
    if choice == "keep":
        return store
    if group_size > 1:
        raise ValueError(
            f"data.near_duplicates: {choice} looks at samples one by one, and {group_size} of a "
            "record stay together in this stage; set it to keep"
        )
    return without_near_duplicates(store, store.path.parent, others)


def without_near_duplicates(
    store: TokenStore, cache_dir: str | Path, others: TokenStore | None = None
) -> TokenStore:
    """A store without the samples that `near_duplicates` finds, kept in `cache_dir`.

    Raises:
        ValueError: no sample is left, or datasketch is not installed.
    """
    parts = {
        "near_duplicates": [CODE_VERSION, SIMILARITY],
        "store": store.fingerprint,
        "others": None if others is None else others.fingerprint,
    }
    fingerprint = xxhash.xxh3_128_hexdigest(json.dumps(parts).encode())
    path = store_path(cache_dir, fingerprint)
    if (known := open_whole(path)) is not None:
        return known
    pairs = dict(near_duplicates(store, others))
    if not pairs:
        return store
    if len(pairs) == store.num_samples:
        raise ValueError(
            f"every sample of {store.report.source} is nearly a training sample, so none is left; "
            "set data.near_duplicates: keep, or hold other records out"
        )
    rejected = store.report.rejected | {NEAR_DUPLICATE: len(pairs)}
    report = replace(store.report, rejected=rejected)
    report.samples = report.tokens = report.supervised_tokens = 0
    with StoreWriter(path) as writer:
        for line in store.rejected_path.read_text(encoding="utf-8").splitlines():
            writer.reject(**json.loads(line))
        for number in range(store.num_samples):
            file, line_number = store.file(number), store.line(number)
            if number in pairs:
                message = (
                    f"{store.origin(number)}: nearly {(others or store).origin(pairs[number])}"
                )
                writer.reject(file, line_number, NEAR_DUPLICATE, message)
                continue
            tokens, supervised = store.sample(number)
            chosen = slice(store.offsets[number], store.offsets[number + 1])
            weights = None if store.weights is None else store.weights[chosen]
            writer.add(tokens, supervised, file, line_number, weights)
            report.samples += 1
            report.tokens += len(tokens)
            report.supervised_tokens += int(np.count_nonzero(supervised[1:]))
        return writer.commit(fingerprint, parts, report)


def _index(similarity: float) -> Any:
    try:
        from datasketch import MinHashLSH
    except ImportError as error:
        raise ValueError(
            f"near duplicates are found with datasketch: pip install 'sft-fast[dedup]' ({error})"
        ) from None
    return MinHashLSH(threshold=similarity, num_perm=NUM_PERMUTATIONS)


def _signature(shingles: npt.NDArray[np.uint64]) -> MinHash:
    from datasketch import MinHash

    signature = MinHash(num_perm=NUM_PERMUTATIONS, hashfunc=int)
    # Its permutations are of 32 bits.
    signature.update_batch((shingles >> np.uint64(32)).tolist())
    return signature


def _shingles(store: TokenStore, number: int, start: int) -> npt.NDArray[np.uint64]:
    """Hashes of the runs of tokens from `start` on, uint64 [distinct runs]."""
    begin, stop = store.offsets[number] + start, store.offsets[number + 1]
    tokens = np.asarray(store.tokens[begin:stop], dtype=np.uint64)
    length = min(SHINGLE_TOKENS, len(tokens))
    hashes = np.zeros(len(tokens) - length + 1, dtype=np.uint64)
    for place in range(length):
        # Overflow is meant.
        hashes = (hashes + tokens[place : len(tokens) - length + 1 + place]) * _FACTOR
        hashes ^= hashes >> np.uint64(29)
    return np.unique(hashes)


def _jaccard(first: npt.NDArray[np.uint64], second: npt.NDArray[np.uint64]) -> float:
    shared = len(np.intersect1d(first, second, assume_unique=True))
    return shared / (len(first) + len(second) - shared)


def _common_prefix(stores: Sequence[TokenStore]) -> int:
    """Tokens that all samples begin with, before the first that any of them trains."""

    def prompts() -> Iterator[npt.NDArray[np.uint32]]:
        for store in stores:
            for number in range(store.num_samples):
                tokens, supervised = store.sample(number)
                yield tokens[: int(supervised.argmax())]

    common = next(prompts())
    for tokens in prompts():
        common = common[: len(tokens)]
        differs = np.flatnonzero(common != tokens[: len(common)])
        if len(differs):
            common = common[: differs[0]]
    return len(common)

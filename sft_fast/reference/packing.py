"""What sft_fast._C computes, written to be checked by eye."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sft_fast.constants import IGNORE_INDEX, round_up


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Packs samples from long to short, each into the fullest bin that has room for it.

    Args:
        lengths: tokens per sample, each in [1, capacity].
        capacity: tokens per bin.

    Returns:
        Bins as lists of sample ids.

    Source: D. S. Johnson, "Near-optimal bin packing algorithms", MIT 1973.
    """
    bins: list[list[int]] = []
    free: list[int] = []
    for sample in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fitting = [b for b in range(len(bins)) if free[b] >= lengths[sample]]
        if fitting:
            best = min(fitting, key=lambda b: free[b])
        else:
            best = len(bins)
            bins.append([])
            free.append(capacity)
        bins[best].append(sample)
        free[best] -= lengths[sample]
    return bins


def next_fit(
    lengths: Sequence[int], capacity: int, max_samples: int | None = None
) -> list[list[int]]:
    """Packs samples in the order given; one that does not fit in the last bin opens another.

    Args:
        lengths: tokens per sample, each in [1, capacity].
        capacity: tokens per bin.
        max_samples: samples per bin; None = no limit.

    Returns:
        Bins as lists of sample ids.
    """
    bins: list[list[int]] = []
    for sample, length in enumerate(lengths):
        is_full = not bins or sum(lengths[other] for other in bins[-1]) + length > capacity
        if is_full or len(bins[-1]) == max_samples:
            bins.append([])
        bins[-1].append(sample)
    return bins


def random_bits(seed: int, epoch: int, stream: int, counter: int) -> int:
    """Returns number `counter` of a random stream, uniform in [0, 2**64).

    Source: the output function of SplitMix64 (Steele, Lea, Flood 2014).
    """
    gamma, mask = 0x9E3779B97F4A7C15, 2**64 - 1

    def mix(bits: int) -> int:
        bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9 & mask
        bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EB & mask
        return bits ^ (bits >> 31)

    key = mix(seed + gamma & mask)
    key = mix(key + epoch + gamma & mask)
    key = mix(key + stream & mask)
    return mix(key + counter * gamma & mask)


def shuffle(items: list[int], begin: int, end: int, seed: int, epoch: int, stream: int) -> None:
    """Puts items[begin:end] into random order (Fisher and Yates).

    Several neighbouring draws come from one random number, the more the shorter the range: each
    takes the high word of its product with the number of choices, and leaves the low one.

    Source: Brackett-Rozinsky and Lemire, "Batched Ranged Random Integer Generation" (2024).
    """
    longest = {6: 2**8, 4: 2**12, 3: 2**16, 2: 2**24, 1: 2**32}
    num_draws = next(draws for draws, most in longest.items() if end - begin <= most)
    bits = 0
    for i in range(begin + 1, end):
        if (i - begin - 1) % num_draws == 0:
            bits = random_bits(seed, epoch, stream, i)
        chosen, bits = divmod(bits * (i - begin + 1), 2**64)
        items[i], items[begin + chosen] = items[begin + chosen], items[i]


def random_order(
    count: int,
    seed: int,
    epoch: int,
    stream: int,
    most_in_place: int = 2**21,
    bucket_size: int = 60_000,
) -> list[int]:
    """Returns 0 to count - 1, shuffled.

    Over `most_in_place` of them, each goes to a random bucket first, and the buckets are shuffled.

    Source: C. R. Rao 1961, M. Sandelius 1962.
    """
    if count <= most_in_place:
        order = list(range(count))
        shuffle(order, 0, count, seed, epoch, stream)
        return order
    num_bits = (count // bucket_size).bit_length()
    buckets: list[list[int]] = [[] for _ in range(2**num_bits)]
    for i in range(count):
        # A number decides on four buckets, 16 bits for each.
        digit = random_bits(seed, epoch, stream, count + i // 4) >> 16 * (i % 4) & 0xFFFF
        buckets[digit >> (16 - num_bits)].append(i)
    order = []
    for bucket in buckets:
        begin = len(order)
        order += bucket
        shuffle(order, begin, len(order), seed, epoch, stream)
    return order


class Window:
    """The pool of the "window" strategy; add() until needs_more() is false, then take_bin()."""

    def __init__(
        self, capacity: int, max_samples: int | None, pool_size: int, seed: int, epoch: int
    ) -> None:
        self.capacity = capacity
        self.max_samples = max_samples or 2**31
        self.pool_size = pool_size
        self.seed, self.epoch = seed, epoch
        self.num_draws = 0
        self.pool: list[tuple[int, int]] = []
        """(sample, length), oldest first."""

    def needs_more(self) -> bool:
        """True below pool_size samples, and below 8 bins' worth of tokens."""
        total = sum(length for _, length in self.pool)
        return len(self.pool) < self.pool_size or total < 8 * self.capacity

    def take_bin(self) -> list[int]:
        """Removes and returns a bin: the oldest, then what fills it exactly, then what fits."""
        mean = sum(length for _, length in self.pool) // len(self.pool)
        reserve = min(mean, self.capacity // 3)
        taken: list[int] = []
        room = self.capacity
        while self.pool and len(taken) < self.max_samples and room > 0:
            rest = room - self.pool[0][1]
            if taken and rest != 0 and rest < reserve:
                break
            room -= self.take(self.pool[0][1], taken)
        while self.pool and len(taken) < self.max_samples and room > 0:
            present = {length for _, length in self.pool}
            size = room
            if room not in present:
                size = self.pair(room) if len(taken) + 1 < self.max_samples else 0
            size = size or max((length for length in present if length <= room), default=0)
            if size == 0:
                break
            room -= self.take(size, taken)
        return taken

    def take(self, size: int, taken: list[int]) -> int:
        """Moves the oldest sample of this length to `taken`; returns the length."""
        place = next(i for i, (_, length) in enumerate(self.pool) if length == size)
        taken.append(self.pool.pop(place)[0])
        return size

    def pair(self, room: int) -> int:
        """Returns the smaller of two lengths in the pool that add up to `room`, or 0."""
        num_words = room // 2 // 64 + 1
        bits = random_bits(self.seed, self.epoch, 5, self.num_draws)
        start = bits * num_words >> 64
        self.num_draws += 1
        lengths = [length for _, length in self.pool]
        found = [
            size
            for size in range(1, room // 2 + 1)
            if size in lengths and lengths.count(room - size) > (2 * size == room)
        ]
        # The search goes through words of 64 lengths, from a random one on and around.
        return min(found, key=lambda size: ((size // 64 - start) % num_words, size), default=0)


class FilledSequence(NamedTuple):
    """The arrays of one micro-batch; shapes and dtypes as in `packing.micro_batch.MicroBatch`."""

    tokens: NDArray[np.int64]
    labels: NDArray[np.int64]
    position_ids: NDArray[np.int64]
    cu_seqlens: NDArray[np.int32]
    active_tokens: NDArray[np.int64]
    weights: NDArray[np.float32]


def fill_sequence(
    store_tokens: NDArray[np.uint32],
    supervised_bits: NDArray[np.uint8],
    offsets: NDArray[np.int64],
    sample_ids: Sequence[int],
    seq_length: int,
    *,
    alignment: int = 1,
    cp_size: int = 1,
    cp_rank: int = 0,
    token_weights: NDArray[np.float16] | None = None,
) -> FilledSequence:
    """Concatenates padded samples, pads, and takes one context-parallel rank's share.

    Args:
        store_tokens: uint32 [total].
        supervised_bits: uint8 [ceil(total / 8)], little-endian bits; 1 = token is a target.
        offsets: int64 [num_samples + 1].
        sample_ids: the samples of the sequence, in order.
        seq_length: over all ranks, at least the total of the padded samples.
        alignment: samples are padded to a multiple of this.
        cp_size: ranks that share; each has two of the 2 * cp_size chunks of a padded sample.
        cp_rank: the rank whose share is returned.
        token_weights: float16 [total], of each token as a target; None = 1.
    """
    supervised = np.unpackbits(supervised_bits, bitorder="little").astype(bool)
    # Columns: token, label, position, weight; a block per sample, and one for the padding.
    blocks = []
    for sample in sample_ids:
        span = slice(offsets[sample], offsets[sample + 1])
        length = span.stop - span.start
        padded_length = round_up(length, alignment)
        block = np.zeros((padded_length, 4))
        block[:length, 0] = store_tokens[span]
        block[:, 1] = IGNORE_INDEX
        block[: length - 1, 1] = np.where(supervised[span], block[:length, 0], IGNORE_INDEX)[1:]
        block[:, 2] = np.arange(padded_length)
        block[: length - 1, 3] = 1 if token_weights is None else token_weights[span][1:]
        blocks.append(block)
    padded_lengths = [len(block) for block in blocks]
    padding = np.tile([0.0, IGNORE_INDEX, 0.0, 0.0], (seq_length - sum(padded_lengths), 1))
    if cp_size > 1:
        chunks = [np.split(block, 2 * cp_size) for block in blocks]
        blocks = [part for one in chunks for part in (one[cp_rank], one[-1 - cp_rank])]
        padding = padding[: len(padding) // cp_size]
    sequence = np.concatenate([*blocks, padding])
    has_label = sequence[:, 1] != IGNORE_INDEX
    return FilledSequence(
        tokens=sequence[:, 0].astype(np.int64),
        labels=sequence[:, 1].astype(np.int64),
        position_ids=sequence[:, 2].astype(np.int64),
        cu_seqlens=np.cumsum([0, *padded_lengths], dtype=np.int32),
        active_tokens=np.flatnonzero(has_label),
        weights=np.where(has_label, sequence[:, 3], 0).astype(np.float32),
    )

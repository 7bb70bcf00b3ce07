"""Fills micro-batches in a thread, while the device computes."""

import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from types import TracebackType
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from sft_fast.constants import ceil_div
from sft_fast.data.targets import StoredTokens
from sft_fast.packing.micro_batch import (
    PLAIN_LAYOUT,
    MicroBatch,
    SequenceBuffers,
    SequenceLayout,
    fill_micro_batch,
)

Item = TypeVar("Item")


class PlannedSequence(NamedTuple):
    """What a micro-batch is filled with, as `fill_micro_batch` takes it."""

    store: StoredTokens
    sample_ids: NDArray[np.int64]
    """int64 [n]."""
    seq_length: int


class Prefetcher(Generic[Item], Iterator[Item]):
    """An iterator over `source` whose items are made in a thread, at most `depth` ahead.

    An error in `source` is raised where its item would have come. Close it, or use it in a `with`
    block: a thread that is waiting for room would stay forever. The items are consumed by one
    thread; `close` may be called by any, and more than once.
    """

    def __init__(self, source: Generator[Item, None, None], depth: int = 2) -> None:
        """Starts the thread; it alone runs `source` and closes it.

        Raises:
            ValueError: `depth` is not positive.
        """
        if depth < 1:
            raise ValueError(f"depth is {depth}; expected at least 1")
        self.depth = depth
        self.changed = threading.Condition()
        # All below is read and written under `changed`.
        self.ready: deque[Item] = deque()
        self.error: BaseException | None = None
        self.is_exhausted = False
        self.is_closed = False
        # A daemon, so that a forgotten close does not keep the process alive.
        self.thread = threading.Thread(
            target=self.run, args=(source,), name="sft_fast prefetch", daemon=True
        )
        self.thread.start()

    def run(self, source: Generator[Item, None, None]) -> None:
        """Makes items until there are no more, or until nobody wants them."""
        error: BaseException | None = None
        try:
            with closing(source):
                for item in source:
                    if not self.put(item):
                        break
        # Whatever it is, it belongs to the consumer; here nobody would see it.
        except BaseException as raised:
            error = raised
        with self.changed:
            self.error, self.is_exhausted = error, True
            self.changed.notify_all()

    def put(self, item: Item) -> bool:
        """Waits for room and adds an item; returns False once closed."""
        with self.changed:
            self.changed.wait_for(lambda: len(self.ready) < self.depth or self.is_closed)
            if not self.is_closed:
                self.ready.append(item)
                self.changed.notify_all()
            return not self.is_closed

    def __next__(self) -> Item:
        with self.changed:
            self.changed.wait_for(lambda: self.ready or self.is_exhausted or self.is_closed)
            if self.is_closed:
                raise StopIteration
            if self.ready:
                item = self.ready.popleft()
                self.changed.notify_all()
                return item
            if self.error is None:
                raise StopIteration
            error, self.error = self.error, None
            raise error

    def close(self) -> None:
        """Stops the thread and waits for it; items that were not taken are lost."""
        with self.changed:
            self.is_closed = True
            self.ready.clear()
            self.changed.notify_all()
        self.thread.join()

    def __enter__(self) -> "Prefetcher[Item]":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class BatchLoader(Iterator[MicroBatch]):
    """Micro-batches on the device, filled ahead of time.

    For a GPU they are filled into `depth` + 2 sets of page-locked buffers, in rotation: `depth` may
    be waiting, one is being filled and one is being copied to the device. What the loader yields
    shares no memory with the buffers.
    """

    def __init__(
        self,
        sequences: Iterable[PlannedSequence],
        device: torch.device | str,
        *,
        max_length: int,
        max_samples: int,
        has_weights: bool = False,
        layout: SequenceLayout = PLAIN_LAYOUT,
        dtype: torch.dtype = torch.int64,
        depth: int = 2,
        reuse_buffers: bool | None = None,
    ) -> None:
        """Starts filling.

        Args:
            sequences: one item per micro-batch, in order; iterated in the thread.
            device: where the micro-batches go.
            max_length: greatest seq_length.
            max_samples: most samples of a micro-batch.
            has_weights: whether a store may have weights.
            layout: how samples lie in a sequence.
            dtype: of tokens, labels and position_ids.
            depth: micro-batches filled ahead.
            reuse_buffers: None = for a GPU only; elsewhere copying costs more than it saves.

        Raises:
            ValueError: here or while iterating, an argument that `fill_micro_batch` refuses.
        """
        self.device = torch.device(device)
        self.is_cuda = self.device.type == "cuda"
        self.does_copy = self.is_cuda if reuse_buffers is None else reuse_buffers
        self.buffers: list[SequenceBuffers] = []
        if self.does_copy:
            self.buffers = [
                SequenceBuffers(
                    ceil_div(max_length, layout.cp_size),
                    max_samples,
                    dtype=dtype,
                    has_weights=has_weights,
                    pin_memory=self.is_cuda,
                )
                for _ in range(depth + 2)
            ]
        # copied[i] is done when the device has read buffers[i].
        self.copied: list[torch.cuda.Event | None] = [None] * len(self.buffers)
        self.num_taken = 0
        self.prefetcher = Prefetcher(self.fill(sequences, layout, dtype), depth)

    def fill(
        self, sequences: Iterable[PlannedSequence], layout: SequenceLayout, dtype: torch.dtype
    ) -> Generator[MicroBatch, None, None]:
        """Yields the micro-batches on the host; runs in the thread."""
        for number, (store, sample_ids, seq_length) in enumerate(sequences):
            buffers = None
            if self.buffers:
                place = number % len(self.buffers)
                buffers, copied = self.buffers[place], self.copied[place]
                if copied is not None:
                    copied.synchronize()
            yield fill_micro_batch(
                store, sample_ids, seq_length, layout=layout, dtype=dtype, buffers=buffers
            )

    def __next__(self) -> MicroBatch:
        batch = next(self.prefetcher).to(self.device, copy=self.does_copy)
        if self.is_cuda and self.does_copy:
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(self.device))
            self.copied[self.num_taken % len(self.buffers)] = event
        self.num_taken += 1
        return batch

    def close(self) -> None:
        """Stops filling."""
        self.prefetcher.close()

    def __enter__(self) -> "BatchLoader":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

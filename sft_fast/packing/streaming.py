"""The optimizer steps of samples that arrive one by one and may never end.

The memory is bounded by the pool of the "window" strategy, whose order is the stream's own. Every
rank reads the same stream and forms the same steps, at any layout.
"""

from __future__ import annotations

import json
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save

from sft_fast import _C
from sft_fast.data.memory_store import MemoryStore, StreamSample
from sft_fast.data.store import DataReport
from sft_fast.data.stream import SampleStream, StreamState
from sft_fast.data.targets import count_targets
from sft_fast.packing.balance import DEFAULT_COST_MODEL, CostModel
from sft_fast.packing.bins import DEFAULT_OPTIONS, Bin, PackingOptions
from sft_fast.packing.choices import MAX_CAPACITY
from sft_fast.packing.steps import Step, StepCounts, StepPlan

STATE_FILE = "stream_state.bin"


@dataclass(frozen=True)
class StreamPlanState:
    """Where the plan of a stream stands between two steps; enough to continue it elsewhere."""

    stream: StreamState
    num_read: int
    """Samples taken from the stream."""
    num_draws: int
    """Random numbers that the packer drew."""
    ids: NDArray[np.int64]
    """int64 [n], the samples that were read and are in no step yet, by their number in the
    stream; in the order in which the packer must be given them."""
    pool: tuple[StreamSample, ...]
    """These samples."""

    def to_bytes(self) -> bytes:
        """The content of a safetensors file; its name is another, for it is no shard of weights."""
        store = MemoryStore.of((*self.pool, *self.stream.buffer, *self.stream.waiting))
        tensors: dict[str, NDArray[Any]] = {
            "ids": self.ids,
            "tokens": store.tokens,
            "supervised_bits": store.supervised_bits,
            "offsets": store.offsets,
        }
        if store.weights is not None:
            tensors["weights"] = store.weights
        text = {
            "num_read": str(self.num_read),
            "num_draws": str(self.num_draws),
            "stream": self.stream.as_json(),
            "origins": json.dumps(store.origins),
        }
        return save(tensors, text)

    @classmethod
    def read(cls, path: Path) -> StreamPlanState:
        """Reads a file of what `to_bytes` returned."""
        with safe_open(path, "numpy") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            text = file.metadata()
        ids = tensors.pop("ids")
        store = MemoryStore(
            tensors["tokens"],
            tensors["supervised_bits"],
            tensors["offsets"],
            tensors.get("weights"),
            tuple(json.loads(text["origins"])),
        )
        samples = store.samples()
        stream = StreamState.of(text["stream"], samples[len(ids) :])
        numbers = (int(text["num_read"]), int(text["num_draws"]))
        return cls(stream, *numbers, ids, tuple(samples[: len(ids)]))


class StreamPlan:
    """Every optimizer step of a stream; the counterpart of `StepPlan`.

    A step is `global_batch_size` bins. Steps are made one after another, by the thread that asks
    first; those before the last one whose counts were asked for are forgotten.
    """

    strategy = "window"

    def __init__(
        self,
        samples: SampleStream,
        *,
        capacity: int,
        global_batch_size: int,
        seed: int = 0,
        options: PackingOptions = DEFAULT_OPTIONS,
        cost_model: CostModel = DEFAULT_COST_MODEL,
    ) -> None:
        """Reads nothing yet.

        Args:
            samples: at the beginning, or where `state` has it.
            capacity: tokens per bin, a multiple of the alignment.
            global_batch_size: bins per step, over all data-parallel ranks.
            seed: in [0, 2**64).
            options: limits on bins.
            cost_model: decides which rank computes which bins of a step, and nothing else.

        Raises:
            ValueError: an argument is out of range.
        """
        if not 1 <= capacity <= MAX_CAPACITY or not 0 <= seed < 2**64 or global_batch_size < 1:
            raise ValueError(
                f"packing.capacity is {capacity}, seed {seed}, train.global_batch_size "
                f"{global_batch_size}; expected 1 to {MAX_CAPACITY}, [0, 2**64), at least 1"
            )
        cost_model.check(capacity * global_batch_size, longest=capacity)
        self.samples = samples
        self.capacity = capacity
        self.global_batch_size = global_batch_size
        self.options = options
        self.cost_model = cost_model
        self.packer = _C.StreamPacker(
            capacity,
            seed,
            alignment=options.alignment,
            max_samples=options.max_samples_per_bin or 0,
            pool_size=options.pool_size,
        )
        self.seed = seed
        self.held: dict[int, StreamSample] = {}
        self.num_read = 0
        # Steps are asked for by the thread that fills micro-batches and by the training loop, which
        # must not wait for those that are made ahead: whoever makes one holds `making`.
        self.making = threading.Lock()
        self.next_step = 0
        self.lock = threading.Lock()
        # Read and written under `lock`.
        self.made: deque[tuple[int, Step, StreamPlanState]] = deque()

    def resume(self, checkpoint: Path, step: int) -> None:
        """Goes on at `step` as `checkpoint` has it; before any step is asked for."""
        self.restore(StreamPlanState.read(checkpoint / STATE_FILE), step)

    def restore(self, state: StreamPlanState, step: int) -> None:
        """Goes on at `step` from `state`; before any step is asked for."""
        self.samples.restore(state.stream)
        self.packer = _C.StreamPacker(
            self.capacity,
            self.seed,
            alignment=self.options.alignment,
            max_samples=self.options.max_samples_per_bin or 0,
            pool_size=self.options.pool_size,
            num_draws=state.num_draws,
        )
        self.num_read, self.next_step = state.num_read, step
        self.held = dict(zip(state.ids.tolist(), state.pool, strict=True))
        for number, sample in self.held.items():
            self.packer.add(number, len(sample.tokens))

    def state_files(self, number: int) -> dict[str, Callable[[], bytes]]:
        """Name -> content of what a checkpoint before step `number` must hold beside its own."""
        return {STATE_FILE: self.state(number).to_bytes}

    def step(self, number: int) -> Step:
        """Returns a step, over all ranks; its ids are places in its own store.

        Raises:
            ValueError: a record cannot be used; see `SampleStream`.
        """
        step = self.find(number)
        if step is None:
            with self.making:
                while self.next_step <= number:
                    made = (self.next_step, self.make_step(), self.snapshot())
                    with self.lock:
                        self.made.append(made)
                    self.next_step += 1
            step = self.find(number)
        assert step is not None, f"step {number} was forgotten"
        return step

    def find(self, number: int) -> Step | None:
        """Returns a step that is made and not forgotten."""
        with self.lock:
            return next((step for made, step, _ in self.made if made == number), None)

    def counts(self, number: int) -> StepCounts:
        """Returns what a whole step holds; no step before it can be asked for any more."""
        counts = self.step(number).counts()
        with self.lock:
            while self.made[0][0] < number:
                self.made.popleft()
        return counts

    def state(self, number: int) -> StreamPlanState:
        """Returns where the stream stood before step `number`, the one before it being kept."""
        with self.lock:
            return next(state for made, _, state in self.made if made == number - 1)

    def expected(self) -> StepPlan:
        """Returns the plan of the samples in the buffer: what to expect of all others.

        Raises:
            ValueError: none of them has a supervised token; or as `step`.
        """
        head = MemoryStore.of(self.samples.head())
        return StepPlan(
            lengths=head.lengths,
            num_supervised=head.num_supervised,
            capacity=self.capacity,
            strategy=self.strategy,
            seed=self.seed,
            global_batch_size=self.global_batch_size,
            options=self.options,
            cost_model=self.cost_model,
            loss_weights=head.loss_weights,
            is_extract=True,
        )

    def report_before(self, number: int) -> DataReport | None:
        """Returns what became of the records before step `number`; None if none was made."""
        with self.lock:
            states = (state for made, _, state in self.made if made == number - 1)
            return next((state.stream.report for state in states), None)

    def snapshot(self) -> StreamPlanState:
        """Returns where the stream stands; samples are shared, not copied."""
        ids = self.packer.ids()
        pool = tuple(self.held[number] for number in ids.tolist())
        stream = self.samples.state()
        return StreamPlanState(stream, self.num_read, self.packer.num_draws, ids, pool)

    def make_step(self) -> Step:
        """Returns the next step."""
        bins = [self.next_bin() for _ in range(self.global_batch_size)]
        samples = [self.held.pop(number) for number in np.concatenate(bins).tolist()]
        store = MemoryStore.of(samples)
        supervised, loss_weights = count_targets(store)
        ends = np.cumsum([len(ids) for ids in bins])
        return Step(
            bins=np.split(np.arange(len(samples), dtype=np.int64), ends[:-1]),
            lengths=store.lengths,
            supervised=supervised,
            loss_weights=loss_weights,
            capacity=self.capacity,
            alignment=self.options.alignment,
            cost_model=self.cost_model,
            store=store,
        )

    def next_bin(self) -> Bin:
        """Returns the numbers of the samples of the next bin."""
        while self.packer.needs_more():
            sample = next(self.samples)
            self.packer.add(self.num_read, len(sample.tokens))
            self.held[self.num_read] = sample
            self.num_read += 1
        return self.packer.take_bin()

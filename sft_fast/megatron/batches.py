"""Which samples this rank computes: from the packing plan to micro-batches on the device."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from sft_fast.config.sections import ModelConfig, PackingConfig, TrainConfig
from sft_fast.constants import round_up
from sft_fast.data.memory_store import MemoryStore
from sft_fast.data.store import TokenStore
from sft_fast.data.stream import SampleStream, TrainingData
from sft_fast.megatron.parallel import Parallel
from sft_fast.packing.micro_batch import SequenceLayout
from sft_fast.packing.prefetch import BatchLoader, PlannedSequence
from sft_fast.packing.steps import Step, StepPlan
from sft_fast.packing.streaming import StreamPlan


@dataclass(frozen=True)
class BatchShape:
    """How many micro-batches a rank takes per step, and how large they are."""

    num_microbatches: int
    micro_batch_size: int
    """Packs of each."""
    capacity: int
    """Tokens of a pack."""
    alignment: int
    """A sample takes up a multiple of this many tokens."""
    length_multiple: int
    """What divides a sequence: the ranks that share it, times the rows of an 8-bit product."""
    keeps_padding: bool
    """All sequences have one length: pipeline stages do not tell each other any."""

    @property
    def seq_length(self) -> int:
        """Tokens of a micro-batch, all its padding included."""
        return self.capacity * self.micro_batch_size

    @property
    def longest(self) -> int:
        """Tokens of the longest micro-batch that may be filled."""
        return round_up(self.seq_length, self.length_multiple)


def batch_shape(
    train: TrainConfig, packing: PackingConfig, model: ModelConfig, parallel: Parallel
) -> BatchShape:
    """The shape of this run's micro-batches; the same on every rank."""
    return BatchShape(
        train.global_batch_size // (train.micro_batch_size * parallel.dp_size),
        train.micro_batch_size,
        packing.capacity,
        packing.alignment,
        parallel.tp_size * parallel.cp_size * model.fp8_multiple,
        keeps_padding=parallel.pp_size > 1,
    )


def store_of(step: Step, data: TrainingData) -> TokenStore | MemoryStore:
    """Where the samples of a step are; each step of a stream has its own."""
    if step.store is not None:
        return step.store
    assert not isinstance(data, SampleStream), "the steps of a stream have their samples"
    return data


def planned_sequences(
    data: TrainingData,
    plan: StepPlan | StreamPlan,
    steps: Iterable[int],
    shape: BatchShape,
    parallel: Parallel,
) -> Iterator[PlannedSequence]:
    """Yields what each of this rank's micro-batches is filled with, step after step."""
    for number in steps:
        step = plan.step(number)
        store = store_of(step, data)
        for packs in step.micro_batches(parallel.dp_rank, parallel.dp_size, shape.micro_batch_size):
            sample_ids = np.concatenate(packs)
            seq_length = shape.capacity * len(packs)
            if not shape.keeps_padding:
                used = int(round_up(step.lengths[sample_ids], shape.alignment).sum())
                seq_length = round_up(max(used, shape.alignment), shape.length_multiple)
            yield PlannedSequence(store, sample_ids, seq_length)


def open_batches(
    data: TrainingData,
    plan: StepPlan | StreamPlan,
    steps: Iterable[int],
    shape: BatchShape,
    parallel: Parallel,
) -> BatchLoader:
    """This rank's micro-batches of `steps`, filled ahead in a thread; to be used in a `with`."""
    return BatchLoader(
        planned_sequences(data, plan, steps, shape, parallel),
        parallel.device,
        max_length=shape.longest,
        max_samples=shape.longest,
        # Whether a stream has weights is known only when they come.
        has_weights=isinstance(data, SampleStream) or data.weights is not None,
        layout=SequenceLayout(shape.alignment, parallel.cp_size, parallel.cp_rank),
    )

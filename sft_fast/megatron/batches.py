"""Which samples this rank computes: from the packing plan to micro-batches on the device."""

from collections.abc import Iterator

import numpy as np

from sft_fast.config.schema import Config
from sft_fast.constants import round_up
from sft_fast.data.store import TokenStore
from sft_fast.megatron.parallel import Parallel
from sft_fast.packing.micro_batch import RowLayout
from sft_fast.packing.prefetch import BatchLoader, Row
from sft_fast.packing.steps import StepPlan


def packed_rows(
    store: TokenStore, plan: StepPlan, steps: range, config: Config, parallel: Parallel
) -> Iterator[Row]:
    """Yields (sample ids, rows) of each of this rank's micro-batches, step after step."""
    size, alignment = config.train.micro_batch_size, config.packing.alignment
    num_parts = parallel.tp_size * parallel.cp_size * config.model.fp8_multiple
    for step in steps:
        for bins in plan.micro_batches(step, parallel.dp_rank, parallel.dp_size, size):
            sample_ids = np.concatenate(bins)
            num_rows = config.packing.capacity * len(bins)
            if parallel.pp_size == 1:
                # Without pipeline stages nothing needs a fixed shape, so the padding is cut off.
                used = round_up(store.lengths[sample_ids], alignment)
                num_rows = round_up(max(int(used.sum()), alignment), num_parts)
            yield sample_ids, num_rows


def open_batches(
    store: TokenStore, plan: StepPlan, steps: range, config: Config, parallel: Parallel
) -> BatchLoader:
    """This rank's micro-batches of `steps`, filled ahead in a thread; to be used in a `with`."""
    num_parts = parallel.tp_size * parallel.cp_size * config.model.fp8_multiple
    max_rows = round_up(config.packing.capacity * config.train.micro_batch_size, num_parts)
    return BatchLoader(
        store,
        packed_rows(store, plan, steps, config, parallel),
        parallel.device,
        max_rows=max_rows,
        max_samples=max_rows,
        layout=RowLayout(config.packing.alignment, parallel.cp_size, parallel.cp_rank),
    )

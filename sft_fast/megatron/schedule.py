"""megatron's pipeline schedule over one global batch."""

from collections.abc import Iterator
from itertools import tee
from typing import Any, Protocol

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor
from torch.nn import ModuleList

from sft_fast.megatron.batches import BatchShape
from sft_fast.megatron.optim import one_or_all
from sft_fast.megatron.parallel import Parallel


class ForwardStep(Protocol):
    """megatron's contract; see forward_step.forward_step."""

    def __call__(self, data_iterator: Iterator[Any], model: Any) -> tuple[Tensor, Any]:
        """Runs one micro-batch; returns its output and the loss_func for it."""


def run_schedule(
    model: ModuleList,
    batches: Iterator[Any],
    shape: BatchShape,
    step: ForwardStep,
    forward_only: bool = False,
) -> list[dict[str, Tensor]]:
    """Runs all of this rank's micro-batches of one global batch.

    Returns: the reports of `step`'s loss_func; none but on the last pipeline stage.
    """
    return get_forward_backward_func()(
        forward_step_func=step,
        # Every interleaved stage reads the same micro-batches.
        data_iterator=one_or_all(list(tee(batches, len(model)))),
        model=list(model),
        num_microbatches=shape.num_microbatches,
        seq_length=shape.seq_length,
        micro_batch_size=1,  # to megatron a micro-batch is one sequence that holds all its packs
        forward_only=forward_only,
    )


def sum_over_ranks(
    reports: list[dict[str, Tensor]],
    name: str,
    shape: tuple[int, ...],
    parallel: Parallel,
    votes: tuple[float, ...] = (),
    seen: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Adds up the micro-batches of all ranks.

    Args:
        reports: from `run_schedule`.
        name: of a value of `shape` in each report.
        shape: of the value.
        parallel: the layout.
        votes: more numbers to add up, of every rank.
        seen: fp64, a tensor of every rank to add up; None = an empty one.

    Returns: fp64 of `shape`, fp64 [len(votes)] and fp64 like `seen`, the same on every rank.
    """
    total = torch.zeros(shape, dtype=torch.float64, device=parallel.device)
    # Only the last stage has reports; tensor-parallel ranks have the same ones.
    if parallel.tp_rank == 0:
        for report in reports:
            total += report[name]
    asked = torch.tensor(votes, dtype=torch.float64).to(parallel.device, non_blocking=True)
    seen = total.new_empty(0) if seen is None else seen
    everything = torch.cat([total.reshape(-1), asked, seen.reshape(-1)])
    dist.all_reduce(everything)
    counted, voted, observed = everything.split([total.numel(), len(votes), seen.numel()])
    return counted.reshape(shape), voted, observed.reshape(seen.shape)

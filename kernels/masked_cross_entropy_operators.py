"""Custom operators around a backend's launches: torch.compile sees what they read and write.

An operator takes tensors and numbers only. Columns and options become numbers in front of it, and
what they were inside it; no operator names an option.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sft_fast.kernels.loss_options import LossOptions, options_of
from sft_fast.kernels.masked_cross_entropy import VocabColumns


def define_statistics(
    name: str,
    num_splits: Callable[[Tensor], int],
    launch: Callable[[Tensor, Tensor, Tensor, VocabColumns, LossOptions, bool], None],
) -> Callable[..., Tensor]:
    """Makes LossKernels.shard_statistics, as the operator `name`.

    Args:
        name: of the operator, once per process.
        num_splits: parts into which logits [N, width] are cut; the same on every rank.
        launch: writes the first of (statistics [num_splits, S, N], logits [N, width], labels [N],
            columns, options, with_outputs).
    """

    def allocate(logits: Tensor, options: list[float], with_outputs: bool) -> Tensor:
        """Statistics [num_splits, S, N]."""
        count = options_of(tuple(options)).num_statistics(with_outputs)
        return logits.new_empty((num_splits(logits), count, len(logits)), dtype=torch.float32)

    @torch.library.custom_op(f"sft_fast::{name}", mutates_args=())
    def operator(
        logits: Tensor,
        labels: Tensor,
        columns: list[int],
        options: list[float],
        with_outputs: bool,
    ) -> Tensor:
        """Logits [N, width], labels [N] -> statistics [num_splits, S, N]."""
        statistics = allocate(logits, options, with_outputs)
        made = options_of(tuple(options))
        launch(statistics, logits, labels, VocabColumns(*columns), made, with_outputs)
        return statistics

    operator.register_fake(
        lambda logits, labels, columns, options, with_outputs: allocate(
            logits, options, with_outputs
        )
    )
    return with_numbers(operator)


def define_losses(
    name: str, launch: Callable[[Tensor, Tensor, Tensor, int, LossOptions, bool], None]
) -> Callable[..., Tensor]:
    """Makes LossKernels.token_losses, as the operator `name`.

    Args:
        name: of the operator, once per process.
        launch: writes the first of (outputs [1 or 4, N], statistics [num_parts, S, N], labels [N],
            vocab_size, options, with_outputs).
    """

    def allocate(statistics: Tensor, with_outputs: bool) -> Tensor:
        """Outputs [1 or 4, N]."""
        return statistics.new_empty((4 if with_outputs else 1, statistics.shape[2]))

    @torch.library.custom_op(f"sft_fast::{name}", mutates_args=())
    def operator(
        statistics: Tensor,
        labels: Tensor,
        vocab_size: int,
        options: list[float],
        with_outputs: bool,
    ) -> Tensor:
        """Statistics [num_parts, S, N], labels [N] -> outputs [1 or 4, N]."""
        outputs = allocate(statistics, with_outputs)
        made = options_of(tuple(options))
        launch(outputs, statistics, labels, vocab_size, made, with_outputs)
        return outputs

    operator.register_fake(
        lambda statistics, labels, vocab_size, options, with_outputs: allocate(
            statistics, with_outputs
        )
    )
    return with_numbers(operator)


def define_gradient(
    name: str,
    launch: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, VocabColumns, LossOptions], None],
) -> Callable[..., None]:
    """Makes LossKernels.write_gradient, as the operator `name`.

    Args:
        name: of the operator, once per process.
        launch: writes the first of (gradient [N, width], logits [N, width], labels [N],
            statistics [num_parts, S, N], grads [2, N], columns, options).
    """

    @torch.library.custom_op(f"sft_fast::{name}", mutates_args=("gradient",))
    def operator(
        gradient: Tensor,
        logits: Tensor,
        labels: Tensor,
        statistics: Tensor,
        grads: Tensor,
        columns: list[int],
        options: list[float],
    ) -> None:
        """Writes gradient [N, width]."""
        made = options_of(tuple(options))
        launch(gradient, logits, labels, statistics, grads, VocabColumns(*columns), made)

    operator.register_fake(lambda *_: None)
    return with_numbers(operator)


def with_numbers(operator: Callable[..., Any]) -> Callable[..., Any]:
    """The operator, for arguments that may be VocabColumns or LossOptions."""

    @functools.wraps(operator)
    def call(*arguments: Any) -> Any:
        return operator(*[numbers_of(argument) for argument in arguments])

    return call


def numbers_of(argument: Any) -> Any:
    """Columns as list[int], options as list[float], anything else as it is."""
    if isinstance(argument, LossOptions):
        return argument.values()
    return list(argument) if isinstance(argument, VocabColumns) else argument

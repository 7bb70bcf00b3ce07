"""The end of the model in a stage with a loss or a head of its own."""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor
from torch.nn import Parameter, functional

from sft_fast.megatron.attention.packed_samples import PackedSamples
from sft_fast.packing.micro_batch import sample_index
from sft_fast.stages import ActiveTokens, Stage


class StageHead(torch.nn.Module):
    """A linear layer without bias in place of the LM head; every tensor-parallel rank has it whole.

    Its weight is a parameter of this module, whose forward computes the loss, because DDP gathers
    what a module owns when that module's forward begins.
    """

    def __init__(
        self,
        hidden_size: int,
        stage: Stage,
        dtype: torch.dtype,
        tp_group: dist.ProcessGroup,
        sequence_parallel: bool,
    ):
        """The weight, [num_outputs, hidden_size] of `dtype`, is undefined until it is loaded."""
        super().__init__()
        assert stage.num_outputs is not None, "the stage has a head of its own"
        self.stage, self.tp_group = stage, tp_group
        self.sequence_parallel = sequence_parallel
        self.weight = Parameter(torch.empty(stage.num_outputs, hidden_size, dtype=dtype))

    def forward(
        self, hidden: Tensor, labels: Tensor | None = None, samples: PackedSamples | None = None
    ) -> Tensor:
        """Outputs [b, s, num_outputs] of hidden [s, b, h], or with `labels` [b, s] token losses.

        With sequence parallelism hidden is this rank's part of the sequence, [s/tp, b, h]. The
        outputs are fp32; losses are as `token_losses` returns them.
        """
        if self.sequence_parallel:
            # All ranks compute the same from here on: the gradient is cut, not added up.
            hidden = gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=False, group=self.tp_group
            )
        if labels is None:
            return functional.linear(hidden.float(), self.weight.float()).transpose(0, 1)
        assert samples is not None and samples.active_tokens is not None, "a micro-batch has them"
        active = samples.active_tokens.to(hidden.device, non_blocking=True)  # [A]
        rows = hidden.flatten(0, 1).index_select(0, active)  # [A, h]
        outputs = functional.linear(rows.float(), self.weight.float())  # [A, num_outputs]
        return token_losses(self.stage, outputs, labels, samples)


def token_losses(stage: Stage, outputs: Tensor, labels: Tensor, samples: PackedSamples) -> Tensor:
    """The stage's losses at their places in the sequence.

    Args:
        stage: has the loss.
        outputs: fp32 [A, num_outputs] or [A], see `Stage.loss`.
        labels: int64 or int32 [b, s].
        samples: of the micro-batch.

    Returns: fp32 [b, s], times the weights, 0 at tokens that are not active; where an evaluation
        wants outputs [1 + measures, b, s], the loss without weights and what the stage measures.
    """
    assert samples.active_tokens is not None, "a micro-batch has them"
    active = samples.active_tokens.to(labels.device, non_blocking=True)  # [A]
    flat_labels = labels.t().flatten().index_select(0, active).long()  # [A]
    if not len(active):
        # Zeros that hang on the outputs: every parameter has a gradient in every micro-batch.
        nothing = spread(outputs.flatten(), active, labels)
        return nothing.expand(1 + len(stage.measures), -1, -1) if samples.wants_outputs else nothing
    index = sample_index(samples.active_tokens, samples.seqlens, samples.cp_size)
    tokens = ActiveTokens.of(flat_labels, index)
    losses = checked(stage, "loss()", stage.loss(outputs, tokens), active)
    if torch.is_grad_enabled() and not losses.requires_grad:
        raise ValueError(
            f"{type(stage).__name__}: loss() does not depend on the outputs, so nothing would be "
            "learnt; compute it from them, without detach() or no_grad()"
        )
    if samples.wants_outputs:
        columns = measures_of(stage, outputs, tokens, active)
        return torch.stack([spread(column, active, labels) for column in (losses, *columns)])
    if samples.token_weights is not None:
        losses = losses * samples.token_weights.t().flatten().index_select(0, active)
    return spread(losses, active, labels)


def measures_of(
    stage: Stage, outputs: Tensor, tokens: ActiveTokens, active: Tensor
) -> list[Tensor]:
    """fp32 [A] for each of the stage's measures.

    Raises:
        ValueError: the stage returned others than it lists.
    """
    measured: object = stage.measure(outputs, tokens)
    if not isinstance(measured, Mapping) or measured.keys() != stage.measures.keys():
        found = ", ".join(measured) if isinstance(measured, Mapping) else type(measured).__name__
        raise ValueError(
            f"{type(stage).__name__}: measure() returned {found or 'nothing'}, but measures lists "
            f"{', '.join(stage.measures) or 'nothing'}"
        )
    return [checked(stage, f"measure() {name}", measured[name], active) for name in stage.measures]


def checked(stage: Stage, name: str, values: object, active: Tensor) -> Tensor:
    """[A] fp32; raises ValueError where the stage returned anything else than a number a token."""
    expected = f"expected one number for each active token, {list(active.shape)}"
    if not isinstance(values, Tensor):
        raise ValueError(
            f"{type(stage).__name__}: {name} returned {type(values).__name__}; {expected}"
        )
    if values.shape != active.shape:
        raise ValueError(
            f"{type(stage).__name__}: {name} has shape {list(values.shape)}; {expected}"
        )
    return values.float()


def spread(values: Tensor, active: Tensor, labels: Tensor) -> Tensor:
    """[A] at the active places of [b, s], 0 elsewhere."""
    batch, sequence = labels.shape
    flat = values.new_zeros(sequence * batch).index_copy(0, active, values)
    return flat.view(sequence, batch).t()

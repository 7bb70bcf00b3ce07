"""LoRA beside the matrices of experts: a pair A, B for each expert's gate, up and down.

The pairs of a rank's experts are one parameter per projection and letter, A [experts, rank, in] and
B [experts, out, rank]. They are spread over expert-parallel ranks as the experts are, and split
over expert-tensor-parallel ranks as their matrix is: B by rows with gate and up, A by columns with
down. The other letter is the same on those ranks; each computes a part of its gradient, and these
are summed before the gradient is added to the others of the step.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.tensor_parallel import (
    get_cuda_rng_tracker,
    set_tensor_model_parallel_attributes,
)
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import Parameter, functional

from sft_fast.config.sections import LoraConfig
from sft_fast.kernels.expert_adapters import GroupedAdapters
from sft_fast.kernels.expert_copies import CopyOrder
from sft_fast.kernels.expert_mlp import expert_mlp, expert_mlp_with_dropout
from sft_fast.megatron.experts import GroupedExperts
from sft_fast.megatron.hf import part
from sft_fast.megatron.lora_parameters import initial_a, parameter_name, scale_of
from sft_fast.models.families import Rule

INPUTS_RNG = "lora-expert-inputs"
"""Random numbers that the ranks which share experts, and get the same rows, have in common."""
ACTIVATIONS_RNG = "lora-expert-activations"
"""Those of an activation that is split over these ranks."""


@dataclass(frozen=True)
class ExpertProjection:
    """One Hugging Face projection of all experts of a layer."""

    hf_name: str
    """With * for the expert's number: model.layers.3.mlp.experts.*.gate_proj."""
    matrix: str
    """The parameter that it is rows of: gate_up or down."""
    num_rows: int
    """Of an expert, on this rank."""
    is_adapted: bool

    @property
    def name(self) -> str:
        """Its name without the module: gate_proj."""
        return self.hf_name.rpartition(".")[2]

    @property
    def split_dims(self) -> dict[str, int | None]:
        """Dimension over which the ranks that share an expert split a and b; None = each has all
        of it."""
        return {"a": 2, "b": None} if self.matrix == "down" else {"a": None, "b": 1}


class LoraExperts(GroupedExperts):
    """What adapted experts have beside their matrices. Experts become these by their `__class__`.

    The adapters are parameters of the experts themselves, not of a child, because DDP gathers what
    a module owns when that module's forward begins.
    """

    projections: tuple[ExpertProjection, ...]
    """Gate, up and down."""
    scale: float
    dropout: float

    def parameters_of(self, projection: ExpertProjection) -> dict[str, Tensor]:
        """a [experts, rank, in] and b [experts, num_rows, rank], this rank's parts."""
        return {letter: getattr(self, parameter_name(letter, projection.name)) for letter in "ab"}

    def adapted(self) -> list[ExpertProjection]:
        """The projections that have adapters."""
        return [projection for projection in self.projections if projection.is_adapted]

    def shared(self, projection: ExpertProjection, letter: str) -> Tensor:
        """A parameter as the forward pass reads it; the ranks that have the same one sum their
        gradients of it."""
        value = self.parameters_of(projection)[letter]
        if self.etp_group.size() == 1 or projection.split_dims[letter] is not None:
            return value
        return cast(Tensor, SummedGradient.apply(value, self.etp_group))

    def adapters(self, matrix: str) -> GroupedAdapters | None:
        """Those of gate_up or down; None = there are none."""
        own = [projection for projection in self.projections if projection.matrix == matrix]
        a = tuple(self.shared(projection, "a") for projection in own if projection.is_adapted)
        if not a:
            return None
        num_columns, first, rows = sum(each.shape[1] for each in a), 0, []
        for projection in own:
            if not projection.is_adapted:
                shape = len(a[0]), projection.num_rows, num_columns
                rows.append(a[0].new_zeros(shape))
                continue
            b = self.shared(projection, "b")
            last = first + b.shape[2]
            rows.append(functional.pad(b, (first, num_columns - last)) if len(a) > 1 else b)
            first = last
        return GroupedAdapters(a, rows[0] if len(rows) == 1 else torch.cat(rows, 1), self.scale)

    def forward(self, hidden: Tensor, order: CopyOrder, probs: Tensor) -> tuple[Tensor, None]:
        """[rows, h], as GroupedExperts, of hidden [rows, h] and probs [rows, chosen]."""
        matrices = hidden, self.gate_up, self.down, probs, order, self.activate
        pairs = self.adapters("gate_up"), self.adapters("down")
        if self.dropout == 0.0 or not self.training:
            return expert_mlp(*matrices, *pairs), None
        drops = partial(self.drop, INPUTS_RNG), partial(self.drop, ACTIVATIONS_RNG)
        return expert_mlp_with_dropout(*matrices, *pairs, drops), None

    def drop(self, numbers: str, x: Tensor) -> Tensor:
        """Dropout of x, of any shape, by the random numbers of that name."""
        with get_cuda_rng_tracker().fork(numbers):
            return functional.dropout(x, self.dropout)

    @torch.no_grad()
    def merged_matrix(self, matrix: str, number: int) -> Tensor:
        """[out, in] fp32: this rank's part of one expert's gate_up or down, adapters merged."""
        weight: Tensor = getattr(self, matrix)[number].float()
        parts = []
        for projection in self.projections:
            if projection.matrix != matrix:
                continue
            delta = weight.new_zeros(projection.num_rows, weight.shape[1])
            if projection.is_adapted:
                pair = self.parameters_of(projection)
                delta = pair["b"][number].float() @ pair["a"][number].float()
            parts.append(delta)
        return torch.add(weight, torch.cat(parts), alpha=self.scale)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
    ) -> dict[str, Any]:
        """That of the experts, and the adapters in [all experts, ...], split as they are."""
        tensors = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        axis, etp = len(sharded_offsets), (self.etp_group.rank(), self.etp_group.size())
        for projection in self.adapted():
            for letter, parameter in self.parameters_of(projection).items():
                dim = projection.split_dims[letter]
                own = () if dim is None else ((axis + dim, *etp),)
                key = f"{prefix}{parameter_name(letter, projection.name)}"
                tensors[key] = ShardedTensor.from_rank_offsets(
                    key,
                    parameter,
                    *sharded_offsets,
                    (axis, self.ep_group.rank(), self.ep_group.size()),
                    *own,
                    replica_id=(0, etp[0] if dim is None else 0, self.dp_group.rank()),
                    prepend_axis_num=len(sharded_offsets),
                )
        return tensors


class SummedGradient(torch.autograd.Function):
    """A parameter as it is; its gradient is the sum of those of the ranks of a group.

    Up to 0.16 megatron's own leaves a gradient unsummed that is a part of a larger one.
    """

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, group: dist.ProcessGroup) -> Tensor:
        """The parameter, of any shape."""
        ctx.group = group
        return parameter.view_as(parameter)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Of the parameter's shape."""
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total, None


def adapt_experts(
    experts: GroupedExperts,
    numbers: Sequence[int],
    rules: Mapping[str, Rule],
    prefix: str,
    targets: set[str],
    lora: LoraConfig,
    seed: int,
) -> None:
    """Gives the projections of `targets` their adapters; without one the experts stay as they are.

    Args:
        experts: of a layer.
        numbers: of this rank's experts, among all of the layer.
        rules: of the layer's parameters.
        prefix: of their Hugging Face names, model.layers.3.
        targets: full names, with * for the expert's number.
        lora: section of the run.
        seed: of the run.
    """
    projections = []
    for matrix in ("gate_up", "down"):
        sources = rules[f"mlp.experts.{matrix}"].sources
        num_rows = getattr(experts, matrix).shape[1] // len(sources)
        for source in sources:
            name = prefix + source.removesuffix(".weight")
            projections.append(ExpertProjection(name, matrix, num_rows, name in targets))
    if not any(projection.is_adapted for projection in projections):
        return
    adapted: Any = experts
    adapted.__class__ = LoraExperts
    adapted.projections = tuple(projections)
    adapted.scale, adapted.dropout = scale_of(lora), lora.dropout
    for projection in adapted.adapted():
        add_pairs(adapted, projection, numbers, lora, seed)


def add_pairs(
    experts: LoraExperts,
    projection: ExpertProjection,
    numbers: Sequence[int],
    lora: LoraConfig,
    seed: int,
) -> None:
    """Adds A, as in PEFT, and B, zero, of every expert of this rank."""
    num_columns, sharing = getattr(experts, projection.matrix).shape[2], experts.etp_group
    is_split = projection.split_dims["a"] is not None
    num_inputs = num_columns * sharing.size() if is_split else num_columns
    own = part(num_inputs, sharing.size(), sharing.rank()) if is_split else slice(None)
    a = [
        initial_a(projection.hf_name.replace("*", str(number)), lora.rank, num_inputs, seed)[:, own]
        for number in numbers
    ]
    b = torch.zeros(len(numbers), projection.num_rows, lora.rank)
    for letter, value in {"a": torch.stack(a), "b": b}.items():
        parameter: Any = Parameter(value.to(experts.down).contiguous())
        # Counted once in the norm of the gradients: on every rank where it is split or other
        # experts' own, else on the first of the ranks that share them.
        dim = projection.split_dims[letter]
        set_tensor_model_parallel_attributes(parameter, True, dim or 0, stride=1)
        parameter.shared = dim is None and sharing.rank() > 0
        parameter.allreduce = False
        experts.register_parameter(parameter_name(letter, projection.name), parameter)

"""Mixtures of experts without Transformer Engine: grouped products instead of a loop over experts.

megatron-core's MoELayer runs as it is, with a router, experts and a dispatcher of ours. The router
names the experts of each token, [tokens, chosen], where megatron's would mark them in a table. A
matrix of all experts of a rank is one parameter. Where a rank has all experts no tokens travel, and
the host waits for no number; else it waits once a layer, for the sizes of what is exchanged.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import (
    all_to_all,
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules
from torch import Tensor
from torch.nn import Parameter

from sft_fast.kernels import block_torch
from sft_fast.kernels.block_backends import BlockKernels
from sft_fast.kernels.expert_copies import CopyOrder, copies_of, sort_copies, sums_of
from sft_fast.kernels.expert_mlp import expert_mlp
from sft_fast.megatron.collectives import all_gather_single
from sft_fast.megatron.parallel import Parallel
from sft_fast.megatron.router import Router
from sft_fast.models.architecture import Architecture


class GroupedExperts(MegatronModule):
    """This rank's experts: SwiGLU, the columns of each split over expert-tensor-parallel ranks."""

    gate_up: Parameter
    """[experts, 2 ffn / etp, h]: an expert's part of gate, and then of up"""
    down: Parameter
    """[experts, h, ffn / etp]"""
    kernels: BlockKernels = block_torch

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        pg_collection: Any = None,
        name: str | None = None,
    ):
        super().__init__(config=config)
        self.ep_group, self.etp_group = pg_collection.ep, pg_collection.expt_tp
        self.dp_group = pg_collection.expt_dp
        width, hidden = config.moe_ffn_hidden_size // self.etp_group.size(), config.hidden_size
        self.gate_up = self.matrices(num_local_experts, 2 * width, hidden, split_dim=1)
        self.down = self.matrices(num_local_experts, hidden, width, split_dim=2)

    def matrices(self, *shape: int, split_dim: int) -> Parameter:
        """Undefined values; they are loaded."""
        placement = {"dtype": self.config.params_dtype, "device": torch.cuda.current_device()}
        parameter: Any = Parameter(torch.empty(shape, **placement))
        set_tensor_model_parallel_attributes(parameter, True, split_dim, stride=1)
        # Other ranks have the same experts than have the rest of the layer.
        parameter.allreduce = False
        return parameter

    def forward(self, hidden: Tensor, order: CopyOrder, probs: Tensor) -> tuple[Tensor, None]:
        """[rows, h], a part of the sum over the ranks that share an expert.

        Args:
            hidden: [rows, h], tokens or copies of them.
            order: of their experts, as numbers of this rank.
            probs: [rows, chosen] fp32.
        """
        return expert_mlp(hidden, self.gate_up, self.down, probs, order, self.activate), None

    def activate(self, gate_up: Tensor, factors: Tensor) -> Tensor:
        """[rows, ffn / etp] of gate_up [rows, 2 ffn / etp] and the router's factors [rows]."""
        return self.kernels.gated_activation(gate_up, "silu", factors, False)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
    ) -> dict[str, Any]:
        """Under the keys and in the global shapes of megatron's SequentialMLP."""
        ep, etp = ((group.rank(), group.size()) for group in (self.ep_group, self.etp_group))
        shard = partial(
            ShardedTensor.from_rank_offsets,
            replica_id=(0, 0, self.dp_group.rank()),
            prepend_axis_num=len(sharded_offsets),
        )
        expert_axis = len(sharded_offsets)
        offsets = (*sharded_offsets, (expert_axis, *ep))
        key = f"{prefix}experts.linear_fc1.weight"
        down = shard(
            f"{prefix}experts.linear_fc2.weight",
            self.down,
            *offsets,
            (expert_axis + 2, *etp),
        )
        gate_up = (
            shard(key, self.gate_up, *offsets)
            if etp[1] == 1
            else gate_up_factory(key, self.gate_up, sharded_offsets, ep, etp, down.replica_id)
        )
        return {f"{prefix}gate_up": gate_up, f"{prefix}down": down}


def gate_up_factory(
    key: str,
    gate_up: Parameter,
    sharded_offsets: Sequence[tuple[int, int, int]],
    ep: tuple[int, int],
    etp: tuple[int, int],
    replica_id: tuple[int, int, int],
) -> ShardedTensorFactory:
    """Each expert's gate and up apart, because a rank's parts of them are no one block."""
    num_experts, expert_axis = len(gate_up), len(sharded_offsets)

    def build(key: str, tensor: Tensor, replica_id: Any, flattened_range: Any) -> list[Any]:
        return [
            ShardedTensor.from_rank_offsets(
                key,
                half,
                *sharded_offsets,
                (expert_axis, ep[0] * num_experts + expert, ep[1] * num_experts),
                (expert_axis + 1, number * etp[1] + etp[0], 2 * etp[1]),
                replica_id=replica_id,
                prepend_axis_num=expert_axis + 1,
            )
            for expert, matrix in enumerate(tensor)
            for number, half in enumerate(matrix.chunk(2))
        ]

    def merge(halves: list[Tensor]) -> Tensor:
        return torch.cat(halves).view_as(gate_up)

    return ShardedTensorFactory(key, gate_up, build, merge, replica_id)


class Dispatcher(MoETokenDispatcher):
    """Brings tokens to the ranks that have their experts, and the results back.

    A copy of a token travels to each rank of `ep_group` with one of its experts; the ranks of
    `tp_group` share experts, so each of them gets the tokens of all.
    """

    hidden_shape: torch.Size
    experts: Tensor
    """[rows, chosen] of the rows that are to be computed, as numbers of this rank."""
    home: CopyOrder
    """The order in which this rank's own copies were sent."""
    sent: list[int]
    """To each expert-parallel rank."""
    received: list[int]
    shared: list[int]
    """Rows of each rank that has parts of the same experts."""

    def __init__(self, config: TransformerConfig, pg_collection: Any):
        super().__init__(config, pg_collection)
        self.num_local_experts = config.num_moe_experts // self.ep_size

    def dispatch_preprocess(
        self, hidden: Tensor, experts: Tensor, probs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """hidden [s, b, h] -> [tokens, h]; remembers the experts [tokens, chosen]."""
        self.hidden_shape, self.experts = hidden.shape, experts
        return hidden.flatten(0, 1), probs

    def token_dispatch(self, hidden: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """[tokens, h], [tokens, chosen] -> the same of the rows that this rank computes."""
        if self.ep_size > 1:
            hidden, probs = self.exchange(hidden, probs)
        elif self.tp_size > 1:
            self.shared = self.rows_of_sharing_ranks(len(hidden))
        if self.tp_size > 1:
            gather = partial(
                gather_from_sequence_parallel_region,
                group=self.tp_group,
                output_split_sizes=self.shared,
            )
            hidden, probs = gather(hidden), gather(probs)
            if self.ep_size == 1:
                with torch.no_grad():
                    self.experts = gather(self.experts)
        return hidden, probs

    def exchange(self, hidden: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Sends each copy to its expert's rank; [rows, h], [rows, 1] of the copies received."""
        self.home = sort_copies(self.experts, self.num_local_experts * self.ep_size)
        counts = self.home.offsets.diff().view(self.ep_size, -1)
        arriving = torch.empty_like(counts)
        dist.all_to_all_single(arriving, counts, group=self.ep_group)
        every = arriving
        if self.tp_size > 1:
            every = arriving.new_empty((self.tp_size * self.ep_size, self.num_local_experts))
            all_gather_single(every, arriving, group=self.tp_group)
        of_ranks = every.view(self.tp_size, -1).sum(1)
        sizes = torch.cat([counts.sum(1), arriving.sum(1), of_ranks]).tolist()
        self.sent, self.received = sizes[: self.ep_size], sizes[self.ep_size : 2 * self.ep_size]
        self.shared = sizes[2 * self.ep_size :]
        numbers = torch.arange(self.num_local_experts, device=every.device).expand_as(every)
        self.experts = torch.repeat_interleave(
            numbers.flatten(), every.flatten(), output_size=sum(self.shared)
        ).unsqueeze(1)
        travel = partial(all_to_all, self.ep_group)
        rows = travel(copies_of(hidden, self.home), self.received, self.sent)
        weights = probs.flatten().index_select(0, self.home.copy_numbers)
        return rows, travel(weights, self.received, self.sent).unsqueeze(1)

    def rows_of_sharing_ranks(self, num_rows: int) -> list[int]:
        """Tensor-parallel ranks have equal parts of a sequence; others have to be asked."""
        if self.config.tensor_model_parallel_size % self.tp_size == 0:
            return [num_rows] * self.tp_size
        counts = self.experts.new_empty(self.tp_size)
        all_gather_single(counts, counts.new_full((1,), num_rows), group=self.tp_group)
        sizes: list[int] = counts.tolist()
        return sizes

    def dispatch_postprocess(
        self, hidden: Tensor, probs: Tensor
    ) -> tuple[Tensor, CopyOrder, Tensor]:
        """What GroupedExperts takes, of hidden [rows, h] and probs [rows, chosen]."""
        return hidden, sort_copies(self.experts, self.num_local_experts), probs

    def combine_preprocess(self, output: Tensor) -> Tensor:
        """[rows, h] of all sharing ranks -> of this rank: sums of what they made of a row."""
        if self.tp_size == 1:
            return output
        return reduce_scatter_to_sequence_parallel_region(
            output, group=self.tp_group, input_split_sizes=self.shared
        )

    def token_combine(self, output: Tensor) -> Tensor:
        """[rows, h] -> [tokens, h]: sends each copy home, and adds up the copies of a token."""
        if self.ep_size == 1:
            return output
        return sums_of(all_to_all(self.ep_group, output, self.sent, self.received), self.home)

    def combine_postprocess(self, output: Tensor) -> Tensor:
        """[tokens, h] -> [s, b, h]."""
        return output.view(self.hidden_shape)


def experts_config(architecture: Architecture, parallel: Parallel) -> dict[str, Any]:
    """What TransformerConfig has to know of experts; the choice among them is our router's."""
    a = architecture
    if not a.num_experts:
        return {}
    dense = {}
    if a.dense_layers:
        # Layers that differ are saved one by one.
        dense["moe_layer_freq"] = [int(i not in a.dense_layers) for i in range(a.num_layers)]
    return dense | {
        "moe_shared_expert_intermediate_size": a.shared_ffn_size or None,
        "moe_shared_expert_gate": "mlp.shared_experts.gate_weight" in a.layer,
        "num_moe_experts": architecture.num_experts,
        "moe_ffn_hidden_size": architecture.ffn_hidden_size,
        "moe_router_topk": architecture.experts_per_token,
        "moe_router_load_balancing_type": "none",
        "moe_token_dispatcher_type": "alltoall",
        "expert_model_parallel_size": parallel.ep_size,
        "expert_tensor_parallel_size": parallel.etp_size,
    }


def use_grouped_experts(layer: TransformerLayerSubmodules) -> None:
    """Puts our router and experts into the spec of a layer with experts."""
    # A ModuleSpec, or in newer releases a function with the submodules as an argument.
    submodules = getattr(layer.mlp, "keywords", {}).get("submodules") or layer.mlp.submodules
    submodules.router, submodules.experts = Router, GroupedExperts


def connect_experts(model: GPTModel, architecture: Architecture) -> None:
    """Gives the layers with experts our dispatcher, for megatron chooses among its own only, and
    tells their routers how to choose."""
    for module in model.modules():
        if isinstance(module, MoELayer):
            module.token_dispatcher = Dispatcher(module.config, model.pg_collection)
            module.router.choose_by(architecture)

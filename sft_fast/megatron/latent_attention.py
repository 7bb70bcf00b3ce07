"""Multi-head latent attention: keys and values of all heads come from one narrow vector a token.

A head's query and key have two parts, one without positions and one that is rotated; the rotated
part of the key is the same for all heads. The narrow vectors are made on every tensor-parallel rank
from its part of the sequence; heads are split over the ranks. For training keys and values are
computed in full, which costs fewer products than attending to the narrow vectors would.

Source: DeepSeek-V2, 2024 (arXiv 2405.04434), section 2.1.
"""

from functools import partial
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.nn import functional

from sft_fast.megatron.loss_rows import select_rows
from sft_fast.megatron.norm import RMSNorm
from sft_fast.megatron.rotary import rotary_kind
from sft_fast.models.architecture import Architecture

NORM_EPS = 1e-6
"""Of the narrow vectors' norms, whatever the model's other norms have."""


class ReplicatedLinear(nn.Module):
    """A product that every tensor-parallel rank computes of its part of the sequence."""

    def __init__(self, config: TransformerConfig, num_inputs: int, num_outputs: int):
        super().__init__()
        placement = {"dtype": config.params_dtype, "device": torch.cuda.current_device()}
        weight: Any = nn.Parameter(torch.empty((num_outputs, num_inputs), **placement))
        # megatron adds up gradients of weights that have the mark.
        weight.sequence_parallel = config.sequence_parallel
        self.weight = weight

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., num_inputs] -> [..., num_outputs]."""
        return functional.linear(hidden, self.weight)


class LatentAttention(MegatronModule):
    """Latent attention of a layer, in megatron-core's names of its parts."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: SelfAttentionSubmodules,
        layer_number: int,
        *,
        architecture: Architecture,
        pg_collection: Any = None,
        **kwargs: Any,
    ):
        super().__init__(config=config)
        a = architecture
        self.tp_group, self.layer_number = pg_collection.tp, layer_number
        self.key_sizes = a.head_dim - a.rope_dim, a.rope_dim
        self.kv_rank, self.value_dim = a.kv_rank, a.value_dim
        self.rotates_neighbours = a.rotates_neighbours
        self.rotary_kind = rotary_kind(architecture, layer_number - 1)
        selective = config.recompute_granularity == "selective"
        self.recomputes_core = selective and "core_attn" in config.recompute_modules
        split = partial(
            ColumnParallelLinear,
            config=config,
            init_method=config.init_method,
            gather_output=False,
            bias=False,
            skip_bias_add=False,
            tp_group=self.tp_group,
        )
        self.has_narrow_queries = a.query_rank > 0
        if self.has_narrow_queries:
            self.linear_q_down_proj = ReplicatedLinear(config, a.hidden_size, a.query_rank)
            self.q_layernorm = RMSNorm(config, a.query_rank, NORM_EPS)
            self.linear_q_up_proj = split(a.query_rank, a.query_size)
        else:
            self.linear_q_proj = split(a.hidden_size, a.query_size)
        self.linear_kv_down_proj = ReplicatedLinear(config, a.hidden_size, a.kv_rank + a.rope_dim)
        self.kv_layernorm = RMSNorm(config, a.kv_rank, NORM_EPS)
        self.linear_kv_up_proj = split(a.kv_rank, a.latent_key_value_size)
        self.linear_proj = RowParallelLinear(
            a.value_size,
            a.hidden_size,
            config=config,
            init_method=config.output_layer_init_method,
            bias=False,
            input_is_parallel=True,
            skip_bias_add=True,
            tp_group=self.tp_group,
        )
        self.core_attention = build_module(
            submodules.core_attention,
            config=config,
            layer_number=layer_number,
            attn_mask_type=None,
            attention_type="self",
        )

    def forward(
        self,
        hidden_states: Tensor,
        rotary_tables: Tensor,
        packed_seq_params: PackedSeqParams | None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """The layer's attention, [s, b, h], or [A, 1, h] of rows [A].

        Args:
            hidden_states: [s, b, h], normalised; s is this rank's part with sequence parallelism.
            rotary_tables: [kinds, s * b, rotated channels] fp32, see rotary.rotary_tables.
            packed_seq_params: the samples of the sequence.
            rows: int64 [A], the tokens whose output is wanted; None = all.
        """
        table = None if self.rotary_kind is None else rotary_tables[self.rotary_kind]
        query = self.queries(hidden_states, table)
        latent = self.linear_kv_down_proj(hidden_states)
        shared, turned = latent.split([self.kv_rank, self.key_sizes[1]], dim=-1)
        key_value, _ = self.linear_kv_up_proj(self.kv_layernorm(shared))
        widths = [self.key_sizes[0], self.value_dim]
        plain, value = key_value.unflatten(-1, (-1, sum(widths))).split(widths, dim=-1)
        turned = self.rotate(self.of_whole_sequence(turned).unsqueeze(2), table)
        key = torch.cat([plain, turned.expand(-1, -1, plain.shape[2], -1)], dim=-1)
        attend = partial(
            self.core_attention, attention_mask=None, packed_seq_params=packed_seq_params
        )
        if self.recomputes_core and self.training:
            attended = tensor_parallel.checkpoint(attend, False, query, key, value)
        else:
            attended = attend(query, key, value)
        output, _ = self.linear_proj(attended if rows is None else select_rows(attended, rows))
        return output

    @property
    def first_products(self) -> tuple[nn.Module, ...]:
        """What reads the layer's normalised input."""
        of_queries = self.linear_q_down_proj if self.has_narrow_queries else self.linear_q_proj
        return of_queries, self.linear_kv_down_proj

    def queries(self, hidden_states: Tensor, table: Tensor | None) -> Tensor:
        """[s, b, heads / tp, head_dim], rotated, of [s or s / tp, b, h]."""
        if self.has_narrow_queries:
            latent = self.q_layernorm(self.linear_q_down_proj(hidden_states))
            query, _ = self.linear_q_up_proj(latent)
        else:
            query, _ = self.linear_q_proj(hidden_states)
        query = query.unflatten(-1, (-1, sum(self.key_sizes)))
        plain, turned = query.split(self.key_sizes, dim=-1)
        return torch.cat([plain, self.rotate(turned, table)], dim=-1)

    def of_whole_sequence(self, turned: Tensor) -> Tensor:
        """[s, b, rope_dim] of [s or s / tp, b, rope_dim]; each rank's heads give it a gradient."""
        if self.config.sequence_parallel:
            return gather_from_sequence_parallel_region(turned, group=self.tp_group)
        return copy_to_tensor_model_parallel_region(turned, group=self.tp_group)

    def rotate(self, heads: Tensor, table: Tensor | None) -> Tensor:
        """[s, b, heads, rope_dim] rotated by table [s * b, rope_dim]: cosines, then sines."""
        if table is None:
            return heads
        cosines, sines = table.view(*heads.shape[:2], 1, -1).chunk(2, dim=-1)
        if self.rotates_neighbours:
            first, second = heads[..., 0::2], heads[..., 1::2]
        else:
            first, second = heads.chunk(2, dim=-1)
        # Scores do not depend on the order of channels that queries and keys share.
        parts = [first * cosines - second * sines, second * cosines + first * sines]
        return torch.cat(parts, dim=-1).type_as(heads)

"""A transformer layer whose steps between the products are one kernel each.

Parameters and checkpoint keys are megatron-core's. Every sum of the residual stream and a norm is
one pass, forward and backward; queries, keys and values leave the projection normalised and
rotated; gate and up become their product at once. kernels/README.md counts the bytes.
"""

from collections.abc import Collection
from functools import partial
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor
from torch.nn import functional

from sft_fast.kernels import block_torch
from sft_fast.kernels.block_backends import BlockKernels
from sft_fast.megatron.experts import GroupedExperts
from sft_fast.megatron.loss_rows import select_rows
from sft_fast.megatron.norm import NormThenAdd, RMSNorm, WideNorm, norm_over_heads
from sft_fast.megatron.recompute import free_until_backward, trains
from sft_fast.megatron.rotary import rotary_kind
from sft_fast.models.architecture import Architecture


class FusedSelfAttention(SelfAttention):
    """megatron-core's self-attention with rotary tables of our own, chosen by layer."""

    kernels: BlockKernels = block_torch

    def __init__(self, *args: Any, architecture: Architecture, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.rotary_kind = rotary_kind(architecture, self.layer_number - 1)
        self.has_wide_norm = architecture.has_wide_qk_norm
        if self.has_wide_norm:
            groups, head = self.num_query_groups_per_partition, self.hidden_size_per_attention_head
            heads = self.num_attention_heads_per_partition
            self.query_norm = WideNorm(self.config, heads * head)
            self.key_norm = WideNorm(self.config, groups * head)

    @property
    def first_products(self) -> tuple[torch.nn.Module, ...]:
        """What reads the layer's normalised input."""
        return (self.linear_qkv,)

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
        qkv, _ = self.linear_qkv(hidden_states)
        if self.has_wide_norm:
            qkv = norm_over_heads(
                qkv,
                self.query_norm(),
                self.key_norm(),
                self.num_query_groups_per_partition,
                self.hidden_size_per_attention_head,
                self.config.layernorm_epsilon,
                self.pg_collection.tp,
            )
        table = None if self.rotary_kind is None else rotary_tables[self.rotary_kind]
        weights = None, None
        if self.config.qk_layernorm:
            weights = self.q_layernorm(), self.k_layernorm()
        heads = self.kernels.rotate_qkv(
            qkv,
            table,
            self.num_query_groups_per_partition,
            self.hidden_size_per_attention_head,
            *weights,
            self.config.layernorm_epsilon,
            self.config.layernorm_zero_centered_gamma,
        )
        attend = self.core_attention
        if self.checkpoint_core_attention and self.training:
            attend = self._checkpointed_attention_forward
        attended = attend(*heads, attention_mask=None, packed_seq_params=packed_seq_params)
        output, _ = self.linear_proj(attended if rows is None else select_rows(attended, rows))
        return output


class GatedMLP(MLP):
    """megatron-core's MLP with one kernel for gate and up."""

    kernels: BlockKernels = block_torch
    activation: str
    recomputes_activation = False
    """The second product's input is not kept."""

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
        """([..., h], no bias).

        Args:
            hidden_states: [..., h].
            **kwargs: what megatron's layer has for experts.
        """
        gate_up, _ = self.linear_fc1(hidden_states)
        # Overwritten by its gradient: nobody else has seen it.
        hidden = self.kernels.gated_activation(gate_up, self.activation, None, True)
        output, _ = self.linear_fc2(hidden)
        if self.recomputes_activation and trains(self.linear_fc2):
            kept = gate_up.detach()

            def write(out: Tensor) -> None:
                self.kernels.write_gated_activation(out, kept, self.activation, None)

            free_until_backward(hidden, write, output)
        return output, None


class GatedSharedExpert(GatedMLP, SharedExpertMLP):
    """megatron-core's expert of every token, with the kernel of GatedMLP.

    Its output is multiplied by sigmoid(hidden_states @ gate_weight), where it has that weight.
    """

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:  # type: ignore[override]
        """[..., h] -> [..., h]."""
        output, _ = super().forward(hidden_states)
        if self.gate_weight is None:
            return output
        return output * functional.linear(hidden_states, self.gate_weight).sigmoid()


class FusedTransformerLayer(TransformerLayer):
    """megatron-core's layer for decoders without biases, dropout and cross-attention."""

    recomputes_norms = False
    """The outputs of the two norms that products read are not kept."""

    def forward(
        self,
        hidden_states: Tensor,
        *,
        rotary_pos_emb: Tensor,
        packed_seq_params: PackedSeqParams | None = None,
        context: None = None,
        padding_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """(the layer's output [s, b, h], no context); of the last layer [A, 1, h] of `loss_rows`.

        Args:
            hidden_states: [s, b, h].
            rotary_pos_emb: the rotary tables; the name is that of megatron's block.
            packed_seq_params: the samples of the sequence.
            context: of cross-attention, None.
            padding_mask: None; the samples know what is padding.
            **kwargs: what megatron's block passes for inference and cross-attention, all None.
        """
        normed, residual = self.input_layernorm(hidden_states)
        rows = self.loss_rows(packed_seq_params)
        attended = self.self_attention(normed, rotary_pos_emb, packed_seq_params, rows)
        if self.recomputes_norms and trains(*self.self_attention.first_products):
            self.input_layernorm.free_until_backward(normed, residual, attended)
        if rows is not None:
            residual = select_rows(residual, rows)
        if isinstance(self.self_attn_bda, NormThenAdd):
            normed, residual = self.pre_mlp_layernorm(self.self_attn_bda(attended, residual))
        else:
            normed, residual = self.pre_mlp_layernorm(attended, residual)
        is_token = self.tokens_of_rank(packed_seq_params) if self.is_moe_layer else None
        mlp = partial(self.mlp, padding_mask=is_token)
        output, _ = self.checkpointed(mlp, normed) if self.recompute_mlp else mlp(normed)
        if self.recomputes_norms and trains(self.mlp):
            self.pre_mlp_layernorm.free_until_backward(normed, residual, output)
        if isinstance(self.mlp_bda, NormThenAdd):
            return self.mlp_bda(output, residual), context
        return residual + output, context

    def loss_rows(self, packed_seq_params: PackedSeqParams | None) -> Tensor | None:
        """int64 [A]: the tokens that this layer computes behind its attention; None = all."""
        if self.layer_number < self.config.num_layers:
            return None
        return getattr(packed_seq_params, "loss_rows", None)

    def tokens_of_rank(self, packed_seq_params: PackedSeqParams | None) -> Tensor | None:
        """bool [1, s] of this rank's part of the sequence, False for padding; None = no padding."""
        is_token: Tensor | None = getattr(packed_seq_params, "is_token", None)
        if is_token is None or not self.config.sequence_parallel:
            return is_token
        return is_token.chunk(self.config.tensor_model_parallel_size, 1)[self.tp_group.rank()]

    def checkpointed(self, mlp: Any, normed: Tensor) -> Any:
        """Calls the MLP so that the backward pass computes it again."""
        if not self.config.fp8:
            return tensor_parallel.checkpoint(mlp, False, normed)
        from megatron.core.extensions.transformer_engine import te_checkpoint

        tracker = tensor_parallel.random.get_cuda_rng_tracker
        return te_checkpoint(mlp, False, tracker, self.pg_collection.tp, normed)


def use_kernels(
    model: torch.nn.Module,
    kernels: BlockKernels,
    activation: str,
    recomputed: Collection[str],
    recompute_layers: int | None = None,
) -> None:
    """Tells all layers of a model which kernels compute them.

    Args:
        model: whose layers they are.
        kernels: of norms, rotary positions and gates.
        activation: of the gate, as `gated_activation` of the kernels names it.
        recomputed: what the backward pass computes again: norm, activation.
        recompute_layers: in how many of the first layers; None = in all.
    """
    module: Any
    for module in model.modules():
        if type(module) in (MLP, SharedExpertMLP):
            # By its class, because megatron's releases name the MLP of a layer in two ways.
            module.__class__ = GatedMLP if type(module) is MLP else GatedSharedExpert
            module.activation = activation
    layers = [module for module in model.modules() if isinstance(module, FusedTransformerLayer)]
    for layer in layers[:recompute_layers]:
        layer.recomputes_norms = "norm" in recomputed
        for module in layer.modules():
            if isinstance(module, GatedMLP):
                module.recomputes_activation = "activation" in recomputed
    for module in model.modules():
        if isinstance(module, RMSNorm | FusedSelfAttention | GatedMLP | GroupedExperts):
            module.kernels = kernels

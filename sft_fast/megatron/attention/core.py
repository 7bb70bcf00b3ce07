"""Attention over packed samples as a `core_attention` module for megatron-core layer specs.

Samples in a pack never see each other. The cost is the sum of the squared sample lengths, not the
square of the sequence's: padding is not attended at all.
"""

from collections.abc import Sequence

from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.nn import functional

from sft_fast.megatron.attention.context_parallel import ContextGroup, attend_in_context
from sft_fast.megatron.attention.dense import dense_attention
from sft_fast.megatron.attention.packed_samples import AttentionFn, PackedSamples, ScoreOptions


class PackedAttention(MegatronModule):
    """Dot-product attention, causal within each sample; grouped queries supported."""

    def __init__(
        self,
        config: object,
        layer_number: int,
        attn_mask_type: object,
        attention_type: str,
        softmax_scale: float | None = None,
        *,
        attend: AttentionFn,
        scorings: Sequence[ScoreOptions],
        context: ContextGroup | None = None,
        **kwargs: object,
    ):
        """Args:
        scorings: of all layers of the model.
        """
        super().__init__(config=config)
        assert config.attention_dropout == 0.0, "the backends have no dropout"  # type: ignore[attr-defined]
        self.scoring = scorings[layer_number - 1]
        self.attend = attend
        self.context = context

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: object = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attends within samples.

        Args:
            query: [s, b, heads / tp, head_dim].
            key: [s, b, kv_heads / tp, head_dim].
            value: like key.
            attention_mask: megatron's; None.
            attn_mask_type: megatron's; samples decide.
            attention_bias: megatron's; None.
            packed_seq_params: a `PackedSamples` (then b is 1), or None: each of the b columns is
                one sample of length s.

        Returns: [s, b, heads * head_dim / tp]; zero past the last sample.
        """
        assert attention_mask is None and attention_bias is None, "only causal masks are known"
        if packed_seq_params is None:
            return dense_attention(query, key, value, self.scoring).flatten(2)
        assert isinstance(packed_seq_params, PackedSamples) and query.shape[1] == 1
        context_size = 1 if self.context is None else self.context.size
        num_tokens = sum(packed_seq_params.seqlens) // context_size  # of this rank
        padding = query.shape[0] - num_tokens
        assert padding >= 0, (query.shape, packed_seq_params.seqlens)
        query, key, value = (tensor.squeeze(1) for tensor in (query, key, value))
        if self.context is not None:
            arguments = query, key, value, packed_seq_params, self.scoring, self.context
            output = attend_in_context(self.attend, *arguments)
        else:
            if padding:  # A slice of everything would cost its gradient a copy.
                query, key, value = query[:num_tokens], key[:num_tokens], value[:num_tokens]
            output = self.attend(query, key, value, packed_seq_params, self.scoring)
        if padding:
            output = functional.pad(output, (0, 0, 0, 0, 0, padding))
        # [tokens, heads, head_dim] -> [s, 1, heads * head_dim]
        return output.flatten(1).unsqueeze(1)

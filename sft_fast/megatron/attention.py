"""Causal attention over packed samples, as a `core_attention` module for megatron-core layer specs.

Samples in a pack never see each other. The cost is the sum of the squared sample lengths, not the
square of the row: padding rows are not attended at all.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from megatron.core.utils import divide
from torch import Tensor
from torch.nn import functional


@dataclass
class PackedSamples(PackedSeqParams):
    """What every layer must know of a micro-batch; travels in megatron's `packed_seq_params` slot.

    `qkv_format` stays "sbhd": the row is dense to megatron, only our attention sees the samples.
    """

    seqlens: tuple[int, ...] = ()
    """Tokens of each sample, in row order; their sum may be shorter than the row."""
    active_rows: Tensor | None = None
    """int64 [num_supervised]: rows that have a label."""

    @cached_property
    def groups(self) -> tuple[list[Tensor], Tensor]:
        """How attention takes the row apart and puts it together again, on the CPU.

        Returns:
            Groups of samples of similar length: row numbers int64 [samples, longest]. A shorter
            sample repeats its first row at the end; those copies come after its own rows, so that
            no row of the sample attends to them.
            The place of each row in the concatenated groups: int64 [sum of seqlens].
        """
        # A row of padding alone still attends to itself: every weight must get its (zero)
        # gradient, or DDP would wait for it.
        lengths = torch.tensor(self.seqlens or (1,))
        starts = lengths.cumsum(0) - lengths
        classes = torch.tensor([size_class(length) for length in lengths.tolist()])
        groups, order, num_places = [], torch.empty(int(lengths.sum()), dtype=torch.int64), 0
        for size in classes.unique():
            members = classes == size
            steps = torch.arange(int(lengths[members].max()))
            is_own = steps < lengths[members, None]
            rows = starts[members, None] + torch.where(is_own, steps, 0)
            places = num_places + torch.arange(rows.numel()).view_as(rows)
            order[rows[is_own]] = places[is_own]
            groups.append(rows)
            num_places += rows.numel()
        return groups, order


def size_class(length: int) -> int:
    """Rounds up to a step of 32, or of an eighth to a quarter of the length where that is more."""
    step = max(32, (1 << length.bit_length()) >> 3)
    return -(-length // step) * step


class PackedAttention(MegatronModule):
    """Scaled dot-product attention, causal within each sample; grouped queries supported."""

    def __init__(
        self,
        config: object,
        layer_number: int,
        attn_mask_type: object,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        **kwargs: object,
    ):
        super().__init__(config=config)
        head_dim = config.kv_channels  # type: ignore[attr-defined]
        self.softmax_scale = softmax_scale or 1.0 / math.sqrt(head_dim)
        dropout = config.attention_dropout  # type: ignore[attr-defined]
        self.attention_dropout = dropout if attention_dropout is None else attention_dropout
        projection = head_dim * config.num_attention_heads  # type: ignore[attr-defined]
        tensor_parallel_size = config.tensor_model_parallel_size  # type: ignore[attr-defined]
        self.hidden_size_per_partition = divide(projection, tensor_parallel_size)

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
            query: [s, b, heads / tp, head_dim]; key, value: [s, b, kv_heads / tp, head_dim].
            packed_seq_params: a `PackedSamples` (then b is 1), or None: each of the b columns is
                one sample of length s.

        Returns: [s, b, heads * head_dim / tp]; zero on rows past the last sample.
        """
        assert attention_mask is None and attention_bias is None, "only causal masks are known"
        if packed_seq_params is None:
            return self.attend(query, key, value).flatten(2)
        assert isinstance(packed_seq_params, PackedSamples) and query.shape[1] == 1
        groups, order = packed_seq_params.groups
        padding = query.shape[0] - len(order)
        assert padding >= 0, (query.shape, len(order))
        outputs = []
        for rows in groups:
            index = rows.t().flatten().to(query.device, non_blocking=True)
            parts = (tensor.squeeze(1).index_select(0, index) for tensor in (query, key, value))
            sample_parts = (part.unflatten(0, rows.t().shape) for part in parts)
            outputs.append(self.attend(*sample_parts).transpose(0, 1).flatten(0, 1))
        order = order.to(query.device, non_blocking=True)
        output = torch.cat(outputs).index_select(0, order)
        output = functional.pad(output, (0, 0, 0, 0, 0, padding))
        return output.flatten(1).unsqueeze(1)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Plain causal attention of [s, b, heads, head_dim] tensors."""
        output = functional.scaled_dot_product_attention(
            query.permute(1, 2, 0, 3),
            key.permute(1, 2, 0, 3),
            value.permute(1, 2, 0, 3),
            dropout_p=self.attention_dropout if self.training else 0.0,
            is_causal=True,
            scale=self.softmax_scale,
            enable_gqa=True,
        )
        return output.permute(2, 0, 1, 3)

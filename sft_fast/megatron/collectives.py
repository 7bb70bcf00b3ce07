"""Collectives of one tensor each, by the names that torch 2.13 gives them and older ones lack."""

from typing import Any

import torch.distributed as dist

all_gather_single: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
"""(output [size * n, ...], input [n, ...], group)."""
reduce_scatter_single: Any = (
    getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
)
"""(output [n, ...], input [size * n, ...], group); the sum."""

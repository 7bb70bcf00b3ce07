"""What adapters of every kind have in common: their names, their first values, their scale."""

import math

import torch
import xxhash
from torch import Tensor

from sft_fast.config.sections import LoraConfig
from sft_fast.megatron.hf import ADAPTER_PREFIX


def parameter_name(letter: str, projection: str) -> str:
    """The name of an adapter's matrix `letter` of a projection, such as q_proj."""
    return f"{ADAPTER_PREFIX}{letter}_{projection}"


def is_adapter(name: str) -> bool:
    """Tells adapters from other entries of a state dict, by their full name."""
    return name.rpartition(".")[2].startswith(ADAPTER_PREFIX)


def scale_of(lora: LoraConfig) -> float:
    """What the product of the two matrices is multiplied by."""
    return lora.alpha / (math.sqrt(lora.rank) if lora.rslora else lora.rank)


def initial_a(hf_name: str, rank: int, num_inputs: int, seed: int) -> Tensor:
    """[rank, num_inputs] fp32, uniform in +-1/sqrt(num_inputs): Kaiming with a = sqrt(5)."""
    digest = xxhash.xxh64_intdigest(f"{hf_name}.lora_A".encode(), seed=seed) >> 1
    generator = torch.Generator().manual_seed(digest)
    bound = 1 / math.sqrt(num_inputs)
    return torch.empty(rank, num_inputs).uniform_(-bound, bound, generator=generator)

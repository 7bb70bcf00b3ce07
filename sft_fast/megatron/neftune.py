"""NEFTune: uniform noise on the embeddings of training samples.

The noise of a token is a hash of seed, step, sample, position and channel, so that it does not
depend on the packing, on ranks or on what else was drawn. A sample of length L gets noise of at
most alpha / sqrt(L * hidden_size), as if it were alone.

Source: Jain et al. 2023, arXiv 2310.05914.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import ModuleList

from sft_fast.config.sections import TrainConfig
from sft_fast.megatron.attention.packed_samples import PackedSamples
from sft_fast.megatron.model import unwrap
from sft_fast.megatron.parallel import Parallel


class EmbeddingNoise:
    """Adds the noise of one step; `step` is set before it."""

    def __init__(self, alpha: float, seed: int, lengths: NDArray[np.integer], parallel: Parallel):
        """
        Args:
            alpha: strength.
            seed: of the run.
            lengths: [N], tokens of every sample.
            parallel: the layout.
        """
        self.alpha, self.seed, self.lengths, self.parallel = alpha, seed, lengths, parallel
        self.step = 0

    def add(self, embeddings: Tensor, position_ids: Tensor, samples: PackedSamples) -> Tensor:
        """embeddings [T or T / tp, 1, hidden_size] plus noise; padding gets none.

        Args:
            embeddings: [T or T / tp, 1, hidden_size].
            position_ids: int64 [1, T].
            samples: of the sequence.
        """
        num_tokens, hidden_size = position_ids.shape[1], embeddings.shape[2]
        keys, limits = self.keys_and_limits(position_ids[0], samples, hidden_size)  # [T] each
        if len(embeddings) < num_tokens:  # sequence parallel
            begin = self.parallel.tp_rank * len(embeddings)
            part = slice(begin, begin + len(embeddings))
            keys, limits = keys[part], limits[part]
        channels = mixed(torch.arange(hidden_size, dtype=torch.int32, device=keys.device))
        # An int32 over 2**31: uniform in [-1, 1).
        noise = mixed(keys[:, None] ^ channels).to(limits.dtype).mul_(2.0**-31)  # [T, hidden_size]
        return embeddings + noise.mul_(limits[:, None])[:, None].to(embeddings.dtype)

    def keys_and_limits(
        self, positions: Tensor, samples: PackedSamples, hidden_size: int
    ) -> tuple[Tensor, Tensor]:
        """int32 [T], the random key of each token, and fp32 [T], its largest noise.

        Args:
            positions: int64 [T], of each token in its sample.
            samples: of the sequence.
            hidden_size: channels of an embedding.
        """
        ids = samples.sample_ids
        assert ids is not None, "the micro-batch says which samples it holds"
        # Padded samples, as this context-parallel rank has them.
        padded_lengths = np.array(samples.seqlens)[: len(ids)] // self.parallel.cp_size
        lengths = self.lengths[ids].astype(np.int64)
        seeds = np.array([hash_of(self.seed, self.step, int(number)) for number in ids], np.int64)
        limits = (self.alpha / np.sqrt(np.maximum(lengths, 1) * hidden_size)).astype(np.float32)

        def by_token(values: NDArray[Any]) -> Tensor:
            """[samples] -> [T]."""
            repeated = np.zeros(len(positions), values.dtype)
            repeated[: padded_lengths.sum()] = np.repeat(values, padded_lengths)
            return torch.from_numpy(repeated).to(positions.device, non_blocking=True)

        is_token = positions < by_token(lengths)
        keys = by_token(seeds) + positions * 0x9E3779B97F4A7C
        keys = mixed((keys ^ (keys >> 32)).to(torch.int32))
        return keys, torch.where(is_token, by_token(limits), 0.0)


def hash_of(*numbers: int) -> int:
    """A hash of some numbers, 63 bits (splitmix64)."""
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) % 2**64
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ state >> 27) * 0x94D049BB133111EB % 2**64
        state ^= state >> 31
    return state >> 1


def mixed(values: Tensor) -> Tensor:
    """A hash of each value, int32 of the same shape (lowbias32); integers wrap around."""
    values = values ^ (values >> 16 & 0xFFFF)
    values = values.mul_(0x7FEB352D)
    values = values.bitwise_xor_(values >> 15 & 0x1FFFF)
    values = values.mul_(0x846CA68B - 2**32)
    return values.bitwise_xor_(values >> 16 & 0xFFFF)


def add_noise(
    model: ModuleList,
    train: TrainConfig,
    seed: int,
    lengths: NDArray[np.integer],
    parallel: Parallel,
) -> None:
    """Turns the noise on where the config asks for it; `lengths` [N] are the training samples'."""
    alpha = train.neftune_alpha
    if alpha > 0:
        for chunk in model:
            unwrap(chunk).noise = EmbeddingNoise(alpha, seed, lengths, parallel)


def begin_step(model: ModuleList, step: int) -> None:
    """Draws the noise of `step` from now on."""
    for chunk in model:
        noise = unwrap(chunk).noise
        if noise is not None:
            noise.step = step

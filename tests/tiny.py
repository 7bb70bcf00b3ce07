"""Tiny models, stores and configs that the megatron tests share."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

VOCAB_SIZE = 131  # prime: every tensor-parallel size needs padding
TWO_KINDS_OF_LAYERS: dict[str, Any] = {
    "model_type": "gemma3_text",
    "head_dim": 16,
    "sliding_window": 9,
    "layer_types": ["sliding_attention", "full_attention"],
}
"""Of a Gemma 3 of two layers, whose blocks have norms behind them too; see save_tiny_llama."""


@dataclass(frozen=True)
class ListStore:
    """A token store in memory, made of lists."""

    tokens: NDArray[np.uint32]
    supervised_bits: NDArray[np.uint8]
    offsets: NDArray[np.int64]
    files: tuple[tuple[int, str], ...] = ((0, "rows"),)
    weights: NDArray[np.float16] | None = None

    @property
    def lengths(self) -> NDArray[np.int32]:
        return np.diff(self.offsets).astype(np.int32)

    @property
    def num_supervised(self) -> NDArray[np.int32]:
        mask = np.unpackbits(self.supervised_bits, bitorder="little")[: len(self.tokens)]
        samples = np.split(mask, self.offsets[1:-1])
        return np.array([sample[1:].sum() for sample in samples], dtype=np.int32)

    @property
    def loss_weights(self) -> NDArray[np.float64] | None:
        if self.weights is None:
            return None
        mask = np.unpackbits(self.supervised_bits, bitorder="little")[: len(self.tokens)]
        mask[self.offsets[:-1]] = 0
        return np.add.reduceat(mask * self.weights.astype(np.float64), self.offsets[:-1])


def make_store(
    samples: list[tuple[list[int], list[int]]], weights: NDArray[np.float16] | None = None
) -> ListStore:
    """samples: (tokens, supervised 0/1) each; weights: float16 [total]."""
    tokens = np.concatenate([np.array(ids, dtype=np.uint32) for ids, _ in samples])
    mask = np.concatenate([np.array(bits, dtype=np.uint8) for _, bits in samples])
    offsets = np.cumsum([0, *(len(ids) for ids, _ in samples)]).astype(np.int64)
    return ListStore(tokens, np.packbits(mask, bitorder="little"), offsets, weights=weights)


def random_samples(count: int, seed: int, longest: int = 40) -> list[tuple[list[int], list[int]]]:
    """Samples whose prompts are masked; the share of supervised tokens varies wildly."""
    rng = np.random.default_rng(seed)
    samples = []
    for _ in range(count):
        length = int(rng.integers(4, longest + 1))
        prompt = int(rng.integers(1, length - 1))
        ids = rng.integers(0, VOCAB_SIZE, length).tolist()
        samples.append((ids, [0] * prompt + [1] * (length - prompt)))
    return samples


def make_config(output_dir: Path | str = "unused", **sections: dict[str, Any]) -> Any:
    """A config for a tiny fp32 model; `sections` update the sections of that name."""
    from sft_fast.config.schema import Config

    values: dict[str, Any] = {
        "output_dir": str(output_dir),
        "model": {
            "dtype": "fp32",
            "shape": {
                "hidden_size": 32,
                "num_layers": 4,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "ffn_hidden_size": 48,
                "max_position_embeddings": 128,
            },
        },
        "tokenizer": {"path": "demo"},
        "data": {"train": "demo"},
        "packing": {"capacity": 64},
        "train": {"steps": 1, "global_batch_size": 4},
        "optim": {"lr": 1e-3},
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    return Config.model_validate(values)


def save_tiny_llama(folder: Path, model_type: str = "llama", **options: Any) -> None:
    """Writes a random Llama (or other family) of transformers; weights make logits differ."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        model_type,
        hidden_size=32,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=16384,
        rms_norm_eps=1e-5,
        pad_token_id=None,  # transformers has no gradient for its embedding
        **{
            "vocab_size": VOCAB_SIZE,
            "num_hidden_layers": 4,
            "num_key_value_heads": 2,
            "initializer_range": 0.3,
            **options,
        },
    )
    model = AutoModelForCausalLM.from_config(config)
    vary_vectors(model)
    model.save_pretrained(folder)


@torch.no_grad()
def vary_vectors(model: Any) -> None:
    """Norms and biases of a model of transformers become what they are in a trained one."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if "norm" in name or "bias" in name:
            tensor.add_(torch.randn_like(tensor) * 0.1)

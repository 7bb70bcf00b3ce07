"""Facts of Primus' model presets, by the name of their file.

Source: the model files of Primus and the config.json of the models that they name.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Preset:
    """A model that a preset describes.

    Attributes:
        hub_id: The model on the Hugging Face hub, which is the default tokenizer.
        arguments: Sizes of a model without experts, as Megatron calls them; empty for all others.
    """

    hub_id: str
    arguments: dict[str, Any]


def _dense(hub_id: str, *sizes: int, theta: int, eps: float, length: int, std: float) -> Preset:
    names = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads")
    arguments = dict(zip((*names, "num_query_groups"), sizes, strict=True))
    details = {
        "init_method_std": std,
        "max_position_embeddings": length,
        "norm_epsilon": eps,
        "rotary_base": theta,
        "untie_embeddings_and_output_weights": True,
    }
    return Preset(hub_id, arguments | details)


def _llama2(name: str, *sizes: int) -> Preset:
    hub_id = f"meta-llama/Llama-2-{name}-hf"
    return _dense(hub_id, *sizes, theta=10_000, eps=1e-5, length=4096, std=0.02)


def _llama3(name: str, *sizes: int, length: int = 8192) -> Preset:
    hub_id = f"meta-llama/{name}"
    return _dense(hub_id, *sizes, theta=500_000, eps=1e-5, length=length, std=0.02)


def _qwen(name: str, *sizes: int) -> Preset:
    return _dense(f"Qwen/{name}", *sizes, theta=1_000_000, eps=1e-6, length=131_072, std=0.008)


# Layers, hidden size, MLP width, attention heads, key and value heads.
PRESETS = {
    "llama2_7B": _llama2("7b", 32, 4096, 11008, 32, 32),
    "llama2_13B": _llama2("13b", 40, 5120, 13824, 40, 40),
    "llama2_70B": _llama2("70b", 80, 8192, 28672, 64, 8),
    "llama3_8B": _llama3("Meta-Llama-3-8B", 32, 4096, 14336, 32, 8),
    "llama3_70B": _llama3("Meta-Llama-3-70B", 80, 8192, 28672, 64, 8),
    "llama3.1_8B": _llama3("Llama-3.1-8B", 32, 4096, 14336, 32, 8, length=131_072),
    "llama3.1_70B": _llama3("Llama-3.1-70B", 80, 8192, 28672, 64, 8, length=131_072),
    "llama3.1_405B": _llama3("Llama-3.1-405B", 126, 16384, 53248, 128, 8),
    "llama3.2_1B": _llama3("Llama-3.2-1B", 16, 2048, 8192, 32, 8),
    "llama3.2_3B": _llama3("Llama-3.2-3B", 28, 3072, 8192, 24, 8),
    "llama3.3_70B": _llama3("Llama-3.3-70B-Instruct", 80, 8192, 28672, 64, 8, length=131_072),
    "qwen2.5_3B": _qwen("Qwen2.5-3B", 36, 2048, 11008, 16, 2),
    "qwen2.5_7B": _qwen("Qwen2.5-7B", 28, 3584, 18944, 28, 4),
    "qwen2.5_14B": _qwen("Qwen2.5-14B", 48, 5120, 13824, 40, 8),
    "qwen2.5_32B": _qwen("Qwen2.5-32B", 64, 5120, 27648, 40, 8),
    "qwen2.5_72B": _qwen("Qwen2.5-72B", 80, 8192, 29568, 64, 8),
    # The models have norms of queries and keys, or heads of another size, and so no shape here.
    "qwen3_4B": Preset("Qwen/Qwen3-4B", {}),
    "qwen3_8B": Preset("Qwen/Qwen3-8B", {}),
    "qwen3_14B": Preset("Qwen/Qwen3-14B", {}),
    "qwen3_32B": Preset("Qwen/Qwen3-32B", {}),
    "qwen3_30B_A3B": Preset("Qwen/Qwen3-30B-A3B", {}),
    "qwen3_235B_A22B": Preset("Qwen/Qwen3-235B-A22B", {}),
    "qwen3_235B_A22B_4layer": Preset("Qwen/Qwen3-235B-A22B", {}),
    "mixtral_8x7B_v0.1": Preset("mistralai/Mixtral-8x7B-v0.1", {}),
    "mixtral_8x22B_v0.1": Preset("mistralai/Mixtral-8x22B-v0.1", {}),
    "deepseek_v2": Preset("deepseek-ai/DeepSeek-V2", {}),
    "deepseek_v2_lite": Preset("deepseek-ai/DeepSeek-V2-Lite", {}),
    "deepseek_v3": Preset("deepseek-ai/DeepSeek-V3", {}),
}

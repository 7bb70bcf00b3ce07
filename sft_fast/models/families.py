"""The supported families of Hugging Face models: options they have, and their weights.

Each family has one table: which Hugging Face tensors make up each megatron parameter of a layer,
their shapes, and how tensor-parallel ranks split the parameter.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Split = Literal["replicated", "vocab", "rows", "columns", "qkv"]
"""rows: each block by rows; columns: by columns; qkv: by query groups, each of which has its
queries, key and value next to each other; vocab: by rows of the padded vocabulary."""


@dataclass(frozen=True)
class Rule:
    """How one megatron parameter is made of Hugging Face tensors.

    A source has the sizes of its dimensions by name. Rows such as "ffn+ffn" are blocks one after
    the other, which the parameter holds as if they were tensors of their own. `*` stands for the
    number of an expert: the parameter has a matrix for each of a rank's experts.
    """

    split: Split
    sources: Mapping[str, tuple[str, ...]]
    is_expert: bool = False
    matrix: int | None = None
    """Of an expert's rule: which of the parameter's matrices is meant."""


def replicated(name: str, *shape: str) -> Rule:
    """A parameter that every tensor-parallel rank has whole."""
    return Rule("replicated", {name: shape})


MODEL = {
    "embedding.word_embeddings.weight": Rule(
        "vocab", {"model.embed_tokens.weight": ("vocab", "hidden")}
    ),
    "decoder.final_layernorm.weight": replicated("model.norm.weight", "hidden"),
    "output_layer.weight": Rule("vocab", {"lm_head.weight": ("vocab", "hidden")}),
}
ATTENTION = {
    "input_layernorm.weight": replicated("input_layernorm.weight", "hidden"),
    "self_attention.linear_qkv.weight": Rule(
        "qkv",
        {
            "self_attn.q_proj.weight": ("queries", "hidden"),
            "self_attn.k_proj.weight": ("keys", "hidden"),
            "self_attn.v_proj.weight": ("keys", "hidden"),
        },
    ),
    "self_attention.linear_proj.weight": Rule(
        "columns", {"self_attn.o_proj.weight": ("hidden", "queries")}
    ),
    "pre_mlp_layernorm.weight": replicated("post_attention_layernorm.weight", "hidden"),
}
LLAMA = ATTENTION | {
    "mlp.linear_fc1.weight": Rule(
        "rows",
        {"mlp.gate_proj.weight": ("ffn", "hidden"), "mlp.up_proj.weight": ("ffn", "hidden")},
    ),
    "mlp.linear_fc2.weight": Rule("columns", {"mlp.down_proj.weight": ("hidden", "ffn")}),
}
QKV_BIAS = {
    "self_attention.linear_qkv.bias": Rule(
        "qkv",
        {
            "self_attn.q_proj.bias": ("queries",),
            "self_attn.k_proj.bias": ("keys",),
            "self_attn.v_proj.bias": ("keys",),
        },
    )
}
QK_NORM = {
    "self_attention.q_layernorm.weight": replicated("self_attn.q_norm.weight", "head"),
    "self_attention.k_layernorm.weight": replicated("self_attn.k_norm.weight", "head"),
}
FUSED = {
    "self_attention.linear_qkv.weight": Rule(
        "qkv", {"self_attn.qkv_proj.weight": ("queries+keys+keys", "hidden")}
    ),
    "mlp.linear_fc1.weight": Rule("rows", {"mlp.gate_up_proj.weight": ("ffn+ffn", "hidden")}),
}
POST_NORMS = {
    "self_attn_bda.weight": replicated("post_attention_layernorm.weight", "hidden"),
    "pre_mlp_layernorm.weight": replicated("pre_feedforward_layernorm.weight", "hidden"),
    "mlp_bda.weight": replicated("post_feedforward_layernorm.weight", "hidden"),
}


def experts(block: str, gate: str, up: str, down: str) -> dict[str, Rule]:
    """A router and experts in place of the MLP."""
    names = {key: f"{block}.experts.*.{key}.weight" for key in (gate, up, down)}
    return {
        "mlp.router.weight": replicated(f"{block}.gate.weight", "experts", "hidden"),
        "mlp.experts.gate_up": Rule(
            "rows", {names[gate]: ("ffn", "hidden"), names[up]: ("ffn", "hidden")}, is_expert=True
        ),
        "mlp.experts.down": Rule("columns", {names[down]: ("hidden", "ffn")}, is_expert=True),
    }


@dataclass(frozen=True)
class Family:
    """What sets a family of models apart from Llama."""

    layer: Mapping[str, Rule] = field(default_factory=lambda: LLAMA)
    """The parameters of a layer."""
    fixed: tuple[tuple[str, Any], ...] = ()
    """Keys of config.json whose other values we would compute wrongly."""
    activation: tuple[str, str] = ("hidden_act", "silu")
    """Key of config.json that names the activation function, and its value."""
    is_gemma: bool = False
    """Norms multiply by 1 + weight and also follow attention and MLP; embeddings are scaled."""
    experts_of: str | None = None
    """Key of config.json with the width of an expert; None = no experts."""
    window_period: int | None = None
    """Every n-th layer sees the whole sample, where config.json has no layer_types."""
    no_rope_period: int | None = None
    """Every n-th layer knows no positions, where config.json has no no_rope_layers."""

    @property
    def qkv_bias(self) -> bool:
        """Whether the projections to queries, keys and values have biases."""
        return "self_attention.linear_qkv.bias" in self.layer

    @property
    def is_fused(self) -> bool:
        """Queries, keys and values are one Hugging Face tensor."""
        return len(self.layer["self_attention.linear_qkv.weight"].sources) == 1

    @property
    def projections(self) -> tuple[str, ...]:
        """Matrices of a layer that adapters can stand beside, but for those of experts."""
        rules = [] if self.is_fused else [r for r in self.layer.values() if not r.is_expert]
        names = [name.removesuffix(".weight") for rule in rules for name in rule.sources]
        return tuple(name for name in names if name.endswith("_proj"))

    @property
    def qk_norm(self) -> bool:
        """Whether queries and keys are normalised."""
        return "self_attention.q_layernorm.weight" in self.layer


NO_BIAS = (("attention_bias", False), ("mlp_bias", False))
GEMMA_FIXED = (("attention_bias", False), ("use_bidirectional_attention", False))
FAMILIES = {
    "LlamaForCausalLM": Family(fixed=NO_BIAS),
    "MistralForCausalLM": Family(),
    "Qwen2ForCausalLM": Family(LLAMA | QKV_BIAS, (("use_sliding_window", False),)),
    "Qwen3ForCausalLM": Family(
        LLAMA | QK_NORM, (("attention_bias", False), ("use_sliding_window", False))
    ),
    "Qwen3MoeForCausalLM": Family(
        ATTENTION | QK_NORM | experts("mlp", "gate_proj", "up_proj", "down_proj"),
        (
            ("attention_bias", False),
            ("use_sliding_window", False),
            ("mlp_only_layers", []),
            ("decoder_sparse_step", 1),
        ),
        experts_of="moe_intermediate_size",
    ),
    "MixtralForCausalLM": Family(
        ATTENTION | experts("block_sparse_moe", "w1", "w3", "w2"),
        (("router_jitter_noise", 0.0),),
        experts_of="intermediate_size",
    ),
    "Gemma2ForCausalLM": Family(
        LLAMA | POST_NORMS,
        GEMMA_FIXED,
        ("hidden_activation", "gelu_pytorch_tanh"),
        is_gemma=True,
        window_period=2,
    ),
    "Gemma3ForCausalLM": Family(
        LLAMA | POST_NORMS | QK_NORM,
        GEMMA_FIXED,
        ("hidden_activation", "gelu_pytorch_tanh"),
        is_gemma=True,
        window_period=6,
    ),
    "Phi3ForCausalLM": Family(LLAMA | FUSED, (("resid_pdrop", 0.0), ("embd_pdrop", 0.0))),
    "SmolLM3ForCausalLM": Family(fixed=(*NO_BIAS, ("use_sliding_window", False)), no_rope_period=4),
}
REFUSED = {
    "GptOssForCausalLM": "attention sinks and experts in MXFP4 are not supported",
    "Gemma3ForConditionalGeneration": (
        "images are not supported; use a checkpoint of the text model alone (Gemma3ForCausalLM), "
        "made of this one's language_model: from_pretrained of that class takes none of its tensors"
    ),
}

"""The supported families of Hugging Face models: options they have, and their weights.

Each family has one table: which Hugging Face tensors make up each megatron parameter of a layer,
their shapes, and how tensor-parallel ranks split the parameter. Import, export, random weights, the
count of parameters and the parts of a layer follow from it. What else sets a family apart is a
field of `Traits`, and the family's `own_fields` reads it from config.json.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

SIZE_FIELDS = {
    "vocab": "vocab_size",
    "outputs": "num_outputs",
    "hidden": "hidden_size",
    "queries": "query_size",
    "keys": "key_size",
    "head": "head_dim",
    "ffn": "ffn_hidden_size",
    "experts": "num_experts",
}
"""Names of dimensions in the tables -> the attributes of an `Architecture` that hold the sizes."""
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
    initial: float | None = None
    """All values of a vector in a model of random weights; None = those of a norm that changes
    nothing. Matrices are random."""
    matrix: int | None = None
    """Of an expert's rule: which of the parameter's matrices is meant."""


def replicated(name: str, *shape: str) -> Rule:
    """A parameter that every tensor-parallel rank has whole."""
    return Rule("replicated", {name: shape})


HEAD = "output_layer.weight"
MODEL = {
    "embedding.word_embeddings.weight": Rule(
        "vocab", {"model.embed_tokens.weight": ("vocab", "hidden")}
    ),
    "decoder.final_layernorm.weight": replicated("model.norm.weight", "hidden"),
    HEAD: Rule("vocab", {"lm_head.weight": ("vocab", "hidden")}),
}
OUTPUT_HEAD = replicated("score.weight", "outputs", "hidden")
"""HEAD where it is no LM head, as in transformers' ...ForSequenceClassification."""
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
        initial=0.0,
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


@dataclass(frozen=True, kw_only=True)
class Traits:
    """What sets a model's layers apart from Llama's, beside the table; Llama's are the defaults."""

    has_zero_centered_norms: bool = False
    """Norms multiply by 1 + weight, in fp32."""
    embedding_scale: float = 1.0
    """Factor of what the embedding gives, rounded to the type of the weights."""
    attention_scale: float | None = None
    """Factor of the attention scores; None = 1 / sqrt(head_dim)."""
    attention_softcap: float | None = None
    """Bound c of the attention scores c * tanh(scores / c); None = none."""
    logit_softcap: float | None = None
    """The same for the logits."""


def no_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Of a family that config.json describes in the usual keys."""
    return {}


@dataclass(frozen=True)
class Family:
    """What sets a family of models apart from Llama."""

    layer: Mapping[str, Rule] = field(default_factory=lambda: LLAMA)
    """The parameters of a layer."""
    fixed: tuple[tuple[str, Any], ...] = ()
    """Keys of config.json whose other values we would compute wrongly."""
    activation: tuple[str, str] = ("hidden_act", "silu")
    """Key of config.json that names the activation function, and its value."""
    own_fields: Callable[[Mapping[str, Any]], dict[str, Any]] = no_fields
    """From config.json: fields of `Architecture`, traits and others, that only this family has or
    that it spells in its own way."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """What transformers takes for keys that a config.json does not have, where it matters to what
    we compute; config_defaults.py has those of all."""
    experts_of: str | None = None
    """Key of config.json with the width of an expert; None = no experts."""
    window_period: int | None = None
    """Every n-th layer sees the whole sample, where config.json has no layer_types."""
    no_rope_period: int | None = None
    """Every n-th layer knows no positions, where config.json has no no_rope_layers."""

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


def gemma_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Soft caps are Gemma 2's alone."""
    return {
        "has_zero_centered_norms": True,
        "embedding_scale": math.sqrt(config["hidden_size"]),
        "attention_scale": config["query_pre_attn_scalar"] ** -0.5,
        "attention_softcap": config.get("attn_logit_softcapping"),
        "logit_softcap": config.get("final_logit_softcapping"),
    }


NO_BIAS = (("attention_bias", False), ("mlp_bias", False))
GEMMA_FIXED = (("attention_bias", False), ("use_bidirectional_attention", False))
GEMMA_DEFAULTS: dict[str, Any] = {
    "head_dim": 256,
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}
NO_WINDOW_DEFAULT = {"use_sliding_window": False}
QWEN_DEFAULTS: dict[str, Any] = {
    "max_position_embeddings": 32768,
    "num_key_value_heads": 32,
    **NO_WINDOW_DEFAULT,
}
MISTRAL_DEFAULTS: dict[str, Any] = {"max_position_embeddings": 131072, "num_key_value_heads": 8}
FAMILIES = {
    "LlamaForCausalLM": Family(fixed=NO_BIAS, defaults={"max_position_embeddings": 2048}),
    "MistralForCausalLM": Family(defaults=MISTRAL_DEFAULTS | {"sliding_window": 4096}),
    "Qwen2ForCausalLM": Family(
        LLAMA | QKV_BIAS, (("use_sliding_window", False),), defaults=QWEN_DEFAULTS
    ),
    "Qwen3ForCausalLM": Family(
        LLAMA | QK_NORM,
        (("attention_bias", False), ("use_sliding_window", False)),
        defaults=QWEN_DEFAULTS | {"head_dim": 128},
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
        defaults=QWEN_DEFAULTS
        | {
            "num_key_value_heads": 4,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
            "norm_topk_prob": False,
        },
    ),
    "MixtralForCausalLM": Family(
        ATTENTION | experts("block_sparse_moe", "w1", "w3", "w2"),
        (("router_jitter_noise", 0.0),),
        experts_of="intermediate_size",
        defaults=MISTRAL_DEFAULTS
        | {"rms_norm_eps": 1e-5, "rope_theta": 1e6, "num_experts_per_tok": 2},
    ),
    "Gemma2ForCausalLM": Family(
        LLAMA | POST_NORMS,
        GEMMA_FIXED,
        ("hidden_activation", "gelu_pytorch_tanh"),
        own_fields=gemma_fields,
        window_period=2,
        defaults=GEMMA_DEFAULTS
        | {
            "max_position_embeddings": 8192,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
    ),
    "Gemma3ForCausalLM": Family(
        LLAMA | POST_NORMS | QK_NORM,
        GEMMA_FIXED,
        ("hidden_activation", "gelu_pytorch_tanh"),
        own_fields=gemma_fields,
        window_period=6,
        defaults=GEMMA_DEFAULTS
        | {
            "max_position_embeddings": 131072,
            "rope_theta": 1e6,
            "rope_local_base_freq": 10000.0,
        },
    ),
    "Phi3ForCausalLM": Family(
        LLAMA | FUSED,
        (("resid_pdrop", 0.0), ("embd_pdrop", 0.0)),
        defaults={
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
        },
    ),
    "SmolLM3ForCausalLM": Family(
        fixed=(*NO_BIAS, ("use_sliding_window", False)),
        no_rope_period=4,
        defaults={
            "max_position_embeddings": 32768,
            "num_key_value_heads": 4,
            "rope_theta": 2e6,
            "tie_word_embeddings": True,
            **NO_WINDOW_DEFAULT,
        },
    ),
}
REFUSED = {
    "GptOssForCausalLM": "attention sinks and experts in MXFP4 are not supported",
    "Gemma3ForConditionalGeneration": (
        "images are not supported; use a checkpoint of the text model alone (Gemma3ForCausalLM), "
        "made of this one's language_model: from_pretrained of that class takes none of its tensors"
    ),
}

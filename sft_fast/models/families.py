"""The supported families of Hugging Face models: options they have, and their weights.

Each family has one table: which Hugging Face tensors make up each megatron parameter of a layer,
their shapes, and how tensor-parallel ranks split the parameter. Import, export, random weights, the
count of parameters and the parts of a layer follow from it. What else sets a family apart is a
field of `Traits`, and the family's `own_fields` reads it from config.json.
"""

import math
from collections.abc import Callable, Collection, Mapping
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
    "values": "value_size",
    "query_rank": "query_rank",
    "kv_rank": "kv_rank",
    "rope": "rope_dim",
    "latent_keys_values": "latent_key_value_size",
    "dense_ffn": "dense_ffn_size",
    "shared_ffn": "shared_ffn_size",
    "experts": "num_experts",
}
"""Names of dimensions in the tables -> the attributes of an `Architecture` that hold the sizes; the
dimension "1" is one row."""
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
    is_buffer: bool = False
    """No gradient changes it; fp32 in memory and in files."""
    matrix: int | None = None
    """Of an expert's rule: which of the parameter's matrices is meant."""


def replicated(name: str, *shape: str) -> Rule:
    """A parameter that every tensor-parallel rank has whole."""
    return Rule("replicated", {name: shape})


HEAD = "output_layer.weight"
EXPERT_BIAS = "mlp.router.expert_bias"
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


def gated_mlp(parameter: str, block: str, width: str) -> dict[str, Rule]:
    """An MLP: the prefixes of megatron's names and of Hugging Face's, and its width."""
    gate, up = f"{block}.gate_proj.weight", f"{block}.up_proj.weight"
    return {
        f"{parameter}.linear_fc1.weight": Rule(
            "rows", {gate: (width, "hidden"), up: (width, "hidden")}
        ),
        f"{parameter}.linear_fc2.weight": Rule(
            "columns", {f"{block}.down_proj.weight": ("hidden", width)}
        ),
    }


LLAMA = ATTENTION | gated_mlp("mlp", "mlp", "ffn")
DENSE_MLP = gated_mlp("mlp", "mlp", "dense_ffn")
"""Of a layer without experts in a model that has layers with them."""
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
WIDE_QK_NORM = {
    "self_attention.query_norm.weight": Rule("rows", {"self_attn.q_norm.weight": ("queries",)}),
    "self_attention.key_norm.weight": Rule("rows", {"self_attn.k_norm.weight": ("keys",)}),
}
"""Over all heads together, where QK_NORM is over one."""
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


LATENT_ATTENTION = {
    "input_layernorm.weight": replicated("input_layernorm.weight", "hidden"),
    "self_attention.linear_kv_down_proj.weight": replicated(
        "self_attn.kv_a_proj_with_mqa.weight", "kv_rank+rope", "hidden"
    ),
    "self_attention.kv_layernorm.weight": replicated("self_attn.kv_a_layernorm.weight", "kv_rank"),
    "self_attention.linear_kv_up_proj.weight": Rule(
        "rows", {"self_attn.kv_b_proj.weight": ("latent_keys_values", "kv_rank")}
    ),
    "self_attention.linear_proj.weight": Rule(
        "columns", {"self_attn.o_proj.weight": ("hidden", "values")}
    ),
    "pre_mlp_layernorm.weight": replicated("post_attention_layernorm.weight", "hidden"),
}
LATENT_QUERIES = {
    "self_attention.linear_q_down_proj.weight": replicated(
        "self_attn.q_a_proj.weight", "query_rank", "hidden"
    ),
    "self_attention.q_layernorm.weight": replicated("self_attn.q_a_layernorm.weight", "query_rank"),
    "self_attention.linear_q_up_proj.weight": Rule(
        "rows", {"self_attn.q_b_proj.weight": ("queries", "query_rank")}
    ),
}
PLAIN_QUERIES = {
    "self_attention.linear_q_proj.weight": Rule(
        "rows", {"self_attn.q_proj.weight": ("queries", "hidden")}
    )
}
SHARED_EXPERTS = gated_mlp("mlp.shared_experts", "mlp.shared_experts", "shared_ffn")
QWEN_EXPERTS = experts("mlp", "gate_proj", "up_proj", "down_proj")
SHARED_EXPERT = gated_mlp("mlp.shared_experts", "mlp.shared_expert", "shared_ffn") | {
    "mlp.shared_experts.gate_weight": replicated("mlp.shared_expert_gate.weight", "1", "hidden")
}
"""An expert for every token, whose output a gate scales."""


def expert_bias(name: str) -> dict[str, Rule]:
    """What is added to the scores of a router for the choice of experts, under that name."""
    sources = {name: ("experts",)}
    return {EXPERT_BIAS: Rule("replicated", sources, initial=0.0, is_buffer=True)}


SIGMOID_BIAS = expert_bias("mlp.gate.e_score_correction_bias")


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
    """The parameters of a layer, of one with experts where some layers have none."""
    dense_mlp: Mapping[str, Rule] | None = None
    """What takes the place of the MLP, in a layer without experts; None = all layers are alike."""
    options: Mapping[str, tuple[Mapping[str, Rule], Mapping[str, Rule]]] = field(
        default_factory=dict
    )
    """Keys of config.json -> what a layer has besides where they are set, and where they are not
    (absent, null, false)."""
    sizes: tuple[str, ...] = ()
    """Further keys of config.json that must be whole numbers above 0."""
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

    def layer_of(self, options: Collection[str], is_dense: bool = False) -> dict[str, Rule]:
        """The parameters of a layer.

        Args:
            options: keys of config.json that are set.
            is_dense: it has no experts, where others have.
        """
        layer = dict(self.layer)
        for key, (where_set, elsewhere) in self.options.items():
            layer |= where_set if key in options else elsewhere
        if not is_dense or self.dense_mlp is None:
            return layer
        rest = {name: rule for name, rule in layer.items() if not name.startswith("mlp.")}
        return {**rest, **self.dense_mlp}

    @property
    def projections(self) -> tuple[str, ...]:
        """Matrices of a layer that adapters can stand beside; see `projections_of`."""
        return projections_of(self.layer)


def projections_of(layer: Mapping[str, Rule]) -> tuple[str, ...]:
    """Matrices of a layer that adapters can stand beside, none that every tensor-parallel rank has
    whole; * is the number of an expert."""
    return tuple(
        name.removesuffix(".weight")
        for rule in layer.values()
        if rule.split != "replicated"
        for name in rule.sources
        if rule.is_expert or name.endswith("_proj.weight")
    )


def latent_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Latent attention; YaRN's mscale_all_dim sharpens its scores."""
    head_dim = config["qk_nope_head_dim"] + config["qk_rope_head_dim"]
    scale = head_dim**-0.5
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    is_scaled = rope.get("rope_type", rope.get("type", "default")) != "default"
    if is_scaled and rope.get("mscale_all_dim") and rope["factor"] > 1:
        scale *= (0.1 * rope["mscale_all_dim"] * math.log(rope["factor"]) + 1.0) ** 2
    return {
        "head_dim": head_dim,
        "num_key_value_heads": config["num_attention_heads"],
        "kv_rank": config["kv_lora_rank"],
        "query_rank": config["q_lora_rank"] or 0,
        "rope_dim": config["qk_rope_head_dim"],
        "value_head_dim": config["v_head_dim"],
        "rotates_neighbours": config.get("rope_interleave", True),
        "attention_scale": scale,
    }


def deepseek2_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Latent attention, and groups of experts where topk_method says so."""
    method = config["topk_method"]
    if method not in ("greedy", "group_limited_greedy"):
        raise ValueError(
            f"config.json: topk_method is {method!r}; supported: 'greedy', 'group_limited_greedy'"
        )
    fields = latent_fields(config) | {"router_scale": config["routed_scaling_factor"]}
    if method == "greedy":
        return fields
    groups = {"router_groups": config["n_group"], "router_groups_chosen": config["topk_group"]}
    return fields | groups | {"scores_of_group": 1}


def sigmoid_router_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """The router of DeepSeek V3, and its layers that predict later tokens."""
    return {
        "router_scores": "sigmoid",
        "router_scale": config["routed_scaling_factor"],
        "router_groups": config["n_group"] or 1,
        "router_groups_chosen": config["topk_group"] or 1,
        "num_mtp_layers": config.get("num_nextn_predict_layers") or 0,
    }


def deepseek3_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Latent attention, and a router of its own."""
    return latent_fields(config) | sigmoid_router_fields(config)


def glm_lite_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """As DeepSeek V3, with a list of the layers that have experts."""
    types = config.get("mlp_layer_types")
    if types is None:
        types = ["dense", *["sparse"] * (config["num_hidden_layers"] - 1)]
    dense = frozenset(layer for layer, kind in enumerate(types) if kind != "sparse")
    return deepseek3_fields(config) | {"dense_layers": dense}


def gemma_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Soft caps are Gemma 2's alone."""
    return {
        "has_zero_centered_norms": True,
        "embedding_scale": math.sqrt(config["hidden_size"]),
        "attention_scale": config["query_pre_attn_scalar"] ** -0.5,
        "attention_softcap": config.get("attn_logit_softcapping"),
        "logit_softcap": config.get("final_logit_softcapping"),
    }


def minimax_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Its router, which config.json does not describe, and its own key of partial rotation."""
    fields: dict[str, Any] = {"router_scores": "sigmoid"}
    rope = config.get("rope_parameters") or {}
    if "rotary_dim" in config and "partial_rotary_factor" not in {**rope, **config}:
        fields["rotary_fraction"] = config["rotary_dim"] / config["head_dim"]
    return fields


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
LATENT_SIZES = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
LATENT_DEFAULTS: dict[str, Any] = {
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
MISTRAL_DEFAULTS: dict[str, Any] = {"max_position_embeddings": 131072, "num_key_value_heads": 8}
FAMILIES = {
    "LlamaForCausalLM": Family(fixed=NO_BIAS, defaults={"max_position_embeddings": 2048}),
    "MistralForCausalLM": Family(defaults=MISTRAL_DEFAULTS | {"sliding_window": 4096}),
    "Qwen2ForCausalLM": Family(
        LLAMA | QKV_BIAS, fixed=(("use_sliding_window", False),), defaults=QWEN_DEFAULTS
    ),
    "Qwen3ForCausalLM": Family(
        LLAMA | QK_NORM,
        fixed=(("attention_bias", False), ("use_sliding_window", False)),
        defaults=QWEN_DEFAULTS | {"head_dim": 128},
    ),
    "Qwen2MoeForCausalLM": Family(
        ATTENTION | QKV_BIAS | QWEN_EXPERTS | SHARED_EXPERT,
        DENSE_MLP,
        fixed=(("qkv_bias", True), ("use_sliding_window", False)),
        experts_of="moe_intermediate_size",
        defaults=QWEN_DEFAULTS
        | {
            "num_key_value_heads": 16,
            "num_experts": 60,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
            "norm_topk_prob": False,
            "qkv_bias": True,
        },
    ),
    "Qwen3MoeForCausalLM": Family(
        ATTENTION | QK_NORM | QWEN_EXPERTS,
        DENSE_MLP,
        fixed=(("attention_bias", False), ("use_sliding_window", False)),
        experts_of="moe_intermediate_size",
        defaults=QWEN_DEFAULTS
        | {
            "num_key_value_heads": 4,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
            "norm_topk_prob": False,
        },
    ),
    "DeepseekV2ForCausalLM": Family(
        LATENT_ATTENTION | QWEN_EXPERTS | SHARED_EXPERTS,
        DENSE_MLP,
        {"q_lora_rank": (LATENT_QUERIES, PLAIN_QUERIES)},
        LATENT_SIZES,
        fixed=(
            ("attention_bias", False),
            ("norm_topk_prob", False),
            ("moe_layer_freq", 1),
            ("scoring_func", "softmax"),
        ),
        own_fields=deepseek2_fields,
        experts_of="moe_intermediate_size",
        defaults=LATENT_DEFAULTS
        | {
            "max_position_embeddings": 2048,
            "n_routed_experts": 64,
            "n_shared_experts": 2,
            "moe_intermediate_size": 1407,
            "first_k_dense_replace": 0,
            "norm_topk_prob": False,
            "routed_scaling_factor": 1.0,
            "topk_method": "greedy",
        },
    ),
    "DeepseekV3ForCausalLM": Family(
        LATENT_ATTENTION | QWEN_EXPERTS | SHARED_EXPERTS | SIGMOID_BIAS,
        DENSE_MLP,
        {"q_lora_rank": (LATENT_QUERIES, PLAIN_QUERIES)},
        LATENT_SIZES,
        fixed=(
            ("attention_bias", False),
            ("topk_method", "noaux_tc"),
            ("moe_layer_freq", 1),
            ("scoring_func", "sigmoid"),
        ),
        own_fields=deepseek3_fields,
        experts_of="moe_intermediate_size",
        defaults=LATENT_DEFAULTS
        | {
            "max_position_embeddings": 4096,
            "n_routed_experts": 256,
            "n_shared_experts": 1,
            "moe_intermediate_size": 2048,
            "num_experts_per_tok": 8,
            "n_group": 8,
            "topk_group": 4,
            "first_k_dense_replace": 3,
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.5,
            "num_nextn_predict_layers": 1,
        },
    ),
    "Glm4MoeLiteForCausalLM": Family(
        LATENT_ATTENTION | QWEN_EXPERTS | SHARED_EXPERTS | SIGMOID_BIAS,
        DENSE_MLP,
        {"q_lora_rank": (LATENT_QUERIES, PLAIN_QUERIES)},
        LATENT_SIZES,
        fixed=(("attention_bias", False),),
        own_fields=glm_lite_fields,
        experts_of="moe_intermediate_size",
        defaults={
            "max_position_embeddings": 202752,
            "rms_norm_eps": 1e-5,
            "kv_lora_rank": 512,
            "q_lora_rank": 768,
            "qk_nope_head_dim": 192,
            "qk_rope_head_dim": 64,
            "v_head_dim": 256,
            "n_routed_experts": 64,
            "n_shared_experts": 1,
            "moe_intermediate_size": 1536,
            "num_experts_per_tok": 4,
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": True,
            "routed_scaling_factor": 1.8,
        },
    ),
    "Glm4MoeForCausalLM": Family(
        ATTENTION | QWEN_EXPERTS | SHARED_EXPERTS | SIGMOID_BIAS,
        DENSE_MLP,
        {"attention_bias": (QKV_BIAS, {}), "use_qk_norm": (QK_NORM, {})},
        own_fields=sigmoid_router_fields,
        experts_of="moe_intermediate_size",
        defaults={
            "max_position_embeddings": 131072,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-5,
            "partial_rotary_factor": 0.5,
            "n_routed_experts": 128,
            "n_shared_experts": 1,
            "moe_intermediate_size": 1408,
            "num_experts_per_tok": 8,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "norm_topk_prob": True,
            "routed_scaling_factor": 1.0,
            "num_nextn_predict_layers": 1,
        },
    ),
    "MixtralForCausalLM": Family(
        ATTENTION | experts("block_sparse_moe", "w1", "w3", "w2"),
        fixed=(("router_jitter_noise", 0.0),),
        experts_of="intermediate_size",
        defaults=MISTRAL_DEFAULTS
        | {"rms_norm_eps": 1e-5, "rope_theta": 1e6, "num_experts_per_tok": 2},
    ),
    "OlmoeForCausalLM": Family(
        ATTENTION | WIDE_QK_NORM | QWEN_EXPERTS,
        fixed=(("attention_bias", False), ("clip_qkv", None)),
        experts_of="intermediate_size",
        defaults={
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "num_experts_per_tok": 8,
            "norm_topk_prob": False,
        },
    ),
    "MiniMaxM2ForCausalLM": Family(
        ATTENTION
        | WIDE_QK_NORM
        | experts("block_sparse_moe", "w1", "w3", "w2")
        | expert_bias("block_sparse_moe.e_score_correction_bias"),
        fixed=(("router_jitter_noise", 0.0),),
        experts_of="intermediate_size",
        own_fields=minimax_fields,
        defaults={
            "head_dim": 128,
            "max_position_embeddings": 196608,
            "num_key_value_heads": 8,
            "rope_theta": 5e6,
            "num_experts_per_tok": 8,
        },
    ),
    "Gemma2ForCausalLM": Family(
        LLAMA | POST_NORMS,
        fixed=GEMMA_FIXED,
        activation=("hidden_activation", "gelu_pytorch_tanh"),
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
        fixed=GEMMA_FIXED,
        activation=("hidden_activation", "gelu_pytorch_tanh"),
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
        fixed=(("resid_pdrop", 0.0), ("embd_pdrop", 0.0)),
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
    "DeepseekV32ForCausalLM": "attention to tokens that an indexer chooses is not supported",
    "GlmMoeDsaForCausalLM": "attention to tokens that an indexer chooses is not supported",
    "Gemma3ForConditionalGeneration": (
        "images are not supported; use a checkpoint of the text model alone (Gemma3ForCausalLM), "
        "made of this one's language_model: from_pretrained of that class takes none of its tensors"
    ),
}

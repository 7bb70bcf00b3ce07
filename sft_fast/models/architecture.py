"""The model's architecture as plain numbers, from and to a Hugging Face config.json."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from sft_fast.config.sections import ShapeConfig
from sft_fast.constants import round_up
from sft_fast.kernels.routing import RouterScores, Routing
from sft_fast.models.config_defaults import SIZES, with_defaults
from sft_fast.models.families import (
    EXPERT_BIAS,
    FAMILIES,
    REFUSED,
    SIZE_FIELDS,
    Family,
    Rule,
    Traits,
    projections_of,
)
from sft_fast.models.rope import RopeScaling, rope_scaling


@dataclass(frozen=True)
class Architecture(Traits):
    """A decoder with RMSNorm, rotary positions, grouped queries and a gated MLP or experts."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    ffn_hidden_size: int
    """Width of the MLP, or of one expert."""
    head_dim: int
    max_position_embeddings: int
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    """How the rotary frequencies change for long samples; None = they do not."""
    local_rope_theta: float | None = None
    """Of the layers with a sliding window, which then have no scaling; None = as the others."""
    rotary_fraction: float = 1.0
    """Share of a head's channels that are rotated."""
    layers_without_rope: frozenset[int] = frozenset()
    """Layers, counted from 0, that know no positions."""
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    sliding_window: int | None = None
    """Tokens that a token attends to, itself and those before it; None = all."""
    layers_without_window: frozenset[int] = frozenset()
    """Layers, counted from 0, that attend to the whole sample all the same."""
    activation: Literal["silu", "gelu_tanh"] = "silu"
    num_experts: int = 0
    """Experts per layer; 0 = a dense MLP."""
    dense_layers: frozenset[int] = frozenset()
    """Layers, counted from 0, that have an MLP in place of experts."""
    dense_ffn_size: int = 0
    """Width of their MLP."""
    shared_ffn_size: int = 0
    """Width of the expert that every token has; 0 = there is none."""
    experts_per_token: int = 0
    renormalise_experts: bool = False
    """The weights of a token's experts add up to 1."""
    kv_rank: int = 0
    """Width of the vector that keys and values of latent attention are made of; 0 = they are made
    of the hidden state, as usual."""
    query_rank: int = 0
    """The same of queries; 0 = they are made of the hidden state."""
    rope_dim: int = 0
    """Channels at the end of a head that latent attention rotates."""
    value_head_dim: int = 0
    """Channels of a head's value; 0 = head_dim."""
    rotates_neighbours: bool = False
    """Channels 2 i and 2 i + 1 are rotated together, not i and i + n."""
    router_scores: RouterScores = "softmax"
    """Of an expert among all; sigmoid = by its own logit alone."""
    router_scale: float = 1.0
    """Factor of the weights of a token's experts."""
    router_groups: int = 1
    """Groups of neighbouring experts."""
    router_groups_chosen: int = 1
    """Groups that the experts of a token come from."""
    scores_of_group: int = 2
    """Highest scores of a group that decide whether it is one of them."""
    num_outputs: int | None = None
    """Outputs of a linear head in place of the LM head; None = the LM head."""
    num_mtp_layers: int = 0
    """Layers after the last one that predict later tokens: they are not trained, and an export has
    those of the source."""
    options: frozenset[str] = frozenset()
    """Keys of config.json that change the table of the family, and are set."""
    family: str = "LlamaForCausalLM"
    """Key of FAMILIES, which has the table of the weights."""

    @property
    def query_size(self) -> int:
        """Width of all heads' queries."""
        return self.num_attention_heads * self.head_dim

    @property
    def key_size(self) -> int:
        """Width of all heads' keys, and of their values."""
        return self.num_key_value_heads * self.head_dim

    @property
    def value_dim(self) -> int:
        """Channels of a head's value."""
        return self.value_head_dim or self.head_dim

    @property
    def value_size(self) -> int:
        """Width of what attention gives."""
        return self.num_attention_heads * self.value_dim

    @property
    def latent_key_value_size(self) -> int:
        """Width of what latent attention makes of its narrow vector: keys without positions, and
        values."""
        return self.num_attention_heads * (self.head_dim - self.rope_dim + self.value_dim)

    @property
    def has_qk_norm(self) -> bool:
        """Queries and keys are normalised head by head."""
        return "self_attention.k_layernorm.weight" in self.layer

    @property
    def has_wide_qk_norm(self) -> bool:
        """Queries and keys are normalised over all heads together."""
        return "self_attention.query_norm.weight" in self.layer

    @property
    def head_cost(self) -> float:
        """Of the head's product in layers, where every token is trained."""
        mlps = (self.experts_per_token or 1) * self.ffn_hidden_size + self.shared_ffn_size
        layer = 2 * (self.query_size + self.key_size) + 3 * mlps
        return (self.num_outputs or self.vocab_size) / layer

    @property
    def layer(self) -> Mapping[str, Rule]:
        """The parameters of a layer, by megatron's names; of one with experts, where some have
        none."""
        return FAMILIES[self.family].layer_of(self.options)

    def layer_rules(self, layer: int) -> Mapping[str, Rule]:
        """The parameters of `layer` (from 0), by megatron's names."""
        if layer not in self.dense_layers:
            return self.layer
        return FAMILIES[self.family].layer_of(self.options, is_dense=True)

    def shape_of(self, dims: tuple[str, ...]) -> tuple[int, ...]:
        """The sizes of a tensor's dimensions; "ffn+ffn" is the sum of two."""
        return tuple(sum(self.size_of(name) for name in dim.split("+")) for dim in dims)

    def size_of(self, name: str) -> int:
        """The size of a dimension that tables name."""
        if name == "1":
            return 1
        size: int = getattr(self, SIZE_FIELDS[name])
        return size

    @property
    def projections(self) -> tuple[str, ...]:
        """Matrices of a layer that adapters can stand beside, such as self_attn.q_proj."""
        return projections_of(self.layer)

    def layer_projections(self, layer: int) -> tuple[str, ...]:
        """Those of `layer` (from 0)."""
        return projections_of(self.layer_rules(layer))

    @property
    def num_vocab_matrices(self) -> int:
        """Matrices with a row for each token: the embedding, and the LM head of its own."""
        return 1 if self.tie_word_embeddings or self.num_outputs is not None else 2

    @property
    def num_head_parameters(self) -> int:
        """Of a head in place of the LM head."""
        return (self.num_outputs or 0) * self.hidden_size

    @property
    def expert_layers(self) -> list[int]:
        """The layers, counted from 0, that have experts."""
        layers = range(self.num_layers) if self.num_experts else ()
        return [layer for layer in layers if layer not in self.dense_layers]

    @property
    def routing(self) -> Routing:
        """How tokens find their experts."""
        return Routing(
            self.experts_per_token,
            self.renormalise_experts,
            self.router_scores,
            self.router_scale,
            self.router_groups,
            self.router_groups_chosen,
            self.scores_of_group,
        )

    @property
    def has_expert_bias(self) -> bool:
        """Experts have a bias that decides which are chosen, beside their scores."""
        return EXPERT_BIAS in self.layer

    def window(self, layer: int) -> int | None:
        """Tokens that a token of `layer` (from 0) attends to; None = its whole sample."""
        return None if layer in self.layers_without_window else self.sliding_window


OPTIONAL_SIZES = (
    *("num_key_value_heads", "head_dim", "max_position_embeddings", "sliding_window"),
    *("decoder_sparse_step", "shared_expert_intermediate_size", "n_shared_experts"),
)
NUM_EXPERTS = ("num_experts", "n_routed_experts", "num_local_experts")
"""What families call it."""
NUMBERS = (
    *("rms_norm_eps", "initializer_range", "query_pre_attn_scalar"),
    *("attn_logit_softcapping", "final_logit_softcapping"),
)
"""Keys of a config.json; what they mean: `architecture_from_hf`."""


def read_hf_config(folder: Path) -> dict[str, Any]:
    """Returns the config.json of a model directory, without what makes transformers run code.

    Raises:
        ValueError: there is none, or it is not a JSON object.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(
            f"model.path: {folder} has no config.json; expected a Hugging Face model directory "
            "(config.json and *.safetensors)"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from None
    except (UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(config).__name__}")
    # Keys with an underscore are transformers' own attributes, some of which name kernels to fetch.
    return {
        key: value for key, value in config.items() if not key.startswith("_") and key != "auto_map"
    }


def check_numbers(config: dict[str, Any], sizes: tuple[str, ...]) -> None:
    """Raises ValueError unless `sizes`, and what else is a number, are such in a config.json."""
    for name in (*sizes, *OPTIONAL_SIZES, *NUMBERS):
        value: Any = config.get(name)
        if value is None and name not in sizes:
            continue
        is_size = name not in NUMBERS
        is_number = isinstance(value, int if is_size else int | float)
        if isinstance(value, bool) or not is_number or value < is_size:
            found = repr(value) if name in config else "missing"
            expected = "a whole number above 0" if is_size else "a number, 0 or more"
            raise ValueError(f"config.json: {name} is {found}; expected {expected}")


def architecture_from_hf(config: dict[str, Any]) -> Architecture:
    """Translates a config.json of a supported family.

    Raises:
        ValueError: another architecture, or an option of it that we would compute wrongly.
    """
    names = config.get("architectures") or ["(missing)"]
    name = names[0] if isinstance(names, list) and isinstance(names[0], str) else repr(names)
    if name not in FAMILIES:
        reason = f" ({REFUSED[name]})" if name in REFUSED else ""
        raise ValueError(
            f"config.json: architectures is {name}{reason}; supported: {', '.join(FAMILIES)}"
        )
    family, config = FAMILIES[name], with_defaults(config, FAMILIES[name])
    for key, expected in (*family.fixed, family.activation, ("attention_dropout", 0.0)):
        # Most keys may also be null for "off".
        if (config.get(key, expected) or 0) != (expected or 0):
            raise ValueError(f"config.json: {key} is {config[key]!r}; supported: {expected!r}")
    if ("use_sliding_window", False) in family.fixed:
        # Qwen writes a window down even where there is none, or 0.
        config["sliding_window"] = None
    of_experts = (family.experts_of, "num_experts_per_tok") if family.experts_of else ()
    check_numbers(config, (*SIZES, *of_experts, *family.sizes))
    heads = config["num_attention_heads"]
    architecture = Architecture(
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        num_layers=config["num_hidden_layers"],
        num_attention_heads=heads,
        num_key_value_heads=config.get("num_key_value_heads") or heads,
        ffn_hidden_size=config[family.experts_of or "intermediate_size"],
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        max_position_embeddings=config["max_position_embeddings"],
        norm_eps=config["rms_norm_eps"],
        tie_word_embeddings=config["tie_word_embeddings"],
        initializer_range=config["initializer_range"],
        activation="gelu_tanh" if family.activation[1] == "gelu_pytorch_tanh" else "silu",
        family=name,
        options=frozenset(key for key in family.options if config.get(key)),
        **rope_from_hf(config, family),
        **windows_from_hf(config, family),
        **experts_from_hf(config, family),
        **dense_parts_from_hf(config, family),
    )
    return replace(architecture, **family.own_fields(config))


def exported_architecture(config: dict[str, Any]) -> Architecture:
    """Translates the config.json of an export, which may have the head of a stage.

    Raises:
        ValueError: as `architecture_from_hf`.
    """
    (name,) = config["architectures"]
    family = name.replace("ForSequenceClassification", "ForCausalLM")
    architecture = architecture_from_hf({**config, "architectures": [family]})
    if name == family:
        return architecture
    return replace(architecture, num_outputs=len(config["id2label"]), tie_word_embeddings=False)


def windows_from_hf(config: dict[str, Any], family: Family) -> dict[str, Any]:
    """The fields of sliding windows."""
    if config.get("sliding_window") is None:
        return {}
    types, period = None, family.window_period
    if period is not None:
        types = config.get("layer_types")
    if types is None and period is not None:
        period = config.get("sliding_window_pattern", period)
        types = [
            "sliding_attention" if (layer + 1) % period else "full_attention"
            for layer in range(config["num_hidden_layers"])
        ]
    without = [i for i, kind in enumerate(types or ()) if kind != "sliding_attention"]
    return {
        "sliding_window": config["sliding_window"],
        "layers_without_window": frozenset(without),
    }


def experts_from_hf(config: dict[str, Any], family: Family) -> dict[str, Any]:
    """The fields of `Architecture` that describe experts; {} for a dense model."""
    if family.experts_of is None:
        return {}
    num_experts = next((config[key] for key in NUM_EXPERTS if config.get(key)), None)
    if num_experts is None:
        raise ValueError("config.json: num_experts is missing, a size of the model")
    return {
        "num_experts": num_experts,
        "experts_per_token": config["num_experts_per_tok"],
        # Mixtral has no such key, and always does.
        "renormalise_experts": config.get("norm_topk_prob", True),
    }


def dense_parts_from_hf(config: dict[str, Any], family: Family) -> dict[str, Any]:
    """The fields of what every token meets in a mixture of experts: shared experts, and layers
    without experts."""
    fields: dict[str, Any] = {}
    if "mlp.shared_experts.linear_fc1.weight" in family.layer:
        width = config.get("shared_expert_intermediate_size")
        if width is None:
            width = config["n_shared_experts"] * config["moe_intermediate_size"]
        fields["shared_ffn_size"] = width
    if family.dense_mlp is None:
        return fields
    step = config.get("decoder_sparse_step", 1)
    first, named = config.get("first_k_dense_replace") or 0, config.get("mlp_only_layers") or []
    dense = frozenset(
        layer
        for layer in range(config["num_hidden_layers"])
        if layer < first or (layer + 1) % step or layer in named
    )
    if len(dense) == config["num_hidden_layers"]:
        raise ValueError(
            "config.json: no layer has experts (first_k_dense_replace, decoder_sparse_step, "
            "mlp_only_layers); expected at least one"
        )
    return fields | {"dense_layers": dense, "dense_ffn_size": config["intermediate_size"]}


def rope_from_hf(config: dict[str, Any], family: Family) -> dict[str, Any]:
    """The fields of rotary positions, from either spelling of the keys."""
    new, old = config.get("rope_parameters") or {}, config.get("rope_scaling") or {}
    rope = old or new  # as in transformers
    fields: dict[str, Any] = {}
    if "full_attention" in new:
        rope, local = new["full_attention"] | old, new.get("sliding_attention") or {}
        if rope_scaling(local, config) is not None:
            raise ValueError(f"config.json: sliding_attention of rope_parameters is {local}")
        default = config.get("rope_local_base_freq", config["rope_theta"])
        fields["local_rope_theta"] = local.get("rope_theta", default)
    elif "rope_local_base_freq" in config:
        fields["local_rope_theta"] = config["rope_local_base_freq"]
    scaling = rope_scaling(rope, config)
    # Both would reach the layers with a sliding window, which have no scaling.
    if fields and scaling and (scaling.kind == "longrope" or scaling.attention_factor != 1.0):
        raise ValueError(
            f"config.json: rotary scaling {scaling.kind} is not supported in a model whose layers "
            "with a sliding window have rotary positions of their own"
        )
    fraction = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    return fields | {
        "rope_theta": rope.get("rope_theta", config["rope_theta"]),
        "rope_scaling": scaling,
        "rotary_fraction": fraction,
        "layers_without_rope": layers_without_rope(config, family),
    }


def layers_without_rope(config: dict[str, Any], family: Family) -> frozenset[int]:
    """The numbers of layers that have no rotary positions."""
    used, period = config.get("no_rope_layers"), family.no_rope_period
    if used is None and period is not None:
        period = config.get("no_rope_layer_interval", period)
        used = [(layer + 1) % period for layer in range(config["num_hidden_layers"])]
    return frozenset(layer for layer, is_used in enumerate(used or ()) if not is_used)


def architecture_to_hf(architecture: Architecture) -> dict[str, Any]:
    """The config.json of a model that has no source directory."""
    assert architecture.rope_scaling is None, "model.shape knows no scaling"
    rope = {"rope_type": "default", "rope_theta": architecture.rope_theta}
    kind: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "mlp_bias": False,
    }
    if architecture.num_experts:
        kind = {
            "architectures": ["MixtralForCausalLM"],
            "model_type": "mixtral",
            "num_local_experts": architecture.num_experts,
            "num_experts_per_tok": architecture.experts_per_token,
            "sliding_window": None,
            "router_jitter_noise": 0.0,
        }
    return kind | {
        "vocab_size": architecture.vocab_size,
        "hidden_size": architecture.hidden_size,
        "num_hidden_layers": architecture.num_layers,
        "num_attention_heads": architecture.num_attention_heads,
        "num_key_value_heads": architecture.num_key_value_heads,
        "intermediate_size": architecture.ffn_hidden_size,
        "head_dim": architecture.head_dim,
        "max_position_embeddings": architecture.max_position_embeddings,
        "rms_norm_eps": architecture.norm_eps,
        "rope_parameters": rope,
        "rope_theta": architecture.rope_theta,
        "tie_word_embeddings": architecture.tie_word_embeddings,
        "initializer_range": architecture.initializer_range,
        "hidden_act": "silu",
    }


def architecture_from_shape(shape: ShapeConfig, vocab_size: int) -> Architecture:
    """The architecture that `model.shape` describes, with the tokenizer's vocabulary."""
    fields = shape.model_dump()
    if shape.num_experts:
        fields |= {"family": "MixtralForCausalLM", "renormalise_experts": True}
    else:
        fields["experts_per_token"] = 0
    return Architecture(vocab_size=vocab_size, head_dim=shape.head_dim, **fields)


def padded_vocab_size(vocab_size: int, tp_size: int) -> int:
    """Rows of the embedding over all tensor-parallel ranks: a multiple of 128 on each rank."""
    multiple = 128 * tp_size
    return round_up(vocab_size, multiple)

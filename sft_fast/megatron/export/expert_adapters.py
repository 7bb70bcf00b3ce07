"""The adapters of experts as PEFT names and lays them out.

PEFT takes the adapters of a layer's experts only if every expert has them, for gate, up and down:
of others it loads none, with a warning. What was not adapted is therefore written as zeros.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import ModuleList

from sft_fast.config.layout import adapted_projections
from sft_fast.config.sections import LoraConfig
from sft_fast.megatron.hf import gather_shards
from sft_fast.megatron.lora_experts import ExpertProjection, LoraExperts
from sft_fast.megatron.lora_parameters import scale_of
from sft_fast.megatron.model import unwrap
from sft_fast.megatron.parallel import Parallel
from sft_fast.models.architecture import Architecture

PEFT_PREFIX = "base_model.model."
FUSED_EXPERTS = "mlp.experts"
"""Where transformers 5 has the experts of a layer in memory, whatever its files call them."""
Pairs = dict[str, tuple[Tensor, Tensor]]
"""Name with * for the number -> A [E, r, in] and B [E, out, r] of gate, up and down, in order."""


def adapts_experts(architecture: Architecture, lora: LoraConfig) -> bool:
    """Whether `lora.targets` selects projections of experts."""
    return any("*" in name for name in adapted_projections(architecture, lora.targets))


def expert_tensors(
    model: ModuleList,
    architecture: Architecture,
    lora: LoraConfig,
    per_expert: bool,
    dtype: torch.dtype,
    parallel: Parallel,
) -> dict[str, Tensor]:
    """PEFT's name -> matrix, on the CPU, of this pipeline stage's experts.

    Every rank with the first copy of its experts calls it.

    Args:
        model: what DDP wraps.
        architecture: of the model.
        lora: section of the run.
        per_expert: a matrix for each expert, in every layer; else one for all experts of a layer,
            in the layers that have adapters.
        dtype: of the matrices.
        parallel: this rank's place.
    """
    tensors: dict[str, Tensor] = {}
    layer: Any
    for layer in (layer for chunk in map(unwrap, model) for layer in chunk.decoder.layers):
        prefix = f"model.layers.{layer.layer_number - 1}."
        experts = getattr(layer.mlp, "experts", None)
        if experts is None or not (per_expert or isinstance(experts, LoraExperts)):
            continue
        own = experts.adapted() if isinstance(experts, LoraExperts) else []
        found = {item.hf_name: whole_pair(experts, item, parallel) for item in own}
        pairs = {
            name: found.get(name) or zero_pair(shape, architecture.num_experts, lora.rank)
            for name, shape in expert_shapes(architecture, prefix)
        }
        named = single_pairs(pairs) if per_expert else fused_pairs(prefix, pairs)
        for name, value in named:
            tensors[PEFT_PREFIX + name] = value.to("cpu", dtype, copy=True).contiguous()
    return tensors


def expert_shapes(architecture: Architecture, prefix: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yields (name, (out, in)) of gate, up and down."""
    for rule in architecture.layer.values():
        if rule.is_expert:
            for name, dims in rule.sources.items():
                yield prefix + name.removesuffix(".weight"), architecture.shape_of(dims)


def zero_pair(shape: tuple[int, ...], num_experts: int, rank: int) -> tuple[Tensor, Tensor]:
    """A [E, r, in] and B [E, out, r] that add nothing."""
    return torch.zeros(num_experts, rank, shape[1]), torch.zeros(num_experts, shape[0], rank)


def whole_pair(
    experts: LoraExperts, projection: ExpertProjection, parallel: Parallel
) -> tuple[Tensor, Tensor]:
    """A [E, r, in] and B [E, out, r] of all experts of the layer."""
    pair = []
    for letter, parameter in experts.parameters_of(projection).items():
        value, dim = parameter.detach(), projection.split_dims[letter]
        if dim is not None:
            value = torch.cat(gather_shards(value, parallel, is_expert=True), dim)
        parts = [torch.empty_like(value) for _ in range(parallel.ep_size)]
        dist.all_gather(parts, value.contiguous(), group=parallel.ep_group)
        pair.append(torch.cat(parts))
    return pair[0], pair[1]


def single_pairs(pairs: Pairs) -> Iterator[tuple[str, Tensor]]:
    """Yields (name, A [r, in] or B [out, r]) for each expert."""
    for name, (a, b) in pairs.items():
        for number in range(len(a)):
            own = name.replace("*", str(number))
            yield f"{own}.lora_A.weight", a[number]
            yield f"{own}.lora_B.weight", b[number]


def fused_pairs(prefix: str, pairs: Pairs) -> Iterator[tuple[str, Tensor]]:
    """Yields (name, A [E r, in] or B [out, r E]) of gate_up, whose rank is 2 r, and of down.

    An expert's rows of A lie together, its columns of B do not. PEFT wraps the experts twice: the
    inner layer has gate_up.
    """
    (a_gate, b_gate), (a_up, b_up), down = pairs.values()
    rank = b_gate.shape[2]
    b = torch.cat(
        [
            torch.nn.functional.pad(b_gate, (0, rank)),
            torch.nn.functional.pad(b_up, (rank, 0)),
        ],
        dim=1,
    )
    gate_up = torch.cat([a_gate, a_up], dim=1), b
    for layer, (a, b) in {f"{FUSED_EXPERTS}.base_layer": gate_up, FUSED_EXPERTS: down}.items():
        yield f"{prefix}{layer}.lora_A.weight", a.flatten(0, 1)
        yield f"{prefix}{layer}.lora_B.weight", b.permute(1, 2, 0).flatten(1)


def expert_options(
    architecture: Architecture, lora: LoraConfig, per_expert: bool
) -> dict[str, Any]:
    """What adapter_config.json says of experts, which PEFT loads without dropout only.

    The scale is written as a plain alpha: where PEFT fuses gate and up it doubles rank and alpha,
    which would change the scale of rsLoRA.
    """
    alpha = scale_of(lora) * lora.rank
    options: dict[str, Any] = {"lora_alpha": alpha, "use_rslora": False, "lora_dropout": 0.0}
    if per_expert:
        return options
    targets = adapted_projections(architecture, lora.targets)
    layers = sorted({int(name.split(".")[2]) for name in targets if "*" in name})
    names = [f"model.layers.{layer}.{FUSED_EXPERTS}" for layer in layers]
    pattern = r".*\.gate_up_proj"
    return options | {
        "target_parameters": [
            f"{name}.{matrix}" for name in names for matrix in ("gate_up_proj", "down_proj")
        ],
        "rank_pattern": {pattern: 2 * lora.rank},
        "alpha_pattern": {pattern: 2 * alpha},
    }

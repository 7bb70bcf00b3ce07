"""LoRA adapters as the directory that PEFT loads."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import ModuleList

from sft_fast.config.sections import ExportConfig, LoraConfig, ModelConfig
from sft_fast.files import write_json
from sft_fast.megatron.exchange import StoreExchange
from sft_fast.megatron.export.expert_adapters import (
    FUSED_EXPERTS,
    PEFT_PREFIX,
    adapts_experts,
    expert_options,
    expert_tensors,
)
from sft_fast.megatron.export.model import EXPORT_TIMEOUT_S
from sft_fast.megatron.export.tokenizer import export_tokenizer
from sft_fast.megatron.export.weights import save_tensors
from sft_fast.megatron.hf import gather_shards, merge_rows
from sft_fast.megatron.lora import LoraLinear
from sft_fast.megatron.model import DTYPES, unwrap
from sft_fast.megatron.parallel import Parallel
from sft_fast.models.architecture import Architecture
from sft_fast.models.families import OUTPUT_HEAD
from sft_fast.runtime.manifest import staged_directory

PEFT_NAMES = {"a": "lora_A.weight", "b": "lora_B.weight", "m": "lora_magnitude_vector"}


def export_adapter(
    model: ModuleList,
    folder: Path,
    tokenizer: Any,
    architecture: Architecture,
    model_config: ModelConfig,
    lora: LoraConfig,
    export: ExportConfig,
    parallel: Parallel,
) -> None:
    """Writes adapter_config.json, adapter_model.safetensors and the tokenizer; every rank calls it.

    All that was trained is in there, so nothing has to be found in the base's directory again: new
    embeddings, which PEFT leaves out where that is gone, are never trained beside adapters.

    `folder` is replaced when it exists, after everything is written; see manifest.py.
    """
    dtype, per_expert = DTYPES[export.dtype or model_config.dtype], export.adapter_per_expert
    has_experts, tensors = adapts_experts(architecture, lora), {}
    with staged_directory(folder, StoreExchange("export/adapter", EXPORT_TIMEOUT_S)) as stage:
        if has_experts and parallel.edp_rank == 0:
            tensors = expert_tensors(model, architecture, lora, per_expert, dtype, parallel)
        if parallel.is_first_replica:
            tensors |= whole_adapters(model, architecture, dtype, parallel)
            tensors = gather_stages(tensors, parallel)
            if parallel.is_main:
                config = peft_config(list(tensors), model_config, lora)
                if has_experts:
                    config |= expert_options(architecture, lora, per_expert)
                save_tensors(tensors, stage.path / "adapter_model.safetensors")
                export_tokenizer(tokenizer, stage.path)
                write_json(stage.path / "adapter_config.json", config)


def whole_adapters(
    model: ModuleList, architecture: Architecture, dtype: torch.dtype, parallel: Parallel
) -> dict[str, Tensor]:
    """PEFT's name -> [rank, in], [out, rank] or [out], on the CPU, of this pipeline stage's linear
    layers; and the head of a stage [num_outputs, hidden]."""
    tensors = {}
    for chunk in map(unwrap, model):
        if chunk.has_stage_head:
            (name,) = OUTPUT_HEAD.sources
            weight = chunk.output_layer.weight.detach()
            tensors[PEFT_PREFIX + name] = weight.to("cpu", dtype, copy=True)
    for module in model.modules():
        if not isinstance(module, LoraLinear):
            continue
        for projection in module.adapted():
            for letter, parameter in module.parameters_of(projection).items():
                value, dim = parameter.detach(), module.split_dims[letter]
                shards = [value] if dim is None else gather_shards(value, parallel)
                if dim == 0 and projection.fused is not None:
                    value = merge_rows(projection.fused, shards, architecture)
                elif dim is not None:
                    value = torch.cat(shards, dim)
                name = f"{PEFT_PREFIX}{projection.hf_name}.{PEFT_NAMES[letter]}"
                tensors[name] = value.to("cpu", dtype, copy=True).contiguous()
    return tensors


def gather_stages(tensors: dict[str, Tensor], parallel: Parallel) -> dict[str, Tensor]:
    """The tensors, of any shape, of all pipeline stages, sorted by name."""
    stages: list[Any] = [None] * parallel.pp_size
    dist.all_gather_object(stages, tensors, group=parallel.pp_group)
    merged = {name: tensor for stage in stages for name, tensor in stage.items()}
    return dict(sorted(merged.items()))


def peft_config(names: list[str], model: ModelConfig, lora: LoraConfig) -> dict[str, Any]:
    """adapter_config.json; it names every adapted linear layer in full, so no other can match."""
    paths = [name.removeprefix(PEFT_PREFIX) for name in names]
    whole = [path.removesuffix(".weight") for path in paths if ".lora_" not in path]
    modules = {path.split(".lora_")[0] for path in paths if ".lora_" in path}
    return {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if whole else "CAUSAL_LM",
        "base_model_name_or_path": model.path,
        "revision": model.revision,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.rslora,
        "use_dora": lora.dora,
        "target_modules": sorted({target_of(module) for module in modules} - {""}),
        "fan_in_fan_out": False,
        "bias": "none",
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": whole or None,
    }


def target_of(module: str) -> str:
    """What selects an adapted module; one of an expert goes by its last part, as they all have
    adapters; "" for experts as one, which are no linear layer."""
    container, _, last = module.rpartition(".")
    if container.rpartition(".")[2].isdecimal() and ".experts." in container:
        return last
    is_fused = module.removesuffix(".base_layer").endswith(f".{FUSED_EXPERTS}")
    return "" if is_fused else module

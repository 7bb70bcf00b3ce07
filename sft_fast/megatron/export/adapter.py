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
from sft_fast.megatron.export.model import EXPORT_TIMEOUT_S
from sft_fast.megatron.export.tokenizer import export_tokenizer
from sft_fast.megatron.export.weights import save_tensors
from sft_fast.megatron.hf import gather_shards
from sft_fast.megatron.lora import LoraLinear
from sft_fast.megatron.model import DTYPES, unwrap
from sft_fast.megatron.parallel import Parallel
from sft_fast.models.families import OUTPUT_HEAD
from sft_fast.runtime.manifest import staged_directory

PEFT_NAMES = {"a": "lora_A.weight", "b": "lora_B.weight", "m": "lora_magnitude_vector"}


def export_adapter(
    model: ModuleList,
    folder: Path,
    tokenizer: Any,
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
    dtype = DTYPES[export.dtype or model_config.dtype]
    with staged_directory(folder, StoreExchange("export/adapter", EXPORT_TIMEOUT_S)) as stage:
        if parallel.is_first_replica:
            tensors = gather_stages(whole_adapters(model, dtype, parallel), parallel)
            if parallel.is_main:
                save_tensors(tensors, stage.path / "adapter_model.safetensors")
                export_tokenizer(tokenizer, stage.path)
                write_json(
                    stage.path / "adapter_config.json",
                    peft_config(list(tensors), model_config, lora),
                )


def whole_adapters(model: ModuleList, dtype: torch.dtype, parallel: Parallel) -> dict[str, Tensor]:
    """PEFT's name -> [rank, in], [out, rank] or [out], on the CPU, of this pipeline stage; and the
    head of a stage [num_outputs, hidden]."""
    tensors = {}
    for chunk in map(unwrap, model):
        if chunk.has_stage_head:
            (name,) = OUTPUT_HEAD.sources
            weight = chunk.output_layer.weight.detach()
            tensors[f"base_model.model.{name}"] = weight.to("cpu", dtype, copy=True)
    for module in model.modules():
        if not isinstance(module, LoraLinear):
            continue
        for projection in module.adapted():
            for letter, parameter in module.parameters_of(projection).items():
                value, dim = parameter.detach(), module.split_dims[letter]
                if dim is not None:
                    value = torch.cat(gather_shards(value, parallel), dim)
                name = f"base_model.model.{projection.hf_name}.{PEFT_NAMES[letter]}"
                tensors[name] = value.to("cpu", dtype, copy=True).contiguous()
    return tensors


def gather_stages(tensors: dict[str, Tensor], parallel: Parallel) -> dict[str, Tensor]:
    """The tensors, of any shape, of all pipeline stages, sorted by name."""
    stages: list[Any] = [None] * parallel.pp_size
    dist.all_gather_object(stages, tensors, group=parallel.pp_group)
    merged = {name: tensor for stage in stages for name, tensor in stage.items()}
    return dict(sorted(merged.items()))


def peft_config(names: list[str], model: ModelConfig, lora: LoraConfig) -> dict[str, Any]:
    """adapter_config.json; it names every adapted projection in full, so no other can match."""
    paths = [name.removeprefix("base_model.model.") for name in names]
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
        "target_modules": sorted(modules),
        "fan_in_fan_out": False,
        "bias": "none",
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": whole or None,
    }

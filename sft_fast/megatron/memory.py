"""What trades memory for time: recomputation, offloading, gradients summed by the GEMM.

Options of megatron-core, each used where this machine and the installed libraries can do it and
refused with the reason where they cannot.
"""

import importlib.util
from typing import Any

from sft_fast.config.sections import OWN_PARTS, LoraConfig, ModelConfig, OptimConfig
from sft_fast.megatron.parallel import Parallel

ENGINE_MODULE = "transformer_engine"


def is_installed(module: str) -> bool:
    """Whether a module can be imported."""
    return importlib.util.find_spec(module) is not None


def recompute_options(model: ModelConfig) -> dict[str, Any]:
    """TransformerConfig arguments for `model.recompute`."""
    kind = model.recompute
    if kind == "none":
        return {}
    if kind == "selective":
        modules = [module for module in model.recompute_modules if module not in OWN_PARTS]
        if not modules:
            return {}
        return {"recompute_granularity": "selective", "recompute_modules": modules}
    method, layers = "uniform", 1
    if kind == "block":
        assert model.recompute_layers is not None, "the config demands it"
        method, layers = "block", model.recompute_layers
    return {
        "recompute_granularity": "full",
        "recompute_method": method,
        "recompute_num_layers": layers,
    }


def recomputed_parts(model: ModelConfig) -> list[str]:
    """Those of OWN_PARTS that this run computes again."""
    if model.recompute != "selective":
        return []
    return [module for module in model.recompute_modules if module in OWN_PARTS]


def fusion_obstacle(lora: LoraConfig, parallel: Parallel) -> str:
    """Why weight gradients are not added to the fp32 buffers by the GEMM itself; "" = they are."""
    if parallel.device.type != "cuda":
        return "no GPU"
    if lora.rank > 0:
        return "LoRA freezes the large weights"
    return ""


def memory_options(model: ModelConfig, lora: LoraConfig, parallel: Parallel) -> dict[str, Any]:
    """TransformerConfig arguments.

    Raises:
        ValueError: an option that this machine cannot do.
    """
    options = recompute_options(model)
    options["gradient_accumulation_fusion"] = not fusion_obstacle(lora, parallel)
    layers = model.offload_layers
    if layers > 0:
        require("model.offload_layers", layers, parallel)
        options |= {
            "cpu_offloading": True,
            "cpu_offloading_num_layers": layers,
            "cpu_offloading_activations": True,
            "cpu_offloading_weights": False,
        }
    return options


def optimizer_offload_options(optim: OptimConfig, parallel: Parallel) -> dict[str, Any]:
    """OptimizerConfig arguments.

    Raises:
        ValueError: there is no GPU, or no Transformer Engine.
    """
    share = optim.offload_fraction
    if share == 0.0:
        return {}
    require("optim.offload_fraction", share, parallel)
    return {
        "optimizer_cpu_offload": True,
        "optimizer_offload_fraction": share,
        "use_precision_aware_optimizer": True,
        "overlap_cpu_optimizer_d2h_h2d": True,
    }


def require(key: str, value: object, parallel: Parallel) -> None:
    """Raises ValueError where there is no GPU, or no Transformer Engine."""
    if parallel.device.type != "cuda":
        raise ValueError(
            f"{key} is {value}, but this run is on a CPU, where there is nothing to take away from "
            "a GPU; remove it"
        )
    if not is_installed(ENGINE_MODULE):
        raise ValueError(
            f"{key} is {value}, which megatron-core does through Transformer Engine, and "
            f"{ENGINE_MODULE} is not installed; install it, or remove {key}"
        )


def describe_memory(model: ModelConfig, lora: LoraConfig, parallel: Parallel) -> str:
    """One line for the log."""
    obstacle = fusion_obstacle(lora, parallel)
    fusion = f"off ({obstacle})" if obstacle else "on"
    return f"recompute {model.recompute}, gradient accumulation fusion {fusion}"

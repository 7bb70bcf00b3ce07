"""What a checkpoint holds of a run: sharded weights, optimizer and schedule."""

from typing import Any

from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch.nn import Module, ModuleList

from sft_fast.megatron.checkpoint.optimizer_shards import SHARDING, state_to_save
from sft_fast.megatron.lora import has_adapters
from sft_fast.megatron.lora_parameters import is_adapter
from sft_fast.megatron.model import unwrap
from sft_fast.models.families import HEAD


def named_chunks(model: ModuleList) -> list[tuple[str, Module]]:
    """The chunks of a rank's model, as a checkpoint calls them."""
    return [(f"chunk{number}", chunk) for number, chunk in enumerate(model)]


def model_weights(model: ModuleList) -> dict[str, Any]:
    """The weights of each chunk, sharded for dist_checkpointing; with LoRA, those it trains."""
    weights = {}
    for chunk_name, chunk in named_chunks(model):
        tensors = unwrap(chunk).sharded_state_dict(metadata=dict(SHARDING))
        if has_adapters(model):
            trained = (HEAD,) if unwrap(chunk).has_stage_head else ()
            tensors = {n: tensor for n, tensor in tensors.items() if is_adapter(n) or n in trained}
        weights[chunk_name] = tensors
    return weights


def sharded_state(
    model: ModuleList, optimizer: MegatronOptimizer, schedule: OptimizerParamScheduler
) -> dict[str, Any]:
    """What this rank saves, in dist_checkpointing's sharded form; its tensors stay where they are.

    With LoRA it holds what that trains and its optimizer state, no base weights.
    """
    state = state_to_save(model_weights(model), optimizer)
    return {**state, "lr_schedule": schedule.state_dict()}
